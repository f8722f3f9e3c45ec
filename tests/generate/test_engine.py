"""Decoding against naive recomputation and transformers; the text it is put together to."""

import gzip
import json
from collections import Counter
from itertools import chain

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from miaobi.corpus.tokenizer import SPECIALS, Tokenizer
from miaobi.errors import UserError
from miaobi.generate.chat import preview
from miaobi.generate.config import SampleConfig
from miaobi.generate.engine import LanguageModel, load, read_prompt
from miaobi.generate.slots import Slots, Stream
from miaobi.model.config import ModelConfig
from miaobi.model.generation import end_ids
from miaobi.model.transformer import Transformer

CHARACTERS = "皇马赢得比赛的冠军和转会球迷们期待国家队。，"
TOKENIZER = Tokenizer.train_char(Counter(CHARACTERS))
V, BLOCK = TOKENIZER.vocab_size, 16


def random_lm(family: str = "gpt2", seed: int = 0, **changes: object) -> LanguageModel:
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": BLOCK, "vocab_size": V} | changes
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(family=family, **sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.2)
    return LanguageModel(model, TOKENIZER)


@pytest.fixture(params=["gpt2", "qwen3"], scope="module")
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return random_lm(request.param)


@torch.no_grad()
def naive_greedy(lm: LanguageModel, prompt_ids: list[int], n: int) -> list[int]:
    """No cache: the whole window again at every token; a full window restarts from its last half."""
    history, window = list(prompt_ids), list(prompt_ids)[-BLOCK:]
    for _ in range(n):
        token = int(lm.model(torch.tensor([window]))[0, -1].argmax())
        history.append(token)
        window = [*window, token] if len(window) < BLOCK else history[-BLOCK // 2 :]
    return history[len(prompt_ids) :]


@pytest.mark.parametrize("prompt", ["皇", "皇马赢得", "国家队" * 5, "国家队" * 6, CHARACTERS * 3])
def test_greedy_tokens_are_those_of_naive_recomputation_past_the_block(lm, prompt):
    ids = TOKENIZER.encode(prompt)
    cfg = SampleConfig(temperature=0, max_new_tokens=3 * BLOCK)
    assert list(lm.tokens(prompt, cfg)) == naive_greedy(lm, ids, 3 * BLOCK)


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_text_is_what_transformers_generates(lm, penalty, tmp_path):
    from miaobi.model.checkpoint import save_model

    save_model(tmp_path, lm.model, TOKENIZER, ())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([TOKENIZER.encode("皇马赢得")])
    out = theirs.generate(ids, max_new_tokens=BLOCK - 4, do_sample=False, repetition_penalty=penalty, pad_token_id=0,
                          eos_token_id=None)  # fmt: skip
    cfg = SampleConfig(temperature=0, max_new_tokens=BLOCK - 4, repetition_penalty=penalty)
    assert list(lm.tokens("皇马赢得", cfg)) == out[0, 4:].tolist()


def test_logits_are_those_of_the_model(lm):
    ids = torch.tensor([TOKENIZER.encode("皇马赢得比赛")])
    assert lm.logits(ids).shape == (1, 6, V)
    with torch.no_grad():
        torch.testing.assert_close(lm.logits(ids), lm.model(ids))


def test_the_same_seed_gives_the_same_text_and_another_seed_another(lm):
    texts = [[c.text for c in lm.generate("皇马", num_samples=4, max_new_tokens=30, seed=s)] for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 1, "the streams of one batch differ"


def test_counts_and_reasons(lm):
    for completion in lm.generate("皇马", num_samples=3, max_new_tokens=20, seed=5):
        assert completion.text.startswith("皇马")
        assert completion.finish_reason in ("length", "stop")
        assert completion.tokens == 20 or completion.finish_reason == "stop"


@pytest.mark.parametrize("prompt", ["", "😀🐉", "龘𡃁没见过", "<sep><|im_end|><0x41>", "\n", "皇" * 100])
def test_any_prompt_simply_works(lm, prompt):
    completion = lm.generate(prompt, num_samples=1, max_new_tokens=4)[0]
    assert completion.text.startswith(prompt)
    assert completion.tokens >= 1


# --- putting text together ---------------------------------------------------------------------------------------


class Scripted(LanguageModel):
    """Writes given ids, whatever the prompt."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__(random_lm().model, TOKENIZER)
        self.ids = ids

    def slots(self, size=1):
        return Script(self.ids, size)


class Script:
    """Slots whose streams all get the same ids."""

    def __init__(self, ids: list[int], size: int) -> None:
        self.ids, self.size, self.running = ids, size, []

    @property
    def free(self) -> int:
        return self.size - len(self.running)

    def add(self, stream: Stream) -> None:
        stream.left = min(stream.left, len(self.ids))
        self.running.append((stream, iter(self.ids)))

    def end(self, stream: Stream) -> None:
        self.running = [pair for pair in self.running if pair[0] is not stream]

    write = Slots.write

    def advance(self) -> list[tuple[Stream, int]]:
        drawn = [(stream, next(ids)) for stream, ids in self.running]
        for stream, _ in drawn:
            stream.left -= 1
        return drawn


LETTERS = [TOKENIZER.encode(c)[0] for c in "皇马赢。"]
EMOJI = TOKENIZER.encode("😀")
PIECES = [[i] for i in (*LETTERS, *EMOJI, *TOKENIZER.encode("é"), TOKENIZER.token_to_id("<0x41>"), TOKENIZER.eot_id)]
SAID = st.lists(st.sampled_from([*PIECES, EMOJI]), min_size=1, max_size=14).map(lambda parts: list(chain(*parts)))
STOPS = st.lists(st.sampled_from(["马", "皇马", "马赢。", "😀", "A", "é皇", "。"]), max_size=2).map(tuple)
TEXTS = st.text("皇马赢。😀éA", min_size=1, max_size=10)


def joined_stream(lm: LanguageModel, stop: tuple[str, ...]) -> str:
    return "".join(lm.stream("国", stop=stop, max_new_tokens=99))


@given(SAID, STOPS)
def test_streamed_pieces_join_to_the_generated_text_whatever_the_tokens(ids, stop):
    lm = Scripted(ids)
    assert "国" + joined_stream(lm, stop) == lm.generate("国", stop=stop, num_samples=1, max_new_tokens=99)[0].text


@given(TEXTS, st.sampled_from(["马", "皇马", "马赢。", "😀", "é皇", "A马", "没有"]))
def test_text_ends_before_the_stop_string(text, stop):
    lm = Scripted(TOKENIZER.encode(text))
    for completion in lm.generate("国", stop=(stop,), num_samples=2, max_new_tokens=99):
        assert completion.text == "国" + text.split(stop)[0]
        assert completion.finish_reason == ("stop" if stop in text else "length")
    assert joined_stream(lm, (stop,)) == text.split(stop)[0]


@given(TEXTS, st.sampled_from(["皇马", "马赢", "😀é"]))
def test_no_streamed_piece_is_taken_back(text, stop):
    lm, shown = Scripted(TOKENIZER.encode(text)), ""
    for piece in lm.stream("国", stop=(stop,), max_new_tokens=99):
        assert piece
        assert "\ufffd" not in piece
        shown += piece
        assert text.startswith(shown)
        assert stop not in shown


@pytest.mark.parametrize("stop", ["赢。", ["赢。"], ["没有", "赢。"], iter(["赢。"])])
def test_stop_strings_in_python_are_one_text_or_any_row_of_texts(stop):
    cfg = SampleConfig(stop=stop, num_samples=1, max_new_tokens=9)
    completion = Scripted(TOKENIZER.encode("皇赢马赢。国")).generate("国", cfg)[0]
    assert (completion.text, completion.finish_reason) == ("国皇赢马", "stop")
    assert {cfg: 1}[cfg], "settings are looked up"


def test_a_stop_string_at_the_very_beginning_leaves_the_prompt_alone():
    completion = Scripted(TOKENIZER.encode("马赢。")).generate("皇", stop=("马",), num_samples=1)[0]
    assert (completion.text, completion.finish_reason) == ("皇", "stop")


def test_a_stop_string_in_the_prompt_does_not_stop():
    completion = Scripted(TOKENIZER.encode("赢皇")).generate("马", stop=("马",), num_samples=1, max_new_tokens=9)[0]
    assert (completion.text, completion.finish_reason) == ("马赢皇", "length")


def test_the_end_of_text_ends_a_sample_and_is_not_shown():
    lm = Scripted([*LETTERS[:2], TOKENIZER.eot_id, *LETTERS])
    completion = lm.generate("国", num_samples=1, max_new_tokens=99)[0]
    assert (completion.text, completion.tokens, completion.finish_reason) == ("国皇马", 3, "stop")
    assert joined_stream(lm, ()) == "皇马"


def test_a_character_cut_by_the_length_limit_is_marked_not_lost():
    lm = Scripted(TOKENIZER.encode("皇😀"))
    assert lm.generate("国", num_samples=1, max_new_tokens=3)[0].text.startswith("国皇\ufffd")
    assert list(lm.stream("国", max_new_tokens=5)) == ["皇", "😀"]


# --- models by name ----------------------------------------------------------------------------------------------


def test_python_users_load_a_run_and_write(trained):
    import miaobi

    lm = miaobi.load(str(trained("qwen3", "char")), device="cpu", dtype="float32")
    text = "皇马赢得😀"
    assert lm.tokenizer.decode(lm.tokenizer.encode(text)) == text
    assert lm.logits(torch.tensor([lm.tokenizer.encode(text)])).dtype == torch.float32
    whole = lm.generate("皇马", num_samples=1, max_new_tokens=40, seed=3)[0].text
    assert "皇马" + "".join(lm.stream("皇马", max_new_tokens=40, seed=3)) == whole


def test_a_missing_model_is_an_error_for_the_user(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        load(tmp_path / "nothing", "cpu")


def test_a_preview_is_always_the_same_and_leaves_torchs_randomness_alone(lm):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = preview(lm.model, TOKENIZER, "皇马", 8, (), False)
    assert torch.equal(torch.rand(2), expected), "a sample printed in training would change the dropout after it"
    assert first == preview(lm.model, TOKENIZER, "皇马", 8, (), False)


def test_a_prompt_can_come_from_a_file_of_any_encoding(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "gb18030", "utf-16"):
        (tmp_path / "prompt.txt").write_bytes(("皇马赢得比赛，" * 9).encode(encoding))
        assert read_prompt(f"FILE:{tmp_path / 'prompt.txt'}") == "皇马赢得比赛，" * 9
    assert read_prompt("FILES: 不是文件") == "FILES: 不是文件"
    with pytest.raises(UserError, match="no such file"):
        read_prompt("FILE:nowhere.txt")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.md", "a.jsonl.gz", "prompt"])
def test_a_prompt_file_is_taken_as_it_is_whatever_its_name(tmp_path, name):
    text = 'text,label\n"皇马",1\n\n{"text": "曼联"}\n'
    data = text.encode("utf-16")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read_prompt(f"FILE:{tmp_path / name}") == text


# --- ends and control tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [(), (TOKENIZER.eot_id,), (TOKENIZER.sep_id, TOKENIZER.pad_id)])
def test_control_tokens_that_end_nothing_are_never_drawn(ends):
    """A model of plain text (--split=tail) never saw one, and would write `<|endoftext|>` as if it were text."""
    model = random_lm().model
    control = {TOKENIZER.token_to_id(name) for name in SPECIALS}
    cfg = SampleConfig(max_new_tokens=1280, temperature=3.0, top_k=0)
    lm = LanguageModel(model, TOKENIZER, ends)
    assert control.intersection(lm.tokens("皇马", cfg)) == set(ends)
    everything = LanguageModel(model, TOKENIZER, tuple(control))
    assert control <= set(everything.tokens("皇马", cfg))


def test_a_foreign_model_may_draw_what_it_likes(tmp_path):
    foreign = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "[CLS]": 1}, [], unk_token="[CLS]")))
    foreign.backend.add_special_tokens(["[CLS]"])
    assert LanguageModel(random_lm().model, foreign).barred == ()


def test_each_of_several_ends_ends_a_text():
    ends = (TOKENIZER.sep_id, TOKENIZER.pad_id)
    for end in ends:
        lm = Scripted([LETTERS[0], end, LETTERS[1]])
        lm.end_ids = ends
        assert joined_stream(lm, ()) == lm.generate("国", num_samples=1)[0].text[1:] == "皇"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(None, {"eos_token_id": 5}, (5,)), ({"eos_token_id": [7, 3]}, {"eos_token_id": 5}, (7, 3)), (None, {}, ()),
     ({"eos_token_id": None}, {"eos_token_id": None}, ()), ({}, {"eos_token_id": [1]}, (1,))],
)  # fmt: skip
def test_what_ends_a_text_is_read_from_the_model_directory(tmp_path, generation, config, expected):
    for name, content in (("generation_config", generation), ("config", config)):
        if content is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert end_ids(tmp_path) == expected


def test_loading_a_run_brings_its_ends(trained, prepared, train, tmp_path):
    run = trained("gpt2", "char")
    assert load(run, "cpu").end_ids == (load(run, "cpu").tokenizer.eot_id,)
    train(data=prepared(split="tail"), out_dir=tmp_path / "tail", max_iters=1)
    assert load(tmp_path / "tail", "cpu").end_ids == ()


@pytest.mark.parametrize("named", [None, (50256,), (-1,), (50256, 50257)])
def test_a_foreign_model_that_names_no_end_it_has_ends_as_its_tokenizer_does(tmp_path, named, capsys):
    """BERT's vocabulary under a GPT-2, as the hub has it: 21,128 tokens and an end of 50256, or none at all."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(CHARACTERS)]
    size = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": BLOCK, "vocab_size": len(words)}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    for name in ("config", "generation_config"):
        config = json.loads((tmp_path / f"{name}.json").read_text())
        config["eos_token_id"] = named if named is None else list(named)
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    lm = load(tmp_path, "cpu")
    assert lm.end_ids == (words.index("[SEP]"),)
    assert len(lm.generate("", num_samples=1, max_new_tokens=3)) == 1, "an empty prompt begins at an end that exists"
    said = capsys.readouterr().err
    assert bool(named) == ("eos_token_id has" in said)

"""small-gpt's checkpoints: the same logits, the same vocabulary, and nothing executed."""

import json
import math
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from originals import SMALL_GPT, Original, chat_text, naive_vocabulary

from miaobi.convert import small_gpt as converter
from miaobi.convert.small_gpt import convert, converted, vocabulary
from miaobi.corpus import blocks
from miaobi.corpus.template import ChatTemplate
from miaobi.errors import UserError
from miaobi.generate.engine import load
from miaobi.model.checkpoint import load_model

ODD_TEXT = "你好\n\n吃了吗😀🐉👨‍👩‍👧 𠮷野家 龘 <sep><pad><unk><0x41>é\u0000\tx  "


@pytest.fixture(scope="module")
def model_dir(small_gpt, tmp_path_factory) -> Path:
    """The trained checkpoint, converted."""
    out = tmp_path_factory.mktemp("converted") / "model"
    convert(small_gpt.path, str(small_gpt.corpus), out)
    return out


@pytest.fixture
def corpus_of(tmp_path):
    """A corpus with exactly so many characters of its own."""

    def write(characters: int) -> Path:
        path = tmp_path / "train.txt"
        path.write_text("".join(chr(0x4E00 + i) for i in range(characters)), encoding="utf-8")
        return path

    return write


# --- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_logits_are_the_originals(saved, corpus_of, tmp_path, bias, prefix):
    original = Original.random(SMALL_GPT, bias, vocab_size=45)
    path = saved(original.small_gpt(prefix, masks=prefix != "module."), "cpt.pth")
    result = convert(path, str(corpus_of(40)), tmp_path / "out")
    assert (result["spare_rows"], result["characters"], result["step"]) == (45 - 43, 40, 4000)
    ids = torch.randint(45, (20,), generator=torch.Generator().manual_seed(1))
    theirs = original.logits(ids)
    assert theirs.std() > 0.5, "logits that are all alike would prove nothing"
    ours = load(tmp_path / "out", device="cpu", dtype="float32").logits(ids[None])[0]
    torch.testing.assert_close(ours[:, :45], theirs, atol=1e-4, rtol=0)
    hub = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(hub).__name__ == "GPT2LMHeadModel"
    with torch.no_grad():
        torch.testing.assert_close(hub(ids[None]).logits[0, :, :45], theirs, atol=1e-4, rtol=0)


def test_the_greedy_continuation_is_the_originals(small_gpt, model_dir):
    lm = load(model_dir, device="cpu", dtype="float32")
    for opening in ("你好", "今天天气怎么样"):
        prompt = [small_gpt.vocabulary.index(c) for c in opening] + [1]
        expected = small_gpt.original.greedy(prompt, 12)
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(lm.logits(torch.tensor([ids]))[0, -1].argmax()))
        assert ids == expected
        assert len(set(expected[len(prompt) :])) > 3, "a model that only says one thing would prove nothing"
        hub = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
        written = hub.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0].tolist()
        reply = next(i for i in range(len(prompt), len(expected)) if expected[i] in (1, 2)) + 1
        assert written == expected[:reply], "generate stops at the end of the turn"


def test_rows_stay_one_to_one_and_bytes_begin_as_the_unknown(small_gpt, model_dir):
    rows = small_gpt.original.vocab_size
    model, tokenizer = load_model(model_dir)
    theirs = small_gpt.original.state["transformer.wte.weight"]
    assert model.cfg.vocab_size == tokenizer.vocab_size == rows + 256
    assert torch.equal(model.wte.weight[:rows], theirs)
    assert torch.equal(model.wte.weight[rows : rows + 256], theirs[:1].expand(256, -1))
    assert not model.wte.weight[rows + 256 :].any()


# --- the vocabulary ------------------------------------------------------------------------------------------------


@example(text="<<a\x0b\x0b")  # UTF-16 would explain such bytes better if \x0b was too unlikely
@given(text=st.text(st.sampled_from("你好吗a<> \n\n\n\r\u2028\x0b\ufeff\u3000é😀𠮷"), min_size=1, max_size=80))
def test_the_vocabulary_is_small_gpts(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("corpus") / "train.txt"
    path.write_bytes(("好" + text).encode("utf-8"))
    with open(path, encoding="utf-8") as file:  # universal newlines, as small-gpt opens it
        expected = naive_vocabulary(file.read())
    assert vocabulary(path)[0] == expected


@pytest.mark.parametrize("name", ["train.txt", "train.csv", "corpus"])
def test_the_vocabulary_of_a_file_in_many_blocks(tmp_path, monkeypatch, name):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    text = "\ufeff" + chat_text(300).replace("\n", "\r\n") + "，".join(chr(0x4E00 + i * 7) for i in range(500))
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8"))
    with open(path, encoding="utf-8") as file:
        expected = naive_vocabulary(file.read())
    assert "\ufeff" in expected
    assert vocabulary(path)[0] == expected


@pytest.mark.parametrize("encoding", ["gb18030", "big5", "utf-16"])
def test_the_vocabulary_is_the_same_in_another_encoding(tmp_path, encoding):
    text = "今天天氣很好，我們出去走走吧。\n好的，一起去公園看花。\n\n你吃飯了沒有？\n吃過了，謝謝。\n" * 5
    path = tmp_path / "train.txt"
    path.write_bytes(text.encode(encoding))
    assert vocabulary(path)[0] == naive_vocabulary(text)


# --- the tokenizer -------------------------------------------------------------------------------------------------


@given(text=st.one_of(st.text(max_size=200), st.text(st.sampled_from("你好吃了吗<sep>\n 龘"), max_size=200)))
def test_any_text_survives(model_dir, text):
    tokenizer = load_tokenizer(model_dir)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids), "specials in a text stay text"
    assert ids == tokenizer.backend.encode(text, add_special_tokens=False).ids, "NumPy's path gives the library's ids"


def load_tokenizer(path: Path):
    if path not in _tokenizers:
        _tokenizers[path] = load_model(path)[1]
    return _tokenizers[path]


_tokenizers: dict = {}


def test_transformers_reads_the_tokenizer(small_gpt, model_dir):
    ours, theirs = load_tokenizer(model_dir), transformers.AutoTokenizer.from_pretrained(model_dir)
    for text in ("你好吃了吗", "龘😀 x\n", "嗯" * 100):
        assert theirs(text).input_ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs(ODD_TEXT, split_special_tokens=True).input_ids == ours.encode(ODD_TEXT)
    assert (theirs.sep_token_id, theirs.pad_token_id) == (ours.sep_id, ours.pad_id) == (1, 2)
    assert transformers.GenerationConfig.from_pretrained(model_dir).eos_token_id == [1, 2]
    known = [ours.token_to_id(token) for token in small_gpt.vocabulary]
    assert known == list(range(len(small_gpt.vocabulary)))


def test_it_is_a_chit_chat_model(model_dir):
    tokenizer, theirs = load_tokenizer(model_dir), transformers.AutoTokenizer.from_pretrained(model_dir)
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好呀"},
                {"role": "user", "content": "吃了吗"}]  # fmt: skip
    ids = ChatTemplate.of(tokenizer).encode(messages, add_generation_prompt=True)
    assert ids == [*tokenizer.encode("你好"), 1, *tokenizer.encode("你好呀"), 1, *tokenizer.encode("吃了吗"), 1]
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids


def test_exact_adds_no_rows(small_gpt, tmp_path):
    result = convert(small_gpt.path, str(small_gpt.corpus), tmp_path / "out", exact=True)
    model, tokenizer = load_model(tmp_path / "out")
    assert result["vocab_size"] == model.cfg.vocab_size == small_gpt.original.vocab_size
    assert tokenizer.encode("你龘好\n") == [tokenizer.token_to_id("你"), 0, tokenizer.token_to_id("好"), 0]
    assert tokenizer.encode("好" * 100) == [tokenizer.token_to_id("好")] * 100
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("你龘好\n").input_ids == tokenizer.encode("你龘好\n")
    assert theirs.unk_token_id == 0


# --- what does not fit ---------------------------------------------------------------------------------------------


def test_a_corpus_with_too_many_characters_is_the_wrong_one(saved, corpus_of, tmp_path):
    path = saved(Original.random(SMALL_GPT, True, 43).small_gpt(), "cpt.pth")
    convert(path, str(corpus_of(40)), tmp_path / "fits")
    with pytest.raises(UserError, match=r"44 different tokens.*room for 43.*'data/train.txt'"):
        convert(path, str(corpus_of(41)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_corpus_is_noticed_by_its_loss(small_gpt, tmp_path, capsys):
    right = convert(small_gpt.path, str(small_gpt.corpus), tmp_path / "right")
    ids = {token: id_ for id_, token in enumerate(small_gpt.vocabulary)}
    losses = []
    for dialogue in chat_text().split("\n\n")[:8]:
        row = torch.tensor([*(1 if c == "\n" else ids[c] for c in dialogue), 2])
        losses.append(torch.nn.functional.cross_entropy(small_gpt.original.logits(row[:-1]), row[1:], reduction="none"))
    assert right["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=0.1), "the byte rows take a little"
    assert right["loss"] < 2
    assert "probably not" not in capsys.readouterr().err
    other = tmp_path / "other.txt"
    letters = sorted(set(chat_text()) - {"\n"})
    swap = dict(zip(letters, letters[5:] + letters[:5], strict=True))
    other.write_text("".join(swap.get(c, c) for c in chat_text()[::-1]), encoding="utf-8")
    wrong = convert(small_gpt.path, str(other), tmp_path / "wrong")
    assert wrong["loss"] > math.log(small_gpt.original.vocab_size) + 1
    assert "probably not the text" in capsys.readouterr().err


def test_a_vocabulary_that_is_wrong_in_part_is_noticed_wherever_it_is_used(small_gpt, tmp_path, capsys):
    """Another stretch of the same text: better than guessing, worse than counting characters. chat and train say so
    too, each time."""
    other, dialogues = tmp_path / "other.txt", chat_text().strip().split("\n\n")
    text = "\n\n".join([*dialogues, *dialogues[-1:] * 9])  # one that is commoner there: other characters are first
    other.write_text(text, encoding="utf-8")
    shares = [n / len(text) for n in Counter(text).values()]
    entropy = -sum(share * math.log(share) for share in shares)
    assert vocabulary(other)[1] == pytest.approx(entropy)
    path = tmp_path / "cpt.pth"
    path.write_bytes(small_gpt.path.read_bytes())
    result = convert(path, str(other), tmp_path / "out")
    assert entropy < result["loss"] < math.log(small_gpt.original.vocab_size) + 1
    said = " ".join(capsys.readouterr().err.split())
    counting = f"{result['loss']:.2f} nats a token, where counting characters alone gives {entropy:.2f}"
    assert f"{counting}; without a character: 0 rows" in said
    for _ in range(2):
        converted(path, str(other))
        assert "probably not the text" in capsys.readouterr().err


def broken(checkpoint: dict, how: str) -> dict:
    """A checkpoint with one thing wrong."""
    state, wte = checkpoint["state_dict"], "transformer.wte.weight"
    changes = {
        "fewer blocks": {"n_layer": 1},
        "more blocks": {"n_layer": 3},
        "endless blocks": {"n_layer": 10_000_000},
        "other width": {"n_embd": 64},
        "other rows": {"vocab_size": 46},
        "other context": {"block_size": 33},
        "heads that do not divide": {"n_head": 5},
        "no size": {"n_embd": None},
        "a size in words": {"n_embd": "32"},
        "biases not announced": {"bias": False},
        "a tensor less": {"state_dict": {k: v for k, v in state.items() if "h.1.ffn.dense1.weight" not in k}},
        "a tensor more": {"state_dict": state | {"transformer.h.0.adapter.weight": torch.ones(2)}},
        "another head": {"state_dict": state | {"lm_head.weight": state[wte] + 1}},
        "a tensor of another shape": {"state_dict": state | {wte: state[wte][:, :7]}},
        "no tensors": {"state_dict": {wte: "weights"}},
    }
    return checkpoint | changes[how]


@pytest.mark.parametrize(("how", "said"), [
    ("fewer blocks", "n_layer=1, but has weights of 2 blocks"), ("more blocks", "n_layer=3"),
    ("endless blocks", "n_layer=10000000"), ("other width", r"has shape \(45, 32\).*\(45, 64\)"),
    ("other rows", r"\(45, 32\).*\(46, 32\)"), ("other context", r"wpe.*\(32, 32\).*\(33, 32\)"),
    ("heads that do not divide", r"cpt\.pth: n_embd \(32\) is not divisible by n_head"),
    ("no size", "n_embd is None"), ("a size in words", "n_embd is '32'"),
    ("biases not announced", "tensors too many"), ("a tensor less", r"h\.1\.ffn\.dense1\.weight is missing"),
    ("a tensor more", r"too many.*adapter"), ("another head", r"lm_head\.weight is not the embedding"),
    ("a tensor of another shape", r"wte\.weight has shape \(45, 7\)"), ("no tensors", "not a table of tensors"),
])  # fmt: skip
def test_a_checkpoint_that_contradicts_itself_is_named(saved, corpus_of, tmp_path, how, said):
    path = saved(broken(Original.random(SMALL_GPT, True, 45).small_gpt(), how), "cpt.pth")
    with pytest.raises(UserError, match=said) as error:
        convert(path, str(corpus_of(40)), tmp_path / "out")
    assert str(path) in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_cut_short_is_named(tmp_path, corpus_of, share, zipped):
    path = tmp_path / "cpt.pth"
    torch.save(Original.random(SMALL_GPT, True, 45).small_gpt(), path, _use_new_zipfile_serialization=zipped)
    convert(path, str(corpus_of(40)), tmp_path / "whole")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"cpt\.pth cannot be read.*copy it again") as error:
        convert(path, str(corpus_of(40)), tmp_path / "out")
    assert "weights_only" not in str(error.value), "torch's own advice is to execute what is in the file"


@pytest.mark.parametrize("form", ["in the state dict", "in the settings", "a bare pickle", "not zipped"])
def test_a_malicious_checkpoint_executes_nothing(tmp_path, corpus_of, bomb, form):
    path, checkpoint = tmp_path / "cpt.pth", Original.random(SMALL_GPT, True, 45).small_gpt()
    if form == "a bare pickle":
        path.write_bytes(pickle.dumps(bomb, protocol=2))
    else:
        part = checkpoint["state_dict"] if form == "in the state dict" else checkpoint
        part["dataset"] = bomb
        torch.save(checkpoint, path, _use_new_zipfile_serialization=form != "not zipped")
    with pytest.raises(UserError, match=r"cpt\.pth (was not loaded|cannot be read)"):
        convert(path, str(corpus_of(40)), tmp_path / "out")
    assert not bomb.path.exists()


def test_what_a_refused_checkpoint_holds_is_named(saved, corpus_of, tmp_path, bomb):
    path = saved(Original.random(SMALL_GPT, True, 45).small_gpt() | {"dataset": bomb}, "cpt.pth")
    with pytest.raises(UserError, match=r"was not loaded.*it holds \S*getattr.*could run a program"):
        convert(path, str(corpus_of(40)), tmp_path / "out")


def test_other_files_are_told_apart(saved, corpus_of, tmp_path):
    corpus = str(corpus_of(40))
    nanogpt = Original.random(SMALL_GPT, True, 45).nanogpt()
    for content, said in ((nanogpt, "convert nanogpt"), ({"a": 1}, "no state_dict"), ([1], "holds a list")):
        with pytest.raises(UserError, match=said):
            convert(saved(content, "cpt.pth"), corpus, tmp_path / "out")
    with pytest.raises(UserError, match="no such checkpoint"):
        convert(tmp_path / "nothing.pth", corpus, tmp_path / "out")
    path = saved(Original.random(SMALL_GPT, True, 45).small_gpt(), "cpt.pth")
    with pytest.raises(UserError, match=r"no vocabulary of its own.*--corpus"):
        convert(path, None, tmp_path / "out")
    (tmp_path / "blank.txt").write_text("\n \n\n")
    with pytest.raises(UserError, match=r"blank\.txt has no dialogues"):
        convert(path, str(tmp_path / "blank.txt"), tmp_path / "out")
    with pytest.raises(UserError, match=r"elsewhere\.txt: no such file.*no vocabulary of its own"):
        convert(path, str(tmp_path / "elsewhere.txt"), tmp_path / "out")


def test_only_an_earlier_conversion_is_replaced(small_gpt, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert(small_gpt.path, str(small_gpt.corpus), out)
    convert(small_gpt.path, str(small_gpt.corpus), out, exact=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("valuable")
    for path in (tmp_path / "thesis", tmp_path / "thesis" / "chapter1.txt"):
        with pytest.raises(UserError, match="--out"):
            convert(small_gpt.path, str(small_gpt.corpus), path)
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "valuable"


# --- on the fly ----------------------------------------------------------------------------------------------------


@pytest.fixture
def place(small_gpt, tmp_path, monkeypatch) -> Path:
    """A working directory as small-gpt's: checkpoints/cpt4000.pth and data/train.txt."""
    for name, file in (("checkpoints", small_gpt.path), ("data", small_gpt.corpus)):
        (tmp_path / name).mkdir()
        shutil.copy2(file, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_conversion_is_kept_until_something_changes(place, monkeypatch):
    pth, corpus, runs = Path("checkpoints/cpt4000.pth"), Path("data/train.txt"), []
    monkeypatch.setattr(converter, "convert", lambda *args: runs.append(args) or convert(*args))
    assert converted(pth, str(corpus)) == Path("checkpoints/cpt4000.miaobi")
    converted(pth, str(corpus))
    assert len(runs) == 1
    for file in (pth, corpus):
        os.utime(file)
        converted(pth, str(corpus))
        assert len(runs) == 1, "the same bytes at another time"
    corpus.write_text(corpus.read_text(encoding="utf-8").replace("嗯", "哼"), encoding="utf-8")
    assert converted(pth, str(corpus)).is_dir()
    assert len(runs) == 2
    assert load_model("checkpoints/cpt4000.miaobi")[1].token_to_id("哼") is not None
    checkpoint = torch.load(pth, weights_only=True)
    checkpoint["state_dict"]["_orig_mod.transformer.ln_f.bias"] += 1
    torch.save(checkpoint, pth)
    converted(pth, str(corpus))
    assert len(runs) == 3
    corpus.unlink()
    converted(pth, str(corpus))
    assert len(runs) == 3, "what was converted needs no corpus"
    shutil.rmtree("checkpoints/cpt4000.miaobi")
    with pytest.raises(UserError, match=r"data.train\.txt: no such file.*cpt4000\.pth has no vocabulary"):
        converted(pth, str(corpus))


YAML = """\
data_path: data/train.txt
train_percent: 0.8
block_size: 32
vocab_size: {rows}
n_layer: 2
n_head: 2
n_embd: 32
dropout: 0.05
bias: True
compile: False
max_epoch: 1919810
tensorboard_path: ./tensorboard
device: cpu
eval_freq: 2
eval_steps: 1
train_batch: 4
test_batch: 4
grad_clip: 1.0
lr: 1e-9
warmup_steps: 1
decay_steps: 100000
min_lr: 1e-9
weight_decay: 0
beta1: 0.9
beta2: 0.95
checkpoint_root: ./runs
save_freq: 4000
resume_from: checkpoints/cpt4000.pth
seed: 114514
"""


@pytest.fixture
def config(place, small_gpt) -> Path:
    """chat300M.yaml's keys at this checkpoint's sizes."""
    path = place / "chat.yaml"
    path.write_text(YAML.format(rows=small_gpt.original.vocab_size), encoding="utf-8")
    return path


def test_training_from_a_pth_begins_with_its_weights(miaobi, small_gpt, config):
    answer = miaobi("train", config, "--max_iters=2", "--sample_tokens=0", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["step"] == 2
    assert "its weights are taken" in answer.err
    assert "steps count from 0" in answer.err
    model, tokenizer = load_model("runs")
    theirs = small_gpt.original.state["transformer.wte.weight"]
    torch.testing.assert_close(model.wte.weight[: len(theirs)].detach(), theirs, atol=1e-6, rtol=0)
    assert tokenizer.backend.to_str() == load_model("checkpoints/cpt4000.miaobi")[1].backend.to_str()
    generation = json.loads(Path("runs/checkpoints/last/generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == [tokenizer.sep_id, tokenizer.pad_id], "it still is a chit-chat model"
    assert ChatTemplate.of(tokenizer)
    again = miaobi("train", config, "--max_iters=2", "--sample_tokens=0")
    assert again.code == 0, again.err
    assert "steps count from 0" not in again.err
    assert "finished" in again.err
    assert miaobi("train", config, "--max_iters=3", "--sample_tokens=0").code == 0


@pytest.mark.parametrize(("key", "value"), [("n_layer", 3), ("n_head", 4), ("n_embd", 64), ("block_size", 64),
                                            ("vocab_size", 7587), ("bias", False)])  # fmt: skip
def test_sizes_that_the_yaml_gives_must_be_the_checkpoints(miaobi, small_gpt, config, key, value):
    answer = miaobi("train", config, f"--{key}={value}", "--max_iters=2")
    assert answer.code == 2
    has = small_gpt.original.__dict__[key]
    assert f"cpt4000.pth has {key}={has}, but {key}={value} was asked for" in answer.err
    assert not Path("checkpoints/cpt4000.miaobi").exists()


def test_without_its_corpus_a_pth_is_refused(miaobi, config):
    Path("data/train.txt").unlink()
    answer = miaobi("train", config, "--max_iters=2")
    assert answer.code == 2
    assert "no such file" in answer.err
    assert "cpt4000.pth has no vocabulary of its own" in answer.err


def test_from_scratch_on_the_command_line_leaves_the_pth_alone(miaobi, config):
    answer = miaobi("train", config, "--init_from=scratch", "--vocab_size=400", "--max_iters=2", "--sample_tokens=0")
    assert answer.code == 0, answer.err
    assert "left alone" in answer.err
    assert not Path("checkpoints/cpt4000.miaobi").exists()


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_converts_beside_the_checkpoint(miaobi, place):
    answer = miaobi("convert", "small-gpt", "checkpoints/cpt4000.pth", "--corpus", "data/train.txt", "--json")
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    assert result["out"] == os.path.join("checkpoints", "cpt4000.miaobi")
    assert {"parameters", "vocab_size", "spare_rows", "loss"} <= set(result)
    model, _ = load_model("checkpoints/cpt4000.miaobi")
    assert model.num_parameters() == result["parameters"]
    plain = miaobi("convert", "small-gpt", "checkpoints/cpt4000.pth", "--corpus=data/train.txt", "--out=out", "--exact")
    assert plain.code == 0, plain.err
    assert "next: miaobi chat out" in plain.out
    assert load_model("out")[0].cfg.vocab_size == model.cfg.vocab_size - 256


def test_the_command_lists_what_it_converts(miaobi):
    for arguments in (["--help"], []):
        answer = miaobi("convert", *arguments)
        assert answer.code == 0
        assert "small-gpt" in answer.out
        assert "nanogpt" in answer.out
    assert "--corpus" in miaobi("convert", "small-gpt", "--help").out
    answer = miaobi("convert", "onnx", "x")
    assert answer.code == 2
    assert "it knows small-gpt, nanogpt" in answer.err

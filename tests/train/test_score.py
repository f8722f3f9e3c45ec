"""`eval`: a trained model directory scored here and, naively, through transformers."""

import json
import math

import pytest
import torch
import transformers

from miaobi.corpus.packing import PackedDialogues
from miaobi.corpus.prepared import PreparedData
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError
from miaobi.model.checkpoint import model_directory
from miaobi.train.config import EvalConfig
from miaobi.train.evaluate import given_and_scored, text_size
from miaobi.train.run_directory import load_progress
from miaobi.train.score import score, stride_tokens

BLOCK = 32
TEXT = "皇马赢得比赛，曼联输掉冠军。😀𠮷龘<sep>\n\n国家队期待联赛！球迷谈到训练。<|endoftext|>\n\n"
TEXT += "前锋错过转会，" * 20


def miaobi_score(run, *sources, **changes) -> dict:
    settings = {"batch_size": 4, "device": "cpu"} | changes
    return score(EvalConfig(str(run), tuple(str(s) for s in sources), **settings))


@torch.no_grad()
def naive_nats(path, documents: list[str], stride: int) -> tuple[float, int]:
    """Nats of all tokens, end-of-text included, through transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    ids = [tokenizer.eos_token_id]
    for text in documents:
        ids += [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    total, done = 0.0, 1
    while done < len(ids):
        end = min(len(ids), done + (BLOCK if done == 1 else stride))
        window = torch.tensor(ids[max(0, end - 1 - BLOCK) : end])
        log_p = model(window[None, :-1]).logits[0].log_softmax(-1)
        picked = log_p.gather(1, window[1:, None])[:, 0]
        total -= picked[-(end - done) :].sum().item()
        done = end
    return total, len(ids) - 1


@pytest.mark.parametrize(("family", "tokenizer"), [("gpt2", "char"), ("qwen3", "char"), ("qwen3", "bpe")])
@pytest.mark.parametrize("stride", ["half", "block", "5"])
def test_bits_per_character_are_those_of_transformers(trained, tmp_path, family, tokenizer, stride):
    run, file = trained(family, tokenizer), tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    documents = TEXT.split("\n\n")
    total, tokens = naive_nats(model_directory(run), documents, stride_tokens(stride, BLOCK))
    result = miaobi_score(run, file, stride=stride)
    characters = sum(map(len, documents))
    assert (result["tokens"], result["characters"]) == (tokens, characters)
    assert result["loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert result["bits_per_char"] == pytest.approx(total / math.log(2) / characters, rel=1e-4)
    text_bytes = sum(len(d.encode()) for d in documents)
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / text_bytes, rel=1e-4)


@pytest.mark.bf16
@pytest.mark.parametrize(("family", "tokenizer"), [("gpt2", "char"), ("qwen3", "bpe")])
def test_a_prepared_part_and_its_own_text_score_the_same(trained, prepared, tmp_path, family, tokenizer):
    data = PreparedData.open(prepared(**{"tokenizer": tokenizer} | ({"vocab_size": 400} if tokenizer == "bpe" else {})))
    decoder, documents, start = Tokenizer.load(data.path), [], 0
    ids = data.val.read(0, len(data.val))
    for end in (ids == data.eot_id).nonzero()[0]:
        documents.append(decoder.decode(ids[start:end]))
        start = end + 1
    assert start == len(ids)
    (tmp_path / "val.txt").write_text("\n\n".join(documents), encoding="utf-8")
    run = trained(family, tokenizer)
    as_prepared, as_text = miaobi_score(run, data.path), miaobi_score(run, tmp_path / "val.txt")
    for key in ("tokens", "characters"):
        assert as_prepared[key] == as_text[key]
    for key in ("loss", "bits_per_char", "bits_per_byte", "perplexity"):
        assert as_prepared[key] == pytest.approx(as_text[key], rel=1e-6)


@pytest.mark.bf16
def test_a_stream_without_documents_scores_as_one_text(prepared, train, tmp_path, corpus_file):
    data = prepared(split="tail")
    run = tmp_path / "run"
    train(data=data, out_dir=run)
    text = corpus_file.read_text(encoding="utf-8")
    part = text[: PreparedData.open(data).train.characters]
    (tmp_path / "train.txt").write_text(part, encoding="utf-8")
    as_prepared, as_text = miaobi_score(run, data, split="train"), miaobi_score(run, tmp_path / "train.txt")
    assert as_prepared["tokens"] == as_text["tokens"] == len(part)
    assert as_prepared["loss"] == pytest.approx(as_text["loss"], rel=1e-6)
    assert as_prepared["bits_per_char"] == pytest.approx(as_prepared["loss"] / math.log(2))


@pytest.mark.bf16
def test_a_model_that_learned_scores_better_on_its_text_than_on_shuffled_text(trained, tmp_path):
    plain, shuffled = "皇马赢得比赛。曼联输掉冠军，" * 10, "赛马。赢皇比得冠联军输曼，掉" * 10
    for name, text in (("plain", plain), ("shuffled", shuffled)):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    scores = [miaobi_score(trained("qwen3"), tmp_path / f"{n}.txt")["bits_per_char"] for n in ("plain", "shuffled")]
    assert scores[0] < scores[1] - 0.3


@pytest.fixture(scope="module")
def chatter(tmp_path_factory):
    """A run on dialogues whose vocabulary has `好` and hardly more."""
    from miaobi.corpus.config import PrepareConfig
    from miaobi.corpus.prepare import prepare
    from miaobi.settings import load_config
    from miaobi.train.loop import train as train_run

    folder = tmp_path_factory.mktemp("chatter")
    (folder / "chat.txt").write_text("好你\n好我\n\n" + "\n\n".join(f"你好{i}\n好" for i in range(40)), "utf-8")
    prepare([str(folder / "chat.txt")], PrepareConfig(out=folder / "data", format="dialogue", workers=1))
    settings = {"data": folder / "data", "out_dir": folder / "run", "n_layer": 1, "n_head": 2, "n_embd": 16,
                "block_size": 8, "batch_size": 4, "max_iters": 1, "sample_tokens": 0, "device": "cpu",
                "dtype": "float32", "compile": False}  # fmt: skip
    train_run(*load_config(None, [(key, str(value)) for key, value in settings.items()]))
    return folder / "run"


@pytest.mark.parametrize(
    ("text", "tokens", "characters", "text_bytes"),
    [
        ("好好", 2, 1, 3),  # the first is given; what ends the dialogue is scored, and no character
        ("好\n好", 3, 2, 4),
        ("好𪚥\n好", 7, 3, 8),
        ("𪚥\n好", 6, 3, 7),  # its first byte is given, the other three are told
        ("𪚥𪚥𪚥", 12, 3, 11),  # two pieces of 9 and 5 tokens, cut inside a character
        ("好好好好好好好\n好好", 9, 8, 22),  # two pieces of whole turns: the second one's first is given too
        ("𪚥\n好\n\n好𪚥\n好", 13, 6, 15),
    ],
)
def test_characters_of_dialogues_are_those_of_which_something_is_scored(
    chatter, tmp_path, text, tokens, characters, text_bytes
):
    (tmp_path / "chat.txt").write_text(text, encoding="utf-8")
    result = miaobi_score(chatter, tmp_path / "chat.txt")
    assert (result["tokens"], result["characters"]) == (tokens, characters)
    assert result["bits_per_char"] == pytest.approx(result["loss"] * tokens / math.log(2) / characters)
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * tokens / math.log(2) / text_bytes)


def test_training_counts_the_characters_of_its_windows_as_eval_does(chatter):
    data, found = PreparedData.open(chatter.parent / "data"), load_progress(chatter / "checkpoints" / "last")
    blocks = PackedDialogues(data.val, 8)
    characters, _ = text_size(*given_and_scored(blocks.fixed(len(blocks))), Tokenizer.load(data.path))
    result = miaobi_score(chatter, data.path)
    assert characters == result["characters"]
    assert found.val_bits_per_char == pytest.approx(result["bits_per_char"], rel=1e-5)


@pytest.mark.parametrize("text", ["\n", "\n\n", "好", "好\n\n你\n"])
def test_dialogues_of_which_no_character_is_scored_are_an_error(chatter, tmp_path, text):
    (tmp_path / "chat.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"nothing to score in .*chat\.txt"):
        miaobi_score(chatter, tmp_path / "chat.txt")


@pytest.mark.parametrize("stride", ["0", "33", "-1", "third", "1.5", ""])
def test_strides_that_make_no_sense_are_refused(stride):
    with pytest.raises(UserError, match="stride"):
        stride_tokens(stride, BLOCK)


def test_mistakes_name_what_is_wrong(trained, prepared, tmp_path):
    run = trained("gpt2", "char")
    with pytest.raises(UserError, match="another tokenizer"):
        miaobi_score(run, prepared(tokenizer="bpe", vocab_size=400))
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        miaobi_score(run, tmp_path / "nowhere.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"empty\.txt"):
        miaobi_score(run, tmp_path / "empty.txt")
    with pytest.raises(UserError, match="no such directory"):
        miaobi_score(tmp_path / "no-model", prepared())


def test_the_field_of_records_can_be_named(miaobi, trained, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "皇马赢得比赛。"}\n{"body": "曼联输掉冠军！"}\n', encoding="utf-8")
    (tmp_path / "a.csv").write_text("id,body\n1,皇马赢得比赛。\n2,曼联输掉冠军！\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("皇马赢得比赛。\n\n曼联输掉冠军！\n", encoding="utf-8")
    for name in ("a.jsonl", "a.csv"):
        refused = miaobi("eval", trained(), tmp_path / name, "--device=cpu")
        assert refused.code == 2
        assert "Name one with --field" in refused.err
        answer = miaobi("eval", trained(), tmp_path / name, "--field=body", "--device=cpu", "--json")
        expected = miaobi_score(trained(), tmp_path / "a.txt")
        assert json.loads(answer.out) | {"seconds": 0} == expected | {"seconds": 0}


def test_bad_records_are_left_out_and_counted_where_that_is_asked_for(miaobi, trained, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "皇马赢得比赛。"}\nnonsense\n', encoding="utf-8")
    refused = miaobi("eval", trained(), tmp_path / "a.jsonl", "--device=cpu")
    assert refused.code == 2
    assert "--skip_bad" in refused.err
    answer = miaobi("eval", trained(), tmp_path / "a.jsonl", "--skip_bad", "--device=cpu", "--json")
    assert json.loads(answer.out)["characters"] == 7
    assert "bad files, records or bytes left out or replaced: 1" in answer.err

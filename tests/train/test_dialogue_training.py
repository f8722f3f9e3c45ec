"""Models on dialogues: packed or alone makes no difference, runs resume exactly, and figures are of what is learned."""

import json
import math
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests import processes
from transformers import AutoModelForCausalLM

from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.dataset import IGNORE
from miaobi.corpus.packing import PackedDialogues
from miaobi.corpus.prepare import prepare
from miaobi.corpus.prepared import PreparedData
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError
from miaobi.files import pointed
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer, document_mask
from miaobi.settings import load_config
from miaobi.train.config import EvalConfig
from miaobi.train.score import score

WHO, DID = "皇马 曼联 国家队 主教练 球迷 裁判".split(), "赢得 输掉 期待 谈到 错过".split()  # noqa: SIM905


def talks(n: int, seed: int = 0) -> list[list[str]]:
    """Questions and the replies that follow from them, two to six utterances."""
    draw, found = random.Random(seed), []
    for i in range(n):
        pairs = [(draw.choice(WHO), draw.choice(DID)) for _ in range(draw.randint(1, 3))]
        found.append([words for a, b in pairs for words in (f"{a}{i}{b}什么？", f"{a}{b}比赛。")])
    return found


def write(path: Path, dialogues: list[list[str]]) -> Path:
    path.write_text("\n\n".join("\n".join(lines) for lines in dialogues) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """`data(template="chatml")`: 200 dialogues prepared, once per set of settings."""
    known: dict[tuple, Path] = {}

    def get(**settings: object) -> Path:
        key = tuple(sorted(settings.items()))
        if key not in known:
            home = tmp_path_factory.mktemp("dialogues")
            known[key] = home / "data"
            source = write(home / "a.txt", talks(200))
            prepare([str(source)], PrepareConfig(out=known[key], format="dialogue", workers=1, **settings))
        return known[key]

    return get


# --- packed or alone ---------------------------------------------------------------------------------------------


class Stream:
    """Random tokens as dialogues of the given lengths."""

    def __init__(self, lengths: list[int]) -> None:
        self.tokens = np.random.default_rng(0).integers(0, 50, sum(lengths))
        self.starts = self.turns = np.cumsum([0, *lengths[:-1]])

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]

    def read_scored(self, start: int, stop: int) -> np.ndarray:
        return np.ones(stop - start, bool)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_packed_dialogues_have_the_logits_and_the_gradient_of_each_alone(family):
    torch.manual_seed(0)
    kv = {"n_kv_head": 1} if family == "qwen3" else {}
    model = Transformer(ModelConfig(family=family, n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=50, **kv))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim < 2), std=0.2)  # qwen3 is born without attention
    lengths = [5, 17, 30, 8, 8, 21, 3, 12, 9, 33, 2, 14] * 2
    stream = Stream(lengths)
    blocks = PackedDialogues(stream, 32)
    rows = blocks.batch(len(blocks), 1, 0)
    assert (rows.documents.max(1) > 0).sum() > 2
    assert (rows.documents == -1).any()
    ids, targets, positions, documents = map(torch.from_numpy, rows)
    logits = model(ids, positions, document_mask(documents))
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum").backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    found = []
    for row, numbers in enumerate(documents):
        for number in range(int(numbers.max()) + 1):
            mine = numbers == number
            alone = model(ids[row : row + 1, mine])[0]
            torch.testing.assert_close(logits[row, mine], alone, atol=1e-5, rtol=1e-5)
            F.cross_entropy(alone, targets[row, mine], reduction="sum").backward()
            found.append((*ids[row, mine].tolist(), int(targets[row, mine][-1])))
    assert sorted(found) == sorted(tuple(t.tolist()) for t in np.split(stream.tokens, stream.starts[1:]))
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradient[name], p.grad, atol=1e-4, rtol=1e-4)
    assert (model(ids, positions) - logits).abs().max() > 0.01, "without the mask they see each other"
    assert (model(ids, None, document_mask(documents)) - logits).abs().max() > (0.01 if family == "gpt2" else -1)


# --- runs --------------------------------------------------------------------------------------------------------


def weights(run: Path) -> bytes:
    return (pointed(run / "checkpoints" / "last") / "model.safetensors").read_bytes()


KILL = """
import os, signal, sys
from miaobi import cli
from miaobi.train import loop
step = loop.Run.step
def until_25(run, n):
    if n == 25:
        run.saver.thread.join()  # step 20 is on the disk, however slow that is
        os.kill(os.getpid(), signal.SIGKILL)
    return step(run, n)
loop.Run.step = until_25
cli.main(["train", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_a_killed_run_on_dialogues_ends_in_the_same_weights(data, train, tmp_path):
    settings = {"data": data(), "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 48, "batch_size": 8,
                "dropout": 0.2, "long_history": 0.5, "max_iters": 40, "eval_interval": 10, "eval_iters": 2,
                "log_interval": 5, "sample_tokens": 0, "device": "cpu", "dtype": "float32",
                "compile": False}  # fmt: skip
    blocks = PackedDialogues(PreparedData.open(data()).train, 48)
    assert 25 * 8 / len(blocks) > 1, "the seam of two epochs lies before the kill"
    assert len(blocks) % 8
    train(**settings, out_dir=tmp_path / "alone")
    flags = [f"--{key}={value}" for key, value in settings.items()]
    done = processes.run(["-c", KILL, *flags, f"--out_dir={tmp_path / 'killed'}"])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert pointed(tmp_path / "killed" / "checkpoints" / "last").name == "step-20"
    assert train(**settings, out_dir=tmp_path / "killed")["step"] == 40
    assert weights(tmp_path / "killed") == weights(tmp_path / "alone")


def test_packing_as_a_stream(data, train, tmp_path):
    result = train(data=data(), out_dir=tmp_path / "stream", packing="stream", max_iters=60, eval_interval=60)
    assert result["val_loss"] < 0.9 * math.log(Tokenizer.load(data()).vocab_size)
    with pytest.raises(UserError, match="packing=stream learns all tokens"):
        train(data=data(template="chatml"), out_dir=tmp_path / "x", packing="stream")
    source = write(tmp_path / "plain.txt", talks(100))
    with pytest.raises(UserError, match="packing=documents is for dialogues"):
        train(data=source, out_dir=tmp_path / "y", packing="documents")


def test_a_corpus_without_replies_is_refused_when_only_those_are_learned(train, tmp_path):
    lines = [json.dumps({"messages": [{"role": "user", "content": "\n".join(talk)}]}) for talk in talks(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    given = {"data": tmp_path / "a.jsonl", "format": "dialogue", "max_iters": 2, "block_size": 64}
    with pytest.raises(UserError, match="no turn of the assistant is in the data"):
        train(**given, out_dir=tmp_path / "run")
    assert train(**given, out_dir=tmp_path / "all", loss="all")["step"] == 2


def nats(run: Path, out: Path) -> list[tuple[str, list[int], np.ndarray]]:
    """(text, ids, nats of each id after the first) of the validation dialogues, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(pointed(run / "checkpoints" / "last")).eval()
    prepared, tokenizer, found = PreparedData.open(out), Tokenizer.load(out), []
    for ids in np.split(prepared.val.read(0, len(prepared.val)), prepared.val.starts[1:]):
        x = torch.from_numpy(ids)[None]
        with torch.no_grad():
            loss = F.cross_entropy(model(x).logits[0, :-1], x[0, 1:], reduction="none")
        found.append((tokenizer.decode(ids), ids.tolist(), loss.double().numpy()))
    return found


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_bits_per_char_of_chit_chat_are_of_every_character_but_the_first(data, train, tmp_path, family):
    out = data()
    result = train(data=out, out_dir=tmp_path / "run", family=family, max_iters=20, eval_interval=20, block_size=64,
                   eval_iters=8)  # fmt: skip
    found = nats(tmp_path / "run", out)
    characters = sum(len(text.removesuffix("<pad>").replace("<sep>", "\n")) - 1 for text, _, _ in found)
    total = sum(loss.sum() for _, _, loss in found)
    assert result["val_bits_per_char"] == pytest.approx(total / math.log(2) / characters, rel=1e-4)
    assert result["val_loss"] == pytest.approx(total / sum(len(loss) for _, _, loss in found), rel=1e-4)
    assert evaluated(tmp_path / "run", out) == pytest.approx(result["val_bits_per_char"], rel=1e-4)


def evaluated(run: Path, out: Path) -> float:
    """What `miaobi eval` says."""
    return score(EvalConfig(str(run), (str(out),), checkpoint="last", batch_size=8, device="cpu"))["bits_per_char"]


def by_speaker(text: str, ids: list[int], loss: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, int]:
    """Nats of the assistant's words with the token that ends them, of the user's, and the characters of the former."""
    mine, theirs, characters, at = [], [], 0, 0
    for turn in text.split("<|im_start|>")[1:]:
        role, _, words = turn.partition("\n")
        words = words.removesuffix("<|im_end|>\n")
        begin = at + 1 + len(tokenizer.encode(role + "\n"))
        end = begin + len(tokenizer.encode(words)) + 1
        assert ids[end - 1] == tokenizer.token_to_id("<|im_end|>")
        (mine if role == "assistant" else theirs).append(loss[begin - 1 : end - 1])
        characters += len(words) if role == "assistant" else 0
        at = end + 1
    return np.concatenate(mine), np.concatenate(theirs), characters


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_learning_replies_alone_lowers_their_loss_alone(data, train, tmp_path, tokenizer):
    settings = {"tokenizer": "bpe", "vocab_size": 330} if tokenizer == "bpe" else {}
    out = data(template="chatml", **settings)
    own, mean = Tokenizer.load(out), {}
    for name, steps in (("before", 1), ("after", 120)):
        result = train(data=out, out_dir=tmp_path / name, max_iters=steps, eval_interval=steps, block_size=160,
                       batch_size=8, learning_rate=3e-5 if steps == 1 else 3e-3, eval_iters=8)  # fmt: skip
        parts = [by_speaker(*dialogue, own) for dialogue in nats(tmp_path / name, out)]
        replies, questions = (np.concatenate([p[i] for p in parts]) for i in (0, 1))
        mean[name] = replies.mean(), questions.mean()
    assert mean["after"][0] < 0.4 * mean["before"][0]
    assert mean["after"][1] > 0.8 * mean["before"][1]
    characters = sum(p[2] for p in parts)
    assert result["val_loss"] == pytest.approx(replies.mean(), rel=1e-3)
    assert result["val_bits_per_char"] == pytest.approx(replies.sum() / math.log(2) / characters, rel=1e-3)
    assert evaluated(tmp_path / "after", out) == pytest.approx(result["val_bits_per_char"], rel=1e-3)


# --- small-gpt's keys --------------------------------------------------------------------------------------------


def test_small_gpts_keys_train_on_the_first_dialogues_of_its_text(train, tmp_path):
    dialogues = talks(50) + talks(3)  # it drops no repeats
    source = write(tmp_path / "train.txt", dialogues)
    train(data_path=source, train_percent=0.8, train_batch=4, out_dir=tmp_path / "run", max_iters=1)
    prepared, tokenizer = PreparedData.open(tmp_path / "run" / "data"), Tokenizer.load(tmp_path / "run" / "data")
    cut = int(53 * 0.8)
    for stream, expected in ((prepared.train, dialogues[:cut]), (prepared.val, dialogues[cut:])):
        text = tokenizer.decode(stream.read(0, len(stream)))
        assert text == "".join("<sep>".join(lines) + "<pad>" for lines in expected)


def test_small_gpts_share_is_cut_where_it_cuts_it(tmp_path):
    source = write(tmp_path / "train.txt", talks(97))
    for hundredths in range(50, 100, 7):
        percent = hundredths / 100
        cfg, _ = load_config(None, [("data_path", str(source)), ("train_percent", str(percent))])
        d = cfg.data
        prepare([d.data], PrepareConfig(out=tmp_path / "out", format=d.format, split=d.split,
                                        val_fraction=d.val_fraction))  # fmt: skip
        assert PreparedData.open(tmp_path / "out").train.documents == int(97 * percent)

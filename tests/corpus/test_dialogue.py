"""Dialogue records in every shape, odd separators, weights, and the prepared directory against a naive rendering."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from miaobi.corpus import blocks, documents, workers
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.messages import messages_of
from miaobi.corpus.prepare import prepare
from miaobi.corpus.prepared import PreparedData
from miaobi.corpus.template import CHATML_TEMPLATE, SEP_TEMPLATE
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError

HELLO = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好呀"}]
SYSTEM = {"role": "system", "content": "简短"}


def run(sources: object, out: Path, **settings: object) -> dict:
    given = sources if isinstance(sources, list) else [sources]
    return prepare([str(source) for source in given], PrepareConfig(out=out, format="dialogue", **settings))


def jsonl(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def talks(n: int, seed: int = 0) -> list[list[str]]:
    """n different dialogues of two or four utterances."""
    draw = random.Random(seed)
    return [[f"{seed}号{i}问" + "".join(draw.choices("吃了吗你好在", k=5))] + ["答" + draw.choice("好坏中")]
            * draw.choice((1, 3)) for i in range(n)]  # fmt: skip


def as_messages(talk: list[str]) -> dict:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": line} for i, line in enumerate(talk)]}


def text(path: Path, dialogues: list[list[str]]) -> Path:
    path.write_text("\n\n".join("\n".join(lines) for lines in dialogues) + "\n", encoding="utf-8")
    return path


def decoded(out: Path, split: str) -> list[str]:
    """Every dialogue of a split as text, control tokens written out."""
    data = PreparedData.open(out)
    stream, tokenizer = getattr(data, split), Tokenizer.load(out)
    return [tokenizer.decode(part) for part in np.split(stream.read(0, len(stream)), stream.starts[1:])]


def everything(out: Path) -> list[str]:
    return sorted(decoded(out, "train") + decoded(out, "val"))


def sep(*dialogues: list[str]) -> list[str]:
    return sorted("<sep>".join(lines) + "<pad>" for lines in dialogues)


def chatml(talk: list[str]) -> str:
    return "".join(f"<|im_start|>{('user', 'assistant')[i % 2]}\n{line}<|im_end|>\n" for i, line in enumerate(talk))


# --- records -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": HELLO}, HELLO),
        ({"conversations": HELLO}, HELLO),  # minimind's
        ({"messages": [SYSTEM, *HELLO]}, [SYSTEM, *HELLO]),
        ({"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": " 你好呀\n"}]}, HELLO),
        ({"conversations": [{"from": "human", "value": "你好"}, {"from": "bot", "value": "你好呀"}], "system": "简短"},
         [SYSTEM, *HELLO]),
        ({"conversations": HELLO, "system": None}, HELLO),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]},
         HELLO[1]]}, HELLO),
        ({"messages": None, "conversations": HELLO}, HELLO),
        ({"conversations": [], "messages": HELLO, "tools": [], "images": None}, HELLO),
        ({"messages": [], "instruction": "你好", "output": "你好呀"}, HELLO),
        ({"messages": [SYSTEM, *HELLO], "system": " 简短 "}, [SYSTEM, *HELLO]),
        ({"messages": [HELLO[0], HELLO[1] | {"reasoning_content": " 想\n", "weight": 0}]},
         [HELLO[0], HELLO[1] | {"reasoning_content": "想", "weight": 0}]),
        ({"messages": [HELLO[0], HELLO[1] | {"weight": 1, "train": True, "tool_calls": None}]}, HELLO),
        ({"messages": [HELLO[0] | {"loss": False}, HELLO[1] | {"train": False}]},
         [HELLO[0] | {"weight": 0}, HELLO[1] | {"weight": 0}]),
        ({"messages": [HELLO[0], {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "查", "arguments": '{"城": "京"}'}}]},
            {"role": "tool", "tool_call_id": "1", "content": "晴"}], "tools": [{"type": "function"}]},
         [HELLO[0] | {"tools": [{"type": "function"}]}, {"role": "assistant", "content": "", "tool_calls": [
             {"type": "function", "function": {"name": "查", "arguments": {"城": "京"}}, "id": "1"}]},
          {"role": "tool", "content": "晴", "tool_call_id": "1"}]),
        ({"conversations": [{"from": "human", "value": "你好"}, {"from": "function_call", "value":
          '{"name": "查", "arguments": {}}'}, {"from": "observation", "value": "晴"}], "tools": '[{"name": "查"}]'},
         [HELLO[0] | {"tools": [{"name": "查"}]}, {"role": "assistant", "content": "", "tool_calls": [
             {"type": "function", "function": {"name": "查", "arguments": {}}}]}, {"role": "tool", "content": "晴"}]),
        ({"instruction": "你好", "input": "", "output": "你好呀"}, HELLO),
        ({"instruction": "你好", "output": "你好呀", "input": None, "system": "简短"}, [SYSTEM, *HELLO]),
        ({"instruction": "译", "input": "早", "output": "morning"},
         [{"role": "user", "content": "译\n早"}, {"role": "assistant", "content": "morning"}]),
        ({"instruction": "再", "output": "见", "history": [["你好", "你好呀"]]},
         [*HELLO, {"role": "user", "content": "再"}, {"role": "assistant", "content": "见"}]),
        ({"instruction": "你好", "output": "你好呀", "history": None}, HELLO),
    ],
)  # fmt: skip
def test_the_shapes_of_records(record, expected):
    assert messages_of(record) == (expected, "")


BAD = [
    ({"messages": [{"role": "narrator", "content": "x"}]}, "turn 1 has the unknown role 'narrator'"),
    ({"messages": HELLO, "conversations": HELLO}, "two dialogues in it: messages and conversations"),
    ({"messages": HELLO, "instruction": "x", "output": "y"}, "two dialogues in it: messages and instruction"),
    ({"messages": [SYSTEM, *HELLO], "system": "啰嗦"}, "`system` stands next to the turns and in them"),
    ({"messages": HELLO, "system": ["x"]}, "`system` is list, not text"),
    ({"messages": HELLO, "images": ["a.png"]}, "`images` cannot be learned"),
    ({"messages": HELLO, "rejected": "不"}, "`rejected` cannot be learned"),
    ({"messages": [HELLO[0] | {"audio": {"id": 1}}]}, "turn 1: `audio` cannot be learned"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "part of the type 'image_url'",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "part of the type 'input_audio'"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "turn 1 has a part without text"),
    ({"messages": [HELLO[0], HELLO[1] | {"weight": 0.5}]}, "turn 2: `weight` is 0.5; only 0"),
    ({"messages": [HELLO[0], HELLO[1] | {"weight": "0"}]}, "turn 2: `weight` is '0'"),
    ({"messages": [HELLO[0] | {"reasoning_content": "想"}]}, "turn 1: only the assistant has thoughts"),
    ({"messages": [HELLO[0], HELLO[1] | {"reasoning_content": ["想"]}]}, "turn 2: the thought is list"),
    ({"messages": HELLO, "tools": "[{"}, "`tools` is text, but not JSON"),
    ({"messages": HELLO, "tools": {"name": "x"}}, "`tools` is not a list"),
    (
        {"messages": [HELLO[0], {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
        "turn 2: a call of a tool has no name",
    ),
    ({"messages": [*HELLO, {"role": ["user"], "content": "x"}]}, "turn 3 has the unknown role"),
    ({"messages": [{"content": "x"}]}, "turn 1 has the unknown role None"),
    ({"messages": [HELLO[0], {"role": "assistant", "content": " \n\u3000"}]}, "turn 2 is empty"),
    ({"messages": [{"role": "user", "content": []}]}, "turn 1 is empty"),
    ({"messages": [{"role": "user", "content": None}]}, r"turn 1 has no text \(NoneType\)"),
    ({"messages": [{"role": "user", "content": 5}]}, r"turn 1 has no text \(int\)"),
    ({"messages": ["你好"]}, "turn 1 is str, not an object"),
    ({"messages": []}, "`messages` is not a list of turns"),
    ({"conversations": "你好"}, "`conversations` is not a list of turns"),
    ({"text": "你好"}, r"no dialogue in it: needs .*the fields are text"),
    ({}, "the fields are none"),
    ({"instruction": "", "output": "好"}, "`instruction` is empty"),
    ({"instruction": "好", "output": " "}, "`output` is empty"),
    ({"instruction": ["好"], "output": "好"}, "must be texts"),
    ({"instruction": "好", "output": "好", "history": [["只有问"]]}, "`history` must be a list of"),
    ({"instruction": "好", "output": "好", "history": "你好"}, "`history` must be a list of"),
    ({"instruction": "好", "output": "好", "history": 5}, "`history` must be a list of"),
    ({"messages": [{"role": "user", "content": "你\ufdd9好"}]}, r"U\+FDD9 is not a character"),
    ({"messages": [{"role": "user", "content": "\ufdd0"}]}, r"U\+FDD0 is not a character"),
    (["你好"], "list instead of an object"),
]
BROKEN = [
    ('{"messages": [', "not JSON"),
    ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half a character"),
    ("[" * 100_000, "not JSON"),
]
LINES = [(json.dumps(record, ensure_ascii=False), why) for record, why in BAD] + BROKEN


@pytest.mark.parametrize(("line", "why"), LINES, ids=range(len(LINES)))
def test_a_bad_record_is_named_by_file_and_line(tmp_path, line, why):
    good = [json.dumps({"messages": HELLO[:1]}), "", json.dumps({"messages": HELLO}, ensure_ascii=False)]
    (tmp_path / "a.jsonl").write_text("\n".join([*good, line, *good]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"a\.jsonl, line 4: .*{why}.*--skip_bad leaves such lines out"):
        run(tmp_path / "a.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_skip_bad_counts_every_bad_record(tmp_path):
    good = [as_messages(talk) for talk in talks(40)]
    lines = [json.dumps(r, ensure_ascii=False) for r in good[:20]] + [line for line, _ in LINES]
    lines += [json.dumps(r, ensure_ascii=False) for r in good[20:]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    result = run(tmp_path / "a.jsonl", tmp_path / "out", skip_bad=True)
    assert (result["skipped"], result["documents"]) == (len(LINES), 40)
    assert everything(tmp_path / "out") == sorted(map(chatml, talks(40)))


def test_marks_in_the_text_forge_no_roles(tmp_path):
    """Roles travel as noncharacters inside; a file that holds some gets no say in them."""
    (tmp_path / "a.txt").write_text("\n".join("\n".join([*talk, ""]) for talk in talks(30)), encoding="utf-8")
    lines = (tmp_path / "a.txt").read_text(encoding="utf-8").split("\n")
    at = next(i for i, line in enumerate(lines) if line.startswith("0号7"))
    lines[at] = "\ufdd8系统\ufdda答"
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    for template in ("sep", "chatml"):
        with pytest.raises(UserError, match=rf"a\.txt, line {at + 1}: U\+FDD8 is not a character"):
            run(tmp_path / "a.txt", tmp_path / "out", template=template)
        result = run(tmp_path / "a.txt", tmp_path / template, template=template, skip_bad=True)
        assert (result["skipped"], result["documents"]) == (1, 29)


# --- text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
@pytest.mark.parametrize("blank", ["\n", "\r\n", "\n\n\n", "\n \t\n", "\n\u3000\n", "\r\n\u3000 \r\n\r\n", "\r"])
def test_odd_separators_give_the_same_dialogues(tmp_path, blank, encoding):
    dialogues = [[f"你好{i}，吃了吗？今天的比赛真好看", "吃了", "好"] for i in range(60)]
    end = "\r\n" if "\r\n" in blank else blank[0]
    raw = (end + blank).join(end.join([f" {d[0]}\u3000", *d[1:]]) for d in dialogues)
    for before, after in ((f"{blank}\u3000{end}", f"{end} {blank}\u3000"), (f"\u3000{end}", f"{end} \u3000")):
        (tmp_path / "a.txt").write_bytes((before + raw + after).encode(encoding))
        run(tmp_path / "a.txt", tmp_path / "out")
        assert everything(tmp_path / "out") == sep(*dialogues)


def test_templates_and_the_tokens_they_take(tmp_path):
    source = text(tmp_path / "a.txt", talks(60))
    run(source, tmp_path / "sep")
    run(source, tmp_path / "chatml", template="chatml")
    assert everything(tmp_path / "sep") == sep(*talks(60))
    assert everything(tmp_path / "chatml") == sorted(map(chatml, talks(60)))
    for name, template, end in (("sep", SEP_TEMPLATE, "<pad>"), ("chatml", CHATML_TEMPLATE, "<|im_end|>")):
        tokenizer, data = Tokenizer.load(tmp_path / name), PreparedData.open(tmp_path / name)
        assert tokenizer.config["chat_template"] == template
        assert tokenizer.config["eos_token"] == end
        assert data.is_dialogue
        assert data.end_ids[-1] == data.eot_id == tokenizer.token_to_id(end)
        assert data.sep_id == (tokenizer.sep_id if name == "sep" else None)
        for stream in (data.train, data.val):
            ids = stream.read(0, len(stream))
            if name == "chatml":  # before every second message, the user's
                begins = np.flatnonzero(ids == tokenizer.token_to_id("<|im_start|>"))[::2]
            else:
                begins = np.flatnonzero(ids == tokenizer.sep_id) + 1
            assert stream.turns.tolist() == sorted({*stream.starts.tolist(), *begins.tolist()})


def test_text_and_records_mixed(tmp_path):
    sources = [text(tmp_path / "a.txt", talks(40)), jsonl(tmp_path / "b.jsonl", [as_messages(t) for t in talks(40, 1)])]
    run(sources, tmp_path / "auto")
    assert everything(tmp_path / "auto") == sorted(map(chatml, talks(40) + talks(40, 1)))
    lines = {"messages": [SYSTEM, {"role": "user", "content": "一\n二\r\n三"}, {"role": "assistant", "content": "好"}]}
    sources.append(jsonl(tmp_path / "c.jsonl", [lines]))
    run(sources, tmp_path / "sep", template="sep")
    assert everything(tmp_path / "sep") == sep(*talks(40), *talks(40, 1), ["一 二 三", "好"])


def test_the_assistants_words_and_the_token_that_ends_them_are_marked(tmp_path):
    run(jsonl(tmp_path / "a.jsonl", [as_messages(t) for t in talks(60)]), tmp_path / "out")
    data, tokenizer = PreparedData.open(tmp_path / "out"), Tokenizer.load(tmp_path / "out")
    learned = Counter()
    for stream in (data.train, data.val):
        assert len(stream.scored) == len(stream)
        for start, end in zip(stream.starts, [*stream.starts[1:], len(stream)], strict=True):
            scored = stream.read_scored(start, end)
            learned[tokenizer.decode(stream.read(start, end)[scored])] += 1
    assert learned == Counter("".join(line + "<|im_end|>" for line in talk[1::2]) for talk in talks(60))
    run(tmp_path / "a.jsonl", tmp_path / "all", loss="all")
    assert PreparedData.open(tmp_path / "all").train.scored is None
    assert PreparedData.open(tmp_path / "all").fingerprint != data.fingerprint  # the same tokens, learned otherwise


def test_counts_are_of_words_and_one_character_between_turns(tmp_path):
    dialogues = talks(60)
    run(text(tmp_path / "a.txt", dialogues), tmp_path / "sep")
    records = jsonl(tmp_path / "a.jsonl", [as_messages(t) for t in dialogues])
    for number, settings in enumerate(({}, {"loss": "all"}, {"tokenizer": "bpe", "vocab_size": 330})):
        run(records, out := tmp_path / f"roles{number}", **settings)
        described = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        kept = {split: [d for d in dialogues if chatml(d) in set(decoded(out, split))] for split in ("train", "val")}
        for split in ("train", "val"):
            assert described[split]["documents"] == len(kept[split]) > 0
            assert described[split]["characters"] == sum(len("\n".join(d)) for d in kept[split])
            assert described[split]["bytes"] == sum(len("\n".join(d).encode()) for d in kept[split])
        assert described["statistics"]["characters"] == sum(len("".join(d)) for d in dialogues)
        assert not any("\ufdd0" <= c <= "\ufdef" for token in Tokenizer.load(out).backend.get_vocab() for c in token)
    described = json.loads((tmp_path / "sep" / "manifest.json").read_text(encoding="utf-8"))
    assert sum(described[s]["characters"] for s in ("train", "val")) == sum(len("\n".join(d)) for d in dialogues)


# --- weights -----------------------------------------------------------------------------------------------------


def test_weights_thin_out_and_repeat_without_moving_the_split(tmp_path):
    first, second = talks(400), talks(300, seed=1)
    sources = [text(tmp_path / "a.txt", first), text(tmp_path / "b.txt", second)]
    run(sources, tmp_path / "plain")
    sides = {split: Counter(decoded(tmp_path / "plain", split)) for split in ("train", "val")}
    result = run(sources, tmp_path / "weighted", weights=(0.3, 2.5))
    described = json.loads((tmp_path / "weighted" / "manifest.json").read_text(encoding="utf-8"))
    train, val = (Counter(decoded(tmp_path / "weighted", split)) for split in ("train", "val"))
    assert set(train) <= set(sides["train"])
    assert set(val) <= set(sides["val"])
    assert set(val.values()) == {1}
    ours, others = set(sep(*first)), set(sep(*second))
    kept = {d for d in {**train, **val} if d in ours}
    assert 0.2 < len(kept) / 400 < 0.4
    assert {train[d] for d in kept if d in train} == {1}
    assert others <= {*train, *val}
    times = Counter(train[d] for d in others if d in train)
    assert set(times) == {2, 3}
    assert 0.4 < times[2] / times.total() < 0.6
    for split, found in (("train", train), ("val", val)):
        words = "".join(d.removesuffix("<pad>").replace("<sep>", "\n") * n for d, n in found.items())
        assert described[split]["documents"] == found.total()
        assert described[split]["characters"] == len(words)
        assert described[split]["bytes"] == len(words.encode())
    statistics = described["statistics"]
    assert statistics["left_out_by_weights"] == 400 - len(kept)
    assert statistics["documents"] == train.total() + val.total() == result["documents"]
    again = run(sources, tmp_path / "again", weights=(0.3, 2.5), workers=2)
    assert (again["train_tokens"], again["val_tokens"]) == (result["train_tokens"], result["val_tokens"])


def test_weights_of_the_last_dialogues_move_none_into_training(tmp_path):
    sources = [text(tmp_path / "a.txt", talks(100)), text(tmp_path / "b.txt", talks(100, seed=1))]
    run(sources, tmp_path / "out", split="tail", val_fraction=0.25, weights=(0.3, 2))
    assert set(decoded(tmp_path / "out", "val")) == set(sep(*talks(100, seed=1)[50:]))
    assert Counter(d for d in decoded(tmp_path / "out", "train") if d.startswith("1"))[sep(talks(1, seed=1)[0])[0]] == 2


def test_what_a_thinned_source_loses_comes_from_the_other(tmp_path):
    sources = [text(tmp_path / "a.txt", talks(200)), text(tmp_path / "b.txt", talks(200))]
    run(sources, tmp_path / "out", weights=(0.2, 1))
    assert everything(tmp_path / "out") == sep(*talks(200))


def test_weights_of_plain_text(tmp_path):
    paths = [text(tmp_path / f"{name}.txt", talks(100, seed)) for seed, name in enumerate("ab")]
    sources = [str(path) for path in paths]
    result = prepare(sources, PrepareConfig(out=tmp_path / "out", weights=(1, 3)))
    train, val = (decoded(tmp_path / "out", split) for split in ("train", "val"))
    assert {Counter(train)[d] for d in train if d.startswith("1")} == {3}
    assert len(val) == len(set(val))
    assert result["documents"] == len(train) + len(val)
    with pytest.raises(UserError, match="one stream and knows no weights"):
        prepare(sources, PrepareConfig(out=tmp_path / "x", weights=(1, 3), split="tail"))


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": (1, 2)}, "2 weights for 1 source; give one number for each source"),
        ({"template": "sep", "loss": "assistant"}, "--loss=assistant needs roles"),
        ({"loss": "assistant"}, "--loss=assistant needs roles"),
        ({"format": "text", "loss": "all"}, "--template, --loss and --enable_thinking are for dialogues"),
        ({"format": "auto", "template": "chatml"}, "--template, --loss and --enable_thinking are for dialogues"),
        ({"enable_thinking": False}, "--enable_thinking is for templates that ask for it"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, settings, message):
    source = text(tmp_path / "a.txt", talks(30))
    if settings.get("tokenizer") == "FOREIGN":
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE

        Backend(BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
        settings = settings | {"tokenizer": str(tmp_path)}
    with pytest.raises(UserError) as refusal:
        prepare([str(source)], PrepareConfig(**{"out": tmp_path / "out", "format": "dialogue"} | settings))
    assert message in str(refusal.value)


@pytest.mark.parametrize("weights", [(0,), (-1,), (101,), (float("nan"),)])
def test_weights_are_positive(tmp_path, weights):
    with pytest.raises(UserError, match="give a positive number up to 100 for every source"):
        PrepareConfig(out=tmp_path, weights=weights)


def test_a_models_own_template_is_kept(tmp_path):
    run(text(tmp_path / "a.txt", talks(60)), tmp_path / "one", template="chatml")
    own = "{% for m in messages %}{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "one" / "chat_template.jinja").write_text(own, encoding="utf-8")
    run(text(tmp_path / "b.txt", talks(50, 2)), tmp_path / "two", tokenizer=str(tmp_path / "one"))
    assert Tokenizer.load(tmp_path / "two").config["chat_template"] == own
    names = ("user", "assistant")
    assert everything(tmp_path / "two") == sorted(
        "".join(f"{names[i % 2]}>{line}<|im_end|>" for i, line in enumerate(talk)) for talk in talks(50, 2)
    )


# --- workers, and the directory ----------------------------------------------------------------------------------


def contents(out: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "manifest.json"}
    described = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    described.pop("settings")
    return {**files, "manifest": json.dumps(described).encode()}


@pytest.mark.parametrize("settings", [{}, {"template": "sep"}, {"tokenizer": "bpe", "vocab_size": 330},
                                      {"weights": (0.5, 2), "split": "tail"}])  # fmt: skip
def test_workers_and_blocks_change_nothing(tmp_path, monkeypatch, settings):
    sources = [
        text(tmp_path / "a.txt", talks(150)),
        jsonl(tmp_path / "b.jsonl", [as_messages(t) for t in talks(90, 1)]),
    ]
    run(sources, tmp_path / "one", workers=1, **settings)
    monkeypatch.setattr(workers, "SMALL_INPUT_BYTES", 0)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 700)
    monkeypatch.setattr(documents, "MAX_BLOCKS_PER_TASK", 3)
    run(sources, tmp_path / "many", workers=2, **settings)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_a_directory_is_rewritten_in_place(tmp_path):
    """Roles, then lines, then plain text, into a directory that also holds the source."""
    home = tmp_path / "home"
    home.mkdir()
    records, lines = jsonl(home / "a.jsonl", [as_messages(t) for t in talks(60)]), text(home / "b.txt", talks(60))
    shared = {"a.jsonl", "b.txt", "train.bin", "train.idx", "val.bin", "val.idx", "tokenizer.json",
              "tokenizer_config.json", "manifest.json"}  # fmt: skip
    more = {f"{split}.{kind}" for split in ("train", "val") for kind in ("turns", "scored")} | {"chat_template.jinja"}
    run(records, home)
    assert {path.name for path in home.iterdir()} == shared | more
    run(lines, home)
    assert {path.name for path in home.iterdir()} == shared | more - {"train.scored", "val.scored"}
    assert PreparedData.open(home).train.scored is None
    prepare([str(lines)], PrepareConfig(out=home))
    assert {path.name for path in home.iterdir()} == shared
    assert not PreparedData.open(home).is_dialogue
    run(home, tmp_path / "again", template="sep")  # the directory as a source: its own products are no dialogues
    assert everything(tmp_path / "again") == sep(*talks(60))


@pytest.mark.parametrize("kind", ["idx", "turns", "scored"])
def test_damage_beside_the_shards_is_named(tmp_path, kind):
    run(jsonl(tmp_path / "a.jsonl", [as_messages(t) for t in talks(60)]), tmp_path / "out")
    file = tmp_path / "out" / f"train.{kind}"
    whole = file.read_bytes()
    for damaged, message in (
        (whole[:-8], "is truncated or altered"),
        (whole[:-1], "is truncated or altered"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "was altered"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"train\.{kind} {message}"):
            PreparedData.open(tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match=rf"train\.{kind} is missing"):
        PreparedData.open(tmp_path / "out")


def test_a_directory_that_does_not_list_what_lies_beside_still_opens(tmp_path):
    run(text(tmp_path / "a.txt", talks(60)), tmp_path / "out")
    file = tmp_path / "out" / "manifest.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    for split in ("train", "val"):
        del described[split]["beside"]
    file.write_text(json.dumps(described), encoding="utf-8")
    assert everything(tmp_path / "out") == sep(*talks(60))
    (tmp_path / "out" / "train.turns").write_bytes(b"123")
    with pytest.raises(UserError, match=r"train\.turns is truncated"):
        _ = PreparedData.open(tmp_path / "out").train.turns

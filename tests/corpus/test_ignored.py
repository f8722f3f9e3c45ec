"""Keys of dialogue records: read, or refused by name, or said once with file, line and count. Never in silence."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from miaobi.corpus import blocks, workers
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.ignored import MOST, OTHERS, in_words, note
from miaobi.corpus.messages import ignored_keys, messages_of
from miaobi.corpus.prepare import prepare

USER, REPLY = {"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好呀"}


@pytest.mark.parametrize("turn", [
    {"name": "小明"}, {"cache_control": {"type": "ephemeral"}}, {"id": 7}, {"emotion": "喜"},
    {"annotations": [{"url": "x"}]}, {"timestamp": 0}, {"from": "gpt"}, {"value": "你好呀"}, {"prefix": "Dr."},
    {"model": "gpt-4o"}, {"is_final": False},
])  # fmt: skip
def test_what_is_only_said_about_a_turn_is_named(turn):
    (key,) = turn
    for shape in ("messages", "conversations"):
        record = {shape: [USER, REPLY | turn]}
        assert messages_of(record) == ([USER, REPLY], "")
        assert list(ignored_keys(record)) == [f"{shape}[].{key}"]


@pytest.mark.parametrize("record", [
    {"messages": [USER, REPLY], "tools": [{"type": "function"}], "system": "简短", "kto_tag": True},
    {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "好", "prefix": False}]},
    {"instruction": "你好", "input": "", "output": "好", "history": [["问", "答"]], "reasoning": "想"},
    {"messages": [USER, REPLY | {"finish_reason": "stop", "refusal": None, "annotations": [], "name": ""}]},
    {"messages": [USER, {"role": "tool", "name": "查", "tool_call_id": "1", "content": "晴"}]},
    {"messages": None, "conversations": [USER, REPLY | {"thinking": "想", "eot": True, "loss_mask": 1}]},
])  # fmt: skip
def test_nothing_is_said_of_what_is_read_or_empty(record):
    assert messages_of(record)[1] == ""
    assert list(ignored_keys(record)) == []


@pytest.mark.parametrize(("record", "expected"), [
    ({"messages": [USER, REPLY], "id": 1, "source": "web"}, ["id", "source"]),
    ({"messages": [USER, REPLY], "instruction": "译"}, ["instruction"]),
    ({"instruction": "问", "output": "答", "label": "体育", "tags": ["甲"]}, ["label", "tags"]),
    ({"messages": [USER, REPLY | {"reasoning": "想", "thinking": "再想"}]}, ["messages[].thinking"]),
    ({"messages": [{"role": "user", "content": [{"text": "你好", "cache_control": {"type": 1}}]}]},
     ["messages[].content[].cache_control"]),
])  # fmt: skip
def test_what_stands_around_the_turns_is_named(record, expected):
    assert messages_of(record)[1] == ""
    assert list(ignored_keys(record)) == expected


@pytest.mark.parametrize(("record", "why"), [
    ({"messages": [USER, REPLY | {"prefix": True}]}, "turn 2 is not whole: `prefix` is True; finish it"),
    ({"messages": [USER, REPLY | {"partial": True}]}, "turn 2 is not whole: `partial`"),
    ({"messages": [USER, REPLY | {"eot": False}]}, "turn 2 is not whole: `eot`"),
    ({"messages": [USER, REPLY | {"finish_reason": "length"}]}, "turn 2 is not whole: `finish_reason` is 'length'"),
    ({"messages": [USER, REPLY | {"refusal": "不行"}]}, "turn 2: `refusal` cannot be learned"),
    ({"messages": [USER, REPLY | {"reasoning_details": [{}]}]}, "turn 2: `reasoning_details` cannot be learned"),
    ({"messages": [USER | {"attachments": [1]}]}, "turn 1: `attachments` cannot be learned"),
    ({"messages": [USER, REPLY | {"train_detail": [1]}]}, "turn 2: `train_detail` cannot be learned"),
    ({"messages": [USER, REPLY | {"value": "另一句"}]}, "turn 2 has `content` and `value`, and they differ"),
    ({"messages": [USER, REPLY], "documents": [{"text": "x"}]}, "`documents` cannot be learned"),
    ({"messages": [USER, REPLY], "label": False}, "`label` is false: its reply is one not to give"),
    ({"messages": [USER, REPLY | {"masked": 0.5}]}, "turn 2: `masked` is 0.5; only 0 (not masked) and 1 "),
])  # fmt: skip
def test_what_changes_the_meaning_is_refused(record, why):
    assert messages_of(record)[0] == []
    assert messages_of(record)[1].startswith(why)


@pytest.mark.parametrize("mark", [{"training": False}, {"masked": True}, {"loss_mask": 0}, {"loss_scale": 0.0}])
def test_other_projects_names_for_a_turn_that_is_not_learned(mark):
    assert messages_of({"messages": [USER, REPLY | mark]}) == ([USER, REPLY | {"weight": 0}], "")


def write(path: Path, records: list[dict]) -> Path:
    """As the suffix says: JSON lines, an array, parquet."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"messages": [r["messages"] for r in records]}), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, ensure_ascii=False, indent=0), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def dialogue(number: int, **more: object) -> dict:
    return {"messages": [{"role": "user", "content": f"第{number}问"}, {"role": "assistant", "content": "好"} | more]}


@pytest.mark.parametrize(("name", "place"), [("a.jsonl", "line 31"), ("a.parquet", "row 31"), ("a.json", "line ")])
@pytest.mark.parametrize("count", [1, 2])
def test_keys_are_said_once_with_file_line_and_count(tmp_path, monkeypatch, capsys, name, place, count):
    monkeypatch.setattr(workers, "SMALL_INPUT_BYTES", 0)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 900)
    records = [dialogue(i, **({"name": "甲"} if i >= 30 else {})) for i in range(60)]
    path = write(tmp_path / name, records)
    result = prepare([str(path)], PrepareConfig(out=tmp_path / "out", format="dialogue", workers=count))
    (key, (times, first)), = result["ignored"].items()  # fmt: skip
    assert (key, times) == ("messages[].name", 30)
    assert first.startswith(f"{path}, {place}")
    line = f"keys of the dialogues that are not read: `messages[].name` (30, first in {first})"
    assert capsys.readouterr().err.count(line) == 1
    (source,) = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))["sources"]
    assert source["ignored"] == {key: [30, first]}


@pytest.mark.parametrize("count", [1, 2])
def test_system_messages_that_a_template_has_no_place_for_are_counted(tmp_path, monkeypatch, capsys, count):
    """Beside the turns, and inside: the sep template leaves both out."""
    monkeypatch.setattr(workers, "SMALL_INPUT_BYTES", 0)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 900)
    records = [dialogue(i) | ({"system": "简短"} if i % 3 == 0 else {}) for i in range(60)]
    records[1]["messages"].insert(0, {"role": "system", "content": "礼貌"})
    path = write(tmp_path / "a.jsonl", records)
    cfg = PrepareConfig(out=tmp_path / "out", format="dialogue", template="sep", workers=count)
    assert prepare([str(path)], cfg)["ignored"] == {"system": (21, str(path))}
    assert f"not read: `system` (21, first in {path})" in capsys.readouterr().err


def test_as_many_names_as_somebody_likes_take_no_more_room():
    counted = {}
    for i in range(5000):
        note(counted, [f"{i:05}" * 200], 3)
    assert len(counted) == MOST + 1
    assert counted[OTHERS] == (5000 - MOST, 3)
    assert len(in_words(counted)) < 2000


@pytest.mark.parametrize("key", ["\ud800", "名\udfff", "\x00\ud9ff\x1b["])
def test_names_with_half_a_character_stand_in_the_manifest_as_they_are(tmp_path, key):
    file = tmp_path / "a.jsonl"
    file.write_text((json.dumps({"messages": [USER, REPLY], key: 1}) + "\n") * 30, encoding="utf-8")
    prepare([str(file)], PrepareConfig(out=tmp_path / "out", format="dialogue", workers=1, dedup="none"))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert list(manifest["sources"][0]["ignored"]) == [key]

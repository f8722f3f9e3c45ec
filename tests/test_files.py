"""JSON and text that this program writes."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from miaobi.files import json_of, write_json, write_text

ANY = st.text(st.characters(codec=None, categories=None))


@given(st.recursive(ANY | st.integers() | st.booleans() | st.none(), lambda x: st.lists(x) | st.dictionaries(ANY, x)))
def test_json_holds_half_characters_and_is_utf8(value):
    assert json.loads(json_of(value).encode("utf-8")) == value
    assert json.loads(json_of(value, indent=1).encode("utf-8")) == value


def test_files_hold_half_characters(tmp_path: Path):
    write_json(tmp_path / "a.json", {"\ud800": "皇马\udfff"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"\ud800": "皇马\udfff"}
    write_text(tmp_path / "a.txt", "bad\udcff.txt")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "bad\\udcff.txt"

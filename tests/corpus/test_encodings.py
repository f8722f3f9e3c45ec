"""Which encoding short texts, texts with zero bytes and texts of two encodings are in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miaobi.corpus import encodings

SIMPLIFIED = (
    "皇马昨晚在主场以三比一战胜了来访的对手，球迷们高兴地唱起歌来。\n主教练赛后说，大家都知道这场比赛很重要。\n\n"
    "今天天气很好，我们去公园里走走吧。\n你说得对，可是我还没有吃饭呢！\n\n"
    "经济发展的速度比去年同期提高了百分之五，这是一个很好的消息。"
)
TRADITIONAL = (
    "皇馬昨晚在主場以三比一戰勝了來訪的對手，球迷們高興地唱起歌來。\n主教練賽後說，大家都知道這場比賽很重要。\n\n"
    "今天天氣很好，我們去公園裡走走吧。\n你說得對，可是我還沒有吃飯呢！\n\n"
    "經濟發展的速度比去年同期提高了百分之五，這是一個很好的消息。"
)


@pytest.mark.parametrize(("codec", "text"), [("gb18030", SIMPLIFIED), ("big5", TRADITIONAL), ("gb18030", TRADITIONAL)])
@pytest.mark.parametrize(("length", "at_most_wrong"), [(4, 0.03), (8, 0.0)])
def test_short_texts(codec, text, length, at_most_wrong):
    wrong = total = 0
    for start in range(len(text) - length):
        snippet = text[start : start + length]
        if all("\u4e00" <= c <= "\u9fff" for c in snippet):
            total += 1
            wrong += encodings.detect(snippet.encode(codec)) != (codec, 0)
    assert total > 10
    assert wrong / total <= at_most_wrong


@pytest.mark.parametrize(
    "text", ["plain ASCII", "café · naïve", "Привет, мир", "日本語のテキスト", "한국어", "x😀", "a\tb\n"]
)
def test_utf8_that_is_not_chinese(text):
    assert encodings.detect(text.encode()) == ("utf-8", 0)


def test_text_of_few_characters_and_control_characters_is_utf8():
    """UTF-16 explains it better, but badly; what is valid UTF-8 is then no reason to refuse a file."""
    assert encodings.detect("好<<a\x0b\x0b".encode()) == ("utf-8", 0)


PASSAGES = st.sampled_from(["gb18030", "big5", "utf-8"]).flatmap(
    lambda codec: st.sampled_from([SIMPLIFIED[:60], TRADITIONAL[:60], "plain words 123 ", "㐀㐁㐂㐃" * 9]).map(
        lambda text: (text * 9).encode(codec, "ignore") + b"\n"
    )
)


@given(
    pieces=st.lists(PASSAGES, max_size=12), encoding=st.sampled_from(["gb18030", "big5"]), ending=st.binary(max_size=2)
)
def test_mixed_encodings_are_found_as_if_each_passage_was_looked_at(pieces, encoding, ending):
    data, expected, position = b"".join(pieces) + ending, None, 0
    while position < len(data) and not expected:
        end = data.find(b"\n", position + 1024) + 1 or len(data)
        found = encodings._better_reading(data[position:end], encoding)
        expected, position = (position, found) if found else None, end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encodings, "_STRETCH", 3)
        assert encodings.mixed_encoding(data, encoding) == expected


@pytest.mark.parametrize("codec", ["utf-8", "gb18030", "big5"])
@pytest.mark.parametrize("place", [0, 1, 300, -1])
@pytest.mark.parametrize("count", [1, 3, 5000])
def test_zero_bytes_do_not_make_a_text_binary(codec, place, count):
    data = (TRADITIONAL * 9).encode(codec)
    characters = [c.encode(codec) for c in TRADITIONAL * 9]
    at = len(data) if place == -1 else len(b"".join(characters[:place]))
    assert encodings.detect(data[:at] + bytes(count) + data[at:]) == (codec, 0)


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_utf16_that_a_disk_filled_up(codec):
    text = SIMPLIFIED + "\n"
    assert encodings.detect(text.encode(codec) + bytes(4096)) == (codec, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"\x7fELF\2\1\1" + bytes(9) + bytes(range(1, 32)) * 20,
        bytes(range(256)) * 9,
        b"".join(n.to_bytes(4, "little") for n in range(0, 400000, 1999)),
        b"\0\1\2\3" * 100,
    ],
    ids=["program", "all bytes", "numbers", "small numbers"],
)
def test_binary_files_stay_binary(data):
    assert encodings.detect(data) is None

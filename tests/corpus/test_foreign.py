"""BERT's vocab.txt and GPT-2's vocab.json + merges.txt: transformers' ids, text without loss where it can be."""

import contextlib
import itertools
import json
import pickle
from pathlib import Path

import pytest
import transformers
from hypothesis import example, given
from hypothesis import strategies as st

from miaobi.corpus.foreign import join_word_pieces
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = (
    [*"你好世界今天皇马赢了比赛，。！？：“”、,.!?;:[]()'-"] + list("abcdefghijklmnopqrstuvwxyzABCDEHIPSUVé0123456789")
    + [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyzé0123456789好"]
    + ["hello", "world", "the", "##ing", "##er", "play", "Hello", "é", "sep", "SEP", "한국", "##어", "▁"]
)  # fmt: skip
TEXTS = [
    "你好，世界！", "hello world", "Hello, world! Playing 3,000 times; it's 12:30", "今天hello世界world 2024年",
    "皇马3:1赢了 Real Madrid  了比赛", "😀你好👨‍👩‍👧", "[SEP] 你好[CLS][PAD][UNK][MASK]", "naïve café é", "한국어 한국",
    "a\nb\tc\u3000d\u200d\x00e", "", " ", "﹏ＡＢＣ龘𠮷", "x" * 120,
]  # fmt: skip
any_text = st.text(st.one_of(st.sampled_from("".join(TEXTS)), st.characters(exclude_categories=["Cs"])), max_size=60)


def bert(directory: Path, **settings: object) -> Path:
    """A directory with vocab.txt and, where there are settings, tokenizer_config.json."""
    directory.mkdir(exist_ok=True)
    (directory / "vocab.txt").write_text("\n".join(dict.fromkeys(SPECIALS + WORDS)) + "\n", encoding="utf-8")
    if settings:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


SETTINGS = [
    {},
    {"do_lower_case": False},
    {"do_lower_case": False, "strip_accents": True},
    {"strip_accents": False, "tokenize_chinese_chars": True},
    {"tokenize_chinese_chars": False, "do_lower_case": True},
]


@pytest.fixture(scope="module", params=range(len(SETTINGS)))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Ours and transformers' tokenizer of one directory."""
    directory = bert(tmp_path_factory.mktemp("bert"), **SETTINGS[request.param])
    return Tokenizer.load(directory), transformers.BertTokenizerFast.from_pretrained(directory)


@given(text=any_text)
def test_bert_ids_are_those_of_transformers(both, text):
    ours, theirs = both
    assert ours.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids


def test_bert_ids_of_odd_text(both):
    ours, theirs = both
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.encode_array(text).tolist() == ids
        controls = {ours.token_to_id(name) for name in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")}
        assert not controls & set(ids), "a literal special in text stays text"


def test_specials_of_bert(tmp_path):
    tokenizer = Tokenizer.load(bert(tmp_path))
    assert (tokenizer.pad_id, tokenizer.sep_id, tokenizer.eot_id) == (0, 3, 3)
    assert tokenizer.vocab_size == len(dict.fromkeys(SPECIALS + WORDS))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "[CLS]", "pad_token": "[MASK]"}))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.pad_id, tokenizer.sep_id, tokenizer.eot_id) == (4, 3, 2)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("你好，世界！", "你好，世界！"),
        ("hello world", "hello world"),
        ("playing the player", "playing the player"),
        ("hello, world! 3,000 12:30", "hello, world!3,000 12:30"),
        ("你好hello world世界 2024", "你好hello world世界2024"),
        ("皇马3:1赢了", "皇马3:1赢了"),
    ],
)
def test_chinese_is_joined_and_words_stay_apart(tmp_path, text, shown):
    tokenizer = Tokenizer.load(bert(tmp_path))
    assert tokenizer.decode(tokenizer.encode(text)) == shown


def test_korean_words_stay_apart_and_japanese_ones_do_not():
    assert join_word_pieces(["한국", "한국", "##어"], frozenset()) == "한국 한국어"
    assert join_word_pieces(["こん", "にちは"], frozenset()) == "こんにちは"


def test_specials_are_written_out_without_blanks(tmp_path):
    tokenizer = Tokenizer.load(bert(tmp_path))
    ids = [2, *tokenizer.encode("hello"), 3, *tokenizer.encode("world"), 3]
    assert tokenizer.decode(ids) == "[CLS]hello[SEP]world[SEP]"
    assert tokenizer.decode([*ids, 10**6]) == tokenizer.decode(ids), "spare rows decode to nothing"


@given(tokens=st.lists(st.sampled_from(["", "##", *SPECIALS, *WORDS]), max_size=12))
def test_more_tokens_only_add_text(tokens):
    specials = frozenset(SPECIALS)
    shown = [join_word_pieces(tokens[:n], specials) for n in range(len(tokens) + 1)]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))
    letters = "".join(t[2:] if t.startswith("##") and len(t) > 2 else t for t in tokens)
    assert shown[-1].replace(" ", "") == letters, "nothing but blanks is put between"


def test_streaming_and_decode_agree(tmp_path):
    tokenizer = Tokenizer.load(bert(tmp_path))
    ids = tokenizer.encode("".join(TEXTS))
    assert tokenizer.decode_stable(ids) == tokenizer.decode(ids)


def test_a_bert_tokenizer_is_saved_for_us_and_for_transformers(tmp_path):
    original = Tokenizer.load(bert(tmp_path / "from", do_lower_case=False, model_max_length=64))
    original.save(tmp_path / "to", model_max_length=32)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "to")
    for copy in (Tokenizer.load(tmp_path / "to"), pickle.loads(pickle.dumps(original))):
        assert copy.backend.to_str() == original.backend.to_str()
        assert (copy.eot_id, copy.pad_id, copy.sep_id) == (3, 0, 3)
        for text in TEXTS:
            ids = original.encode(text)
            assert copy.encode(text) == theirs(text, add_special_tokens=False).input_ids == ids
            assert copy.decode(ids) == original.decode(ids)
    assert (theirs.sep_token_id, theirs.pad_token_id) == (3, 0)


def test_tokens_added_behind_a_vocabulary(tmp_path):
    size = len(dict.fromkeys(SPECIALS + WORDS))
    bert(tmp_path, additional_special_tokens=["[S]"])
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[S]": size + 1, "ordinary": size}), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.token_to_id("ordinary"), tokenizer.token_to_id("[S]")) == (size, size + 1)
    assert tokenizer.encode("你ordinary") == [tokenizer.token_to_id("你"), size]
    assert size + 1 not in tokenizer.encode("[S]")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[S]": size + 7}), encoding="utf-8")
    with pytest.raises(UserError, match=r"added_tokens\.json puts \[S\] at"):
        Tokenizer.load(tmp_path)


# GPT-2


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt of a small byte-level BPE."""
    from tokenizers import ByteLevelBPETokenizer

    directory = tmp_path_factory.mktemp("gpt2")
    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(TEXTS * 5, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    learner.save_model(str(directory))
    return directory


@given(text=any_text)
def test_gpt2_ids_are_those_of_transformers(gpt2, text):
    ours, theirs = Tokenizer.load(gpt2), transformers.GPT2TokenizerFast.from_pretrained(gpt2)
    ids = ours.encode(text)
    assert ids == theirs(text, split_special_tokens=True).input_ids
    assert ours.decode(ids) == text


def test_gpt2_specials_and_streaming(gpt2, tmp_path):
    tokenizer = Tokenizer.load(gpt2)
    assert tokenizer.eot_id == tokenizer.token_to_id("<|endoftext|>") == 0
    assert tokenizer.eot_id not in tokenizer.encode("a<|endoftext|>b")
    ids = tokenizer.encode("".join(TEXTS))
    shown = [tokenizer.decode_stable(ids[:n]) for n in range(len(ids) + 1)]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))
    tokenizer.save(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("你好 hello").input_ids == tokenizer.encode(
        "你好 hello"
    )


# Damage


def test_what_is_missing_or_of_another_kind_is_said(tmp_path, gpt2):
    with pytest.raises(UserError, match=r"no tokenizer\.json there, nor vocab\.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"has no \[UNK\], so it is not BERT's"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((gpt2 / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"Qwen2Tokenizer needs its tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "merges.txt").write_text("#version: 0.2\n皇 马\n", encoding="utf-8")
    with pytest.raises(UserError, match="do not fit together"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[]", "holds no settings")])
def test_damaged_settings_are_named(tmp_path, name, content, message):
    bert(tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"{name} {message}"):
        Tokenizer.load(tmp_path)


# --- hostile tokenizer.json


def with_part(**parts: object) -> str:
    return json.dumps(json.loads(Tokenizer.train_char({"好": 2, "a": 1}).backend.to_str()) | parts)


def replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def control(content: str, id_: int = 263) -> list[dict]:
    kinds = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": id_, "content": content, "special": True, **kinds}]


def around(ids: list[int]) -> dict:
    """A post-processor that puts these ids before a text."""
    single = [{"SpecialToken": {"id": "X", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    token = {"id": "X", "ids": ids, "tokens": ["x"] * len(ids)}
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"X": token}}  # fmt: skip


def test_a_text_is_neither_padded_nor_cut(tmp_path):
    """Nor is memory taken for the length that a file asks for, when it is read."""
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    texts = {}
    for name, parts in (("plain", {}), ("padded", {"padding": padding}), ("cut", {"truncation": cut})):
        (tmp_path / f"{name}.json").write_text(with_part(**parts), encoding="utf-8")
        texts[name] = Tokenizer.load(tmp_path / f"{name}.json").encode("皇马赢得比赛")
    assert texts["padded"] == texts["cut"] == texts["plain"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (with_part(normalizer={"type": "Sequence", "normalizers": [replace({"String": "a"}, "aa")] * 40}), "as long"),
        (with_part(normalizer=replace({"Regex": "."}, "a" * 10**5)), "times as long"),
        (with_part(decoder={"type": "Sequence", "decoders": [replace({"String": "a"}, "a" * 9)] * 3}), "times as long"),
        (with_part(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "gives up on it"),
        (with_part(added_tokens=control("x" * 30_000)), "30,000 characters"),
        (with_part(added_tokens=control("x\ufdd0y")), r"U\+FDD0"),
        (with_part(model={"type": "BPE", "vocab": {"a": 2**31}, "merges": []}), "2,147,483,648"),
        (with_part(model={"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "[UNK]", "max_input_chars_per_word": 9,
                          "continuing_subword_prefix": "##"}), r"\[UNK\]"),
        (with_part(post_processor=around([4_000_000_000])), "the id 4,000,000,000 around a text"),
        (with_part(post_processor=around([0] * 100_000)), "100,000 control tokens around"),
        (with_part(post_processor={"type": "BertProcessing", "sep": ["a", 0], "cls": ["b", 70_000]}), "the id 70,000"),
        (with_part(model=None), ""),
        ("[" * 100_000, ""),
        ('{"model": ' * 100_000, "nested too deeply"),
        ('{"model": ' + "9" * 5000 + "}", ""),
        ("[]", "no model"),
        ("\ufeff{}", ""),
    ],
)  # fmt: skip
def test_a_hostile_tokenizer_is_refused(tmp_path, text, why):
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"is not a tokenizer the tokenizers library can read.*{why}"):
        Tokenizer.load(tmp_path)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5),
              st.sampled_from(["BPE", "WordPiece", "Unigram", "Replace", "Sequence", "ByteFallback", "Split", "a"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["type", "vocab", "merges", "content", "pattern", "String", "Regex", "normalizers", "id", "a"]),
        inner, max_size=5),
    max_leaves=12,
)  # fmt: skip


@given(part=st.sampled_from(["model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder",
                             "truncation", "padding", "version"]), value=JSON)  # fmt: skip
def test_any_part_of_a_tokenizer_is_a_result_or_a_users_error(tmp_path_factory, part, value):
    home = tmp_path_factory.mktemp("fuzz")
    (home / "tokenizer.json").write_text(with_part(**{part: value}), encoding="utf-8")
    try:
        tokenizer = Tokenizer.load(home)
    except UserError:
        return
    tokenizer.decode(tokenizer.encode("好 a\n"))


@given(data=st.binary(max_size=200))
@example(data=b'{"a": ' * 50_000)
@example(data=b'{"eos_token": {"content": 5}, "unk_token": [1], "additional_special_tokens": 5, "chat_template": [[]]}')
def test_any_bytes_in_a_tokenizers_files_are_a_result_or_a_users_error(tmp_path_factory, data):
    home = tmp_path_factory.mktemp("fuzz")
    whole = {"vocab.txt": "[UNK]\n好", "vocab.json": '{"a": 0}', "merges.txt": "", "tokenizer.json": with_part()}
    beside = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
    kinds = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))
    for number, files in enumerate(kinds):
        for name in (*files, *beside):
            (place := home / f"{number}-{name}").mkdir()
            for file in files:
                (place / file).write_text(whole[file], encoding="utf-8")
            (place / name).write_bytes(data)
            with contextlib.suppress(UserError):
                Tokenizer.load(place).encode("好a")


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_patterns_that_give_up_on_a_text_are_an_error(part):
    """The library panics in the middle of an encoding, which is no Exception; it takes no time."""
    content = json.loads(Tokenizer.train_char(dict.fromkeys("皇马ab", 3)).backend.to_str())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
    content[part] = split if part == "pre_tokenizer" else replace
    tokenizer = Tokenizer.from_json(json.dumps(content), {})
    hostile = "a" * 3000 + "!"
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_documents([text], end_id=1)):
        with pytest.raises(UserError, match=r"patterns in tokenizer\.json give up on this text"):
            encode(hostile)
    assert tokenizer.decode(tokenizer.encode("ab"))


@pytest.mark.parametrize("role", ["unk_token", "eos_token", "bos_token", "pad_token"])
@pytest.mark.parametrize("value", [["x"], {"content": ["x"]}, {"content": {"a": 1}}, {"a": 1}, 3.5])
def test_special_tokens_that_are_no_text_are_refused_where_they_are_read(tmp_path, role, value):
    """Also beside a sound tokenizer.json; who uses a name must not look what it is."""
    Tokenizer.train_char({"你": 2, "好": 1}).save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {role: value}))
    with pytest.raises(UserError, match="special token of the tokenizer is"):
        Tokenizer.load(tmp_path)

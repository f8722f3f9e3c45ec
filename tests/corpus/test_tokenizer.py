"""Any text survives, literal specials stay text, and transformers agrees on every id."""

import itertools
import json
import os
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miaobi.corpus.tokenizer import BYTE_PIECES, N_RESERVED, SPECIALS, Tokenizer
from miaobi.errors import UserError

CORPUS = (
    "皇马昨晚在主场以3比1战胜了来访的对手，球迷们高兴地唱起歌来。\n\n主教练说：“大家都知道，这场比赛很重要！”\n" * 20
) + ("The quick brown fox <0x41> jumps over 2024 dogs.\t<sep> a<|im_end|>b  c\n" * 20)
ODD = [
    "<sep>", "<|im_end|>", "<|endoftext|><pad>", "<0x41>", "a<0x00>b", "\x00\x01\x7f", "é e\u0301 \u200d\ufeff", "𠮷𡃁",
    "😀👨‍👩‍👧",
    "  two  spaces\t\ttabs \n\n\n lines\r\n", "囍龘鱻", "\u2028\u2029\x85", "\U0010ffff\ufffd\ufdd0", "", " ", "\n",
    "▁Ġ##",
]  # fmt: skip
any_text = st.text(st.one_of(st.sampled_from(CORPUS), st.characters(exclude_categories=["Cs"])), max_size=200)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {
        "char": Tokenizer.train_char(Counter(CORPUS)),
        "small": Tokenizer.train_char(Counter(CORPUS), vocab_size=N_RESERVED + 20),
        "bpe": Tokenizer.train_bpe([CORPUS], 500),
    }


@pytest.fixture(scope="module")
def hub(tokenizers, tmp_path_factory) -> dict:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer

    loaded = {}
    for kind, tokenizer in tokenizers.items():
        directory = tmp_path_factory.mktemp(kind)
        tokenizer.save(directory, model_max_length=10**6)
        loaded[kind] = AutoTokenizer.from_pretrained(directory)
    return loaded


def naive_char_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    vocab = tokenizer.backend.get_vocab(with_added_tokens=False)
    ids = []
    for character in text:
        ids += [vocab[character]] if character in vocab else [5 + byte for byte in character.encode()]
    return ids


@pytest.mark.parametrize("kind", ["char", "small", "bpe"])
@given(text=any_text)
def test_any_text_survives(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_array(text).tolist() == ids
    assert tokenizer.encode_array(text).dtype == np.uint32
    assert not set(ids) & set(range(len(SPECIALS)))
    if kind != "bpe":
        assert ids == naive_char_ids(tokenizer, text)


@pytest.mark.parametrize("kind", ["char", "small", "bpe"])
@given(text=any_text)
def test_transformers_gives_the_same_ids(tokenizers, hub, kind, text):
    ids = tokenizers[kind].encode(text)
    assert hub[kind](text)["input_ids"] == ids
    assert hub[kind].decode(ids) == text


@pytest.mark.parametrize("kind", ["char", "small", "bpe"])
@pytest.mark.parametrize("text", [*ODD, "".join(ODD) * 3])
def test_odd_text(tokenizers, hub, kind, text):
    ids = tokenizers[kind].encode(text)
    assert tokenizers[kind].decode(ids) == text
    assert hub[kind](text)["input_ids"] == ids == hub[kind].encode(text, add_special_tokens=False)
    assert hub[kind].decode(ids) == text


def test_hub_settings(hub):
    for loaded in hub.values():
        assert (loaded.eos_token, loaded.eos_token_id, loaded.pad_token, loaded.pad_token_id) == (
            "<|endoftext|>",
            0,
            "<pad>",
            1,
        )
        assert loaded.model_max_length == 10**6


def test_vocabulary_order():
    tokenizer = Tokenizer.train_char({"丙": 2, "乙": 5, "甲": 5, "丁": 1})
    assert [tokenizer.token_to_id(t) for t in (*SPECIALS, *BYTE_PIECES)] == list(range(N_RESERVED))
    assert [tokenizer.token_to_id(c) for c in "乙甲丙丁"] == list(range(N_RESERVED, N_RESERVED + 4))
    assert (tokenizer.vocab_size, tokenizer.eot_id, tokenizer.pad_id, tokenizer.sep_id) == (265, 0, 1, 2)
    assert Tokenizer.train_char({"甲": 5, "丁": 1}, min_frequency=2).token_to_id("丁") is None
    assert Tokenizer.train_char({"甲": 5, "丁": 1}, vocab_size=262).vocab_size == 262


def test_bpe_really_merges(tokenizers):
    assert len(tokenizers["bpe"].encode(CORPUS)) < 0.6 * len(CORPUS)
    assert tokenizers["bpe"].vocab_size <= 500


def test_bpe_of_the_same_text_is_the_same():
    """Also where the last place for a character goes to one of many that are equally rare."""
    texts = ["".join(chr(0x4E00 + i) for i in range(300)) + "赢得比赛" * 9]
    first, second = (Tokenizer.train_bpe(texts, vocab_size=400) for _ in range(2))
    assert first.backend.to_str() == second.backend.to_str()
    assert first.token_to_id("赛") is not None
    assert first.token_to_id(chr(0x4E00)) is not None
    assert first.token_to_id(chr(0x4E00 + 299)) is None


@pytest.mark.parametrize("size", [200, N_RESERVED])
def test_too_small_vocabulary(size):
    with pytest.raises(UserError, match="leaves no room"):
        Tokenizer.train_char({"甲": 1}, vocab_size=size)
    with pytest.raises(UserError, match="leaves no room"):
        Tokenizer.train_bpe(["甲"], vocab_size=size)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_lone_surrogate(tokenizers, kind):
    for text in ("好\ud83d", "好" * 100 + "\ud83d"):
        with pytest.raises(UserError, match="lone surrogate U\\+D83D"):
            tokenizers[kind].encode(text)
        with pytest.raises(UserError, match="lone surrogate"):
            tokenizers[kind].encode_array(text)


@pytest.mark.parametrize("kind", ["char", "small", "bpe"])
@given(documents=st.lists(any_text, max_size=6))
def test_documents_like_one_at_a_time(tokenizers, kind, documents):
    tokenizer = tokenizers[kind]
    ids, starts = tokenizer.encode_documents(documents, tokenizer.eot_id)
    expected, expected_starts = [], []
    for document in documents:
        expected_starts.append(len(expected))
        expected += [*tokenizer.encode(document), 0]
    assert ids.tolist() == expected
    assert starts.tolist() == expected_starts
    ids, _ = tokenizer.encode_documents(documents, tokenizer.pad_id, tokenizer.sep_id)
    expected = []
    for document in documents:
        for n, line in enumerate(document.split("\n")):
            expected += [2] * (n > 0) + tokenizer.encode(line)
        expected.append(1)
    assert ids.tolist() == expected


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_newline_cut_changes_no_ids(tokenizers, kind):
    tokenizer = tokenizers[kind]
    text = "一\n\n 二\n\t\n三x1\n"
    whole = tokenizer.encode(text)
    for i, character in enumerate(text):
        if character == "\n":
            assert tokenizer.encode(text[: i + 1]) + tokenizer.encode(text[i + 1 :]) == whole


def test_streaming_decode(tokenizers):
    for tokenizer in tokenizers.values():
        ids = tokenizer.encode("a龘𠮷é😀b")
        pieces = [tokenizer.decode_stable(ids[:n]) for n in range(len(ids) + 1)]
        assert all("\ufffd" not in piece for piece in pieces)
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(pieces))
        assert pieces[-1] == "a龘𠮷é😀b"
    broken = [5 + 0xE4, *tokenizers["char"].encode("好")]  # a lead byte whose character never comes
    assert tokenizers["char"].decode_stable(broken) == "\ufffd好"


def test_save_load_pickle(tokenizers, tmp_path):
    for kind, tokenizer in tokenizers.items():
        tokenizer.save(tmp_path / kind)
        for copy in (
            Tokenizer.load(tmp_path / kind),
            Tokenizer.load(tmp_path / kind / "tokenizer.json"),
            pickle.loads(pickle.dumps(tokenizer)),
        ):
            assert copy.encode("".join(ODD) * 2) == tokenizer.encode("".join(ODD) * 2)
            assert (copy.vocab_size, copy.eot_id) == (tokenizer.vocab_size, 0)
        assert b"\r" not in (tmp_path / kind / "tokenizer_config.json").read_bytes()
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    for path in (tmp_path / "tokenizer.json", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            Tokenizer.load(path)


def test_foreign_tokenizer(tmp_path):
    """Byte-level BPE as GPT-2 and Qwen have it: no byte pieces, an end of text of another name."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [CORPUS], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eot_id == tokenizer.token_to_id("</s>")
    assert tokenizer.pad_id is None
    for text in [*ODD, "</s>", CORPUS]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode("好龘😀")
    assert all("\ufffd" not in tokenizer.decode_stable(ids[:n]) for n in range(len(ids)))
    tokenizer.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").encode(CORPUS) == tokenizer.encode(CORPUS)


def test_a_tokenizer_that_cuts_and_pads_does_neither_here(tokenizers, tmp_path):
    backend = tokenizers["bpe"].backend.from_str(tokenizers["bpe"].backend.to_str())
    backend.enable_truncation(8)
    backend.enable_padding(pad_id=1, pad_token="<pad>", length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    for text in ("皇马", "皇马赢得比赛，" * 20):
        assert Tokenizer.load(tmp_path).encode(text) == tokenizers["bpe"].encode(text)


@pytest.mark.parametrize("content", ["5", "[]", "{}", '{"model": {}}', "{", "\udcff"])
def test_what_is_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_spare_rows_decode_to_nothing(tokenizers):
    for tokenizer in tokenizers.values():
        assert tokenizer.decode([*tokenizer.encode("好"), tokenizer.vocab_size + 7]) == "好"

"""nanoGPT's checkpoints: the same logits, its meta.pkl and GPT-2's tokenizer, and nothing executed."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from originals import NANOGPT, Original, chat_text
from tokenizers import decoders, models, pre_tokenizers, trainers

from miaobi.convert.nanogpt import convert, least_expected
from miaobi.corpus.nanogpt import read_characters
from miaobi.errors import UserError
from miaobi.generate.engine import load
from miaobi.model.checkpoint import load_model

CHARACTERS = sorted(set(chat_text()))


@pytest.fixture
def meta(tmp_path) -> Path:
    """meta.pkl as data/NAME/prepare.py writes it."""
    path = tmp_path / "meta.pkl"
    table = {"vocab_size": len(CHARACTERS), "itos": dict(enumerate(CHARACTERS)),
             "stoi": {c: i for i, c in enumerate(CHARACTERS)}}  # fmt: skip
    path.write_bytes(pickle.dumps(table))
    return path


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory) -> Path:
    """A byte-level BPE of 340 tokens in GPT-2's form: tokenizer.json, and vocab.json with merges.txt."""
    folder = tmp_path_factory.mktemp("gpt2")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=339, initial_alphabet=alphabet, min_frequency=1, show_progress=False)
    backend.train_from_iterator([chat_text(), "Friends, Romans, countrymen, lend me your ears " * 9], trainer)
    for name in ("json", "files"):
        (folder / name).mkdir()
    pieces = json.loads(backend.to_str())["model"]
    vocab = pieces["vocab"] | {"<|endoftext|>": len(pieces["vocab"])}
    (folder / "files" / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in pieces["merges"]), ""])
    (folder / "files" / "merges.txt").write_text(merges, encoding="utf-8")
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(folder / "json" / "tokenizer.json"))
    return folder


# --- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_logits_and_greedy_text_are_the_originals(saved, meta, tmp_path, bias, prefix):
    V = len(CHARACTERS)
    original = Original.random(NANOGPT, bias, V)
    path = saved(original.nanogpt(prefix, masks=prefix == ""), "ckpt.pt")
    result = convert(path, str(meta), None, tmp_path / "out")
    assert (result["spare_rows"], result["step"], result["vocab_size"]) == (0, 5000, V + 256)
    ids = torch.randint(V, (20,), generator=torch.Generator().manual_seed(1))
    theirs = original.logits(ids)
    assert theirs.std() > 0.5, "logits that are all alike would prove nothing"
    ours = load(tmp_path / "out", device="cpu", dtype="float32")
    torch.testing.assert_close(ours.logits(ids[None])[0, :, :V], theirs, atol=1e-4, rtol=0)
    hub = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(hub).__name__ == "GPT2LMHeadModel"
    with torch.no_grad():
        torch.testing.assert_close(hub(ids[None]).logits[0, :, :V], theirs, atol=1e-4, rtol=0)
    expected = original.greedy([CHARACTERS.index("你"), CHARACTERS.index("好")], 12)
    written = ours.generate("你好", num_samples=1, max_new_tokens=12, temperature=0)[0].text
    assert written == "".join(CHARACTERS[i] for i in expected)


def test_a_converted_model_has_a_card_that_stays_when_it_is_edited_and_converted_again(saved, meta, tmp_path):
    path = saved(Original.random(NANOGPT, False, len(CHARACTERS)).nanogpt(), "ckpt.pt")
    convert(path, str(meta), None, tmp_path / "out", license="mit")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit"
    assert hashlib.sha256(path.read_bytes()).hexdigest() in card.text
    (tmp_path / "out" / "README.md").write_text("# 我的模型", encoding="utf-8")
    convert(path, str(meta), None, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "# 我的模型"


def test_byte_rows_begin_as_the_token_that_is_expected_least(saved, meta, tmp_path):
    original = Original.random(NANOGPT, True, len(CHARACTERS))
    model = load_converted(original, saved, meta, tmp_path)
    V = len(CHARACTERS)
    rows = model.wte.weight[V : V + 256]
    assert (rows == rows[0]).all()
    ids = torch.randint(V, (8, 32))
    probability = torch.stack([original.logits(row).softmax(-1) for row in ids]).mean((0, 1))
    copied = next(i for i in range(V) if torch.equal(model.wte.weight[i], rows[0]))
    assert probability[copied] < probability.median() / 2
    assert torch.equal(least_expected(model), least_expected(model))


def load_converted(original, saved, meta, tmp_path):
    convert(saved(original.nanogpt(), "ckpt.pt"), str(meta), None, tmp_path / "out")
    return load_model(tmp_path / "out")[0]


def test_a_checkpoint_from_before_biases_were_a_choice_has_them(saved, meta, tmp_path):
    original = Original.random(NANOGPT, True, len(CHARACTERS))
    checkpoint = original.nanogpt()
    del checkpoint["model_args"]["bias"]
    convert(saved(checkpoint, "ckpt.pt"), str(meta), None, tmp_path / "out")
    ids = torch.arange(20)
    ours = load(tmp_path / "out", device="cpu", dtype="float32").logits(ids[None])[0, :, : len(CHARACTERS)]
    torch.testing.assert_close(ours, original.logits(ids), atol=1e-4, rtol=0)


# --- characters ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def char_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("char")
    torch.save(Original.random(NANOGPT, True, len(CHARACTERS)).nanogpt(), folder / "ckpt.pt")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(CHARACTERS))}))
    convert(folder / "ckpt.pt", str(folder / "meta.pkl"), None, folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def char_tokenizers(char_dir):
    return load_model(char_dir)[1], transformers.AutoTokenizer.from_pretrained(char_dir)


@given(text=st.one_of(st.text(max_size=120), st.text(st.sampled_from(CHARACTERS), max_size=120)))
def test_any_text_survives_and_characters_keep_their_ids(char_tokenizers, text):
    ours, theirs = char_tokenizers
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert theirs(text).input_ids == ids
    assert [i for i in ids if i < len(CHARACTERS)] == [CHARACTERS.index(c) for c in text if c in CHARACTERS]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_meta_of_any_pickle_protocol_is_read(tmp_path, protocol):
    path = tmp_path / "meta.pkl"
    table = {"vocab_size": 3, "itos": {0: "\n", 1: "中", 2: "😀"}, "stoi": {"\n": 0, "中": 1, "😀": 2}}
    path.write_bytes(pickle.dumps(table, protocol))
    assert read_characters(path) == ["\n", "中", "😀"]


@pytest.mark.parametrize(("meta", "said"), [
    ([1], "no table itos"), ({"stoi": {"a": 0}}, "no table itos"), ({"itos": {}}, "no table itos"),
    ({"itos": {0: "a", 2: "b"}}, "from 0 to 1"), ({"itos": {0: "a", 1: "word"}}, "'word' is not one character"),
    ({"itos": {0: "a", 1: 7}}, "7 is not one character"), ({"itos": {0: "a", 1: "a"}}, "two ids"),
    ({"itos": {0: "a", 1: "\ud83d"}}, "not one character"),
])  # fmt: skip
def test_a_meta_that_is_no_table_of_characters_is_named(tmp_path, meta, said):
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(meta))
    with pytest.raises(UserError, match=said) as error:
        read_characters(path)
    assert str(path) in str(error.value)


def test_a_meta_cut_short_or_missing_is_named(meta):
    data = meta.read_bytes()
    for length in (0, 1, len(data) // 2, len(data) - 1):
        meta.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"meta\.pkl cannot be read"):
            read_characters(meta)
    meta.unlink()
    with pytest.raises(UserError, match=r"meta\.pkl: no such file"):
        read_characters(meta)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_meta_executes_nothing(tmp_path, bomb, protocol):
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps({"itos": {0: "a"}, "stoi": bomb}, protocol))
    with pytest.raises(UserError, match=r"meta\.pkl was not loaded.*could run a program"):
        read_characters(path)
    assert not bomb.path.exists()


def padded(rows: int, known: int) -> Original:
    """A model that has learned to expect none of its rows from `known` on."""
    original = Original.random(NANOGPT, True, rows)
    table, towards = original.state["transformer.wte.weight"], original.state["transformer.ln_f.bias"]
    table[known:] = -towards / towards.square().sum() * 24
    original.state["transformer.ln_f.weight"] *= 0.3
    return original


@pytest.mark.parametrize("rows", [64, 128, 50304])
def test_rows_that_pad_the_vocabulary_are_spare_and_said(miaobi, saved, meta, tmp_path, rows):
    """nanoGPT takes 50,304 where train.py found no meta.pkl; its users pad to multiples of 64."""
    known = len(CHARACTERS)
    original = padded(rows, known)
    path = saved(original.nanogpt(), "ckpt.pt")
    answer = miaobi("convert", "nanogpt", path, f"--meta={meta}", "--json")
    result = json.loads(answer.out)
    assert (answer.code, answer.err) == (0, "")
    assert (result["spare_rows"], result["vocab_size"], result["doubt"]) == (rows - known, rows + 256, None)
    said = miaobi("convert", "nanogpt", path, f"--meta={meta}").out
    assert f"{rows - known:,} rows of it spare" in said
    ids = torch.randint(known, (20,), generator=torch.Generator().manual_seed(1))
    ours = load(tmp_path / "ckpt.miaobi", device="cpu", dtype="float32")
    torch.testing.assert_close(ours.logits(ids[None])[0, :, :rows], original.logits(ids), atol=1e-4, rtol=0)
    hub = transformers.AutoTokenizer.from_pretrained(tmp_path / "ckpt.miaobi")
    assert hub("你好").input_ids == [CHARACTERS.index("你"), CHARACTERS.index("好")]
    assert ours.tokenizer.decode(ours.tokenizer.encode("龘你")) == hub.decode(hub("龘你").input_ids) == "龘你"


@pytest.mark.parametrize("missing", [1, 20])
def test_spare_rows_that_the_model_expects_are_another_vocabularys(saved, meta, tmp_path, capsys, missing):
    known = len(CHARACTERS)
    path = saved(padded(128, known).nanogpt(), "ckpt.pt")
    meta.write_bytes(pickle.dumps({"itos": dict(enumerate(CHARACTERS[:-missing]))}))
    result = convert(path, str(meta), None, tmp_path / "out")
    assert "probably not the vocabulary" in result["doubt"]
    assert result["doubt"] in " ".join(capsys.readouterr().err.split())
    assert json.loads((tmp_path / "out" / "converted.json").read_text())["doubt"] == result["doubt"]


# --- GPT-2's BPE ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["json", "files"])
@pytest.mark.parametrize("rows", [340, 384, 640])
def test_a_bpe_model_takes_gpt2s_tokenizer(saved, gpt2, tmp_path, form, rows):
    original = Original.random(NANOGPT, False, rows)
    result = convert(saved(original.nanogpt(), "ckpt.pt"), None, str(gpt2 / form), tmp_path / "out")
    assert (result["vocab_size"], result["spare_rows"]) == (rows, rows - 340)
    ours = load(tmp_path / "out", device="cpu", dtype="float32")
    reference = tokenizers.Tokenizer.from_file(str(gpt2 / "json" / "tokenizer.json"))
    hub = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("Romans, lend me 你好呀 your ears", "你好\n龘😀 x", ""):
        ids = reference.encode(text).ids
        assert ours.tokenizer.encode(text) == hub(text).input_ids == ids
        assert ours.tokenizer.decode(ids) == hub.decode(ids) == text
    ids = torch.tensor(reference.encode("Friends, Romans, 你好").ids)[:32]
    torch.testing.assert_close(ours.logits(ids[None])[0], original.logits(ids), atol=1e-4, rtol=0)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 339
    assert ours.tokenizer.eot_id == 339
    assert 339 not in ours.tokenizer.encode("<|endoftext|>")


@pytest.mark.parametrize("rows", [339, 404])
def test_another_tokenizer_than_the_models_is_refused(saved, gpt2, tmp_path, rows):
    path = saved(Original.random(NANOGPT, False, rows).nanogpt(), "ckpt.pt")
    with pytest.raises(UserError, match=f"has {rows} tokens, .*json has 340"):
        convert(path, None, str(gpt2 / "json"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_without_a_tokenizer_is_named(saved, tmp_path):
    path = saved(Original.random(NANOGPT, False, 340).nanogpt(), "ckpt.pt")
    with pytest.raises(UserError, match=r"nothing_there: no tokenizer\.json"):
        convert(path, None, str(tmp_path / "nothing_there"), tmp_path / "out")


# --- what does not fit ---------------------------------------------------------------------------------------------


def test_another_meta_than_the_models_is_refused(saved, meta, tmp_path):
    for rows in (len(CHARACTERS) - 1, len(CHARACTERS) + 1, len(CHARACTERS) + 64):
        path = saved(Original.random(NANOGPT, True, rows).nanogpt(), "ckpt.pt")
        with pytest.raises(UserError, match=f"has {rows} tokens, .*has {len(CHARACTERS)}"):
            convert(path, str(meta), None, tmp_path / "out")


def test_one_vocabulary_must_be_given(saved, meta, tmp_path):
    path = saved(Original.random(NANOGPT, True, len(CHARACTERS)).nanogpt(), "ckpt.pt")
    for arguments in ((None, None), (str(meta), str(tmp_path))):
        with pytest.raises(UserError, match=r"--meta=data/TH/meta\.pkl .*--tokenizer=DIR"):
            convert(path, *arguments, tmp_path / "out")


@pytest.mark.parametrize(("change", "said"), [
    ({"n_layer": 3}, "n_layer=3, but has weights of 2 blocks"), ({"n_embd": 64}, r"wte.*has shape"),
    ({"block_size": 8}, r"wpe.*has shape"), ({"n_head": None}, "n_head is None"), ({"bias": False}, "too many"),
])  # fmt: skip
def test_a_checkpoint_that_contradicts_itself_is_named(saved, meta, tmp_path, change, said):
    checkpoint = Original.random(NANOGPT, True, len(CHARACTERS)).nanogpt()
    checkpoint["model_args"] |= change
    with pytest.raises(UserError, match=said):
        convert(saved(checkpoint, "ckpt.pt"), str(meta), None, tmp_path / "out")


def test_a_small_gpt_checkpoint_is_told_apart(saved, meta, tmp_path):
    checkpoint = Original.random(NANOGPT, True, len(CHARACTERS)).small_gpt()
    with pytest.raises(UserError, match="convert small-gpt"):
        convert(saved(checkpoint, "ckpt.pt"), str(meta), None, tmp_path / "out")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_checkpoint_cut_short_is_named(saved, meta, tmp_path, share):
    path = saved(Original.random(NANOGPT, True, len(CHARACTERS)).nanogpt(), "ckpt.pt")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"ckpt\.pt cannot be read"):
        convert(path, str(meta), None, tmp_path / "out")


@pytest.mark.parametrize("where", ["config", "model", "best_val_loss"])
def test_a_malicious_checkpoint_executes_nothing(saved, meta, tmp_path, bomb, where):
    checkpoint = Original.random(NANOGPT, True, len(CHARACTERS)).nanogpt()
    if where == "best_val_loss":
        checkpoint[where] = bomb
    else:
        checkpoint[where]["x"] = bomb
    with pytest.raises(UserError, match=r"ckpt\.pt was not loaded.*could run a program"):
        convert(saved(checkpoint, "ckpt.pt"), str(meta), None, tmp_path / "out")
    assert not bomb.path.exists()


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_converts_and_the_model_writes(miaobi, saved, meta, tmp_path):
    path = saved(Original.random(NANOGPT, True, len(CHARACTERS)).nanogpt(), "ckpt.pt")
    answer = miaobi("convert", "nanogpt", path, f"--meta={meta}", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["out"] == str(tmp_path / "ckpt.miaobi")
    again = miaobi("convert", "nanogpt", path, f"--meta={meta}")
    assert f"next: miaobi sample {tmp_path / 'ckpt.miaobi'}" in again.out
    written = miaobi("sample", tmp_path / "ckpt.miaobi", "--start=你好", "--num_samples=1", "--max_new_tokens=8",
                     "--device=cpu")  # fmt: skip
    assert written.code == 0, written.err
    assert written.out.startswith("你好")
    assert "--meta" in miaobi("convert", "nanogpt", "--help").out
    assert os.listdir(tmp_path / "ckpt.miaobi")


@pytest.mark.parametrize("kind", ["nanogpt", "small-gpt"])
@pytest.mark.parametrize("path", [".", "/", "nothing.pt"])
def test_a_checkpoint_that_is_no_file_is_said(miaobi, meta, kind, path):
    vocabulary = f"--meta={meta}" if kind == "nanogpt" else f"--corpus={meta}"
    answer = miaobi("convert", kind, path, vocabulary)
    assert answer.code == 2
    assert answer.err.endswith(": no such checkpoint file\n")

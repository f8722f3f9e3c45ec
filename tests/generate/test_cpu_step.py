"""The compiled step against the model's own forward and against transformers, and what happens without it."""

import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from miaobi import native
from miaobi.cache import TAG
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.generate import cpu_step, engine, speculate
from miaobi.generate.config import SampleConfig
from miaobi.model.checkpoint import save_model
from miaobi.model.config import ModelConfig
from miaobi.model.quantized import eight_bits
from miaobi.model.transformer import Transformer

GREEDY = SampleConfig(num_samples=1, max_new_tokens=24, temperature=0)
FAMILIES = {
    "gpt2": {"family": "gpt2", "bias": True},
    "gpt2 of the hub": {"family": "gpt2", "bias": False, "activation": "gelu_new", "tie_word_embeddings": False},
    "qwen3": {"family": "qwen3", "n_kv_head": 2, "head_dim": 24},
    "llama": {"family": "llama", "n_kv_head": 1, "intermediate_size": 72},
}


@pytest.fixture(scope="module", autouse=True)
def compiled(built) -> None:
    built(cpu_step.SOURCE)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache directory of its own, as on a machine where nothing was built yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.build.cache_clear()
    yield tmp_path / "cache" / "miaobi"
    native.build.cache_clear()


def loud_model(vocab_size: int = 101, **settings) -> Transformer:
    """Random, but with every norm and bias in use, and far from saying the same token for ever."""
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 40, "vocab_size": vocab_size}
    model = Transformer(ModelConfig(**sizes, **settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.2)
    return model


def saved(tmp_path: Path, **settings) -> Path:
    """A model directory with a tokenizer."""
    tokenizer = Tokenizer.train_char({chr(0x4E00 + i): 1 for i in range(101)}, vocab_size=512)
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", loud_model(vocab_size=tokenizer.vocab_size, **settings), tokenizer, end_ids=())
    return tmp_path / "model"


def greedy(lm: engine.LanguageModel) -> list[int]:
    return list(lm.tokens("一丁", GREEDY))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("kind", "tolerance"), [("float32", 2e-4), ("bfloat16", 0.05), ("int8", 0.05)])
@pytest.mark.parametrize("threads", [1, 3])
@torch.inference_mode()
def test_a_step_gives_the_logits_of_forward(family: str, kind: str, tolerance: float, threads: int):
    """Logits are about 2.5 wide. float32 differs by the order of sums alone (either is up to
    8e-5 away from float64); in the others a key or value that lies
    between two bf16 neighbours in the cache may go to either."""
    model = loud_model(**FAMILIES[family])
    compiled = cpu_step.CpuStep(model, kind)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    until = 40 if threads == 1 else 14  # threads that share a core wait milliseconds for each other, product by product
    try:
        for streams in (1, 3, 6, 16):  # alone, fewer than a tile has, tiles of which one is not full, full ones
            ids = torch.randint(0, 101, (streams, 40))
            ours, theirs = (model.make_caches(streams, 40, compiled.cache_dtype) for _ in range(2))
            model(ids[:, :5], caches=ours)
            model(ids[:, :5], caches=theirs)
            for t in range(5, until):
                got = compiled(ids[:, t : t + 1], ours, [t] * streams)
                torch.testing.assert_close(got, model(ids[:, t : t + 1], caches=theirs)[:, -1], rtol=0, atol=tolerance)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", cpu_step.KINDS)
@torch.inference_mode()
def test_streams_change_nothing_for_each_other(family: str, kind: str):
    """To the last bit: few streams, many, and the tokens of one stream at once."""
    compiled = cpu_step.CpuStep(loud_model(**FAMILIES[family]), kind)
    ids = torch.randint(0, 101, (17, 8))
    caches = compiled.model.make_caches(17, 40, compiled.cache_dtype)
    alone = [compiled(ids[:, t : t + 1], caches, [t] * 17) for t in range(8)]
    for streams in (1, 2, 3, 4, 5, 6, 7, 11, 16):
        caches = compiled.model.make_caches(streams, 40, compiled.cache_dtype)
        for t in range(8):
            assert torch.equal(compiled(ids[:streams, t : t + 1], caches, [t] * streams), alone[t][:streams])
    caches = compiled.model.make_caches(1, 40, compiled.cache_dtype)
    at_once = compiled.verify(ids[0, :, None], caches, 0)
    assert torch.equal(at_once, torch.stack([logits[0] for logits in alone]))


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_seed_gives_its_text_in_any_company(tmp_path: Path, family: str):
    """Past a full block too."""
    lm = engine.load(saved(tmp_path, **FAMILIES[family]), "cpu", "bfloat16")
    cfg = SampleConfig(num_samples=14, max_new_tokens=100, temperature=1.0, seed=7)
    for n, completion in enumerate(lm.generate("一丁", cfg)):
        (alone,) = lm.generate("一丁", replace(cfg, num_samples=1, seed=7 + n))
        assert completion.text == alone.text
        assert "一丁" + "".join(lm.stream("一丁", replace(cfg, seed=7 + n))) == alone.text


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@torch.inference_mode()
def test_the_model_is_rounded_to_what_was_packed(kind: str):
    """Scores and prefill see the weights that the step sees; and no weight moves further than its precision says."""
    model, exact = loud_model(family="qwen3"), loud_model(family="qwen3")
    cpu_step.CpuStep(model, kind)
    for name, weight in model.named_parameters():
        known = dict(exact.named_parameters())[name]
        if weight.ndim == 1:
            assert torch.equal(weight, known)
        elif kind == "bfloat16":
            rows = 101 if name == "wte.weight" else len(weight)  # padding rows are never read
            assert torch.equal(weight[:rows], known[:rows].bfloat16().float())
        else:
            half = known.abs().amax(1, keepdim=True) / 254
            assert ((weight - known).abs() <= half * 1.001).all()
            assert not torch.equal(weight, known)


def test_a_row_of_zeros_stays_zero_in_int8():
    weight = torch.tensor([[0.0, 0.0], [-2.0, 1.0]])
    packed, scale = eight_bits(weight)
    torch.testing.assert_close(packed * scale, torch.tensor([[0.0, 0.0], [-2.0, 1.0]]), rtol=0, atol=2 / 254)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_greedy_text_in_float32_is_that_of_transformers(tmp_path: Path, family: str):
    transformers = pytest.importorskip("transformers")
    at = saved(tmp_path, **FAMILIES[family])
    lm = engine.load(at, "cpu", "float32")
    assert lm.step is not None
    lm.barred = ()  # transformers draws control tokens too
    prompt = torch.tensor([lm.tokenizer.encode("一丁")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32)
    theirs.generation_config.eos_token_id = None
    written = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False,
                              pad_token_id=0)  # fmt: skip
    assert written[0, prompt.shape[1] :].tolist() == greedy(lm)


@pytest.mark.parametrize("tokens", range(20, 32))
def test_a_greedy_sample_has_all_its_tokens_however_they_were_guessed(tmp_path: Path, tokens: int, monkeypatch):
    """With guesses that are all right; and one that a stop string ends has none of the guesses behind it."""
    lm = engine.load(saved(tmp_path, **FAMILIES["gpt2"]), "cpu", "float32")
    cfg = SampleConfig(num_samples=1, max_new_tokens=tokens, temperature=0)
    truth = [*lm.tokenizer.encode("一丁一丁"), *lm.tokens("一丁一丁", replace(cfg, max_new_tokens=36))]
    monkeypatch.setattr(speculate, "continued", lambda ids, most: truth[len(ids) :][: max(0, most)])
    (whole,) = lm.generate("一丁一丁", cfg)
    assert (whole.tokens, whole.finish_reason) == (tokens, "length")
    ids = list(lm.tokens("一丁一丁", cfg))
    assert whole.text == "一丁一丁" + lm.tokenizer.decode(ids)
    assert "".join(lm.stream("一丁一丁", cfg)) == lm.tokenizer.decode(ids)
    stop = lm.tokenizer.decode(ids[tokens // 2 : tokens // 2 + 1])
    (cut,) = lm.generate("一丁一丁", cfg, stop=(stop,))
    assert cut.text == "一丁一丁" + lm.tokenizer.decode(ids).split(stop)[0]
    assert cut.tokens == ids.index(ids[tokens // 2]) + 1


def test_text_goes_on_past_a_full_block(tmp_path: Path):
    """The caches are filled again by prefill, and the step goes on from there, as without it."""
    lm = engine.load(saved(tmp_path, **FAMILIES["gpt2"]), "cpu", "float32")
    plain = engine.LanguageModel(lm.model, lm.tokenizer, lm.end_ids)
    cfg = SampleConfig(max_new_tokens=100, temperature=1.0)
    assert list(lm.tokens("一", cfg)) == list(plain.tokens("一", cfg))


def test_auto_decodes_in_bfloat16_where_there_is_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    at = saved(tmp_path, **FAMILIES["qwen3"])
    assert engine.load(at, "cpu").step.kind == "bfloat16"
    monkeypatch.setattr(engine, "can_compile", lambda device: False)
    lm = engine.load(at, "cpu", "float32")
    assert lm.step is None
    assert len(greedy(lm)) == 24


def test_int8_without_a_compiler_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine, "can_compile", lambda device: False)
    lm = engine.load(saved(tmp_path, **FAMILIES["qwen3"]), "cpu", "int8")
    assert lm.step is None
    assert "int8 weights need a CPU and a C++ compiler" in capsys.readouterr().err


def test_widths_that_are_no_whole_vectors_decode_without_the_step(tmp_path: Path):
    at = saved(tmp_path, family="llama", intermediate_size=68)
    lm = engine.load(at, "cpu", "float32")
    assert lm.step is None
    assert len(greedy(lm)) == 24


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch):
    """`late(n)`: the library is there from the nth time on that somebody asks, as on a first run; how many rows each
    call of it then had.
    """
    library, call = cpu_step.library(), cpu_step.CpuStep.call
    asked, calls = [], []

    def arrive(after: int) -> list[int]:
        def later():
            asked.append(None)
            return None if len(asked) <= after else library

        monkeypatch.setattr(cpu_step, "library", later)
        monkeypatch.setattr(cpu_step.CpuStep, "call", lambda *a, **k: (calls.append(len(a[1])), call(*a, **k))[1])
        return calls

    return arrive


@pytest.mark.parametrize("after", [1, 2, 5])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_library_that_arrives_in_mid_text_takes_over_with_the_next_text(tmp_path, late, after, kind, temperature):
    """A seeded text is either PyTorch's or the compiled step's from its first token to its last, past a full block."""
    lm = engine.load(saved(tmp_path, **FAMILIES["qwen3"]), "cpu", kind)
    cfg = SampleConfig(max_new_tokens=60, temperature=temperature, seed=3)
    compiled = list(lm.tokens("一丁", cfg))
    lm.step, step = None, lm.step
    theirs = lm.slots()
    theirs.reserve(40)
    theirs.caches = lm.model.make_caches(1, 40, step.cache_dtype)
    eager = list(theirs.write(lm.open("一丁", cfg)))
    lm.step, calls = step, late(after)
    slots = lm.slots()
    for _ in range(after - 1):
        assert list(slots.write(lm.open("一丁", cfg))) == eager
        assert not calls
    for _, token in zip(range(7), slots.write(lm.open("一丁", cfg)), strict=False):  # one that is broken off
        assert token
    slots = lm.slots()
    assert list(slots.write(lm.open("一丁", cfg))) == compiled
    assert calls


def test_rows_that_share_caches_change_over_together(tmp_path: Path, late):
    """Streams that come while others are written go on with what these have; the next ones find the library."""
    lm = engine.load(saved(tmp_path, **FAMILIES["gpt2"]), "cpu", "bfloat16")
    calls = late(2)
    slots = lm.slots(2)
    cfg = SampleConfig(max_new_tokens=20, seed=1)
    first, second, third = (lm.open("一丁", replace(cfg, max_new_tokens=n)) for n in (20, 5, 30))
    slots.add(first)
    for _ in range(3):
        slots.advance()
    slots.add(second)
    while second.left:
        slots.advance()
    slots.add(third)
    while third.left:
        slots.advance()
    assert not calls, "there was always somebody in the middle of a text"
    assert len(list(slots.write(lm.open("一丁", cfg)))) == 20
    assert set(calls) == {1}


def test_it_is_built_once(elsewhere: Path, built):
    """By a process that outlives this one; what others see at the path is whole."""
    made = native.build(cpu_step.SOURCE)
    assert cpu_step.library() is None
    built(cpu_step.SOURCE)
    assert {path.name for path in elsewhere.iterdir()} == {made.name, TAG}
    born = made.stat().st_mtime_ns
    native.build.cache_clear()
    assert native.build(cpu_step.SOURCE) == made
    assert cpu_step.library() is not None
    time.sleep(0.3)
    assert made.stat().st_mtime_ns == born


def test_a_compiler_that_fails_leaves_nothing(elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = tmp_path / "bin"
    broken.mkdir()
    for name in ("c++", "g++", "clang++"):
        (broken / name).write_text('#!/bin/sh\nfor last; do :; done\nwhile [ "$1" != -o ]; do shift; done\n'
                                   'echo half > "$2"\nexit 1\n')  # fmt: skip
        (broken / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken}:/usr/bin:/bin")
    lm = engine.load(saved(tmp_path, **FAMILIES["gpt2"]), "cpu", "bfloat16")
    assert len(greedy(lm)) == 24
    for _ in range(100):
        if {path.suffix for path in elsewhere.iterdir()} == {".failed", Path(TAG).suffix}:
            break
        time.sleep(0.05)
    assert {path.suffix for path in elsewhere.iterdir()} == {".failed", Path(TAG).suffix}
    assert cpu_step.library() is None


def test_a_library_of_another_system_is_left_alone(elsewhere: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **how: None)
    made = native.build(cpu_step.SOURCE)
    made.write_bytes(b"\x7fELF not for here")
    assert cpu_step.library() is None
    assert len(greedy(engine.load(saved(tmp_path, **FAMILIES["gpt2"]), "cpu", "bfloat16"))) == 24

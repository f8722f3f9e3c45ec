"""The compiled step with AVX-512's dot products and AMX's tiles, emulated: every CPU with a compiler tests them."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from miaobi import native
from miaobi.generate import cpu_step
from miaobi.generate.engine import load
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer

FAMILIES = {
    "gpt2": {"family": "gpt2", "bias": True},
    "qwen3": {"family": "qwen3", "n_kv_head": 2, "head_dim": 24},
    "llama": {"family": "llama", "n_kv_head": 1, "intermediate_size": 296, "n_embd": 136, "head_dim": 32},
}


def compiled(out: Path, march: str, *flags: str) -> Path:
    if native.compiler() is None:
        pytest.skip("no C++ compiler")
    every = native.FLAGS.replace("-march=native", march).split()
    subprocess.run([native.compiler(), *every, *flags, str(cpu_step.SOURCE), "-o", str(out)], check=True)
    return out


@pytest.fixture(scope="module", params=["avx512", "amx"])
def emulated(request, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    names = ["avx512.h"] if request.param == "avx512" else ["avx512.h", "amx.h"]  # what has tiles has dot products too
    headers = [word for name in names for word in ("-include", str(Path(__file__).with_name(name)))]
    out = tmp_path_factory.mktemp("emulated") / f"{request.param}.so"
    return ctypes.CDLL(str(compiled(out, "-march=native", "-Wno-psabi", *headers)))


@pytest.fixture
def there(emulated, monkeypatch):
    monkeypatch.setattr(cpu_step, "library", lambda: emulated)


def model(**settings) -> Transformer:
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 40, "vocab_size": 101} | settings
    made = Transformer(ModelConfig(**sizes)).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.3) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.2)
    return made


def rounded(x: torch.Tensor, kind: str) -> torch.Tensor:
    """What the products see of their inputs."""
    if kind == "bfloat16":
        return x.bfloat16().float()
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.floor(x / scale + 0.5) * scale


def rounding(transformer: Transformer, kind: str) -> None:
    """PyTorch's forward with inputs of every product rounded as the instructions have them."""
    for layer in transformer.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, given: (rounded(given[0], kind),))
    transformer.norm.register_forward_hook(lambda _, given, out: rounded(out, kind))


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@torch.inference_mode()
def test_a_step_gives_the_logits_of_a_forward_with_rounded_states(family, kind):
    """Logits are about 2.5 wide. A state between two steps may go to either, and takes what follows along."""
    transformer = model(**FAMILIES[family])
    step = cpu_step.CpuStep(transformer, kind)
    rounding(transformer, kind)
    for streams in (1, 3, 4, 6):
        ids = torch.randint(0, 101, (streams, 12))
        ours, theirs = (transformer.make_caches(streams, 40, step.cache_dtype) for _ in range(2))
        for t in range(12):
            got = step(ids[:, t : t + 1], ours, [t] * streams)
            expected = transformer(ids[:, t : t + 1], caches=theirs)[:, -1]
            assert (got - expected).norm() < (0.02 if kind == "bfloat16" else 0.05) * expected.norm()


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", cpu_step.KINDS)
@torch.inference_mode()
def test_streams_change_nothing_for_each_other(family, kind):
    """To the last bit: alone, some, many, and the tokens of one stream at once."""
    step = cpu_step.CpuStep(model(**FAMILIES[family]), kind)
    ids = torch.randint(0, 101, (17, 6))
    caches = step.model.make_caches(17, 40, step.cache_dtype)
    everybody = [step(ids[:, t : t + 1], caches, [t] * 17) for t in range(6)]
    for streams in (1, 2, 3, 4, 5, 8, 13, 16):
        caches = step.model.make_caches(streams, 40, step.cache_dtype)
        for t in range(6):
            assert torch.equal(step(ids[:streams, t : t + 1], caches, [t] * streams), everybody[t][:streams])
    caches = step.model.make_caches(1, 40, step.cache_dtype)
    at_once = step.verify(ids[0, :, None], caches, 0)
    assert torch.equal(at_once, torch.stack([logits[0] for logits in everybody]))


@torch.inference_mode()
def bits(lm, text: str) -> float:
    """Bits per character of `text`, step after step, in windows of a block each."""
    block = lm.model.cfg.block_size
    ids = torch.tensor(lm.tokenizer.encode(text))
    windows = ids[: len(ids) // block * block].view(-1, block)
    slots = lm.slots(len(windows))
    slots.reserve(block)
    nats = sum(
        torch.nn.functional.cross_entropy(slots.logits(windows[:, t].tolist(), [t] * len(windows)), windows[:, t + 1],
                                          reduction="sum").item()
        for t in range(block - 1))  # fmt: skip
    return nats / math.log(2) / (len(windows) * (block - 1))


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(("kind", "most"), [("bfloat16", 0.004), ("int8", 0.01)])
def test_rounded_states_cost_a_trained_model_next_to_nothing(trained, kind, most):
    from tests.conftest import sports_text

    text = sports_text(120, seed=7).replace("\n", "")
    run = trained("qwen3", "char")
    exact = load(run, "cpu", "float32")
    assert bits(load(run, "cpu", kind), text) - bits(exact, text) < most


def test_it_is_built_for_such_a_cpu_and_has_their_instructions(tmp_path):
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    try:
        out = compiled(tmp_path / "step.so", "-march=sapphirerapids")
    except subprocess.CalledProcessError:
        pytest.skip("a compiler that does not know this CPU")
    listing = subprocess.run(["objdump", "-d", str(out)], check=True, capture_output=True, text=True).stdout
    assert "vdpbf16ps" in listing
    assert "vpdpbusd" in listing
    assert "tdpbf16ps" in listing
    assert "tdpbssd" in listing

"""Models of 8 and 4 bits: what is lost against a naive reading of the layout, who reads them, who refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from miaobi.generate.engine import load
from miaobi.model import quantized
from miaobi.model.tensors import read_tensors

KINDS = ("int8", "int4")


@pytest.fixture(scope="module")
def made(trained: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`made("gpt2", "int4")`: the tiny model of that family, quantized once."""
    from miaobi.convert.config import QuantizeConfig
    from miaobi.convert.quantize import convert

    known: dict[tuple[str, str], Path] = {}

    def get(family: str, kind: str) -> Path:
        if (family, kind) not in known:
            out = known[family, kind] = tmp_path_factory.mktemp("quantized") / f"{family}-{kind}"
            convert(QuantizeConfig(str(trained(family)), dtype=kind, out=out))
        return known[family, kind]

    return get


def naive(path: Path) -> dict[str, torch.Tensor]:
    """The layout as its page says it, number by number of the first rows."""
    stored, out = load_file(path / "model.safetensors"), {}
    for name, whole in stored.items():
        if (scale := stored.get(f"{name}_scale")) is None:
            continue
        rows = []
        for row, scales in list(zip(whole.tolist(), scale.float().tolist(), strict=True))[:3]:
            if whole.dtype == torch.uint8:
                row = [number - 8 for byte in row for number in (byte % 16, byte // 16)]
            rows.append([number * scales[i // 32 if len(scales) > 1 else 0] for i, number in enumerate(row)])
        out[name] = torch.tensor(rows)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_the_layout_is_as_documented_and_near_the_original(trained: Callable, made: Callable, family: str, kind: str):
    before, after = read_tensors(trained(family) / "checkpoints" / "best"), read_tensors(made(family, kind))
    assert before.keys() == after.keys()
    for name, expected in naive(made(family, kind)).items():
        whole = after[name].T if family == "gpt2" and ".h." in name else after[name]
        torch.testing.assert_close(whole[: len(expected)], expected)
    for name, weight in before.items():
        if weight.ndim < 2 or "wpe" in name:
            assert torch.equal(after[name], weight)
        else:
            error = (after[name] - weight).norm() / weight.norm()
            assert 0 < error < (0.02 if kind == "int8" or "embed" in name or "wte" in name else 0.12), name
    size = (made(family, kind) / "model.safetensors").stat().st_size
    assert size < (trained(family) / "checkpoints" / "best" / "model.safetensors").stat().st_size / 2


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40).map(lambda n: 2 * n), st.floats(1e-30, 1e30), st.integers(0, 2**31))
def test_any_matrix_comes_back_within_half_a_step(rows: int, columns: int, size: float, seed: int):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    weight[0] = 0
    for kind, step in (("int8", 127), ("int4", 7)):
        packed, kept = quantized.quantize({"a.weight": weight}, kind)
        back = quantized.widened(packed)["a.weight"]
        assert kept == []
        assert bool(back.isfinite().all())
        assert torch.equal(back[0], weight[0])
        groups = weight if kind == "int8" else torch.nn.functional.pad(weight, (0, -columns % 32)).view(-1, 32)
        errors = (
            back - weight if kind == "int8" else torch.nn.functional.pad(back - weight, (0, -columns % 32)).view(-1, 32)
        )
        allowed = groups.abs().amax(1) / step * (0.51 if kind == "int8" else 2.7)  # int4 may cut off up to 30%
        assert bool((errors.abs().amax(1) <= allowed * 1.01).all())


def test_what_is_int8_already_does_not_change_again():
    weight = torch.randn(8, 64)
    once = quantized.widened(quantized.quantize({"a.weight": weight}, "int8")[0])
    whole, scale = quantized.eight_bits(once["a.weight"])
    torch.testing.assert_close(whole.float() * scale, once["a.weight"])


def test_an_odd_matrix_stays_as_it_is():
    packed, kept = quantized.quantize({"a.weight": torch.randn(4, 7)}, "int4")
    assert kept == ["a.weight"]
    assert packed["a.weight"].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_sample_eval_and_train_read_it(
    trained: Callable, made: Callable, miaobi: Callable, prepared: Callable, tmp_path: Path, family: str, kind: str
):
    path = made(family, kind)
    sampled = miaobi("sample", path, "--start=皇马", "--num_samples=1", "--max_new_tokens=8", "--device=cpu", "--json")
    assert sampled.code == 0, sampled.err
    lm = load(path, "cpu")
    assert lm.step is None or lm.step.kind == ("int8" if kind == "int8" else "bfloat16")
    scored = miaobi("eval", path, prepared(), "--device=cpu", "--json")
    assert scored.code == 0, scored.err
    original = miaobi("eval", trained(family), prepared(), "--device=cpu", "--json")
    lost = json.loads(scored.out)["bits_per_char"] - json.loads(original.out)["bits_per_char"]
    assert abs(lost) < (0.01 if kind == "int8" else 0.1)
    if family == "qwen3":
        own = {"init_from": path, "data": prepared(), "out_dir": tmp_path / "run", "max_iters": 1, "eval_interval": 1,
               "eval_iters": 1, "batch_size": 2, "sample_tokens": 0, "device": "cpu", "dtype": "float32",
               "compile": False}  # fmt: skip
        tuned = miaobi("train", *(f"--{key}={value}" for key, value in own.items()))
        assert tuned.code == 0, tuned.err
        assert f"its weights are {kind}; they are trained in full precision" in tuned.err
        assert "quantization_config" not in json.loads((tmp_path / "run/checkpoints/best/config.json").read_text())


def test_others_refuse_it_and_the_card_says_so(made: Callable, miaobi: Callable, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    path = made("qwen3", "int4")
    for kind in KINDS:  # int8 it would take for the weights
        with pytest.raises(ValueError, match="miaobi-quantized"):
            AutoModelForCausalLM.from_pretrained(made("qwen3", kind))
    assert "do not read this layout" in (path / "README.md").read_text(encoding="utf-8")
    again = miaobi("convert", "quantize", path, f"--out={tmp_path / 'again'}")
    assert again.code == 2
    assert "quantized already" in again.err


def broken(path: Path, change: Callable[[dict], None]) -> None:
    """Change the stored tensors of a copy, whose checksums are gone."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "checksums.json").unlink()


NORM, PROJ = "model.norm.weight", "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{PROJ}_scale"), "config.json says"),
        (lambda t: t.pop(PROJ), "scale of no weight"),
        (lambda t: t.update({f"{PROJ}_scale": t[f"{PROJ}_scale"][:, :0].contiguous()}), "do not fit"),
        (lambda t: t.update({f"{PROJ}_scale": t[f"{PROJ}_scale"].to(torch.int32)}), "do not fit"),
        (lambda t: t.update({PROJ: t[PROJ][:, :3].contiguous()}), "config.json says"),
        (lambda t: t.update({f"{PROJ}_scale": t[f"{PROJ}_scale"] * float("nan")}), "not finite"),
        (lambda t: t.update({f"{NORM}_scale": torch.ones(1, 1)}), "do not fit"),
    ],
)
def test_damage_is_told(made: Callable, miaobi: Callable, tmp_path: Path, change: Callable, said: str):
    path = Path(shutil.copytree(made("qwen3", "int4"), tmp_path / "model"))
    broken(path, change)
    answer = miaobi("sample", path, "--device=cpu")
    assert answer.code == 2
    assert said in answer.err

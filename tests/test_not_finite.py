"""Weights that are finite and give numbers that are not: every verb says so, none writes nonsense with exit code 0."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module", params=["inf", "nan"])
def overflowing(trained, tmp_path_factory, request) -> Path:
    """A model whose last norm is so large that logits overflow; with both signs a sum of them is nan."""
    place = tmp_path_factory.mktemp("overflowing") / "model"
    shutil.copytree(trained("qwen3", "char") / "checkpoints" / "best", place, symlinks=False,
                    ignore=shutil.ignore_patterns("checksums.json", "train_state"))  # fmt: skip
    tensors = load_file(place / "model.safetensors")
    norm = tensors["model.norm.weight"]
    norm.fill_(3e38)
    if request.param == "nan":
        norm[::2] *= -1
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


@pytest.mark.parametrize("flags", [["--temperature=0"], ["--top_k=0"], ["--top_k=5", "--num_samples=3"],
                                   ["--top_p=0.9"], ["--repetition_penalty=1.3"]])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_nothing_is_sampled(miaobi, overflowing, flags, dtype):
    answer = miaobi("sample", overflowing, "--max_new_tokens=4", "--device=cpu", f"--dtype={dtype}", *flags)
    assert answer.code == 2
    assert "not finite" in answer.err
    assert not answer.out


def test_a_loss_is_not_printed(miaobi, overflowing, corpus_file):
    answer = miaobi("eval", overflowing, corpus_file, "--device=cpu", "--json")
    assert (answer.code, answer.out) == (2, "")
    assert "not finite" in answer.err

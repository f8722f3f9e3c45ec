"""Newton-Schulz iterations against singular values, polar factors, and the plain iteration in float64."""

import pytest
import torch

from miaobi.train import orthogonal
from miaobi.train.orthogonal import QUINTIC, orthogonalize, symmetric_product


def plain(g: torch.Tensor) -> torch.Tensor:
    """Five steps as published, in float64."""
    a, b, c = QUINTIC
    x = g.double().mT if g.shape[-2] > g.shape[-1] else g.double()
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if g.shape[-2] > g.shape[-1] else x


SPECTRA = {
    "flat": lambda n: torch.ones(n),
    "to 1e-6": lambda n: torch.logspace(0, -6, n),
    "of low rank": lambda n: (torch.arange(n) < 8).float(),
    "one that is large": lambda n: torch.cat([torch.ones(1), torch.full((n - 1,), 1e-3)]),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(48, 48), (48, 144), (160, 48), (48, 64)])
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-4), ("float16", 0.08), ("bfloat16", 0.5)])
def test_the_iterations_are_as_near_to_the_exact_ones_as_plain_ones(monkeypatch, spectrum, shape, dtype, most):
    """The norm of what is off, of matrices with a norm of one. Iterations that left out computing G anew had 1e-3 in
    float32 and were lost in half precision. most: about twice what the plain iteration has in that precision.
    """
    monkeypatch.setattr(orthogonal, "iteration_dtype", lambda device: getattr(torch, dtype))
    g = torch.randn(2, *shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    g = ((u * SPECTRA[spectrum](min(shape)).double()) @ vh).float()
    off = torch.linalg.matrix_norm(orthogonalize(g).double() - plain(g), 2)
    assert off.max() < most


@pytest.fixture
def in_float32(monkeypatch):
    """Iterations in float32, also on a CPU with bf16 units."""
    monkeypatch.setattr(orthogonal, "iteration_dtype", lambda device: torch.float32)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("shape", [(40, 40), (40, 72), (33, 90)])
def test_halves_of_symmetric_products_make_the_whole(monkeypatch, shape):
    """Where blocks do not divide the rows too."""
    monkeypatch.setattr(orthogonal, "BLOCK", 8)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, *shape, generator=draw) / shape[1]
    gram = symmetric_product(x, x.mT)
    torch.testing.assert_close(gram, x @ x.mT)
    torch.testing.assert_close(symmetric_product(gram, gram, gram, -2.0, 0.5), -2 * gram + 0.5 * gram @ gram)
    monkeypatch.setattr(orthogonal, "CACHED", 100)  # one matrix at a time
    torch.testing.assert_close(orthogonalize(x), plain(x).float(), atol=1e-4, rtol=0)


@pytest.mark.bf16
@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96), (8, 64), (128, 16)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_singular_values_end_near_one(shape, scale):
    g = torch.randn(3, *shape, generator=torch.Generator().manual_seed(sum(shape)))
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    spectrum = torch.linspace(1.0, 0.2, min(shape))  # square noise has a value near zero, which no iteration lifts
    g = scale * (u * spectrum) @ vh
    values = torch.linalg.svdvals(orthogonalize(g).float())
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e4])
def test_iterations_in_float16_keep_gradients_of_any_size(monkeypatch, scale):
    """What GPUs without bf16 units run: a gradient of 1e-7 would be 0 in float16, one of 1e5 infinite."""
    torch.manual_seed(0)
    g = torch.randn(3, 48, 32)
    exact = orthogonalize(g * scale)
    monkeypatch.setattr(orthogonal, "iteration_dtype", lambda device: torch.float16)
    torch.testing.assert_close(orthogonalize(g * scale).float(), exact, atol=0.02, rtol=0)


@pytest.mark.bf16
def test_orthogonalize_turns_each_matrix_towards_its_polar_factor():
    g = torch.randn(4, 32, 48, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    ours = orthogonalize(g).float()
    for i in range(4):
        cosine = torch.nn.functional.cosine_similarity(ours[i].flatten(), (u @ vh)[i].flatten(), dim=0)
        assert cosine > 0.97
        alone = orthogonalize(g[i : i + 1])[0].float()
        torch.testing.assert_close(ours[i], alone, atol=0.03, rtol=0.03)


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_iterates_in_what_it_has_units_for(monkeypatch, has_bf16, expected):
    """Turing and Volta compute bf16 in software."""
    monkeypatch.setattr(orthogonal, "gpu_has_bf16", lambda device: has_bf16)
    assert orthogonal.iteration_dtype(torch.device("cuda", 1)) == expected

"""Recorded steps. Recording itself needs a GPU; everything around it is tested with one that simply runs again."""

import contextlib
import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from miaobi.config import ModelConfig
from miaobi.generate.config import SamplingConfig
from miaobi.generate.cuda_step import CudaStep, decode
from miaobi.generate.slots import Slots, Stream
from miaobi.model.transformer import Transformer

V, BLOCK = 37, 16
CFG = SamplingConfig(max_new_tokens=30, temperature=0, repetition_penalty=1.2)
PROMPTS = [[5], [1, 2, 3, 4], [1, 2, 9], [*range(14)], [*range(30)], [1, 2, 3, 4, 6]]


class Rerun(CudaStep):
    """Records by keeping the function; its result stays in one place, as a graph's does."""

    def capture(self, step):
        self.records = getattr(self, "records", 0) + 1
        logits = step()
        return logits, lambda: logits.copy_(step())


class Refused(CudaStep):
    def capture(self, step):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore of that")


def model(family: str, device: str = "cpu", dtype: torch.dtype = torch.double, **values) -> Transformer:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": BLOCK, "vocab_size": V} | values
    made = Transformer(ModelConfig(family=family, **sizes)).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.3)
    return made.to(device, dtype)


def written(transformer: Transformer, size: int, graphs: CudaStep | None) -> list[list[int]]:
    """What streams of different lengths write that come as slots become free."""
    slots, device = Slots(transformer, size, graphs), transformer.wte.weight.device
    streams = [Stream(list(ids), replace(CFG, max_new_tokens=30 - 4 * n), torch.Generator(device))
               for n, ids in enumerate(PROMPTS)]  # fmt: skip
    coming = list(streams)
    while any(one.left for one in streams):
        while coming and slots.free:
            slots.add(coming.pop(0))
        slots.advance()
    return [one.ids for one in streams]


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@pytest.mark.parametrize("size", [1, 3, 5, 6])
def test_recorded_steps_write_what_plain_ones_write(family, size):
    """Past the block, with rows that nobody has, and with remembered rows that a later prompt begins like."""
    transformer = model(family)
    graphs = Rerun(transformer)
    assert written(transformer, size, graphs) == written(transformer, size, None)
    assert set(graphs.recorded) <= {min(size, rows) for rows in (1, 2, 4, 8)}
    assert graphs.records <= 3 * len(graphs.recorded), "recorded again only where the caches grew"


@pytest.mark.parametrize(("family", "values"), [
    ("gpt2", {}), ("gpt2", {"bias": True}), ("gpt2", {"activation": "gelu_new"}), ("qwen3", {}),
    ("qwen3", {"n_kv_head": 2}), ("qwen3", {"n_kv_head": 1, "head_dim": 12}), ("qwen2", {"n_kv_head": 2}),
    ("llama", {}), ("llama", {"n_kv_head": 1}),
])  # fmt: skip
def test_the_step_in_few_launches_gives_the_models_logits(family, values):
    """Rows at different positions, with tokens behind them that must not be seen."""
    transformer = model(family, **values)
    text = torch.randint(V, (3, BLOCK), generator=torch.Generator().manual_seed(0))
    at = [5, BLOCK - 1, 0]
    with torch.inference_mode():
        caches, expected = transformer.make_caches(3), transformer(text)
        transformer.hidden(text, caches=[replace(cache) for cache in caches])
        for cache in caches:
            for row, position in enumerate(at):
                cache.k[row, :, position] = cache.v[row, :, position] = 100.0
        logits = decode(transformer, text[range(3), at], torch.tensor(at), caches)
    torch.testing.assert_close(logits, expected[range(3), at], atol=1e-9, rtol=1e-9)


def test_one_after_the_other_slots_of_other_sizes_are_recorded_anew():
    transformer = model("qwen3")
    graphs = Rerun(transformer)
    for size in (3, 5, 1, 3):
        assert written(transformer, size, graphs) == written(transformer, size, None)


def test_memory_that_a_recorded_step_points_into_is_not_given_to_others():
    """A graph holds addresses, not tensors: caches of another shape could come to lie there."""

    class Pointing(CudaStep):
        def capture(self, step):
            return step(), lambda: None

    graphs = Pointing(model("qwen3"))
    slots = Slots(graphs.model, 2, graphs)
    slots.add(Stream([1], CFG, torch.Generator()))
    slots.advance()
    keys = weakref.ref(slots.caches[0].k)
    del slots
    gc.collect()
    assert graphs.recorded
    assert keys() is not None
    other = Slots(graphs.model, 1, graphs)
    other.add(Stream([1], CFG, torch.Generator()))
    other.advance()
    gc.collect()
    assert keys() is None, "the memory of old caches is not kept for ever"


def test_where_nothing_can_be_recorded_decoding_goes_on_and_says_so_once(capsys):
    transformer = model("qwen3")
    graphs = Refused(transformer)
    assert written(transformer, 3, graphs) == written(transformer, 3, None)
    assert not graphs.ready
    said = capsys.readouterr().err
    assert said.count("no CUDA graph here (CUDA error: operation not permitted when stream is capturing)") == 1


def test_a_step_is_recorded_on_the_models_device_whichever_is_current(monkeypatch):
    """As far as a machine without a GPU can see: every stream and graph is made while cuda:1 is the current device."""
    current, made = [torch.device("cuda:0")], []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *_):
            current.pop()

    class Made(contextlib.nullcontext):
        def __init__(self, *_, stream=None, **__):
            super().__init__()
            made.append((current[-1], stream.device if stream else None))
            self.device = current[-1]

        def wait_stream(self, _):
            pass

        def replay(self):
            pass

    for name in ("Stream", "current_stream", "stream", "graph", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Made)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    weight = SimpleNamespace(device=torch.device("cuda:1"))
    step = CudaStep(SimpleNamespace(wte=SimpleNamespace(weight=weight)))
    ran = []
    logits, _ = step.capture(lambda: ran.append(current[-1]) or len(ran))
    assert (logits, ran) == (3, [torch.device("cuda:1")] * 3)
    assert {device for device, _ in made} == {torch.device("cuda:1")}
    assert made[-1][1] == torch.device("cuda:1"), "the graph's own stream too"
    assert current == [torch.device("cuda:0")]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_cuda_graphs_write_what_plain_steps_write(family):
    transformer = model(family, "cuda", torch.float32)
    graphs = CudaStep(transformer)
    assert written(transformer, 4, graphs) == written(transformer, 4, None)
    assert graphs.ready
    assert graphs.recorded

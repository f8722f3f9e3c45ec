"""Recorded steps. Recording itself needs a GPU; everything around it is tested with one that simply runs again."""

import contextlib
import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from miaobi.errors import UserError
from miaobi.generate import cuda_step
from miaobi.generate.config import SamplingConfig
from miaobi.generate.cuda_step import CudaStep, decode
from miaobi.generate.memory import Memory
from miaobi.generate.slots import Slots, Stream
from miaobi.model.config import ModelConfig
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


def written(transformer: Transformer, size: int, graphs: CudaStep | None, **settings) -> list[list[int]]:
    """What streams of different lengths write that come as slots become free."""
    slots, device = Slots(transformer, size, graphs), transformer.wte.weight.device
    asked = {name: settings.pop(name) for name in ("alternatives", "ends", "never_empty") if name in settings}
    streams = [Stream(list(ids), replace(CFG, max_new_tokens=30 - 4 * n, **settings),
                      torch.Generator(device).manual_seed(n), **asked) for n, ids in enumerate(PROMPTS)]  # fmt: skip
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
    assert {rows for rows, _ in graphs.recorded} <= {min(size, rows) for rows in (1, 2, 4, 8)}
    assert graphs.records == 2 * len(graphs.recorded), "a step and what it draws, each once"
    seen = graphs.records
    assert written(transformer, size, graphs) == written(transformer, size, None)
    assert graphs.records == seen, "the next call has what this one recorded"


@pytest.mark.parametrize("size", [1, 3])
def test_attention_looks_no_further_than_the_longest_row_needs(monkeypatch, size):
    """By powers of two; the same texts, also past the block, where rows become shorter again."""
    monkeypatch.setattr(cuda_step, "SHORTEST", 4)
    transformer = model("qwen3")
    graphs = Rerun(transformer)
    assert written(transformer, size, graphs) == written(transformer, size, None)
    assert {span for _, span in graphs.recorded} == {4, 8, 16}


SETTINGS = [{"temperature": 1.0}, {"temperature": 1.4, "top_k": 5, "repetition_penalty": 1.0},
            {"temperature": 0.8, "top_p": 0.7, "min_p": 0.02}]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
def test_what_is_drawn_depends_on_the_seed_alone(settings):
    """Not on company, on what else is asked of the model, nor on whether steps can be recorded."""
    transformer = model("qwen3")
    alone = written(transformer, 1, Rerun(transformer), **settings)
    assert alone != written(transformer, 1, Rerun(transformer), temperature=0)
    for size in (3, 6):
        assert written(transformer, size, Rerun(transformer), **settings) == alone
    assert written(transformer, 3, Rerun(transformer), alternatives=2, **settings) == alone
    assert written(transformer, 3, Refused(transformer), **settings) == alone


def test_the_first_token_of_a_reply_is_no_end_and_later_ones_may_be():
    transformer = model("qwen3")
    asked = {"ends": [*range(V - 1)], "never_empty": True, "temperature": 1.0}  # all but one
    texts = written(transformer, 3, Rerun(transformer), **asked)
    assert texts == written(transformer, 3, Refused(transformer), **asked)
    new = [ids[len(prompt) :] for ids, prompt in zip(texts, PROMPTS, strict=True)]
    assert {ids[0] for ids in new} == {V - 1}
    assert len({id_ for ids in new for id_ in ids[1:]}) > 5


def test_a_step_that_goes_on_from_the_last_one_is_given_nothing(monkeypatch):
    """Token, position and count are on the card already: only what changes is copied there."""
    put, given = Memory.put, []
    monkeypatch.setattr(Memory, "put", lambda self, *of: given.append(of[0]) or put(self, *of))
    transformer = model("qwen3", block_size=64)
    graphs = Rerun(transformer)
    slots = Slots(transformer, 2, graphs)
    streams = [Stream([n + 1], replace(CFG, max_new_tokens=10 * (n + 1), temperature=0.9), torch.Generator())
               for n in range(2)]  # fmt: skip
    slots.add(streams[0])
    for _ in range(4):
        slots.advance()
    assert len(given) == 1
    slots.add(streams[1])
    while streams[1].left:
        slots.advance()
    assert len(given) == 3, "when one comes, and when one has ended"


def test_slots_that_live_at_the_same_time_do_not_share_memory():
    transformer = model("gpt2")
    graphs = Rerun(transformer)
    expected = written(transformer, 1, None)
    sides = [Slots(transformer, 1, graphs) for _ in range(2)]
    streams = [Stream(list(ids), replace(CFG, max_new_tokens=30 - 4 * n), torch.Generator())
               for n, ids in enumerate(PROMPTS[:2])]  # fmt: skip
    for slots, stream in zip(sides, streams, strict=True):
        slots.add(stream)
    while any(stream.left for stream in streams):
        for slots, stream in zip(sides, streams, strict=True):
            if stream.left:
                slots.advance()
    assert [stream.ids for stream in streams] == expected[:2]


def test_logits_that_are_not_finite_are_an_error_and_leave_nothing_behind():
    """The memory is lent again: what is not finite in it would go into every text, times a weight of nothing."""
    transformer = model("qwen3")
    graphs, good = Rerun(transformer), transformer.norm.weight.detach().clone()
    expected = written(transformer, 3, None)
    transformer.blocks[0].attn_norm.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        written(transformer, 3, graphs)
    transformer.blocks[0].attn_norm.weight.data[0] = model("qwen3").blocks[0].attn_norm.weight[0]
    assert torch.equal(good, transformer.norm.weight)
    gc.collect()
    assert written(transformer, 3, graphs) == expected


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

    def once(size: int) -> weakref.ref:
        slots = Slots(graphs.model, size, graphs)
        slots.add(Stream([1], CFG, torch.Generator()))
        slots.advance()
        return weakref.ref(slots.caches[0].k)

    graphs = Pointing(model("qwen3"))
    keys = once(2)
    gc.collect()
    assert graphs.recorded
    assert keys() is not None
    assert once(1)() is keys(), "whoever needs no more rows gets the same"
    other = once(3)
    gc.collect()
    assert keys() is None, "the memory of old caches is not kept for ever"
    assert other() is not None


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
@pytest.mark.parametrize("settings", [{}, *SETTINGS])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_cuda_graphs_write_what_plain_steps_write(family, settings):
    """The likeliest tokens, and drawn ones; twice, the second time with what the first has recorded."""
    transformer = model(family, "cuda", torch.float32)
    graphs = CudaStep(transformer)
    expected = written(transformer, 4, None, **settings)
    assert written(transformer, 4, graphs, **settings) == expected
    assert written(transformer, 4, graphs, **settings) == expected
    assert graphs.ready
    assert graphs.recorded

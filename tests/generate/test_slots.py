"""Streams together against each alone: who else is there must not change what is written."""

from contextlib import closing, suppress
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miaobi.generate import cpu_step
from miaobi.generate import slots as slots_module
from miaobi.generate.config import SampleConfig, SamplingConfig
from miaobi.generate.slots import Slots, Stream, common
from miaobi.generate.speculate import continued
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer

V, BLOCK = 37, 16


def model(family: str, block_size: int = BLOCK) -> Transformer:
    """Random, in double precision: together and alone differ by the order of sums, which must not decide a draw."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": block_size, "vocab_size": V}
    grouped = {} if family == "gpt2" else {"n_kv_head": 2}
    made = Transformer(ModelConfig(family=family, **sizes, **grouped)).double().eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.3)
    return made


MODELS = {family: model(family) for family in ("gpt2", "qwen3")}
CONFIGS = [
    SamplingConfig(max_new_tokens=9, temperature=0),
    SamplingConfig(max_new_tokens=5, temperature=1.3, repetition_penalty=1.5),
    SamplingConfig(max_new_tokens=40, temperature=0.9, top_k=5),
    SamplingConfig(max_new_tokens=17, top_p=0.8),
]
PROMPTS = st.lists(st.integers(0, V - 1), min_size=1, max_size=2 * BLOCK)
BEGUN = st.builds(lambda kept, more: [*range(kept), *more], st.integers(0, BLOCK), PROMPTS)  # many begin alike
WISHES = st.lists(st.tuples(st.integers(0, 12), st.one_of(PROMPTS, BEGUN), st.sampled_from(CONFIGS), st.booleans()),
                  min_size=1, max_size=7)  # fmt: skip


def stream(ids: list[int], cfg: SamplingConfig, seed: int, never_empty: bool = False) -> Stream:
    ends = (3, 5, V + 9)  # the last has no logit
    return Stream(list(ids), cfg, torch.Generator().manual_seed(seed), ends, (7,), never_empty)


def alone(transformer: Transformer, *wish) -> list[int]:
    """What a stream writes that nobody is with."""
    slots, one = Slots(transformer), stream(*wish)
    slots.add(one)
    return [token for _ in range(one.left) for _, token in slots.advance()]


@settings(max_examples=settings.default.max_examples // 2)
@given(st.sampled_from(list(MODELS)), st.integers(1, 4), WISHES)
def test_streams_that_come_and_go_write_what_each_writes_alone(family, size, wishes):
    """Prompts shorter and longer than the block, alike and not, arriving while others are being written."""
    slots, written = Slots(MODELS[family], size), {}
    coming = sorted(enumerate(wishes), key=lambda item: item[1][0])
    turn = 0
    while coming or slots.running:
        while coming and coming[0][1][0] <= turn and slots.free:
            number, (_, ids, cfg, never_empty) = coming.pop(0)
            one = stream(ids, cfg, number, never_empty)
            slots.add(one)
            written[number] = (one, [])
        for one, token in slots.advance():
            next(got for other, got in written.values() if other is one).append(token)
        turn += 1
    for number, (_, ids, cfg, never_empty) in enumerate(wishes):
        assert written[number][1] == alone(MODELS[family], ids, cfg, number, never_empty)
        assert written[number][0].ids == [*ids, *written[number][1]]


@settings(max_examples=settings.default.max_examples // 2)
@given(WISHES, st.data())
def test_a_stream_that_is_ended_leaves_the_others_as_they_were(wishes, data):
    slots = Slots(MODELS["qwen3"], len(wishes))
    streams = [stream(ids, cfg, number) for number, (_, ids, cfg, _) in enumerate(wishes)]
    for one in streams:
        slots.add(one)
    gone = set()
    while slots.running or slots.waiting:
        if data.draw(st.booleans()):
            ended = data.draw(st.sampled_from(streams))
            slots.end(ended)
            gone.add(ended)
        slots.advance()
    for number, (_, ids, cfg, _) in enumerate(wishes):
        whole = [*ids, *alone(MODELS["qwen3"], ids, cfg, number)]
        got = streams[number].ids
        assert got == whole[: len(got)]
        assert streams[number] in gone or got == whole


def test_bars_and_ends_are_each_streams_own():
    cfg = SamplingConfig(max_new_tokens=300, temperature=3.0)
    slots = Slots(MODELS["gpt2"], 3)
    barred = [(), (1,), (2, V)]
    streams = [Stream([4], cfg, torch.Generator().manual_seed(1), barred=bars) for bars in barred]
    for one in streams:
        slots.add(one)
    for _ in range(300):
        slots.advance()
    for one, bars in zip(streams, barred, strict=True):
        assert set(range(V)) - set(one.ids) == set(bars) - {V}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes of what the model reads from now on."""
    shapes, hidden = [], Transformer.hidden

    def spy(self, ids, *args, **kwargs):
        shapes.append(tuple(ids.shape))
        return hidden(self, ids, *args, **kwargs)

    monkeypatch.setattr(Transformer, "hidden", spy)
    return shapes


def test_a_prompt_of_many_streams_is_read_once(monkeypatch):
    read = counted(monkeypatch)
    slots = Slots(MODELS["qwen3"], 4)
    for seed in range(4):
        slots.add(stream([*range(12)], CONFIGS[2], seed))
    slots.advance()
    assert read == [(1, 11), (4, 1)]


def test_prompts_of_like_length_are_read_together_and_long_ones_apart(monkeypatch):
    read = counted(monkeypatch)
    slots = Slots(MODELS["qwen3"], 6)
    for seed, (begin, length) in enumerate([(9, 3), (20, 14), (11, 2), (30, 12), (0, 1), (13, 4)]):
        slots.add(stream([begin + i for i in range(length)], CONFIGS[2], seed))
    slots.advance()
    assert sorted(read) == [(1, 1), (2, 3), (2, 13), (6, 1)]
    monkeypatch.setattr(slots_module, "PREFILL_TOKENS", 20)
    read.clear()
    slots = Slots(MODELS["qwen3"], 3)
    for seed in range(3):
        slots.add(stream([10 * seed + i for i in range(10)], CONFIGS[2], seed))
    slots.advance()
    assert read == [(2, 9), (1, 9), (3, 1)]


def test_what_a_row_knows_is_not_read_again_after_its_stream(monkeypatch):
    slots, first = Slots(MODELS["qwen3"]), stream([*range(8)], CONFIGS[0], 0)
    slots.add(first)
    while first.left:
        slots.advance()
    read = counted(monkeypatch)
    ids = [*first.ids, 30, 31, 32][:BLOCK]
    slots.add(stream(ids[:15], CONFIGS[1], 1))
    slots.advance()
    assert read[-1] == (1, 1)
    assert sum(length for _, length in read) <= 3


def test_full_slots_take_no_more():
    slots = Slots(MODELS["gpt2"], 1)
    slots.add(stream([1], CONFIGS[0], 0))
    with pytest.raises(ValueError, match="all 1 slots are taken"):
        slots.add(stream([2], CONFIGS[0], 1))
    assert Slots(MODELS["gpt2"], 1).advance() == []


@given(st.lists(st.integers(0, 2), max_size=9), st.lists(st.integers(0, 2), max_size=9))
def test_common_is_the_longest_common_beginning(a, b):
    naive = 0
    with suppress(IndexError):
        while a[naive] == b[naive]:
            naive += 1
    assert common(a, b) == naive


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_the_compiled_step_serves_rows_at_different_places(kind, built):
    """Greedy, against each alone."""
    built(cpu_step.SOURCE)
    transformer = model("qwen3").float()
    compiled = cpu_step.CpuStep(transformer, kind)
    cfg = SamplingConfig(max_new_tokens=24, temperature=0)
    prompts = [[5], [1, 2, 3, 4], [1, 2, 9], [*range(14)], [*range(30)]]

    def written(size: int) -> list[list[int]]:
        slots = Slots(transformer, size, compiled)
        streams = [Stream(list(ids), replace(cfg, max_new_tokens=24 - n), torch.Generator())
                   for n, ids in enumerate(prompts)]  # fmt: skip
        coming = iter(streams)
        while not all(one.left == 0 for one in streams):
            for one in islice(coming, slots.free):
                slots.add(one)
            slots.advance()
        return [one.ids for one in streams]

    assert written(1) == written(3) == written(5)


@pytest.mark.parametrize(("threads", "family"), [(1, "gpt2"), (1, "qwen3"), (3, "qwen3")])
@pytest.mark.parametrize("kind", cpu_step.KINDS)
def test_greedy_text_is_the_same_with_guesses_and_takes_fewer_steps(family, kind, threads, monkeypatch, built):
    """Past the block, with a penalty and without, and with a prompt that says everything twice."""
    built(cpu_step.SOURCE)
    transformer, before = model(family, 64).float(), torch.get_num_threads()
    compiled, steps = cpu_step.CpuStep(transformer, kind), []
    most = 150 if threads == 1 else 60  # threads that share a core wait milliseconds for each other in every product
    torch.set_num_threads(threads)
    call = cpu_step.CpuStep.call

    def spy(*given):  # self, tokens, caches, positions, row, unscored: prompts are read without logits
        if not any(given[5:]):
            steps.append(len(given[1]))
        return call(*given)

    monkeypatch.setattr(cpu_step.CpuStep, "call", spy)

    def written(penalty: float) -> tuple[list[int], int]:
        steps.clear()
        cfg = SamplingConfig(max_new_tokens=most, temperature=0, repetition_penalty=penalty)
        one = Stream([*range(12), *range(9)], cfg, torch.Generator(), ends=(5,), barred=(2,), never_empty=True)
        slots = Slots(transformer, 2, compiled)
        slots.add(one)
        tokens = []
        while one.left:
            tokens += [token for _, token in slots.advance()]
        assert one.ids[21:] == tokens
        return tokens, len(steps)

    try:
        guessed = [written(penalty) for penalty in (1.0, 1.3)]
        assert max(steps) > 1
        monkeypatch.setattr(Slots, "propose", lambda self: [])
        plain = [written(penalty) for penalty in (1.0, 1.3)]
    finally:
        torch.set_num_threads(before)
    assert [tokens for tokens, _ in guessed] == [tokens for tokens, _ in plain]
    assert plain[0][1] == most > guessed[0][1]


@pytest.mark.parametrize("kind", cpu_step.KINDS)
@torch.inference_mode()
def test_tokens_of_one_stream_at_once_get_the_logits_of_one_by_one_bit_for_bit(kind, built):
    built(cpu_step.SOURCE)
    transformer = model("qwen3", 64).float()
    compiled = cpu_step.CpuStep(transformer, kind)
    together, apart = (transformer.make_caches(2, 64, compiled.cache_dtype) for _ in range(2))
    ids = torch.randint(0, V, (40, 1))
    for caches in (together, apart):
        compiled(ids[:1], caches, [0])
    for at in range(1, 37, 9):
        some = compiled.verify(ids[at : at + 9], together, at)
        assert torch.equal(some, torch.cat([compiled(ids[i : i + 1], apart, [i]) for i in range(at, at + 9)]))


@given(st.lists(st.integers(0, 2), max_size=12), st.integers(-1, 5))
def test_what_continues_is_what_followed_the_same_tokens_latest(ids, most):
    guess = continued(ids, most)
    assert len(guess) <= max(0, most)
    follows = [ids[at + n :] for n in (3, 2) for at in range(len(ids) - n - 1, -1, -1) if ids[at : at + n] == ids[-n:]]
    assert guess == (follows[0][: max(0, most)] if follows else [])


def test_complete_gives_texts_in_order_and_takes_prompts_when_there_is_room(trained, monkeypatch):
    import miaobi
    from miaobi.generate import engine

    lm = miaobi.load(str(trained("qwen3", "char")), device="cpu", dtype="float32")
    monkeypatch.setattr(engine, "SLOTS", {"cpu": 2})
    prompts = ["皇马", "皇马赢得", "冠军", "", "皇马赢得了", "国家队"]
    cfg = SampleConfig(max_new_tokens=12, seed=5)
    taken = []
    with closing(lm.complete((taken.append(text) or text for text in prompts), cfg)) as texts:
        first = next(texts)
        assert 2 <= len(taken) < len(prompts)
        found = [first, *texts]
    assert taken == prompts
    expected = [lm.generate(text, cfg, num_samples=1, seed=5 + n)[0] for n, text in enumerate(prompts)]
    assert found == expected
    assert list(lm.complete([])) == []

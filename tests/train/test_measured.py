"""How steps are computed is measured once, remembered, and kept by a run that goes on."""

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from miaobi import native
from miaobi.config import TrainConfig
from miaobi.device import can_compile
from miaobi.errors import UserError
from miaobi.model import cpu_attention
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer
from miaobi.train import compile_time, computing, measured
from miaobi.train.computing import choose_mode
from miaobi.train.layout import Objective, is_compiled, no_recompilation
from miaobi.train.measured import (
    ExecutionMode,
    Workload,
    choose,
    choose_compiled,
    compiling_seconds,
    fastest,
    larger_micro_batch,
    least_seconds,
    remember,
    remembered,
    tiled_fits,
)
from miaobi.train.run_directory import Progress
from miaobi.train.world import World

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def built():
    """Our own attention lies in the cache that all tests share."""
    native.build.cache_clear()
    native.awaited(cpu_attention.SOURCE)


@pytest.fixture(autouse=True)
def own_cache(built, tmp_path, monkeypatch):
    monkeypatch.setenv("MIAOBI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(measured.OtherPrograms, "cores", lambda self: 0.0)  # other tests may run beside these


def work(steps: int = 1000, rows: int = 3, family: str = "qwen3", micro: int = 0, is_fixed: bool = False,
         layers: int = 2) -> Workload:  # fmt: skip
    torch.manual_seed(0)
    sizes = {"n_layer": layers, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 70}
    model = Transformer(ModelConfig(family=family, **sizes))
    ids = torch.randint(0, 70, (rows, 16))

    def example(count: int, compiled: bool) -> tuple:
        return ids[:count], ids[:count], None, None

    return Workload(Objective(model.train()), example, CPU, steps, rows, micro or rows, is_fixed)


def refuse(*_):
    raise AssertionError("measured again")


def test_the_first_mode_stays_unless_another_is_clearly_faster():
    a, b, c = (ExecutionMode("float32", compiled=part) for part in ("", "blocks", "whole"))
    assert fastest({a: 1.00, b: 0.99, c: 1.2}) == a
    assert fastest({a: 1.00, b: 0.90, c: 0.89}) == b
    assert fastest({a: 1.00, b: 0.90, c: 0.70}) == c


def test_modes_take_turns_and_the_first_turn_does_not_count():
    order, modes = [], {ExecutionMode("float32"): 100.0, ExecutionMode("bfloat16"): 100.0}

    def turn(mode):
        order.append(mode)
        return 100.0 if order.count(mode) == 1 else float(order.count(mode))

    seconds = least_seconds({mode: lambda mode=mode: turn(mode) for mode in modes})
    assert order[:4] == [*modes, *modes]
    assert set(seconds.values()) == {2.0}  # of 2 to 5, the first of which was 100


def test_a_short_run_is_not_measured(monkeypatch):
    monkeypatch.setattr(measured, "least_seconds", refuse)
    assert choose(work(steps=measured.MIN_MICRO_BATCHES - 1), ["float32"], True, "it pays") == ExecutionMode("float32")


def test_a_shape_is_measured_once_per_machine(monkeypatch):
    job = work()
    weights = [p.clone() for p in job.objective.parameters()]
    state = torch.get_rng_state()
    first = choose(job, ["float32"], False, "")
    assert first.why.startswith("measured")
    assert first.seconds > 0
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(weights, job.objective.parameters(), strict=True))
    monkeypatch.setattr(measured, "least_seconds", refuse)
    assert choose(work(), ["float32"], False, "") == first
    for other in (work(rows=2), work(family="gpt2")):
        with pytest.raises(AssertionError, match="measured again"):
            choose(other, ["float32"], False, "")
    monkeypatch.setattr(compile_time, "cpu_flags", lambda: "flags: avx512f amx_tile")
    with pytest.raises(AssertionError, match="measured again"):
        choose(work(), ["float32"], False, "")


def test_timings_that_other_programs_disturbed_are_not_cached(monkeypatch, capsys):
    monkeypatch.setattr(measured.OtherPrograms, "cores", lambda self: 0.8)
    choose(work(), ["float32"], False, "")
    assert "other programs took 0.8 cores" in capsys.readouterr().err
    monkeypatch.setattr(measured, "least_seconds", refuse)
    with pytest.raises(AssertionError, match="measured again"):
        choose(work(), ["float32"], False, "")


def speeds(monkeypatch, **seconds):
    """Ways take so many seconds as the last of `seconds` says whose name their description has in it."""

    def told(mode):
        return [took for name, took in seconds.items() if name in str(mode)][-1]

    monkeypatch.setattr(measured, "least_seconds", lambda modes: {mode: told(mode) for mode in modes})


def test_probabilities_that_would_take_too_much_memory_are_not_tried(monkeypatch):
    speeds(monkeypatch, eager=1.0, explicit=0.1)
    monkeypatch.setattr(measured, "EXTRA_MEMORY", 0.0)
    assert not choose(work(), ["float32"], False, "").explicit
    monkeypatch.setattr(measured, "EXTRA_MEMORY", 0.15)
    assert choose(work(rows=2), ["float32"], False, "").explicit


def test_a_precision_that_is_slower_here_is_not_taken_eager_or_compiled(monkeypatch):
    monkeypatch.setattr(Workload, "apply", lambda self, mode: mode)
    monkeypatch.setattr(Workload, "time_pass", lambda self, mode: 1.0)
    speeds(monkeypatch, bfloat16=2.0, float32=1.0, compiled=1.5)
    assert choose(work(), ["bfloat16", "float32"], True, "it pays").dtype == "float32"
    speeds(monkeypatch, bfloat16=2.0, float32=1.0, compiled=0.5)  # compiled, its conversions cost less
    found = choose(work(rows=2), ["bfloat16", "float32"], True, "it pays")
    assert (found.dtype, found.compiled) == ("bfloat16", "blocks")
    assert "float32, fused attention, eager: 1e+03 ms" in found.why


def test_our_own_attention_is_tried_where_it_computes_the_same(monkeypatch, capsys):
    speeds(monkeypatch, eager=1.0, tiled=0.1)
    job = work()
    assert choose(job, ["float32"], False, "").tiled
    assert job.apply(ExecutionMode("float32", tiled=True))
    assert {block.attn.kind for block in job.objective.model.blocks} == {"tiled"}
    monkeypatch.setattr(cpu_attention.native, "awaited", lambda source: None)  # no compiler
    assert not choose(work(rows=2), ["float32"], False, "").tiled
    assert job.apply(ExecutionMode("float32", tiled=True))
    assert "miaobi's own attention kernel" in capsys.readouterr().err
    assert {block.attn.kind for block in job.objective.model.blocks} == {"fused"}
    monkeypatch.undo()
    dropping = work()
    dropping.objective.model.cfg = replace(dropping.objective.model.cfg, dropout=0.1)
    assert not tiled_fits(dropping)
    assert not tiled_fits(replace(work(), example=lambda rows, compiled: (*work().example(rows, compiled)[:3], True)))


def test_a_larger_micro_batch_is_tried_where_memory_allows_it(monkeypatch):
    job = work(rows=8, micro=2)
    assert larger_micro_batch(job, 9.0) == 8
    assert larger_micro_batch(job, 1.0) == 4
    assert larger_micro_batch(job, 0.5) == 3, "3 + 3 + 2"
    assert larger_micro_batch(job, 0.4) == 0
    assert larger_micro_batch(work(rows=8, micro=2, is_fixed=True), 9.0) == 0
    speeds(monkeypatch, eager=1.0, once=0.5)
    found = choose(work(rows=8, micro=2), ["float32"], False, "")
    assert found.micro == 8
    assert "8 at once: 500 ms" in found.why


@pytest.mark.parametrize(
    ("steps", "why", "tried"),
    [
        (1000, "", []),
        (1000, "it pays", ["blocks"]),
        (21 * 1000, "", ["blocks"]),
        (51 * 1000, "", ["blocks", "whole"]),
        (81 * 1000, "it pays", ["blocks", "whole", "whole, explicit"]),
        (400 * 1000, "", ["blocks", "whole", "whole, explicit", "whole, max_autotune"]),
    ],
)
def test_compiled_modes_are_tried_as_far_as_the_run_pays(monkeypatch, steps, why, tried):
    """One second in a thousand steps may go into it."""
    compiled = []
    monkeypatch.setattr(Workload, "apply", lambda self, mode: compiled.append(mode) or mode)
    monkeypatch.setattr(measured, "TRIAL_SHARE", 1e-3)
    speeds(monkeypatch, float32=1.0)
    choose_compiled(work(steps=steps, rows=1), ExecutionMode("float32", seconds=1.0), "float32", why)
    names = [w.compiled + ", explicit" * w.explicit + ", max_autotune" * w.autotuned for w in compiled]
    assert names == tried


def test_the_fastest_compiled_way_is_taken(monkeypatch):
    monkeypatch.setattr(Workload, "apply", lambda self, mode: mode)
    speeds(monkeypatch, eager=1.0, blocks=1.1, whole=0.9, explicit=0.95, max_autotune=0.8)
    found = choose_compiled(work(steps=10**9), ExecutionMode("float32", seconds=1.0), "float32", "")
    assert (found.compiled, found.explicit, found.autotuned, found.seconds) == ("whole", False, True, 0.8)
    monkeypatch.setattr(Workload, "apply", lambda self, mode: None)  # the compiler fails
    eager = ExecutionMode("float32", seconds=1.0)
    assert choose_compiled(work(steps=10**9), eager, "float32", "it pays") == eager


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"eager": 3}', '{"eager": {"dtype": "int8"}}',
                                    '{"eager": {"dtype": "float32", "explicit": "yes"}}',
                                    '{"eager": {"dtype": "float32", "micro": -1}}',
                                    '{"eager": {"dtype": "float32", "seconds": NaN}}',
                                    '{"eager": {"dtype": "float32", "run": "rm"}}'])  # fmt: skip
def test_a_damaged_memory_is_no_memory(damage):
    remember("key", "eager", ExecutionMode("float32", explicit=True))
    assert remembered("key")["eager"].explicit is True
    measured.cache_file("key").write_text(damage)
    assert remembered("key") == {}


def test_a_resumed_run_computes_as_it_began(monkeypatch):
    monkeypatch.setattr(measured, "least_seconds", refuse)
    progress = Progress(step=7, computed={"dtype": "float32", "explicit": True, "why": "another machine"})
    job = work()
    decided = choose_mode(TrainConfig(), job, torch.float32, progress, World())
    assert decided == ExecutionMode("float32", explicit=True, why="another machine")
    assert all(block.attn.kind == "explicit" for block in job.objective.model.blocks)
    old = Progress(step=7)  # of a version that did not measure
    assert choose_mode(TrainConfig(), work(), torch.float32, old, World()) == ExecutionMode("float32")


def test_the_first_rank_decides_for_all(monkeypatch):
    class Two(World):
        def gather(self, value, group=None):
            return [{"dtype": "float32", "explicit": True}, value]

    monkeypatch.setattr(computing, "choose", lambda *_, **__: ExecutionMode("float32", why="slower here"))
    job = work()
    assert choose_mode(TrainConfig(), job, torch.float32, Progress(), Two()).explicit
    assert job.objective.model.blocks[0].attn.kind == "explicit"


def test_a_precision_that_this_machine_lacks_is_replaced_and_said(capsys):
    progress = Progress(step=7, computed={"dtype": "bfloat16", "explicit": True})
    decided = choose_mode(TrainConfig(), work(), torch.float32, progress, World())
    assert decided == ExecutionMode("float32", explicit=True)
    assert capsys.readouterr().err.count("warning:") == 1
    damaged = Progress(step=7, computed={"dtype": "int8"})
    with pytest.raises(UserError, match="damaged"):
        choose_mode(TrainConfig(), work(), torch.float32, damaged, World())


@pytest.fixture
def bf16_cpu(monkeypatch) -> list:
    """As on a CPU where compiled bf16 pays. What the compiler is asked for is only noted down, with what was said."""
    asked = []
    monkeypatch.setenv("MIAOBI_CPU_BF16", "yes")
    monkeypatch.setattr(computing, "can_compile", lambda device: True)
    monkeypatch.setattr(computing, "is_long", lambda work: False)
    monkeypatch.setattr(measured, "compile_as", lambda *of: asked.append(of) or True)
    return asked


@pytest.mark.parametrize(
    ("steps", "pieces", "seconds", "compiled"),
    [(1000, 1, 0.023, False), (23, 1, 1.0, False), (3000, 1, 0.023, False), (30, 1, 20.0, True), (30, 10, 2.0, True),
     (20_000, 1, 0.02, True), (199, 1, 1.1, True), (200, 1, 0.9, False)],
)  # fmt: skip
def test_auto_compiles_by_the_work_not_by_the_steps(bf16_cpu, monkeypatch, capsys, steps, pieces, seconds, compiled):
    """A run of 23 seconds in 1,000 steps was compiled once, which took 20; ten minutes in 30 steps were not."""
    took = iter([9 * seconds, seconds])  # the first pass warms up
    monkeypatch.setattr(Workload, "time_pass", lambda self, mode: next(took))
    progress, job = Progress(), work(steps=steps, rows=pieces)  # a sequence each
    mode = choose_mode(TrainConfig(), job, torch.bfloat16, progress, World())
    assert bool(mode.compiled) == compiled == bool(progress.computed["compiled"])
    said = capsys.readouterr().err
    assert ("compiling now, which takes about 20 s: the run would take" in said) == compiled


@pytest.mark.parametrize(("asked", "begun"), [(True, None), ("auto", "compiled"), ("auto", None)])
def test_compiling_is_announced_before_it_begins(bf16_cpu, monkeypatch, capsys, asked, begun):
    said = []
    monkeypatch.setattr(measured, "compile_as", lambda *of: said.append(capsys.readouterr().err) or True)
    monkeypatch.setattr(Workload, "time_pass", lambda self, mode: 6.0)
    progress = Progress()
    if begun:
        progress = Progress(step=7, computed={"dtype": "bfloat16", "compiled": "blocks", "why": "it saves a lot"})
    choose_mode(TrainConfig(compile=asked), work(steps=1000, rows=1), torch.bfloat16, progress, World())
    why = "it saves a lot" if begun else "the run would take 1.7 h without it, and compiling saves about 10 min"
    why = "--compile asks for it; it saves about 10% of a step" if asked is True else why
    assert f"compiled (blocks)\ncompiling now, which takes about 20 s: {why}\n" in said[0]


def test_the_next_estimate_is_what_compiling_took_on_this_machine(bf16_cpu, monkeypatch, capsys):
    """Also whether a run pays for it: 600 s save 60, which is too little for a compiler that takes 70."""
    mode, now = ExecutionMode("bfloat16", compiled="blocks"), [0.0]
    monkeypatch.setattr(measured.time, "perf_counter", lambda: now[0])

    def compiles(seconds, then=True):
        monkeypatch.setattr(measured, "compile_as", lambda *_: now.append(now.pop() + seconds) or then)
        work().apply(mode)

    compiles(999.0, then=False)  # the compiler failed
    assert compiling_seconds(work(), mode) == 20
    compiles(70.0)
    compiles(3.0)  # its parts lay in Inductor's cache
    assert compiling_seconds(work(), mode) == 70
    assert compiling_seconds(work(), replace(mode, compiled="whole")) == 30, "a kind that was not compiled here yet"
    monkeypatch.setattr(Workload, "time_pass", lambda self, mode: 0.6)
    run = TrainConfig(), work(steps=1000, rows=1), torch.bfloat16
    assert not choose_mode(*run, Progress(), World()).compiled
    for _ in range(compile_time.MAX_KEPT):
        compiles(9.0)
    assert compiling_seconds(work(), mode) == 9, "as it has been lately"
    capsys.readouterr()
    assert choose_mode(*run, Progress(), World()).compiled
    assert "compiling now, which takes about 9 s: the run would take" in capsys.readouterr().err
    monkeypatch.setattr(compile_time, "cpu_flags", lambda: "flags: another machine")
    assert compiling_seconds(work(), mode) == 20


@pytest.mark.parametrize("damage", ["", "[]", '{"blocks": []}', '{"blocks": [NaN]}', '{"blocks": [-1]}',
                                    '{"blocks": ["1"]}', '{"blocks": 3}'])  # fmt: skip
def test_a_damaged_memory_of_compiling_is_none(damage):
    compile_time.cache_file(CPU).write_text(damage)
    assert compiling_seconds(work(), ExecutionMode("float32", compiled="blocks")) == 20


def test_no_rank_compiles_where_one_cannot(bf16_cpu, monkeypatch):
    class Two(World):
        def gather(self, value, group=None):
            return [value, False if isinstance(value, bool) else value]

    monkeypatch.setattr(Workload, "time_pass", lambda self, mode: 60.0)
    assert not choose_mode(TrainConfig(), work(), torch.bfloat16, Progress(), Two()).compiled
    assert choose_mode(TrainConfig(), work(), torch.bfloat16, Progress(), World()).compiled


def masked_work(fails: Callable[[bool], bool], **given) -> tuple[Workload, list[bool]]:
    """Packed documents on a GPU, and the forms of mask that were asked for, in turn; `fails` says which do."""
    asked = []

    def example(rows: int, flex: bool) -> tuple:
        asked.append(flex)
        if fails(flex):
            raise RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376")
        return work().example(rows, flex)

    return replace(work(**given), example=example, flex=True), asked


def test_compiled_blocks_get_their_own_form_of_the_mask():
    """On a GPU eager attention takes a matrix, the compiled one FlexAttention's blocks."""
    job, asked = masked_work(lambda flex: False)
    job.time_pass(ExecutionMode("float32"))
    job.time_pass(ExecutionMode("float32", compiled="blocks"))
    job.time_pass(ExecutionMode("float32", compiled="blocks", plain_mask=True))
    replace(job, flex=False).time_pass(ExecutionMode("float32", compiled="blocks"))
    assert asked == [False, True, False, False]


@pytest.fixture
def any_compiler(monkeypatch):
    """torch.compile that takes no time and changes nothing."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(computing, "can_compile", lambda device: True)


@pytest.mark.usefixtures("any_compiler")
def test_flexattention_that_fails_costs_flexattention_and_not_compilation(capsys):
    """Its backward pass may take more shared memory than a card has. A run that goes on does not try it again."""
    job, asked = masked_work(lambda flex: flex, steps=20)
    progress = Progress()
    mode = choose_mode(TrainConfig(compile=True), job, torch.float32, progress, World())
    assert (mode.compiled, mode.plain_mask) == ("blocks", True)
    assert asked == [True, False]
    said = capsys.readouterr().err
    assert said.count("torch.compile does not work here (RuntimeError); trying without FlexAttention") == 1
    assert "continuing without" not in said
    job, asked = masked_work(lambda flex: flex, steps=20)
    progress.step = 7
    assert choose_mode(TrainConfig(compile=True), job, torch.float32, progress, World()) == mode
    assert asked == [False]


@pytest.mark.usefixtures("any_compiler")
def test_of_the_modes_that_are_timed_only_the_first_tries_flexattention():
    job, asked = masked_work(lambda flex: flex, steps=10**7)
    best = choose_compiled(job, ExecutionMode("float32", seconds=1.0), "float32", "")
    assert best.plain_mask or not best.compiled
    assert asked.count(True) == 1
    assert {(mode.compiled, mode.plain_mask) for mode in job.ready} == {("blocks", True), ("whole", True)}


@pytest.mark.usefixtures("any_compiler")
def test_a_compiler_that_fails_with_any_mask_is_done_without(capsys):
    job, asked = masked_work(lambda flex: True, steps=20)
    mode = choose_mode(TrainConfig(compile=True), job, torch.float32, Progress(), World())
    assert mode == ExecutionMode("float32")
    assert asked == [True, False]
    assert capsys.readouterr().err.count("continuing without it (--compile=False avoids this warning)") == 1


@pytest.mark.parametrize("error", [RuntimeError, OSError, TypeError, subprocess.CalledProcessError, KeyError])
def test_whatever_the_compiler_raises_is_one_line_of_warning(monkeypatch, capsys, error):
    """Dynamo's, Inductor's, Triton's, ptxas's: they have no class in common."""

    def broken(self, mode):
        raise error(1, "ptxas") if error is subprocess.CalledProcessError else error("no")

    monkeypatch.setattr(Workload, "time_pass", broken)
    assert work().apply(ExecutionMode("float32", compiled="blocks")) is None
    assert f"does not work here ({error.__name__}); continuing without" in capsys.readouterr().err


def test_a_run_says_below_its_configuration_how_it_computes(train, prepared, tmp_path, monkeypatch):
    speeds(monkeypatch, eager=1.0, explicit=0.1)
    run = {"data": prepared(), "out_dir": tmp_path / "run", "batch_size": 2, "sample_tokens": 0}
    train(**run, max_iters=400, eval_interval=400)
    written = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert (
        "#   float32, explicit attention, eager (measured, a sequence each; float32, fused attention, eager:" in written
    )
    progress = json.loads((tmp_path / "run/checkpoints/last/train_state/progress.json").read_text(encoding="utf-8"))
    assert progress["computed"]["explicit"] is True
    monkeypatch.setattr(measured, "least_seconds", refuse)
    monkeypatch.setenv("MIAOBI_CACHE_DIR", str(tmp_path / "another machine's"))
    train(**run, max_iters=401, eval_interval=400)
    again = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert again == written.replace("max_iters: 400", "max_iters: 401"), "once, and as it began"


@pytest.mark.slow
@pytest.mark.parametrize("mode", [{"compiled": "blocks", "tiled": True},
                                  {"compiled": "whole", "explicit": True, "autotuned": True}],
                         ids=["blocks", "whole"])  # fmt: skip
def test_compiled_modes_have_the_gradients_of_eager_ones_also_of_a_smaller_last_batch(mode, capfd):
    if not can_compile(CPU):
        pytest.skip("no C++ compiler")
    mode = ExecutionMode("float32", **mode)
    layers = 2 if mode.compiled == "blocks" else 1  # of the whole, each layer is compiled for itself
    job, plain = (work(family="gpt2", layers=layers) for _ in range(2))
    assert job.apply(mode)
    assert not re.search("autotune|warning", capfd.readouterr().err, re.IGNORECASE), "torch's own words"
    assert is_compiled(job.objective)
    assert not is_compiled(plain.objective)
    compiled = job.objective.whole
    assert job.apply(ExecutionMode("float32"))
    assert not is_compiled(job.objective)
    assert job.apply(mode)
    assert job.objective.whole is compiled, "compiled once"
    for rows in (3, 2):
        for each in (job, plain):
            each.objective.zero_grad(set_to_none=True)
            with no_recompilation(each.objective):
                each.objective(*each.example(rows, False)).backward()
        for ours, theirs in zip(job.objective.parameters(), plain.objective.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)

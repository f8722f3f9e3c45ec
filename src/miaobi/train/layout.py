"""How a model is laid out for training: compiled, and over the ranks of a run.

DDP copies it (arXiv:2006.15704); FSDP2 shards it (arXiv:2304.11277), over all ranks or within groups of them (HSDP).
"""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stderr

import torch
from torch import Tensor, nn

from miaobi.cache import keep_compiled_code_private
from miaobi.config import ModelConfig, TrainConfig
from miaobi.console import log, warn
from miaobi.errors import UserError
from miaobi.model.checkpoint import Unfilled
from miaobi.model.loss import linear_cross_entropy
from miaobi.model.transformer import Transformer
from miaobi.train.world import World

EAGER = (None, ())
"""Nothing is compiled: see `use_compiled`."""
WITHOUT = "going on without (--compile=False says so)"


class Objective(nn.Module):
    """Nats over the scored targets, as one module: DDP prepares its reductions in `forward`.

    Attributes: whole, `after_embedding` compiled, where that is how the run computes.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        self.whole: Callable[..., Tensor] | None = None

    def forward(self, ids: Tensor, targets: Tensor, position_ids: Tensor | None, mask) -> Tensor:
        if self.whole is not None:
            positions = torch.arange(ids.shape[1], device=ids.device) if position_ids is None else position_ids
            return self.whole(*self.model.embed(ids, positions), mask, targets)
        hidden = self.model.hidden(ids, position_ids, mask)
        return linear_cross_entropy(hidden, self.model.head_weight, targets)

    def after_embedding(self, x: Tensor, rope: Tensor | None, mask, targets: Tensor) -> Tensor:
        """The same of embedded tokens (B, T, C). Compiled, the embedding's gradient would be added up by all threads at
        once, in any order: a run that is repeated would not end in the same bits.
        """
        return linear_cross_entropy(self.model.after_embedding(x, rope, mask), self.model.head_weight, targets)


def make_model(
    cfg: TrainConfig,
    world: World,
    device: torch.device,
    dtype: torch.dtype,
    shape: ModelConfig,
    weights: dict[str, Tensor] | None,
) -> Transformer:
    """A model of `shape` with `weights`, or with initial ones: whole on the CPU, or this rank's shards on `device`.

    Raises UserError for fsdp in float16.
    """
    torch.manual_seed(cfg.seed)
    if not wants_shards(cfg, world, shape, device):
        with Unfilled():
            model = Transformer(shape)
        if weights is None:
            model.init_weights()
        else:
            model.load_state_dict(weights)
        return model
    if dtype == torch.float16:
        raise UserError("parallel=fsdp cannot scale the loss for float16; use --dtype=bfloat16, or --parallel=ddp")
    with torch.device("meta"):
        model = Transformer(shape)
    shard(model, world, cfg, device, dtype)
    fill(model, weights)
    return model


def wants_shards(cfg: TrainConfig, world: World, shape: ModelConfig, device: torch.device) -> bool:
    """Whether a model is to be sharded. auto: fp32 weights, gradients and two moments would fill half of a GPU."""
    if cfg.parallel != "auto" or world.size == 1 or device.type != "cuda" or cfg.trainable == "lora":
        return cfg.parallel == "fsdp"
    with torch.device("meta"):
        parameters = Transformer(shape).num_parameters()
    return 16 * parameters > torch.cuda.get_device_properties(device).total_memory / 2


def shard(model: Transformer, world: World, cfg: TrainConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Shard the weights of `model` (FSDP2), block by block and then the rest, in place.

    The blocks' products and what is sent for them are in `dtype`; weights, gradients' sums and moments are in fp32.
    `model` is on the meta device, and gets memory for its shards, without values: see `fill`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    size = cfg.fsdp_shard_size or world.size
    if size == world.size:
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(device.type, (world.size // size, size), mesh_dim_names=("replicate", "shard"))
    reduced = torch.float32 if dtype != torch.float32 else None
    # States between blocks and the rotary table stay fp32, as they do under DDP: autocast casts what a product takes.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if reduced else None, reduce_dtype=reduced, cast_forward_inputs=False
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)  # embeddings in fp32: what they give is where the states begin
    register_fsdp_forward_method(model, "hidden")
    model.to_empty(device=device)


@torch.no_grad()
def fill(model: Transformer, values: dict[str, Tensor] | None) -> None:
    """Give a sharded model the weights `values`, or draw the initial ones as one process would, one by one.

    Every rank draws whole parameters and keeps its part, so that no rank ever holds more than one whole.
    """
    for name, p in model.named_parameters():
        if values is None:
            value = torch.empty(p.shape)
            model.init_parameter(name, value)
        else:
            value = values[name]
        p.copy_(part_of(value.to(p.device), p))


def is_sharded(held: Tensor | nn.Module) -> bool:
    """Whether this rank has only a part of it: a DTensor, an FSDPModule (known by attributes: slow to import)."""
    return hasattr(held, "full_tensor") or hasattr(held, "reshard")


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered (a collective), any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a sharded tensor, the same memory; any other as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def shards_of(local: Tensor, like: Tensor) -> Tensor:
    """The sharded tensor, laid out as `like` is, of which this rank holds `local`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has whole, sharded as `like` is; all of it where that is not."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def compile_as(
    objective: Objective, part: str, autotuned: bool, once: Callable[[], object], instead: str = WITHOUT
) -> bool:
    """Compile the `blocks` (one graph that all layers share) or the `whole` objective behind the embedding, with its
    loss, and try it by `once`. Where that fails: as it was before, with a line of warning, and False.

    autotuned: Inductor times other matrix products than the library's (max_autotune). instead: what is said to be done
    where it fails.
    Shapes are taken as they are: a smaller last micro-batch runs uncompiled (see `no_recompilation`).
    """
    before, started = compiled_parts(objective), time.perf_counter()
    keep_compiled_code_private()
    options = {"max_autotune": True} if autotuned else None
    use_compiled(objective, EAGER)
    if part == "blocks":
        for block in objective.model.blocks:
            block.compile(dynamic=False, options=options)
    else:
        objective.whole = torch.compile(objective.after_embedding, dynamic=False, options=options)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # torch's deprecations, and autotune's tables
            warnings.simplefilter("ignore")
            once()
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # the compiler's own, and what Triton, ptxas and their subprocesses raise
        warn(f"torch.compile does not work here ({type(e).__name__}); {instead}")
        use_compiled(objective, before)
        return False
    finally:
        objective.model.zero_grad(set_to_none=True)
    log(f"compiled in {time.perf_counter() - started:.0f} s")
    return True


def compiled_parts(objective: Objective) -> tuple:
    """What of the objective is compiled: the whole of it, and each block; None is what runs eagerly."""
    return objective.whole, tuple(block._compiled_call_impl for block in objective.model.blocks)


def use_compiled(objective: Objective, parts: tuple) -> None:
    """Compute by what `compiled_parts` gave, or by EAGER."""
    objective.whole, blocks = parts
    for i, block in enumerate(objective.model.blocks):
        block._compiled_call_impl = blocks[i] if blocks else None


def is_compiled(objective: nn.Module) -> bool:
    """Whether the objective or its blocks are compiled."""
    whole, blocks = compiled_parts(getattr(objective, "module", objective))  # within DDP
    return any(part is not None for part in (whole, *blocks))


def no_recompilation(objective: nn.Module) -> AbstractContextManager:
    """What is compiled for other shapes runs eagerly: compiling again would take longer than that ever does."""
    return torch.compiler.set_stance("eager_on_recompile") if is_compiled(objective) else nullcontext()


def reducing(objective: nn.Module, model: Transformer, last: bool) -> AbstractContextManager:
    """Gradients are reduced over the ranks with the last micro-batch only."""
    if is_sharded(model):
        model.set_requires_gradient_sync(last)
    elif hasattr(objective, "no_sync") and not last:  # DDP's
        return objective.no_sync()
    return nullcontext()

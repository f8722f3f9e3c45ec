"""Layout of a model for training: compilation, and its distribution over the ranks of a run.

DDP copies the model (arXiv:2006.15704); FSDP2 shards it (arXiv:2304.11277), over all ranks or within groups (HSDP).
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
from miaobi.config import TrainConfig
from miaobi.console import log, warn
from miaobi.errors import UserError
from miaobi.model.checkpoint import Unfilled
from miaobi.model.config import ModelConfig
from miaobi.model.loss import linear_cross_entropy
from miaobi.model.transformer import Transformer
from miaobi.train.world import World

EAGER = (None, ())
"""Nothing compiled; for `use_compiled`."""
WITHOUT = "continuing without it (--compile=False avoids this warning)"


class Objective(nn.Module):
    """Sum of nats over the scored targets, as one module: DDP prepares its reductions in `forward`.

    Attributes: whole, `after_embedding` compiled, if the run uses that mode.
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
        """The same from embedded tokens (B, T, C). If the embedding were compiled too, threads would add up its
        gradient in any order, and a repeated run would not end in the same bits.
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
    """Whether to shard a model. auto: if fp32 weights, gradients and two moments would fill half of a GPU."""
    if cfg.parallel != "auto" or world.size == 1 or device.type != "cuda" or cfg.trainable == "lora":
        return cfg.parallel == "fsdp"
    with torch.device("meta"):
        parameters = Transformer(shape).num_parameters()
    return 16 * parameters > torch.cuda.get_device_properties(device).total_memory / 2


def shard(model: Transformer, world: World, cfg: TrainConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Shard the weights of `model` in place (FSDP2): each block, then the rest.

    Matrix products and their communication are in `dtype`; weights, sums of gradients and moments in fp32. `model` is
    on the meta device and gets uninitialised memory for its shards: see `fill`.
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
    """Give a sharded model the weights `values`, or draw initial ones as one process would, parameter by parameter.

    Every rank draws whole parameters and keeps its part, so no rank ever holds more than one whole parameter.
    """
    for name, p in model.named_parameters():
        if values is None:
            value = torch.empty(p.shape)
            model.init_parameter(name, value)
        else:
            value = values[name]
        p.copy_(part_of(value.to(p.device), p))


def is_sharded(held: Tensor | nn.Module) -> bool:
    """Whether this rank holds only a part: a DTensor or FSDPModule, recognised by attributes (they are slow to
    import).
    """
    return hasattr(held, "full_tensor") or hasattr(held, "reshard")


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered (a collective); any other unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def shards_of(local: Tensor, like: Tensor) -> Tensor:
    """The sharded tensor with the layout of `like` whose part on this rank is `local`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has whole, sharded as `like`; all of it if that is not sharded."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def compile_as(
    objective: Objective, part: str, autotuned: bool, once: Callable[[], object], instead: str = WITHOUT
) -> bool:
    """Compile the `blocks` (one graph for all layers) or the `whole` objective after the embedding, with its loss, and
    try it by calling `once`. If that fails: a warning, False, and nothing changes.

    autotuned: Inductor times other matrix products than the library's (max_autotune). instead: what the warning says is
    done now. Shapes are static: a smaller last micro-batch runs uncompiled (see `no_recompilation`).
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
    """The compiled parts of the objective: the whole, and each block; None for what runs eagerly."""
    return objective.whole, tuple(block._compiled_call_impl for block in objective.model.blocks)


def use_compiled(objective: Objective, parts: tuple) -> None:
    """Use what `compiled_parts` returned, or EAGER."""
    objective.whole, blocks = parts
    for i, block in enumerate(objective.model.blocks):
        block._compiled_call_impl = blocks[i] if blocks else None


def is_compiled(objective: nn.Module) -> bool:
    """Whether the objective or its blocks are compiled."""
    whole, blocks = compiled_parts(getattr(objective, "module", objective))  # within DDP
    return any(part is not None for part in (whole, *blocks))


def no_recompilation(objective: nn.Module) -> AbstractContextManager:
    """Other shapes than the compiled ones run eagerly: compiling again would take longer than that."""
    return torch.compiler.set_stance("eager_on_recompile") if is_compiled(objective) else nullcontext()


def reducing(objective: nn.Module, model: Transformer, last: bool) -> AbstractContextManager:
    """Reduce gradients over the ranks only with the last micro-batch."""
    if is_sharded(model):
        model.set_requires_gradient_sync(last)
    elif hasattr(objective, "no_sync") and not last:  # DDP's
        return objective.no_sync()
    return nullcontext()

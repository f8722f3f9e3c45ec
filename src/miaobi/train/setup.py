"""Set-up of a run: data, model, optimizers and progress, as one plan."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.amp import GradScaler

from miaobi.config import OptimConfig, RunConfig
from miaobi.console import log
from miaobi.corpus.dataset import Batch
from miaobi.corpus.prepared import PreparedData
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError, number_of
from miaobi.model.checkpoint import load_model, model_directory
from miaobi.model.config import ModelConfig
from miaobi.model.lora import adapter_parameters, add_lora, load_adapter
from miaobi.model.rows import add_rows, added_tokens
from miaobi.model.transformer import Transformer, head_dim, intermediate_size
from miaobi.settings import Origin
from miaobi.train import bigrams
from miaobi.train.average import Average
from miaobi.train.data import Blocks, open_blocks, open_data
from miaobi.train.layout import make_model
from miaobi.train.mirror import Mirror
from miaobi.train.optimizer import make_optimizers
from miaobi.train.optimizer_state import load as load_optimizers
from miaobi.train.recipe import micro_batch, resolve_model, resolve_optim, total_steps
from miaobi.train.run_directory import Progress, create_run, is_read_only, load_progress, open_run, verified
from miaobi.train.same_run import with_longer_decay
from miaobi.train.schedule import first_estimate
from miaobi.train.world import World, check_same

SIZES = ("family", "n_layer", "n_head", "n_embd", "block_size")
SHAPE = tuple(key.name for key in dataclasses.fields(ModelConfig) if key.name != "dropout")  # the weights' shapes
TRAIN_SHARE = 4  # the training loss is measured on a quarter as many windows as the validation loss
MakeModel = Callable[[ModelConfig, dict[str, Tensor] | None], Transformer]
"""(shape, weights or None for initial ones) -> model on this rank's device."""


@dataclass(frozen=True)
class Plan:
    """All parts of a run; only `progress`, weights and optimizer state change during training."""

    cfg: RunConfig
    world: World
    device: torch.device
    dtype: torch.dtype
    data: PreparedData
    tokenizer: Tokenizer
    model: Transformer
    optim: OptimConfig
    """With all open settings resolved."""
    optimizers: list[torch.optim.Optimizer]
    scaler: GradScaler
    progress: Progress
    """The state of the run."""
    blocks: Blocks
    """Training data."""
    val_windows: Batch
    """Validation data, the same at every evaluation."""
    train_windows: Batch | None
    """A sample of the training text, to compare with the validation loss; None if it would cost too much."""
    total_steps: int
    micro: int
    """Sequences of a micro-batch, on each rank."""
    mirror: Mirror | None
    average: Average | None
    """Average of the weights, if they are averaged."""
    parameters: int
    """Parameters of the checkpoints, where adapters are merged."""
    trained_parameters: int

    @property
    def out(self) -> Path:
        """The run directory."""
        return Path(self.cfg.train.out_dir)

    @property
    def end(self) -> str:
        """Why the run ends if nothing stops it earlier."""
        return "max_minutes" if self.progress.laid else "max_iters"

    def flops_per_token(self) -> float:
        """Forward and backward: 6N + 12 L H D T (PaLM, arXiv:2204.02311, appendix B); 4N where N is frozen."""
        cfg, attn = self.model.cfg, self.model.blocks[0].attn
        dense = 6 * self.trained_parameters + (4 * self.parameters if self.progress.base_weights else 0)
        return dense + 12 * cfg.n_layer * attn.n_head * attn.head_dim * cfg.block_size

    def headline(self) -> str:
        """Description of the run that is logged before it starts."""
        cfg = self.model.cfg
        part = f", {self.trained_parameters:,} trained (LoRA)" if self.progress.base_weights else ""
        return (
            f"number of parameters: {self.parameters / 1e6:.2f}M{part}  ({cfg.family}, "
            f"{number_of(cfg.n_layer, 'layer')}, "
            f"{number_of(cfg.n_head, 'head')}, {cfg.n_embd} wide, block {cfg.block_size}, vocabulary "
            f"{cfg.vocab_size})\n"
            f"{self.optim.optimizer}, {self.cfg.train.global_batch} x {cfg.block_size} tokens a step, "
            f"{number_of(self.total_steps, 'step')}, {number_of(len(self.data.train), 'training token')}; "
            f"{self.device}, {str(self.dtype).removeprefix('torch.')}"
        )

    def result(self, stopped: str) -> dict:
        """The JSON object of `miaobi train`."""
        p = self.progress
        return {
            "run": str(self.out),
            "step": p.step,
            "train_loss": p.train_loss,
            "val_loss": p.val_loss,
            "val_bits_per_char": p.val_bits_per_char,
            "best_step": p.best_step,
            "best_val_loss": p.best_val_loss,
            "tokens_per_second": p.tokens / p.seconds if p.seconds else None,
            "parameters": self.parameters,
            "trained_parameters": self.trained_parameters,
            "stopped": stopped,
        }


def set_up(cfg: RunConfig, origin: Origin, world: World, device: torch.device, dtype: torch.dtype) -> Plan:
    """Open the run directory and build what `cfg` describes, in the state of the latest checkpoint.

    Raises UserError for a run, data or model that do not match the configuration or each other.
    """
    mirror = Mirror(cfg.train.mirror) if cfg.train.mirror else None
    checkpoint, data = open_inputs(cfg, origin, world, mirror)
    tokenizer, given = data.tokenizer, cfg
    with verified(checkpoint, world.is_first):
        progress = start_or_continue(cfg, data, checkpoint)
        make = partial(make_model, cfg.train, world, device, dtype)
        model = build_model(cfg, origin, Start(data, tokenizer, checkpoint, progress), make).to(device)
        model.recompute = cfg.train.activation_checkpointing
        shape = model.cfg
        blocks, val_blocks = open_blocks(cfg.data, data, shape.block_size)
        steps, micro = total_steps(cfg, len(blocks)), micro_batch(cfg, device, world.size)
        if cfg.train.max_minutes is not None and not cfg.train.eval_only:
            steps = first_estimate(cfg, progress, world, model, blocks.fixed(micro), dtype, steps)
            total = int(progress.laid[-1][1])
        else:
            total = steps
        if progress.step > total and not cfg.train.eval_only:
            raise UserError(f"{checkpoint} is at step {progress.step}, beyond the {number_of(total, 'step')} of "
                            "this run: nothing is left to train; give a larger --max_iters")  # fmt: skip
        tuning = cfg.train.trainable if progress.base else None
        short = progress.bigrams and bigrams.is_short(cfg, shape, data)  # it may have been extended meanwhile
        asked = with_longer_decay(cfg, progress).optim
        if progress.laid:  # the decay ends with the time
            asked = dataclasses.replace(asked, lr_decay_iters=None)
        optim = resolve_optim(asked, shape.family, steps, tuning, short, shape.n_embd)
        optimizers = make_optimizers(model, optim, optim.optimizer)
        scaler = GradScaler(device.type, enabled=dtype == torch.float16)
        if checkpoint is not None and not cfg.train.eval_only:
            load_optimizers(checkpoint / "train_state", model, optimizers, scaler)
        average = Average.of(cfg.train, checkpoint, model, progress, steps * cfg.train.global_batch / len(blocks))
    if world.is_first and not is_read_only(given):  # only now: a damaged checkpoint must not change anything
        create_run(given, origin)
    val_windows, train_windows = evaluation_windows(cfg, progress, steps, blocks, val_blocks)
    adapted = adapter_parameters(model)
    parameters = model.num_parameters() - adapted
    return Plan(
        cfg, world, device, dtype, data, tokenizer, model, optim, optimizers, scaler, progress, blocks, val_windows,
        train_windows, total, micro, mirror, average, parameters, adapted or parameters,
    )  # fmt: skip


def open_inputs(
    cfg: RunConfig, origin: Origin, world: World, mirror: Mirror | None
) -> tuple[Path | None, PreparedData]:
    """The checkpoint to continue from, and the data; rank 0 finds and prepares them before the others open them."""
    out, checkpoint = Path(cfg.train.out_dir), None
    with world.first():
        if world.is_first:
            checkpoint = open_run(cfg, origin, mirror, world.restarted)
        data = open_data(cfg, out, world.is_first)
    check_same(world, cfg, data.fingerprint)
    state = world.gather(str(checkpoint) if checkpoint else None)[0]
    return Path(state) if state else None, data


def evaluation_windows(
    cfg: RunConfig, progress: Progress, steps: int, blocks: Blocks, val_blocks: Blocks
) -> tuple[Batch, Batch | None]:
    """Validation and training windows of every evaluation: always the same, and no more than are trained on before
    it.
    """
    requested = cfg.train.eval_iters * cfg.train.batch_size
    trained = min(cfg.train.eval_interval, progress.planned or steps) * cfg.train.global_batch
    if not progress.windows:  # older checkpoints do not have it
        progress.windows = min(requested, trained)
    val = val_blocks.fixed(requested if cfg.train.eval_only else progress.windows)
    share = min(len(val.inputs) // TRAIN_SHARE, trained - len(val.inputs))
    return val, blocks.fixed(share) if share > 0 and not cfg.train.eval_only else None


def start_or_continue(cfg: RunConfig, data: PreparedData, checkpoint: Path | None) -> Progress:
    """Progress of the run: new, or that of the checkpoint.

    From another run's checkpoint (resume_from) only the steps are taken: its best model is not in this run, and its
    loss may be of other windows.

    Raises UserError if the checkpoint was trained on other data.
    """
    if checkpoint is None:
        base = cfg.train.base_model
        name = base_name(base) if base else ""
        return Progress(data=data.fingerprint, base=name, first_iters=cfg.train.max_iters)
    progress = load_progress(checkpoint)
    if progress.data != data.fingerprint:
        raise UserError(f"the data in {data.path} is not what {checkpoint} was trained on; "
                        "restore it, or start another --out_dir")  # fmt: skip
    if not is_own(checkpoint, cfg):
        fresh = Progress()
        for key in ("best_step", "best_val_loss", "history", "stopped", "evaluated", "planned", "windows", "run"):
            setattr(progress, key, getattr(fresh, key))
    return progress


def is_own(checkpoint: Path, cfg: RunConfig) -> bool:
    """Whether the checkpoint is in the run's own directory, which `refuse_changes` has checked already."""
    return checkpoint.parent.resolve() == (Path(cfg.train.out_dir) / "checkpoints").resolve()


@dataclass(frozen=True)
class Start:
    """What a model is built from."""

    data: PreparedData
    tokenizer: Tokenizer
    checkpoint: Path | None
    progress: Progress


def build_model(cfg: RunConfig, origin: Origin, start: Start, make: MakeModel) -> Transformer:
    """The model at the start: new, from a checkpoint, or with the weights of another MODEL, with adapters for LoRA.

    A checkpoint determines the shape; raises UserError if the configuration explicitly asks for another. Only
    block_size may be smaller than another MODEL's: contexts of hub models are longer than most texts and memories.
    """
    data, checkpoint, progress = start.data, start.checkpoint, start.progress
    lora = cfg.train.trainable == "lora"
    if checkpoint is not None and lora != bool(progress.base_weights):
        was, now = ("full", "lora") if lora else ("lora", "full")
        raise UserError(f"{checkpoint} was trained with trainable={was}, now trainable={now}; "
                        f"tune its model in a new --out_dir with --init_from={checkpoint}")  # fmt: skip
    source = find_base(cfg, progress, checkpoint) if lora else checkpoint or cfg.train.base_model
    if source is None:
        shape = resolve_model(cfg.model, data.vocab_size)
        weights = bigrams.initial_weights(cfg, shape, data)
        progress.bigrams = weights is not None
        return make(shape, weights)
    model, theirs = load_model(source, is_verified=source == checkpoint)
    if model.quantized:
        log(f"{source}: its weights are {model.quantized}; they are trained in full precision")
    added = added_tokens(start.tokenizer, theirs) if checkpoint is None else 0
    if added and lora:
        raise UserError(f"{added} control tokens of the chat template are new to {source}, and LoRA leaves the rows of "
                        "tokens as they are: tune it with --trainable=full first")  # fmt: skip
    if added:
        add_rows(model, added, first=theirs.vocab_size)
    elif theirs.backend.to_str() != start.tokenizer.backend.to_str():
        raise UserError(
            f"{data.path} was prepared with another tokenizer than {source} has; prepare it with --tokenizer={source}"
        )
    own = checkpoint is not None and is_own(checkpoint, cfg)  # an older version may have compared only the sizes
    refuse_shape(cfg.model, origin, model.cfg, source, SIZES if own else SHAPE, may_shorten=source != checkpoint)
    longest = model.cfg.block_size if origin.get("block_size", "default") == "default" else cfg.model.block_size
    changed = dataclasses.replace(model.cfg, dropout=cfg.model.dropout, block_size=min(longest, model.cfg.block_size))
    weights = model.state_dict()
    if model.wpe is not None:
        weights["wpe.weight"] = weights["wpe.weight"][: changed.block_size]
    again = make(changed, weights)
    again.end_ids, again.generation = model.end_ids, model.generation
    if lora:
        add_adapters(again, cfg, checkpoint, progress)
    return again


def refuse_shape(
    cfg: ModelConfig, origin: Origin, has: ModelConfig, source: Path | str, keys: tuple[str, ...], may_shorten: bool
) -> None:
    """Raise UserError naming the first of `keys` that was set explicitly and differs from that of `source`.

    may_shorten: block_size may be smaller.
    """
    actual = dataclasses.asdict(has) | {
        "n_kv_head": has.n_kv_head or has.n_head, "head_dim": head_dim(has), "intermediate_size": intermediate_size(has)
    }  # fmt: skip
    for key in keys:
        now = getattr(cfg, key)
        shorter = key == "block_size" and may_shorten and now < has.block_size
        was_set = now is not None and not origin.get(key, "default").startswith(("default", "auto"))
        if was_set and now != actual[key] and not shorter:
            raise UserError(f"{source} has {key}={actual[key]}, but {key}={now} was given; leave {key} out")


def base_name(model: str) -> str:
    """The name under which PEFT, and the resumed run, find a MODEL: its absolute directory, or its hub name."""
    return str(model_directory(model).resolve()) if Path(model).exists() else model


def find_base(cfg: RunConfig, progress: Progress, checkpoint: Path | None) -> str:
    """The base model of LoRA: where it was when the run began, else where init_from says that it is now.

    Raises UserError if it does not exist any more.
    """
    base = cfg.train.base_model
    if base is None or Path(progress.base).exists():
        base = progress.base
    try:
        model_directory(base)
    except UserError as e:
        if checkpoint is None:
            raise
        raise UserError(f"{checkpoint} needs its base model ({e}); restore it, "
                        "or say where it is now with --init_from=MODEL") from e  # fmt: skip
    return base


def add_adapters(model: Transformer, cfg: RunConfig, checkpoint: Path | None, progress: Progress) -> None:
    """Add adapters to the base model, new ones or the checkpoint's; a new run records the hash of its base.

    Raises UserError for another base than the checkpoint's.
    """
    hash_of_base = fingerprint(model)
    torch.manual_seed(cfg.train.seed)
    add_lora(model, cfg.lora)
    if checkpoint is None:
        progress.base_weights = hash_of_base
        return
    if hash_of_base != progress.base_weights:
        raise UserError(f"the weights of {progress.base} are not those that {checkpoint} tunes: "
                        "they have changed; restore them, or start another --out_dir")  # fmt: skip
    load_adapter(checkpoint / "adapter", model)


def fingerprint(model: Transformer) -> str:
    """SHA-256 of every parameter, in the model's own order."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy())
    return digest.hexdigest()

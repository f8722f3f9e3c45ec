"""Everything a run needs before its first step: data, model, optimizers, and where it stands."""

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
from miaobi.train.run_directory import Progress, load_progress, only_reads, open_run, start_run, verified
from miaobi.train.same_run import grown
from miaobi.train.schedule import lay_first
from miaobi.train.world import World, check_same

SIZES = ("family", "n_layer", "n_head", "n_embd", "block_size")
SHAPE = tuple(key.name for key in dataclasses.fields(ModelConfig) if key.name != "dropout")  # what weights are bound to
TRAIN_SHARE = 4  # the training loss is measured on a quarter as many windows as the validation loss
MakeModel = Callable[[ModelConfig, dict[str, Tensor] | None], Transformer]
"""A model of that shape with those weights, or with initial ones, on this rank's device."""


@dataclass(frozen=True)
class Plan:
    """What a run is made of; only `progress`, weights and optimizer state change while it trains."""

    cfg: RunConfig
    world: World
    device: torch.device
    dtype: torch.dtype
    data: PreparedData
    tokenizer: Tokenizer
    model: Transformer
    optim: OptimConfig
    """Every number decided."""
    optimizers: list[torch.optim.Optimizer]
    scaler: GradScaler
    progress: Progress
    """Where the run stands."""
    blocks: Blocks
    """What it learns from."""
    val_windows: Batch
    """The same windows at every evaluation."""
    train_windows: Batch | None
    """Of the training text, to be compared with the validation loss; None where they would cost too much."""
    total_steps: int
    micro: int
    """Sequences of a rank that go through the model at once."""
    mirror: Mirror | None
    average: Average | None
    """Of the weights, where they are averaged."""
    parameters: int
    """Those of the checkpoints, where adapters are merged."""
    trained_parameters: int

    @property
    def out(self) -> Path:
        """The run directory."""
        return Path(self.cfg.train.out_dir)

    @property
    def end(self) -> str:
        """What ends it, if nothing else does."""
        return "max_minutes" if self.progress.laid else "max_iters"

    def flops_per_token(self) -> float:
        """Forward and backward: 6N + 12 L H D T (PaLM, arXiv:2204.02311, appendix B); 4N where N is frozen."""
        cfg, attn = self.model.cfg, self.model.blocks[0].attn
        dense = 6 * self.trained_parameters + (4 * self.parameters if self.progress.base_weights else 0)
        return dense + 12 * cfg.n_layer * attn.n_head * attn.head_dim * cfg.block_size

    def headline(self) -> str:
        """What is about to be trained."""
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
    """Enter the run directory and make what `cfg` describes, as far as the run has come.

    Raises UserError for a run, data or model that do not fit the configuration or each other.
    """
    mirror = Mirror(cfg.train.mirror) if cfg.train.mirror else None
    checkpoint, data = enter(cfg, origin, world, mirror)
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
            steps = lay_first(cfg, progress, world, model, blocks.fixed(micro), dtype, steps)
            total = int(progress.laid[-1][1])
        else:
            total = steps
        if progress.step > total and not cfg.train.eval_only:
            raise UserError(f"{checkpoint} is at step {progress.step}, beyond the {number_of(total, 'step')} of "
                            f"this run: "
                            "nothing is left to train; give a larger --max_iters")  # fmt: skip
        tuning = cfg.train.trainable if progress.base else None
        short = progress.bigrams and bigrams.is_short(cfg, shape, data)  # it may have been extended
        asked = grown(cfg, progress).optim
        if progress.laid:  # the decay ends with the time
            asked = dataclasses.replace(asked, lr_decay_iters=None)
        optim = resolve_optim(asked, shape.family, steps, tuning, short, shape.n_embd)
        optimizers = make_optimizers(model, optim, optim.optimizer)
        scaler = GradScaler(device.type, enabled=dtype == torch.float16)
        if checkpoint is not None and not cfg.train.eval_only:
            load_optimizers(checkpoint / "train_state", model, optimizers, scaler)
        average = Average.of(cfg.train, checkpoint, model, progress, steps * cfg.train.global_batch / len(blocks))
    if world.is_first and not only_reads(given):  # not before: a damaged checkpoint leaves everything as it is
        start_run(given, origin)
    val_windows, train_windows = evaluation_windows(cfg, progress, steps, blocks, val_blocks)
    adapted = adapter_parameters(model)
    parameters = model.num_parameters() - adapted
    return Plan(
        cfg, world, device, dtype, data, tokenizer, model, optim, optimizers, scaler, progress, blocks, val_windows,
        train_windows, total, micro, mirror, average, parameters, adapted or parameters,
    )  # fmt: skip


def enter(cfg: RunConfig, origin: Origin, world: World, mirror: Mirror | None) -> tuple[Path | None, PreparedData]:
    """The checkpoint to continue from, and the data; rank 0 finds the one and prepares the other before the rest."""
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
    """Windows of validation and of training text that every evaluation scores: the same ones each time, and never more
    tokens than were trained until the first of them.
    """
    requested = cfg.train.eval_iters * cfg.train.batch_size
    trained = min(cfg.train.eval_interval, progress.planned or steps) * cfg.train.global_batch
    if not progress.windows:  # checkpoints that do not know it were to take `planned` steps
        progress.windows = min(requested, trained)
    val = val_blocks.fixed(requested if cfg.train.eval_only else progress.windows)
    share = min(len(val.inputs) // TRAIN_SHARE, trained - len(val.inputs))
    return val, blocks.fixed(share) if share > 0 and not cfg.train.eval_only else None


def start_or_continue(cfg: RunConfig, data: PreparedData, checkpoint: Path | None) -> Progress:
    """Where the run stands: at its beginning, or where the checkpoint is.

    Of another run's checkpoint (resume_from) the steps count, not what was best there: that model is not in this run,
    and may have been measured on other windows. It is evaluated again where an evaluation is due.

    Raises UserError for other data than the checkpoint's.
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
    """Whether the checkpoint is in the directory of the run, which `refuse_changes` has compared already."""
    return checkpoint.parent.resolve() == (Path(cfg.train.out_dir) / "checkpoints").resolve()


@dataclass(frozen=True)
class Start:
    """What a model is started from."""

    data: PreparedData
    tokenizer: Tokenizer
    checkpoint: Path | None
    progress: Progress


def build_model(cfg: RunConfig, origin: Origin, start: Start, make: MakeModel) -> Transformer:
    """The model to start with: new, from a checkpoint, or from another MODEL's weights, with adapters for LoRA.

    A checkpoint brings its own shape; raises UserError where the configuration explicitly asks for another. Only
    block_size may be less than another MODEL's: the hub's contexts are longer than most texts and memories.
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
        log(f"{source}: its weights are {model.quantized}; they are trained on in full precision")
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
    own = checkpoint is not None and is_own(checkpoint, cfg)  # from when only the sizes were compared, maybe
    refuse_shape(cfg.model, origin, model.cfg, source, SIZES if own else SHAPE, may_shorten=source != checkpoint)
    longest = model.cfg.block_size if origin.get("block_size", "default") == "default" else cfg.model.block_size
    changed = dataclasses.replace(model.cfg, dropout=cfg.model.dropout, block_size=min(longest, model.cfg.block_size))
    weights = model.state_dict()
    if model.wpe is not None:
        weights["wpe.weight"] = weights["wpe.weight"][: changed.block_size]
    again = make(changed, weights)
    again.end_ids, again.generation = model.end_ids, model.generation
    if lora:
        adapt(again, cfg, checkpoint, progress)
    return again


def refuse_shape(
    cfg: ModelConfig, origin: Origin, has: ModelConfig, source: Path | str, keys: tuple[str, ...], may_shorten: bool
) -> None:
    """Raise UserError naming the first of `keys` that was given explicitly and is not what `source` has.

    may_shorten: block_size may be less.
    """
    actual = dataclasses.asdict(has) | {
        "n_kv_head": has.n_kv_head or has.n_head, "head_dim": head_dim(has), "intermediate_size": intermediate_size(has)
    }  # fmt: skip
    for key in keys:
        now = getattr(cfg, key)
        shorter = key == "block_size" and may_shorten and now < has.block_size
        was_set = now is not None and not origin.get(key, "default").startswith(("default", "auto"))
        if was_set and now != actual[key] and not shorter:
            raise UserError(f"{source} has {key}={actual[key]}, asked for was {key}={now}; leave {key} out")


def base_name(model: str) -> str:
    """What PEFT, and this run when it goes on, find a MODEL by: its directory from the root, or its hub name."""
    return str(model_directory(model).resolve()) if Path(model).exists() else model


def find_base(cfg: RunConfig, progress: Progress, checkpoint: Path | None) -> str:
    """The model that LoRA leaves as it is: where it was when the run began, else where init_from says it is now.

    Raises UserError if it is gone.
    """
    base = cfg.train.base_model
    if base is None or Path(progress.base).exists():
        base = progress.base
    try:
        model_directory(base)
    except UserError as e:
        if checkpoint is None:
            raise
        raise UserError(f"{checkpoint} needs the model that it tunes ({e}); put it back, "
                        "or say where it is now with --init_from=MODEL") from e  # fmt: skip
    return base


def adapt(model: Transformer, cfg: RunConfig, checkpoint: Path | None, progress: Progress) -> None:
    """Give the base model its adapters, new or the checkpoint's; a new run notes down what its base is.

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
                        "they were changed since; put them back, or start another --out_dir")  # fmt: skip
    load_adapter(checkpoint / "adapter", model)


def fingerprint(model: Transformer) -> str:
    """SHA-256 of every parameter, in the model's own order."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy())
    return digest.hexdigest()

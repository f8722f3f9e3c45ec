"""A training run: the same command again continues it, and ends where an undisturbed run would have."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from rich.progress import Progress as Bar
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from miaobi.config import RunConfig
from miaobi.console import console, log, progress, warn
from miaobi.corpus.dataset import IGNORE, derive
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.device import explain_memory, keep_allocations, peak_flops, pick_dtype
from miaobi.errors import UserError
from miaobi.model.lora import adapter_parameters
from miaobi.model.transformer import Transformer
from miaobi.settings import Origin
from miaobi.train import bigrams
from miaobi.train.computing import COMPILE_PAYS_AFTER, Computing
from miaobi.train.evaluate import eager, place, text_size, told, validation_nats
from miaobi.train.layout import Objective, is_sharded, no_recompilation, placed, whole
from miaobi.train.measured import Work
from miaobi.train.mirror import Mirror
from miaobi.train.optimizer import make_optimizers, rate, set_rate
from miaobi.train.recipe import length, micro_batch, resolve_optim
from miaobi.train.saving import Saver, kept, load_optimizers
from miaobi.train.source import build_model, open_blocks, open_data, opening, start_or_continue
from miaobi.train.state import open_run, start_run
from miaobi.train.watch import Metrics, on_signals, overfitting, since_best
from miaobi.train.world import World, check_batch, check_same, explain_lost, join, rank_device

Preview = Callable[[Transformer, Tokenizer, str, int, tuple[int, ...], bool], str]
"""(model, tokenizer, prompt, tokens, end_ids, is_dialogue) -> prompt and what follows; printed at every evaluation."""


def train(cfg: RunConfig, origin: Origin | None = None, preview: Preview | None = None) -> dict:
    """Train, or continue, the run that `cfg` describes.

    Returns run, step, train_loss, val_loss, val_bits_per_char, best_step, tokens_per_second, parameters,
    trained_parameters, stopped.
    Raises UserError for settings and data that do not fit, a loss that is not finite, too little memory.
    """
    keep_allocations()
    world = join(cfg.train)
    try:
        check_batch(world, cfg.train)
        device = rank_device(cfg.train.device, world)
        dtype = pick_dtype(cfg.train.dtype, device)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as nanoGPT allows
        micro = micro_batch(cfg, device, world.size)
        advice = (
            f"micro-batches of {micro} x {cfg.model.block_size} tokens were too large. "
            f"Try --micro_batch_size={max(1, micro // 2)} (same step, less memory), "
            "then --activation_checkpointing=True, then a smaller --block_size or model"
        )
        with explain_memory(device, advice), explain_lost(world):
            return Run(cfg, origin or {}, world, device, dtype).go(preview)
    finally:
        world.leave()


class Run:
    """Everything that lives while a run trains."""

    def __init__(self, cfg: RunConfig, origin: Origin, world: World, device: torch.device, dtype: torch.dtype) -> None:
        self.cfg, self.world, self.device, self.dtype = cfg, world, device, dtype
        self.micro = micro_batch(cfg, device, world.size)
        self.out = Path(cfg.train.out_dir)
        mirror = Mirror(cfg.train.mirror) if cfg.train.mirror else None
        checkpoint = None
        with world.first():  # the others find the run begun and its data prepared
            if world.is_first:
                checkpoint = open_run(cfg, origin, mirror, world.restarted)
                start_run(cfg, origin)
            self.data = open_data(cfg, self.out)
        check_same(world, cfg, self.data.fingerprint)
        checkpoint = world.gather(checkpoint)[0]
        self.tokenizer = self.data.tokenizer
        self.progress = start_or_continue(cfg, self.data, checkpoint)
        on_ranks = partial(placed, cfg.train, world, device, dtype)
        self.model = build_model(cfg, origin, self.data, self.tokenizer, checkpoint, self.progress, on_ranks).to(device)
        self.objective: nn.Module = Objective(self.model)
        self.model.recompute = cfg.train.activation_checkpointing
        model_cfg = self.model.cfg
        self.blocks, val_blocks = open_blocks(cfg.data, self.data, model_cfg.block_size)
        self.total_steps = length(cfg, len(self.blocks))
        done = self.progress.step
        if done > self.total_steps and not cfg.train.eval_only:
            raise UserError(f"{checkpoint} is at step {done}, beyond the {self.total_steps} steps of this run: "
                            "nothing is left to train; give a larger --max_iters")  # fmt: skip
        tuning = cfg.train.trainable if self.progress.base else None
        gently = self.progress.bigrams and bigrams.is_short(cfg, model_cfg, self.data)  # it may have been extended
        self.optim = resolve_optim(cfg.optim, model_cfg.family, self.total_steps, tuning, gently, model_cfg.n_embd)
        self.optimizers = make_optimizers(self.model, self.optim, self.optim.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        if checkpoint is not None:
            load_optimizers(checkpoint, self.model, self.optimizers, self.scaler, world)
        # The same windows at every evaluation, and never more tokens than were trained until the first of them.
        wished = cfg.train.eval_iters * cfg.train.batch_size
        if not self.progress.windows:  # checkpoints that do not know it were to take `planned` steps
            first = min(cfg.train.eval_interval, self.progress.planned or self.total_steps) * cfg.train.global_batch
            self.progress.windows = min(wished, first)
        self.eval_windows = val_blocks.fixed(wished if cfg.train.eval_only else self.progress.windows)
        self.eval_share = world.share(self.eval_windows)
        self.saver = Saver(self.out, world, self.tokenizer, self.data.end_ids, cfg.train.save_interval, mirror,
                           (self.progress.best_step, self.progress.best_val_loss))  # fmt: skip
        self.interrupted: str | None = None
        self.flex, self.computing = False, None
        adapted = adapter_parameters(self.model)
        self.parameters = self.model.num_parameters() - adapted  # those of the checkpoints, where adapters are merged
        self.trained_parameters = adapted or self.parameters

    def go(self, preview: Preview | None) -> dict:
        """Train to the end, to early stopping, or to an interruption."""
        p, cfg = self.progress, self.cfg.train
        first = p.step
        log(self.headline())
        if cfg.eval_only:
            p.val_loss = self.validation_loss()
            p.val_bits_per_char = self.bits_per_char(p.val_loss)
            return self.result("eval_only")
        if p.stopped == "patience" and self.total_steps > p.planned:  # extended: patience begins anew
            p.stopped, p.history = None, [min(p.history, key=lambda row: row[2])]
        p.planned = self.total_steps
        if (p.step >= self.total_steps and p.evaluated == p.step) or p.stopped:
            log(f"this run is finished ({p.stopped or 'max_iters'}, step {p.step}); a larger --max_iters extends it")
            return self.result(p.stopped or "max_iters")
        if first:
            log(f"continuing from step {first}")
        self.choose_computing()
        self.peak = peak_flops(self.device, self.dtype)
        if self.world.size > 1 and not is_sharded(self.model):
            self.objective = DistributedDataParallel(self.objective, gradient_as_bucket_view=True)
        wandb = {"project": cfg.wandb_project, "name": cfg.wandb_run_name} if cfg.wandb_log else None
        metrics = Metrics(self.out, first, wandb, p.evaluated == first) if self.world.is_first else None
        with on_signals(self.interrupt), progress("{task.fields[figures]}") as bar:
            task = bar.add_task("train", total=self.total_steps, completed=first, figures="",
                                visible=console.is_terminal)  # fmt: skip
            try:
                self.steps(metrics, bar, task, preview)
            finally:
                if self.world.size == 1 or sys.exc_info()[0] is None:  # ranks that are lost cannot finish it
                    self.saver.finish(p)
                self.computing.close()
                if metrics is not None:
                    metrics.close()
        if self.saver.lost:
            raise UserError(f"the last checkpoint, of step {p.step}, could not be written; {kept(self.saver.root)}. "
                            "Free some space: the same command again goes on from there")  # fmt: skip
        return self.result(p.stopped or "max_iters")

    def steps(self, metrics: Metrics | None, bar: Bar, task, preview: Preview | None) -> None:
        """The loop itself."""
        p, cfg = self.progress, self.cfg.train
        waiting, tokens, seconds, figures = [], 0, 0.0, ""  # since the last line of metrics
        self.model.train()
        if p.step and self.is_due(p.step) and p.evaluated != p.step:  # interrupted just before it
            self.evaluate(metrics, preview)
            self.save()
        while p.step < self.total_steps and p.stopped is None:
            self.computing.before(p.step)
            started = time.perf_counter()
            loss, norm, scored = self.step(p.step)
            waiting.append(loss)
            p.step, p.tokens, tokens = p.step + 1, p.tokens + scored, tokens + scored
            due, interrupted = self.is_due(p.step), self.world.agree(self.interrupted)  # a signal may come at any time
            save = due or interrupted or bool(cfg.save_interval and p.step % cfg.save_interval == 0)
            losses = None
            if save or p.step % cfg.log_interval == 0:
                losses = self.world.sum(torch.stack(waiting).cpu().double())  # the only wait for the device
            seconds += time.perf_counter() - started
            if losses is not None:
                figures = self.record(metrics, losses, norm.item(), tokens, seconds)
                waiting, tokens, seconds = [], 0, 0.0
            bits = f"  val {p.val_bits_per_char:.3f} bits/char" if p.val_bits_per_char else ""
            bar.update(task, completed=p.step, figures=figures + bits)
            if due and not interrupted:
                self.evaluate(metrics, preview)
            if save:
                self.save()
            if interrupted:
                self.saver.finish(p)
                p.stopped = interrupted
                if not self.saver.lost:
                    log(f"{interrupted}: saved step {p.step} in {self.out}; the same command again goes on from there")

    def record(self, metrics: Metrics | None, losses: torch.Tensor, norm: float, tokens: int, seconds: float) -> str:
        """Write down the last steps, whose losses are (steps,) float64; returns the figures to show.

        Raises UserError for a loss that is not finite.
        """
        p = self.progress
        if not bool(torch.isfinite(losses).all()):
            self.fail_not_finite(p.step - len(losses) + int((~torch.isfinite(losses)).nonzero()[0]) + 1)
        p.loss_sum, p.loss_steps = p.loss_sum + losses.sum().item(), p.loss_steps + len(losses)
        p.seconds += seconds
        speed = tokens / seconds
        if metrics is not None:
            metrics.log(
                p.step,
                train_loss=losses.mean().item(),
                learning_rate=rate(p.step - 1, self.optim) * self.optim.learning_rate,
                grad_norm=norm,
                tokens_per_second=speed,
                mfu=speed * self.flops_per_token() / (self.peak * self.world.size),
                epoch=p.step * self.cfg.train.global_batch / len(self.blocks),
            )
        figures = f"loss {losses.mean():.3f}  {speed:,.0f} tok/s"
        if not console.is_terminal:
            log(f"step {p.step}/{self.total_steps}  {figures}")
        return figures

    def step(self, step: int) -> tuple[Tensor, Tensor, int]:
        """One optimizer step: (this rank's share of the mean loss in nats, gradient norm, tokens scored by all)."""
        cfg, world = self.cfg.train, self.world
        batch = self.blocks.batch(cfg.global_batch, cfg.seed, step, world.rows(cfg.global_batch))
        scored = int(world.sum(torch.tensor((batch.targets != IGNORE).sum())))
        total = torch.zeros((), device=self.device)
        starts = range(0, len(batch.inputs), self.micro)
        for micro, i in enumerate(starts):
            x, y, positions, mask = place(batch, slice(i, i + self.micro), self.device, self.flex)
            if self.model.cfg.dropout or self.cfg.lora.lora_dropout:
                torch.manual_seed(derive(cfg.seed, "dropout", step, micro, world.rank))
            with self.reducing(micro == len(starts) - 1):
                autocast = torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)
                with autocast, no_recompilation(self.objective):
                    loss = self.objective(x, y, positions, mask) / scored
                self.scaler.scale(loss * world.size).backward()  # DDP and FSDP average over the ranks
            total += loss.detach()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        limit = self.optim.grad_clip or math.inf
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        set_rate(self.optimizers, rate(step, self.optim))
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return total, norm, scored

    def reducing(self, last: bool) -> AbstractContextManager:
        """Gradients are reduced over the ranks with the last micro-batch only."""
        if is_sharded(self.model):
            self.model.set_requires_gradient_sync(last)
        elif self.world.size > 1 and not last:
            return self.objective.no_sync()
        return nullcontext()

    def validation_loss(self) -> float:
        """Nats per scored token over the evaluation windows, which the ranks share."""
        nats = validation_nats(self.model, self.eval_share, self.micro, self.dtype)
        if is_sharded(self.model):
            self.model.reshard()  # the forward pass leaves the outermost weights gathered
        total = self.world.sum(torch.tensor(nats, dtype=torch.float64))
        return float(total) / max(1, int((self.eval_windows.targets != IGNORE).sum()))

    def is_due(self, step: int) -> bool:
        """Whether the run is evaluated after `step` steps."""
        return step % self.cfg.train.eval_interval == 0 or step == self.total_steps

    def evaluate(self, metrics: Metrics | None, preview: Preview | None) -> None:
        """Validation loss on fixed windows, best so far, warnings, early stopping, a sample."""
        p, cfg, data = self.progress, self.cfg.train, self.data
        self.saver.finish(p)
        p.val_loss = self.validation_loss()
        if not math.isfinite(p.val_loss):
            self.fail_not_finite(p.step)
        p.val_bits_per_char = self.bits_per_char(p.val_loss)
        p.evaluated = p.step
        if p.loss_steps:  # else another run's checkpoint, which was evaluated there
            p.train_loss = p.loss_sum / p.loss_steps
        p.loss_sum, p.loss_steps = 0.0, 0
        p.history.append([p.step, p.train_loss, p.val_loss])
        if p.best_val_loss is None or p.val_loss < p.best_val_loss:
            p.best_step, p.best_val_loss = p.step, p.val_loss
        if metrics is not None:
            metrics.log(p.step, val_loss=p.val_loss, val_bits_per_char=p.val_bits_per_char)
        log(f"step {p.step}: train loss {p.train_loss:.4f}, val loss {p.val_loss:.4f}, "
            f"{p.val_bits_per_char:.3f} bits/char{', best so far' if p.best_step == p.step else ''}")  # fmt: skip
        if (warning := overfitting(p.history)) is not None:
            warn(warning)
        if cfg.patience and since_best(p.history) >= cfg.patience and p.step < self.total_steps:
            p.stopped = "patience"
            log(f"stopped: no better validation loss for {cfg.patience} evaluations. "
                f"The best model is step {p.best_step} (val {p.best_val_loss:.4f})")  # fmt: skip
        if preview is not None and cfg.sample_tokens and self.world.is_first and not is_sharded(self.model):
            prompt = cfg.sample_start or opening(data, self.tokenizer)
            self.model.eval()
            with eager(self.model):
                text = preview(self.model, self.tokenizer, prompt, cfg.sample_tokens, data.end_ids, data.is_dialogue)
            log("  " + text.replace("\n", "\n  "))
            self.model.train()

    def bits_per_char(self, nats_per_token: float) -> float:
        """All nats of the validation text, separators included, over its characters.

        Of dialogues: what is learned of those in the windows, as `miaobi eval` counts it.
        """
        tokens, characters = len(self.data.val), self.data.val.characters
        if self.data.is_dialogue:
            ids, scored = told(self.eval_windows)
            tokens, (characters, _) = int(scored.sum()), text_size(ids, scored, self.tokenizer)
        return nats_per_token * tokens / max(1, characters) / math.log(2)

    def save(self) -> None:
        """Begin a checkpoint; it is written while training goes on."""
        self.saver.save(self.model, self.optimizers, self.scaler, self.progress)

    def interrupt(self, reason: str) -> None:
        """Ask the loop to save after the step at hand; Ctrl-C once more stops at once.

        SIGTERM may well come twice: SLURM tells every process, and torchrun passes its own on.
        """
        if self.interrupted and reason == "interrupted":
            raise KeyboardInterrupt
        self.interrupted = reason
        log("finishing this step, then saving (Ctrl-C again stops at once)")

    def fail_not_finite(self, step: int) -> None:
        """Raise UserError: the loss, which all ranks share, is NaN or infinite."""
        self.saver.finish(self.progress)
        last = self.out / "checkpoints" / "last"
        kept = f"The last good checkpoint is {last}." if last.exists() else "No checkpoint was written yet."
        raise UserError(
            f"the loss is not finite at step {step}. {kept} "
            f"Try a lower --learning_rate (now {self.optim.learning_rate:g}), a longer --warmup_iters, "
            "or --dtype=float32, in another --out_dir"
        )

    def choose_computing(self) -> None:
        """Decide, or go on with, precision, attention and compilation."""
        wish = self.cfg.train.compile
        # FlexAttention knows no dropout, and needs the compiler to be fast.
        compiles = wish is True or (wish == "auto" and self.total_steps >= COMPILE_PAYS_AFTER)
        self.flex = self.device.type == "cuda" and self.model.cfg.dropout == 0.0 and compiles
        example = place(self.blocks.fixed(self.micro), slice(None), self.device, self.flex)
        self.model.train()
        pieces = math.ceil(self.cfg.train.global_batch / self.world.size / self.micro)
        work = Work(self.objective, example, self.device, self.total_steps - self.progress.step, pieces)
        self.computing = Computing(self.cfg.train, work, self.dtype, self.progress, self.world)
        self.dtype = getattr(torch, self.computing.now.dtype)
        self.flex = self.flex and bool(self.computing.now.compiled)

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
            f"number of parameters: {self.parameters / 1e6:.2f}M{part}  ({cfg.family}, {cfg.n_layer} layers, "
            f"{cfg.n_head} heads, {cfg.n_embd} wide, block {cfg.block_size}, vocabulary {cfg.vocab_size})\n"
            f"{self.optim.optimizer}, {self.cfg.train.global_batch} x {cfg.block_size} tokens a step, "
            f"{self.total_steps} steps, {len(self.data.train):,} training tokens; "
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

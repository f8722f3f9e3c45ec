"""A training run: the same command again continues it, and ends where an undisturbed run would have."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from rich.progress import Progress as Bar
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from miaobi.config import RunConfig
from miaobi.console import console, log, progress, warn
from miaobi.corpus.dataset import IGNORE, derive
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.device import explain_memory, keep_allocations, peak_flops, pick_dtype
from miaobi.model.transformer import Transformer
from miaobi.settings import Origin, flatten
from miaobi.train.computing import choose_computing, note
from miaobi.train.data import opening
from miaobi.train.evaluate import bits_per_char, eager, mean_loss, place
from miaobi.train.layout import Objective, is_sharded, no_recompilation, reducing, whole
from miaobi.train.measured import Work
from miaobi.train.optimizer import move, rate, set_rate
from miaobi.train.recipe import memory_advice, micro_batch
from miaobi.train.rendezvous import join, rank_device
from miaobi.train.run_directory import one_writer
from miaobi.train.saving import Saver
from miaobi.train.setup import Plan, set_up
from miaobi.train.threads import Threads
from miaobi.train.watch import Metrics, not_finite, on_signals, overfitting, since_best, time_left
from miaobi.train.world import check_batch, explain_lost

Preview = Callable[[Transformer, Tokenizer, str, int, tuple[int, ...], bool], str]
"""(model, tokenizer, prompt, tokens, end_ids, is_dialogue) -> prompt and what follows; printed at every evaluation."""


def train(cfg: RunConfig, origin: Origin | None = None, preview: Preview | None = None) -> dict:
    """Train, or continue, the run that `cfg` describes.

    Returns run, step, train_loss, val_loss, val_bits_per_char, best_step, tokens_per_second, parameters,
    trained_parameters, stopped.
    Raises UserError for settings and data that do not fit, a loss that is not finite, too little memory, a run that
    another process is writing.
    """
    keep_allocations()
    world = join(cfg.train)
    try:
        check_batch(world, cfg.train)
        device = rank_device(cfg.train.device, world)
        dtype = pick_dtype(cfg.train.dtype, device)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as nanoGPT allows
        advice = memory_advice(micro_batch(cfg, device, world.size), cfg.model.block_size)
        with explain_memory(device, advice), explain_lost(world), one_writer(cfg, world.is_first):
            return Run(set_up(cfg, origin or {}, world, device, dtype)).go(preview)
    finally:
        world.leave()


class Run:
    """A plan being carried out.

    Attributes: plan, what it is made of; progress, where it stands; objective, the model as the ranks train it.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.progress, self.cfg, self.world = plan, plan.progress, plan.cfg.train, plan.world
        self.model = plan.model
        self.objective: nn.Module = Objective(plan.model)
        self.saver = Saver(plan)
        self.metrics: Metrics | None = None
        self.interrupted: str | None = None
        self.flex, self.peak = False, math.inf

    def go(self, preview: Preview | None) -> dict:
        """Train to the end, to early stopping, or to an interruption."""
        p, plan, cfg = self.progress, self.plan, self.cfg
        first = p.step
        log(plan.headline())
        if cfg.eval_only:
            p.val_loss = self.validation_loss()
            p.val_bits_per_char = bits_per_char(plan, p.val_loss)
            return plan.result("eval_only")
        if p.stopped == "patience" and plan.total_steps > p.planned:  # extended: patience begins anew
            p.stopped, p.history = None, [min(p.history, key=lambda row: row[2])]
        p.planned = plan.total_steps
        if (p.step >= plan.total_steps and p.evaluated == p.step) or p.stopped:
            log(f"this run is finished ({p.stopped or 'max_iters'}, step {p.step}); a larger --max_iters extends it")
            return plan.result(p.stopped or "max_iters")
        if first:
            log(f"continuing from step {first}")
        self.choose_computing()
        plan, self.threads = self.plan, Threads(alone=self.world.size == 1)
        self.peak = peak_flops(plan.device, plan.dtype)
        if self.world.size > 1 and not is_sharded(self.model):
            self.objective = DistributedDataParallel(self.objective, gradient_as_bucket_view=True)
        if self.world.is_first:
            wandb = {"project": cfg.wandb_project, "name": cfg.wandb_run_name, "id": p.run, "config": flatten(plan.cfg)}
            self.metrics = Metrics(plan.out, first, wandb if cfg.wandb_log else None, p.evaluated == first,
                                   cfg.tensorboard_path)  # fmt: skip
        with on_signals(self.interrupt), progress("{task.fields[figures]}") as bar:
            task = bar.add_task("train", total=plan.total_steps, completed=first, figures="",
                                visible=console.is_terminal)  # fmt: skip
            try:
                self.steps(bar, task, preview)
            finally:
                if self.world.size == 1 or sys.exc_info()[0] is None:  # ranks that are lost cannot finish it
                    self.saver.finish()
                self.threads.close()
                if self.metrics is not None:
                    self.metrics.close()
        self.saver.refuse_lost()
        log(f"curves: tensorboard --logdir={cfg.tensorboard_path or plan.out}")
        return plan.result(p.stopped or "max_iters")

    def steps(self, bar: Bar, task, preview: Preview | None) -> None:
        """The loop itself."""
        p, cfg = self.progress, self.cfg
        waiting, tokens, seconds, figures = [], 0, 0.0, ""  # since the last line of metrics
        self.model.train()
        if p.step and self.is_due(p.step) and p.evaluated != p.step:  # interrupted just before it
            self.evaluate(preview)
            self.saver.save()
        if cfg.eval_first and not p.step:
            self.evaluate_first()
        while p.step < self.plan.total_steps and p.stopped is None:
            started = time.perf_counter()
            loss, norm, scored = self.step(p.step)
            waiting.append(torch.stack((loss, norm)))
            p.step, p.tokens, tokens = p.step + 1, p.tokens + scored, tokens + scored
            due, interrupted = self.is_due(p.step), self.world.agree(self.interrupted)  # a signal may come at any time
            save = due or interrupted or bool(cfg.save_interval and p.step % cfg.save_interval == 0)
            losses = None
            if save or p.step % cfg.log_interval == 0:
                losses, norms = torch.stack(waiting).cpu().double().unbind(1)  # the only wait for the device
                losses = self.world.sum(losses.contiguous())
            seconds += time.perf_counter() - started
            if losses is not None:
                figures = self.record(losses, norms, tokens, seconds)
                waiting, tokens, seconds = [], 0, 0.0
            self.threads.look()
            bits = f"  val {p.val_bits_per_char:.3f} bits/char" if p.val_bits_per_char else ""
            bar.update(task, completed=p.step, figures=figures + bits)
            if due and not interrupted:
                self.evaluate(preview)
            if interrupted:
                log(f"{interrupted}: saving step {p.step} (Ctrl-C again stops at once)")
            if save:
                self.saver.save()
            if interrupted:
                self.saver.finish()
                p.stopped = interrupted
                if not self.saver.lost:
                    log(f"{interrupted}: saved step {p.step} in {self.plan.out}; "
                        "the same command again goes on from there")  # fmt: skip

    def record(self, losses: Tensor, norms: Tensor, tokens: int, seconds: float) -> str:
        """Write down the last steps, their losses and gradients' norms (steps,) float64; returns the figures to show.

        Raises UserError for one that is not finite.
        """
        p, plan = self.progress, self.plan
        if plan.scaler.is_enabled():  # float16 leaves such steps out, and goes on with a smaller scale
            norms = torch.zeros_like(norms)
        for what, values in ("loss", losses), ("gradient", norms):
            if not bool(torch.isfinite(values).all()):
                self.fail_not_finite(what, p.step - len(values) + int((~torch.isfinite(values)).nonzero()[0]) + 1)
        p.loss_sum, p.loss_steps = p.loss_sum + losses.sum().item(), p.loss_steps + len(losses)
        p.seconds += seconds
        speed, per_step = tokens / seconds, seconds / len(losses)
        mfu = speed * plan.flops_per_token() / (self.peak * self.world.size)
        if self.metrics is not None:
            self.metrics.log(
                p.step,
                train_loss=losses.mean().item(),
                learning_rate=rate(p.step - 1, plan.optim) * plan.optim.learning_rate,
                grad_norm=norms[-1].item(),
                tokens_per_second=speed,
                mfu=mfu,
                epoch=p.step * self.cfg.global_batch / len(plan.blocks),
            )
        figures = f"loss {losses.mean():.3f}  {speed:,.0f} tok/s  {1000 * per_step:,.0f} ms/step  mfu {mfu:.1%}"
        left = time_left((plan.total_steps - p.step) * per_step)
        if not console.is_terminal:
            log(f"step {p.step}{f'/{plan.total_steps}' if left else ''}  {figures}  {left}".rstrip())
        return figures

    def step(self, step: int) -> tuple[Tensor, Tensor, int]:
        """One optimizer step: (this rank's share of the mean loss in nats, gradient norm, tokens scored by all)."""
        cfg, world, plan = self.cfg, self.world, self.plan
        batch = plan.blocks.batch(cfg.global_batch, cfg.seed, step, world.rows(cfg.global_batch))
        scored = int(world.sum(torch.tensor((batch.targets != IGNORE).sum())))
        total = torch.zeros((), device=plan.device)
        starts = range(0, len(batch.inputs), plan.micro)
        for micro, i in enumerate(starts):
            x, y, positions, mask = place(batch, slice(i, i + plan.micro), plan.device, self.flex)
            if self.model.cfg.dropout or plan.cfg.lora.lora_dropout:
                torch.manual_seed(derive(cfg.seed, "dropout", step, micro, world.rank))
            with reducing(self.objective, self.model, micro == len(starts) - 1):
                autocast = torch.autocast(plan.device.type, dtype=plan.dtype, enabled=plan.dtype != torch.float32)
                with autocast, no_recompilation(self.objective):
                    loss = self.objective(x, y, positions, mask) / scored
                plan.scaler.scale(loss * world.size).backward()  # DDP and FSDP average over the ranks
            total += loss.detach()
        for optimizer in plan.optimizers:
            plan.scaler.unscale_(optimizer)
        limit = plan.optim.grad_clip or math.inf
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        set_rate(plan.optimizers, rate(step, plan.optim))
        move(plan.optimizers, norm)
        for optimizer in plan.optimizers:
            optimizer.zero_grad(set_to_none=True)
        plan.scaler.update()
        return total, norm, scored

    def validation_loss(self) -> float:
        """Nats per scored token over the validation windows."""
        return mean_loss(self.plan, self.plan.val_windows)

    def is_due(self, step: int) -> bool:
        """Whether the run is evaluated after `step` steps."""
        return step % self.cfg.eval_interval == 0 or step == self.plan.total_steps

    def evaluate_first(self) -> None:
        """How good the model is before it learns anything; only told, it is neither kept nor compared."""
        loss = self.validation_loss()
        bits = bits_per_char(self.plan, loss)
        if self.metrics is not None:
            self.metrics.log(0, val_loss=loss, val_bits_per_char=bits)
        log(f"step 0: val loss {loss:.4f}, {bits:.3f} bits/char")

    def evaluate(self, preview: Preview | None) -> None:
        """Validation loss on fixed windows, best so far, warnings, early stopping, a sample."""
        p, cfg, plan = self.progress, self.cfg, self.plan
        self.saver.finish()
        p.val_loss = self.validation_loss()
        if not math.isfinite(p.val_loss):
            self.fail_not_finite("loss", p.step)
        p.val_bits_per_char = bits_per_char(plan, p.val_loss)
        p.note_evaluation()
        now = mean_loss(plan, plan.train_windows) if plan.train_windows is not None else None
        if self.metrics is not None:
            self.metrics.log(p.step, val_loss=p.val_loss, val_bits_per_char=p.val_bits_per_char, train_eval_loss=now)
        before = "none" if p.train_loss is None else f"{p.train_loss:.4f}"
        log(f"step {p.step}: train loss {before}{f' (now {now:.4f})' if now is not None else ''}, "
            f"val loss {p.val_loss:.4f}, {p.val_bits_per_char:.3f} bits/char"
            f"{', best so far' if p.best_step == p.step else ''}")  # fmt: skip
        hint = overfitting(p.history, self.model.cfg.dropout, plan.optim.learning_rate)
        if hint is not None and not p.warned:
            warn(hint)
            p.warned = True
        if cfg.patience and since_best(p.history) >= cfg.patience and p.step < plan.total_steps:
            p.stopped = "patience"
            log(f"stopped: no better validation loss for {cfg.patience} evaluations. "
                f"The best model is step {p.best_step} (val {p.best_val_loss:.4f})")  # fmt: skip
        if preview is not None and cfg.sample_tokens and self.world.is_first and not is_sharded(self.model):
            data = plan.data
            prompt = cfg.sample_start or opening(data, plan.tokenizer)
            self.model.eval()
            with eager(self.model):
                text = preview(self.model, plan.tokenizer, prompt, cfg.sample_tokens, data.end_ids, data.is_dialogue)
            log("  " + text.replace("\n", "\n  "))
            self.model.train()

    def interrupt(self, reason: str) -> None:
        """Ask the loop to save after the step at hand; Ctrl-C once more stops at once.

        SIGTERM may well come twice: SLURM tells every process, and torchrun passes its own on. Only a note is taken
        here: a signal may come while a line is being printed.
        """
        if self.interrupted and reason == "interrupted":
            raise KeyboardInterrupt
        self.interrupted = reason

    def fail_not_finite(self, what: str, step: int) -> None:
        """Raise UserError: the loss or the gradient, which all ranks share, is NaN or infinite."""
        self.saver.finish()
        raise not_finite(what, step, self.saver.root / "last", self.plan.optim.learning_rate)

    def choose_computing(self) -> None:
        """Decide, or go on with, precision, attention and compilation."""
        plan, cfg = self.plan, self.cfg
        # FlexAttention knows no dropout, and needs the compiler to be fast.
        can_flex = plan.device.type == "cuda" and self.model.cfg.dropout == 0.0
        self.model.train()
        work = Work(self.objective, lambda rows, compiled: place(plan.blocks.fixed(rows), slice(None), plan.device,
                                                                 can_flex and compiled),
                    plan.device, plan.total_steps - self.progress.step, cfg.global_batch // self.world.size, plan.micro,
                    bound=cfg.micro_batch_size is not None)  # fmt: skip
        way = choose_computing(cfg, work, plan.dtype, self.progress, self.world)
        micro = plan.micro if work.bound else way.micro or plan.micro
        self.plan = replace(plan, dtype=getattr(torch, way.dtype), micro=micro)
        self.flex = can_flex and bool(way.compiled)
        if self.world.is_first:
            note(plan.out / "config.yaml", way)

"""The training loop: the same command again continues a run, and ends where an undisturbed run would have ended."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from rich.progress import Progress as Bar
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from miaobi.config import RunConfig
from miaobi.console import console, log, progress
from miaobi.corpus.dataset import IGNORE, Batch, derive
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.device import explain_memory, keep_allocations, peak_flops, pick_dtype
from miaobi.model.transformer import Transformer
from miaobi.settings import Origin
from miaobi.train.alarms import Alarms
from miaobi.train.computing import decide_mode
from miaobi.train.data import opening
from miaobi.train.evaluate import ForwardGraph, bits_per_char, evaluating, mean_loss, to_device
from miaobi.train.layout import Objective, is_sharded, no_recompilation, reducing, whole
from miaobi.train.micro import halved_micro_batch
from miaobi.train.optimizer import set_rate, step_all
from miaobi.train.recipe import memory_advice, micro_batch
from miaobi.train.recovery import NotFiniteError, with_recovery
from miaobi.train.rendezvous import join, rank_device
from miaobi.train.run_directory import run_lock, with_saved_settings
from miaobi.train.saving import Saver
from miaobi.train.schedule import Deadline, clock, share_of_rate
from miaobi.train.setup import Plan, set_up
from miaobi.train.summary import summarized
from miaobi.train.threads import Threads
from miaobi.train.watch import Metrics, last_step, on_signals, time_left
from miaobi.train.world import check_batch, explain_lost

Preview = Callable[[Transformer, Tokenizer, str, int, tuple[int, ...], bool], str]
"""(model, tokenizer, prompt, tokens, end_ids, is_dialogue) -> prompt and continuation; printed at every evaluation."""


def train(cfg: RunConfig, origin: Origin | None = None, preview: Preview | None = None, since: float = 0) -> dict:
    """Train, or continue, the run that `cfg` describes. since: when the command began, by `schedule.clock`.

    Returns what `Plan.result` holds.
    Raises UserError for settings and data that do not fit, a loss that is not finite, too little memory, a run that
    another process is writing.
    """
    since = since or clock()
    keep_allocations()
    cfg, origin = with_saved_settings(cfg, origin)
    world = join(cfg.train)
    try:
        check_batch(world, cfg.train)
        device = rank_device(cfg.train.device, world)
        dtype = pick_dtype(cfg.train.dtype, device)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as nanoGPT allows
        advice = memory_advice(micro_batch(cfg, device, world.size), cfg.model.block_size)
        with explain_memory(device, advice), explain_lost(world), run_lock(cfg, world.is_first):
            plan = set_up(cfg, origin, world, device, dtype)
            begun = since - plan.progress.wall  # a rollback does not give the time back
            return with_recovery(plan, origin, lambda plan: Run(plan, begun).go(preview))
    finally:
        world.leave()


class Run:
    """Carries out a plan.

    Attributes: plan; progress, its state; objective, the model and loss that the ranks train.
    """

    def __init__(self, plan: Plan, begun: float | None = None) -> None:
        """begun: by `schedule.clock`, when the run would have begun without interruptions; default now."""
        self.plan, self.progress, self.cfg, self.world = plan, plan.progress, plan.cfg.train, plan.world
        self.model, self.saver, self.alarms = plan.model, Saver(plan), Alarms(plan)
        self.objective: nn.Module = Objective(plan.model)
        self.metrics: Metrics | None = None
        self.interrupted: str | None = None
        self.flex, self.peak, self.graph = False, math.inf, None
        self.deadline = Deadline.of(plan, clock() if begun is None else begun)
        self.fetching = 0.0  # seconds spent on reading batches, since the last line of metrics

    def go(self, preview: Preview | None) -> dict:
        """Train to the end, to early stopping, or to an interruption."""
        p, plan, cfg = self.progress, self.plan, self.cfg
        first = p.step
        log(plan.headline())
        if cfg.eval_only:
            p.val_loss = self.validation_loss()
            p.val_bits_per_char = bits_per_char(plan, p.val_loss)
            return plan.result("eval_only")
        if p.stopped == "patience" and plan.total_steps > p.planned:  # extended: patience starts over
            p.stopped, p.history = None, [min(p.history, key=lambda row: row[2])]
        p.planned = plan.total_steps
        if (p.step >= plan.total_steps and p.evaluated == p.step) or p.stopped:
            end = p.stopped or plan.end
            log(f"this run is finished ({end}, step {p.step})" + "; a larger --max_iters extends it" * (not p.laid))
            return plan.result(end)
        if first:
            log(f"continuing from step {first}")
        self.plan, self.flex = decide_mode(plan, self.objective)
        plan, self.graph = self.plan, ForwardGraph.of(self.plan, self.objective)
        self.threads, self.peak = Threads(alone=self.world.size == 1), peak_flops(plan.device, plan.dtype)
        if self.world.size > 1 and not is_sharded(self.model):
            self.objective = DistributedDataParallel(self.objective, gradient_as_bucket_view=True)
        if self.world.is_first:
            self.metrics = Metrics.of(plan)
        with summarized(plan), on_signals(self.interrupt), progress("{task.fields[figures]}") as bar:
            task = bar.add_task("train", total=last_step(plan), completed=first, figures="",
                                visible=console.is_terminal)  # fmt: skip
            try:
                self.steps(bar, task, preview)
            finally:
                if self.world.size == 1 or sys.exc_info()[0] in (None, NotFiniteError):  # lost ranks cannot finish it
                    self.saver.finish()
                self.threads.close()
                if self.metrics is not None:
                    self.metrics.close()
        self.saver.refuse_lost()
        log(f"curves: tensorboard --logdir={cfg.tensorboard_path or plan.out}")
        return plan.result(p.stopped or plan.end)

    def steps(self, bar: Bar, task, preview: Preview | None) -> None:
        """The training loop."""
        p, cfg = self.progress, self.cfg
        waiting, tokens, seconds, figures = [], 0, 0.0, ""  # since the last line of metrics
        self.model.train()
        if p.step and self.is_due(p.step) and p.evaluated != p.step:  # interrupted just before it
            self.evaluate(preview)
            self.saver.save()
        if cfg.eval_first and not p.step:
            self.evaluate_first()
        while p.step < self.plan.total_steps and p.stopped is None:
            if self.deadline is not None and self.deadline.is_due(p.step):
                p.planned = self.deadline.replan(p.step)
                self.plan = replace(self.plan, total_steps=p.planned)
                bar.update(task, total=p.planned)
            started = clock()
            loss, norm, scored = self.step(p.step)
            waiting.append(torch.stack((loss, norm)))
            p.step, p.tokens, tokens = p.step + 1, p.tokens + scored, tokens + scored
            due, interrupted = self.is_due(p.step), self.world.agree(self.interrupted)  # a signal may come at any time
            save = due or interrupted or bool(cfg.save_interval and p.step % cfg.save_interval == 0)
            losses = None
            if save or p.step % cfg.log_interval == 0 or (self.deadline and self.deadline.is_due(p.step)):
                losses, norms = torch.stack(waiting).cpu().double().unbind(1)  # the only wait for the device
                losses = self.world.sum(losses.contiguous())
            seconds += clock() - started
            if losses is not None:
                figures = self.record(losses, norms, tokens, seconds)
                waiting, tokens, seconds = [], 0, 0.0
            self.threads.check()
            bits = f"  val {p.val_bits_per_char:.3f} bits/char" if p.val_bits_per_char else ""
            bar.update(task, completed=p.step, figures=figures + bits)
            started = clock()
            if due and not interrupted:
                self.evaluate(preview)
            if interrupted:
                log(f"{interrupted}: saving step {p.step} (Ctrl-C again stops at once)")
            if save:
                self.alarms.check_disk()
                p.wall = self.deadline.elapsed() if self.deadline else 0.0
                self.saver.save()
                if self.deadline is not None:
                    self.deadline.note_evaluation(clock() - started)
            if interrupted:
                self.saver.finish()
                p.stopped = interrupted
                if not self.saver.lost:
                    log(f"{interrupted}: saved step {p.step} in {self.plan.out}; "
                        "the same command again continues from there")  # fmt: skip

    def record(self, losses: Tensor, norms: Tensor, tokens: int, seconds: float) -> str:
        """Log the last steps, their losses and gradient norms (steps,) float64; returns the line of figures.

        Raises NotFiniteError if too many are not finite.
        """
        p, plan = self.progress, self.plan
        if plan.scaler.is_enabled():  # float16 skips such steps and lowers its scale
            norms = torch.zeros_like(norms)
        speed, per_step = tokens / seconds, seconds / len(losses)
        losses = self.alarms.finite_losses(p.step - len(losses), losses, norms)
        self.alarms.check_speed(speed, self.fetching / seconds)
        if self.deadline is not None:
            self.deadline.note_steps(per_step)
        p.loss_sum, p.loss_steps = p.loss_sum + losses.sum().item(), p.loss_steps + len(losses)
        p.seconds, self.fetching = p.seconds + seconds, 0.0
        mean = losses.mean().item() if len(losses) else math.nan
        mfu = speed * plan.flops_per_token() / (self.peak * self.world.size)
        if self.metrics is not None:
            share, epoch = share_of_rate(p.step - 1, plan.optim, p), p.step * self.cfg.global_batch / len(plan.blocks)
            self.metrics.log(p.step, train_loss=mean if len(losses) else None, tokens_per_second=speed, mfu=mfu,
                             learning_rate=share * plan.optim.learning_rate, epoch=epoch,
                             grad_norm=norms[-1].item() if norms[-1].isfinite() else None)  # fmt: skip
        figures = f"loss {mean:.3f}  {speed:,.0f} tok/s  {1000 * per_step:,.0f} ms/step  mfu {mfu:.1%}"
        left = time_left(plan, per_step)
        if not console.is_terminal:
            log(f"step {p.step}{f'/{plan.total_steps}' if left else ''}  {figures}  {left}".rstrip())
        return figures

    def step(self, step: int) -> tuple[Tensor, Tensor, int]:
        """One optimizer step: (this rank's share of the mean loss in nats, gradient norm, tokens scored by all)."""
        cfg, world, plan, started = self.cfg, self.world, self.plan, clock()
        batch = plan.blocks.batch(cfg.global_batch, cfg.seed, step, world.rows(cfg.global_batch))
        scored = int(world.sum(torch.tensor((batch.targets != IGNORE).sum())))
        self.fetching += clock() - started
        total = None
        while total is None:
            try:
                total = self.gradients(step, batch, scored)
            except RuntimeError as e:  # with a smaller micro-batch again, if it was out of memory
                self.plan = plan = halved_micro_batch(plan, e)
        for optimizer in plan.optimizers:
            plan.scaler.unscale_(optimizer)
        limit = plan.optim.grad_clip or math.inf
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        norm = world.all_finite(norm, norm + total)
        set_rate(plan.optimizers, share_of_rate(step, plan.optim, self.progress))
        step_all(plan.optimizers, norm)
        if plan.average is not None:
            plan.average.update(step + 1)
        for optimizer in plan.optimizers:
            optimizer.zero_grad(set_to_none=True)
        plan.scaler.update()
        return total, norm, scored

    def gradients(self, step: int, batch: Batch, scored: int) -> Tensor:
        """Add up the gradients of a step's micro-batches; returns this rank's share of the mean loss, in nats."""
        cfg, world, plan = self.cfg, self.world, self.plan
        total = torch.zeros((), device=plan.device)
        starts = range(0, len(batch.inputs), plan.micro)
        for micro, i in enumerate(starts):
            x, y, positions, mask = to_device(batch, slice(i, i + plan.micro), plan.device, self.flex, plan.dtype)
            if self.model.cfg.dropout or plan.cfg.lora.lora_dropout:
                torch.manual_seed(derive(cfg.seed, "dropout", step, micro, world.rank))
            with reducing(self.objective, self.model, micro == len(starts) - 1):
                autocast = torch.autocast(plan.device.type, dtype=plan.dtype, enabled=plan.dtype != torch.float32)
                with autocast, no_recompilation(self.objective):
                    loss = self.objective(x, y, positions, mask) / scored
                plan.scaler.scale(loss * world.size).backward()  # DDP and FSDP average over the ranks
            total += loss.detach()
        return total

    def validation_loss(self) -> float:
        """Nats per scored token over the validation windows."""
        return mean_loss(self.plan, self.plan.val_windows, self.graph)

    def is_due(self, step: int) -> bool:
        """Whether the run is evaluated after `step` steps."""
        return step % self.cfg.eval_interval == 0 or step == self.plan.total_steps

    def evaluate_first(self) -> None:
        """Evaluate the model before the first step: the result is logged, but not saved or compared."""
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
            raise NotFiniteError("loss of the validation text", p.step)
        if plan.average is not None:
            p.val_loss = plan.average.lower_loss(p.val_loss, self.validation_loss)
        p.val_bits_per_char = bits_per_char(plan, p.val_loss)
        p.note_evaluation()
        now = mean_loss(plan, plan.train_windows, self.graph) if plan.train_windows is not None else None
        if self.metrics is not None:
            self.metrics.log(p.step, val_loss=p.val_loss, val_bits_per_char=p.val_bits_per_char, train_eval_loss=now)
        before = "none" if p.train_loss is None else f"{p.train_loss:.4f}"
        log(f"step {p.step}: train loss {before}{f' (now {now:.4f})' if now is not None else ''}, "
            f"val loss {p.val_loss:.4f}, {p.val_bits_per_char:.3f} bits/char{' (averaged weights)' * p.averaged}"
            f"{', best so far' if p.best_step == p.step else ''}")  # fmt: skip
        self.alarms.check_evaluation()
        if preview is not None and cfg.sample_tokens and self.world.is_first and not is_sharded(self.model):
            prompt = cfg.sample_start or opening(plan.data, plan.tokenizer)
            given = plan.tokenizer, prompt, cfg.sample_tokens, plan.data.end_ids, plan.data.is_dialogue
            with evaluating(self.model), plan.average.using_better() if plan.average else nullcontext():
                text = preview(self.model, *given)
            log("  " + text.replace("\n", "\n  "))
            if self.metrics is not None:
                self.metrics.sample(p.step, text)

    def interrupt(self, reason: str) -> None:
        """Ask the loop to save after the current step; a second Ctrl-C stops at once. Only sets a flag: a signal may
        arrive while a line is being printed, and SIGTERM may arrive twice (from SLURM, and passed on by torchrun).
        """
        if self.interrupted and reason == "interrupted":
            raise KeyboardInterrupt
        self.interrupted = reason

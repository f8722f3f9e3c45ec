"""The verdict on a run: why it ended, what its curves show, and what to try next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from miaobi.report.reading import RunRecord

RISEN = 0.005
"""Overfitting is a rise of validation by this share over its minimum (all evaluations use the same windows)."""
FALLING = 0.02
"""A run was too short if validation still fell by this share over its last quarter."""


@dataclass(frozen=True)
class Bilingual:
    """A sentence in Chinese and English; text between backquotes is a command."""

    zh: str
    en: str


@dataclass
class Verdict:
    """The judgement on a run."""

    tone: Literal["good", "mixed", "bad"]
    headline: Bilingual
    reasons: list[Bilingual] = field(default_factory=list)
    next_steps: list[Bilingual] = field(default_factory=list)


ENDS = {
    "max_iters": Bilingual("跑完了计划的步数", "it took all its planned steps"),
    "max_minutes": Bilingual(
        "时间到了（--max_minutes），学习率已降完",
        "its time was up (--max_minutes), with the learning rate fully decayed",
    ),
    "patience": Bilingual("验证损失不再下降，提前停止", "validation no longer improved (early stopping)"),
    "interrupted": Bilingual("被 Ctrl-C 中断", "it was interrupted (Ctrl-C)"),
    "terminated": Bilingual("收到终止信号（例如集群抢占）", "it was terminated (SIGTERM, such as pre-emption)"),
    "failed": Bilingual("出错中止", "it failed"),
}
UNKNOWN_END = Bilingual(
    "没有写下结束的原因：进程被强行结束，或仍在训练", "no reason was recorded: it was killed, or is still running"
)


def judge(run: RunRecord) -> Verdict:
    """The verdict on a run."""
    stopped = run.summary.stopped if run.summary else run.progress.stopped if run.progress else None
    end = ENDS.get(stopped or "", UNKNOWN_END)
    if stopped == "failed" or (stopped is None and run.not_finite is not None):
        return _failed(run, end)
    verdict = _by_curves(run)
    verdict.reasons.insert(0, Bilingual(f"停止的原因：{end.zh}。", f"Stopped because {end.en}."))
    if stopped in ("interrupted", "terminated") or end is UNKNOWN_END:
        verdict.next_steps.insert(
            0,
            Bilingual(
                "同一条命令再运行一次，就从最后的检查点接着训练。",
                "Run the same command again: it continues from the last checkpoint.",
            ),
        )
    return verdict


def _failed(run: RunRecord, end: Bilingual) -> Verdict:
    error = run.summary.error if run.summary else ""
    if "not finite" in error or run.not_finite is not None:
        rate = run.value("learning_rate")
        lower = f"`--learning_rate={rate / 3:.1g}`" if isinstance(rate, (int, float)) else "`--learning_rate`"
        return Verdict(
            "bad",
            Bilingual(
                "训练发散：损失或梯度变成了 NaN 或无穷大",
                "Training diverged: the loss or a gradient became NaN or infinite",
            ),
            [Bilingual(f"停止的原因：{end.zh}。{error}", f"Stopped because {end.en}. {error}"), *_best_kept(run)],
            [
                Bilingual(
                    f"把学习率降到三分之一（{lower}），换一个 `--out_dir`。",
                    f"Lower the learning rate to a third ({lower}), in another `--out_dir`.",
                ),
                Bilingual(
                    "或者加长预热 `--warmup_iters`；半精度时试试 `--dtype=float32`。",
                    "Or a longer `--warmup_iters`; in half precision try `--dtype=float32`.",
                ),
            ],
        )
    return Verdict(
        "bad",
        Bilingual("训练出错中止", "The run failed"),
        [Bilingual(f"停止的原因：{error or '未知'}", f"Stopped because: {error or 'not known'}"), *_best_kept(run)],
        [
            Bilingual(
                "按上面的提示改正后，同一条命令从最后的检查点接着训练。",
                "Correct what the message says; the same command then continues from the last checkpoint.",
            )
        ],
    )


def _best_kept(run: RunRecord) -> list[Bilingual]:
    if run.progress is None or run.progress.best_step is None or run.best is None:
        return []
    return [
        Bilingual(
            f"最好的模型（第 {run.progress.best_step:,} 步）已保存。",
            f"The best model (step {run.progress.best_step:,}) is kept.",
        )
    ]


def _by_curves(run: RunRecord) -> Verdict:
    found, best = run.evaluations, run.best
    if best is None or best.step == 0:
        return Verdict(
            "mixed",
            Bilingual("还没有评估过，看不出好坏", "Not evaluated yet"),
            next_steps=[
                Bilingual(
                    "让它至少跑到第一个 `--eval_interval`。", "Let it run to its first `--eval_interval` at least."
                )
            ],
        )
    last, rose = found[-1], found[-1].val_bits / best.val_bits - 1
    if last.step > best.step and rose > RISEN and _train_fell(run):
        return _overfitted(run)
    fell = _late_fall(run)
    if len(found) < 3 or fell is None:
        return Verdict(
            "mixed",
            Bilingual(
                f"最好 {best.val_bits:.3f} 比特/字符；评估太少，看不出走势",
                f"Best {best.val_bits:.3f} bits/char; too few evaluations to see a trend",
            ),
            next_steps=[
                Bilingual(
                    "把 `--eval_interval` 改小，曲线才有形状。",
                    "A smaller `--eval_interval` gives the curve more points.",
                )
            ],
        )
    if fell > FALLING:
        return _too_short(run, fell)
    return Verdict(
        "good",
        Bilingual(
            f"收敛了：最好 {best.val_bits:.3f} 比特/字符（第 {best.step:,} 步）",
            f"Converged: best {best.val_bits:.3f} bits/char, at step {best.step:,}",
        ),
        [
            Bilingual(
                f"最后四分之一的步数里，验证只变了 {fell:+.1%}（正数为下降）；没有过拟合的迹象。",
                f"Over the last quarter of the steps validation changed by only {fell:.1%} (positive: it fell); "
                "there is no sign of overfitting.",
            )
        ],
        [
            Bilingual(
                "想更好：先加文本，再加大模型（`--n_layer`、`--n_embd`）；同样的模型跑更久没有多少帮助。",
                "To do better: more text first, then a larger model (`--n_layer`, `--n_embd`); more steps of this "
                "model will not help much.",
            )
        ],
    )


def _train_fell(run: RunRecord) -> bool:
    """Whether training loss kept falling after the minimum of validation: overfitting, not a failure."""
    best = run.best
    after = [e.train_loss for e in run.evaluations if e.step >= best.step and e.train_loss is not None]
    return len(after) >= 2 and after[-1] < after[0]


def _overfitted(run: RunRecord) -> Verdict:
    best, last, per_nat = run.best, run.evaluations[-1], run.bits_per_nat or 1.0
    epoch = next((value for step, value in run.curves["epoch"] if step >= best.step), None)
    zh_epoch, en_epoch = (f"（第 {epoch:.1f} 遍）", f" (pass {epoch:.1f})") if epoch is not None else ("", "")
    steps = [
        Bilingual(f"少跑：`--max_iters={max(1, best.step)}`，学习率正好在最低点前降完。",
              f"Fewer steps: `--max_iters={max(1, best.step)}`, so that the learning rate "
              "has decayed when validation is lowest.")
    ]  # fmt: skip
    dropout = run.value("dropout")
    if isinstance(dropout, (int, float)) and dropout < 0.4:
        more = 0.2 if dropout < 0.15 else 0.4
        steps.append(
            Bilingual(
                f"更多的随机失活：`--dropout={more}`（现在 {dropout:g}）。",
                f"More dropout: `--dropout={more}` (now {dropout:g}).",
            )
        )
    size = _tokens_per_parameter(run)
    if size is not None and size < 20:
        steps.append(
            Bilingual(
                f"更小的模型：每个参数只有 {size:.2g} 个训练词元（经验值约 20）。",
                f"A smaller model: there are {size:.2g} training tokens per parameter (about 20 are usual).",
            )
        )
    steps.append(Bilingual("最有用的是更多的文本。", "What helps most is more text."))
    train_bits = f"{last.train_loss * per_nat:.2f}" if last.train_loss is not None else "?"
    return Verdict(
        "bad" if last.val_bits / best.val_bits - 1 > 0.05 else "mixed",
        Bilingual(
            f"过拟合：第 {best.step:,} 步{zh_epoch}最好，{best.val_bits:.3f} 比特/字符，之后变差",
            f"Overfitting: best at step {best.step:,}{en_epoch} with {best.val_bits:.3f} bits/char, then worse",
        ),
        [
            Bilingual(
                f"之后验证升到 {last.val_bits:.3f}，训练却降到 {train_bits}：模型在背诵文本。最好的检查点保留在 best。",
                f"After that validation rose to {last.val_bits:.3f} while training fell to {train_bits}: the model was "
                "memorizing the text. The best checkpoint is kept as best.",
            )
        ],
        steps,
    )


def _tokens_per_parameter(run: RunRecord) -> float | None:
    if run.summary is None or not run.summary.parameters or not run.summary.train_tokens:
        return None
    return run.summary.train_tokens / run.summary.parameters


def _late_fall(run: RunRecord) -> float | None:
    """Share by which validation fell over the last quarter of the steps; None where that holds no two evaluations."""
    last = run.evaluations[-1]
    before = [e for e in run.evaluations if 0 < e.step <= 0.75 * last.step]
    return 1 - last.val_bits / before[-1].val_bits if before else None


def _too_short(run: RunRecord, fell: float) -> Verdict:
    best, steps = run.best, run.evaluations[-1].step
    longer = run.summary.total_steps if run.summary and run.summary.total_steps > steps else 2 * steps
    first = (
        Bilingual(
            f"跑更久：`--max_iters={longer}`，换一个 `--out_dir`（学习率的下降要铺满全程）。",
            f"Train longer: `--max_iters={longer}` in another `--out_dir`, so that the learning rate "
            "decays over the whole run.",
        )
        if longer == 2 * steps
        else Bilingual(f"让它跑完计划的 {longer:,} 步。", f"Let it run all of its {longer:,} steps.")
    )
    return Verdict(
        "mixed",
        Bilingual(
            f"还没收敛：{best.val_bits:.3f} 比特/字符，仍在下降",
            f"Not converged: {best.val_bits:.3f} bits/char, and still falling",
        ),
        [
            Bilingual(
                f"最后四分之一的步数里，验证又降了 {fell:.1%}。（学习率降到零时总会降一些。）",
                f"Over the last quarter of the steps validation fell by another {fell:.1%}. (The decay of the "
                "learning rate always gives some of that.)",
            )
        ],
        [first],
    )

"""The words of a run's report follow from its figures."""

import pytest
from tests.report.conftest import falling, flat, history, overfitted

from miaobi.report.reading import read_run
from miaobi.report.verdict import judge


@pytest.mark.parametrize(
    ("metrics", "stopped", "tone", "says", "advises"),
    [
        (history(overfitted, lambda s: 4 - 3 * s), "patience", "bad", "Overfitting: best at step 400 (pass 1.6)",
         "--max_iters=400"),
        (history(falling, falling), "max_iters", "mixed", "Not converged", "--max_iters=2000"),
        (history(flat, flat), "max_iters", "good", "Converged: best 6.000", "more text"),
        (history(flat, flat)[:12], "interrupted", "mixed", "too few evaluations", "Run the same command again"),
        ([], "max_iters", "mixed", "Not evaluated yet", "--eval_interval"),
    ],
    ids=["overfitting", "too short", "converged", "interrupted", "no evaluation"],
)  # fmt: skip
def test_the_verdict_names_what_the_curves_show(altered, metrics, stopped, tone, says, advises):
    verdict = judge(read_run(str(altered(metrics=metrics, summary={"stopped": stopped, "total_steps": 1000}))))
    assert verdict.tone == tone
    assert says in verdict.headline.en
    assert any(advises in step.en for step in verdict.next_steps), verdict.next_steps


def test_validation_that_rises_while_training_rises_too_is_not_overfitting(altered):
    run = altered(metrics=history(overfitted, overfitted))
    assert "Overfitting" not in judge(read_run(str(run))).headline.en


def test_a_loss_that_was_not_finite_is_named_with_a_lower_rate(altered):
    run = altered(summary={"stopped": "failed", "error": "the loss is not finite at step 7. No checkpoint"})
    verdict = judge(read_run(str(run)))
    assert verdict.tone == "bad"
    assert "diverged" in verdict.headline.en
    assert "step 7" in verdict.reasons[0].en
    assert "--learning_rate=0.001" in verdict.next_steps[0].en  # a third of the recipe's 3e-3


def test_a_nan_in_the_metrics_of_a_killed_run_is_seen(altered):
    run = altered(metrics=[{"step": 10, "train_loss": 3.0}, {"step": 20, "train_loss": float("nan")}],
                  summary={"stopped": None})  # fmt: skip
    assert "diverged" in judge(read_run(str(run))).headline.en


@pytest.mark.parametrize("stopped", ["interrupted", "terminated", None])
def test_what_did_not_end_by_itself_can_go_on(altered, stopped):
    verdict = judge(read_run(str(altered(metrics=history(flat, flat), summary={"stopped": stopped}))))
    assert "same command" in verdict.next_steps[0].en
    assert "再运行一次" in verdict.next_steps[0].zh


def test_both_languages_say_the_same_figures(altered):
    verdict = judge(read_run(str(altered(metrics=history(overfitted, lambda s: 4 - 3 * s)))))
    for words in (verdict.headline, *verdict.next_steps):
        digits = [sorted(c for c in text if c.isdigit()) for text in (words.zh, words.en)]
        assert digits[0] == digits[1], words

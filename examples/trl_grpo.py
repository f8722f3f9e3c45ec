"""Reward what a model writes with TRL's GRPO (Shao et al. 2024, arXiv:2402.03300): here, a full stop.

python examples/trl_grpo.py my_run/checkpoints/best 中国 北京 --out=rewarded
"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


def full_stop(completions: list[str], **_: object) -> list[float]:
    """1 for a text with a full stop in it, 0 for one without. Write your own: any function of texts."""
    return [float("。" in text) for text in completions]


def main(model: str, prompts: list[str], out: Path, steps: int, length: int, cpu: bool) -> float:
    """Train `steps` steps of 4 continuations of `length` tokens each; returns the last mean reward."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    arguments = GRPOConfig(
        str(out), max_steps=steps, per_device_train_batch_size=4, num_generations=4, max_completion_length=length,
        learning_rate=1e-4, logging_steps=1, save_strategy="no", report_to="none", use_cpu=cpu, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        reward_funcs=full_stop,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return [line["reward"] for line in trainer.state.log_history if "reward" in line][-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(" (")[0])
    parser.add_argument("model")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--cpu", action="store_true")
    print(f"mean reward {main(**vars(parser.parse_args())):.2f}")

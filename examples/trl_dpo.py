"""Prefer some continuations to others with TRL's DPO (Rafailov et al. 2023, arXiv:2305.18290).

    python examples/trl_dpo.py my_run/checkpoints/best pairs.jsonl --out=preferred

pairs.jsonl has a line {"prompt": ..., "chosen": ..., "rejected": ...} for each pair.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def main(model: str, pairs: Path, out: Path, steps: int, cpu: bool) -> float:
    """Train `steps` steps of 4 pairs; returns in how many of the last 4 the chosen side won (0 to 1)."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    arguments = DPOConfig(
        str(out), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-4, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=cpu, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        args=arguments,
        train_dataset=Dataset.from_json(str(pairs)),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return [line["rewards/accuracies"] for line in trainer.state.log_history if "rewards/accuracies" in line][-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(" (")[0])
    parser.add_argument("model")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--cpu", action="store_true")
    print(f"chosen over rejected {main(**vars(parser.parse_args())):.0%}")

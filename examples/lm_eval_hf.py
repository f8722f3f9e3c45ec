"""Score texts of your own with lm-evaluation-harness, as `lm_eval --model hf` does: bits per byte.

python examples/lm_eval_hf.py my_run/checkpoints/best      # reads texts.jsonl here, a line {"text": ...} for each text
"""

import argparse
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parent / "lm_eval_tasks"


def main(model: str, length: int, device: str) -> float:
    """Bits per byte of the texts, which the model reads in windows of `length` tokens."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)  # its own tasks take half a minute to read
    arguments = {"pretrained": model, "max_length": length, "dtype": "float32"}
    found = simple_evaluate("hf", model_args=arguments, tasks=["own_text"], task_manager=manager, device=device)
    return found["results"]["own_text"]["bits_per_byte,none"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    print(f"{main(**vars(parser.parse_args())):.4f} bits per byte")

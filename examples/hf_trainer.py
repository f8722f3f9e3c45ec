"""Train on with Hugging Face's Trainer: a directory of miaobi is a model directory, and stays one.

python examples/hf_trainer.py my_run/checkpoints/best my.txt --out=trained_on
"""

import argparse
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)


def main(model: str, text: Path, out: Path, steps: int, cpu: bool) -> float:
    """Train `steps` steps of 8 blocks of `text`; returns the last loss, in nats per token."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    decoder = AutoModelForCausalLM.from_pretrained(model)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    block = decoder.config.max_position_embeddings
    blocks = [{"input_ids": ids[i : i + block]} for i in range(0, len(ids) - block + 1, block)]
    arguments = TrainingArguments(
        str(out), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=cpu,
    )  # fmt: skip
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(decoder, arguments, train_dataset=blocks, data_collator=collator, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()  # `miaobi sample OUT` reads it
    return [line["loss"] for line in trainer.state.log_history if "loss" in line][-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cpu", action="store_true")
    print(f"loss {main(**vars(parser.parse_args())):.3f}")

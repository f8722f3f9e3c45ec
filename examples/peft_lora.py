"""Tune a few weights with PEFT's LoRA: an adapter for what reads PEFT's, and the whole model with it inside.

python examples/peft_lora.py my_run/checkpoints/best my.txt --out=tuned
miaobi sample tuned
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model: str, text: Path, out: Path, steps: int, cpu: bool) -> float:
    """Train adapters of rank 8 on attention, `steps` steps of 8 blocks; returns the last loss in nats per token."""
    device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model)
    gpt2 = base.config.model_type == "gpt2"
    targets = ["c_attn"] if gpt2 else ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, fan_in_fan_out=gpt2, task_type="CAUSAL_LM")
    tuned = get_peft_model(base, config).to(device)
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    block, draw = base.config.max_position_embeddings, torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-3)
    for _ in range(steps):
        starts = torch.randint(len(ids) - block + 1, (8,), generator=draw)
        batch = torch.stack([ids[start : start + block] for start in starts]).to(device)
        loss = tuned(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.save_pretrained(out / "adapter")
    tuned.merge_and_unload().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cpu", action="store_true")
    print(f"loss {main(**vars(parser.parse_args())):.3f}")

"""small-gpt and nanoGPT, written again from their file formats: what the converters are held against."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

SMALL_GPT = {  # the parts of a block -> small-gpt's names
    "norm1": "ln1", "q": "attention.W_q", "k": "attention.W_k", "v": "attention.W_v", "out": "attention.out_net",
    "norm2": "ln2", "wide": "ffn.dense1", "narrow": "ffn.out_net",
}  # fmt: skip
NANOGPT = {"norm1": "ln_1", "qkv": "attn.c_attn", "out": "attn.c_proj", "norm2": "ln_2", "wide": "mlp.c_fc",
           "narrow": "mlp.c_proj"}  # fmt: skip


@dataclass
class Original:
    """A GPT as both projects compute it, on plain tensors under the names of one of them."""

    names: dict[str, str]
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    bias: bool
    state: dict[str, Tensor]

    @classmethod
    def random(cls, names: dict[str, str], bias: bool, vocab_size: int, n_layer: int = 2, n_head: int = 2,
               n_embd: int = 32, block_size: int = 32, std: float = 0.2, seed: int = 0) -> Original:  # fmt: skip
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw) * std

        state = {"transformer.wte.weight": normal(vocab_size, n_embd), "transformer.wpe.weight":
                 normal(block_size, n_embd)}  # fmt: skip
        sizes = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "qkv": (3, 1), "out": (1, 1), "wide": (4, 1), "narrow": (1, 4)}
        modules = [
            (f"transformer.h.{i}.{name}", sizes.get(part)) for i in range(n_layer) for part, name in names.items()
        ]
        for module, size in [*modules, ("transformer.ln_f", None)]:
            shape = (n_embd,) if size is None else (size[0] * n_embd, size[1] * n_embd)
            state[f"{module}.weight"] = normal(*shape) + (1 if size is None else 0)
            if bias:
                state[f"{module}.bias"] = normal(shape[0])
        state["lm_head.weight"] = state["transformer.wte.weight"]
        return cls(names, n_layer, n_head, n_embd, block_size, vocab_size, bias, state)

    def logits(self, ids: Tensor) -> Tensor:
        """(T,) -> (T, V)."""
        T, C = len(ids), self.n_embd
        D = C // self.n_head
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        x = self.state["transformer.wte.weight"][ids] + self.state["transformer.wpe.weight"][:T]
        for i in range(self.n_layer):
            here = {part: f"transformer.h.{i}.{name}" for part, name in self.names.items()}
            h = self._norm(x, here["norm1"])
            if "qkv" in here:
                q, k, v = self._linear(h, here["qkv"]).chunk(3, dim=-1)
            else:
                q, k, v = (self._linear(h, here[part]) for part in "qkv")
            heads = []
            for head in range(self.n_head):
                part = slice(head * D, (head + 1) * D)
                scores = (q[:, part] @ k[:, part].T / math.sqrt(D)).masked_fill(future, -math.inf)
                heads.append(scores.softmax(-1) @ v[:, part])
            x = x + self._linear(torch.cat(heads, dim=-1), here["out"])
            h = self._linear(self._norm(x, here["norm2"]), here["wide"])
            x = x + self._linear(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))), here["narrow"])
        return self._norm(x, "transformer.ln_f") @ self.state["lm_head.weight"].T

    def greedy(self, ids: list[int], tokens: int) -> list[int]:
        """The likeliest continuation, in the whole context each time."""
        for _ in range(tokens):
            ids = [*ids, int(self.logits(torch.tensor(ids))[-1].argmax())]
        return ids

    def _linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.state[f"{name}.weight"].T
        return y + self.state[f"{name}.bias"] if self.bias else y

    def _norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        y = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * self.state[f"{name}.weight"]
        return y + self.state[f"{name}.bias"] if self.bias else y

    def small_gpt(self, prefix: str = "", masks: bool = True) -> dict:
        """A checkpoint as small-gpt's CheckpointManager saves it."""
        state = {prefix + name: tensor.detach() for name, tensor in self.state.items()}
        for i in range(self.n_layer if masks else 0):
            mask = torch.ones(1, self.block_size, self.block_size).tril()
            state[f"{prefix}transformer.h.{i}.attention.attention.mask"] = mask
        return {"global_step": 4000, "global_epoch": 3, "block_size": self.block_size, "vocab_size": self.vocab_size,
                "n_layer": self.n_layer, "n_head": self.n_head, "n_embd": self.n_embd, "bias": self.bias,
                "dataset": "data/train.txt", "state_dict": state, "optimizer": self._optimizer()}  # fmt: skip

    def nanogpt(self, prefix: str = "", masks: bool = False) -> dict:
        """A checkpoint as nanoGPT's train.py saves it."""
        state = {prefix + name: tensor.detach() for name, tensor in self.state.items()}
        for i in range(self.n_layer if masks else 0):
            mask = torch.ones(1, 1, self.block_size, self.block_size).tril()
            state[f"{prefix}transformer.h.{i}.attn.bias"] = mask
        arguments = {"n_layer": self.n_layer, "n_head": self.n_head, "n_embd": self.n_embd,
                     "block_size": self.block_size, "bias": self.bias, "vocab_size": self.vocab_size,
                     "dropout": 0.2}  # fmt: skip
        return {"model": state, "optimizer": self._optimizer(), "model_args": arguments, "iter_num": 5000,
                "best_val_loss": torch.tensor(1.47),
                "config": {"dataset": "TH", "learning_rate": 1e-3, "device": "cuda", "compile": True}}  # fmt: skip

    def _optimizer(self) -> dict:
        parameters = [torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3))]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        sum(p.sum() for p in parameters).backward()
        optimizer.step()
        return optimizer.state_dict()


def naive_vocabulary(data: str) -> list[str]:
    """What small-gpt's dataParser computes from the text of a file."""
    dialogues = [["<sep>" if c == "\n" else c for c in dialogue] for dialogue in data.split("\n\n")]
    counts: dict[str, int] = {}
    for dialogue in dialogues:
        for token in dialogue:
            counts[token] = counts.get(token, 0) + 1
    first_three = ["<unk>", "<sep>", "<pad>"]
    ordered = sorted(counts, key=counts.__getitem__, reverse=True)  # stable: ties stay in first-seen order
    return first_three + [token for token in ordered if token not in first_three]


def chat_text(dialogues: int = 120, seed: int = 0) -> str:
    """Dialogues of three turns whose replies follow from what was said."""
    draw = random.Random(seed)
    pairs = [("你好", "你好呀"), ("吃了吗", "吃过了，你呢？"), ("今天天气怎么样", "很好，出去走走"), ("晚安", "好梦😀")]
    return "\n\n".join("\n".join([*draw.choice(pairs), draw.choice("嗯哦哈")]) for _ in range(dialogues)) + "\n"

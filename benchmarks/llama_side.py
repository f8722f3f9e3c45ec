"""llama.cpp's side of `decode_speed`: run by the interpreter that has llama-cpp-python and gguf, and nothing of ours.

    PYTHON llama_side.py WEIGHTS_DIR WORK_DIR KIND THREADS

Writes the gpt2 model of WEIGHTS_DIR as GGUF of KIND (f32, bf16, q8_0), loads it, and answers one JSON line per request:
[method, arguments...] -> result.
"""

import json
import os
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

NAMES = {  # Hugging Face's -> GGUF's; the first four layers' matrices are stored transposed (Conv1D)
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm", "ln_2": "ffn_norm",
}  # fmt: skip
WHOLE = {"wte.weight": "token_embd.weight", "wpe.weight": "position_embd.weight", "ln_f.weight": "output_norm.weight",
         "ln_f.bias": "output_norm.bias"}  # fmt: skip
TYPES = {"f32": gguf.GGMLQuantizationType.F32, "bf16": gguf.GGMLQuantizationType.BF16,
         "q8_0": gguf.GGMLQuantizationType.Q8_0}  # fmt: skip


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a float32 .safetensors file: a length, a JSON header, the bytes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[8 + length + at : 8 + length + end], np.float32).reshape(entry["shape"])
        for name, entry in header.items()
        for at, end in [entry["data_offsets"]]
    }


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor of GPT2LMHeadModel."""
    name = name.removeprefix("transformer.")
    if name in WHOLE:
        return WHOLE[name]
    _, layer, rest = name.split(".", 2)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{NAMES[module]}.{kind}"


def write_gguf(weights: Path, to: Path, kind: str) -> None:
    """Matrices in `kind`; norms, biases and positions in float32. There is no vocabulary: ids go in and come out."""
    cfg = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(to, "gpt2")
    writer.add_block_count(cfg["n_layer"])
    writer.add_context_length(cfg["n_positions"])
    writer.add_embedding_length(cfg["n_embd"])
    writer.add_feed_forward_length(cfg["n_inner"] or 4 * cfg["n_embd"])
    writer.add_head_count(cfg["n_head"])
    writer.add_layer_norm_eps(cfg["layer_norm_epsilon"])
    writer.add_vocab_size(cfg["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in read_tensors(weights / "model.safetensors").items():
        conv = ".c_" in name and tensor.ndim == 2
        tensor = np.ascontiguousarray(tensor.T if conv else tensor)
        if conv or "wte" in name:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(tensor, TYPES[kind]), raw_dtype=TYPES[kind])
        else:
            writer.add_tensor(gguf_name(name), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Side:
    """A loaded model."""

    def __init__(self, weights: Path, work: Path, kind: str, threads: int) -> None:
        at = work / f"{kind}.gguf"
        if not at.exists():
            write_gguf(weights, at, kind)
        block = json.loads((weights / "config.json").read_text(encoding="utf-8"))["n_positions"]
        self.llm = llama_cpp.Llama(str(at), n_ctx=block, n_threads=threads, n_threads_batch=threads, verbose=False)

    def logits(self, ids: list[int]) -> list[float]:
        """Of the token after `ids`, which are read one by one, as decoding does."""
        self.llm.reset()
        for id_ in ids:
            self.llm.eval([id_])
        return np.ctypeslib.as_array(self.llm._ctx.get_logits(), (self.llm.n_vocab(),)).tolist()

    def rate(self, prompt: list[int], tokens: int, temperature: float, top_k: int) -> float:
        """Tokens per second of one stream, drawn as ours are."""
        self.llm.reset()
        start = time.perf_counter()
        drawn = self.llm.generate(prompt, top_k=top_k, top_p=1.0, min_p=0.0, temp=temperature, repeat_penalty=1.0)
        for _ in range(tokens):
            next(drawn)
        return tokens / (time.perf_counter() - start)


def main() -> None:
    """Serve requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints goes to stderr
    side = Side(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    print(json.dumps(llama_cpp.__version__), file=answers, flush=True)
    for line in sys.stdin:
        method, *given = json.loads(line)
        print(json.dumps(getattr(side, method)(*given)), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""A model directory is a Hugging Face model directory: written whole or not at all, read without executing anything."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from miaobi.checksums import for_model, verifying
from miaobi.corpus.tokenizer import SPECIALS, Tokenizer
from miaobi.errors import UserError, brief, names_listed
from miaobi.files import pointed, read_json, refuse_pointers, write_json
from miaobi.model.families import check_hf, load_hf, to_hf
from miaobi.model.generation import end_ids, generation_settings
from miaobi.model.hf_config import hf_config, model_config
from miaobi.model.hub import FILE, SETTINGS, resolve
from miaobi.model.quantized import kind_of
from miaobi.model.tensors import read_tensors
from miaobi.model.transformer import Transformer


def save_model(directory: Path, model: Transformer, tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> None:
    """Write config.json, model.safetensors, tokenizer and generation_config.json into an existing directory.

    end_ids: tokens that end a text or a turn, the one that ends a document last; empty where the model saw none.
    How a tuned model is to be sampled stays as its makers said, and what begins a text, which its tokenizer knows too.
    """
    config = hf_config(model.cfg, end_ids)
    if model.generation is not None:
        config["bos_token_id"] = model.generation.get("bos_token_id")
    write_json(directory / "config.json", config)
    ends = [*(id_ for id_ in model.end_ids if id_ not in end_ids), *end_ids]  # what ended a text before still does
    generation = {"bos_token_id": config["bos_token_id"], "pad_token_id": None, "do_sample": True}
    generation |= model.generation or {}
    generation["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    if tokenizer.pad_id is not None:
        generation["pad_token_id"] = tokenizer.pad_id
    write_json(directory / "generation_config.json", generation)
    save_tensors(directory / "model.safetensors", {k: v.cpu() for k, v in to_hf(model).items()})
    tokenizer.save(directory, model_max_length=model.cfg.block_size)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, as readable as any other. Raises OSError, also for a full disk."""
    try:
        path.touch()
        mode = path.stat().st_mode & 0o777
        save_file(tensors, path, {"format": "pt"})
        path.chmod(mode)  # the library makes them 0600
    except SafetensorError as e:  # how it reports a full disk
        raise OSError(f"{path.name} was not written whole ({e})") from e


def model_directory(name: str | Path, checkpoint: str = "best") -> Path:
    """The model directory that a MODEL argument means.

    name: a run directory (its `checkpoint`: best, last or step-N), a model directory, or a hub name (`resolve`).
    Raises UserError if there is none.
    """
    path = resolve(str(name))
    if (path / "config.json").is_file():
        return path
    if (path / "checkpoints").is_dir():
        directory = pointed(path / "checkpoints" / checkpoint)
        if directory is None and checkpoint == "best":
            directory = pointed(path / "checkpoints" / "last")  # interrupted before its first evaluation
        if directory is not None:
            return directory
        names = sorted(p.name for p in (path / "checkpoints").iterdir() if not p.name.startswith("."))
        raise UserError(f"{path} has no checkpoint {checkpoint!r}; it has: {names_listed(names)}")
    if not path.exists():
        what = "file" if FILE.fullmatch(path.name) else "directory"
        raise UserError(f"no model at {path}: no such {what}. Give a run directory (out_dir of `miaobi train`), "
                        "a Hugging Face model directory, or a model of the hub as OWNER/NAME")  # fmt: skip
    if path.is_file():
        raise UserError(f"{path} is a file, not a model directory{_converter(path)}")
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{path} is a PEFT adapter, not a whole model: merge it into its base with PEFT's "
                        "merge_and_unload(), and give the directory that save_pretrained() then writes")  # fmt: skip
    inside = f"; it is inside a run: give {path.parent}" if path.name == "checkpoints" else ""
    raise UserError(f"no model at {path}: neither config.json nor checkpoints/ in it{inside}")


def ends_documents(name: str | Path, checkpoint: str = "best") -> bool:
    """Whether the model was trained on documents that end in an end-of-text token."""
    return read_json(model_directory(name, checkpoint) / "config.json").get("eos_token_id") is not None


def own_end(tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """What ends a text for a model whose configuration is silent: its tokenizer's end. A model of ours that is silent
    saw none.
    """
    ours = [tokenizer.token_to_id(token) for token in SPECIALS] == list(range(len(SPECIALS)))
    return () if ours or tokenizer.eot_id is None or tokenizer.eot_id >= vocab_size else (tokenizer.eot_id,)


class Unfilled(TorchFunctionMode):
    """Weights about to be read from a file are born without random values.

    (The `meta` device does that too, but its first operations import sympy and all of dynamo: 3 s and more.)
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load_model(name: str | Path, checkpoint: str = "best", is_verified: bool = False) -> tuple[Transformer, Tokenizer]:
    """Read a model directory (see `model_directory`) into a float32 model on the CPU, and its tokenizer.

    is_verified: its files are compared with their checksums by the caller.
    Raises UserError for files that are missing, cut short, altered, or do not fit together.
    """
    path = model_directory(name, checkpoint)
    refuse_pointers(path / file for file in SETTINGS)
    with nullcontext() if is_verified else verifying(path, for_model):
        return read_model(path)


def read_model(path: Path) -> tuple[Transformer, Tokenizer]:
    """`load_model`, of a directory whose files nobody compares with anything."""
    hf = read_json(path / "config.json")
    try:
        tensors = read_tensors(path)
        cfg = model_config(hf, tensors)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    tensors = check_hf(cfg, tensors, str(path))
    tokenizer = Tokenizer.load(path)
    check_tokenizer(tokenizer, cfg.vocab_size, path)
    with Unfilled():
        model = Transformer(cfg)
    load_hf(model, tensors)
    model.quantized = kind_of(hf)
    model.end_ids = end_ids(path, cfg.vocab_size, model.not_used) or own_end(tokenizer, cfg.vocab_size)
    model.generation = generation_settings(path, cfg.vocab_size, model.not_used)
    return model, tokenizer


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, path: Path) -> None:
    """Control tokens without a row in the embedding, such as a `[PAD]` that was added for training, are never used.

    Raises UserError where text or the chat template could turn into an id that the model does not have.
    """
    if tokenizer.vocab_size <= vocab_size:
        return
    added = tokenizer.backend.get_added_tokens_decoder()
    ids = tokenizer.backend.get_vocab(with_added_tokens=True)
    beyond = {token: id_ for token, id_ in ids.items() if id_ >= vocab_size}
    template = tokenizer.config.get("chat_template")
    for token, id_ in beyond.items():
        if id_ not in added or not added[id_].special:
            raise UserError(f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, config.json says vocab_size is "
                            f"{vocab_size}; they are not of one model")  # fmt: skip
        if template is not None and token in str(template):
            raise UserError(f"{path}: the chat template writes {brief(token)}, for which the model has no row: its "
                            "tokenizer is of another model, or grew after the embedding")  # fmt: skip
    for role in ("eot_id", "pad_id", "sep_id"):
        if (getattr(tokenizer, role) or 0) >= vocab_size:
            setattr(tokenizer, role, None)


def _converter(path: Path) -> str:
    """What to do with a checkpoint file of another project."""
    if path.suffix == ".pth":
        return f": small-gpt's are converted by `miaobi convert small-gpt {path} --corpus=TEXT`"
    if path.suffix == ".pt":
        return f": nanoGPT's are converted by `miaobi convert nanogpt {path} --meta=data/NAME/meta.pkl`"
    return "; give the directory that it lies in" if path.suffix in (".safetensors", ".bin") else ""

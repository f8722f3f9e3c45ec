"""What people see: the results of the verbs, and their help. Everything is printed on stdout."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from miaobi.console import json_text
from miaobi.errors import names_listed, number_of

if TYPE_CHECKING:
    from miaobi.seeds import Names
    from miaobi.settings import Key


def as_json(result: dict[str, Any], cfg: Any) -> None:
    """The one object of --json."""
    print(json_text(result))


def prepared(result: dict[str, Any], cfg: Any) -> None:
    """`miaobi prepare`."""
    out = result["out"]
    print(f"{out}: {number_of(result['documents'], 'document')}, {number_of(result['characters'], 'character')} "
          f"({result['distinct_characters']:,} distinct), vocabulary {result['vocab_size']:,}")  # fmt: skip
    print(f"train {number_of(result['train_tokens'], 'token')}, validation {number_of(result['val_tokens'], 'token')}, "
          f"{number_of(result['duplicates_removed'], 'duplicate')} removed, {result['seconds']:.1f} s")  # fmt: skip
    if names := [name for name in result["skipped_in"] if name not in result["refused"]]:  # those stand in the table
        bad = result["skipped"] - len(result["refused"])
        print(f"bad records or bytes left out or replaced: {bad:,}, in {names_listed(names, most=5)}")
    print(f"next: miaobi train configs/{next_config(cfg)}.yaml --data={shlex.quote(out)} --out_dir=my_run")


def next_config(cfg: Any) -> str:
    """The shipped configuration that suits what was prepared: dialogues, the seed's text, or any other."""
    if cfg.format == "dialogue":
        return "chat-13m"
    return "train_TH" if Path(cfg.out).parts[-2:] == ("data", "TH") else "demo"


def trained(result: dict[str, Any], cfg: Any) -> None:
    """`miaobi train`."""
    best = ""
    if result["best_step"]:  # not where it was interrupted before its first evaluation
        best = f", best validation loss {result['best_val_loss']:.4f} at step {result['best_step']}"
    print(f"{result['stopped']} at step {result['step']}{best}")
    checkpoints = Path(result["run"]) / "checkpoints"
    print(f"next: miaobi {trying(result['run'], checkpoints / 'best', checkpoints / 'last')}")


def planned(result: dict[str, Any], cfg: Any) -> None:
    """`miaobi plan`."""
    model, text, run, memory = (result[key] for key in ("model", "text", "run", "memory"))
    parts = ", ".join(f"{name} {n / 1e6:.2f}M" for name, n in result["parameters"].items() if name != "total")
    print(f"model: {result['parameters']['total'] / 1e6:.2f}M parameters ({model['family']}: {parts})")
    print(
        f"text: {number_of(text['train_tokens'], 'training token')} of {number_of(text['characters'], 'character')}, "
        f"vocabulary {text['vocab_size']:,}: {run['distinct_tokens_per_parameter']:.2f} tokens per parameter"
    )
    print(f"run: {number_of(run['steps'], 'step')} of {run['batch_size']} x {model['block_size']} tokens, "
          f"{run['epochs']:.1f} passes over the text")  # fmt: skip
    names = ("weights", "gradients", "optimizer", "activations", "working")
    parts = ", ".join(f"{name} {size_in_words(memory[name])}" for name in names)
    parts += f", averaged weights {size_in_words(memory['average'])}" if memory["average"] else ""
    if memory["process"]:
        parts += (
            f", fragments {size_in_words(memory['fragments'])}, Python and libraries {size_in_words(memory['process'])}"
        )
    print(
        f"memory: {size_in_words(memory['run'])} at micro-batches of {memory['micro_batch']} ({parts}; "
        f"a checkpoint being written {size_in_words(memory['checkpoint'])}, "
        f"keys and values of a sample {size_in_words(memory['kv_cache'])})"
    )
    device, largest = result["device"], memory["largest_micro_batch"]
    if largest is not None:
        fits = f"micro-batches of up to {largest} fit" if largest else "not even one sequence at once fits"
        print(f"{device['name']}, {device['dtype']}: {size_in_words(memory['free'])} can be used, {fits}")
    if "measured" in memory:
        print(f"measured: {size_in_words(memory['measured'])}")
    estimates = [duration(result["time"]["seconds"])]
    estimates += [f"{result['energy_kwh']:.2f} kWh"] if result["energy_kwh"] is not None else []
    estimates += [f"costs {result['cost']:.2f}"] if result["cost"] is not None else []
    print(f"time: {', '.join(estimates)} ({result['time']['basis']})")
    if forecast := result["forecast"]:
        from miaobi.plan.forecast import GUESSING

        points = []
        for passes, bits in forecast["curve"]:
            told = f"{bits:.2f}" if bits < GUESSING else f"more than {GUESSING:g}"
            points.append(f"{told} after {passes:,.0f}" if passes >= 100 else f"{told} after {passes:.3g}")
            if bits >= GUESSING:
                break
        print(f"forecast of the validation text: {', '.join(points)} passes (bits/char)")
        print("".join(f"  {line}\n" for line in forecast["advice"]), end="")


def size_in_words(n: int) -> str:
    """Bytes: `640 MiB`, `8.3 GiB`."""
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"


def reported(result: dict[str, Any], cfg: Any) -> None:
    """`miaobi report`."""
    for run in result["runs"]:
        print(f"{run['run']}: {run['verdict']}")
    print(f"{result['out']}: open it in a browser ({result['bytes'] / 1000:,.0f} kB, nothing is fetched)")


def print_rich(*what: Any, **settings: Any) -> None:
    """Print what rich can draw, by `print`: where the reader of a pipe has left, rich would exit with code 1."""
    from rich.console import Console

    console = Console(emoji=False, **settings)
    with console.capture() as text:
        for one in what:
            console.print(one)
    print(text.get(), end="")


def doctor(result: dict[str, Any], cfg: Any) -> None:
    """`miaobi doctor`: a line for each look, and below it what to do."""
    from rich.table import Table
    from rich.text import Text

    looks = {"ok": "green", "note": "yellow", "missing": "bold red"}
    table = Table.grid(padding=(0, 2))
    for check in result["checks"]:
        found = Text(check["found"])
        if check["remedy"]:
            found.append(f"\n-> {check['remedy']}", style="dim")
        table.add_row(Text(check["status"], style=looks[check["status"]]), Text(check["name"]), found)
    print_rich(table, highlight=False, markup=False)
    print("nothing that is needed is missing" if result["healthy"] else "what is marked missing is needed")


def public_texts(result: dict[str, Any], cfg: Any) -> None:
    """`miaobi data list`."""
    for text in result["sets"]:
        print(f"{text['name']:<15} {text['what']}\n{'':<15} license: {text['license']}")
    print("and hf:OWNER/NAME[:SPLIT], modelscope:OWNER/NAME. next: miaobi data get NAME")


def downloaded(result: dict[str, Any], cfg: Any) -> None:
    """`miaobi data get`."""
    for file in result["files"]:
        print(f"{file['path']}: {file['bytes']:,} bytes, SHA-256 {file['sha256']}")
    print(f"license: {result['license']}\nnext: {result['next']}")


def pushed(result: dict[str, Any], cfg: Any) -> None:
    """`miaobi push`."""
    for file in result["files"]:
        print(f"{file['bytes']:>14,}  {file['path']}")
    print(f"sent: {result['url']}" if result["url"] else f"nothing was sent; without --dry_run: {result['name']}")


def samples(result: dict[str, Any], cfg: Any) -> None:
    """`miaobi sample`; the speed goes to stderr."""
    from miaobi.console import log

    for completion in result["samples"]:
        print(f"{completion['text']}\n---------------")
    log(f"{result['tokens_per_second']:.0f} tokens/s")


def scores(result: dict[str, Any], cfg: Any) -> None:
    """`miaobi eval`."""
    if "genres" in result:
        suite_scores(result, cfg)
        return
    print(f"loss {result['loss']:.4f} nats/token   perplexity {result['perplexity']:.2f}   "
          f"{result['bits_per_char']:.4f} bits/char   {result['bits_per_byte']:.4f} bits/byte")  # fmt: skip
    print(f"{number_of(result['characters'], 'character')} in {number_of(result['tokens'], 'token')}, "
          f"{result['seconds']:.1f} s")  # fmt: skip


def suite_scores(result: dict[str, Any], cfg: Any) -> None:
    """`miaobi eval --suite`: a row for each genre; in brackets what people wrote there."""
    from rich.table import Table

    rows, written, people = result["genres"], result.get("written", {}), result.get("people", {})
    table = Table()
    table.add_column("genre", no_wrap=True)
    columns = {"documents": "{:,}", "characters": "{:,}", "bits_per_char": "{:.3f}", "seen": "{:,}"}
    columns = {name: how for name, how in columns.items() if any(name in row for row in rows.values())}
    drawn = {"distinct_2": "{:.3f}", "repetition": "{:.0%}", "stop_rate": "{:.0%}"} if written else {}
    for name in (*columns, *drawn):
        title = {"bits_per_char": "bits/char", "distinct_2": "distinct-2", "stop_rate": "stops"}.get(name, name)
        table.add_column(title, justify="right", no_wrap=True)
    both = [*rows, *(["all"] if "bits_per_char" in result else [])]
    for genre in both:
        row = rows.get(genre) or {"bits_per_char": result["bits_per_char"]}
        cells = [how.format(row[name]) if name in row else "" for name, how in columns.items()]
        cells += [f"{how.format(written[genre][name])} ({how.format(people[genre][name])})"
                  for name, how in drawn.items()]  # fmt: skip
        table.add_row("mean" if genre == "all" else genre, *cells)
    print_rich(table, width=None if sys.stdout.isatty() else 120, markup=False)
    if unknown := sum(row.get("unknown", 0) for row in rows.values()):
        print(f"{number_of(unknown, 'character')} the vocabulary has only <unk> for: each counts as 20.1 bits more")
    if "suite_out" in result:
        print(f"next: miaobi prepare SOURCE... --without={shlex.quote(result['suite_out'])} --out DIR")
    if "parameters" in result:
        print(f"{result['parameters'] / 1e6:.2f}M parameters, {result['seconds']:.1f} s"
              + ("; in brackets: how the documents themselves go on" if written else ""))  # fmt: skip


def ablation(result: dict[str, Any], cfg: Any) -> None:
    """`miaobi classify ablate`: the table; means over the seeds, ± standard deviation."""
    from rich.table import Table

    from miaobi.classify.ablation import FIGURES, by_cell, spread

    table = Table(title=cfg.protocol)
    for column in ("pooling", "trainable", "seeds", "accuracy", "macro-F1", "ECE", "time", "trained", "memory"):
        table.add_column(column, justify="left" if column in ("pooling", "trainable") else "right", no_wrap=True)
    for (pooling, trainable), rows in by_cell([*result.get("earlier", []), *result["rows"]]).items():
        figures = {name: spread(rows, name) for name in FIGURES}
        table.add_row(
            pooling, trainable, str(len(rows)), percent(figures["accuracy"], len(rows)),
            f"{figures['macro_f1'][0]:.4f}", f"{figures['calibration_error'][0]:.3f}", duration(figures["seconds"][0]),
            f"{figures['trained_parameters'][0]:,.0f}", f"{figures['peak_memory_mb'][0]:,.0f} MB",
        )  # fmt: skip
    for name in dict.fromkeys(row["name"] for row in result["baselines"]):
        rows = [row for row in result["baselines"] if row["name"] == name]
        table.add_row(name, "", str(len(rows)), percent(spread(rows, "accuracy"), len(rows)),
                      f"{spread(rows, 'macro_f1')[0]:.4f}", "", duration(spread(rows, "seconds")[0]))  # fmt: skip
    if result["rows"]:
        print_rich(table, width=None if sys.stdout.isatty() else 120, markup=False)


def classifier(result: dict[str, Any], cfg: Any) -> None:
    """`miaobi classify train`: the table, with what earlier commands left in out_dir; the comparison with the SVM, and
    the surest errors of the classifier that does best on its dev part.
    """
    ablation(result, cfg)
    if not result["rows"]:
        return
    versus = result.get("versus_svm", {})
    if versus.get("low") is not None:
        difference, low, high = (100 * versus[name] for name in ("difference", "low", "high"))
        print(f"minus the SVM on the same splits: {difference:+.2f} points (95% interval {low:+.2f} to {high:+.2f})")
    best = max(result["rows"], key=lambda row: row["dev_accuracy"])
    name = "{pooling}-{trainable}-{seed}".format(**best)
    if best["worst_errors"]:
        print(f"surest errors of {name}, of {len(best['worst_errors'])} in its result.json:")
    for error in best["worst_errors"][:3]:
        text = " ".join(error["text"].split())
        print(f"  {error['label']} taken for {error['predicted']} ({error['probability']:.0%}): {text[:60]}")
    print(f"next: miaobi classify predict {shlex.quote(str(result['run']))} 房间很干净，下次还来")


def percent(figure: tuple[float, float], count: int) -> str:
    """Mean ± deviation in percent."""
    return f"{figure[0]:.2%}" + (f" ± {100 * figure[1]:.2f}" if count > 1 else "")


def duration(seconds: float) -> str:
    """`12.3 s`, `26.6 min`, `1.0 h`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def converted(result: dict[str, Any], cfg: Any) -> None:
    """`miaobi convert`: a model directory."""
    print(f"{result['out']}: {result['parameters'] / 1e6:.1f}M parameters, vocabulary {result['vocab_size']:,}"
          + (f", {number_of(result['spare_rows'], 'row')} of it spare" if result["spare_rows"] else "")
          + (f", {result['loss']:.2f} nats/token on the corpus" if "loss" in result else ""))  # fmt: skip
    print(f"next: miaobi {trying(result['out'], Path(result['out']))}")


def gguf(result: dict[str, Any], cfg: Any) -> None:
    """`miaobi convert gguf`: a file."""
    print(f"{result['out']}: {result['bytes'] / 1e6:,.1f} MB, {result['parameters'] / 1e6:.1f}M parameters as "
          f"{result['quantize']}, tokenizer {result['tokenizer']}")  # fmt: skip


def quantized(result: dict[str, Any], cfg: Any) -> None:
    """`miaobi convert quantize`: a model directory."""
    before, now = result["bytes_before"], result["bytes"]
    print(f"{result['out']}: {now / 1e6:,.1f} MB of {result['dtype']}, {before / now:.1f} times smaller than before")
    print(f"next: miaobi {trying(result['out'], Path(result['out']))}")


def trying(name: str, *directories: Path) -> str:
    """The command that tries a model: a chat where one of its directories has a template for that."""
    talks = any((directory / "chat_template.jinja").is_file() for directory in directories)
    return f"{'chat' if talks else 'sample'} {shlex.quote(name)}{'' if talks else ' --start=中国'}"


# --- help --------------------------------------------------------------------------------------------------------


def overview(verbs: dict[str, str], groups: dict[str, str], group: str) -> None:
    """`miaobi --help`, or that of a verb of several kinds; plain text so that it starts fast."""
    if group:
        what = {name.split()[1]: line for name, line in verbs.items() if name.startswith(f"{group} ")}
        usage, title = f"miaobi {group} KIND ...", groups[group]
        end = f"miaobi {group} KIND --help explains its options"
    else:
        what = {name.split()[0]: groups.get(name.split()[0], line) for name, line in verbs.items()}
        usage, title = "miaobi VERB ...", "miniature Chinese GPTs, from raw text to a model that continues it"
        end = ("miaobi VERB --help explains every option; --json prints one JSON object; --debug shows tracebacks\n"
               "miaobi --completion bash (or zsh, fish, powershell) lets the shell complete all of this\n"
               "start here: miaobi demo")  # fmt: skip
    listed = "\n".join(f"  {name:<10} {line}" for name, line in what.items())
    print(f"usage: {usage}\n\n{title}\n\n{listed}\n\n{end}")


def explain(command: str, what: str, kind: type, names: Names) -> None:
    """`COMMAND --help`: every setting with its docstring, its choices and its default."""
    from rich.table import Table
    from rich.text import Text

    from miaobi.settings import keys

    settings = list(keys(kind).values())
    words = [command, *(usage(key) for key in settings if key.is_positional), "[--key=value ...]"]
    print(f"usage: {' '.join(words)}\n\n{what}\n")
    table, section = Table.grid(padding=(0, 2)), ""
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key in settings:
        if key.section != section:
            if section:
                table.add_row()
            section = key.section
            table.add_row(Text(f"{section}:", style="bold"), Text(first_line(key.owner)))
        text = Text(" ".join(docstrings(key.owner).get(key.name, "").split()))
        text.append(f" {facts(key)}", style="dim")
        table.add_row(Text(f"  {key.name.upper() if key.is_positional else '--' + key.name}"), text)
    table.add_row(Text("  --json"), Text("Print the result as one JSON object."))
    also = []
    if names.aliases:
        named = ", ".join(f"{theirs} = {ours.upper() if keys(kind)[ours].is_positional else ours}"
                         for theirs, ours in names.aliases.items())  # fmt: skip
        also.append(Text(f"\nOther names: {named}"))
    print_rich(table, *also, highlight=False)


def usage(key: Key) -> str:
    """A positional setting in a usage line."""
    is_list = typing.get_origin(key.kinds[0]) is tuple
    name = f"{key.name.upper()}{' ...' if is_list else ''}"
    return f"[{name}]" if type(None) in key.kinds else name


def facts(key: Key) -> str:
    """`[a|b|True|False; default: x]`."""
    choices = []
    for kind in key.kinds:
        choices += typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        choices += ["True", "False"] if kind is bool else ()
    if key.default is dataclasses.MISSING:
        default = "" if key.is_positional else "required"
    else:
        value = key.default() if callable(key.default) else key.default
        default = "" if value is None or value in ("", ()) else f"default: {value!r}".replace("'", "")
    listed = "; ".join(filter(None, ("|".join(choices), default)))
    return f"[{listed}]" if listed else ""


def docstrings(kind: type) -> dict[str, str]:
    """Attribute -> the docstring below it, of a class and those it inherits from."""
    import ast
    import inspect
    import itertools
    import textwrap

    docs: dict[str, str] = {}
    for part in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0].body
        for attribute, after in itertools.pairwise(body):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(attribute, ast.AnnAssign) and is_text:
                docs[attribute.target.id] = after.value.value
    return docs


def first_line(kind: type) -> str:
    """What a section is about."""
    return (kind.__doc__ or "").split("\n\n")[0].replace("\n", " ")

"""Completion of command lines in bash, zsh, fish and PowerShell.

`miaobi --completion SHELL` prints a few lines for the shell's own start-up file. At every TAB they ask
`miaobi --complete=WORD WORDS...`: what can WORD, behind WORDS, become? The answer is of the same dataclasses that the
parser reads, so nothing is written down twice and nothing goes out of date.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from miaobi.errors import UserError, brief
from miaobi.seeds import Names
from miaobi.settings import Key, keys

SCRIPTS = {
    # Needs no bash-completion, and runs in macOS's bash 3.2. For bash = and : are borders of words; it cuts its own.
    "bash": r"""
_miaobi() {
    local IFS=$' \t\n' line="${COMP_LINE:0:COMP_POINT}" words word current="" candidate
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] || { word=$((${#words[@]} - 1)); current=${words[word]}; unset "words[$word]"; }
    local border="" rest=${current##*[=:]}
    [[ $COMP_WORDBREAKS == *=* ]] && border=${current%"$rest"}
    COMPREPLY=()
    while IFS= read -r candidate; do
        candidate=${candidate#"$border"}
        COMPREPLY+=("${candidate// /\\ }")
    done < <(miaobi "--complete=$current" "${words[@]:1}" 2>/dev/null)
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=/] ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -F _miaobi miaobi
""",
    "zsh": r"""
_miaobi() {
    local -a found
    found=("${(@f)$(miaobi "--complete=${(Q)PREFIX}" "${(@Q)words[2,CURRENT-1]}" 2>/dev/null)}")
    compadd -S '' -- ${(M)found:#*[=/]}
    compadd -- ${found:#*[=/]}
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _miaobi miaobi
""",
    "fish": r"""
complete -c miaobi -f -a '(miaobi "--complete="(commandline -ct) (commandline -opc)[2..] 2>/dev/null)'
""",
    "powershell": r"""
Register-ArgumentCompleter -Native -CommandName miaobi -ScriptBlock {
    param($word, $line, $position)
    $words = @($line.CommandElements | Where-Object { $_.Extent.EndOffset -lt $position } | ForEach-Object { "$_" })
    miaobi "--complete=$word" @($words | Select-Object -Skip 1) 2>$null | ForEach-Object {
        $text = if ($_ -match '[^\w./\\:=~-]') { "'" + $_.Replace("'", "''") + "'" } else { $_ }
        [System.Management.Automation.CompletionResult]::new($text, $_, 'ParameterValue', $_)
    }
}
""",
}
WHERE = {
    "bash": 'eval "$(miaobi --completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(miaobi --completion zsh)" in ~/.zshrc',
    "fish": "miaobi --completion fish | source in ~/.config/fish/config.fish",
    "powershell": "miaobi --completion powershell | Out-String | Invoke-Expression in $PROFILE",
}


def answer(args: list[str], verbs: Mapping[str, Any], imported: Callable[[str], Any]) -> str:
    """What `--completion SHELL` and `--complete=WORD WORDS...` print.

    verbs: those of cli.py by their names; imported: its function that turns MODULE:NAME into what that names.
    Raises UserError for a shell that is not known.
    """
    first, *rest = args
    if first == "--completion":
        return script(rest)
    word = first.partition("=")[2]
    verb = next((name for name in verbs if rest[: len(name.split())] == name.split()), None)
    if verb is None:
        found = verb_words(rest, list(verbs))
    else:
        kind, names = imported(verbs[verb].settings), imported(f"seeds:{verbs[verb].names}")
        found = in_verb(word, rest[len(verb.split()) :], keys(kind), names, bool(verbs[verb].load))
    return "".join(f"{candidate}\n" for candidate in dict.fromkeys(found) if candidate.startswith(word))


def script(shells: list[str]) -> str:
    """What a shell's start-up file reads. Raises UserError for a shell that is not known."""
    if len(shells) != 1 or shells[0] not in SCRIPTS:
        wrong = f"does not know {brief(shells[0])}" if shells else "needs the name of a shell"
        raise UserError(f"--completion {wrong}; it knows {', '.join(SCRIPTS)}. For bash: {WHERE['bash']}")
    return f"# {WHERE[shells[0]]}{SCRIPTS[shells[0]]}"


def verb_words(before: list[str], verbs: list[str]) -> list[str]:
    """The words of verbs that can stand behind `before`."""
    if before == ["--completion"]:
        return list(SCRIPTS)
    begun = [verb.split() for verb in verbs if verb.split()[: len(before)] == before]
    return [words[len(before)] for words in begun] + ([] if before else ["--help", "--version", "--completion"])


def in_verb(word: str, before: list[str], known: Mapping[str, Key], names: Names, takes_config: bool) -> Iterable[str]:
    """Settings, their values, and the files and directories that words without -- name."""

    def setting(typed: str) -> Key | None:
        name = typed.removeprefix("--").replace("-", "_")
        return known.get(names.aliases.get(name, name))

    typed, equals, _ = word.partition("=")
    if word.startswith("--") and equals:
        key = setting(typed)
        return [f"{typed}={value}" for value in values(key, word[len(typed) + 1 :])] if key else []
    if word.startswith("-"):
        switches = [f"--{name}" for name, key in known.items() if bool in key.kinds]
        others = [f"--{name}=" for name, key in known.items() if bool not in key.kinds]
        return [*others, *switches, "--json", "--help"]
    last = before[-1] if before else ""
    if last.startswith("--") and "=" not in last and (key := setting(last)) and bool not in key.kinds:
        return values(key, word)
    if takes_config:
        return places(word, ".yaml")
    return [value for key in known.values() if key.is_positional for value in values(key, word)]


def values(key: Key, typed: str) -> list[str]:
    """What can be written behind `--key=`: the choices, or what `typed` begins the name of."""
    inner = [kind for outer in key.kinds for kind in (outer, *typing.get_args(outer))]
    inner += [part for kind in inner for part in typing.get_args(kind)]  # tuple[Location, ...]
    found = [value for kind in inner if typing.get_origin(kind) is Literal for value in typing.get_args(kind)]
    return found + (["True", "False"] if bool in inner else []) + (list(places(typed)) if Path in inner else [])


def places(typed: str, ending: str = "") -> Iterator[str]:
    """Files, and directories with / behind them, whose names begin with `typed`; hidden ones where it has the dot."""
    folder, _, begun = typed.rpartition("/")
    try:
        entries = sorted(os.scandir(os.path.expanduser(folder) or ("/" if typed.startswith("/") else ".")),
                         key=lambda entry: entry.name)  # fmt: skip
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(begun) and entry.name.startswith(".") == begun.startswith("."):
            if entry.is_dir():
                yield f"{typed[: len(typed) - len(begun)]}{entry.name}/"
            elif entry.name.endswith(ending):
                yield typed[: len(typed) - len(begun)] + entry.name

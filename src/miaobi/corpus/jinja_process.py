"""Renders chat templates in a process of its own, with a bound on its time and memory.

Jinja's sandbox keeps a template from reaching anything, but not from counting to a trillion or writing ten gigabytes.
Run as a script, this file is that process: it imports nothing but Jinja, and reads and writes JSON lines.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
from datetime import datetime
from typing import Any

SECONDS = 5.0
"""Of processor time for one dialogue."""
MEMORY = 512 << 20
"""Bytes that the process may have in all."""
MAX_CHARACTERS = 32 << 20


def _tojson(value: object, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:  # as HF's
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> Any:
    """As transformers compiles a template: sandboxed, blocks trimmed. Raises jinja2.TemplateError."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which only marks the assistant's words."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own spelling

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment.from_string(source)


def answer(source: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    """{"texts": one for each of the calls' variables}, or {"invalid": why} or {"failed": why}."""
    try:
        template = compiled(source)
    except Exception as error:  # the parser meets deep nesting, long numbers and more
        return {"invalid": f"{error or type(error).__name__}"[:500]}
    texts = []
    for values in calls:
        try:
            text = template.render(**values)
        except MemoryError:
            return {"failed": f"it needs more than {MEMORY >> 20} MiB"}
        except Exception as error:  # a template is a program of its own and may fail in any way
            return {"failed": f"{error or type(error).__name__}"[:500]}
        if len(text) > MAX_CHARACTERS:
            return {"failed": f"it writes more than {MAX_CHARACTERS:,} characters"}
        texts.append(text)
    return {"texts": texts}


def main() -> None:
    """Answers requests until there are no more; the system ends the process where one takes too long."""
    sys.path.append(sys.argv[1])  # where Jinja is
    if sys.platform != "win32":
        import resource

        with contextlib.suppress(ValueError, OSError):  # macOS refuses less than what a process has mapped already
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        request = json.loads(line)
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            reply = json.dumps(answer(request["source"], request["calls"]))
        except MemoryError:
            reply = json.dumps({"failed": f"it needs more than {MEMORY >> 20} MiB"})
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()

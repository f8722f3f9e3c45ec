"""Jinja source and variables -> text, whatever the template does: what may be hostile runs in a process of its own."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from miaobi.corpus import jinja_process
from miaobi.errors import UserError

WALL_SECONDS = 120.0
"""After so long a process that still runs is ended, where the system does not count its processor time."""


def check(source: str) -> None:
    """Raises UserError when `source` is not a Jinja template."""
    render(source, [], is_ours=False)


def render(source: str, calls: list[dict[str, Any]], is_ours: bool) -> list[str]:
    """The text of a template for each of some sets of variables.

    Args:
        is_ours: the template is our own and needs no guard.

    Raises:
        UserError: not a template; it fails; or it takes more than `jinja_process` allows.
    """
    reply = jinja_process.answer(source, calls) if is_ours else _process.ask(source, calls)
    if "invalid" in reply:
        raise UserError(f"the chat template is not valid Jinja ({reply['invalid']}); replace chat_template.jinja")
    if "failed" in reply:
        raise UserError(f"the chat template fails to render this dialogue: {reply['failed']}. Check the order of the "
                        "roles, or replace chat_template.jinja in the model directory")  # fmt: skip
    return reply["texts"]


class _Process:
    """The process of this process; started when first needed, and again when a template has ended it."""

    def __init__(self) -> None:
        self._lock, self._child, self._owner = threading.Lock(), None, 0

    def ask(self, source: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        """See `jinja_process.answer`."""
        request = json.dumps({"source": source, "calls": calls}) + "\n"
        with self._lock:
            if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
                self._start()
            child = self._child
            timer = threading.Timer(WALL_SECONDS, child.kill) if sys.platform == "win32" else None
            if timer is not None:
                timer.start()
            try:
                child.stdin.write(request)
                child.stdin.flush()
                line = child.stdout.readline()
            except (BrokenPipeError, OSError):
                line = ""
            finally:
                if timer is not None:
                    timer.cancel()
            if not line.endswith("\n"):
                self.close()
                return {"failed": f"it takes more than {jinja_process.SECONDS:.0f} seconds, or too much memory"}
        return json.loads(line)

    def _start(self) -> None:
        import subprocess  # our own templates need no process

        self._child, self._owner = None, os.getpid()
        jinja = Path(importlib.util.find_spec("jinja2").origin).parents[1]
        command = [sys.executable, "-I", jinja_process.__file__, str(jinja)]  # isolated: no file of ours hides another
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",
        )

    def close(self) -> None:
        """End the process, if it is this one's."""
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            child.wait()
            child.stdin.close()
            child.stdout.close()


_process = _Process()
atexit.register(_process.close)
if hasattr(os, "register_at_fork"):  # a forked worker may not use its parent's pipes, nor a lock that was held
    os.register_at_fork(after_in_child=_process.__init__)

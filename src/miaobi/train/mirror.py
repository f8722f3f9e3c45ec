"""Copies of a run's checkpoints in other storage, through fsspec: a directory, s3://, oss://, hdfs:// and more."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

import fsspec

from miaobi.console import log, warn
from miaobi.errors import UserError
from miaobi.files import point, pointed, written_whole

NAMES = ("best", "last")
STEP = "step-[0-9]+"


class Mirror:
    """Storage that holds what `checkpoints/` holds: step-N directories, and two small files that name one each.

    Object stores cannot rename: a checkpoint counts from the moment that `last` names it, and that is written last.
    A step that is written again, or anew by another run, is not named while it is replaced.
    """

    def __init__(self, url: str) -> None:
        """Raises UserError for a protocol that fsspec does not know, or whose package is missing."""
        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as e:
            raise UserError(f"mirror {url} cannot be used ({e}); install the package that speaks it, such as s3fs for "
                            "s3:// or ossfs for oss://") from e  # fmt: skip
        self.url = url

    def push(self, checkpoints: Path) -> None:
        """Bring the storage to what the local directory `best` and `last` name; failing costs a warning."""
        named = {name: path.name for name in NAMES if (path := pointed(checkpoints / name))}
        try:
            self.files.makedirs(self.root, exist_ok=True)
            known = {posixpath.basename(path.rstrip("/")) for path in self.files.ls(self.root, detail=False)}
            there = {name: step for name in NAMES if name in known and (step := self._read(name))}
            whole = {step for step in set(there.values()) & set(named.values()) if self._is_copy(checkpoints / step)}
            for step in sorted(set(named.values()) - whole):
                for name in (name for name, other in there.items() if other == step):
                    self.files.rm_file(self._at(name))
                self.files.put(f"{checkpoints / step}/", f"{self._at(step)}/", recursive=True)
            for name, step in named.items():
                self.files.pipe_file(self._at(name), step.encode())
            for step in known:
                if re.fullmatch(STEP, step) and not (checkpoints / step).is_dir():
                    self.files.rm(self._at(step), recursive=True)
        except Exception as e:  # every protocol has errors of its own
            warn(f"the checkpoint could not be copied to {self.url} ({e}); training goes on, {checkpoints} has it")

    def pull(self, checkpoints: Path) -> None:
        """Fetch what `last` and `best` name into a run that has no checkpoint yet; nothing there is no error.

        Raises UserError for storage that cannot be read.
        """
        try:
            named = {name: self._read(name) for name in reversed(NAMES)}
            for step in sorted({step for step in named.values() if step}):
                log(f"fetching {step} from {self.url}")
                with written_whole(checkpoints / step) as aside:
                    self.files.get(f"{self._at(step)}/", f"{aside}/", recursive=True)
        except OSError as e:
            raise UserError(
                f"mirror {self.url} cannot be read ({e}); is it reachable, and are the rights there?"
            ) from e
        for name, step in named.items():
            if step:
                point(checkpoints / name, step)

    def forget(self) -> None:
        """Let no name stand for a checkpoint: the run begins anew, and must not go on from what an older one left.

        Raises UserError for storage that cannot be written.
        """
        try:
            for name in NAMES:
                if self.files.exists(self._at(name)):
                    self.files.rm_file(self._at(name))
        except OSError as e:
            raise UserError(
                f"mirror {self.url} cannot be begun anew ({e}); is it reachable, and are the rights there?"
            ) from e

    def _at(self, name: str) -> str:
        return posixpath.join(self.root, name)

    def _read(self, name: str) -> str | None:
        """The step that `best` or `last` names. Raises UserError for anything else in there, such as a path."""
        if not self.files.exists(self._at(name)):
            return None
        step = self.files.cat_file(self._at(name)).decode(errors="replace").strip()
        if not re.fullmatch(STEP, step):
            raise UserError(f"{name} in {self.url} names {step[:40]!r}, which is no checkpoint; write step-N there, "
                            "or remove that file")  # fmt: skip
        return step

    def _is_copy(self, step: Path) -> bool:
        """Whether the storage's directory of that name is a copy of `step`; no two savings have the same counters."""
        counters = "train_state/progress.json"
        far = self._at(f"{step.name}/{counters}")
        return self.files.exists(far) and self.files.cat_file(far) == (step / counters).read_bytes()

"""Copies of a run's checkpoints in other storage, through fsspec: a directory, s3://, oss://, hdfs:// and more."""

from __future__ import annotations

import contextlib
import json
import posixpath
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from uuid import uuid4

import fsspec

from miaobi.console import log, warn
from miaobi.errors import UserError
from miaobi.files import is_running, point, pointed, write_text, written_whole
from miaobi.lock import Holder, beating, beats, held, read_holder, this_process

NAMES = ("best", "last")
STEP = "step-(0|[1-9][0-9]{0,17})"
BEAT, SILENCE = 20.0, 60.0  # seconds, as in lock.py; every beat is a request that may cost money
SMALL = 1 << 20  # bytes of a small file; a larger one is none of ours


class Mirror:
    """Storage with a copy of `checkpoints/`: step-N directories, and the small files `last` and `best` that name one
    each; and of the run itself: config.yaml, its id (`run`), and the process that writes there (`writer.json`).

    Object stores cannot rename: a checkpoint counts from the moment that `last` names it, which is written last. A step
    that is written again, or by another run, is not named while it is replaced.
    """

    def __init__(self, url: str) -> None:
        """Raises UserError for a protocol that fsspec does not know, or whose package is missing."""
        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
        except Exception as e:  # every protocol has errors of its own
            raise UserError(f"mirror {url} cannot be used ({e}); install the package that speaks it, such as s3fs for "
                            "s3:// or ossfs for oss://") from e  # fmt: skip
        self.url = url

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the storage during the body. The holder renews it; a lock that is no longer renewed (its
        machine is lost) is taken over.

        Raises UserError naming the holder, or for storage that cannot be written.
        """
        mine = this_process()
        with self.explained("written"):
            other = self._holder()
            if other is not None and other.token:
                if (other.machine, other.host) == (mine.machine, mine.host):
                    lives = other.pid != mine.pid and is_running(other.pid)
                else:
                    lives = beats(lambda: self._small("writer.json"), other, SILENCE)
                if lives:
                    raise held(f"the mirror {self.url}", other, "give every run a --mirror of its own, or wait for it")
            self.files.makedirs(self.root, exist_ok=True)

        def beat() -> None:
            sign = replace(mine, token=uuid4().hex)
            self.files.pipe_file(self._at("writer.json"), json.dumps(asdict(sign)).encode())

        with self.explained("written"):
            beat()
        with beating(beat, BEAT):
            yield
        with contextlib.suppress(Exception):
            self.files.rm_file(self._at("writer.json"))

    def push(self, run: Path, name: str) -> None:
        """Copy the checkpoints that `best` and `last` of a run directory name; an error is only a warning.

        name: id of the run (`Progress.run`).
        """
        checkpoints = run / "checkpoints"
        named = {name: path.name for name in NAMES if (path := pointed(checkpoints / name))}
        try:
            self.files.makedirs(self.root, exist_ok=True)
            known = {posixpath.basename(path.rstrip("/")) for path in self.files.ls(self.root, detail=False)}
            present = {name: step for name in NAMES if name in known and (step := self._read(name))}
            whole = {step for step in set(present.values()) & set(named.values()) if self._is_copy(checkpoints / step)}
            for step in sorted(set(named.values()) - whole):
                for link in (link for link, other in present.items() if other == step):
                    self.files.rm_file(self._at(link))
                self.files.put(f"{checkpoints / step}/", f"{self._at(step)}/", recursive=True)
            self.files.pipe_file(self._at("config.yaml"), (run / "config.yaml").read_bytes())
            self.files.pipe_file(self._at("run"), name.encode())
            for link, step in named.items():
                self.files.pipe_file(self._at(link), step.encode())
            for step in known:
                if re.fullmatch(STEP, step) and not (checkpoints / step).is_dir():
                    self.files.rm(self._at(step), recursive=True)
        except Exception as e:  # every protocol has errors of its own
            warn(f"the checkpoint could not be copied to {self.url} ({e}); training goes on, {checkpoints} has it")

    def pull(self, run: Path, check: Callable[[Path], None]) -> None:
        """Fetch the checkpoints that `last` and `best` name, and the configuration, into a run directory that has no
        checkpoint; an empty storage is no error.

        check: called with the configuration file before anything is fetched; raises UserError if it is of another run.
        Raises UserError for storage that cannot be read.
        """
        checkpoints = run / "checkpoints"
        with self.explained("read"), tempfile.TemporaryDirectory() as folder:
            named = {name: self._read(name) for name in reversed(NAMES)}
            config = self.saved_config(Path(folder))
            if config is not None:
                check(config)
                saved = config.read_text(encoding="utf-8")
            for step in sorted({step for step in named.values() if step}):
                checkpoints.mkdir(parents=True, exist_ok=True)
                size, free = self.files.du(self._at(step)), shutil.disk_usage(checkpoints).free
                if size > free:
                    raise UserError(f"{step} in the mirror {self.url} has {size:,} bytes, and the disk of {run} has "
                                    f"{free:,} left; free some space")  # fmt: skip
                log(f"fetching {step} from {self.url}")
                with written_whole(checkpoints / step) as directory:
                    self.files.get(f"{self._at(step)}/", f"{directory}/", recursive=True)
        for name, step in named.items():
            if step:
                point(checkpoints / name, step)
        if config is not None:
            write_text(run / "config.yaml", saved)

    def saved_config(self, folder: Path) -> Path | None:
        """The configuration of the run in the storage, as a file in `folder`; None if there is none.

        Raises UserError for storage that cannot be read.
        """
        with self.explained("read"):
            text = self._small("config.yaml") if self._read("last") else None
        if text is not None:
            (folder / "config.yaml").write_text(text, encoding="utf-8")
        return folder / "config.yaml" if text is not None else None

    def refuse_other(self, name: str) -> None:
        """Raise UserError if the storage holds checkpoints of a run with another id."""
        with self.explained("read"):
            other = self._small("run") if self._read("last") else None
        if other is not None and other != name:
            raise UserError(f"the mirror {self.url} holds the checkpoints of another run; give every run a --mirror of "
                            "its own, or empty that one")  # fmt: skip

    def forget(self) -> None:
        """Remove `last` and `best`: the run starts over, and must not continue from an older one.

        Raises UserError for storage that cannot be written.
        """
        with self.explained("cleared"):
            for name in NAMES:
                if self.files.exists(self._at(name)):
                    self.files.rm_file(self._at(name))

    @contextmanager
    def explained(self, verb: str) -> Iterator[None]:
        """Turn errors of the storage into a UserError: every protocol has its own."""
        try:
            yield
        except UserError:
            raise
        except Exception as e:
            raise UserError(f"mirror {self.url} cannot be {verb} ({e}); is it reachable, and is access allowed?") from e

    def _at(self, name: str) -> str:
        return posixpath.join(self.root, name)

    def _small(self, name: str) -> str | None:
        """The text of a small file; None if there is none."""
        if not self.files.isfile(self._at(name)):
            return None
        return self.files.cat_file(self._at(name), start=0, end=SMALL).decode(errors="replace")

    def _holder(self) -> Holder | None:
        """The process that holds the lock."""
        text = self._small("writer.json")
        if text is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            (file := Path(folder) / "writer.json").write_text(text, encoding="utf-8")
            return read_holder(file)

    def _read(self, name: str) -> str | None:
        """The step that `best` or `last` names. Raises UserError for any other content, such as a path."""
        if (text := self._small(name)) is None:
            return None
        step = text.strip()
        if not re.fullmatch(STEP, step):
            raise UserError(f"{name} in {self.url} names {step[:40]!r}, which is no checkpoint; write step-N there, "
                            "or remove that file")  # fmt: skip
        return step

    def _is_copy(self, step: Path) -> bool:
        """Whether the storage's directory of that name is a copy of `step`; no two checkpoints have the same
        progress.json.
        """
        counters = "train_state/progress.json"
        far, own = self._at(f"{step.name}/{counters}"), (step / counters).read_bytes()
        return self.files.isfile(far) and self.files.cat_file(far, start=0, end=len(own) + 1) == own

"""Who works on the tasks of `survey` and `encode`: this process, worker processes, or a Ray cluster.

Results come back in the order of the tasks, so it makes no difference to them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pickle
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from miaobi import console
from miaobi.corpus.blocks import Block
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.sources import Source
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError, number_of

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

SMALL_INPUT_BYTES = 4 << 20
"""Below this, starting worker processes takes longer than the work."""
REACH_SECONDS = 5
"""For the head of a Ray cluster to answer."""
_RAY_PATIENCE = {"RAY_NUM_REDIS_GET_RETRIES": "1", "RAY_py_gcs_connect_timeout_s": str(REACH_SECONDS)}
"""Where something answers that is not Ray; with its defaults it tries for minutes."""

Run = Callable[[Callable, Iterable[tuple]], Iterator[tuple[tuple[Block, ...], Any]]]
"""run(function, tasks): (blocks, function(tokenizer, blocks, *others)) for each task (blocks, *others), in order."""

_tokenizer: Tokenizer | None = None
"""The worker processes' copy."""


def workers_for(files: list[Source], cfg: PrepareConfig) -> Workers:
    """As many as the settings, the input and the machines suggest. Raises UserError where Ray cannot be reached."""
    if cfg.backend == "ray":
        cpus = connect_ray()
        workers = Workers(min(cfg.workers or cpus, cpus), "ray")
        console.log(f"{number_of(workers.count, 'worker')} on the Ray cluster, which has {cpus} CPUs")
        return workers
    size = sum(file.size * (4 if file.compression else 1) for file in files)
    if size < SMALL_INPUT_BYTES:
        return Workers(1)
    if cfg.workers:
        return Workers(cfg.workers)
    return Workers(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@dataclass(frozen=True)
class Workers:
    """How many, and where."""

    count: int
    backend: str = "processes"

    @contextlib.contextmanager
    def started(self, tokenizer: Tokenizer | None = None) -> Iterator[Run]:
        """The workers, each with the tokenizer, for as long as the context lasts.

        At most four tasks per worker are under way or waiting, which bounds the memory. Raises UserError for a worker
        that is lost.
        """
        _keep_memory()
        if self.count == 1:
            yield partial(_run_here, tokenizer)
        elif self.backend == "ray":
            with _ray(self.count, tokenizer) as run:
                yield run
        else:
            import multiprocessing
            from concurrent.futures import ProcessPoolExecutor
            from concurrent.futures.process import BrokenProcessPool

            # fork shares the loaded libraries; macOS has it too, but Apple's libraries break after it.
            has_fork = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
            context = multiprocessing.get_context("fork" if has_fork else "spawn")
            pool = ProcessPoolExecutor(self.count, context, _start_process, (tokenizer,))
            try:
                with _interrupts_held():
                    pool.submit(int)  # starts them
                yield partial(_run_in_processes, pool, 2 * self.count)
            except BrokenProcessPool as error:
                raise UserError(
                    "a worker process was killed, most likely because memory ran out; try --workers=1"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started meanwhile hold Ctrl-C back for good, as they inherit the mask."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_process(tokenizer: Tokenizer | None) -> None:
    """Ctrl-C is the main process's: a worker that it met in the middle of a result would leave half of one in the pipe,
    which is read for ever. And a worker whose main process was killed ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_main, daemon=True).start()
    _start_worker(tokenizer)


def _end_with_main() -> None:
    from multiprocessing import parent_process

    parent_process().join()
    os._exit(1)


def _start_worker(tokenizer: Tokenizer | None) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    _keep_memory()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker is one core


def _keep_memory() -> None:
    """glibc keeps freed memory for the next time up to the size of the largest block freed so far, at most 32 MiB.

    Otherwise each string and array of some megabytes is new pages, which the kernel clears: 170,000 page faults and a
    quarter of the time for 200 MB of text. Harmless elsewhere.
    """
    bytes(31 << 20)


def _call(function: Callable, task: tuple) -> Any:
    return function(_tokenizer, *task)


def _run_here(tokenizer: Tokenizer | None, function: Callable, tasks: Iterable[tuple]) -> Iterator[tuple]:
    for task in tasks:
        yield task[0], function(tokenizer, *task)


def _run_in_processes(
    pool: ProcessPoolExecutor, ahead: int, function: Callable, tasks: Iterable[tuple]
) -> Iterator[tuple]:
    waiting: deque = deque()
    for task in tasks:
        waiting.append((task[0], pool.submit(_call, function, task)))
        if len(waiting) > ahead:
            blocks, future = waiting.popleft()
            yield blocks, future.result()
    while waiting:
        blocks, future = waiting.popleft()
        yield blocks, future.result()


# Ray


def connect_ray() -> int:
    """Joins the Ray cluster of RAY_ADDRESS, or the one this machine is part of. Returns its CPUs.

    Raises UserError without the `ray` extra, and within half a minute where there is no cluster.
    """
    for setting, value in _RAY_PATIENCE.items():
        os.environ.setdefault(setting, value)  # read when ray is imported
    try:
        import joblib  # noqa: F401
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise UserError("--backend=ray needs Ray on every machine: pip install 'miaobi[ray]'") from error
    address = os.environ.get("RAY_ADDRESS") or "auto"
    if not ray.is_initialized():
        try:
            if address != "auto":
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), REACH_SECONDS).close()
            ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise UserError(
                f"no Ray cluster can be joined at RAY_ADDRESS={address} ({_lines(error)[0]}). On the first "
                "machine run `ray start --head --port=6379`, on the others `ray start --address=FIRST:6379`, and this "
                "command on any of them"
            ) from error
    register_ray()
    return int(ray.cluster_resources().get("CPU", 0)) or 1


def _lines(error: BaseException) -> list[str]:
    """What it says; Ray's errors carry remote tracebacks, whose last line tells."""
    return str(error).strip().splitlines() or [type(error).__name__]


@contextlib.contextmanager
def _ray(count: int, tokenizer: Tokenizer | None) -> Iterator[Run]:
    from concurrent.futures import ThreadPoolExecutor

    import joblib
    from ray.exceptions import RayError

    try:
        with (
            joblib.Parallel(
                count, "ray", batch_size=1, pre_dispatch="all", initializer=_start_worker, initargs=(tokenizer,)
            ) as parallel,
            ThreadPoolExecutor(1) as ahead,
        ):
            yield partial(_run_on_ray, parallel, ahead, 2 * count)
    except RayError as error:
        raise UserError(
            f"a Ray worker was lost ({_lines(error)[-1]}). Every machine of the cluster needs the "
            "same miaobi and enough memory; `ray status` lists them. Then run the command again"
        ) from error


def _run_on_ray(
    parallel: Any, ahead: ThreadPoolExecutor, window: int, function: Callable, tasks: Iterable[tuple]
) -> Iterator[tuple]:
    """joblib has no generator of results on Ray: one window of tasks is worked on while the last one's are used."""
    tasks, done = iter(tasks), None
    while done is None or done[0]:
        under_way = tuple(itertools.islice(tasks, window))
        results = ahead.submit(_work_on_ray, parallel, function, under_way)
        if done is not None:
            for task, result in zip(done[0], done[1].result(), strict=True):
                yield task[0], pickle.loads(result)
        done = under_way, results


def _work_on_ray(parallel: Any, function: Callable, tasks: tuple[tuple, ...]) -> list[bytes]:
    import joblib

    return parallel(joblib.delayed(_call_on_ray)(function, (_with_full_paths(t[0]), *t[1:])) for t in tasks)


def _with_full_paths(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    """A worker's current directory is another."""
    return tuple(
        dataclasses.replace(block, source=dataclasses.replace(block.source, path=block.source.path.absolute()))
        for block in blocks
    )


def _call_on_ray(function: Callable, task: tuple) -> bytes:
    """The result, pickled: arrays that Ray hands over are windows into its store and would keep all of it occupied."""
    try:
        return pickle.dumps(_call(function, task))
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} is not on the Ray worker {socket.gethostname()}; put the sources on a disk that all "
            "machines of the cluster see under the same path"
        ) from error

"""How a job passes from the worker's thread to the request's."""

import asyncio
import threading
from types import SimpleNamespace

from miaobi.serve import worker
from miaobi.serve.text import Piece
from miaobi.serve.worker import Job


def piece(number: int) -> Piece:
    return Piece(0, str(number), [], None)


def test_a_reader_is_woken_only_where_it_waits(monkeypatch):
    """Waking it costs a system call of the worker and a turn of the loop, on the cores that the model needs."""
    monkeypatch.setattr(worker, "PACE", 0.01)

    async def read() -> list[str]:
        loop, found = asyncio.get_running_loop(), []
        job = Job([], 10.0, loop=SimpleNamespace(call_soon_threadsafe=lambda call: (woken.append(call), call())))
        for number in range(3):
            job.pieces.append(piece(number))
            job.ring()
        async for some in job.taken():
            found += [one.text for one in some]
            if len(found) < 9:  # while these are sent
                for number in range(len(found), len(found) + 3):
                    job.pieces.append(piece(number))
                    job.ring()
            elif len(found) == 9:
                loop.call_later(0.2, lambda: (job.pieces.append(piece(9)), job.ring()))  # when it waits
            else:
                counts.append(len(woken))
                job.finish()
        return found

    woken, counts = [], []
    assert asyncio.run(read()) == [str(number) for number in range(10)]
    assert counts == [1]


def test_the_end_of_a_text_is_told_at_once(monkeypatch):
    """However long a stream pauses between what it sends."""
    monkeypatch.setattr(worker, "PACE", 60.0)

    async def read() -> list[str]:
        job, found = Job([], 10.0), []
        job.pieces.append(piece(0))
        async for some in job.taken():
            found += [one.text for one in some]
            if len(found) == 1:
                threading.Timer(0.05, lambda: (job.pieces.append(piece(1)), job.finish())).start()
        return found

    assert asyncio.run(asyncio.wait_for(read(), 10)) == ["0", "1"]


def test_nothing_is_lost_between_two_threads():
    async def read() -> list[str]:
        job, found = Job([], 10.0), []

        def write() -> None:
            for number in range(3000):
                job.pieces.append(piece(number))
                job.ring()
            job.finish()

        writing = threading.Thread(target=write)
        writing.start()
        async for some in job.taken():
            found += [one.text for one in some]
            await asyncio.sleep(0)
        writing.join()
        return found

    assert asyncio.run(asyncio.wait_for(read(), 10)) == [str(number) for number in range(3000)]

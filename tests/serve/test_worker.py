"""How a job passes from the worker's thread to the request's."""

import asyncio
import threading
from types import SimpleNamespace

from miaobi.serve.text import Piece
from miaobi.serve.worker import Job


def piece(number: int) -> Piece:
    return Piece(0, str(number), [], None)


def test_a_reader_is_woken_only_where_it_waits():
    """Waking it costs a system call of the worker and a turn of the loop, on the cores that the model needs."""

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
                loop.call_soon(lambda: (job.pieces.append(piece(9)), job.ring()))  # when it waits
            else:
                job.finish()
        return found

    woken = []
    assert asyncio.run(read()) == [str(number) for number in range(10)]
    assert len(woken) == 2, "once before it first took something, once while it waited"


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

"""`miaobi serve`: bind, load, answer until stopped."""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from miaobi.console import log
from miaobi.errors import UserError
from miaobi.released import released
from miaobi.serve.config import Serve
from miaobi.settings import Origin

HEADER_SECONDS = 15.0  # in which the head of a request must have come
GRACE = 30  # seconds that streams have to end in


def serve(cfg: Serve, origin: Origin) -> None:
    """`miaobi serve`. Raises UserError for models that cannot be read and ports that are taken."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ImportError as e:
        raise UserError(f"miaobi serve needs {e.name}: pip install 'miaobi[serve]'") from e
    from miaobi.serve.app import make_app

    cfg = with_models(cfg)
    check(cfg)
    listening = bind(cfg.host, cfg.port)
    stopping = threading.Event()
    app = make_app(cfg, is_stopping=stopping.is_set)
    config = uvicorn.Config(app, http=protocol(), ws="none", lifespan="off", log_level="warning", access_log=False,
                            server_header=False, timeout_keep_alive=30, timeout_graceful_shutdown=GRACE)  # fmt: skip

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """The first signal lets streams end, the second one ends them; neither is an error."""
            before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for sig, handler in before.items():
                    signal.signal(sig, handler)

        def handle_exit(self, sig: int, frame: Any) -> None:
            stopping.set()
            self.force_exit = self.should_exit
            self.should_exit = True

    server, failed = Server(config), []
    address = f"http://{f'[{cfg.host}]' if ':' in cfg.host else cfg.host}:{listening.getsockname()[1]}"

    def load() -> None:
        try:
            from miaobi.serve.served import load

            app.state.served = load(cfg, list(origin), app.state.metrics)
            log(f"ready: {address} is the page, {address}/v1 OpenAI's API; Ctrl-C stops")
        except BaseException as e:
            failed.append(e)
            server.should_exit = True

    log(f"loading {cfg.model or cfg.chat_model or cfg.classifier or cfg.runs}; {address} answers already")
    threading.Thread(target=load, name="load", daemon=True).start()
    server.run([listening])
    if app.state.served is not None:
        app.state.served.close()
    if failed:
        raise failed[0]


def with_models(cfg: Serve) -> Serve:
    """`cfg`; with the models that come with miaobi where it names nothing to be served. Raises UserError."""
    if not cfg.names_nothing:
        return cfg
    model, chat_model, classifier = released("base", "chat", "sentiment")
    return replace(cfg, model=model, chat_model=chat_model, classifier=classifier)


def check(cfg: Serve) -> None:
    """What can be known before anything is loaded. Raises UserError."""
    from pathlib import Path

    from miaobi.model.checkpoint import model_directory

    if cfg.model is not None:
        model_directory(cfg.model, cfg.checkpoint)
    if cfg.runs is not None and not Path(cfg.runs).is_dir():
        raise UserError(f"--runs={cfg.runs}: no such directory; give one that holds runs of miaobi train")


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except socket.gaierror as e:
        raise UserError(f"--host={host} is no address of this machine ({e.strerror})") from e
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is taken (by another miaobi serve?); give another --port, or "
                            "--port=0 for any that is free") from e  # fmt: skip
        raise UserError(f"{host}:{port} cannot be listened on ({e.strerror}); give another --host or --port") from e


def protocol() -> type:
    """uvicorn's HTTP, which gives up on a client whose request does not come: its own waits forever."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        patience = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self.calm()
            elif self.patience is None:
                self.wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self.calm()
            super().connection_lost(exc)

        def wait(self) -> None:
            """From now on, for so long."""
            self.patience = self.loop.call_later(HEADER_SECONDS, self.transport.close)

        def calm(self) -> None:
            """A request is there, or nobody."""
            if self.patience is not None:
                self.patience.cancel()
                self.patience = None

    return Impatient

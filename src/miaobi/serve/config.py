"""Settings of `miaobi serve`."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field

from miaobi.errors import UserError
from miaobi.generate.config import SamplingConfig
from miaobi.kinds import Location, Positional

KEY_VARIABLE = "MIAOBI_API_KEY"


@dataclass(frozen=True)
class Serve(SamplingConfig):
    """A model behind OpenAI's API, and a page for people. How tokens are drawn is for requests that do not say."""

    model: Positional[Location | None] = None
    """Run directory, model directory or hub name: what completes and chats. Where nothing is named to be served: the
    models that come with miaobi."""
    checkpoint: str = field(default="best", kw_only=True)
    """Which checkpoint of a run: best, last or step-N."""
    chat_model: Location | None = None
    """What answers chats where MODEL has no chat template; default: a model with one that lies in MODEL's run."""
    classifier: Location | None = None
    """Run of `miaobi classify train`, or the directory of a classifier: what POST /classify asks; default: the one that
    lies in MODEL's run."""
    runs: Location | None = None
    """A directory with runs of `miaobi train` in it: their curves are on the page; default: MODEL where it is a run."""
    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own needs an --api_key."""
    port: int = 8000
    """0 = one that is free."""
    api_key: str | None = field(default=None, repr=False)
    """What clients send as `Authorization: Bearer KEY`. The environment variable MIAOBI_API_KEY says the same, unseen
    by others on this machine."""
    cors: tuple[str, ...] = ()
    """Origins whose pages may call the API from a browser, such as http://localhost:3000, or * for any."""
    slots: int | None = None
    """Texts written at once; default 32 on a CPU, 256 on a GPU."""
    max_queue: int = 64
    """Texts that may wait for a slot; beyond, requests get 429."""
    max_new_tokens: int = 512
    """Tokens of a reply where the request does not say."""
    max_tokens: int = 4096
    """Tokens that a request may ask for."""
    timeout: float = 600.0
    """Seconds after which a text ends where it is."""
    log_prompts: bool = False
    """Write what is asked into the log, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.names_nothing and self.checkpoint != "best":
            raise UserError(f"--checkpoint={self.checkpoint} is of a run: name that as well, as in miaobi serve my_run")
        if self.api_key is None and KEY_VARIABLE in os.environ:
            object.__setattr__(self, "api_key", os.environ[KEY_VARIABLE])
        if self.api_key is not None and not self.api_key.strip():
            raise UserError("api_key is empty (a variable that is not set?); give a secret, or leave it out")
        if self.api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", self.api_key):
            raise UserError("api_key has blanks or characters beyond ASCII, which no HTTP header carries")
        if not is_loopback(self.host) and self.api_key is None:
            raise UserError(f"--host={self.host} lets others in: give --api_key=SECRET too (or {KEY_VARIABLE}=SECRET "
                            "in the environment), or leave --host out")  # fmt: skip
        if not 0 <= self.port < 65536:
            raise UserError(f"port is {self.port}; give one from 1 to 65535, or 0 for any that is free")
        for origin in self.cors:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise UserError(f"--cors={origin} is no origin; write it as http://localhost:3000, without a path")
        for name in ("slots", "max_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_queue < 0:
            raise UserError(f"max_queue is {self.max_queue}; it cannot be negative")
        if not 0 < self.timeout < float("inf"):
            raise UserError(f"timeout is {self.timeout}; give a positive number of seconds")

    @property
    def names_nothing(self) -> bool:
        """Whether neither a model nor a classifier nor runs are named."""
        return not (self.model or self.chat_model or self.classifier or self.runs)


def is_loopback(host: str) -> bool:
    """Whether an address is one that only this machine reaches."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""What is served: models, loaded, and the settings that requests leave to the server."""

from __future__ import annotations

import bisect
import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from miaobi import __version__, native
from miaobi.classify import head
from miaobi.classify.head import Judge
from miaobi.console import log, warn
from miaobi.corpus.template import ChatTemplate, Messages, source_of
from miaobi.device import keep_allocations, pick_device, pick_dtype
from miaobi.errors import UserError
from miaobi.generate import cpu_step, engine
from miaobi.generate.chat import Chat, model_settings
from miaobi.generate.config import ChatConfig, SampleConfig, SamplingConfig
from miaobi.generate.engine import LanguageModel
from miaobi.generate.sample import say_unused
from miaobi.model.checkpoint import model_directory
from miaobi.released import shipped
from miaobi.serve.config import Serve
from miaobi.serve.errors import refused
from miaobi.serve.metrics import Metrics
from miaobi.serve.text import Names
from miaobi.serve.worker import Worker

BUILD_SECONDS = 120
SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
                     "frequency_penalty", "seed")  # fmt: skip


class Prompt(NamedTuple):
    """What a text goes on from."""

    ids: list[int]
    silent: int = 0
    """So many of the first ids stand for no text of the prompt, as `<s>`."""
    before: Sequence[int] = ()
    """Ids of the text that it goes on from; none where it begins anew."""


@dataclass
class ServedModel:
    """A language model, and the worker thread that runs it."""

    name: str
    lm: LanguageModel
    worker: Worker
    completion_settings: SamplingConfig
    """How completions are sampled where the request does not say."""
    chat_settings: SamplingConfig
    """How replies are sampled where the request does not say."""
    chat: Chat | None
    """Template and ends; None where the model has no template."""
    names: Names = field(init=False)
    templates: dict[bool, ChatTemplate] = field(default_factory=dict)
    """The chat template by what requests say of `enable_thinking`."""
    created: int = field(default_factory=lambda: int(time.time()))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.names = Names(self.lm.tokenizer)
        about = f"{__version__} {self.name} {self.lm.path} {self.lm.dtype} {getattr(self.lm.step, 'kind', '')}"
        self.fingerprint = f"fp_{hashlib.sha256(about.encode()).hexdigest()[:10]}"

    @property
    def block(self) -> int:
        """Tokens that the model sees at once."""
        return self.lm.model.cfg.block_size

    def encode(self, text: str) -> Prompt:
        """A prompt; something to start from where it is empty. Raises APIError for half characters."""
        try:
            ids, begin = self.lm.tokenizer.encode_prompt(text), len(self.lm.tokenizer.begin_ids)
        except UserError as e:
            raise refused(str(e), "prompt") from e
        ids = ids or [self.lm.start_id()]
        return Prompt(ids, begin if text else len(ids), self.lm.ids_before(text, ids))

    def encode_chat(
        self, messages: Messages, most: int | None, enable_thinking: bool | None = None
    ) -> tuple[list[int], str]:
        """Ids of a conversation up to where the reply begins, and what had to be left out, in words.

        most: where given, the oldest turns beyond so many ids are left out. enable_thinking: for templates that ask;
        None leaves it to the template. Raises APIError.
        """
        if self.chat is None:
            raise refused("this model has no chat template: it continues texts, at /v1/completions", "messages",
                          "unsupported_value")  # fmt: skip
        template = self.template(enable_thinking)
        note, system = "", [m for m in messages if m["role"] == "system"]
        with self.lock:
            try:
                ids = template.encode(messages, add_generation_prompt=True)
            except UserError as e:
                messages = [m for m in messages if m["role"] != "system"]
                if not system or not messages:
                    raise refused(str(e), "messages") from e
                note = "the chat template has no place for system messages; they were left out"
                ids = encoded(template, messages)
            first = [m for m in messages if m["role"] == "system"]
            turns = [m for m in messages if m["role"] != "system"]
            if most is not None and len(ids) > most and len(turns) > 2:
                # by halving: pair after pair takes minutes where there are thousands, and nobody else is served
                def fits(pairs: int) -> bool:
                    return len(encoded(template, [*first, *turns[2 * pairs :]])) <= most

                pairs = bisect.bisect_left(range((len(turns) - 1) // 2), True, key=fits)
                ids = encoded(template, [*first, *turns[2 * pairs :]])
        return ids, note

    def template(self, enable_thinking: bool | None) -> ChatTemplate:
        """The chat template with a value of `enable_thinking`. Raises APIError where it does not ask for one."""
        if enable_thinking is None:
            return self.chat.template
        if enable_thinking not in self.templates:
            try:
                self.templates[enable_thinking] = ChatTemplate.of(self.lm.tokenizer, enable_thinking)
            except UserError as e:
                raise refused("this model's chat template does not ask for enable_thinking; leave it out",
                              "chat_template_kwargs", "unsupported_value") from e  # fmt: skip
        return self.templates[enable_thinking]


def encoded(template: ChatTemplate, messages: Messages) -> list[int]:
    """Ids of a conversation. Raises APIError where the template refuses it."""
    try:
        return template.encode(messages, add_generation_prompt=True)
    except UserError as e:
        raise refused(str(e), "messages") from e


@dataclass
class Served:
    """Everything that a server has loaded."""

    metrics: Metrics
    model: ServedModel | None = None
    chat_model: ServedModel | None = None
    """Another model, for chats; it goes by the same name."""
    judge: Judge | None = None
    judge_name: str = ""
    runs: Path | None = None
    judging: threading.Lock = field(default_factory=threading.Lock)

    @property
    def for_chats(self) -> ServedModel | None:
        """The model that answers chats."""
        return self.chat_model or self.model

    @property
    def workers(self) -> list[Worker]:
        """Of all models."""
        return [model.worker for model in (self.model, self.chat_model) if model is not None]

    def close(self) -> None:
        """Let the workers end when their texts have."""
        for worker in self.workers:
            worker.close()


def load(cfg: Serve, given: Sequence[str] = (), metrics: Metrics | None = None) -> Served:
    """Read the models and start the worker. given: names of settings that the user chose. Raises UserError."""
    served = Served(metrics or Metrics())
    if cfg.model is not None:
        served.model = serve_model(loaded(cfg.model, cfg), served_name(cfg.model), cfg, given, served.metrics)
        cfg = with_contents_of_run(cfg, has_chat=served.model.chat is not None)
    if cfg.chat_model is not None:
        name = served.model.name if served.model is not None else served_name(cfg.chat_model)
        served.chat_model = serve_model(loaded(cfg.chat_model, cfg), name, cfg, given, served.metrics)
        if served.chat_model.chat is None:
            raise UserError(f"--chat_model={cfg.chat_model} has no chat template: a model of dialogues has one")
    if cfg.classifier is not None:
        keep_allocations()
        device, wish = pick_device(cfg.device), "auto" if cfg.dtype == "int8" else cfg.dtype
        served.judge = head.load(cfg.classifier, device, pick_dtype(wish, device))
        served.judge.classifier.eval()
        served.judge_name = served_name(cfg.classifier)
    served.runs = None if cfg.runs is None else Path(cfg.runs)
    for worker in served.workers:
        worker.start()
    return served


def loaded(model: str, cfg: Serve) -> LanguageModel:
    """A MODEL. Raises UserError."""
    lm = engine.load(model, cfg.device, cfg.dtype, cfg.checkpoint if model == cfg.model else "best")
    wait_for_step(lm)
    return lm


def with_contents_of_run(cfg: Serve, has_chat: bool) -> Serve:
    """`cfg` with the chat model, classifier and runs that lie in the run of its model, as `miaobi demo` leaves them,
    where `cfg` names none; logged in one line.
    """
    run, found = Path(cfg.model), {}
    if not (run / "checkpoints").is_dir():
        return cfg
    found["runs"] = str(run)
    for folder in sorted(entry for entry in run.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        try:
            model = model_directory(folder)
        except UserError:
            continue
        if (model / head.SETTINGS).is_file():
            found.setdefault("classifier", str(folder))
        elif (model / "chat_template.jinja").is_file() and not has_chat:
            found.setdefault("chat_model", str(folder))
    found = {key: value for key, value in found.items() if getattr(cfg, key) is None}
    if found:
        log(f"found in {run}: " + ", ".join(f"--{key}={value}" for key, value in found.items()))
    return replace(cfg, **found)


def serve_model(lm: LanguageModel, name: str, cfg: Serve, given: Sequence[str], metrics: Metrics) -> ServedModel:
    """A language model as it is served; its worker is not yet started."""
    chosen: dict[str, Any] = {key: getattr(cfg, key) for key in SAMPLING_SETTINGS if key in given}
    common = {"max_new_tokens": cfg.max_new_tokens}
    chat_settings = replace(ChatConfig(), **common, **chosen)
    chat = None
    if source_of(lm.tokenizer) is not None:
        chat_settings = model_settings(chat_settings, lm.model.generation, given)
        chat = Chat(lm, chat_settings)
    as_sample = SamplingConfig(temperature=SampleConfig.temperature, top_k=SampleConfig.top_k)
    completion_settings = replace(as_sample, **common, **chosen)
    say_unused(completion_settings, lm.model.generation, "/v1/completions")
    size = cfg.slots or engine.SLOTS.get(lm.device.type, engine.SLOTS["cpu"])
    return ServedModel(name, lm, Worker(lm, size, cfg.max_queue, metrics), completion_settings, chat_settings, chat)


def wait_for_step(lm: LanguageModel) -> None:
    """Until the compiled step is there: with another, the same seed may write another text."""
    if not isinstance(lm.step, cpu_step.CpuStep):
        return
    until = time.monotonic() + BUILD_SECONDS
    while not lm.step.ready and (made := native.build(cpu_step.SOURCE)) is not None and time.monotonic() < until:
        if made.with_suffix(".failed").exists():
            break
        time.sleep(0.05)
    if not lm.step.ready:
        warn("there is no compiled step here (is there a C++ compiler?): texts are written several times slower, and "
             "what is decoded in the same batch may round its last bits differently")  # fmt: skip


def served_name(model: str) -> str:
    """What clients call it: a hub's name as it is, a directory's last part, a run's for its checkpoints; miaobi where
    it came with that."""
    path = Path(model)
    if not path.exists():
        return model
    if path.absolute().parent == shipped("models", ""):
        return "miaobi"
    parts = path.absolute().parts if path.name not in ("", ".", "..") else path.resolve().parts
    return parts[-3] if len(parts) > 2 and parts[-2] == "checkpoints" else parts[-1]


def note(text: str) -> dict[str, str]:
    """The header that tells a client what was left out."""
    if text:
        log(text)
    return {"x-miaobi-note": text} if text else {}

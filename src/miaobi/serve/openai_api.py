"""POST /v1/completions and /v1/chat/completions: OpenAI's shapes in and out (platform.openai.com/docs)."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from miaobi.serve.config import Serve
from miaobi.serve.errors import APIError, json_response, refused
from miaobi.serve.schemas import ChatRequest, CompletionRequest, Sampling, TemplateSettings, unserved
from miaobi.serve.served import Prompt, Served, ServedModel, note
from miaobi.serve.sse import STILL_HERE, EventStream, frame, result
from miaobi.serve.text import Names, Piece, ScoredToken, scored_prompt
from miaobi.serve.text_request import (
    TextRequest,
    allowed_tokens,
    check_length,
    log_prompt,
    logit_bias,
    model_of,
    sampling_settings,
)
from miaobi.serve.worker import Job

DONE = b"data: [DONE]\n\n"
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions


async def chat_completions(body: ChatRequest, request: Request, served: Served, server: Serve) -> Response:
    """A reply to a conversation. Raises APIError."""
    model = model_of(served.for_chats, body.model)
    unserved(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise refused("top_logprobs needs logprobs: true", "top_logprobs")
    param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    limit = getattr(body, param)
    messages = [{"role": message.role, "content": message.words} for message in body.messages]
    most = allowed_tokens(limit, server.max_new_tokens, server, param)
    room = most if body.truncation == "auto" else None
    prompt, left_out = await conversation(model, messages, room, body.chat_template_kwargs)
    check_length([prompt], model.block, "messages")
    log_prompt(server, messages)
    if limit is None:
        most = min(most, max(model.block - len(prompt.ids), model.block // 2, 1))
    alternatives = (body.top_logprobs or 0) if body.logprobs else None
    wanted = TextRequest(
        model, [prompt], sampling_settings(body, model.chat_settings, most), "chatcmpl", body.n or 1, body.stops,
        logit_bias(body, model.lm.model.cfg.vocab_size), alternatives, is_reply=True,
    )  # fmt: skip
    return await answer(ChatShape(wanted), body, request, server, note(left_out))


async def conversation(
    model: ServedModel, messages: list[dict[str, str]], most: int | None, settings: TemplateSettings | None = None
) -> tuple[Prompt, str]:
    """`ServedModel.encode_chat` of messages, with developer as system.

    most: tokens of the reply, where old turns may be left out.
    """
    messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
    room = None if most is None else model.block - min(most, model.block // 2)
    thinks = settings.enable_thinking if settings else None
    ids, left_out = await asyncio.to_thread(model.encode_chat, messages, room, thinks)
    return Prompt(ids), left_out


async def completions(body: CompletionRequest, request: Request, served: Served, server: Serve) -> Response:
    """Continuations of prompts. Raises APIError."""
    model = model_of(served.model, body.model)
    unserved(body)
    prompts, vocab_size = await prompts_of(body, model), model.lm.model.cfg.vocab_size
    if any(id_ >= vocab_size for prompt in prompts for id_ in prompt.ids):
        raise refused(f"prompt has tokens beyond this model's, which go to {vocab_size - 1}", "prompt")
    check_length(prompts, model.block, "prompt")
    log_prompt(server, body.prompt)
    most = allowed_tokens(body.max_tokens, COMPLETION_TOKENS, server, "max_tokens")
    wanted = TextRequest(
        model, prompts, sampling_settings(body, model.completion_settings, max(most, 1)), "cmpl", body.n or 1,
        body.stops, logit_bias(body, vocab_size), body.logprobs,
        scores_prompt=bool(body.echo) and body.logprobs is not None, writes=most > 0,
    )  # fmt: skip
    return await answer(CompletionShape(wanted, bool(body.echo)), body, request, server)


async def prompts_of(body: CompletionRequest, model: ServedModel) -> list[Prompt]:
    """The prompts of a request."""
    given = body.prompt
    if isinstance(given, list) and given and isinstance(given[0], int):
        return [Prompt(given, 0, given)]
    if isinstance(given, list) and given and isinstance(given[0], list):
        return [Prompt(ids, 0, ids) for ids in given]
    texts = given if isinstance(given, list) else [given or ""]
    if sum(map(len, texts)) < 2000:
        return [model.encode(text) for text in texts]
    return await asyncio.to_thread(lambda: [model.encode(text) for text in texts])


class Shape(ABC):
    """How the texts of a request are sent; `object` and what a choice holds are of the kinds below."""

    whole = part = ""

    def __init__(self, wanted: TextRequest) -> None:
        self.wanted, self.names = wanted, wanted.model.names

    @abstractmethod
    def choice(self, index: int, text: str, tokens: list[ScoredToken], finish: str) -> dict[str, Any]:
        """A choice that is all there."""

    def begin(self, index: int) -> dict[str, Any] | None:
        """A choice of a stream before its first token."""
        return None

    @abstractmethod
    def piece(self, piece: Piece) -> dict[str, Any]:
        """A choice of a stream: some more of it."""

    @abstractmethod
    def end(self, piece: Piece) -> dict[str, Any]:
        """A choice of a stream: that it has ended, and why."""

    def take(self, piece: Piece, job: Job) -> Piece:
        """A piece as it is sent."""
        return piece


class ChatShape(Shape):
    """Replies."""

    whole, part = "chat.completion", "chat.completion.chunk"

    def logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        """Of the reply's tokens, where they were asked for."""
        if self.wanted.alternatives is None:
            return None
        return {"content": [token_logprob(self.names, token) for token in tokens], "refusal": None}

    def choice(self, index: int, text: str, tokens: list[ScoredToken], finish: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self.logprobs(tokens), "finish_reason": finish}

    def begin(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, piece: Piece) -> dict[str, Any]:
        return {"index": piece.index, "delta": {"content": piece.text}, "logprobs": self.logprobs(piece.tokens),
                "finish_reason": None}  # fmt: skip

    def end(self, piece: Piece) -> dict[str, Any]:
        return {"index": piece.index, "delta": {}, "logprobs": None, "finish_reason": piece.finish}


class CompletionShape(Shape):
    """Continuations, with their prompts where `echo`."""

    whole = part = "text_completion"

    def __init__(self, wanted: TextRequest, echo: bool) -> None:
        super().__init__(wanted)
        self.echo = echo
        self.offset: dict[int, int] = {}  # of each choice: characters in front of what was written

    def logprobs(self, index: int, tokens: Sequence[ScoredToken]) -> dict[str, Any] | None:
        """OpenAI's older shape, and the bytes of each token."""
        if self.wanted.alternatives is None:
            return None
        tops = [token.score and {self.names.name(id_, "bytes:"): value for id_, value in token.score.top}
                | {self.names.name(token.id, "bytes:"): token.score.logprob} for token in tokens]  # fmt: skip
        return {
            "tokens": [self.names.name(token.id, "bytes:") for token in tokens],
            "token_logprobs": [token.score and token.score.logprob for token in tokens],
            "top_logprobs": tops if self.wanted.alternatives else None,
            "text_offset": [token.begin for token in tokens],
            "token_bytes": [list(self.names.bytes_of(token.id)) for token in tokens],
        }

    def take(self, piece: Piece, job: Job) -> Piece:
        """The first piece of a choice comes with its prompt, and all with their places behind it."""
        text, tokens = piece.text, piece.tokens
        if self.echo and piece.index not in self.offset:
            first = job.choices[piece.index - piece.index % self.wanted.n].stream
            of = self.wanted.prompts[piece.index // self.wanted.n]
            scores = first.prompt_scores or [None] * (len(of.ids) - 1)
            prompt, prompt_tokens = scored_prompt(self.wanted.model.lm, of.ids, of.silent, scores)
            self.offset[piece.index] = len(prompt)
            text, tokens = prompt + text, prompt_tokens + self.moved(tokens, len(prompt))
        else:
            tokens = self.moved(tokens, self.offset.get(piece.index, 0))
        return Piece(piece.index, text, tokens, piece.finish)

    def moved(self, tokens: list[ScoredToken], by: int) -> list[ScoredToken]:
        """Tokens behind a prompt of so many characters."""
        return [token._replace(begin=token.begin + by, end=token.end + by) for token in tokens] if by else tokens

    def choice(self, index: int, text: str, tokens: list[ScoredToken], finish: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self.logprobs(index, tokens), "finish_reason": finish}

    def piece(self, piece: Piece) -> dict[str, Any]:
        return self.choice(piece.index, piece.text, piece.tokens, None)

    def end(self, piece: Piece) -> dict[str, Any]:
        return {"index": piece.index, "text": "", "logprobs": None, "finish_reason": piece.finish}


def token_logprob(names: Names, token: ScoredToken) -> dict[str, Any]:
    """A token as chats and responses tell it."""
    top = [{"token": names.name(id_), "logprob": value, "bytes": list(names.bytes_of(id_))}
           for id_, value in token.score.top]  # fmt: skip
    return {"token": names.name(token.id), "logprob": token.score.logprob, "bytes": list(names.bytes_of(token.id)),
            "top_logprobs": top}  # fmt: skip


async def answer(
    shape: Shape, body: Sampling, request: Request, server: Serve, headers: dict[str, str] | None = None
) -> Response:
    """The texts, when all are there or as they come. Raises APIError."""
    if body.stream_options is not None and not body.stream:
        raise refused("stream_options is only allowed when stream is true", "stream_options")
    worker, job = shape.wanted.model.worker, shape.wanted.job(server, bool(body.stream))
    worker.submit(job)
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(stream(shape, job, with_usage), lambda: client_left(worker, job), headers)
    pieces = await result(request, collected(job), lambda: client_left(worker, job))
    choices = [shape.choice(*shape.take(piece, job)) for piece in sorted(pieces, key=lambda piece: piece.index)]
    completion = {**shape.wanted.head, "object": shape.whole, "choices": choices, "usage": shape.wanted.usage(job)}
    return json_response(completion, headers=headers)


def client_left(worker: Any, job: Job) -> None:
    """The client went away."""
    worker.metrics.gone.inc()
    worker.cancel(job)


async def collected(job: Job) -> list[Piece]:
    """All pieces of a job that is not streamed: one of each choice."""
    return [piece async for some in job.taken() for piece in some]


async def stream(shape: Shape, job: Job, with_usage: bool) -> AsyncIterator[bytes]:
    """Frames of a stream. What goes wrong in the middle is a frame, too."""
    head = {**shape.wanted.head, "object": shape.part} | ({"usage": None} if with_usage else {})
    began: set[int] = set()

    def chunk(choice: dict[str, Any]) -> bytes:
        return frame({**head, "choices": [choice]})

    first = [begun for choice in job.choices if (begun := shape.begin(choice.index)) is not None]
    if first:
        yield b"".join(map(chunk, first))
    try:
        async for some in job.taken():
            data = b"" if some else STILL_HERE
            for piece in joined(some):
                piece = shape.take(piece, job)
                began.add(piece.index)
                data += chunk(shape.piece(piece)) if piece.text or piece.tokens else b""
                data += chunk(shape.end(piece)) if piece.finish else b""
            if data:
                yield data
    except APIError as error:
        yield frame(error.body)
        return
    if with_usage:
        yield frame({**head, "choices": [], "usage": shape.wanted.usage(job)}) + DONE
    else:
        yield DONE


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces that follow each other in one choice, as one."""
    found: dict[int, Piece] = {}
    for piece in pieces:
        if (before := found.get(piece.index)) is not None:
            piece = Piece(piece.index, before.text + piece.text, before.tokens + piece.tokens, piece.finish)
        found[piece.index] = piece
    return list(found.values())

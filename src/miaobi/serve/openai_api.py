"""POST /v1/completions and /v1/chat/completions: OpenAI's shapes in and out (platform.openai.com/docs)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from miaobi.serve.asking import Asked, bias, fits, length, model_of, noted, sampling
from miaobi.serve.config import Serve
from miaobi.serve.errors import APIError, json_response, refused
from miaobi.serve.schemas import ChatRequest, CompletionRequest, Sampling, unserved
from miaobi.serve.served import Prompt, Served, Writing, note
from miaobi.serve.sse import STILL_HERE, EventStream, frame, result
from miaobi.serve.text import Names, Piece, Told, prompt_told
from miaobi.serve.worker import Job

DONE = b"data: [DONE]\n\n"
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions


async def chat_completions(told: ChatRequest, request: Request, served: Served, server: Serve) -> Response:
    """A reply to a conversation. Raises APIError."""
    writing = model_of(served.talking, told.model)
    unserved(told)
    if told.top_logprobs is not None and not told.logprobs:
        raise refused("top_logprobs needs logprobs: true", "top_logprobs")
    param = "max_tokens" if told.max_completion_tokens is None else "max_completion_tokens"
    asked, said = getattr(told, param), [{"role": message.role, "content": message.words} for message in told.messages]
    most = length(asked, server.max_new_tokens, server, param)
    prompt, left_out = await conversation(writing, said, most if told.truncation == "auto" else None)
    fits([prompt], writing.block, "messages")
    noted(server, said)
    if asked is None:
        most = min(most, max(writing.block - len(prompt.ids), writing.block // 2, 1))
    alternatives = (told.top_logprobs or 0) if told.logprobs else None
    understood = Asked(
        writing, [prompt], sampling(told, writing.chatting, most), "chatcmpl", told.n or 1, told.stops,
        bias(told, writing.lm.model.cfg.vocab_size), alternatives, is_reply=True,
    )  # fmt: skip
    return await answer(ChatShape(understood), told, request, server, note(left_out))


async def conversation(writing: Writing, said: list[dict[str, str]], most: int | None) -> tuple[Prompt, str]:
    """`Writing.talk` of messages, with developer as system. most: tokens of the reply, where old turns may go."""
    said = [m | {"role": "system"} if m["role"] == "developer" else m for m in said]
    room = None if most is None else writing.block - min(most, writing.block // 2)
    ids, left_out = await asyncio.to_thread(writing.talk, said, room)
    return Prompt(ids), left_out


async def completions(told: CompletionRequest, request: Request, served: Served, server: Serve) -> Response:
    """Continuations of prompts. Raises APIError."""
    writing = model_of(served.writing, told.model)
    unserved(told)
    prompts, vocab_size = await prompts_of(told, writing), writing.lm.model.cfg.vocab_size
    if any(id_ >= vocab_size for prompt in prompts for id_ in prompt.ids):
        raise refused(f"prompt has tokens beyond this model's, which go to {vocab_size - 1}", "prompt")
    fits(prompts, writing.block, "prompt")
    noted(server, told.prompt)
    most = length(told.max_tokens, COMPLETION_TOKENS, server, "max_tokens")
    understood = Asked(
        writing, prompts, sampling(told, writing.sampling, max(most, 1)), "cmpl", told.n or 1, told.stops,
        bias(told, vocab_size), told.logprobs, scores_prompt=bool(told.echo) and told.logprobs is not None,
        writes=most > 0,
    )  # fmt: skip
    return await answer(CompletionShape(understood, bool(told.echo)), told, request, server)


async def prompts_of(told: CompletionRequest, writing: Writing) -> list[Prompt]:
    """The prompts of a request."""
    given = told.prompt
    if isinstance(given, list) and given and isinstance(given[0], int):
        return [Prompt(given, 0, given)]
    if isinstance(given, list) and given and isinstance(given[0], list):
        return [Prompt(ids, 0, ids) for ids in given]
    texts = given if isinstance(given, list) else [given or ""]
    if sum(map(len, texts)) < 2000:
        return [writing.encode(text) for text in texts]
    return await asyncio.to_thread(lambda: [writing.encode(text) for text in texts])


class Shape:
    """How the texts of a request are told; `object` and what a choice holds are of the kinds below."""

    whole = part = ""

    def __init__(self, asked: Asked) -> None:
        self.asked, self.names = asked, asked.writing.names

    def choice(self, index: int, text: str, tokens: list[Told], finish: str) -> dict[str, Any]:
        """A choice that is all there."""
        raise NotImplementedError

    def begin(self, index: int) -> dict[str, Any] | None:
        """A choice of a stream before its first token."""
        return None

    def piece(self, piece: Piece) -> dict[str, Any]:
        """A choice of a stream: some more of it."""
        raise NotImplementedError

    def end(self, piece: Piece) -> dict[str, Any]:
        """A choice of a stream: that it has ended, and why."""
        raise NotImplementedError

    def take(self, piece: Piece, job: Job) -> Piece:
        """A piece as it is told."""
        return piece


class ChatShape(Shape):
    """Replies."""

    whole, part = "chat.completion", "chat.completion.chunk"

    def logprobs(self, tokens: Sequence[Told]) -> dict[str, Any] | None:
        """Of the reply's tokens, where they were asked for."""
        if self.asked.alternatives is None:
            return None
        return {"content": [token_logprob(self.names, told) for told in tokens], "refusal": None}

    def choice(self, index: int, text: str, tokens: list[Told], finish: str) -> dict[str, Any]:
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

    def __init__(self, asked: Asked, echo: bool) -> None:
        super().__init__(asked)
        self.echo = echo
        self.offset: dict[int, int] = {}  # of each choice: characters in front of what was written

    def logprobs(self, index: int, tokens: Sequence[Told]) -> dict[str, Any] | None:
        """OpenAI's older shape, and the bytes of each token."""
        if self.asked.alternatives is None:
            return None
        tops = [told.score and {self.names.name(id_, "bytes:"): value for id_, value in told.score.top}
                | {self.names.name(told.id, "bytes:"): told.score.logprob} for told in tokens]  # fmt: skip
        return {
            "tokens": [self.names.name(told.id, "bytes:") for told in tokens],
            "token_logprobs": [told.score and told.score.logprob for told in tokens],
            "top_logprobs": tops if self.asked.alternatives else None,
            "text_offset": [told.begin for told in tokens],
            "token_bytes": [list(self.names.bytes_of(told.id)) for told in tokens],
        }

    def take(self, piece: Piece, job: Job) -> Piece:
        """The first piece of a choice comes with its prompt, and all with their places behind it."""
        text, tokens = piece.text, piece.tokens
        if self.echo and piece.index not in self.offset:
            first = job.choices[piece.index - piece.index % self.asked.n].stream
            of = self.asked.prompts[piece.index // self.asked.n]
            scores = first.prompt_scores or [None] * (len(of.ids) - 1)
            prompt, heard = prompt_told(self.asked.writing.lm, of.ids, of.silent, scores)
            self.offset[piece.index] = len(prompt)
            text, tokens = prompt + text, heard + self.moved(tokens, len(prompt))
        else:
            tokens = self.moved(tokens, self.offset.get(piece.index, 0))
        return Piece(piece.index, text, tokens, piece.finish)

    def moved(self, tokens: list[Told], by: int) -> list[Told]:
        """Tokens behind a prompt of so many characters."""
        return [told._replace(begin=told.begin + by, end=told.end + by) for told in tokens] if by else tokens

    def choice(self, index: int, text: str, tokens: list[Told], finish: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self.logprobs(index, tokens), "finish_reason": finish}

    def piece(self, piece: Piece) -> dict[str, Any]:
        return self.choice(piece.index, piece.text, piece.tokens, None)

    def end(self, piece: Piece) -> dict[str, Any]:
        return {"index": piece.index, "text": "", "logprobs": None, "finish_reason": piece.finish}


def token_logprob(names: Names, told: Told) -> dict[str, Any]:
    """A token as chats and responses tell it."""
    top = [{"token": names.name(id_), "logprob": value, "bytes": list(names.bytes_of(id_))}
           for id_, value in told.score.top]  # fmt: skip
    return {"token": names.name(told.id), "logprob": told.score.logprob, "bytes": list(names.bytes_of(told.id)),
            "top_logprobs": top}  # fmt: skip


async def answer(
    shape: Shape, told: Sampling, request: Request, server: Serve, headers: dict[str, str] | None = None
) -> Response:
    """The texts, when all are there or as they come. Raises APIError."""
    if told.stream_options is not None and not told.stream:
        raise refused("stream_options is only allowed when stream is true", "stream_options")
    worker, job = shape.asked.writing.worker, shape.asked.job(server, bool(told.stream))
    worker.submit(job)
    if told.stream:
        with_usage = bool(told.stream_options and told.stream_options.include_usage)
        return EventStream(stream(shape, job, with_usage), lambda: gone(worker, job), headers)
    pieces = await result(request, collected(job), lambda: gone(worker, job))
    choices = [shape.choice(*shape.take(piece, job)) for piece in sorted(pieces, key=lambda piece: piece.index)]
    body = {**shape.asked.head, "object": shape.whole, "choices": choices, "usage": shape.asked.usage(job)}
    return json_response(body, headers=headers)


def gone(worker: Any, job: Job) -> None:
    """The client went away."""
    worker.metrics.gone.inc()
    worker.cancel(job)


async def collected(job: Job) -> list[Piece]:
    """All pieces of a job that is not streamed: one of each choice."""
    return [piece async for some in job.taken() for piece in some]


async def stream(shape: Shape, job: Job, with_usage: bool) -> AsyncIterator[bytes]:
    """Frames of a stream. What goes wrong in the middle is a frame, too."""
    head = {**shape.asked.head, "object": shape.part} | ({"usage": None} if with_usage else {})
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
        yield frame({**head, "choices": [], "usage": shape.asked.usage(job)}) + DONE
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

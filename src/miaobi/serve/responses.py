"""POST /v1/responses: OpenAI's newer shape, text in and text out. Nothing is kept between requests."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from miaobi.serve.config import Serve
from miaobi.serve.errors import APIError, json_response
from miaobi.serve.openai_api import client_left, collected, conversation, joined, token_logprob
from miaobi.serve.schemas import ResponseRequest, unserved
from miaobi.serve.served import Served, note
from miaobi.serve.sse import STILL_HERE, EventStream, frame, result
from miaobi.serve.text import ScoredToken
from miaobi.serve.text_request import TextRequest, allowed_tokens, check_length, log_prompt, model_of, sampling_settings
from miaobi.serve.worker import Job

LOGPROBS = "message.output_text.logprobs"


async def responses(body: ResponseRequest, request: Request, served: Served, server: Serve) -> Response:
    """A reply to an input. Raises APIError."""
    model = model_of(served.for_chats, body.model)
    unserved(body)
    listed = [] if isinstance(body.input, str) else [(message.role, message.words) for message in body.input]
    turns = [("system", body.instructions)] if body.instructions else []
    turns += listed or [("user", body.input)]
    messages = [{"role": role, "content": words} for role, words in turns]
    most = allowed_tokens(body.max_output_tokens, server.max_new_tokens, server, "max_output_tokens")
    prompt, left_out = await conversation(model, messages, most if body.truncation == "auto" else None)
    check_length([prompt], model.block, "input")
    log_prompt(server, messages)
    if body.max_output_tokens is None:
        most = min(most, max(model.block - len(prompt.ids), model.block // 2, 1))
    with_logprobs = body.top_logprobs is not None or LOGPROBS in (body.include or [])
    wanted = TextRequest(model, [prompt], sampling_settings(body, model.chat_settings, most), "resp", is_reply=True,
                         alternatives=(body.top_logprobs or 0) if with_logprobs else None)  # fmt: skip
    answer, job = Answer(wanted, body), wanted.job(server, bool(body.stream))
    model.worker.submit(job)
    if body.stream:
        return EventStream(answer.events(job), lambda: client_left(model.worker, job), note(left_out))
    pieces = await result(request, collected(job), lambda: client_left(model.worker, job))
    return json_response(
        answer.finished(pieces[0].text, pieces[0].tokens, pieces[0].finish, job), headers=note(left_out)
    )


class Answer:
    """One response, as it is sent at different times."""

    def __init__(self, wanted: TextRequest, body: ResponseRequest) -> None:
        self.wanted, self.body, self.item = wanted, body, f"msg_{uuid.uuid4().hex}"
        self.number = -1

    def response(self, status: str, output: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The whole object; what a request may say is said back."""
        body, wanted = self.body, self.wanted
        return {
            "id": wanted.id.replace("-", "_", 1), "object": "response", "created_at": wanted.created, "status": status,
            "background": False, "error": None, "incomplete_details": None, "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens, "max_tool_calls": None, "model": wanted.model.name,
            "output": output, "parallel_tool_calls": False, "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None}, "service_tier": "default", "store": False,
            "temperature": wanted.cfg.temperature, "text": {"format": {"type": "text"}}, "tool_choice": "none",
            "tools": [], "top_logprobs": body.top_logprobs or 0, "top_p": wanted.cfg.top_p,
            "truncation": body.truncation or "disabled", "usage": None, "user": None, "metadata": body.metadata or {},
            **more,
        }  # fmt: skip

    def finished(self, text: str, tokens: list[ScoredToken], finish: str, job: Job) -> dict[str, Any]:
        """The response when its text is all there."""
        usage, cut = self.wanted.usage(job), finish == "length"
        counted = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        status = "incomplete" if cut else "completed"
        details = {"reason": "max_output_tokens"} if cut else None
        message = self.message(status, [self.part(text, tokens)])
        return self.response(status, [message], usage=counted, incomplete_details=details)

    def message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        """The one item of the output."""
        return {"type": "message", "id": self.item, "status": status, "role": "assistant", "content": content}

    def part(self, text: str, tokens: list[ScoredToken]) -> dict[str, Any]:
        """The one part of the item."""
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs(tokens)}

    def logprobs(self, tokens: list[ScoredToken]) -> list[dict[str, Any]]:
        """Of tokens, where they were asked for."""
        if self.wanted.alternatives is None:
            return []
        return [token_logprob(self.wanted.model.names, token) for token in tokens]

    def event(self, kind: str, **what: Any) -> bytes:
        """A frame."""
        self.number += 1
        return frame({"type": kind, "sequence_number": self.number, **what}, kind)

    async def events(self, job: Job) -> AsyncIterator[bytes]:
        """The events of a stream, in OpenAI's order."""
        begun, text, tokens = self.response("in_progress", []), "", []
        item = {"output_index": 0}
        place = {"item_id": self.item, **item, "content_index": 0}
        yield b"".join((
            self.event("response.created", response=begun),
            self.event("response.in_progress", response=begun),
            self.event("response.output_item.added", **item, item=self.message("in_progress", [])),
            self.event("response.content_part.added", **place, part=self.part("", [])),
        ))  # fmt: skip
        finish = "length"
        try:
            async for some in job.taken():
                data = b"" if some else STILL_HERE
                for piece in joined(some):
                    text, tokens, finish = text + piece.text, tokens + piece.tokens, piece.finish or finish
                    if piece.text or piece.tokens:
                        logprobs = self.logprobs(piece.tokens)
                        data += self.event("response.output_text.delta", **place, delta=piece.text, logprobs=logprobs)
                if data:
                    yield data
        except APIError as error:
            details = {"code": "server_error", "message": error.message}
            failed = self.response("failed", [self.message("incomplete", [self.part(text, tokens)])], error=details)
            yield self.event("error", code=error.code, message=error.message, param=error.param)
            yield self.event("response.failed", response=failed)
            return
        whole = self.finished(text, tokens, finish, job)
        (message,) = whole["output"]
        yield b"".join((
            self.event("response.output_text.done", **place, text=text, logprobs=self.logprobs(tokens)),
            self.event("response.content_part.done", **place, part=message["content"][0]),
            self.event("response.output_item.done", **item, item=message),
            self.event(f"response.{whole['status']}", response=whole),
        ))  # fmt: skip

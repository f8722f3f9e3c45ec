"""What answers hold, as the OpenAPI document has it. Names are OpenAI's and vLLM's."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class TopLogprob(BaseModel):
    """A token that might have stood there."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token, and those that might have stood there."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of each token."""

    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(BaseModel):
    """The reply."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One reply."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class CachedTokens(BaseModel):
    """Of a prompt."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ChatCompletion(BaseModel):
    """Of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Logprobs(BaseModel):
    """Of each token: OpenAI's older shape, with the bytes of each."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]
    token_bytes: list[list[int]]


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """Of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    """Of GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Tokens(BaseModel):
    """Of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Prompt(BaseModel):
    """Of POST /detokenize."""

    prompt: str


class Contribution(BaseModel):
    """What a character adds."""

    text: str
    score: float


class Label(BaseModel):
    """Of one text."""

    index: int
    label: str
    probs: dict[str, float]
    score: float
    contributions: list[Contribution] | None = None


class Labels(BaseModel):
    """Of POST /classify."""

    model: str
    data: list[Label]

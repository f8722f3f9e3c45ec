"""What requests may say, as the OpenAPI document has it. Names and bounds are OpenAI's and vLLM's.

Fields that are not here are ignored, but for those in `unserved`, without which the answer would be another.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from miaobi.serve.errors import refused


def whole(text: str) -> str:
    """`text`, which JSON may have cut inside a character. Raises ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"half a character (a lone surrogate) at {e.start}; remove it") from e
    return text


Text = Annotated[str, AfterValidator(whole)]
Id = Annotated[int, Field(ge=0)]
Bias = dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]
MOST = 128  # texts of one request


class Body(BaseModel):
    """JSON as it is: "1" is no number."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: bool | None = None


class Sampling(Body):
    """What completions and chats have in common."""

    model: Text
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Bias | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(None, ge=1, le=MOST)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a text."""
        return tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop or []))


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST)]
        | Annotated[list[Id], Field(min_length=1)]
        | Annotated[list[Annotated[list[Id], Field(min_length=1)]], Field(min_length=1, max_length=MOST)]
        | None
    )
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)


class TextPart(Body):
    """A part of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: Text


class Message(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def words(self) -> str:
        """Its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TemplateSettings(BaseModel):
    """What a request may tell the chat template; whatever else would be silently without effect."""

    model_config = ConfigDict(strict=True, extra="forbid")

    enable_thinking: bool | None = Field(None, description="for templates that ask, as Qwen3's: think before the reply")


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    chat_template_kwargs: TemplateSettings | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto = the oldest turns that do not fit are left out (ours; as in /v1/responses)"
    )


class InputMessage(Message):
    """One turn of a response's input."""

    type: Literal["message"] = "message"


class ResponseRequest(Body):
    """POST /v1/responses."""

    model: Text
    input: Text | Annotated[list[InputMessage], Field(min_length=1)]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    stream: bool | None = None
    metadata: dict[Text, Text] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="ours: same seed, same text")


def unserved(request: Body) -> None:
    """Raises APIError for what would change the answer and is not there."""
    extra = request.model_extra or {}
    with_tools = extra.get("tool_choice", "auto") != "none" and extra.get("function_call", "auto") != "none"
    reasons = {
        "tools": "tools are not supported; leave them out, or say tool_choice: none" if with_tools else "",
        "functions": "functions are not supported; leave them out, or say function_call: none" if with_tools else "",
        "suffix": "suffix is not supported: the models here write on from a prompt",
        "audio": "audio is not supported: the models here write text",
        "web_search_options": "web search is not supported",
        "previous_response_id": "responses are not kept here; send the whole conversation as input",
        "conversation": "conversations are not kept here; send the whole conversation as input",
        "background": "background responses are not supported; use stream",
        "prompt": "stored prompts are not supported; send instructions and input",
        "prompt_embeds": "prompt embeddings are not supported; send text or ids",
        "use_beam_search": "beam search is not supported",
    }
    for name, reason in reasons.items():
        if reason and name not in type(request).model_fields and extra.get(name) not in (None, "", [], {}, False):
            raise refused(reason, name, "unsupported_parameter")
    forms = {"response_format": extra.get("response_format"), "text.format": _inside(extra.get("text"), "format")}
    for name, form in forms.items():
        if form is not None and _inside(form, "type") != "text":
            raise refused(f"{name} can only be text: JSON modes are not supported", name, "unsupported_value")
    if set(_listed(extra.get("modalities"))) - {"text"}:
        raise refused("modalities can only be text", "modalities", "unsupported_value")
    if isinstance(best := extra.get("best_of"), int) and best > (getattr(request, "n", None) or 1):
        raise refused("best_of is not supported; leave it out, or make it n", "best_of", "unsupported_parameter")


def _inside(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _listed(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or a conversation as the chat template writes it."""

    model: Text | None = None
    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    chat_template_kwargs: TemplateSettings | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Text | None = None
    tokens: list[Id]


class ClassifyRequest(Body):
    """POST /classify."""

    model: Text | None = None
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=2048)]
    explain: bool | None = Field(None, description="what each character adds to the label's probability: what the "
                                                   "probability loses without it (leave-one-out)")  # fmt: skip

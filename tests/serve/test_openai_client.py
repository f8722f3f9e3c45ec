"""The real openai client, unchanged, against the server."""

import json
import math

import httpx
import openai
import pydantic
import pytest
from openai.types import chat, responses

from miaobi.serve.answers import ChatCompletion, Completion
from miaobi.serve.config import Serve


@pytest.fixture
def client(site):
    return openai.OpenAI(base_url=site.v1, api_key="none", max_retries=0)


HELLO = [{"role": "user", "content": "你好"}]


def test_models(client):
    listed = client.models.list().data
    assert [model.id for model in listed] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError) as e:
        client.models.retrieve("other/model")
    assert e.value.code == "model_not_found"


def test_chat(client):
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12, seed=1, n=2)
    ChatCompletion.model_validate(answer.to_dict())
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert all(choice.message.role == "assistant" for choice in answer.choices)


def test_stream(client):
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "seed": 1}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert not chunks[0].choices[0].delta.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert not chunks[-2].choices[0].delta.content
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=8, logprobs=True, top_logprobs=3, temperature=0
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob) or token.logprob <= 0
        assert bytes(token.bytes).decode("utf-8", "replace")
    data = b"".join(bytes(token.bytes) for token in content)
    assert data.decode("utf-8", "replace") == answer.choices[0].message.content


def test_completions(client):
    answer = client.completions.create(
        model="tiny", prompt=["皇马", "曼联赢得"], max_tokens=6, n=2, logprobs=2, echo=True
    )
    Completion.model_validate(answer.to_dict())
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice, prompt in zip(answer.choices, ["皇马", "皇马", "曼联赢得", "曼联赢得"], strict=True):
        assert choice.text.startswith(prompt)
        told = choice.logprobs
        assert told.tokens[: len(prompt)] == list(prompt)
        assert told.token_logprobs[0] is None
        assert all(value <= 0 for value in told.token_logprobs[1:])
        assert told.text_offset[: len(prompt)] == list(range(len(prompt)))


def test_scoring_a_text(client):
    answer = client.completions.create(model="tiny", prompt="皇马赢得比赛", max_tokens=0, echo=True, logprobs=1)
    (choice,) = answer.choices
    assert choice.text == "皇马赢得比赛"
    assert choice.finish_reason == "length"
    assert len(choice.logprobs.token_logprobs) == 6
    assert answer.usage.completion_tokens == 0
    assert math.isfinite(sum(choice.logprobs.token_logprobs[1:]))


def test_responses(client):
    answer = client.responses.create(
        model="tiny", instructions="你是我", max_output_tokens=9, temperature=0, top_logprobs=2,
        input=[{"role": "user", "content": [{"type": "input_text", "text": "你好"}]}],
    )  # fmt: skip
    strict(responses.Response, answer)
    assert answer.usage.output_tokens <= 9
    assert answer.output[0].content[0].text == answer.output_text
    assert all(len(token.top_logprobs) == 2 for token in answer.output[0].content[0].logprobs)
    if answer.status == "incomplete":
        assert answer.incomplete_details.reason == "max_output_tokens"


def test_streamed_responses(client):
    asked = {"model": "tiny", "input": "你好", "max_output_tokens": 9, "temperature": 0}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == ["response.created", "response.in_progress", "response.output_item.added",
                     "response.content_part.added", "response.output_text.done", "response.content_part.done",
                     "response.output_item.done", f"response.{whole.status}"]  # fmt: skip
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text == events[-1].response.output_text
    with client.responses.stream(model="tiny", input="你好", max_output_tokens=9, temperature=0) as stream:
        assert "".join(e.delta for e in stream if e.type == "response.output_text.delta") == whole.output_text


def strict(kind, value):
    """The client's types are lenient when they read; here they are not."""
    pydantic.TypeAdapter(kind).validate_python(value.to_dict())


def test_shapes_are_those_of_the_clients_types(client):
    strict(
        chat.ChatCompletion, client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2, logprobs=True)
    )
    for chunk in client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2, stream=True, logprobs=True):
        strict(chat.ChatCompletionChunk, chunk)
    for piece in client.completions.create(model="tiny", prompt="皇", max_tokens=2, stream=True, logprobs=1):
        piece.choices[0].finish_reason = piece.choices[0].finish_reason or "length"  # null until then, as OpenAI's is
        strict(openai.types.Completion, piece)
    strict(openai.types.Model, client.models.retrieve("tiny"))


@pytest.mark.parametrize(("asked", "param", "code"), [
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
    ({"messages": [{"role": "tool", "content": "1", "tool_call_id": "1"}]}, "messages.0.role", "invalid_value"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
     "messages.0.content.0.type", "invalid_value"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": "1"}, "temperature", "invalid_type"),
    ({"top_p": -0.1}, "top_p", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": 100_001}, "max_tokens", "invalid_value"),
    ({"max_completion_tokens": 10**9}, "max_completion_tokens", "invalid_value"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value"),
    ({"logit_bias": {"999999": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"3": 101}}, "logit_bias.3", "invalid_value"),
    ({"frequency_penalty": 3}, "frequency_penalty", "invalid_value"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"stop": ["a"] * 17}, "stop", "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_value"),
    ({"modalities": ["text", "audio"]}, "modalities", "unsupported_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"messages": [{"role": "user", "content": "你" * 200}]}, "messages", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages.0.content", "invalid_value"),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(http, asked, param, code):
    answer = http.post("/v1/chat/completions", content=json.dumps({"model": "tiny", "messages": HELLO} | asked),
                       headers={"content-type": "application/json"})  # fmt: skip
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error"), error
    assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("more", [
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"}, {"tools": []},
    {"response_format": {"type": "text"}}, {"user": "me", "store": True, "metadata": {"a": "b"}, "nonsense": {"x": 1}},
    {"logprobs": None, "stop": None, "n": None, "seed": None, "temperature": None, "stream": None, "logit_bias": None},
    {"stop": ""}, {"stop": []}, {"top_p": 0}, {"top_p": 1}, {"temperature": 0}, {"temperature": 2}, {"top_k": -1},
    {"min_p": 1}, {"messages": [{"role": "developer", "content": "a"}, {"role": "user", "content": ""}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]}]},
    {"messages": [*HELLO, {"role": "assistant", "content": "你好", "refusal": None}], "max_completion_tokens": 3},
])  # fmt: skip
def test_what_does_no_harm_is_served(http, more):
    answer = http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, "max_tokens": 3} | more)
    assert answer.status_code == 200, answer.text


def test_other_mistakes(client, http):
    with pytest.raises(openai.NotFoundError) as e:
        client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert (e.value.code, e.value.param) == ("model_not_found", "model")
    for asked, param in [({"prompt": "皇", "suffix": "马"}, "suffix"), ({"prompt": "皇", "best_of": 3}, "best_of")]:
        with pytest.raises(openai.BadRequestError) as e:
            client.completions.create(model="tiny", **asked)
        assert e.value.param == param
    for prompt in ([], [[]], [1, "a"], [-1], [10**6], {"a": 1}, [[1], "a"], 7):
        answer = http.post("/v1/completions", json={"model": "tiny", "prompt": prompt})
        assert answer.status_code == 400, prompt
        assert answer.json()["error"]["param"].startswith("prompt")
    assert http.post("/v1/completions", json={"model": "tiny"}).json()["error"]["param"] == "prompt"
    assert http.post("/v1/completions", json={"prompt": "皇"}).json()["error"]["param"] == "model"
    for more in (
        {"previous_response_id": "resp_1"},
        {"background": True},
        {"text": {"format": {"type": "json_schema"}}},
    ):
        answer = http.post("/v1/responses", json={"model": "tiny", "input": "你好"} | more)
        assert answer.json()["error"]["code"] in ("unsupported_parameter", "unsupported_value")
    assert http.get("/v1/chat/completions").status_code == 405


def test_stops_bias_and_penalties(client):
    asked = {"model": "tiny", "prompt": "皇马", "max_tokens": 30, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    assert len(text) > 4
    stopped = client.completions.create(**asked, stop=[text[3:5], "no"]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(text[3:5])]
    streamed = client.completions.create(**asked, stop=text[3:5], stream=True)
    assert "".join(piece.choices[0].text for piece in streamed) == stopped.text


def test_tokens_there_and_back(http):
    text = "皇马😀 a"
    told = http.post("/tokenize", json={"model": "tiny", "prompt": text, "return_token_strs": True}).json()
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["max_model_len"] == 64
    assert http.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": text}
    biased = {str(told["tokens"][0]): 100}
    answer = http.post("/v1/completions", json={"model": "tiny", "prompt": "马", "max_tokens": 4, "logit_bias": biased})
    assert answer.json()["choices"][0]["text"] == "皇皇皇皇"
    apart = {"logit_bias": biased, "frequency_penalty": 2, "temperature": 0}
    counted = http.post("/v1/completions", json={"model": "tiny", "prompt": "马", "max_tokens": 4} | apart).json()
    assert counted["choices"][0]["text"].startswith("皇")


def test_a_template_that_asks_is_told_whether_to_think(serving, thinker, client):
    """As vLLM's `chat_template_kwargs`; each reply's prompt is that of `/tokenize`."""
    said = [{"role": "user", "content": "你好"}]
    with serving(Serve(model=str(thinker), device="cpu", dtype="float32", slots=2)) as address:
        other = openai.OpenAI(base_url=address.v1, api_key="none")
        prompts = {}
        for thinks in (None, False, True):
            told = {"chat_template_kwargs": {"enable_thinking": thinks}}
            reply = other.chat.completions.create(model="thinks", messages=said, max_tokens=2, extra_body=told)
            body = {"messages": said, "add_generation_prompt": True, **told}
            tokens = httpx.post(f"{address.url}/tokenize", json=body).json()["tokens"]
            assert reply.usage.prompt_tokens == len(tokens)
            prompts[thinks] = httpx.post(f"{address.url}/detokenize", json={"tokens": tokens}).json()["prompt"]
        assert prompts[True].endswith("期待")
        assert prompts[False] == prompts[None] == prompts[True].replace("期待", "错过")
        for wrong in ({"thinking": True}, {"enable_thinking": "yes"}):
            with pytest.raises(openai.BadRequestError) as caught:
                other.chat.completions.create(model="thinks", messages=said, extra_body={"chat_template_kwargs": wrong})
            assert "chat_template_kwargs" in caught.value.param
    with pytest.raises(openai.BadRequestError, match="does not ask for enable_thinking") as caught:
        client.chat.completions.create(model="tiny", messages=said,
                                       extra_body={"chat_template_kwargs": {"enable_thinking": False}})  # fmt: skip
    assert caught.value.param == "chat_template_kwargs"

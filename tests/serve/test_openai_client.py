"""The real openai client, unchanged, against the server."""

import math

import openai
import pytest

from miaobi.serve.schemas import ChatCompletion, Completion


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

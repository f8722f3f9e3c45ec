"""What is written does not depend on who else is being written, and is what the other verbs write."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from langchain_openai import ChatOpenAI, OpenAI

PROMPTS = [
    "皇马",
    "皇马赢得比赛。曼联",
    "国家队主教练期待" * 5,
    "a",
    "曼联输掉了",
    "皇马赢得比赛。裁判",
    "训练",
    "，！",
]


@pytest.fixture
def post(http, built):
    from miaobi.generate import cpu_step

    built(cpu_step.SOURCE)

    def ask(prompt, **more):
        asked = {"model": "tiny", "prompt": prompt, "max_tokens": 40} | more
        answer = http.post("/v1/completions", json=asked)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    return ask


@pytest.mark.parametrize(
    "how", [{"temperature": 0}, {"temperature": 1.2, "seed": 7, "top_k": 0, "repetition_penalty": 1.1}]
)
def test_texts_together_are_what_each_is_alone(post, how):
    """More texts than slots, prompts of many lengths that begin alike or not, some with other settings between them."""
    alone = [post(prompt, **how)[0]["text"] for prompt in PROMPTS]
    with ThreadPoolExecutor(16) as pool:
        noise = [pool.submit(post, "曼联赢得", n=2, seed=i, max_tokens=30, logprobs=2) for i in range(4)]
        together = [pool.submit(post, prompt, **how) for prompt in [*PROMPTS, *reversed(PROMPTS)]]
        found = [future.result()[0]["text"] for future in together]
        assert all(future.result() for future in noise)
    assert found == [*alone, *reversed(alone)]


def test_it_is_what_miaobi_sample_writes(post, miaobi, model_path):
    cfg = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}
    flags = [f"--{key}={value}" for key, value in cfg.items()]
    told = miaobi("sample", model_path, "--start=皇马", "--num_samples=3", "--max_new_tokens=40", "--seed=5",
                  "--device=cpu", "--dtype=float32", "--json", *flags)  # fmt: skip
    samples = [sample["text"] for sample in json.loads(told.out)["samples"]]
    found = [choice["text"] for choice in post("皇马", n=3, seed=5, **cfg)]
    assert ["皇马" + text for text in found] == samples


def test_log_probabilities_are_those_of_transformers(http, post, model_path):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    ids = http.post("/tokenize", json={"prompt": "皇马赢得比赛，国家队"}).json()["tokens"]
    (choice,) = post(ids, max_tokens=0, echo=True, logprobs=5)
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
    told = choice["logprobs"]
    for i, id_ in enumerate(ids[1:]):
        assert told["token_logprobs"][i + 1] == pytest.approx(expected[i, id_].item(), abs=1e-3)
        best = max(told["top_logprobs"][i + 1].values())
        assert best == pytest.approx(expected[i].max().item(), abs=1e-3)
    (written,) = post(ids, max_tokens=5, temperature=1.5, seed=1, logprobs=0, presence_penalty=1)
    data = [bytes(one) for one in written["logprobs"]["token_bytes"]]
    assert b"".join(data).decode("utf-8", "replace") == written["text"]
    with torch.inference_mode():
        for logprob in written["logprobs"]["token_logprobs"]:
            row = theirs(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            close = (row - logprob).abs().argmin().item()
            assert row[close].item() == pytest.approx(logprob, abs=1e-3)
            ids = [*ids, close]


def test_the_prompt_is_read_once_for_many(http, post):
    prompt = "主教练谈到球迷错过冠军准备转会" * 3
    usage = http.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "n": 4, "max_tokens": 1}).json()[
        "usage"
    ]
    again = http.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] == again["prompt_tokens"] == len(prompt)
    assert again["prompt_tokens_details"]["cached_tokens"] == len(prompt) - 1


def test_langchain(site):
    chat = ChatOpenAI(model="tiny", base_url=site.v1, api_key="none", max_tokens=8, temperature=0)
    said = [("system", "你是我"), ("human", "你好")]
    whole = chat.invoke(said)
    assert whole.usage_metadata["output_tokens"] <= 8
    assert "".join(chunk.content for chunk in chat.stream(said)) == whole.content
    assert [answer.content for answer in chat.batch([said, said])] == [whole.content] * 2
    completion = OpenAI(model="tiny", base_url=site.v1, api_key="none", max_tokens=8, temperature=0)
    assert completion.invoke("皇马") == "".join(completion.stream("皇马"))

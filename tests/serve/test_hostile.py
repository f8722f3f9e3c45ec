"""Clients that do what they should not, and those that go away: the others notice nothing."""

import contextlib
import json
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
from tests.serve.conftest import running

from miaobi.corpus.tokenizer import SPECIALS
from miaobi.errors import UserError
from miaobi.serve import guard
from miaobi.serve import server as server_module
from miaobi.serve.config import Serve
from miaobi.serve.errors import APIError
from miaobi.serve.metrics import Metrics
from miaobi.serve.served import Served, ServedModel, serve_model

JSON = {"content-type": "application/json"}
LONG = {"model": "tiny", "prompt": "皇马", "max_tokens": 100_000, "seed": 3,
        "logit_bias": {str(id_): -100 for id_ in range(len(SPECIALS))}}  # it does not end  # fmt: skip


def within(seconds, condition):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come true in time"
        time.sleep(0.01)


@contextlib.contextmanager
def another(site, **settings):
    """A second server with the same model and other settings."""
    cfg = Serve(model=site.cfg.model, **{"slots": 2, "max_tokens": 100_000} | settings)
    served = Served(Metrics())
    served.model = serve_model(site.served.model.lm, "tiny", cfg, (), served.metrics)
    served.model.worker.start()
    with running(cfg, served) as address:
        yield address
    served.close()


def is_well(site):
    """A short request is answered."""
    answer = httpx.post(f"{site.v1}/completions", json=LONG | {"max_tokens": 2}, timeout=60)
    return answer.status_code == 200


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_goes_away_frees_its_slots(site, is_streamed):
    worker = site.served.model.worker
    before = site.served.metrics.gone._value.get()
    asked = LONG | {"n": 6, "stream": is_streamed}
    with httpx.Client(timeout=0.4) as client:
        if is_streamed:
            with client.stream("POST", f"{site.v1}/completions", json=asked) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{site.v1}/completions", json=asked)
    within(10, lambda: not worker.active and not worker.waiting)
    assert site.served.metrics.gone._value.get() == before + 1
    assert is_well(site)


def test_who_reads_nothing_holds_nobody_up(site):
    worker = site.served.model.worker
    body = json.dumps(LONG | {"max_tokens": 600, "n": 3, "stream": True, "logprobs": 20}).encode()
    with socket.create_connection(site.url.removeprefix("http://").split(":")) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                     b"content-length: %d\r\n\r\n%s" % (len(body), body))  # fmt: skip
        within(10, lambda: worker.active)
        assert is_well(site)
        within(30, lambda: not worker.active)  # its texts are written, and nobody has read them


def test_a_full_queue_says_when_to_come_back(site):
    with another(site, slots=1, max_queue=1) as small, httpx.Client(base_url=small.url, timeout=30) as client:
        with client.stream("POST", "/v1/completions", json=LONG | {"n": 2, "stream": True}) as first:
            lines = first.iter_lines()  # dropped, it would close the connection
            next(lines)
            refused = client.post("/v1/completions", json=LONG)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            error = refused.json()["error"]
            assert (error["type"], error["param"], error["code"]) == ("rate_limit_error", None, "queue_full")
        within(10, lambda: not small.served.model.worker.active)
        assert client.post("/v1/completions", json=LONG | {"max_tokens": 2}).status_code == 200


def test_time_is_limited(site):
    with another(site, timeout=0.3, slots=1) as hasty, httpx.Client(base_url=hasty.url, timeout=30) as client:
        answer = client.post("/v1/completions", json=LONG).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert 0 < answer["usage"]["completion_tokens"] < 100_000
        two = client.post("/v1/completions", json=LONG | {"n": 3})
        assert two.status_code == 503
        assert two.json()["error"]["code"] == "timeout"
        with client.stream("POST", "/v1/completions", json=LONG | {"n": 3, "stream": True}) as stream:
            frames = [line for line in stream.iter_lines() if line]
        assert json.loads(frames[-1].removeprefix("data: "))["error"]["code"] == "timeout"


def test_a_step_that_fails_fails_those_in_it_alone(site, monkeypatch):
    with another(site) as other, httpx.Client(base_url=other.url, timeout=30) as client:
        worker = other.served.model.worker
        monkeypatch.setattr(worker.slots, "draw", lambda logits: logits[10**6].tolist())
        with client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
            frames = [line for line in stream.iter_lines() if line]
        assert json.loads(frames[-1].removeprefix("data: "))["error"]["type"] == "server_error"
        assert client.post("/v1/completions", json=LONG | {"max_tokens": 2}).status_code == 200


def test_slow_requests_are_given_up_and_block_nobody(site, monkeypatch):
    monkeypatch.setattr(server_module, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.5)
    place = tuple(site.url.removeprefix("http://").split(":"))
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(place)) for _ in range(30)]
        for i, one in enumerate(slow):
            one.sendall(b"POST /v1/completions HTTP/1.1\r\n" if i % 2 else
                        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                        b"content-length: 100\r\n\r\n{")  # fmt: skip
        assert is_well(site)
        for i, one in enumerate(slow):
            one.settimeout(5)
            said = one.recv(10000)
            assert said == b"" if i % 2 else b" 408 " in said
    assert is_well(site)


@pytest.mark.parametrize("body", [
    b"{" * 100_000, b"", b"{", b"[]", b"7", b"\xff\xfe{}", '{"model": "tiny", "prompt": "\xff'.encode("latin-1"),
    b'{"model": "tiny", "prompt": "a", "temperature": NaN}', b'{"model": "tiny", "prompt": "a", "top_p": 1e999}',
    b'{"model": "tiny", "prompt": "a", "seed": 1' + b"0" * 5000 + b"}", b'{"model": "\\ud800", "prompt": "a"}',
    b'{"model": "tiny", "prompt": "a", "max_tokens": -1}', b'{"model": "tiny", "prompt": "a", "max_tokens": 1.5}',
    b'{"model": "tiny", "prompt": "a", "stop": ["\\udc00"]}', b'{"model": "tiny", "prompt": "a", "n": -5}',
    b'{"model": "tiny", "prompt": "' + b"a" * 1_000_000 + b'"}',
])  # fmt: skip
def test_broken_bodies(site, body):
    answer = httpx.post(f"{site.v1}/completions", content=body, headers=JSON, timeout=30)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.json()["error"]["code"]


def test_bodies_are_limited_whether_they_say_their_length_or_not(site):
    for content in (b" " * (guard.MAX_BODY + 1), iter([b" " * (1 << 20)] * 5)):
        try:
            answer = httpx.post(f"{site.v1}/completions", content=content, headers=JSON, timeout=30)
        except (httpx.WriteError, httpx.ReadError):  # it hung up before all was sent
            continue
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
    assert is_well(site)


def test_keys(site):
    with another(site, api_key="secret") as locked, httpx.Client(base_url=locked.url) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"},
                        {"authorization": "Bearer"}, {"authorization": "Basic secret"},
                        {"authorization": "Bearer secret2"}, {b"authorization": "Bearer 密".encode()}):  # fmt: skip
            for path in ("/v1/models", "/metrics", "/api/info", "/api/runs", "/openapi.json"):
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401, path
                assert answer.json()["error"]["code"] == "invalid_api_key"
            assert client.post("/classify", headers=headers, json={"input": "a"}).status_code == 401
        right = {"authorization": "Bearer secret"}
        assert client.get("/v1/models", headers=right).status_code == 200
        assert {client.get(path).status_code for path in ("/health", "/", "/page/app.js")} == {200}
        for path in ("//v1/models", "/v1/../v1/models", "/V1/models", "/%76%31/models", "/page/../v1/models"):
            assert client.get(path).status_code in (401, 404), path


def test_only_names_of_this_machine_are_answered_without_a_key(site):
    assert httpx.get(f"{site.url}/api/info", headers={"host": "evil.example"}).status_code == 403
    for host in ("localhost.evil.example", "127.0.0.1.evil.example:80", "", "a:b"):
        assert httpx.get(f"{site.url}/api/info", headers={"host": host}).status_code == 403, host
    for host in ("localhost", "0.0.0.0:8000", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"):
        assert httpx.get(f"{site.url}/api/info", headers={"host": host}).status_code == 200, host


def test_browsers_of_other_origins_only_where_asked(site):
    url = f"{site.v1}/chat/completions"
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    ours, others = {"origin": "http://localhost:3000"}, {"origin": "http://evil.example"}
    preflight = httpx.options(url, headers=ask | ours)
    assert preflight.headers["access-control-allow-origin"] == ours["origin"]
    assert preflight.headers["x-request-id"].startswith("req_")
    assert "x-request-id" in httpx.options(url, headers=ask | others).headers  # refused ones too
    assert "access-control-allow-origin" not in httpx.options(url, headers=ask | others).headers
    assert "access-control-allow-origin" not in httpx.get(f"{site.v1}/models", headers=others).headers
    assert "access-control-allow-origin" in httpx.post(url, headers=ours, json={}).headers
    plain = httpx.post(f"{site.v1}/completions", content=json.dumps(LONG), headers={"content-type": "text/plain"})
    assert plain.status_code == 400  # a page of any site could send that without asking first


def test_prompts_are_not_in_the_log(site, capfd):
    httpx.post(f"{site.v1}/completions", json=LONG | {"prompt": "皇马赢得", "max_tokens": 2})
    httpx.post(f"{site.v1}/completions", json=LONG | {"prompt": "皇马赢得" * 100})
    log = ""
    while log.count("POST /v1/completions") < 2:  # which is written once the answer is out
        log += capfd.readouterr().err
    assert "皇马" not in log


def test_paths_of_runs_lead_nowhere_else(site, http):
    assert [run["name"] for run in http.get("/api/runs").json()] == ["first"]
    for name in ("..", "%2e%2e", "..%2fjudge", "first/../../judge", "%00", "/etc", "nope"):
        assert http.get(f"/api/runs/{name}").status_code == 404, name


class Template:
    """Ten ids a message; counts how often it is asked, and refuses fewer than `least` messages."""

    def __init__(self, least: int = 0) -> None:
        self.asked, self.least = 0, least

    def encode(self, messages, add_generation_prompt):
        self.asked += 1
        if len(messages) < self.least:
            raise UserError("too few")
        return [0] * 10 * len(messages)


def left_of(template, turns, most):
    """How many messages a server sends to the model of so many turns."""
    model = SimpleNamespace(chat=True, template=lambda _: template, lock=threading.Lock())
    messages = [{"role": "system", "content": "a"}] + [{"role": "user", "content": "b"}] * turns
    return len(ServedModel.encode_chat(model, messages, most)[0]) // 10


@pytest.mark.parametrize("turns", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("most", [5, 30, 40, 59, 60, 1000])
def test_the_oldest_pairs_of_turns_that_do_not_fit_are_left_out(turns, most):
    kept = turns
    while 10 * (kept + 1) > most and kept > 2:
        kept -= 2
    assert left_of(Template(), turns, most) == kept + 1


def test_a_conversation_of_thousands_of_turns_is_not_rendered_thousands_of_times():
    """All who chat wait for it."""
    template = Template()
    assert left_of(template, 50_000, 100) <= 10
    assert template.asked < 30


def test_a_template_that_refuses_what_is_left_of_a_conversation_is_the_requests_fault():
    with pytest.raises(APIError, match="too few"):
        left_of(Template(least=5), 50, 40)

"""`miaobi serve` as it is typed: its mistakes, how it starts, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import pytest

from miaobi.errors import UserError
from miaobi.serve import server as server_module
from miaobi.serve.config import KEY_VARIABLE, Serve, is_loopback


@pytest.mark.parametrize(("words", "said"), [
    (["--checkpoint=last"], "is of a run"),
    (["{model}", "--host=0.0.0.0"], "--api_key"),
    (["{model}", "--host=192.168.1.5"], "--api_key"),
    (["{model}", "--host=::"], "--api_key"),
    (["{model}", "--api_key="], "api_key"),
    (["{model}", "--api_key=密码"], "api_key"),
    (["{model}", "--port=65536"], "port"),
    (["{model}", "--port=x"], "port"),
    (["{model}", "--cors=localhost"], "--cors"),
    (["{model}", "--cors=http://localhost:3000/path"], "--cors"),
    (["{model}", "--slots=0"], "slots"),
    (["{model}", "--max_queue=-1"], "max_queue"),
    (["{model}", "--timeout=0"], "timeout"),
    (["{model}", "--max_tokens=0"], "max_tokens"),
    (["no_such_model"], "no_such_model"),
    (["{model}", "--runs=no_such_runs"], "no_such_runs"),
    (["{model}", "--classifier={model}", "--port=0"], "classifier"),
    (["{model}", "--host=no.such.host.invalid", "--api_key=x"], "no.such.host.invalid"),
])  # fmt: skip
def test_mistakes(miaobi, model_path, words, said, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    answer = miaobi("serve", *(word.replace("{model}", str(model_path)) for word in words))
    assert answer.code == 2
    assert said in answer.err.splitlines()[-1]
    assert "Traceback" not in answer.err


def test_a_port_that_is_taken(site, miaobi, model_path):
    port = site.url.rpartition(":")[2]
    answer = miaobi("serve", model_path, f"--port={port}")
    assert answer.code == 2
    assert f"port {port} of 127.0.0.1 is taken" in answer.err


def test_without_its_packages_it_names_them(monkeypatch, model_path):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"pip install 'miaobi\[serve\]'"):
        server_module.serve(Serve(model=str(model_path)), {})


def test_keys_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert Serve(model="m", host="0.0.0.0").api_key == "secret"
    assert "secret" not in repr(Serve(model="m"))


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True),
                                                ("LOCALHOST", True), ("0.0.0.0", False), ("::", False),
                                                ("localhost.evil.example", False), ("10.0.0.1", False)])  # fmt: skip
def test_which_addresses_are_this_machine(host, expected):
    assert is_loopback(host) is expected


def test_it_answers_while_loading_and_ends_when_streams_have(model_path):
    command = [sys.executable, "-m", "miaobi", "serve", str(model_path), "--port=0", "--device=cpu", "--slots=1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline())[0]
        seen = set()
        while 200 not in seen:
            answer = httpx.get(f"{url}/health", timeout=30)
            seen.add(answer.status_code)
            if answer.status_code == 503:
                assert answer.json()["error"]["code"] == "loading"
                models = httpx.get(f"{url}/v1/models", timeout=30).status_code
                assert models == 503 or httpx.get(f"{url}/health", timeout=30).status_code == 200  # loaded since
            time.sleep(0.05)
        assert seen <= {200, 503}
        asked = {"model": "tiny", "prompt": "皇马", "max_tokens": 4096, "stream": True,
                 "logit_bias": {str(id_): -100 for id_ in range(8)}}  # fmt: skip
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.wait(timeout=30) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()

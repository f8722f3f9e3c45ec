"""Models sent to hubs that are served here, by the hubs' own libraries."""

import base64
import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors import safe_open
from tests.flaky import LocalServer

from miaobi.files import pointed

NAME = "me/my-gpt"


class Receiver(LocalServer):
    """Hugging Face's API, as far as an upload asks it: what arrived lies in `files`."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.tokens: set[str] = set()
        self.status = 200
        super().__init__()

    def body(self, request: BaseHTTPRequestHandler) -> bytes:
        if request.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(request.rfile.readline(), 16):
                parts.append(request.rfile.read(size))
                request.rfile.readline()
            request.rfile.readline()
            return b"".join(parts)
        return request.rfile.read(int(request.headers.get("Content-Length", 0)))

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body, path = self.body(request), request.path.partition("?")[0]
        if "Authorization" in request.headers:
            self.tokens.add(request.headers["Authorization"])
        told: object = {}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            told = {"url": f"{self.url}/{NAME}"}
        elif path.endswith("/preupload/main"):
            told = {"files": [{"path": file["path"], "shouldIgnore": False,
                               "uploadMode": "lfs" if file["path"].endswith(("safetensors", "gguf")) else "regular"}
                              for file in json.loads(body)["files"]]}  # fmt: skip
        elif path.endswith("/info/lfs/objects/batch"):
            told = {"transfer": "basic", "objects": [
                {**thing, "actions": {"upload": {"href": f"{self.url}/put/{thing['oid']}"}}}
                for thing in json.loads(body)["objects"]]}  # fmt: skip
        elif path.startswith("/put/"):
            self.large[path.removeprefix("/put/")] = body
        elif "/commit/" in path:
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.large[value["oid"]]
            told = {"commitUrl": f"{self.url}/{NAME}/commit/{'e' * 40}", "commitOid": "e" * 40, "success": True}
        elif path == "/api/validate-yaml":
            told = {"errors": [], "warnings": []}
        answer = json.dumps(told if self.status == 200 else {"error": "You may not \x1b[31m write here"}).encode()
        request.send_response(self.status)
        request.send_header("Content-Length", str(len(answer)))
        request.send_header("Content-Type", "application/json")
        request.end_headers()
        request.wfile.write(answer)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    from huggingface_hub import constants

    receiver = Receiver()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", receiver.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # plain LFS, as any mirror has it
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield receiver
    receiver.close()


def test_a_run_is_sent_with_its_card_and_without_what_is_private(miaobi, hub, trained, tmp_path: Path):
    run = trained("qwen3")
    (tmp_path / "my.gguf").write_bytes(b"GGUF" + bytes(100))
    answer = miaobi("push", run, NAME, f"--gguf={tmp_path / 'my.gguf'}", "--private", "--json")
    assert answer.code == 0, answer.err
    told = json.loads(answer.out)
    assert told["url"] == f"{hub.url}/{NAME}"
    assert {file["path"] for file in told["files"]} == set(hub.files)
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "my.gguf"} <= set(hub.files)
    assert not any(name.startswith("train_state") or name == "checksums.json" for name in hub.files)
    best = pointed(run / "checkpoints" / "best")
    for name, content in hub.files.items():
        local = tmp_path / "my.gguf" if name == "my.gguf" else best / name
        assert hashlib.sha256(content).digest() == hashlib.sha256(local.read_bytes()).digest()
    (tmp_path / "back.safetensors").write_bytes(hub.files["model.safetensors"])
    with safe_open(tmp_path / "back.safetensors", "pt") as weights:
        assert len(weights.keys()) > 5
    assert ModelCard(hub.files["README.md"].decode()).data.library_name == "transformers"
    assert hub.created[0]["name"] == "my-gpt"
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    assert hub.tokens == {"Bearer hf_test"}
    everything = b"".join(content for name, content in hub.files.items() if name != "model.safetensors")
    assert str(run.parent).encode() not in everything


def test_a_dry_run_tells_what_would_be_sent_and_sends_nothing(miaobi, hub, trained):
    answer = miaobi("push", trained("qwen3"), NAME, "--dry_run")
    assert answer.code == 0, answer.err
    assert "model.safetensors" in answer.out
    assert "nothing was sent" in answer.out
    assert hub.created == []
    assert hub.files == {}


@pytest.mark.parametrize(("status", "says"), [(401, "HF_TOKEN"), (403, "right to write"), (500, "tries again")])
def test_what_the_hub_refuses_says_what_to_do(miaobi, hub, trained, monkeypatch, status: int, says: str):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.status = status
    answer = miaobi("push", trained("qwen3"), NAME)
    assert answer.code == 2
    assert says in answer.err
    assert "\x1b" not in answer.err


@pytest.mark.parametrize("name", ["", "my-gpt", "a/b/c", "../x", "me/-x"])
def test_a_name_that_no_hub_has_is_refused(miaobi, hub, trained, name: str):
    answer = miaobi("push", trained("qwen3"), name)
    assert answer.code == 2
    assert hub.created == []


def test_a_model_without_a_card_is_not_sent(miaobi, hub, trained, tmp_path: Path):
    import shutil

    shutil.copytree(pointed(trained("qwen3") / "checkpoints" / "best"), tmp_path / "model")
    (tmp_path / "model" / "README.md").unlink()
    answer = miaobi("push", tmp_path / "model", NAME)
    assert answer.code == 2
    assert "README.md" in answer.err
    assert hub.files == {}


class ModelScope(Receiver):
    """ModelScope's API, as far as its client asks it."""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body, path = self.body(request), request.path.partition("?")[0]
        told: dict[str, object] = {}
        status = self.status
        if "Authorization" in request.headers:
            self.tokens.add(request.headers["Authorization"])
        if request.command == "GET" and path.endswith(f"/models/{NAME}") and not self.created:
            status = 404
        elif request.command == "POST" and path.endswith("/models"):
            self.created.append(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            told = {"objects": [{**thing, "actions": {"upload": {"href": f"{self.url}/put/{thing['oid']}"}}}
                                for thing in json.loads(body)["objects"]]}  # fmt: skip
        elif path.startswith("/put/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/put/")
            self.large[path.removeprefix("/put/")] = body
        elif "/commit/" in path and status == 200:
            for action in json.loads(body)["actions"]:
                is_large = action["type"] == "lfs"
                content = self.large[action["sha256"]] if is_large else base64.b64decode(action["content"])
                self.files[action["path"]] = content
        answer = json.dumps({"Code": status, "Success": status == 200, "Data": told, "Message": "no"}).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(answer)))
        request.send_header("Content-Type", "application/json")
        request.end_headers()
        request.wfile.write(answer)


@pytest.fixture
def model_scope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModelScope]:
    from modelscope_hub.config import set_default_config

    receiver = ModelScope()
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", receiver.url)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms_test")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    set_default_config(None)  # it reads the environment once
    yield receiver
    receiver.close()
    set_default_config(None)


def test_modelscope_gets_the_same_files_through_its_client(miaobi, model_scope, trained, tmp_path: Path):
    run = trained("qwen3")
    (tmp_path / "my.gguf").write_bytes(b"GGUF" + bytes(100))
    answer = miaobi("push", run, NAME, "--to=modelscope", f"--gguf={tmp_path / 'my.gguf'}", "--private", "--json")
    assert answer.code == 0, answer.err
    assert {file["path"] for file in json.loads(answer.out)["files"]} == set(model_scope.files)
    best = pointed(run / "checkpoints" / "best")
    for name, content in model_scope.files.items():
        assert content == (tmp_path / "my.gguf" if name == "my.gguf" else best / name).read_bytes(), name
    made = model_scope.created[0]  # its client asks again for each file
    assert made["License"] == "Other", "none was stated: its client would say Apache-2.0"
    assert made["Path"] + "/" + made["Name"] == NAME
    assert made["Visibility"] == 1, "private"
    assert model_scope.tokens == {"Bearer ms_test"}


@pytest.mark.parametrize("status", [401, 403])
def test_what_modelscope_refuses_says_what_to_do(miaobi, model_scope, trained, status: int):
    model_scope.status = status
    answer = miaobi("push", trained("qwen3"), NAME, "--to=modelscope")
    assert answer.code == 2
    assert "MODELSCOPE_API_TOKEN" in answer.err
    assert model_scope.files == {}

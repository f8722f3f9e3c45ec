"""Names of models: paths stay paths; downloads resume and are checked, against hubs served here."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from tests.flaky import LocalServer

from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError
from miaobi.model import hub
from miaobi.model.checkpoint import load_model, model_directory, save_model
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer

NAME = "someone/tiny-gpt"
COMMIT = "c" * 40


class Hub(LocalServer):
    """A model as Hugging Face and ModelScope serve it, with faults to order; large files lie in LFS."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.altered: dict[str, bytes] = {}  # sent instead, with the true checksum
        self.cut: list[int] = []  # after how many bytes of the weights the connection breaks, one try after another
        self.ranges = True
        self.gated = False
        self.config: dict = {"model_type": "gpt2"}
        self.sent: list[tuple[str, int]] = []  # (file, first byte) of every download
        super().__init__()

    def entry(self, name: str) -> dict:
        """What Hugging Face's API says of a file."""
        data = self.files[name]
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"size": len(data), "blobId": blob, "oid": blob}
        if name.endswith((".safetensors", ".bin")):
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(data), "pointerSize": 134}
        return entry

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        url = urlsplit(request.path)
        if url.path in (f"/api/models/{NAME}", f"/api/models/{NAME}/revision/main"):
            siblings = [{"rfilename": name, **self.entry(name)} for name in self.files]
            self.json(request, {"id": NAME, "sha": COMMIT, "siblings": siblings, "config": self.config})
        elif url.path == f"/api/models/{NAME}/tree/{COMMIT}":
            self.json(request, [{"type": "file", "path": name, **self.entry(name)} for name in self.files])
        elif match := re.fullmatch(rf"/{NAME}/resolve/({COMMIT}|main)/(.+)", url.path):
            self.file(request, match[2])
        elif url.path == f"/api/v1/models/{NAME}/repo/files":
            files = [
                {
                    "Path": name,
                    "Name": name,
                    "Type": "blob",
                    "Size": len(data),
                    "Sha256": hashlib.sha256(data).hexdigest(),
                }
                for name, data in self.files.items()
            ]
            self.json(request, {"Code": 200, "Success": True, "Data": {"Files": files}})
        elif url.path == f"/api/v1/models/{NAME}/repo":
            self.file(request, parse_qs(url.query)["FilePath"][0])
        else:
            self.json(request, {"error": "Repository not found", "Code": 404}, 404, "RepoNotFound")

    def json(self, request: BaseHTTPRequestHandler, value: object, status: int = 200, error: str = "") -> None:
        body = json.dumps(value).encode()
        request.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "X-Error-Code": error}
        for header in headers.items():
            request.send_header(*header)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def page(self, request: BaseHTTPRequestHandler) -> None:
        """What a network that wants a login answers to everything."""
        request.send_response(200)
        for header in {"Content-Type": "text/html", "Content-Length": str(len(PAGE))}.items():
            request.send_header(*header)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(PAGE)

    def file(self, request: BaseHTTPRequestHandler, name: str) -> None:
        if self.gated:
            return self.json(request, {"error": "gated"}, 403, "GatedRepo")
        if name not in self.files:
            return self.json(request, {"error": "no file"}, 404, "EntryNotFound")
        data, entry = self.altered.get(name, self.files[name]), self.entry(name)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")) if self.ranges else None
        start = int(asked[1]) if asked else 0
        request.send_response(206 if asked else 200)
        request.send_header("ETag", f'"{entry.get("lfs", entry)["oid"]}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(len(data) - start))
        if asked:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        if request.command == "HEAD":
            return None
        self.sent.append((name, start))
        broken = self.cut.pop(0) if self.cut and name == "model.safetensors" else None
        request.wfile.write(data[start:broken])
        if broken is not None:
            request.wfile.flush()
            request.close_connection = True
            request.connection.shutdown(2)
        return None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train_char(dict.fromkeys("皇马赢得比赛", 1))
    torch.manual_seed(0)
    cfg = ModelConfig(family="gpt2", n_layer=1, n_head=2, n_embd=64, block_size=16, vocab_size=tokenizer.vocab_size)
    save_model(directory, Transformer(cfg), tokenizer, (tokenizer.eot_id,))
    return directory


@pytest.fixture
def served(model: Path) -> Iterator[Hub]:
    """The model on a hub, among files that we have no use for."""
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    server = Hub(files | {"README.md": b"# tiny", "pytorch_model.bin": b"x" * 99, "flax_model.msgpack": b"x",
                          "model.fp16.safetensors": b"x", "onnx/model.onnx": b"x"})  # fmt: skip
    yield server
    server.close()


@pytest.fixture(autouse=True)
def forget() -> None:
    """Every test asks the hub anew."""
    hub.from_hugging_face.cache_clear()
    hub.from_model_scope.cache_clear()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, served: Hub) -> Hub:
    """Hugging Face's client on that hub, with a cache of its own. (It reads the environment once, when imported.)"""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # what it keeps of a stream that breaks
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return served


def same(path: Path, model: Path) -> bool:
    """Whether the weights at `path` are the model's."""
    ours, theirs = load_model(path)[0].state_dict(), load_model(model)[0].state_dict()
    return all(torch.equal(ours[key], theirs[key]) for key in theirs)


# Which names are hub names


def test_what_is_plainly_a_path_never_reaches_the_network(tmp_path, monkeypatch):
    def network(name: str) -> Path:
        raise AssertionError(f"{name} was looked up")

    monkeypatch.setattr(hub, "from_hugging_face", network)
    monkeypatch.setattr(hub, "from_model_scope", network)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "there").mkdir(parents=True)
    for name in ("my_run", "./x/y", "../x/y", "/x/y", "a/b/c", "runs/typo", "runs/there", "x\\y", "~/x", "-x/y", "x/"):
        assert hub.resolve(name) == Path(name)
        if name != "runs/there":
            with pytest.raises(UserError, match="no such directory"):
                model_directory(name)


def test_names_of_hubs_reach_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr(hub, "from_hugging_face", lambda name: asked.append(f"hf {name}") or tmp_path)
    monkeypatch.setattr(hub, "from_model_scope", lambda name: asked.append(f"ms {name}") or tmp_path)
    names = ("uer/gpt2-chinese-cluecorpussmall", "Qwen/Qwen3-0.6B", "modelscope:Qwen/Qwen3-0.6B", "a1/b_c.d")
    assert [hub.resolve(name) for name in names] == [tmp_path] * 4
    assert asked == [f"ms {n.partition(':')[2]}" if ":" in n else f"hf {n}" for n in names]
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    assert hub.resolve("Qwen/Qwen3-0.6B") == Path("Qwen/Qwen3-0.6B"), "what is here wins"


# Hugging Face


def test_what_we_read_is_fetched_once_and_nothing_else(online, model):
    path = model_directory(NAME)
    assert same(path, model)
    assert {p.name for p in path.iterdir()} == {p.name for p in model.iterdir()}
    assert sorted(name for name, _ in online.sent) == sorted(p.name for p in model.iterdir())
    hub.from_hugging_face.cache_clear()
    assert model_directory(NAME) == path
    assert len(online.sent) == len(list(model.iterdir())), "the cache serves the second time"


def test_where_symlinks_are_refused_nothing_is_fetched_twice(online, model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *args, **kwargs: False)
    for _ in range(2):
        hub.from_hugging_face.cache_clear()
        assert same(hub.resolve(NAME), model)
    assert starts(online) == [0]


def test_two_processes_fetch_a_file_once(online, model):
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import HfApi

    info = HfApi().model_info(NAME, files_metadata=True)
    (large,) = (sibling for sibling in info.siblings if sibling.rfilename == "model.safetensors")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: hub.fetch_large(NAME, info.sha, large), range(4)))
    assert starts(online) == [0]
    assert same(hub.resolve(NAME), model)


def test_bin_is_fetched_where_there_is_no_safetensors(online, model, tmp_path):
    from safetensors.torch import load_file

    torch.save(load_file(model / "model.safetensors"), tmp_path / "weights.bin")
    del online.files["model.safetensors"]
    online.files["pytorch_model.bin"] = (tmp_path / "weights.bin").read_bytes()
    path = hub.resolve(NAME)
    assert (path / "pytorch_model.bin").exists()
    assert same(path, model)


def starts(served: Hub) -> list[int]:
    """The first byte of each download of the weights."""
    return [start for name, start in served.sent if name == "model.safetensors"]


def test_a_download_that_is_cut_goes_on_where_it_stopped(online, model, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    online.cut = [20_000, 50_000]
    assert same(hub.resolve(NAME), model)
    first, second, third = starts(online)
    assert first == 0
    assert 12_000 < second <= 20_000
    assert 42_000 < third <= 50_000


def test_a_download_that_was_given_up_goes_on_in_the_next_command(online, model, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    online.cut = [20_000] * 7  # from the second try on nothing comes, until the client gives up
    with pytest.raises(UserError, match=r"could not be fetched .*Run the command again: .* goes on where it stopped"):
        hub.resolve(NAME)
    tries, online.cut = len(starts(online)), []
    assert same(hub.resolve(NAME), model)
    assert 12_000 < starts(online)[tries] <= 20_000


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_bytes_that_differ_from_the_checksum_are_refused_and_fetched_anew(online, model, name):
    online.altered = {name: online.files[name][:-9] + bytes(9)}  # of the same size, which is all that the client checks
    for _ in range(2):
        with pytest.raises(UserError, match=f"{name} was altered on the way"):
            hub.resolve(NAME)
    online.altered = {}
    assert same(hub.resolve(NAME), model)


def test_a_resumed_download_whose_beginning_rotted_is_refused(online, model, monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    online.cut = [20_000] * 7
    with pytest.raises(UserError, match="could not be fetched"):
        hub.resolve(NAME)
    (part,) = (tmp_path / "cache").rglob("*.part")
    part.write_bytes(bytes(len(part.read_bytes())))
    online.cut = []
    with pytest.raises(UserError, match=r"model\.safetensors was altered on the way"):
        hub.resolve(NAME)
    assert same(hub.resolve(NAME), model)


def test_a_hub_that_cannot_resume_is_asked_for_everything(online, model, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    online.cut, online.ranges = [20_000], False
    assert same(hub.resolve(NAME), model)
    assert starts(online) == [0, 0]


def test_an_unknown_name_says_where_it_was_looked_for(online):
    with pytest.raises(UserError, match=rf"no such directory here, and no such model on {online.url}"):
        model_directory("someone/else")
    with pytest.raises(UserError, match="no such directory here"):
        model_directory("some--one/else")  # not a name that the hub allows


def test_terms_that_are_not_accepted(online):
    online.gated = True
    with pytest.raises(UserError, match=rf"open {online.url}/{NAME}, accept.*HF_TOKEN"):
        hub.resolve(NAME)


def test_another_architecture_is_refused_before_its_weights_are_fetched(online):
    online.config = {"model_type": "mamba"}
    with pytest.raises(UserError, match=f"{NAME} is a mamba model; miaobi runs GPT2LMHeadModel"):
        hub.resolve(NAME)
    assert online.sent == []


def test_without_network_the_cache_serves_and_without_that_advice(online, model, monkeypatch, capsys):
    from huggingface_hub import constants

    for offline in (False, True):
        monkeypatch.setattr(constants, "ENDPOINT", online.url)
        hub.from_hugging_face.cache_clear()
        hub.resolve(NAME)
        capsys.readouterr()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
        hub.from_hugging_face.cache_clear()
        assert same(hub.resolve(NAME), model)
        assert ("using the copy" in capsys.readouterr().err) == (not offline)
        with pytest.raises(UserError, match="HF_HUB_OFFLINE=1 forbids" if offline else "HF_ENDPOINT=https://hf-mirror"):
            hub.resolve("someone/else")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


PAGE = b"<html>login</html>"
UNUSABLE = {  # what is wrong -> what the message says
    "socks": r"unset ALL_PROXY, or pip install 'httpx\[socks\]'",
    "page": r"not the hub, perhaps a network's login page: check [A-Z]+_ENDPOINT",
    "token": "_TOKEN holds characters that no token has",
}


@pytest.fixture
def spoil(served: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`spoil("socks")`: from now on no answer can be had, or none that means anything."""
    from huggingface_hub import close_session

    def command(what: str) -> None:
        if what == "socks":
            monkeypatch.setitem(sys.modules, "socksio", None)
            monkeypatch.setattr("requests.adapters.SOCKSProxyManager", missing_socks)
            for variable in ("NO_PROXY", "no_proxy"):
                monkeypatch.delenv(variable, raising=False)
            monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
        elif what == "page":
            monkeypatch.setattr(served, "answer", served.page)
        else:
            monkeypatch.setenv("HF_TOKEN", "我的令牌")
            monkeypatch.setenv("MODELSCOPE_API_TOKEN", "我的令牌")
        close_session()  # it reads the proxy once

    yield command
    monkeypatch.undo()
    close_session()


def missing_socks(*args: object, **kwargs: object) -> None:
    """What requests has in place of SOCKS where PySocks is not installed."""
    from requests.exceptions import InvalidSchema

    raise InvalidSchema("Missing dependencies for SOCKS support.")


@pytest.mark.parametrize("what", UNUSABLE)
def test_what_no_other_try_mends_says_what_does_and_the_cache_serves(online, model, spoil, capsys, what):
    hub.resolve(NAME)
    hub.from_hugging_face.cache_clear()
    spoil(what)
    assert same(hub.resolve(NAME), model)
    said = " ".join(capsys.readouterr().err.split())
    assert "using the copy" in said
    assert re.search(UNUSABLE[what], said)
    with pytest.raises(UserError, match=rf"someone/else could not be fetched from .*{UNUSABLE[what]}"):
        hub.resolve("someone/else")


def test_half_a_download_is_not_taken_for_a_model_when_the_network_is_gone(online, monkeypatch):
    from huggingface_hub import constants

    online.gated = True  # every file is refused: the cache knows the model's name at most
    with pytest.raises(UserError):
        hub.resolve(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="could not be fetched"):
        hub.resolve(NAME)


def test_a_full_disk_is_not_called_a_network_error(online, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):
        hub.resolve(NAME)


@pytest.mark.slow
def test_the_command_respects_hf_endpoint(served, tmp_path):
    settings = {"HF_ENDPOINT": served.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-m", "miaobi", "sample", NAME, "--start=皇马", "--num_samples=1", "--max_new_tokens=3",
         "--device=cpu", "--json"],
        env=os.environ | settings, capture_output=True, text=True, encoding="utf-8", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"][0]["text"].startswith("皇马")
    assert (tmp_path / "hub" / "models--someone--tiny-gpt").is_dir()


# ModelScope


@pytest.fixture
def model_scope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, served: Hub) -> Hub:
    """ModelScope's client on that hub, with a cache of its own."""
    from modelscope_hub.config import set_default_config

    set_default_config(None)  # it reads the environment once
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", served.url)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("modelscope_hub._download._DownloadControl.sleep", lambda self, seconds: None)
    return served


def test_modelscope_fetches_what_we_read_and_resumes(model_scope, model):
    model_scope.cut = [20_000]
    path = model_directory(f"modelscope:{NAME}")
    assert same(path, model)
    assert {p.name for p in path.iterdir() if not p.name.startswith(".")} == {p.name for p in model.iterdir()}
    first, second = starts(model_scope)
    assert first == 0
    assert 0 < second <= 20_000


def test_modelscope_refuses_altered_bytes(model_scope, model):
    data = model_scope.files["model.safetensors"]
    model_scope.altered = {"model.safetensors": data[:-9] + bytes(9)}
    with pytest.raises(UserError, match=r"modelscope:someone/tiny-gpt could not be fetched \(.*[Hh]ash"):
        hub.resolve(f"modelscope:{NAME}")
    model_scope.altered = {}
    assert same(hub.resolve(f"modelscope:{NAME}"), model)


def test_modelscope_without_the_model_the_network_or_weights(model_scope, model, monkeypatch):
    from modelscope_hub.config import set_default_config

    with pytest.raises(UserError, match="modelscope:someone/else could not be fetched"):
        hub.resolve("modelscope:someone/else")
    assert same(hub.resolve(f"modelscope:{NAME}"), model)
    for name in ("model.safetensors", "pytorch_model.bin"):
        del model_scope.files[name]
    for variable, value in (("CACHE", os.environ["MODELSCOPE_CACHE"] + "-2"), ("ENDPOINT", "http://127.0.0.1:9")):
        with monkeypatch.context() as patch:
            patch.setenv(f"MODELSCOPE_{variable}", value)
            set_default_config(None)
            hub.from_model_scope.cache_clear()
            if variable == "CACHE":
                with pytest.raises(UserError, match="has neither"):
                    hub.resolve(f"modelscope:{NAME}")
            else:
                assert same(hub.resolve(f"modelscope:{NAME}"), model), "the cache serves without network"


@pytest.mark.parametrize("what", UNUSABLE)
def test_modelscope_says_what_no_other_try_mends_and_the_cache_serves(model_scope, model, spoil, capsys, what):
    from modelscope_hub.config import set_default_config

    assert same(hub.resolve(f"modelscope:{NAME}"), model)
    hub.from_model_scope.cache_clear()
    spoil(what)
    set_default_config(None)
    assert same(hub.resolve(f"modelscope:{NAME}"), model)
    assert re.search(UNUSABLE[what], " ".join(capsys.readouterr().err.split()))
    with pytest.raises(UserError, match=rf"modelscope:someone/else could not be fetched .*{UNUSABLE[what]}"):
        hub.resolve("modelscope:someone/else")


def test_modelscope_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(UserError, match=r"pip install 'miaobi\[modelscope\]'"):
        hub.resolve(f"modelscope:{NAME}")

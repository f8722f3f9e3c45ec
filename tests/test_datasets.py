"""Public texts: resumed, verified, never in another file's place, and read by prepare."""

import hashlib
import json
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.conftest import sports_text
from tests.flaky import Flaky

from miaobi import download
from miaobi.datasets import PUBLIC, GetConfig, data_get, inside, is_data, mirrored
from miaobi.errors import UserError

BYTES = random.Random(0).randbytes(300_000)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Flaky]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    flaky = Flaky()
    flaky.files["/file"] = BYTES
    monkeypatch.setitem(PUBLIC, "file", replace(PUBLIC["chat"], url=f"{flaky.url}/file", file="file.txt"))
    yield flaky
    flaky.close()


def get(tmp_path: Path, name: str = "file", **how: str) -> dict:
    return data_get(GetConfig(name, str(tmp_path / "data"), **how))


# Downloads


def test_a_download_that_is_cut_goes_on_where_it_stopped(server, tmp_path):
    server.cut = [100_000, 200_000]
    told = get(tmp_path)
    assert (tmp_path / "data" / "file.txt").read_bytes() == BYTES
    assert told["files"][0]["sha256"] == hashlib.sha256(BYTES).hexdigest()
    starts = [start for _, start in server.asked]
    assert starts[0] == 0
    assert 0 < starts[1] <= 100_000 < starts[2] <= 200_000


def test_what_was_given_up_goes_on_in_the_next_command(server, tmp_path):
    server.cut = [100_000, *[1] * 20]
    with pytest.raises(UserError, match="goes on where this one stopped"):
        get(tmp_path)
    assert not (tmp_path / "data" / "file.txt").exists()
    server.cut, server.asked = [], []
    get(tmp_path)
    assert server.asked[0][1] > 50_000
    assert (tmp_path / "data" / "file.txt").read_bytes() == BYTES
    assert [p.name for p in (tmp_path / "data").iterdir() if not p.name.startswith(".")] == ["file.txt"]


def test_a_server_that_cannot_resume_is_asked_for_everything(server, tmp_path):
    server.cut, server.ranges = [100_000], False
    get(tmp_path)
    assert [start for _, start in server.asked] == [0, 0]
    assert (tmp_path / "data" / "file.txt").read_bytes() == BYTES


def test_a_file_that_changed_in_between_begins_anew(server, tmp_path):
    """Two halves of two files would be neither."""
    server.cut = [100_000, *[0] * 20]
    with pytest.raises(UserError):
        get(tmp_path)
    server.cut, server.files["/file"] = [], BYTES[::-1]
    get(tmp_path)
    assert (tmp_path / "data" / "file.txt").read_bytes() == BYTES[::-1]


@pytest.mark.parametrize("left", ["file.txt.part", "file.txt.part.etag"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_lies_in_the_place_of_a_part_is_neither_written_through_nor_waited_for(server, tmp_path, left, kind):
    mine, place = tmp_path / "mine.txt", tmp_path / "data" / left
    mine.write_text("mine")
    place.parent.mkdir()
    place.symlink_to(mine) if kind == "link" else os.mkfifo(place)
    get(tmp_path)
    assert (tmp_path / "data" / "file.txt").read_bytes() == BYTES
    assert mine.read_text() == "mine"


def test_a_server_that_sends_more_than_there_is_is_not_heard_to_its_end(server, tmp_path):
    with pytest.raises(download.AlteredError):
        download.fetch(f"{server.url}/file", tmp_path / "file.txt", "file", size=1000)
    assert not list(tmp_path.iterdir())


def test_a_part_that_is_whole_already_is_not_fetched_again(server, tmp_path):
    part = tmp_path / "whole.part"
    part.write_bytes(BYTES)
    download.fetch(f"{server.url}/file", tmp_path / "whole", "whole")
    assert (tmp_path / "whole").read_bytes() == BYTES


def test_a_part_that_is_too_long_begins_anew(server, tmp_path):
    (tmp_path / "x.part").write_bytes(BYTES + b"more")
    download.fetch(f"{server.url}/file", tmp_path / "x", "x")
    assert (tmp_path / "x").read_bytes() == BYTES


@pytest.mark.parametrize("expected", [{"sha256": "0" * 64}, {"size": 300_001}])
def test_what_is_not_what_was_to_come_is_removed(server, tmp_path, expected):
    with pytest.raises((download.AlteredError, *download.broken())):
        download.fetch(f"{server.url}/file", tmp_path / "x", "x", **expected)
    assert not (tmp_path / "x").exists()
    if "sha256" in expected:
        assert list(tmp_path.iterdir()) == []


# Names


def test_a_file_that_is_there_is_verified_and_not_fetched_again(server, tmp_path):
    get(tmp_path)
    before = len(server.asked)
    get(tmp_path)
    assert len(server.asked) == before
    (tmp_path / "data" / "file.txt").write_bytes(BYTES[:-1])
    with pytest.raises(UserError, match="SHA-256 differs"):
        get(tmp_path)


def test_a_file_of_the_users_own_is_never_replaced(server, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="did not come from"):
        get(tmp_path)
    assert (tmp_path / "data" / "file.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><title>Google Drive", b"\n<html lang=zh>"])
def test_a_page_is_not_taken_for_the_file(server, tmp_path, page):
    server.files["/file"] = page
    with pytest.raises(UserError, match="a web page instead of the file"):
        get(tmp_path)
    assert not (tmp_path / "data" / "file.txt").exists()


def test_what_is_gone_is_said(server, tmp_path):
    del server.files["/file"]
    with pytest.raises(UserError, match="HTTP 404"):
        get(tmp_path)


def test_a_mirror_stands_in_front_or_in_place_of_the_hub(monkeypatch):
    from huggingface_hub import constants

    raw = PUBLIC["hotel-reviews"].url
    assert mirrored(raw, "https://proxy.example/") == f"https://proxy.example/{raw}"
    weights = PUBLIC["small-gpt-90m"].url
    assert mirrored(weights, "https://m.example").startswith("https://m.example/cjl196/small-gpt/resolve/")
    monkeypatch.setattr(constants, "ENDPOINT", "https://hf-mirror.com")
    assert mirrored(weights, "").startswith("https://hf-mirror.com/cjl196/")
    with pytest.raises(UserError, match="mirror"):
        GetConfig("chat", mirror="hf-mirror.com")


def test_the_seeds_addresses_are_as_the_seeds_give_them():
    assert "1nEuew_KNpTMbyy7BO4c8bXMXN351RCPp" in PUBLIC["chat"].url
    assert PUBLIC["hotel-reviews"].url.endswith("/SophonPlus/ChineseNlpCorpus/master/datasets/ChnSentiCorp_htl_all/"
                                                "ChnSentiCorp_htl_all.csv")  # fmt: skip
    assert PUBLIC["small-gpt-300m"].url == "https://huggingface.co/cjl196/small-gpt/resolve/main/cpt300M.pth"
    assert all(text.license for text in PUBLIC.values())


def test_the_command_shows_licenses_and_what_to_do_next(miaobi, server, tmp_path):
    assert "license: none stated" in miaobi("data", "list").out
    server.files["/file"] = sports_text(30).encode()
    answer = miaobi("data", "get", "file", f"--out={tmp_path}")
    assert answer.code == 0, answer.err
    assert "license: none stated" in answer.out
    assert f"next: miaobi prepare {tmp_path / 'file.txt'} --format=dialogue" in answer.out
    prepared = miaobi("prepare", tmp_path / "file.txt", "--format=dialogue", f"--out={tmp_path / 'p'}", "--json")
    assert json.loads(prepared.out)["documents"] > 10


@pytest.mark.parametrize("name", ["chatt", "someone/news", "", "../x"])
def test_a_name_that_is_none_is_said(miaobi, name):
    answer = miaobi("data", "get", name)
    assert answer.code == 2
    assert answer.err.count("\n") == 1


# The hubs


def test_a_data_set_of_hugging_face_is_fetched_verified_and_prepared(miaobi, server, tmp_path):
    rows = "".join(json.dumps({"text": text}) + "\n" for text in sports_text(40).split("\n\n"))
    server.dataset = {"README.md": b"# news", "data/train.jsonl": rows.encode(), "data/test.jsonl": b'{"text": "x"}\n',
                      "code.py": b"print()", ".gitattributes": b""}  # fmt: skip
    server.cut = [len(rows) // 2]
    answer = miaobi("data", "get", "hf:someone/news:train", f"--out={tmp_path}", f"--mirror={server.url}", "--json")
    assert answer.code == 0, answer.err
    told = json.loads(answer.out)
    assert told["license"] == "cc-by-4.0"
    assert [Path(file["path"]).name for file in told["files"]] == ["train.jsonl"]
    assert len(server.asked) == 2
    done = miaobi(*told["next"].split()[1:], "--json")
    assert json.loads(done.out)["documents"] > 20
    assert miaobi("data", "get", "hf:someone/news:train", f"--out={tmp_path}", f"--mirror={server.url}").code == 0
    assert len(server.asked) == 2


def test_bytes_that_differ_from_the_hubs_checksum_are_refused(server, tmp_path):
    server.dataset = {"train.jsonl": b'{"text": "yes"}\n'}
    server.altered = {"train.jsonl": b'{"text": "not"}\n'}
    with pytest.raises(UserError, match="is not what was to come"):
        get(tmp_path, "hf:someone/news", mirror=server.url)
    assert not list((tmp_path / "data").rglob("train.jsonl"))


@pytest.mark.parametrize("name", ["../../evil.jsonl", "/etc/evil.txt", "a/../../b.txt", "C:\\evil.txt", "a\\..\\b.txt"])
def test_a_name_cannot_leave_its_directory(server, tmp_path, name):
    server.dataset = {name: b"x"}
    with pytest.raises(UserError, match="not in its directory"):
        get(tmp_path, "hf:someone/news", mirror=server.url)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert inside(Path("p"), "a/b.txt") == Path("p/a/b.txt")


def test_a_split_or_name_that_is_not_there_says_what_is(server, tmp_path):
    server.dataset = {"data/train-00000-of-00001.parquet": b"x"}
    with pytest.raises(UserError, match=r"a split validation.*train-00000"):
        get(tmp_path, "hf:someone/news:validation", mirror=server.url)
    with pytest.raises(UserError, match="no data set someone/else"):
        get(tmp_path, "hf:someone/else", mirror=server.url)


def test_which_files_are_data():
    assert is_data("data/train-00000-of-00002.parquet", "train")
    assert is_data("a.jsonl.gz", "")
    assert is_data("x.zip", "")
    assert not any(is_data(name, "") for name in ("README.md", "x.py", ".cache/a.txt", "w.bin", "dataset_infos.json"))
    assert not is_data("data/test.csv", "train")


def test_modelscope_is_asked_through_its_client(monkeypatch, tmp_path):
    modelscope = pytest.importorskip("modelscope_hub")
    seen = {}

    def download_repo(self, name: str, kind: str, local_dir: Path) -> Path:
        seen.update(name=name, kind=kind)
        (local_dir / "data").mkdir(parents=True)
        (local_dir / "data" / "train.txt").write_text("中国\n", encoding="utf-8")
        return local_dir

    monkeypatch.setattr(modelscope.HubApi, "download_repo", download_repo)
    told = get(tmp_path, "modelscope:someone/news")
    assert seen == {"name": "someone/news", "kind": "dataset"}
    assert told["files"][0]["path"].endswith("train.txt")

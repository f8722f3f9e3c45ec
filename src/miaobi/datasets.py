"""`miaobi data`: public texts by name, downloaded once, resumed when cut off, and known by their SHA-256.

Named ones come from the addresses that their projects give; `hf:OWNER/NAME[:SPLIT]` and `modelscope:OWNER/NAME` are
data sets of the hubs, through the hubs' own libraries.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from miaobi import download
from miaobi.console import log
from miaobi.corpus.folders import COMPRESSION, FORMAT_BY_NAME, TEXT_SUFFIXES
from miaobi.errors import UserError, number_of
from miaobi.files import read_record, sha256, write_json
from miaobi.kinds import Location, Positional
from miaobi.model.hub import HUB_NAME, MODELSCOPE, TIMEOUT, next_step, reason
from miaobi.settings import suggest

HF = "hf:"
RECORD = ".source.json"
"""Beside a file or in a directory that was downloaded: what it is and where it came from."""


@dataclass(frozen=True)
class PublicText:
    """A file that a project points to."""

    what: str
    url: str
    file: str
    """Its name in --out; where the project's own commands look for it."""
    license: str
    """As its publisher states it."""
    next: str
    """The command that goes on with it; {path} is the file."""


PUBLIC = {
    "chat": PublicText(
        "small-gpt's dialogues: short Chinese chats, an utterance a line, a blank line between two",
        "https://drive.usercontent.google.com/download?id=1nEuew_KNpTMbyy7BO4c8bXMXN351RCPp&export=download&confirm=t",
        "train.txt",
        "none stated",
        "miaobi prepare {path} --format=dialogue --out=data/chat",
    ),
    "hotel-reviews": PublicText(
        "ChnSentiCorp_htl_all: about 7,800 hotel reviews, label 1 (good) or 0 (bad)",
        "https://raw.githubusercontent.com/SophonPlus/ChineseNlpCorpus/master/datasets/ChnSentiCorp_htl_all/"
        "ChnSentiCorp_htl_all.csv",
        "ChnSentiCorp_htl_all.csv",
        "none stated; published for research",
        "miaobi classify train configs/sentiment.yaml --data={path} --base_model=MODEL",
    ),
    "small-gpt-90m": PublicText(
        "small-gpt's checkpoint of 90M parameters; its vocabulary is that of `chat`",
        "https://huggingface.co/cjl196/small-gpt/resolve/main/cpt90M.pth",
        "cpt90M.pth",
        "none stated",
        "miaobi convert small-gpt {path} --corpus=data/train.txt",
    ),
    "small-gpt-300m": PublicText(
        "small-gpt's checkpoint of 300M parameters; its vocabulary is that of `chat`",
        "https://huggingface.co/cjl196/small-gpt/resolve/main/cpt300M.pth",
        "cpt300M.pth",
        "none stated",
        "miaobi convert small-gpt {path} --corpus=data/train.txt",
    ),
}


@dataclass(frozen=True)
class ListConfig:
    """Names that `miaobi data get` knows."""


@dataclass(frozen=True)
class GetConfig:
    """A public text by its name."""

    name: Positional[str]
    """A name of `miaobi data list`; hf:OWNER/NAME, or hf:OWNER/NAME:SPLIT for one split; modelscope:OWNER/NAME."""
    out: Location = "data"
    """Directory that it is put into; data sets of a hub get one of their own in it."""
    mirror: str = ""
    """Where to fetch from instead. Of Hugging Face: another address of the hub, as HF_ENDPOINT (https://hf-mirror.com);
    of others: an address that is put in front of theirs."""

    def __post_init__(self) -> None:
        if self.mirror and not re.match(r"https?://[^/\s]+", self.mirror):
            raise UserError(f"mirror is {self.mirror[:80]!r}; give an address, such as https://hf-mirror.com")


@dataclass(frozen=True)
class Origin:
    """What is known of a download."""

    url: str
    license: str
    sha256: dict[str, str]
    """Of every file, by its path."""


def data_list(cfg: ListConfig) -> dict[str, Any]:
    """`miaobi data list`: sets [{name, what, license, url}, ...]."""
    return {"sets": [{"name": name, "what": text.what, "license": text.license, "url": text.url}
                     for name, text in PUBLIC.items()]}  # fmt: skip


def data_get(cfg: GetConfig) -> dict[str, Any]:
    """`miaobi data get`. Returns name, files [{path, bytes, sha256}], license, source, next.

    Raises UserError for an unknown name, something else in its place, and what cannot be fetched or is not what the
    publisher says.
    """
    if cfg.name.startswith(HF):
        return from_hugging_face(cfg)
    if cfg.name.startswith(MODELSCOPE):
        return from_model_scope(cfg)
    if cfg.name not in PUBLIC:
        hint = f" For a data set of Hugging Face write hf:{cfg.name}" if HUB_NAME.fullmatch(cfg.name) else ""
        raise UserError(f"no data set {cfg.name[:80]!r}.{suggest(cfg.name, list(PUBLIC))} `miaobi data list` "
                        f"shows those there are.{hint}")  # fmt: skip
    return from_project(cfg, PUBLIC[cfg.name])


def from_project(cfg: GetConfig, text: PublicText) -> dict[str, Any]:
    """A named file. The first download is trusted; from then on it is known by its SHA-256."""
    path = Path(cfg.out) / text.file
    record = path.with_name(f".{path.name}{RECORD}")
    log(f"{cfg.name}: {text.what}\nlicense: {text.license}; from {text.url}")
    if path.exists():
        known = read_record(record, Origin) if record.is_file() else None
        if known is None or known.url != text.url:
            raise UserError(f"{path} is there already, and did not come from {text.url}: give another --out")
        if known.sha256.get(path.name) != sha256(path):
            raise UserError(f"{path} is not what was downloaded (its SHA-256 differs); remove it to fetch it anew")
        log(f"{path} is there already, and whole")
    else:
        fetch(mirrored(text.url, cfg.mirror), path, text.url)
        if looks_like_a_page(path):
            path.unlink()
            raise UserError(f"{text.url} answered with a web page instead of the file (a login, or too many downloads "
                            f"today); fetch it with a browser and put it at {path}, or give a --mirror")  # fmt: skip
        write_json(record, asdict(Origin(text.url, text.license, {path.name: sha256(path)})))
    return result(cfg, [path], text.license, text.url, text.next.format(path=path))


def mirrored(url: str, mirror: str) -> str:
    """Where a file is fetched from."""
    hub = "https://huggingface.co/"
    if url.startswith(hub):
        from huggingface_hub import constants

        return f"{(mirror or constants.ENDPOINT).rstrip('/')}/{url.removeprefix(hub)}"
    return f"{mirror.rstrip('/')}/{url}" if mirror else url


def looks_like_a_page(path: Path) -> bool:
    """Whether it is HTML."""
    with path.open("rb") as file:
        return bool(re.match(rb"\s*(<!doctype html|<html)", file.read(200), re.IGNORECASE))


def fetch(url: str, path: Path, name: str, digest: str = "", size: int | None = None, headers: Any = None) -> None:
    """`download.fetch`, with errors in words."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download.fetch(url, path, path.name, digest, size, headers)
    except download.AlteredError as e:
        raise UserError(f"{name}: what came is not what was to come (its size or SHA-256 differs); "
                        "the same command fetches it anew") from e  # fmt: skip
    except download.AnswerError as e:
        raise UserError(f"{name} could not be fetched: {e}. Is it still there? Else give a --mirror") from e
    except download.broken() as e:
        raise UserError(f"{name} could not be fetched ({reason(e)}). The same command goes on where this one stopped; "
                        "behind a wall give a --mirror, or set HTTPS_PROXY") from e  # fmt: skip


def result(cfg: GetConfig, paths: list[Path], license: str, source: str, then: str) -> dict[str, Any]:
    """The object of --json."""
    files = [{"path": str(path), "bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths]
    return {"name": cfg.name, "files": files, "license": license, "source": source, "next": then}


# The hubs


def from_hugging_face(cfg: GetConfig) -> dict[str, Any]:
    """Data files of a data set, each compared with the hub's checksum."""
    from huggingface_hub import HfApi, constants, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import build_hf_headers

    name, _, split = cfg.name.removeprefix(HF).partition(":")
    site = (cfg.mirror or constants.ENDPOINT).rstrip("/")
    try:
        info = HfApi(endpoint=site).dataset_info(name, files_metadata=True, timeout=TIMEOUT)
    except GatedRepoError as e:
        raise UserError(f"{name} wants you to accept its terms first: open {site}/datasets/{name}, accept, then log in "
                        "with `hf auth login`, or set HF_TOKEN") from e  # fmt: skip
    except (RepositoryNotFoundError, HFValidationError) as e:
        raise UserError(f"no data set {name[:80]} on {site}; check the name. A private one needs HF_TOKEN") from e
    except (OSError, ValueError, ImportError, *HfHubHTTPError.__bases__) as e:
        advice = next_step(e, "HF_TOKEN", "HF_ENDPOINT") or "In mainland China give --mirror=https://hf-mirror.com"
        raise UserError(f"{name} could not be looked up on {site} ({reason(e)}). {advice}") from e
    siblings = info.siblings or []
    chosen = {sibling.rfilename: sibling for sibling in siblings if is_data(sibling.rfilename, split)}
    if not chosen:
        there = ", ".join(sorted(s.rfilename for s in siblings if is_data(s.rfilename, ""))[:6]) or "none"
        raise UserError(f"{name} has no data files{f' of a split {split}' if split else ''} that `miaobi prepare` "
                        f"reads; of those that it reads there are: {there}")  # fmt: skip
    license = str((info.card_data or {}).get("license") or "none stated")
    log(f"{name}: {number_of(len(chosen), 'file')}\nlicense: {license}; from {site}/datasets/{name}")
    directory = Path(cfg.out) / name.replace("/", "--")
    known = read_known(directory)
    paths = []
    for file, sibling in chosen.items():
        path = inside(directory, file)
        digest = sibling.lfs["sha256"] if sibling.lfs else ""
        if path.is_file() and known.get(file) == sha256(path) and digest in ("", known[file]):
            log(f"{path} is there already, and whole")
        else:
            url = hf_hub_url(name, file, repo_type="dataset", revision=info.sha, endpoint=site)
            fetch(url, path, f"{name}: {file}", digest, sibling.size, build_hf_headers())
            known[file] = sha256(path)
            write_json(directory / RECORD, asdict(Origin(f"{site}/datasets/{name}", license, known)))
        paths.append(path)
    return result(
        cfg, paths, license, f"{site}/datasets/{name}", f"miaobi prepare {directory} --out={directory}-prepared"
    )


def read_known(directory: Path) -> dict[str, str]:
    """SHA-256 of what was downloaded into a directory before."""
    try:
        return dict(read_record(directory / RECORD, Origin).sha256)
    except UserError:
        return {}


def is_data(file: str, split: str) -> bool:
    """Whether a file of a data set is text that `prepare` reads, and of the split: by its name, or its directory's."""
    path = PurePosixPath(file)
    inner = PurePosixPath(path.stem) if path.suffix.lower() in COMPRESSION else path
    reads = inner.suffix.lower() in {*FORMAT_BY_NAME, *TEXT_SUFFIXES} - {".md", ".json"} or (
        path.suffix.lower() == ".zip" or (inner.suffix.lower() == ".json" and not path.name.startswith("dataset_info"))
    )
    hidden = any(part.startswith(".") and part != ".." for part in path.parts)
    words = re.split(r"[-_./]", file.lower())
    return reads and not hidden and path.name != "LICENSE.txt" and (not split or split.lower() in words)


def inside(directory: Path, file: str) -> Path:
    """Where a file of a hub lies. Raises UserError for a name that would lead elsewhere."""
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or "\\" in file or "\0" in file or ":" in file:
        raise UserError(f"the data set names a file {file[:80]!r}, which is not in its directory; nothing was written")
    return directory.joinpath(*path.parts)


def from_model_scope(cfg: GetConfig) -> dict[str, Any]:
    """A data set of ModelScope; its client resumes, and compares SHA-256 itself."""
    try:
        from modelscope_hub import HubApi
        from modelscope_hub.errors import HubError
    except ImportError as e:
        raise UserError(f"{cfg.name} needs a package more: pip install 'miaobi[modelscope]'") from e
    name = cfg.name.removeprefix(MODELSCOPE)
    directory = Path(cfg.out) / name.replace("/", "--")
    try:
        api = HubApi(endpoint=cfg.mirror or None)
        api.download_repo(name, "dataset", local_dir=directory)
    except (HubError, OSError, ValueError, ImportError) as e:
        raise UserError(f"{cfg.name} could not be fetched ({reason(e)}). Check the name; the same command goes on "
                        "where this one stopped") from e  # fmt: skip
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and is_data(p.relative_to(directory).as_posix(), ""))
    if not paths:
        raise UserError(f"{directory}: no file of {name} is one that `miaobi prepare` reads")
    log(f"{name}: its license stands in {directory / 'README.md'}")
    return result(
        cfg, paths, "see its README.md", f"{MODELSCOPE}{name}", f"miaobi prepare {directory} --out={directory}-prepared"
    )

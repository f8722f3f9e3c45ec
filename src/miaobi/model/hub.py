"""Models by name: downloaded from Hugging Face or ModelScope once, resumed when cut off, checked against checksums."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from miaobi import download, files
from miaobi.console import log
from miaobi.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

FILE = re.compile(r".*\.(pth|pt|ckpt|bin|safetensors|gguf|ya?ml|py|jsonl?|txt)", re.IGNORECASE)
"""Names of files, which no model of a hub has: `checkpoints/cpt4000.pth` that is missing is not asked for there."""
HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
MODELSCOPE = "modelscope:"
SETTINGS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")  # only where the former are not
UNUSABLE = (ImportError, ValueError)
"""What the clients raise for a SOCKS proxy without its package, a page that is not JSON, a token that is none."""
TIMEOUT = 15  # seconds for the hub's first answer; a mirror abroad needs a few


def resolve(name: str) -> Path:
    """The directory that `name` means: one that exists, else a download of OWNER/NAME or modelscope:OWNER/NAME.

    What is plainly a path (starts with . or /, has several parts, lies in a directory that exists) is returned as it
    is, existing or not. Raises UserError for a model that is not on the hub, or cannot be fetched.
    """
    path = Path(name)
    if path.exists():
        return path
    if name.startswith(MODELSCOPE):
        return from_model_scope(name.removeprefix(MODELSCOPE))
    if HUB_NAME.fullmatch(name) and not FILE.fullmatch(name) and not path.parent.exists():
        return from_hugging_face(name)
    return path


@functools.cache
def from_hugging_face(name: str) -> Path:
    """The newest snapshot of OWNER/NAME in huggingface_hub's cache (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN).

    Files are checked against the hub's checksums (huggingface_hub compares sizes). Without network the newest
    snapshot in the cache is taken. Raises UserError.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    site = constants.ENDPOINT
    try:
        info = HfApi().model_info(name, files_metadata=True, timeout=TIMEOUT)
        check_architecture(name, (info.config or {}).get("model_type"))
        names = wanted([sibling.rfilename for sibling in info.siblings or []])
        files = [sibling for sibling in info.siblings or [] if sibling.rfilename in names]
        for sibling in files:
            fetch_large(name, info.sha, sibling)
        path = Path(snapshot_download(name, allow_patterns=names))
    except (GatedRepoError, RepositoryNotFoundError, HFValidationError) as e:
        if isinstance(e, GatedRepoError):
            raise UserError(f"{name} wants you to accept its terms first: open {site}/{name}, accept, "
                            "then log in with `hf auth login`, or set HF_TOKEN") from e  # fmt: skip
        raise UserError(f"no model {name}: no such directory here, and no such model on {site}. Check the name; "
                        "a private model needs `hf auth login`, or HF_TOKEN") from e  # fmt: skip
    except (OSError, *UNUSABLE, *HfHubHTTPError.__bases__) as e:  # requests', httpx's or httpx2's, by its version
        if not_the_network(e):
            raise
        advice = next_step(e, "HF_TOKEN", "HF_ENDPOINT")
        if (cached := in_cache(functools.partial(snapshot_download, name, local_files_only=True))) is not None:
            if not isinstance(e, OfflineModeIsEnabled):
                tell_cached(site, e, name, advice)
            return cached
        if isinstance(e, OfflineModeIsEnabled):
            raise UserError(f"no model {name}: no such directory here, nor in the cache of Hugging Face, and "
                            "HF_HUB_OFFLINE=1 forbids to look further; unset it") from e  # fmt: skip
        raise UserError(
            f"{name} could not be fetched from {site} ({reason(e)}). "
            + (advice or "Run the command again: the download goes on where it stopped. In mainland China set "
               "HF_ENDPOINT=https://hf-mirror.com, or take modelscope:OWNER/NAME")
        ) from e  # fmt: skip
    for sibling in files:
        verify_small(path / sibling.rfilename, sibling, name)
    return path


@functools.cache
def from_model_scope(name: str) -> Path:
    """The newest snapshot of OWNER/NAME in ModelScope's cache; its client resumes, and compares SHA-256 itself.

    Without network the one in the cache is taken. Raises UserError.
    """
    try:
        from modelscope_hub import HubApi
        from modelscope_hub.errors import HubError, NetworkError, RequestTimeoutError, ServerError
    except ImportError as e:
        raise UserError(f"{MODELSCOPE}{name} needs a package more: pip install 'miaobi[modelscope]'") from e

    download = functools.partial(HubApi().download_repo, name, "model")
    try:
        directory = with_weights(download)
    except (HubError, OSError, *UNUSABLE) as e:
        if not_the_network(e):
            raise
        advice = next_step(e, "MODELSCOPE_API_TOKEN", "MODELSCOPE_ENDPOINT")
        offline = not isinstance(e, HubError) or isinstance(e, (NetworkError, RequestTimeoutError, ServerError))
        directory = in_cache(functools.partial(download, local_files_only=True)) if offline else None
        if directory is None:
            raise UserError(
                f"{MODELSCOPE}{name} could not be fetched ({reason(e)}). "
                + (advice or "Check the name; run the command again: the download goes on where it stopped")
            ) from e
        tell_cached("ModelScope", e, name, advice)
    if directory is None:
        raise UserError(f"{MODELSCOPE}{name} has neither model.safetensors nor pytorch_model.bin; take another model")
    return directory


def wanted(files: list[str]) -> list[str]:
    """What we read of a model's files: settings, and the weights in one format."""

    def among(patterns: tuple[str, ...]) -> list[str]:
        return [file for file in files if any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)]

    return among(SETTINGS) + (among(SAFETENSORS) or among(PICKLES))


def with_weights(download: Callable[..., str | Path]) -> Path | None:
    """The directory that `download(allow_patterns=...)` gives, with safetensors or else .bin; None without either."""
    for weights in (SAFETENSORS, PICKLES):
        path = Path(download(allow_patterns=[*SETTINGS, *weights]))
        if any(next(path.glob(pattern), None) for pattern in weights):
            return path
    return None


def in_cache(look: Callable[..., str | Path]) -> Path | None:
    """The snapshot that `look(allow_patterns=...)` finds on this machine, None if there is no whole one."""
    try:
        return with_weights(look)
    except Exception:  # each client, in each version, has its own class for "not in the cache"
        return None


def check_architecture(name: str, kind: str | None) -> None:
    """Raise UserError, before gigabytes are fetched, for a model_type that the decoder does not have."""
    from miaobi.model.hf_config import ARCHITECTURES

    if kind is not None and kind not in ARCHITECTURES and not kind.startswith("miaobi-"):  # ours that others refuse
        raise UserError(f"{name} is a {kind} model; miaobi runs {', '.join(ARCHITECTURES.values())}")


def fetch_large(name: str, commit: str, sibling: RepoSibling) -> None:
    """Put a large file's content into huggingface_hub's cache, going on where an earlier command stopped.

    (huggingface_hub itself begins anew in every process.) Raises UserError for bytes that differ from the SHA-256.
    Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    from filelock import FileLock
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers

    file = sibling.rfilename
    if sibling.lfs is None or isinstance(try_to_load_from_cache(name, file, revision=commit), str):
        return
    cache, folder = Path(constants.HF_HUB_CACHE), f"models--{name.replace('/', '--')}"
    sha256 = sibling.lfs["sha256"]
    content = cache / folder / "blobs" / sha256
    lock = cache / ".locks" / folder / f"{sha256}.part.lock"
    for directory in (content.parent, lock.parent):
        directory.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if content.exists():
            return
        url = hf_hub_url(name, file, revision=commit)
        try:
            download.fetch(url, content, file, sha256, sibling.lfs["size"], build_hf_headers())
        except download.AlteredError as e:
            raise UserError(_altered(name, file)) from e
        except download.AnswerError as e:
            get_hf_file_metadata(url)  # says what the client calls it: terms that are not accepted, a name, ...
            raise OSError(str(e)) from e


def verify_small(file: Path, sibling: RepoSibling, name: str) -> None:
    """Compare a file that lies in git itself with git's SHA-1 (a mirror may not tell it).

    Raises UserError after removing a file that differs, so that the next try fetches it again.
    """
    if sibling.lfs is not None or sibling.blob_id is None:
        return
    git = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    if files.checksum(file, git) != sibling.blob_id:
        file.resolve().unlink()  # the cache keeps contents apart from names
        file.unlink(missing_ok=True)
        raise UserError(_altered(name, file.name))


def _altered(name: str, file: str) -> str:
    return (
        f"{name}: {file} was altered on the way: its checksum is not the hub's. Run the command again to fetch it anew"
    )


def not_the_network(e: Exception) -> bool:
    """Whether it is the system's own error, such as a full disk. (Many errors of requests are ValueErrors too.)"""
    others = (ConnectionError, TimeoutError, ValueError)
    return isinstance(e, OSError) and e.errno is not None and not isinstance(e, others)


def tell_cached(site: str, e: Exception, name: str, advice: str) -> None:
    """Log that an older download serves, why, and what may help."""
    log(f"{site} cannot be reached ({type(e).__name__}); using the copy of {name} in the cache. {advice}".rstrip())


def next_step(e: Exception, token: str, endpoint: str) -> str:
    """What to do about an error that no other try mends; "" for the network's. token, endpoint: their variables."""
    if isinstance(e, UnicodeError):
        return f"{token} holds characters that no token has: set it anew, or unset it"
    if isinstance(e, UNUSABLE) and "SOCKS" in str(e):  # not one that cannot be reached
        return "For a SOCKS proxy a package is missing: unset ALL_PROXY, or pip install 'httpx[socks]' pysocks"
    if isinstance(e, ValueError):
        return f"What answered is not the hub, perhaps a network's login page: check {endpoint}, and the proxy"
    return ""


def reason(e: Exception) -> str:
    """First line of an error, or its class where it says nothing; of several failed files, the first one's."""
    for failed in getattr(e, "failed_files", {}).values():
        e = failed
        break
    return str(e).strip().split("\n")[0] or type(e).__name__

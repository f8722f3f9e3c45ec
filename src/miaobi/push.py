"""`miaobi push`: a model to Hugging Face or ModelScope, by the hub's own library: weights, card, GGUF beside."""

from __future__ import annotations

import contextlib
import fnmatch
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from miaobi.config import ModelChoice
from miaobi.console import log, shown
from miaobi.errors import UserError, number_of
from miaobi.kinds import Positional
from miaobi.model.card import CARD
from miaobi.model.checkpoint import model_directory
from miaobi.model.hub import HUB_NAME, next_step, reason

PUSHED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.gguf", "Modelfile", CARD, "adapter/*")
PRIVATE = ("checksums.json", "converted.json", "result.json")
"""What tells of the machine, or holds only here."""


@dataclass(frozen=True)
class PushConfig(ModelChoice):
    """A model, and where on a hub it goes."""

    name: Positional[str] = ""
    """OWNER/NAME there; made where it does not exist."""
    to: Literal["hf", "modelscope"] = "hf"
    """hf = Hugging Face (HF_TOKEN, or `hf auth login`; HF_ENDPOINT); modelscope = ModelScope (MODELSCOPE_API_TOKEN)."""
    gguf: Path | None = None
    """A file of `miaobi convert gguf` that goes beside the weights."""
    private: bool = False
    """A repository that is made is for its owner alone."""
    dry_run: bool = False
    """Only tell what would be sent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not HUB_NAME.fullmatch(self.name):
            raise UserError(
                f"where to? give OWNER/NAME of the hub, not {self.name[:80]!r}: miaobi push my_run me/my-gpt"
            )
        if self.gguf is not None and not self.gguf.is_file():
            raise UserError(f"--gguf={self.gguf}: no such file; make it with miaobi convert gguf")


def push(cfg: PushConfig) -> dict[str, Any]:
    """Returns to, name, url (None for a dry run), files [{path, bytes}].

    Raises UserError for a model without a card or weights, a missing token, and what the hub refuses.
    """
    directory = model_directory(cfg.model, cfg.checkpoint)
    files = sendable(directory)
    names = [file.relative_to(directory).as_posix() for file in files]
    if not any(name.endswith(".safetensors") and "/" not in name for name in names):
        raise UserError(f"{directory} has no weights in safetensors; nothing was sent")
    if CARD not in names:
        raise UserError(f"{directory} has no {CARD}: who finds the model there learns nothing of it. Write one there "
                        "(a model that this version trains or converts has one)")  # fmt: skip
    sent = [{"path": name, "bytes": file.stat().st_size} for name, file in zip(names, files, strict=True)]
    if cfg.gguf is not None:
        sent.append({"path": cfg.gguf.name, "bytes": cfg.gguf.stat().st_size})
    result = {"to": cfg.to, "name": cfg.name, "url": None, "files": sent}
    if cfg.dry_run:
        return result
    size = sum(file["bytes"] for file in sent) / 1e6
    log(f"sending {number_of(len(sent), 'file')}, {size:,.1f} MB, to {cfg.to}: {cfg.name}")
    send = to_hugging_face if cfg.to == "hf" else to_model_scope
    return result | {"url": send(cfg, directory, names)}


def sendable(directory: Path) -> list[Path]:
    """Files of a model directory that others need: no training state, no links, nothing that tells of this machine."""
    found = []
    for file in sorted(directory.rglob("*")):
        name = file.relative_to(directory).as_posix()
        wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in PUSHED)
        private = name in PRIVATE or name.startswith(("train_state/", ".")) or "/." in name
        if wanted and not private and file.is_file() and not file.is_symlink():
            found.append(file)
    return found


def to_hugging_face(cfg: PushConfig, directory: Path, names: list[str]) -> str:
    """One commit with everything. Returns the page of the model."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi(endpoint=constants.ENDPOINT)
    sent = [CommitOperationAdd(name, directory / name) for name in names]
    if cfg.gguf is not None:
        sent.append(CommitOperationAdd(cfg.gguf.name, cfg.gguf))
    try:
        api.create_repo(cfg.name, private=cfg.private or None, exist_ok=True)
        api.create_commit(cfg.name, sent, commit_message="Upload by miaobi push")
    except LocalTokenNotFoundError as e:
        raise UserError("no token for Hugging Face: log in with `hf auth login`, or set HF_TOKEN") from e
    except (OSError, ValueError, ImportError, *HfHubHTTPError.__bases__) as e:
        raise refused(cfg, constants.ENDPOINT, e, "HF_TOKEN", "HF_ENDPOINT") from e
    return f"{constants.ENDPOINT}/{cfg.name}"


def to_model_scope(cfg: PushConfig, directory: Path, names: list[str]) -> str:
    """ModelScope's client uploads file by file. Returns the page of the model."""
    try:
        from modelscope_hub import HubApi
        from modelscope_hub.errors import HubError
    except ImportError as e:
        raise UserError("ModelScope needs a package more: pip install 'miaobi[modelscope]'") from e
    api = HubApi()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it tells of every file
            if not api.repo_exists(cfg.name, "model"):
                api.create_repo(cfg.name, "model", visibility="private" if cfg.private else "public",
                                license=license_of(directory))  # fmt: skip
            sent = [(directory / name, name) for name in names]
            for file, name in [*sent, *([(cfg.gguf, cfg.gguf.name)] if cfg.gguf is not None else [])]:
                api.upload_file(cfg.name, "model", file, name, commit_message="Upload by miaobi push")
    except (HubError, OSError, ValueError, ImportError) as e:
        raise refused(cfg, "ModelScope", e, "MODELSCOPE_API_TOKEN", "MODELSCOPE_ENDPOINT") from e
    return f"https://modelscope.cn/models/{cfg.name}"


def license_of(directory: Path) -> str:
    """The card's license as ModelScope calls it; its client takes Apache-2.0 where nothing is said."""
    from huggingface_hub import ModelCard
    from modelscope_hub.constants import License

    stated = ""
    with contextlib.suppress(Exception):  # what PyYAML raises, and more: a person may have written it
        stated = str(ModelCard.load(directory / CARD, ignore_metadata_errors=True).data.license or "").lower()
    return next((known.value for known in License if known.value.lower() == stated), License.OTHER.value)


def refused(cfg: PushConfig, site: str, e: Exception, token: str, endpoint: str) -> UserError:
    """The error for what the hub, or the network, did not take."""
    said = shown(reason(e))[:200]
    status = getattr(getattr(e, "response", e), "status_code", None)  # ModelScope's errors have it themselves
    if status in (401, 403):
        advice = f"The token needs the right to write to {cfg.name}: make one in the settings of the hub, set {token}"
    else:
        advice = next_step(e, token, endpoint) or "The same command tries again"
    return UserError(f"{cfg.name} could not be sent to {site} ({said}). {advice}")

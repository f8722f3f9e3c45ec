"""The prepared data of a run: a prepared directory as it is, raw text prepared once into the run."""

from __future__ import annotations

from pathlib import Path

from miaobi.config import PrepareConfig, RunConfig
from miaobi.console import log
from miaobi.corpus.dataset import PreparedData
from miaobi.corpus.prepare import prepare
from miaobi.model.checkpoint import model_directory


def open_data(cfg: RunConfig, out: Path) -> PreparedData:
    """Open `cfg.data.data`; raw text is prepared into `out`/data the first time.

    Raises UserError for data that is missing, damaged or empty.
    """
    source = Path(cfg.data.data)
    if (source / "manifest.json").is_file():
        return PreparedData.open(source)
    prepared = out / "data"
    if not (prepared / "manifest.json").is_file():
        d = cfg.data
        start_from = cfg.train.init_from not in ("scratch", "resume")
        log(f"preparing {source} into {prepared}")
        prepare(
            [d.data],
            PrepareConfig(
                out=prepared,
                tokenizer=str(model_directory(cfg.train.init_from)) if start_from else d.tokenizer,
                vocab_size=None if start_from else cfg.model.vocab_size,
                format=d.format,
                field=d.field,
                dedup=d.dedup,
                split=d.split,
                val_fraction=d.val_fraction,
            ),
        )
    return PreparedData.open(prepared)

"""miaobi 妙笔: a small Chinese GPT, from raw text to a model that continues it.

What other programs may use, in the order in which it is used:

>>> import miaobi
>>> manifest = miaobi.prepare("novel.txt", out="novel")
>>> manifest["documents"]
300
>>> run = miaobi.train_run(data="novel", out_dir="my_run", n_layer=1, n_head=2, n_embd=32, block_size=32, batch_size=4,
...                        max_iters=20, eval_interval=10, eval_iters=1, sample_tokens=0, device="cpu")
>>> run["step"], run["stopped"]
(20, 'max_iters')
>>> scores = miaobi.evaluate("my_run", "novel", device="cpu")
>>> 0 < scores["bits_per_char"] < 12
True
>>> model = miaobi.load("my_run", device="cpu")
>>> model.tokenizer.decode(model.tokenizer.encode("皇马"))
'皇马'
>>> try:
...     miaobi.load("nothing")
... except miaobi.UserError as e:
...     print(str(e)[:19])
no model at nothing
"""

from __future__ import annotations

import typing
from pathlib import Path

from miaobi.errors import UserError

if typing.TYPE_CHECKING:
    from miaobi.generate.engine import LanguageModel

__all__ = ["UserError", "__version__", "evaluate", "load", "prepare", "train_run"]
__version__ = "0.1.0"

# torch and the rest are imported where they are used: `import miaobi` is quick.


def prepare(*sources: str | Path, out: str | Path, **settings: typing.Any) -> dict[str, typing.Any]:
    """`miaobi prepare`: text files, directories or globs into tokens on disk.

    settings: those of the command, by its names. Returns what its --json prints. Raises UserError.
    """
    from miaobi.corpus.config import PrepareConfig
    from miaobi.corpus.prepare import prepare as prepare_texts

    return prepare_texts([str(source) for source in sources], PrepareConfig(out=Path(out), **settings))


def train_run(config: str | Path | None = None, **settings: typing.Any) -> dict[str, typing.Any]:
    """`miaobi train`: train, or continue, the run that a YAML file and settings describe.

    Returns what its --json prints. Raises UserError.
    """
    from miaobi.report.page import writing_report
    from miaobi.settings import find_config, load_config
    from miaobi.train.loop import train

    cfg, origin = load_config(None if config is None else find_config(str(config)), list(settings.items()))
    with writing_report(cfg.train.out_dir):
        return train(cfg, origin)


def evaluate(model: str | Path, *data: str | Path, **settings: typing.Any) -> dict[str, typing.Any]:
    """`miaobi eval`: loss, perplexity, bits_per_char and bits_per_byte of a model on text, or with suite=DIRECTORY what
    `miaobi.yardstick.judge.judge` returns. Raises UserError.
    """
    from miaobi.train.config import EvalConfig
    from miaobi.yardstick.judge import judge

    return judge(EvalConfig(str(model), tuple(str(place) for place in data), **settings))


def load(name: str, device: str | None = None, dtype: str | None = None) -> LanguageModel:
    """Load a run directory or a Hugging Face model directory; see `miaobi.generate.engine.LanguageModel`."""
    from miaobi.generate.engine import load as load_language_model

    return load_language_model(name, device, dtype)

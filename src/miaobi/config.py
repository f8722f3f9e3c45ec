"""Settings of a run: frozen dataclasses whose attribute docstrings are the command line's help."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from miaobi.corpus.config import Corpus
from miaobi.errors import UserError, brief
from miaobi.kinds import Location, Positional
from miaobi.model.config import LoraConfig, ModelConfig


def check_license(license: str | None) -> None:
    """Raises UserError for what cannot be the hub's id of a license."""
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,60}", license):
        raise UserError(f"license is {brief(license)}; give the hub's id of it, in small letters: apache-2.0, mit, "
                        "cc-by-4.0, other")  # fmt: skip


@dataclass(frozen=True)
class ModelChoice:
    """Which model a verb works with."""

    model: Positional[Location] = ""
    """Run directory, model directory, or a hub name: OWNER/NAME, modelscope:OWNER/NAME. --out_dir=RUN says the same."""
    checkpoint: str = field(default="best", kw_only=True)
    """Which checkpoint of a run: best, last or step-N."""

    def __post_init__(self) -> None:
        if not self.model:
            raise UserError("which model? give a run or model directory, or a hub name: miaobi sample my_run")


@dataclass(frozen=True)
class OptionalModel(ModelChoice):
    """Which model a verb works with that has one of its own where none is named."""

    model: Positional[Location] = ""
    """Run directory, model directory, or a hub name: OWNER/NAME, modelscope:OWNER/NAME. --out_dir=RUN says the same.
    Default: the model that comes with miaobi."""

    def __post_init__(self) -> None:
        if not self.model and self.checkpoint != "best":
            raise UserError(
                f"--checkpoint={self.checkpoint} is of a run: name that as well, as in miaobi sample my_run"
            )


@dataclass(frozen=True, kw_only=True)
class Where:
    """What computes, and how exactly."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the matrix products; auto = the fastest that the device does well."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW, and the length of a step."""

    weight_decay: float = 0.1
    """AdamW's decay of matrices and embeddings."""
    beta1: float = 0.9
    """AdamW's first moment."""
    beta2: float = 0.95
    """AdamW's second moment."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 = no clipping."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name} is {getattr(self, name)}; give a number from 0 up to below 1")
        for name in ("weight_decay", "grad_clip"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}; it must be finite and cannot be negative")


@dataclass(frozen=True)
class DataConfig(Corpus):
    """Which text to learn from. What says how it is read is for raw text, which is prepared into the run."""

    data: Location = "data"
    """A directory made by `miaobi prepare`, or raw text (file, directory, glob), prepared once into the run."""
    packing: Literal["auto", "documents", "stream"] = "auto"
    """documents = several whole dialogues in a block, none attending to another; stream = windows cut anywhere, as for
    text. auto = documents for dialogues."""
    long_history: float = 0.1
    """Dialogues: share of the blocks in which they follow each other as one conversation, so that late positions are
    trained."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.long_history <= 1.0:
            raise UserError(f"long_history is {self.long_history}; give a share from 0 to 1")


@dataclass(frozen=True)
class OptimConfig(Optim):
    """How weights move. `None` means: the recipe of the family."""

    optimizer: Literal["auto", "adamw", "muon"] = "auto"
    """muon = Muon for the matrices inside blocks, AdamW for the rest; auto = muon for a qwen3 from scratch, else adamw
    (gpt2, and any MODEL that is tuned)."""
    learning_rate: float | None = None
    """Peak rate of AdamW; default 1e-3 (adamw), 3e-3 (muon's AdamW part up to 256 wide, then less by the root of the
    width; 1e-3 in a short run after bigram_init); a tenth of it where init_from names a MODEL, but 1e-3 for LoRA."""
    muon_learning_rate: float | None = None
    """Peak rate of Muon, in units of an orthogonal update scaled by sqrt(max(1, rows/columns)); default 0.02, in a
    short run after bigram_init 0.005."""
    min_lr: float | None = None
    """Rate at the end of the schedule; default learning_rate/10 (cosine), 0 (wsd)."""
    schedule: Literal["auto", "cosine", "wsd", "constant"] = "auto"
    """cosine = nanoGPT's; wsd = warm-up, stable, then linear decay; auto = cosine for adamw, wsd for muon."""
    decay_fraction: float = 0.5
    """wsd: share of the run spent decaying."""
    warmup_iters: int | None = None
    """Steps of linear warm-up; default 5% of max_iters, at most 2000 (adamw); 10 steps at most (muon)."""
    lr_decay_iters: int | None = None
    """Step at which the schedule ends; default max_iters."""
    decay_lr: bool = True
    """False: the rate is at its peak from the first step to the last, without warm-up; schedule=constant warms up."""
    momentum: float = 0.95
    """Muon's Nesterov momentum."""
    muon_weight_decay: float | None = None
    """Muon's decoupled decay of its matrices; default 0, and more where the text is repeated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("learning_rate", "muon_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < float("inf"):
                raise UserError(f"{name} is {rate}; it must be positive and finite, such as 1e-3")
        for name in ("min_lr", "warmup_iters", "lr_decay_iters", "muon_weight_decay"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}; it must be finite and cannot be negative")
        if not 0.0 <= self.momentum < 1.0:
            raise UserError(f"momentum is {self.momentum}; give a number from 0 up to below 1")
        if not 0.0 < self.decay_fraction <= 1.0:
            raise UserError(f"decay_fraction is {self.decay_fraction}; give a share in (0, 1]")


@dataclass(frozen=True)
class TrainConfig(Where):
    """The run."""

    out_dir: Location = "out"
    """Run directory: config.yaml, metrics.jsonl, TensorBoard events, checkpoints."""
    init_from: Location = "scratch"
    """scratch, resume (fail if there is nothing to resume), or a MODEL (run, model directory, hub name) whose weights
    and tokenizer to start from."""
    trainable: Literal["full", "lora"] = "full"
    """full = every weight moves; lora = small matrices added to those of the MODEL in init_from, which are frozen.
    Checkpoints are whole models either way; those of lora hold adapter/ in PEFT's format as well."""
    resume_from: Location | None = None
    """Run or checkpoint directory to continue from, when it is not out_dir; or a small-gpt .pth: its weights, not
    its steps, converted once with the vocabulary of the text that `data` names."""
    bigram_init: Literal["auto"] | bool = "auto"
    """Start a new qwen3 or llama with what the text's pairs of tokens say, counted in a second, instead of at random.
    auto = for text, where the run trains on at most a tenth of a token per parameter."""
    batch_size: int = 32
    """Sequences per step. With gradient_accumulation_steps it is nanoGPT's micro-batch: the product is the step."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches per step."""
    micro_batch_size: int | None = None
    """Sequences that go through the model at once; smaller needs less memory and changes no result. Default: the whole
    step, but about 2,048 tokens on a CPU."""
    max_iters: int = 2000
    """Steps of the whole run."""
    max_epochs: int | None = None
    """Stop after this many passes over the data; with max_iters as well, what comes first."""
    average_weights: Literal["auto"] | bool = "auto"
    """Average the weights along the run; both are scored at every evaluation, and the better of the two is the
    checkpoint's model. Training stays the same. auto = from scratch, where the text is read twice or more."""
    max_minutes: float | None = None
    """End within this many minutes of the command's start, text prepared and last evaluation included, with the
    schedule of the learning rate finished: as many steps as the speed allows; with max_iters as well, what comes
    first. Of a run that is cut and continued, the time between does not count."""
    eval_interval: int = 250
    """Steps between evaluations, checkpoints and printed samples."""
    eval_iters: int = 20
    """Evaluation size in batches, on fixed validation windows."""
    eval_first: bool = False
    """Evaluate once before the first step, to see where the model begins; the result is only printed."""
    eval_only: bool = False
    """Evaluate the last checkpoint and leave."""
    save_interval: int | None = None
    """Steps between further checkpoints that are kept for good; default none besides best and last."""
    log_interval: int = 10
    """Steps between lines of metrics.jsonl and of the log."""
    patience: int = 10
    """Evaluations without improvement after which the run stops; 0 = never."""
    sample_start: str = ""
    """Prompt of the sample printed at each evaluation; empty = the first characters of the validation text, or the
    first message of its first dialogue."""
    sample_tokens: int = 60
    """Length of that sample; 0 = none."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile; auto = where it works and the run is long enough to win its cost back."""
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """How processes that torchrun started share the work. ddp = each holds the whole model; fsdp = each holds a part of
    it (FSDP2), also for one process. auto = ddp, but fsdp where weights and optimizer would fill half of a GPU."""
    fsdp_shard_size: int | None = None
    """fsdp: ranks over which one copy of the model is split; default all. The GPUs of one machine = HSDP: whole copies
    on every machine, so that only gradients cross the network."""
    activation_checkpointing: bool = False
    """Keep only each block's input and compute the rest again in the backward pass: less memory, a third more work."""
    comm_timeout: int = 600
    """Seconds that a rank waits for the others before it gives up."""
    mirror: Location | None = None
    """Storage to which every checkpoint is copied, and from which a run without one goes on: a directory or an fsspec
    URL, such as s3://bucket/run (pip install s3fs) or oss://bucket/run (ossfs)."""
    seed: int = 1337
    """Seed of initialisation, data order and dropout."""
    license: str | None = None
    """License of the model, for its card, by the hub's id: apache-2.0, mit, cc-by-4.0, ..."""
    tensorboard_path: Location | None = None
    """Directory that gets the TensorBoard events as well; out_dir has them in any case."""
    trackers: tuple[Literal["wandb", "swanlab", "trackio"], ...] = ()
    """Log to Weights & Biases, SwanLab or trackio as well (pip install 'miaobi[track]')."""
    wandb_log: bool = False
    """nanoGPT's way to say --trackers=wandb."""
    wandb_project: str = "miaobi"
    """Project name there, at any of them."""
    wandb_run_name: str | None = None
    """Run name there, at any of them; default the name of out_dir and the run's id."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation_steps", "micro_batch_size", "max_iters", "max_epochs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("eval_interval", "eval_iters", "log_interval", "save_interval", "fsdp_shard_size", "comm_timeout"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_minutes is not None and not 0 < self.max_minutes < float("inf"):
            raise UserError(f"max_minutes is {self.max_minutes}; give minutes, such as 3 or 0.5")
        if self.fsdp_shard_size is not None and self.parallel != "fsdp":
            raise UserError("fsdp_shard_size is for --parallel=fsdp; add that, or leave fsdp_shard_size out")
        if self.parallel == "fsdp" and self.trainable == "lora":
            raise UserError("LoRA's adapters are small and its model is frozen: nothing is won by sharding them; "
                            "use --parallel=ddp")  # fmt: skip
        if not -(2**63) <= self.seed < 2**64:
            raise UserError(f"seed is {self.seed}; give a whole number of at most 64 bits")
        if self.patience < 0 or self.sample_tokens < 0:
            raise UserError("patience and sample_tokens cannot be negative; 0 switches them off")
        check_license(self.license)
        if self.trainable == "lora" and self.init_from == "scratch" and self.resume_from is None:
            raise UserError("trainable=lora tunes a model that is there already: name it with --init_from=MODEL "
                            "(a run or model directory), or use --trainable=full")  # fmt: skip

    @property
    def base_model(self) -> str | None:
        """The MODEL that init_from names, if it names one."""
        return None if self.init_from in ("scratch", "resume") else self.init_from

    @property
    def global_batch(self) -> int:
        """Sequences per step."""
        return self.batch_size * (self.gradient_accumulation_steps or 1)

    @property
    def micro_batch(self) -> int:
        """Sequences that go through the model at once."""
        return min(self.micro_batch_size or self.batch_size, self.global_batch)


@dataclass(frozen=True)
class RunConfig:
    """All settings of `miaobi train`, in sections; keys are unique across them."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if self.train.trainable == "lora" and self.optim.optimizer == "muon":
            raise UserError("optimizer=muon is for whole matrices, and LoRA trains thin ones; "
                            "leave optimizer out, or use --trainable=full")  # fmt: skip

"""The machine's best choice without flags, and one line of warning where a wish cannot be met."""

import pytest
import torch
from tests import processes
from tests.conftest import tiny

from miaobi import device as module
from miaobi.device import can_compile, peak_flops, pick_device, pick_dtype
from miaobi.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize(("name", "warnings"), [("auto", 0), ("cpu", 0), ("cuda", 1), ("cuda:1", 1), ("mps", 1)])
def test_a_device_that_is_not_there_becomes_the_cpu_with_one_line_of_warning(capsys, name, warnings):
    assert pick_device(name) == CPU
    assert capsys.readouterr().err.count("warning:") == warnings


def test_an_accelerator_is_taken_by_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto").type == "cuda"
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="2 CUDA devices"):
        pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto").type == "mps"


@pytest.mark.parametrize("name", ["gpu9", "meta", "xpu", "vulkan", "xla:0"])
def test_a_device_that_miaobi_does_not_know_is_refused(name):
    """Torch knows most of these."""
    with pytest.raises(UserError, match=f"{name}' is not known"):
        pick_device(name)


@pytest.mark.parametrize(
    ("has_bf16", "wish", "expected", "warnings"),
    [
        (True, "auto", torch.bfloat16, 0),
        (True, "bfloat16", torch.bfloat16, 0),
        (True, "float16", torch.bfloat16, 1),
        (True, "float32", torch.float32, 0),
        (False, "auto", torch.float32, 0),
        (False, "bfloat16", torch.float32, 1),
        (False, "float16", torch.float32, 1),
    ],
)
def test_precision_on_a_cpu_follows_its_hardware(monkeypatch, capsys, has_bf16, wish, expected, warnings):
    monkeypatch.setattr(module, "cpu_has_bf16", lambda: has_bf16)
    assert pick_dtype(wish, CPU) == expected
    assert capsys.readouterr().err.count("warning:") == warnings


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_older_gpus_get_float16(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(module, "gpu_has_bf16", lambda device: has_bf16)
    assert pick_dtype("auto", torch.device("cuda")) == expected


def test_the_gpu_in_question_is_asked_not_the_current_one(monkeypatch):
    """Two cards of different ages in one machine: only the second one, which is not current, has bf16."""
    current = [0]

    class On:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", On)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: current[-1] == 1)
    assert pick_dtype("auto", torch.device("cuda:1")) == torch.bfloat16
    assert pick_dtype("auto", torch.device("cuda:0")) == torch.float16


def test_a_cpu_without_a_compiler_does_not_compile(monkeypatch):
    monkeypatch.setattr(module.native.shutil, "which", lambda name: None)
    assert not can_compile(CPU)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA GeForce RTX 4080", 97.5),
        ("NVIDIA GeForce RTX 4080 SUPER", 104.4),
        ("NVIDIA GeForce RTX 4080 Laptop GPU", 49.3),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", 147.1),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA GeForce GTX 1080 Ti", None),
        ("NVIDIA GeForce MX450", None),
    ],
)
def test_cards_are_told_apart_by_the_words_of_their_names(name, tera):
    """As the driver spells them."""
    assert module.known_peak(name) == (None if tera is None else pytest.approx(tera * 1e12))


@pytest.mark.parametrize(
    "text",
    [
        "MPS backend out of memory (MPS allocated: 1 GB)",
        "HIP out of memory. Tried",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_running_out_of_memory_is_recognised_in_every_backends_words(text):
    with (
        pytest.raises(UserError, match="out of memory on mps: do less"),
        module.explain_memory(torch.device("mps"), "do less"),
    ):
        raise RuntimeError(text)


def test_the_data_sheet_is_used_for_known_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4080")
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == 97.5e12
    assert peak_flops(CPU, torch.float32) > 1e8


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("verb", ["train", "sample", "eval", "chat", "classify train", "ranks"])
def test_a_device_that_is_missing_and_keys_without_a_meaning_are_told_once(verb, miaobi, trained, prepared, tmp_path):
    """By every verb that takes the seeds' lines, however often it asks; of several ranks by the first."""
    reviews = tmp_path / "reviews.csv"
    reviews.write_text("label,review\n" + "".join(f"{i % 2},皇马{i}\n" for i in range(40)), encoding="utf-8")
    (tmp_path / "run.yaml").write_text("test_batch: 4\nddp: True\nlocal_rank: -1\n", encoding="utf-8")
    flags = tiny(data=prepared(), out_dir=tmp_path / "run", max_iters=2, device="cuda", batch_size=4, family="qwen3")
    train = ["train", tmp_path / "run.yaml", *flags, "--backend=nccl"]
    words = {
        "train": train,
        "sample": ["sample", trained(), "--init_from=resume", "--compile=False", "--num_samples=1",
                   "--max_new_tokens=1"],
        "eval": ["eval", trained(), prepared()],
        "chat": ["chat", trained()],  # which has no template: what was said until then counts
        "classify train": ["classify", "train", f"--base_model={trained()}", f"--data={reviews}", "--test_batch=8",
                           "--save_freq=9", f"--out_dir={tmp_path / 'c'}", "--max_epoch=1", "--seeds=2"],
    }  # fmt: skip
    if verb == "ranks":
        said = "".join(done.stderr for done in processes.ranks(2, *train[1:]))
    else:
        said = miaobi(*words[verb], *["--device=cuda"] * (verb != "train")).err
    assert said.count("device cuda is not available here; using the CPU") == 1, said
    assert said.count("not needed:") == (verb not in ("eval", "chat")), said

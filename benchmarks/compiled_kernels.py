"""Kernels for GPUs, compiled to machine code on a machine without one: how many, and what shared memory they take.

    pip install --no-deps --target DIR triton==3.7.1
    PYTHONPATH=DIR python -m benchmarks.compiled_kernels

What torch.compile makes of the forward and the backward pass of one qwen3 block of 512 (32 x 256 tokens, autocast),
with FlexAttention as well, of the forward pass of an evaluation, and Muon's own kernel for symmetric products; nothing
is run. Takes some minutes; no test runs it, since PyTorch's CPU build comes without Triton.
"""

from __future__ import annotations

from benchmarks import fake_cuda  # isort: skip  # before torch

import dataclasses
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
import triton
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.virtualized import V
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.common import machine, parse, report
from benchmarks.fake_cuda import CUDA
from benchmarks.launches import fake_model
from miaobi.cache import keep_compiled_code_private
from miaobi.model.transformer import document_block_mask
from miaobi.train.symmetric import TILE
from miaobi.train.symmetric_kernel import STEP, kernel

RMS_NORM = torch.nn.functional.rms_norm  # Inductor takes it apart
CARDS = {"T4": (7, 5, 65536), "A100": (8, 0, 166912), "RTX 3090": (8, 6, 101376), "RTX 4080": (8, 9, 101376),
         "H100": (9, 0, 232448)}  # fmt: skip
"""Compute capability, and the shared memory that a block of threads may have (CUDA C++ Programming Guide, table of
compute capabilities)."""


@dataclass(frozen=True)
class Args:
    """Command line."""

    cards: tuple[str, ...] = tuple(CARDS)
    """What to compile for."""
    json: bool = False
    """Print one line of JSON as well."""


class Driver:
    """What Inductor asks of Triton's driver."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return self.target

    def get_active_torch_device(self) -> torch.device:
        """The only one."""
        return CUDA


def describe_card(major: int, minor: int, shared: int) -> None:
    """Answer what Inductor asks of the card; what does not depend on its kind is an RTX 4080's."""
    card = SimpleNamespace(name="as described", major=major, minor=minor, multi_processor_count=76, warp_size=32,
                           regs_per_multiprocessor=65536, max_threads_per_multi_processor=1536 if major > 7 else 1024,
                           total_memory=16 << 30, shared_memory_per_block=49152, shared_memory_per_block_optin=shared,
                           L2_cache_size=64 << 20, gcnArchName="")  # fmt: skip
    triton.runtime.driver.set_active(Driver(target(major, minor)))
    triton_helpers.set_driver_to_gpu = lambda: None  # to a real one
    for interface in (CudaInterface, CudaInterface.Worker):
        interface.get_device_properties = staticmethod(lambda *_: card)
        interface.get_compute_capability = staticmethod(lambda *_: 10 * major + minor)
        interface.current_device = staticmethod(lambda: 0)
    torch.cuda.get_device_properties = lambda *_: card
    torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda *_: None


def target(major: int, minor: int) -> GPUTarget:
    """A compute capability, as Triton names it."""
    return GPUTarget("cuda", 10 * major + minor, 32)


def traced(dtype: torch.dtype, documents: bool, trains: bool) -> dict[str, torch.fx.GraphModule]:
    """The graphs of the forward and the backward pass, as torch.compile cuts them; with FlexAttention for documents.
    The forward pass alone of an evaluation.
    """
    graphs: dict[str, torch.fx.GraphModule] = {}

    def keep(name: str) -> Any:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs[name] = graph
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch.compiler.reset()
    model = fake_model("qwen3", 1, 512, 8).train(trains)
    mask = document_block_mask(torch.zeros(32, 256, dtype=torch.long, device=CUDA)) if documents else None
    block = torch.compile(model.blocks[0], backend=backend, dynamic=False)
    x = torch.zeros(32, 256, 512, device=CUDA, requires_grad=trains)
    # no accelerator: dynamo would look for its streams
    no_streams = mock.patch.object(torch.accelerator, "is_available", return_value=False)
    with torch.set_grad_enabled(trains), torch.autocast("cuda", dtype=dtype), no_streams:
        out = block(x, model.rope[:, :256], mask)
        if trains:
            out.sum().backward()
    return graphs


def generated(graph: torch.fx.GraphModule) -> str:
    """Inductor's code of a graph."""
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    lowering = GraphLowering(graph, example_inputs=inputs, is_inference=False)
    mode = next(value.fake_mode for value in inputs if hasattr(value, "fake_mode"))
    with DebugContext(), V.set_graph_handler(lowering), V.set_fake_mode(mode):
        lowering.run(*inputs)
        code, _ = lowering.codegen()
    return getattr(code, "value", code)


def shared_memory(code: str, directory: str) -> dict[str, int]:
    """Compile every Triton kernel in Inductor's code: name -> bytes of shared memory, of its hungriest variant."""
    taken = {}
    for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.DOTALL):
        path = Path(directory, f"{name}.py")  # Triton reads the source of its functions from files
        path.write_text(source, encoding="utf-8")
        module: dict[str, Any] = {"__file__": str(path), "__name__": name}
        exec(compile(source, path, "exec"), module)
        module[name].precompile(warm_cache_only=True)
        variants = [found.kernel for found in module[name].compile_results]
        if not all(variant.asm["cubin"] for variant in variants):
            raise SystemExit(f"{name} was not compiled")
        taken[name] = max(variant.metadata.shared for variant in variants)
    return taken


def symmetric_memory(major: int, minor: int, dtype: str) -> int:
    """Shared memory of Muon's kernel for symmetric products, in bytes."""
    tensors, numbers = ("x", "y", "c", "out"), ("beta", "alpha")
    constants = {"adds": True, "tile": TILE, "step": STEP}
    kinds = dict.fromkeys(tensors, f"*{dtype}") | dict.fromkeys(numbers, "fp32") | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    made = triton.compile(ASTSource(kernel, signature, constants), target(major, minor))
    return made.metadata.shared


def measured(major: int, minor: int, most: int, directory: str) -> dict[str, Any]:
    """What is compiled for one card."""
    describe_card(major, minor, most)
    dtype = torch.bfloat16 if major > 7 else torch.float16
    found: dict[str, Any] = {}
    for kind, documents, trains in (
        ("", False, True),
        (" of documents", True, True),
        (" of an evaluation", False, False),
    ):
        with fake_cuda.fake_cuda((major, minor)), mock.patch.object(torch.nn.functional, "rms_norm", RMS_NORM):
            graphs = traced(dtype, documents, trains)
        for name, graph in graphs.items():
            with mock.patch.multiple(torch.cuda, is_available=lambda: True, current_device=lambda: 0,
                                     get_device_capability=lambda *_: (major, minor)):  # fmt: skip
                code = generated(graph)
                shared = shared_memory(code, directory)
            found[name + kind] = {
                "kernels": len(re.findall(r"^\s+triton_\w+\.run\(", code, re.MULTILINE)),
                "products": len(re.findall(r"extern_kernels\.\w+\(", code)),
                "attention": len(re.findall(r"= torch\.ops\.aten\._scaled_dot_product\w+", code)),
                "shared": max(shared.values()), "compiled": len(shared),
            }  # fmt: skip
    short = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    found["symmetric product"] = {"kernels": 1, "products": 0, "attention": 0, "compiled": 1,
                                  "shared": symmetric_memory(major, minor, short)}  # fmt: skip
    return found


def main() -> None:
    """Compile and print."""
    args = parse("compiled_kernels", Args, __doc__)
    keep_compiled_code_private()
    torch._inductor.config.use_static_triton_launcher = False  # it would load the kernels
    result, rows = {}, []
    for card in args.cards:
        major, minor, most = CARDS[card]
        with tempfile.TemporaryDirectory() as directory:
            result[card] = measured(major, minor, most, directory)
        for what, row in result[card].items():
            fits = row["shared"] <= most
            rows.append([f"{card}, {what}", row["kernels"], row["products"], row["attention"], row["compiled"],
                         row["shared"], most, "yes" if fits else "NO"])  # fmt: skip
    columns = ["what", "Triton", "products", "attention", "to cubins", "shared bytes", "of", "fits"]
    report("compiled_kernels", columns, rows, {"machine": machine("cpu"), "settings": dataclasses.asdict(args),
                                               "cards": result}, args.json)  # fmt: skip


if __name__ == "__main__":
    main()

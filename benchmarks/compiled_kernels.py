"""Kernels that torch.compile makes of a block for a GPU, counted on a machine without one.

    pip install --no-deps --target DIR triton==3.7.1
    PYTHONPATH=DIR python -m benchmarks.compiled_kernels

Inductor generates the code of the forward and the backward pass of one qwen3 block of 512 (32 x 256 tokens, bf16
autocast); nothing is compiled further, or run. Takes half a minute; no test runs it, since PyTorch's CPU build comes
without Triton.
"""

from __future__ import annotations

from benchmarks import fake_cuda  # isort: skip  # before torch

import re
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_function
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from triton.backends.compiler import GPUTarget

from benchmarks.fake_cuda import CUDA
from benchmarks.launches import fake_model

RMS_NORM = torch.nn.functional.rms_norm  # Inductor takes it apart
CARD = SimpleNamespace(name="RTX 4080, as described", major=8, minor=9, multi_processor_count=76, warp_size=32,
                       regs_per_multiprocessor=65536, max_threads_per_multi_processor=1536, total_memory=16 << 30,
                       shared_memory_per_block=49152, shared_memory_per_block_optin=101376, L2_cache_size=64 << 20,
                       gcnArchName="")  # fmt: skip


class Driver:
    """What Inductor asks of Triton's driver."""

    def get_current_target(self) -> GPUTarget:
        """Compute capability 8.9."""
        return GPUTarget("cuda", 89, 32)

    def get_active_torch_device(self) -> torch.device:
        """The only one."""
        return CUDA


def describe_card() -> None:
    """Answer what Inductor asks of the card."""
    triton.runtime.driver.set_active(Driver())
    for interface in (CudaInterface, CudaInterface.Worker):
        interface.get_device_properties = staticmethod(lambda *_: CARD)
        interface.current_device = staticmethod(lambda: 0)
    torch.cuda.get_device_properties = lambda *_: CARD
    torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda *_: None


def traced() -> dict[str, torch.fx.GraphModule]:
    """The graphs of the forward and the backward pass, as torch.compile cuts them."""
    graphs: dict[str, torch.fx.GraphModule] = {}

    def keep(name: str) -> Any:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs[name] = graph
            return make_boxed_func(graph.forward)

        return compiler

    model = fake_model("qwen3", 1, 512, 8)
    block = model.blocks[0]
    names, weights = zip(*block.named_parameters(), strict=True)

    def forward(x, rope, *values):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return torch.func.functional_call(block, dict(zip(names, values, strict=True)), (x, rope))

    step = aot_function(forward, keep("forward"), keep("backward"), decompositions=select_decomp_table(),
                        partition_fn=min_cut_rematerialization_partition)  # fmt: skip
    x = torch.zeros(32, 256, 512, device=CUDA, requires_grad=True)
    step(x, model.rope[:, :256], *weights).sum().backward()
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


def main() -> None:
    """Print the counts."""
    describe_card()
    with fake_cuda.fake_cuda(), mock.patch.object(torch.nn.functional, "rms_norm", RMS_NORM):
        graphs = traced()
    for name, graph in graphs.items():
        with mock.patch.multiple(torch.cuda, is_available=lambda: True, current_device=lambda: 0,
                                 get_device_capability=lambda *_: (8, 9)):  # fmt: skip
            code = generated(graph)
        kernels = len(re.findall(r"^\s+triton_\w+\.run\(", code, re.MULTILINE))
        products = len(re.findall(r"extern_kernels\.\w+\(", code))
        attention = len(re.findall(r"= torch\.ops\.aten\._scaled_dot_product\w+", code))
        print(f"{name}: {kernels} Triton kernels, {products} products, {attention} of attention")


if __name__ == "__main__":
    main()

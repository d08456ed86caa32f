"""The code that Inductor writes for GPUs, on a machine that has none: ``python -m tests.inductor_cuda``.

A model is traced, sharded and partitioned on the CPU, as one of four ranks of a process group that sends
nothing; where Inductor takes the forward and the backward over, their tensors become fake ones of a GPU, and
what it writes is kept and not run. The Triton kernels are taken as on a GPU. Autograd needs a device that is
there, so the CPU traces; this leaves out whatever tracing on a GPU does otherwise.

One line of JSON: model -> phase -> what the code does, in order: "start", "wait" of collectives and "work"
(a product, a kernel, an operator of ours); and the collectives of this code, and of the CPU's.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, graph
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree

import spcompile
from spcompile.agreement import Agreement
from spcompile.passes import overlap
from spcompile.reports.report import RECORDS, Report

RANKS = 4
PROPERTIES = SimpleNamespace(
    major=9,
    minor=0,
    multi_processor_count=132,
    name="NVIDIA H100 80GB HBM3",
    total_memory=80 << 30,
    shared_memory_per_multiprocessor=233472,
    shared_memory_per_block_optin=232448,
    shared_memory_per_block=49152,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    L2_cache_size=50 << 20,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
    gcnArchName="",
)
INTERFACE = {
    "is_available": True,
    "current_device": 0,
    "device_count": 1,
    "get_device_properties": PROPERTIES,
    "get_compute_capability": 90,
    "synchronize": None,
    "exchange_device": 0,
    "maybe_exchange_device": 0,
    "set_device": None,
    "is_triton_capable": True,
    "raise_if_triton_unavailable": None,
    "get_raw_stream": 0,
    "is_bf16_supported": True,
}


class _Compiled(Exception):
    """Both halves are compiled: the first is called, and goes no further."""


class Driver:
    """Enough of a Triton driver for Inductor to write kernels for sm_90."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 90, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


@contextlib.contextmanager
def a_gpu() -> Iterator[None]:
    """Let Inductor take this machine for one with an H100."""
    from triton.runtime import driver

    def told(value: Any) -> Any:
        return staticmethod(lambda *args, **kwargs: value)

    cuda = {"device_count": 1, "current_device": 0, "get_device_properties": PROPERTIES, "synchronize": None}
    cuda |= {"get_device_capability": (9, 0), "get_device_name": PROPERTIES.name, "_lazy_init": None}
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, told(value).__func__))
        for name, value in INTERFACE.items():
            stack.enter_context(mock.patch.object(CudaInterface, name, told(value)))
        worker = {"get_device_properties": PROPERTIES, "current_device": 0, "set_device": None}
        for name, value in worker.items():
            stack.enter_context(mock.patch.object(CudaInterface.Worker, name, told(value)))
        stack.enter_context(mock.patch.object(CudaInterface, "device", contextlib.nullcontext))
        for module in ("spcompile.kernels.linear.kernel", "spcompile.kernels.scan"):
            stack.enter_context(mock.patch(f"{module}.without_our_kernels", return_value=None))
        driver.set_active(Driver())
        yield


def on_gpu(gm: fx.GraphModule, inputs: Any, mode: Any) -> list[Any]:
    """Let a graph of fake CPU tensors be one of fake GPU tensors; returns its new inputs."""

    def moved(x: Any) -> Any:
        if isinstance(x, torch.device) and x.type == "cpu":
            return torch.device("cuda", 0)
        if isinstance(x, Tensor):
            with mode:
                return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
        return x

    given = [moved(x) for x in inputs]
    fresh, values = iter(given), {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            values[node] = node.meta["val"] = next(fresh)
            continue
        if node.op == "get_attr":  # what a higher-order operator is given as code
            values[node] = getattr(gm, node.target)
            for inner in values[node].graph.nodes:
                inner.args, inner.kwargs = fx.node.map_aggregate((inner.args, inner.kwargs), moved)
                inner.meta["val"] = pytree.tree_map(moved, inner.meta.get("val"))
            values[node].recompile()
            continue
        if node.op != "call_function":
            continue
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), moved)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        with mode:
            values[node] = node.meta["val"] = node.target(*args, **kwargs)
        node.meta.pop("tensor_meta", None)
    gm.recompile()
    return given


def generated(model: nn.Module, inputs: list[Tensor]) -> list[str]:
    """What Inductor writes for the forward and the backward of ``model(*inputs).sum()``."""
    found: list[str] = []
    inner = compile_fx._compile_fx_inner

    def taken(gm: fx.GraphModule, example_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mode = torch._guards.detect_fake_mode(example_inputs)
        return inner(gm, on_gpu(gm, example_inputs, mode), *args, **kwargs)

    def stopped(self: Any) -> Any:
        code, _ = self.codegen()
        found.append(code.value if hasattr(code, "value") else code)
        return SimpleNamespace(call=not_run, __file__="", key="", runner=None)

    def not_run(*args: Any) -> Any:
        raise _Compiled

    settings = {"triton.autotune_at_compile_time": False, "force_disable_caches": True, "compile_threads": 1}
    with (
        a_gpu(),
        mock.patch.object(compile_fx, "_compile_fx_inner", taken),
        mock.patch.object(graph.GraphLowering, "_compile_to_module", stopped),
        mock.patch.object(overlap, "on_gpu", return_value=True),
        mock.patch.object(Agreement, "before_compiling"),
        mock.patch.object(Agreement, "before_calling"),
        functorch_config.patch(force_non_lazy_backward_lowering=True),
        inductor_config.patch(settings),
        contextlib.suppress(_Compiled),
    ):
        torch.compile(model, backend="spcompile", fullgraph=True)(*inputs)
    torch._dynamo.reset()
    assert len(found) == 2, found
    return found


WORK = re.compile(r"extern_kernels\.\w+|torch\.ops\.(spcompile|aten)\.(?!rank\b)\w+|\.run\(")


def order(code: str) -> list[str]:
    """What the code does."""
    steps = []
    for line in map(str.strip, code.splitlines()):
        if line.startswith(("assert_", "#", "import ", "from ")) or "= async_compile" in line:
            continue
        collective = re.search(r"_c10d_functional\.(\w+)\.", line)
        work = WORK.search(line)
        if collective is not None:
            name = collective[1]
            steps.append("wait" if name == "wait_tensor" else f"start {name.strip('_')}")
        elif work is not None and ("buf" in line or "(" in line):
            name = re.match(r"(\w+)\.run\(", line)
            steps.append(f"work {name[1] if name else work[0]}")
    return steps


def sent(report: Report) -> list[Any]:
    """The collectives of a report and what each brings."""
    return [(row.phase, row.op, row.count, row.bytes) for row in report.collectives]


def main() -> int:
    from tests.overlap_models import MODELS

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=RANKS)
    torch.manual_seed(0)
    found = {}
    for name, make in MODELS.items():
        model, inputs = make()
        forward, backward = generated(model, inputs)
        cpu = spcompile.explain(model, ranks=RANKS)(*inputs)
        found[name] = {
            "forward": order(forward),
            "backward": order(backward),
            "sent": sent(Report(RANKS, [RECORDS[-1]])),
            "sent on cpu": sent(cpu),
        }
    print("FOUND", json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

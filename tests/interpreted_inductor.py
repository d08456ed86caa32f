"""Code that Inductor writes for an H100, run on this CPU by Triton's interpreter (``TRITON_INTERPRET=1``).

Functions without gradients alone: they are traced on CPU tensors, which become fake ones of a GPU where
Inductor takes the graph over (``inductor_cuda.py``). What Inductor has written is then called with the CPU
tensors, its kernels interpreted one by one, its buffers full of NaN beforehand. What this leaves out: what
the interpreter leaves out (``triton_interpreter.py``), how a kernel is started, and the numbers of threads.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._inductor.config as inductor_config
import triton
from torch import Tensor
from torch._inductor import compile_fx, graph
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.runtime import triton_helpers, triton_heuristics

from tests.inductor_cuda import a_gpu, on_gpu

__all__ = ["NotRun", "Written", "interpreted", "templates", "written"]

_HEURISTICS = ("template", "pointwise", "reduction", "persistent_reduction")
_SETTINGS = {"triton.autotune_at_compile_time": False, "force_disable_caches": True, "compile_threads": 1}


class Written(NamedTuple):
    """A graph's code, and how many entries the largest buffer has that it allocated when it was called."""

    code: str
    largest: list[int]


class _Kernel:
    """A kernel as the code starts it: arguments, then the sizes of the grid or nothing, and a stream."""

    def __init__(self, kernel: Any, fixed: bool) -> None:
        self.kernel, self.fixed = kernel, fixed
        self.names = list(inspect.signature(kernel.fn).parameters)

    def run(self, *args: Any, stream: int) -> None:
        given, grid = (args[:-3], args[-3:]) if self.fixed else (args, ())
        named = dict(zip(self.names, given, strict=False))
        tiles: dict[str, int] = {}
        for name in self.names[len(given) :]:  # as the heuristics would choose, and few programs
            number = named.get(name.replace("BLOCK", "numel").lower(), 1)
            tiles[name] = min(1024 if name.startswith("R") else 128, triton.next_power_of_2(int(number)))
        if not self.fixed:
            axes = [(named.get(f"{axis}numel"), f"{axis.upper()}BLOCK") for axis in "xyz"]
            grid = tuple(1 if n is None else triton.cdiv(n, tiles.get(tile, 1)) for n, tile in axes)
        self.kernel[grid](*given, **tiles)


_SOURCES = tempfile.TemporaryDirectory(prefix="kernels-")  # until the process ends


def _loaded(name: str, source: str, device_str: str = "cuda") -> Any:
    """The kernel of a source, which must lie in a file: the interpreter reads it."""
    kept = {"dir": _SOURCES.name, "prefix": name[:40], "suffix": ".py", "delete": False}
    with tempfile.NamedTemporaryFile("w", **kept) as file:
        file.write(source)
    space: dict[str, Any] = {"__file__": file.name, "__name__": name}
    exec(compile(source, file.name, "exec"), space)
    return space[name]


def _made(*, inductor_meta: dict[str, Any], **_: Any) -> Callable[[Any], _Kernel]:
    return lambda kernel: _Kernel(kernel, inductor_meta.get("grid_type") == "FixedGrid")


def _poisoned(sizes: Any, strides: Any, dtype: torch.dtype) -> Tensor:
    made = torch.empty_strided(sizes, strides, dtype=dtype)
    return made.fill_(torch.nan if dtype.is_floating_point else 1 if dtype == torch.bool else -7)


class NotRun(Exception):
    """Outside of :func:`interpreted` code is written, and not called."""


def _module(self: graph.GraphLowering, written: list[Written], run: bool) -> Any:
    code, _ = self.codegen()
    text, largest = code.value if hasattr(code, "value") else code, [0]
    written.append(Written(text, largest))

    def not_run(*args: Any) -> None:
        raise NotRun

    if not run:
        return SimpleNamespace(call=not_run, __file__="", key="", runner=None)

    def allocated(sizes: Any, strides: Any, dtype: torch.dtype) -> Tensor:
        made = _poisoned(sizes, strides, dtype)
        largest[0] = max(largest[0], made.numel())
        return made

    start = "from torch._C import _cuda_getCurrentRawStream as get_raw_stream"
    space: dict[str, Any] = {"__name__": "written", "get_raw_stream": lambda device: 0}
    exec(compile(text.replace(start, ""), "<written>", "exec"), space)
    space["empty_strided_cuda"] = allocated
    return SimpleNamespace(call=space["call"], __file__="", key="", runner=space.get("runner"))


def templates(code: str) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels that were made from templates, for Triton to compile, and how Inductor would start them."""

    def kept(**how: Any) -> Callable[[Any], Any]:
        return lambda kernel: (kernel, how)

    sources = re.findall(r"async_compile\.triton\('(triton_tem_\w+)', '''(.*?)'''", code, re.DOTALL)
    with (
        mock.patch.object(triton_heuristics, "template", kept),
        mock.patch.object(triton_helpers, "set_driver_to_gpu"),
    ):
        return [_loaded(name, source) for name, source in sources]


@contextlib.contextmanager
def written(run: bool = False) -> Iterator[list[Written]]:
    """What ``torch.compile`` has written inside; a call that would run it raises :class:`NotRun`."""
    found: list[Written] = []
    inner = compile_fx._compile_fx_inner

    def taken(gm: Any, example_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mode = torch._guards.detect_fake_mode(example_inputs)
        return inner(gm, on_gpu(gm, example_inputs, mode), *args, **kwargs)

    def permuted(out: Tensor, strides: Any) -> Tensor:
        """The result of a fake FlexAttention, without a copy, which would need the device."""
        like = real(torch.empty(out.shape, device="meta"), strides)
        return out.new_empty_strided(out.shape, like.stride())

    home = sys.modules[type(torch.ops.higher_order.flex_attention).__module__]
    real = home._permute_strides  # type: ignore[attr-defined]
    with (
        a_gpu(),
        mock.patch.object(compile_fx, "_compile_fx_inner", taken),
        mock.patch.object(graph.GraphLowering, "_compile_to_module", lambda self: _module(self, found, run)),
        mock.patch.object(home, "_permute_strides", permuted),
        inductor_config.patch(_SETTINGS),
    ):
        yield found


@contextlib.contextmanager
def interpreted() -> Iterator[list[Written]]:
    """As :func:`written`, and what is compiled inside runs, inside."""
    with contextlib.ExitStack() as stack:
        for name in _HEURISTICS:
            stack.enter_context(mock.patch.object(triton_heuristics, name, _made))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu"))
        stack.enter_context(
            mock.patch.object(AsyncCompile, "triton", lambda self, *args, **kw: _loaded(*args))
        )
        stack.enter_context(mock.patch.object(AsyncCompile, "wait"))
        stack.enter_context(mock.patch.object(torch.cuda, "_DeviceGuard", contextlib.nullcontext))
        stack.enter_context(mock.patch.object(torch.cuda, "set_device"))
        yield stack.enter_context(written(run=True))

"""Every private PyTorch name that spcompile uses, imported here alone, each with its reason.

``tests/test_torch_names.py`` fails loudly when a torch version has moved one of them.
"""

from __future__ import annotations

from typing import Any

import torch

# torch.vmap and torch.func.grad wrap tensors and push levels on a stack: which tensors are wrapped, how deep
# the stack is, and how it is brought back to a depth after an error.
from torch._C._functorch import get_dynamic_layer_stack_depth as transform_depth
from torch._C._functorch import is_functorch_wrapped_tensor as is_wrapped
from torch._C._functorch import pop_dynamic_layer_stack_and_undo_to_depth as undo_transforms

# Where Dynamo asks whether a frame has too many graphs already (spcompile.limits), its limits, and how it is
# told not to compile a call.
from torch._dynamo import config as dynamo_config
from torch._dynamo import convert_frame

# ---- AOTAutograd and Inductor ---------------------------------------------------------------------------
# Simulated ranks (spcompile.simulate) and `explain` stop before Inductor: they need AOTAutograd's joint
# graph and its partition into forward and backward. The proofs in tests/ want a partition that recomputes
# nothing, which is the default one.
from torch._dynamo.backends.common import aot_autograd

# Functions that Dynamo calls when it is about to trace: the table of library calls looks for new imports.
from torch._dynamo.callback import callback_handler

# Dynamo lets an exception of this class through to the user as it is; others come out of a backend wrapped,
# and then a rank that compiles and one that calls would raise different types for one fault.
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.exc import Unsupported as _Unsupported

# Exceptions of a backend that Dynamo takes for a graph break: it then runs the frame eagerly.
from torch._dynamo.exc import exceptions_allowed_to_be_fallback as fallbacks

# The frame that Dynamo is compiling: its code and arguments tell which names `sequence_dims` can have.
from torch._dynamo.symbolic_convert import InstructionTranslator as _InstructionTranslator

# The float symbols for which a trace is started anew (spcompile.floats).
from torch._dynamo.symbolic_convert import TensorifyState
from torch._dynamo.types import FrameAction as _FrameAction
from torch._dynamo.types import FrameExecStrategy as _FrameExecStrategy

# The graph breaks that Dynamo has counted in this process, by reason: `explain` reports them. Inductor's own
# are kept with a compiled graph and counted again when a cache serves it, which tells us which it served.
from torch._dynamo.utils import counters
from torch._functorch.partitioners import (
    default_partition,
    min_cut_rematerialization_partition,
)

# Which operators the partitioner would rather repeat in the backward than save the results of.
from torch._functorch.partitioners import get_default_op_list as partitioner_operators

# Which frame Dynamo is compiling.
from torch._guards import CompileContext, detect_fake_mode

# The fake mode of a graph's values, and what AOTAutograd knows of the graph that it is compiling (the inputs
# that it mutates), which `explain` asks for.
from torch._guards import TracingContext as _TracingContext

# The backward of FlexAttention, given what its forward has found: autograd through the public function would
# need a second forward, and a tape inside an operator. Its arguments are the same from torch 2.11 to 2.14.
from torch._higher_order_ops.flex_attention import flex_attention_backward

# What `mode=` of torch.compile means to Inductor, and the names and types of its options, which are checked
# before they are handed on.
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options

# The compile entry that takes config patches with a hook on the joint graph; the public
# `torch.compile(backend="inductor")` gives no way to edit Dynamo's graph first.
from torch._inductor.compile_fx import compile_fx

# The type of Inductor's graph hooks: its cache asks a hook for a uuid.
from torch._inductor.custom_graph_pass import CustomGraphPass

# Which operators Inductor takes apart: a pass that runs after AOTAutograd must not emit one of them.
from torch._inductor.decomposition import select_decomp_table

# Orders between operators that are not of data, and Inductor's scheduler, which forgets some (see below).
from torch._inductor.dependencies import StarDep as _StarDep
from torch._inductor.dependencies import WeakDep as _WeakDep

# Inductor's counter-based random numbers: what was drawn from a seed tensor can be drawn again under
# checkpointing.
from torch._inductor.inductor_prims import random as inductor_random
from torch._inductor.inductor_prims import seed as inductor_seed

# Where Inductor keeps its caches: what a compilation told is kept beside them.
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.scheduler import SchedulerNode as _SchedulerNode

# Artifacts of TORCH_TRACE: the reports and graphs that tlparse shows.
from torch._logging import trace_structured

# The classes of operators, by which the passes that read a graph tell an ATen call from a Python function.
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

# The command builds its model of fake tensors, which allocate nothing; their values can't be compared.
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

# The two calls by which Dynamo writes autocast into its graph: what replaces a loop under autocast has its
# casts written out, and switches autocast off around itself.
from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.amp.autocast_mode import _exit_autocast as exit_autocast

# A collective names its group by text, and no public function gives the group of a name.
from torch.distributed.distributed_c10d import _resolve_process_group as resolve_process_group

# The shadow trace (spcompile.passes.shadow) must know the ATen node that made each tensor while the trace
# is still going on; the public make_fx only gives the finished graph.
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx, track_tensor_tree

# What a fake mode needs for sizes that Dynamo makes symbolic; and whether something holds for all sizes that
# a symbol may have, which records no guard.
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true

# Symbolic numbers whose value is known at run time only: they must be neither guarded nor written in.
from torch.fx.experimental.symbolic_shapes import symbol_is_type as _symbol_is_type

# The tensor metadata that the partitioner looks for on a node.
from torch.fx.passes.shape_prop import _extract_tensor_metadata as tensor_metadata

# Real numbers while a graph is traced: passes run under the fake mode and the proxies of a compilation.
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._sympy.symbol import SymT as _SymT

__all__ = [
    "UNTAGGED_POINTWISE",
    "CompileContext",
    "CustomGraphPass",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "ShapeEnv",
    "ShortenTraceback",
    "TensorifyState",
    "aot_autograd",
    "cache_dir",
    "callback_handler",
    "compile_fx",
    "convert_frame",
    "counters",
    "default_partition",
    "detect_fake_mode",
    "differentiable",
    "disable_current_modes",
    "disabled_torch_function",
    "dynamo_config",
    "enter_autocast",
    "exit_autocast",
    "fallbacks",
    "flash_attention_cpu",
    "flash_attention_cpu_backward",
    "flash_attention_cuda",
    "flash_attention_cuda_backward",
    "flex_attention_backward",
    "float_symbols",
    "get_proxy_mode",
    "get_proxy_slot",
    "hint",
    "inductor_config",
    "inductor_random",
    "inductor_seed",
    "is_unbacked",
    "is_wrapped",
    "list_mode_options",
    "make_fx",
    "make_wrapper_subclass",
    "min_cut_rematerialization_partition",
    "not_traced",
    "partitioner_operators",
    "resolve_process_group",
    "select_decomp_table",
    "set_grad_enabled",
    "source_name",
    "statically_known_true",
    "tensor_metadata",
    "trace_structured",
    "traced_frame",
    "tracing_metadata",
    "track_tensor_tree",
    "transform_depth",
    "undo_transforms",
]

# ---- operators ------------------------------------------------------------------------------------------
# Inductor's own pointwise prims carry no tag; fma is not there before torch 2.12.
UNTAGGED_POINTWISE = tuple(
    getattr(torch.ops.prims, name).default for name in ("fma",) if hasattr(torch.ops.prims, name)
)

# The fused CPU attention with its log-sum-exp: `scaled_dot_product_attention` does not return it, and
# without it two parts of one softmax can't be merged.
flash_attention_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_attention_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
# The same on NVIDIA GPUs.
flash_attention_cuda = torch.ops.aten._scaled_dot_product_flash_attention.default
flash_attention_cuda_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default


# What dispatch keys are on outside every operator and mode.
_OUTSIDE = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()

# How Dynamo writes no_grad and enable_grad into its graph; what is between two of them keeps its mode.
set_grad_enabled = torch._C._set_grad_enabled


def differentiable() -> Any:
    """A context in which torch.func can differentiate inside an operator's kernel.

    Under a dispatch mode (a FLOP counter, say) a kernel runs with the keys of functorch switched off, and
    torch.func fails. A kernel that runs is not traced, so it may have the keys that it would have outside.
    """
    return torch._C._ForceDispatchKeyGuard(*_OUTSIDE)


def float_symbols(shapes: ShapeEnv) -> list[Any]:
    """The symbols of floats whose value is known."""
    return [s for s in shapes.backed_var_to_val if _symbol_is_type(s, _SymT.FLOAT)]


def is_unbacked(symbol: Any) -> bool:
    """Whether the value of a symbol of a shape environment is known at run time only."""
    return _symbol_is_type(symbol, (_SymT.UNBACKED_INT, _SymT.UNBACKED_FLOAT))


# A tensor subclass that holds other tensors and is asked about operators only (spcompile.sharded); PyTorch
# documents both in its notes on subclasses.
make_wrapper_subclass = torch.Tensor._make_wrapper_subclass
disabled_torch_function = torch._C._disabled_torch_function_impl


def tracing_metadata() -> Any:
    """AOTAutograd's metadata of the graph being compiled; None outside a compilation."""
    context = _TracingContext.try_get()
    return context.fw_metadata if context is not None else None


def traced_frame() -> tuple[Any, dict[str, Any]] | None:
    """The code that Dynamo is compiling and its variables by name; None outside Dynamo."""
    try:
        frame = _InstructionTranslator.current_tx()
    except AttributeError:  # outside Dynamo there is none
        return None
    return frame.f_code, frame.f_locals


def source_name(node: torch.fx.Node) -> str:
    """Where Dynamo took an input from, as code: ``L['self']._parameters['weight']``; "" if it does not say.

    It is a method in some versions and a property in others.
    """
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return name() if callable(name) else name


def hint(x: Any) -> Any:
    """The number that a symbolic one was traced with, without a guard on it; others as they are."""
    return x.node.hint if isinstance(x, torch.SymInt | torch.SymFloat) else x


_recompute = _SchedulerNode.recompute_size_and_body


def _recompute_in_order(node: Any, *args: Any, **kwargs: Any) -> None:
    """Loops are computed again before two kernels are fused on a CPU; what must come before stays so.

    Without this a kernel may read what a collective brings before the wait for it, silently: up to torch 2.13
    the wait, a write in place, is forgotten (pytorch/pytorch#185873 mended it), in 2.11 other orders are too
    (#177816). On a version that keeps them it changes nothing.
    """
    orders = [dep for dep in node.read_writes.reads if isinstance(dep, (_WeakDep, _StarDep))]
    _recompute(node, *args, **kwargs)
    found = node.read_writes
    for dep in orders:
        found = found.with_read(dep)
    node.set_read_writes(found.rename(node.mutation_renames))


_SchedulerNode.recompute_size_and_body = _recompute_in_order


def not_traced(reason: str) -> Exception:
    """An exception by which Dynamo runs one call eagerly, compiles nothing that it calls, and asks again at
    the next call."""
    error = _Unsupported(reason, gb_type="spcompile")
    error.frame_exec_strategy = _FrameExecStrategy(_FrameAction.DEFAULT, _FrameAction.RUN_ONLY)
    return error

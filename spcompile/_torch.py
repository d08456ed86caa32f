"""Every private PyTorch name that spcompile uses, imported here alone, each with its reason.

``tests/test_torch_names.py`` fails loudly when a torch version has moved one of them.
"""

# ruff: noqa: F401
from __future__ import annotations

# The compile entry that takes config patches with a hook on the joint graph; `torch.compile(backend="inductor")`
# has no public way to edit the forward graph first.
from torch._inductor.compile_fx import compile_fx

# The type of Inductor's graph hooks: its cache asks a hook for a uuid.
from torch._inductor.custom_graph_pass import CustomGraphPass

# Which operators Inductor takes apart: a pass that runs after AOTAutograd must not emit one of them.
from torch._inductor.decomposition import select_decomp_table

# Inductor's counter-based random numbers: a mask drawn from a seed tensor can be drawn again under checkpointing.
from torch._inductor.inductor_prims import random as inductor_random
from torch._inductor.inductor_prims import seed as inductor_seed

# The tensor metadata that the partitioner looks for on a node.
from torch.fx.passes.shape_prop import _extract_tensor_metadata as tensor_metadata

# Simulated ranks (spcompile.simulate) and `explain` stop before Inductor: they need AOTAutograd's joint graph and
# its partition into forward and backward.
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition

# Inductor's own pointwise prims carry no tag; fma is not there before torch 2.12.
import torch  # noqa: E402

UNTAGGED_POINTWISE = tuple(getattr(torch.ops.prims, name).default for name in ("fma",) if hasattr(torch.ops.prims, name))

# ---- attention kernels ----------------------------------------------------------------------------------------------
# The fused CPU attention with its log-sum-exp: `scaled_dot_product_attention` does not return it, and without it two
# parts of one softmax can't be merged.
from torch import ops as _ops

flash_attention_cpu = _ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_attention_cpu_backward = _ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# ---- explain --------------------------------------------------------------------------------------------------------
# The graph breaks that Dynamo has counted in this process, by reason.
from torch._dynamo.utils import counters

# The fake mode of a graph's values, and what AOTAutograd knows of the graph that it is compiling (mutated inputs).
from torch._guards import TracingContext as _TracingContext
from torch._guards import detect_fake_mode

# The command builds its model of fake tensors, which allocate nothing.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def tracing_metadata():  # type: ignore[no-untyped-def]
    """AOTAutograd's metadata of the graph being compiled."""
    context = _TracingContext.try_get()
    return context.fw_metadata if context is not None else None

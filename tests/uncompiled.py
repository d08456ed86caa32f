"""The backend on real ranks without Inductor: its passes run, and so do the graphs that they write.

For what happens between graphs, which Inductor has no part in, and where compiling would take minutes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import fx

from spcompile import _torch

__all__ = ["uncompiled"]


class _Runner(fx.Interpreter):
    """A view was traced on strides that a rank's part need not have: compiled it takes any."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        target = torch.reshape if target is torch.ops.aten.view.default else target
        return super().call_function(target, args, kwargs)


def uncompiled(gm: fx.GraphModule, inputs: Sequence[Any], config_patches: Mapping[str, Any]) -> Any:
    """Stands in for Inductor's ``compile_fx``."""
    joint_pass = config_patches["joint_custom_pre_pass"]
    last_pass = config_patches["post_grad_custom_post_pass"]

    def partition(joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **kwargs: Any) -> Any:
        joint_pass(joint.graph)
        joint.recompile()
        split = _torch.min_cut_rematerialization_partition
        return split(joint, inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)

    def run(module: fx.GraphModule, example: Any) -> Any:
        last_pass(module.graph)
        module.recompile()
        return make_boxed_func(lambda *args: _Runner(module).run(*args, enable_io_processing=False))

    def inference(module: fx.GraphModule, example: Any) -> Any:
        joint_pass(module.graph)
        return run(module, example)

    return _torch.aot_autograd(
        fw_compiler=run,
        bw_compiler=run,
        inference_compiler=inference,
        partition_fn=partition,
        decompositions=_torch.select_decomp_table(),
        keep_inference_input_mutations=True,
    )(gm, inputs)

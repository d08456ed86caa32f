"""FlexAttention's kernels, as Inductor writes them, as machine code.

``python -m tests.flex_machine DTYPE SIZE``. One line of JSON: for each kernel its shared memory, stack and
registers. ``SM`` in the environment: another architecture, whose tiles Inductor then chooses.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.machine_code import SHARED, described
from spcompile.kernels.softmax import flex
from spcompile.kernels.softmax.operands import Operands, Options
from tests.interpreted_inductor import NotRun, templates, written


def main() -> int:
    dtype, size, arch = getattr(torch, sys.argv[1]), int(sys.argv[2]), int(os.environ.get("SM", "90"))
    q, k, v, grad = (torch.randn(1, h, 300, size, dtype=dtype) for h in (2, 1, 1, 2))
    x, options = Operands(q, k, v, torch.randn(300, 300)), Options(True, 0.1)
    with written() as found:
        torch.cuda.get_device_capability = lambda *args: divmod(arch, 10)
        for call in (
            lambda: flex.forward(x, options),
            lambda: flex.backward(grad, x, q, q[..., 0].float(), options),
        ):
            with contextlib.suppress(NotRun):
                call()
    results = {}
    for at, (kernel, how) in enumerate(x for code in found for x in templates(code.code)):
        meta = how["triton_meta"]
        source = ASTSource(fn=kernel, signature=meta["signature"], constexprs={}, attrs=meta["configs"][0])
        options_of = {name: how[name] for name in ("num_warps", "num_stages")}
        with mock.patch.dict(os.environ, TRITON_ALWAYS_COMPILE="1"):
            made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options_of)
        code = described(made, arch)
        kind = ("forward", "again", "backward")[at]
        results[kind] = {"shared": code.shared, "most": SHARED[arch], "stack": code.stack}
        results[kind] |= {"products": code.wide + code.products, "registers": code.registers}
    print("FOUND", json.dumps(results), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

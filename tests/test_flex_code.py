"""The code that Inductor writes for FlexAttention on an H100: interpreted, and as machine code.

``tests/test_flex.py`` has what FlexAttention is told; ``tests/interpreted_inductor.py`` says how it is done.
"""

from __future__ import annotations

import pytest

from tests import workers

pytest.importorskip("triton", reason="Triton is for Linux alone")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]

# What one rounding of each operand leaves.
TOLERANCE = {"fp32": 2e-6, "bf16": 6e-3}
RELEASE = [
    pytest.param(case, marks=pytest.mark.sweep)
    for case in ("bf16, bool", "fp32", "bf16, alibi", "fp32, capped")
]


@pytest.mark.parametrize("case", ["fp32, minimum", *RELEASE])
def test_the_compiled_code(case: str) -> None:
    """Forward and backward; no buffer of rows x keys; compiled once, and once more for other lengths."""
    (results,) = workers.found("flex_worker", case, timeout=570, TRITON_INTERPRET="1").values()
    for result in results:
        out, lse, *gradients = result["errors"]
        assert lse < 2e-6 and max(out, *gradients) < TOLERANCE[case.split(",")[0]], result
        assert result["largest"] < result["entries"], "of the size of a mask"
    assert [result["graphs"] for result in results] == [2, 2, 0][: len(results)]


@pytest.mark.parametrize(("dtype", "size", "arch"), [("float32", 128, 90)])
def test_the_machine_code(dtype: str, size: int, arch: int) -> None:
    """With a bias: it compiles, would start, and multiplies on the tensor cores."""
    kernels = workers.found("flex_machine", dtype, str(size), timeout=570, SM=str(arch))
    assert set(kernels) == {"forward", "again", "backward"}
    for kernel in kernels.values():
        assert kernel["shared"] <= kernel["most"] and kernel["products"] > 0, kernels

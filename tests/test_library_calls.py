"""How library calls get into Dynamo's graph: what is registered, when, and what is left alone."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import spcompile
from spcompile import library
from spcompile.library.table import TABLE
from spcompile.simulate import simulated
from tests.third_party import fla_kernel, fla_naive, load, transformers_function

TOLERANCE = 2e-5
SCAN = "mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined"


def operands(length: int = 97) -> dict[str, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 2, 8).requires_grad_() for _ in range(3))
    g = torch.nn.functional.logsigmoid(torch.randn(2, length, 2) + 2).requires_grad_()
    return {"q": q, "k": k, "v": v, "g": g}


def gradients(function: Callable[..., Tensor], x: dict[str, Tensor]) -> list[Tensor]:
    out = function(**x)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), list(x.values()))]


def targets(function: Callable[..., Any], x: dict[str, Tensor]) -> list[str]:
    """What Dynamo's graphs of the function call, nothing compiled."""
    found: list[str] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        found.extend(str(n.target) for n in gm.graph.nodes)
        return gm.forward

    torch._dynamo.reset()
    library.watch()
    torch.compile(function, backend=backend)(**x)
    return found


def fake(monkeypatch: pytest.MonkeyPatch, path: str, signature: str, body: str, disabled: bool) -> Any:
    """A module that looks like a library's, with one function of the given signature."""
    name, function = path.rsplit(".", 1)
    module: Any = types.ModuleType(name)
    exec(f"import torch\nCALLS = []\ndef {function}({signature}):\n    {body}", vars(module), vars(module))
    if disabled:
        setattr(module, function, torch.compiler.disable(getattr(module, function)))
    monkeypatch.setitem(sys.modules, name, module)
    return module


def scan(monkeypatch: pytest.MonkeyPatch, disabled: bool) -> tuple[Any, Callable[..., Tensor]]:
    """mamba_ssm's scan that would give zeros and notes each call, and a model's function that uses it."""
    body = "CALLS.append(1)\n    return torch.zeros_like(x)"
    module = fake(monkeypatch, SCAN, TABLE[SCAN].signature.replace("inf", "float('inf')"), body, disabled)

    def use(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **rest: Any) -> Tensor:
        A = torch.zeros(2) - 1
        return module.mamba_chunk_scan_combined(v, g.exp(), A, k, q, chunk_size=16, **rest) * 2

    return module, use


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor", "ranks"])
def test_the_operator_is_right_under_any_backend(backend: str) -> None:
    """Of a function that Dynamo would unroll, and of one that it would not enter: no graph break, and the
    outputs and gradients of fla's loop."""
    chunk = fla_naive("simple_gla/naive", "naive_chunk_simple_gla")
    kernel = fla_kernel("simple_gla/chunk", "chunk_simple_gla")
    loop = fla_naive("simple_gla/naive", "naive_recurrent_simple_gla")
    torch._dynamo.reset()
    ranks = simulated(3)

    def both(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return chunk(q, k, v, g)[0] + kernel(q, k, v, g=g)[0]

    compiled = torch.compile(both, backend=ranks if backend == "ranks" else backend, fullgraph=True)
    found = gradients(compiled, operands())
    expected = gradients(lambda q, k, v, g: 2 * loop(q, k, v, g)[0], operands())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * float(b.abs().max()))


@pytest.mark.parametrize("backend", ["eager", "inductor", "ranks"])
def test_autocast_where_the_operator_is_called(backend: str) -> None:
    """States stay float32, and outputs have the dtype that the library gives them."""
    function = transformers_function("qwen3_next", "torch_chunk_gated_delta_rule")
    torch._dynamo.reset()
    ranks = simulated(2)

    def use(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return function(q, k, v, g=g, beta=g.exp(), use_qk_l2norm_in_kernel=True)[0]

    compiled = torch.compile(use, backend=ranks if backend == "ranks" else backend, fullgraph=True)
    exact = gradients(use, operands())
    for x in (operands(), {n: y.detach().bfloat16().requires_grad_() for n, y in operands().items()}):
        with torch.autocast("cpu", torch.bfloat16):
            out = compiled(**x)
            assert out.dtype == use(**x).dtype
        grads = torch.autograd.grad(out.sin().sum(), list(x.values()))
        for a, b in zip([out.detach(), *grads], exact, strict=True):
            torch.testing.assert_close(a.float(), b, rtol=0, atol=3e-2 * float(b.abs().max()))


def test_the_function_itself_is_unchanged() -> None:
    function = transformers_function("qwen3_next", "torch_chunk_gated_delta_rule")
    before = function.__wrapped__.__code__
    library.register()
    assert function.__wrapped__.__code__ is before
    x = operands(16)
    out, state = function(x["q"], x["k"], x["v"], g=x["g"], beta=x["g"].exp())
    assert out.shape == x["v"].shape and state is None


@pytest.mark.parametrize("disabled", [True, False], ids=["disabled", "traced"])
def test_unknown_arguments_call_the_function_itself(monkeypatch: pytest.MonkeyPatch, disabled: bool) -> None:
    module, use = scan(monkeypatch, disabled)
    x = operands(32)
    assert any("linear_attention" in t for t in targets(use, x))
    assert not module.CALLS
    packed = {"cu_seqlens": torch.tensor([0, 32])}
    found = targets(use, {**x, **packed})
    assert not any("linear_attention" in t for t in found)
    assert module.CALLS or not disabled
    assert float(use(**x, **packed).detach().abs().max()) == 0.0


def test_an_argument_with_its_default_is_no_unknown_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _, use = scan(monkeypatch, disabled=True)
    rest: dict[str, Any] = {"seq_idx": None, "return_varlen_states": False}
    assert any("linear_attention" in t for t in targets(lambda **x: use(**x, **rest), operands(32)))


def test_another_signature_is_reported_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version may mean something else by its arguments."""
    module = fake(monkeypatch, SCAN, "x, dt, A, B, C, new_option=True", "return x", disabled=False)
    with pytest.warns(library.UnknownVersion, match="new_option"):
        library.register()
    library.register()  # once is enough
    status = library.known()[-1]
    assert status.row is TABLE[SCAN] and "new_option" in status.problem

    def use(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return module.mamba_chunk_scan_combined(v, g, None, k, q) + 1

    assert not any("linear_attention" in t for t in targets(use, operands(8)))


def test_versions_with_other_parameters_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    (signature,) = TABLE[SCAN].also
    module = fake(monkeypatch, SCAN, signature.replace("inf", "float('inf')"), "return x", disabled=True)

    def use(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return module.mamba_chunk_scan_combined(v, g.exp(), torch.zeros(2) - 1, k, q, 16, None, None)

    assert any("linear_attention" in t for t in targets(use, operands(8)))


def test_another_default_is_another_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    signature = (
        TABLE[SCAN].signature.replace("inf", "float('inf')").replace("dt_softplus=False", "dt_softplus=True")
    )
    fake(monkeypatch, SCAN, signature, "return x", disabled=False)
    with pytest.warns(library.UnknownVersion):
        library.register()


def test_a_library_imported_after_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.compile`` looks the backend up; the library's module comes while nothing is traced yet."""
    uses: list[Callable[..., Tensor]] = []
    torch._dynamo.reset()
    compiled = torch.compile(lambda **x: uses[0](**x), backend=simulated(2), fullgraph=True)
    uses.append(scan(monkeypatch, disabled=True)[1])
    assert float(compiled(**operands(32)).detach().abs().max()) > 0


def test_what_is_imported_is_registered_once() -> None:
    library.register()
    before = library.known()
    library.register()
    assert library.known() == before


def test_absent_libraries_cost_nothing() -> None:
    """Looking the backend up imports none of them."""
    names = sorted({row.module.partition(".")[0] for row in TABLE.values()})
    code = (
        "import sys\n"
        "from spcompile.backend import spcompile\n"
        f"print([n for n in {names} if n in sys.modules], 'spcompile.library' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[] True", done.stderr


def test_every_row_of_an_installed_library_is_registered() -> None:
    """The pinned versions have the signatures of the table."""
    for path, row in TABLE.items():
        if path.startswith("transformers."):
            transformers_function(path.split(".")[2], row.name)
        elif path.startswith(("fla.", "performer_pytorch.")):
            load(row.module)
    library.register()
    found = {(s.module, s.row.name): s.problem for s in library.known()}
    for row in TABLE.values():
        if not row.module.startswith(("mamba_ssm", "causal_conv1d")):  # built for CUDA alone
            assert found[row.module, row.name] == "", row.path


def test_explain_lists_library_calls() -> None:
    kernel = fla_kernel("simple_gla/chunk", "chunk_simple_gla")

    def attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return kernel(q, k, v, g=g)[0]

    report = spcompile.explain(attention, ranks=2)(**operands())
    (site,) = report.sites
    assert (site.kind, site.mask, site.rewritten) == ("linear", "causal", True)
    assert "kernel(q, k, v, g=g)" in site.source
    assert not report.breaks


def test_transformers_beside_fla() -> None:
    """Then its functions call fla's kernels, which need a GPU; compiled, they do not."""
    code = """
import importlib, warnings
warnings.simplefilter("ignore")
import fla, torch
from spcompile.simulate import simulated
model = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
attention = model.torch_chunk_gated_delta_rule
torch.manual_seed(0)
q, k, v = (torch.nn.functional.normalize(torch.randn(1, 70, 2, 8), dim=-1) for _ in range(3))
g, beta = -torch.rand(1, 70, 2), torch.rand(1, 70, 2)
def use(**x):
    return attention(q, k, v, g=g, beta=beta, chunk_size=64, cu_seqlens=None, **x)[0]
found = torch.compile(use, backend=simulated(2), fullgraph=True)(use_qk_l2norm_in_kernel=True)
expected = attention.__wrapped__(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]
print(float((found - expected).abs().max()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) < TOLERANCE, done.stderr

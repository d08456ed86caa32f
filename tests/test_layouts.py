"""Every operator means the same for operands of any strides: Inductor chooses them as it likes.

PyTorch's fused kernels do not all look at the strides that they are given: one of them once read beside the
queries, in compiled code only, for the layouts that one graph in ten has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import spcompile
import spcompile.chunked  # registers operators
import spcompile.rules.scans  # registers an operator
from spcompile.attention import softmax
from spcompile.kernels.linear.operands import Operands, Options
from tests.threads import close
from tests.variants import KINDS, cotangents, draw, options_of

spc = torch.ops.spcompile


@pytest.fixture(autouse=True)
def _second_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory is NaN, and operators that read their rank are rank 1."""
    monkeypatch.setattr(softmax, "current_rank", lambda group: 1)
    mode = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(mode)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def attention(mask: Tensor | None, values: int = 4) -> tuple[Any, ...]:
    """q of 6 tokens, k and v of 12: the operands of rank 1 of 2."""
    return normal(2, 4, 6, 4), normal(2, 2, 12, 4), normal(2, 2, 12, values), mask


def softmax_backward(operator: Any, own: tuple[Any, ...], *options: Any) -> tuple[Any, ...]:
    out, lse = operator(*own, *options)
    return normal(*out.shape), *own, out, lse, *options


def masks() -> dict[str, Tensor | None]:
    additive = normal(2, 4, 6, 12)
    return {"no mask": None, "bool": additive > -0.5, "additive": additive, "one row": additive[:, :1, :1]}


WHOLE, LOCAL = (True, 0.3), (0.3, "group", 6)


def softmax_samples(operator: str, *options: Any) -> list[tuple[Any, ...]]:
    operands = [attention(m) for m in masks().values()] + [attention(None, 7)]
    if not operator.endswith("_backward"):
        return [(*own, *options) for own in operands]
    forward = getattr(spc, operator.removesuffix("_backward").removesuffix("_relative"))
    return [softmax_backward(forward, own, *options) for own in operands]


def linear() -> list[tuple[Operands, Options]]:
    rows = [
        (draw(v, 2, 2, 70, 4, 5), options_of(v, reverse)) for v in KINDS.values() for reverse in (False, True)
    ]
    (basic,) = (v for v in KINDS.values() if v.decay == "none" and not v.delta)
    return [*rows, (draw(basic, 2, 2, 9, 4, 5, initial=False), options_of(basic)._replace(causal=False))]


def linear_backward(x: Operands, o: Options) -> tuple[Any, ...]:
    grad, grad_final = cotangents(x)
    return grad, grad_final if o.causal else None, *x, spc.linear_attention(*x, *o)[1], *o


def scans() -> list[tuple[Any, ...]]:
    shapes = {False: (2, 9, 3, 4), True: (2, 9, 3, 3)}
    return [(normal(*a), normal(2, 9, 3, 4), normal(2, 3, 4), matrix) for matrix, a in shapes.items()]


OVER_CHUNKS = (
    *("chunk_states", "chunk_total", "chunk_chain", "chunk_within", "chunk_outputs", "chunk_sources"),
    *("chunk_within_backward", "chunk_states_backward"),
)
CHUNK = 16  # of 70 tokens: the last of five chunks is not full


def chunks() -> list[dict[str, Any]]:
    """Of each kind of operands the arguments of the operators over chunks, made by one another."""
    rows = []
    for x, o in linear()[:-1]:
        tokens = *x[1:4], x.beta, CHUNK, o.reverse
        states, transitions, written = spc.chunk_states(*tokens)
        matrix = x.beta is not None
        how = o.scale, CHUNK, o.exclusive, o.reverse
        reads = *x[:4], written, *how
        intra, queries = spc.chunk_within(*reads)
        before, _ = spc.chunk_chain(states, transitions, None, matrix, False)
        grad = cotangents(x)[0]
        back = grad, *x[:4], written, before, *how
        known = spc.chunk_within_backward(*back)[1:]
        rows.append(
            {
                "chunk_states": tokens,
                "chunk_total": (states, transitions, matrix, o.reverse),
                "chunk_chain": (states, transitions, x.initial_state.flatten(0, 1), matrix, o.reverse),
                "chunk_within": reads,
                "chunk_outputs": (intra, queries, before, x.q, o.reverse),
                "chunk_sources": (queries, grad, o.reverse),
                "chunk_within_backward": back,
                "chunk_states_backward": (
                    *x[1:5],
                    written,
                    before,
                    normal(*before.shape),
                    *known,
                    CHUNK,
                    o.reverse,
                ),
            }
        )
    return rows


def folds() -> list[tuple[Any, ...]]:
    """Three ranks, of which the first two count."""
    keep, states = torch.tensor([True, True, False]), normal(3, 1, 2, 4, 5)
    transitions = {"basic": None, "decay": -normal(3, 1, 2, 4, 1).abs(), "matrix": normal(3, 1, 2, 4, 4)}
    return [(a, states, keep, normal(1, 2, 4, 5), name, True) for name, a in transitions.items()]


SAMPLES: dict[str, Callable[[], list[tuple[Any, ...]]]] = {
    "softmax_attention": lambda: softmax_samples("softmax_attention", *WHOLE),
    "softmax_attention_backward": lambda: softmax_samples("softmax_attention_backward", *WHOLE),
    "local_softmax_attention": lambda: softmax_samples("local_softmax_attention", *LOCAL),
    "local_softmax_attention_backward": lambda: softmax_samples("local_softmax_attention_backward", *LOCAL),
    "softmax_attention_relative_backward": lambda: softmax_samples(
        "softmax_attention_relative_backward", *WHOLE, None, None, None, None, normal(4, 23)
    ),
    "local_softmax_attention_relative_backward": lambda: softmax_samples(
        "local_softmax_attention_relative_backward",
        *LOCAL,
        *(True, None, None, None, 0, None, None, normal(1, 23)),
    ),
    "linear_attention": lambda: [(*x, *o) for x, o in linear()],
    "linear_attention_backward": lambda: [linear_backward(x, o) for x, o in linear()],
    "affine_scan": scans,
    "max_scan": lambda: [(a, b, start) for a, b, start, matrix, *_ in scans() if not matrix],
    **{name: partial(lambda name: [row[name] for row in chunks()], name) for name in OVER_CHUNKS},
    "folded": folds,
    "reverse_cumsum": lambda: [(normal(2, 9, 3), 1)],
    "lend": lambda: [(normal(2, 9, 3), 0)],
    "open_port": lambda: [(normal(2, 9, 3),)],
    "late": lambda: [(torch.zeros(()), [2, 9], [1], "", torch.float64, torch.device("cpu"))],
    "rows": lambda: [(normal(7, 3), 2, 5, []), (normal(4, 2), 0, 4, [])],
    "add_product": lambda: [(normal(4, 3), normal(4, 5), normal(5, 3))],
    "add_late": lambda: [(normal(2, 9, 3), torch.zeros(()), [1], "")],
}
"""Arguments of each operator that takes tensors."""


def relaid(x: Tensor, order: list[int], gap: int) -> Tensor:
    """``x`` with its dims laid out in ``order``, and ``gap`` entries of garbage between neighbours."""
    order = [d for d in order if d < x.dim()]
    shape = [x.shape[d] for d in order]
    room = torch.full((*shape, gap), 7.0).to(x.dtype)
    room[..., 0] = x.permute(order)
    return room[..., 0].permute([order.index(d) for d in range(x.dim())])


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if x.numel()]


def check(
    operator: Callable[..., Any], arguments: tuple[Any, ...], relay: Callable[[Tensor], Tensor]
) -> None:
    """As for contiguous operands, and with the strides that the fake promises to the compiler."""
    moved = tuple(relay(x) if isinstance(x, Tensor) else x for x in arguments)
    found, wanted = tensors(operator(*moved)), tensors(operator(*arguments))
    with FakeTensorMode() as mode:
        promised = tensors(operator(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in moved)))
    for x, y, fake in zip(found, wanted, promised, strict=True):
        close(x, y, 1e-12)
        assert (x.shape, x.stride(), x.dtype) == (fake.shape, fake.stride(), fake.dtype)


def test_every_operator_has_samples() -> None:
    source = "".join(p.read_text() for p in Path(spcompile.__file__).parent.rglob("*.py"))
    # "rank" takes no tensor; the "start_" operators need ranks to send to (tests/test_ways.py), and copy what
    # they send; those with "_" at the end only write; the others are replaced by their rules.
    others = {"rank", "start_shift", "start_mirror", "add_late_", "add_product_", "arrive", "depart"}
    # GPU kernels run in a process where they are interpreted: opcheck, and strided operands, there.
    worker = (Path(__file__).parent / "fused_worker.py").read_text()
    others |= set(re.findall(r"opcheck\(\s*ops\.(\w+)", worker))
    assert {*SAMPLES, *others} == set(re.findall(r'custom_op\("spcompile::(\w+)"', source))


@pytest.mark.parametrize("name", SAMPLES)
def test_operators_take_any_strides(name: str) -> None:
    operator, rows = getattr(spc, name), SAMPLES[name]()

    @settings(max_examples=12, deadline=None)
    @given(st.data())
    def any_layout(data: st.DataObject) -> None:
        arguments = rows[data.draw(st.integers(0, len(rows) - 1))]
        order = st.permutations(range(5))
        check(operator, arguments, lambda x: relaid(x, data.draw(order), data.draw(st.integers(1, 2))))

    any_layout()


@pytest.mark.parametrize("name", [*OVER_CHUNKS, "folded"])
def test_opcheck(name: str) -> None:
    """torch's own check of schemas and fakes; those with gradients have theirs in their own tests."""
    for arguments in SAMPLES[name]():
        torch.library.opcheck(getattr(spc, name).default, arguments)


@pytest.mark.parametrize("gap", [1, 2])
@pytest.mark.parametrize("name", SAMPLES)
def test_operators_take_reversed_strides(name: str, gap: int) -> None:
    for arguments in SAMPLES[name]():
        check(getattr(spc, name), arguments, lambda x: relaid(x, [4, 3, 2, 1, 0], gap))

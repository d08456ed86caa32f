"""The symbolic evaluator of masks: usual spellings are proved, and whatever is proved is what
evaluation gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from spcompile.passes.recognize.algebra.dims import Atom
from spcompile.passes.recognize.proof import masks
from spcompile.passes.recognize.proof.prover import Prover
from spcompile.passes.shadow import Value, trace

INF = float("inf")


def value_of(fn: Callable[..., Tensor], *data: Tensor) -> Value:
    """The shadow Value of what `fn` returns, without Dynamo: a graph of one call."""
    graph = torch.fx.Graph()
    mode = FakeTensorMode()
    nodes = []
    for n, x in enumerate(data or (torch.zeros(1),)):
        nodes.append(graph.placeholder(f"x{n}"))
        nodes[-1].meta["example_value"] = mode.from_tensor(x)
    graph.output((graph.call_function(fn, tuple(nodes[: len(data)])),))
    shadow = trace(torch.fx.GraphModule(torch.nn.Module(), graph))
    assert shadow is not None
    (out,) = next(r.result for r in shadow.records.values() if r.node.op == "output")
    return out


def pieces_of(fn: Callable[..., Tensor], *data: Tensor) -> tuple[masks.Spans | None, Value]:
    value = value_of(fn, *data)
    rows, cols = Atom(value.shape[-2]), Atom(value.shape[-1])
    dims = tuple((Atom(s),) if s > 1 else () for s in value.shape[:-2]) + ((rows,), (cols,))
    return Prover().spans(value, dims, rows, cols), value


T, S = 6, 6


def q_idx() -> Tensor:
    return torch.arange(T)[:, None]


def k_idx() -> Tensor:
    return torch.arange(T)[None, :]


def tokens_of_one_document() -> Tensor:
    """As transformers detects packed sequences when positions are an arange."""
    position = (torch.arange(T) + 0).unsqueeze(0).expand(2, -1)
    document = (torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    batch = torch.arange(2)[:, None, None, None]
    q, k = torch.arange(T)[None, None, :, None], torch.arange(T)[None, None, None, :]
    keep = q.new_ones((), dtype=torch.bool) & (document[batch, q] == document[batch, k])
    return (keep & (position[batch, k] <= position[batch, q])).expand(2, -1, T, T)


CAUSAL = {
    "ge": lambda: q_idx() >= k_idx(),
    "le": lambda: k_idx() <= q_idx(),
    "gt plus one": lambda: q_idx() + 1 > k_idx(),
    "not lt": lambda: ~(q_idx() < k_idx()),
    "difference": lambda: (q_idx() - k_idx()) >= 0,
    "ge method": lambda: torch.ge(q_idx(), k_idx()),
    "tril ones": lambda: torch.tril(torch.ones(T, T)).bool(),
    "tril ones bool": lambda: torch.ones(T, T, dtype=torch.bool).tril(),
    "tril eq": lambda: torch.tril(torch.ones(T, T)) == 1,
    "tril byte": lambda: torch.tril(torch.ones((T, T), dtype=torch.uint8)).view(1, 1, T, T) > 0,
    "triu complement": lambda: torch.triu(torch.ones(T, T), diagonal=1) == 0,
    "triu of rows": lambda: torch.triu(torch.ones(T, T, dtype=torch.bool)).t(),
    "logical not triu": lambda: torch.logical_not(torch.triu(torch.ones(T, T, dtype=torch.bool), 1)),
    "cumsum": lambda: (torch.ones(T).cumsum(0) - 1)[:, None] >= k_idx(),
    "float arange": lambda: torch.arange(T, dtype=torch.float32)[:, None] >= torch.arange(T).float(),
    "expanded": lambda: (q_idx() >= k_idx())[None, None].expand(2, 3, T, T),
    "reshaped": lambda: torch.arange(T).view(1, 1, T, 1) >= torch.arange(T).reshape(1, 1, 1, T),
    "conjunction": lambda: (q_idx() >= k_idx()) & torch.ones(T, T, dtype=torch.bool),
    "xor": lambda: (q_idx() < k_idx()) ^ torch.ones((), dtype=torch.bool),
    "where": lambda: torch.where(q_idx() < k_idx(), False, True),
    "fill": lambda: torch.zeros(T, T).masked_fill(q_idx() < k_idx(), -INF) == 0,
    "in place": lambda: torch.full((T, T), -INF).triu_(1) == 0,
    "clamp": lambda: (q_idx() - k_idx()).clamp(min=-1) >= 0,
    "minimum": lambda: torch.minimum(q_idx(), k_idx()) == k_idx(),
    "sign of the max": lambda: torch.maximum(q_idx(), k_idx()) <= q_idx(),
    "abs": lambda: (q_idx() - k_idx()).abs() == q_idx() - k_idx(),
    "sliced": lambda: torch.ones(9, 9, dtype=torch.bool).tril()[:T, :T],
    "flipped twice": lambda: torch.ones(T, T, dtype=torch.bool).triu().flip(0, 1),
    "window that is wider": lambda: (q_idx() >= k_idx()) & (q_idx() - k_idx() < T),
    "one document": tokens_of_one_document,
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_spellings_are_proved(name: str) -> None:
    spans, value = pieces_of(CAUSAL[name])
    assert masks.kind_of(spans) == "causal"
    complement, _ = pieces_of(lambda: ~CAUSAL[name]())
    assert masks.kind_of(complement) == "anticausal"
    assert torch.equal(CAUSAL[name]().expand(value.shape), torch.ones(value.shape, dtype=torch.bool).tril())


OTHER = {
    "all": lambda: torch.ones(T, T, dtype=torch.bool),
    "all by range": lambda: q_idx() + k_idx() >= 0,
    "all by two halves": lambda: (q_idx() >= k_idx()) | (q_idx() < k_idx()),
    "none": lambda: (q_idx() > k_idx()) & (q_idx() < k_idx()),
    "none ": lambda: torch.zeros(T, T).bool(),
}


@pytest.mark.parametrize("name", OTHER)
def test_trivial_masks(name: str) -> None:
    assert masks.kind_of(pieces_of(OTHER[name])[0]) == name.split()[0]


@pytest.mark.parametrize(
    "fn",
    [
        lambda: q_idx() > k_idx(),
        lambda: torch.ones(T, T, dtype=torch.bool).tril(1),
        lambda: k_idx() < 3,
        lambda: q_idx() + k_idx() > 4,
        lambda: q_idx() // 2 >= k_idx() // 2,
        lambda: q_idx() * 2 >= k_idx(),
        lambda: (q_idx() >= k_idx()) & (k_idx() != 2),
    ],
)
def test_others_are_general(fn: Callable) -> None:
    assert masks.kind_of(pieces_of(fn)[0]) == "general"


def test_data_is_not_trusted_but_equals_itself() -> None:
    x = torch.ones(T, T, dtype=torch.bool).tril()
    assert masks.kind_of(pieces_of(lambda x: x, x)[0]) == "general"
    assert masks.kind_of(pieces_of(lambda x: x & (q_idx() >= k_idx()), x)[0]) == "general"
    assert masks.kind_of(pieces_of(lambda x: x | ~x, x)[0]) == "all"


def test_nothing_of_size_t_by_t_and_fast() -> None:
    """A proof at a length of which a table would take a terabyte."""
    n = 2**20
    spans, _ = pieces_of(lambda: torch.arange(n)[:, None] >= torch.arange(n)[None, :])
    assert masks.kind_of(spans) == "causal"


def test_numbers_that_do_not_fit_are_data() -> None:
    n = 400
    small = lambda: torch.arange(n, dtype=torch.bfloat16)  # noqa: E731  (256 and 257 are one number there)
    assert masks.kind_of(pieces_of(lambda: small()[:, None] >= small())[0]) == "general"
    bytes_ = lambda: torch.arange(200, dtype=torch.uint8)  # noqa: E731  (wraps at 256)
    assert masks.kind_of(pieces_of(lambda: bytes_()[:, None] + 100 >= bytes_() + 100)[0]) == "general"


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (4, 4), (3, 6), (6, 3)])
def test_keeps_every_row(rows: int, cols: int) -> None:
    """Against a table, for every band."""
    d = torch.arange(rows)[:, None] - torch.arange(cols)
    for lo in range(1 - cols, rows):
        for hi in range(lo, rows):
            spans = [
                masks.Span(1 - cols, lo - 1, False),
                masks.Span(lo, hi, True),
                masks.Span(hi + 1, rows - 1, False),
            ]
            spans = [p for p in spans if p.lo <= p.hi]
            assert masks.keeps_every_row(spans, rows, cols) == bool(((d >= lo) & (d <= hi)).any(1).all())


# ---------------------------------------------------------------- random programs


def numbers(depth: int) -> st.SearchStrategy:
    leaf = st.sampled_from(["i", "j", "1", "2", "-3", "i.float()", "ones.cumsum(0)[:, None]", "eye"])
    if depth == 0:
        return leaf
    sub = numbers(depth - 1)
    two = st.tuples(sub, st.sampled_from(["+", "-", "*"]), sub).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
    call = st.tuples(st.sampled_from(["maximum", "minimum"]), sub, sub).map(
        lambda t: f"torch.{t[0]}(as_t({t[1]}), as_t({t[2]}))"
    )
    where = st.tuples(bools(depth - 1), sub, sub).map(lambda t: f"torch.where({t[0]}, {t[1]}, {t[2]})")
    one = st.tuples(
        sub, st.sampled_from(["abs()", "neg()", "clamp(-1, 2)", "floor_divide(2)", "remainder(3)"])
    ).map(lambda t: f"as_t({t[0]}).{t[1]}")
    return st.one_of(leaf, two, call, where, one)


def bools(depth: int) -> st.SearchStrategy:
    compare = st.tuples(
        numbers(max(depth - 1, 0)), st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), numbers(0)
    )
    leaf = st.one_of(
        compare.map(lambda t: f"(as_t({t[0]}) {t[1]} as_t({t[2]}))"),
        st.integers(-3, 3).map(lambda n: f"full.tril({n})"),
        st.integers(-3, 3).map(lambda n: f"full.triu({n})"),
    )
    if depth == 0:
        return leaf
    sub = bools(depth - 1)
    two = st.tuples(sub, st.sampled_from(["&", "|", "^"]), sub).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
    one = st.one_of(
        sub.map(lambda s: f"(~{s})"),
        sub.map(lambda s: f"(full & {s}).tril(1)"),
        sub.map(lambda s: f"(full & {s})[None].expand(2, -1, -1)[1]"),
        sub.map(lambda s: f"((full & {s}).float() * 2.0 > 0.5)"),
    )
    return st.one_of(leaf, two, one)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(bools(3), st.sampled_from([(4, 4), (5, 5), (3, 5)]))
def test_what_is_proved_is_true(program: str, shape: tuple[int, int]) -> None:
    n, m = shape

    def fn() -> Tensor:
        square = n == m
        scope = {
            "torch": torch, "i": torch.arange(n)[:, None], "j": torch.arange(m)[None, :],
            "ones": torch.ones(n, dtype=torch.int64), "full": torch.ones(n, m, dtype=torch.bool),
            "eye": torch.eye(n, dtype=torch.int64) if square else torch.zeros(n, m, dtype=torch.int64),
            "as_t": lambda x: x if isinstance(x, Tensor) else torch.full((), x),
        }  # fmt: skip
        return eval(program, scope).expand(n, m)

    spans, _ = pieces_of(fn)
    if spans is None:
        return
    want = fn()
    d = torch.arange(n)[:, None] - torch.arange(m)
    got = torch.zeros(n, m, dtype=torch.bool)
    for p in spans:
        got |= (d >= p.lo) & (d <= p.hi) & bool(p.value)
    assert spans[0].lo == 1 - m and spans[-1].hi == n - 1
    assert torch.equal(got, want), program

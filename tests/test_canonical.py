"""Dynamo's graph in canonical order: one text for programs that compute the same, and the values of eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from spcompile.passes.canonical import canonicalise, in_their_order, own_copy
from spcompile.passes.einsums import cheapest, split_einsums, without_opt_einsum


def text(program: Callable[..., Any], *inputs: Any) -> tuple[str, Any, Any]:
    """The canonical graph of ``program``, what it gives and what Dynamo's own graph gives, same seed."""
    found: list[Any] = []

    def backend(gm: fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            torch.manual_seed(0)
            mine = [x.clone() if isinstance(x, Tensor) else x for x in args]
            expected = gm(*mine)
            places = canonicalise(gm)
            split_einsums(gm)
            gm.graph.lint()
            other = [x.clone() if isinstance(x, Tensor) else x for x in args]
            torch.manual_seed(0)
            given = gm(*(other[i] for i in places))
            found.extend([(expected, mine), (given, other)])
            code = "".join(m.code for m in gm.modules() if isinstance(m, fx.GraphModule))
            found.append(code)
            return given

        return run

    torch._dynamo.reset()
    torch.compile(program, backend=backend, fullgraph=True)(*inputs)
    expected, given, code = found
    return code, expected, given


def walk(names: Sequence[str], x: Tensor, tables: dict[str, Tensor]) -> Tensor:
    """What Gemma 4 does: something for each name of a set, in the set's order, used in another."""
    made = {}
    with torch.no_grad():
        for name in names:
            angle = tables[name].float() * torch.arange(x.shape[0])[:, None]
            made[name] = (angle.cos(), angle.sin())
    for name in sorted(names):
        x = x * made[name][0] + x.flip(-1) * made[name][1]
    return x


def regions(names: Sequence[str], x: Tensor, tables: dict[str, Tensor]) -> Tensor:
    """The same under a mode for each."""
    made = {}
    for name in names:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made[name] = x @ tables[name].diag()
    return torch.stack([made[n] for n in sorted(names)])


def twins(names: Sequence[str], x: Tensor, tables: dict[str, Tensor]) -> Tensor:
    """Equal parts that are used differently."""
    made = {name: x.sin() for name in names}
    return torch.stack([made[n] * tables[n] for n in sorted(names)])


@pytest.mark.parametrize("program", [walk, regions, twins])
def test_one_text_for_any_order(program: Callable[..., Tensor]) -> None:
    x, tables = torch.randn(3, 4), {n: torch.randn(4) for n in "abc"}
    texts = set()
    for names in ("abc", "bca", "cab", "cba"):
        code, expected, given = text(lambda x, t: program(names, x, t), x, tables)  # noqa: B023
        torch.testing.assert_close(given, expected, rtol=0, atol=0)
        texts.add(code)
    assert len(texts) == 1


def in_place(x: Tensor, y: Tensor) -> Any:
    before = x * 2
    view = x[1:]
    view.mul_(3)
    after = x * 2
    y[0] = after[0]
    x += 1
    return before, after, view * 1, y.sum(), x.relu_() + before


def random(x: Tensor, y: Tensor) -> Any:
    first = F.dropout(x, 0.5)
    second = torch.rand(3, 4)
    return F.dropout(y, 0.5) + second, torch.bernoulli(x.sigmoid()), first, torch.rand_like(x)


def modes(x: Tensor, y: Tensor) -> Any:
    z = y.sin()
    with torch.no_grad():
        a = x.cos()
        with torch.enable_grad():
            b = a * y
        x.mul_(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        c = x @ y.t()
        with torch.autocast("cpu", enabled=False):
            d = x @ z.t()
    return d, c, b, a, x + 1


def checkpointed(x: Tensor, y: Tensor) -> Any:
    def block(h: Tensor) -> Tensor:
        return F.dropout(h.sin(), 0.5) * y

    return checkpoint(block, checkpoint(block, x, use_reentrant=False), use_reentrant=False) + x


def vmapped(x: Tensor, y: Tensor) -> Any:
    return torch.vmap(lambda a: a.sin() * y.cos().sum())(x), y.cos()


def statistics(x: Tensor, y: Tensor) -> Any:
    mean, variance = torch.zeros(4), torch.ones(4)
    before = mean + 1
    out = F.batch_norm(x, mean, variance, training=True)
    return out, mean * 1, before, variance + y


@pytest.mark.parametrize("program", [in_place, random, modes, checkpointed, vmapped, statistics])
def test_effects_keep_their_order(program: Callable[..., Any]) -> None:
    """Values, and what is left in the inputs, are those of Dynamo's own order; values are eager's."""
    inputs = torch.randn(3, 4), torch.randn(3, 4)
    _, expected, given = text(program, *(x.clone() for x in inputs))
    torch.testing.assert_close(given, expected, rtol=0, atol=0)
    torch.manual_seed(0)
    mine = [x.clone() for x in inputs]
    eager = program(*mine)
    eager = eager if isinstance(eager, tuple) else (eager,)
    torch.testing.assert_close(tuple(expected[0]), eager, rtol=0, atol=0)


def test_operands_come_just_before_their_user_and_unused_values_last() -> None:
    def program(x: Tensor) -> Tensor:
        late, unused = x.cos(), x.tan()
        return (x.sin() + late) * unused.shape[0]

    code, *_ = text(program, torch.randn(3))
    lines = [line.split(" = ")[1].split(";")[0] for line in code.splitlines() if " = " in line]
    assert lines[1:] == ["l_x_.sin()", "l_x_.cos()", "sin + late", "add * 3", "l_x_.tan()"]


EINSUMS = [
    ("bik,bjk,bijk->bij", [(2, 3, 4), (2, 5, 4), (2, 3, 5, 4)]),
    ("...i, ij, j...", [(2, 3, 4), (4, 5), (5, 3)]),
    ("ab,bc,cd,de", [(2, 3), (3, 4), (4, 5), (5, 6)]),
    ("ii,ij,k->jk", [(3, 3), (3, 4), (2,)]),
    ("bi,bj,bk->ijk", [(1, 3), (5, 4), (5, 2)]),
    ("a,b,c,d,e,f->fa", [(2,), (3,), (2,), (3,), (2,), (3,)]),
]


@pytest.mark.parametrize(("equation", "shapes"), EINSUMS)
def test_einsums_of_many_operands_are_split(equation: str, shapes: list[tuple[int, ...]]) -> None:
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    code, _, (given, _) = text(lambda *x: torch.einsum(equation, *x), *inputs)
    torch.testing.assert_close(given[0], torch.einsum(equation, *inputs), rtol=1e-12, atol=1e-12)
    assert code.count("einsum(") == len(shapes) - 1


def test_opt_einsum_may_be_off_already() -> None:
    with without_opt_einsum(), without_opt_einsum():
        assert not torch.backends.opt_einsum.enabled


def test_the_cheapest_product_comes_first() -> None:
    chain = ["ab", "bc", "cd"]
    assert cheapest(chain, "ad", {"a": 2, "b": 9, "c": 9, "d": 9}) == [(0, 1), (0, 1)]
    assert cheapest(chain, "ad", {"a": 9, "b": 9, "c": 9, "d": 2}) == [(1, 2), (0, 1)]
    assert cheapest(["a", "b", "c"], "abc", {"a": 2, "b": 2, "c": 2}) == [(0, 1), (0, 1)]


def test_dynamos_own_graph_is_left_alone() -> None:
    """Dynamo writes the call by the order of its graph's inputs, which it reads after the backend; the passes
    move inputs and give the module another graph. Without a copy the operands would be swapped, silently."""

    def backend(gm: fx.GraphModule, example: Sequence[Any]) -> Callable[..., Any]:
        before = str(gm.graph)
        mine = own_copy(gm)
        places = canonicalise(mine)
        mine.graph = fx.Graph(mine)
        moved.append(places != sorted(places))
        nested = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
        assert str(gm.graph) == before and not {*nested} & {*mine.modules()}
        again = own_copy(gm)
        canonicalise(again)
        return in_their_order(again, places)

    def late_first(x: Tensor, y: Tensor) -> Tensor:
        shape = x.shape[0] * 2  # x is Dynamo's first input, y is what is computed with first
        return checkpoint(torch.cos, y.sin(), use_reentrant=False) - x * shape

    moved: list[bool] = []
    torch._dynamo.reset()
    x, y = torch.randn(3), torch.randn(3, requires_grad=True)
    found = torch.compile(late_first, backend=backend, fullgraph=True)(x, y)
    torch.testing.assert_close(found, late_first(x, y))
    assert moved == [True]

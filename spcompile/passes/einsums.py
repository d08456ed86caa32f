"""An einsum of three operands or more as a chain of einsums of two.

torch.einsum leaves the order of such products to opt_einsum, where it is installed, which walks sets of
letters: where two orders cost the same, each process takes another. Here ties go to the first operands.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from spcompile._torch import FakeTensor, hint

__all__ = ["split_einsums", "without_opt_einsum"]

# Orders of more operands than these are chosen step by step.
_TRY_ALL = 5
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_KEPT = ("stack_trace", "nn_module_stack", "source_fn_stack")

Step = tuple[int, int]  # the two terms that are multiplied; their product comes last


@contextlib.contextmanager
def without_opt_einsum() -> Iterator[None]:
    """What is traced inside does not follow the hashes of strings. It may be off already (by the user)."""
    if not torch.backends.opt_einsum.enabled:
        yield
        return
    with torch.backends.opt_einsum.flags(enabled=False):
        yield


def split_einsums(gm: fx.GraphModule) -> None:
    """Replace each einsum of Dynamo's graph that has more than two operands and an equation of letters."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            if _split_all(module.graph):
                module.recompile()


def _split_all(graph: fx.Graph) -> bool:
    found = False
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not torch.einsum or not isinstance(node.args[0], str):
            continue
        operands = node.args[1:] if len(node.args) != 2 else node.args[1]
        if not isinstance(operands, Sequence) or len(operands) < 3:
            continue
        values = [x.meta.get("example_value") for x in operands]
        if all(isinstance(v, FakeTensor) for v in (*values, node.meta.get("example_value"))):
            _split(graph, node, list(operands), *written_out(node.args[0], [v.dim() for v in values]))
            found = True
    return found


def _split(graph: fx.Graph, node: fx.Node, operands: list[Any], terms: list[str], out: str) -> None:
    shapes = [[int(hint(s)) for s in x.meta["example_value"].shape] for x in operands]
    sizes = sizes_of(terms, shapes)
    for i, j in cheapest(terms, out, sizes):
        (a, b), (x, y) = (terms[i], terms[j]), (operands[i], operands[j])
        terms, operands = _without(terms, i, j), _without(operands, i, j)
        made = _product(a, b, terms, out)
        with graph.inserting_before(node):
            new = graph.call_function(torch.einsum, (f"{a},{b}->{made}", x, y))
        new.meta.update({k: node.meta[k] for k in _KEPT if k in node.meta})
        new.meta["example_value"] = _like(node.meta["example_value"], [sizes[c] for c in made])
        terms.append(made)
        operands.append(new)
    operands[0].meta["example_value"] = node.meta["example_value"]
    node.replace_all_uses_with(operands[0])
    graph.erase_node(node)


def _without(items: list[Any], i: int, j: int) -> list[Any]:
    return [x for k, x in enumerate(items) if k not in (i, j)]


def _product(a: str, b: str, others: Sequence[str], out: str) -> str:
    """The letters of a product of two terms: those that are still needed, or the output's at the end."""
    if not others:
        return out
    needed = "".join(others) + out
    return "".join(c for c in dict.fromkeys(a + b) if c in needed)


def _like(value: Tensor, shape: list[int]) -> Tensor:
    """What Dynamo would have recorded of a part of the einsum that gives ``value``."""
    assert isinstance(value, FakeTensor)
    with value.fake_mode:  # which need not be that of the compilation
        return value.new_empty(shape)


def written_out(equation: str, dims: Sequence[int]) -> tuple[list[str], str]:
    """The letters of each operand and of the output, with ``...`` and an output left out made explicit."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    free = [c for c in _LETTERS if c not in equation]
    widths = [d - len(t) + 3 if "..." in t else 0 for t, d in zip(terms, dims, strict=True)]
    dots = "".join(free[: max(widths)])
    if not arrow:
        once = sorted(c for c in set(left) - set(",.") if left.count(c) == 1)
        out = "..." * ("..." in left) + "".join(once)
    terms = [t.replace("...", dots[len(dots) - w :] if w else "") for t, w in zip(terms, widths)]
    return terms, out.replace("...", dots)


def sizes_of(terms: Sequence[str], shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """The size of each letter."""
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for letter, size in zip(term, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return sizes


def cheapest(terms: Sequence[str], out: str, sizes: Mapping[str, int]) -> list[Step]:
    """The order of products with the fewest multiplications; of equal ones the first.

    A product costs the product of all its letters' sizes. Of many operands the cheapest product comes first.
    """

    def cost(a: str, b: str) -> int:
        return math.prod(sizes[c] for c in dict.fromkeys(a + b))

    def best(left: list[str]) -> tuple[int, list[Step]]:
        if len(left) == 1:
            return 0, []
        pairs = list(itertools.combinations(range(len(left)), 2))
        if len(left) > _TRY_ALL:
            pairs = [min(pairs, key=lambda p: cost(left[p[0]], left[p[1]]))]
        found: tuple[int, list[Step]] | None = None
        for i, j in pairs:
            rest = _without(left, i, j)
            more, steps = best([*rest, _product(left[i], left[j], rest, out)])
            total = cost(left[i], left[j]) + more
            if found is None or total < found[0]:
                found = total, [(i, j), *steps]
        assert found is not None
        return found

    return best(list(terms))[1]

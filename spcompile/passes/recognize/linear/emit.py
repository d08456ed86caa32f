"""The call of `spcompile::linear_attention` that stands for a Form, and what goes around it.

Weights become tensors here: a `Side`'s expressions are written with the graph's own nodes, its log decay as
`[B or 1, H or 1, T or 1, 1]`, its row factors into q, its column factors into k. Weights on both sides of the
diagonal are two calls, one of them in reverse.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import prod
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from spcompile.passes.recognize.algebra.dims import Atom
from spcompile.passes.recognize.algebra.products import Factor
from spcompile.passes.recognize.edit import Editor, Operand, Refused, Writer
from spcompile.passes.recognize.linear.form import Form
from spcompile.passes.recognize.linear.weights import ONE, ZERO, Side
from spcompile.passes.recognize.proof.reals import Parity

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    sympy.exp: torch.exp,
    sympy.log: torch.log,
    sympy.Abs: torch.abs,
    sympy.Pow: torch.pow,
    Parity: torch.where,
}
Groups = tuple[tuple[Atom, ...], tuple[Atom, ...]]


def emit(form: Form, mates: list[Form], editor: Editor) -> fx.Node:
    """Replace the numerator and its normalisers by one `linear_attention` (two, if bidirectional).

    Returns:
        The node of the outputs.
    Raises:
        Refused: an operand is not at hand where the call must stand; nothing is edited then.
    """
    node = editor.node_of(form.terminal)
    others = [(m, editor.node_of(m.terminal)) for m in mates]
    first = _first([node, *(n for _, n in others)])
    try:
        q, k, v = (editor.operand(f, first) for f in (form.q, form.k, form.v) if f is not None)
        decays = Decays(form, editor, first)
    except Refused:
        if not mates:
            raise
        return emit(form, [], editor)  # v is made after the normaliser is used
    for f in form.rows:  # all lookups that may refuse come before the first edit
        editor.operand(f, node)
    for m, n in others:
        for f in m.rows:
            editor.operand(f, n)
    w = editor.writer(first)
    groups = form.groups
    dtype = form.dtype if form.dtype is not None and form.dtype.is_floating_point else form.terminal.dtype
    values = _values(w, editor, form, v, groups)
    width = w.shape(values)[-1]
    if mates:
        ones = w.call(torch.ones_like, w.call(torch.narrow, values, -1, 0, 1))
        values = w.call(torch.cat, [values, ones], -1)
    q4 = w.to(w.arrange(q, (*groups, (form.t,), form.features)), dtype)
    k4 = w.to(w.arrange(k, (*groups, (form.s,), form.features)), dtype)
    if form.polynomial is not None:
        q4, k4 = _powers(w, q4, form.polynomial), _powers(w, k4, tuple(bool(a) for a in form.polynomial))
    call = _run(w, form, decays, q4, k4, w.to(values, dtype))
    out = w.call(torch.narrow, call, -1, 0, width) if mates else call
    finished = [(form, node, out, 1.0)]
    for m, n in others:
        den = w.call(torch.narrow, call, -1, width, 1)
        finished.append((m, n, den, m.scale / form.scale))
    for done, n, x, factor in finished:
        _finish(done, n, x, factor, done.groups, editor)
    return call


def _powers(w: Writer, x: fx.Node, a: tuple[float, ...]) -> fx.Node:
    """[a_0, a_1 x, a_2 x (x) x] of x [..., K], without those whose a is 0."""
    parts = []
    for n, c in enumerate(a):
        if not c:
            continue
        if n == 0:
            p = w.call(torch.ones_like, w.call(torch.narrow, x, -1, 0, 1))
        elif n == 1:
            p = x
        else:
            square = w.call(torch.mul, w.call(torch.unsqueeze, x, -1), w.call(torch.unsqueeze, x, -2))
            p = w.call(torch.flatten, square, -2)
        parts.append(p if c == 1 else w.call(torch.mul, p, c))
    return parts[0] if len(parts) == 1 else w.call(torch.cat, parts, -1)


def _run(w: Writer, form: Form, decays: Decays, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """The sum over the sides of the op's outputs."""
    op = torch.ops.spcompile.linear_attention.default
    scale = float(form.scale)
    if not form.weights.sides:
        return w.call(operator.getitem, w.call(op, q, k, v, None, None, None, False, scale), 0)
    total: fx.Node | None = None
    for side in form.weights.sides:
        log = decays.log(w, side)
        q4, k4 = decays.times(w, q, side.rows), decays.times(w, k, side.columns)
        call = w.call(op, q4, k4, v, log, None, None, True, scale, side.exclusive, side.reverse)
        out = w.call(operator.getitem, call, 0)
        total = out if total is None else w.call(torch.add, total, out)
    assert total is not None
    return total


def _first(nodes: list[fx.Node]) -> fx.Node:
    order = {n: i for i, n in enumerate(nodes[0].graph.nodes)}
    return min(nodes, key=lambda n: order[n])


def _values(w: Writer, editor: Editor, form: Form, v: Operand, groups: Groups) -> fx.Node:
    """v as [B, H, S, V], times the factors per key."""
    out = w.arrange(v, (*groups, (form.s,), form.values))
    for c in form.columns:
        x = w.arrange(editor.operand(c, w.before), (*groups, (form.s,), ()), expand=False)
        out = w.call(torch.div if c.inverse else torch.mul, out, x)
    return out


def _finish(form: Form, node: fx.Node, x: fx.Node, factor: float, groups: Groups, editor: Editor) -> None:
    """Bring the op's output to the dims of what it replaces, times the factors per row, and replace it."""
    w = editor.writer(node)
    if factor != 1.0:
        x = w.call(torch.mul, x, factor)
    target = (*groups, (form.t,), form.values)
    for f in form.rows:
        r = w.arrange(editor.operand(f, node), target, expand=False)
        x = w.call(torch.div if f.inverse else torch.mul, x, r)
    x = w.scatter(x, target, form.out, form.terminal.shape)
    fresh = editor.written_later(node)
    editor.replace(node, w.like(x, node, fresh=fresh or x.target in (operator.getitem, torch.narrow)))


# ---------------------------------------------------------------- decays


class Decays:
    """Writes the expressions of a form's weights; all operands are looked up when it is made."""

    def __init__(self, form: Form, editor: Editor, before: fx.Node) -> None:
        self.form = form
        wide = form.dtype == torch.float64
        self.dtype = torch.float64 if wide else torch.float32
        self.operands: dict[AppliedUndef, tuple[Operand, int]] = {}
        for side in form.weights.sides:
            for e in (side.step, side.rows, side.columns):
                if not e.free_symbols <= set(form.table.named.values()):
                    raise Refused("its decay has a dim that it does not share")
                if any(x.func not in _FUNCTIONS for x in e.atoms(sympy.Function) - e.atoms(AppliedUndef)):
                    raise Refused("its decay has a function that is not followed")
                for x in e.atoms(AppliedUndef):
                    self.operands[x] = self._look_up(x, editor, before)
                if e.replace(lambda x: isinstance(x, (AppliedUndef, Parity)), lambda x: ONE).free_symbols:
                    raise Refused("its decay depends on positions in a way that is not followed")

    def _look_up(self, x: AppliedUndef, editor: Editor, before: fx.Node) -> tuple[Operand, int]:
        found = self.form.table.dims(x.args)
        source = self.form.table.reals.sources[x.func]
        if found is None or source.summed is not None:
            raise Refused("its decay is made of entries that are not followed")
        dims, ahead = found
        if abs(ahead) > 1 or source.value.shape != tuple(prod(a.size for a in d) for d in dims):
            raise Refused("its decay is made of a part of a tensor")
        return editor.operand(Factor(source.value, dims), before), ahead

    def log(self, w: Writer, side: Side) -> fx.Node | None:
        """The log decay as a tensor of four dims; None if there is none."""
        if side.step == ZERO:
            return None
        out = self.write(w, side.step)
        if not isinstance(out, fx.Node):
            return w.call(torch.full, (1, 1, 1, 1), out, dtype=self.dtype, device=w.device)
        return w.to(out, self.dtype)

    def times(self, w: Writer, x: fx.Node, factor: sympy.Expr) -> fx.Node:
        """x times a factor per token, in x's dtype."""
        if factor == ONE:
            return x
        return w.to(w.call(torch.mul, x, self.write(w, factor)), x.meta["example_value"].dtype)

    def write(self, w: Writer, e: sympy.Expr) -> fx.Node | float:
        """An expression, `[B or 1, H or 1, T or 1, 1]` or a number."""
        if e.is_Number:
            return float(e)
        if isinstance(e, AppliedUndef):
            return self._source(w, e)
        if isinstance(e, Parity):
            return self._parity(w, *e.args)
        args = [self.write(w, a) for a in e.args]
        if e.is_Add or e.is_Mul:
            fold: Callable[..., Any] = torch.add if e.is_Add else torch.mul
            out = args[0]
            for a in args[1:]:
                out = _apply(w, fold, out, a)
            return out
        return _apply(w, _FUNCTIONS[e.func], *args)

    def _parity(self, w: Writer, base: sympy.Expr, position: sympy.Symbol) -> fx.Node:
        size = (self.form.t if position == self.form.table.ctx.i else self.form.s).size
        odd = w.reshape(w.call(torch.arange, size, device=w.device), (1, 1, size, 1))
        odd = w.call(torch.eq, w.call(torch.remainder, odd, 2), 1)
        flip = w.call(torch.logical_and, w.call(torch.lt, self.write(w, base), 0), odd)
        one = w.number(1.0, self.dtype)
        return w.call(torch.where, flip, w.call(torch.neg, one), one)

    def _source(self, w: Writer, e: AppliedUndef) -> fx.Node:
        operand, ahead = self.operands[e]
        at = self.form.s if e.has(self.form.table.ctx.j) else self.form.t
        x = w.to(w.arrange(operand, (*self.form.groups, (at,), ()), expand=False), self.dtype)
        if not ahead:
            return x
        n = w.shape(x)[2]
        # The entry beyond the end is that of the last token: it meets an empty state.
        kept = w.call(torch.narrow, x, 2, max(ahead, 0), n - 1)
        end = w.call(torch.narrow, x, 2, n - 1 if ahead > 0 else 0, 1)
        return w.call(torch.cat, [kept, end] if ahead > 0 else [end, kept], 2)


def _apply(w: Writer, function: Callable[..., Any], *args: fx.Node | float) -> fx.Node | float:
    """`function` of nodes and numbers; the first argument of a torch function is a tensor."""
    if not any(isinstance(a, fx.Node) for a in args):
        return float(function(*(torch.tensor(a, dtype=torch.float64) for a in args)))
    if function in (torch.add, torch.mul) and not isinstance(args[0], fx.Node):
        args = args[::-1]
    return w.call(function, *args)

"""What the softmax and the linear recognizer share: privacy of what is replaced, tracing a dim to tokens."""

from __future__ import annotations

from collections.abc import Iterable

from spcompile.passes.recognize.algebra.dims import Atom, Dims, align, atoms_of, back_through_view, name_dims
from spcompile.passes.recognize.algebra.expand import product_of
from spcompile.passes.recognize.algebra.products import Factor, same_values
from spcompile.passes.recognize.edit import Refused
from spcompile.passes.shadow import Value


def check_private(interior: Iterable[Value], allowed: set[Value], what: str) -> None:
    """Refuse if something outside the attention reads what lies inside it."""
    for v in interior:
        if v.escapes or any(u.live and u not in allowed for u in v.users):
            raise Refused(f"its {what} are used elsewhere")


def check_one_place(path: Iterable[Value], terminal: Value) -> None:
    """Refuse pieces in different graphs (a checkpointed block is a graph of its own) or under different
    grad modes."""
    assert terminal.node is not None
    for v in path:
        if v.node is not None and v.node.graph is not terminal.node.graph:
            raise Refused("its pieces lie on both sides of a checkpoint boundary")
        if v.grad_mode != terminal.grad_mode:
            raise Refused("gradients are switched on or off inside it")


# ---------------------------------------------------------------- tokens


def tokens(value: Value, dims: Dims, atom: Atom) -> set[tuple[Value, int]]:
    """Every (Value that is not a parameter, dim) that `atom` of `value` comes from, itself included."""
    found: set[tuple[Value, int]] = set()
    todo = [(value, dims, atom)]
    while todo:
        v, ds, a = todo.pop()
        place = next((n for n, d in enumerate(ds) if a in atoms_of((d,))), None)
        if place is None or (v, place) in found or v.is_parameter:
            continue
        found.add((v, place))
        todo += [(o, od, a) for o, od in _sources(v, ds, place)]
    return found


_SAME_DIMS = {
    "softmax",
    "layer_norm",
    "rms_norm",
    "group_norm",
    "cumsum",
    "dropout",
    "log_softmax",
    "normalize",
    "roll",
}


def _sources(v: Value, dims: Dims, place: int) -> list[tuple[Value, Dims]]:
    """Operands that have v's dim `place`, and their dims."""
    if (source := same_values(v)) is not None:
        return [(source, dims)]
    if (back := back_through_view(v, dims)) is not None:
        return [back]
    if (product := product_of(v, dims)) is not None:
        return [(f.value, f.dims) for f in product.factors]
    if v.name == "embedding":
        return [(v.args["indices"], dims[:-1])] if place < len(dims) - 1 else []
    if v.name == "select":  # one entry of a dim: q, k or v of all three
        source, d = v.args["self"], v.args["dim"]
        return [(source, dims[:d] + name_dims(source.shape[d : d + 1]) + dims[d:])]
    if v.name == "getitem":  # of an operation with several results: dims that kept their length are the same
        whole = v.args["self"].args.get("self")
        same = isinstance(whole, Value) and len(whole.shape) == len(v.shape)
        return [(whole, _kept_dims(whole, v, dims))] if same and whole.shape[place] == v.shape[place] else []
    out = []
    for o in v.operands():
        if len(o.shape) == len(v.shape) and v.name in (
            "cat",
            "slice",
            "index_select",
            "constant_pad_nd",
            "pad",
        ):
            out.append((o, _kept_dims(o, v, dims)))
        elif v.name in _SAME_DIMS or _broadcasts(o.shape, v.shape):
            out.append((o, align(dims, o.shape) if len(o.shape) <= len(dims) else dims))
    return [(o, d) for o, d in out if len(d) == len(o.shape)]


def _kept_dims(source: Value, v: Value, dims: Dims) -> Dims:
    return tuple(
        d if s == n else name_dims((s,))[0] for d, s, n in zip(dims, source.shape, v.shape, strict=True)
    )


def _broadcasts(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    tail = large[len(large) - len(small) :]
    return len(small) <= len(large) and all(s in (1, n) for s, n in zip(small, tail, strict=True))


def same_tokens(a: Factor, b: Factor, atom: Atom) -> bool:
    """Whether `atom` is a dim that both come to from one activation, or from inputs that are not
    parameters."""
    ta, tb = tokens(a.value, a.dims, atom), tokens(b.value, b.dims, atom)
    if ta & tb:
        return True
    return all(any(v.name == "input" for v, _ in t) for t in (ta, tb))


def is_activation(v: Value, memo: dict[Value, bool]) -> bool:
    """Whether it depends on an input that is no parameter."""
    order = [v]
    while order:
        x = order[-1]
        if x in memo:
            order.pop()
        elif x.name == "input":
            memo[x] = not x.is_parameter
        else:
            todo = [o for o in x.operands() if o not in memo]
            if todo:
                order += todo
            else:
                memo[x] = any(memo[o] for o in x.operands())
    return memo[v]

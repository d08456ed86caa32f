"""Softmax attention, by dataflow: a contraction with values whose other operand is a softmax of scaled,
masked scores.

    logits = c (q . k) + biases, with entries filled where a mask says       out = softmax(logits over keys) v

`match` follows the probabilities back to the contraction of queries and keys, naming dims on the way, or
reads a call of `scaled_dot_product_attention`. `rewrite` proves what it can of the masks, and emits the op;
masks that are not proved stay data.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from spcompile.passes.recognize.algebra.dims import Atom, Dims, align, atoms_of, name_dims, resolve
from spcompile.passes.recognize.algebra.expand import product_of
from spcompile.passes.recognize.algebra.products import Factor, peel, scalar, scaled
from spcompile.passes.recognize.common import check_one_place, check_private
from spcompile.passes.recognize.edit import Editor, Operand, Refused, Writer
from spcompile.passes.recognize.proof.prover import Prover
from spcompile.passes.recognize.softmax.documents import Documents
from spcompile.passes.recognize.softmax.prefixes import Prefixes
from spcompile.passes.recognize.softmax.relative import emit_relative
from spcompile.passes.recognize.softmax.sinks import read_sink, without_maximum
from spcompile.passes.recognize.softmax.steps import (
    Found,
    Step,
    decide,
    emit_mask,
    emit_undefined,
    emit_uniform,
)
from spcompile.passes.shadow import Value

# ---------------------------------------------------------------- finding


def match(v: Value) -> Found | None:
    """Read `v` as the result of a softmax attention."""
    if v.name == "scaled_dot_product_attention":
        return _match_call(v)
    out = name_dims(v.shape)
    term = product_of(v, out)
    if term is None or len(term.factors) != 2 or len(resolve(term.summed)) != 1:
        return None
    for p, other in (term.factors, term.factors[::-1]):
        found = _match_probabilities(v, out, p, other, resolve(term.summed)[0])
        if found is not None:
            found.interior += [f.value for f in term.path]
            return found
    return None


def _match_probabilities(v: Value, out: Dims, p: Factor, values: Factor, keys: Atom) -> Found | None:
    at, dims, path = peel(p.value, p.dims)
    dropout = at.name == "dropout"
    if dropout:
        path.append(Factor(at, dims))
        at, dims, more = peel(at.args["input"], dims)
        path += more
    sink = read_sink(at, dims, keys)
    if keys not in values.atoms or (sink is None and at.name != "softmax"):
        return None
    if sink is not None:
        path += sink.path
        logits, at = sink.logits, sink.softmax
    else:
        logits, dim = at.args["self"], at.args["dim"]
        if resolve(dims[dim]) != resolve((keys,)):
            return None
        off = without_maximum(logits, dim)
        if off is not None:
            path += [Factor(x, ()) for x in (logits, *off[1])]
            logits = off[0]
    found = _match_logits(logits, dims)
    if found is None:
        return None
    product, steps, walked = found
    q, k = product.factors
    keys_now = resolve((keys,))
    if len(keys_now) != 1:
        return None
    if keys_now[0] in q.atoms:
        q, k = k, q
    if keys_now[0] in q.atoms or keys_now[0] not in k.atoms:
        return None
    interior = [f.value for f in path] + [at] + walked
    return Found(
        v,
        out,
        q,
        k,
        values,
        keys_now[0],
        resolve(product.summed),
        steps,
        walked[-1].dtype,
        interior,
        dropout=dropout,
        sinks=None if sink is None else sink.sinks,
    )


def _match_logits(v: Value, dims: Dims) -> tuple | None:
    """Back from the logits to the contraction of q and k: (its Term, the steps in order, the Values
    walked)."""
    v, dims, path = peel(v, dims)
    walked = [f.value for f in path] + [v]
    product = product_of(v, dims) if v.name != "sum" else None
    if product is not None:
        return (product, [], walked) if len(product.factors) == 2 else None
    for source, step in _steps_back(v, dims):
        deeper = _match_logits(source, dims)
        if deeper is not None:
            return deeper[0], [*deeper[1], step], walked + deeper[2]
    return None


def _steps_back(v: Value, dims: Dims) -> list[tuple[Value, Step]]:
    """The ways to read `v` as a step on scores: (the scores, the step)."""
    sc = scaled(v)
    if sc is not None:
        return [(sc[0], Step("scale", sc[1]))]
    a: Any = v.args.get("self")
    b = v.args.get("other")
    if v.name == "tanh":
        return [(a, Step("cap"))]
    if v.name == "where":
        m = v.args["condition"]
        fills = [(x, scalar(y), keep) for x, y, keep in ((a, b, True), (b, a, False))]
        return [
            (x, Step("fill", fill, m, align(dims, m.shape), keep))
            for x, fill, keep in fills
            if fill is not None and isinstance(x, Value) and x.shape == v.shape
        ]
    if v.name == "add" and isinstance(a, Value) and isinstance(b, Value):
        alpha = float(v.args.get("alpha", 1))
        ways = [(a, Step("bias", alpha, b, align(dims, b.shape)))]
        if alpha == 1:
            ways.append((b, Step("bias", 1.0, a, align(dims, a.shape))))
        return [(x, s) for x, s in ways if x.shape == v.shape]
    return []


def _match_call(v: Value) -> Found | None:
    """A call of scaled_dot_product_attention: its dims are what its documentation says."""
    q, k, val, mask = v.args["query"], v.args["key"], v.args["value"], v.args.get("attn_mask")
    if len(q.shape) < 2 or len(v.shape) != len(q.shape):
        return None
    out = name_dims(v.shape)
    keys, features = name_dims(k.shape[-2:-1])[0], name_dims(q.shape[-1:])[0]
    if len(keys) != 1:
        return None
    batch = out[:-2]
    kv_batch = batch
    if v.args.get("enable_gqa") and len(q.shape) >= 3 and batch[-1] and k.shape[-3] != q.shape[-3]:
        head = batch[-1][0]
        head.parts = (Atom(k.shape[-3]), Atom(q.shape[-3] // k.shape[-3]))
        kept = head.parts[:1] if k.shape[-3] != 1 else ()
        kv_batch = (*batch[:-1], kept)
        if k.shape[-3] != val.shape[-3]:
            return None
    scale = v.args.get("scale")
    steps = [Step("scale", 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale))]
    scores = (*batch, out[-2], keys)
    if isinstance(mask, Value):
        kind = "fill" if mask.dtype == torch.bool else "bias"
        steps.append(Step(kind, -math.inf if kind == "fill" else 1.0, mask, align(scores, mask.shape), True))

    def factor(x: Value, lead: Dims, *tail: tuple[Atom, ...]) -> Factor:
        return Factor(x, align(lead, x.shape[:-2]) + tail)

    fq = factor(q, batch, out[-2], features)
    fk, fv = factor(k, kv_batch, keys, features), factor(val, kv_batch, keys, out[-1])
    found = Found(v, out, fq, fk, fv, keys[0], features, steps, v.dtype)
    found.by_hand = False
    found.causal, found.dropout = bool(v.args.get("is_causal")), float(v.args.get("dropout_p", 0)) > 0
    return found


# ---------------------------------------------------------------- rewriting


@dataclass
class Roles:
    """Every atom's part: groups of the op's dims, outermost first."""

    b: tuple[Atom, ...]
    h: tuple[Atom, ...]
    shared: tuple[Atom, ...]
    """Atoms of the query heads that keys and values do not have."""
    t: Atom
    s: Atom
    k: tuple[Atom, ...]
    v: tuple[Atom, ...]

    def with_heads(self, dims: Dims) -> Roles:
        """Knowing what has heads and no batch: a batch of one is no dim; the first would be taken for it."""
        if not set(self.b) & set(resolve(atoms_of(dims))):
            return self
        return replace(self, b=(), h=self.b + self.h)


def assign(found: Found, q: Operand, k: Operand, v: Operand) -> Roles:
    """Decide each atom's role, or refuse."""
    aq, ak, av = (set(atoms_of(x.dims)) for x in (q, k, v))
    out = atoms_of(found.out)
    contracted = resolve(found.contracted)
    values = tuple(a for a in out if a in av and a not in aq and a not in ak)
    batch = [a for a in out if a in ak or (a in aq and a in av)]
    rows = [a for a in out if a not in values and a not in batch]
    keys = resolve((found.keys,))
    if len(keys) != 1 or not rows:
        raise Refused("its sequence has length one or is cut in spans")
    if (aq | ak) - set(contracted) - set(keys) - set(out) or av - set(keys) - set(out) or set(keys) & aq:
        raise Refused("its dims are not those of an attention")
    t = _row_atom(rows, keys[0], found.steps)
    shared = tuple(a for a in rows if a is not t) + tuple(a for a in batch if a not in ak and a not in av)
    batch = [a for a in batch if a in ak or a in av]
    return Roles(tuple(batch[:1]), tuple(batch[1:]), shared, t, keys[0], contracted, values)


def _row_atom(rows: Sequence[Atom], keys: Atom, steps: Sequence[Step]) -> Atom:
    """Of the dims that only queries have, the tokens: masked together with the keys, as long as them, or
    the last."""
    masked = [a for a in rows if any({a, keys} <= set(atoms_of(s.dims)) for s in steps)]
    same = [a for a in rows if a.size == keys.size]
    return (masked or same or list(rows))[-1]


def rewrite(found: Found, editor: Editor, prover: Prover) -> tuple[fx.Node, str]:
    """Put one `softmax_attention` in the place of what was found; its node and the name of its mask."""
    if found.dropout:
        raise Refused("its probabilities have dropout")
    if found.terminal.dtype is None or not found.terminal.dtype.is_floating_point:
        raise Refused("it is not real floating point")
    allowed = {found.terminal, *found.interior}
    check_private(found.interior, allowed, "probabilities or scores")
    check_one_place(found.interior, found.terminal)
    node = editor.node_of(found.terminal)
    q, k, v = (editor.operand(f, node) for f in (found.q, found.k, found.v))
    roles = assign(found, q, k, v)
    masking = decide(found, roles.t, prover, lambda v: editor.find(v, node) is not None)
    for dims in [x.dims for x in masking.relative] + ([] if found.sinks is None else [found.sinks.dims]):
        roles = roles.with_heads(dims)
    w = editor.writer(node)
    dtype = found.dtype if found.dtype is not None and found.dtype.is_floating_point else found.terminal.dtype
    heads = roles.h + roles.shared
    lean = not set(roles.shared) & (set(atoms_of(k.dims)) | set(atoms_of(v.dims)))
    kv_heads = roles.h if lean else heads
    rows, keys = (roles.t,), (roles.s,)
    mask = emit_mask(w, editor, masking.general, (roles.b, heads, rows, keys), dtype)
    more = [masking.band.window, masking.soft_cap, _sinks(found, heads, editor, w)]
    more.append(_of_tokens(masking.documents, roles, editor, w))
    more.append(emit_relative(masking.relative, heads, roles.t, roles.s, editor, w))
    more.append(_of_tokens(masking.prefixes, roles, editor, w))
    while more and more[-1] is None:
        more.pop()
    q4 = w.to(w.arrange(q, (roles.b, heads, rows, roles.k)), dtype)
    k4 = w.to(w.arrange(k, (roles.b, kv_heads, keys, roles.k)), dtype)
    v4 = w.to(w.arrange(v, (roles.b, kv_heads, keys, roles.v)), dtype)
    op = torch.ops.spcompile.softmax_attention.default
    call = w.call(op, q4, k4, v4, mask, masking.band.causal, float(masking.scale), *more)
    out = w.call(operator.getitem, call, 0)
    if masking.uniform:
        out = emit_uniform(w, out, w.call(operator.getitem, call, 1), v4)
    elif masking.undefined:
        out = emit_undefined(w, out, w.call(operator.getitem, call, 1), dtype)
    out = w.scatter(out, (roles.b, heads, rows, roles.v), found.out, found.terminal.shape)
    editor.replace(node, w.like(out, node, fresh=editor.written_later(node)))
    return call, masking.name


def _of_tokens(found: Documents | Prefixes | None, roles: Roles, editor: Editor, w: Writer) -> fx.Node | None:
    """The tokens' documents or prefixes, [B or 1, S]."""
    if found is None:
        return None
    operand = editor.operand(Factor(found.value, found.dims), w.before)
    if not set(atoms_of(operand.dims)) <= set(resolve((*roles.b, roles.s))):
        raise Refused("its documents or prefixes differ from head to head")
    ids = w.arrange(operand, (roles.b, (roles.s,)), expand=False)
    if isinstance(found, Prefixes) and found.value.dtype == torch.bool:  # 0 for one prefix, -1 for none
        flags = w.to(ids, torch.int64)
        return w.call(torch.sub, flags, 1) if found.keep else w.call(torch.neg, flags)
    return ids


def _sinks(found: Found, heads: tuple[Atom, ...], editor: Editor, w: Writer) -> fx.Node | None:
    """The sinks as one number per query head."""
    if found.sinks is None:
        return None
    operand = editor.operand(found.sinks, w.before)
    if not set(atoms_of(operand.dims)) <= set(resolve(heads)):
        raise Refused("its sinks are not one per head")
    return w.arrange(operand, (heads,))

"""What the steps on the scores come to: a scale, a mask that is proved, and masks that stay data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from spcompile.passes.recognize import masks
from spcompile.passes.recognize.dims import Atom, Dims
from spcompile.passes.recognize.edit import Editor, Refused, Writer
from spcompile.passes.recognize.products import Factor
from spcompile.passes.shadow import Value

NEVER = -1e9  # a filled score at or below this has weight zero in a row that keeps a key (see `_is_never`)


@dataclass
class Step:
    """What happens to the scores, in order from the raw ones outward."""

    kind: str
    """"scale", "bias" or "fill"."""
    number: float = 1.0
    """The factor; the bias's sign; the value that is filled in."""
    value: Value | None = None
    dims: Dims = ()
    keep: bool = False
    """Of a fill: whether the mask says where to keep (or where to fill)."""


@dataclass
class Found:
    """A softmax attention, before anything is decided about its dims."""

    terminal: Value
    out: Dims
    q: Factor
    k: Factor
    v: Factor
    keys: Atom
    contracted: tuple[Atom, ...]
    steps: list[Step]
    dtype: torch.dtype | None
    interior: list[Value] = field(default_factory=list)
    """Everything from the scores to the probabilities."""
    causal: bool = False
    dropout: bool = False
    by_hand: bool = True
    """Whether it is a softmax (a row that keeps no key is NaN) and not a library's attention (it is 0)."""


def _is_never(fill: float, dtype: torch.dtype | None) -> bool:
    """Whether a filled score has weight exactly zero beside a kept one.

    At -1e9 that needs every kept score above -1e9 + 750, in float64 the widest case: scores below that are
    not numbers that attention produces, and float32 has no precision left there. -10000 is not accepted.
    """
    least = torch.finfo(dtype).min if dtype is not None and dtype.is_floating_point else NEVER
    return fill <= NEVER or fill <= least


@dataclass
class Masking:
    """What the steps come to: a scale, a proved mask, and the steps that stay data."""

    scale: float
    causal: bool
    general: list[Step]
    uniform: bool = False
    """Whether a row that keeps no key is uniform over all keys, as a finite fill makes it, and not zero."""
    undefined: bool = False
    """Whether a row that keeps no key is NaN, as a softmax over nothing is."""

    @property
    def name(self) -> str:
        return (
            " and ".join([*(["causal"] if self.causal else []), *(["general"] if self.general else [])])
            or "all"
        )


def decide(found: Found, rows: Atom, prover: masks.Prover) -> Masking:
    """Prove the masks, and fold the scales."""
    scale, proved, general, all_infinite = 1.0, None, [], True
    for n, step in enumerate(found.steps):
        if step.kind == "scale":
            scale *= step.number
            continue
        after = math.prod(s.number for s in found.steps[n + 1 :] if s.kind == "scale")
        if after <= 0:
            raise Refused("its masked scores are multiplied by a number that is not positive")
        keep = _proved_keep(step, after, rows, found, prover)
        if step.kind == "fill" or keep is not None:
            all_infinite &= step.kind == "fill" and step.number == -math.inf
        if keep is None:
            general.append(
                Step(
                    step.kind,
                    step.number * (after if step.kind == "bias" or step.number > -math.inf else 1),
                    step.value,
                    step.dims,
                    step.keep,
                )
            )
        else:
            general.append(Step("proved", 1.0, step.value, step.dims))
            proved = keep if proved is None else masks.combine(lambda a, b: a and b, proved, keep)
    kind = "all" if proved is None else masks.kind_of(proved)
    data = [s for s in general if s.kind != "proved"]
    if kind == "all" or (kind == "causal" and (not data or all_infinite)):
        data, causal = (data, found.causal or kind == "causal")
    else:
        data, causal = _undo(found), found.causal
    whole = proved is not None and len(general) == len([s for s in general if s.kind == "proved"])
    keeps = whole and proved is not None and masks.keeps_every_row(proved, rows.size, found.keys.size)
    uniform = _uniform(data) and not keeps
    undefined = bool(data) and found.by_hand and not uniform and not keeps
    return Masking(scale, causal, data, uniform, undefined)


def _uniform(steps: list[Step]) -> bool:
    """Whether finite fills are left: a row that keeps no key then attends to all, and passes no gradient to
    scores.

    That is exact only if every entry of such a row gets the same number: one fill value, and nothing added
    after it.
    """
    fills = [n for n, s in enumerate(steps) if s.kind == "fill"]
    numbers = {steps[n].number for n in fills}
    if all(x == -math.inf for x in numbers):
        return False
    if (
        len(numbers) > 1
        or any(s.kind == "bias" for s in steps[fills[0] :])
        or not _is_never(max(numbers), None)
    ):
        raise Refused("a row may lose all its keys, to a fill that is not one finite number")
    return True


def _undo(found: Found) -> list[Step]:
    """Every mask as data, with the scales that follow it: what can't be proved stays general."""
    out = []
    for n, s in enumerate(found.steps):
        after = math.prod(x.number for x in found.steps[n + 1 :] if x.kind == "scale")
        if s.kind != "scale":
            out.append(Step(s.kind, s.number * after, s.value, s.dims, s.keep))
    return out


def _proved_keep(
    step: Step, after: float, rows: Atom, found: Found, prover: masks.Prover
) -> masks.Pieces | None:
    """Where the step keeps scores, as pieces of i - j, if it is proved to do nothing there and forbid the
    rest."""
    assert step.value is not None
    pieces = prover.pieces(step.value, step.dims, rows, found.keys)
    if pieces is None:
        return None
    if step.kind == "fill":
        if not _is_never(step.number * after, found.dtype):
            return None
        return masks.mapped(lambda x: bool(x) == step.keep, pieces)
    values = [float(p.value) * step.number * after for p in pieces]
    if any(x != 0 and not _is_never(x, found.dtype) for x in values):
        return None
    return masks.mapped(lambda x: float(x) == 0, pieces)


def emit_mask(
    w: Writer, editor: Editor, steps: Sequence[Step], groups: Sequence, dtype: torch.dtype
) -> tuple[fx.Node | None, fx.Node | None]:
    """What the steps do, as one node broadcastable to [B, H, T, S]; and the boolean part of it alone."""
    keep: fx.Node | None = None
    bias: fx.Node | None = None
    for s in steps:
        assert s.value is not None
        x = w.arrange(editor.operand(Factor(s.value, s.dims), w.before), groups, expand=False)
        if s.kind == "fill":
            x = w.to(x, torch.bool)
            x = x if s.keep else w.call(torch.logical_not, x)
            keep = x if keep is None else w.call(torch.logical_and, keep, x)
            continue
        if s.value.requires_grad:
            raise Refused("its bias needs a gradient")
        x = w.to(x, dtype)
        x = x if s.number == 1 else w.call(torch.mul, x, s.number)
        bias = x if bias is None else w.call(torch.add, bias, x)
    if bias is not None and keep is not None:
        return w.call(torch.where, keep, bias, w.number(-math.inf, dtype)), keep
    return (keep if bias is None else bias), keep


def emit_uniform(w: Writer, out: fx.Node, v: fx.Node, keep: fx.Node) -> fx.Node:
    """Rows that keep no key get the mean of all values."""
    some = w.call(torch.any, keep, -1, keepdim=True)
    mean = w.call(torch.mean, v, 2, keepdim=True)
    copies = w.shape(out)[1] // w.shape(v)[1]
    mean = mean if copies == 1 else w.call(torch.repeat_interleave, mean, copies, 1)
    return w.call(torch.where, some, out, mean)


def emit_undefined(w: Writer, out: fx.Node, lse: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Rows that keep no key are NaN, and so are their gradients: a product, unlike a choice, gives both."""
    empty = w.call(torch.eq, w.call(torch.unsqueeze, lse, -1), -math.inf)
    factor = w.call(torch.where, empty, w.number(math.nan, dtype), w.number(1.0, dtype))
    return w.call(torch.mul, out, factor)

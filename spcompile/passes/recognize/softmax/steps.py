"""What the steps on the scores come to: a scale, a mask that is proved, and masks that stay data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from spcompile.passes.recognize.algebra.dims import Atom, Dims, align, atoms_of
from spcompile.passes.recognize.algebra.products import Factor, peel, scalar
from spcompile.passes.recognize.edit import Editor, Refused, Writer
from spcompile.passes.recognize.proof import masks
from spcompile.passes.recognize.proof.constants import bounded
from spcompile.passes.recognize.proof.prover import Prover
from spcompile.passes.recognize.softmax.bands import Band, Split, band_of, split
from spcompile.passes.recognize.softmax.documents import Documents
from spcompile.passes.recognize.softmax.prefixes import Prefixes
from spcompile.passes.recognize.softmax.relative import Relative, read_relative
from spcompile.passes.shadow import Value

NEVER = -1e9  # a filled score at or below this has weight zero in a row that keeps a key (see `_is_never`)


@dataclass
class Step:
    """What happens to the scores, in order from the raw ones outward."""

    kind: str
    """"scale", "cap" (a tanh), "bias" or "fill"."""
    number: float = 1.0
    """The factor; the bias's sign; the value that is filled in."""
    value: Value | None = None
    dims: Dims = ()
    keep: bool = False
    """Of a fill: whether the mask says where to keep (or where to fill)."""
    of_keys: bool = False
    """Whether the mask or bias has keys, and no rows."""
    bounded: bool = False
    """Of a bias: whether it is known to hide nothing."""


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
    sinks: Factor | None = None
    """A logit of each row beside those of the keys, whose weight is dropped."""
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
    """What the steps come to: the scores' numbers, a proved band, and the steps that stay data."""

    scale: float
    soft_cap: float | None
    band: Band
    general: list[Step]
    sinks: bool = False
    uniform: bool = False
    """Whether a row that keeps no key is uniform over all keys, as a finite fill makes it, and not zero."""
    undefined: bool = False
    """Whether a row that keeps no key is NaN, as a softmax over nothing is."""
    documents: Documents | None = None
    relative: list[Relative] = field(default_factory=list)
    """Biases by head and distance."""
    prefixes: Prefixes | None = None

    @property
    def name(self) -> str:
        """For reports."""
        per_key = {"fill": "padding", "bias": "bias per key"}
        data = {per_key[s.kind] if s.of_keys else "general": None for s in self.general}
        band = f"{self.band.name} with prefixes" if self.prefixes else self.band.name
        structure = [band, "documents" if self.documents else ""]
        mask = " and ".join([*(name for name in structure if name), *data]) or "all"
        others = {
            "soft cap": self.soft_cap is not None,
            "relative bias": bool(self.relative),
            "sinks": self.sinks,
        }
        more = [name for name, there in others.items() if there]
        return ", ".join([mask, *more])


def decide(found: Found, rows: Atom, prover: Prover, held: Callable[[Value], bool]) -> Masking:
    """Prove the masks, and fold the scales.

    Args:
        held: whether a Value can be had where the operator will stand.
    """
    scale, soft_cap = _scores(found.steps)
    whole: masks.Spans = [masks.Span(1 - found.keys.size, rows.size - 1, True)]
    proved, data, numbers, documents = whole, list[Step](), list[float](), dict[Documents, None]()
    relative: list[Relative] = []
    hiding: list[Step] = []
    prefixes, narrower = list[Prefixes](), found.causal  # whether another band hides what they show
    for step, after, part in _masks(found, rows, prover, held):
        if isinstance(part, Relative):
            relative.append(part)
            continue
        if part is None:
            alone = step.kind == "bias" and rows not in atoms_of(step.dims)
            data.append(replace(_scaled(step, after), of_keys=alone))
            numbers += [data[-1].number] if step.kind == "fill" else []
        else:
            proved = masks.combine(lambda a, b: a and b, proved, part.spans)
            data += [Step("fill", part.hides, k.value, k.dims, k.keep, True) for k in part.keys]
            numbers.append(part.hides)
            documents |= {} if part.documents is None else {part.documents: None}
            prefixes += [] if part.prefixes is None else [part.prefixes]
            narrower |= part.prefixes is None and not all(p.value for p in part.spans)
        hiding += [] if step.bounded else [step]
    if documents:  # a row of which no more is known than that it may see itself
        sure = masks.combine(lambda a, b: a and b, proved, _itself(rows.size, found.keys.size))
    else:
        sure = proved
    # With a sink a row that keeps no key gives it all its weight, whatever stands for the hidden scores.
    keeps = found.sinks is not None or masks.keeps_every_row(sure, rows.size, found.keys.size)
    band = band_of(proved)
    structure = bool(documents) or (band is not None and bool(band.name))
    told = not structure or _told_apart(hiding, numbers, data)
    apart = len(documents) <= 1 and not (prefixes and (len(prefixes) > 1 or narrower))
    if band is None or not apart or not (told if _hides(data) else keeps):
        data, band = _undo(found), Band()
        documents.clear()
        relative.clear()
        prefixes.clear()
    band = Band(band.causal or found.causal, band.window)
    keeps = keeps and (not _hides(data) or found.sinks is not None)
    uniform = _uniform(data) and not keeps
    undefined = _hides(data) and found.by_hand and not uniform and not keeps
    ids, own = next(iter(documents), None), next(iter(prefixes), None)
    told_of = data, found.sinks is not None, uniform, undefined, ids, relative, own
    return Masking(scale, soft_cap, band, *told_of)


def _hides(data: Sequence[Step]) -> bool:
    return any(not s.bounded for s in data)


def _masks(
    found: Found, rows: Atom, prover: Prover, held: Callable[[Value], bool]
) -> Iterator[tuple[Step, float, _Part | Relative | None]]:
    """What is added to or filled into the scores, the factor behind it, and what it is proved to be.

    A bias that is a sum of what is structure and of numbers that hide nothing is these, one by one.
    """
    for n, step in enumerate(found.steps):
        if step.kind not in ("bias", "fill"):
            continue
        after = _after(found.steps, n)
        if after <= 0:
            raise Refused("its masked scores are multiplied by a number that is not positive")
        whole = _structure(step, after, rows, found, prover, held)
        terms = [_known(t) for t in _terms(step, found.dtype)]
        if whole is None and len(terms) > 1:
            proved = [_structure(t, after, rows, found, prover, held) for t in terms]
            free = [t.bounded and t.value is not None and held(t.value) for t in terms]
            if any(proved) and all(p or f for p, f in zip(proved, free, strict=True)):
                yield from ((t, after, p) for t, p in zip(terms, proved, strict=True))
                continue
        yield _known(step), after, whole


def _structure(
    step: Step, after: float, rows: Atom, found: Found, prover: Prover, held: Callable[[Value], bool]
) -> _Part | Relative | None:
    """What a mask or a bias is proved to be; None: it is data."""
    part = _proved_part(step, after, rows, found, prover, held)
    if part is not None or step.kind != "bias":
        return part
    assert step.value is not None
    return read_relative(step.value, step.dims, step.number * after, rows, found.keys, held)


def _known(step: Step) -> Step:
    """With what is known of a bias's numbers."""
    return replace(step, bounded=step.kind == "bias" and bounded(step.value))


def _terms(step: Step, dtype: torch.dtype | None) -> list[Step]:
    """The terms of a bias that is a sum, or that is there where a mask says and hides what is elsewhere."""
    v = step.value
    if step.kind != "bias" or v is None:
        return [step]
    v, dims, _ = peel(v, step.dims)

    def terms(x: Value, by: float = 1.0) -> list[Step]:
        part = replace(step, number=step.number * by, value=x, dims=align(dims, x.shape))
        return _terms(part, dtype)

    if v.name == "add":
        a, b, alpha = v.args["self"], v.args["other"], v.args.get("alpha", 1)
        return [*terms(a), *terms(b, alpha)] if isinstance(b, Value) and alpha > 0 else [step]
    if v.name == "where":
        mask = v.args["condition"]
        for name, other, keep in (("self", "other", True), ("other", "self", False)):
            x, fill = v.args[name], scalar(v.args[other])
            if isinstance(x, Value) and fill is not None and _is_never(fill * step.number, dtype):
                hides = Step("fill", fill * step.number, mask, align(dims, mask.shape), keep)
                return [*terms(x), hides]
    return [step]


def _itself(rows: int, keys: int) -> masks.Spans:
    """A row sees the key at its own place."""
    spans = [masks.Span(1 - keys, -1, False), masks.Span(0, 0, True), masks.Span(1, rows - 1, False)]
    return [p for p in spans if p.lo <= p.hi]


def _after(steps: Sequence[Step], n: int) -> float:
    """What step ``n`` is multiplied by afterwards."""
    return math.prod(s.number for s in steps[n + 1 :] if s.kind == "scale")


def _scores(steps: Sequence[Step]) -> tuple[float, float | None]:
    """The scale and the soft cap: c tanh(s q k) is cap * tanh(scale q k / cap), cap = |c|, scale = s c."""
    caps = [n for n, s in enumerate(steps) if s.kind == "cap"]
    if not caps:
        return _after(steps, -1), None
    if len(caps) > 1 or any(s.kind != "scale" for s in steps[: caps[0]]):
        raise Refused("something other than a scale stands before the tanh of its scores")
    cap = _after(steps, caps[0])
    if cap == 0:
        raise Refused("its scores are multiplied by zero")
    inner = math.prod(s.number for s in steps[: caps[0]])
    return inner * cap, abs(cap)


def _scaled(step: Step, after: float) -> Step:
    """A mask that stays data, with the scales that follow it."""
    number = step.number * (after if step.kind == "bias" or step.number > -math.inf else 1)
    return replace(step, number=number)


def _told_apart(hiding: Sequence[Step], numbers: Sequence[float], data: Sequence[Step]) -> bool:
    """Whether structure may be taken off the data: whether it is known what becomes of a row without a key.

    It is where all that is hidden is -inf, or one finite fill. Two masks that are added are not: twice a huge
    negative number is another number, or -inf.
    """
    if all(x == -math.inf for x in numbers):
        return True
    alike = len(hiding) == 1 or all(s.kind == "fill" for s in hiding)
    apart = all(s.bounded or (s.kind == "fill" and s.of_keys) for s in data)
    return alike and len(set(numbers)) == 1 and apart


def _uniform(steps: list[Step]) -> bool:
    """Whether finite fills are left: a row that keeps no key then attends to all, and passes no gradient to
    scores.

    That is exact only if every entry of such a row gets the same number: one fill value, and nothing added
    after it; and if what is added before it makes no score as low as the fill.
    """
    fills = [n for n, s in enumerate(steps) if s.kind == "fill"]
    numbers = {steps[n].number for n in fills}
    if all(x == -math.inf for x in numbers):
        return False
    hides = any(s.kind == "bias" and not s.bounded for s in steps)
    if (
        len(numbers) > 1
        or hides
        or any(s.kind == "bias" for s in steps[fills[0] :])
        or not _is_never(max(numbers), None)
    ):
        raise Refused("a row may lose all its keys, to a fill that is not one finite number")
    return True


def _undo(found: Found) -> list[Step]:
    """Every mask as data, with the scales that follow it: what can't be proved stays general."""
    steps = enumerate(found.steps)
    return [_scaled(_known(s), _after(found.steps, n)) for n, s in steps if s.kind in ("bias", "fill")]


@dataclass
class _Part(Split):
    """A step that is proved to do nothing where it keeps scores, and to forbid the rest."""

    hides: float = -math.inf
    """What a hidden score becomes."""


def _proved_part(
    step: Step,
    after: float,
    rows: Atom,
    found: Found,
    prover: Prover,
    held: Callable[[Value], bool],
) -> _Part | None:
    assert step.value is not None
    hidden: list[float] = []

    def fill(x: Any) -> bool | None:
        return bool(x) == step.keep

    def bias(x: Any) -> bool | None:
        number = float(x) * step.number * after
        if number == 0:
            return True
        hidden.append(number)
        return False if _is_never(number, found.dtype) else None

    if step.kind == "fill":
        if not _is_never(step.number * after, found.dtype):
            return None
        hidden.append(step.number * after)
    does = fill if step.kind == "fill" else bias
    spans = prover.spans(step.value, step.dims, rows, found.keys)
    if spans is not None:
        if any(does(p.value) is None for p in spans):
            return None
        return _Part(masks.mapped(does, spans), [], hides=max(hidden, default=-math.inf))
    parts = split(step.value, step.dims, rows, found.keys, does, held)
    if parts is None:
        return None
    if parts.keys and step.kind == "bias" and found.sinks is None:
        # A row that keeps no key weighs all alike, but unlike after a fill its scores have a gradient.
        return None
    hides = max(hidden, default=-math.inf)
    return _Part(parts.spans, parts.keys, parts.documents, parts.prefixes, hides)


def emit_mask(
    w: Writer, editor: Editor, steps: Sequence[Step], groups: Sequence, dtype: torch.dtype
) -> fx.Node | None:
    """What the steps do, as one node broadcastable to [B, H, T, S]."""
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
        return w.call(torch.where, keep, bias, w.number(-math.inf, dtype))
    return keep if bias is None else bias


def emit_uniform(w: Writer, out: fx.Node, lse: fx.Node, v: fx.Node) -> fx.Node:
    """Rows that keep no key get the mean of all values."""
    some = w.call(torch.ne, w.call(torch.unsqueeze, lse, -1), -math.inf)
    mean = w.call(torch.mean, v, 2, keepdim=True)
    copies = w.shape(out)[1] // w.shape(v)[1]
    mean = mean if copies == 1 else w.call(torch.repeat_interleave, mean, copies, 1)
    return w.call(torch.where, some, out, mean)


def emit_undefined(w: Writer, out: fx.Node, lse: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Rows that keep no key are NaN, and so are their gradients: a product, unlike a choice, gives both."""
    empty = w.call(torch.eq, w.call(torch.unsqueeze, lse, -1), -math.inf)
    factor = w.call(torch.where, empty, w.number(math.nan, dtype), w.number(1.0, dtype))
    return w.call(torch.mul, out, factor)

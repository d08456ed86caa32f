"""A report as tables that fit 120 columns."""

from __future__ import annotations

import html
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from spcompile.reports import budget
from spcompile.reports.traffic import Collective
from spcompile.source import source_of

if TYPE_CHECKING:
    from spcompile.reports.report import Report

__all__ = ["human", "render", "render_html"]

WIDTH = 118


def render(report: Report) -> str:
    """The whole report."""
    return "\n\n".join(_parts(report))


def render_html(report: Report) -> str:
    """The whole report for a notebook."""
    return "\n".join(
        part.html if isinstance(part, _Table) else f"<pre>{html.escape(part)}</pre>"
        for part in _parts(report)
    )


def _parts(report: Report) -> list[str]:
    parts = [_header(report), _sites(report), _refused(report), _kernels(report)]
    parts += [*_collectives(report), _ways(report), _gathers(report)]
    parts += [_memory(report), _fits(report), _largest(report), _choices(report), _passes(report)]
    return [part for part in parts if part]


def human(size: float) -> str:
    """A number of bytes for people: 16384 -> "16 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.3g} TiB" if size < 1000 else f"{size:,.0f} TiB"


class _Table(str):
    """A table as text, and as HTML too."""

    html: str


def _table(
    title: str, headers: Sequence[str], rows: Iterable[Sequence[Any]], right: str = "", note: str = ""
) -> _Table:
    """One titled table; ``right`` names the columns to align right."""
    rows = list(rows)
    align = ["right" if h in right.split("|") else "left" for h in headers]
    plain, marked = (
        tabulate(rows, headers=headers, tablefmt=kind, colalign=align, disable_numparse=True)
        for kind in ("simple", "html")
    )
    body = "\n".join(line.rstrip() for line in plain.splitlines())
    table = _Table("\n".join(filter(None, [title, body, textwrap.fill(note, WIDTH)])))
    below = f"<p>{html.escape(note)}</p>" if note else ""
    table.html = f"<p><b>{html.escape(title)}</b></p>{marked}{below}"
    return table


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _header(report: Report) -> str:
    lines = [f"spcompile: {report.name or 'the graphs compiled last'} on {_number(report.ranks, 'rank')}"]
    for length, block in dict.fromkeys(r.sequence for r in report.records if r.sequence):
        padding = report.ranks * block - length
        padded = f"{_number(padding, 'position')} of padding" if padding else "no padding"
        lines.append(f"sequence: {length:,} tokens, {block:,} per rank, {padded}")
    if report.ranks > 1 and not any(r.sequence for r in report.records):
        lines.append("sequence: none found, so nothing is sharded; the option sequence_dims names it")
    calls = sum(report.calls) if report.calls else len(report.records)
    lines.append(
        f"graphs: {len(report.records)}" + (f", {calls} calls" if calls != len(report.records) else "")
    )
    cached = sum(not r.sharded for r in report.records)
    if cached:
        lines.append(f"served by Inductor's cache, so nothing is known of them: {_number(cached, 'graph')}")
    for reason, times in report.breaks.items():
        first = (reason.strip().splitlines() or [""])[0]
        lines.append(_cut(f"graph break{f' (x{times})' if times > 1 else ''}: {first}", WIDTH))
    return "\n".join(lines)


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _sites(report: Report) -> str:
    counts = Counter(
        (s.kind, s.mask, r.strategies.get(s.kind, ""), s.source)
        for r in report.records
        for s in r.sites
        if s.rewritten
    )
    if not counts:
        return "attention: none was recognized"
    rows = [(n, kind, mask, how, _cut(source, 64)) for (kind, mask, how, source), n in counts.items()]
    return _table("attention found", ("count", "kind", "mask", "strategy", "source"), rows, "count")


def _refused(report: Report) -> str:
    counts = Counter((s.kind, s.reason, s.source) for s in report.sites if not s.rewritten)
    if not counts:
        return ""
    rows = [(n, kind, _cut(why, 50), _cut(source, 52)) for (kind, why, source), n in counts.items()]
    return _table("seen and not rewritten", ("count", "kind", "why", "source"), rows, "count")


def _ways(report: Report) -> str:
    if report.ranks == 1 or not report.ways:
        return ""
    rows = [
        (
            way.count,
            way.kind,
            way.taken,
            ", ".join(f"{name} {seconds * 1e3:.3g}" for name, seconds in way.seconds.items()),
        )
        for way in report.ways
    ]
    note = "Not measured: latency, bandwidth and rate are round numbers for the device (spcompile.costs)."
    heads = ("count", "kind", "taken", "ms in a step of one, by each way")
    return _table("ways across the ranks", heads, rows, "count", note)


def _kernels(report: Report) -> str:
    if not report.kernels:
        return ""
    rows = [(n, *what) for what, n in report.kernels.items()]
    return _table("kernels", ("count", "kind", "kernel", "why no fused one"), rows, "count")


def _collectives(report: Report) -> list[str]:
    if report.ranks == 1:
        return []
    found = report.collectives
    if not found:
        return ["collectives: none"]
    shared: dict[str, set[int]] = {}
    for c in found:
        for name, value in c.values.items():
            shared.setdefault(name, set()).add(value)
    letters = {name: values.pop() for name, values in shared.items() if len(values) == 1 and name in _LEGEND}
    legend = ", ".join(
        f"{name} = {letters[name]:,} ({what})" for name, what in _LEGEND.items() if name in letters
    )
    last = found[-1].phase
    return [
        _phase(phase, [c for c in found if c.phase == phase], letters, legend if phase == last else "")
        for phase in ("forward", "backward")
    ]


def _phase(phase: str, found: list[Collective], letters: dict[str, int], legend: str) -> str:
    if not found:
        return ""
    buckets = [c for c in found if c.purpose.startswith("gradients (")]
    rows = [
        _collective(c, letters) for c in _grouped(c for c in found if c not in buckets or len(buckets) == 1)
    ]
    if len(buckets) > 1:
        rows.append(_merged(buckets))
    total = human(sum(c.count * c.bytes for c in found))
    rows.append(("all", sum(c.count for c in found), "", "", total, "", ""))
    headers = ("collective", "count", "what for", "each", "total", "formula", "with T")
    return _table(f"{phase} collectives, bytes received by a rank", headers, rows, "count|each|total", legend)


def _collective(c: Collective, letters: dict[str, int]) -> tuple[Any, ...]:
    # A letter that means the same in all rows is told below; of others the number stands in the formula.
    formula = "".join(str(c.values[x]) if x in c.values and x not in letters else x for x in c.formula)
    total = human(c.count * c.bytes)
    return (c.op, c.count, _cut(c.purpose, 38), human(c.bytes), total, formula, _GROWS[c.grows])


_GROWS = {True: "grows", False: "same", None: "?"}


def _grouped(found: Iterable[Collective]) -> list[Collective]:
    """Rows that differ in the user's line alone, which the table does not tell, as one."""
    groups: dict[Any, list[Collective]] = {}
    for c in found:
        groups.setdefault((c.op, c.purpose, c.bytes, c.formula, *c.values.items(), c.grows), []).append(c)
    return [replace(same[0], count=sum(c.count for c in same)) for same in groups.values()]


def _merged(buckets: list[Collective]) -> tuple[Any, ...]:
    """Buckets of gradients, of many sizes, as one row."""
    count, total = sum(c.count for c in buckets), sum(c.count * c.bytes for c in buckets)
    (grows,) = {c.grows for c in buckets} if len({c.grows for c in buckets}) == 1 else {None}
    elements: dict[int, int] = {}
    for c in buckets:
        if c.formula:
            elements[c.values["w"]] = elements.get(c.values["w"], 0) + c.count * c.values["N"]
    size = " + ".join(f"{n} {w}" for w, n in elements.items())
    formula = (
        f"2 (P-1)/P {size if len(elements) == 1 else f'({size})'}" if all(c.formula for c in buckets) else ""
    )
    return ("all_reduce", count, "gradients in buckets", "", human(total), formula, _GROWS[grows])


_LEGEND = {
    "P": "ranks",
    "b": "tokens per rank",
    "T": "tokens",
    "B": "batch",
    "H": "heads",
    "G": "key heads",
    "K": "key size",
    "V": "value size",
}


def _gathers(report: Report) -> str:
    counts = Counter((g.op, g.reason, g.bytes, g.source) for g in report.gathers)
    if not counts:
        return ""
    rows = [(n, op, why, human(size), _cut(source, 48)) for (op, why, size, source), n in counts.items()]
    headers = ("count", "operator", "why", "bytes", "source")
    return _table("gathered and computed whole on every rank", headers, rows, "count|bytes")


def _memory(report: Report) -> str:
    here, alone = report.memory, report.alone
    if here is None or alone is None:
        return ""
    rows: list[tuple[str, int, int]] = []
    if report.parameters:
        rows.append(("parameters and buffers (on every rank)", report.parameters, report.parameters))
    trains = here.saved or here.backward
    if trains and report.trained:
        rows.append(("their gradients", report.trained, report.trained))
        state = report.trained * budget.OPTIMIZERS[report.optimizer]
        if state:
            rows.append((f"optimizer state ({report.optimizer})", state, state))
    if report.inputs:
        rows.append(("inputs (on every rank)", report.inputs, report.inputs))
    if trains:
        rows.append(("activations saved for the backward", alone.saved, here.saved))
    rows.append(("peak of the forward" if trains else "peak", alone.forward, here.forward))
    if trains:
        rows.append(("peak of the backward", alone.backward, here.backward))
    rows.append(("total", budget.total(report, alone), budget.total(report, here)))
    table: list[Sequence[str]] = [
        (what, human(one), human(each), _ratio(one, each)) for what, one, each in rows
    ]
    note = (
        "Peaks are of activations alive at once, saved ones too, each operator's result counted: a bound "
        "from above, before Inductor's fusion. The total has the higher peak."
    )
    headers: Sequence[str] = ("memory", "1 rank", f"each of {report.ranks} ranks", "ratio")
    if report.ranks == 1:
        headers, table = headers[:2], [row[:2] for row in table]
    return _table("memory per rank", headers, table, "|".join(headers[1:]), note)


def _fits(report: Report) -> str:
    """Whether a rank's device has room, and on how few ranks each would."""
    limit, needed = report.device_memory, report.total
    if limit is None or needed is None:
        return ""
    room = f"{human(limit - needed)} to spare" if needed <= limit else f"{human(needed - limit)} too much"
    text = f"device memory {human(limit)}: {'fits' if needed <= limit else 'does not fit'}, {room}; "
    fewest = budget.fewest_ranks(report, limit)
    if fewest is None:
        return text + "no number of ranks does, because of what each rank holds whole"
    return text + f"the fewest ranks that do: {fewest:,}"


def _largest(report: Report) -> str:
    """The five largest tensors alive at the peak, equal ones in one row."""
    counts = Counter(report.largest)
    rows = [
        (
            n,
            human(x.bytes),
            _cut(f"{x.dtype}{list(x.shape)}", 32),
            _cut(x.op, 26),
            _cut(source_of(x.stack), 38),
        )
        for x, n in sorted(counts.items(), key=lambda item: -item[0].bytes)[:5]
    ]
    headers = ("count", "each", "tensor", "operator", "source")
    return _table("largest tensors at the peak of a rank", headers, rows, "count|each") if rows else ""


def _choices(report: Report) -> str:
    rows = budget.choices(report)
    return _table("what could be otherwise", ("now", "costs", "instead"), rows) if rows else ""


def _ratio(one: int, each: int) -> str:
    return f"{one / each:.1f}x" if each else ""


def _passes(report: Report) -> str:
    parts = [f"{name} {seconds:.2f} s" for name, seconds in report.pass_seconds.items()]
    if report.seconds:
        parts.append(f"{report.seconds:.2f} s in all")
    return f"time of the passes: {', '.join(parts)}" if parts else ""

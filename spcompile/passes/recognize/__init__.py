"""Find attention in Dynamo's graph and put one of our ops in its place.

Recognition is only speed: whatever is in doubt is left as it is, with a `Site` that says why. The graph is
analysed on its shadow (`passes/shadow/`) and edited itself.
"""

from __future__ import annotations

from torch import fx

import spcompile.attention  # noqa: F401  (registers the ops that are emitted)
from spcompile.errors import SpcompileError
from spcompile.passes.recognize import linear, loops, softmax
from spcompile.passes.recognize.edit import Editor, Refused
from spcompile.passes.recognize.proof.prover import Prover
from spcompile.passes.recognize.safety import Snapshot, failed
from spcompile.passes.recognize.softmax.steps import Found
from spcompile.passes.shadow import Shadow, trace
from spcompile.passes.shadow.values import values_in
from spcompile.passes.sites import Site
from spcompile.source import source_of

__all__ = ["Site", "recognize"]


def recognize(gm: fx.GraphModule, *, enabled: bool = True) -> list[Site]:
    """Rewrite the attention in Dynamo's `gm`, and in graphs nested in it, in place.

    Args:
        gm: Dynamo's forward graph; placeholders carry `example_value`.
        enabled: False leaves the graph alone (and returns no sites).
    Returns:
        One Site for every attention that was seen, rewritten or not, in order of execution. If recognition
        fails the graph is as it was, and one Site tells why.
    """
    if not enabled:
        return []
    before = Snapshot(gm)
    try:
        return _recognize(gm)
    except SpcompileError:
        raise
    except Exception as why:  # only speed is lost, and the report says so
        before.restore()
        return [failed(why)]


def _recognize(gm: fx.GraphModule) -> list[Site]:
    shadow, sites = _reroll(gm)
    if shadow is None:
        return []
    editor, prover = Editor(shadow), Prover()
    sites += _softmax(shadow, editor, prover)
    sites += linear.recognize(shadow, editor, prover)
    _clean(shadow, editor)
    return [site for _, site in sorted(sites, key=lambda s: s[0])]


def _reroll(gm: fx.GraphModule) -> tuple[Shadow | None, list[tuple[int, Site]]]:
    """Re-roll loops, an inner one before the loop around it; the shadow of what is left."""
    found: list[tuple[int, Site]] = []
    size = None
    while (shadow := trace(gm)) is not None:
        if size is not None and len(shadow.values) >= size:
            return shadow, found  # what was written is no smaller than what it replaced: it ends here
        size = len(shadow.values)
        sites = loops.recognize(shadow, Editor(shadow))
        if not any(site.rewritten for _, site in sites):
            return shadow, found + sites
        found += [s for s in sites if s[1].rewritten]
        _compile(shadow)
    return None, []


def _softmax(shadow: Shadow, editor: Editor, prover: Prover) -> list[tuple[int, Site]]:
    sites = []
    for v in [v for v in shadow.values if v.live and v.node is not None]:
        found = softmax.match(v)
        if found is not None:
            sites.append((v.time, _rewrite(found, editor, prover)))
    return sites


def _rewrite(found: Found, editor: Editor, prover: Prover) -> Site:
    node = found.terminal.node
    assert node is not None
    source, name = source_of(node), node.name
    try:
        call, mask = softmax.rewrite(found, editor, prover)
    except Refused as why:
        return Site("softmax", "unknown", False, str(why), source, name)
    return Site("softmax", mask, True, "", source, call.name)


def _clean(shadow: Shadow, editor: Editor) -> None:
    """Drop what the new ops made dead, and recompile the graphs."""
    for scope in shadow.scopes:
        nodes = [n for n in scope.graph.nodes if n in shadow.records]
        results = {n: shadow.records[n].result for n in nodes}
        editor.erase([n for n in nodes if any(v.live for v in values_in([results[n]]))])
    _compile(shadow)


def _compile(shadow: Shadow) -> None:
    for scope in shadow.scopes:
        scope.graph.lint()
        scope.recompile()

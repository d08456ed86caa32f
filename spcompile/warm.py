"""A second start is warm: what compiling a graph told is kept beside Inductor's caches, and told again.

Our passes do not run where the caches serve a graph; without this, nobody would hear of its gathers.

NOTE [Which entry was served] The caches do not say under which key they found what they serve. But Inductor
keeps with each graph how far its counters went up while that graph was compiled, and counts them up again
when it serves it. So what was told is kept under a digest of itself, and the hook that runs inside Inductor
counts a name that holds the digest. An entry and what it told cannot be mixed up; if what it told is not
there any more (or a version of PyTorch counts otherwise), the graph is compiled anew, without the caches.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import fx

from spcompile import _torch
from spcompile.reports.report import Record
from spcompile.source import source_of

__all__ = ["Told", "remember", "remembered"]

MARK = "spcompile told"

NO_CACHES: dict[str, Any] = {"fx_graph_cache": False, "fx_graph_remote_cache": False}
"""Inductor's options to compile anew; AOTAutograd's cache is off with Inductor's.

Under `force_disable_caches` what is remembered meanwhile would go to a folder that is gone afterwards.
"""


# ---- a small store


def _file(key: str) -> Path:
    name = hashlib.sha256(key.encode()).hexdigest()
    return Path(_torch.cache_dir(), "spcompile", name[:2], name)


def remembered(key: str) -> dict[str, Any] | None:
    """What an earlier process, or this one, kept under ``key``; None if there is nothing that can be read."""
    try:
        kept = pickle.loads(_file(key).read_bytes())
    except Exception:  # a file that is not there, cut short, or of classes that are no more: as if not there
        return None
    return kept["value"] if isinstance(kept, dict) and kept.get("key") == key else None


def remember(key: str, value: Mapping[str, Any]) -> None:
    """Keep ``value`` under ``key`` for later processes, beside Inductor's caches (TORCHINDUCTOR_CACHE_DIR).

    The ranks of a machine, and processes side by side, may keep the same: a file is there whole or not at
    all. Where the folder cannot be written nothing is kept.

    Args:
        key: names all that the value depends on.
        value: can be pickled.
    """
    file, content = _file(key), pickle.dumps({"key": key, "value": dict(value)})
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        os.replace(temporary, file)


# ---- what a graph told


class Lines:
    """The user's lines, by the node of Dynamo's graph that comes from there.

    The caches serve a graph to a source file whose lines have moved; what is kept is the number of a node,
    and what is told is that node's line today.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        nodes = [n for m in gm.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes]
        self.texts = [n.meta.get("stack_trace") or "" for n in nodes] + [source_of(n) for n in nodes]
        self.numbers = {text: number for number, text in reversed(list(enumerate(self.texts)))}

    def number(self, text: str) -> int | str:
        """What stands for a line in a file; the line itself if no node has it."""
        return self.numbers.get(text, text)

    def text(self, number: int | str) -> str:
        """The line of :meth:`number`."""
        return number if isinstance(number, str) else self.texts[number]


class Told:
    """What the passes tell of one graph, in this process or in the one that filled the caches.

    Args:
        record: what is told goes into it.
        gm: Dynamo's graph, as it goes to the compiler.
        version: changes when what is kept is written or read otherwise.
    """

    def __init__(self, record: Record, gm: fx.GraphModule, version: str) -> None:
        self.record, self.lines, self.version = record, Lines(gm), version
        self.joint = ""
        """The digest of what the joint graph told; part of the hooks' uuid, so that graphs which are alike
        only after the partitioner are kept apart."""
        self.phases: set[str] = set()
        record.catch_up = self._catch_up

    def compile(self, compiler: Callable[[dict[str, Any]], Any]) -> Any:
        """Run a compiler, which takes patches of Inductor's configuration.

        See NOTE [Which entry was served].
        """
        before = _counted()
        compiled = compiler({})
        if not self.record.sharded and not self._retell(_counted() - before):
            compiled = compiler(NO_CACHES)
        self._catch_up()
        return compiled

    # ---- telling

    def saw_joint(self, graph: fx.Graph, sharded: Any) -> None:
        """A joint graph was sharded (``spcompile.passes.shard.Sharded``)."""
        self.record.saw_joint(graph, sharded)
        number = self.lines.number
        gathers = [(g._replace(source=""), number(g.source)) for g in self.record.gathers]
        record = self.record
        told: dict[str, Any] = {"gathers": gathers, "sequence": record.sequence}
        told |= {"lent": record.lent, "kernels": record.kernels, "sizes": record.sizes}
        self.joint = self._keep(told | self._transfers(None))

    def saw_final(self, graph: fx.Graph) -> None:
        """Inductor's own passes have run on the forward, or later the backward, graph."""
        phase = self.record.saw_final(graph)
        self.phases.add(phase)
        kept = self._keep(self._transfers(phase))
        _torch.counters["inductor"][f"{MARK} {self.joint} {phase} {kept}"] += 1

    def _transfers(self, phase: str | None) -> dict[str, Any]:
        found = [t for t in self.record.transfers if phase in (None, t.phase)]
        return {"transfers": [(t._replace(stack=""), self.lines.number(t.stack)) for t in found]}

    def _keep(self, told: dict[str, Any]) -> str:
        digest = hashlib.sha256(repr((self.version, told)).encode()).hexdigest()
        remember(digest, told)
        return digest

    # ---- telling again

    def _retell(self, counted: Counter[str]) -> bool:
        """Take what the served graphs told; False if that is not known."""
        marks = [mark.removeprefix(MARK).split() for mark in counted if mark.startswith(MARK)]
        joint = remembered(marks[0][0]) if len({m[0] for m in marks}) == 1 else None
        finals = {phase: remembered(kept) for _, phase, kept in marks}
        if joint is None or None in finals.values():
            return False
        self.joint = marks[0][0]
        self.record.sharded, self.record.sequence = True, joint["sequence"]
        self.record.lent, self.record.kernels = joint["lent"], joint["kernels"]
        self.record.sizes = joint["sizes"]
        self.record.gathers += [g._replace(source=self.lines.text(n)) for g, n in joint["gathers"]]
        self._take(joint["transfers"], None)
        for phase, final in finals.items():
            assert final is not None
            self._take(final["transfers"], phase)
        return True

    def _take(self, kept: list[Any], phase: str | None) -> None:
        transfers = [t._replace(stack=self.lines.text(n)) for t, n in kept]
        others = [t for t in self.record.transfers if phase not in (None, t.phase)]
        self.record.transfers = others + transfers
        if phase is not None:
            self.phases.add(phase)

    def _catch_up(self) -> None:
        """A graph that we sharded may have been served after the partitioner, its backward at the first call
        of it: take what it told."""
        for mark in _counted():
            joint, phase, kept = mark.removeprefix(MARK).split() if mark.startswith(MARK) else ("", "", "")
            if joint and joint == self.joint and phase not in self.phases:
                final = remembered(kept)
                if final is not None:
                    self._take(final["transfers"], phase)


def _counted() -> Counter[str]:
    return Counter(_torch.counters["inductor"])

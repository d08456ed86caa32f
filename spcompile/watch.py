"""Being looked at: what is compiled goes to ``TORCH_LOGS`` and to ``TORCH_TRACE`` as it happens.

``TORCH_LOGS=spcompile`` has a line for each graph, ``TORCH_LOGS=+spcompile`` its report too. ``TORCH_TRACE``
has each graph before and after the passes, and its report, as artifacts that tlparse shows beside Inductor's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import fx

from spcompile import _torch

if TYPE_CHECKING:
    from spcompile.reports.report import Record

__all__ = ["compiled", "graph"]

_log = logging.getLogger("spcompile")


def graph(name: str, graph: fx.Graph) -> None:
    """Tell of a joint graph; its text is made only if somebody listens."""

    def text() -> str:
        return str(graph.python_code("self", verbose=True, include_stride=True).src)

    _artifact(f"spcompile_graph_{name}", text)


def compiled(record: Record) -> None:
    """Tell of a graph that is compiled."""
    from spcompile.reports.report import Report

    report = Report(record.group.size, [record])
    if _log.isEnabledFor(logging.INFO):  # a summary asks for the formulas of all collectives
        _log.info("%s", report.summary())
    _log.debug("%s", report)
    _artifact("spcompile_report", lambda: str(report))


def _artifact(name: str, text: Callable[[], str]) -> None:
    _torch.trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text
    )

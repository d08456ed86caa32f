"""Being looked at: logs, traces, notebooks, and a short repr."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import spcompile
from spcompile.example import tiny
from spcompile.reports.report import Report

# A training step whose graphs stop short of Inductor's code: this is about what is told of them.
PROGRAM = """
import torch, spcompile._torch as t
from spcompile.example import tiny
from spcompile.backend import spcompile
def stop(gm, inputs, config_patches):
    joint = config_patches["joint_custom_pre_pass"]
    def partition(module, *args, **kwargs):
        joint(module.graph)
        return t.default_partition(module, *args, **kwargs)
    table = t.select_decomp_table()
    gm.recompile()
    run = t.aot_autograd(fw_compiler=lambda g, _: g, partition_fn=partition, decompositions=table)
    return run(gm, inputs)
t.compile_fx = stop
ids = torch.zeros(1, 9, dtype=torch.long)
torch.compile(tiny("L", hidden=8, heads=1), backend=spcompile)(ids, labels=ids)
"""


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("trace")
    env = os.environ | {"TORCH_LOGS": "+spcompile", "TORCH_TRACE": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, "\n".join(p.read_text() for p in folder.iterdir())


@pytest.mark.timeout(300)
def test_torch_logs_have_a_line_and_the_report(watched: tuple[str, str]) -> None:
    log, _ = watched
    assert "compiled on 1 rank: 1 graph, 1 attention" in log
    assert "attention found" in log and "example.py" in log


@pytest.mark.timeout(300)
def test_torch_trace_has_the_graphs_and_the_report(watched: tuple[str, str]) -> None:
    _, trace = watched
    for name in ("spcompile_graph_before", "spcompile_graph_after", "spcompile_report"):
        assert f'"name": "{name}"' in trace
    before, after = trace.split("spcompile_graph_before")[1].split("spcompile_graph_after")[:2]
    assert "spcompile.linear_attention" in before and "spcompile.linear_attention" not in after
    assert "example.py" in before  # the user's lines


@pytest.fixture(scope="module")
def report() -> Report:
    with torch.device("meta"), torch.no_grad():
        return spcompile.explain(tiny("N", hidden=8, heads=1), ranks=2)(torch.zeros(1, 8, dtype=torch.long))


def test_a_short_repr(report: Report) -> None:
    text = repr(report)
    assert text.startswith("<Report: Model on 2 ranks: 1 graph, 1 attention, ") and len(text) < 160
    assert "1 graph" in repr(report.records[0]) and len(repr(report.records[0])) < 160


def test_a_notebook_gets_tables(report: Report) -> None:
    page = report._repr_html_()
    assert page.count("<table>") == page.count("</table>") >= 4
    assert "<pre>spcompile: Model on 2 ranks" in page and "softmax: keys and values" in page
    report.name = "<script>"
    assert "<script>" not in report._repr_html_()

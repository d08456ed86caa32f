"""Modules of the passes import one way: what reads is above what is read."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx

import spcompile

ROOT = Path(spcompile.__file__).parent


def imports() -> nx.DiGraph:
    """What each module imports, wherever in it."""
    paths = {".".join(p.relative_to(ROOT.parent).with_suffix("").parts): p for p in ROOT.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): p for name, p in paths.items()}
    graph = nx.DiGraph()
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            found: list[str] = []
            if isinstance(node, ast.Import):
                found = [x.name for x in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                whole = [f"{node.module}.{x.name}" for x in node.names]
                found = [x if x in modules else node.module for x in whole]
            graph.add_edges_from((name, x) for x in found if x in modules and x != name)
    return graph


def test_the_recognizers_import_one_way() -> None:
    circles = [sorted(c) for c in nx.strongly_connected_components(imports()) if len(c) > 1]
    places = ("spcompile.passes.recognize", "spcompile.passes.shadow")
    assert not [c for c in circles if any(m.startswith(places) for m in c)]


def test_the_search_sees_imports() -> None:
    graph = imports()
    assert graph.has_edge("spcompile.passes.recognize.linear", "spcompile.passes.recognize.linear.match")
    assert graph.has_edge("spcompile.reports.report", "spcompile.reports.tables")  # inside a function

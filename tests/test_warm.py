"""A second start is served from Inductor's caches, and tells what the first did."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from spcompile import _torch, warm
from spcompile.backend import JointPass
from spcompile.boundary import Boundary
from spcompile.collectives import Group
from spcompile.config import Config
from spcompile.frontend import Frontend
from spcompile.report import Record, last
from tests.test_ranks import run_ranks


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield tmp_path
    torch._dynamo.reset()


# ---- the store


def test_what_is_remembered_comes_back(cache: Path) -> None:
    assert warm.remembered("a key") is None
    warm.remember("a key", {"x": (1, "two")})
    warm.remember("another", {})
    assert warm.remembered("a key") == {"x": (1, "two")}
    assert [f.name for f in (cache / "spcompile").rglob("tmp*")] == []


def test_a_file_that_cannot_be_read_is_as_if_not_there(cache: Path) -> None:
    warm.remember("a key", {"x": 1})
    file = warm._file("a key")
    whole = file.read_bytes()
    for content in (b"", whole[:-3], b"no pickle at all"):
        file.write_bytes(content)
        assert warm.remembered("a key") is None
    warm._file("another").parent.mkdir(parents=True, exist_ok=True)
    warm._file("another").write_bytes(whole)
    assert warm.remembered("another") is None


def test_nothing_is_kept_where_the_folder_cannot_be_written(cache: Path) -> None:
    (cache / "spcompile").write_text("a file in the place of the folder")
    warm.remember("a key", {"x": 1})
    assert warm.remembered("a key") is None


def test_a_line_is_told_as_it_is_today() -> None:
    def lines(first: int) -> warm.Lines:
        graph = fx.Graph()
        nodes = [graph.placeholder(f"x{n}") for n in range(2)]
        graph.output(nodes)
        for n, node in enumerate(nodes):
            node.meta["stack_trace"] = f'File "model.py", line {first + n}, in forward\n    code'
        return warm.Lines(fx.GraphModule({}, graph))

    before, after = lines(10), lines(70)
    known = [text for text in before.texts if "line" in text and "no source line" not in text]
    assert len(known) == 4  # of two nodes, the whole stack and the last line
    for text in known:
        assert after.text(before.number(text)) == text.replace("line 1", "line 7")
        assert after.text(before.number(text)) != text
    assert after.text(before.number("of no node")) == "of no node"


def test_whatever_changes_the_graph_is_part_of_the_key() -> None:
    told = warm.Told(Record(Group(1, "")), fx.symbolic_trace(nn.Identity()), "")
    plain = Frontend()
    edges = Boundary(Group(1, ""), 0)
    passes = [
        JointPass(Group(2, "0"), Config(), plain, told, edges),
        JointPass(Group(2, "1"), Config(), plain, told, edges),  # another axis of the mesh
        JointPass(Group(4, "0"), Config(), plain, told, edges),
        JointPass(Group(2, "0"), Config(regather=True), plain, told, edges),
        JointPass(Group(2, "0"), Config(gradients="partial"), plain, told, edges),
        JointPass(Group(2, "0"), Config(), Frontend(hints={"primals_1": 1}), told, edges),
        JointPass(Group(2, "0"), Config(), Frontend(parameters=("primals_1",)), told, edges),
    ]
    assert len({p.uuid() for p in passes}) == len(passes)
    before = passes[0].uuid()
    told.joint = "a digest"  # the same forward, of another joint graph
    assert passes[0].uuid() != before


# ---- compiled for real


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        q = x @ self.weight
        scores = (q @ x.mT).masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), 0)
        return (scores @ x).sum()


def step(net: nn.Module) -> tuple[str, dict[str, Any]]:
    """One step, in what is a new process for the caches: what they did, and the report."""
    torch._dynamo.reset()
    counted = _torch.counters["aot_autograd"]
    before = counted.copy()
    x = torch.randn(2, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(net(x), net.weight)[0]
    found = torch.autograd.grad(torch.compile(net, backend="spcompile")(x), net.weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    report = last().to_dict()
    del report["pass_seconds"]
    states = [k for k in ("hit", "miss", "bypass") if (counted - before)[f"autograd_cache_{k}"]]
    return " ".join(states), report


@pytest.mark.timeout(600)
def test_one_rank_is_served_from_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = _Attention()
    state, first = step(net)
    assert state == "miss" and first["sites"][0]["rewritten"]
    assert step(net) == ("hit", first)
    shutil.rmtree(cache / "spcompile")
    patches: list[Any] = []
    inner = _torch.compile_fx

    def watched(*args: Any, config_patches: Any) -> Any:
        patches.append(config_patches.get("fx_graph_cache"))
        return inner(*args, config_patches=config_patches)

    monkeypatch.setattr(_torch, "compile_fx", watched)
    assert step(net) == ("hit bypass", first)  # compiled anew, since nobody knows what the hit would tell
    assert step(net) == ("hit", first)
    assert patches == [None, False, None]


def test_an_entry_whose_told_is_lost_in_part_is_not_served(cache: Path) -> None:
    gm = fx.symbolic_trace(nn.Identity())
    told = warm.Told(Record(Group(1, "")), gm, "")
    joint = told._keep({"gathers": [], "sequence": None, "lent": {}, "transfers": []})
    mark = f"{warm.MARK} {joint} forward"
    assert not told._retell(warm.Counter({f"{mark} {'0' * 64}": 1}))
    assert not told._retell(warm.Counter())
    final = told._keep({"transfers": []})
    assert told._retell(warm.Counter({f"{mark} {final}": 1}))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_tell_again_what_they_gather(cache: Path) -> None:
    first, second = run_ranks("warm", 2), run_ranks("warm", 2)
    for cold, served in zip(first, second, strict=True):
        assert (cold.pop("hits"), served.pop("hits")) == (0, 1)
        assert served == cold
        assert "median" in cold["told"][0] and cold["report"]["collectives"] and cold["error"] <= 1e-9

"""A second start is served from Inductor's caches, and tells what the first did."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn

from spcompile import _torch, frontend, replay, warm
from spcompile.backend import JointPass
from spcompile.boundary import Boundary
from spcompile.collectives import Group
from spcompile.config import Config
from spcompile.frontend import Frontend
from spcompile.passes.canonical import own_copy
from spcompile.reports.report import Record, last
from tests.real_ranks import run_ranks


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
    known = [text for text in before.texts if "model.py" in text]
    assert len(known) == 4  # of two nodes, the whole stack and the last line
    for text in known:
        assert after.text(before.number(text)) == text.replace("10", "70").replace("11", "71")
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


# ---- recognition made again


def _traced(function: Callable[..., Any], *args: Any, dynamic: bool = False) -> fx.GraphModule:
    """Dynamo's graph, as a start of its own would see it."""
    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        graphs.append(own_copy(gm))
        return gm.forward

    torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    return graphs[0]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    future = torch.ones(6, 6, dtype=torch.bool).triu(1)
    return (q @ k.mT).masked_fill(future, -torch.inf).softmax(-1) @ v.relu()


def _elsewhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    future = torch.ones(6, 6, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v.relu()


def _loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = torch.zeros(2, 4, 4), []
    for t in range(6):
        state = 0.5 * state + k[:, t, :, None] * v[:, t, None]
        out.append(torch.einsum("bd,bde->be", q[:, t], state))
    return torch.stack(out, 1)


def _checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(_attend, q, k, v, use_reentrant=False)


def _cast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return _loop(q, k, v).float()


def _no_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("btd,btd,btd->bt", q, k, v)


def _qkv(length: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, 4, generator=generator).requires_grad_() for _ in range(3)]


def _geometry(n: fx.Node) -> list[Any]:
    leaves = torch.utils._pytree.tree_leaves(n.meta.get("example_value"))
    return [(x.dtype, x.shape, x.stride(), x.requires_grad) if isinstance(x, Tensor) else x for x in leaves]


def _prepared(gm: fx.GraphModule, version: str = "") -> tuple[int, list[Any], list[str], list[Any]]:
    """How often recognition ran, the sites, and what the graphs became: their code and what is on nodes."""
    with mock.patch.object(frontend, "_recognized", wraps=frontend._recognized) as ran:
        sites = frontend.prepare(gm, Config(), version).sites
    scopes = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
    gm.graph.lint()
    metas = [
        (n.name, sorted(n.meta), n.meta.get("stack_trace"), _torch.source_name(n), _geometry(n))
        for m in scopes
        for n in m.graph.nodes
    ]
    return ran.call_count, sites, [m.code for m in scopes], metas


@pytest.mark.parametrize("function", [_attend, _loop, _checkpointed, _cast, _no_attention])
def test_an_edit_is_made_again_without_recognizing(cache: Path, function: Callable[..., Any]) -> None:
    before, first, second = (_traced(function, *_qkv()) for _ in range(3))
    cold, warm_ = _prepared(first), _prepared(second)
    assert (cold[0], warm_[0]) == (1, 0)
    assert cold[1:] == warm_[1:]
    assert any(site.rewritten for site in cold[1]) or function is _no_attention
    assert cold[2] != [m.code for m in before.modules() if isinstance(m, fx.GraphModule)]
    inputs = _qkv()
    torch.testing.assert_close(second(*inputs), before(*inputs), rtol=1e-2, atol=1e-2)


def test_a_site_made_again_is_told_at_its_line_of_today(cache: Path) -> None:
    cold, warm_ = (_prepared(_traced(f, *_qkv())) for f in (_attend, _elsewhere))
    assert (cold[0], warm_[0]) == (1, 1)  # two lines in the place of one: which is meant cannot be known
    moved = _traced(_attend, *_qkv())
    for n in moved.graph.nodes:
        if "stack_trace" in n.meta:
            n.meta["stack_trace"] = re.sub(r"line (\d+)", r"line 9\1", n.meta["stack_trace"])
    again = _prepared(moved)
    expected = [dataclasses.replace(s, source=s.source.replace(".py:", ".py:9")) for s in cold[1]]
    assert again[:2] == (0, expected) and expected != cold[1]


def test_whatever_recognition_reads_is_part_of_its_key() -> None:
    def key(
        f: Callable[..., Any] = _attend, args: list[Tensor] | None = None, version: str = ""
    ) -> str | None:
        return replay.Kept(_traced(f, *(args or _qkv())), version).key

    def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q * 2, k, v)

    def scaled_more(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q * 3, k, v)

    q, k, v = _qkv()
    keys = [
        key(),
        key(version="other sources"),
        key(scaled),
        key(scaled_more),
        key(_checkpointed),
        key(args=[x.double() for x in (q, k, v)]),
        key(args=[x.detach() for x in (q, k, v)]),
        key(args=[x.detach().mT.contiguous().mT.requires_grad_() for x in (q, k, v)]),
        key(args=[nn.Parameter(x.detach()) for x in (q, k, v)]),
        key(args=[x.detach() for x in (q, q[:], v)]),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        keys.append(key())
    with torch.no_grad():
        keys.append(key())
    assert None not in keys and len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_what_a_text_does_not_tell_is_not_kept(cache: Path) -> None:
    @torch.library.custom_op("spcompile_tests::warm_mask", mutates_args=())
    def mask(x: Tensor) -> Tensor:
        return x.clone()

    mask.register_fake(lambda x: torch.empty_like(x))

    @torch.compiler.allow_in_graph
    def of_the_user(x: Tensor) -> Tensor:
        return x * 2

    gms = [
        _traced(lambda q, k, v: _attend(mask(q), k, v), *_qkv()),
        _traced(lambda q, k, v: _attend(of_the_user(q), k, v), *_qkv()),
        _traced(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, *_qkv(), dynamic=True),
    ]
    for gm in gms:
        assert replay.Kept(gm, "").key is None
        assert _prepared(gm)[0] == 1
    assert not (cache / "spcompile").exists()


def test_our_own_tokens_on_the_meta_device_have_no_values_to_read(cache: Path) -> None:
    gm = _traced(_no_attention, *_qkv())
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    node.meta["example_value"] = torch.empty((), device="meta")
    assert replay.Kept(gm, "").key is not None
    node.meta["example_value"] = torch.ones(())
    assert replay.Kept(gm, "").key is None


def test_an_edit_that_comes_out_otherwise_is_not_used(cache: Path) -> None:
    cold = _prepared(_traced(_attend, *_qkv()))
    name = replay.Kept(_traced(_attend, *_qkv()), "")._name
    kept = warm.remembered(name)
    assert kept is not None
    content = kept["graphs"][0]
    other = content.replace(b"reshape", b"squeeze")
    assert other != content
    for wrong in (other, content[:-9], b""):
        warm.remember(name, kept | {"graphs": {0: wrong}})
        assert _prepared(_traced(_attend, *_qkv())) == cold  # which keeps it anew
    assert _prepared(_traced(_attend, *_qkv()))[0] == 0


def test_a_recognition_that_failed_is_not_kept(cache: Path) -> None:
    with mock.patch("spcompile.passes.recognize._recognize", side_effect=MemoryError):
        assert "failed" in _prepared(_traced(_attend, *_qkv()))[1][0].reason
    assert _prepared(_traced(_attend, *_qkv()))[1][0].rewritten


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
    assert state == "miss" and first["sites"][0]["rewritten"] and first["kernels"]
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
    joint = told._keep(
        {"gathers": [], "sequence": None, "lent": {}, "kernels": {}, "sizes": {}, "transfers": []}
    )
    mark = f"{warm.MARK} {joint} forward"
    assert not told._retell(warm.Counter({f"{mark} {'0' * 64}": 1}))
    assert not told._retell(warm.Counter())
    final = told._keep({"transfers": []})
    assert told._retell(warm.Counter({f"{mark} {final}": 1}))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_tell_again_what_they_gather(cache: Path) -> None:
    first, second = (run_ranks("warm", 2, each=[{}, {}]) for _ in range(2))
    for cold, served in zip(first, second, strict=True):
        assert (cold.pop("hits"), served.pop("hits")) == (0, 1)
        assert served == cold
        assert "median" in cold["told"][0] and cold["report"]["collectives"] and cold["error"] <= 1e-9

"""Private PyTorch names: all of them in one file of spcompile, and each still what spcompile takes it for."""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo import list_backends
from torch._inductor import comms
from torch._inductor import config as inductor_config
from torch._inductor.output_code import CompiledFxGraph

from spcompile import _torch, floats, inductor
from spcompile.backend import JointPass, WaitPass
from spcompile.passes.overlap import scheduler
from spcompile.warm import NO_CACHES

SOURCES = Path(_torch.__file__).parent
HOME = Path(_torch.__file__)

# Names with an underscore, or under an experimental package, that may be used anywhere in spcompile.
ALLOWED = {
    "torch.utils._pytree": "how all of PyTorch walks nested arguments; it has no public name",
    "torch.utils._python_dispatch": "TorchDispatchMode, documented for users outside PyTorch",
    "torch.ops": "the operators (aten, prims, _c10d_functional, ours): graphs are made of them",
}
PRIVATE_PACKAGES = ("torch.fx.experimental", "torch.fx.passes", "torch.distributed.distributed_c10d")


def moved(name: str, what: str) -> str:
    """What a failing assertion says: what happened, and what to do."""
    return (
        f"torch {torch.__version__}: {name} {what}. Do: look up in this version's sources what took its "
        "place; adapt spcompile/_torch.py so that it serves every version that pyproject.toml allows (or "
        "narrow the requirement there), run all tests, and correct the expectation in this file."
    )


def test_this_version_of_torch_is_allowed() -> None:
    text = (SOURCES.parent / "pyproject.toml").read_text()
    found = re.search(r'"torch>=(\d+)\.(\d+),<(\d+)\.(\d+)"', text)
    assert found is not None, "pyproject.toml no longer says which versions of torch are allowed"
    low, high = (int(found[1]), int(found[2])), (int(found[3]), int(found[4]))
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    assert low <= version < high, moved("this version", f"is not one of {low} to {high} that were looked at")


# ---- where private names stand


def names(source: str) -> Iterator[tuple[int, str]]:
    """Every dotted torch name that ``source`` imports or reads, with its line; local names are followed."""
    tree = ast.parse(source)
    local = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
                whole = name.name if name.asname else name.name.partition(".")[0]
                local[name.asname or whole] = whole
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for name in node.names:
                yield node.lineno, f"{node.module}.{name.name}"
                local[name.asname or name.name] = f"{node.module}.{name.name}"
    for node in ast.walk(tree):
        parts: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in local:
            yield node.lineno, ".".join([local[inner.id], *parts])


def private(name: str) -> bool:
    if not name.startswith("torch.") or any(name == a or name.startswith(f"{a}.") for a in ALLOWED):
        return False
    if any(name == p or name.startswith(f"{p}.") for p in PRIVATE_PACKAGES):
        return True
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def test_private_names_are_in_one_file() -> None:
    strays = [
        f"{path.relative_to(SOURCES.parent)}:{line}: {name}"
        for path in sorted(SOURCES.rglob("*.py"))
        if path != HOME
        for line, name in names(path.read_text())
        if private(name)
    ]
    text = "\n".join(strays)
    assert not strays, f"private names of torch belong into spcompile/_torch.py, with a reason:\n{text}"


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "import torch._dynamo as d",
        "from torch._inductor import config",
        "from torch.fx.passes.shape_prop import _extract_tensor_metadata",
        "from torch.fx.experimental.proxy_tensor import make_fx",
        "import torch\ntorch._ops.OpOverload",
        "import torch.distributed as dist\ndist.distributed_c10d._resolve_process_group('0')",
        "from torch import distributed\nx = distributed._functional_collectives",
        "import torch\ndef f():\n    return torch._C._functions",
    ],
)
def test_the_search_finds(line: str) -> None:
    assert any(private(name) for _, name in names(line))


@pytest.mark.parametrize(
    "line",
    [
        "import torch\ntorch.__version__",
        "from torch.utils._pytree import tree_map",
        "import torch\ntorch.ops._c10d_functional.wait_tensor.default",
        "from spcompile import _torch\n_torch.compile_fx",
        "def f(target):\n    return target._schema",
    ],
)
def test_the_search_passes(line: str) -> None:
    assert not any(private(name) for _, name in names(line))


def test_every_name_has_a_reason_and_a_user() -> None:
    """Each import of spcompile/_torch.py follows a comment, and each exported name is used somewhere."""
    lines = HOME.read_text().splitlines()
    for node in ast.parse(HOME.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module != "__future__" and private(f"{node.module}.x"):
            above = node.lineno - 2
            while lines[above].startswith(("from ", "import ", "    ", ")")):
                above -= 1
            assert lines[above].startswith("# "), f"{HOME.name}:{node.lineno}: without a reason"
    users = [*SOURCES.rglob("*.py"), *Path(__file__).parent.glob("*.py")]
    text = "\n".join(p.read_text() for p in users if p not in (HOME, Path(__file__)))
    for name in _torch.__all__:
        assert re.search(rf"\b{name}\b", text), f"nobody uses _torch.{name}: remove it"


# ---- that they are what spcompile takes them for

# name -> parameters that spcompile gives it; "**" for any keywords.
CALLED = {
    "aot_autograd": ["**"],
    "cache_dir": [],
    "compile_fx": ["model_", "example_inputs_", "config_patches"],
    "default_partition": ["joint_module", "_joint_inputs", "num_fwd_outputs"],
    "detect_fake_mode": ["inputs"],
    "enter_autocast": [],
    "exit_autocast": ["mode"],
    "differentiable": [],
    "disable_current_modes": [],
    "FakeTensorMode": ["allow_non_fake_inputs", "shape_env"],
    "flex_attention_backward": [
        *("query", "key", "value", "out", "logsumexp", "grad_out", "grad_logsumexp"),
        *("fw_graph", "joint_graph", "block_mask", "scale", "kernel_options"),
        *("score_mod_other_buffers", "mask_mod_other_buffers"),
    ],
    "get_proxy_mode": [],
    "get_proxy_slot": ["obj", "tracer", "default"],
    "list_mode_options": [],
    "hint": ["x"],
    "not_traced": ["reason"],
    "make_fx": ["f", "tracing_mode", "pre_dispatch"],
    "min_cut_rematerialization_partition": ["joint_module", "_joint_inputs", "num_fwd_outputs"],
    "partitioner_operators": [],
    "select_decomp_table": [],
    "ShortenTraceback": ["first_useful_frame"],
    "source_name": ["node"],
    "ShapeEnv": [],
    "statically_known_true": ["x"],
    "tensor_metadata": ["result"],
    "trace_structured": ["name", "metadata_fn", "payload_fn"],
    "traced_frame": [],
    "track_tensor_tree": ["inner_res", "proxy_res", "constant", "tracer"],
}

# name -> its operator and the arguments that spcompile gives or asks for.
OPERATORS = {
    "flash_attention_cpu": (
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        ["query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale"],
    ),
    "flash_attention_cpu_backward": (
        "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
        ["grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal", "attn_mask"],
    ),
    "flash_attention_cuda": (
        "aten._scaled_dot_product_flash_attention.default",
        ["query", "key", "value", "dropout_p", "is_causal"],
    ),
    "flash_attention_cuda_backward": (
        "aten._scaled_dot_product_flash_attention_backward.default",
        [
            *("grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k"),
            *("max_q", "max_k", "dropout_p", "is_causal", "philox_seed", "philox_offset"),
        ],
    ),
    "inductor_random": ("prims.inductor_random.default", ["size", "seed", "mode"]),
    "inductor_seed": ("prims.inductor_seed.default", ["device"]),
}


@pytest.mark.parametrize("name", CALLED)
def test_signature(name: str) -> None:
    target = getattr(_torch, name)
    assert callable(target), moved(name, "is not callable")
    parameters = inspect.signature(target).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    missing = [p for p in CALLED[name] if p != "**" and p not in parameters and not anything]
    assert not missing, moved(name, f"no longer takes {missing}: it is {inspect.signature(target)}")
    assert "**" not in CALLED[name] or anything, moved(name, "no longer takes any keywords")
    given = {*CALLED[name], "self"}
    asked = [
        n
        for n, p in parameters.items()
        if p.default is p.empty and n not in given and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    assert not asked, moved(name, f"wants {asked} too")


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str) -> None:
    target, (spelling, arguments) = getattr(_torch, name), OPERATORS[name]
    assert isinstance(target, _torch.OpOverload), moved(name, "is no operator overload")
    assert str(target) == spelling, moved(name, f"is {target}")
    found = [a.name for a in target._schema.arguments]
    assert found[: len(arguments)] == arguments, moved(name, f"takes {found}, not {arguments}")
    extra = [a.name for a in target._schema.arguments[len(arguments) :] if not a.has_default_value()]
    assert not extra, moved(name, f"wants {extra} too")


def test_all_names_are_expected_here() -> None:
    elsewhere = {
        "CompileContext",
        "CustomGraphPass",
        "FakeTensor",
        "HigherOrderOperator",
        "OpOverload",
        "OpOverloadPacket",
        "TensorifyState",
        "UNTAGGED_POINTWISE",
        "callback_handler",
        "convert_frame",
        "counters",
        "disabled_torch_function",
        "fallbacks",
        "float_symbols",
        "inductor_config",
        "is_unbacked",
        "is_wrapped",
        "make_wrapper_subclass",
        "dynamo_config",
        "resolve_process_group",
        "set_grad_enabled",
        "tracing_metadata",
        "transform_depth",
        "undo_transforms",
    }
    unknown = set(_torch.__all__) ^ {*CALLED, *OPERATORS, *elsewhere}
    assert not unknown, f"spcompile/_torch.py and this file disagree about {sorted(unknown)}: add a test"


def test_graph_hooks() -> None:
    hook = _torch.CustomGraphPass
    assert {"__call__", "uuid"} <= hook.__abstractmethods__, moved(
        "CustomGraphPass", f"asks for {sorted(hook.__abstractmethods__)}, not for __call__ and uuid"
    )
    for made in (JointPass, WaitPass):
        missing: Any = made.__abstractmethods__
        assert not missing, moved("CustomGraphPass", f"asks {made.__name__} for {sorted(missing)}")


HOOKS = ("joint_custom_pre_pass", "post_grad_custom_post_pass")


@pytest.mark.parametrize("name", [*HOOKS, *scheduler(True), *NO_CACHES])
def test_inductor_has_the_option(name: str) -> None:
    assert name in inductor_config.get_config_copy(), moved(f"torch._inductor.config.{name}", "is gone")


def test_inductor_has_the_pass_that_sinks_waits() -> None:
    key = "reorder_for_compute_comm_overlap_passes"
    for name in (*scheduler(True)[key], *scheduler(False)[key]):
        found = callable(getattr(comms, name, None))
        assert found, moved(f"torch._inductor.comms.{name}", "is gone: waits would stand before the work")


def test_what_the_partitioner_repeats() -> None:
    graph, aten = torch.fx.Graph(), torch.ops.aten
    x, operators = graph.placeholder("x"), _torch.partitioner_operators()
    for op, repeats in ((aten.add.Tensor, True), (aten.view.default, True), (aten.mm.default, False)):
        found = operators.is_recomputable(graph.call_function(op, (x, x)))
        assert found == repeats, moved("partitioner_operators", f"takes {op} for the other kind")


def test_decompositions() -> None:
    table = _torch.select_decomp_table()
    assert isinstance(table, dict), moved("select_decomp_table", f"returns a {type(table).__name__}")
    aten = torch.ops.aten
    taken_apart = (aten.clamp.default, aten.gelu_backward.default, aten.tril.default, aten.stack.default)
    for op in taken_apart:
        assert callable(table.get(op)), moved("select_decomp_table", f"does not take {op} apart")


def test_classes_of_operators() -> None:
    assert isinstance(torch.ops.aten.mm.default, _torch.OpOverload), moved("OpOverload", "is another class")
    assert isinstance(torch.ops.higher_order.cond, _torch.HigherOrderOperator), moved(
        "HigherOrderOperator", "is another class"
    )
    for name in ("_schema", "_opname", "_overloadname", "namespace", "tags", "is_view", "overloadpacket"):
        assert hasattr(torch.ops.aten.view.default, name), moved(f"OpOverload.{name}", "is gone")
    assert isinstance(torch.ops.aten.view, _torch.OpOverloadPacket), moved("OpOverloadPacket", "is another")
    for op in _torch.UNTAGGED_POINTWISE:
        assert isinstance(op, _torch.OpOverload), moved("UNTAGGED_POINTWISE", f"has {op}, no overload")


COLLECTIVES = {
    "all_gather_into_tensor": ["input", "group_size", "group_name"],
    "all_reduce": ["input", "reduce_op", "group_name"],
    "reduce_scatter_tensor": ["input", "reduce_op", "group_size", "group_name"],
    "wait_tensor": ["tensor"],
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_functional_collective(name: str) -> None:
    found = [a.name for a in getattr(torch.ops._c10d_functional, name).default._schema.arguments]
    assert found == COLLECTIVES[name], moved(f"_c10d_functional.{name}", f"takes {found}")


def test_state_of_a_compilation() -> None:
    assert _torch.counters["graph_break"] is not None, moved("counters", "is no default dict of counts")
    kept = CompiledFxGraph.__annotations__
    assert "counter_deltas" in kept, moved("CompiledFxGraph", "no longer keeps how far the counters went up")
    assert _torch.tracing_metadata() is None, moved("TracingContext.try_get", "finds one outside of any")
    assert _torch.detect_fake_mode([]) is None, moved("detect_fake_mode", "finds one where there is none")
    assert _torch.get_proxy_mode() is None, moved("get_proxy_mode", "finds one where there is none")


def test_dynamo_says_where_inputs_come_from() -> None:
    found: list[tuple[str, Any]] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
        found.extend((_torch.source_name(n), _torch.hint(x)) for n, x in zip(nodes, inputs, strict=True))
        return gm.forward

    with torch._dynamo.config.patch(assume_static_by_default=False):
        torch.compile(lambda x, n: x * n, backend=backend, dynamic=True)(torch.ones(3), 5)
    numbers = {name: value for name, value in found if not isinstance(value, torch.Tensor)}
    assert "L['x']" in dict(found) and numbers == {"L['x'].size()[0]": 3, "L['n']": 5}, moved(
        "Node._dynamo_source or SymNode.hint", f"says {found}"
    )


def test_dynamo_writes_the_grad_mode_so() -> None:
    written: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        written.extend(n.target for n in gm.graph.nodes)
        return gm.forward

    def program(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return x * 2

    torch.compile(program, backend=backend)(torch.ones(3, requires_grad=True))
    assert written.count(_torch.set_grad_enabled) == 2, moved("torch._C._set_grad_enabled", "is not written")


def test_an_error_of_a_backend_that_dynamo_lets_through() -> None:
    class Mine(_torch.ShortenTraceback):
        pass

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        raise Mine("", first_useful_frame=None)

    with pytest.raises(Mine):
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))


def test_dynamo_calls_back_before_it_traces() -> None:
    seen: list[str] = []
    callbacks = _torch.callback_handler.start_callbacks
    callbacks.append(lambda _: seen.append("called"))
    try:
        torch.compile(lambda x: (seen.append("traced"), x + 1)[1], backend="eager")(torch.zeros(1))
    finally:
        callbacks.pop()
    assert seen[0] == "called", moved("callback_handler.start_callbacks", f"are called late: {seen}")


def test_the_frame_that_dynamo_compiles() -> None:
    assert _torch.traced_frame() is None, moved("InstructionTranslator.current_tx", "is one outside Dynamo")
    seen: list[Any] = []

    def keep(gm: Any, inputs: Any) -> Any:
        seen.append(_torch.traced_frame())
        return gm

    def called(x: Any) -> Any:
        return x + 1

    torch.compile(called, backend=keep)(torch.zeros(1))
    ((code, variables),) = seen
    assert code is called.__code__ and isinstance(variables["x"], torch.Tensor), moved(
        "InstructionTranslator.f_code or f_locals", f"are {code} and {variables}"
    )


def test_transforms_push_levels_that_can_be_undone() -> None:
    from torch._C import _functorch as functorch

    depth = _torch.transform_depth()
    functorch._vmap_increment_nesting(2, "error")
    assert _torch.transform_depth() == depth + 1, moved("get_dynamic_layer_stack_depth", "does not count")
    x = functorch._add_batch_dim(torch.zeros(2, 3), 0, 1)
    wrapped = _torch.is_wrapped(x), _torch.is_wrapped(torch.zeros(2))
    _torch.undo_transforms(depth)
    assert wrapped == (True, False), moved("is_functorch_wrapped_tensor", f"says {wrapped}")
    assert _torch.transform_depth() == depth, moved("pop_dynamic_layer_stack_and_undo_to_depth", "does not")


def test_wrapper_subclasses_and_backwards_that_run_again() -> None:
    class Wrapper(torch.Tensor):
        __torch_function__ = _torch.disabled_torch_function

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    x = _torch.make_wrapper_subclass(Wrapper, (2, 3), strides=(1, 2), dtype=torch.int32, device="cpu")
    assert x.stride() == (1, 2), moved("_make_wrapper_subclass", "takes no strides")


def test_symbols_known_at_run_time_only() -> None:
    shapes = _torch.ShapeEnv()
    for number in (shapes.create_unbacked_symint(), shapes.create_unbacked_symfloat()):
        (symbol,) = number.node.expr.free_symbols
        assert _torch.is_unbacked(symbol), moved("symbol_is_type", f"does not know {symbol}")


def test_a_counter_in_float64_restarts_no_trace() -> None:
    """Once PyTorch keeps the write without ``no_restart`` this fails, and spcompile.floats may go."""
    seen: list[bool] = []

    def backend(gm: Any, inputs: Any) -> Any:
        with contextlib.nullcontext() if seen else floats.no_restart(gm):
            return _torch.aot_autograd(fw_compiler=lambda g, x: make_boxed_func(g.forward))(gm, inputs)

    def tripled(steps: Any, x: Any) -> Any:
        steps.mul_(3)
        return x + steps

    for expected in (3.0, 1.0):
        steps = torch.ones((), dtype=torch.float64)
        torch._dynamo.reset()
        torch.compile(tripled, backend=backend)(steps, torch.zeros(3))
        assert float(steps) == expected, moved("TensorifyState", f"leads to {float(steps)}")
        seen.append(True)


def test_options_of_inductor() -> None:
    known, modes = _torch.inductor_config.get_config_copy(), _torch.list_mode_options()
    for mode in ("default", "lite", "max-autotune"):
        assert mode in modes, moved("list_mode_options", f"has no mode {mode!r} but {sorted(modes)}")
    for name in {*inductor._OURS, *(name for options in modes.values() for name in options)}:
        assert name in known, moved(f"torch._inductor.config.{name}", "is gone")
    assert _torch.inductor_config.get_type("max_autotune") is bool, moved("get_type", "gives no type")


def test_dynamo_asks_for_its_limit_by_a_name_of_its_module() -> None:
    exceeds = inspect.unwrap(_torch.convert_frame.exceeds_recompile_limit)
    found = list(inspect.signature(exceeds).parameters)
    assert found == ["cache_size", "compile_id"], moved("exceeds_recompile_limit", f"takes {found}")
    uses = inspect.getsource(_torch.convert_frame).count(" exceeds_recompile_limit(cache_size, compile_id)")
    assert uses == 1, moved("exceeds_recompile_limit", f"is called in {uses} places of convert_frame")
    assert {"recompile_limit", "accumulated_recompile_limit"} <= set(_torch.dynamo_config.get_config_copy())
    assert _torch.CompileContext.current_compile_id() is None, moved("CompileContext", "has one outside")
    asked: list[Any] = []
    names = _torch.convert_frame.exceeds_recompile_limit
    try:
        _torch.convert_frame.exceeds_recompile_limit = lambda *args: asked.append(args) or names(*args)
        torch.compile(lambda x: x + 2, backend="eager")(torch.zeros(1))
    finally:
        _torch.convert_frame.exceeds_recompile_limit = names
    ((cache_size, compile_id),) = asked
    assert cache_size.will_compilation_exceed_accumulated_limit() is False
    assert isinstance(compile_id.frame_id, int) and compile_id.frame_compile_id == 0


def test_group_of_a_name() -> None:
    assert callable(_torch.resolve_process_group), moved("_resolve_process_group", "is not callable")
    with pytest.raises((ValueError, RuntimeError)):
        _torch.resolve_process_group("no group has this name")


def test_fake_tensors_have_metadata_and_storages() -> None:
    with _torch.FakeTensorMode(allow_non_fake_inputs=True, shape_env=_torch.ShapeEnv()) as mode:
        x = torch.empty(2, 3)
    assert x.fake_mode is mode, moved("FakeTensor.fake_mode", "is gone")
    assert _torch.detect_fake_mode([x]) is mode, moved("detect_fake_mode", "does not find a tensor's mode")
    assert tuple(_torch.tensor_metadata(x).shape) == (2, 3), moved("tensor_metadata", "has no shape")
    assert isinstance(x.untyped_storage()._cdata, int), moved("UntypedStorage._cdata", "is no address")


def test_dynamo_finds_the_backend() -> None:
    assert "spcompile" in list_backends(), (
        "torch.compile finds no backend 'spcompile': the package is not installed (pip install -e .), or "
        + moved("the entry point torch_dynamo_backends", "is not read")
    )

"""``spcompile doctor``: whether all is there that a run needs, and a step on two ranks that proves it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Finding", "examine", "report"]


class Finding(NamedTuple):
    """What one check found.

    Args:
        state: "ok", "note" (it can go wrong) or "fail" (it does).
        text: what was found.
        remedy: what to do, unless it is ok.
    """

    state: str
    text: str
    remedy: str = ""


def report(self_test: bool = True) -> int:
    """Print every finding as it comes; returns the exit status: 1 if a check failed, else 0."""
    show, busy = _screen()
    failed = 0
    for what, check in _checks(self_test):
        with busy(what):
            found = list(check())
        for finding in found:
            failed += finding.state == "fail"
            show(finding)
    show(
        Finding("fail", f"{failed} of the checks failed", "see above")
        if failed
        else Finding("ok", "all is there" if self_test else "all is there; the self-test was left out")
    )
    return 1 if failed else 0


def examine(self_test: bool = False) -> list[Finding]:
    """Every finding."""
    return [finding for _, check in _checks(self_test) for finding in check()]


def _checks(self_test: bool) -> list[tuple[str, Callable[[], Iterator[Finding]]]]:
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("Python", _python),
        ("torch", _versions),
        ("other libraries", _libraries),
        ("C++ compiler", _compiler),
        ("process groups", _groups),
        ("environment", _environment),
    ]
    return checks + (
        [("self-test on two ranks, which compiles for a minute", _self_test)] if self_test else []
    )


# ---------------------------------------------------------------------------------------------------- checks


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Iterator[Finding]:
    yield Finding("ok", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        yield Finding(
            "fail",
            f"Python.h is not in {sysconfig.get_paths()['include']}, and Inductor's code needs it",
            "install Python's headers, for instance the package python3-dev",
        )


def _versions() -> Iterator[Finding]:
    from spcompile import __version__

    found = {e.name for e in importlib.metadata.entry_points(group="torch_dynamo_backends")}
    if "spcompile" in found:
        yield Finding("ok", f"spcompile {__version__}, known to torch.compile")
    else:
        yield Finding(
            "fail",
            f"spcompile {__version__} is not known to torch.compile",
            "install it: pip install spcompile",
        )
    wanted = next((r for r in importlib.metadata.requires("spcompile") or () if r.startswith("torch")), "")
    yield (
        _in_range(_version("torch"), wanted)
        if "spcompile" in found
        else Finding("ok", f"torch {_version('torch')}")
    )
    try:
        import torch  # noqa: F401
    except Exception as error:
        yield Finding("fail", f"torch cannot be imported: {error}", "install it anew")


def _in_range(version: str | None, wanted: str) -> Finding:
    """Whether torch's version is one that the package asks for, as in ``torch<2.15,>=2.11``."""
    if version is None:
        return Finding("fail", "torch is not installed", f"pip install '{wanted}'")
    have = tuple(map(int, version.split("+")[0].split(".")[:2]))
    low, high = (
        tuple(map(int, found.groups())) if (found := re.search(sign + r"\s*(\d+)\.(\d+)", wanted)) else None
        for sign in (">=", "<")
    )
    if (low is not None and have < low) or (high is not None and have >= high):
        return Finding("fail", f"torch {version} is not one that spcompile knows", f"pip install '{wanted}'")
    return Finding("ok", f"torch {version} ({wanted.removeprefix('torch')} is supported)")


def _libraries() -> Iterator[Finding]:
    triton = _version("triton")
    if triton is None and platform.system() == "Linux":
        yield Finding("note", "triton is not installed; GPUs need it", "pip install triton")
    names = "triton sympy transformers fla-core flash-linear-attention mamba-ssm performer-pytorch accelerate"
    known = [f"{name} {version}" for name in names.split() if (version := _version(name)) is not None]
    yield Finding("ok", f"installed: {', '.join(known)}")


_PROGRAM = "#include <omp.h>\n#include <vector>\nint main() { return omp_get_max_threads() < 1; }\n"


def _compiler() -> Iterator[Finding]:
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None:
        yield Finding("fail", f"no C++ compiler {name!r}", "install g++, or name one in the variable CXX")
        return
    version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.splitlines()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "program.cpp"
        source.write_text(_PROGRAM)
        command = [path, "-std=c++17", "-fopenmp", str(source), "-o", str(Path(folder) / "program")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        yield Finding(
            "fail",
            f"{path} cannot compile with OpenMP: {(done.stderr.strip().splitlines() or ['no message'])[-1]}",
            "install libgomp or libomp, or name another compiler in the variable CXX",
        )
        return
    yield Finding("ok", f"{path}: {(version or ['?'])[0]}")
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < 2**30:
        yield Finding(
            "note",
            f"{tempfile.gettempdir()}, where Inductor keeps its code, has {free / 2**20:.0f} MiB left",
            "make room, or name another folder in TORCHINDUCTOR_CACHE_DIR",
        )


def _groups() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield Finding("fail", "this torch has no torch.distributed", "install a torch that was built with it")
        return
    backends = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    yield Finding("ok", f"process group backends: {', '.join(n for n, there in backends.items() if there)}")
    if not torch.cuda.is_available():
        yield Finding("ok", f"no GPU; {os.cpu_count()} processors")
        return
    count = torch.cuda.device_count()
    yield Finding("ok", f"GPUs: {count}, the first a {torch.cuda.get_device_name(0)}")
    if not backends["nccl"]:
        yield Finding("note", "GPUs and no NCCL", "install a torch that was built with NCCL")


def _environment() -> Iterator[Finding]:
    env = os.environ
    world = env.get("WORLD_SIZE", "1")
    if not world.isdigit():
        yield Finding("fail", f"WORLD_SIZE={world!r} is no number", "start the ranks by torchrun")
    elif int(world) > 1:
        missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in env]
        if missing:
            yield Finding(
                "fail",
                f"WORLD_SIZE={world}, but {', '.join(missing)} not set: no process group can start",
                "start the ranks by torchrun, or unset WORLD_SIZE for one process",
            )
        else:
            yield Finding("ok", f"rank {env['RANK']} of {world}; call init_process_group before the model")
    if env.get("PYTHONHASHSEED", "random") == "random":
        yield Finding(
            "note",
            "PYTHONHASHSEED is not set: ranks that walk sets of strings may trace other graphs",
            "set PYTHONHASHSEED=0 on every rank",
        )
    else:
        yield Finding("ok", f"PYTHONHASHSEED={env['PYTHONHASHSEED']}")
    threads = env.get("OMP_NUM_THREADS")
    if threads is None:
        yield Finding(
            "note",
            f"OMP_NUM_THREADS is not set: each rank takes all {os.cpu_count()} processors "
            "(torchrun sets it to 1)",
            "set it to the processors of this machine, divided by its ranks",
        )
    else:
        yield Finding("ok", f"OMP_NUM_THREADS={threads}")


# ------------------------------------------------------------------------------------------------- self-test


def _self_test(ranks: int = 2, timeout: float = 600) -> Iterator[Finding]:
    """A training step of a hybrid model on real processes, compared with eager in float64."""
    with tempfile.TemporaryDirectory() as folder:
        common = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "WORLD_SIZE": str(ranks)}
        code = f"from spcompile.doctor import rank; rank({folder!r})"
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                env=common | {"RANK": str(r)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for r in range(ranks)
        ]
        try:
            texts = [w.communicate(timeout=timeout)[0] for w in workers]
        except subprocess.TimeoutExpired:
            yield Finding(
                "fail", f"self-test: not done after {timeout:.0f} s", "look for a rank that waits for another"
            )
            return
        finally:
            for worker in workers:
                worker.kill()
        yield _judged([Path(folder) / f"rank{r}.json" for r in range(ranks)], texts)


def _judged(files: list[Path], texts: list[str]) -> Finding:
    """What the ranks wrote, or what the first that wrote nothing said."""
    for file, text in zip(files, texts):
        if not file.exists():
            return Finding("fail", f"self-test: {file.stem} failed\n{text.strip()}", "read its message above")
    error = _worst([json.loads(file.read_text())["error"] for file in files])
    if not error <= 1e-9:
        return Finding(
            "fail",
            f"self-test: loss or gradients differ from eager by {error:.2g}",
            "report it with the output of this command",
        )
    text = f"self-test: linear and softmax attention train on {len(files)} ranks as in eager, to {error:.1g}"
    return Finding("ok", text)


def _worst(errors: list[float]) -> float:
    """The largest; NaN, which no comparison sees, if there is one."""
    return next((e for e in errors if e != e), max(errors))


def rank(folder: str) -> None:
    """One process of the self-test; it writes how far loss and gradients are from eager's."""
    import torch
    import torch.distributed as dist

    from spcompile.example import tiny

    here, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=here, world_size=ranks)
    torch.manual_seed(0)
    model = tiny("LN", vocab=32, hidden=16, heads=2).double()
    ids = torch.randint(0, 32, (1, 17))

    def step(called: Any) -> list[torch.Tensor]:
        model.zero_grad()
        loss = called(ids, labels=ids)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected, found = step(model), step(torch.compile(model, backend="spcompile"))
    scale = max(float(e.abs().max()) for e in expected[1:])
    errors = [float((f - e).abs().max()) / max(float(e.abs().max()), scale) for f, e in zip(found, expected)]
    (Path(folder) / f"rank{here}.json").write_text(json.dumps({"error": _worst(errors)}))
    dist.barrier()
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------- screen

_COLOURS = {"ok": "green", "note": "yellow", "fail": "bold red"}


def _screen() -> tuple[Callable[[Finding], None], Callable[[str], Any]]:
    """How a finding is shown, and how a check that goes on; prettier where rich is installed."""
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        return _plain, lambda what: contextlib.nullcontext()
    console = Console(soft_wrap=True)

    def show(finding: Finding) -> None:
        console.print(Text(f"{finding.state:>4}", _COLOURS[finding.state]), Text(finding.text))
        if finding.remedy:
            console.print(Text(f"     Remedy: {finding.remedy}"))

    return show, lambda what: console.status(f"{what} ...")


def _plain(finding: Finding) -> None:
    print(f"{finding.state:>4} {finding.text}", flush=True)
    if finding.remedy:
        print(f"     Remedy: {finding.remedy}", flush=True)

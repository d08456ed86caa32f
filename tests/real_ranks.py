"""Real ranks: a process each, on Gloo.

An import of torch and of Inductor takes ten seconds of a core. So the ranks of a test are forked from
processes that have imported them (``tests/parent.py``): those of even number from one, those of odd number
from another, so that neighbours have other hashes. What is read from the environment at import is as it was
at the first test of a session.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Parent:
    """A process that forks ranks."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.parent"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start(self, ranks: list[dict[str, str]], environment: dict[str, str]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"ranks": ranks, "environment": environment}) + "\n")
        self.process.stdin.flush()

    def ended(self, seconds: float) -> bool:
        """Whether all ranks ended, in the seconds that are left; it waits for them."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], max(seconds, 0))
        return bool(ready) and bool(self.process.stdout.readline())

    def kill(self) -> None:
        """With its ranks."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@functools.cache
def _parent(parity: int) -> Parent:
    return Parent()


def run_ranks(
    case: str,
    ranks: int,
    timeout: float = 280,
    worker: str = "tests.rank_worker",
    each: Sequence[dict[str, str]] | None = None,
) -> list[dict[str, Any]]:
    """Every rank's result of a case of a worker module.

    ``each``: environment of each rank, which is then a process that imports all by itself.

    Raises:
        AssertionError: with all that the ranks wrote, where one of them has no result in time; where code of
            Inductor's reads what a collective brings before the wait for it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(r) for r in range(ranks)]
        for file in files:
            file.touch()
        if each is None:
            _forked(case, worker, files, os.environ | common, timeout)
        else:
            environments = [
                os.environ | common | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)
            ]
            _started(case, worker, files, [a | b for a, b in zip(environments, each, strict=True)], timeout)
        outputs = [file.read_text() for file in files]
    results = [[line for line in out.splitlines() if line.startswith("RESULT ")] for out in outputs]
    assert all(results), "\n".join(outputs)
    unwaited = [line for out in outputs for line in out.splitlines() if line.startswith("UNWAITED ")]
    assert unwaited == ["UNWAITED []"] * (ranks if each is None else 0), unwaited
    return [json.loads(r[0].removeprefix("RESULT ")) for r in results]


def _forked(case: str, worker: str, files: list[Path], environment: dict[str, str], timeout: float) -> None:
    births = [
        {"rank": str(r), "case": case, "worker": worker, "output": str(file)} for r, file in enumerate(files)
    ]
    parents, until = [_parent(parity) for parity in range(min(2, len(files)))], time.monotonic() + timeout
    for parity, parent in enumerate(parents):
        parent.start(births[parity::2], environment)
    if not all(parent.ended(until - time.monotonic()) for parent in parents):
        for parent in parents:
            parent.kill()
        _parent.cache_clear()


def _started(
    case: str, worker: str, files: list[Path], environments: list[dict[str, str]], timeout: float
) -> None:
    workers = []
    for file, env in zip(files, environments, strict=True):
        command = [sys.executable, "-m", worker, case]
        with file.open("w") as output:
            workers.append(subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT))
    until = time.monotonic() + timeout
    try:
        for w in workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                w.wait(max(until - time.monotonic(), 0))
    finally:
        for w in workers:
            w.kill()
            w.wait()

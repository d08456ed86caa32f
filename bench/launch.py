"""Run a worker module in one process for each rank, and read what it reports.

Each measurement gets processes of its own, so that neither memory nor state of one leaks into the next.
A worker is a module run with `-m`; it takes its task as JSON on standard input and reports JSON lines.
"""

from __future__ import annotations

import json
import os
import queue
import re
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

# glibc maps blocks above 32 MB afresh at every call and gives freed memory back at once; the page faults that
# follow cost more than the arithmetic and grow with the block. Times are taken with the memory kept.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000"}
# A kept heap splits its blocks, and a peak then depends on what was there before. Peaks are taken in
# processes of their own, with every block of 64 KB and more coming from the system and going back to it.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000000"}

MARK = "@report "  # begins a report; other lines that a worker prints are nobody's business
Report = dict[str, Any]


class WorkerError(RuntimeError):
    """A worker failed or took too long; the message ends with what it wrote to standard error."""


def report(**fields: Any) -> None:
    """In a worker: send `fields` to the process that launched it."""
    print(MARK + json.dumps(fields), flush=True)


def task() -> dict[str, Any]:
    """In a worker: what it was launched to do."""
    return json.load(sys.stdin)


def processor_seconds() -> float:
    """In a worker: of this process and of those that it started: compilers."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(
    module: str,
    work: dict[str, Any],
    ranks: int = 1,
    threads: int | None = None,
    on_report: Callable[[int, Report], None] = lambda rank, fields: None,
    timeout: float = 1800,
    env: dict[str, str] | None = None,
    folder: str | None = None,
) -> list[Report]:
    """Run `module` on `ranks` processes and return each rank's last report.

    Args:
        work: the task, JSON.
        threads: of each rank; by default the cores are shared evenly.
        on_report: called with (rank, fields) for each report as it comes.
        timeout: seconds before the workers are ended.
        env: variables added to the environment.
        folder: a checkout whose modules they use; None: this one's.
    Raises:
        WorkerError: a rank ended with an error, reported nothing, or ran out of time.
    """
    common = os.environ | rendezvous(ranks) | (env or {})
    common["OMP_NUM_THREADS"] = str(threads or max(1, cores() // ranks))
    inbox: queue.Queue[tuple[int, Report]] = queue.Queue()
    workers: list[subprocess.Popen[str]] = []
    logs = [tempfile.TemporaryFile("w+") for _ in range(ranks)]  # noqa: SIM115, closed below
    try:
        for rank, log in enumerate(logs):
            rank_env = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(start(module, work, rank, rank_env, log, inbox, folder))
        last = collect(workers, inbox, on_report, timeout, logs)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
        for log in logs:
            log.close()
    return [last[rank] for rank in range(ranks)]


def rendezvous(ranks: int) -> dict[str, str]:
    """What torchrun would set for `ranks` processes on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def start(
    module: str,
    work: dict[str, Any],
    rank: int,
    env: dict[str, str],
    log: TextIO,
    inbox: queue.Queue[tuple[int, Report]],
    folder: str | None = None,
) -> subprocess.Popen[str]:
    """Start one rank, with a thread that moves its reports into `inbox`."""
    worker = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=env,
        cwd=folder,  # with -m modules are looked for there first
    )
    assert worker.stdin is not None and worker.stdout is not None
    output = worker.stdout
    json.dump(work, worker.stdin)
    worker.stdin.close()

    def pump() -> None:
        for line in output:
            if line.startswith(MARK):
                inbox.put((rank, json.loads(line.removeprefix(MARK))))

    threading.Thread(target=pump, daemon=True).start()
    return worker


def collect(
    workers: list[subprocess.Popen[str]],
    inbox: queue.Queue[tuple[int, Report]],
    on_report: Callable[[int, Report], None],
    timeout: float,
    logs: Sequence[TextIO],
) -> dict[int, Report]:
    """Pass reports on until every worker has ended well; raise at the first that has not."""
    deadline = time.monotonic() + timeout
    last: dict[int, Report] = {}
    while True:
        ended = all(worker.poll() is not None for worker in workers)
        try:
            rank, fields = inbox.get(timeout=0.2)
            last[rank] = fields
            on_report(rank, fields)
            continue
        except queue.Empty:
            pass
        for rank, worker in enumerate(workers):
            if worker.poll():
                raise WorkerError(f"rank {rank} ended with code {worker.returncode}\n{tail(logs[rank])}")
        if ended:
            break
        if time.monotonic() > deadline:
            raise WorkerError(f"no end after {timeout:.0f} s; rank 0 wrote\n{tail(logs[0])}")
    for rank in range(len(workers)):
        if rank not in last:
            raise WorkerError(f"rank {rank} reported nothing\n{tail(logs[rank])}")
    return last


def reason(error: WorkerError) -> str:
    """The line of a worker's traceback that names the exception."""
    lines = str(error).splitlines()
    named = [
        line for line in lines if re.match(r"[\w.]*(Error|Exception|Unsupported|Exit|Interrupt)\b", line)
    ]
    return (named or lines)[-1]


def tail(log: TextIO, lines: int = 30) -> str:
    log.seek(0)
    return "".join(log.readlines()[-lines:])

"""A process that looks at something and prints one line of JSON, ``FOUND ...``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

__all__ = ["found"]


def found(worker: str, *arguments: str, timeout: float = 860, **environment: str) -> Any:
    """What ``python -m tests.WORKER`` finds, on one thread.

    Raises:
        RuntimeError: with the end of its errors.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"tests.{worker}", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    if done.returncode:
        raise RuntimeError(f"tests.{worker} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND "))

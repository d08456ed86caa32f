"""The graphs of models under one hash seed: ``PYTHONHASHSEED=1 python -m tests.hash_seeds [NAMES...]``.

One line for each model: its name and a hash of the text of its Dynamo graph after recognition and of the
joint graph that each of two ranks runs. ``python -m tests.hash_seeds --sweep`` runs all models under three
seeds and says which of them differ.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

from rich.progress import track
from torch import fx, nn

import models
from spcompile import frontend
from spcompile.config import Config
from tests.proof import capture
from tests.zoo import FUNCTIONS, MODELS

SEEDS = ("0", "1", "2")
LENGTH = 33
_SHARE = 4  # models for each process of the sweep: starting one costs about as much as a small model
Builder = Callable[[], tuple[nn.Module, dict[str, Any]]]


def _own(name: str) -> Builder:
    def build() -> tuple[nn.Module, dict[str, Any]]:
        model = models.get(name)()
        return model, model.example_inputs(LENGTH)

    return build


def _other(build: Callable[[int], tuple[nn.Module, dict[str, Any]]]) -> Builder:
    return lambda: build(128)


def builders() -> dict[str, Builder]:
    """Every model of models/ and of tests/zoo.py."""
    own = {name: _own(name) for name in sorted(models.names()) if name.endswith(":tiny")}
    return own | {name: _other(build) for name, build in sorted({**MODELS, **FUNCTIONS}.items())}


def text(model: nn.Module, inputs: dict[str, Any]) -> str:
    """Dynamo's graph after recognition, and the joint graph of one of two ranks."""
    found: list[str] = []
    prepare = frontend.prepare

    def keep(gm: fx.GraphModule, config: Config) -> Any:
        result = prepare(gm, config)
        found.extend(m.code for m in gm.modules() if isinstance(m, fx.GraphModule))
        return result

    with mock.patch.object(frontend, "prepare", keep):
        local, _ = capture(model, inputs).shard(2)
    return "\n".join([*found, local.code])


def graphs(names: list[str], seed: str) -> dict[str, str]:
    """Model -> hash of its text, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.hash_seeds", *names],
        env=os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("GRAPH ")]
    return {name: digest for _, name, digest in lines}


def sweep(names: list[str]) -> tuple[dict[str, str], list[str]]:
    """What seed 0 gives each model, and the models that another seed gives another graph."""
    jobs = [(names[i : i + _SHARE], seed) for i in range(0, len(names), _SHARE) for seed in SEEDS]
    found: dict[str, dict[str, str]] = {seed: {} for seed in SEEDS}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(lambda job: (job[1], graphs(*job)), jobs)
        for seed, part in track(done, "graphs under three hash seeds", total=len(jobs)):
            found[seed] |= part
    return found["0"], [name for name in names if len({f[name] for f in found.values()}) > 1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hash_seeds", description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    known = builders()
    if arguments.sweep:
        found, differ = sweep(arguments.names or list(known))
        failed = {name: digest for name, digest in found.items() if len(digest) != 64}
        print(f"{len(found)} models under {len(SEEDS)} seeds; other graphs: {differ or 'none'}")
        print(f"not captured: {failed or 'none'}")
        return int(bool(differ))
    for name in arguments.names or known:
        try:
            model, inputs = known[name]()
            print("GRAPH", name, hashlib.sha256(text(model, inputs).encode()).hexdigest(), flush=True)
        except Exception as error:  # this model cannot be captured: that too must be so under every seed
            print("GRAPH", name, type(error).__name__, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

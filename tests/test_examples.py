"""Each file of examples/ as its docstring says to run it: the losses are those of one process in eager."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
# Run for each change: one on two ranks. Two axes are in tests/test_sharded_parameters.py; the others are
# compiled no otherwise.
ALWAYS = ("plain_loop",)


def losses(command: list[str]) -> list[float]:
    """The losses that a run prints."""
    env = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")}
    env |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(FOLDER.parent),
    }
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout + done.stderr
    return [float(x) for x in re.findall(r"^step \d+ loss (\S+)", done.stdout, re.MULTILINE)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "example",
    [pytest.param(p, id=p.stem, marks=() if p.stem in ALWAYS else pytest.mark.sweep) for p in EXAMPLES],
)
def test_the_losses_are_eagers(example: Path) -> None:
    said = re.search(
        r"^PYTHONHASHSEED=0 torchrun --nproc-per-node (\d) examples/(\S+)$", example.read_text(), re.M
    )
    assert said is not None and said[2] == example.name, "the docstring does not say how to run it"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", said[1]]
    expected, found = losses([sys.executable, str(example), "--eager"]), losses([*launch, str(example)])
    assert len(found) == 3 and len(set(found)) == 3
    # Three optimizer steps in float32.
    assert found == pytest.approx(expected, rel=1e-6)


def test_each_example_is_in_the_readme() -> None:
    text = (FOLDER.parent / "README.md").read_text()
    assert len(EXAMPLES) >= 6
    for example in EXAMPLES:
        assert f"examples/{example.name}" in text, f"README does not name {example.name}"

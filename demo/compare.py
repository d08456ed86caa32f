"""Are two loss curves equal to the noise of their dtype? And a picture of them."""

from __future__ import annotations

import csv
from pathlib import Path

# Bounds for float32.
# Before the first optimizer step both runs hold the same weights: only the order of sums differs, a few times
# the 1.2e-7 relative rounding of float32.
FIRST = 2e-6

# Each optimizer step then feeds that rounding back into the weights. Unsharded Inductor, which differs from
# eager in rounding alone, was 3e-6 away after 80 steps; one wrong token in 2048 is about 1e-3 away.
ALL = 5e-5

# In float64, rounding starts half a billion times smaller, and training has that much room to multiply it.
EXACT = 1e-9


def furthest(a: list[float], b: list[float]) -> tuple[float, int]:
    """The largest difference and its index; infinite where either is not finite."""
    gaps = [abs(x - y) if x - y == x - y else float("inf") for x, y in zip(a, b)]
    largest = max(gaps)
    return largest, gaps.index(largest)


def verdict(eager: list[float], ranks: list[list[float]], dtype: str = "float32") -> str | None:
    """Why the curves of the ranks do not equal eager's; None if they do."""
    at_first, at_all = (FIRST, ALL) if dtype == "float32" else (EXACT, EXACT)
    if any(losses != ranks[0] for losses in ranks):
        rank, losses = next((r, x) for r, x in enumerate(ranks) if x != ranks[0])
        gap, step = furthest(losses, ranks[0])
        return f"ranks 0 and {rank} differ from each other, by {gap:.1e} at step {step + 1}"
    first = abs(eager[0] - ranks[0][0]) / abs(eager[0])
    if not first <= at_first:
        return f"the first loss is off by a relative {first:.1e}; {dtype} noise is below {at_first:.0e}"
    gap, step = furthest(eager, ranks[0])
    if not gap <= at_all:
        return f"the losses differ by {gap:.1e} at step {step + 1}; {dtype} noise stays below {at_all:.0e}"
    if not eager[-1] < eager[0]:
        return f"the curves agree, but the loss did not fall: {eager[0]:.3f} to {eager[-1]:.3f}"
    return None


def praise(eager: list[float], sharded: list[float]) -> str:
    gap, step = furthest(eager, sharded)
    return (
        f"over {len(eager)} steps the losses differ by at most {gap:.1e} (step {step + 1}), float32 noise; "
        f"loss {eager[0]:.3f} -> {eager[-1]:.3f}"
    )


def save(folder: Path, eager: list[float], sharded: list[float], name: str) -> Path:
    """Write `losses.csv` and `losses.png` into `folder`; return the picture's path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    steps = range(1, len(eager) + 1)
    with (folder / "losses.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "eager", name])
        rows.writerows(zip(steps, eager, sharded))
    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=[3, 1], layout="constrained"
    )
    above.plot(steps, eager, label="eager, one process", linewidth=4, alpha=0.4)
    above.plot(steps, sharded, label=name, linewidth=1.2)
    above.set_ylabel("loss (nats per byte)")
    above.legend()
    gaps = [max(abs(a - b), 1e-9) for a, b in zip(eager, sharded)]  # zero has no place on a logarithmic axis
    below.semilogy(steps, gaps, ".", markersize=3, color="tab:red")
    below.axhline(ALL, color="grey", linewidth=0.8, linestyle="--")
    below.set_ylabel("|difference|")
    below.set_xlabel("step")
    picture = folder / "losses.png"
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return picture

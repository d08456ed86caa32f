"""Where results go: tables on the screen, CSV and PNG files in a folder."""

from __future__ import annotations

import csv
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.launch import cores
from bench.options import Row


def machine() -> str:
    """The machine in words: processor, cores in use, memory, operating system, Python and torch."""
    cpu, memory = platform.processor() or platform.machine(), ""
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal"):
            memory = f", {int(line.split()[1]) / 2**20:.0f} GiB"
    system = f"{platform.system()} {platform.machine()}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{cpu}, {cores()} cores{memory}, {system}, {versions}"


def commit(folder: str) -> str:
    """The commit of a checkout, or its folder's name where it is none."""
    asked = ["git", "-C", folder, "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return Path(folder).name


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def available_bytes() -> int | None:
    """Memory that a new process could take; None where the system does not say."""
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return None


def save_csv(path: Path, rows: list[Row], header: list[str]) -> None:
    """The rows under `header`, whose lines begin with #; a row that lacks a column leaves it empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        file.writelines(f"# {line}\n" for line in header)
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


def save_plot(path: Path, title: str, pictures: list[Any], footer: str) -> None:
    """All pictures side by side, logarithmic on both axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 2
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(11, 4 * rows), squeeze=False, layout="constrained")
    for axis, (name, label, lines) in zip(axes.flat, pictures):
        for line, (x, y) in lines.items():
            if x:
                axis.loglog(x, y, "o-", label=line, base=2)
        axis.set_title(name)
        axis.set_xlabel("T, tokens")
        axis.set_ylabel(label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=10)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.suptitle(f"{title}\n{footer}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)

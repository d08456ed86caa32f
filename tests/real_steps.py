"""A training step on real ranks, forked from the process that has the model, all short of code generation."""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from spcompile import _torch
from tests.proof import Eager, left_behind, loss_of
from tests.uncompiled import uncompiled

__all__ = ["error_on_ranks"]

# Ranks are copies of a process whose imports are done, so a step costs what its passes cost.
_FORKED = multiprocessing.get_context("fork")


def error_on_ranks(
    model: nn.Module, inputs: Mapping[str, Any], expected: Eager, ranks: int, timeout: float
) -> float:
    """The largest error of any of ``ranks`` Gloo processes, against what eager leaves behind.

    Raises:
        RuntimeError: with what a rank says that has failed.
        TimeoutError: not all have ended in ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        said: Any = _FORKED.Queue()
        given = (f"file://{folder}/store", ranks, said, lambda: _error(model, inputs, expected))
        processes = [_FORKED.Process(target=_rank, args=(r, *given), daemon=True) for r in range(ranks)]
        for process in processes:
            process.start()
        try:
            worst = max(_answers(said, ranks, time.monotonic() + timeout))
            for process in processes:
                process.join(10)
            return worst
        finally:
            for process in processes:
                process.kill()
                process.join()


def _answers(said: Any, ranks: int, until: float) -> list[float]:
    found: list[float] = []
    while len(found) < ranks:
        try:
            answer = said.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise TimeoutError(f"{ranks - len(found)} of {ranks} ranks have not ended") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        found.append(answer)
    return found


def _rank(rank: int, store: str, ranks: int, said: Any, work: Callable[[], float]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    try:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
        said.put(work())
        dist.barrier()  # nobody leaves while another still sends
    except BaseException as error:
        traceback.print_exc()
        said.put(f"rank {rank}: {type(error).__name__}: {error}")
    finally:
        said.close()
        said.join_thread()


def _error(model: nn.Module, inputs: Mapping[str, Any], expected: Eager) -> float:
    _torch.compile_fx = uncompiled  # of this process alone
    torch.compiler.reset()
    loss = loss_of(torch.compile(model, backend="spcompile")(**inputs))
    loss.backward()
    return expected.error(loss.detach(), left_behind(model, inputs))

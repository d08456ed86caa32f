"""Packed documents of linear attention: five documents in one sequence are the five by themselves."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spcompile.library.registry import substitute
from spcompile.library.table import TABLE
from tests.library_samples import SAMPLES, B, K, Sample, T, V
from tests.packed_models import LAYERS, Model
from tests.proof import capture, eager, relative_error
from tests.real_ranks import run_ranks
from tests.releases import each_change
from tests.test_library import TOLERANCE, refuses, run

# One of a single token, and one of two.
LENGTHS = [10, 1, 29, 2, 22]
ENDS = torch.tensor([0, *LENGTHS]).cumsum(0)
assert ENDS[-1] == T

ROWS = {path: how for path, row in TABLE.items() for how in ("cu_seqlens", "seq_idx") if how in row.taken}


def documents(length: int = T) -> Tensor:
    """The document of each token, [1, T]."""
    return torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS))[None, :length]


def has_states(sample: Sample) -> bool:
    given = {**sample.tensors, **sample.rest}
    names = ("initial_state", "initial_states", "output_final_state", "return_final_states", "normalize")
    return any(given.get(name) is not None and given[name] is not False for name in names)


def one_sequence(sample: Sample) -> dict[str, Tensor]:
    """The tensors of the first sequence of the batch."""
    tensors = {n: x for n, x in sample.tensors.items() if not n.startswith("initial_state")}
    return {n: x[:1] if x.dim() > 2 and x.shape[0] == B else x for n, x in tensors.items()}


def apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on each document by itself."""

    def call(**given: Any) -> Tensor:
        def has_tokens(x: Any) -> bool:
            return isinstance(x, Tensor) and x.dim() > 2 and T in x.shape

        outs = []
        for first, end in itertools.pairwise(ENDS):
            of = {
                n: x.narrow(along(x), int(first), int(end - first)) for n, x in given.items() if has_tokens(x)
            }
            out = function(**{**given, **of})
            outs.append(out[0] if isinstance(out, tuple) else out)
        return torch.cat(
            outs, along(outs[-1].new_zeros([T if n == LENGTHS[-1] else n for n in outs[-1].shape]))
        )

    return call


def first_of(function: Callable[..., Any], how: dict[str, Any], **given: Any) -> Tensor:
    """The output, without the states."""
    out = function(**given, **how)
    return out[0] if isinstance(out, tuple) else out


def along(x: Tensor) -> int:
    """The dim of the tokens."""
    return list(x.shape).index(T)


@pytest.mark.parametrize("path", ROWS)
def test_a_library_call(path: str) -> None:
    """What a row computes of packed documents is what the reference computes of each."""
    row, compared = TABLE[path], 0
    for sample in SAMPLES[path]():
        rest, tensors = dict(sample.rest), one_sequence(sample)
        if has_states(sample) and "mamba" not in path:
            continue
        assert sample.reference is not None
        how = {"cu_seqlens": ENDS} if ROWS[path] == "cu_seqlens" else {"seq_idx": documents().int()}
        reference = sample.reference
        if "mamba_split" in path:  # the reference wants a state to start from
            how |= {"initial_states": None}
            reference = functools.partial(reference, initial_states=torch.zeros(1, 4, V, K))
        first = functools.partial(first_of, substitute(row, refuses), how)
        found = run(first, Sample(tensors, rest))
        expected = run(apart(reference), Sample(tensors, rest))
        pairs = [(found[0][0], expected[0][0]), *((found[2][n], g) for n, g in expected[2].items())]
        for a, b in pairs:
            scale = max(1.0, float(b.detach().abs().max()))
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE * scale)
        compared += 1
    assert compared, path


def test_states_are_the_librarys_own() -> None:
    """Each document would have one: the call is left to the library."""
    (sample,) = [s for s in SAMPLES["fla.ops.gla.chunk.chunk_gla"]() if has_states(s)]
    with pytest.raises(AssertionError, match="fell back"):
        substitute(TABLE["fla.ops.gla.chunk.chunk_gla"], refuses)(
            **one_sequence(sample), cu_seqlens=ENDS, output_final_state=True
        )


# ---- sharded


BORDERS = {"inside": [5, 1, 7, 3, 8], "on": [6, 6, 6, 3, 3]}
BOTH = [*itertools.product(LAYERS, BORDERS)]


# For each change every layer once, and half of them with borders on the shards' own.
@pytest.mark.parametrize(("name", "where"), each_change(BOTH, [*BOTH[::4], *BOTH[3::4]]))
def test_five_documents(name: str, where: str) -> None:
    """Borders inside, on and across the shards of 24 tokens, of 1 to 4 ranks; loss and every gradient."""
    model, lengths = Model(LAYERS[name]), BORDERS[where]
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(11, (1, 24), generator=generator) for _ in range(2))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    total = torch.stack(
        [
            model(x, torch.tensor([0, x.shape[1]]), y)
            for x, y in zip(ids.split(lengths, 1), labels.split(lengths, 1), strict=True)
        ]
    ).sum()
    apart = torch.autograd.grad(total, list(model.parameters()))
    joint = capture(model, {"ids": ids, "ends": ends, "labels": labels})
    # The scan and SSD compute in float32 inside, as their libraries do.
    limit = 1e-5 if name in ("scan", "ssd") else 1e-9
    for ranks in (1, 2, 3, 4):
        loss, found = joint.run(ranks, nan_padding=True)
        assert relative_error(loss, total.detach()) <= limit
        for (weight, _), gradient in zip(model.named_parameters(), apart, strict=True):
            got = found[weight]
            assert got is not None and relative_error(got, gradient) <= limit, (ranks, weight)
    assert eager(model, {"ids": ids, "ends": ends, "labels": labels}).error(*joint.run(3)) <= limit
    assert not joint.shard(3)[1].gathers


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_real_ranks() -> None:
    """Through Inductor; the second length is symbolic."""
    for result in run_ranks("packed", 2, timeout=580):
        assert max(result["errors"]) <= 1e-9

"""Another batch, other weights, another graph: an error on every rank in that very step, and no hang."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spcompile.digest import digest, sketch
from tests.agreement_cases import FAIL, PASS
from tests.real_ranks import run_ranks


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_ranks("agreement", 2)


@pytest.mark.parametrize("name", [f.__name__ for f in PASS])
@pytest.mark.timeout(280)
def test_passes(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        assert rank[name] == ["", ""]


# What the error says, besides the ranks and a remedy.
SAYS = {
    "batch": ["argument `input_ids`, int64[2, 12], has other values", "Also: argument `labels`.", '["sp"]'],
    "batch_and_weights": ["argument `input_ids`", "broadcast"],
    "batch_later": ["argument `input_ids`"],
    "labels": ["argument `labels`, int64[2, 12], has other values"],
    "shape": ["argument `input_ids` is int64[2, 12] on rank 0, int64[2, 13] on rank 1"],
    "weights": ["parameter `embed.weight`", "Also: parameter `head.weight`", "torch.manual_seed"],
    "buffer": ["buffer `scale`, float32[8], has other values"],
    "weights_later": ["parameter `head.weight`"],
    "number": ["on rank 0, where on rank 1 it has", " * number", "agreement_cases.py"],
    "options": ["options", "regather=True"],
    "data_parallel": ["argument `", "int64[2, 12], has other values", 'mesh["sp"]'],
    "wrong_axis": ["argument `", "int64[2, 12], has other values", 'mesh["sp"]'],
    "sampler": ["argument `input_ids`", "DistributedSampler"],
}


@pytest.mark.parametrize("name", [f.__name__ for f in FAIL])
@pytest.mark.timeout(280)
def test_fails_on_every_rank(found: list[dict[str, Any]], name: str) -> None:
    assert found[0][name] == found[1][name]
    kind, text = found[0][name]
    assert kind == "RanksDisagree"
    for says in ["ranks [1] of the sequence axis run something else than rank 0", "Remedy:", *SAYS[name]]:
        assert says in text, text
    assert name == "weights" or "parameter `embed" not in text


DTYPES = (
    *(torch.bool, torch.uint8, torch.int16, torch.int64, torch.float8_e4m3fn, torch.bfloat16),
    *(torch.float32, torch.float64, torch.complex64, torch.complex128),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (3, 5), (2, 40_001)])
def test_a_digest_sees_each_entry(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0))
    for at in {0, x.numel() // 2, x.numel() - 1}:
        other = x.clone()
        other.view(-1)[at] ^= 1
        assert int(digest(x.to(dtype))) != int(digest(other.to(dtype)))


def test_a_digest_is_of_values_and_shape_alone() -> None:
    x = torch.randn(300, 400, dtype=torch.float64)
    spellings = [x.t().contiguous().t(), torch.cat([x, x], 1)[:, :400], x.clone().requires_grad_()]
    spellings.append(torch.cat([x.new_zeros(1), x.view(-1)])[1:].view(300, 400))
    assert {int(digest(y)) for y in spellings} == {int(digest(x))}
    others = [x.view(400, 300), x.t(), -x, x.flip(0), x.to(torch.float32), x.view(torch.int64)]
    assert len({int(digest(y)) for y in others}) == len(others) and int(digest(x)) not in map(digest, others)
    assert int(digest(torch.zeros(0))) != int(digest(torch.zeros(0, 1)))
    z = x[:9].to(torch.complex64)
    assert int(digest(z.conj())) == int(digest(z.conj().resolve_conj())) != int(digest(z))


def test_a_digest_sees_signs() -> None:
    """An even number of changed signs: without folding words, half of these would go unseen."""
    x = torch.randn(1000, dtype=torch.float64)
    digests = {int(digest(x))}
    for i in range(100):
        other = x.clone()
        other[[i, 999 - i]] *= -1
        digests.add(int(digest(other)))
    assert len(digests) == 101


def test_a_sketch_tells_rounding_from_other_values() -> None:
    x = torch.randn(1000)
    norm, sums = sketch(x)
    assert norm == pytest.approx(float(x.double().norm())) and len(set(sums)) == 4
    assert max(abs(a - b) for a, b in zip(sums, sketch(x * (1 + 1e-7))[1])) < 1e-5 * norm
    assert max(abs(a - b) for a, b in zip(sums, sketch(torch.randn(1000))[1])) > 1e-2 * norm

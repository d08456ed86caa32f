"""The linear strategies on P ranks simulated by threads: every variant, exact, and what each sends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spcompile.attention import algebra, reference
from spcompile.attention import fold as folds
from spcompile.attention.algebra import Summary
from spcompile.attention.variants import VARIANTS
from spcompile.kernels.linear.operands import Operands, Options
from spcompile.strategies import LINEAR, linear
from tests.test_linear_attention import MAXIMA, SCANS, scan_operands
from tests.threads import Ranks, close, shards, whole
from tests.variants import KINDS, cotangents, draw, options_of, references

RANKS = (1, 2, 3, 4, 8)
# Divisible by every P, by none, and fewer tokens than ranks; 200 has several chunks per rank.
LENGTHS = (24, 13, 5, 200)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_strategy = pytest.mark.parametrize("strategy", LINEAR)
OTHERS = [name for name in LINEAR if name != "allgather"]


def sharded(
    ranks: Ranks,
    x: Operands,
    options: Options,
    grads: tuple[Tensor, Tensor],
    strategy: str = "allgather",
) -> list[Tensor]:
    """Out, final state and gradients, put together from all ranks; NaN fills the padding."""
    start, sequence = LINEAR[strategy].load(), ranks.sequence(x.k.shape[2])
    tokens = [y is not None and y.dim() == 4 and y.shape[2] == x.k.shape[2] for y in x[:5]]
    parts = [shards(y, sequence) if cut else [y] * ranks.size for y, cut in zip(x, tokens, strict=False)]
    outs = shards(grads[0], sequence)

    def work(rank: int) -> list[Tensor | None]:
        own = Operands(*(p[rank] for p in parts), x.initial_state)
        out, final, carry = linear.forward(own, options, sequence, start)
        return [out, final, *linear.backward(outs[rank], grads[1], own, options, carry, sequence, start)]

    results = []
    cut_like = (True, False, *tokens, False)
    for name, cut, got in zip(
        ("out", "final", *x._fields), cut_like, zip(*ranks.run(work), strict=True), strict=True
    ):
        if got[0] is None:
            continue
        if cut:
            results.append(whole(list(got), sequence))
        elif name == "log_decay":
            results.append(sum(got))  # each rank's term
        else:
            assert all(torch.equal(y, got[0]) for y in got), f"{name} differs between the ranks"
            results.append(got[0])
    return results


@pytest.mark.parametrize(
    ("strategy", "length"), [*(("allgather", n) for n in LENGTHS), *((name, 13) for name in OTHERS)]
)
@pytest.mark.parametrize("size", RANKS)
@every_kind
def test_linear_is_exact(
    monkeypatch: pytest.MonkeyPatch, kind: str, size: int, strategy: str, length: int
) -> None:
    """With an initial state, and a gradient of the final one."""
    x, options = draw(KINDS[kind], 2, 2, length, 4, 6), options_of(KINDS[kind])
    grads = cotangents(x)
    got = sharded(Ranks(size, monkeypatch), x, options, grads, strategy)
    for found, wanted in zip(got, references(x, options, grads), strict=True):
        close(found, wanted)


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("size", [2, 3])
@every_strategy
@every_kind
def test_reverse(monkeypatch: pytest.MonkeyPatch, kind: str, strategy: str, size: int, initial: bool) -> None:
    x, options = draw(KINDS[kind], 1, 2, 13, 4, 6, initial=initial), options_of(KINDS[kind], reverse=True)
    grads = cotangents(x)
    got = sharded(Ranks(size, monkeypatch), x, options, grads, strategy)
    for found, wanted in zip(got, references(x, options, grads), strict=True):
        close(found, wanted)


@pytest.mark.parametrize("size", [1, 3])
@every_kind
def test_chunks_that_are_traced(monkeypatch: pytest.MonkeyPatch, kind: str, size: int) -> None:
    """The kernel and the fold of GPUs without Triton's kernels."""
    for module in ("kernels.linear.kernel.is_opaque", "strategies.linear_allgather.opaque"):
        monkeypatch.setattr(f"spcompile.{module}", lambda device: False)
    x, options = draw(KINDS[kind], 2, 2, 200, 4, 6), options_of(KINDS[kind])
    grads = cotangents(x)
    got = sharded(Ranks(size, monkeypatch), x, options, grads)
    for found, wanted in zip(got, references(x, options, grads), strict=True):
        close(found, wanted)


@pytest.mark.parametrize("length", [24, 13, 2])
@pytest.mark.parametrize("size", RANKS)
def test_without_a_mask(monkeypatch: pytest.MonkeyPatch, size: int, length: int) -> None:
    x, options = draw(VARIANTS["linear_llama3"], 2, 2, length, 4, 6, initial=False), Options(False, 0.3)
    grads = cotangents(x)
    got = sharded(Ranks(size, monkeypatch), x, options, grads)
    for found, wanted in zip(got, references(x, options, grads), strict=True):
        close(found, wanted)


@every_strategy
def test_a_gate_of_zero_on_a_rank_without_tokens(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """A constant log decay of -inf times no tokens is no decay, and not NaN."""
    x, options = draw(VARIANTS["retention"], 1, 2, 3, 4, 6), Options(True, 0.3)
    x = x._replace(log_decay=torch.tensor([-torch.inf, -0.5], dtype=torch.float64).reshape(1, 2, 1, 1))
    got = sharded(Ranks(8, monkeypatch), x, options, cotangents(x), strategy)
    for found, wanted in zip(got, references(x, options, cotangents(x)), strict=True):
        close(found, wanted)


def plain_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """LASP-2 as published: the states of the ranks before are added up as they are."""

    def fold(_: object, summaries: Summary, keep: Tensor, reverse: bool = False) -> Summary:
        basic = summaries[-1:]
        return (
            *(algebra.ALGEBRAS["affine"].neutral(a)[0] for a in summaries[:-1]),
            *algebra.fold(algebra.BASIC, basic, keep, reverse),
        )

    monkeypatch.setattr(folds, "fold", fold)


@every_kind
def test_the_plain_sum_is_wrong_under_decay(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """By how much, on 4 ranks of 8 tokens with gates of exp(-0.5) on average: tens of percent.

    Without decay it is exact, which shows that the test would see it.
    """
    x, options = draw(KINDS[kind], 1, 2, 32, 4, 6, initial=False), options_of(KINDS[kind])
    want = references(x, options, cotangents(x))
    plain_sum(monkeypatch)
    got = sharded(Ranks(4, monkeypatch), x, options, cotangents(x))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]
    print(f"{kind}: the plain sum is off by {errors[0]:.2g} (outputs), {max(errors[2:]):.2g} (gradients)")
    if KINDS[kind].algebra is algebra.BASIC:
        assert max(errors) < 1e-12
    else:
        assert errors[0] > 0.05 and max(errors[2:]) > 0.05


@pytest.mark.parametrize("length", [64, 1000])
@pytest.mark.parametrize("size", [2, 4])
@every_kind
def test_linear_collectives(monkeypatch: pytest.MonkeyPatch, kind: str, size: int, length: int) -> None:
    """One all-gather each way of (P-1) B H (K V + A) 4 bytes, whatever the length and the inputs' dtype.

    A: what the transition of a rank takes; nothing for a constant decay, which every rank knows.
    """
    b, h, k, v = 2, 3, 4, 6
    x, options = draw(KINDS[kind], b, h, length, k, v, dtype=torch.bfloat16), options_of(KINDS[kind])
    ranks = Ranks(size, monkeypatch)
    sharded(ranks, x, options, cotangents(x))
    assert ranks.log == [("all_gather", (size - 1) * b * h * KINDS[kind].elements(k, v) * 4)] * 2


@pytest.mark.parametrize("size", [2, 3, 8])
@every_kind
def test_what_goes_from_rank_to_rank(monkeypatch: pytest.MonkeyPatch, kind: str, size: int) -> None:
    """A ring P - 1 states, a scan 1 + ceil(log2(P - 1)) summaries, a pipeline P + n - 2 slices; then the last
    state to all."""
    b, h, k, v = 2, 3, 4, 6
    x, options = draw(KINDS[kind], b, h, 64, k, v, dtype=torch.bfloat16), options_of(KINDS[kind])
    state, summary = (b * h * n * 4 for n in (k * v, KINDS[kind].elements(k, v)))
    ways = {
        "ring": (state, size - 1),
        "scan": (summary, 1 + (size - 2).bit_length()),
        "pipelined": (state // 6, size + 6 - 2),
    }
    assert ways.keys() == LINEAR.keys() - {"allgather"}
    for name, (step, steps) in ways.items():
        ranks = Ranks(size, monkeypatch)
        sharded(ranks, x, options, cotangents(x), name)
        assert ranks.log == [*[("shift", step)] * steps, ("all_reduce", state)] * 2, name


def test_collectives_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(VARIANTS["linear_llama3"], 2, 3, 64, 4, 6, initial=False, dtype=torch.bfloat16)
    ranks = Ranks(3, monkeypatch)
    sharded(ranks, x, Options(False, 0.3), cotangents(x))
    assert ranks.log == [("all_reduce", 2 * 3 * 4 * 6 * 4)] * 2


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@every_kind
def test_low_precision(monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, bound: float) -> None:
    """Ratio of the RMS error to the RMS value; bfloat16 itself rounds by up to 2^-9 = 2e-3."""
    x, options = draw(KINDS[kind], 1, 2, 150, 16, 16, dtype=dtype), options_of(KINDS[kind])
    grads = cotangents(x)
    got = sharded(Ranks(3, monkeypatch), x, options, grads)
    for found, wanted in zip(got, references(x, options, grads), strict=True):
        assert (found.double() - wanted).norm() <= bound * wanted.norm()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@every_strategy
@pytest.mark.parametrize(("name", "maximum"), [*((n, False) for n in SCANS), *((n, True) for n in MAXIMA)])
def test_scan_is_exact(
    monkeypatch: pytest.MonkeyPatch, name: str, maximum: bool, strategy: str, size: int, reverse: bool
) -> None:
    """By all-gather one; the backward is another scan."""
    a, b, initial, matrix = scan_operands(name)
    ranks = Ranks(size, monkeypatch)
    sequence = ranks.sequence(b.shape[1])
    of_a = [a] * size if a is None or a.shape[1] == 1 else shards(a, sequence, 1)
    of_b = shards(b, sequence, 1)

    def work(rank: int) -> tuple[Tensor, Tensor]:
        options = dict(matrix=None if maximum else matrix, reverse=reverse, sequence=sequence)
        return linear.scan(of_a[rank], of_b[rank], initial, start=LINEAR[strategy].load(), **options)

    before, final = zip(*ranks.run(work), strict=True)
    if maximum:
        want = reference.max_scan(a, b, initial, reverse)
    else:
        want = reference.affine_scan(a, b, initial, matrix, reverse)
    close(whole(list(before), sequence, 1), want[0])
    for got in final:
        close(got, want[1])
    assert strategy != "allgather" or len(ranks.log) == (size > 1)

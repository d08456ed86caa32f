"""Arguments for every operator of the rule table: small, asymmetric, of both signs, sizes distinct where
they may be.

A new row of the table needs a sample here.
"""

from __future__ import annotations

import torch
from rule_checker import Sample as S
from torch import Tensor

from spcompile._torch import flash_attention_cpu, flash_attention_cpu_backward
from tests.variants import KINDS, cotangents, draw, options_of

aten, prims, ops = torch.ops.aten, torch.ops.prims, torch.ops.spcompile

__all__ = ["EMPTY", "POINTWISE", "RANDOM", "ROUTED", "SAMPLES", "flags", "n", "x"]

END = 2**63 - 1


def x(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers of both signs, float64."""
    generator = torch.Generator().manual_seed(seed + sum(s * 31**i for i, s in enumerate(shape)))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def n(high: int, *shape: int, seed: int = 0) -> Tensor:
    """Integers in [0, high)."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed + high))


def flags(*shape: int, seed: int = 5) -> Tensor:
    """True or false."""
    return x(*shape, seed=seed) > 0


def distinct(high: int, *shape: int) -> Tensor:
    """Indices in [0, high) of which no two along a row are the same."""
    order = torch.stack(
        [torch.randperm(high, generator=torch.Generator().manual_seed(i)) for i in range(shape[0])]
    )
    return order[:, : shape[1]]


CONTRACTIONS = [
    S(aten.mm.default, (x(6, 5), x(5, 7))),
    S(aten.bmm.default, (x(3, 6, 5), x(3, 5, 4))),
    S(aten.mv.default, (x(6, 5), x(5))),
    S(aten.dot.default, (x(6), x(6, seed=1))),
    S(aten.addmm.default, (x(7), x(6, 5), x(5, 7)), name="row"),
    S(aten.addmm.default, (x(6, 7), x(6, 5), x(5, 7)), dict(alpha=2, beta=-3), name="scaled"),
    S(aten.addmm.default, (x(6, 1), x(6, 5), x(5, 7)), name="column"),
    S(aten.baddbmm.default, (x(3, 6, 1), x(3, 6, 5), x(3, 5, 4)), name="columns"),
    S(aten.baddbmm.default, (x(4), x(3, 6, 5), x(3, 5, 4)), dict(beta=2), name="row"),
]

VIEWS = [
    S(aten.view.default, (x(4, 6, 5), [24, 5]), name="merge"),
    S(aten.view.default, (x(24, 5), [4, 6, 5]), name="split"),
    S(aten.view.default, (x(24, 5), [2, 6, 2, 5]), name="split in three"),
    S(aten.view.default, (x(4, 6), [3, 8]), name="cut"),
    S(aten.view.default, (x(4, 6, 5), [1, 4, 1, 30]), name="ones"),
    S(aten._unsafe_view.default, (x(24, 5), [4, 6, 5])),
    S(aten.reshape.default, (x(6, 4, 5), [6, -1])),
    S(aten.squeeze.dim, (x(6, 1, 5), 1)),
    S(aten.squeeze.dims, (x(6, 1, 5, 1), [1, -1])),
    S(aten.squeeze.default, (x(6, 1, 5),)),
    S(aten.unsqueeze.default, (x(6, 5), -2)),
    S(aten.permute.default, (x(4, 6, 5), [2, 0, -2])),
    S(aten.expand.default, (x(4, 1, 5), [3, 4, 6, -1])),
    S(aten.expand.default, (x(5), [6, 5]), name="rows"),
    S(aten.repeat.default, (x(4, 6), [1, 3, 1]), name="middle"),
    S(aten.repeat.default, (x(4, 6), [2, 1]), name="first"),
    S(aten.select.int, (x(6, 5, 4), 1, -2)),
    S(aten.select.int, (x(6, 5), 0, 0), name="the first"),
    S(aten.unbind.int, (x(6, 3, 4), 1)),
    S(aten.select_scatter.default, (x(6, 5, 4), x(6, 4), 1, 3)),
    S(aten.slice.Tensor, (x(4, 8, 5), 1, 2, 7)),
    S(aten.slice.Tensor, (x(4, 8), -1, 0, -1), name="but the last"),
    S(aten.slice.Tensor, (x(4, 8), 1, -5, END), name="the last five"),
    S(aten.slice.Tensor, (x(4, 8), 1, 0, END), name="all"),
    S(aten.slice.Tensor, (x(4, 8), 1, 1, 8, 3), name="steps"),
    S(aten.slice.Tensor, (x(4, 8), 1, -1, END), name="the last"),
    S(aten.slice_scatter.default, (x(4, 8, 5), x(4, 3, 5), 1, 2, 5)),
    S(aten.slice_scatter.default, (x(8, 4), x(7, 4), 0, 1, END), name="but the first"),
    S(aten.slice_scatter.default, (x(6, 4), x(6, 4, seed=1), 0, 0, END), name="all"),
    S(aten.slice_scatter.default, (x(8, 5), x(4, 5), 0, 0, 8, 2), name="steps"),
    S(aten.constant_pad_nd.default, (x(4, 6), [0, 0, 1, 2]), name="zeros"),
    S(aten.constant_pad_nd.default, (x(4, 6, 5), [2, 0, 1, 0], 1.5), name="two dims"),
    S(aten.constant_pad_nd.default, (x(4, 6), [1, -1], 0.5), name="shift right"),
    S(aten.constant_pad_nd.default, (x(4, 6), [-1, 1]), name="shift left"),
    S(aten.constant_pad_nd.default, (n(9, 4, 6), [0, 1], -100), name="labels"),
    S(aten.cat.default, ([x(4, 6), x(4, 5)], 1)),
    S(aten.cat.default, ([x(2, 4), n(9, 1, 4), x(5, 4)],), name="three, one of integers"),
    S(aten.cat.default, ([torch.zeros(0, dtype=torch.float64), x(4, 6), x(3, 6)],), name="with an empty one"),
    S(aten.flip.default, (x(4, 6, 5), [1, -1]), exchanges=True),
    S(prims.rev.default, (x(4, 6), [1]), exchanges=True),
    S(aten.view_as_complex.default, (x(4, 6, 2),)),
    S(aten.view_as_real.default, (torch.complex(x(4, 6), x(4, 6, seed=1)),)),
]

REDUCTIONS = [
    S(aten.sum.default, (x(4, 6),)),
    S(aten.sum.default, (n(9, 4, 6),), name="integers"),
    S(aten.sum.dim_IntList, (x(4, 6, 5), [0, -1])),
    S(aten.sum.dim_IntList, (x(4, 6), [1], True), name="kept"),
    S(aten.sum.dim_IntList, (flags(4, 6), [1]), name="flags"),
    S(aten.sum.dim_IntList, (x(4, 6), []), name="all"),
    S(aten.mean.default, (x(4, 6),)),
    S(aten.mean.dim, (x(4, 7, 5), [1])),
    S(aten.mean.dim, (x(4, 7, 5), [-1, 1], True), name="kept"),
    S(aten.amax.default, (x(4, 6), [1])),
    S(aten.amax.default, (n(9, 4, 6) - 20, [0], True), name="integers"),
    S(aten.amax.default, (flags(4, 6), [1]), name="flags"),
    S(aten.amin.default, (x(4, 6),), name="all"),
    S(aten.amin.default, (n(9, 4, 6) + 20, [0]), name="integers"),
    S(aten.prod.default, (x(2, 3),)),
    S(aten.prod.dim_int, (x(4, 6), 1)),
    S(aten.max.default, (x(4, 6) - 9,)),
    S(aten.min.default, (x(4, 6) + 9,)),
    S(aten.any.default, (torch.zeros(4, 6) > 0,)),
    S(aten.any.dim, (flags(4, 6), 1)),
    S(aten.any.dims, ((x(4, 6, 5) > 1.2).double(), [0, 2]), name="numbers"),
    S(aten.all.default, (torch.zeros(4, 6) == 0,)),
    S(aten.all.dim, (x(4, 6) > -1, 0, True)),
    S(aten.all.dims, ((x(4, 6, 5) > -1.5).double(), [1]), name="numbers"),
    S(aten.var.correction, (x(4, 6), [1]), exchanges=True),
    S(aten.var.correction, (x(4, 6),), exchanges=True, name="all"),
    S(aten.var.correction, (x(3, 7, 2) + 1e3, [1]), dict(keepdim=True), exchanges=True, name="far from zero"),
    S(aten.var_mean.correction, (x(4, 6), [1]), dict(correction=0, keepdim=True), exchanges=True),
    S(aten.max.dim, (x(4, 6), 1)),
    S(aten.min.dim, (x(4, 6), 0, True)),
    S(aten.argmax.default, (x(4, 6), -1)),
    S(aten.argmin.default, (x(4, 6, seed=3),), name="all"),
    S(aten.argmin.default, (x(4, 6), 0, True), name="kept"),
    S(aten.cumsum.default, (x(4, 6, 5), 1), exchanges=True),
    S(aten.cumsum.default, (n(9, 7), -1), exchanges=True, name="positions"),
    S(aten.cumsum.default, (n(9, 6, 5), 0), dict(dtype=torch.float64), exchanges=True, name="cast"),
    S(aten.masked_scatter.default, (x(4, 6, 5), flags(4, 6, 5), x(13, 9)), exchanges=True),
    S(aten.masked_scatter.default, (x(6, 5), flags(6, 1), x(31)), exchanges=True, name="rows"),
    S(aten.masked_scatter_backward.default, (x(4, 6, 5), flags(4, 6, 5), [13, 9]), exchanges=True),
    S(ops.reverse_cumsum.default, (x(6, 5), 0), exchanges=True, name="first"),
    S(ops.reverse_cumsum.default, (x(4, 6, 5), 1), exchanges=True),
    S(aten.cumprod.default, (x(4, 6), 1)),
    S(aten.glu.default, (x(4, 6, 5), 1)),
    S(aten.glu.default, (x(4, 6),), name="last"),
    S(aten.glu_backward.default, (x(4, 3, 5), x(4, 6, 5), 1)),
    S(aten.logcumsumexp.default, (x(4, 6), 1)),
    S(aten.cummax.default, (x(4, 6), 1)),
    S(aten.cummin.default, (x(4, 6), 0)),
    S(aten.topk.default, (x(4, 6), 3)),
    S(aten.topk.default, (x(7, 5), 2, 0), name="rows"),
    S(aten.sort.default, (x(4, 6), 0)),
    S(aten.histc.default, (x(4, 6), 5, -1, 1)),
    S(aten.sort.stable, (x(4, 6),), dict(stable=True, dim=1, descending=True)),
    S(aten._softmax.default, (x(4, 6), 1, False)),
    S(aten._log_softmax.default, (x(4, 6), -2, False)),
]

INDEXING = [
    S(aten.embedding.default, (x(9, 4), n(9, 5, 6))),
    S(aten.gather.default, (x(4, 6, 5), 1, n(6, 4, 7, 5))),
    S(aten.gather.default, (x(7, 6), -1, n(6, 5, 3)), name="fewer rows"),
    S(aten.gather.default, (x(4, 9, 5), 1, n(9, 4, 1, 5)), name="one of each row"),
    S(aten.scatter.value, (x(4, 6), 1, distinct(6, 4, 3), -0.1)),
    S(aten.scatter.value, (x(7, 6), 1, distinct(6, 4, 3), -0.1), name="fewer rows"),
    S(aten.scatter.src, (x(4, 6), 1, distinct(6, 4, 3), x(4, 3))),
    S(aten.scatter.src, (x(4, 6), 1, distinct(6, 4, 3), x(5, 7)), name="larger source"),
    S(aten.scatter.reduce, (x(4, 6), 1, n(6, 4, 7), x(4, 7)), dict(reduce="multiply")),
    S(aten.scatter.value_reduce, (x(4, 6), 1, n(6, 4, 7), 2.0), dict(reduce="add")),
    S(aten.scatter_reduce.two, (x(4, 6), 1, n(6, 4, 7), x(4, 7), "amax"), dict(include_self=False)),
    S(aten.scatter_add.default, (x(4, 6), 1, n(6, 4, 7), x(4, 7))),
    S(aten.scatter_add.default, (x(8, 5), 0, n(8, 7, 5), x(7, 5)), name="rows"),
    S(aten.scatter_add.default, (x(8, 5), 0, n(8, 6, 4), x(7, 6)), name="larger source"),
    S(aten.bucketize.Tensor, (x(4, 6), x(5).sort()[0])),
    S(aten.searchsorted.Tensor, (x(5).sort()[0], x(4, 6))),
    S(aten.searchsorted.Tensor, (x(4, 5).sort()[0], x(4, 6)), dict(right=True), name="rows"),
    S(aten.index.Tensor, (x(9, 4), [n(9, 5, 6)])),
    S(aten.index.Tensor, (x(4, 9, 5), [None, n(9, 7)]), name="second"),
    S(aten.index.Tensor, (x(4, 9, 5), [n(4, 6), None, n(5, 6)]), name="apart"),
    S(aten.index.Tensor, (x(4, 9, 5), [n(4, 4), n(9, 4) - 9]), name="one of each row"),
    S(aten.index.Tensor, (x(9, 4, 5), [n(9, 3), None, n(5, 2, 1)]), name="few, apart"),
    S(aten.index.Tensor, (x(4, 9, 5), [None, n(9, 6, 1), n(5, 7)]), name="outer"),
    S(aten.index_put.default, (x(7, 4), [distinct(7, 1, 5)[0]], x(5, 4))),
    S(aten.index_put.default, (x(4, 7), [None, distinct(7, 1, 5)[0]], x()), name="a number"),
    S(aten.index_put.default, (x(7, 4), [n(7, 5, 6)], x(5, 6, 4), True), name="sum"),
    S(aten.index_put.default, (x(4, 7, 5), [n(4, 3), n(7, 3) - 7], x(3, 5), True), name="sum of one each"),
    S(aten.index_put.default, (x(7, 4), [n(7, 6)], x(4), True), name="sum of one row"),
    S(aten.index_put.default, (x(4, 7, 5), [n(4, 6), n(7, 6)], x(6, 1), True), name="sum of numbers"),
    S(aten.index_put.default, (x(4, 7, 5), [None, n(7, 6)], x(4, 6, 5), True), name="sum, second"),
    S(
        aten._unsafe_masked_index_put_accumulate.default,
        (x(7, 4), flags(5, 6).unsqueeze(-1), [n(7, 5, 6)], x(5, 6, 4)),
    ),
]

CREATION = [
    S(aten.full.default, ([4, 6], 2.5), dict(dtype=torch.float64)),
    S(
        prims.iota.default,
        (7,),
        dict(start=3, step=-2, dtype=torch.int64, device=torch.device("cpu"), requires_grad=False),
    ),
    S(
        prims.iota.default,
        (12,),
        dict(start=0, step=1, dtype=torch.int32, device=torch.device("cpu"), requires_grad=False),
        name="int32",
    ),
]

# What comes of these is not told by their arguments: tests/test_rules.py has a test of its own for them.
# Sharded in the order of a sort alone: tests/test_routing.py proves it.
ROUTED = [
    S(
        aten._grouped_mm.default,
        (x(7, 4).float(), x(3, 4, 8).float(), torch.tensor([2, 5, 7], dtype=torch.int32)),
    )
]
EMPTY = [S(aten.new_empty_strided.default, (x(4, 6), [4, 6], [1, 4]))]
RANDOM = [S(aten.rand.default, ([4, 6],)), S(aten.randn.default, ([4, 6],), dict(dtype=torch.float64))]

_q, _k, _v = x(2, 3, 7, 4), x(2, 3, 5, 4), x(2, 3, 5, 4, seed=1)
_long_k, _long_v = x(2, 3, 7, 4, seed=2), x(2, 3, 7, 4, seed=3)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, name: str) -> list[S]:
    options = dict(attn_mask=mask, scale=0.7)
    out, lse = flash_attention_cpu(q, k, v, 0.0, causal, **options)
    grad = x(*out.shape, seed=9)
    return [
        S(flash_attention_cpu, (q, k, v, 0.0, causal), options, name, trusting=True, tolerance=1e-10),
        S(
            flash_attention_cpu_backward,
            (grad, q, k, v, out, lse, 0.0, causal),
            options,
            name,
            trusting=True,
            tolerance=1e-10,
        ),
    ]


def _convolution(name: str, bias: bool = False, kernel: int = 3, groups: int = 6, **options: int) -> list[S]:
    """A convolution of [4, 6, 9] and its backward, with the gradients that the forward has operands for."""
    stride, padding, dilation = (
        options.get(o, d) for o, d in (("stride", 1), ("padding", 0), ("dilation", 1))
    )
    rest = ([stride], [padding], [dilation], False, [0], groups)
    signal, weight = x(4, 6, 9), x(6, 6 // groups, kernel)
    forward = S(
        aten.convolution.default, (signal, weight, x(6) if bias else None, *rest), name=name, tolerance=1e-10
    )
    gradient = x(*forward.call().outputs[0].shape, seed=4)
    args = (gradient, signal, weight, [6] if bias else None, *rest, [True, True, bias])
    backward = S(aten.convolution_backward.default, args, name=name, tolerance=1e-10)
    forward.exchanges = backward.exchanges = True
    return [forward, backward]


_CONVOLUTIONS = [
    *_convolution("causal", True, padding=2),
    *_convolution("causal, wide", kernel=5, padding=4),
    *_convolution("padded before", kernel=4),
    *_convolution("centred", True, padding=1),
    *_convolution("dilated", padding=4, dilation=2),
    *_convolution("a wide margin", padding=3),
    *_convolution("of one token", kernel=1),
    *_convolution("of two tokens", True, kernel=2),
    *_convolution("mixing channels", True, groups=1, padding=2),
    *_convolution("in steps", True, groups=1, stride=2, padding=1),
    *_convolution("in steps, without padding", kernel=2, stride=2),
    *_convolution("in steps, dilated", kernel=2, stride=2, padding=1, dilation=2),
    S(
        aten.convolution.default,
        (x(4, 6, 3, 9), x(6, 1, 2, 3), None, [1, 1], [0, 2], [1, 1], False, [0, 0], 6),
        name="of an image",
        tolerance=1e-10,
    ),
    S(
        aten.convolution.default,
        (x(4, 6, 9), x(6, 1, 3), None, [1], [2], [1], True, [0], 6),
        name="transposed",
        tolerance=1e-10,
    ),
]


_UNFOLDED = [
    S(aten.unfold.default, (x(*shape), dim, size, step), name=name, exchanges=size > 1)
    for name, shape, dim, size, step in [
        ("windows of three", (2, 12, 3), 1, 3, 1),
        ("in steps", (2, 12, 3), -2, 4, 2),
        ("side by side", (2, 12, 3), 1, 2, 2),
        ("with gaps", (12, 2, 3), 0, 1, 2),
    ]
]


def _pool(name: str, shape: tuple[int, ...], *options: object, exchanges: bool = True) -> list[S]:
    """A mean over neighbours and its backward."""
    forward = S(aten.avg_pool2d.default, (x(*shape), *options), name=name, tolerance=1e-10)
    full = [*options, *([], 0, False, True, None)[len(options) - 1 :]]
    gradient = x(*forward.call().outputs[0].shape, seed=4)
    args = (gradient, x(*shape), *full)
    backward = S(aten.avg_pool2d_backward.default, args, name=name, tolerance=1e-10)
    forward.exchanges = backward.exchanges = exchanges
    return [forward, backward]


_POOLS = [
    *_pool("centred", (4, 3, 1, 9), [1, 3], [1, 1], [0, 1]),
    *_pool("not padded, along the other dim", (4, 3, 9, 2), [4, 1], [1, 1], [0, 0]),
    *_pool("wide, with a divisor", (4, 1, 9), [1, 5], [1, 1], [0, 2], False, True, 3),
    *_pool("edges counted apart", (4, 3, 1, 9), [1, 3], [1, 1], [0, 1], False, False, exchanges=False),
    *_pool("in steps", (4, 3, 1, 9), [1, 3]),
    *_pool("in overlapping steps", (4, 3, 1, 12), [1, 4], [1, 2], [0, 1]),
    *_pool("in steps that leave some out", (4, 3, 12, 2), [1, 1], [2, 1], [0, 0], exchanges=False),
    *_pool("of both dims", (4, 3, 4, 9), [3, 3], [1, 1], [1, 1], exchanges=False),
]

KERNELS = [
    *_POOLS,
    *_UNFOLDED,
    *_flash(_q, _k, _v, False, None, "cross"),
    *_flash(_long_k, _q, _long_v, True, None, "causal"),
    *_flash(_q, _k, _v, False, x(7, 5), "mask"),
    *_flash(_q, _k, _v, False, x(2, 1, 1, 5), "padding mask"),
    *_CONVOLUTIONS,
]


def _linear_family() -> list[S]:
    """Every kind of operands of linear attention, in both orders, and of a scan."""
    found = []
    for n, (name, variant) in enumerate(KINDS.items()):
        of = draw(variant, 2, 3, 7, 4, 5, initial=n % 2 == 0)
        grad, final = cotangents(of)
        for reverse in (False, True) if name == "gla" else (False,):
            label, options = f"{name}, reverse" if reverse else name, options_of(variant, reverse)
            found += [
                S(ops.linear_attention.default, (*of, *options), name=label),
                S(
                    ops.linear_attention_backward.default,
                    (grad, final, *of, ops.linear_attention(*of, *options)[1], *options),
                    name=label,
                ),
            ]
    for name, (shape, of_b, matrix) in SCANS.items():
        a = None if shape is None else x(*shape) / 2
        for reverse in (False, True) if matrix else (False,):
            label = f"{name}, reverse" if reverse else name
            b, initial = x(*of_b), x(*of_b[:-3], *of_b[-2:])
            found.append(S(ops.affine_scan.default, (a, b, initial, matrix, reverse), name=label))
            if not matrix or reverse:
                factor = None if matrix else a
                found.append(S(ops.max_scan.default, (factor, b, initial, reverse), name=label))
    for sample in found:
        sample.exchanges, sample.trusting, sample.tolerance = True, True, 1e-10
    return found


# a, b and whether a is a matrix
SCANS = {
    "sum": (None, (2, 7, 3, 4), False),
    "elementwise": ((2, 7, 3, 4), (2, 7, 3, 4), False),
    "broadcast": ((2, 7, 3, 1), (2, 7, 3, 4), False),
    "constant": ((1, 1, 3, 1), (2, 7, 3, 4), False),
    "matrix": ((2, 7, 3, 3), (2, 7, 3, 4), True),
}


def _attention() -> list[S]:
    found = []
    for causal in (True, False):
        q, k, v, grad = (x(2, 3, 7, size, seed=i) for i, size in enumerate((4, 4, 5, 5)))
        of, name = (q, k, v, None, None, None), "causal" if causal else "all"
        out, lse = ops.softmax_attention(q, k, v, None, causal, 0.7)
        found += [
            S(ops.linear_attention.default, (*of, causal, 0.7), name=name),
            S(
                ops.linear_attention_backward.default,
                (grad, None, *of, ops.linear_attention(*of, causal, 0.7)[1], causal, 0.7),
                name=name,
            ),
            S(ops.softmax_attention.default, (q, k, v, None, causal, 0.7), name=name),
            S(
                ops.softmax_attention_backward.default,
                (grad, q, k, v, None, out, lse, causal, 0.7),
                name=name,
            ),
        ]
    q, k, v, grad, final = x(2, 3, 7, 4), x(2, 3, 9, 4, seed=1), x(2, 3, 9, 5), x(2, 3, 7, 5), x(2, 3, 4, 5)
    of, options = (q, k, v, None, None, None), (False, 0.7)
    state = ops.linear_attention(*of, *options)[1]
    backward = ops.linear_attention_backward.default
    found += [
        S(ops.linear_attention.default, (*of, *options), name="cross"),
        S(backward, (grad, None, *of, state, *options), name="cross"),
        S(backward, (grad, final, *of, state, *options), name="cross, final"),
    ]
    q, k, v, mask = x(2, 6, 7, 4), x(2, 3, 5, 4), x(2, 3, 5, 8), x(7, 5)
    out, lse = ops.softmax_attention(q, k, v, mask, False, 0.7)
    found += [
        S(ops.softmax_attention.default, (q, k, v, mask, False, 0.7), name="cross, grouped, masked"),
        S(
            ops.softmax_attention_backward.default,
            (x(2, 6, 7, 8), q, k, v, mask, out, lse, False, 0.7),
            name="cross, grouped, masked",
        ),
    ]
    q, k, v, grad = (x(2, 3, 7, size, seed=i) for i, size in enumerate((4, 4, 5, 5)))
    for name, more in {"window": (True, 0.7, 2), "window, cap, sinks": (False, 0.7, 3, 1.5, x(3))}.items():
        out, lse = ops.softmax_attention(q, k, v, None, *more)
        backward = (grad, q, k, v, None, out, lse, *more)
        found += [
            S(ops.softmax_attention.default, (q, k, v, None, *more), name=name),
            S(ops.softmax_attention_backward.default, backward, name=name),
        ]
    ids = torch.tensor([[0, 0, 1, 1, 1, 1, 2], [3, 4, 4, 4, 4, 4, 4]])
    for name, of in {"documents": ids, "documents alike": ids[:1]}.items():
        more = (name == "documents", 0.7, None, None, None, of)
        out, lse = ops.softmax_attention(q, k, v, None, *more)
        found += [
            S(ops.softmax_attention.default, (q, k, v, None, *more), name=name),
            S(ops.softmax_attention_backward.default, (grad, q, k, v, None, out, lse, *more), name=name),
        ]
    for name, of in {"prefixes": ids - 1, "prefixes alike": ids[:1]}.items():
        more = (True, 0.7, 2 if name == "prefixes" else None, None, None, None, None, of)
        out, lse = ops.softmax_attention(q, k, v, None, *more)
        found += [
            S(ops.softmax_attention.default, (q, k, v, None, *more), name=name),
            S(ops.softmax_attention_backward.default, (grad, q, k, v, None, out, lse, *more), name=name),
        ]
    for name, of in {"relative": x(3, 13), "relative alike": x(1, 17)}.items():
        more = (name == "relative", 0.7, None, None, None, None, of)
        out, lse = ops.softmax_attention(q, k, v, None, *more)
        back = (grad, q, k, v, None, out, lse, *more)
        found += [
            S(ops.softmax_attention.default, (q, k, v, None, *more), name=name),
            S(ops.softmax_attention_backward.default, back, name=name),
            S(ops.softmax_attention_relative_backward.default, back, name=name),
        ]
    for sample in found:
        sample.exchanges, sample.trusting, sample.tolerance = True, True, 1e-10
    return found


SAMPLES = [*CONTRACTIONS, *VIEWS, *REDUCTIONS, *INDEXING, *CREATION, *KERNELS]
SAMPLES += [*_attention(), *_linear_family()]

_a, _b, _row, _column = x(4, 6), x(4, 6, seed=1), x(6), x(4, 1)
_i, _j = n(9, 4, 6), n(9, 6) + 1
_f, _g = flags(4, 6), flags(6)
_positive, _unit = _a.abs() + 0.5, torch.sigmoid(_a)

POINTWISE = [
    *(
        S(getattr(aten, op).Tensor, (_a, other))
        for op in ("add", "sub", "mul", "div")
        for other in (_b, _row, _column, 3.0)
    ),
    S(aten.add.Tensor, (_a, _b), dict(alpha=-2), "scaled"),
    S(aten.sub.Tensor, (_row, _b), dict(alpha=2), "scaled"),
    S(aten.mul.Tensor, (_i, _j), name="integers"),
    S(aten.mul.Tensor, (_a, _f), name="masked"),
    S(aten.mul.Scalar, (_a, -2.0)),
    S(aten.div.Scalar, (_a, -2.0)),
    S(aten.div.Tensor, (_i, _j), name="integers", tolerance=1e-6),
    S(aten.div.Tensor_mode, (_i, _j), dict(rounding_mode="floor")),
    S(aten.rsub.Scalar, (_a, 2.0)),
    *(
        S(getattr(aten, op).default, (_a,))
        for op in [
            "neg",
            "abs",
            "sign",
            "exp",
            "expm1",
            "sin",
            "cos",
            "tanh",
            "sigmoid",
            "silu",
            "gelu",
            "relu",
            "erf",
            "floor",
            "ceil",
            "round",
            "trunc",
            "square",
            "atan",
            "isnan",
            "isinf",
            "logical_not",
            "softplus",
            "leaky_relu",
            "elu",
            "hardtanh",
        ]
        if hasattr(aten, op)
    ),
    *(
        S(getattr(aten, op).default, (_positive,))
        for op in ["log", "log2", "log1p", "sqrt", "rsqrt", "reciprocal", "lgamma"]
    ),
    *(S(getattr(aten, op).default, (_unit,)) for op in ("asin", "atanh", "erfinv", "logit")),
    S(aten.pow.Tensor_Scalar, (_a, 3)),
    S(aten.pow.Tensor_Tensor, (_positive, _b)),
    S(aten.pow.Scalar, (2.0, _a)),
    S(aten.maximum.default, (_a, _row)),
    S(aten.minimum.default, (_a, _column)),
    S(aten.fmod.Tensor, (_a, _positive)),
    S(aten.remainder.Scalar, (_i, 4)),
    S(aten.atan2.default, (_a, _b)),
    S(aten.clamp.default, (_a, -0.5, 0.5)),
    S(aten.clamp.Tensor, (_a, -_positive)),
    S(aten.clamp_min.default, (_a, 0.1)),
    S(aten.where.self, (_f, _a, _row)),
    *(S(getattr(aten, op).Tensor, (_a, _column)) for op in ("eq", "ne", "lt", "le", "gt", "ge")),
    S(aten.eq.Scalar, (_i, 3)),
    S(aten.lt.Scalar, (_i, 3)),
    S(aten.logical_and.default, (_f, _g)),
    S(aten.bitwise_and.Tensor, (_f, _g)),
    S(aten.bitwise_or.Tensor, (_i, _j)),
    S(aten.bitwise_xor.Tensor, (_i, _j)),
    S(aten.bitwise_not.default, (_f,)),
    S(aten.masked_fill.Scalar, (_a, _f, -3.0)),
    S(aten.lerp.Scalar, (_a, _row, 0.3)),
    S(aten.addcmul.default, (_a, _row, _column)),
    S(aten.threshold_backward.default, (_a, _b, 0)),
    S(aten.tanh_backward.default, (_a, _b)),
    S(aten.sigmoid_backward.default, (_a, _b)),
    S(aten.silu_backward.default, (_a, _b)),
    S(aten.gelu_backward.default, (_a, _b)),
    S(aten.clone.default, (_a,)),
    S(aten.alias.default, (_a,)),
    S(aten.lift_fresh_copy.default, (_a,)),
    S(aten._to_copy.default, (_a,), dict(dtype=torch.float32)),
    S(aten.copy.default, (_a, _row)),
    S(aten.complex.default, (_a, _row)),
    S(aten.polar.default, (_positive, _column)),
    S(prims.convert_element_type.default, (_a, torch.float32), name="narrow"),
    S(prims.convert_element_type.default, (x(4, 6).float(), torch.float64), name="widen", tolerance=1e-6),
    S(prims.convert_element_type.default, (_a * 5, torch.int64), name="to integers"),
    *([S(prims.fma.default, (_a, _b, _a))] if hasattr(prims, "fma") else []),
]

"""One spelling of every operation, made where the shadow makes a Value.

PyTorch has many names for one thing (`x.mT`, `transpose`, `movedim`; `1 - x` is `rsub`; a layer is `linear`,
`addmm` or `matmul`), and recognizers must know them all or read one. They read these:

    add(self, other, alpha)  mul  div     sub, rsub, neg, addcmul, addcdiv, lerp; the ends of addmm, linear
    einsum                                matmul, mm, bmm, mv, dot, outer, tensordot, linear, addmm, baddbmm
    where(condition, self, other)         masked_fill, tril, triu, index_put of one number under a mask
    reshape  permute  expand              view, flatten, unsqueeze; t, mT, movedim; expand_as, broadcast_to
    slice  select                         narrow, and an item of split, chunk and unbind
    clone  _to_copy                       contiguous, alias, dropout that drops nothing; to, type_as
    full  literal  arange                 zeros_like, new_ones, fill; a tensor of one number
    sum  cumsum  cat  softmax  flip       with dims that are counted from the front

What is canonical is itself a call of ATen, with the same results up to rounding, so that whoever runs a Value
again (the loops do) need not know how it was spelled. Values on the way, such as the product in `addmm`, are
*derived*: no node of any graph holds them.
"""

from __future__ import annotations

from dataclasses import replace

from spcompile.passes.shadow.spelling import arithmetic, views
from spcompile.passes.shadow.spelling.call import Call, Derive, by_schema, target_of

__all__ = ["Call", "by_schema", "canonical", "target_of"]

_REWRITES = arithmetic.REWRITES | views.REWRITES


def canonical(call: Call, derive: Derive) -> Call:
    """The same result in the one spelling that is read."""
    name = arithmetic.SYNONYMS.get(call.name, call.name)
    call = replace(call, name=name)
    rewrite = _REWRITES.get(name)
    return call if rewrite is None or call.dtype is None else rewrite(call, derive) or call

"""Which of three equal forms of a rotated linear map is the cheapest.

A rotation R = I - U M of rank r changes `y = x Wᵀ` in one of three ways (n rows, W is out x in):

    input    y = (x Rᵀ) Wᵀ                  rotate the rows, then run the layer
    output   y = x Wᵀ - (x Mᵀ) (W U)ᵀ       run the layer, then add
    weight   y = x (W R)ᵀ                    rotate the weight; its gradient is as large as the weight

Flops of a training step beyond the frozen layer's own (a product of m x k and k x l counts 2 m k l):

    input    12 n in r,  and 2 n in out if x itself needs no gradient: rotated rows always need one
    output   6 n r (in + out) + 4 in out r  (4 n r in + ... if x needs no gradient)
    weight   12 in out r + 2 n in out

At inference U and W are constants: W U is computed once and kept, so that `output` costs 2 n r (in + out),
`input` 4 n in r, and `weight` 4 in out r.

Thin products are bound by memory, so numbers count as well: `input` writes the rotated rows to fresh memory
(n in numbers), `weight` the rotated weight, in training with its gradient, and `output` adds in place. A number
written and read again is priced at 100 flops: two CPU cores do 300 Gflop/s and move 12 GB/s, less into fresh pages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Form = Literal["input", "output", "weight"]

FLOPS_PER_NUMBER = 100


def flops(form: Form, n: int, n_in: int, n_out: int, r: int, training: bool, input_grad: bool) -> int:
    """Flops that the form costs beyond the frozen layer's own; see the table above."""
    if form == "input":
        step = 12 * n * n_in * r if input_grad else 10 * n * n_in * r + 2 * n * n_in * n_out
        return step if training else 4 * n * n_in * r
    if form == "output":
        step = (6 if input_grad else 4) * n * r * n_in + 6 * n * r * n_out + 4 * n_in * n_out * r
        return step if training else 2 * n * r * (n_in + n_out)
    return 12 * n_in * n_out * r + 2 * n * n_in * n_out if training else 4 * n_in * n_out * r


def numbers(form: Form, n: int, n_in: int, n_out: int, training: bool) -> int:
    """Numbers that the form writes to memory of its own and reads again, of the size of the rows or the weight."""
    if form == "weight":
        return (2 if training else 1) * n_in * n_out
    return n * n_in if form == "input" else 0


def cheapest(
    forms: Iterable[Form], n: int, n_in: int, n_out: int, r: int, training: bool = True, input_grad: bool = True
) -> Form:
    """The form with the least cost, flops and priced numbers; the first of `forms` where several cost the same."""
    best: tuple[int, Form] | None = None
    for form in forms:  # not min(..., key=...), which some versions of torch.compile do not trace
        moved = FLOPS_PER_NUMBER * numbers(form, n, n_in, n_out, training)
        cost = flops(form, n, n_in, n_out, r, training, input_grad) + moved
        if best is None or cost < best[0]:
            best = cost, form
    assert best is not None
    return best[1]

"""Which of several equal forms of a changed linear map is the cheapest.

A rotation R = I - U M of rank r changes `y = x Wᵀ` in one of five ways (n rows, W is out x in):

    input    y = (x Rᵀ) Wᵀ                  rotate the rows, then run the layer
    through  y = x Wᵀ - (x Mᵀ) (W U)ᵀ       run the layer, then add; gradients of U come from those of the rows
    output   the same                       where the layer is no plain `x Wᵀ`, and W U has a gradient of its own
    inside   y = x (W - (W U) M)ᵀ           form the weight, in forward and again in backward; gradients stay thin
    weight   y = x (W R)ᵀ                   rotate the weight; its gradient is as large as the weight

Flops of a training step beyond the frozen layer's own (a product of m x k and k x l counts 2 m k l):

    input    12 n in r,  and 2 n in out if x itself needs no gradient: rotated rows always need one
    through  8 n in r + 4 n out r + 2 in out r  (4 n in r + 6 n out r + 4 in out r if x needs no gradient)
    output   6 n r (in + out) + 4 in out r  (4 n r in + ... if x needs no gradient)
    inside   4 n r (in + out) + 8 in out r  (6 in out r)
    weight   12 in out r + 2 n in out

At inference U and W are constants: W U is computed once and kept, so that `through` and `output` cost
2 n r (in + out), `input` 4 n in r, and `weight` 4 in out r.

Thin products are bound by memory, so numbers count as well: `input` writes the rotated rows to fresh memory
(n in numbers), `weight` and `inside` the changed weight, and those two add in place. `inside` rounds the changed
weight to its dtype, where the others round products: it is for fp32 and better.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

Form = Literal["input", "through", "output", "inside", "weight"]

FLOPS_PER_NUMBER = 100
"""A number written to fresh memory and read again, in flops: two CPU cores do 300 Gflop/s and move 12 GB/s."""


def flops(form: Form, n: int, n_in: int, n_out: int, r: int, training: bool, input_grad: bool) -> int:
    """Flops that the form costs beyond the frozen layer's own; see the table above."""
    if form == "input":
        step = 12 * n * n_in * r if input_grad else 10 * n * n_in * r + 2 * n * n_in * n_out
        return step if training else 4 * n * n_in * r
    if form in ("through", "output"):
        a, b, c = (4, 6, 4) if not input_grad else (8, 4, 2) if form == "through" else (6, 6, 4)
        step = a * n * r * n_in + b * n * r * n_out + c * n_in * n_out * r
        return step if training else 2 * n * r * (n_in + n_out)
    if form == "inside":
        return 4 * n * r * (n_in + n_out) + (8 if input_grad else 6) * n_in * n_out * r
    return 12 * n_in * n_out * r + 2 * n * n_in * n_out if training else 4 * n_in * n_out * r


def numbers(form: Form, n: int, n_in: int, n_out: int, training: bool) -> int:
    """Numbers that the form writes to memory of its own and reads again, of the size of the rows or the weight."""
    if form in ("weight", "inside"):
        return (2 if training else 1) * n_in * n_out
    return n * n_in if form == "input" else 0


def cheapest(
    forms: Iterable[Form],
    n: int,
    n_in: int,
    n_out: int,
    r: int,
    training: bool = True,
    input_grad: bool = True,
    price: int = FLOPS_PER_NUMBER,
) -> Form:
    """The form with the least cost, flops and priced numbers; the first of `forms` where several cost the same."""
    best: tuple[int, Form] | None = None
    for form in forms:  # not min(..., key=...), which some versions of torch.compile do not trace
        moved = price * numbers(form, n, n_in, n_out, training)
        cost = flops(form, n, n_in, n_out, r, training, input_grad) + moved
        if best is None or cost < best[0]:
            best = cost, form
    assert best is not None
    return best[1]


def inside_pays(x: Tensor, n_out: int, r: int) -> bool:
    """Whether a low-rank change of a layer of rows x (..., in) is cheaper inside its weight than beside it."""
    if not exact_inside(x.dtype):
        return False
    n_in = x.shape[-1]
    n, price = x.numel() // n_in, price_of(x)
    return 2 * n * r * (n_in + n_out) > (4 * r + 2 * price) * n_in * n_out


def exact_inside(dtype: torch.dtype) -> bool:
    """Whether a weight in this dtype can take up a change without losing what is small beside it."""
    return dtype in (torch.float32, torch.float64)


def price_of(x: Tensor) -> int:
    """What writing a number of x's dtype and reading it again costs on x's device, in flops of that dtype."""
    if not x.is_cuda:
        return FLOPS_PER_NUMBER
    key = x.device.index or 0, x.dtype
    if key not in _PRICES:
        if torch.compiler.is_compiling():
            return FLOPS_PER_NUMBER
        _PRICES[key] = price_on(torch.cuda.get_device_properties(key[0]), x.dtype)
    return _PRICES[key]


_PRICES: dict[tuple[int, torch.dtype], int] = {}
_HALF = {(7, 0): 1024, (8, 0): 2048, (9, 0): 4096, (10, 0): 8192}
"""Dense flops of one multiprocessor a cycle in fp16 and bf16, by compute capability; 512 where it is not here."""
_SINGLE = 256


def price_on(card: Any, dtype: torch.dtype) -> int:
    """The price on a card of these properties (`torch.cuda.get_device_properties`): peak flops by peak bandwidth.

    The one for two CPU cores where they do not say what it takes.
    """
    cycle = _HALF.get((card.major, card.minor), 512) if dtype.itemsize == 2 else _SINGLE
    # Clocks are in kHz, the bus in bits, and memory answers twice a cycle.
    peak = cycle * card.multi_processor_count * getattr(card, "clock_rate", 0)
    bandwidth = 2 * getattr(card, "memory_clock_rate", 0) * getattr(card, "memory_bus_width", 0) / 8
    return round(2 * dtype.itemsize * peak / bandwidth) if peak and bandwidth else FLOPS_PER_NUMBER

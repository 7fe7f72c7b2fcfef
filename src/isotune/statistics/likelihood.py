"""The directions in which the scores of a model are differentiated for its Fisher information.

For the probabilities p of C classes, with J the Jacobian of their scores (logits) by the weights,

    Σ_c p_c (∂ log p_c)² = Σ_k (Jᵀ S_k)²,    S Sᵀ = diag(p) - p pᵀ.

The Cholesky factor S has C - 1 columns and a closed form (Tanabe and Sagae, JRSS B 1992), so that the expectation
over C classes takes C - 1 backward passes, exactly. For a label y, drawn or given, S is the one column e_y - p.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor

from isotune.errors import IsotuneError, OptionError
from isotune.linalg.precision import at_least_fp32

Expectation = Literal["exact", "sample", "empirical"]

IGNORED = -100


def scores_of(output: Any) -> Tensor:
    """The scores in what a model returned: (n, classes), or (n, length, tokens).

    Raises IsotuneError where it is neither of the two kinds.
    """
    found = getattr(output, "logits", output)
    found = found[0] if isinstance(found, tuple | list) else found
    if not isinstance(found, Tensor) or found.dim() not in (2, 3) or found.shape[-1] < 2:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise IsotuneError(
            f"the Fisher information needs the scores of a classifier, (n, classes), or of a language model, "
            f"(n, tokens, vocabulary); this model gives {shape}"
        )
    return found


Directions = Iterator[tuple[Tensor, bool]]  # what to multiply the Jacobian with, and whether it is the last


def directions(
    logits: Tensor, labels: Tensor | None, mask: Tensor | None, expectation: str, draw: torch.Generator
) -> Directions:
    """The columns of S for the scores (n, ...) of a batch, each in their shape and dtype.

    Raises OptionError for an expectation that the scores or the batch do not allow.
    """
    if expectation not in ("exact", "sample", "empirical"):
        raise OptionError(f"expectation={expectation!r} is unknown; choose exact, sample or empirical")
    if expectation == "empirical" and labels is None:
        raise OptionError("the empirical Fisher needs the labels of each batch, as its 'labels'; or choose 'sample'")
    if logits.dim() == 3:
        return _next_tokens(logits, labels, mask, expectation, draw)
    p = at_least_fp32(logits).softmax(dim=-1)
    if expectation == "exact":
        return _all_classes(p, logits.dtype)
    drawn = cast(Tensor, labels) if expectation == "empirical" else _drawn(p, draw)
    return iter([((_one_hot(drawn, p) - p).to(logits.dtype), True)])


def _all_classes(p: Tensor, dtype: torch.dtype) -> Directions:
    """The columns of S, each (n, classes), with `S Sᵀ = diag(p) - p pᵀ` for every row of p."""
    # q_k: what is left after the classes up to k, summed from the end, where it is small.
    q = torch.cat([p.flip(-1).cumsum(-1).flip(-1), torch.zeros_like(p[:, :1])], dim=1)
    for k in range(p.shape[1] - 1):
        before, after = q[:, k], q[:, k + 1]
        column = torch.zeros_like(p)
        column[:, k] = (p[:, k] * after / before).nan_to_num().sqrt()
        below = (p[:, k + 1 :] / after[:, None]) * (p[:, k] * after / before).sqrt()[:, None]
        column[:, k + 1 :] = -below.nan_to_num()
        yield column.to(dtype), k == p.shape[1] - 2


def _next_tokens(
    logits: Tensor, labels: Tensor | None, mask: Tensor | None, expectation: str, draw: torch.Generator
) -> Directions:
    if expectation == "exact":
        raise OptionError(
            f"the exact Fisher of a language model takes {logits.shape[-1]} backward passes for each position; "
            "choose expectation='sample', which has the same mean, or 'empirical'"
        )
    targets = labels[:, 1:] if labels is not None else None
    if targets is not None:
        used = targets != IGNORED
    elif mask is not None:
        used = mask[:, 1:].bool()
    else:
        used = torch.ones(logits.shape[0], logits.shape[1] - 1, dtype=torch.bool, device=logits.device)
    p = at_least_fp32(logits[:, :-1][used]).softmax(dim=-1)
    drawn = _drawn(p, draw) if expectation == "sample" else cast(Tensor, targets)[used]
    direction = torch.zeros_like(logits)
    direction[:, :-1][used] = (_one_hot(drawn, p) - p).to(logits.dtype)
    yield direction, True


def _drawn(p: Tensor, draw: torch.Generator) -> Tensor:
    """A class for each row of p (n, classes), the same on every device."""
    sums = p.cumsum(dim=-1)
    u = torch.rand(len(p), 1, generator=draw, dtype=torch.float32).to(p) * sums[:, -1:]
    return torch.searchsorted(sums, u, right=True).squeeze(-1).clamp(max=p.shape[-1] - 1)


def _one_hot(labels: Tensor, p: Tensor) -> Tensor:
    return torch.zeros_like(p).scatter_(-1, labels[..., None], 1.0)

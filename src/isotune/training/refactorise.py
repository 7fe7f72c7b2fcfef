"""FedSVD: the mean of what clients trained, and a new factorisation of it, `B A = B' A'`, with orthonormal A'.

    B = Σ (n_k / n) B_k,    B' = U diag(S),    A' = Vᵀ,    U diag(S) Vᵀ = B A

Clients train B alone, so that the mean is exact: `mean(B_k) A = mean(B_k A)`. With A' A'ᵀ = I a gradient G of the
weight gives one of B', G A'ᵀ, that is no larger than G: clipping cuts off less, and noise weighs less.

The rows of A' span what those of A span. Between two orthonormal A's re-factorising is a rotation, which plain
gradient descent, clipping by the norm and isotropic noise do not see: from the first re-factorisation on they take
the steps of FFA-LoRA (A frozen) from that same orthonormal A. An optimizer that scales single entries does see it.

Paper: "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", NeurIPS 2025, arXiv 2505.12805.
Cost: O((out + in) r²), where the authors' code decomposes the dense out x in product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isotune.errors import OptionError
from isotune.linalg.low_rank import Factored, svd


def aggregate(tensors: Sequence[Tensor], sizes: Sequence[float]) -> Tensor:
    """The clients' mean `Σ (n_k / n) B_k`, of tensors of one shape, by the number of their rows of data.

    Raises OptionError where there is nothing to average, or sizes that are not positive.
    """
    if not tensors or len(tensors) != len(sizes) or min(sizes) <= 0:
        raise OptionError(
            f"the mean of clients needs a positive size for each of them; found {len(tensors)} clients and the "
            f"sizes {list(sizes)}"
        )
    return torch.stack([n / sum(sizes) * tensor for tensor, n in zip(tensors, sizes, strict=True)]).sum(0)


def refactorise(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """B' (out, r) and A' (r, in) with `B' A' = B A` and `A' A'ᵀ = I`, computed in float64, in B's and A's dtype.

    The columns of B' are orthogonal and descend in length, and the largest entry of each is positive. Where B A has
    less rank than r, the rest of B' is zero and A' is completed; where it is zero, B and A come back as they are.

    Raises OptionError where r is larger than a side: there is no such A'.
    """
    rank, limit = B.shape[1], min(B.shape[0], A.shape[1])
    if rank > limit:
        raise OptionError(f"factors of rank {rank} on a layer whose smaller side is {limit} cannot be orthonormal")
    # The small core is square, so that its singular vectors, and with them A', are complete at any rank.
    found = svd(Factored(B.double(), A.double()))
    if not found.S.any():
        return B, A
    return (found.U * found.S).to(B.dtype), found.V.mT.to(A.dtype)

"""Adam's second moments of the weights, from the optimizer that trained a model or its adapter.

Of a parameter that is trained itself they are the optimizer's, divided by 1 - β₂ᵗ. A low-rank adapter's optimizer has
those of A and B. With `W' = W + s B A` and G the gradient of the loss by W',

    ∂B = s G Aᵀ,    ∂A = s Bᵀ G.

Where the entries of G are uncorrelated and V = E[G²] has rank one, `V = τ r cᵀ` with r and c that sum to 1, then

    E[∂B²]_ik = s² τ r_i Σ_j c_j A_kj²,    E[∂A²]_kj = s² τ c_j Σ_i r_i B_ik²

so that r is the mean of B's moments over k, c that of A's, and τ follows from either sum; both together are used. It
is exact under these two assumptions, and an estimate otherwise: what A and B did not look at is extrapolated from
what they did. Where only one of the two is trained, or B is still 0, nothing is known of the other side, and the
moments are the same along it.

Use: "Harnessing Optimization Dynamics for Curvature-Informed Model Merging", 2025, arXiv 2509.11167. The moments are
of gradients averaged over batches, after clipping: they decrease as batches grow, unlike the Fisher information.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isotune.adapters.contract import Adapter
from isotune.adapters.low_rank.lora import LoRAAdapter
from isotune.adapters.spectral.principal import Principal
from isotune.errors import IsotuneError, OptionError
from isotune.model.adapted import Adapted, Trained, current
from isotune.model.names import base_modules
from isotune.statistics.stored import RankOne


def second_moments(model: nn.Module, optimizer: Any, compress: bool = True) -> dict[str, Tensor | RankOne]:
    """The second moments of all weights that the optimizer trains, itself or through an adapter.

    Args:
        model: A model, or one with an adapter in use.
        optimizer: Adam or AdamW, after at least one step.
        compress: Whether to keep of a parameter's matrix only its sums over rows and columns; of an adapter, always.

    Returns:
        By the path of an adapted layer, (out, in), and by the name of any other parameter, in its shape.

    Raises:
        OptionError: An adapter whose moments say nothing direct of its weights'.
        IsotuneError: An optimizer that keeps no second moments, or keeps them in another shape.
    """
    found: dict[str, Tensor | RankOne] = {}
    moments = _moments(optimizer)
    for path, module in base_modules(model):
        if isinstance(module, Adapted):
            for adapter in module.isotune.running():
                if any(parameter in moments for parameter in adapter.parameters()):
                    found[path] = _of_adapter(adapter, moments, path)
            continue
        owner = current(module) if isinstance(module, Trained) else module
        for name, parameter in owner.named_parameters(recurse=isinstance(module, Trained)):
            if parameter in moments:
                V = moments[parameter]
                full = f"{path}.{name}" if path else name
                found[full] = RankOne.of(V) if compress and V.dim() == 2 else V
    if not found:
        raise IsotuneError("the optimizer has no second moments of this model's weights; train with Adam or AdamW")
    return found


def check_informative(model: nn.Module) -> None:
    """Raise OptionError where the second moments of an adapter in use would say nothing direct of its weights'."""
    for path, module in base_modules(model):
        for adapter in module.isotune.running() if isinstance(module, Adapted) else []:
            _factors(adapter, path)


def _factors(adapter: Adapter, path: str) -> tuple[nn.Parameter, nn.Parameter, float]:
    """B (out, r), A (r, in) and s of an adapter with `W' = s B A + what is frozen`."""
    plain = isinstance(adapter, Principal) and type(adapter).left is Principal.left
    if isinstance(adapter, LoRAAdapter) or plain:
        return adapter.B, adapter.A, adapter.scale  # type: ignore[return-value]
    raise OptionError(
        f"the second moments of the {adapter.method} adapter on {path!r} are of its own parameters, which are no "
        "factors of W' - W, and those of W' do not follow from them; use its Fisher information: "
        "isotune.training.collect_fisher(RUN, kind='second_moment')"
    )


def _moments(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """Each parameter's second moment, bias-corrected, in fp32."""
    found: dict[nn.Parameter, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "exp_avg_sq" not in state:
                continue
            V = state["exp_avg_sq"]
            if V.shape != parameter.shape:
                raise IsotuneError(
                    f"the optimizer keeps a second moment of shape {tuple(V.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}; it is sharded or quantised, which is not supported"
                )
            steps, beta = float(state["step"]), group["betas"][1]
            found[parameter] = V.detach().float() / (1 - beta**steps)
    return found


def _of_adapter(adapter: Adapter, moments: dict[nn.Parameter, Tensor], path: str) -> RankOne:
    B, A, scale = _factors(adapter, path)
    of_B, of_A = moments.get(B), moments.get(A)
    return from_factors(B.detach(), A.detach(), scale, of_B, of_A)


def from_factors(B: Tensor, A: Tensor, scale: float, of_B: Tensor | None, of_A: Tensor | None) -> RankOne:
    """The second moments of `W + scale B A` from those of B (out, r) and of A (r, in), where they are trained."""
    r = _profile(of_B, 1, B.shape[0])
    c = _profile(of_A, 0, A.shape[1])
    seen, expected = 0.0, 0.0
    if of_B is not None:
        seen += float(of_B.cpu().double().sum())
        expected += scale**2 * float((A.cpu().double().square().sum(dim=0) * c).sum())
    if of_A is not None:
        seen += float(of_A.cpu().double().sum())
        expected += scale**2 * float((B.cpu().double().square().sum(dim=1) * r).sum())
    total = seen / expected if expected > 0 else 0.0
    return RankOne(total * r, total * c)


def _profile(moment: Tensor | None, over: int, length: int) -> Tensor:
    """The means of a moment over the rank, scaled to sum to 1; the same everywhere where nothing is known."""
    mean = torch.ones(length, dtype=torch.float64) if moment is None else moment.cpu().double().mean(dim=over)
    mean = mean if mean.any() else torch.ones_like(mean)
    return mean / mean.sum()

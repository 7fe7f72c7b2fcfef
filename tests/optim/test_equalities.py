"""Where one optimizer comes down to another, and what must hold whatever the gradients are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slow import followed, newton_schulz
from torch import Tensor

from isotune.linalg.dct import dct_matrix
from isotune.optim import AdaRem, ALLoRA, AuON, Conda, DCTAdamW, Muon, NorMuon, Scion, ScionLight, Trion, adjustment
from isotune.optim.dct import chosen, expanded, put_back, taken

SHAPES = pytest.mark.parametrize("shape", [(9, 4), (4, 9)], ids=str)


def drawn(shape: tuple[int, ...], count: int = 5) -> list[Tensor]:
    """Gradients."""
    return [torch.randn(shape, dtype=torch.float64) for _ in range(count)]


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """The same after every step."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@SHAPES
def test_conda_in_the_identitys_basis_is_adamw(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from isotune.optim import conda

    def identity(M: Tensor) -> Tensor:
        return torch.eye(min(M.shape[-2:]), dtype=M.dtype).expand(len(M), -1, -1)

    monkeypatch.setattr(conda, "_basis", identity)
    W, gradients = torch.randn(shape, dtype=torch.float64), drawn(shape)
    ours = followed(lambda p: Conda(p, lr=0.1, scale=1.0, eps=0, weight_decay=0.1), W, gradients)
    close(
        ours, followed(lambda p: torch.optim.AdamW(p, 0.1, betas=(0.9, 0.99), eps=0, weight_decay=0.1), W, gradients)
    )


def test_condas_first_step_has_entries_of_one_size_in_its_basis() -> None:
    W, (G,) = torch.randn(7, 4, dtype=torch.float64), drawn((7, 4), 1)
    (after,) = followed(lambda p: Conda(p, lr=1.0, scale=1.0, betas=(0.9, 0.0), eps=0), W, [G])
    Q = torch.linalg.svd(G)[2].mT
    torch.testing.assert_close(((W - after) @ Q).abs(), torch.ones_like(W))


def test_conda_turns_with_what_it_trains() -> None:
    W, gradients = torch.randn(9, 4, dtype=torch.float64), drawn((9, 4))
    R = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    plain = followed(lambda p: Conda(p, lr=0.1), W, gradients)
    turned = followed(lambda p: Conda(p, lr=0.1), W @ R, [G @ R for G in gradients])
    close(turned, [found @ R for found in plain])


@SHAPES
def test_trion_with_all_cosines_is_muon_without_the_look_ahead(shape: tuple[int, int]) -> None:
    W, gradients = torch.randn(shape, dtype=torch.float64), drawn(shape)
    muon = followed(lambda p: Muon(p, lr=0.1, weight_decay=0, nesterov=False), W, gradients)
    # Its momentum decays after each step: M - (1 - μ) M = μ M.
    close(followed(lambda p: Trion(p, lr=0.1, rank=99), W, gradients), muon)


@SHAPES
def test_dct_adamw_with_all_cosines_is_adamw_of_the_expanded_gradient(shape: tuple[int, int]) -> None:
    W, gradients = torch.randn(shape, dtype=torch.float64), drawn(shape)
    ours = followed(lambda p: DCTAdamW(p, lr=0.1, rank=99, error_feedback=True), W, gradients)
    C = dct_matrix(4)

    def to(X: Tensor) -> Tensor:
        return X @ C.mT if shape == (9, 4) else C @ X

    def back(X: Tensor) -> Tensor:
        return X @ C if shape == (9, 4) else C.mT @ X

    theirs = followed(lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.01), to(W), [to(G) for G in gradients])
    close(ours, [back(X) for X in theirs])


@SHAPES
@pytest.mark.parametrize("norm", [1.0, 2.0])
def test_what_the_cosines_leave_out_is_the_rest_of_the_squares(shape: tuple[int, int], norm: float) -> None:
    (M,) = drawn(shape, 1)
    S = expanded(M)
    columns = chosen(S, 2, norm)
    rest = M - put_back(taken(S, columns), columns, M.shape)
    torch.testing.assert_close(rest.square().sum(), M.square().sum() - taken(S, columns).square().sum())
    if norm == 2:
        others = [torch.tensor([i, j]) for i in range(4) for j in range(i)]
        assert all(rest.norm() <= (M - put_back(taken(S, pair), pair, M.shape)).norm() + 1e-12 for pair in others)


@pytest.mark.parametrize("norm", ["auto", "spectral", "sign", "column", "row", "bias_rms"])
def test_scion_light_is_scion_without_a_state(norm: Any) -> None:
    shape = (9, 4)
    W, gradients = torch.randn(shape, dtype=torch.float64), drawn(shape)
    options: dict[str, Any] = {"lr": 0.1, "norm": norm, "momentum": 0.3, "unconstrained": norm == "row"}
    kept = followed(lambda p: Scion(p, **options), W, gradients)
    p = torch.nn.Parameter(W.clone())
    optimizer, light = ScionLight([p], **options), []
    for G in gradients:
        p.grad = G.clone() if p.grad is None else p.grad + G
        optimizer.step()
        light.append(p.detach().clone())
    close(light, kept)
    assert not any(optimizer.state_dict()["state"].values())


@pytest.mark.parametrize(
    ("norm", "dual"),
    [
        ("sign", lambda d: d.abs().sum() / 4),
        ("spectral", lambda d: torch.linalg.svdvals(d).sum() * (9 / 4) ** 0.5),
        ("column", lambda d: d.norm(dim=0).sum() * 3 / 4),
        ("row", lambda d: d.norm(dim=1).sum() / 2),
    ],
)
def test_scions_steps_are_the_furthest_in_their_balls(norm: Any, dual: Any) -> None:
    (d,) = drawn((9, 4), 1)
    W = torch.zeros_like(d)
    (after,) = followed(lambda p: Scion(p, lr=1.0, momentum=1.0, norm=norm, method="svd"), W, [d])
    torch.testing.assert_close(-(after * d).sum(), dual(d))
    (again,) = followed(lambda p: Scion(p, lr=1.0, momentum=1.0, norm=norm, method="svd"), W, [7.5 * d])
    torch.testing.assert_close(again, after)


def test_constrained_scion_stays_in_its_ball() -> None:
    W = torch.zeros(9, 4, dtype=torch.float64)
    radius = 3.0
    for after in followed(lambda p: Scion(p, lr=0.3, scale=radius, method="svd"), W, drawn((9, 4), 30)):
        assert float(torch.linalg.matrix_norm(after, 2)) <= radius * 1.5 + 1e-9


def test_normuons_step_is_as_long_as_muons_and_its_rows_of_one_length_without_memory() -> None:
    W, gradients = torch.zeros(9, 4, dtype=torch.float64), drawn((9, 4), 1)
    (muon,) = followed(lambda p: Muon(p, lr=1.0, weight_decay=0), W, gradients)
    (ours,) = followed(lambda p: NorMuon(p, lr=1.0, beta2=0.0), W, gradients)
    torch.testing.assert_close(ours.norm(), muon.norm())
    torch.testing.assert_close(ours.norm(dim=1), (ours.norm() / 3).expand(9))
    with pytest.raises(ValueError, match="beta2 is 1"):
        NorMuon([torch.nn.Parameter(W)], beta2=1)


def test_normuon_is_muon_where_an_exact_step_has_rows_of_one_length() -> None:
    W, gradients = torch.zeros(4, 9, dtype=torch.float64), drawn((4, 9), 1)
    options: dict[str, Any] = {"lr": 0.1, "method": "svd"}
    close(
        followed(lambda p: NorMuon(p, beta2=0.0, **options), W, gradients),
        followed(lambda p: Muon(p, weight_decay=0, **options), W, gradients),
    )


def test_auon_is_normalised_momentum_to_the_thousandth() -> None:
    W, gradients = torch.zeros(64, 64, dtype=torch.float64), drawn((64, 64), 1)
    (paper,) = followed(lambda p: AuON(p, lr=1.0), W, gradients)
    torch.testing.assert_close(paper, -gradients[0] / gradients[0].norm(), rtol=1e-3, atol=0)
    (code,) = followed(lambda p: AuON(p, lr=1.0, variant="code"), W, gradients)
    torch.testing.assert_close(code, -(1 - 0.95**2) * gradients[0], rtol=1e-3, atol=0)


def test_adarem_without_its_effect_is_sgd_and_begins_as_it() -> None:
    W, gradients = torch.randn(5, dtype=torch.float64), drawn((5,))
    sgd = followed(lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.2), W, gradients)
    close(followed(lambda p: AdaRem(p, 0.1, decay=0, weight_decay=0.2), W, gradients), sgd)
    ours = followed(lambda p: AdaRem(p, 0.1, weight_decay=0.2), W, gradients)
    close(ours[:1], sgd[:1])
    assert not torch.allclose(ours[-1], sgd[-1], rtol=1e-3)


def test_adarem_hurries_where_gradients_agree_and_tarries_where_they_do_not() -> None:
    W, G = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    agreeing = followed(lambda p: AdaRem(p, 1.0, decay=1.0), W, [G, G])
    opposed = followed(lambda p: AdaRem(p, 1.0, decay=1.0), W, [G, -G])
    torch.testing.assert_close(agreeing[1] - agreeing[0], -2 * G)
    torch.testing.assert_close(opposed[1] - opposed[0], 0 * G)


def test_alloras_rows_of_zeros_go_eta_times_as_far_and_grown_ones_less() -> None:
    W, (G,) = torch.zeros(3, 4, dtype=torch.float64), drawn((3, 4), 1)
    W[1], W[2] = 1.0, 100.0
    (ours,) = followed(lambda p: ALLoRA(p, lr=0.1, eta=5.0), W, [G])
    (adam,) = followed(lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0), W, [G])
    factors = ((ours - W) / (adam - W)).mean(dim=1)
    torch.testing.assert_close(factors[0], torch.tensor(5.0, dtype=torch.float64))
    assert 5 > factors[1] > factors[2] > 0


@pytest.mark.parametrize("how", ["original", "match_rms_adamw", "spectral", "rms"])
def test_factors_give_the_step_the_size_they_are_named_for(how: Any) -> None:
    W, gradients = torch.zeros(9, 4, dtype=torch.float64), drawn((9, 4), 1)
    (after,) = followed(lambda p: Muon(p, lr=1.0, weight_decay=0, adjust_lr_fn=how, method="svd"), W, gradients)
    sizes = {
        "original": torch.linalg.matrix_norm(after, 2) / 1.5,
        "match_rms_adamw": after.square().mean().sqrt() / 0.2,
        "spectral": torch.linalg.matrix_norm(after, 2) / 1.5,
        "rms": after.square().mean().sqrt(),
    }
    assert float(sizes[how]) == pytest.approx(1.0)
    assert adjustment((4, 9), "spectral") == pytest.approx(2 / 3)
    assert adjustment((4, 9), None) == 1


def test_a_zero_gradient_lets_the_weight_decay_alone() -> None:
    W = torch.randn(5, 3, dtype=torch.float64)
    for make in (
        lambda p: Muon(p, lr=0.1, weight_decay=0.5),
        lambda p: NorMuon(p, lr=0.1, weight_decay=0.5),
        lambda p: Trion(p, lr=0.1, weight_decay=0.5),
        lambda p: AuON(p, lr=0.1, weight_decay=0.5),
    ):
        close(followed(make, W, [torch.zeros_like(W)]), [0.95 * W])


def test_the_slow_iteration_is_what_it_says() -> None:
    # What the tests above stand on: its polynomial of the singular values, on the same singular vectors.
    (G,) = drawn((5, 3), 1)
    U, S, Vh = torch.linalg.svd(G / G.norm(), full_matrices=False)
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    torch.testing.assert_close(newton_schulz(G), (U * S) @ Vh)

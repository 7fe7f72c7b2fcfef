"""The kernel of the Cayley transform against the portable form, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import isotune
from isotune.kernels import choice
from isotune.kernels.rotation import rotation
from isotune.linalg import cayley

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps


def upper(D: int, b: int, size: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(D, cayley.above_diagonal(b), generator=generator)).to(DEVICE)


@given(st.integers(1, 3), st.integers(2, 40), st.sampled_from([0.0, 1e-4, 1.0, 30.0]), st.integers(0, 99))
def test_the_kernel_equals_the_portable_form(D: int, b: int, size: float, seed: int) -> None:
    Q = upper(D, b, size, seed).requires_grad_()
    wide = Q.detach().double().requires_grad_()
    g = torch.randn(D, b, b, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    R, R64 = rotation(Q, b), cayley.rotation(wide, b)
    R.backward(g)
    R64.backward(g.double())
    # |I - Q| |(I - Q)⁻¹| is at most |I - Q|.
    tolerance = 16 * EPS * b * (1 + size * b**0.5)
    torch.testing.assert_close(R.double(), R64, rtol=0, atol=tolerance)
    torch.testing.assert_close(R.double() @ R.double().mT, torch.eye(b, device=DEVICE).double().expand(D, b, b),
                               rtol=0, atol=tolerance)  # fmt: skip
    torch.testing.assert_close(Q.grad.double(), wide.grad, rtol=0, atol=tolerance * float(g.norm()))


def test_what_there_is_no_kernel_for_takes_the_portable_form() -> None:
    for Q, b, terms in ((upper(2, 70), 70, None), (upper(2, 4), 4, 5), (upper(2, 4).double(), 4, None)):
        assert torch.equal(rotation(Q, b, terms), cayley.rotation(Q, b, terms))
    Q = upper(2, 4)
    torch.testing.assert_close(
        torch.func.jacrev(lambda Q: rotation(Q, 4))(Q), torch.func.jacrev(lambda Q: cayley.rotation(Q, 4))(Q)
    )


def test_gradients_can_be_differentiated_again() -> None:
    def second(form) -> Tensor:  # type: ignore[no-untyped-def]
        Q = upper(2, 5).requires_grad_()
        (g,) = torch.autograd.grad(form(Q, 5).pow(3).sum(), Q, create_graph=True)
        return torch.autograd.grad(g.square().sum(), Q)[0]

    torch.testing.assert_close(second(rotation), second(cayley.rotation), rtol=1e-3, atol=1e-4)


def test_torch_compile_and_the_operators() -> None:
    Q, x = upper(2, 5).requires_grad_(), torch.randn(2, 3, 5, device=DEVICE)
    y = torch.compile(lambda Q, x: x @ rotation(Q, 5), fullgraph=True, backend="aot_eager")(Q, x)
    torch.testing.assert_close(y, x @ rotation(Q, 5))
    (compiled,) = torch.autograd.grad(y.pow(3).sum(), Q)
    (eager,) = torch.autograd.grad((x @ rotation(Q, 5)).pow(3).sum(), Q)
    torch.testing.assert_close(compiled, eager)
    R = torch.ops.isotune.cayley(Q.detach(), 5)
    torch.library.opcheck(torch.ops.isotune.cayley.default, (Q.detach(), 5))
    torch.library.opcheck(torch.ops.isotune.cayley_backward.default, (Q.detach(), R, R))


@pytest.mark.parametrize("method", ["oft", "boft"])
def test_a_model_trains_with_the_kernel_as_without(method: str) -> None:
    def gradient(mode: choice.Mode) -> Tensor:
        choice.set_kernels(mode)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 8)).to(DEVICE)
        isotune.adapt(model, isotune.method(method, block=8), ["0"], seed=0)
        with torch.no_grad():
            for p in model[0].isotune.parameters():
                p.add_(0.1 * torch.randn_like(p))
        model(torch.ones(2, 32, device=DEVICE)).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model[0].isotune.parameters()])

    torch.testing.assert_close(gradient("on"), gradient("off"), rtol=1e-4, atol=1e-5)

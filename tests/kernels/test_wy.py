"""The Triton kernels against the portable form, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import isotune
from isotune.errors import OptionError
from isotune.kernels import choice
from isotune.kernels.householder import compact_wy
from isotune.linalg import householder

launch = pytest.importorskip("isotune.kernels.launch")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps


def columns(d: int, r: int, seed: int = 0, scales: float = 0.0, zero: bool = False, twice: bool = False) -> Tensor:
    """Columns (d, r) of lengths spread over 10^±scales, perhaps with one that is zero and one that is there twice."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.randn(d, r, generator=generator)
    U *= 10 ** (scales * (2 * torch.rand(r, generator=generator) - 1))
    if twice and r > 1:
        U[:, 1] = U[:, 0]
    if zero:
        U[:, -1] = 0
    return U.to(DEVICE)


def both(U: Tensor, dtype: torch.dtype | None = None, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Û, M and the gradient of U by the kernels, each with what the portable form gives in fp64."""
    generator = torch.Generator().manual_seed(seed)
    g_unit, g_M = (torch.randn(shape, generator=generator).to(U.device) for shape in (U.shape, U.mT.shape))
    found = []
    for form, V in ((compact_wy, U), (householder.compact_wy, U.double())):
        V = V.detach().clone().requires_grad_()
        unit, M = form(V, dtype) if form is compact_wy else form(V)
        ((unit * g_unit.to(unit.dtype)).sum() + (M * g_M.to(M.dtype)).sum()).backward()
        found.append((unit.detach(), M.detach(), V.grad))
    return list(zip(*found, strict=True))


def assert_columns_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Column by column, relative to the length of each."""
    got, expected = got.double(), expected.double()
    assert got.isfinite().all()
    error, length = ((got - expected).norm(dim=0), expected.norm(dim=0))
    assert (error <= tolerance * length).all(), f"{(error / length).max():.1e} of a column's length"


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 150), st.integers(1, 40), st.integers(0, 999), st.sampled_from([0.0, 3.0, 15.0]),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_kernels_equal_the_portable_form(d: int, r: int, seed: int, scales: float, zero: bool, twice: bool) -> None:
    U = columns(d, r, seed, scales, zero, twice)
    (unit, unit64), (M, M64), (grad, grad64) = both(U, seed=seed)
    live = r - zero
    # H is orthogonal whatever the columns, but S may be as badly conditioned as products of r reflections make it.
    tolerance = 8 * EPS * (d + r) ** 0.5 * (1 + r)
    assert_columns_close(unit, unit64, 4 * EPS * d**0.5)
    assert_columns_close(M.mT[:, :live], M64.mT[:, :live], tolerance)
    H = torch.eye(d, dtype=torch.float64, device=U.device) - unit.double() @ M.double()
    torch.testing.assert_close(H @ H.mT, torch.eye(d, dtype=H.dtype, device=H.device), rtol=0, atol=tolerance)
    if zero:
        assert not unit[:, -1].any()
        assert not M[-1].any()
        assert not grad[:, -1].any()
    assert_gradients_close(grad[:, :live], grad64[:, :live], U[:, :live], tolerance)


def assert_gradients_close(got: Tensor, expected: Tensor, U: Tensor, tolerance: float) -> None:
    """As gradients of the columns at length one: what is not tangential cancels, and leaves its rounding."""
    lengths = U.double().norm(dim=0)
    got, expected = got.double() * lengths, expected.double() * lengths
    assert got.isfinite().all()
    assert (got - expected).norm() <= tolerance * max(expected.norm(), U.shape[0] ** 0.5)


SLOW = pytest.mark.thorough


@pytest.mark.parametrize(
    ("d", "r"),
    [
        (200, 33), (70, 128), (4200, 4),
        pytest.param(129, 64, marks=SLOW), pytest.param(64, 250, marks=SLOW), pytest.param(1100, 40, marks=SLOW),
    ],
)  # fmt: skip
def test_many_columns_go_through_tiles_and_many_rows_through_several_steps(d: int, r: int) -> None:
    U = columns(d, r, scales=3.0, twice=True)
    (unit, unit64), (M, M64), (grad, grad64) = both(U)
    tolerance = 8 * EPS * (d + r) ** 0.5 * (1 + r)
    assert_columns_close(unit, unit64, 4 * EPS * d**0.5)
    assert_columns_close(M.mT, M64.mT, tolerance)
    assert_gradients_close(grad, grad64, U, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns_in", [torch.bfloat16, torch.float32])
def test_any_dtype_comes_in_and_goes_out_rounded_once(columns_in: torch.dtype, dtype: torch.dtype) -> None:
    U = columns(70, 6).to(columns_in)
    (unit, unit64), (M, M64), (grad, grad64) = both(U, dtype)
    assert (unit.dtype, M.dtype, grad.dtype) == (dtype, dtype, columns_in)
    # The nearest number is half an eps away; Triton's interpreter cuts bf16 off instead.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(unit.double(), unit64, rtol=1.01 * eps, atol=16 * EPS)
    torch.testing.assert_close(M.double(), M64, rtol=1.01 * eps, atol=64 * EPS)
    assert_gradients_close(grad, grad64, U, 4 * max(eps, torch.finfo(columns_in).eps) * U.shape[1])


def test_what_there_is_no_kernel_for_takes_the_portable_form() -> None:
    assert compact_wy(columns(8, 4).double())[0].dtype == torch.float64
    wide = compact_wy(columns(300, 257))
    assert torch.equal(wide[1], householder.compact_wy(columns(300, 257))[1])
    U = columns(9, 3)
    jacobian = torch.func.jacrev(lambda U: compact_wy(U)[1])(U)
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda U: householder.compact_wy(U)[1])(U))


def test_gradients_can_be_differentiated_again() -> None:
    def second(form) -> Tensor:  # type: ignore[no-untyped-def]
        U = columns(20, 5).requires_grad_()
        unit, M = form(U)
        (g,) = torch.autograd.grad((unit[0] @ M).pow(3).sum(), U, create_graph=True)
        return torch.autograd.grad(g.square().sum(), U)[0]

    expected = second(householder.compact_wy)
    torch.testing.assert_close(second(compact_wy), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_torch_compile_traces_through_in_one_graph() -> None:
    def rotated(U: Tensor, x: Tensor) -> Tensor:
        unit, M = compact_wy(U)
        return x - (x @ unit) @ M

    U, x = columns(40, 6).requires_grad_(), torch.randn(3, 40, device=DEVICE)
    y = torch.compile(rotated, fullgraph=True, backend="aot_eager")(U, x)
    torch.testing.assert_close(y, rotated(U, x))
    (compiled,) = torch.autograd.grad(y.pow(3).sum(), U)
    (eager,) = torch.autograd.grad(rotated(U, x).pow(3).sum(), U)
    torch.testing.assert_close(compiled, eager)


def test_the_operators_keep_what_they_promise() -> None:
    U = columns(12, 3)
    op, back = torch.ops.isotune.compact_wy.default, torch.ops.isotune.compact_wy_backward.default
    torch.library.opcheck(op, (U, torch.bfloat16))
    unit, MT, T, gram, scale = op(U, torch.float32)
    torch.library.opcheck(back, (U, T, gram, scale, unit, MT))


@pytest.mark.parametrize("method", ["hra", "hoft"])
def test_a_model_trains_with_the_kernels_as_without(method: str) -> None:
    def step(mode: choice.Mode) -> list[Tensor]:
        choice.set_kernels(mode)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24)).to(DEVICE)
        isotune.adapt(model, isotune.method(method, rank=4), ["0", "2"], seed=0)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 24, device=DEVICE)).square().mean().backward()
            optimizer.step()
        return [p.detach() for p in parameters]

    for on, off in zip(step("on"), step("off"), strict=True):
        torch.testing.assert_close(on, off, rtol=1e-4, atol=1e-5)


def test_kernels_are_chosen_by_device_and_by_word(monkeypatch: pytest.MonkeyPatch) -> None:
    U = torch.randn(4, 2)
    assert choice.runs(U.to(DEVICE))
    choice.set_kernels("auto")
    assert not choice.runs(U)
    assert choice.runs(U.to(DEVICE)) == (DEVICE == "cuda")
    choice.set_kernels("off")
    assert not choice.runs(U.to(DEVICE))
    with pytest.raises(OptionError, match="auto, on, off, not 'yes'"):
        choice.set_kernels("yes")
    monkeypatch.setenv(choice.VARIABLE, "off")
    choice.set_kernels(None)
    assert choice.kernels() == "off"
    monkeypatch.setenv(choice.VARIABLE, "2")
    choice.set_kernels(None)
    with pytest.raises(OptionError, match=r"ISOTUNE_KERNELS: kernels are auto, on, off, not '2'"):
        choice.runs(U)


def test_on_says_what_it_takes_where_nothing_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(OptionError, match="set TRITON_INTERPRET=1 before Python starts"):
        choice.runs(torch.randn(4, 2))
    monkeypatch.setattr(choice, "_INSTALLED", False)
    with pytest.raises(OptionError, match="pip install triton"):
        choice.runs(torch.randn(4, 2))


def test_where_a_first_launch_fails_the_portable_form_runs_and_one_warning_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[torch.device] = []

    def failing(U: Tensor, *_: object) -> None:
        calls.append(U.device)
        raise RuntimeError("a long story\nFailed to find C compiler")

    monkeypatch.setattr(launch, "forward", failing)
    monkeypatch.setattr(choice, "_working", {})
    device = torch.device(DEVICE)
    with pytest.warns(UserWarning, match=r"do not run on \w+ \(Failed to find C compiler\); the portable form"):
        assert not choice._works(device)
    assert not choice._works(device)
    assert calls == [device]
    monkeypatch.undo()
    choice.set_kernels("on")
    monkeypatch.setattr(choice, "_working", {})
    assert choice._works(torch.device(DEVICE))

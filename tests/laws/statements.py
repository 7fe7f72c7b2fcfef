"""Laws about what an adapted layer computes: values, gradients, dtypes, factors, counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import isotune
from isotune.adapted_site import AdaptedSite
from isotune.adapters.mixed import ByRow
from isotune.errors import IsotuneError
from isotune.model.catalogue import linear_site
from isotune.sites import Site
from laws.case import Case, adapter_of, move, site_of_base, trainable
from laws.layers import strides_with_dilation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def identity_at_start(case: Case) -> None:
    """A fresh adapter leaves the output as it was, where the settings say so."""
    model = case.fresh()
    x = case.input()
    if case.method.identity_at_start:
        assert_close(model(x), case.base()(x), 1e-6)


def forward_equals_reference(case: Case) -> None:
    """The cheap forward and the slow one agree, in values and in gradients, to the rounding of float64."""
    model, x = case.moved(), case.input()
    site, adapter = site_of_base(model), adapter_of(model)
    inputs = [*([x.requires_grad_()] if x.is_floating_point() else []), *trainable(model)]
    cheap = model(x)
    dense = adapter.reference(x, site)
    assert_close(cheap, dense, 1e-10)
    weights = _cotangent(cheap, x, site)
    for got, expected in zip(
        torch.autograd.grad(cheap, inputs, weights), torch.autograd.grad(dense, inputs, weights), strict=True
    ):
        assert_close(got, expected, 1e-9)


def _cotangent(y: Tensor, x: Tensor, site: Site) -> Tensor:
    """Random weights for a loss over the outputs; none at padding tokens, which no loss should see."""
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=y.dtype)
    padding = getattr(site.layer, "padding_idx", None)
    if padding is not None:
        weights = weights * (x != padding).unsqueeze(-1)
    return weights


def gradients_are_derivatives(case: Case) -> None:
    """The gradients are those of finite differences (gradcheck)."""
    model, x = case.moved(), case.input()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    values = [p.detach().requires_grad_() for p in trainable(model)]
    if x.is_floating_point():
        x = x[:1].requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, *v: functional_call(model, dict(zip(names, v, strict=True)), x), (x, *values), fast_mode=True
        )
    else:
        padding = model.layer.padding_idx
        x = x[x != padding] if padding is not None else x
        assert torch.autograd.gradcheck(
            lambda *v: functional_call(model, dict(zip(names, v, strict=True)), x), tuple(values), fast_mode=True
        )


def dtype_is_kept(case: Case) -> None:
    """A base in fp32, bf16 or fp16 answers in its own dtype, also under autocast; adapters stay fp32."""
    expected, bare = case.moved()(case.input()), _bare(case, torch.float64)
    for dtype in DTYPES:
        base, model = case.base(dtype), case.moved(dtype)
        x = case.input(dtype)
        assert {p.dtype for p in trainable(model)} == {torch.float32}
        y = model(x)
        assert y.dtype == base(x).dtype == dtype
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        _loss(y).backward()
        assert all(p.grad is not None for p in trainable(model))
        # torch's own bf16 convolution reads memory that is not its own on CPUs: no measure of an adapter.
        sound = not (dtype == torch.bfloat16 and strides_with_dilation(case.layer))
        pairs = zip(_bare(case, dtype), bare, strict=True)
        if sound and all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in pairs):
            assert_close(y, expected, tolerance)
            assert all(p.grad.isfinite().all() for p in trainable(model) if p.grad is not None)
        assert model.layer.weight.dtype == dtype
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).dtype == base(x).dtype


def default_dtype_changes_nothing(case: Case) -> None:
    """Torch's default dtype, which a program may set to train in half precision, decides nothing here."""
    expected, x = case.moved(torch.float32), case.input(torch.float32)
    y = expected(x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = case.moved(torch.float32)
        for (name, value), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
            assert value.dtype == other.dtype, name
            assert value.equal(other), name
        assert model(x).equal(y)
    finally:
        torch.set_default_dtype(torch.float32)


def _loss(y: Tensor) -> Tensor:
    """The mean square of y in units of its largest entry: its gradients are far from the ends of fp16's range."""
    y = y.float()
    return (y / y.detach().abs().max()).square().mean()


def _bare(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The output of the layer without an adapter, and the gradient of its weight."""
    layer = case.base(dtype).layer.requires_grad_()
    y = layer(case.input(dtype))
    _loss(y).backward()
    return y.detach(), layer.weight.grad


def factors_reproduce_the_change(case: Case) -> None:
    """Where a method has factors, W + B A is the adapted weight to 1e-6 (fp32), of rank at most B's columns."""
    model = case.moved(torch.float32)
    site, adapter = site_of_base(model), adapter_of(model)
    factors = adapter.factors(site.weight)
    if factors is None:
        return
    B, A = (factor.detach() for factor in factors)
    W = site.weight
    assert B.shape[0] == W.shape[0]
    assert A.shape[1] == W.shape[1]
    assert B.shape[1] == A.shape[0]
    change = (adapter.weight(W).double() - W.double()).detach()
    assert_close(B.double() @ A.double(), change, 1e-6, scale=float(W.norm() + change.norm()))
    exact = adapter.double()
    change = exact.weight(W.double()) - W.double()
    assert torch.linalg.matrix_rank(change, rtol=1e-9) <= B.shape[1]


def traces_without_a_break(case: Case) -> None:
    """`torch.compile(fullgraph=True)` needs one graph, which gives what eager gives, forward and backward."""
    _assert_compiles(case, "eager")


def compiles_without_a_break(case: Case) -> None:
    """The same with the backward pass traced ahead of time, as Inductor has it: nothing hides in a mutation."""
    _assert_compiles(case, "aot_eager")


def _assert_compiles(case: Case, backend: str) -> None:
    model, x = case.moved(torch.float32), case.input(torch.float32)
    parameters = trainable(model)
    expected = model(x)
    expected_gradients = torch.autograd.grad(expected.square().sum(), parameters)
    torch._dynamo.reset()
    y = torch.compile(model, fullgraph=True, backend=backend)(x)
    assert_close(y, expected, 1e-5)
    for got, wanted in zip(torch.autograd.grad(y.square().sum(), parameters), expected_gradients, strict=True):
        assert_close(got, wanted, 1e-4)


def parameter_count_is_as_declared(case: Case) -> None:
    """`parameter_count` is what is trained; at default options on a linear map, so is the method's `formula`."""
    model = case.fresh()
    site, method = site_of_base(model), type(case.method)
    trained = sum(p.numel() for p in trainable(model))
    assert trained == case.method.parameter_count(site) + case.method.shared_count({"layer": site})
    default = method()
    letters = {"rank": getattr(default, "rank", None), "n_in": 48, "n_out": 80}
    functions = {"__builtins__": {}, "min": min, "max": max, "ceil": math.ceil}
    assert eval(method.formula, functions, letters) == default.parameter_count(linear_site(48, 80))


def penalty_is_a_finite_scalar(case: Case) -> None:
    """The penalty can be added to a loss and differentiated wherever the adapter is."""
    for model in (case.fresh(), case.moved()):
        penalty = adapter_of(model).penalty(site_of_base(model))
        assert penalty.shape == ()
        (penalty + model(case.input()).square().sum()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def stack_is_the_product_of_its_parts(case: Case) -> None:
    """Two adapters on one layer compute with the second's change of the first's weight, in the order of `use`."""
    model = case.adapt(case.fresh(name="one"), "two", case.seed + 1)
    for order in (("one", "two"), ("two", "one")):
        isotune.use(model, *order)
        move(model, case.seed)
        first, second = (adapter_of(model, name) for name in order)
        site, x = site_of_base(model), case.input()
        bias = second.bias(first.bias(site.bias))
        dense = site.forward_with(x, second.weight(first.weight(site.weight)), bias)
        assert_close(model(x), dense, 1e-10)
        assert_close(AdaptedSite(AdaptedSite(site, first), second)(x), dense, 1e-10)


def rows_of_a_batch_use_their_own_adapters(case: Case) -> None:
    """A batch whose rows use different adapters gives each row what its adapter alone gives; else it is refused."""
    model = move(case.adapt(case.fresh(name="one"), "two", case.seed + 1), case.seed)
    x = case.input()
    x = torch.cat([x, x.flip(-1)])
    names = [("one", None, "two", "one")[i % 4] for i in range(len(x))]
    one = adapter_of(model, "one")
    if one.thin_factors(site_of_base(model)) is None and not isinstance(one, ByRow):
        with pytest.raises(IsotuneError, match="different adapters"):
            isotune.use(model, rows=names)
        return
    alone = []
    for row, name in zip(x, names, strict=True):
        isotune.use(model, *([name] if name else []))
        alone.append(model(row[None]))
    isotune.use(model, rows=names)
    assert_close(model(x), torch.cat(alone), 1e-10)


def assert_close(got: Tensor, expected: Tensor, tolerance: float, scale: float | None = None) -> None:
    """The largest difference is at most `tolerance` times the largest magnitude (at least 1) of what is expected."""
    got, expected = got.detach(), expected.detach()
    assert got.shape == expected.shape
    assert got.isfinite().all()
    scale = scale if scale is not None else max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
    difference = float((got.double() - expected.double()).abs().max()) if got.numel() else 0.0
    assert difference <= tolerance * scale, f"differs by {difference:.2e}, allowed {tolerance * scale:.2e}"


LAWS = (
    identity_at_start,
    forward_equals_reference,
    gradients_are_derivatives,
    dtype_is_kept,
    default_dtype_changes_nothing,
    factors_reproduce_the_change,
    traces_without_a_break,
    compiles_without_a_break,
    parameter_count_is_as_declared,
    penalty_is_a_finite_scalar,
    stack_is_the_product_of_its_parts,
    rows_of_a_batch_use_their_own_adapters,
)

"""One pass over data for the adapters that start from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import isotune
from isotune import HRA
from isotune.adapters.spectral.corda import CorDA
from isotune.errors import IsotuneError, OptionError
from laws.layers import drawn_layer, input_for
from support import assert_unchanged, minilm, output, snapshot, stories, tokens

METHOD = CorDA(rank=2)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The covariances that adapters are given, in order."""
    found: list[Tensor] = []
    calibrate = isotune.adapters.spectral.corda.CorDAAdapter.calibrate

    def keep(self: Any, site: Any, covariance: Tensor) -> None:
        found.append(covariance.clone())
        calibrate(self, site, covariance)

    monkeypatch.setattr(isotune.adapters.spectral.corda.CorDAAdapter, "calibrate", keep)
    return found


def starts(model: nn.Module) -> list[Tensor]:
    """The parts of the weights that are trained."""
    return [m.B0 @ m.A0 for m in model.modules() if isinstance(m, isotune.LowRank)]


class TwoLayers(nn.Module):
    """Two layers that read one input, and a third that reads what they made."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), Conv1D(5, 6), nn.Linear(5, 4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.c(torch.relu(self.a(x) + self.b(x)))


def adapted(model: nn.Module, targets: Any = ("a", "b", "c")) -> nn.Module:
    return isotune.adapt(model, METHOD, list(targets), seed=0)


@pytest.mark.parametrize("one_layer_at_a_time", [False, True])
@pytest.mark.parametrize("form", ["tensors", "tuples", "mappings"])
def test_covariance_is_the_mean_over_all_rows_of_all_batches(
    form: str, one_layer_at_a_time: bool, seen: list[Tensor]
) -> None:
    model = adapted(TwoLayers())
    xs = [torch.randn(n, 7, 6) for n in (3, 1, 2)]
    batches = {"tensors": xs, "tuples": [(x,) for x in xs], "mappings": [{"x": x} for x in xs]}[form]
    isotune.calibrate(model, batches, one_layer_at_a_time=one_layer_at_a_time)
    X = torch.cat([x.reshape(-1, 6) for x in xs])
    H = torch.relu(model.a(X) + model.b(X)).detach()
    expected = [X.T @ X / len(X), X.T @ X / len(X), H.T @ H / len(H)]
    for got, wanted in zip(seen, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted)


def test_padding_does_not_count(seen: list[Tensor]) -> None:
    model = adapted(TwoLayers())
    x, mask = torch.randn(4, 9, 6), torch.ones(4, 9, dtype=torch.long)
    mask[0, 5:], mask[2, :3] = 0, 0
    x[mask == 0] = 1e6
    isotune.calibrate(model, [{"x": x, "attention_mask": mask}])
    X = x[mask.bool()]
    torch.testing.assert_close(seen[0], X.T @ X / len(X))
    assert seen[2].max() < 1e6


def test_a_real_models_padding_does_not_count_and_neither_does_the_batch_size() -> None:
    ids = torch.randint(5, 30000, (12, 40), generator=torch.Generator().manual_seed(0))
    lengths = [40] * 10 + [25, 31]
    mask = torch.tensor([[1] * n + [0] * (40 - n) for n in lengths])
    padded = isotune.adapt(minilm(), CorDA(rank=4), ["query", "key"], seed=0)
    isotune.calibrate(padded, [{"input_ids": ids, "attention_mask": mask}])
    single = isotune.adapt(minilm(), CorDA(rank=4), ["query", "key"], seed=0)
    isotune.calibrate(single, ({"input_ids": row[None, :n]} for row, n in zip(ids, lengths, strict=True)))
    counted = isotune.adapt(minilm(), CorDA(rank=4), ["query", "key"], seed=0)
    isotune.calibrate(counted, [{"input_ids": ids}])
    for one, other, wrong in zip(starts(padded), starts(single), starts(counted), strict=True):
        assert (one - other).norm() < 0.01 * one.norm()
        assert (one - wrong).norm() > 0.02 * one.norm()


@given(drawn_layer("convolution", ["conv2d"]))
def test_rows_of_a_convolution_are_its_patches(layer: nn.Conv2d) -> None:
    layer = layer.float()
    x = input_for(layer, dtype=torch.float32)
    found: list[Tensor] = []
    model = isotune.adapt(nn.Sequential(layer), CorDA(rank=1), ["0"])
    adapter = model[0].isotune["default"]
    adapter.calibrate = lambda site, covariance: found.append(covariance)  # type: ignore[method-assign]
    isotune.calibrate(model, [x], least_rows=1)
    padded = x
    if layer.padding_mode != "zeros":
        padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    elif layer.padding != "valid":
        padded = F.pad(x, layer._reversed_padding_repeated_twice)
    patches = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    n_in = layer.weight[0].numel()
    X = patches.view(len(x), layer.groups, n_in, -1).movedim(2, 3).reshape(-1, n_in)
    torch.testing.assert_close(found[0], X.T @ X / len(X), rtol=1e-4, atol=1e-4)


def test_layers_that_read_one_tensor_share_its_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model = isotune.adapt(stories(), METHOD, ["q_proj", "k_proj", "v_proj", "o_proj"], seed=0)
    made = []
    from isotune.model.calibrate import _Seen

    product = _Seen.product.func
    monkeypatch.setattr(_Seen, "product", property(lambda self: made.append(1) or product(self)))
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    inputs = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    isotune.calibrate(model, [torch.randint(5, 500, (4, 40))])
    handle.remove()
    X = inputs[0].reshape(-1, 64)
    assert len(X) == 160
    assert len(made) == 4


def test_an_input_changed_in_place_between_two_layers_is_measured_twice(seen: list[Tensor]) -> None:
    class InPlace(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.a(x)
            return self.c(y + self.b(x.mul_(2)))

    isotune.calibrate(adapted(InPlace()), [torch.randn(30, 6)])
    torch.testing.assert_close(seen[1], 4 * seen[0])


def test_nothing_but_the_start_changes_and_the_model_answers_as_before() -> None:
    model = adapted(TwoLayers()).train()
    model.a.eval()
    x = torch.randn(40, 6)
    before, base = snapshot(model), model(x)
    isotune.calibrate(model, [x])
    assert torch.equal(model(x), base)
    after = snapshot(model)
    changed = {name for name, t in before["values"].items() if not torch.equal(t, after["values"][name])}
    assert changed == {f"{layer}.isotune.default.{m}" for layer in "abc" for m in ("A", "B", "A0", "B0")}
    assert after["mode"] == before["mode"]
    assert after["trainable"] == before["trainable"]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_covariances_of_other_data_give_another_start_and_the_same_data_the_same() -> None:
    batches = [torch.randn(200, 6) * scale for scale in (torch.arange(1.0, 7), torch.arange(6.0, 0, -1))]
    one, same, other = (starts(isotune.calibrate(adapted(copy_of()), [b])) for b in (batches[0], *batches))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.allclose(one[0], other[0], atol=1e-2)


def copy_of() -> nn.Module:
    torch.manual_seed(3)
    return TwoLayers()


def test_only_the_active_adapters_are_calibrated() -> None:
    model = adapted(TwoLayers())
    isotune.adapt(model, METHOD, ["a"], name="other", seed=1)
    rest = [model.a.isotune["default"].A.clone(), model.b.isotune["default"].A.clone()]
    isotune.calibrate(model, [torch.randn(50, 6) * torch.arange(1.0, 7)])
    assert torch.equal(model.a.isotune["default"].A, rest[0])
    assert torch.equal(model.b.isotune["default"].A, rest[1])
    assert not torch.equal(model.a.isotune["other"].A, rest[0])


def test_a_layer_that_saw_too_little_is_named_and_nothing_is_changed() -> None:
    class Routed(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    for given_model, batches, said in (
        (TwoLayers(), [torch.randn(2, 6)] * 2, "'a' saw 4 rows, and its covariance needs 6; give more batches"),
        (Routed(), [torch.randn(40, 6)], "'b' saw 0 rows"),
        (TwoLayers(), [], "'a' saw 0 rows"),
    ):
        for one_layer_at_a_time in (False, True):
            model = adapted(given_model)
            before = snapshot(model)
            with pytest.raises(IsotuneError, match=said):
                isotune.calibrate(model, batches, one_layer_at_a_time=one_layer_at_a_time)
            assert_unchanged(model, before)
            isotune.remove(model)
    isotune.calibrate(adapted(TwoLayers()), [torch.randn(2, 6)], least_rows=2)


@pytest.mark.parametrize("value", [0.0, float("nan"), 1e30])
def test_values_without_a_covariance_are_refused(value: float) -> None:
    model = adapted(TwoLayers())
    before = snapshot(model)
    with pytest.raises(IsotuneError, match="the inputs of 'a' have no usable covariance"):
        isotune.calibrate(model, [torch.full((20, 6), value)])
    assert_unchanged(model, before)


def test_models_with_nothing_to_calibrate_are_refused() -> None:
    x = [torch.randn(20, 6)]
    trained = adapted(TwoLayers())
    for parameter in trained.parameters():
        parameter.data += parameter.requires_grad
    for model in (TwoLayers(), isotune.adapt(TwoLayers(), HRA(rank=2), ["a"]), trained):
        with pytest.raises(IsotuneError, match="no active adapter wants a covariance"):
            isotune.calibrate(model, x)
    folded = isotune.fold(adapted(TwoLayers()))
    with pytest.raises(IsotuneError, match="folded into the weights; call unfold"):
        isotune.calibrate(folded, x)


def test_one_layer_at_a_time_needs_batches_that_can_be_walked_again() -> None:
    def batches() -> Iterator[Tensor]:
        yield torch.randn(20, 6)

    with pytest.raises(OptionError, match="walked once for every layer, not an iterator"):
        isotune.calibrate(adapted(TwoLayers()), batches(), one_layer_at_a_time=True)
    isotune.calibrate(adapted(TwoLayers()), batches())


def test_half_precision_and_autocast_are_measured_in_fp32(seen: list[Tensor]) -> None:
    x = torch.randn(500, 6).bfloat16()
    model = adapted(TwoLayers().bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        isotune.calibrate(model, [x])
    torch.testing.assert_close(seen[0], x.float().T @ x.float() / 500)
    assert torch.equal(output(model, x=x), output(isotune.remove(model), x=x))


def test_progress_is_silent_where_it_is_turned_off_or_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (True, False):
        isotune.calibrate(adapted(TwoLayers()), [torch.randn(20, 6)], progress=progress)
    assert capsys.readouterr() == ("", "")


def test_tokens_of_a_model_with_a_mask_are_counted_once_for_each_row() -> None:
    model = isotune.adapt(stories(), METHOD, ["q_proj"], seed=0)
    inputs = tokens(model)
    with pytest.raises(IsotuneError, match="saw 20 rows"):
        isotune.calibrate(model, [inputs])

"""What is particular to Hydra: the branch behind the layer, and the bias that changes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isotune
from isotune import HRA, LoRA
from isotune.adapted_site import AdaptedSite
from isotune.adapters.low_rank.hydra import Hydra
from isotune.diagnostics import diagnose
from isotune.errors import NoLowRankFormError, OptionError
from isotune.model.catalogue import linear_site
from isotune.sites import require_site
from support import MINILM, STORIES, adapted, assert_same_output, minilm, move, output, stories


def build(layer: nn.Module, **options: Any) -> Any:
    adapter = Hydra(**options).build(require_site(layer, "layer"), torch.Generator().manual_seed(0))
    return move(adapter, size=0.3)


def test_output_is_the_layers_own_plus_both_branches_the_second_reading_the_bias_too() -> None:
    layer, x = nn.Linear(7, 5), torch.randn(4, 7)
    adapter = build(layer, rank=2, sequential_rank=3, scale=0.5)
    assert adapter.A_s.shape == (3, 5)
    z = layer(x)
    expected = z + 0.5 * (x @ adapter.A_p.mT @ adapter.B_p.mT + z @ adapter.A_s.mT @ adapter.B_s.mT)
    torch.testing.assert_close(adapter(x, require_site(layer, "")), expected)
    W, b = adapter.weight(layer.weight), adapter.bias(layer.bias)
    torch.testing.assert_close(F.linear(x, W, b), expected)
    assert not torch.allclose(b, layer.bias)


def test_convolution_is_mixed_by_its_channels() -> None:
    layer, x = nn.Conv2d(3, 6, 3, stride=2, padding=1), torch.randn(2, 3, 9, 8)
    adapter = build(layer, rank=2)
    z = layer(x)
    low = F.conv2d(x, adapter.A_p.reshape(2, 3, 3, 3), stride=2, padding=1)
    expected = z + torch.einsum("or,brhw->bohw", adapter.B_p, low)
    expected = expected + torch.einsum("or,rc,bchw->bohw", adapter.B_s, adapter.A_s, z)
    torch.testing.assert_close(adapter(x, require_site(layer, "")), expected)


def test_without_the_branch_behind_it_is_lora() -> None:
    layer, x = nn.Linear(7, 5), torch.randn(4, 7)
    adapter = build(layer, rank=2)
    adapter.B_s.data.zero_()
    lora = LoRA(rank=2).build(require_site(layer, ""), torch.Generator())
    lora.A.data, lora.B.data = adapter.A_p.data, adapter.B_p.data
    torch.testing.assert_close(adapter(x, require_site(layer, "")), lora(x, require_site(layer, "")))


def test_dropout_falls_between_the_two_factors_of_a_branch_and_only_while_training() -> None:
    layer, x = nn.Linear(7, 5), torch.randn(200, 7)
    site, adapter = require_site(layer, ""), build(layer, rank=1, sequential_rank=1, dropout=0.5)
    assert torch.equal(adapter(x, site), adapter(x, site))
    change = adapter.train()(x, site) - layer(x)
    columns = torch.cat([adapter.B_p, adapter.B_s], dim=1)
    low = torch.linalg.lstsq(columns, change.mT).solution.mT / torch.cat(
        [x @ adapter.A_p.mT, layer(x) @ adapter.A_s.mT], dim=1
    )
    kept = low.detach().round()
    torch.testing.assert_close(low.detach(), kept, rtol=0, atol=1e-2)
    assert set(kept.flatten().tolist()) == {0.0, 2.0}


def test_rotation_of_the_outputs_above_it_takes_off_the_bias_that_it_has_changed() -> None:
    for layer, x in ((nn.Linear(7, 6), torch.randn(4, 7)), (nn.Conv2d(3, 6, 2), torch.randn(2, 3, 5, 5))):
        site = require_site(layer.requires_grad_(False), "")
        below = AdaptedSite(site, build(layer, rank=2))
        rotation = move(HRA(rank=2, side="out").build(site, torch.Generator()), size=0.5)
        dense = site.forward_with(x, rotation.weight(below.weight), below.bias)
        torch.testing.assert_close(AdaptedSite(below, rotation)(x), dense)


def test_grouped_convolution_is_refused() -> None:
    with pytest.raises(OptionError, match="groups=2 keeps apart; leave this layer out, with exclude="):
        build(nn.Conv2d(4, 4, 3, groups=2))


def test_rank_behind_is_at_most_the_outputs() -> None:
    with pytest.raises(OptionError, match="rank 6 is larger than the layer: its output side is 5"):
        build(nn.Linear(7, 5), rank=2, sequential_rank=6)


def test_export_to_lora_is_exact_without_a_bias(tmp_path: Path) -> None:
    model = adapted(stories(), Hydra(rank=2), ["q_proj", "down_proj"])
    export = isotune.export_lora(model, tmp_path / "lora")
    assert export.rank == 4
    assert export.residual < 1e-5
    assert_same_output(output(isotune.load(stories(), tmp_path / "lora").eval()), output(model))


def test_export_to_lora_is_refused_where_a_bias_would_change_also_from_a_folder(tmp_path: Path) -> None:
    model = adapted(minilm(), Hydra(rank=2), ["query"])
    isotune.save(model, tmp_path / "adapter", base_model=str(MINILM))
    for source in (model, tmp_path / "adapter"):
        with pytest.raises(NoLowRankFormError) as error:
            isotune.export_lora(source, tmp_path / "lora")
        assert (
            "'encoder.layer.0.attention.self.query' cannot be exported as a LoRA: hydra changes the layer's bias"
            in (str(error.value))
        )
        assert "isotune export --to merged works for it" in str(error.value)
    assert not (tmp_path / "lora").exists()
    # A stack is refused for any of its parts.
    adapted(model, LoRA(rank=2), ["query"], name="other")
    isotune.use(model, "other", "default")
    with pytest.raises(NoLowRankFormError, match="hydra changes the layer's bias"):
        isotune.export_lora(model, tmp_path / "lora")


def test_merged_weights_and_biases_compute_the_same(tmp_path: Path) -> None:
    model = adapted(minilm(), Hydra(rank=2), ["query", "dense"], size=0.02)
    expected = output(model)
    plain = isotune.fold(model, keep_base=False)
    assert_same_output(output(plain), expected)
    before = minilm().encoder.layer[0].attention.self.query.bias
    assert not torch.allclose(plain.encoder.layer[0].attention.self.query.bias, before)
    plain.save_pretrained(tmp_path)
    assert_same_output(output(type(plain).from_pretrained(tmp_path, attn_implementation="eager").eval()), expected)


@pytest.mark.parametrize(("base", "at"), [(STORIES, "q_proj"), (MINILM, "query")], ids=["no bias", "bias"])
def test_inspection_measures_the_change_of_the_weight(base: Path, at: str, tmp_path: Path) -> None:
    model = adapted({STORIES: stories, MINILM: minilm}[base](), Hydra(rank=2, sequential_rank=1), [at])
    isotune.save(model, tmp_path)
    row = diagnose(tmp_path, base).sites[0]
    assert row.change_rank == 3
    assert row.trainable == Hydra(rank=2, sequential_rank=1).parameter_count(
        linear_site(row.in_features, row.out_features)
    )
    isotune.save(model, tmp_path, base_model="no/such-base")
    assert diagnose(tmp_path).sites[0].change_rank is None

"""Whole diagnoses: of adapters, runs and full models, beside each other, and of what cannot be measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import isotune
from isotune import HRA, LoRA
from isotune.diagnostics import all_measures, diagnose, survey
from isotune.errors import CheckpointError, IsotuneError, OptionError
from isotune.model.names import adapted_layers
from isotune.sites import require_site
from support import MINILM, STORIES, adapted, minilm, resnet20, stories


def moved(model: nn.Module, size: float = 0.02, seed: int = 0) -> Any:
    """The model with every parameter changed, as by training in full."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn_like(parameter)
    return model


def test_the_sizes_are_those_of_the_dense_change(tmp_path: Path) -> None:
    model = adapted(stories(), LoRA(rank=3), "all-linear")
    isotune.save(model, tmp_path)
    found = diagnose(tmp_path)
    weights = {
        p: (require_site(layer, "").weight, layer.weight.detach() - require_site(layer, "").weight)
        for p, layer in adapted_layers(model)
    }
    changes = sum(float(change.square().sum()) for _, change in weights.values())
    everything = sum(float(W.square().sum()) for W, _ in weights.values())
    assert found.total.relative_change == pytest.approx(math.sqrt(changes / everything), rel=1e-4)
    assert found.total.sites == len(weights) == len(found.sites)
    assert found.total.trainable == sum(site.trainable for site in found.sites)
    assert sum(site.share or 0 for site in found.sites) == pytest.approx(1)
    for site in found.sites:
        W, change = weights[site.site]
        values = torch.linalg.svdvals(change)
        assert site.change_norm == pytest.approx(float(change.norm() / W.norm()), rel=1e-4)
        assert site.share == pytest.approx(float(change.square().sum()) / changes, rel=1e-3)
        assert site.change_rank == len(site.change_values or []) == 3
        assert site.change_values == pytest.approx(values[:3].tolist(), rel=1e-4)
        assert site.weight_values == pytest.approx(torch.linalg.svdvals(W)[:10].tolist(), rel=1e-4)
        assert site.adapted_values == pytest.approx(torch.linalg.svdvals(W + change)[:10].tolist(), rel=1e-4)
        assert site.angles is None
        assert 1 < (site.effective_rank or 0) <= 3 + 1e-6


def test_an_adapter_at_its_start_has_done_nothing(tmp_path: Path) -> None:
    for settings in (LoRA(rank=2), HRA(rank=2)):
        isotune.save(isotune.adapt(stories(), settings, "attention"), tmp_path / settings.name)
        found = diagnose(tmp_path / settings.name)
        assert found.total.intruders == found.total.sites_with_intruders == 0
        assert found.total.relative_change == pytest.approx(0, abs=1e-6)
        for site in found.sites:
            assert site.change_rank == 0
            assert site.variation is not None
            assert site.variation.values < 1e-5
            assert site.variation.distance < 1e-3


def test_a_rotation_of_the_input_keeps_the_spectrum_and_has_angles(tmp_path: Path) -> None:
    isotune.save(adapted(stories(), HRA(rank=4), "attention", size=0.3), tmp_path)
    for site in diagnose(tmp_path).sites:
        assert site.variation is not None
        assert site.variation.relative < 1e-5
        assert site.intruders == []  # every left vector is where it was
        assert site.orthogonality_error is not None
        assert site.orthogonality_error < 1e-5
        assert site.angles is not None
        assert len(site.angles) == 2
        # |W (R - I)| <= |W| times the largest |exp(iθ) - 1|
        assert site.change_norm is not None
        assert site.change_norm <= 2 * math.sin(max(site.angles) / 2) + 1e-6


def test_it_is_plain_json(tmp_path: Path) -> None:
    isotune.save(adapted(stories(), HRA(rank=2), "query-value"), tmp_path)
    said = json.loads(json.dumps(diagnose(tmp_path, k=4).to_dict(), allow_nan=False))
    assert said["kind"] == "adapter"
    assert said["method"] == "hra"
    assert said["base_model"] == str(STORIES)
    assert said["settings"] == {"k": 4, "threshold": 0.5, "side": "left"}
    assert set(said["total"]) == {"sites", "trainable", "relative_change", "intruders", "sites_with_intruders"}
    assert len(said["sites"][0]["similarity"]) == 4
    assert {"values", "vectors"} <= set(said["sites"][0]["variation"])


def test_without_the_base_what_needs_it_is_none(tmp_path: Path) -> None:
    for settings in (LoRA(rank=2), HRA(rank=2)):
        isotune.save(adapted(stories(), settings, "attention"), tmp_path / settings.name, base_model="no/such-base")
        found = diagnose(tmp_path / settings.name)
        assert found.total.relative_change is None
        assert found.total.intruders is None
        for site in found.sites:
            assert site.change_norm is site.similarity is site.variation is site.weight_values is None
            # What a LoRA adds is known without the weight that it is added to, what a rotation does is not.
            assert (site.change_values is None) == (settings.name == "hra")
            assert site.change_rank == (None if settings.name == "hra" else 2)
            assert (site.angles is None) == (settings.name == "lora")


def test_without_spectra_the_base_is_not_decomposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isotune.save(adapted(stories(), LoRA(rank=2), "attention"), tmp_path)
    monkeypatch.setattr(all_measures, "dense_svd", None)
    found = diagnose(tmp_path, spectral=False)
    assert all(site.change_norm and site.intruders is None for site in found.sites)


def test_each_weight_of_a_base_is_decomposed_once_for_all_adaptations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(W: torch.Tensor) -> Any:
        calls.append(tuple(W.shape))
        return dense_svd(W)

    dense_svd = all_measures.dense_svd
    isotune.save(adapted(stories(), LoRA(rank=2), "attention"), tmp_path / "one")
    isotune.save(adapted(stories(), HRA(rank=2), "attention"), tmp_path / "two")
    moved(stories()).save_pretrained(tmp_path / "full")
    monkeypatch.setattr(all_measures, "dense_svd", counted)
    found = survey([tmp_path / name for name in ("one", "two", "full")], STORIES)
    assert len(calls) == 7 * 5  # the attention's four are in all three
    assert [d.kind for d in found.diagnoses] == ["adapter", "adapter", "checkpoint"]
    for diagnosis, name in zip(found.diagnoses, ("one", "two", "full"), strict=True):
        alone = diagnose(tmp_path / name, STORIES, only="layers.1").sites
        together = [site for site in diagnosis.sites if "layers.1" in site.site]
        # The share is of all layers that are measured.
        assert [replace(site, share=None) for site in together] == [replace(site, share=None) for site in alone]


def test_adaptations_of_one_base_are_compared_layer_by_layer(tmp_path: Path) -> None:
    isotune.save(adapted(stories(), LoRA(rank=2), "attention"), tmp_path / "one")
    isotune.save(adapted(stories(), LoRA(rank=2), ["q_proj", "up_proj"], seed=5), tmp_path / "two")
    moved(stories()).save_pretrained(tmp_path / "full")
    found = survey([tmp_path / "one", tmp_path / "two", tmp_path / "one", tmp_path / "full"], STORIES, spectral=False)
    pairs = {tuple(Path(m).name for m in overlap.models): overlap for overlap in found.overlaps}
    assert len(found.overlaps) == 6
    same = found.overlaps[1]  # the first and the third are one adapter
    assert same.columns == pytest.approx(1, abs=1e-5)
    assert same.rows == pytest.approx(1, abs=1e-5)
    two = pairs["one", "two"]
    assert [site.site.rpartition(".")[2] for site in two.sites] == ["q_proj"] * 5
    assert two.columns is not None
    assert two.columns < 0.4
    assert len(pairs["one", "full"].sites) == 4 * 5


def test_a_run_leads_to_its_adapter_or_its_model(tmp_path: Path) -> None:
    for name in ("lora", "full", "stopped"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text("# A resolved isotune recipe: ...\n")
    isotune.save(adapted(stories(), LoRA(rank=2), "attention"), tmp_path / "lora/adapter")
    moved(stories()).save_pretrained(tmp_path / "full/model")
    (tmp_path / "full/model/task.json").write_text(json.dumps({"model": str(STORIES)}))
    assert diagnose(tmp_path / "lora").method == "lora"
    found = diagnose(tmp_path / "full", only="q_proj")  # task.json names the base
    assert (found.kind, found.method, len(found.sites)) == ("checkpoint", "full", 5)
    with pytest.raises(CheckpointError, match=r"is not finished: isotune train .*recipe\.yaml --resume"):
        diagnose(tmp_path / "stopped")


def test_of_a_full_model_the_matrices_of_its_layers_are_measured_and_the_rest_is_named(tmp_path: Path) -> None:
    moved(minilm()).save_pretrained(tmp_path / "full")
    found = diagnose(tmp_path / "full", MINILM, spectral=False, only=r"layer\.3")
    assert len(found.sites) == 6
    left = {name for names in found.left_out.values() for name in names}
    assert {"embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"} <= left
    assert len(left) + 6 * 6 + 1 == len(load_file(tmp_path / "full/model.safetensors"))  # and the pooler
    row = next(site for site in found.sites if site.site.endswith("layer.3.intermediate.dense"))
    before, after = (
        load_file(folder / "model.safetensors")[f"{row.site}.weight"] for folder in (MINILM, tmp_path / "full")
    )
    assert (row.out_features, row.in_features, row.trainable) == (*before.shape, before.numel())
    assert row.change_norm == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)


def test_tensors_that_the_base_lacks_or_has_in_another_shape_are_left_out(tmp_path: Path) -> None:
    moved(stories()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["extra.proj.weight"] = torch.ones(4, 4)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name][:32].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = diagnose(tmp_path, STORIES, spectral=False)
    assert found.left_out["not in the base"] == ["extra.proj.weight"]
    assert found.left_out["of another shape in the base"] == [name]
    assert len(found.sites) == 7 * 5 - 1


def test_weights_that_a_model_stores_turned_are_measured_as_its_layers_compute(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).bfloat16()
    model.save_pretrained(tmp_path / "base")
    before = model.transformer.h[0].attn.c_attn.weight.detach().float()
    moved(model).save_pretrained(tmp_path / "full")
    after = model.transformer.h[0].attn.c_attn.weight.detach().float()
    found = diagnose(tmp_path / "full", tmp_path / "base", k=3)
    assert len(found.sites) == 4
    row = next(site for site in found.sites if site.site.endswith("c_attn"))
    assert (row.kind, row.out_features, row.in_features) == ("gpt2_conv1d", 96, 32)
    U0, U = torch.linalg.svd(before.mT)[0][:, :32], torch.linalg.svd(after.mT)[0][:, :3]
    assert row.similarity == pytest.approx((U0.mT @ U).abs().amax(0).tolist(), abs=1e-3)


def test_an_unchanged_model_has_no_change(tmp_path: Path) -> None:
    stories().save_pretrained(tmp_path)
    found = diagnose(tmp_path, STORIES)
    assert found.total.relative_change == found.total.intruders == 0
    assert all(site.effective_rank == site.share == 0 and site.intruder_share is None for site in found.sites)


def test_embeddings_and_convolutions_are_measured_by_their_matrix(tmp_path: Path) -> None:
    model = resnet20()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    isotune.save(adapted(model, LoRA(rank=2), ["conv1"]), tmp_path / "convs")
    found = diagnose(tmp_path / "convs", tmp_path)
    layers = dict(adapted_layers(model))
    for site in found.sites:
        W, changed = require_site(layers[site.site], "").weight, layers[site.site].weight.detach()
        assert (site.kind, site.out_features, site.in_features) == ("conv2d", *W.shape)
        expected = torch.linalg.svdvals(changed.flatten(1))[:10]
        assert site.adapted_values == pytest.approx(expected.tolist(), rel=1e-3)
    isotune.save(adapted(stories(), LoRA(rank=2), ["embed_tokens"]), tmp_path / "tokens")
    (row,) = diagnose(tmp_path / "tokens").sites
    assert (row.kind, row.out_features, row.in_features, row.change_rank) == ("embedding", 64, 512, 2)
    assert row.similarity is not None


def test_modules_trained_in_full_are_named(tmp_path: Path) -> None:
    isotune.save(adapted(stories(), LoRA(rank=2), "attention", train_also=["norm"]), tmp_path)
    assert diagnose(tmp_path, spectral=False).trained_modules == ["model.norm"]


@pytest.mark.parametrize("name", ["oft", "boft", "hoft", "dora", "vera", "fourierft", "ia3", "pissa", "road"])
def test_methods_of_every_kind_are_measured(name: str, tmp_path: Path) -> None:
    model = adapted(stories(), isotune.method(name), ["q_proj"])
    isotune.save(model, tmp_path)
    found = diagnose(tmp_path)
    layers = dict(adapted_layers(model))
    for site in found.sites:
        W, changed = require_site(layers[site.site], "").weight, layers[site.site].weight.detach()
        assert site.change_norm == pytest.approx(float((changed - W).norm() / W.norm()), rel=1e-3)
        assert site.adapted_values == pytest.approx(torch.linalg.svdvals(changed)[:10].tolist(), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 0}, "k=0 is not usable"),
        ({"threshold": 0.0}, "threshold=0 is not usable"),
        ({"side": "inside"}, "choose left, right or both"),
        ({"only": "nowhere"}, "is found in the path of no weight; there are model.layers"),
        ({"only": "("}, "is no regular expression"),
        ({"device": "abacus"}, "device='abacus' is not usable"),
        ({"base": "no/such-base/here"}, "no/such-base/here"),
        ({"base": MINILM}, "has no tensor"),
    ],
)
def test_a_mistake_is_one_message(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    isotune.save(adapted(stories(), LoRA(rank=2), "attention"), tmp_path)
    with pytest.raises(IsotuneError, match=says):
        diagnose(tmp_path, **options)


def test_what_is_nothing_of_ours_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no adapter folder"):
        diagnose(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is no adapter, no run and no model"):
        diagnose(tmp_path)
    with pytest.raises(OptionError, match="there is nothing to diagnose"):
        survey([])
    stories().save_pretrained(tmp_path / "full")
    with pytest.raises(CheckpointError, match="can only be measured against the one that it started from"):
        diagnose(tmp_path / "full")
    with pytest.raises(CheckpointError, match="has no matrix in common with the base"):
        diagnose(tmp_path / "full", MINILM)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    isotune.save(adapted(stories(), LoRA(rank=2), "attention"), tmp_path / "adapter")
    stories().save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.self_attn.k_proj.weight"][0, 0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"not finite .* at 'model.layers.2.self_attn.k_proj'"):
        diagnose(tmp_path / "adapter", tmp_path / "base")

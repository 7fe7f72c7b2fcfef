"""Nothing that a model needs beside its adapter and its base is left out in silence."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import isotune
from isotune import HRA, LoRA
from isotune.errors import IsotuneWarning

BERT = transformers.BertConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    transformers.BertModel(BERT, add_pooling_layer=True).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def classifier(base: Path) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)


def test_a_head_drawn_at_random_is_told_of_at_save(base: Path, tmp_path: Path) -> None:
    model = isotune.adapt(classifier(base), HRA(rank=4), "query-value")
    with pytest.warns(IsotuneWarning, match=r"hold classifier, which the base.* train_also=\['classifier'\]"):
        isotune.save(model, tmp_path / "adapter")


def test_what_the_warning_says_to_write_makes_the_loaded_model_answer_alike(base: Path, tmp_path: Path) -> None:
    model = isotune.adapt(classifier(base), HRA(rank=4), "query-value", train_also=["classifier"]).eval()
    isotune.save(model, tmp_path / "adapter")
    loaded = isotune.load(classifier(base), tmp_path / "adapter").eval()
    ids = torch.arange(6).view(1, 6)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_head_of_another_size_than_the_stored_one_is_a_drawn_one(tmp_path: Path) -> None:
    transformers.BertForSequenceClassification(BERT).save_pretrained(tmp_path / "base")
    kind = transformers.BertForSequenceClassification
    model = kind.from_pretrained(tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True)
    isotune.adapt(model, LoRA(rank=2), "query-value")
    with pytest.warns(IsotuneWarning, match="hold classifier, which"):
        isotune.save(model, tmp_path / "adapter")


def test_rows_added_to_an_embedding_are_told_of(base: Path, tmp_path: Path) -> None:
    model = transformers.AutoModel.from_pretrained(base)
    model.resize_token_embeddings(43, mean_resizing=False)
    isotune.adapt(model, LoRA(rank=2), "query-value")
    with pytest.warns(IsotuneWarning, match=r"hold embeddings.word_embeddings, which .* another shape"):
        isotune.save(model, tmp_path / "adapter")


@pytest.mark.parametrize("changed", [False, True])
def test_fewer_rows_of_a_table_are_told_of_where_they_are_not_the_first_ones(
    changed: bool, base: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModel.from_pretrained(base)
    table = model.embeddings.position_embeddings.weight[:8].detach().clone()
    table[0, 0] += changed
    model.embeddings.position_embeddings = nn.Embedding.from_pretrained(table)
    isotune.adapt(model, LoRA(rank=2), "query-value")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        isotune.save(model, tmp_path / "adapter")
    assert [str(w.message) for w in told if "embeddings.position_embeddings" in str(w.message)] == [
        str(w.message) for w in told
    ]
    assert len(told) == changed


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_is_its_base_is_saved_without_a_word(tied: bool, tmp_path: Path) -> None:
    """Tied heads and experts that the files hold one by one are no weights of the model's own."""
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, tie_word_embeddings=tied,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base")
    isotune.adapt(model, LoRA(rank=2), ["q_proj", "experts.down_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        isotune.save(model, tmp_path / "adapter")


def test_running_statistics_that_moved_while_training_are_told_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 2))
    isotune.adapt(network, LoRA(rank=2), ["3"])
    isotune.save(network, tmp_path / "before")
    network(torch.randn(4, 3, 8, 8))
    with pytest.warns(IsotuneWarning, match=r"the running statistics of 1, which training moved"):
        isotune.save(network, tmp_path / "after")


@pytest.mark.parametrize("way", ["kept", "stored"])
def test_statistics_that_stay_or_are_stored_are_not(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 2))
    isotune.adapt(network, LoRA(rank=2), ["3"], train_also=["1"] if way == "stored" else [])
    if way == "kept":
        network[1].eval()
    network(torch.randn(4, 3, 8, 8))
    isotune.save(network, tmp_path / "adapter")


def test_a_model_of_diffusers_with_a_layer_put_around_its_own_is_saved(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    kind, blocks = diffusers.UNet2DModel, {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    kind(4, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks).save_pretrained(
        tmp_path / "base"
    )
    model = kind.from_pretrained(tmp_path / "base")
    model.conv_in = nn.Sequential(model.conv_in)
    isotune.adapt(model, LoRA(rank=2), ["conv_out"])
    isotune.save(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()

"""What an optimizer is told of parameters: which are matrices, of what kind, and which are left to AdamW."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import isotune
from isotune.adapters.registry import method_names
from isotune.errors import IsotuneError, OptionError
from isotune.optim import OPTIMIZERS, optimizer_class
from support import PROMPTS, Reader

OPTIONS = {"miss": {"rank": 8}, "bat": {"rank": 8}, "hira": {"rank": 8}}
MATRICES: dict[str, set[str]] = {
    "hra": {"U"},
    "hoft": {"inner.U", "outer.U"},
    "shoft": {"inner.U", "outer.U"},
    "oft": {"Q"},
    "boft": {"Q"},
    "psoft": {"R"},
    "dora": {"product.A", "product.B"},
    "doran": {"product.A", "product.B"},
    "ortha": {"B"},
    "hydra": {"A_p", "B_p", "A_s", "B_s"},
    "miss": {"block"},
    "bat": {"block"},
    "hira": {"A", "B"},
    "loha": {"A1", "B1", "A2", "B2"},
    "lokr": {"W1", "W2"},
    "poly": {"A", "B"},
    "adaptformer": {"D", "U"},
    "houlsby": {"D", "U"},
    "moa": {"D", "U"},
    "conformer": {"V", "U"},
    "mola": {f"experts.{k}.{part}" for k in range(5) for part in "AB"},
    "kadaptation": {"u", "v"},
    "diffora": {"A", "B"},
    "sora": {"A", "B"},
    "adalora": {"A", "B"},
    "pego": {"A", "B"},
    "splora": {"A", "B"},
    "sppara": {"P"},
    "splopa": {"P"},
    **{name: {"A", "B"} for name in ("lora", "loraplus", "pissa", "olora", "corda", "sorsa", "delora")},
}
"""By method; of the others every number stands for itself."""


def adapted(name: str, **options: Any) -> nn.Module:
    """One layer with an adapter."""
    torch.manual_seed(0)
    layer = Reader(24) if name in PROMPTS else nn.LayerNorm(24) if name == "ln_tuning" else nn.Linear(24, 48)
    return isotune.adapt(nn.Sequential(layer), isotune.method(name, **OPTIONS.get(name, {}) | options), "0", seed=0)


def names(model: nn.Module, groups: list[dict[str, Any]], **wanted: Any) -> set[str]:
    """The parameters of the groups with these entries, without the layer's path."""
    known = {p: name.partition(".default.")[2] or name for name, p in model.named_parameters()}
    fitting = [group for group in groups if wanted.items() <= group.items()]
    return {known[p] for group in fitting for p in group["params"]}


@pytest.mark.parametrize("name", method_names())
def test_every_method_says_which_of_its_parameters_are_matrices(name: str) -> None:
    model = adapted(name)
    groups = isotune.parameter_groups(model, lr=1e-3, algorithm="muon")
    assert names(model, groups, algorithm="muon") == MATRICES.get(name, set())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert Counter(id(p) for group in groups for p in group["params"]) == Counter(map(id, trained))


@pytest.mark.parametrize("algorithm", sorted(OPTIMIZERS))
@pytest.mark.parametrize("name", ["hra", "dora", "oft", "bat", "lora"])
def test_every_optimizer_trains_with_its_groups(name: str, algorithm: str) -> None:
    model = adapted(name).double()
    if algorithm == "odelora" and name in ("hra", "oft", "bat"):
        with pytest.raises(IsotuneError, match="nothing here has such a pair"):
            isotune.parameter_groups(model, lr=1e-3, algorithm=algorithm)
        return
    groups = isotune.parameter_groups(model, lr=1e-3, weight_decay=0.0, algorithm=algorithm)
    options = {"unconstrained": True} if algorithm.startswith("scion") else {}
    optimizer = optimizer_class(algorithm)(groups, **options)
    X, Y = torch.randn(64, 24, dtype=torch.float64), torch.randn(64, 48, dtype=torch.float64)
    losses = []
    for _ in range(20):
        if algorithm != "scion_light":
            optimizer.zero_grad()
        loss = (model(X) - Y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_factors_on_the_rate_stay() -> None:
    model = adapted("loraplus", ratio=4.0)
    for algorithm in (None, "muon", "allora"):
        groups = isotune.parameter_groups(model, lr=1.0, weight_decay=0.5, algorithm=algorithm)
        assert names(model, groups, lr=4.0, weight_decay=0.5) == {"B"}
    assert names(model, isotune.parameter_groups(model, 1.0, algorithm="allora"), algorithm="allora") == {"B"}


def test_pairs_come_after_each_other_with_their_scales() -> None:
    model = isotune.adapt(
        nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)),
        isotune.method("lora", rank=2, alpha=4.0),
        ["0", "1"],
        seed=0,
    )
    (group,) = isotune.parameter_groups(model, lr=1.0, algorithm="odelora")
    assert [tuple(p.shape) for p in group["params"]] == [(2, 6), (8, 2), (2, 8), (5, 2)]
    assert group["scale"] == 2.0


def test_heads_embeddings_norms_and_biases_of_a_whole_model_are_left_to_adamw() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    for tied in (True, False):
        llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied))
        groups = isotune.parameter_groups(llama, lr=1.0, algorithm="muon")
        left = names(llama, groups, algorithm="adamw")
        assert left == {n for n, p in llama.named_parameters() if p.dim() == 1 or "embed" in n or "lm_head" in n}
    bert = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2))
    groups = isotune.parameter_groups(bert, lr=1.0, algorithm="scion")
    signs = names(bert, groups, norm="sign")
    assert signs == {n for n, p in bert.named_parameters() if p.dim() > 1 and ("embed" in n or "classifier" in n)}
    kernels = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    groups = isotune.parameter_groups(kernels, lr=1.0, algorithm="muon")
    assert names(kernels, groups, algorithm="muon") == {"0.weight"}


def test_what_train_also_names_is_a_head() -> None:
    model = isotune.adapt(
        nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)),
        isotune.method("lora", rank=2),
        ["0"],
        train_also=["1"],
        seed=0,
    )
    groups = isotune.parameter_groups(model, lr=1.0, algorithm="muon")
    assert len([p for group in groups if group["algorithm"] == "adamw" for p in group["params"]]) == 2


def test_another_name_is_refused() -> None:
    with pytest.raises(OptionError, match="optimizer 'moon' is unknown"):
        isotune.parameter_groups(adapted("lora"), lr=1.0, algorithm="moon")

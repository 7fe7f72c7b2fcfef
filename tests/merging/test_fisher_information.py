"""The Fisher information, against closed forms and against the gradients of single examples."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from transformers.pytorch_utils import Conv1D

import isotune
from isotune import HRA, LoRA
from isotune.errors import IsotuneError, OptionError
from isotune.model.adapted import adapted_site
from isotune.sites import require_site
from isotune.statistics.fisher import fisher
from isotune.statistics.likelihood import directions
from isotune.statistics.whole_model import parameter_fisher
from support import adapted, resnet20, stories, tokens


class Logistic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(5, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        score = self.w(x)
        return torch.cat([score, torch.zeros_like(score)], dim=1)


class Tokens(nn.Module):
    """Several tokens an example, a layer that is called twice, a convolution, an embedding, dropout."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=0)
        self.twice, self.conv1d = nn.Linear(6, 6), Conv1D(8, 6)
        self.conv2d = nn.Conv2d(2, 4, 3, padding=1, stride=2, groups=2)
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(torch.tanh(self.twice(self.twice(self.embedding(x)))))
        h = F.relu(self.conv1d(h), inplace=True)
        h = self.conv2d(h.reshape(len(x), 2, 4, -1))
        return self.head(F.adaptive_avg_pool2d(torch.tanh(h), (2, 4)).flatten(1))


X = torch.tensor([[1, 4, 4, 0], [2, 2, 10, 7], [5, 6, 1, 3], [9, 0, 0, 8], [3, 3, 3, 3]])
LAYERS = ["twice", "conv1d", "conv2d", "head", "embedding"]


def reference(weights: dict[str, Tensor], forward: Any, x: Tensor) -> dict[str, Tensor]:
    """`1/N Σ_n Σ_c p_c (∂ log p_c)²`, one example and one class at a time."""
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    p = forward(weights, x).softmax(-1).detach()
    for c in range(p.shape[1]):

        def score(own: dict[str, Tensor], row: Tensor, c: int = c) -> Tensor:
            return forward(own, row[None]).log_softmax(-1)[0, c]

        gradients = vmap(grad(score), in_dims=(None, 0))(weights, x)
        for name, g in gradients.items():
            total[name] += (p[:, c].reshape(-1, *[1] * (g.dim() - 1)) * g.square()).mean(0)
    return {name: w.detach() for name, w in total.items()}


def test_logistic_regression_has_its_closed_form() -> None:
    model, x = Logistic(), torch.randn(7, 5, dtype=torch.float64)
    p = torch.sigmoid(model.w(x))
    found = fisher(model, [x[:4], x[4:]], whole_model=True)
    torch.testing.assert_close(found["w"], (p * (1 - p) * x.square()).mean(0, keepdim=True).detach())
    torch.testing.assert_close(found["w.bias"], (p * (1 - p)).mean(0).detach())


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_whole_model_is_the_sum_over_examples_and_classes(classes: int) -> None:
    model = Tokens(classes).double().train()
    weights = {n: p.detach() for n, p in model.named_parameters() if not n.startswith("embedding")}
    found = fisher(model, [X[:2], X[2:]], whole_model=True)
    assert model.dropout.training
    expected = reference(weights, lambda w, x: functional_call(model.eval(), w, (x,)), X)
    assert found.keys() == {name.removesuffix(".weight") for name in expected}
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name.removesuffix(".weight")], wanted, rtol=1e-8, atol=1e-14)


class Tied(nn.Module):
    """A table that is the head as well, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(x).mean(1)))


@pytest.mark.parametrize("model", [Tokens, Tied])
def test_every_parameter_has_that_of_single_examples(model: type[nn.Module]) -> None:
    """Embeddings, norms and shared weights too; frozen parameters are frozen again."""
    net = model().double().train()
    first = next(net.parameters()).requires_grad_(False)
    weights = {n: p.detach() for n, p in net.named_parameters()}
    found = parameter_fisher(net, X.split(1))
    assert not first.requires_grad
    expected = reference(weights, lambda w, x: functional_call(net.eval(), w, (x,)), X)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-8, atol=1e-14)
    with pytest.raises(IsotuneError, match="a batch holds 2 examples; give one at a time"):
        parameter_fisher(net, X.split(2))


@pytest.mark.parametrize("method", [LoRA(rank=2, alpha=3.0), HRA(rank=2)])
def test_adapted_layers_have_that_of_their_adapted_weights(method: isotune.Settings) -> None:
    layers = LAYERS if method.name == "lora" else LAYERS[:-1]
    model = adapted(Tokens().double(), method, layers, size=0.3)
    found = fisher(model, [X[:3], X[3:]])
    plain = Tokens().double()
    matrices = {path: adapted_site(model.get_submodule(path)).weight.detach() for path in layers}
    sites = {path: require_site(model.get_submodule(path), path) for path in layers}
    rest = dict(isotune.remove(copy.deepcopy(model), "default").named_parameters())

    def forward(w: dict[str, Tensor], x: Tensor) -> Tensor:
        own = {f"{path}.weight": sites[path].layout(w[path]) for path in layers}
        return functional_call(plain.eval(), {**rest, **own}, (x,))

    for path, wanted in reference(matrices, forward, X).items():
        torch.testing.assert_close(found[path], wanted, rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_are_a_root_of_the_covariance_of_the_classes(dtype: torch.dtype) -> None:
    scores = 4 * torch.randn(20, 6, dtype=dtype)
    scores[0, 2], scores[1, 5], scores[2, :3], scores[3] = 1e4, 1e4, -1e4, 0
    p = scores.softmax(-1)
    turns = list(directions(scores, None, None, "exact", torch.Generator()))
    assert [last for _, last in turns] == [False] * 4 + [True]
    found = sum((S[:, :, None] * S[:, None] for S, _ in turns), torch.zeros(()))
    tolerance = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, p.diag_embed() - p[:, :, None] * p[:, None], rtol=0, atol=tolerance)


def test_batches_examples_and_frozen_adapters_do_not_matter() -> None:
    model = adapted(Tokens(), LoRA(rank=2), ["twice", "head"], size=0.3)
    whole = fisher(model, [X[:3]])
    model.requires_grad_(False)
    for batches in ([X[:1], X[1:2], X[2:3]], [X[:2], X[2:]], [X]):
        for path, wanted in fisher(model, batches, examples=3).items():
            torch.testing.assert_close(wanted, whole[path], rtol=1e-4, atol=1e-10)


def test_square_of_the_summed_gradient_is_something_else() -> None:
    """FusionBench and MergeLM square the gradient of `Σ_n Σ_c √p_c log p_c`: it has terms across n and c."""
    model, x = nn.Linear(6, 4).double(), torch.randn(8, 6, dtype=torch.float64)
    found = fisher(model, [x], whole_model=True)[""]

    def summed(W: Tensor) -> Tensor:
        logs = F.linear(x, W, model.bias).log_softmax(-1)
        return (logs.exp().detach().sqrt() * logs).sum()

    ratio = grad(summed)(model.weight.detach()).square() / len(x) / found
    assert ratio.min() < 1e-2
    assert ratio.max() / ratio.min() > 100


def language_model() -> Any:
    return adapted(stories(), LoRA(rank=2), ["q_proj", "v_proj"], size=0.1)


def sequences(model: nn.Module) -> list[dict[str, Tensor]]:
    batch = tokens(model)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :3] = -100
    return [{**batch, "labels": labels}]


def test_empirical_fisher_of_a_language_model_is_that_of_whole_sequences() -> None:
    model = language_model()
    (batch,) = sequences(model)
    found = fisher(model, [batch], "empirical")
    path = "model.layers.2.self_attn.v_proj"
    adapter = model.get_submodule(path).isotune["default"]
    expected = torch.zeros_like(found[path])
    for row in range(2):
        y: list[Tensor] = []
        handle = model.get_submodule(path).register_forward_hook(lambda _, args, out, y=y: y.extend([args[0], out]))
        logits = model(batch["input_ids"][row : row + 1], batch["attention_mask"][row : row + 1]).logits
        handle.remove()
        loss = F.cross_entropy(logits[0, :-1], batch["labels"][row, 1:], reduction="sum")
        (g,) = torch.autograd.grad(loss, y[1])
        expected += (g[0].mT @ y[0][0].detach()).square() / 2
    assert adapter.method == "lora"
    torch.testing.assert_close(found[path], expected, rtol=1e-4, atol=1e-9)


def test_sampled_fisher_has_the_mean_of_the_exact_one() -> None:
    model = adapted(Tokens(), LoRA(rank=2), ["head"], size=0.3)
    exact = fisher(model, [X])["head"]
    sampled = fisher(model, [X] * 2000, "sample")["head"]
    assert (sampled - exact).norm() < 0.05 * exact.norm()
    assert not fisher(model, [X], "sample", seed=1)["head"].equal(fisher(model, [X], "sample", seed=2)["head"])
    assert fisher(model, [X], "sample", seed=1)["head"].equal(fisher(model, [X], "sample", seed=1)["head"])


def test_sampled_fisher_of_a_language_model_needs_no_labels() -> None:
    model = language_model()
    found = fisher(model, [tokens(model)], "sample")
    assert len(found) == 10
    assert all(value.isfinite().all() and (value >= 0).all() and value.any() for value in found.values())


class Shared(nn.Module):
    """One layer in two places, called by keyword, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"a": nn.Linear(5, 5)})
        self.second = nn.ModuleDict({"a": self.first["a"]})
        self.out, self.tied = nn.Linear(5, 5), nn.Linear(5, 5)
        self.tied.weight = self.out.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.second["a"](input=torch.tanh(self.first["a"](x)))
        return self.tied(torch.tanh(self.out(x)))


def test_shared_weight_sums_the_gradients_of_its_uses_before_the_square() -> None:
    model, x = Shared().double(), torch.randn(4, 5, dtype=torch.float64)
    found = fisher(model, [x], whole_model=True)
    assert found.keys() == {"first.a", "second.a", "first.a.bias", "second.a.bias", "out", "tied"}
    weights = {name: p.detach() for name, p in model.named_parameters()}
    expected = reference(weights, lambda w, x: functional_call(model, w, (x,)), x)
    for path, name in {"first.a": "first.a.weight", "second.a": "first.a.weight", "first.a.bias": "first.a.bias",
                       "out": "out.weight", "tied": "out.weight"}.items():  # fmt: skip
        torch.testing.assert_close(found[path], expected[name], rtol=1e-8, atol=1e-14)


class AltersItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.a(x)
        x.zero_()
        return y


def test_input_altered_in_place_after_the_layer_counts_as_the_layer_saw_it() -> None:
    model, x = AltersItsInput(), torch.randn(4, 5)
    torch.testing.assert_close(fisher(model, [x], whole_model=True)["a"], fisher(model.a, [x], whole_model=True)[""])


def test_pretrained_convolutions_give_the_same_alone_and_in_a_batch() -> None:
    model, x = adapted(resnet20(), LoRA(rank=1), ["conv1"]), torch.randn(3, 3, 16, 16)
    whole, alone = fisher(model, [x]), fisher(model, list(x.split(1)))
    assert len(whole) == 10
    for path, wanted in alone.items():
        torch.testing.assert_close(whole[path], wanted, rtol=1e-3, atol=1e-6 * float(wanted.max()))


def test_model_is_left_as_it_was() -> None:
    model = adapted(Tokens(), LoRA(rank=2), ["head"]).train()
    fisher(model, [X])
    assert model.training
    assert not model.head._forward_hooks
    assert all(p.grad is None for p in model.parameters())


class Mixing(nn.Module):
    """Puts the tokens first, as older transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x.transpose(0, 1).reshape(-1, 4)).reshape(x.shape[1], len(x), 4).mean(0))


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


def test_layer_that_mixes_examples_is_refused_and_single_examples_are_not() -> None:
    model, x = adapted(Mixing(), LoRA(rank=1), ["a"]), torch.randn(2, 3, 4)
    with pytest.raises(IsotuneError, match=r"'a' mixes the examples of a batch, .* one example each"):
        fisher(model, [x])
    assert fisher(model, [x[:1], x[1:]])["a"].any()


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(IsotuneError, match="no adapted layers in use"):
        fisher(Tokens(), [X])
    model = adapted(Tokens(), LoRA(rank=2), ["head"])
    with pytest.raises(OptionError, match="needs the labels of each batch"):
        fisher(model, [X], "empirical")
    with pytest.raises(OptionError, match="choose exact, sample or empirical"):
        fisher(model, [X], "exakt")  # type: ignore[arg-type]
    with pytest.raises(IsotuneError, match="no examples"):
        fisher(model, [])
    with pytest.raises(IsotuneError, match=r"this model gives \(2, 1\)"):
        fisher(adapted(Regression(), LoRA(rank=1), ["a"]), [torch.randn(2, 4)])
    causal = language_model()
    with pytest.raises(
        OptionError, match=r"takes 512 backward passes for each position; choose expectation='sample'"
    ):
        fisher(causal, [tokens(causal)])

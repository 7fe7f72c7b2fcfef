"""A linear probe: the frozen model's features once, then a logistic or a ridge regression to convergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from isotune.model.switch import tokens
from isotune.training.classifiers import features_as_logits, logits_layer
from isotune.training.tasks.classification import classification_metrics
from isotune.training.tasks.collator import Collator, Example
from isotune.training.tasks.regression import regression_metrics

STRENGTHS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
"""L2 strengths tried, on standardised features, strongest first."""
NEXT_TO_CONSTANT = 1e-5
"""Standard deviation, as a share of the largest, below which a feature says nothing."""


@dataclass(frozen=True)
class Probe:
    """The fitted head, the strength the validation rows chose, and the metrics there."""

    weight: Tensor
    bias: Tensor
    l2: float
    validation: dict[str, float]
    positive: int = 1
    """Of two classes the one that F1 is of."""

    def logits(self, features: Tensor) -> Tensor:
        """Scores of shape (n, classes) for features of shape (n, hidden)."""
        return features.double() @ self.weight.T + self.bias

    def metrics(self, features: Tensor, labels: Tensor) -> dict[str, float]:
        """What the task measures, on features of shape (n, hidden)."""
        scores, true = self.logits(features).numpy(), labels.numpy()
        if labels.is_floating_point():
            return regression_metrics(scores, true)
        return classification_metrics(scores, true, self.positive)


def extract_features(
    model: nn.Module,
    examples: Sequence[Example],
    collator: Collator,
    batch_size: int = 64,
    advance: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """What the head reads, in float64, shape (n, hidden), and the labels, in the order of `examples`.

    Args:
        model: The classifier; its adapters should be disabled, its mode is left as it was.
        examples: Tokenised rows with labels.
        collator: Makes a batch of them.
        batch_size: Rows at a time; rows of like length go together.
        advance: Called with the number of rows after each batch.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].get("input_ids", ())))
    features = torch.empty(len(examples), logits_layer(model).in_features, dtype=torch.float64)
    was_training = model.training
    model.eval()
    with torch.no_grad(), features_as_logits(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collator([examples[index] for index in chosen])
            inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
            tokens(model, inputs.get("attention_mask"))
            features[chosen] = model(**inputs).logits.double().cpu()
            if advance is not None:
                advance(len(chosen))
    model.train(was_training)
    return features, torch.tensor([example["labels"] for example in examples])


def fit_probe(
    features: Tensor,
    labels: Tensor,
    classes: int,
    validation: tuple[Tensor, Tensor] | None = None,
    strengths: Sequence[float] | None = None,
    bias: bool = True,
    positive: int = 1,
) -> Probe:
    """Regressions from the strongest L2 to the weakest, logistic or by least squares; the validation rows choose one.

    Args:
        features: Shape (n, hidden), float64.
        labels: Shape (n,): class numbers, or floats to regress on.
        classes: Number of classes; not looked at where the labels are floats.
        validation: Features and labels to choose by (accuracy, then loss).
        strengths: The L2 strengths to try, strongest first; by default `STRENGTHS`, or without validation rows 1e-3.
        bias: Whether the scores have one; without, that of the probe is zero.
        positive: Of two classes the one that F1 is of.
    """
    if strengths is None:
        strengths = STRENGTHS if validation is not None else (1e-3,)
    spread = features.std(0)
    mean = features.mean(0) if bias else torch.zeros_like(spread)
    # Next to constant features stay out: their weights, in the hundred thousands, would break a head that goes on
    # to be trained with the backbone. MiniLM has three.
    scale = torch.where(spread > NEXT_TO_CONSTANT * spread.max(), spread, math.inf)
    standard = (features - mean) / scale
    numbers = labels.is_floating_point()
    parameters = torch.zeros(1 if numbers else classes, features.shape[1] + 1, dtype=torch.float64)
    fitted = []
    for strength in strengths:
        if numbers:
            parameters = _ridge_regression(standard, labels, strength, bias)
        else:
            parameters = _logistic_regression(standard, labels, strength, parameters, bias)
        weight = parameters[:, :-1] / scale
        probe = Probe(weight, parameters[:, -1] - weight @ mean, strength, {}, positive)
        fitted.append(replace(probe, validation=probe.metrics(*validation) if validation is not None else {}))
    return max(fitted, key=lambda probe: (probe.validation.get("accuracy", 0), -probe.validation.get("loss", 0)))


def _ridge_regression(features: Tensor, labels: Tensor, l2: float, bias: bool) -> Tensor:
    """Minimises half the mean squared error + l2/2 |weight|²: (1, hidden + 1), the last the bias, unpenalised."""
    labels = labels.double()
    mean, center = (
        (features.mean(0), labels.mean()) if bias else (torch.zeros_like(features[0]), labels.new_zeros(()))
    )
    X, y = features - mean, labels - center
    gram = X.mT @ X / len(X) + l2 * torch.eye(X.shape[1], dtype=X.dtype)
    weight = torch.linalg.solve(gram, X.mT @ y / len(X))
    return torch.cat([weight, (center - weight @ mean)[None]])[None]


def _logistic_regression(features: Tensor, labels: Tensor, l2: float, start: Tensor, bias: bool) -> Tensor:
    """Minimises mean cross entropy + l2/2 |weight|² by LBFGS; the last column is the bias, unpenalised, or zero."""
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weight = parameters[:, :-1]
        scores = features @ weight.T + parameters[:, -1] if bias else features @ weight.T
        loss = torch.nn.functional.cross_entropy(scores, labels)
        loss = loss + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return parameters.detach()

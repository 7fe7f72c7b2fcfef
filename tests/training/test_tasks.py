"""Tokens, metrics, pooling and the probe, each against the obvious computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from isotune.errors import IsotuneError
from isotune.training.classifiers import load_classifier
from isotune.training.modeling_pooled import pool
from isotune.training.models import load_causal, load_tokenizer
from isotune.training.probe import extract_features, fit_probe
from isotune.training.recipe import Recipe
from isotune.training.session import TaskSpec
from isotune.training.tasks.causal import causal_metrics, token_losses
from isotune.training.tasks.classification import classification_metrics
from isotune.training.tasks.collator import Collator, Example
from isotune.training.tasks.names import TASKS

EOS = 3


def examples_of(task: str, rows: list[dict[str, str]], tokenizer: Any, max_length: int) -> list[Example]:
    spec = TaskSpec(task, "", ["x"], "auto", max_length, "\n", "float32")
    return TASKS[task].examples(rows, tokenizer, spec)


@pytest.mark.parametrize("name", TASKS)
def test_methods_are_compared_by_something_that_is_measured(name: str) -> None:
    task = TASKS[name]
    assert {task.metric, "loss"} <= set(task.metrics)
    assert set(task.counted) <= set(task.metrics)
    timings = {"test_runtime": 1.0, **{f"test_{metric}": 0.5 for metric in task.metrics}}
    assert task.of_trainer(timings, "test").keys() == timings.keys() - {"test_runtime"}


def test_recipes_name_the_tasks_that_there_are() -> None:
    assert get_args(Recipe.model_fields["task"].annotation) == tuple(TASKS)


def test_a_task_of_a_later_version_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text(TaskSpec("poetry", "m", [], "auto", 8, "", "float32").to_json())
    with pytest.raises(IsotuneError, match="names the task 'poetry'; isotune knows: classification, regression"):
        TaskSpec.read(tmp_path)


def test_the_prompt_is_masked_and_the_completion_closed(llama: Path) -> None:
    tokenizer = load_tokenizer(str(llama))
    (example,) = examples_of("causal-lm", [{"prompt": "the cat", "completion": "sees a dog"}], tokenizer, 16)
    completion = tokenizer("sees a dog")["input_ids"]
    assert example["labels"] == [-100, -100, *completion, EOS]
    assert example["input_ids"] == [*tokenizer("the cat")["input_ids"], *completion, EOS]
    (short,) = examples_of("causal-lm", [{"prompt": "the old cat", "completion": "sees a dog"}], tokenizer, 5)
    assert short["labels"] == [-100, *completion, EOS]


def test_texts_are_packed_into_full_blocks(llama: Path) -> None:
    tokenizer = load_tokenizer(str(llama))
    blocks = examples_of("causal-lm", [{"text": "the cat sees"}, {"text": "a dog"}, {"text": "a hen"}], tokenizer, 4)
    stream = [i for block in blocks for i in block["input_ids"]]
    assert [len(block["input_ids"]) for block in blocks] == [4, 4, 2]
    assert stream.count(EOS) == 3
    assert all(block["labels"] == block["input_ids"] for block in blocks)


def test_token_weighted_loss_equals_the_models_own_on_one_batch(llama: Path) -> None:
    tokenizer, model = load_tokenizer(str(llama)), load_causal(str(llama)).eval()
    rows = [{"prompt": "the cat", "completion": "sees a dog"}, {"prompt": "a", "completion": "hen"}]
    batch = Collator(tokenizer.pad_token_id)(examples_of("causal-lm", rows, tokenizer, 16))
    with torch.no_grad():
        output = model(**batch)
    metrics = causal_metrics(token_losses(output.logits, batch["labels"]).numpy())
    assert metrics["loss"] == pytest.approx(output.loss.item(), rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(np.exp(output.loss.item()), rel=1e-5)


def test_classification_metrics_agree_with_scikit_learn() -> None:
    scikit = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    for classes in (2, 5):
        logits, labels = generator.normal(size=(40, classes)), generator.integers(0, classes - 1, 40)
        found = classification_metrics(logits, labels)
        predicted = logits.argmax(-1)
        assert found["accuracy"] == pytest.approx(scikit.accuracy_score(labels, predicted))
        assert found["macro_f1"] == pytest.approx(scikit.f1_score(labels, predicted, average="macro"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_sees_no_padding_on_either_side(side: str) -> None:
    tokens = torch.randn(2, 3, 4)
    pad = torch.full((2, 2, 4), 99.0)
    zeros, ones = torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
    padded = torch.cat([pad, tokens] if side == "left" else [tokens, pad], 1)
    mask = torch.cat([zeros, ones] if side == "left" else [ones, zeros], 1)
    torch.testing.assert_close(pool(padded, mask, "mean"), tokens.mean(1))
    assert torch.equal(pool(padded, mask, "cls"), tokens[:, 0])
    assert torch.equal(pool(padded, mask, "last"), tokens[:, -1])


def test_features_keep_the_order_of_the_rows(bert: Path) -> None:
    tokenizer, model = load_tokenizer(str(bert)), load_classifier(str(bert), ["x", "y"])
    rows = [{"text": text, "label": "x"} for text in ("the old small green cat", "cat", "a dog")]
    examples, collator = examples_of("classification", rows, tokenizer, 16), Collator(0)
    together, _ = extract_features(model, examples, collator, batch_size=2)
    for index, example in enumerate(examples):
        alone, _ = extract_features(model, [example], collator)
        torch.testing.assert_close(together[index], alone[0], rtol=1e-5, atol=1e-6)


def test_the_probe_is_a_converged_logistic_regression() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(120, 6, generator=generator, dtype=torch.float64)
    labels = (features @ torch.randn(6, 3, generator=generator, dtype=torch.float64)).argmax(1)
    features = 3 * features + 5
    probe = fit_probe(features, labels, 3, strengths=(1e-2,))
    standard = ((features - features.mean(0)) / features.std(0)).numpy()
    oracle = linear.LogisticRegression(C=1 / (1e-2 * 120), tol=1e-10, max_iter=5000).fit(standard, labels.numpy())
    expected = torch.from_numpy(oracle.predict_log_proba(standard))
    torch.testing.assert_close(probe.logits(features).log_softmax(-1), expected, rtol=1e-3, atol=1e-4)
    usual = fit_probe(features, labels, 3)
    assert usual.l2 == 1e-3
    assert usual.weight.norm() > probe.weight.norm()


def test_a_feature_next_to_constant_has_no_part_in_the_probe() -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    labels = (features[:, 0] > 0).long()
    features[:, 3] = 1e-7 + 1e-9 * features[:, 0]
    probe = fit_probe(features, labels, 2)
    assert (probe.weight[:, 3] == 0).all()
    without = fit_probe(features[:, :3], labels, 2)
    torch.testing.assert_close(probe.weight[:, :3], without.weight)
    torch.testing.assert_close(probe.bias, without.bias)


def test_the_validation_rows_choose_the_strength() -> None:
    features = torch.randn(60, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = (features[:, 0] > 0).long()
    probe = fit_probe(features[:40], labels[:40], 2, validation=(features[40:], labels[40:]))
    assert probe.validation == probe.metrics(features[40:], labels[40:])
    assert probe.validation["accuracy"] >= 0.9

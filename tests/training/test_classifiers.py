"""Classifiers are what transformers and PEFT open, with their labels; those of version 0.1.0 still work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import make_bert, save_tokenizer, write_recipe
from torch import Tensor, nn

import isotune
from isotune.errors import IsotuneError
from isotune.training.classifiers import head_paths, load_classifier, logits_layer
from isotune.training.evaluation import evaluate
from isotune.training.export import export_merged
from isotune.training.model_folder import open_trained
from isotune.training.progress import Screen
from isotune.training.recipe import build_recipe
from isotune.training.run import Result, train
from isotune.training.session import Session, TaskSpec
from isotune.training.start import probe_of, start_from

LABELS = ["animal", "plant"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
         "max_position_embeddings": 64}  # fmt: skip


def made(folder: Path, kind: str, **options: Any) -> Path:
    """A random model of the kind, without a head, in a folder."""
    torch.manual_seed(0)
    vocabulary = save_tokenizer(folder, classify=True)
    config = transformers.AutoConfig.for_model(kind, vocab_size=vocabulary, **{**SIZES, **options})
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


def roberta(folder: Path) -> Path:
    return made(folder, "roberta", pad_token_id=0)


def distilbert(folder: Path) -> Path:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
    return made(folder, "distilbert", **sizes)


def modernbert(folder: Path) -> Path:
    return made(folder, "modernbert", pad_token_id=0, reference_compile=False)


def llama(folder: Path) -> Path:
    return made(folder, "llama", num_key_value_heads=2)


KINDS: dict[str, tuple[Callable[[Path], Path], str, list[str]]] = {
    "bert": (make_bert, "BertForSequenceClassification", ["classifier"]),
    "roberta": (roberta, "RobertaForSequenceClassification", ["classifier"]),
    "distilbert": (distilbert, "DistilBertForSequenceClassification", ["classifier", "pre_classifier"]),
    "modernbert": (modernbert, "ModernBertForSequenceClassification", ["classifier", "head"]),
    "llama": (llama, "LlamaForSequenceClassification", ["score"]),
}


@pytest.fixture(scope="module", params=list(KINDS))
def trained(request: pytest.FixtureRequest, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A finished run on each architecture."""
    folder = tmp_path_factory.mktemp(request.param)
    model = KINDS[request.param][0](folder / "model")
    recipe = write_recipe(folder / "recipe.yaml", model, rows, folder / "run", max_steps=6)
    return train(build_recipe(recipe, sets=["targets=all-linear"]), progress=False)


def batch(folder: Path) -> dict[str, Tensor]:
    """Two texts of different lengths."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = tokenizer(["the cat", "a small green plant and the old dog"], padding=True, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**inputs).logits
    return found


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_classifier_is_the_architectures_own_class(trained: Result) -> None:
    kind = trained.output.parent.name.rstrip("0123456789")
    _, name, head = KINDS[kind]
    spec = TaskSpec.read(trained.adapter)
    model = Session(spec).model
    assert type(model).__name__ == name
    assert head_paths(model) == head
    assert (model.config.id2label, spec.labels, spec.pooling) == (dict(enumerate(LABELS)), LABELS, "own")
    assert json.loads((trained.adapter / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_the_merged_folder_answers_in_a_pipeline_with_its_labels(trained: Result, tmp_path: Path) -> None:
    merged = export_merged(trained.adapter, tmp_path / "merged")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(merged)
    inputs = batch(merged)
    same(logits(model, inputs), logits(trained.model, inputs))
    answer = transformers.pipeline("text-classification", str(merged))("the old dog")[0]
    assert answer["label"] in LABELS


def test_adapter_and_exported_lora_open_in_peft(trained: Result, tmp_path: Path) -> None:
    isotune.export_lora(trained.adapter, tmp_path / "lora", base=TaskSpec.read(trained.adapter).model)
    inputs = batch(Path(TaskSpec.read(trained.adapter).model))
    for folder in (trained.adapter, tmp_path / "lora"):
        model = peft.AutoPeftModelForSequenceClassification.from_pretrained(
            folder, num_labels=2, pad_token_id=trained.model.config.pad_token_id
        )
        same(logits(model, inputs), logits(trained.model, inputs))


def test_the_cards_lines_open_a_classifier_with_its_labels(trained: Result, tmp_path: Path) -> None:
    isotune.export_lora(trained.adapter, tmp_path / "lora", base=TaskSpec.read(trained.adapter).model)
    for folder in (trained.adapter, tmp_path / "lora"):
        code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
        names: dict[str, Any] = {"PATH": folder}
        exec(code, names)
        inputs = batch(Path(TaskSpec.read(trained.adapter).model))
        names["model"].config.pad_token_id = trained.model.config.pad_token_id
        same(logits(names["model"], inputs), logits(trained.model, inputs))
        assert names["model"].config.id2label == dict(enumerate(LABELS))


def test_load_names_the_labels_of_a_base_that_was_opened_without(trained: Result) -> None:
    base = TaskSpec.read(trained.adapter).model
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    assert isotune.load(model, trained.adapter).config.id2label == dict(enumerate(LABELS))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    with pytest.raises(IsotuneError, match=r"open the base with its 2 labels: from_pretrained\(\.\.\., num_labels=2"):
        isotune.load(model, trained.adapter)


def test_the_probe_starts_the_head_as_what_it_measured(trained: Result) -> None:
    session = Session(TaskSpec.read(trained.adapter))
    texts = {"the cat": "animal", "a tree": "plant", "old green grass": "plant", "a small dog": "animal"}
    examples = session.examples([{"text": text, "label": label} for text, label in texts.items()])
    probe = probe_of(session, {"train": examples, "validation": []}, Screen(False))
    start_from(session, probe, Screen(False))
    layer = logits_layer(session.model)
    torch.testing.assert_close(layer.weight.double(), probe.weight, rtol=1e-6, atol=1e-6)
    assert layer.bias is not None or not probe.bias.any()


def test_a_pooling_that_the_class_has_takes_the_class(tmp_path: Path) -> None:
    model = load_classifier(str(modernbert(tmp_path / "modernbert")), LABELS, "mean")
    assert (type(model).__name__, model.config.classifier_pooling) == ("ModernBertForSequenceClassification", "mean")
    assert type(load_classifier(str(llama(tmp_path / "llama")), LABELS, "last")).__name__.startswith("Llama")


def test_another_pooling_takes_ours_which_transformers_opens(bert: Path, rows: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", bert, rows, tmp_path / "run", max_steps=6)
    result = train(build_recipe(recipe, sets=["pooling=mean"]), progress=False)
    assert result.model.isotune_head.trained == ["head"]
    assert TaskSpec.read(result.adapter).pooling == "mean"
    found = evaluate(result.output, progress=False)
    assert found["loss"] == pytest.approx(result.metrics["test_loss"], rel=1e-5)
    merged = export_merged(result.adapter, tmp_path / "merged")
    assert evaluate(merged, str(rows / "test.jsonl"), progress=False)["accuracy"] == found["accuracy"]
    assert (merged / "modeling_pooled.py").is_file()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(merged, trust_remote_code=True)
    inputs = batch(bert)
    same(logits(model, inputs), logits(result.model, inputs))
    assert model.config.id2label == dict(enumerate(LABELS))
    # The backbone has the names that it has in the architecture's own class.
    keys = load_file(result.adapter / "adapter_model.safetensors")
    assert all(key.startswith(("base_model.model.bert.encoder.", "base_model.model.head.")) for key in keys)


def test_a_run_of_version_0_1_0_evaluates_and_exports(bert: Path, rows: Path, tmp_path: Path) -> None:
    spec = TaskSpec("classification", str(bert), LABELS, "mean", 16, "\n", "float32")
    session = Session(spec)
    isotune.adapt(session.model, isotune.method("hra", rank=2), "query", train_also=["head"], seed=0)
    with torch.no_grad():
        for parameter in session.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter)) if parameter.requires_grad else None
    folder = isotune.save(session.model, tmp_path / "adapter", base_model=str(bert))
    former = {key: value for key, value in asdict(session.spec).items() if key != "backbone"}
    (folder / "task.json").write_text(json.dumps(former))
    keys = load_file(folder / "adapter_model.safetensors").keys()
    assert any(key.startswith("base_model.model.backbone.encoder.") for key in keys)
    inputs = batch(bert)
    expected = logits(session.model, inputs)
    same(logits(open_trained(folder).model, inputs), expected)
    assert evaluate(folder, str(rows / "test.jsonl"), progress=False)["rows"] == 15
    assert isotune.export_lora(folder, tmp_path / "lora", base=str(bert)).residual < 1e-5
    merged = export_merged(folder, tmp_path / "merged")
    same(logits(open_trained(merged).model, inputs), expected)


def test_a_model_folder_of_version_0_1_0_evaluates(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    session = Session(TaskSpec("classification", str(bert), LABELS, "mean", 16, "\n", "float32"))
    session.model.backbone.save_pretrained(folder)
    session.tokenizer.save_pretrained(folder)
    save_file({name: t.detach() for name, t in session.model.head.named_parameters()}, folder / "head.safetensors")
    former = {key: value for key, value in asdict(session.spec).items() if key != "backbone"}
    (folder / "task.json").write_text(json.dumps(former))
    same(logits(open_trained(folder).model, batch(bert)), logits(session.model, batch(bert)))
    (folder / "head.safetensors").unlink()
    with pytest.raises(IsotuneError, match=r"holds no head.safetensors"):
        open_trained(folder)


def test_weights_of_another_kind_of_model_are_refused(tmp_path: Path) -> None:
    folder = make_bert(tmp_path / "bert")
    kept = {key: t for key, t in load_file(folder / "model.safetensors").items() if "layer.1." not in key}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    for pooling in ("auto", "mean"):
        with pytest.raises(IsotuneError, match=r"the weights lack 16 of the model's tensors"):
            load_classifier(str(folder), LABELS, pooling)

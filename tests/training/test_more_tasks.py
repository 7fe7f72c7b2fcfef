"""Pairs, numbers, tags and chats: what their columns are, how they become tokens, and what is measured of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from sklearn import metrics as reference
from tiny import ANIMALS, PLANTS, sentences, write_jsonl

from isotune.errors import DataError, IsotuneError
from isotune.training.data import Row, load_rows, load_splits
from isotune.training.evaluation import evaluate
from isotune.training.models import load_tokenizer
from isotune.training.recipe import DataSettings, build_recipe
from isotune.training.run import train
from isotune.training.session import TaskSpec
from isotune.training.tasks.causal import chat_tokens
from isotune.training.tasks.classification import classification_metrics
from isotune.training.tasks.collator import IGNORED, Collator
from isotune.training.tasks.names import TASKS
from isotune.training.tasks.regression import regression_metrics
from isotune.training.tasks.token_classification import entities, first_tokens, token_metrics

TEMPLATE = (
    "{% for m in messages %}[CLS] {{ m['role'] }} {{ m['content'] }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}[CLS] assistant {% endif %}"
)


def spec_of(task: str, labels: list[str], **fields: Any) -> TaskSpec:
    return TaskSpec(
        task, "", labels, "auto", fields.pop("max_length", 64), "\n", "float32", None, pairs=True, **fields
    )


def flags(model: Path, data: Path, output: Path, task: str, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model), "data.train": str(data), "task": task, "output": str(output),
        "training.num_train_epochs": 3, "training.per_device_train_batch_size": 8,
        "training.report_to": "none", "data.max_length": 32, **more,
    }  # fmt: skip


def trained(*given: Any, **more: Any) -> Any:
    return train(build_recipe(None, flags(*given, **more)), progress=False)


# Columns


@pytest.mark.parametrize(
    ("task", "names", "wanted"),
    [
        ("classification", ["label", "sentence"], {"text": ["sentence"], "label": ["label"]}),
        ("classification", ["premise", "hypothesis", "label"],
         {"text": ["premise"], "pair": ["hypothesis"], "label": ["label"]}),
        ("regression", ["sentence1", "sentence2", "score"],
         {"text": ["sentence1"], "pair": ["sentence2"], "label": ["score"]}),
        ("classification", ["text", "intent"], {"text": ["text"], "label": ["intent"]}),
        ("token-classification", ["tokens", "ner_tags"], {"text": ["tokens"], "label": ["ner_tags"]}),
        ("causal-lm", ["messages", "id"], {"messages": ["messages"]}),
        ("causal-lm", ["question", "answer"], {"prompt": ["question"], "completion": ["answer"]}),
        ("causal-lm", ["text", "source"], {"text": ["text"]}),
    ],
)  # fmt: skip
def test_columns_with_usual_names_need_not_be_named(task: str, names: list[str], wanted: dict[str, Any]) -> None:
    assert TASKS[task].columns(DataSettings(train="x"), names) == wanted


def test_a_named_column_goes_before_a_usual_one() -> None:
    data = DataSettings(train="x", text=["b", "a"], label="c")
    assert TASKS["classification"].columns(data, ["text", "label"]) == {"text": ["b"], "pair": ["a"], "label": ["c"]}


@pytest.mark.parametrize(
    ("task", "row", "settings", "message"),
    [
        ("causal-lm", {"messages": [{"role": "user", "content": "hi"}]}, {"text": "messages"},
         "a list and no text (chats are named with data.messages) in column 'messages'"),
        ("causal-lm", {"messages": [{"role": "user", "content": "hi"}]}, {},
         "a chat without a turn of the assistant's"),
        ("causal-lm", {"messages": [{"who": "me"}]}, {}, "a message without role and content (who)"),
        ("causal-lm", {"chat": "hello"}, {"messages": "chat"}, "a str and no list of messages"),
        ("regression", {"text": "a", "score": "much"}, {}, "'much' and no number in column 'score'"),
        ("regression", {"text": "a", "score": "inf"}, {}, "'inf', which is not finite,"),
        ("token-classification", {"tokens": "a b", "tags": ["O", "O"]}, {}, "'a b' and no list of words"),
        ("token-classification", {"tokens": ["a", " "], "tags": ["O", "O"]}, {}, "nothing in column 'tokens'"),
        ("classification", {"text": ["a"], "label": "x"}, {}, "a list and no text in column 'text'"),
    ],
)  # fmt: skip
def test_a_cell_of_the_wrong_kind_is_named(
    task: str, row: Row, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [row])
    with pytest.raises(DataError) as raised:
        load_rows(str(file), DataSettings(train="x", **settings), task)
    assert message in str(raised.value)
    assert "row 1 has " in str(raised.value)


def test_labels_that_measure_are_no_classes(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "label": n / 7} for n in range(30)])
    with pytest.raises(DataError, match=r"the 30 labels are numbers such as .* \(--task regression\)"):
        load_splits(DataSettings(train=str(file)), "classification", 0)


# Pairs


def test_a_pair_is_given_to_the_tokenizer_as_one(bert: Path) -> None:
    tokenizer = load_tokenizer(str(bert))
    row = {"text": "the cat", "pair": "a dog", "label": "x"}
    task, spec = TASKS["classification"], spec_of("classification", ["x", "y"])
    (example,) = task.examples([row], tokenizer, spec)
    assert example["input_ids"] == tokenizer("the cat", "a dog")["input_ids"]
    assert example["input_ids"] != tokenizer("the cat\na dog")["input_ids"]
    (joined,) = task.examples([row], tokenizer, replace(spec, pairs=False))
    assert joined["input_ids"] == tokenizer("the cat\na dog")["input_ids"]


def test_token_types_of_a_pair_reach_the_model_padded() -> None:
    examples = [
        {"input_ids": [1, 2, 3], "token_type_ids": [0, 1, 1]},
        {"input_ids": [1, 2], "token_type_ids": [0, 1]},
    ]
    batch = Collator(9)(examples)
    assert batch["token_type_ids"].tolist() == [[0, 1, 1], [0, 1, 0]]
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 2, 9]]


def test_a_run_on_pairs_keeps_to_pairs_when_it_is_evaluated(bert: Path, tmp_path: Path) -> None:
    first, second = sentences(40, 0), sentences(41, 1)
    pairs = [(one, second[place + place // 2 % 2]) for place, one in enumerate(first)]
    kinds = ["same" if one["label"] == other["label"] else "not" for one, other in pairs]
    rows = [
        {"sentence1": one["text"], "sentence2": other["text"], "label": kind}
        for (one, other), kind in zip(pairs, kinds, strict=True)
    ]
    file = write_jsonl(tmp_path / "x.jsonl", rows)
    result = trained(bert, file, tmp_path / "run", "classification")
    assert json.loads((result.adapter / "task.json").read_text())["pairs"] is True
    found = evaluate(result.output, str(file), progress=False)
    assert found["rows"] == 40
    assert -1 <= found["matthews"] <= 1


# Metrics, against scikit-learn and scipy's definitions


@pytest.mark.parametrize("classes", [2, 5])
def test_the_metrics_of_classes_are_scikit_learns(classes: int) -> None:
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(size=(60, classes)), draw.integers(classes, size=60)
    found, predicted = classification_metrics(logits, labels), logits.argmax(-1)
    assert found["matthews"] == pytest.approx(reference.matthews_corrcoef(labels, predicted))
    assert found["macro_f1"] == pytest.approx(reference.f1_score(labels, predicted, average="macro"))
    assert classification_metrics(np.eye(classes)[[0] * 60], labels)["matthews"] == 0


def test_the_metrics_of_numbers_are_scipys() -> None:
    from scipy import stats

    draw = np.random.default_rng(0)
    found, labels = draw.normal(size=(50, 1)), draw.integers(5, size=50).astype(np.float32)
    measured = regression_metrics(found, labels)
    assert measured["pearson"] == pytest.approx(stats.pearsonr(found[:, 0], labels).statistic)
    assert measured["spearman"] == pytest.approx(stats.spearmanr(found[:, 0], labels).statistic)
    assert measured["rmse"] == pytest.approx(reference.root_mean_squared_error(labels, found[:, 0]))
    assert regression_metrics(np.ones((50, 1)), labels)["pearson"] == 0


def test_entities_are_whole_or_wrong() -> None:
    tags = ["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "I-PER", "I-ORG", "O"]
    assert entities(tags) == {("PER", 0, 1), ("LOC", 3, 3), ("LOC", 4, 4), ("PER", 5, 5), ("ORG", 6, 6)}
    labels = ["O", "B-PER", "I-PER", "B-LOC"]
    true, told = [1, 2, 0, 3, 0], [1, 0, 0, 3, 3]
    kept = np.array([[[a, 0.5, b] for a, b in zip(told, true, strict=True)] + [[-100.0, -100.0, -100.0]]])
    found = token_metrics(kept, labels)
    assert (found["precision"], found["recall"], found["f1"]) == (1 / 3, 1 / 2, 2 / 5)
    assert found["accuracy"] == 3 / 5
    assert found["loss"] == 0.5


def test_tags_that_are_no_entities_count_one_by_one() -> None:
    kept = np.array([[[0.0, 0, 0], [1, 0, 1], [2, 0, 1], [0, 0, 2]]])
    found = token_metrics(kept, ["O", "NOUN", "VERB"])
    assert (found["precision"], found["recall"]) == (1 / 2, 1 / 3)


# Numbers


def test_a_regression_learns_to_count_and_starts_from_its_probe(bert: Path, tmp_path: Path) -> None:
    rows = [
        {"text": row["text"], "score": sum(word in ANIMALS for word in row["text"].split()) / 2}
        for row in sentences(160, 0)
    ]
    file = write_jsonl(tmp_path / "x.jsonl", rows)
    result = trained(bert, file, tmp_path / "run", "regression", **{"data.validation": 0.25})
    assert result.metrics["validation_pearson"] > 0.5
    assert result.metrics["validation_rmse"] == pytest.approx(result.metrics["validation_loss"] ** 0.5)
    lines = tmp_path / "out.jsonl"
    found = evaluate(result.output, str(file), predictions=lines, progress=False)
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    made, wanted = ([row[key] for row in told] for key in ("prediction", "label"))
    assert found["pearson"] == pytest.approx(np.corrcoef(made, wanted)[0, 1])


# Tags


MORE = {"training.learning_rate": 2e-2, "training.num_train_epochs": 8}


def tagged(count: int, seed: int) -> list[Row]:
    kinds = {**dict.fromkeys(ANIMALS, "B-ANIMAL"), **dict.fromkeys(PLANTS, "B-PLANT")}
    words = [row["text"].split() for row in sentences(count, seed)]
    return [{"tokens": own, "ner_tags": [kinds.get(word, "O") for word in own]} for own in words]


def test_the_first_token_of_a_word_has_its_tag(bert: Path) -> None:
    tokenizer = load_tokenizer(str(bert))
    row = {"text": ["the", "cat", "sees"], "label": ["O", "B-ANIMAL", "O"]}
    spec = spec_of("token-classification", ["O", "B-ANIMAL"], max_length=4)
    (example,) = TASKS["token-classification"].examples([row], tokenizer, spec)
    assert example["labels"] == [IGNORED, 0, 1, IGNORED]  # [CLS], two words, [SEP]: the third is cut off
    assert list(first_tokens([None, 0, 0, 1, 2, 2, None])) == [(1, 0), (3, 1), (4, 2)]


def test_a_tagger_learns_and_its_predictions_have_a_tag_for_each_word(bert: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", tagged(120, 0))
    result = trained(bert, file, tmp_path / "run", "token-classification", **MORE)
    assert result.metrics["validation_f1"] > 0.9
    assert "classifier.weight" in " ".join(load_file(result.adapter / "adapter_model.safetensors"))
    lines = tmp_path / "out.jsonl"
    evaluate(result.output, str(file), predictions=lines, progress=False)
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    assert all(len(row["prediction"]) == len(row["text"]) for row in told)
    assert sum(row["prediction"] == row["label"] for row in told) > 80


def test_words_and_tags_go_together(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [*tagged(4, 0), {"tokens": ["a", "cat"], "ner_tags": ["O"]}])
    with pytest.raises(DataError, match=r"row 5 of .* has 2 words and 1 tags"):
        load_splits(DataSettings(train=str(file)), "token-classification", 0)


# Chats


@pytest.fixture
def talker(llama: Path, tmp_path: Path) -> Path:
    """A language model whose tokenizer has a chat template."""
    folder = Path(shutil.copytree(llama, tmp_path / "talker"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


CHAT = [
    {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sees a dog"},
    {"role": "user", "content": "and"}, {"role": "assistant", "content": "a hen"},
]  # fmt: skip


def test_the_assistants_turns_are_trained_and_nothing_else(talker: Path) -> None:
    tokenizer = load_tokenizer(str(talker))
    ids, labels = chat_tokens(CHAT, tokenizer, "")
    assert ids == tokenizer.apply_chat_template(CHAT, return_dict=False)
    said = tokenizer.decode([label for label in labels if label != IGNORED])
    assert said == "sees a dog [SEP] a hen [SEP]"
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


def test_a_template_that_rewrites_what_came_before_is_refused(talker: Path) -> None:
    tokenizer = load_tokenizer(str(talker))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'fox' if loop.last else 'owl' }} {{ m['content'] }} {% endfor %}"
    )
    with pytest.raises(DataError, match="row 3: the chat template writes what came before anew"):
        chat_tokens(CHAT, tokenizer, "row 3")


def test_a_model_without_a_template_cannot_chat(llama: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"messages": CHAT}] * 8)
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        trained(llama, file, tmp_path / "run", "causal-lm")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("packing", [False, True])
def test_chats_are_learnt_alone_and_packed(packing: bool, talker: Path, tmp_path: Path) -> None:
    theirs = {"conversations": [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sees a dog"}]}
    file = write_jsonl(tmp_path / "x.jsonl", [theirs] * 16)
    more = {"data.packing": packing, "training.learning_rate": 0.01, "training.num_train_epochs": 12}
    result = trained(talker, file, tmp_path / "run", "causal-lm", **{"method.name": "full"}, **more)
    assert result.metrics["validation_loss"] < 1.5  # of a drawn model: 3.2
    kept = json.loads((result.trained / "task.json").read_text())
    assert kept["packing"] is packing


def test_packed_rows_share_a_sequence_and_no_label_crosses(talker: Path) -> None:
    tokenizer, task = load_tokenizer(str(talker)), TASKS["causal-lm"]
    rows = [{"prompt": "the cat", "completion": "sees a dog"}, {"prompt": "a", "completion": "hen"}] * 2
    alone = task.examples(rows, tokenizer, spec_of("causal-lm", [], max_length=12))
    packed = task.examples(rows, tokenizer, spec_of("causal-lm", [], max_length=12, packing=True))
    assert [i for e in packed for i in e["input_ids"]] == [i for e in alone for i in e["input_ids"]]
    assert max(len(e["input_ids"]) for e in packed) <= 12
    assert len(packed) < len(alone)
    count = [sum(label != IGNORED for e in of for label in e["labels"][1:]) for of in (alone, packed)]
    assert count[0] == count[1]


def test_settings_of_two_kinds_of_rows_are_refused() -> None:
    given = {"model": "m", "data.train": "x", "output": "o", "data.messages": "b"}
    with pytest.raises(IsotuneError, match=r"name one of data\.text, data\.prompt"):
        build_recipe(None, {**given, "task": "causal-lm", "data.text": "a"})
    with pytest.raises(IsotuneError, match=r"data\.messages belong to task: causal-lm"):
        build_recipe(None, given)

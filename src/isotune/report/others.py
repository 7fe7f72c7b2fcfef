"""What is said of runs, adapters, merged models and diagnoses that belong to no comparison."""

from __future__ import annotations

from collections.abc import Sequence

from isotune.merging.record import CompressedAdapters, MergedAdapter
from isotune.report import words
from isotune.report.data import Diagnosed, Json, RunResult, Weights

_SCORES = tuple(
    f"{split}_{metric}"
    for metric in ("accuracy", "pearson", "f1", "perplexity", "loss")
    for split in ("test", "validation")
)
_AGAINST = {
    "majority": "the commonest label always",
    "probe": "a linear probe",
    "base": "before training",
}
"""What a score is against, by the word that stands in the key."""

Said = tuple[str, list[str], list[str], list[str]]
"""Subject, headlines, findings, cautions."""


def run_verdict(runs: Sequence[RunResult]) -> Said:
    """Of runs: the scores, and that single runs rank nothing."""
    headlines, cautions = [], []
    for run in runs:
        key = main_score(run.metrics, run.recipe.get("metric"))
        value = f": {_said(key)} {words.score(key, run.metrics[key])}{_against(run.metrics, key)}" if key else ""
        count = run.metrics.get("trainable_parameters_encoder", run.metrics.get("trainable_parameters"))
        size = f" with {count:,} trainable parameters" if count else ""
        headlines.append(f"{run_label(run)}{size}{value}.")
    unsearched = [run.name for run in runs if run.metrics.get("learning_rate_is_the_methods_default")]
    if len(runs) > 1:
        cautions.append("Single runs rank nothing: isotune compare gives every method the same search and seeds.")
    else:
        cautions.append("One run with one seed: another seed may give another score.")
    if unsearched:
        cautions.append(f"The learning rate of {words.listed(unsearched)} is the method's default, not searched.")
    subject = f"{words.counted(len(runs), 'run')} of {words.listed(list(dict.fromkeys(map(_on, runs))))}."
    return subject, headlines, [], cautions


def _against(metrics: Json, key: str) -> str:
    """` (95 % interval ...; the commonest label always: 69.3 %; a linear probe: 66.4 %)`, as far as it is known."""
    split, _, metric = key.partition("_")
    ends = [words.score(key, end).removesuffix(" %") for end in metrics.get(f"{key}_interval", ())]
    found = [f"95 % interval by the draw of the rows: {' to '.join(ends)} %"] if ends else []
    found += [
        f"{said}: {words.score(key, value)}"
        for word, said in _AGAINST.items()
        if (value := metrics.get(f"{split}_{word}_{metric}")) is not None
    ]
    return f" ({'; '.join(found)})" if found else ""


def main_score(metrics: Json, metric: str | None = None) -> str | None:
    """The metric that a run is known by, the named one before others: of the test rows where there are some."""
    keys = (f"test_{metric}", f"validation_{metric}", *_SCORES)
    return next((key for key in keys if isinstance(metrics.get(key), int | float)), None)


def run_label(run: RunResult) -> str:
    """`runs/one (hra)`."""
    return f"{run.name} ({words.method_name(str(run.metrics.get('method', 'unknown method')))})"


def adapter_findings(weights: Sequence[Weights]) -> Said:
    """Of adapters and models by themselves, and of merges: what they are made of and what was cut off."""
    headlines = []
    for one in weights:
        merge = one.merge
        if isinstance(merge, CompressedAdapters):
            headlines.append(compressed(one.name, merge))
        elif merge:
            cut = ""
            if isinstance(merge, MergedAdapter):
                cut = f"; writing it at its rank lost {words.share(merge.error)} of the change"
            made = words.counted(len(merge.models), "model")
            headlines.append(f"{one.name}: {made} merged by {merge.rule}{cut}.")
        else:
            headlines.append(f"{one.name}: {described(one)}.")
    return (
        f"{words.counted(len(weights), 'adapter or model', 'adapters and models')} by themselves.",
        headlines,
        [],
        [],
    )


def described(one: Weights) -> str:
    """What an adapter or a model is, from its config."""
    if one.kind == "checkpoint":
        return f"a full model, {one.config.get('model_type', 'of unknown type')}"
    base = one.config.get("base_model_name_or_path")
    method = str(one.config.get("peft_type", "unknown")).lower().removeprefix("isotune_")
    return f"an adapter, {method}" + (f", of {base.rstrip('/').rpartition('/')[2]}" if base else "")


def compressed(name: str, record: CompressedAdapters) -> str:
    """Of what rule rmm wrote: how much smaller, and the worst error."""
    errors = record.errors.values()
    worst = f"; the worst of them changes by {words.share(max(errors))}" if errors else ""
    many = words.counted(len(errors), "adapter")
    return f"{name}: {many} compressed by rmm, each of which can be recovered{worst}."


def diagnosis_findings(diagnoses: Sequence[Diagnosed]) -> list[str]:
    """How far the weights moved, and who brought intruder dimensions: each by name, or of many the extremes."""
    if len(diagnoses) <= 6:
        said = [part for one in diagnoses if (part := _moved(one))]
        return [f"Change of the weights: {'; '.join(said)}."] if said else []
    counts = [
        (one, count) for one in diagnoses if (count := (one.found.get("total") or {}).get("intruders")) is not None
    ]
    if not counts:
        return []
    most, many = max(counts, key=lambda pair: pair[1])
    some = sum(count > 0 for _, count in counts)
    return [
        f"Intruder dimensions in {some} of {len(counts)} models that were diagnosed"
        + (f", most of them, {many}, in {most.label}." if many else ".")
    ]


def _moved(one: Diagnosed) -> str:
    total = one.found.get("total") or {}
    change, count = total.get("relative_change"), total.get("intruders")
    parts = [] if change is None else [words.share(change)]
    if count:
        where, sites = total.get("sites_with_intruders"), total.get("sites", len(one.found["sites"]))
        parts.append(f"{words.counted(count, 'intruder dimension')} in {where} of {sites} layers")
    elif count == 0:
        parts.append("no intruder dimensions")
    return f"{one.label} {words.listed(parts)}" if parts else ""


def _on(run: RunResult) -> str:
    model = str(run.recipe.get("model", "a model")).rstrip("/").rpartition("/")[2]
    return f"{model} ({run.recipe['task']})" if run.recipe.get("task") else model


def _said(key: str) -> str:
    return key.replace("_", " ")

"""`python -m benchmarks.choosing`: the page on choosing a method, from the comparisons that are committed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import isotune
from benchmarks.reading import at_budget, number, score, words
from benchmarks.standings import REFERENCES, summaries
from isotune.adapters.registry import BUILT_IN
from isotune.comparison.results import Summary, ranked
from isotune.model.catalogue import MethodInfo

DOCS = Path(__file__).parent.parent / "docs"
PAGE = "choosing.md"
OPENING = """# Choose a method

Written by `python -m benchmarks.choosing` from what isotune's prober and the committed comparisons say; do not edit.

1. What must the adapter be able to do? The first table leaves some methods out.
2. Of those left, take one that was not told apart from the best in a task like yours. If none is, take `hra` or
   `lora`: they do all that the table asks for, and servers of LoRAs take them.
3. Give it a search over learning rates before you judge it. What that is worth is said below.
4. Compare on your own data, over several seeds. A difference smaller than its interval is none."""

READING = """## How to read the comparisons

At a budget every method has the size that comes nearest to it in trained parameters (of `lt_sft` and `pruning`, which
train a number for each weight, in what they keep), and the same number of
learning rates, of which the validation rows choose. The score is that on test rows: mean and 95 % t-interval over
seeds. Two methods are *told apart* here if the 95 % t-interval of their difference, paired over the seeds, leaves
zero out. That is generous: of twenty true ties, one is told apart by chance, and the best of many means is partly the
luckiest. A method whose best rate is at an end of the range may do better beyond it. Rates are those that were given;
what is no rotation took them whole then, where steps are divided [for depth](learning-rates.md) today."""

ELSEWHERE = {
    "recipes/convolutions.md#which-method": "ways to adapt the convolutions of a ResNet-20 to inverted colours",
    "pruning-channels.md#what-it-does-to-a-resnet-20": "a ResNet-20 with 30 to 70 % of its channels gone",
    "mixtures.md#tasks": "four tasks and a fifth: one LoRA, a LoRA for each, `poly` and MHR",
    "mixtures.md#modalities-that-are-missing": "a modality that is missing, and an adapter for each case",
    "recipes/diffusion.md#subjects-and-conditions-small": "subjects and conditions, by diffusion models of digits",
}
"""Pages with comparisons that scripts of their own made, and what they compare."""


def main() -> None:
    """Write the page."""
    (DOCS / PAGE).write_text(page(DOCS))


def page(docs: Path) -> str:
    """The page as Markdown; `docs` is the folder that holds the figures."""
    parts = [OPENING, "## What each can do", can([m for m in isotune.methods() if m.name in BUILT_IN]), READING]
    if (docs / "compare.md").is_file():
        parts.append("To make such a comparison on your own data: [Compare](compare.md).")
        others = "\n".join(f"- [{what}]({where})" for where, what in ELSEWHERE.items())
        parts.append(f"Scripts of their own made these, which are on other pages:\n\n{others}")
    for name, summary in summaries(docs).items():
        parts += [f"## {_title(name, summary)}", about(summary), *_links(docs, name)]
        parts += [at_budget(summary, group) for group in summary.groups]
    return "\n\n".join(parts) + "\n"


def can(found: Iterable[MethodInfo]) -> str:
    """The methods that can do each thing, by probing."""
    found = list(found)
    small = [m for m in found if m.lora_rank not in (None, "full")]
    needs = {
        "be served as a LoRA (exact, and small)": small,
        "load in PEFT": [m for m in found if m.peft],
        "adapt convolutions": [m for m in found if "conv2d" in m.kinds],
        "adapt embeddings": [m for m in found if "embedding" in m.kinds],
        "fold into the weights": [m for m in found if m.foldable],
        "change nothing at the start": [m for m in found if m.identity_at_start],
    }
    return table_of_text(
        ["to", "methods"], [[need, _all_but(names(able), names(found))] for need, able in needs.items()]
    )


def names(found: Iterable[MethodInfo]) -> list[str]:
    """The methods' names, each leading to its page."""
    return [f"[`{m.name}`](methods.md#{m.name})" for m in found]


def _all_but(able: list[str], every: list[str]) -> str:
    """The shorter of naming those that can and those that cannot."""
    others = [name for name in every if name not in able]
    if not others:
        return "all"
    return f"all but {', '.join(others)}" if len(others) < len(able) else ", ".join(able)


def table_of_text(header: list[str], body: list[list[str]]) -> str:
    """A Markdown table without figures."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *body])


def _title(name: str, summary: Summary) -> str:
    return f"{(summary.task or 'comparison').capitalize()} with {summary.model or 'a model'}: {name}"


def _links(docs: Path, name: str) -> list[str]:
    return (
        [f"[Its report](examples/{name}/report.html)."]
        if (docs / "examples" / name / "report.html").is_file()
        else []
    )


def about(summary: Summary) -> str:
    """What was compared, where, and what stands beside the methods."""
    where = summary.environment
    made = ", ".join(
        f"{label} {where[key]}"
        for key, label in (("cpu", "on"), ("threads", "threads"), ("isotune_version", "isotune"),
                           ("torch_version", "torch"), ("date", "of"))
        if where.get(key) is not None
    )  # fmt: skip
    said = [
        f"{summary.metric.capitalize()} ({'higher' if summary.higher_is_better else 'lower'} is better), "
        f"{summary.seeds} seeds, {summary.trials} learning rates tried for each method; {made}."
    ]
    if note := (summary.model_extra or {}).get("note"):
        said.append(note)
    for standing in ranked([row for row in summary.rows if row.budget is None], summary.higher_is_better):
        row = standing.row
        kept = [f", {words(key)} {score(found, key)}" for key, found in row.forgetting.items()]
        name = REFERENCES.get(row.method, row.method).capitalize()
        said.append(f"{name}: {score(row.score, summary.metric)}{''.join(kept)}.")
    for key, measure in summary.forgetting.items():
        said.append(
            f"Forgetting, *{measure.label}*: the base has {number(measure.base, key)}."
            if measure.base is not None
            else f"Forgetting: {measure.label}."
        )
    return " ".join(said)


if __name__ == "__main__":
    main()

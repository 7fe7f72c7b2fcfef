"""The model card (README.md) beside an adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from isotune.adapters.settings import Settings
from isotune.checkpoint.base_record import LABELLED
from isotune.version import __version__


def adapter_card(
    config: dict[str, Any],
    settings: Mapping[str, Settings],
    tensors: Mapping[str, Tensor],
    reason: str | None,
    labels: Sequence[str],
) -> str:
    """The card of a saved adapter; `reason` says why PEFT cannot load it, None where it can."""
    first = next(iter(settings.values()), None)
    options = json.dumps(first.model_dump(exclude_defaults=True)) if first else "{}"
    peft = (
        f"PEFT cannot load it: {reason}. `isotune export --to lora` writes a LoRA where the method has that form."
        if reason
        else "PEFT loads it too: `PeftModel.from_pretrained(model, PATH)`."
    )
    opened = _opening(config, labels) or "\n# model: the base model, as it was before training"
    return f"""{_front_matter(config)}
# Adapter

| | |
|---|---|
| method | {first.name if first else "modules trained in full"} |
| options that differ from the defaults | `{options}` |
| layers | {len(settings)} |
| values stored | {sum(t.numel() for t in tensors.values()):,} |
| modules trained in full | {", ".join(config["modules_to_save"] or []) or "none"} |
| base model | {config["base_model_name_or_path"] or "not recorded"} |

```python
import isotune
{opened}
isotune.load(model, PATH)
```

{peft}

Written by isotune {__version__}.
"""


def export_card(
    config: dict[str, Any],
    residuals: Mapping[str, float],
    ranks: Mapping[str, int],
    dtype: str,
    trained: list[str],
    labels: Sequence[str],
) -> str:
    """The card of an exported LoRA."""
    rows = "\n".join(f"| {path} | {ranks[path]} | {residual:.1e} |" for path, residual in residuals.items())
    heads = (
        f"It also holds modules trained in full ({', '.join(trained)}), which PEFT loads; a server that takes only "
        "LoRA tensors needs them folded into the base (`isotune export --to merged`)."
        if trained
        else "It holds nothing but LoRA tensors."
    )
    if opened := _opening(config, labels):
        lines = f"from peft import PeftModel\n{opened}\nmodel = PeftModel.from_pretrained(model, PATH)"
        heads += f"\n\n```python\n{lines}\n```"
    return f"""{_front_matter(config)}
# LoRA

Exported as an exact low-rank form, rank {config["r"]} at every layer (zero-padded), scaling 1, stored as {dtype}.
{heads}

The residual is `|W + B A - W'| / |W|` in the Frobenius norm for B and A as stored, where W' is the adapted weight.

| layer | rank | residual |
|---|---|---|
{rows}

Written by isotune {__version__}.
"""


def _opening(config: Mapping[str, Any], labels: Sequence[str]) -> str:
    """The lines that open a classifier's base with as many labels as the adapter has; none for other models."""
    kind = LABELLED.get(config.get("task_type") or "")
    if not kind or not labels:
        return ""
    base = json.dumps(config["base_model_name_or_path"] or "BASE")
    names = dict(enumerate(labels))
    return f"from transformers import {kind}\n\nmodel = {kind}.from_pretrained({base}, id2label={names!r})"


def _front_matter(config: dict[str, Any]) -> str:
    base = (
        f"base_model: {json.dumps(config['base_model_name_or_path'])}\n" if config["base_model_name_or_path"] else ""
    )
    return f"---\n{base}library_name: peft\ntags:\n- isotune\n---"

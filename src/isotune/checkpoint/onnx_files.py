"""A vision transformer of DINOv2's kind in an ONNX file that torch wrote: it alone, without what is built upon it.

In such a file vectors keep their names and matrices do not: a matrix is known by the node that multiplies by it, such
as `/backbone/encoder/layer.0/mlp/fc1/MatMul`, and stands transposed there. The positions of the class token and of
the patches are two tensors. Names are those of the hub's files, which transformers turns into its own as it loads.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from isotune.checkpoint.unpacked_once import unpacked_once
from isotune.errors import CheckpointError

SUFFIX = ".onnx"
_FIRST, _POSITIONS = "embeddings.cls_token", "embeddings.position_embeddings"
_HEAD = 64
"""Numbers in each head of attention, in all of DINOv2's models."""
_PIXELS = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True, "size": {"shortest_edge": 256}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}  # fmt: skip
"""How DINOv2 is evaluated: the middle of an image, by the means and deviations of ImageNet."""


def is_onnx(name: str | Path) -> bool:
    """Whether the name is that of an ONNX file at hand."""
    return str(name).endswith(SUFFIX) and Path(name).expanduser().is_file()


def unpacked(file: str | Path) -> Path:
    """The folder of a `Dinov2Model` of transformers with the file's weights, and of an image processor.

    Raises CheckpointError where the package onnx is missing, the file cannot be read, holds no such model, or the
    cache cannot be written.
    """
    return unpacked_once(Path(file).expanduser(), "onnx", _unpack)


def _unpack(file: Path, folder: Path) -> None:
    if importlib.util.find_spec("onnx") is None:
        raise CheckpointError(f"{file} is an ONNX file, which takes a package to read: pip install 'isotune[vision]'")
    import onnx
    import transformers

    try:
        state = _tensors(onnx.load(file).graph, onnx.numpy_helper.to_array)
        width, layers = state[_FIRST].shape[-1], [name for name in state if name.endswith("mlp.fc1.weight")]
        patch = state["embeddings.patch_embeddings.projection.weight"].shape[-1]
        config = transformers.Dinov2Config(
            hidden_size=width,
            num_hidden_layers=len(layers),
            num_attention_heads=width // _HEAD,
            mlp_ratio=len(state[layers[0]]) // width,
            patch_size=patch,
            image_size=patch * math.isqrt(state[_POSITIONS].shape[1] - 1),
            use_mask_token=False,
            architectures=["Dinov2Model"],
        )
    except Exception as error:  # a damaged file surfaces as whatever its reader raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{file} cannot be read as a vision transformer of DINOv2's kind: {reason}") from None
    tensors = {name: torch.tensor(np.ascontiguousarray(array)) for name, array in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps(_PIXELS, indent=2) + "\n", encoding="utf-8")
    config.save_pretrained(folder)


def _tensors(graph: Any, as_array: Any) -> dict[str, np.ndarray]:
    """The model's tensors by the names of the hub's files. Raises ValueError where it is not there."""
    arrays = {tensor.name: as_array(tensor) for tensor in graph.initializer}
    first = next((name for name in arrays if name.endswith(_FIRST)), None)
    if first is None:
        raise ValueError(f"it has no tensor {_FIRST!r}")
    prefix = first.removesuffix(_FIRST)
    found, positions = dict(arrays), []
    for node in graph.node:
        path = node.name.strip("/").replace("/", ".").removesuffix(f".{node.op_type}")
        for name in (name for name in node.input if name in arrays and name.startswith("onnx::")):
            if node.op_type == "MatMul":
                found[f"{path}.weight"] = arrays[name].T
            elif path.startswith(f"{prefix}embeddings"):
                positions.append(arrays[name])
    if positions:  # that of the class token, and those of the patches
        found[prefix + _POSITIONS] = np.concatenate(sorted(positions, key=lambda array: array.shape[1]), axis=1)
    return {name.removeprefix(prefix): array for name, array in found.items() if name.startswith(prefix)}

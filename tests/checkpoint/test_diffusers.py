"""LoRAs as diffusers' training scripts write them are adapters like others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import isotune
from isotune.checkpoint.export import export_lora
from isotune.checkpoint.export_diffusers import export_diffusers
from isotune.checkpoint.read_diffusers import FILE
from isotune.diagnostics.sources import open_source
from isotune.errors import CheckpointError, NoLowRankFormError, OptionError
from isotune.merging.adapters.merge import merge


class Attention(nn.Module):
    def __init__(self, names: tuple[str, ...], out: nn.Module) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(6, 6))
        self.add_module("to_out" if isinstance(out, nn.ModuleList) else "out_proj", out)
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        out = self.to_out[0] if hasattr(self, "to_out") else self.out_proj
        return out(sum(getattr(self, name)(x) for name in self.names))


def unet() -> nn.Module:
    torch.manual_seed(0)
    out = nn.ModuleList([nn.Linear(6, 6), nn.Dropout(0.0)])
    return nn.Sequential(Attention(("to_q", "to_k"), out)).eval()


def text_encoder() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(Attention(("q_proj", "k_proj"), nn.Linear(6, 6))).eval()


# By the layer what each way to write calls its down factor; the up factor is called alike.
WAYS: dict[str, dict[str, str]] = {
    "PEFT's names": {"0.to_q": "unet.0.to_q.lora_A", "0.to_out.0": "unet.0.to_out.0.lora_A"},
    "present": {"0.to_q": "unet.0.to_q.lora.down", "0.to_out.0": "unet.0.to_out.0.lora.down"},
    "processors": {"0.to_q": "unet.0.processor.to_q_lora.down", "0.to_out.0": "unet.0.processor.to_out_lora.down"},
    "no prefix": {"0.to_q": "0.to_q.lora.down", "0.to_out.0": "0.to_out.0.lora.down"},
    "text": {"0.q_proj": "text_encoder.0.q_proj.lora_linear_layer.down"},
    "old text": {"0.q_proj": "text_encoder.0.to_q_lora.down", "0.out_proj": "text_encoder.0.to_out_lora.down"},
}


def drawn(names: Mapping[str, str], rank: int = 2) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a file, and by layer the change B A."""
    generator = torch.Generator().manual_seed(2)
    tensors, changes = {}, {}
    for layer, down in names.items():
        up = down.removesuffix("down") + "up" if down.endswith("down") else down.removesuffix("A") + "B"
        A, B = (torch.randn(*shape, generator=generator) for shape in ((rank, 6), (6, rank)))
        tensors |= {f"{down}.weight": A, f"{up}.weight": B}
        changes[layer] = B @ A
    return tensors, changes


def write(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    described = {} if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
    save_file(tensors, folder / FILE, metadata={"format": "pt", **described})
    return folder


def assert_changed(model: nn.Module, bare: nn.Module, changes: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """The model answers as the bare one with these changes of its weights."""
    with torch.no_grad():
        for layer, change in changes.items():
            weight: Any = bare.get_submodule(layer).weight
            weight += scale * change
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(model(x), bare(x))


@pytest.mark.parametrize("way", WAYS)
def test_every_name_that_diffusers_ever_wrote_is_understood(way: str, tmp_path: Path) -> None:
    make = text_encoder if "text" in way else unet
    tensors, changes = drawn(WAYS[way])
    folder = write(tmp_path / "lora", tensors)
    assert_changed(isotune.load(make(), folder), make(), changes)
    assert_changed(isotune.load(make(), folder / FILE), make(), changes)


def test_the_part_that_fits_the_model_is_taken(tmp_path: Path) -> None:
    (one, changes), (two, others) = drawn(WAYS["present"]), drawn(WAYS["text"])
    folder = write(tmp_path / "lora", one | two)
    assert_changed(isotune.load(unet(), folder), unet(), changes)
    assert_changed(isotune.load(text_encoder(), folder), text_encoder(), others)
    with pytest.raises(CheckpointError, match="holds LoRAs for text_encoder, unet of a pipeline, of which none fits"):
        isotune.load(nn.Sequential(nn.Linear(6, 6)), folder)


def test_alpha_is_read_from_the_header_or_beside_the_factors(tmp_path: Path) -> None:
    tensors, changes = drawn(WAYS["present"])
    metadata = {"unet.r": 2, "unet.lora_alpha": 8, "unet.target_modules": ["to_q"], "unet.use_rslora": False}
    header = write(tmp_path / "header", tensors, metadata)
    assert_changed(isotune.load(unet(), header), unet(), changes, 4.0)
    alphas = {"unet.0.to_q.alpha": torch.tensor(8.0), "unet.0.to_out.0.alpha": torch.tensor(8.0)}
    beside = write(tmp_path / "beside", tensors | alphas)
    assert_changed(isotune.load(unet(), beside), unet(), changes, 4.0)


def test_ranks_may_differ_by_layer(tmp_path: Path) -> None:
    (one, changes), (two, others) = (
        drawn({"0.to_q": "unet.0.to_q.lora.down"}),
        drawn({"0.to_k": "unet.0.to_k.lora.down"}, rank=3),
    )
    assert_changed(isotune.load(unet(), write(tmp_path / "lora", one | two)), unet(), changes | others)


def test_names_of_another_trainer_are_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "lora", {"lora_unet_0_to_q.lora_down.weights": torch.ones(2, 6)})
    with pytest.raises(CheckpointError, match=r"another trainer wrote it, open it with .*load_lora_weights"):
        isotune.load(unet(), folder)


def test_the_file_is_inspected_exported_and_merged_like_any_adapter(tmp_path: Path) -> None:
    folder, base = write(tmp_path / "lora", drawn(WAYS["present"])[0]), tmp_path / "base"
    base.mkdir()
    save_file(unet().state_dict(), base / "diffusion_pytorch_model.safetensors")
    assert sorted(open_source(folder, base).names.values()) == ["0.to_out.0", "0.to_q"]
    export_lora(folder, tmp_path / "exported", base=base)
    merge([folder, folder / FILE], rule="linear", names=["a", "b"], base=base, output=tmp_path / "merged")
    x = torch.randn(3, 6)
    one, two, three = (isotune.load(unet(), p)(x) for p in (folder, tmp_path / "exported", tmp_path / "merged"))
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(one, three)


@pytest.mark.parametrize("tensors", [{"unet.0.to_q.alpha": torch.tensor(8.0)}, {"unet.0.to_q.alpha": torch.ones(2)}])
def test_a_file_without_its_factors_is_told(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        isotune.load(unet(), write(tmp_path / "lora", tensors))


@pytest.mark.parametrize("dora", [False, True])
def test_diffusers_own_file_gives_what_diffusers_computes(dora: bool, tmp_path: Path) -> None:
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    from peft.utils import get_peft_model_state_dict

    def small() -> Any:
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16,
            attention_head_dim=2, norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval()  # fmt: skip

    theirs = small()
    targets = ["to_k", "to_q", "to_v", "to_out.0", *(["conv1"] if not dora else [])]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False, use_dora=dora)
    theirs.add_adapter(config)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=diffusers.utils.convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs)),
        unet_lora_adapter_metadata=config.to_dict(),
    )
    ours = isotune.load(small(), tmp_path)
    given = torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(*given).sample, theirs(*given).sample, rtol=1e-4, atol=1e-5)


def test_an_export_is_what_pipelines_load(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Pipeline

    torch.manual_seed(0)
    bare = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip
    bare.save_pretrained(tmp_path / "unet")
    model = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    isotune.adapt(model, isotune.HRA(rank=4), r".*attn[12]\.to_(q|k|v|out\.0)")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.5 * torch.randn_like(p))
    isotune.save(model, tmp_path / "adapter")
    export = export_diffusers(tmp_path / "adapter", tmp_path / "lora", base=tmp_path / "unet")
    assert export.residual < 1e-5
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 5, 16)
    served = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    state, alphas = Pipeline.lora_state_dict(tmp_path / "lora")
    Pipeline.load_lora_into_unet(state, alphas, served)
    ours = isotune.load(UNet2DConditionModel.from_pretrained(tmp_path / "unet"), tmp_path / "lora")
    with torch.no_grad():
        wanted = model.eval()(*inputs).sample
        torch.testing.assert_close(served.eval()(*inputs).sample, wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.eval()(*inputs).sample, wanted, rtol=0, atol=1e-4)
        assert (bare.eval()(*inputs).sample - wanted).abs().max() > 1e-3
    transformer = export_diffusers(tmp_path / "adapter", tmp_path / "other", "transformer", base=tmp_path / "unet")
    assert all(key.startswith("transformer.") for key in load_file(transformer.path / FILE))


def test_what_no_pipeline_takes_is_refused(tmp_path: Path) -> None:
    model = isotune.adapt(unet(), isotune.LoRA(rank=2), ["to_q"], train_also=["0.to_k"])
    isotune.save(model, tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(unet().state_dict(), tmp_path / "base" / "model.safetensors")
    with pytest.raises(NoLowRankFormError, match=r"modules trained in full \(0\.to_k\), which no pipeline takes"):
        export_diffusers(tmp_path / "adapter", tmp_path / "lora", base=tmp_path / "base")
    with pytest.raises(OptionError, match="part 'vae' is unknown; choose unet, transformer"):
        export_diffusers(tmp_path / "adapter", tmp_path / "lora", "vae")  # type: ignore[arg-type]
    assert not (tmp_path / "lora").exists()

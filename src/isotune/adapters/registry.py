"""Which methods there are. A built-in method is one line here; others register the entry point `isotune.methods`."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from isotune.adapters.settings import Settings
from isotune.errors import OptionError, nearest

BUILT_IN = {
    "hra": "isotune.adapters.orthogonal.hra:HRA",
    "lora": "isotune.adapters.low_rank.lora:LoRA",
    "oft": "isotune.adapters.orthogonal.oft:OFT",
    "boft": "isotune.adapters.orthogonal.boft:BOFT",
    "hoft": "isotune.adapters.orthogonal.hoft:HOFT",
    "shoft": "isotune.adapters.orthogonal.shoft:SHOFT",
    "soda": "isotune.adapters.orthogonal.soda:SODA",
    "psoft": "isotune.adapters.orthogonal.psoft:PSOFT",
    "ether": "isotune.adapters.orthogonal.ether:ETHER",
    "ether_plus": "isotune.adapters.orthogonal.ether_plus:ETHERPlus",
    "goft": "isotune.adapters.orthogonal.goft:GOFT",
    "road": "isotune.adapters.orthogonal.road:RoAd",
    "pissa": "isotune.adapters.spectral.pissa:PiSSA",
    "olora": "isotune.adapters.spectral.olora:OLoRA",
    "sorsa": "isotune.adapters.spectral.sorsa:SORSA",
    "corda": "isotune.adapters.spectral.corda:CorDA",
    "loldu": "isotune.adapters.spectral.loldu:LoLDU",
    "loca": "isotune.adapters.spectral.loca:LoCA",
    "fourierft": "isotune.adapters.spectral.fourierft:FourierFT",
    "dora": "isotune.adapters.low_rank.dora:DoRA",
    "doran": "isotune.adapters.low_rank.doran:DoRAN",
    "loraplus": "isotune.adapters.low_rank.loraplus:LoRAPlus",
    "ortha": "isotune.adapters.low_rank.ortha:OrthA",
    "hydra": "isotune.adapters.low_rank.hydra:Hydra",
    "delora": "isotune.adapters.low_rank.delora:DeLoRA",
    "miss": "isotune.adapters.low_rank.miss:MiSS",
    "bat": "isotune.adapters.low_rank.bat:BAT",
    "vera": "isotune.adapters.low_rank.vera:VeRA",
    "randlora": "isotune.adapters.low_rank.randlora:RandLoRA",
    "tlora": "isotune.adapters.low_rank.tlora:TLoRA",
    "sora": "isotune.adapters.low_rank.sora:SoRA",
    "adalora": "isotune.adapters.low_rank.adalora:AdaLoRA",
    "diffora": "isotune.adapters.low_rank.diffora:DiffoRA",
    "pego": "isotune.adapters.low_rank.pego:PEGO",
    "hira": "isotune.adapters.low_rank.hira:HiRA",
    "loha": "isotune.adapters.low_rank.loha:LoHa",
    "lokr": "isotune.adapters.low_rank.lokr:LoKr",
    "shira": "isotune.adapters.sparse.shira:SHiRA",
    "mola": "isotune.adapters.mixture.mola:MoLA",
    "poly": "isotune.adapters.mixture.poly:Poly",
    "lily": "isotune.adapters.mixture.lily:Lily",
    "moa": "isotune.adapters.mixture.moa:MoA",
    "conformer": "isotune.adapters.bottleneck.conformer:Conformer",
    "adaptformer": "isotune.adapters.bottleneck.adaptformer:AdaptFormer",
    "alore": "isotune.adapters.bottleneck.alore:ALoRE",
    "arc": "isotune.adapters.bottleneck.arc:ARC",
    "kadaptation": "isotune.adapters.low_rank.kadaptation:KAdaptation",
    "houlsby": "isotune.adapters.bottleneck.houlsby:Houlsby",
    "lt_sft": "isotune.adapters.sparse.lt_sft:LTSFT",
    "pruning": "isotune.adapters.sparse.pruning:AdaptByPruning",
    "splora": "isotune.adapters.sparse.splora:SPLoRA",
    "sppara": "isotune.adapters.sparse.sppara:SPPaRA",
    "splopa": "isotune.adapters.sparse.splopa:SPLoPA",
    "ssf": "isotune.adapters.sparse.ssf:SSF",
    "bitfit": "isotune.adapters.sparse.bitfit:BitFit",
    "ln_tuning": "isotune.adapters.sparse.ln_tuning:LNTuning",
    "ia3": "isotune.adapters.low_rank.ia3:IA3",
    "prefix": "isotune.adapters.prompt.prefix:PrefixTuning",
    "prompt": "isotune.adapters.prompt.shallow:PromptTuning",
    "deep_prompt": "isotune.adapters.prompt.deep:DeepPrompts",
}

OLDER_NAMES = {"bone": "miss"}
"""Names under which a method was published before."""


def method_names() -> list[str]:
    """The names of all methods, built-in ones first."""
    others = sorted(entry_points(group="isotune.methods").names - BUILT_IN.keys())
    return [*BUILT_IN, *others]


@cache
def method_class(name: str) -> type[Settings]:
    """The settings class of a method. Raises OptionError for an unknown name."""
    name = OLDER_NAMES.get(name, name)
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(import_module(module), attribute)
    if name not in (names := method_names()):
        raise OptionError(f"unknown method {name!r}.{nearest(name, names)} The methods are: {', '.join(names)}.")
    (entry,) = entry_points(group="isotune.methods", name=name)
    return entry.load()


def method(name: str, **options: Any) -> Settings:
    """A method's settings by name: `method("hra", rank=8)` is `HRA(rank=8)`."""
    return method_class(name)(**options)

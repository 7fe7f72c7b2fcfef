"""An adapted model as a `peft.PeftModel`, for those who ask for one: TRL, and Trainer on a quantised base."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import isotune
from isotune.errors import IsotuneError
from isotune.model.names import changed_modules, unwrapped
from isotune.model.switch import active_names, adapter_names

try:
    from peft import PeftConfig, PeftModel
except ImportError as missing:
    raise IsotuneError("as_peft needs PEFT: pip install 'isotune[peft]'") from missing


def as_peft(model: nn.Module) -> PeftModel:
    """The adapted model as a `peft.PeftModel`, of which it is a thin view: nothing is copied, and nothing moves.

    `transformers.Trainer` then trains adapters on a quantised base, and TRL's trainers take what the adapter was when
    they began for their reference. Saving writes the adapter alone, which a checkpoint resumes from. The model itself
    goes on as before; give `AdapterCallback` to the trainer for methods with a penalty or a step of their own.

    Args:
        model: A model with adapters on it, one or several of them in use.

    Returns:
        The view: `isinstance(view, peft.PeftModel)`, and `view.get_base_model()` is the model.

    Raises:
        IsotuneError: PEFT is not installed, or the model has no adapter in use.
    """
    if not active_names(model):
        raise IsotuneError("as_peft shows adapters, and none is in use on this model; call isotune.adapt, or use")
    return _View(model)


class _View(PeftModel):
    """See `as_peft`. PEFT's own set-up, which would wrap the layers, is left out."""

    base_model_of_isotune = "base_model"

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.base_model = model
        self.peft_type = None
        self.special_peft_forward_args: set[str] = set()
        self._is_prompt_learning = self._adapters_disabled = False
        config = getattr(unwrapped(model), "config", None)
        self.name_or_path = str(getattr(config, "_name_or_path", "") or "")

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """A plain configuration for each adapter; the first in use is found as "default", too."""
        config = PeftConfig(base_model_name_or_path=self.name_or_path, inference_mode=False)
        return dict.fromkeys(("default", *adapter_names(self.base_model)), config)

    @property
    def active_adapters(self) -> list[str]:
        """The adapters in use."""
        return active_names(self.base_model)

    @property
    def active_adapter(self) -> str:
        """The last of them."""
        return (self.active_adapters or ["default"])[-1]

    @property
    def active_peft_config(self) -> PeftConfig:
        """A plain configuration."""
        return self.peft_config["default"]

    @property
    def modules_to_save(self) -> set[str]:
        """None: what is trained in full is saved with the adapter."""
        return set()

    def get_base_model(self) -> nn.Module:
        """The adapted model."""
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's."""
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's."""
        return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The bare base within the context."""
        with isotune.disabled(self.base_model):
            yield

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Let one adapter run; what learns is left as it is. Raises IsotuneError for an unknown one."""
        learns = {id(p): p.requires_grad for p in self.base_model.parameters()}
        isotune.use(self.base_model, adapter_name)
        for parameter in self.base_model.parameters():
            parameter.requires_grad_(learns[id(parameter)] and not inference_mode)

    def add_adapter(self, adapter_name: str, peft_config: Any = None, low_cpu_mem_usage: bool = False) -> None:
        """A copy of the adapters in use as they are now, at rest; TRL's reference. The configuration says nothing.

        Raises IsotuneError for a name that is taken, or where several adapters are in use.
        """
        (name, *more) = self.active_adapters
        if more or adapter_name in adapter_names(self.base_model):
            why = (
                "it is there already" if not more else f"{name} and {', '.join(more)} are stacked, and one is copied"
            )
            raise IsotuneError(f"adapter {adapter_name!r} cannot be added: {why}")
        for _, module in changed_modules(self.base_model):
            home = module.isotune
            if name in home:
                home[adapter_name] = copy.deepcopy(home[name]).requires_grad_(False)
                if name in home.settings:
                    home.settings[adapter_name] = home.settings[name]

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write the adapters in use and what trains in full, in PEFT's layout; the base is not written."""
        isotune.save(self.base_model, save_directory, base_model=self.name_or_path or None)

    def load_adapter(
        self, model_id: str | Path, adapter_name: str, is_trainable: bool = False, **kwargs: Any
    ) -> None:
        """Put the weights of a folder that `save_pretrained` wrote into the adapter in use."""
        isotune.load_weights(self.base_model, model_id)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The model with the adapters folded into its weights, and without them."""
        return isotune.fold(self.base_model, keep_base=False)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Nothing: the card comes with `save_pretrained`."""

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable parameters, and all of them."""
        sizes = [(p.numel(), p.requires_grad) for p in self.base_model.parameters()]
        return sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """The adapted model's, under its own names."""
        return self.base_model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """The adapted model's."""
        return self.base_model.load_state_dict(state_dict, strict, assign)

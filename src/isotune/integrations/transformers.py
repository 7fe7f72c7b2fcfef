"""Adapters in `transformers.Trainer` and what is built on it, such as TRL's trainers, by one callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import isotune
from isotune.bare import HOME
from isotune.model.names import unwrapped

_OF_A_WHOLE_MODEL = ("config.json", "generation_config.json")


class AfterStep(TrainerCallback):
    """Lets the adapters do what their method does after each optimizer step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        isotune.after_step(model, (state.global_step + 1) / max(state.max_steps, 1), kwargs.get("optimizer"))


class AdapterCallback(AfterStep):
    """Does for an adapted model what its trainer does not know of: `Trainer(..., callbacks=[AdapterCallback()])`.

    - A checkpoint holds the adapter and what else trains, not the base: `model.safetensors` for the trainer, which
      resumes from it once the model is adapted in the same way, and the folder `adapter` for `isotune.load`.
    - The penalty's gradient is added before each optimizer step. It is not clipped, and with fp16 it needs
      `max_grad_norm` above 0, as by default, so that gradients are unscaled by then.
    - `isotune.after_step` follows each optimizer step.

    Learning rates for methods that rotate come from `isotune.parameter_groups`:
    `Trainer(..., optimizers=(torch.optim.AdamW(isotune.parameter_groups(model, lr=1e-3)), None))`.
    """

    def __init__(self) -> None:
        self._kept: Any = None
        self._saving = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        penalty = isotune.penalty(model)
        if not penalty.requires_grad:
            return
        trained = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(penalty, trained, allow_unused=True)
        for parameter, gradient in zip(trained, found, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._restore(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if control.should_save:
            self._leave_base_out(model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if control.should_save:
            self._leave_base_out(model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._restore(model)
        if not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for name in _OF_A_WHOLE_MODEL:  # with these, from_pretrained would draw a base anew
            (checkpoint / name).unlink(missing_ok=True)
        isotune.save(model, checkpoint / "adapter")

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._restore(model)

    def _leave_base_out(self, model: Any) -> None:
        """Let `save_pretrained` write nothing but what is in the adapters, for the one checkpoint that comes."""
        model = unwrapped(model)
        if not self._saving:
            self._kept, self._saving = model._keys_to_ignore_on_save, True
            model._keys_to_ignore_on_save = [key for key in model.state_dict() if f".{HOME}." not in f".{key}"]

    def _restore(self, model: Any) -> None:
        if self._saving:
            unwrapped(model)._keys_to_ignore_on_save, self._saving = self._kept, False

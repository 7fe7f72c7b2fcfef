"""`transformers.Trainer` for adapters: penalties in the loss, small checkpoints, exact resumption."""

from __future__ import annotations

import math
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import IntervalStrategy

import isotune
from isotune.errors import CheckpointError, DivergedError
from isotune.integrations.transformers import AfterStep
from isotune.model.rates import treatments
from isotune.model.running import frozen_statistics
from isotune.training.folder import mark_complete, mark_incomplete, resume_command
from isotune.training.measure import StepTimer
from isotune.training.optimizers import build_optimizer
from isotune.training.weights import load_weights, save_weights

Along = Callable[[Any], Mapping[str, float]]
"""Measures a model beside each validation."""
Asking = Callable[[Any, Any, int], Mapping[str, float]]
"""Measures a model on examples by what it writes, so many at a time."""


class AdapterTrainer(Trainer):
    """A Trainer whose checkpoints hold the adapter alone (a model without adapters whole), once they are complete."""

    def __init__(
        self,
        *args: Any,
        base_model: str,
        task_loss: Callable[[Any, Any], tuple[Any, Any] | None],
        around_training: Callable[[Any], AbstractContextManager[Any]] = nullcontext,
        chosen_optimizer: Mapping[str, Any] | None = None,
        along: Along | None = None,
        asking: Asking | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        self.task_loss, self.around_training = task_loss, around_training
        self.chosen_optimizer = chosen_optimizer
        self.along, self.asking = along, asking
        self.timer = StepTimer()
        with _as_one_with_adapters(kwargs["model"]):
            super().__init__(*args, callbacks=[self.timer, *callbacks], **kwargs)
        self.base_model = base_model
        self.kept_as_they_are = frozen_statistics(self.model)
        self.remove_callback(PrinterCallback)
        self.add_callback(_AdapterSteps())
        self.add_callback(_MissedEvaluation(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; an optimizer that meets what is no number says so as a loss does."""
        try:
            with self.around_training(self.model):
                return super().train(*args, **kwargs)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise DivergedError(
                f"the optimizer could not decompose a matrix at step {self.state.global_step + 1}: lower "
                "training.learning_rate"
            ) from error

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, counting tokens."""
        if (mask := _token_mask(inputs)) is not None:
            self.timer.count(mask)
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The task's loss, by default the model's own, and in training the adapters' penalty."""
        isotune.tokens(self.model, _token_mask(inputs))
        for norm in self.kept_as_they_are:
            norm.eval()  # the Trainer sets the whole model to training before each step
        loss, outputs = self.task_loss(model, inputs) or super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if model.training:
            # A loss that is normalised over all accumulated batches is summed over them: the penalty counts once.
            summed = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            loss = loss + isotune.penalty(self.model) / (self.current_gradient_accumulation_steps if summed else 1)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The recipe's, or the Trainer's, with a group for each of the methods' own factors on the learning rate."""
        if self.chosen_optimizer is not None and getattr(self, "optimizer", None) is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            free = {p for name, p in self.model.named_parameters() if name not in decayed}
            rate, decay = self.args.learning_rate, self.args.weight_decay
            self.optimizer: Any = build_optimizer(self.model, self.chosen_optimizer, rate, decay, free)
            return self.optimizer
        optimizer = super().create_optimizer(*args, **kwargs)
        factors = {p: how.rate for p, how in treatments(self.model).items() if how.rate != 1}
        for group in list(optimizer.param_groups):
            for factor in sorted({factors[p] for p in group["params"] if p in factors}):
                own = [p for p in group["params"] if factors.get(p) == factor]
                group["params"] = [p for p in group["params"] if factors.get(p) != factor]
                optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * factor})
        return optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, without a trace on the random state: a resumed run does not repeat it."""
        with torch.random.fork_rng():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As the Trainer's, with what is measured by asking the model, among the metrics."""
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.asking is not None:
            found = self.asking(self.model, dataloader.dataset, self.args.per_device_eval_batch_size)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with what else is measured beside each validation."""
        if self.along is not None and "eval_loss" in logs:
            logs = logs | {f"eval_{name}": value for name, value in self.along(self.model).items()}
        super().log(logs, *args, **kwargs)

    def misses_evaluation(self) -> bool:
        """Whether a validation is due at this step by the recipe, and the history has none."""
        state, strategy = self.state, self.args.eval_strategy
        if strategy == IntervalStrategy.EPOCH:
            due = float(state.epoch or 0.5).is_integer() or state.global_step >= state.max_steps
        else:
            due = strategy == IntervalStrategy.STEPS and state.global_step % state.eval_steps == 0
        done = any(entry["step"] == state.global_step for entry in state.log_history if "eval_loss" in entry)
        return due and state.global_step > 0 and not done

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_weights(self.model, folder, self.base_model)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            mark_incomplete(checkpoint)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(checkpoint)
        except (OSError, RuntimeError, CheckpointError) as error:
            shutil.rmtree(checkpoint, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint at step {self.state.global_step} cannot be written: {error}. Earlier checkpoints "
                f"are intact; make room, then: {resume_command(self.args.output_dir)}"
            ) from error
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_weights(self.model, Path(self.state.best_model_checkpoint or ""))


def _token_mask(inputs: Mapping[str, Any]) -> Any:
    """Which tokens of a batch are no padding; None where it has none: the mask beside sound counts samples."""
    return inputs.get("attention_mask") if "input_ids" in inputs else None


@contextmanager
def _as_one_with_adapters(model: Any) -> Iterator[None]:
    """Let a quantised base pass for one with adapters on it, which it is: Trainer looks for those of PEFT alone."""
    quantised = getattr(model, "is_quantized", False)
    if quantised:
        model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        if quantised:
            model._hf_peft_config_loaded = False


class _AdapterSteps(AfterStep):
    """The adapters' own update after each optimizer step, and a log line before each checkpoint."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The log is part of the checkpoint: without it a resumed run could not know its whole training loss.
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            raise DivergedError(
                f"the training loss is {logs['loss']} at step {state.global_step}: lower training.learning_rate"
            )


class _MissedEvaluation(TrainerCallback):
    """The validation that was due at a checkpoint's step, and not done when the run was stopped, on resuming."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.misses_evaluation():
            self.trainer.evaluate()


class StopOnInterrupt(TrainerCallback):
    """After the first Ctrl-C: finish the step, save a checkpoint, stop. The second stops at once."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle SIGINT within the context, where this thread may."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint, and for the end."""
        if self.requested:
            control.should_save = control.should_log = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave at once: no evaluation on the way out."""
        if self.requested:
            control.should_evaluate = control.should_save = False

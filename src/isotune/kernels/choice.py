"""Whether the kernels run, or the portable functions of `linalg` that they stand for."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from isotune.errors import OptionError

Mode = Literal["auto", "on", "off"]
MODES: tuple[Mode, ...] = ("auto", "on", "off")
VARIABLE = "ISOTUNE_KERNELS"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TENSORS = (Tensor, torch.nn.Parameter)  # not a subclass, which may hold its numbers elsewhere
_INSTALLED = sys.platform == "linux" and importlib.util.find_spec("triton") is not None
_mode: Mode | None = None
_working: dict[torch.device, bool] = {}


def set_kernels(mode: Mode | None) -> None:
    """Say when the Triton kernels stand in for the portable functions.

    Args:
        mode: "auto", on a GPU where Triton is installed (the default); "on", also on a CPU, which takes Triton's
            interpreter (TRITON_INTERPRET=1) and is for tests; "off", never. None: as the environment variable
            ISOTUNE_KERNELS says, which takes the same three words.

    Raises:
        OptionError: Another word.
    """
    global _mode
    _mode = None if mode is None else _checked(mode, "set_kernels")


def kernels() -> Mode:
    """When the kernels run, as `set_kernels` or, read once, the environment says. Raises OptionError as that does."""
    global _mode
    if _mode is None:
        _mode = _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)
    return _mode


def runs(x: Tensor) -> bool:
    """Whether kernels run on this tensor: by its device, dtype and class, and by what is installed.

    Raises OptionError for "on" where they cannot run.
    """
    mode = _mode or kernels()
    if mode == "off" or (mode == "auto" and not x.is_cuda):
        return False
    if x.dtype not in _DTYPES or torch._C._are_functorch_transforms_active():
        return False
    if mode == "on":
        _check_runnable(x)
        return True
    return _INSTALLED and (torch.compiler.is_compiling() or type(x) in _TENSORS) and _works(x.device)


def padded(n: int) -> int:
    """The side of the square that a kernel computes n columns in: a power of two, at least 16."""
    return max(16, 1 << (n - 1).bit_length())


def operator(function: Any, name: str) -> Any:
    """The function itself, or, where `torch.compile` traces, the operator that stands for it in a graph."""
    return getattr(torch.ops.isotune, name) if torch.compiler.is_compiling() else function


def _works(device: torch.device) -> bool:
    """Whether a first launch succeeds there, which takes a C compiler and a card that Triton knows; else it warns."""
    if device not in _working and not torch.compiler.is_compiling():
        from isotune.kernels import launch

        try:
            launch.forward(torch.ones(16, 2, device=device), torch.float32)
        except Exception as error:  # whatever Triton, its compiler or the driver find
            said = (str(error).strip() or type(error).__name__).splitlines()[-1]
            warnings.warn(
                f"Triton's kernels do not run on {device} ({said}); the portable form does instead. "
                f"{VARIABLE}=off says so without this warning.",
                stacklevel=2,
            )
            _working[device] = False
        else:
            _working[device] = True
    return _working.get(device, True)


def _check_runnable(x: Tensor) -> None:
    if not _INSTALLED:
        raise OptionError('kernels are "on", and Triton is not installed: pip install triton, or choose "auto"')
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise OptionError(
            f'kernels are "on", and this tensor is on {x.device}: set TRITON_INTERPRET=1 before Python starts, which '
            'is slow and for tests, or choose "auto"'
        )


def _checked(mode: str, where: str) -> Mode:
    if mode not in MODES:
        raise OptionError(f"{where}: kernels are {', '.join(MODES)}, not {mode!r}")
    return mode

"""Frozen, checked options, of methods and of merging rules: every field has bounds and a one-line description."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from isotune.errors import OptionError, nearest


class Options(BaseModel):
    """Raises OptionError, in one line for each problem, for an unknown option or a value out of bounds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    """What the options belong to, on the command line and in files."""

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise OptionError(_explain(type(self), error)) from None


def _explain(options: type[Options], error: ValidationError) -> str:
    """One line for each thing wrong."""
    known = list(options.model_fields)
    lines = []
    for problem in error.errors():
        option = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(
                f"{options.name} has no option {option!r}.{nearest(option, known)} "
                f"Its options: {', '.join(known) or 'none'}."
            )
        else:
            lines.append(f"{options.name}: {option}={problem['input']!r} is not usable: {problem['msg'].lower()}.")
    return " ".join(lines)

"""Mistakes in a method's name or options: each message says what was asked, what was found, and what to do."""

from __future__ import annotations

from typing import Any

import pytest

import isotune
from isotune import HRA, IsotuneError, LoRA
from isotune.adapters import registry
from isotune.errors import OptionError


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        (HRA, {"rnk": 8}, ["no option 'rnk'", "Did you mean 'rank'?", "side, strict, start"]),
        (HRA, {"rank": 0}, ["hra", "rank=0", "greater than 0"]),
        (HRA, {"rank": -3}, ["rank=-3", "greater than 0"]),
        (HRA, {"rank": "many"}, ["rank='many'", "valid integer"]),
        (HRA, {"rank": 2.5}, ["rank=2.5", "integer"]),
        (HRA, {"side": "left"}, ["side='left'", "'in' or 'out'"]),
        (HRA, {"penalty": -1.0}, ["penalty=-1.0", "greater than or equal to 0"]),
        (HRA, {"penalty": float("nan")}, ["penalty=nan", "finite"]),
        (HRA, {"rank": 9}, ["rank=9 is odd", "use rank=10"]),
        (LoRA, {"alpha": 0}, ["lora", "alpha=0", "greater than 0"]),
        (LoRA, {"dropout": 1.0}, ["dropout=1.0", "less than 1"]),
        (LoRA, {"side": "in"}, ["no option 'side'", "Its options: rank, alpha, rslora, dropout"]),
        (LoRA, {"rank": 0, "dropout": 2}, ["rank=0", "dropout=2"]),
    ],
)
def test_unusable_option_is_named_with_its_value_and_what_is_allowed(
    method: Any, options: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(OptionError) as error:
        method(**options)
    assert all(words in str(error.value) for words in said), error.value


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        HRA().rank = 4  # type: ignore[misc]


def test_unknown_method_is_named_with_the_nearest_and_all_known() -> None:
    with pytest.raises(OptionError, match=r"unknown method 'lorra'. Did you mean 'lora'\? The methods are: hra"):
        isotune.method("lorra")


def test_method_by_name_is_the_same_as_by_class() -> None:
    assert isotune.method("hra", rank=4, side="out") == HRA(rank=4, side="out")
    assert isotune.method("lora", alpha=4) == LoRA(alpha=4)
    assert issubclass(OptionError, IsotuneError)


def test_registry_lists_each_method_under_its_own_name() -> None:
    names = registry.method_names()
    assert names[:2] == ["hra", "lora"]
    assert len(set(names)) == len(names)
    assert [registry.method_class(name).name for name in names] == names


def test_registry_finds_methods_of_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint, EntryPoints

    found = EntryPoints([EntryPoint("plugged", "isotune.adapters.low_rank.lora:LoRA", "isotune.methods")])
    monkeypatch.setattr(registry, "entry_points", lambda **choice: found.select(**choice))
    assert registry.method_names()[-1] == "plugged"
    assert registry.method_class("plugged") is LoRA
    registry.method_class.cache_clear()


def test_schema_of_the_options_describes_every_field() -> None:
    for name in registry.method_names():
        schema = registry.method_class(name).model_json_schema()
        assert all(field["description"] for field in schema["properties"].values())

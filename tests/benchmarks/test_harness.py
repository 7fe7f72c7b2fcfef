"""Every section of the benchmarks runs, at tiny sizes; nothing here looks at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import isotune
from benchmarks import conv, disk, growth, layer, memory, methods, model, optimizers, streaming
from benchmarks.__main__ import SECTIONS, rounded, run_section
from benchmarks.contenders import contenders, peft_form, settings_of, too_costly
from benchmarks.machine import machine
from benchmarks.models import LLAMA_1B, LLAMA_TINY, ModelCase
from benchmarks.options import Options
from benchmarks.render import render
from benchmarks.tables import method_table
from benchmarks.timing import Effort
from isotune.adapters.registry import method_names

QUICK = Options(quick=True, threads=1)


@pytest.fixture(autouse=True)
def _one_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Options, "effort", lambda self, times=1.0: Effort(0.0, least=1, most=1, sample=0.0))


def assert_timed(figures: dict[str, Any], phase: str = "total") -> None:
    """Every contender has a figure or a reason."""
    for name, figure in figures.items():
        assert "skipped" in figure or figure[phase]["min"] > 0, name


def test_a_linear_layer_is_compared_and_saved_bytes_agree_with_lora() -> None:
    row = layer.measure(layer.LinearCase(d=64, rank=4, rows=32), QUICK)
    assert list(row["contenders"]) == contenders()
    assert_timed(row["contenders"])
    assert row["contenders"]["frozen"]["saved"] == 4 * 64 * 64
    assert row["contenders"]["peft-hra"]["saved"] > 2 * row["contenders"]["isotune-hra"]["saved"]


def test_low_precision_has_a_contender_of_its_own() -> None:
    row = layer.measure(layer.LinearCase(d=64, rank=4, rows=32, grad_input=False, dtype="bfloat16"), QUICK)
    assert "saved" in row["contenders"]["peft-lora-bf16"]


def test_a_convolution_is_compared() -> None:
    row = conv.measure(conv.ConvCase(channels=8, pixels=6, batch=2, rank=4), QUICK)
    assert_timed({name: row["contenders"][name] for name in ("peft-lora", "isotune-lora", "isotune-hra")})


def test_every_method_is_timed_and_pefts_own_beside_it_where_there_is_one() -> None:
    found = [methods.measure(replace(case, d=128, rows=16), QUICK) for case in methods.cases(QUICK)]
    assert [row["case"]["method"] for row in found] == method_names()
    for row in found:
        name, figures = row["case"]["method"], row["contenders"]
        assert_timed({who: figures[who] for who in ("frozen", "peft-lora", f"isotune-{name}")})
        assert "skipped" not in figures[f"isotune-{name}"], figures[f"isotune-{name}"]
        assert (f"peft's {name}" in figures) == (peft_form(settings_of(name, 16)) is not None)
    by_name = {row["case"]["method"]: row["contenders"] for row in found}
    assert by_name["hra"]["peft's hra"]["saved"] > 2 * by_name["hra"]["isotune-hra"]["saved"]
    result = {"rows": found, "seconds": 1.0, "date": "", "versions": {}, "machine": machine("cpu")}
    text = render({"methods": result | {"settings": {"quick": True}, "section": "methods"}}, {})["README.md"]
    assert all(f"\n| {name} | " in text for name in ("frozen", "peft-lora", *method_names()))


def test_a_method_takes_the_rank_asked_for_where_it_can() -> None:
    assert settings_of("hra", 16) == isotune.HRA(rank=16)
    assert settings_of("hra", 15) == isotune.HRA()
    assert peft_form(isotune.LoRA(rank=4))["r"] == 4
    assert peft_form(isotune.HRA(side="out")) is None


def test_a_method_that_refuses_the_layer_is_left_out_with_its_reason() -> None:
    row = methods.measure(methods.MethodCase("lora", d=8, rank=16, rows=4), QUICK)
    assert "rank 16 is larger than the layer" in row["contenders"]["isotune-lora"]["skipped"]
    assert "| lora | 256 | - | " in method_table([row])


def test_growth_is_measured_along_an_axis() -> None:
    row = growth.measure(growth.GrowthCase("r", (2, 4), d=32, rank=0, rows=16), QUICK)
    assert [point["value"] for point in row["points"]] == [2, 4]
    assert set(row["exponents"]) == {"isotune-lora", "isotune-hra"}


@pytest.mark.parametrize("name", ["stories260k", "llama-tiny"])
def test_a_model_takes_training_steps(name: str) -> None:
    row = model.measure(ModelCase(name, batch=2, tokens=8, targets="attention", rank=4), QUICK)
    assert_timed(row["contenders"])
    assert row["contenders"]["isotune-lora"]["trained"] == row["contenders"]["peft-lora"]["trained"]


def test_the_large_llama_differs_from_the_tiny_one_in_size_only() -> None:
    assert LLAMA_1B.keys() == LLAMA_TINY.keys()


def test_memory_is_measured_around_the_steps() -> None:
    found = memory.peak_of_steps("isotune-hra", ModelCase("stories260k", 2, 8, "attention", 4), "cpu", 0)
    # The kernel counts resident pages by processor and adds them up now and then: its peak is not quite monotone.
    assert found["peak"] > 0.99 * found["before"] > 0


def test_adapters_are_saved_loaded_and_exported() -> None:
    row = disk.measure(ModelCase("stories260k", 0, 0, "attention", 4), QUICK)
    assert set(row["contenders"]["isotune-hra"]) == {"save", "load", "export"}
    assert set(row["contenders"]["peft-lora"]) == {"save", "load"}


def test_steps_of_optimizers_are_timed_and_shown() -> None:
    case = optimizers.OptimizerCase("small", blocks=2, width=12, key_width=8, inner=20, rank=4)
    row = optimizers.measure(case, QUICK)
    assert_timed(row["contenders"])
    layers = [(12, 12), (12, 8), (12, 8), (12, 12), (12, 20), (12, 20), (20, 12)]
    assert row["numbers"] == 2 * 4 * sum(n + m for n, m in layers)
    result = {"rows": [row], "seconds": 1.0, "date": "", "versions": {}, "machine": machine("cpu")}
    text = render({"optimizers": result | {"settings": {"quick": True}, "section": "optimizers"}}, {})["README.md"]
    assert "| torch-muon | " in text
    assert "28 matrices" in text


def test_a_large_adapter_is_exported_from_its_folder(tmp_path: Path) -> None:
    case = streaming.StreamCase(layers=2, d=64, rank=4)
    streaming.write_base(case, tmp_path / "base", seed=0)
    streaming.write_adapter(case, tmp_path / "adapter", seed=0)
    found = streaming.read_and_export(tmp_path / "base", tmp_path / "adapter", tmp_path / "lora")
    assert found["residual"] < 1e-5


def test_what_would_take_too_long_is_left_out_with_a_reason() -> None:
    assert too_costly("peft-hra", 4096, 64) is None  # a named case
    assert "GiB" in str(too_costly("peft-hra", 4096, 256))
    assert too_costly("isotune-hra", 4096, 256) is None


def test_a_section_says_what_it_was_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "cases", lambda options: [growth.GrowthCase("n", (8, 16), d=16, rank=2, rows=0)])
    result = rounded(run_section("growth", QUICK))
    assert result["settings"]["quick"]
    assert {"cpu", "cores", "threads", "memory_gib", "system"} <= result["machine"].keys()
    assert {"torch", "peft", "transformers", "isotune"} <= result["versions"].keys()
    assert "A quick run" in render({"growth": result}, {})["README.md"]


@pytest.mark.parametrize("options", [Options(), QUICK, Options(device="cuda"), Options(device="cuda", quick=True)])
def test_every_section_has_cases_with_titles(options: Options) -> None:
    assert all(case.title for section in SECTIONS.values() for case in section.cases(options))

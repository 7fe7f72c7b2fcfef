"""Every section of the benchmarks runs, at tiny sizes; nothing here looks at a time."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import isotune
from benchmarks import (
    conv,
    decoding,
    disk,
    gpu,
    growth,
    launches,
    layer,
    loss,
    memory,
    methods,
    model,
    optimizers,
    streaming,
)
from benchmarks.__main__ import SECTIONS, rounded, run_section
from benchmarks.contenders import contenders, peft_form, settings_of, too_costly
from benchmarks.machine import machine
from benchmarks.models import LLAMA_1B, LLAMA_8B, LLAMA_TINY, ModelCase, batch, build
from benchmarks.options import Options
from benchmarks.render import render
from benchmarks.tables import method_table
from benchmarks.timing import Effort

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
    assert [row["case"]["method"] for row in found] == methods.names()
    for row in found:
        name, figures = row["case"]["method"], row["contenders"]
        assert_timed({who: figures[who] for who in ("frozen", "peft-lora", f"isotune-{name}")})
        assert "skipped" not in figures[f"isotune-{name}"], figures[f"isotune-{name}"]
        assert (f"peft's {name}" in figures) == (peft_form(settings_of(name, 16)) is not None)
    by_name = {row["case"]["method"]: row["contenders"] for row in found}
    assert by_name["hra"]["peft's hra"]["saved"] > 2 * by_name["hra"]["isotune-hra"]["saved"]
    result = {"rows": found, "seconds": 1.0, "date": "", "versions": {}, "machine": machine("cpu")}
    text = render({"methods": result | {"settings": {"quick": True}, "section": "methods"}}, {})["README.md"]
    assert all(f"\n| {name} | " in text for name in ("frozen", "peft-lora", *methods.names()))


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
    assert LLAMA_1B.keys() == LLAMA_TINY.keys() == LLAMA_8B.keys()


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


def test_launches_are_counted_for_every_phase_and_shown() -> None:
    row = launches.measure(launches.LaunchCase(d=64, rank=4, rows=2), QUICK)
    counted = {name: figure["launches"] for name, figure in row["contenders"].items()}
    assert counted["frozen"]["forward"] == counted["frozen"]["inference"] == 1
    # The layer's own product, two casts, two thin products; where nothing learns the casts are made once.
    assert counted["isotune-lora"]["forward"] == 5
    for name in ("lora", "hra", "miss", "pissa"):
        assert counted[f"isotune-{name}"]["inference"] == 3
    assert counted["peft-lora"]["inference"] > 3
    assert_timed(row["contenders"])
    assert_timed(row["contenders"], "inference")
    assert "| isotune-hra | " in text_of("launches", row)


def test_a_token_is_timed_with_and_without_adapters_and_shown() -> None:
    row = decoding.measure(decoding.DecodingCase("llama-tiny", 2, 4, "all-linear", 2), QUICK)
    assert_timed(row["contenders"])
    assert decoding.ROWS in row["contenders"]
    assert "## A token" in text_of("decoding", row)


def test_a_decoding_step_leaves_the_cache_as_it_was() -> None:
    case = decoding.DecodingCase("stories260k", 2, 4, "all-linear", 2)
    built = build(case).eval()
    ids = batch(case, built, "cpu", QUICK.generator())["input_ids"]
    seen: list[int] = []
    built.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs["past_key_values"].get_seq_length()), with_kwargs=True
    )
    step = decoding.decoding_step(built, ids, "cpu")
    step()
    step()
    assert seen == [0, 4, 4]


def test_a_model_is_timed_with_checkpointing() -> None:
    row = model.measure(ModelCase("llama-tiny", 2, 8, "attention", 4, how="checkpointing"), QUICK)
    assert set(row["contenders"]) == {"frozen", "peft-lora", "isotune-lora", "isotune-hra"}
    assert_timed(row["contenders"])


def test_everything_for_a_gpu_runs_in_one_go_and_within_its_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "TESTS", ("--version",))
    monkeypatch.setattr(gpu, "SECTIONS", ("launches",))
    arguments = ["--device", "cpu", "--quick", "--output", str(tmp_path)]
    assert gpu.main(arguments) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"gpu.json", "cpu-quick-launches.json"}
    assert gpu.main([*arguments, "--seconds", "0"]) == 1
    assert "no time was left" in (tmp_path / "gpu.json").read_text()
    assert gpu.run(["-c", "import time; print('here', flush=True); time.sleep(60)"], 3)["ended"] == "stopped"
    failed = gpu.run(["-c", "raise SystemExit('why')"], 60)
    assert failed["ended"] == "failed"
    assert "why" in failed["said"]


def text_of(section: str, row: dict[str, Any]) -> str:
    """The page with a section of this row."""
    result = {"rows": [row], "seconds": 1.0, "date": "", "versions": {}, "machine": machine("cpu")}
    return render({section: result | {"settings": {"quick": True}, "section": section}}, {})["README.md"]


def test_a_loss_in_chunks_is_compared_with_the_whole_one_and_shown() -> None:
    case = loss.LossCase(20_000, 64, 1, 2, 512)
    found = {how: loss.steps(how, case, "cpu") for how in loss.HOWS}
    assert all(figures["total"] > 0 for figures in found.values())
    row = {"case": asdict(case), "contenders": found}
    assert "| vocabulary 20000, 1 layers, 2 x 512 tokens | " in text_of("loss", row)

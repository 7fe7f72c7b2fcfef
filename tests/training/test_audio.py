"""Sound is classified: from folders, Parquet and arrays to the run, its evaluation, predictions and export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
import torch
import transformers
from sounds import RATE, TONES, make_model, tone, write_tones

from isotune.comparison import build_comparison, compare
from isotune.errors import DataError, IsotuneError, IsotuneWarning
from isotune.training.data import load_splits
from isotune.training.evaluation import evaluate
from isotune.training.export import export_merged
from isotune.training.prediction import predict
from isotune.training.recipe import DataSettings, build_recipe
from isotune.training.run import train
from isotune.training.session import Session, TaskSpec
from isotune.training.tasks.clips import Clip, as_clip, resampled

KINDS = ["whisper", "ast", "wav2vec2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make_model(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tones(tmp_path_factory.mktemp("tones"), {"train": 16, "test": 6})


def flags(model: Path, data: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model), "task": "audio-classification", "data.train": str(data), "output": str(output),
        "training.max_steps": 4, "training.learning_rate": 1e-4, "training.report_to": "none",
        "method.rank": 4, **more,
    }  # fmt: skip


def rows_of(data: Path, **more: Any) -> list[dict[str, Any]]:
    return load_splits(DataSettings(train=str(data), validation=None, **more), "audio-classification", 0).train


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_folders_of_sounds_goes_to_its_export(
    kind: str, models: dict[str, Path], tones: Path, tmp_path: Path
) -> None:
    recipe = build_recipe(None, flags(models[kind], tones, tmp_path / "run", **{"data.test": "test"}))
    result = train(recipe, progress=False)
    assert result.metrics["test_accuracy"] > 0.9
    assert result.metrics["test_majority_accuracy"] == 0.5
    assert result.metrics["tokens_per_second"] is None
    assert result.metrics["test_probe_accuracy"] > 0.9
    again = evaluate(result.output, progress=False)
    assert again["loss"] == pytest.approx(result.metrics["test_loss"], rel=1e-4)
    merged = export_merged(result.adapter, tmp_path / "merged")
    assert evaluate(merged, str(tones), progress=False)["loss"] == pytest.approx(again["loss"], rel=1e-4)
    wave = soundfile.read(tones / "test" / "low" / "0.wav", dtype="float32")[0]
    told = transformers.pipeline("audio-classification", str(merged))(wave)
    assert {one["label"] for one in told} == TONES.keys()


def test_a_run_goes_on_to_the_same_bits(models: dict[str, Path], tones: Path, tmp_path: Path) -> None:
    more = {"training.save_strategy": "steps", "training.save_steps": 2}
    whole = train(build_recipe(None, flags(models["wav2vec2"], tones, tmp_path / "a", **more)), progress=False)
    cut = train(build_recipe(None, flags(models["wav2vec2"], tones, tmp_path / "b", **more)), progress=False)
    (cut.output / "metrics.json").unlink()
    for left in cut.output.glob("checkpoint-4"):
        (left / "complete").unlink()
    gone_on = train(build_recipe(cut.output / "recipe.yaml"), resume=True, progress=False)
    files = [one.adapter / "adapter_model.safetensors" for one in (whole, gone_on)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_was_guessed_and_found_is_said(
    models: dict[str, Path], tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(build_recipe(None, flags(models["wav2vec2"], tones, tmp_path / "run")))
    said = capsys.readouterr().err
    assert "columns, by their usual names: audio: audio; label: label" in said
    assert "examples: 28 train, 4 validation; labels: high, low" in said
    assert "class of ours" not in said


def test_methods_are_compared_on_sounds(models: dict[str, Path], tones: Path, tmp_path: Path) -> None:
    chosen = flags(models["whisper"], tones, tmp_path / "c", **{"data.max_seconds": 1, "data.test": "test"})
    del chosen["method.rank"]
    sizes = {"compare.methods": "lora,bitfit", "compare.seeds": 2, "compare.trials": 1, "compare.full": False}
    found = compare(build_comparison(None, {**chosen, **sizes, "compare.cost_steps": 0}), progress=False)
    assert {row.method for row in found.rows} == {"lora", "bitfit", "frozen"}
    assert all(row.mean is not None and row.mean > 0.9 for row in found.rows)


def test_predictions_name_the_files_and_need_no_labels(models: dict[str, Path], tones: Path, tmp_path: Path) -> None:
    result = train(build_recipe(None, flags(models["ast"], tones, tmp_path / "run")), progress=False)
    files = sorted(str(file) for file in (tones / "test").rglob("*.wav"))
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps({"path": file}) + "\n" for file in files))
    lines = tmp_path / "told.jsonl"
    assert predict(result.output, str(tmp_path / "bare.jsonl"), lines, progress=False) == 12
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [one["audio"] for one in told] == files
    assert sum(one["prediction"] == Path(one["audio"]).parent.name for one in told) > 9


def test_bytes_arrays_and_saved_data_sets_give_the_same_sounds(tones: Path, tmp_path: Path) -> None:
    found = rows_of(tones)
    files = [Path(row["audio"].file) for row in found]
    labels = [row["label"] for row in found]
    held = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    arrays = [{"array": row["audio"].wave.tolist(), "sampling_rate": RATE} for row in found]
    datasets.Dataset.from_dict({"audio": held, "label": labels}).to_parquet(tmp_path / "bytes.parquet")
    datasets.Dataset.from_dict({"audio": arrays, "label": labels}).to_parquet(tmp_path / "arrays.parquet")
    saved = datasets.Dataset.from_dict({"audio": held, "label": labels})
    saved = saved.cast_column("audio", datasets.Audio())
    saved.save_to_disk(tmp_path / "saved")
    saved.to_parquet(tmp_path / "typed.parquet")
    assert len(found) == 32
    for name in ("bytes.parquet", "arrays.parquet", "typed.parquet", "saved"):
        again = rows_of(tmp_path / name)
        assert [row["label"] for row in again] == labels
        for one, other in zip(found, again, strict=True):
            assert other["audio"].rate == RATE
            assert np.array_equal(one["audio"].wave, other["audio"].wave)


def test_the_rate_becomes_the_models_and_nothing_is_folded_back() -> None:
    times = np.arange(44100) / 44100
    sine, shrill = (np.sin(2 * np.pi * pitch * times).astype(np.float32) for pitch in (440, 15000))
    found = resampled(Clip(sine, 44100, ""), RATE)
    assert found.shape == (RATE,)
    assert found.dtype == np.float32
    inside = slice(RATE // 10, -RATE // 10)  # the filter sees silence around the clip
    exact = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    np.testing.assert_allclose(found[inside], exact[inside], atol=5e-3)
    assert np.abs(resampled(Clip(shrill, 44100, ""), RATE)[inside]).max() < 0.01
    assert resampled(Clip(sine, 44100, ""), 44100) is sine


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = (tone(label, np.random.default_rng(0)) for label in TONES)
    soundfile.write(tmp_path / "x.wav", np.stack([left, right], 1), RATE, subtype="FLOAT")
    np.testing.assert_allclose(as_clip(str(tmp_path / "x.wav")).wave, (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_clips_are_cut_where_the_recipe_or_the_model_says(kind: str, models: dict[str, Path]) -> None:
    spec = replace(TaskSpec.plain("audio-classification", str(labelled(models[kind]))), max_seconds=0.5)
    draw = np.random.default_rng(0)
    rows = [{"audio": Clip(tone("low", draw, seconds), RATE, ""), "label": "low"} for seconds in (0.1, 0.4, 0.9)]
    session = Session(spec)
    with pytest.warns(IsotuneWarning, match=r"1 of 3 clips are longer than 0.5 seconds and are cut there"):
        examples = session.examples(rows)
    assert [len(example["audio"]) for example in examples] == [4000, 6400, 8000]
    with torch.no_grad():
        assert session.model(**session.collator(examples)).logits.isfinite().all()
    limit = {"whisper": 3, "ast": 0.64, "wav2vec2": 30}[kind]
    assert Session(replace(spec, max_seconds=None)).spec.max_seconds == limit
    if kind != "wav2vec2":
        with pytest.raises(IsotuneError, match=rf"data.max_seconds is 31, but .* reads at most {limit} seconds"):
            Session(replace(spec, max_seconds=31))


def labelled(folder: Path) -> Path:
    """A model's folder whose configuration names labels."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.id2label, config.label2id = dict(enumerate(TONES)), {label: n for n, label in enumerate(TONES)}
    config.save_pretrained(folder)
    return folder


def test_a_shortened_whisper_reads_the_first_of_its_positions(models: dict[str, Path]) -> None:
    spec = TaskSpec.plain("audio-classification", str(labelled(models["whisper"])))
    whole, short = Session(spec).model, Session(replace(spec, max_seconds=0.6)).model
    assert (whole.config.max_source_positions, short.config.max_source_positions) == (150, 50)
    table = whole.encoder.embed_positions.weight
    assert torch.equal(short.encoder.embed_positions.weight, table[:50])
    assert not any(p.requires_grad for p in short.encoder.embed_positions.parameters())


def test_what_is_no_sound_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_text("no sound")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(8, np.nan, np.float32), RATE, subtype="FLOAT")
    wrong = [
        (str(tmp_path / "x.wav"), "no sound that can be read"),
        (str(tmp_path / "missing.wav"), "no sound that can be read"),
        (str(tmp_path / "empty.wav"), "a sound without samples"),
        (str(tmp_path / "nan.wav"), "a sound that is not finite"),
        (3, "a int and no sound"),
        (None, "nothing"),
        ({"array": [0.1, 0.2]}, "an array with the sampling_rate None"),
        ({"array": [[0.1], [0.2]], "sampling_rate": 8}, r"an array of shape \(2, 1\)"),
    ]
    for value, message in wrong:
        rows = [json.dumps({"audio": value, "label": label}) for label in "ab"]
        (tmp_path / "x.jsonl").write_text("\n".join(rows))
        with pytest.raises(DataError, match=rf"row 1 has {message}.* in column 'audio'"):
            rows_of(tmp_path / "x.jsonl")


def test_a_folder_of_sounds_alone_has_no_labels(models: dict[str, Path], tones: Path, tmp_path: Path) -> None:
    result = train(build_recipe(None, flags(models["ast"], tones, tmp_path / "run")), progress=False)
    lines = tmp_path / "told.jsonl"
    assert predict(result.output, str(tones / "test" / "low"), lines, progress=False) == 6
    with pytest.raises(DataError, match=r"no column 'label' \(data.label\)"):
        evaluate(result.output, str(tones / "test" / "low"), progress=False)
    (tmp_path / "mixed" / "low").mkdir(parents=True)
    for file in ("0.wav", "low/0.wav"):
        soundfile.write(tmp_path / "mixed" / file, tone("low", np.random.default_rng(0)), RATE)
    with pytest.raises(DataError, match=r"0.wav is in no folder named for its label"):
        rows_of(tmp_path / "mixed")


def test_wrong_columns_labels_and_folders_are_named(models: dict[str, Path], tones: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"clip": str(next(tones.rglob("*.wav"))), "label": "a"}) + "\n")
    with pytest.raises(DataError, match=r"no column 'audio' \(data.audio\).* Columns there: clip, label"):
        rows_of(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match=r"no column 'command' \(data.label\)"):
        rows_of(tmp_path / "x.jsonl", audio="clip", label="command")
    with pytest.raises(DataError, match="every training row has the label 'a'"):
        rows_of(tmp_path / "x.jsonl", audio="clip")
    more = tmp_path / "more" / "humming"
    more.mkdir(parents=True)
    (tmp_path / "more" / "low").mkdir()
    for folder in ("humming", "low"):
        soundfile.write(tmp_path / "more" / folder / "0.wav", tone("low", np.random.default_rng(0)), RATE)
    run = flags(models["ast"], tones, tmp_path / "run", **{"data.validation": str(tmp_path / "more")})
    with pytest.raises(DataError, match="has the label 'humming', which the training rows do not have"):
        train(build_recipe(None, run), progress=False)


def test_a_model_of_texts_classifies_no_sound(bert: Path, tones: Path, tmp_path: Path) -> None:
    with pytest.raises(IsotuneError, match="transformers has no class of bert models that classifies sound"):
        train(build_recipe(None, flags(bert, tones, tmp_path / "run")), progress=False)

"""What isotune promises about its cost, each beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.contenders import REFERENCE
from benchmarks.store import Results, find, ratio, rows

HRA, LORA = "isotune-hra", "isotune-lora"


@dataclass(frozen=True)
class Goal:
    """One promise: `measured` should be at most, or at least, `target`."""

    text: str
    target: float
    measured: float | None
    at_least: bool = False
    unit: str = "x"
    note: str = ""

    @property
    def verdict(self) -> str:
        """Met, missed, or not measured."""
        if self.measured is None:
            return "not measured"
        met = self.measured >= self.target if self.at_least else self.measured <= self.target
        return "met" if met else "**missed**"


def goals(results: Results) -> list[Goal]:
    """All promises, in the order of the tables below them."""
    return [
        *_layer(results),
        *_models(results),
        *_lora(results),
        *_growth(results),
        *_export(results),
        *_optimizers(results),
        *_few_rows(results),
    ]


def gpu_goals(results: Results) -> list[Goal]:
    """What is promised of a GPU, in bf16."""
    square, wide = (
        find(results, "layer", d=4096, rank=r, rows=8192, d_out=out) for r, out in ((32, None), (16, 14336))
    )
    few = find(results, "launches", rows=16)
    whole, again, compiled = (
        find(results, "model", model="llama-8b", how=how) for how in ("", "checkpointing", "compiled")
    )
    token = find(results, "decoding", model="llama-1b")
    step, low = "6 layers of Llama-3-8B, 4 x 1024 tokens, r = 16, training step: HRA", "peft-lora-bf16"
    saved = "Linear 4096 x 4096, 8192 rows, r = 32, bytes saved for backward: HRA"
    return [
        Goal("Linear 4096 x 4096, 8192 rows, r = 32: HRA / frozen", 1.35, square and ratio(square, HRA, "frozen")),
        Goal("Linear 4096 to 14336, 8192 rows, r = 16: HRA / frozen", 1.15, wide and ratio(wide, HRA, "frozen")),
        Goal("Linear 4096 x 4096, 16 rows, r = 32: HRA / our LoRA", 1.1, few and ratio(few, HRA, LORA)),
        Goal(f"{step} / PEFT's LoRA", 0.7, whole and ratio(whole, HRA, REFERENCE)),
        Goal(f"{step} / PEFT's LoRA in bf16", 0.98, whole and ratio(whole, HRA, low)),
        Goal(f"{step} / our LoRA, with activation checkpointing", 1.03, again and ratio(again, HRA, LORA)),
        Goal(f"{step} / PEFT's LoRA in bf16, both compiled", 1.0, compiled and ratio(compiled, HRA, low)),
        Goal("Llama-3.2-1B, a token: with HRA / without", 1.3, token and ratio(token, HRA, "frozen")),
        Goal(f"{saved} / PEFT's LoRA", 0.78, square and ratio(square, HRA, REFERENCE, "saved")),
    ]


def _few_rows(results: Results) -> Iterator[Goal]:
    for d, d_out, rank, n in ((3072, 1024, 48, 512), (1536, None, 32, 768)):
        row = find(results, "layer", d=d, d_out=d_out, rank=rank, rows=n)
        text = f"Linear {d} to {d_out or d}, {n} rows, r = {rank}: HRA / PEFT's LoRA"
        yield Goal(text, 1.0, row and ratio(row, HRA, REFERENCE))
    row = find(results, "decoding", batch=1)
    text = "stories260K, a token: with HRA / without"
    yield Goal(text, 1.3, row and ratio(row, HRA, "frozen"))


def _layer(results: Results) -> Iterator[Goal]:
    for d, rank, n, lora, speedup in ((2048, 32, 512, 1.05, 20), (4096, 64, 512, 1.0, 50)):
        row = find(results, "layer", d=d, rank=rank, rows=n, grad_input=True)
        where = f"Linear {d} x {d}, {n} rows, r = {rank}: HRA"
        yield Goal(f"{where} / PEFT's LoRA", lora, row and ratio(row, HRA, REFERENCE))
        yield Goal(f"{where}, times faster than PEFT's HRA", speedup, row and ratio(row, "peft-hra", HRA), True)
        yield Goal(f"{where}, bytes saved / PEFT's LoRA", 1.02, row and ratio(row, HRA, REFERENCE, "saved"))
    for d in (384, 768):
        row = find(results, "layer", d=d, rank=8, rows=2048, grad_input=True)
        text = f"Linear {d} x {d}, 2048 rows, r = 8: HRA / PEFT's LoRA"
        yield Goal(text, 0.6, row and ratio(row, HRA, REFERENCE), note=_beyond_frozen(row) if row else "")


def _beyond_frozen(row: dict[str, Any]) -> str:
    """What the frozen layer alone takes of LoRA's time, and HRA's share of what LoRA adds to that."""
    frozen, hra = ratio(row, "frozen", REFERENCE), ratio(row, HRA, REFERENCE)
    if frozen is None or hra is None:
        return ""
    return f"the frozen layer alone {frozen:.2f}x; HRA adds {(hra - frozen) / (1 - frozen):.2f}x of what LoRA adds"


def _models(results: Results) -> Iterator[Goal]:
    for tokens in (64, 24):
        row = find(results, "model", model="minilm", batch=32, tokens=tokens)
        text = f"MiniLM, 32 x {tokens} tokens, training step: HRA / PEFT's LoRA"
        yield Goal(text, 1.0, row and ratio(row, HRA, REFERENCE))
    row = find(results, "memory", model="minilm", batch=32)
    text = "MiniLM, 32 x 64 tokens, peak resident memory: HRA / PEFT's LoRA"
    yield Goal(text, 1.02, row and ratio(row, HRA, REFERENCE, "peak"))


def _lora(results: Results) -> Iterator[Goal]:
    found = [
        (value, row["case"])
        for section in ("layer", "conv", "model")
        for row in rows(results, section)
        if (value := ratio(row, LORA, REFERENCE)) is not None
    ]
    worst, case = max(found, key=lambda pair: pair[0], default=(None, {}))
    above = sum(value > 1 for value, _ in found)
    note = f"worst of {len(found)} cases ({describe(case)}); {above} above 1" if found else ""
    yield Goal("our LoRA / PEFT's LoRA, everywhere", 1.0, worst, note=note)


def _growth(results: Results) -> Iterator[Goal]:
    for row in rows(results, "growth"):
        slope = row["exponents"][HRA]
        off = None if slope is None else abs(slope - 1)
        note = "" if slope is None else f"exponent {slope:.2f}"
        text = f"HRA's extra cost in {row['case']['axis']}: distance of the exponent from 1"
        yield Goal(text, 0.1, off, unit="", note=note)


def _export(results: Results) -> Iterator[Goal]:
    row = next((row for row in rows(results, "disk") if "export" in row), None)
    if row is None:
        return
    case, figures = row["case"], {key: value["median"] for key, value in row["export"].items()}
    where = f"export of a 7B-shaped adapter ({case['layers']} layers of {case['d']} x {case['d']}, q and v)"
    seconds = figures["export_seconds"] / figures["read_seconds"]
    cold = figures["export_cold_seconds"] / figures["read_cold_seconds"]
    yield Goal(f"{where}: time / reading the weights from disk", 2.0, cold)
    yield Goal(f"{where}: time / reading the weights from the page cache", 2.0, seconds)
    peak = figures["export_cold_peak"] / figures["export_peak_of_one_layer"]
    yield Goal(f"{where}: peak memory / that of one layer alone", 1.1, peak)


def _optimizers(results: Results) -> Iterator[Goal]:
    row = find(results, "optimizers", rank=16)
    for other, ours in (
        ("torch-muon", "isotune-muon"),
        ("pytorch-optimizer-muon", "isotune-muon"),
        ("pytorch-optimizer-normuon", "isotune-normuon"),
    ):
        text = f"a step on a 1B model's LoRA, r = 16: {ours} / {other}"
        yield Goal(text, 0.5, row and ratio(row, ours, other))


def describe(case: dict[str, Any]) -> str:
    """A case in a few words."""
    if "method" in case:
        return f"d = {case['d']}, n = {case['rows']}, r = {case['rank']}"
    if "vocabulary" in case:
        return f"vocabulary {case['vocabulary']}, {case['layers']} layers, {case['batch']} x {case['tokens']} tokens"
    if "model" in case:
        how = f", {case['how']}" if case.get("how") else ""
        return f"{case['model']} {case['batch']} x {case['tokens']}, {case['targets']}, r = {case['rank']}{how}"
    if "channels" in case:
        pixels = case["pixels"]
        return f"{case['channels']} channels, {case['batch']} x {pixels} x {pixels}, r = {case['rank']}"
    plain = "" if case["grad_input"] else ", plain input"
    out = f" to {case['d_out']}" if case.get("d_out") else ""
    return f"d = {case['d']}{out}, n = {case['rows']}, r = {case['rank']}{plain}"

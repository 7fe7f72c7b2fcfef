"""`python -m benchmarks.serving`: do servers write, to the token, what isotune's model writes?

An HRA adapter on SmolLM2-135M-Instruct, trained for a few steps on sums, exported as a LoRA in three dtypes. What a
server chooses greedily is set beside what the model with the adapter itself chooses, and the bare model. llama.cpp
runs in a Python of its own, with nothing but its own packages: see `make serving`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine, now, versions
from benchmarks.tables import table

RESULTS = Path(__file__).parent / "results" / "serving.json"
PAGE = Path(__file__).parent.parent / "docs" / "served.md"
PROMPTS = [
    "How many are 12 and 7?",
    "Write one sentence about a cat that sleeps on a piano.",
    "What is the capital of France?",
    "List three colours.",
]
TOKENS = 16
DTYPES = ("float32", "float16", "bfloat16")
Answers = dict[str, list[list[int]]]
"""For each model ("bare", or an adapter's name) the tokens of each prompt's answer."""

OPENING = """# What servers wrote

Written by `python -m benchmarks.serving`, from `benchmarks/results/serving.json`; do not edit.

An HRA adapter of rank 8 on all linear layers of SmolLM2-135M-Instruct, trained for {steps} steps on sums, exported by
`isotune export --to lora`. Up to {tokens} tokens, greedily, after {prompts} prompts in the model's chat template; in
fp32, but for what a row says. "The same" counts the tokens until the first that differs, out of those that isotune's
own model wrote. The bare model and the adapted one agree in {apart} tokens: an adapter that does nothing would be
seen.

{rows}

The residual, `|W + B A - W'| / |W|` as stored, is at most {residuals}.

{where}
"""


def main(arguments: list[str] | None = None) -> None:
    """Train, export, ask every server, and write what they said."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-python", help="A Python with llama-cpp-python.")
    parser.add_argument("--llama-source", type=Path, help="llama.cpp's sources, for its converters.")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    asked = parser.parse_args(arguments)
    if bool(asked.llama_python) != bool(asked.llama_source):
        parser.error("--llama-python and --llama-source go together: make serving")
    with tempfile.TemporaryDirectory(prefix="isotune-serving-") as scratch:
        found = measured(Path(scratch), asked.steps, asked.llama_python, asked.llama_source)
    asked.results.write_text(json.dumps(found, indent=1) + "\n")
    asked.page.write_text(page(found))
    print(f"{asked.page}: written")


def measured(folder: Path, steps: int, llama_python: str | None, llama_source: Path | None) -> dict[str, Any]:
    """What isotune's own model and every server wrote, and what they ran on."""
    import isotune
    from isotune.checkpoint.base import SMOLLM2, local_folder
    from isotune.training.evaluation import open_any

    run = trained(folder, steps)
    session = open_any(run, "causal-lm")
    tokenizer, model = session.tokenizer, session.model.eval()
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    with isotune.disabled(model):
        ours = {"bare": written(model, prompts)}
    ours["adapted"] = written(model, prompts)
    base = local_folder(SMOLLM2)
    assert base is not None
    residuals, loras = {}, {}
    for dtype in DTYPES:
        export = isotune.export_lora(run / "adapter", folder / dtype, dtype=dtype, base=base)
        residuals[dtype], loras[dtype] = export.residual, export.path
    servers = {"PEFT": by_peft(base, loras, prompts)}
    other: dict[str, str] = {}
    if llama_python is not None and llama_source is not None:
        servers["llama.cpp"] = by_llama_cpp(folder, base, loras, prompts, llama_python, llama_source)
        asked = "import llama_cpp; print(llama_cpp.__version__)"
        done = subprocess.run([llama_python, "-c", asked], capture_output=True, text=True, check=True)
        other["llama-cpp-python"] = done.stdout.strip()
    return {
        "steps": steps, "tokens": TOKENS, "prompts": PROMPTS, "residuals": residuals, "ours": ours,
        "servers": servers, "machine": machine("cpu"), "versions": {**versions(), **other}, "date": now(),
    }  # fmt: skip


def trained(folder: Path, steps: int) -> Path:
    """A run on sums."""
    from isotune.training.recipe import build_recipe
    from isotune.training.run import train

    rows = []
    for a in range(2, 18):
        asked, answer = f"How many are {a} and {a + 5}?", f"{a} and {a + 5} are {2 * a + 5}."
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]})
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags: dict[str, Any] = {
        "model": "smollm2", "task": "causal-lm", "data.train": str(folder / "sums.jsonl"), "data.validation": None,
        "targets": "all-linear", "output": str(folder / "run"), "training.max_steps": steps,
        "training.per_device_train_batch_size": 4, "training.report_to": "none",
    }  # fmt: skip
    return train(build_recipe(None, flags), progress=False).output


def written(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """What a transformers model goes on with after each prompt."""
    found = []
    for prompt in prompts:
        with torch.no_grad():
            ids = torch.tensor([prompt])
            whole = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
        found.append(whole[0, len(prompt) :].tolist())
    return found


def by_peft(base: Path, loras: Mapping[str, Path], prompts: list[list[int]]) -> Answers:
    """PEFT's layers on transformers' model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found: Answers = {}
    for name, lora in loras.items():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).eval()
        found[name] = written(model, prompts)
    with model.disable_adapter():
        found["bare"] = written(model, prompts)
    return found


def by_llama_cpp(
    folder: Path, base: Path, loras: Mapping[str, Path], prompts: list[list[int]], python: str, source: Path
) -> Answers:
    """llama.cpp, on what its own converters make of the base and of the LoRAs."""
    model = folder / "base.gguf"
    convert(source / "convert_hf_to_gguf.py", base, "--outfile", model, "--outtype", "f32")
    files = {}
    for name, lora in loras.items():
        files[name] = folder / f"{name}.gguf"
        kind = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[name]
        convert(source / "convert_lora_to_gguf.py", lora, "--base", base, "--outfile", files[name], "--outtype", kind)
    end = json.loads((base / "config.json").read_text())["eos_token_id"]
    given = {name: str(file) for name, file in files.items()}
    task = {"model": str(model), "loras": given, "prompts": prompts, "end": end}
    script = Path(__file__).with_name("serving_llama_cpp.py")
    done = subprocess.run(
        [python, script, str(TOKENS)], input=json.dumps(task), capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"llama.cpp failed: {done.stderr[-2000:]}")
    found: Answers = json.loads(done.stdout)
    return found


def convert(script: Path, *arguments: Any) -> None:
    """Run one of llama.cpp's converters, in this Python, which has transformers."""
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{script.name} failed: {done.stderr[-2000:]}")


def agreed(one: list[list[int]], other: list[list[int]]) -> int:
    """How many tokens are the same, of each answer up to the first that differs, or to the end of the shorter."""
    total = 0
    for a, b in zip(one, other, strict=True):
        same = [x == y for x, y in zip(a, b, strict=False)]
        total += same.index(False) if False in same else len(same)
    return total


def page(found: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    ours, rows = found["ours"], []
    count = {name: sum(map(len, answers)) for name, answers in ours.items()}
    for server, answers in found["servers"].items():
        for name, answer in answers.items():
            other = "bare" if name == "bare" else "adapted"
            what = "without the adapter" if name == "bare" else f"with the LoRA in {name}"
            rows.append([server, what, f"{agreed(answer, ours[other])} of {count[other]}"])
    told = ", ".join(f"{value:.1e} in {dtype}" for dtype, value in found["residuals"].items())
    versions_of = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return OPENING.format(
        steps=found["steps"], tokens=found["tokens"], prompts=len(found["prompts"]),
        apart=agreed(ours["bare"], ours["adapted"]), rows=table(["server", "", "the same"], rows), residuals=told,
        where=f"{found['machine']['cpu']}, {found['date']}: {versions_of}.",
    )  # fmt: skip


if __name__ == "__main__":
    main()

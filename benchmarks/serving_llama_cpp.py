"""What llama.cpp writes, run by `benchmarks.serving` in a Python that has llama-cpp-python and nothing of ours."""

from __future__ import annotations

import json
import sys
from typing import Any


def written(model: Any, prompts: list[list[int]], count: int, end: int) -> list[list[int]]:
    """At most so many tokens after each prompt, the likeliest each time, up to the end token."""
    found = []
    for prompt in prompts:
        model.reset()
        model.eval(prompt)
        answer: list[int] = []
        while len(answer) < count and answer[-1:] != [end]:
            answer.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(answer[-1:])
        found.append(answer)
    return found


def main(count: int) -> None:
    """Read the task from standard input, write the answers to standard output."""
    from llama_cpp import Llama

    task = json.load(sys.stdin)
    found = {}
    for name, lora in {"bare": None, **task["loras"]}.items():
        # The cache in fp32, 0, as everything else; by default it is in half precision.
        model = Llama(task["model"], lora_path=lora, n_ctx=512, type_k=0, type_v=0, logits_all=True, verbose=False)
        found[name] = written(model, task["prompts"], count, task["end"])
        model.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))

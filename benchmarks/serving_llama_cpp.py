"""What llama.cpp writes, run by `benchmarks.serving` in a Python that has llama-cpp-python and nothing of ours."""

from __future__ import annotations

import json
import sys
from typing import Any


def written(model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """So many tokens after each prompt, the likeliest each time."""
    found = []
    for prompt in prompts:
        model.reset()
        model.eval(prompt)
        answer: list[int] = []
        for _ in range(count):
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
        model = Llama(task["model"], lora_path=lora, n_ctx=512, logits_all=True, verbose=False)
        found[name] = written(model, task["prompts"], count)
        model.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))

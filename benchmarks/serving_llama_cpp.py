"""What llama.cpp writes, run by `benchmarks.serving` in a Python that has llama-cpp-python and nothing of ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def written(model: Any, prompts: list[list[int]], count: int, end: int) -> list[dict[str, Any]]:
    """At most so many tokens after each prompt, the likeliest each time, up to the end token.

    With the log-probability of each.
    """
    import numpy as np

    found = []
    for prompt in prompts:
        model.reset()
        model.eval(prompt)
        tokens: list[int] = []
        logprobs: list[float] = []
        while len(tokens) < count and tokens[-1:] != [end]:
            scores = model.scores[model.n_tokens - 1].astype(np.float64)
            tokens.append(int(scores.argmax()))
            logprobs.append(-float(np.log(np.exp(scores - scores.max()).sum())))
            model.eval(tokens[-1:])
        found.append({"tokens": tokens, "logprobs": logprobs})
    return found


def main(output: Path) -> None:
    """Read the task from standard input, write the answers to a file."""
    import llama_cpp

    task = json.load(sys.stdin)
    found = {}
    for name, lora in {"bare": None, **task["loras"]}.items():
        # The cache in fp32, 0, as everything else; by default it is in half precision. One thread: two wait long
        # for each other where something else runs.
        model = llama_cpp.Llama(
            task["model"], lora_path=lora, n_ctx=512, type_k=0, type_v=0, logits_all=True, n_threads=1,
            n_threads_batch=1, verbose=False,
        )  # fmt: skip
        found[name] = written(model, task["prompts"], task["tokens"], task["end"])
        model.close()
    output.write_text(json.dumps({"version": llama_cpp.__version__, "alone": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

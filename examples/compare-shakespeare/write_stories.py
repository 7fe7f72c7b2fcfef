"""Let stories260K write stories.jsonl: text like that it was pretrained on, to see what adapting it costs there."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

MODEL = Path(__file__).parents[2] / "tests/data/stories260k"
OUTPUT = Path(__file__).with_name("stories.jsonl")


def main() -> None:
    """128 stories of up to 200 tokens, sampled at temperature 1 from the first token on."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    torch.manual_seed(0)
    stories = []
    for _ in range(2):
        start = torch.full((64, 1), tokenizer.bos_token_id)
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": 200, "pad_token_id": 0}
        for row in model.generate(start, attention_mask=torch.ones_like(start), **options).tolist():
            ends = [
                row.index(token, 1) for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token in row[1:]
            ]
            stories.append(tokenizer.decode(row[1 : min(ends, default=None)], skip_special_tokens=True).strip())
    lines = (json.dumps({"text": story}, ensure_ascii=False) for story in stories if len(story) > 100)
    OUTPUT.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()

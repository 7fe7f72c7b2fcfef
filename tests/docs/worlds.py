"""What the pages of the documentation take for granted: files in the working folder, and names in Python."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from run_folders import trained_runs
from sweeps import sweep
from tiny import make_bert, sentences, write_jsonl

import isotune
from examples import run_isotune
from support import MINILM, STORIES, tokens, write_citations

Names = dict[str, Any]


def ids() -> Names:
    """Two prompts for the causal model."""
    return {"ids": torch.arange(3, 19).reshape(2, 8)}


def linked(**folders: Path) -> None:
    """path/to/NAME as a link to each folder."""
    Path("path/to").mkdir(parents=True)
    for name, folder in folders.items():
        (Path("path/to") / name).symlink_to(folder)


def causal_model() -> Names:
    """The model at path/to/model."""
    linked(model=STORIES)
    return ids()


def encoder() -> Names:
    """The encoder at path/to/encoder, rows in train.csv and test.csv, and batches for it."""
    import transformers

    linked(encoder=MINILM)
    write_citations(Path(), train=24, test=8)
    batch = tokens(transformers.BertModel(transformers.BertConfig(num_hidden_layers=0)))
    labels = torch.tensor([0, 2])
    return {
        "batches": [batch] * 2,
        "labelled": {**batch, "labels": labels},
        "loss_of": lambda output: output.last_hidden_state.square().mean(),
    }


def chats() -> Names:
    """A causal model with questions and answers, and a text."""
    rows = [{"question": f"How many are {n} and one?", "answer": f"They are {n + 1}."} for n in range(24)]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("stories.txt").write_text("Once upon a time there was a small dog. It liked to play in the park.\n" * 40)
    return causal_model()


def talks() -> Names:
    """The same, a model with a chat template at path/to/talker, chats, and preferences with their tokenizer."""
    import transformers

    names = chats()
    shutil.copytree(STORIES, "path/to/talker")
    turn = "{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n"
    asked = "{% if add_generation_prompt %}assistant: {% endif %}"
    Path("path/to/talker/chat_template.jinja").write_text(f"{{% for m in messages %}}{turn}{{% endfor %}}{asked}")
    rows = [json.loads(line) for line in Path("chats.jsonl").read_text().splitlines()]
    talk = [
        {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in rows
    ]
    write_jsonl(Path("talks.jsonl"), talk)
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    tokenizer.pad_token = tokenizer.eos_token
    preferences = [{"prompt": "Once upon a time", "chosen": " there was a dog", "rejected": " x"}] * 8
    return {**names, "tokenizer": tokenizer, "preferences": preferences}


def tasks() -> Names:
    """An encoder, pairs of texts with a number and without, and a causal model with questions and answers."""
    names = chats()
    Path("path/to/encoder").symlink_to(MINILM)
    texts = [row["text"] for row in sentences(24, 0)]
    pairs = [
        {"sentence1": a, "sentence2": b, "score": len(a) / len(b)} for a, b in zip(texts, texts[::-1], strict=True)
    ]
    write_jsonl(Path("pairs.jsonl"), pairs)
    write_jsonl(Path("unlabelled.jsonl"), [{k: v for k, v in pair.items() if k != "score"} for pair in pairs[:4]])
    return names


def trained(*runs: str, **methods: str) -> Names:
    """A causal model and finished runs of it: in runs/NAME, or in a folder for each method named."""
    found = chats()
    flags = ("--model", "path/to/model", "--task", "causal-lm", "--data", "stories.txt")
    least = ("training.max_steps=1", "data.max_length=16", "data.validation=null")
    brief = ("--no-report", *(word for value in least for word in ("--set", value)))
    for seed, name in enumerate(runs):
        assert run_isotune("train", *flags, *brief, "--seed", seed, "--output", f"runs/{name}") == 0
    for name, method in methods.items():
        assert run_isotune("train", *flags, *brief, "--method", method, "--output", name.replace("_", "-")) == 0
    return found


def finished_run() -> Names:
    """A causal model and a finished run of it in runs/one."""
    return trained("one")


def finished_runs() -> Names:
    """Runs of one model in runs/a, runs/b and runs/c, and a recipe that merges two of them."""
    trained("a", "b", "c")
    Path("recipe.yaml").write_text("models: [runs/a, runs/b]\nrule: sum\noutput: by-recipe\n")
    return {}


def comparison() -> Names:
    """A recipe of a tiny encoder with a section on what to compare, of the least size."""
    Path("model").mkdir()
    make_bert(Path("model"))
    write_jsonl(Path("train.jsonl"), sentences(24, seed=1))
    write_jsonl(Path("test.jsonl"), sentences(8, seed=2))
    recipe = {
        "model": "model",
        "data": {"train": "train.jsonl", "test": "test.jsonl", "max_length": 16},
        "training": {"max_steps": 1},
        "compare": {"budgets": [300], "seeds": 1, "trials": 1, "cost_steps": 1, "full": False, "frozen": False},
        "output": "runs/compared",
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))
    return {}


def diagnosed_runs() -> Names:
    """Runs by LoRA, by HRA and in full, the last of them also as a model beside its base; a model with an adapter."""
    import transformers

    names = trained(lora_run="lora", hra_run="hra", full_run="full")
    Path("my-base").symlink_to(STORIES)
    Path("my-tuned-model").symlink_to(Path("full-run/model"))
    model = isotune.load(transformers.AutoModelForCausalLM.from_pretrained(STORIES), "lora-run/adapter").eval()
    return {"model": model, "batch": {"input_ids": names["ids"]}}


def images() -> Names:
    """Batches of images and their classes."""
    draw = torch.Generator().manual_seed(0)
    return {"batches": [(torch.randn(4, 3, 8, 8, generator=draw), torch.tensor([0, 3, 9, 3]))] * 2}


def unet() -> Names:
    """A tiny diffusion U-Net, drawn at random, at path/to/unet, and batches of latents with embedded texts."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
    ).save_pretrained("path/to/unet")
    draw = torch.Generator().manual_seed(0)
    return {"batches": [(torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 5, 16, generator=draw))] * 2}


def results() -> Names:
    """A comparison in sweeps/scicite, three runs and their base."""
    sweep(Path("sweeps/scicite"), methods=["lora", "hra"])
    trained_runs(Path())
    return {}


WORLDS: dict[str, Callable[[], Names]] = {
    "index.md": encoder,
    "recipes/encoders.md": encoder,
    "pruning-channels.md": encoder,
    "recipes/causal.md": talks,
    "learning-rates.md": chats,
    "tasks.md": tasks,
    "mixtures.md": causal_model,
    "prompts.md": causal_model,
    "recipes/convolutions.md": images,
    "recipes/diffusion.md": unet,
    "serving.md": finished_run,
    "from-peft.md": causal_model,
    "file-format.md": causal_model,
    "compare.md": comparison,
    "report.md": results,
    "diagnostics.md": diagnosed_runs,
    "merging.md": finished_runs,
}
"""By page; a page that is not here starts in an empty folder."""

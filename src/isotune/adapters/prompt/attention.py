"""More keys and values for the attention inside a block, whoever wrote it.

Nothing of the block is rewritten: its one call of `scaled_dot_product_attention` is met on its way, and gets p more
keys and values, which every query sees. Their order among the others is of no account to attention.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from isotune.bare import HOME, bare_class
from isotune.errors import IsotuneError, OptionError
from isotune.sites import Site, site_of

_attention = F.scaled_dot_product_attention
_KEY = re.compile(r"(to_|w)?k(ey)?s?(_?(proj|lin|layer)\w*)?", re.IGNORECASE)
_VALUE = re.compile(r"(to_|w)?v(alue)?s?(_?(proj|lin|layer)\w*)?", re.IGNORECASE)
_PACKED = re.compile(r"w?qkv\w*|c_attn|query_key_value|in_proj\w*", re.IGNORECASE)


def widths(site: Site) -> tuple[int, int]:
    """How wide the keys and the values of the attention in a block are, over all heads.

    Raises OptionError where its layers do not tell, by their names, which of them make keys and values.
    """
    sizes = dict(_sizes(site.layer))
    k, v, packed = (
        next((n for own, n in sizes.items() if name.fullmatch(own)), 0) for name in (_KEY, _VALUE, _PACKED)
    )
    if k and v:
        return k, v
    if packed:
        queries, keys = _heads(site.layer)
        return packed * keys // (queries + 2 * keys), packed * keys // (queries + 2 * keys)
    raise OptionError(
        f"a {bare_class(site.layer).__name__} holds no layers that are, by their names, those of keys and values; "
        "name the attention modules, such as targets=['self_attn']"
    )


def _sizes(block: nn.Module) -> Iterator[tuple[str, int]]:
    """The names of the matrices in a block, and how many features they give."""
    for path, module in block.named_modules():
        if HOME in path.split("."):
            continue
        if (site := site_of(module)) is not None:
            yield path.rpartition(".")[2], site.out_features
        if isinstance(module, nn.MultiheadAttention):
            yield from ((name, len(p)) for name, p in module.named_parameters(recurse=False) if p.dim() == 2)


def _heads(block: nn.Module) -> tuple[int, int]:
    """How many heads of queries there are to how many of keys, by the config of transformers' models; else alike."""
    for config in (getattr(module, "config", None) for module in block.modules()):
        if config is not None and getattr(config, "num_key_value_heads", None):
            return config.num_attention_heads, config.num_key_value_heads
    return 1, 1


class Met(TorchFunctionMode):
    """Within this context `attend` is called in the place of `scaled_dot_product_attention`."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _attention:
            return self.attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:  # modes do not see what it calls
            F.scaled_dot_product_attention = self.attend
            try:
                return func(*args, **kwargs)
            finally:
                F.scaled_dot_product_attention = _attention
        return func(*args, **kwargs)


def inserted(K: Tensor, V: Tensor, calls: list[Any]) -> Met:
    """The context in which the attention gets more keys K (p, k) and values V (p, v); its calls are appended."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **others: Any,
    ) -> Tensor:
        calls.append(None)
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None:
            attn_mask = F.pad(attn_mask, (len(K), 0), value=float(attn_mask.dtype == torch.bool))
        key, value = torch.cat([_by_head(K, key), key], dim=-2), torch.cat([_by_head(V, value), value], dim=-2)
        return _attention(query, key, value, attn_mask, dropout_p, **others)

    return Met(attend)


def recorded(found: list[Any]) -> Met:
    """The context in which the keys and values of the attention, (b, heads, m, width of a head), are appended."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append((key, value))
        return _attention(query, key, value, *args, **kwargs)

    return Met(attend)


def _by_head(K: Tensor, like: Tensor) -> Tensor:
    """K (p, heads * d) for a batch like (b, heads, m, d), whose heads may be repeated ones of fewer."""
    if like.dim() != 4:
        raise IsotuneError(f"an attention over keys of shape {tuple(like.shape)}: it has to be (batch, heads, m, d)")
    heads = K.reshape(len(K), -1, like.shape[-1]).transpose(0, 1).to(like)
    if like.shape[1] % len(heads):
        raise IsotuneError(f"the attention has {like.shape[1]} heads of keys, and its prefix {len(heads)}")
    heads = heads.repeat_interleave(like.shape[1] // len(heads), dim=0)
    return heads.expand(len(like), *heads.shape)


@contextmanager
def through_sdpa(block: nn.Module) -> Iterator[None]:
    """Within this context a model of transformers that is set to "eager", and torch's own, call that function too."""
    configs = (getattr(module, "config", None) for module in block.modules())
    config: Any = next((c for c in configs if getattr(c, "_attn_implementation", None) == "eager"), None)
    fused = any(isinstance(module, nn.MultiheadAttention) for module in block.modules())
    fused = fused and torch.backends.mha.get_fastpath_enabled()
    if config is not None:
        config._attn_implementation = "sdpa"
    if fused:
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        if config is not None:
            config._attn_implementation = "eager"
        if fused:
            torch.backends.mha.set_fastpath_enabled(True)


def check_calls(calls: list[Any], block: nn.Module) -> None:
    """Raise IsotuneError unless the block called the attention once."""
    if len(calls) != 1:
        found = "several times: name one attention of it" if calls else (
            "never: open the model with attn_implementation='sdpa', call nn.MultiheadAttention with "
            "need_weights=False, or name modules that hold an attention"
        )  # fmt: skip
        raise IsotuneError(f"a {bare_class(block).__name__} calls scaled_dot_product_attention {found}")

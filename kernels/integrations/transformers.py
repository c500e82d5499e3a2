"""Hugging Face transformers: attention of its models by these kernels.

A model of transformers makes masks by one function and attends by another, both looked up by the name that stands in
`attn_implementation`. The two must agree on what a mask says. Here:

    a mask (B or 1, H or 1, L or 1, S): complete, no rule of the layer is added. bool (True = may attend) or added.
    None, or (B, S) bool or whole numbers (True or not 0 = a token, not padding): the rule of the layer holds too:
        causal, its last query beside its last key, and its window, or none.

Source: transformers/masking_utils.py and transformers/integrations/sdpa_attention.py say how the two are called.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from kernels.attention.api import scaled_dot_product_attention
from kernels.attention.formula import all_finite
from kernels.attention.varlen import varlen_attention
from kernels.backend import shown

OLDEST = (5, 4)
NEEDS = "kernels.integrations.transformers needs transformers 5.4 or later (tried with 5.4, 5.17 and 5.24), found"

try:
    import transformers
except ImportError as error:
    raise ImportError(f"{NEEDS} none; pip install transformers") from error
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(f"{NEEDS} {transformers.__version__}; pip install --upgrade transformers")
from transformers.masking_utils import (  # noqa: E402
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface  # noqa: E402

__all__ = ["register"]

TAKEN = ("eager", "sdpa", "flash", "flex_attention", "paged", "/", "|", ":")
# Keywords that models hand on and that change no score.
HARMLESS = frozenset(
    {
        "cache_position",  # where the queries stand: the mask says so, or the last stands beside the last key
        "deterministic",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",  # used up in rotary embeddings, and in the mask where sequences are packed
        "return_dict",
        "seq_idx",  # for state-space layers
        "use_cache",
    }
)
UNSAID: Any = object()  # the layer gives no such keyword
left_out: set[int | None] = set()  # the windows that masks have left to the layers


def register(name: str = "calcformer") -> str:
    """Make `attn_implementation=name` mean these kernels, in transformers; once or many times.

    Registers the attention and the mask function that goes with it. A model then takes it by
    `AutoModel.from_pretrained(..., attn_implementation=name)` or `model.set_attn_implementation(name)`.

    Args:
        name: any but those to which transformers gives a meaning of its own.

    Returns:
        The name.

    Raises:
        ValueError: transformers treats the name specially, or something else is registered by it.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be a text, found {shown(name)}; take 'calcformer'")
    if any(part in name for part in TAKEN):
        raise ValueError(
            f"name must be a text without {', '.join(map(repr, TAKEN))}, to which transformers gives a meaning of its "
            f"own, found {shown(name)}; take 'calcformer'"
        )
    for table, ours in ((ALL_ATTENTION_FUNCTIONS, attention), (ALL_MASK_ATTENTION_FUNCTIONS, mask)):
        if name in table.valid_keys() and table[name] is not ours:
            raise ValueError(f"the name {name!r} is registered in transformers for {shown(table[name])}; take another")
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    return name


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = False,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **others: Any,
) -> torch.Tensor | None:
    """The mask that `attention` is given; called by transformers, by keyword.

    Args:
        q_length, kv_length: L and S. q_offset, kv_offset: the places of the first query and key; of a static cache
            q_offset is a tensor, which is not looked at.
        mask_function: who may attend to whom, by places.
        attention_mask: (B, places) bool, False for padding.
        local_size: the length of the window or of the chunks.
        allow_is_causal_skip, allow_is_bidirectional_skip: the rule may be left to the layer.
        config: of the model.

    Returns:
        None or (B, S) bool where the layer knows the rule: causal, with a window or not, the last query beside the last
        key. (B, 1, 1, S) bool where there is nothing but padding. All else (B, 1, L, S) bool.

    Raises:
        ValueError: the model would not call `attention`.
    """
    modeling = type(config).__module__.replace(".configuration_", ".modeling_")
    if _has_its_own_attention(modeling):
        raise ValueError(
            f"the attention of {modeling} does not look up attn_implementation, so that these kernels are not reached "
            "and their masks would be misread; take attn_implementation='eager'"
        )
    padding = attention_mask
    if padding is not None:
        missing = kv_offset + kv_length - padding.shape[-1]
        padding = torch.nn.functional.pad(padding, (0, missing)) if missing > 0 else padding
        padding = padding[:, kv_offset : kv_offset + kv_length].bool()
        if not torch.compiler.is_compiling() and padding.all():
            padding = None
    if mask_function is bidirectional_mask_function:
        if padding is not None:
            return padding[:, None, None, :]
        if allow_is_bidirectional_skip:
            return None
    elif allow_is_causal_skip and isinstance(q_offset, (int, torch.SymInt)):
        # transformers hands over windows and chunks as closures, which tell nothing: the config does.
        is_window = local_size is not None and getattr(config, "sliding_window", None) == local_size
        is_window = is_window and getattr(config, "attention_chunk_size", None) is None
        is_plain = local_size is None and mask_function is causal_mask_function
        if (is_plain or is_window) and q_offset + q_length == kv_offset + kv_length:
            if is_window and not torch.compiler.is_compiling():  # a graph would be guarded on what is left out
                left_out.add(local_size)
            return padding
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **others,
    )


@torch.compiler.assume_constant_result
def _has_its_own_attention(modeling: str) -> bool:
    """Whether a file of models, by the name of its module, has layers of attention that look up none."""
    return modeling in sys.modules and _looks_up_none(modeling)


@functools.cache
def _looks_up_none(modeling: str) -> bool:
    names = vars(sys.modules[modeling])
    layers = [x for name, x in names.items() if "Attention" in name and getattr(x, "__module__", "") == modeling]
    return bool(layers) and "ALL_ATTENTION_FUNCTIONS" not in names


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = UNSAID,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    output_attentions: bool | None = False,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention of a layer; called by transformers.

    Args:
        query: (B, Hq, L, E); key: (B, Hkv, S, E); value: (B, Hkv, S, Ev).
        attention_mask: as the first lines of this file say.
        is_causal: None for what the module says, and True where it says nothing, as transformers has it.
        sliding_window: how many keys a causal query sees, its own among them.
        s_aux: as many numbers as heads, the sinks.
        position_bias: broadcastable to (B, Hq, L, S), added to the scores, differentiable.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: sequences packed into one batch entry, as
            `kernels.varlen_attention` takes them.
        output_attentions: return the weights too, those before dropout.

    Returns:
        (B, L, Hq, Ev), and the weights (B, Hq, L, S) or None.

    Raises:
        ValueError: a keyword that is not known and could change the scores, or a mask of another kind.
    """
    unknown = [name for name, x in others.items() if name not in HARMLESS and x is not None and x is not False]
    if unknown:
        raise ValueError(
            f"{type(module).__name__} passes attention {', '.join(sorted(unknown))}, which may change its scores and "
            "is not known here; take attn_implementation='sdpa' or 'eager' for this model"
        )
    gqa, sinks = key.shape[1] != query.shape[1], s_aux if s_aux is None or s_aux.ndim == 1 else s_aux.flatten()
    rule: dict[str, Any] = {}
    if attention_mask is None or attention_mask.ndim != 4:
        rule = _rule(module, is_causal, sliding_window, query.shape[2], key.shape[2], cu_seq_lens_q is not None)
    if cu_seq_lens_q is not None:
        if attention_mask is None and position_bias is None and not output_attentions and query.shape[0] == 1:
            starts_k = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
            longest_q: Any = cu_seq_lens_q.diff().max() if max_length_q is None else max_length_q
            longest_k: Any = starts_k.diff().max() if max_length_k is None else max_length_k
            q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, E)
            rule |= {"dropout_p": dropout, "scale": scaling, "enable_gqa": gqa, "softcap": softcap, "sinks": sinks}
            return varlen_attention(q, k, v, cu_seq_lens_q, starts_k, longest_q, longest_k, **rule)[None], None
        attention_mask = _with_packed(attention_mask, cu_seq_lens_q, cu_seq_lens_k, query, key)
    attn_mask = attention_mask
    if not attention_mask is position_bias is None:
        attn_mask = _one_mask(attention_mask, position_bias, query, key)
    is_causal = rule.pop("is_causal", False)
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask,
        dropout,
        is_causal,
        scaling,
        gqa,
        softcap=softcap,
        sinks=sinks,
        need_weights=bool(output_attentions),
        **rule,
    )
    weights = None
    if output_attentions:
        output, _, weights = output
    batch, heads, n_queries, size = output.shape
    if n_queries == 1:
        return output.reshape(batch, 1, heads, size), weights  # in half the time
    return output.transpose(1, 2).contiguous(), weights


def _rule(
    module: torch.nn.Module, is_causal: bool | None, sliding_window: Any, n_queries: int, n_keys: int, packed: bool
) -> dict[str, Any]:
    """The rule of a layer whose mask leaves it to the layer, as options of attention: no more of it than is needed."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if sliding_window is UNSAID:
        own = None
        if n_queries > 1 or packed or torch.compiler.is_compiling() or left_out:  # else it is the last, and sees all
            own = getattr(getattr(module, "config", None), "sliding_window", None)
        if causal and isinstance(own, int) and 0 < own < n_keys:
            raise ValueError(
                f"{type(module).__name__} does not pass sliding_window to attention and its config has one of {own}, "
                f"shorter than the {n_keys} keys: the mask may have left it out; take attn_implementation='sdpa' or "
                "'eager'"
            )
        sliding_window = None
    is_local = sliding_window is not None and sliding_window < n_keys
    if n_queries == 1 and not is_local:
        return {}  # the last query may attend to all
    if not causal:
        if is_local:
            raise ValueError(
                "a layer that is not causal needs a mask (B, 1, L, S) for its sliding_window, "
                f"{type(module).__name__} has one of {sliding_window} for {n_keys} keys and none in the mask; take "
                "attn_implementation='sdpa' or 'eager'"
            )
        return {}
    window = {"window": (sliding_window - 1, None)} if is_local else {}  # its own key is one of those it sees
    if n_queries == n_keys and not packed:
        return {"is_causal": True, **window}
    return {"is_causal": True, "causal_alignment": "bottom_right", **window}


def _one_mask(
    attention_mask: torch.Tensor | None, position_bias: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """Mask and bias as one argument, of four dimensions."""
    if attention_mask is not None:
        if attention_mask.ndim == 2 and not attention_mask.is_floating_point():
            if attention_mask.shape != (key.shape[0], key.shape[2]):
                raise ValueError(
                    f"a mask of two dimensions must be (B, S) = {(key.shape[0], key.shape[2])}, found "
                    f"{tuple(attention_mask.shape)}; make it (B, 1, L, S)"
                )
            attention_mask = attention_mask.bool()[:, None, None, :]
        elif attention_mask.ndim != 4 or not (attention_mask.is_floating_point() or attention_mask.dtype == torch.bool):
            raise ValueError(
                "a mask must be (B, S) bool or whole numbers, or (B, 1, L, S) bool or floating point, found "
                f"{tuple(attention_mask.shape)} {attention_mask.dtype}"
            )
        if attention_mask.dtype not in (torch.bool, torch.float32, query.dtype):
            attention_mask = attention_mask.to(query.dtype)
    if position_bias is None:
        return attention_mask
    if attention_mask is None:
        return position_bias
    if attention_mask.dtype == torch.bool:
        if not all_finite(position_bias):
            return torch.where(attention_mask, position_bias, -torch.inf)
        attention_mask = torch.where(attention_mask, position_bias.new_zeros(()), -torch.inf)
    return attention_mask + position_bias


def _with_packed(
    attention_mask: torch.Tensor | None,
    starts_q: torch.Tensor,
    starts_k: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
) -> torch.Tensor:
    """A complete mask (1, 1, L, S) that also keeps packed sequences apart."""
    if query.shape[0] != 1 or attention_mask is None or attention_mask.ndim != 4:
        found = None if attention_mask is None else tuple(attention_mask.shape)
        raise ValueError(
            "packed sequences (cu_seq_lens_q) must stand in one batch entry, with no mask or one of (1, 1, L, S), and "
            f"without weights or position_bias beside no mask, found query {tuple(query.shape)} and mask {found}"
        )
    starts_k = starts_q if starts_k is None else starts_k
    of_query, of_key = (
        torch.bucketize(torch.arange(x.shape[2], device=x.device), starts.to(x.device), right=True)
        for x, starts in ((query, starts_q), (key, starts_k))
    )
    same = of_query[:, None] == of_key
    if attention_mask.dtype == torch.bool:
        return attention_mask & same
    return attention_mask.masked_fill(~same, -torch.inf)

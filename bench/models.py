"""Models of Hugging Face transformers on a CPU: a training step and generation, ours beside "sdpa" and "eager".

    python -m bench.models [NAME ...] [--rounds 21] [--threads 1]

Small random models of the real classes. The ways take turns, round by round, each first in turn; what is told is the
median of the times, and of the ratios within a round. Needs transformers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from kernels.integrations.transformers import register  # first, since it says which transformers it needs

import transformers  # isort: skip

BATCH, TOKENS, NEW, WORDS = 4, 256, 64, 1_000
WIDTHS = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": WORDS}
ROPE = {**WIDTHS, "intermediate_size": 1024, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024}
LAYERS = {
    "d_model": 256,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "vocab_size": WORDS,
    "max_position_embeddings": 1024,
}
LAYERS |= {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in (("attention_heads", 4), ("ffn_dim", 1024))
}
T5 = {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 2, "num_heads": 4, "vocab_size": WORDS}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 128}
# Class of the model, class of its config, and what the config says.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 256, "n_head": 4, "n_layer": 4, "vocab_size": WORDS}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", ROPE),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**ROPE, "sliding_window": 128}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**ROPE, "sliding_window": 128, "query_pre_attn_scalar": 64}),
    "GPT-OSS": ("GptOssForCausalLM", "GptOssConfig", {**ROPE, **EXPERTS}),
    "BERT": ("BertForMaskedLM", "BertConfig", {**WIDTHS, "intermediate_size": 1024}),
    "T5": ("T5ForConditionalGeneration", "T5Config", T5),
    "BART": ("BartForConditionalGeneration", "BartConfig", LAYERS),
}
WAYS = "ours", "sdpa", "eager"


def make(name: str, way: str) -> Any:
    """A model, the same for each way; ValueError or ImportError where transformers has none."""
    model_class, config_class, options = MODELS[name]
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1}
    config = getattr(transformers, config_class)(**options, **special)
    config._attn_implementation = register() if way == "ours" else way
    return getattr(transformers, model_class)(config)


def training_step(model: Any) -> Callable[[], object]:
    """Loss and gradients of a padded batch."""
    torch.manual_seed(1)
    ids, mask = torch.randint(2, WORDS, (BATCH, TOKENS)), torch.ones(BATCH, TOKENS, dtype=torch.int64)
    mask[0, -40:] = 0
    model.train()

    def step() -> None:
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()

    return step


def generation(model: Any) -> Callable[[], object]:
    """New words after a prompt, greedily, with the cache."""
    torch.manual_seed(2)
    ids = torch.randint(2, WORDS, (1, TOKENS))
    model.eval()
    return lambda: model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)


WORK: dict[str, Callable[[Any], Callable[[], object]]] = {
    "training step": training_step,
    f"generation of {NEW}": generation,
}


def take_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round."""
    found: dict[str, list[float]] = {way: [] for way in calls}
    order = list(calls)
    for turn in range(rounds + 1):  # the first does not count
        for way in order:
            started = time.perf_counter()
            calls[way]()
            if turn:
                found[way].append(time.perf_counter() - started)
        order = order[1:] + order[:1]
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)} (all)")
    parser.add_argument("--rounds", type=int, default=21, help="times that each is measured (21)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (1)")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in MODELS]
    if unknown:
        parser.error(f"names are of {', '.join(MODELS)}, found {', '.join(unknown)}")
    if options.rounds < 1 or options.threads < 1:
        parser.error(f"--rounds and --threads must be 1 or more, found {options.rounds} and {options.threads}")
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, threads {options.threads}, milliseconds\n"
    )
    print("| model, work | ours | sdpa | eager | sdpa / ours | eager / ours |\n|---|---|---|---|---|---|")
    for name in options.names or MODELS:
        for work, prepare in WORK.items():
            if name == "BERT" and work.startswith("generation"):
                continue
            calls = {}
            for way in WAYS:
                try:
                    calls[way] = prepare(make(name, way))
                    calls[way]()
                except (ValueError, ImportError):  # GPT-OSS knows no sdpa
                    if way == "ours":
                        raise
                    calls.pop(way, None)
            found = take_turns(calls, options.rounds)
            times = [f"{statistics.median(found[way]) * 1e3:.1f}" if way in found else "–" for way in WAYS]
            ratios = [
                f"{statistics.median(a / b for a, b in zip(found[way], found['ours'])):.2f}" if way in found else "–"
                for way in WAYS[1:]
            ]
            print(f"| {name}, {work} | {' | '.join([*times, *ratios])} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

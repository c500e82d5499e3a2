"""Fine-tune GPT-2 on a sentence, then let it go on from the first words, with this package's attention.

pip install transformers
python examples/gpt2.py                      # downloads GPT-2, half a gigabyte
python examples/gpt2.py --attention eager    # the same by transformers' own
"""

from __future__ import annotations

import argparse

import torch

from kernels.integrations.transformers import register  # first, since it says which transformers it needs

import transformers  # isort: skip

SENTENCE = "The quick brown fox jumps over the lazy dog, and then it sleeps until the evening."


def fine_tune(model: torch.nn.Module, ids: torch.Tensor, epochs: int = 10, learning_rate: float = 1e-5) -> list[float]:
    """Train on ids (B, L) as a whole, `epochs` times; the loss before each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    model.train()
    losses = []
    for _ in range(epochs):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def go_on(model: torch.nn.Module, ids: torch.Tensor, n_tokens: int = 20) -> torch.Tensor:
    """ids (B, L) and what the model thinks most likely to follow, (B, L + n_tokens)."""
    model.eval()
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False, pad_token_id=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", default=register(), help="what attends: %(default)s, eager, sdpa")
    parser.add_argument("--model", default="gpt2", help="its name or folder")
    asked = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(asked.model, attn_implementation=asked.attention)
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    for epoch, loss in enumerate(fine_tune(model, ids), 1):
        print(f"epoch {epoch}: loss {loss:.4f}")
    print(tokenizer.decode(go_on(model, ids[:, :4])[0]))


if __name__ == "__main__":
    main()

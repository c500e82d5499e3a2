"""The peer of the training benchmarks: calcformer's encoder-decoder on torch.nn.Transformer, as one writes it."""

from __future__ import annotations

import re
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from calcformer.data import Examples, Pairs, Task
from calcformer.model.encoder_decoder import EncoderDecoder
from calcformer.model.positions import sinusoid
from calcformer.model.settings import ModelConfig

__all__ = ["PlainTransformer", "TransformerTrainer"]

NAMES = (  # of weights, ours by a pattern, and as nn.Transformer has it
    (r"^(encoder|decoder)_norm", r"transformer.\1.norm"),
    (r"^(encoder\.\d+)\.feed_forward_norm", r"\1.norm2"),
    (r"^(encoder|decoder)\.", r"transformer.\1.layers."),
    (r"\.attention_norm", ".norm1"),
    (r"\.cross_attention_norm", ".norm2"),
    (r"\.feed_forward_norm", ".norm3"),
    (r"\.attention\.", ".self_attn."),
    (r"\.cross_attention\.", ".multihead_attn."),
    (r"_attn\.output", "_attn.out_proj"),
    (r"_attn\.(query|key_value|query_key_value)\.", "_attn.in_proj_"),
    (r"\.feed_forward\.expand", ".linear1"),
    (r"\.feed_forward\.contract", ".linear2"),
)

Memory = tuple[torch.Tensor, torch.Tensor]  # states of the encoder (B, S, D), and which are of padding, (B, S)


class PlainTransformer(nn.Module):
    """Embeddings, sinusoid, nn.Transformer and prediction layer: as many parameters as calcformer's model.

    Args:
        config: its embeddings are "separate" or "tied", its norm is "post" or "pre".
    """

    positions: torch.Tensor

    def __init__(self, task: Task, config: ModelConfig) -> None:
        super().__init__()
        size, pad_id = len(task.vocabulary), task.vocabulary.pad_id
        assert pad_id is not None
        self.pad_id = pad_id
        self.source_embedding = nn.Embedding(size, config.width)
        self.target_embedding = nn.Embedding(size, config.width)
        self.prediction = nn.Linear(config.width, size)
        self.embedding_scale = 1.0
        if config.embeddings == "tied":
            self.prediction.weight = self.target_embedding.weight = self.source_embedding.weight
            nn.init.normal_(self.prediction.weight, std=config.width**-0.5)
            self.embedding_scale = config.width**0.5
        length = max(task.source_length, task.target_length)
        self.register_buffer("positions", sinusoid(length, config.width), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "enable_nested_tensor")  # that it has no use for it with norms first
            self.transformer = nn.Transformer(
                config.width,
                config.heads,
                config.encoder_layers,
                config.decoder_layers,
                config.hidden,
                config.dropout,
                batch_first=True,
                norm_first=config.norm == "pre",
            )

    def _embed(self, ids: torch.Tensor, embedding: nn.Embedding) -> torch.Tensor:
        x = embedding(ids)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        return self.dropout(x + self.positions[: ids.shape[1]])

    def encode(self, source: torch.Tensor) -> Memory:
        """source (B, S) int64 to what the decoder attends to."""
        padding = source == self.pad_id
        x = self._embed(source, self.source_embedding)
        return self.transformer.encoder(x, src_key_padding_mask=padding), padding

    def decode(self, target: torch.Tensor, memory: Memory) -> torch.Tensor:
        """Scores (B, T, V) of the token that follows each of target (B, T) int64."""
        length = target.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        x = self.transformer.decoder(
            self._embed(target, self.target_embedding),
            memory[0],
            tgt_mask=later,
            tgt_key_padding_mask=target == self.pad_id,
            memory_key_padding_mask=memory[1],
        )
        return self.prediction(x)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """source (B, S), target (B, T) int64, the target as the decoder reads it; returns scores (B, T, V)."""
        return self.decode(target, self.encode(source))

    def copy_weights(self, model: EncoderDecoder) -> None:
        """Take the weights of calcformer's model of the same settings."""
        found: dict[str, list[torch.Tensor]] = {}
        for name, weights in model.state_dict().items():
            for pattern, theirs in NAMES:
                name = re.sub(pattern, theirs, name)
            found.setdefault(name, []).append(weights)  # queries, then keys and values: nn.Transformer has them in one
        self.load_state_dict({name: torch.cat(parts) for name, parts in found.items()})


class TransformerTrainer:
    """Trains it on the same problems, shuffled each epoch, with torch.optim.Adam.

    Args:
        lean: also cut the padding that a batch has in common and use the fused Adam, as calcformer does: what is then
            left between the two is the model and the step.
        compiled: None leaves the model eager, else torch.compile's mode; "reduce-overhead" replays CUDA graphs.
    """

    def __init__(
        self,
        task: Task,
        model: ModelConfig,
        device: torch.device,
        learning_rate: float,
        batch_size: int,
        lean: bool = False,
        compiled: str | None = None,
    ) -> None:
        self.examples = task.split()[0].to(device)
        self.batch_size, self.lean, self.device = batch_size, lean, device
        self.model = PlainTransformer(task, model).to(device)
        self.forward = torch.compile(self.model, mode=compiled) if compiled else self.model
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=learning_rate, fused=lean or None)

    def step(self, batch: Examples) -> torch.Tensor:
        """Forward, backward and an Adam step; returns the loss."""
        assert isinstance(batch, Pairs)
        if self.lean and self.device.type == "cpu":
            batch = batch.trim(self.model.pad_id)
        self.optimizer.zero_grad(set_to_none=True)  # before the forward pass, whose CUDA graph may reuse their memory
        logits = self.forward(batch.source, batch.decoder_input)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=self.model.pad_id)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def epoch(self) -> float:
        """One pass over the problems; returns the mean loss of its batches, which waits for the device."""
        self.model.train()
        order = torch.randperm(len(self.examples)).to(self.device)
        batches = self.examples.select(order).batches(self.batch_size)
        return torch.stack([self.step(batch) for batch in batches]).mean().item()

"""The peer of the training benchmark: S1's model on torch.nn.Transformer, as one writes it, and compiled."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from calcformer.data import Examples, Pairs, Task
from calcformer.model.positions import sinusoid
from calcformer.model.settings import ModelConfig

__all__ = ["S1Transformer", "TransformerTrainer"]


class S1Transformer(nn.Module):
    """Embeddings, sinusoid, nn.Transformer and prediction layer: as many parameters as calcformer's model."""

    positions: torch.Tensor

    def __init__(self, task: Task, config: ModelConfig) -> None:
        super().__init__()
        size, pad_id = len(task.vocabulary), task.vocabulary.pad_id
        assert pad_id is not None
        self.pad_id = pad_id
        self.source_embedding = nn.Embedding(size, config.width)
        self.target_embedding = nn.Embedding(size, config.width)
        length = max(task.source_length, task.target_length)
        self.register_buffer("positions", sinusoid(length, config.width), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.transformer = nn.Transformer(
            config.width,
            config.heads,
            config.encoder_layers,
            config.decoder_layers,
            config.hidden,
            config.dropout,
            batch_first=True,
        )
        self.prediction = nn.Linear(config.width, size)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """source (B, S), target (B, T) int64, the target as the decoder reads it; returns scores (B, T, V)."""
        source_padding, target_padding = source == self.pad_id, target == self.pad_id
        length = target.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        x = self.dropout(self.source_embedding(source) + self.positions[: source.shape[1]])
        y = self.dropout(self.target_embedding(target) + self.positions[:length])
        y = self.transformer(
            x,
            y,
            tgt_mask=later,
            src_key_padding_mask=source_padding,
            tgt_key_padding_mask=target_padding,
            memory_key_padding_mask=source_padding,
        )
        return self.prediction(y)


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
        self.model = S1Transformer(task, model).to(device)
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

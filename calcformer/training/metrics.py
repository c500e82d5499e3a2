"""How good a model is: loss, token accuracy and exact match."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from calcformer.data import Examples, Task
from calcformer.decoding import BATCH
from calcformer.training.team import Team

__all__ = ["Totals", "count_labels", "evaluate", "measure", "measure_answers", "token_loss"]

LARGEST_EXPONENT = 27.0  # of perplexity: what is larger is no figure
FROM_LABELS = "valid_loss", "valid_token_accuracy", "perplexity"
LARGE = 512  # tokens of a vocabulary, from which on the loss's passes over scores take longer than calling for them
ROUGH = 1e-30  # probability, below which float32 has fewer digits
IGNORE = -100  # F.cross_entropy's own default, a label no vocabulary has


def token_loss(logits: torch.Tensor, labels: torch.Tensor, pad_id: int | None, smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy in nats, summed over the labels that are not padding.

    Args:
        logits: (B, T, V) float, or (B, V).
        labels: (B, T) int64, or (B,).
        smoothing: share of the target spread evenly over the vocabulary (Szegedy et al. 2016, section 7).
    """
    scores, places, ignored = logits.flatten(0, -2), labels.flatten(), IGNORE if pad_id is None else pad_id
    is_large = smoothing > 0.0 and scores.is_cpu and scores.requires_grad and scores.shape[1] >= LARGE
    if is_large and not torch.compiler.is_compiling():
        return SmoothedLoss.apply(scores, places, ignored, smoothing)
    return F.cross_entropy(scores, places, ignore_index=ignored, label_smoothing=smoothing, reduction="sum")


class SmoothedLoss(torch.autograd.Function):
    """`F.cross_entropy` with label smoothing and reduction="sum", in fewer passes over the scores (N, V).

    PyTorch makes the gradients of log-probabilities first, one by the labels and one by the smoothing, and of their sum
    the gradient of the scores. Here that is written at once.
    """

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, labels: torch.Tensor, ignored: int, smoothing: float) -> torch.Tensor:
        """The loss ()."""
        p, counts = scores.softmax(dim=1), labels != ignored
        labels = labels.where(counts, 0)[:, None]
        own, p_own = scores.gather(1, labels).squeeze(1), p.gather(1, labels).squeeze(1)
        lse = own - p_own.log()
        is_rough = p_own < ROUGH
        if is_rough.any():
            lse = torch.where(is_rough, scores.logsumexp(dim=1), lse)
        loss = lse - (1 - smoothing) * own - smoothing / scores.shape[1] * scores.sum(dim=1)
        ctx.save_for_backward(p, labels, counts)
        ctx.smoothing = smoothing
        return loss.where(counts, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """grad * (softmax(scores) - (1 - smoothing) onehot(label) - smoothing / V); 0 where the label is ignored."""
        p, labels, counts = ctx.saved_tensors
        found = p - ctx.smoothing / p.shape[1]
        found.scatter_add_(1, labels, found.new_tensor(ctx.smoothing - 1).expand_as(labels))
        return found.mul_(torch.where(counts, grad, 0.0)[:, None]), None, None, None


def count_labels(labels: torch.Tensor, pad_id: int | None) -> torch.Tensor:
    """How many of the labels (B, T) are not padding: () float32."""
    if pad_id is None:
        return torch.full((), labels.numel(), dtype=torch.float32, device=labels.device)
    return (labels != pad_id).sum(dtype=torch.float32)


class Totals:
    """Sums over batches, kept on the device so that adding a batch never waits for it."""

    def __init__(self, pad_id: int | None, device: torch.device | str = "cpu") -> None:
        self.pad_id = pad_id
        self.sums = torch.zeros(3, device=device)  # loss, right tokens, tokens

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: its summed loss (), its scores (B, T, V) and its labels (B, T)."""
        real = torch.ones_like(labels, dtype=torch.bool) if self.pad_id is None else labels != self.pad_id
        scores = logits.detach()
        if scores.is_cpu and scores.dtype == torch.float32:  # the highest is found sooner than its place
            same = scores.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) == scores.amax(dim=-1)
        else:
            same = scores.argmax(dim=-1) == labels
        right = real & same
        self.sums += torch.stack((loss.detach(), *(x.sum(dtype=torch.float32) for x in (right, real))))

    def result(self) -> tuple[float, float]:
        """Mean loss and accuracy of a token."""
        loss, right, count = self.sums.tolist()
        return loss / count, right / count


@dataclass(frozen=True)
class Score:
    """loss in nats a token and token_accuracy with the right answer so far given; n problems."""

    loss: float
    token_accuracy: float
    n: int

    @property
    def figures(self) -> dict[str, float]:
        """By the names of metrics.jsonl."""
        perplexity = math.exp(min(self.loss, LARGEST_EXPONENT))
        return {"valid_loss": self.loss, "valid_token_accuracy": self.token_accuracy, "perplexity": perplexity}


@torch.no_grad()
def evaluate(
    model: Any, examples: Examples, pad_id: int | None, batch_size: int = 1_000, team: Team | None = None
) -> Score:
    """Loss and token accuracy on all examples, which stand on the model's device; each of a team measures a part."""
    team = team or Team()
    was_training = model.training
    model.eval()
    totals = Totals(pad_id, examples.device)
    for batch in examples.part(team.rank, team.size).batches(batch_size):
        if examples.device.type == "cpu":
            batch = batch.trim(pad_id)
        logits = model(*batch.inputs)
        totals.add(token_loss(logits, batch.labels, pad_id), logits, batch.labels)
    model.train(was_training)
    team.sum_(totals.sums)
    return Score(*totals.result(), n=len(examples))


@torch.no_grad()
def measure_answers(
    model: Any, examples: Examples, task: Task, batch_size: int = BATCH, team: Team | None = None
) -> dict[str, float]:
    """The figures of the answers that the model gives by itself, such as exact_match: see `Task.answer_figures`."""
    team = team or Team()
    was_training = model.training
    model.eval()
    said = task.answer(model, examples.part(team.rank, team.size), batch_size=batch_size)
    model.train(was_training)
    if team.size > 1:  # each has the answers of the others by a sum: a token's number is exact in float32 up to 2^24
        every = torch.zeros(len(examples), *said.shape[1:], device=said.device)
        start = len(examples) * team.rank // team.size
        every[start : start + len(said)] = said
        team.sum_(every)
        said = every.long()
    return task.answer_figures(said, examples)


def measure(
    model: Any,
    examples: Examples,
    task: Task,
    wanted: Collection[str],
    validation: bool = True,
    answers: bool = True,
    team: Team | None = None,
) -> dict[str, float]:
    """The figures of a task that are `wanted`: from the labels, and from answers where any of them needs those."""
    found: dict[str, float] = {}
    if validation:
        score = evaluate(model, examples, task.ignored_label, task.measured_at_once, team)
        found |= score.figures | task.text_figures(score.loss)
    if answers and task.has_answers and not set(wanted) <= set(FROM_LABELS):
        found |= measure_answers(model, examples, task, team=team)
    return {name: value for name, value in found.items() if name in wanted}

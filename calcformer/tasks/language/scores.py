"""How good translations are, by the library sacrebleu."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from calcformer.errors import InputError

__all__ = ["score", "sentence_scores", "signature"]


def metrics() -> Any:
    """The measures of the library, which nothing else needs."""
    try:
        return importlib.import_module("sacrebleu.metrics")
    except ImportError:
        raise InputError("translation needs the package sacrebleu; pip install sacrebleu") from None


def score(said: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU and chrF of N translations, 0..100 each, whose right ones are `references`.

    Source: Papineni et al. 2002, "BLEU"; Popovic 2015, "chrF"; Post 2018, "A call for clarity in reporting BLEU
    scores".
    """
    found = {"bleu": metrics().BLEU(), "chrf": metrics().CHRF()}
    return {name: min(metric.corpus_score(said, [references]).score, 100.0) for name, metric in found.items()}


def signature(said: Sequence[str], references: Sequence[str]) -> str:
    """How sacrebleu names what BLEU was computed by, so that others can compare theirs."""
    metric = metrics().BLEU()
    metric.corpus_score(said, [references])
    return str(metric.get_signature())


def sentence_scores(said: Sequence[str], references: Sequence[str]) -> list[float]:
    """chrF of each translation, which unlike BLEU has a meaning for one sentence."""
    metric = metrics().CHRF()
    return [metric.sentence_score(one, [right]).score for one, right in zip(said, references)]

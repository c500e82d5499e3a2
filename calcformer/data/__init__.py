"""Examples, tasks and vocabularies: what training, decoding and evaluation know of a kind of problem."""

from calcformer.data.examples import Examples, Labelled, Pairs, Texts
from calcformer.data.task import Answer, Task
from calcformer.data.vocab import Vocabulary

__all__ = ["Answer", "Examples", "Labelled", "Pairs", "Task", "Texts", "Vocabulary"]

"""What can be learned: a file and a line for each task. Nothing else knows their names; nothing here needs torch."""

from calcformer.settings import TaskSettings
from calcformer.tasks.expression import Expressions
from calcformer.tasks.formula import Formulas
from calcformer.tasks.next_word import NextWords
from calcformer.tasks.text import Text
from calcformer.tasks.translation import Translation

__all__ = ["TASKS"]

TASKS: dict[str, type[TaskSettings]] = {
    task.task: task for task in (Formulas, Expressions, NextWords, Text, Translation)
}  # add yours here

"""Problems to calculate: what they are, how they become tokens, and which are held out."""

from calcformer.data.examples import Examples, Task
from calcformer.data.expressions import ExpressionTask, generate_expressions
from calcformer.data.formulas import FormulaTask, generate_formulas, random_formula
from calcformer.data.vocab import EXPRESSION, FORMULA, Vocabulary

__all__ = ["EXPRESSION", "FORMULA", "Examples", "ExpressionTask", "FormulaTask", "Task", "Vocabulary",
           "generate_expressions", "generate_formulas", "random_formula"]

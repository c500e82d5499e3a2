"""Problems: what they are, how they become tokens, and which are held out."""

from calcformer.data.examples import Examples, Labelled, Pairs, Texts
from calcformer.data.expressions import ExpressionTask, generate_expressions
from calcformer.data.formula_tensors import FormulaForm, generate_formulas
from calcformer.data.formulas import FormulaTask, random_formula
from calcformer.data.task import Answer, Task
from calcformer.data.vocab import EXPRESSION, FORMULA, Vocabulary

__all__ = [
    "EXPRESSION",
    "FORMULA",
    "Answer",
    "Examples",
    "ExpressionTask",
    "FormulaForm",
    "FormulaTask",
    "Labelled",
    "Pairs",
    "Task",
    "Texts",
    "Vocabulary",
    "generate_expressions",
    "generate_formulas",
    "random_formula",
]

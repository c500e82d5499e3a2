"""A transformer worked by hand: each step with its matrices, as a page to read and to calculate along."""

from pathlib import Path

from calcformer.by_hand.losses import draw_losses, losses_page
from calcformer.by_hand.pages import draw_page, run_page
from calcformer.by_hand.steps import Page
from calcformer.by_hand.tutorial import tutorial_page
from calcformer.by_hand.writers import COLUMNS, write_html, write_text
from calcformer.errors import InputError

__all__ = [
    "COLUMNS",
    "choose_page",
    "draw_losses",
    "draw_page",
    "losses_page",
    "run_page",
    "tutorial_page",
    "write_html",
    "write_text",
]


def choose_page(
    sentence: str | None, run: Path | None, tutorial: bool, losses: bool, drawn: dict[str, str | int | None]
) -> Page:
    """The page that flags ask for.

    Args:
        sentence: what is read; None for the page's own.
        run, tutorial, losses: which page instead of one with drawn weights.
        drawn: arguments of `draw_page` by name, None where they were not given.

    Raises:
        InputError: they do not go together; what `draw_page` and `run_page` raise.
    """
    chosen = [name for name, value in {"run": run, "tutorial": tutorial, "losses": losses}.items() if value]
    given = {name: value for name, value in drawn.items() if value is not None}
    if len(chosen) > 1:
        raise InputError(f"--{chosen[0]} and --{chosen[1]} are two pages; leave one out")
    if chosen and given:
        flag = {"key_size": "d-k", "value_size": "d-v"}.get(name := next(iter(given)), name)
        raise InputError(f"--{flag} is for drawn weights; leave it out, or --{chosen[0]}")
    if run is not None:
        if sentence is None:
            raise InputError("--run needs a problem, such as: calcformer explain 649+864 --run RUN")
        return run_page(run, sentence)
    if chosen:
        if sentence is not None:
            raise InputError(f"--{chosen[0]} has its own words; leave the sentence out")
        return tutorial_page() if tutorial else losses_page()
    if sentence is not None:
        given["sentence"] = sentence
    return draw_page(**given)  # type: ignore[arg-type]

"""A page as text for a terminal, and as HTML."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

from calcformer.by_hand.steps import KEPT, MORE, Matrix, Page, Step
from calcformer.errors import InputError

__all__ = ["COLUMNS", "write_html", "write_text"]

INDENT, GAP = "   ", "   "
COLUMNS = 110  # of text, where no terminal says how many it has
MOST_COLUMNS, MOST_ROWS = 12, 16  # of a matrix that are shown whole
CUT = (
    f"Of matrices with more than {MOST_COLUMNS} columns or {MOST_ROWS} rows, or too wide for the line, the first "
    f"{KEPT} and the last are shown, with {MORE} between."
)
LONGEST_HEAD, LONGEST_LABEL = 12, 24  # characters that are shown of a column's name, and of a row's
LONGEST_CORNER = 10  # of a matrix's name, to stand before the names of its columns


def short(label: str, longest: int = LONGEST_HEAD) -> str:
    return label if len(label) <= longest else label[: longest - 1] + "…"


def all_steps(page: Page) -> dict[int, Step]:
    """The steps that are shown, by their numbers, of which what was checked is the last; InputError for others."""
    names = list(page.checks[0].apart)
    table = [[check.apart[name] for name in names] for check in page.checks]
    verdict = "All agree: what is left is rounding." if page.agrees else "SOMETHING IS WRONG: not all agree."
    matrix = Matrix("apart", table, [check.name for check in page.checks], names, digits=-1)
    steps = [*page.steps, Step("Checked", f"{page.checked_by} {verdict}", matrices=[[matrix]])]
    first, last = page.shown or (1, len(steps))
    if last > len(steps):
        raise InputError(f"--steps must be 1 to {len(steps)}, which this page has, got {last}")
    return dict(list(enumerate(steps, 1))[first - 1 : last])


def write_text(page: Page, columns: int = COLUMNS) -> str:
    """The page in lines of so many characters (60 to 140), as far as its words let it."""
    columns = min(max(columns, 60), 140)
    body: list[str] = []
    for place, step in all_steps(page).items():
        body.append("")
        head = f"{place}. {step.title}"
        if step.formula and len(head + GAP + step.formula) <= columns:
            body.append(head + GAP + step.formula)
        else:
            body += [head, *wrap(step.formula, columns)]
        body += wrap(step.text, columns)
        body += [line for matrices in step.matrices for line in side_by_side(matrices, columns)]
        body += [line for text in (*step.examples, *step.notes) for line in wrap(text, columns)]
    is_cut = any(MORE in line.split() for line in body)
    head_lines = [line for text in (page.title, *page.intro, *[CUT] * is_cut) for line in wrap(text, columns, "")]
    closing = ["", *(line for text in page.closing for line in wrap(text, columns, ""))] if page.closing else []
    return "\n".join(line.rstrip() for line in (*head_lines, *body, *closing))


def wrap(text: str, columns: int, indent: str = INDENT) -> list[str]:
    """A paragraph, its second line and those after it set in a little more."""
    return textwrap.wrap(
        text,
        columns,
        initial_indent=indent,
        subsequent_indent=indent + "  " * bool(indent),
        break_long_words=False,
        break_on_hyphens=False,
    )


def side_by_side(matrices: Sequence[Matrix], columns: int) -> list[str]:
    """Matrices beside each other as far as there is room; where rows are named as those before, not named again."""
    room = columns - len(INDENT)
    is_above = any(len(matrix.name) > LONGEST_CORNER for matrix in matrices)
    bands: list[list[list[str]]] = []
    names, width = None, 0
    for matrix in matrices:
        block = draw(matrix, room, matrix.rows != names, is_above)
        width += len(GAP) + len(block[0])
        if not bands or width > room:
            block = draw(matrix, room, True, is_above)
            width = len(block[0])
            bands.append([])
        bands[-1].append(block)
        names = matrix.rows
    return [
        INDENT + GAP.join(part.ljust(len(block[0])) for part, block in zip(parts, band))
        for band in bands
        for parts in zip_longest(*band, fillvalue="")
    ]


def draw(matrix: Matrix, room: int, is_labelled: bool, is_above: bool) -> list[str]:
    """A matrix as lines of the same length, its columns cut where it has more than `room` characters.

    Args:
        is_labelled: whether rows are named.
        is_above: whether its own name stands above it, and not before the names of the columns.
    """
    for most in MOST_COLUMNS, KEPT:
        heads, body = matrix.cut(most, MOST_ROWS)
        table = [["" if is_above else matrix.name, *heads]]
        table += [[row[0] if is_labelled else "", *row[1:]] for row in body]
        texts = [[short(row[0], LONGEST_LABEL), *(short(text) for text in row[1:])] for row in table]
        widths = [max(map(len, column)) for column in zip(*texts)]
        if sum(widths) + 2 * len(heads) <= room:
            break
    lines = []
    for row in texts:
        cells = (text.rjust(width) for text, width in zip(row[1:], widths[1:]))
        lines.append("  ".join((row[0].ljust(widths[0]), *cells)))
    if not widths[0]:
        lines = [line[2:] for line in lines]
    if is_above:
        lines.insert(0, " " * (widths[0] + 2 * bool(widths[0])) + matrix.name)
    longest = max(map(len, lines))
    return [line.ljust(longest) for line in lines]


BLUE, ORANGE = "26,115,232", "242,133,0"
LEGEND = "Numbers above 0 stand on blue, those below on orange, the darker the larger beside others of their matrix."
STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 0 .8rem 3rem; color: #222;
  background: #fff; overflow-wrap: break-word }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.15rem; margin: 2rem 0 .2rem } p { margin: .3rem 0 }
code { background: #f2f2f2; padding: .1rem .3rem; border-radius: .2rem }
.row { display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; margin: .5rem 0 }
.matrix { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font: .85rem/1.4 ui-monospace, monospace }
caption { text-align: left; font-weight: bold; white-space: nowrap }
th { font-weight: normal; color: #666; padding: .1rem .45rem; text-align: right; white-space: nowrap }
td { padding: .1rem .45rem; text-align: right; white-space: nowrap }
.example { font: .85rem/1.5 ui-monospace, monospace; color: #555; overflow-wrap: anywhere }
nav { columns: 18rem; font-size: .9rem } nav a { display: block; color: #06c; text-decoration: none }
"""


def write_html(page: Page) -> str:
    """The page as one HTML document that needs nothing else; numbers above 0 stand on blue, those below on orange."""
    steps = all_steps(page)
    tables = ["".join(map(table_of, matrices)) for step in steps.values() for matrices in step.matrices]
    is_cut = any(f"<td>{MORE}</td>" in table for table in tables)
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(page.title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>",
        f"<h1>{html.escape(page.title)}</h1>",
        *paragraphs([*page.intro, *[CUT] * is_cut, LEGEND]),
        "<nav>",
        *(f'<a href="#step-{place}">{place}. {html.escape(step.title)}</a>' for place, step in steps.items()),
        "</nav>",
    ]
    for place, step in steps.items():
        parts.append(f'<section id="step-{place}">\n<h2>{place}. {html.escape(step.title)}</h2>')
        parts += paragraphs([step.text] if step.text else [])
        parts += [f"<p><code>{html.escape(step.formula)}</code></p>"] if step.formula else []
        for matrices in step.matrices:
            parts += ['<div class="row">', *map(table_of, matrices), "</div>"]
        parts += paragraphs(step.examples, "example")
        parts += [*paragraphs(step.notes), "</section>"]
    return "\n".join([*parts, *paragraphs(page.closing), "</body>\n</html>\n"])


def paragraphs(texts: Sequence[str], kind: str = "") -> list[str]:
    start = f'<p class="{kind}">' if kind else "<p>"
    return [f"{start}{html.escape(text)}</p>" for text in texts]


def table_of(matrix: Matrix) -> str:
    """A matrix as a table, each number on a ground as dark as it is large beside the largest."""
    heads, body = matrix.cut(MOST_COLUMNS, MOST_ROWS)
    sizes = [abs(value) for row in matrix.values for value in row if abs(value) < float("inf")]
    largest = max(sizes, default=0.0) or 1.0
    lines = [f'<div class="matrix"><table>\n<caption>{html.escape(matrix.name)}</caption>\n<tr><th></th>']
    lines += [f'<th scope="col">{html.escape(short(head))}</th>' for head in heads]
    for row in body:
        lines.append(f'</tr>\n<tr><th scope="row">{html.escape(short(row[0], LONGEST_LABEL))}</th>')
        lines += [f"<td{shade(text, largest)}>{html.escape(text)}</td>" for text in row[1:]]
    return "".join([*lines, "</tr>\n</table></div>"])


def shade(text: str, largest: float) -> str:
    """The ground of a cell, as an attribute; the sizes of differences have none."""
    if text in (MORE, "-", "-inf") or "e" in text:
        return ""
    share = float(text) / largest
    return f' style="background:rgba({BLUE if share > 0 else ORANGE},{abs(share) * 0.55:.2f})"' if share else ""

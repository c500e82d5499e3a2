"""A transformer worked by hand: calculated again in plain Python, held to the kernels, to a tutorial and to a run."""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import kernels
from calcformer.by_hand import draw_page, losses_page, run_page, tutorial_page, write_html, write_text
from calcformer.by_hand import tutorial as tutorial_module
from calcformer.by_hand.losses import LOSSES, WORDS
from calcformer.by_hand.steps import Matrix, Page, Step, attend, normalise
from calcformer.by_hand.transformer import work_out
from calcformer.by_hand.tutorial import read_tutorial
from calcformer.by_hand.weights import Linear, draw_weights, weights_of
from calcformer.by_hand.writers import MOST_COLUMNS, MOST_ROWS, all_steps
from calcformer.cli import main
from calcformer.config import PRESETS
from calcformer.solver import Solver
from calcformer.training import train
from tests.pictures import is_picture

pytestmark = pytest.mark.usefixtures("as_on_a_cpu", "empty_folder")

README = Path(__file__).parents[1] / "calcformer" / "README.md"
Rows = list[list[float]]


def matrices(page: Page, title: str) -> dict[str, Rows]:
    """The matrices of a step by name."""
    (step,) = [step for step in page.steps if step.title == title]
    return {matrix.name: [list(row) for row in matrix.values] for line in step.matrices for matrix in line}


# Plain Python, a number at a time.


def times(a: Rows, b: Rows) -> Rows:
    return [[sum(x * y for x, y in zip(row, column)) for column in zip(*b)] for row in a]


def plus(a: Rows, b: Rows) -> Rows:
    return [[x + y for x, y in zip(*rows)] for rows in zip(a, b)]


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(x) for x in row]
    return [x / sum(powers) for x in powers]


def norm(row: list[float]) -> list[float]:
    mean = sum(row) / len(row)
    variance = sum((x - mean) ** 2 for x in row) / len(row)
    return [(x - mean) / math.sqrt(variance + 1e-5) for x in row]


def part(a: Rows, head: int, size: int) -> Rows:
    """The columns of a head."""
    return [row[head * size : (head + 1) * size] for row in a]


def attention(x: Rows, memory: Rows, weights: Any, is_causal: bool) -> dict[str, Rows]:
    """All of an attention, the first head's queries, keys, values, scores and weights by name."""
    query, key, value, output = (linear.weight.tolist() for linear in weights[:4])
    found: dict[str, Rows] = {}
    mix: Rows = [[] for _ in x]
    for head in range(weights.heads):
        e, ev = len(query[0]) // weights.heads, len(value[0]) // weights.heads
        q, k, v = (
            times(x, part(query, head, e)),
            times(memory, part(key, head, e)),
            times(memory, part(value, head, ev)),
        )
        scores = times(q, [list(column) for column in zip(*k)])
        seen = [row[: i + 1] if is_causal else row for i, row in enumerate(scores)]
        shares = [softmax([score / math.sqrt(e) for score in row]) for row in seen]
        shares = [row + [0.0] * (len(memory) - len(row)) for row in shares]
        mix = [before + row for before, row in zip(mix, times(shares, v))]
        if head == 0:
            found = {"Q": q, "K": k, "V": v, "scores": scores, "weights": shares}
    return {**found, "mix": mix, "output": times(mix, output)}


def place(length: int, width: int) -> Rows:
    angle = [[t / 10_000 ** (i // 2 * 2 / width) for i in range(width)] for t in range(length)]
    return [[math.cos(x) if i % 2 else math.sin(x) for i, x in enumerate(row)] for row in angle]


def close(ours: Rows, expected: Rows) -> None:
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), rtol=1e-6, atol=1e-6)


def hold_stack(page: Page, where: str, x: Rows, layer: Any, memory: Rows | None) -> Rows:
    """Compare each step of encoder or decoder with plain Python; returns what comes out."""
    close(matrices(page, f"{where}: words as rows of numbers")["x"], x)
    kinds = [("self-attention", layer.attention, x), ("cross-attention", layer.cross_attention, memory)]
    for name, weights, seen in kinds if memory else kinds[:1]:
        found = attention(x, x if name == "self-attention" else seen, weights, name[0] == "s" and memory is not None)
        for step in "query, key, value", "weights", "output":
            shown = matrices(page, f"{where} {name}: {step}")
            for key in shown.keys() & found.keys():
                close(shown[key], found[key])
        shown = matrices(page, f"{where} {name}: add and norm")
        close(shown["sum"], plus(x, found["output"]))
        x = [norm(row) for row in plus(x, found["output"])]
        close(shown["norm"], x)
    hidden = [[max(0.0, value) for value in row] for row in times(x, layer.expand.weight.tolist())]
    output = times(hidden, layer.contract.weight.tolist())
    close(matrices(page, f"{where} feed-forward")["hidden"], hidden)
    x = [norm(row) for row in plus(x, output)]
    close(matrices(page, f"{where} feed-forward: add and norm")["norm"], x)
    return x


@pytest.mark.parametrize(
    ("sizes", "d_k", "d_v"),
    [
        pytest.param({}, 4, 4, id="as it comes"),
        pytest.param({"width": 6, "heads": 3, "hidden": 5, "seed": 7}, 2, 2, id="heads"),
        pytest.param({"width": 5, "heads": 2, "key_size": 3, "value_size": 1, "seed": 2}, 3, 1, id="d_k and d_v"),
        pytest.param({"width": 1, "hidden": 1, "sentence": "die", "answer": "die"}, 1, 1, id="one number a word"),
    ],
)
def test_every_matrix_is_that_of_plain_python(sizes: dict[str, Any], d_k: int, d_v: int) -> None:
    page = draw_page(**sizes)
    source, target = sizes.get("sentence", "you win you live").split(), sizes.get("answer", "you live").split()
    words = list(dict.fromkeys(["<begin>", "<end>", *source, *target]))
    width, heads = sizes.get("width", 4), sizes.get("heads", 1)
    weights = draw_weights(words, width, heads, sizes.get("hidden", 4), d_k, d_v, sizes.get("seed", 0))
    table = dict(zip(words, weights.source_embedding.tolist()))
    x, y = (plus([table[word] for word in read], place(len(read), width)) for read in (source, ["<begin>", *target]))
    memory = hold_stack(page, "Encoder", x, weights.encoder[0], None)
    y = hold_stack(page, "Decoder", y, weights.decoder[0], memory)
    scores, shown = times(y, weights.prediction.weight.tolist()), matrices(page, "Scores of words, and softmax")
    close(shown["scores"], scores)
    close(shown["p"], [softmax(row) for row in scores])
    losses = [-math.log(softmax(row)[words.index(word)]) for row, word in zip(scores, [*target, "<end>"])]
    assert page.closing[0].startswith(f"The mean loss is {sum(losses) / len(losses):.2f}.")
    assert page.agrees


def test_plain_python_rejects_another_weight() -> None:
    other = draw_weights(["<begin>", "<end>", "you", "win", "live"], 4, 1, 4, 4, 4, 0)
    other.encoder[0].contract.weight[3, 2] += 0.1
    table = other.source_embedding.tolist()
    with pytest.raises(AssertionError):
        hold_stack(draw_page(), "Encoder", plus([table[i] for i in (2, 3, 2, 4)], place(4, 4)), other.encoder[0], None)


def test_numbers_that_need_no_calculator() -> None:
    """A query of 1, keys of 0 and ln 3, so weights of 1/4 and 3/4; 1, 3, 5, 7 have the mean 4 and the variance 5."""
    query, key, value = (torch.tensor([x], dtype=torch.float64) for x in ([[1]], [[0], [math.log(3)]], [[4], [8]]))
    done = attend("", query, key, value)
    close(done.weights[0].tolist(), [[0.25, 0.75]])
    close(done.output[0].tolist(), [[7.0]])
    layer_norm = kernels.nn.LayerNorm(4, eps=0.0, dtype=torch.float64)
    with torch.no_grad():
        normed = normalise("", torch.tensor([[1.0, 3, 5, 7]], dtype=torch.float64), layer_norm)
    close([[*normed.mean[0].tolist(), *normed.variance[0].tolist()]], [[4.0, 5.0]])
    close((normed.output * math.sqrt(5)).tolist(), [[-3.0, -1.0, 1.0, 3.0]])


def off(function: Callable[..., Any], by: float) -> Callable[..., Any]:
    """The function with a fault in all that it gives."""

    def wrong(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        if isinstance(result, torch.Tensor):
            return result + by
        return type(result)(*(None if x is None else x + by for x in result))

    return wrong


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("kernels.scaled_dot_product_attention", "fused"),
        ("kernels.layer_norm", "fused"),
        ("kernels.reference.scaled_dot_product_two_loop_single", "two loops"),
        ("kernels.reference.scaled_dot_product_no_loop_batch", "no loop"),
        ("kernels.reference.layer_norm_two_loop", "two loops"),
        ("kernels.reference.layer_norm_no_loop", "no loop"),
    ],
)
def test_a_function_that_is_wrong_shows(
    name: str, column: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    owner, function = name.rsplit(".", 1)
    module = kernels if owner == "kernels" else kernels.reference
    original = getattr(module, function)
    if "no_loop_batch" in name:
        monkeypatch.setattr(module, function, lambda *a: tuple(x + 1e-9 for x in original(*a)))
    else:
        monkeypatch.setattr(module, function, off(original, 1e-9))
    page = draw_page()
    kind = "norms" if "norm" in name else "attention"
    wrong = {check.name for check in page.checks if not check.agrees}
    assert wrong == {check.name for check in page.checks if kind in check.name}
    assert all((check.apart[column] > 1e-10) == (check.name in wrong) for check in page.checks)
    assert main(["explain"]) == 1 and "SOMETHING IS WRONG" in " ".join(capsys.readouterr().out.split())


def examples(page: Page) -> list[str]:
    """The numbers worked out, the losses in notes too."""
    notes = [note for step in page.steps for note in step.notes]
    losses = [f"loss = {loss}" for note in notes for loss in re.findall(r"(-ln\([^)]*\) = \S+)\.$", note)]
    return [text for step in page.steps for text in step.examples] + losses


def calculated(example: str) -> tuple[float, float, float]:
    """What a pocket calculator makes of the numbers printed, what stands behind them, and what rounding explains."""
    _, formula, result = example.split(" = ")
    formula = re.sub(r"\bln\(", "log(", formula.replace("^", "**"))
    names = {"e": math.e, "sqrt": math.sqrt, "sin": math.sin, "max": max, "log": math.log, "__builtins__": {}}
    ours, half = eval(formula, names), 0.5 * 0.1 ** len(result.partition(".")[2])
    for found in re.finditer(r"\d+\.(\d+)", formula):
        moved = float(found[0]) + 0.5 * 0.1 ** len(found[1])  # half a digit more
        half += abs(eval(f"{formula[: found.start()]}{moved}{formula[found.end() :]}", names) - ours)
    return ours, float(result), 1.01 * half


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(draw_page, id="drawn"),
        pytest.param(lambda: draw_page("one two three", "four", 6, 2, 5, 3, 2, 9), id="other sizes"),
        pytest.param(lambda: draw_page("die", "die", 2), id="one word"),
        pytest.param(tutorial_page, id="tutorial"),
        pytest.param(losses_page, id="losses"),
    ],
)
def test_a_pocket_calculator_gets_what_is_printed(page: Callable[[], Page]) -> None:
    found = examples(page())
    assert len(found) >= 7 and ('-> "' in page().title) == any(text.startswith("loss") for text in found)
    for example in found:
        ours, printed, rounding = calculated(example)
        assert abs(ours - printed) <= rounding, example
        assert rounding < 0.05 + 0.01 * abs(printed) or example.startswith(("norm[", "weights[")), example


def test_the_pocket_calculator_rejects_a_wrong_number() -> None:
    ours, printed, rounding = calculated("x[win, 0] = (-0.30) + 0.84 = 0.56")
    assert ours == pytest.approx(0.54) and abs(ours - printed) > rounding


def test_a_mask_shows_as_minus_infinity_and_weight_0() -> None:
    shown = matrices(draw_page(), "Decoder self-attention: weights")
    assert [[value == -math.inf for value in row] for row in shown["masked"]] == [
        [False, True, True],
        [False, False, True],
        [False, False, False],
    ]
    assert shown["weights"][0] == [1, 0, 0] and shown["weights"][1][2] == 0


# The tutorial.


def test_each_printed_result_of_the_tutorial_is_beside_ours() -> None:
    given, page = read_tutorial(), tutorial_page()
    assert len({word for s in given["corpus"] for word in re.findall(r"[a-z']+", s.lower())}) == 23
    assert "The tutorial counts 23." in page.steps[0].notes and "The 23 different words" in page.steps[0].text
    x = given["x"].tolist()
    shown = matrices(page, "Encoder self-attention: query, key, value")
    for name, key in ("Q", "query"), ("K", "key"), ("V", "value"):
        close(shown[name], times(x, given[f"w_{key}"].tolist()))
        if name != "V":
            assert (torch.tensor(shown[name]) - given[key]).abs().max() < 0.005001
    said = " ".join(note for step in page.steps for note in step.notes)
    assert "prints the same Q" in said and "prints the same K" in said and "prints another output" in said
    assert [said.count(f"SLIP {number}") for number in (1, 2, 3, 4)] == [1, 1, 1, 0]
    shown = matrices(page, "Encoder self-attention: output")
    assert shown["the tutorial's output"] == given["output_projection"].tolist()
    tried = {(i, j): value for i, row in enumerate(shown["apart, divided by"]) for j, value in enumerate(row)}
    assert min(tried, key=tried.__getitem__) == (1, 1)  # V = Q, sqrt(6)
    # Rounded to two digits before W_O and after it.
    assert tried[1, 1] < 0.005 * float(given["w_output"].sum(0).max()) + 0.005
    assert tried[0, 0] == pytest.approx(1.62, abs=0.005) and all(v > 0.1 for k, v in tried.items() if k != (1, 1))
    sums = plus(x, shown["output"])
    means = matrices(page, "Encoder self-attention: add and norm")["row means"]
    close([row[:1] for row in means], [[sum(row) / 6] for row in sums])
    close([row[1:] for row in means], [[sum(row) / 6] for row in plus(x, given["output_projection"].tolist())])
    assert page.agrees


def test_a_wrong_weight_of_the_tutorial_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    given = read_tutorial()
    given["w_query"][2, 3] += 0.02
    monkeypatch.setattr(tutorial_module, "read_tutorial", lambda: given)
    notes = [note for step in tutorial_page().steps for note in step.notes]
    assert "The tutorial prints another Q, up to 0.02 apart." in notes
    assert any(note.startswith("The tutorial prints the same K") for note in notes)


# A run.


@pytest.mark.parametrize("norm", ["post", "pre", "course"])
@pytest.mark.parametrize(
    "settings",
    [
        {"positions": "sinusoid", "activation": "gelu"},
        {"positions": "learned", "embeddings": "shared"},
        {"positions": "relative", "embeddings": "tied"},
        {"positions": "rotary"},
        {"positions": "none"},
        {"positions": "course"},
        {"positions": "simple"},
    ],
    ids=lambda settings: settings["positions"],
)
def test_any_model_by_hand_is_the_model(settings: dict[str, Any], norm: str) -> None:
    sizes = {"width": 12, "heads": 2, "hidden": 7, "encoder_layers": 3, "decoder_layers": 2, "dropout": 0.3}
    config = PRESETS["formula"].with_settings({**sizes, **settings, "norm": norm})
    task = config.data.build()
    model = config.model.build(task).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms and biases that do something
        source, target = torch.randint(14, (2, 6))
        expected = model(source[None], target[None, :4])[0]
    weights = weights_of(model, task.vocabulary.tokens, config.model)
    done, scores = work_out(weights, source.tolist(), target[:4].tolist())
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert all(check.agrees for check in done.checks)
    loops = {check.name: check.apart["two loops"] for check in done.checks}
    has_bias = settings["positions"] == "relative"
    assert [name for name, value in loops.items() if math.isnan(value)] == (
        ["Encoder self-attention", "Decoder self-attention"] if has_bias else []
    )
    wrong = replace(weights, prediction=Linear(weights.prediction.weight + 0.01, weights.prediction.bias))
    assert (work_out(wrong, source.tolist(), target[:4].tolist())[1] - expected).abs().max() > 1e-3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A barely trained run with 2 + 2 layers and 5 heads."""
    tiny = {"train_size": 50, "valid_size": 20, "width": 20, "heads": 5, "hidden": 8, "epochs": 1}
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.backend.INTERPRETED", False)
        train(PRESETS["formula"].with_settings({**tiny, "device": "cpu", "processes": 1}), folder, bar=False)
    return folder


def test_a_run_gives_its_own_answer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "-9-8", "--run", str(run)]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == str(Solver(run, "cpu").answers(["-9-8"])[0])
    page = run_page(run, "-9-8")
    assert page.checks[-1].name == "the run's own scores" and page.checks[-1].apart["fused"] < 1e-5
    titles = [step.title for step in page.steps]
    assert len(set(titles)) == len(titles) and "Encoder: the layers after the first" in titles
    weight = Solver(run, "cpu").model.encoder[0].attention.query_key_value.weight  # (3 * 20, 20)
    shown = torch.tensor(matrices(page, "Encoder self-attention: query, key, value")["W_K of head 1"])
    assert torch.equal(shown[:20], weight[20:24].T)
    assert "Of matrices with more than 12 columns" in text and " …" in text


def test_a_run_without_encoder_layers_gives_its_own_answer(tmp_path: Path) -> None:
    tiny = {"train_size": 20, "valid_size": 5, "width": 8, "hidden": 8, "encoder_layers": 0, "epochs": 1}
    config = PRESETS["formula"].with_settings({**tiny, "device": "cpu", "processes": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.backend.INTERPRETED", False)
        train(config, tmp_path / "run", bar=False)
    page = run_page(tmp_path / "run", "9-8")
    assert page.agrees and "0 + 2 layers of 4 heads" in page.intro[0]


# Two writers of the same steps.


class Reader(HTMLParser):
    """Reads a page: cells, headings, text, and whether every tag is closed."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.tags: Counter[str] = Counter()
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.names |= {name for name, _ in attrs}
        if tag == "td":
            self.cells.append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def read_html(page: Page) -> Reader:
    reader = Reader()
    reader.feed(write_html(page))
    reader.close()
    assert not reader.open
    return reader


PAGES = {
    "drawn": draw_page,
    "large": lambda: draw_page("the storm brings the storm " * 4, "storm", 18, 3, 20),
    "tutorial": tutorial_page,
    "losses": losses_page,
}


@pytest.mark.parametrize("name", PAGES)
def test_html_has_the_numbers_of_the_text(name: str) -> None:
    page = PAGES[name]()
    reader, text = read_html(page), write_text(page, 140)
    steps = all_steps(page).values()
    shown = [matrix.cut(MOST_COLUMNS, MOST_ROWS) for step in steps for line in step.matrices for matrix in line]
    cells = [cell for _, body in shown for row in body for cell in row[1:]]
    assert reader.cells == cells
    missing = Counter(cells) - Counter(text.split())
    assert not missing and len(cells) > 40
    for step in steps:
        for said in (step.title, step.text, step.formula, *step.examples, *step.notes, *page.intro, *page.closing):
            assert said in reader.text and " ".join(said.split()) in " ".join(text.split())
    assert reader.tags["section"] == reader.tags["h2"] == len(steps)
    is_cut = name == "large"
    assert ("the last are shown" in text) == ("the last are shown" in reader.text) == is_cut


def test_the_page_needs_nothing_else_and_takes_any_words() -> None:
    step = Step("<i>", "a & b", "x < 'y'", [[Matrix("<b>", [[0.5]], ['"q"'], ["</table>"])]], ["1 < 2"], ["&amp;"])
    page = replace(draw_page(), title='<script>alert("&")</script>', intro=["<p>"], steps=[step], closing=["</html>"])
    content, reader = write_html(page), read_html(page)
    for said in page.title, "<p>", "<i>", "a & b", "x < 'y'", '"q"', "</table>", "1 < 2", "&amp;", "</html>":
        assert said in reader.text
    assert not reader.tags["script"] and not reader.tags["i"] and not reader.tags["link"] and not reader.tags["img"]
    assert "src" not in reader.names and "://" not in content and "@import" not in content
    assert '<meta name="viewport"' in content


@pytest.mark.parametrize("columns", [60, 80, 110, 140])
def test_text_keeps_to_its_columns(columns: int) -> None:
    for page in draw_page(), PAGES["large"](), tutorial_page(), losses_page():
        text = write_text(page, columns)
        assert max(map(len, text.splitlines())) <= columns
        assert not re.search(r"\d-\d|\d\.\d+\.\d", "".join(re.findall(r"^   \S+ +[-\d. ]+$", text, re.MULTILINE)))


def test_what_comes_without_a_flag_is_short(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    assert main(["explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 215 and max(map(len, lines)) <= 110


def test_steps_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    pages = {}
    for flags in ["--steps", "4"], ["--steps", "3-5"], ["--steps", "21"], []:
        assert main(["explain", *flags]) == 0
        pages[" ".join(flags)] = capsys.readouterr().out
    headings = {flags: re.findall(r"^(\d+)\. ", text, re.MULTILINE) for flags, text in pages.items()}
    assert list(headings.values()) == [["4"], ["3", "4", "5"], ["21"], [str(n) for n in range(1, 22)]]
    step = pages["--steps 4"].split("\n\n")[1].strip()
    assert step.startswith("4. Encoder self-attention: weights") and step in pages[""]
    assert main(["explain", "--steps", "20-21", "--html", "page.html"]) == 0
    assert re.findall(r"<h2>(\d+)\.", Path("page.html").read_text()) == ["20", "21"]


def test_the_excerpt_in_the_readme_is_what_is_printed() -> None:
    (excerpt,) = re.findall(r"```\n\$ calcformer explain[^\n]*\n(.*?)```", README.read_text(), re.DOTALL)
    text = write_text(draw_page())
    parts = excerpt.split("...\n")
    assert len(parts) > 1 and all(part.strip("\n") in text for part in parts)


def test_the_largest_seed_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--seed", str(2**63 - 1)]) == 0
    with pytest.raises(SystemExit):
        main(["explain", "--seed", str(2**63)])
    assert f"must be a whole number, 0 to {2**63 - 1}, got '{2**63}'" in capsys.readouterr().err


def test_html_is_written_in_one_piece(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["explain", '<b>you & "I"</b>', "--html", "page.html", "--seed", "3", "--d-k", "2"]) == 0
    assert capsys.readouterr().out == "written to page.html\n"
    page = draw_page('<b>you & "I"</b>', seed=3, key_size=2)
    assert (tmp_path / "page.html").read_text() == write_html(page) and page.title.startswith(
        'A transformer by hand: "b'
    )
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


# Losses.


def test_losses_and_gradients_are_those_of_pytorch() -> None:
    page = losses_page()
    shown = matrices(page, "The losses")[""]
    z = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    p, y = z.softmax(0), torch.tensor([1.0, 0, 0], dtype=torch.float64)
    calls: dict[str, tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]] = {
        "cross-entropy": (z, lambda x: F.cross_entropy(x[None], torch.tensor([0]))),
        "NLL": (z.log_softmax(0), lambda x: F.nll_loss(x[None], torch.tensor([0]))),
        "BCE": (p, lambda x: F.binary_cross_entropy(x, y)),
        "BCE with logits": (z, lambda x: F.binary_cross_entropy_with_logits(x, y)),
        "MSE": (p, lambda x: F.mse_loss(x, y)),
        "L1": (p, lambda x: F.l1_loss(x, y)),
    }
    assert [loss.name for loss in LOSSES] == list(calls) and len(WORDS) == 3
    for row, (given, function) in zip(shown, calls.values(), strict=True):
        x = given.clone().requires_grad_()
        loss = function(x)
        (slope,) = torch.autograd.grad(loss, x)
        close([row], [[loss.item(), *slope.tolist()]])
    close([shown[0][:1]], [shown[1][:1]])  # NLL of log-softmax is cross-entropy
    e = math.e
    assert shown[0][0] == pytest.approx(math.log(1 + 1 / e + 1 / e**2)) and page.agrees


def test_a_wrong_loss_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [
        replace(loss, by_hand=lambda x, y: ((x - y) ** 2).sum()) if loss.name == "MSE" else loss for loss in LOSSES
    ]
    monkeypatch.setattr("calcformer.by_hand.losses.LOSSES", wrong)
    assert [check.name for check in losses_page().checks if not check.agrees] == ["MSE"]


def test_losses_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["explain", "--losses", "--picture", "losses.png"]) == 0
    told = capsys.readouterr()
    assert told.err == "drawn to losses.png\n" and "NLL of log-softmax is cross-entropy" in told.out
    assert is_picture(tmp_path / "losses.png")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([""], "the sentence must have a word of letters or digits, got ''"),
        (["?!"], "the sentence must have a word"),
        (["--answer", " "], "--answer must have a word"),
        (["word " * 65], "at most 64 words, got 65"),
        (["--width", "3", "--heads", "2"], "--width must be a multiple of --heads, got 3 and 2"),
        (["--width", "3", "--heads", "2", "--d-k", "2"], "--width must be a multiple"),
        (["--width", "0"], "--width: must be a whole number, 1 to 256, got '0'"),
        (["--hidden", "1000000"], "--hidden: must be a whole number, 1 to 1024"),
        (["--heads", "-1"], "--heads: must be a whole number"),
        (["--d-v", "x"], "--d-v: must be a whole number"),
        (["--tutorial", "you win"], "--tutorial has its own words"),
        (["--tutorial", "--d-k", "4"], "--d-k is for drawn weights"),
        (["--tutorial", "--losses"], "--tutorial and --losses are two pages"),
        (["--losses", "--answer", "x"], "--answer is for drawn weights"),
        (["--picture", "x.png"], "--picture is for --losses"),
        (["--losses", "--html", "x.html", "--picture", "no/x.png"], "no/x.png: there is no folder no"),
        (["--html", "/"], "/: Is a directory"),
        (["--steps", "22"], "--steps must be 1 to 21, which this page has, got 22"),
        (["--steps", "5-3"], "--steps: must be a number from 1, or two such as 3-6, got '5-3'"),
        (["--steps", "0"], "must be a number from 1"),
        (["--html", ""], "--html: must be the name of a file"),
        (["1+1", "--run", "nowhere"], "there is no run folder nowhere"),
        (["one plus one", "--run", "RUN"], "'o' at place 1"),
        (["--run", "RUN"], "--run needs a problem"),
        (["1+1", "--run", "RUN", "--seed", "1"], "--seed is for drawn weights"),
        (["1+1", "--run", "RUN", "--tutorial"], "--run and --tutorial are two pages"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    words: list[str], match: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run) if word == "RUN" else word for word in words]
    with pytest.raises(SystemExit) as caught:
        main(["explain", *words])
    told = capsys.readouterr()
    assert caught.value.code == 2 and match in told.err and told.err.count("\n") == 1 and not told.out
    assert list(tmp_path.iterdir()) == []

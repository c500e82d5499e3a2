"""What a trained run attends to, as pictures and as BertViz takes it."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from calcformer.attention_maps import attention_maps, folder_name, head_view, save_maps
from calcformer.cli import main
from calcformer.config import PRESETS
from calcformer.plots import save_heads
from calcformer.solver import Solver
from calcformer.training import train
from tests.pictures import cut_off, is_picture

QUESTIONS = {"formula": "-9-8", "expression": "NEGATIVE 30 subtract NEGATIVE 34"}
SOURCES = {"formula": ["-", "9", "-", "8", "<eos>"], "expression": "BOS NEGATIVE 3 0 subtract NEGATIVE 3 4 EOS".split()}

pytestmark = pytest.mark.usefixtures("as_on_a_cpu", "empty_folder")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A barely trained run of each task, with 3 encoder layers, 2 decoder layers and 5 heads."""
    tiny = {
        "train_size": 50,
        "valid_size": 20,
        "width": 10,
        "heads": 5,
        "hidden": 8,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "epochs": 1,
        "device": "cpu",
        "processes": 1,
    }
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.backend.INTERPRETED", False)
        for name in QUESTIONS:
            train(PRESETS[name].with_settings(tiny), folder / name, bar=False)
    return {name: folder / name for name in QUESTIONS}


@pytest.mark.parametrize("task", QUESTIONS)
def test_maps_are_of_the_answer_that_solve_gives(task: str, runs: dict[str, Path]) -> None:
    solver = Solver(runs[task], "cpu")
    maps = attention_maps(solver, QUESTIONS[task])
    assert maps.source == SOURCES[task]
    vocabulary = solver.task.vocabulary
    assert maps.target[0] == vocabulary.bos and maps.target[1:] == maps.said[:-1]
    assert [solver.task.decode_answer(vocabulary.encode(maps.said))] == solver.solve([QUESTIONS[task]])
    source, target = len(maps.source), len(maps.target)
    assert [layer.shape for layer in maps.encoder] == [(1, 5, source, source)] * 3
    assert [layer.shape for layer in maps.decoder] == [(1, 5, target, target)] * 2
    assert [layer.shape for layer in maps.cross] == [(1, 5, target, source)] * 2
    for layer in maps.encoder + maps.decoder + maps.cross:
        torch.testing.assert_close(layer.sum(dim=-1), torch.ones(layer.shape[:-1]))
    assert all(not layer.triu(1).any() for layer in maps.decoder)  # none looks ahead


def test_answer_without_an_end_is_as_long_as_the_task_allows(runs: dict[str, Path]) -> None:
    solver = Solver(runs["formula"], "cpu")
    with torch.no_grad():
        solver.model.prediction.bias[solver.task.vocabulary.eos_id] = -1e9
    maps = attention_maps(solver, "1+1")
    assert len(maps.said) == len(maps.target) == solver.task.target_length - 1


def test_arguments_of_bertviz(runs: dict[str, Path]) -> None:
    # The parameters of bertviz 1.4's head_view and model_view that encoder-decoder models need.
    def bertviz_head_view(
        *,
        encoder_attention: list[torch.Tensor],
        decoder_attention: list[torch.Tensor],
        cross_attention: list[torch.Tensor],
        encoder_tokens: list[str],
        decoder_tokens: list[str],
    ) -> None:
        for layers, queries, keys in (
            (encoder_attention, encoder_tokens, encoder_tokens),
            (decoder_attention, decoder_tokens, decoder_tokens),
            (cross_attention, decoder_tokens, encoder_tokens),
        ):
            stacked = torch.stack([layer.squeeze(0) for layer in layers])
            assert stacked.shape[2:] == (len(queries), len(keys)) and stacked.dtype == torch.float32

    arguments = head_view(runs["formula"], QUESTIONS["formula"], "cpu")
    assert arguments.keys() == inspect.signature(bertviz_head_view).parameters.keys()
    bertviz_head_view(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("task", QUESTIONS)
def test_pictures_of_every_layer(task: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    question = QUESTIONS[task]
    (answer,) = Solver(runs[task], "cpu").solve([question])
    assert main(["attention", question, "--run", str(runs[task]), "--device", "cpu"]) == 0
    folder = runs[task] / "attention" / folder_name(question)
    said = capsys.readouterr().out
    assert said.startswith(f"{question} = {answer}  (probability 0.") and said.count("\n") == 1
    assert said.endswith(f"): 7 pictures in {folder}, of {runs[task]}, epoch 1 of 1\n")
    assert {path.name for path in folder.iterdir()} == {
        *(f"encoder-self-{layer}.png" for layer in (1, 2, 3)),
        *(f"decoder-{kind}-{layer}.png" for kind in ("self", "cross") for layer in (1, 2)),
    }
    assert all(map(is_picture, folder.iterdir()))


def test_several_problems_and_another_folder(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calcformer.attention_maps.can_draw", lambda: True)
    monkeypatch.setattr("calcformer.attention_maps.save_heads", lambda *_: True)
    words = ["1+1", " - 2 + 0003", "--run", str(runs["formula"]), "--out", "maps", "--device", "cpu"]
    assert main(["attention", *words]) == 0
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["-2+3", "1+1"]


def test_file_for_bertviz(runs: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ["attention", "1+1", "--run", str(runs["formula"]), "--bertviz", "maps.json", "--device", "cpu"]
    assert main(words) == 0
    content = json.loads((tmp_path / "maps.json").read_text())
    expected = head_view(runs["formula"], "1+1", "cpu")
    assert content.keys() == expected.keys() and content["encoder_tokens"] == expected["encoder_tokens"]
    for written, layer in zip(content["cross_attention"], expected["cross_attention"]):
        torch.testing.assert_close(torch.tensor(written), layer)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["1+x"], "'x' at place 3"),
        (["1+1", "2+x"], "'x' at place 3"),
        (["1+1", "2+2", "--bertviz", "f.json"], "--bertviz takes one problem, got 2"),
        (["1+1", "--bertviz", "/"], "/: Is a directory"),
        ([], "required: PROBLEM"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    words: list[str], match: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["attention", *words, "--run", str(runs["formula"])])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and match in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_error_says_what_to_install(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calcformer.attention_maps.can_draw", lambda: False)
    maps = attention_maps(Solver(runs["formula"], "cpu"), "1+1")
    with pytest.raises(ValueError, match="pip install matplotlib"):
        save_maps(maps, tmp_path / "maps")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_pictures_of_many_heads_and_tokens_have_several_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    for heads, tokens in (8, 12), (8, 40), (1, 60):
        words = [str(token) for token in range(tokens)]
        weights = torch.full((heads, tokens, tokens), 1 / tokens).tolist()
        assert save_heads(weights, words, words, ("reads", "attends to"), "title", tmp_path / "heads.png")
        height, width, _ = imread(tmp_path / "heads.png").shape
        assert width < (2_100 if heads > 1 and tokens < 50 else 120 * (0.35 * tokens + 4)), (heads, tokens, width)


SENTENCE = (
    "A small dog sleeps in the garden today and a tall old man sings in the kitchen now . He is happy today .".split()
)
SHORT, LONG = ["jardin → aujourd'hui", "<bos> → Un"] * 5, [f"{word} → professeur" for word in SENTENCE]


@pytest.mark.parametrize(
    ("queries", "keys"),
    [(SHORT, SENTENCE[:10]), (SENTENCE[:10], SENTENCE[:10]), pytest.param(LONG, SENTENCE, marks=pytest.mark.slow)],
)
def test_words_and_title_of_a_sentence_are_whole(
    queries: list[str], keys: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    figures: list[Any] = []
    monkeypatch.setattr("calcformer.plots._save", lambda figure, path: figures.append(figure))
    weights = torch.full((4, len(queries), len(keys)), 1 / len(keys)).tolist()
    for words in SENTENCE[:4], SENTENCE * 2:
        title = f"{' '.join(words)} -> {' '.join(words)}\ndecoder cross attention, layer 1"
        assert save_heads(weights, queries, keys, ("token read → said", "attends to"), title, tmp_path / "heads.png")
    assert cut_off(figures[0]) == cut_off(figures[1]) == []
    assert figures[1].get_figheight() > figures[0].get_figheight()  # a longer title takes nothing from panels
    figures[1].set_layout_engine("none")
    figures[1].suptitle("sentence " * 50)
    figures[1].axes[0].set_ylabel("a label\nof many lines" * 20)
    assert {"title", "head 1"} <= set(cut_off(figures[1]))


def test_a_long_problem_has_a_folder_of_its_own(tmp_path: Path) -> None:
    names = [folder_name(f"{'日本語 ' * 50}{end}") for end in "ab"]
    assert len(set(names)) == 2 and names[0].startswith("日本語_日本語_") and folder_name("A dog, now.") == "A_dog_now_"
    for name in names:
        (tmp_path / name).mkdir()  # of at most 255 bytes


def test_tokens_that_look_like_formulas_are_drawn_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ["$$", "$\\nothing$", "$x^$", "\0"]
    weights = torch.full((1, 4, 4), 0.25).tolist()
    assert save_heads(weights, words, words, ("reads", "attends to"), "title", tmp_path / "heads.png")


def test_problem_answer_verdict_and_axes_stand_in_the_picture(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[tuple[str, str], str]] = []

    def note(weights: object, queries: object, keys: object, labels: tuple[str, str], title: str, path: Path) -> bool:
        drawn.append((labels, title))
        return True

    monkeypatch.setattr("calcformer.attention_maps.save_heads", note)
    monkeypatch.setattr("calcformer.attention_maps.can_draw", lambda: True)
    maps = attention_maps(Solver(runs["formula"], "cpu"), "-9-8")
    save_maps(maps, tmp_path)
    verdict = "right" if maps.answer.said == "-17" else "wrong, -17 is right"
    assert drawn[0] == (
        ("token", "attends to"),
        f"-9-8 = {maps.answer.said} ({verdict})\nencoder self attention, layer 1",
    )
    assert {labels for labels, _ in drawn[3:]} == {("token read → said", "attends to")}

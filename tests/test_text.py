"""Texts as a task: what is held out, tokens, windows, what is learned and said, and every wrong input."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calcformer.attention_maps import attention_maps, save_maps
from calcformer.cli import main
from calcformer.comparison import draw, make_table
from calcformer.config import PRESETS
from calcformer.errors import InputError
from calcformer.plots import visible
from calcformer.runs.newest import can_read, newest_run
from calcformer.settings import is_loss
from calcformer.solver import Solver
from calcformer.tasks.language.texts import DIGEST, MEASURED_BEFORE, TOKENIZER, NextToken, TextTask, cut
from calcformer.tasks.language.tokenizers import BytePairs, Characters, WordPieces, Words
from calcformer.tasks.text import Text
from calcformer.training import resume, train
from tests.pictures import is_picture

pytestmark = pytest.mark.usefixtures("as_on_a_cpu", "empty_folder")

PERIOD = "abcdefg"
TINY = "--width 16 --heads 2 --layers 1 --hidden 16 --train-size 40 --context 8 --processes 1 --device cpu".split()
FOX = "The quick brown fox didn't stop: it jumps over the lazy dog.\n"


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must fail and write nothing; returns its one line."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert sorted(Path().rglob("*")) == before
    return captured.err


@pytest.fixture
def text() -> Path:
    """A text of 700 characters whose next one is always known."""
    path = Path("text.txt")
    path.write_text(PERIOD * 100)
    return path


@pytest.fixture
def run(text: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A barely trained run on it."""
    assert main(["train", "text", "--data", str(text), "--epochs", "1", "--out", "run", *TINY]) == 0
    capsys.readouterr()
    return Path("run")


# What is held out


@pytest.mark.parametrize("length", [2, 7, 8, 9, 16, 17, 23])
def test_windows_have_each_token_but_the_first_once(length: int) -> None:
    context = 7
    ids = torch.arange(max(length, context + 1))
    windows = cut(ids, context, 1000)
    assert windows.ids.shape == windows.following.shape and windows.ids.shape[1] == context
    real = windows.following != MEASURED_BEFORE
    assert windows.following[real].tolist() == ids[1:].tolist()
    assert torch.equal(windows.ids[real] + 1, windows.following[real])
    assert len(cut(ids, context, 1)) == 1


def test_the_sides_are_apart_and_make_up_the_text(text: Path) -> None:
    text.write_text("".join(chr(0x100 + place) for place in range(500)))  # each character once
    task = Text(data=str(text), context=9, train_size=2_000).build()
    trained, held_out = task.split()
    both = [set(examples.ids.flatten().tolist()) for examples in (trained, held_out)]
    assert not both[0] & both[1] and len(both[1]) == 49  # the last token of a text is said and not read
    assert both[0] == set(range(449)) and max(trained.labels.flatten().tolist()) == 449
    assert torch.equal(held_out.labels[held_out.labels >= 0], torch.arange(451, 500))
    assert torch.equal(trained.labels, trained.ids + 1)


def test_windows_are_drawn_by_the_seed(text: Path) -> None:
    task = Text(data=str(text), context=9, train_size=50).build()
    first, again, other = (task.draw(torch.Generator().manual_seed(seed)).ids for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_folder_has_input_txt_or_all_texts_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text("second" * 20)
    with gzip.open(folder / "a.txt.gz", "wt") as file:
        file.write("first" * 20)
    (folder / "c.md").write_text("not this")
    assert Text(data=str(folder), context=4).build().raw == "first" * 20 + "\n" + "second" * 20
    (folder / "input.txt").write_text("\ufeffall there is\r\n" * 20, newline="")
    assert Text(data=str(folder), context=4).build().raw.startswith("all there is\n")


# Tokens


@pytest.mark.parametrize("kind", [Characters, Words])
def test_what_tokens_say_is_the_text(kind: Any) -> None:
    made = kind.of(FOX * 2)
    ids = made.encode(FOX)
    assert made.decode(ids) == FOX and len(made) == len(set(ids))
    assert made.from_json(made.to_json()).tokens == made.tokens
    with pytest.raises(InputError, match="is not in the text that this run learns"):
        made.encode("The quick #zebra")


def test_words_keep_signs_apart() -> None:
    assert Words.of("").split("If you don't fight, you can't win!") == [
        *("If", "you", "don't", "fight", ",", "you", "can't", "win", "!")
    ]


def test_words_keep_their_marks() -> None:
    """Vowels of Hindi, and accents that are signs of their own."""
    text = "\u0915\u094d\u092f\u093e \u0939\u0948 e\u0301t\u00e9 x"
    made = Words.of(text)
    assert len(made) == 4 and made.decode(made.encode(text)) == text


def vocabulary(path: Path, size: int = 30_522) -> Path:
    """A made-up vocabulary of word pieces."""
    known = "[PAD] [UNK] [CLS] [SEP] [MASK] if you win live lose die fight , ! ' t don can the ##m ##ing ##n e".split()
    letters = [f"{sign}{letter}" for sign in ("", "##") for letter in "abcdfghijklopqrsuvwxyz"]
    tokens = [*known, *letters]
    path.write_text("".join(f"{x}\n" for x in [*tokens, *(f"[unused{x}]" for x in range(size - len(tokens)))]))
    return path


def test_word_pieces_are_the_longest_first(tmp_path: Path) -> None:
    made = WordPieces.read(vocabulary(tmp_path / "vocab.txt"))
    assert len(made) == 30_522
    assert made.split("Winning, YOU can't \u00e9") == "win ##n ##ing , you can ' t e".split()
    assert made.split("win\u4e00!") == ["win", "[UNK]", "!"] and made.split("x" * 101) == ["[UNK]"]
    assert made.decode(made.encode("winning, you live!")) == "winning, you live!"
    # As the library `tokenizers` divides them: signs that are no punctuation stand within words, those of control not.
    assert made.words("5\u20ac_x\u00b0 \u201cca\u0301n\u201d\u00a0t\u200d\x07o \U00020000b $+~ \u0915\u093f\u0930") == [
        *("5\u20ac", "_", "x\u00b0", "\u201c", "can", "\u201d", "to", "\U00020000", "b"),
        *("$", "+", "~", "\u0915\u093f\u0930"),
    ]
    saved = tmp_path / "saved.txt"  # as an editor of Windows writes it
    saved.write_text((tmp_path / "vocab.txt").read_text(), encoding="utf-8-sig", newline="\r\n")
    assert WordPieces.read(saved).tokens == made.tokens and made.lower
    small = [str(number) for number in range(200)]
    assert WordPieces(["[UNK]", *small, "<EOS>"]).lower and not WordPieces(["[UNK]", *small, *"ABCDE"]).lower
    with pytest.raises(InputError, match="no vocabulary of word pieces"):
        WordPieces.read(Path(__file__))


def test_byte_pairs_are_learned_kept_and_say_any_text(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    text.write_text(FOX * 40)
    made = BytePairs.of(FOX * 40, 280)
    assert len(made) == 280 and made.decode(made.encode("Zebra \u00e9!")) == "Zebra \u00e9!"
    words = ["--tokenizer", "bpe", "--vocabulary-size", "270", "--epochs", "1", "--out", "run", *TINY]
    assert main(["train", "text", "--data", str(text), *words]) == 0
    assert main(["train", "--resume", "run"]) == 0
    kept = json.loads(Path("run", TOKENIZER).read_text())
    assert kept["model"]["type"] == "BPE" and len(Solver("run", "cpu").task.vocabulary) == 270
    capsys.readouterr()
    assert main(["generate", "run", "The quick", "--length", "5"]) == 0
    assert capsys.readouterr().out.startswith("The quick")


def test_without_the_library_byte_pairs_say_what_to_install(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    assert "needs the package tokenizers; pip install tokenizers" in fails(
        capsys, "train", "text", "--data", text, "--tokenizer", "bpe", *TINY
    )


# What is learned


def test_a_text_that_repeats_is_learned_to_its_floor_and_gone_on_with(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(text), "--epochs", "6", "--batch-size", "10", "--learning-rate", "0.02", "--out", "run"]
    assert main(["train", "text", *words, *TINY, "--train-size", "300"]) == 0
    said = capsys.readouterr()
    assert re.search(r"run: loss 0\.0\d{3}, perplexity 1\.0\d{3}, bits a character 0\.\d{4} on held-out", said.out)
    assert "300 fresh windows an epoch, 9 held out" in said.err and re.search("  [a-g]{50}", said.err)
    assert main(["evaluate", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 9 and found["perplexity"] == pytest.approx(math.exp(found["loss"])) and found["loss"] < 0.05
    assert found["bits_per_character"] == pytest.approx(found["loss"] / math.log(2))
    assert main(["generate", "run", "bcd", "--length", "21", "--temperature", "0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["texts"] == ["bcd" + "efgabcd" * 3] and told["temperature"] == 0
    options = ["--count", "2", "--seed", "3", "--top-k", "2", "--top-p", "0.9", "--length", "9"]
    assert main(["generate", "run", "a", *options]) == 0
    said = capsys.readouterr()
    assert said.out == "abcdefgabc\n---\nabcdefgabc\n" and "epoch 6 of 6, seed 3" in said.err
    assert main(["generate", "run", "--length", "3"]) == 0
    assert len(capsys.readouterr().out) == 4
    for words in ["run", *options, "a"], ["--count", "2", "run", *options[2:], "a"]:  # in any order
        assert main(["generate", *words]) == 0
        assert capsys.readouterr().out == said.out
    for command in ["info", "run"], ["runs", "."]:
        assert main(command) == 0
        assert re.search("text.*decoder-only|text +text +6/6 +loss 0.0", capsys.readouterr().out)


def test_a_text_is_told_of_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["train", "text", "--text", "a\nb" * 200, "--out", "run", *"--epochs 1 --tokenizer words".split(), *TINY])
        == 0
    )
    capsys.readouterr()
    assert main(["info", "run"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 6 and "... (600 characters), --tokenizer words" in said


def test_where_nothing_is_held_out_none_is_told_of(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "text", "--data", "text.txt", "--held-out", "0", "--epochs", "1", "--out", "run", *TINY]) == 0
    said = capsys.readouterr()
    assert "on the windows trained on" in said.out and "none held out" in said.err
    assert main(["evaluate", "run"]) == 0
    assert "88 windows trained on: loss" in capsys.readouterr().out


def test_of_several_tokenizers_the_best_is_that_of_fewest_bits_a_character() -> None:
    figures = {"bits_per_character": "bits a character", "valid_loss": "validation loss"}
    rows = [
        {"values": {"tokenizer": kind}, "mean": dict(zip(figures, found)), "spread": {}, "reported": {}, "runs": []}
        for kind, found in {"characters": (2.2, 1.5), "words": (1.9, 5.8)}.items()
    ]
    results = {"study": None, "vary": {"tokenizer": ["characters", "words"]}, "seeds": 1, "figures": figures}
    table = make_table(results | {"main": "valid_loss", "rows": rows})
    assert "- Best by bits a character: tokenizer words." in table and "Token accuracy" not in table
    assert is_loss("bits_per_character") and is_loss("bits a character") and not is_loss("valid_token_accuracy")


def test_kinds_of_model_without_a_setting_are_drawn_by_epoch() -> None:
    pytest.importorskip("matplotlib")
    rows: list[dict[str, Any]] = [
        {"values": values, "mean": {"valid_loss": 1.0}, "spread": {}, "reported": {}, "runs": []}
        for values in ({"model": "recurrent", "layers": 1}, {"model": "recurrent", "layers": 2}, {"model": "bag"})
    ]
    vary = {"model": ["recurrent", "bag"], "layers": [1, 2]}
    results = {"study": None, "vary": vary, "seeds": 1, "figures": {"valid_loss": "loss"}, "main": "valid_loss"}
    assert draw(results | {"rows": rows}, Path("sweep"), Path("sweep.png")) and Path("sweep.png").stat().st_size > 1_000


def test_a_model_that_learned_nothing_is_as_bad_as_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures are not always good: of seven letters that are equally likely, two bits and more."""
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 5 < found["perplexity"] < 8 and found["bits_per_character"] > 2.3


def test_figures_are_those_of_every_token_of_the_held_out_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    solver = Solver(run, "cpu")
    ids = solver.task.sides[1]
    losses = []
    for start in range(0, len(ids) - 1, 8):
        begin = min(start, len(ids) - 9)
        scores = solver.model(ids[None, begin : begin + 8])[0].detach().double().log_softmax(dim=1)
        losses += [-float(scores[x, ids[begin + x + 1]]) for x in range(start - begin, 8)]
    assert len(losses) == len(ids) - 1 and found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert main(["evaluate", str(run), "--json", "--problems", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 2


def test_ends_of_lines_are_those_of_the_text(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text.write_text("one\r\ntwo\r\n" * 100, newline="")
    assert main(["train", "text", "--data", str(text), "--epochs", "1", "--out", "run", *TINY]) == 0
    assert Solver("run", "cpu").task.beginning("one\r\n") == Solver("run", "cpu").task.beginning("one\n")
    assert "\r" not in Text(text="a\r\n" * 300, context=8).build().raw
    old = Path("run", "config.json")
    old.write_text(old.read_text().replace('"task": "text",', '"task": "text", "data_seed": 0,'))
    assert main(["evaluate", "run"]) == 0  # of a version that had this setting
    capsys.readouterr()


def test_a_resumed_run_has_the_weights_it_would_have_had(run: Path, text: Path) -> None:
    changes = {"epochs": 1, "schedule": "constant", "warmup_steps": 0, "processes": 1, "dropout": 0.1}
    short = Solver(run, "cpu").config.with_settings(changes)
    config = short.with_settings({"epochs": 3})
    train(config, "whole", bar=False)
    train(short, "cut", bar=False)
    Path("cut", "config.json").write_text(config.to_json())  # as if killed after the first epoch
    text.rename("elsewhere.txt")
    with pytest.raises(InputError, match="there is no text text.txt"):
        resume("cut", bar=False)
    Path("elsewhere.txt").rename(text)
    resume("cut", bar=False)
    assert Path("cut", "model.safetensors").read_bytes() == Path("whole", "model.safetensors").read_bytes()


def test_two_processes_learn_what_one_does(text: Path) -> None:
    from calcformer.runs.device import count_cores

    if count_cores() < 2:
        pytest.skip("needs two cores")
    losses = []
    for processes in "1", "2":
        words = ["--data", str(text), "--epochs", "1", "--out", processes, *TINY, "--processes", processes]
        assert main(["train", "text", *words]) == 0
        losses.append(json.loads(Path(processes, "metrics.jsonl").read_text().splitlines()[-1])["valid_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_sentence_of_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = vocabulary(tmp_path / "vocab.txt")
    options = ["--processes", "1", "--device", "cpu"]
    assert main(["train", "--preset", "sentence-words", "--out", "words", *options]) == 0
    assert "the report" not in capsys.readouterr().out
    pieces = ["--vocabulary", str(path), "--epochs", "2", "--out", "pieces", *options]
    assert main(["train", "--preset", "sentence-report", *pieces]) == 0
    assert "(the report: loss 6.0900)" in capsys.readouterr().out
    log = [json.loads(line) for line in Path("pieces", "metrics.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(10.3, abs=0.3) and log[1]["loss"] < log[0]["loss"]
    path.unlink()  # the run has the tokens
    assert main(["train", "--resume", "pieces"]) == 0
    capsys.readouterr()
    assert main(["generate", "pieces", "you win", "--length", "4"]) == 0
    assert capsys.readouterr().out.startswith("you win")
    assert "'zebra' is not in the text that this run learns" in fails(capsys, "generate", "words", "zebra")
    assert "has words with no token in the vocabulary" in fails(capsys, "generate", "pieces", "you \u4e00")
    greek = [
        "--tokenizer",
        "word-piece",
        "--vocabulary",
        vocabulary(path),
        "--text",
        "\u03b1 win " * 30 + "\u03b3 " * 20,
    ]
    said = fails(capsys, "train", "text", *greek, "--context", "4")
    assert "vocab.txt has no pieces for 50 of the 80 tokens of --text; give --vocabulary a file for its" in said


def test_the_large_preset_is_the_model_it_says() -> None:
    config = PRESETS["shakespeare-gpu"].with_settings({"text": "".join(map(chr, range(65, 130))) * 90})
    with torch.device("meta"):
        model = config.model.build(TextTask(config.data))
    count = sum(parameter.numel() for parameter in model.parameters()) - 384 * 256  # of positions
    assert count == pytest.approx(10.65e6, rel=0.005)
    steps = config.training.epochs * config.data.train_size // config.training.batch_size
    assert (steps, config.data.context, config.model.dropout) == (5_000, 256, 0.2)


def test_solve_says_the_next_token(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solver = Solver(run, "cpu")
    for text in "abc", "e", PERIOD * 3:  # the last is longer than a window
        ids = torch.tensor([solver.task.vocabulary.encode(text)[-8:]])
        chances = solver.model(ids)[0, -1].softmax(0)
        (answer,) = solver.answers([text])
        assert answer.said == PERIOD[int(chances.argmax())] and answer.is_right is None
        assert answer.probability == pytest.approx(chances.max().item(), abs=1e-6)
    assert main(["solve", "--run", str(run), "e", "a"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("e -> ") and second.startswith("a -> ") and second.endswith(")")
    assert NextToken("a\n", " ", 0.5, None).equation == "'a\\n' -> ' '"


def test_a_text_may_begin_with_a_minus_sign(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text.write_text("-1 - a\n" * 60)
    assert main(["train", "text", "--data", "text.txt", "--epochs", "1", "--out", "run", *TINY]) == 0
    capsys.readouterr()
    for words in "-1", "- a", "-1 - a":
        assert main(["generate", "run", words, "--length", "1"]) == 0
        assert capsys.readouterr().out.startswith(words)
        assert main(["solve", "--run", "run", words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["answers"][0]["asked"] == words


def test_solve_and_attention_need_no_text(run: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    text.unlink()
    shutil.copytree(run, "runs/text-1")
    assert newest_run(["abc"]) == Path("runs/text-1")
    config = Solver(Path("runs/text-1"), "cpu").config
    assert can_read(Path("runs/text-1"), config, ["abc"]) and not can_read(Path("runs/text-1"), config, ["x"])
    assert main(["attention", "abca", "--bertviz", "view.json"]) == 0
    assert capsys.readouterr().out.endswith("1 pictures in runs/text-1/attention/abca, of runs/text-1, epoch 1 of 1\n")
    view = json.loads(Path("view.json").read_text())
    assert view["tokens"] == list("abca") and torch.tensor(view["attention"]).shape == (1, 1, 2, 4, 4)
    assert all(x == 0 for head in view["attention"][0][0] for x in head[0][1:])  # the first sees itself alone
    assert is_picture(Path("runs/text-1/attention/abca/decoder-self-1.png"))
    solver = Solver("runs/text-1", "cpu")
    maps = attention_maps(solver, "abca")
    assert maps.said[-1] == maps.answer.said and len(maps.said) == 4
    assert maps.said[:2] == [attention_maps(solver, "abca"[:end]).answer.said for end in (1, 2)]
    assert [visible(token) for token in (" ", "\n", "a\n", "  ", "a b")] == [
        "\u2423",
        "\u21b5",
        "a\u21b5",
        "\u2423" * 2,
        "a b",
    ]
    long = replace(maps, target=["a"] * 201)
    with pytest.raises(InputError, match="pictures show at most 200 tokens, got 201; give a shorter text"):
        save_maps(long, Path("long"))
    assert not Path("long").exists()


# What is asked of the wrong run


def test_a_problem_goes_to_a_language_model_last(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs").mkdir()
    shutil.copytree(run, "runs/text-1")
    assert "'1' is not in the text that this run learns" in fails(capsys, "solve", "1+1")
    tiny = {"train_size": 40, "valid_size": 20, "epochs": 1, "width": 8, "hidden": 8, "processes": 1, "device": "cpu"}
    train(PRESETS["formula"].with_settings(tiny), "runs/formula-1", bar=False)
    os.utime("runs/formula-1/model.safetensors", (0, 0))  # the older one
    capsys.readouterr()
    for questions, asked in (["1+1"], "formula-1"), (["a"], "text-1"), ([], "formula-1"):
        assert newest_run(questions) == Path("runs") / asked
    config = Path("runs/text-1/config.json")
    config.write_text(config.read_text().replace("text.txt", "x" * 5_000))  # a text that the system cannot read
    assert newest_run(["nothing that is known"]) == Path("runs/formula-1")
    assert "answers problems and goes on with no text" in fails(capsys, "generate", "runs/formula-1", "1+1")
    assert "is for problems that are numbered, which windows are not" in fails(capsys, "evaluate", run, "--exhaustive")
    assert "text is measured without answers" in fails(capsys, "evaluate", run, "--beam", "2")


# Bad input

BAD = {
    "no text": ([], "there is no text to learn; give --data FILE or FOLDER"),
    "no file": (["--data", "none.txt"], "there is no text none.txt; give --data FILE or FOLDER"),
    "empty folder": (["--data", "folder"], "folder has no text in it"),
    "empty": (["--data", "empty.txt"], "empty.txt is empty"),
    "not UTF-8": (["--data", "latin.txt"], r"latin.txt is no text in UTF-8 \(byte 4 is 0xe9\)"),
    "not gzip": (["--data", "plain.gz"], "plain.gz is no gzip file"),
    "one line": (["--data", "line.txt"], "line.txt has 12 tokens to train on and a window, .* has 129"),
    "long context": (["--data", "text.txt", "--context", "600"], "text.txt has 70 tokens held out .* has 601"),
    "context too long for memory as well": (
        ["--data", "text.txt", "--context", "60000", "--batch-size", "1000000"],
        "text.txt has 630 tokens to train on .* has 60001",
    ),
    "no file but a device": (["--data", "/dev/zero"], "/dev/zero is no file on a disk"),
    "text not UTF-8": (["--text", "caf\udce9 " * 300], "--text has bytes that are no UTF-8"),
    "a vocabulary of another kind": (
        ["--data", "text.txt", "--tokenizer", "word-piece", "--vocabulary", "text.txt"],
        "text.txt is no vocabulary of word pieces",
    ),
    "no vocabulary": (
        ["--data", "text.txt", "--tokenizer", "word-piece", "--vocabulary", "none"],
        "there is no vocabulary none",
    ),
    "vocabulary not named": (["--data", "text.txt", "--tokenizer", "word-piece"], "needs --vocabulary FILE"),
    "vocabulary for nothing": (["--data", "text.txt", "--vocabulary", "text.txt"], "is for --tokenizer word-piece"),
    "another model": (["--data", "text.txt", "--encoder-layers", "1"], "is a setting of encoder-decoder"),
    "heads": (["--data", "text.txt", "--width", "10"], "width must be a multiple of heads"),
    "key heads": (["--data", "text.txt", "--key-heads", "3"], "heads must be a multiple of key_heads, got 4 and 3"),
    "a seed of nothing": (["--data", "text.txt", "--data-seed", "1"], "data_seed is a setting of formula"),
    "odd heads": (["--data", "text.txt", "--head-size", "5"], "rotary positions need an even head size, got 5"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_gets_a_line_and_nothing_is_written(
    name: str, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("folder").mkdir()
    Path("empty.txt").write_text(" \n")
    Path("latin.txt").write_bytes("caf\u00e9 cr\u00e8me".encode("latin-1").replace(b"caf", b"caf ", 1))
    Path("plain.gz").write_text("plain")
    Path("line.txt").write_text("to be or not\n")
    words, match = BAD[name]
    assert re.search(match, fails(capsys, "train", "text", *words))


def test_wrong_words_of_generate(
    run: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calcformer.sampling.free_memory", lambda device: 10**9)
    for words, match in (
        (["xyz"], "'x' is not in the text that this run learns; leave it out of 'xyz'"),
        ([""], "'' has no token; begin with another text, or none"),
        (["a\udce9"], "'a\\udce9' has bytes that are no UTF-8; begin with another text, or none"),
        (["--length", "10000", "--count", "10000"], "10000 texts of 10001 tokens would take about 1.7 GB of memory"),
        (["--temperature", "-1"], "must be a number, 0 to 1000, got '-1'"),
        (["--top-p", "2"], "must be a number, 0 to 1, got '2'"),
        (["--length", "0"], "must be a whole number, 1 to"),
    ):
        assert match in fails(capsys, "generate", run, *words), words
    assert "there is no run folder nowhere" in fails(capsys, "generate", "nowhere")
    Path(run, TOKENIZER).write_text("[]")
    assert "tokenizer.json is damaged" in fails(capsys, "generate", run)


def test_a_text_that_is_gone_or_another_is_named(run: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text.write_text("xyz" * 300)
    for words in ["evaluate", run], ["train", "--resume", run]:
        assert "text.txt is not the text that run learned; put that one back" in fails(capsys, *words)
    text.write_text(PERIOD[::-1] * 100)  # of the same characters
    assert "text.txt is not the text that run learned" in fails(capsys, "evaluate", run)
    Path(run, DIGEST).unlink()  # as of a run of an older version
    assert main(["evaluate", str(run)]) == 0
    capsys.readouterr()
    text.unlink()
    for words in ["evaluate", run], ["train", "--resume", run]:
        assert "there is no text text.txt; give --data FILE or FOLDER, or put it back" in fails(capsys, *words)
    assert main(["generate", str(run), "abc", "--length", "2"]) == 0  # which needs its tokens alone
    assert len(capsys.readouterr().out) == 6

"""Sweeps: grids and studies, runs side by side, and what is made of them."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import calcformer
from calcformer import sweep as sweeps
from calcformer.cli import main
from calcformer.comparison import draw, label_figures, make_table
from calcformer.config import PRESETS
from calcformer.errors import InputError
from calcformer.plots import Line, save_panels
from calcformer.pool import Worker, run_jobs
from calcformer.runs.checkpoint import load_run
from calcformer.studies import STUDIES, Sweep, parse_vary
from calcformer.sweep import read_sweep, run_sweep
from tests.pictures import is_picture

TINY: dict[str, Any] = {
    "train_size": 50,
    "valid_size": 20,
    "width": 8,
    "heads": 2,
    "hidden": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "epochs": 2,
    "batch_size": 25,
    "device": "cpu",
}

pytestmark = pytest.mark.usefixtures("as_on_a_cpu", "empty_folder")


def flags(**settings: Any) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(autouse=True)
def workers_find_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(calcformer.__file__).parents[1]))


def without_times(content: Any) -> Any:
    """Results without what differs from run to run."""
    if isinstance(content, dict):
        return {name: without_times(value) for name, value in content.items() if name != "seconds"}
    return [without_times(value) for value in content] if isinstance(content, list) else content


def tiny_sweep(vary: dict[str, list[Any]]) -> Sweep:
    """Two seeds of formulas of one digit."""
    settings = {name: value for name, value in TINY.items() if name not in vary}
    return Sweep.of({**settings, "complexity": 1}, vary, 2, "formula")


def changed(**values: Any) -> str:
    """A sweep's file with something else in it."""
    return json.dumps({**json.loads(Sweep.of({}, {}).to_json()), **values})


# Grids


def test_values_as_typed() -> None:
    words = ["learning-rate=1e-2,1e-3", "norm=pre,post", "truncate=true,false", "heads=1,2", "device=cpu"]
    assert parse_vary(words, PRESETS["formula"]) == {
        "learning_rate": [0.01, 0.001],
        "norm": ["pre", "post"],
        "truncate": [True, False],
        "heads": [1, 2],
        "device": ["cpu"],
    }


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["learning-rate"], "not of the form SETTING=VALUE"),
        (["wings=2"], "no setting 'wings'"),
        (["heads=two"], "heads must be of type int, got 'two'"),
        (["heads="], "not of the form"),
        (["truncate=yes"], "truncate must be true or false, got 'yes'"),
        (["heads=1", "heads=2"], "heads stands twice"),
    ],
)
def test_wrong_values_are_one_line(words: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        parse_vary(words, PRESETS["formula"])
    assert "\n" not in str(caught.value)


def test_members_are_the_grid_times_the_seeds() -> None:
    sweep = Sweep.of({"seed": 3, "epochs": 7}, {"norm": ["pre", "post"], "learning_rate": [0.5]}, seeds=2)
    members = sweep.members()
    assert [member.name for member in members] == [
        f"norm={norm},learning-rate=0.5,seed={seed}" for norm in ("pre", "post") for seed in (3, 4)
    ]
    assert members[3].values == {"norm": "post", "learning_rate": 0.5}
    config = members[3].config
    assert (config.model.norm, config.training.learning_rate, config.training.seed) == ("post", 0.5, 4)
    assert (config.training.epochs, config.training.processes) == (7, 1)
    assert [member.name for member in Sweep.of({}, {}).members()] == ["run"]


def test_sweep_survives_its_file(tmp_path: Path) -> None:
    sweep = Sweep.of(TINY, {"learning_rate": [1e-9], "truncate": [True, False]}, 3, "formula-report")
    (tmp_path / "sweep.json").write_text(sweep.to_json())
    assert read_sweep(tmp_path) == sweep


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "not a sweep folder"),
        ("{", "cannot be used"),
        ("[]", "cannot be used"),
        ('{"format": 2}', "not of format 1"),
        ('{"format": 1, "base": {"format": 1, "data": 3}}', "data must hold"),
        ("[" * 100_000, "cannot be used"),
        (changed(seeds=1.5), "seeds must be 1 to 1000, got 1.5"),
        (changed(seeds=10**9), "seeds must be 1 to 1000"),
        (changed(study="nope"), "there is no study 'nope'"),
        (changed(study=5), "there is no study 5"),
        (changed(vary={"heads": 3}), "'heads' cannot be varied over 3"),
        (changed(vary={"wings": [3]}), "'wings' cannot be varied"),
        (changed(cases={"large": {"wings": 3}}), "case 'large' cannot have the settings"),
        (changed(cases={"large": 3}), "case 'large' cannot have the settings 3"),
        (changed(cases=[3]), "cannot be used"),
    ],
)
def test_damaged_sweeps_are_one_line(text: str | None, match: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(InputError, match=match) as caught:
        read_sweep(tmp_path)
    assert "\n" not in str(caught.value)


def test_studies_are_the_reports() -> None:
    members = Sweep.of({}, {}, study="s0-learning-rate").members()
    assert [member.config.training.learning_rate for member in members] == [10.0**-power for power in range(2, 10)]
    config, model = members[1].config, members[1].config.model
    assert (model.encoder_layers, model.decoder_layers, model.heads) == (4, 4, 4)
    assert (model.width, model.hidden, model.dropout, model.norm) == (32, 32, 0.2, "course")
    assert (config.training.batch_size, config.training.epochs, config.training.schedule) == (256, 10, "constant")
    train, valid = config.data.build().split()
    assert (len(train), len(valid)) == (4_000, 1_000)
    reported = STUDIES["s0-learning-rate"].reported
    assert reported[1] == ({"learning_rate": 1e-3}, {"loss": 0.0228, "valid_loss": 0.0088, "valid_token_accuracy": 1.0})
    overfit = Sweep.of({}, {}, study="s0-overfit").members()[0].config
    assert len(overfit.data.build().split()[0]) == overfit.training.batch_size == 4
    formula = Sweep.of({}, {}, study="s1-positions").members()
    assert [member.config.model.positions for member in formula] == ["sinusoid", "none"]
    assert formula[0].config.data.truncate and formula[0].config.training.learning_rate == 1e-3


def test_study_can_be_changed() -> None:
    sweep = Sweep.of({"epochs": 1}, {"learning_rate": [1e-3], "norm": ["pre", "post"]}, study="s0-learning-rate")
    assert [member.values for member in sweep.members()] == [
        {"learning_rate": 1e-3, "norm": "pre"},
        {"learning_rate": 1e-3, "norm": "post"},
    ]
    assert Sweep.of({}, {"epochs": [1, 2]}, study="s0-overfit").members()[1].config.training.epochs == 2


def test_the_translation_report_has_four_settings() -> None:
    members = Sweep.of({}, {}, study="s3").members()
    found = []
    for member in members:
        model, training = member.config.model, member.config.training
        assert (training.batch_size, training.epochs, training.schedule, training.warmup_steps) == (
            16,
            10,
            "constant",
            0,
        )
        assert (model.norm, model.positions, model.hidden) == ("post", "sinusoid", 4 * model.width)
        assert model.encoder_layers == model.decoder_layers
        found.append((model.encoder_layers, model.heads, model.width, model.dropout))
    assert found == [(2, 8, 512, 0.1), (4, 8, 512, 0.2), (4, 12, 768, 0.2), (6, 12, 768, 0.1)]
    assert members[3].name == "case=6-wide-layers" and members[3].values == {"case": "6-wide-layers"}
    best = {"token_accuracy": 0.901, "valid_loss": 2.08, "valid_token_accuracy": 0.740, "bleu": 38.54}
    assert STUDIES["s3"].reported[2] == ({"case": "4-wide-layers"}, best)


def test_cases_can_be_chosen_and_changed(tmp_path: Path) -> None:
    settings = {"width": 24, "hidden": 8, "epochs": 1, "data": "corpus"}
    vary = {"case": ["6-wide-layers", "2-layers"], "norm": ["post", "pre"]}
    sweep = Sweep.of(settings, vary, 2, study="s3")
    members = sweep.members()
    assert [member.name for member in members[:3]] == [
        "case=6-wide-layers,norm=post,seed=0",
        "case=6-wide-layers,norm=post,seed=1",
        "case=6-wide-layers,norm=pre,seed=0",
    ]
    assert members[4].values == {"case": "2-layers", "norm": "post"}
    models = [member.config.model for member in (members[0], members[-1])]
    assert [(model.encoder_layers, model.heads, model.width, model.hidden) for model in models] == [
        (6, 12, 24, 8),
        (2, 8, 24, 8),
    ]
    assert sweep.cases["2-layers"] == {"encoder_layers": 2, "decoder_layers": 2, "heads": 8, "dropout": 0.1}
    (tmp_path / "sweep.json").write_text(sweep.to_json())
    assert read_sweep(tmp_path) == sweep and read_sweep(tmp_path).members() == members
    by_depth = Sweep.of({}, {"encoder_layers": [1, 3]}, study="s3").members()  # what is varied is not the case's
    assert [member.config.model.encoder_layers for member in by_depth] == 4 * [1, 3]


def test_expressions_of_the_report_can_be_asked() -> None:
    task = PRESETS["expression-report"].data.build()
    assert task.read_question("BOS POSITIVE 04 add NEGATIVE 11 EOS") == (4, -11, True)
    ids = task.write(torch.tensor([4]), torch.tensor([-11]), torch.tensor([True])).source[0].tolist()
    assert " ".join(task.vocabulary.decode(ids)) == "BOS POSITIVE 0 4 add NEGATIVE 1 1 EOS"


def test_sweeps_that_are_too_large_are_refused() -> None:
    many = [f"0.{number:04}" for number in range(1, 102)]
    with pytest.raises(InputError, match="at most 10000 runs, this one 10100"):
        Sweep.of({}, parse_vary([f"learning-rate={','.join(many)}"], PRESETS["formula"]), 100)
    config = PRESETS["formula"]
    vary = {
        name: [value]
        for section in (config.data, config.model, config.training)
        for name, value in vars(section).items()
        if type(value) is int
    }
    with pytest.raises(InputError, match="cannot be the name of a folder; vary fewer settings at once"):
        Sweep.of({}, vary, preset="formula").members()


def test_warm_up_that_was_asked_for_is_not_cut() -> None:
    assert Sweep.of({}, {"epochs": [1, 30]}, preset="formula").members()[0].config.training.warmup_steps == 8
    with pytest.raises(InputError, match="warmup_steps must be at most the 80 steps of the whole run, got 90"):
        Sweep.of({"warmup_steps": 90}, {"epochs": [1, 30]}, preset="formula").members()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--vary", "heads=3"], "width 64 and 3 heads"),
        (["--vary", "heads=2,2"], "heads names a value twice"),
        (["--vary", "heads=2", "--heads", "4"], "heads is varied; leave out --heads"),
        (["--seeds", "0"], "must be a whole number, 1 to 1000, got '0'"),
        (["--seeds", "2", "--vary", "seed=1,2"], "leave it out or --vary seed"),
        (["--jobs", "-1"], "must be a whole number, 0 to 1024, got '-1'"),
        (["--jobs", "1000"], "CPU cores busy and there are"),
        (["--resume", ""], "must be the name of a file or folder"),
        (["--vary", "width=1000000000"], "width must be 1 to 16384, got 1000000000"),
        (["--study", "s9"], "invalid choice: 's9'"),
        (["--study", "s1-positions", "--preset", "formula"], "leave out --preset"),
        (["--study", "s3", "--vary", "case=2-layers,9-layers"], "no case '9-layers' of s3 (2-layers, 4-layers, "),
        (["--vary", "case=2-layers"], "no case '2-layers' of a sweep (none)"),
        (["--vary", "device=cpu,cuda:99"], "cuda:99 is not here"),
        (["--resume", "nowhere"], "not a sweep folder"),
        (["--resume", "nowhere", "--epochs", "2"], "leave out --epochs"),
        (["--resume", "nowhere", "--vary", "heads=2"], "leave out --vary"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_writes_nothing(
    words: list[str], match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["sweep", *words])
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert match in captured.err
    assert list(tmp_path.iterdir()) == []


# Runs


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A sweep of three sizes of the held-out set, one of them too large, and two seeds."""
    folder = tmp_path_factory.mktemp("sweeps") / "sizes"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("PYTHONPATH", str(Path(calcformer.__file__).parents[1]))
        run_sweep(tiny_sweep({"valid_size": [900, 20, 30]}), folder, 2, bar=False)
    yield folder


@pytest.mark.long
def test_failed_member_does_not_stop_the_others(swept: Path) -> None:
    results = json.loads((swept / "results.json").read_text())
    failed, *rows = results["rows"]
    assert failed["mean"] == {} and all("cannot be held out" in run["failed"] for run in failed["runs"])
    for row in rows:
        first, second = (run["figures"] for run in row["runs"])
        assert row["mean"]["loss"] == pytest.approx((first["loss"] + second["loss"]) / 2)
        assert row["spread"]["loss"] == pytest.approx(abs(first["loss"] - second["loss"]) / 2**0.5)
        assert 0 <= row["mean"]["exact_match"] <= 1 and row["mean"]["seconds"] > 0
    table = (swept / "table.md").read_text()
    assert table == make_table(results)
    lines = table.splitlines()
    assert "| valid size | training loss | validation loss | token accuracy |" in " ".join(lines[0].split())
    assert len(set(map(len, lines[:5]))) == 1 and "failed" in lines[2] and max(map(len, lines[:11])) <= 80
    assert lines[6].startswith("| valid size |") and sum(lines[row].count(" ± ") for row in (3, 9)) == 5
    assert "valid-size=900,seed=1 failed: complexity 1 has 462 formulas" in table
    assert is_picture(swept / "sweep.png")


def test_members_are_runs(swept: Path) -> None:
    config, _, _, epoch = load_run(swept / "valid-size=20,seed=1")
    assert epoch == 2 and config.training.seed == 1 and config.preset == "formula"


@pytest.mark.slow
def test_finished_members_are_not_run_again(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {path: path.stat().st_mtime_ns for path in swept.glob("valid-size=*/model.safetensors")}
    before = json.loads((swept / "results.json").read_text())
    assert len(weights) == 4 and main(["sweep", "--resume", str(swept)]) == 0
    assert {path: path.stat().st_mtime_ns for path in weights} == weights
    assert json.loads((swept / "results.json").read_text()) == before
    assert make_table(before) in capsys.readouterr().out


def test_folders_in_use_are_refused(swept: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds another sweep.*--resume"):
        run_sweep(tiny_sweep({"learning_rate": [1e-2]}), swept)
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="already exists; give --out another name"):
        run_sweep(Sweep.of(TINY, {}), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_nothing_finished_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run").write_text("in the way")
    sweep = Sweep.of(TINY, {})
    (tmp_path / "out" / "sweep.json").write_text(sweep.to_json())
    with pytest.raises(InputError, match="no run of .* could be finished; the first one: .*run already exists"):
        run_sweep(sweep, tmp_path / "out", jobs=1, bar=True)
    assert "run: " in capsys.readouterr().err


@pytest.mark.long
def test_member_that_cannot_be_continued_is_kept(tmp_path: Path) -> None:
    sweep = tiny_sweep({})
    run_sweep(sweep, tmp_path / "out", jobs=1, bar=False)
    weights = tmp_path / "out" / "seed=0" / "model.safetensors"
    before = weights.read_bytes()
    weights.with_name("resume.safetensors").write_bytes(b"")
    log = weights.with_name("metrics.jsonl")
    figures = json.loads((tmp_path / "out" / "results.json").read_text())["rows"][0]["runs"][0]["figures"]
    for content, kept in (log.read_bytes(), figures), (b"", {"seconds": 0}):  # finished: it keeps what can be had
        log.write_bytes(content)
        (row,) = run_sweep(sweep, tmp_path / "out", jobs=1, bar=False)["rows"]
        assert weights.read_bytes() == before and row["runs"][0]["figures"] == kept
    weights.unlink()
    results = run_sweep(sweep, tmp_path / "out", jobs=1, bar=False)
    assert "resume.safetensors is damaged" in results["rows"][0]["runs"][0]["failed"]


@pytest.mark.long
def test_member_whose_log_or_weights_are_lost_is_mended(tmp_path: Path) -> None:
    sweep = tiny_sweep({})
    run_sweep(sweep, tmp_path / "out", jobs=1, bar=False)
    before = json.loads((tmp_path / "out" / "results.json").read_text())["rows"][0]["mean"]
    (tmp_path / "out" / "seed=0" / "metrics.jsonl").write_bytes(b"")
    (tmp_path / "out" / "seed=1" / "model.safetensors").write_bytes(b"")
    (row,) = run_sweep(sweep, tmp_path / "out", jobs=1, bar=False)["rows"]
    assert row["mean"]["exact_match"] == before["exact_match"] and row["mean"]["valid_loss"] == before["valid_loss"]


def test_the_best_row_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(heads: int, exact_match: float, loss: float) -> dict[str, Any]:
        mean = {"loss": loss, "valid_loss": loss, "valid_token_accuracy": 0.5, "exact_match": exact_match, "seconds": 1}
        return {"values": {"heads": heads}, "mean": mean, "spread": {}, "reported": {}, "runs": []}

    drawn: dict[str, Any] = {}

    def note(panels: Any, xlabel: str, title: str, path: Path, ticks: list[int], best: int) -> bool:
        drawn.update(ticks=ticks, best=best)
        return save_panels(panels, xlabel, title, path, ticks, best)

    monkeypatch.setattr("calcformer.comparison.save_panels", note)
    results = {
        "study": None,
        "vary": {"heads": [8, 1, 2]},
        "seeds": 1,
        "figures": label_figures(PRESETS["formula"].data),
        "main": "exact_match",
        "rows": [row(8, 0.25, 1.0), row(1, 0.5, 0.7), row(2, 0.5, 0.9)],
    }
    table = make_table(results)
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:5]] == ["8", "**1**", "2"]
    assert "- Best by exact match: heads 1.\n" in table
    assert draw(results, tmp_path, tmp_path / "sweep.png") and is_picture(tmp_path / "sweep.png")
    assert drawn == {"ticks": [1, 2, 8], "best": 1}
    results["rows"][0]["mean"], results["rows"][2]["mean"] = {}, {"loss": 0.5}  # failed; and its log was lost
    assert "failed" in make_table(results) and "–" in make_table(results)
    assert draw(results, tmp_path, tmp_path / "sweep.png")


def test_a_wide_table_is_several(tmp_path: Path) -> None:
    """Each begins with what is varied; the report's figure stands beside ours, and what a case is below."""
    sweep = Sweep.of({"width": 24}, {"case": ["2-layers", "6-wide-layers"]}, study="s3")
    labels = label_figures(sweep.base.data, reported=["token_accuracy", "bleu"])
    assert list(labels) == ["loss", "token_accuracy", "valid_loss", "valid_token_accuracy", "chrf", "bleu", "seconds"]
    rows = [
        {"values": {"case": case}, "mean": dict.fromkeys(labels, 0.5) | {"bleu": bleu}, "spread": {}, "runs": []}
        | {"reported": {"token_accuracy": 0.9, "bleu": 37.45} if case == "2-layers" else {}}
        for case, bleu in (("2-layers", 30.0), ("6-wide-layers", 12.5))
    ]
    results = {"study": "s3", "vary": sweep.axes, "cases": sweep.cases, "seeds": 1, "figures": labels, "rows": rows}
    *tables, notes = make_table(results | {"main": "bleu"}).split("\n\n")
    cells = [[[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()] for table in tables]
    assert [table[0] for table in cells] == [
        ["case", "training loss", "training token accuracy", "S3"],
        ["case", "validation loss", "token accuracy", "chrF", "BLEU", "S3"],
        ["case", "seconds"],
    ]
    assert cells[1][2:] == [
        ["**2-layers**", "0.5000", "0.5000", "0.5000", "30.0000", "37.45"],
        ["6-wide-layers", "0.5000", "0.5000", "0.5000", "12.5000", ""],
    ]
    assert all(len(line) <= 80 for table in tables for line in table.splitlines())
    assert "- 2-layers: encoder layers 2, decoder layers 2, heads 8, hidden 2048, dropout 0.1.\n" in notes
    assert draw(results | {"main": "bleu"}, tmp_path, tmp_path / "sweep.png")
    for row, norm in zip(rows, ("post", "pre")):
        row["values"] = {"norm": norm, "case": "2-layers"}
    table = make_table(results | {"main": "bleu", "vary": {"case": ["2-layers"], "norm": ["post", "pre"]}})
    assert table.split("|")[1].strip() == "norm" and "- All runs: case 2-layers.\n" in table


def test_a_report_is_drawn_once_for_all_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What all rows have in common stands in the title, not in every label."""
    drawn: list[Any] = []
    monkeypatch.setattr("calcformer.comparison.save_panels", lambda *arguments: bool(drawn.append(arguments)) or True)
    sweep = Sweep.of({}, {"case": ["6-wide-layers"], "norm": ["post", "pre"]}, study="s3")
    theirs = STUDIES["s3"].reported[3][1]
    rows = []
    for member in sweep.members():
        run = tmp_path / member.name
        run.mkdir()
        (run / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "valid_loss": 5.0}) + "\n")
        ours = {"mean": {"valid_loss": 5.0, "bleu": 1.0}, "spread": {}, "runs": [{"run": run.name, "figures": {}}]}
        rows.append({"values": member.values, "reported": theirs, **ours})
    results = {"study": "s3", "vary": sweep.axes, "cases": sweep.cases, "seeds": 1, "rows": rows, "main": "bleu"}
    assert draw(results | {"figures": {"valid_loss": "validation loss"}}, tmp_path, tmp_path / "sweep.png")
    panels, _, title, _ = drawn[0]
    assert title == "s3, case 6-wide-layers"
    assert [(line.label, line.points[0][1], line.color, line.reported) for line in panels["validation loss"]] == [
        ("norm post (best)", 5.0, "C0", False),
        ("norm pre", 5.0, "C1", False),
        ("S3", 4.77, "black", True),
    ]


def test_a_place_without_a_panel_is_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures: list[Any] = []
    monkeypatch.setattr("calcformer.plots._save", lambda figure, path: figures.append(figure))
    for epochs in [3.0], [3.0, 4.0]:  # BLEU after the last one only
        points = [(epoch, 30.0, 0.0) for epoch in epochs]
        lines = [Line(f"{number}: {'settings ' * 5}", points, f"C{number}") for number in range(4)]
        panels = {"loss": lines, "chrF": lines, "BLEU": [Line("theirs", points[-1:], "black", reported=True)]}
        assert save_panels(panels, "epoch", "study", tmp_path / "sweep.png")
    assert [axes.axison for axes in figures[0].axes] == [True, True, True, False]
    assert figures[0].axes[0].get_xlim() == (0, 6) and figures[1].axes[0].get_xlim()[0] > 2.5
    assert figures[0].legends[0].get_window_extent().x0 >= 0


@pytest.mark.long
def test_killed_sweep_continues_to_the_same_results(tmp_path: Path) -> None:
    words = ["sweep", *flags(**TINY | {"epochs": 30}), "--vary", "learning-rate=1e-2,1e-3", "--jobs", "1"]
    with subprocess.Popen([sys.executable, "-m", "calcformer", *words, "--out", "killed"]) as process:
        log = tmp_path / "killed" / "learning-rate=0.01" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "results.json").exists()
    assert main([*words, "--out", "killed"]) == 0 and main([*words, "--out", "whole"]) == 0
    killed, whole = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("killed", "whole"))
    assert without_times(killed) == without_times(whole)
    lines = [
        (tmp_path / name / "learning-rate=0.01" / "metrics.jsonl").read_text().splitlines()
        for name in ("killed", "whole")
    ]
    assert [len(each) for each in lines] == [30, 30]


@pytest.mark.long
def test_worker_that_ends_fails_its_member_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose input closes, one that is killed; then another does what is left."""
    workers: list[Worker] = []

    def give(worker: Worker, job: str) -> None:
        workers.append(worker)
        whole_give(worker, job)

    def end(jobs: list[str]) -> None:
        number = len(workers) - 1
        if number < 2 and (tmp_path / f"epochs={100_000 + number}" / "metrics.jsonl").exists():
            process = workers[number].process
            assert process.stdin is not None
            process.kill() if number else process.stdin.close()

    whole_give = Worker.give
    monkeypatch.setattr(Worker, "give", give)
    settings = {name: value for name, value in TINY.items() if name != "epochs"}
    sweep = Sweep.of({**settings, "warmup_steps": 0}, {"epochs": [100_000, 100_001, 1, 2]})
    (tmp_path / "sweep.json").write_text(sweep.to_json())
    names = [member.name for member in sweep.members()]
    first, second, *others = run_jobs("calcformer.sweep", [tmp_path], names, 1, end)
    assert first[0] == names[0] and "its process ended with exit code 1" in str(first[1])
    assert second[0] == names[1] and "its process was ended by SIGKILL (killed, or out of memory?)" in str(second[1])
    assert others == [(names[2], None), (names[3], None)]
    assert len({worker.process.pid for worker in workers}) == 3 and workers[2] is workers[3]
    assert all(worker.process.poll() is not None for worker in workers)


@pytest.mark.long
def test_control_c_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "out" / "seed=0" / "model.safetensors"

    def interrupted(*arguments: Any) -> Iterator[tuple[str, Any]]:
        def watch(jobs: list[str]) -> None:
            if (tmp_path / "out" / "seed=1").exists():
                raise KeyboardInterrupt

        return run_jobs(*arguments[:-1], watch)

    words = ["sweep", *flags(**TINY), "--seeds", "2", "--jobs", "1", "--out", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "run_jobs", interrupted)
        assert main(words) == 130
    assert first.exists() and not (tmp_path / "out" / "results.json").exists()
    assert "of 2 runs finished; continue with: calcformer sweep --resume out" in capsys.readouterr().err
    assert main(["sweep", "--resume", "out"]) == 0
    assert "Mean and standard deviation of 2 training seeds" in capsys.readouterr().out


@pytest.mark.long
def test_study_of_positions_asks_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--study", "s1-positions", *flags(**TINY)]) == 0
    folder = tmp_path / "runs" / "s1-positions-1"
    *tables, _ = capsys.readouterr().out.split("\n\n")
    cells = [[[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()] for table in tables]
    columns = [column for table in cells for column in zip(*table)]
    assert [column[0] for column in columns if column[0] != "positions"] == [
        *("training loss", "S1", "validation loss", "S1", "token accuracy", "S1"),
        *("exact match", "seconds", "123+123", "321+321"),
    ]
    assert [column[2] for column in columns if column[0] == "S1"] == ["0.126", "0.117", "0.963"]
    answers = json.loads((folder / "results.json").read_text())["rows"][1]["runs"][0]["answers"]
    assert list(answers.values()) == [column[3] for column in columns[-2:]]
    assert is_picture(folder / "sweep.png")


@pytest.mark.long
def test_study_of_translations_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sacrebleu")
    (tmp_path / "corpus").mkdir()
    lines = [f"{a} {b} {c}\n" for a in "abcde" for b in "abcde" for c in "abcde"]
    for part, chosen in ("train", lines[:100]), ("val", lines[100:]):
        (tmp_path / "corpus" / f"{part}.en").write_text("".join(chosen))
        (tmp_path / "corpus" / f"{part}.fr").write_text("".join(line[::-1].strip() + "\n" for line in chosen))
    tiny = flags(data="corpus", width=24, hidden=8, epochs=2, device="cpu", longest=10)
    words = ["sweep", "--study", "s3", *tiny, "--vary", "case=2-layers,6-wide-layers", "--jobs", "1", "--out", "out"]

    def interrupted(*arguments: Any) -> Iterator[tuple[str, Any]]:
        def watch(jobs: list[str]) -> None:
            if (tmp_path / "out" / "case=6-wide-layers").exists():
                raise KeyboardInterrupt

        return run_jobs(*arguments[:-1], watch)

    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "run_jobs", interrupted)
        assert main(words) == 130
    assert main(["sweep", "--resume", "out"]) == 0
    first, second = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert first["reported"]["bleu"] == 37.45 and second["reported"]["valid_loss"] == 4.77
    assert 0 <= first["mean"]["bleu"] <= 100 and 0 < second["mean"]["token_accuracy"] < 1
    config, _, model, _ = load_run(tmp_path / "out" / "case=6-wide-layers")
    assert len(model.decoder) == 6 and config.model.heads == 12 and config.training.batch_size == 16
    assert "- 6-wide-layers: encoder layers 6, decoder layers 6, heads 12, dropout 0.1.\n" in capsys.readouterr().out
    assert is_picture(tmp_path / "out" / "sweep.png")


@pytest.mark.long
def test_study_of_overfitting_measures_what_was_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--study", "s0-overfit", "--device", "cpu", "--out", "out"]) == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert row["mean"]["valid_token_accuracy"] == row["mean"]["exact_match"] == 1.0
    assert row["reported"] == {"valid_loss": 0.0070, "valid_token_accuracy": 1.0}
    assert "Validated on the problems trained on." in capsys.readouterr().out
    assert is_picture(tmp_path / "out" / "sweep.png")

"""Translations as a task: parallel corpora, tokens of sentences, batches by tokens, BLEU, what is learned and said."""

from __future__ import annotations

import gzip
import io
import json
import math
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calcformer.attention_maps import attention_maps, save_maps
from calcformer.cli import main
from calcformer.config import PRESETS
from calcformer.data.examples import like_lengths, shared
from calcformer.decoding import decode, take_best
from calcformer.errors import InputError
from calcformer.memory import memory_to_train
from calcformer.runs.checkpoint import load_run
from calcformer.settings import TrainingConfig
from calcformer.solver import Solver
from calcformer.tasks.language.scores import score
from calcformer.tasks.language.tokenizers import SPECIAL, BytePairs, Words
from calcformer.tasks.language.translations import TranslationTask
from calcformer.tasks.translation import Translation
from calcformer.training import resume, train
from calcformer.training.optimizer import learning_rate
from tests.pictures import is_picture

pytest.importorskip("sacrebleu")

pytestmark = pytest.mark.usefixtures("as_on_a_cpu", "empty_folder")

WORDS = "red dog sees a big cat near the old house today quietly".split()
MODEL = {"width": 32, "heads": 4, "encoder_layers": 1, "decoder_layers": 1, "hidden": 64, "dropout": 0.0}
QUICK = {"learning_rate": 5e-3, "batch_tokens": 300, "warmup_steps": 50, "schedule": "cosine", "label_smoothing": 0.0}
SMALL = {**MODEL, **QUICK, "tokenizer": "words", "target": "ne", "processes": 1, "device": "cpu", "average": 0}
LINES = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def write_corpus(folder: Path, **parts: int) -> Path:
    """Sentences, and what they are backwards, so many for each part."""
    folder.mkdir()
    draw = random.Random(0)
    for part, count in parts.items():
        sentences = [draw.sample(WORDS, draw.randint(4, 6)) for _ in range(count)]
        (folder / f"{part}.en").write_text("".join(" ".join(words) + "\n" for words in sentences))
        (folder / f"{part}.ne").write_text("".join(" ".join(reversed(words)) + "\n" for words in sentences))
    return folder


def write_pair(first: str, second: str, part: str = "train", folder: str = "corpus") -> Path:
    Path(folder).mkdir(exist_ok=True)
    for language, text in ("en", first), ("ne", second):
        Path(folder, f"{part}.{language}").write_text(text, encoding="utf-8")
    return Path(folder)


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must fail and write nothing; returns its one line."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert sorted(Path().rglob("*")) == before
    return captured.err


def config(**changes: Any) -> Any:
    return PRESETS["translate"].with_settings({**SMALL, **changes})


def weights(run: str | Path) -> list[torch.Tensor]:
    return list(load_run(Path(run))[2].state_dict().values())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to say sentences backwards, beside its corpus."""
    place = tmp_path_factory.mktemp("backwards")
    corpus = write_corpus(place / "corpus", train=2000, val=100, test=100)
    with pytest.MonkeyPatch.context() as patch:  # `as_on_a_cpu` is of each test
        patch.setattr("kernels.backend.INTERPRETED", False)
        train(config(data=str(corpus), epochs=12, exact_match_every=6), place / "run", bar=False)
    return place / "run"


# What is learned


@pytest.mark.slow
def test_backwards_is_learned_to_a_bleu_of_100(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["bleu"] == last["chrf"] == last["test_bleu"] == last["test_chrf"] == 100
    assert last["valid_token_accuracy"] == 1
    for words, part in (
        ([], "test"),
        (["--part", "valid"], "valid"),
        (["--beam", "3", "--length-penalty", "0.6"], "test"),
    ):
        assert main(["evaluate", str(trained), "--json", *words]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["bleu"], found["chrf"], found["n"], found["part"]) == (100, 100, 100, part)
        assert found["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
        rows = Path(found["file"]).read_text().splitlines()
        assert rows[0] == "chrF\tsource\tsaid\tright" and len(rows) == 101
        chrf, source, said, right = rows[1].split("\t")
        assert float(chrf) == 100 and said == right == " ".join(reversed(source.split()))
        assert len(found["worst"]) == len(found["best"]) == 3
    assert (found["beam"], found["length_penalty"]) == (3, 0.6)
    assert main(["evaluate", str(trained)]) == 0
    text = capsys.readouterr().out
    assert "100 sentences of test: BLEU 100.0000, chrF 100.0000, token accuracy 1.0000" in text
    assert "the worst sentences by chrF" in text and "the best sentences by chrF" in text


@pytest.mark.slow
def test_sentences_are_translated_one_a_line(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["translate", str(trained), "the red dog sees", "  old cat near a  "]) == 0
    captured = capsys.readouterr()
    assert captured.out == "sees dog red the\na near cat old\n" and "translated by" in captured.err
    Path("in.txt").write_bytes("\ufeffthe red dog sees\r\n\r\nold cat near a".encode())
    assert main(["translate", str(trained), "--input", "in.txt", "--output", "out.txt", "--beam", "2"]) == 0
    assert Path("out.txt").read_text() == "sees dog red the\n\na near cat old\n"
    capsys.readouterr()
    assert main(["translate", str(trained), "the red unicorn sees"]) == 0
    assert "words that this run never learned, read as unknown: unicorn" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\ufeffthe red dog sees\r\n".encode())))
    assert main(["translate", str(trained)]) == 0
    assert capsys.readouterr().out == "sees dog red the\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("old cat\né".encode("latin-1"))))
    assert "standard input is no text in UTF-8 (byte 8 is 0xe9)" in fails(capsys, "translate", trained)
    assert main(["solve", "--run", str(trained), "the red dog sees"]) == 0
    assert capsys.readouterr().out.startswith("the red dog sees -> sees dog red the  (probability 0.9")


@pytest.mark.slow
def test_attention_has_words_at_its_axes(trained: Path) -> None:
    pytest.importorskip("matplotlib")
    maps = attention_maps(Solver(trained), "the red dog sees")
    assert maps.source == ["the", "red", "dog", "sees", "<eos>"]
    assert maps.target == ["<bos>", "sees", "dog", "red", "the"] and maps.said == ["sees", "dog", "red", "the", "<eos>"]
    assert maps.cross[0].shape == (1, 4, 5, 5)
    assert all(is_picture(path) for path in save_maps(maps, Path("maps")))
    assert is_picture(trained / "curve.png")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["translate", "RUN"], "no sentence was given"),
        (["translate", "RUN", " "], "no sentence was given"),
        (["translate", "RUN", "a dog " * 60], "has 120 tokens, and this run translates sentences of 1 to 100"),
        (["translate", "RUN", "--input", "long.txt", "--output", "out"], "long.txt, line 2: 'a dog a dog"),
        (["translate", "RUN", "--input", "latin.txt"], "latin.txt is no text in UTF-8 (byte 0 is 0xe9)"),
        (["translate", "RUN", "--input", "none.txt"], "none.txt"),
        (["translate", "RUN", "a dog", "--input", "long.txt"], "leave out --input or the sentences"),
        (["translate", "RUN", "a dog", "--output", "nowhere/out"], "there is no folder nowhere; make it"),
        (["translate", "RUN", "a dog", "--output", "."], ". is a folder; give --output a file"),
        (["translate", "RUN", "a dog", "--length-penalty", "1"], "--length-penalty is for a beam"),
        (["translate", "nowhere", "a dog"], "nowhere"),
        (["evaluate", "RUN", "--part", "train"], "has no part 'train' to measure; give --part test or valid"),
        (["evaluate", "RUN", "--exhaustive"], "--exhaustive is for problems that are numbered, which sentences"),
        (["explain", "the red dog " * 50, "--run", "RUN"], "has 150 tokens"),
        (["generate", "RUN", "a dog"], "ask it by: calcformer translate RUN"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_translated_is_one_line(
    trained: Path, words: list[str], match: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("long.txt").write_text("a dog\n" + "a dog " * 60)
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    assert match in fails(capsys, *[str(trained) if word == "RUN" else word for word in words])


@pytest.mark.slow
def test_a_run_of_another_task_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    train(PRESETS["formula"].with_settings({"epochs": 1, "train_size": 10, "valid_size": 10}), "formula", bar=False)
    capsys.readouterr()
    assert "formula is a run of formula, which translates nothing" in fails(capsys, "translate", "formula", "a dog")
    assert "has no part 'test' to measure; give --part valid" in fails(capsys, "evaluate", "formula", "--part", "test")


@pytest.mark.slow
def test_a_translation_is_worked_by_hand(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["explain", "the red dog sees", "--run", str(trained), "--steps", "1"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "0 <pad>, 1 <bos>, 2 <eos>, 3 [UNK], 4 a" in text
    numbers = [4 + sorted(WORDS).index(word) for word in ("the", "red", "dog", "sees")]
    assert f"The encoder reads {' '.join(map(str, numbers))} 2." in text
    monkeypatch.setattr("calcformer.by_hand.pages.MOST_TOKENS", 15)
    assert "one vocabulary of up to 15 tokens" in fails(capsys, "explain", "the red dog sees", "--run", trained)


# Parallel corpora


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        ("a\nb\n", "c\n", "train.en has 2 lines and corpus/train.ne 1; each line of one must translate the same line"),
        ("a\n\nb\n", "a\nb\nc\n", "corpus/train.en: line 2 is empty; take such lines out of both files"),
        ("a\nb\nc\nd\n", "a\n \nb\n\n", "corpus/train.ne: line 2 and 1 more is empty"),
        ("", "a\n", "has 0 lines"),
        ("a a a a\n", "b b b b\n", "no sentences are left to"),
        ("", "", "corpus/train.en is empty"),
    ],
)
def test_wrong_files_are_one_line(first: str, second: str, match: str, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_pair(first, second)
    assert match in fails(capsys, "train", "translate", "--data", corpus, *LINES)


def test_a_wrong_encoding_a_missing_language_and_no_corpus_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_pair("a\n", "b\n")
    wrong = {
        "has no train.de (or .gz); give --source a language that it has (en, ne)": ["--data", corpus, "--source", "de"],
        "has no train.fr (or .gz); give --target": ["--data", corpus, "--target", "fr"],
        "--source and --target are both ne; give two languages": ["--data", corpus, "--source", "ne"],
        "there is no folder nowhere": ["--data", "nowhere"],
        "there is no corpus to learn; give --data FOLDER": [],
        "corpus/other.txt has 2 lines": ["--source", "corpus/other.txt", "--target", "corpus/train.ne"],
        "is no text in UTF-8": ["--source", "corpus/latin.txt", "--target", "corpus/train.ne"],
        "is no gzip file": ["--source", "corpus/wrong.gz", "--target", "corpus/train.ne"],
        "embeddings tied need one vocabulary": ["--data", corpus, "--vocabularies", "separate"],
    }
    Path("corpus/other.txt").write_text("a\nb\n")
    Path("corpus/latin.txt").write_bytes("é".encode("latin-1"))
    Path("corpus/wrong.gz").write_bytes(b"no")
    for match, words in wrong.items():
        assert match in fails(capsys, "train", "translate", *LINES, *words), match
    write_pair("a\nb\n", "c\n", "test_2")  # said before the first epoch, not after the last
    assert "test_2.en has 2 lines and" in fails(capsys, "train", "translate", "--data", corpus, *LINES)
    Path("corpus/val.en").write_text("a\n")
    assert "has val in one of en and ne only" in fails(capsys, "train", "translate", "--data", corpus, *LINES)


def test_two_files_are_a_corpus_and_one_source_is_on_one_side() -> None:
    sentences = [f"{a} {b}" for a in WORDS for b in WORDS] * 2
    with gzip.open("first.gz", "wt") as file:
        file.write("\n".join(sentences))
    Path("second.txt").write_text("\r\n".join(line.upper() for line in sentences) + "\r\n")
    data = Translation(source="first.gz", target="second.txt", tokenizer="words", held_out=0.2)
    task = data.build()
    trained, held_out = task.split()
    assert len(trained) + len(held_out) == len(sentences) and 0.1 < len(held_out) / len(sentences) < 0.3
    asked = [set(task.questions(side)) for side in (trained, held_out)]
    assert not asked[0] & asked[1] and asked[0] | asked[1] == set(sentences)
    assert task.tests == []
    answers = [task.decode_answer(ids) for ids in held_out.labels.tolist()]
    assert answers == [question.upper() for question in task.questions(held_out)]


def test_pairs_too_long_to_train_on_are_left_out_and_said_and_measured_ones_are_cut(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_pair("a b c\na\nb b\n", "a b\na b c d\nb\n")
    corpus = write_pair("a b c\n", "c b a\n", "val")
    task = Translation(data=str(corpus), target="ne", tokenizer="words", minimum_count=1, longest=2).build()
    trained, held_out = task.split()
    assert task.questions(trained) == ["b b"]
    assert "2 pairs of more than 2 tokens are not trained on" in capsys.readouterr().err
    assert task.questions(held_out) == ["a b"]  # cut, but held to the words of all of it
    assert task.compare(held_out.labels, held_out) == (["c b"], ["c b a"])


def test_a_run_knows_its_pairs_again(capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(Path("corpus"), train=20, val=4)
    train(config(data="corpus", epochs=1, exact_match_every=0), "run", bar=False)
    capsys.readouterr()
    (corpus / "train.ne").write_text((corpus / "train.en").read_text())
    assert "train.ne are not the pairs that run learned; put those back" in fails(capsys, "train", "--resume", "run")
    shutil.rmtree("corpus")
    assert "corpus" in fails(capsys, "evaluate", "run")
    assert main(["translate", "run", "a dog"]) == 0  # which needs no corpus
    capsys.readouterr()
    (Path("run") / "target.json").write_text("{}")
    assert "target.json is missing or damaged" in fails(capsys, "translate", "run", "a dog")


def test_more_is_measured_than_while_training(capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(Path("corpus"), train=20, val=9, test=3)
    train(config(data="corpus", epochs=1, valid_size=2), "run", bar=False)
    for words, count in ([], 3), (["--part", "valid"], 2), (["--problems", "7"], 7):
        capsys.readouterr()
        assert main(["evaluate", "run", "--json", *words]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["n"] == count and len(Path(found["file"]).read_text().splitlines()) == 1 + count
    assert "--part test is a test; leave one" in fails(capsys, "evaluate", "run", "--part", "test", "--problems", "2")


def test_a_beam_searches_with_the_length_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(Path("corpus"), train=20, val=4, test=3)
    train(config(data="corpus", epochs=1), "run", bar=False)
    asked: list[tuple[int, float]] = []

    def note(*words: Any) -> torch.Tensor:
        asked.append((words[4], words[7]))
        return decode(*words)

    monkeypatch.setattr("calcformer.data.task.decode", note)
    for command in ["evaluate", "run"], ["translate", "run", "a dog"]:
        assert main([*command, "--beam", "2", "--length-penalty", "0.6"]) == main([*command, "--beam", "2"]) == 0
    assert asked == [(2, 0.6), (2, 1.0)] * 2


def test_held_out_sentences_that_are_trained_on_are_counted() -> None:
    """Each side is as wide as its longest sentence."""
    write_pair("a b\nb a\na b a b\n", "c\nc\nc\n")
    corpus = write_pair("b a\nb b\na b\n", "c\nd\nd\n", "val")
    data = Translation(data=str(corpus), target="ne", tokenizer="words", minimum_count=1)
    assert shared(*data.build().split()) == 2


def test_sentences_with_tabs_and_line_ends_stay_one_row_each() -> None:
    pytest.importorskip("tokenizers")
    write_pair("a\tb c\nd\re\u2028f\n", "c\tb a\nf\re\u2028d\n")
    write_pair("a\tb c\nd\re\u2028f\n", "c\tb a\nf\re\u2028d\n", "val")
    task = Translation(data="corpus", target="ne", vocabulary_size=300).build()
    held_out = task.split()[1]
    found = task.describe_answers(held_out.labels, held_out, Path(), "valid")
    rows = Path(found["file"]).read_text(encoding="utf-8").splitlines()[1:]
    assert [row.split("\t")[1:] for row in rows] == [["a b c", "c b a", "c b a"], ["d e f", "f e d", "f e d"]]
    assert task.decode_answer(task.vocabulary.encode("a\nb")) == "a b"


def test_a_batch_of_few_tokens_has_one_sentence_in_memory() -> None:
    write_corpus(Path("corpus"), train=20, val=4)
    few, one = (config(data="corpus", longest=400, batch_tokens=tokens) for tokens in (10, 402))
    task = few.data.build()
    assert memory_to_train(few, task, 1) == memory_to_train(one, task, 1)
    assert task.count == 24 and memory_to_train(few, task, 1) < 1e9  # of the pairs that there are, and not of 100,000


# Tokens


def test_rare_words_are_unknown_and_special_tokens_cannot_be_said() -> None:
    words = Words.of("a b a <eos> b c", 2, SPECIAL)
    assert words.tokens == (*SPECIAL, "a", "b")
    assert words.encode("a c b <eos>") == [4, 3, 5, 3, 3, 3]
    assert words.decode([1, 4, 3, 2, 0]) == "a [UNK]"
    assert Words.from_json(words.to_json()).encode("c") == [3]


def test_byte_pairs_of_sentences() -> None:
    pytest.importorskip("tokenizers")
    made = BytePairs.of("the cat sat\nthe cat\nthe sat\n" * 20, 400, SPECIAL[:3])
    assert (made.pad_id, made.bos_id, made.eos_id, made.unknown_id) == (0, 1, 2, None)
    again = BytePairs.from_json(made.to_json())
    for text in "the cat sat", "é\u2026 \U0001f600", "a <eos> b<pad>", "cat  cat":
        ids = again.encode(text)
        assert ids == made.encode(text) and min(ids) > 2
        assert again.decode([1, *ids, 2, 0]) == text
    with pytest.raises(InputError, match="is no text in UTF-8"):
        made.encode("cat \udcff")
    assert [made.name(place) for place in (1, *made.encode("the dog"))] == ["<bos>", "the", " ", "##d", "##o", "##g"]
    assert made.name(made.encode("cat")[0]) == "cat" and made.name(made.encode("xx")[-1]) == "##x"


def test_vocabularies_of_their_own_share_special_tokens() -> None:
    write_pair("a b\nc d\n", "e f\ng h i\n")
    data = Translation(
        data="corpus", target="ne", tokenizer="words", minimum_count=1, vocabularies="separate", held_out=0.5
    )
    task = TranslationTask(data)
    assert task.source_vocabulary.tokens[:4] == task.vocabulary.tokens[:4] == SPECIAL
    assert set(task.source_vocabulary.tokens) | set(task.vocabulary.tokens) <= {*SPECIAL, *"abcdefghi"}
    assert not set(task.source_vocabulary.tokens[4:]) & set(task.vocabulary.tokens[4:])
    made = config(vocabularies="separate", embeddings="output").model.build(task)
    assert made.prediction.weight is made.target_embedding.weight is not made.source_embedding.weight
    assert made.source_embedding.weight.shape[0] == len(task.source_vocabulary)
    assert set(task.files()) == {"source.json", "target.json", "pairs.sha256"}


# BLEU


def bleu_in_two_loops(said: list[str], right: list[str]) -> float:
    """BLEU of words between spaces, Papineni et al. 2002, section 2.3, without smoothing."""
    logs = 0.0
    lengths = [sum(len(line.split()) for line in lines) for lines in (said, right)]
    for size in range(1, 5):
        matched = count = 0
        for one, other in zip(said, right):
            grams, known = (
                Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))
                for words in (one.split(), other.split())
            )
            for gram, times in grams.items():
                matched += min(times, known[gram])
                count += times
        logs += math.log(matched / count) / 4
    return 100 * math.exp(logs + min(0.0, 1 - lengths[1] / lengths[0]))


def test_bleu_by_hand_and_in_two_loops() -> None:
    said, right = ["the cat sat on a mat today"], ["the cat sat on the mat"]
    # 5 of 7 words, 3 of 6 pairs, 2 of 5 triples, 1 of 4 of four; longer than the right one, so no penalty.
    by_hand = 100 * (5 / 7 * 3 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert score(said, right)["bleu"] == pytest.approx(by_hand) == pytest.approx(bleu_in_two_loops(said, right))
    draw = random.Random(1)
    right = [" ".join(draw.choices(WORDS, k=draw.randint(6, 12))) for _ in range(50)]
    said = [" ".join(word for word in line.split() if draw.random() < 0.9) for line in right]  # shorter
    assert score(said, right)["bleu"] == pytest.approx(bleu_in_two_loops(said, right))
    assert score(said, right) != pytest.approx(score(said, right[1:] + right[:1]))
    assert score(right, right) == {"bleu": 100, "chrf": 100}


def test_bleu_is_of_words_and_not_of_ids() -> None:
    """What a model cannot say, as a word that is unknown, counts against it."""
    write_pair("a b c d\n" * 3 + "a b c rare\n", "a b c d\n" * 3 + "a b c rare\n")
    corpus = write_pair("a b c rare\n" * 4, "a b c rare\n" * 4, "val")
    task = Translation(data=str(corpus), target="ne", tokenizer="words", minimum_count=3).build()
    held_out = task.split()[1]
    assert task.answer_figures(held_out.labels, held_out)["bleu"] < 60


# Batches of like lengths


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=200), st.integers(1, 200))
def test_batches_by_tokens_have_every_example_once_and_few_tokens(pairs: list[tuple[int, int]], most: int) -> None:
    lengths = torch.tensor(pairs)
    torch.manual_seed(0)
    one, sizes = like_lengths(lengths, torch.randperm(len(pairs)), most)
    other, others = like_lengths(lengths, torch.randperm(len(pairs)), most)
    assert sorted(one.tolist()) == sorted(other.tolist()) == list(range(len(pairs)))
    assert sorted(sizes) == sorted(others) and sum(sizes) == len(pairs)  # in any order as many steps
    for batch in one.split(sizes):
        assert len(batch) == 1 or len(batch) * int(lengths[batch].max()) <= most


def test_batches_by_tokens_have_little_padding_and_change() -> None:
    torch.manual_seed(0)
    lengths = (torch.randn(2000, 1) * 5 + 15).clamp(3, 40).long().expand(-1, 2) + torch.randint(0, 3, (2000, 2))
    (one, sizes), (other, _) = (like_lengths(lengths, torch.randperm(2000), 500) for _ in range(2))
    places = sum(len(batch) * int(lengths[batch, side].max()) for batch in one.split(sizes) for side in (0, 1))
    assert lengths.sum() / places > 0.94
    shuffled = torch.randperm(2000).split(25)
    assert lengths.sum() / sum(len(batch) * int(lengths[batch].max()) * 2 for batch in shuffled) < 0.7
    first = [frozenset(batch.tolist()) for batch in one.split(sizes)]
    assert not torch.equal(one, other) and [len(batch) for batch in first] != sorted(len(batch) for batch in first)


def test_batches_by_tokens_are_of_examples_that_stay(capsys: pytest.CaptureFixture[str]) -> None:
    assert "batch_tokens needs formulas that stay the same" in fails(capsys, "train", "--fresh", "--batch-tokens", "99")


# Training


def test_noam_by_hand() -> None:
    training = TrainingConfig(schedule="noam", warmup_steps=4, learning_rate=1.0)
    rates = [learning_rate(step, 100, training) for step in (0, 3, 4, 15, 99)]
    assert rates == pytest.approx([1 / 4, 1, math.sqrt(4 / 5), 1 / 2, 1 / 5])
    # A warm-up of 1,000 steps in a run of 20 is one of 2, where steps are not known before the pairs are read.
    short = TrainingConfig(schedule="constant", warmup_steps=1_000, learning_rate=1.0, batch_tokens=10)
    assert [learning_rate(step, 20, short) for step in range(4)] == [0.5, 1, 1, 1]


def test_the_last_weights_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(Path("corpus"), train=60, val=4)
    shared = {"data": "corpus", "schedule": "constant", "exact_match_every": 0, "warmup_steps": 0}
    after = []
    for epochs in 2, 3, 4:
        train(config(epochs=epochs, **shared), f"plain-{epochs}", bar=False)
        after.append(weights(f"plain-{epochs}"))
    train(config(epochs=4, average=3, **shared), "run", bar=False)
    for mean, *each in zip(weights("run"), *after):
        torch.testing.assert_close(mean, sum(each) / 3)
        assert not torch.equal(mean, each[-1])


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_ends_with_the_same_weights(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped within the epochs that are averaged; batches by tokens, and dropout."""
    from calcformer.training.trainer import Trainer

    write_corpus(Path("corpus"), train=60, val=4, test=3)
    made = config(data="corpus", epochs=5, average=3, dropout=0.3, processes=processes)
    train(made, "whole", bar=False)

    class Killed(Exception):
        pass

    def kill(self: Trainer, entry: dict[str, Any]) -> None:
        if entry["epoch"] == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_say", kill)
        with pytest.raises(Killed):
            train(made, "killed", bar=False)
    last = resume("killed", bar=False)
    assert last["epoch"] == 5 and "test_bleu" in last
    assert all(map(torch.equal, weights("whole"), weights("killed")))


@pytest.mark.slow
def test_two_processes_find_the_figures_of_one() -> None:
    write_corpus(Path("corpus"), train=40, val=7, test=3)
    found = [
        train(config(data="corpus", epochs=1, processes=processes), f"run-{processes}", bar=False)
        for processes in (1, 2)
    ]
    for name in "bleu", "chrf", "test_bleu", "valid_loss":
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4), name


# Beams


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**32 - 1), st.sampled_from([2, 5, 1000]))
def test_the_best_of_equal_ones_are_the_first(count: int, seed: int, levels: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (3, 40), generator=draw).double()
    scores[scores == 0] = -torch.inf
    best, column = take_best(scores, count)
    right, order = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(best, right[:, :count]) and torch.equal(column, order[:, :count])

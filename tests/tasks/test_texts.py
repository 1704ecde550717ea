"""Texts without labels: files read, texts held out, scored pairs, and what is wrong with a file said in one sentence."""

import json

import pytest

from kmq_kernels.tasks import TaskError, Texts, load_task, read_texts


def _written(path, *lines):
    path.write_text("\n".join(lines))
    return path


def test_the_same_texts_from_every_kind_of_file(tmp_path):
    lines = [f"text {i}, with a comma" for i in range(12)]
    files = [
        _written(tmp_path / "a.txt", *lines, ""),
        _written(tmp_path / "a.csv", "id,text", *(f'{i},"{line}"' for i, line in enumerate(lines))),
        _written(tmp_path / "a.tsv", "text\tid", *(f"{line}\t{i}" for i, line in enumerate(lines))),
        _written(tmp_path / "a.jsonl", *(json.dumps({"text": line}) for line in lines)),
    ]
    for file in files:
        found = read_texts(file)
        assert (found.texts, found.empty, found.note) == (lines, 0, ())
    renamed = _written(tmp_path / "b.csv", "sentence,label", *(f'"{line}",1' for line in lines))
    assert read_texts(renamed, "sentence").texts == lines


def test_empty_lines_are_left_out_and_said(tmp_path):
    file = _written(tmp_path / "a.txt", "one", "", "two", "   ", "three\r", "")
    found = read_texts(file)
    assert found.texts == ["one", "two", "three"]
    assert found.note == (f"{file}: 2 lines without a text left out",)
    rows = ["text,label", "one,1", ",2", '"  ",3', "four,4"]
    assert read_texts(_written(tmp_path / "a.csv", *rows)).empty == 2


def test_a_tenth_is_held_out_and_no_text_is_on_both_sides(tmp_path):
    file = _written(tmp_path / "a.txt", *(f"text {i}" for i in range(60)), *(f"text {i}" for i in range(60)))
    task = load_task("texts", train_file=file)
    assert isinstance(task, Texts)
    train, held = set(task.train["text"]), set(task.evaluation["held_out"]["text"])
    assert (len(train), len(held)) == (54, 6)
    assert len(task.train) == 54
    assert not train & held
    again = load_task(**task.source)
    assert again.train["text"] == task.train["text"]
    own = load_task("texts", train_file=file, validation_file=_written(tmp_path / "b.txt", "text 3", "other", "third"))
    assert own.evaluation["held_out"]["text"] == ["text 3", "other", "third"]
    assert "text 3" not in own.train["text"]
    assert own.notes == (f"{file}: 1 texts left out, which are in {tmp_path / 'b.txt'}, too",)
    assert load_task("texts", validation_file=file).train["text"] == []


def test_scored_pairs(tmp_path):
    file = _written(tmp_path / "a.txt", *(f"text {i}" for i in range(30)))
    pairs = _written(tmp_path / "p.tsv", "index\tsentence1\tsentence2\tscore", "0\ta b\tc\t4.5", "1\td\te\t0", "2\tf\tg\t5")
    task = load_task("texts", train_file=file, pairs=pairs)
    assert task.metrics == ("mean_cosine", "worst_cosine", "similarity_spearman", "pairs_spearman")
    assert task.pairs.to_dict() == {"text": ["a b", "d", "f"], "text_pair": ["c", "e", "g"], "label": [4.5, 0.0, 5.0]}
    assert load_task(**task.source).pairs.to_dict() == task.pairs.to_dict()


@pytest.mark.parametrize(
    ("name", "lines", "sentence"),
    [
        ("a.txt", ["", "  "], "has no texts"),
        (
            "a.txt",
            ["one", "two"],
            "train_file: expected different texts, at least 3 of them to measure on, got 1 to train and 1 to",
        ),
        ("a.txt", ["one"] * 50, "expected different texts"),
        ("a.doc", ["one"], "the file name must end in .txt, .csv, .tsv or .jsonl"),
        ("a.csv", ["sentence", "one"], "text_columns: .*a.csv has no column 'text'; its columns are sentence"),
        ("a.csv", ["text,label", "one,1", "two"], "line 3: 1 fields, expected 2"),
        ("a.jsonl", ['{"text": 3}'], "line 2: the text is not a string but 3|line 1: the text is not a string but 3"),
        ("a.jsonl", ['{"text": "\\ud800"}'], "half a character"),
        ("a.csv", [""], "is empty"),
    ],
)
def test_files_of_no_use_are_refused_in_one_sentence(tmp_path, name, lines, sentence):
    with pytest.raises(TaskError, match=sentence):
        load_task("texts", train_file=_written(tmp_path / name, *lines))


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["sentence1,sentence2", "a,b"], "pairs: .* has no column 'score'; its columns are sentence1, sentence2"),
        (["sentence1,sentence2,score", "a,b,", "c,d,1", "e,f,2"], "line 2: the score is missing"),
        (["sentence1,sentence2,score", "a,b,much", "c,d,1", "e,f,2"], "line 2: the score much is not a finite number"),
        (["sentence1,sentence2,score", "a,b,nan", "c,d,1", "e,f,2"], "the score nan is not a finite number"),
        (["sentence1,sentence2,score", "a,,3", "c,d,1", "e,f,2"], "line 2: one of the two texts is empty"),
        (["sentence1,sentence2,score", "a,b,3", "c,d,3", "e,f,3"], "expected at least 3 pairs with scores that differ"),
    ],
)
def test_pairs_of_no_use_are_refused_in_one_sentence(tmp_path, lines, sentence):
    file = _written(tmp_path / "a.txt", *(f"text {i}" for i in range(30)))
    with pytest.raises(TaskError, match=sentence):
        load_task("texts", train_file=file, pairs=_written(tmp_path / "p.csv", *lines))


def test_options_that_do_not_go_with_texts_are_refused(tmp_path):
    file = _written(tmp_path / "a.txt", *(f"text {i}" for i in range(30)))
    for options, sentence in (
        ({}, "train_file: the task texts needs a file of texts"),
        ({"train_file": file, "problem": "regression"}, "problem: the task texts has no labels"),
        ({"train_file": file, "ignore_labels": ("x",)}, "ignore_labels: the task texts has no labels"),
        ({"train_file": file, "data_dir": tmp_path}, "data_dir: .* the task texts takes a training file"),
        ({"train_file": file, "text_columns": ("a", "b")}, "text_columns: the task texts takes one column"),
        ({"train_file": file, "pairs": tmp_path / "none.csv"}, "pairs: the file .*none.csv does not exist"),
        ({"train_file": file, "pairs": file}, "pairs: .*a.txt: the file name must end in .csv, .tsv or .jsonl"),
        ({"train_file": tmp_path / "none.txt"}, "none.txt does not exist"),
    ):
        with pytest.raises(TaskError, match=sentence):
            load_task("texts", **options)
    with pytest.raises(TaskError, match="pairs: scored pairs measure an embedder"):
        load_task("banking77", pairs=file)

"""Data sets and metrics: every layout, every metric by hand, every refusal with its sentence."""

import collections
import csv
import json
import sys

import numpy as np
import pytest

pytest.importorskip("datasets")

from kmq_kernels.tasks import TaskError, load_task, tokenize
from kmq_kernels.tasks.load import BANKING77, GLUE


def write(path, *lines, end="\n", bom=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(line + end for line in lines)
    path.write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    return path


def tabs(*fields):
    return "\t".join(fields)


class WordTokenizer:
    """Words to their lengths, with the call and the truncation of a transformers tokenizer."""

    def __init__(self, token_types):
        self.token_types = token_types

    def __call__(self, text, text_pair=None, *, truncation, max_length, padding, return_attention_mask):
        assert truncation
        assert not padding
        assert return_attention_mask
        pairs = text_pair or [""] * len(text)
        ids = [[len(word) for word in f"{a} {b}".split()][:max_length] for a, b in zip(text, pairs, strict=True)]
        encoded = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
        return encoded | ({"token_type_ids": [[0] * len(row) for row in ids]} if self.token_types else {})


def test_banking77_is_whole():
    task = load_task()
    assert (task.name, task.num_labels, task.regression, task.metric) == ("banking77", 77, False, "accuracy")
    assert (len(task.train), len(task.evaluation["test"])) == (10003, 3080)
    assert list(task.evaluation) == ["test"]
    assert task.label_names == tuple(json.loads((BANKING77 / "categories.json").read_text()))
    counts = collections.Counter(task.evaluation["test"]["label"])
    assert counts == dict.fromkeys(range(77), 40)
    train_counts = collections.Counter(task.train["label"])
    assert (len(train_counts), min(train_counts.values()), max(train_counts.values())) == (77, 35, 187)
    assert task.train[0] == {"text": "I am still waiting on my card?", "label": task.label_names.index("card_arrival")}
    assert "CC BY 4.0" in (BANKING77 / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert (BANKING77 / "LICENSE").read_text(encoding="utf-8").startswith("Attribution 4.0 International")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [False, True])
@pytest.mark.parametrize("header", [True, False])
def test_sst2_with_and_without_header(tmp_path, end, bom, header):
    first = [tabs("sentence", "label")] if header else []
    write(tmp_path / "train.tsv", *first, tabs('a "fine film', "1"), tabs("label", "0"), end=end, bom=bom)
    write(tmp_path / "dev.tsv", *first, tabs('"', "0"), "", end=end, bom=bom)
    task = load_task("SST-2", data_dir=tmp_path)
    assert task.train.to_dict() == {"text": ['a "fine film', "label"], "label": [1, 0]}
    assert task.evaluation["validation"].to_dict() == {"text": ['"'], "label": [0]}
    assert task.label_names == ("negative", "positive")
    assert task.name == "sst2"


def test_cola_has_four_columns_and_no_header(tmp_path):
    write(tmp_path / "train.tsv", tabs("gj04", "1", "", 'He said "no.'), tabs("bc01", "0", "*", "Him left."))
    write(tmp_path / "dev.tsv", tabs("gj04", "1", "", "It rained."))
    task = load_task("cola", data_dir=str(tmp_path))
    assert task.train.to_dict() == {"text": ['He said "no.', "Him left."], "label": [1, 0]}
    assert task.metric == "matthews_correlation"


MRPC_HEADER = tabs("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")


@pytest.mark.parametrize(
    ("train", "held_out", "key"),
    [("train.tsv", "dev.tsv", "validation"), ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt", "test")],
)
def test_mrpc_in_both_layouts(tmp_path, train, held_out, key):
    lines = (tabs("1", "7", "8", 'A "quoted', "B"), tabs("0", "9", "10", "C", "D"))
    write(tmp_path / train, MRPC_HEADER, *lines, bom=True, end="\r\n")
    write(tmp_path / held_out, MRPC_HEADER, tabs("0", "1", "2", "E", "F"), bom=True)
    task = load_task("MRPC", data_dir=tmp_path)
    assert task.train.to_dict() == {"text": ['A "quoted', "C"], "text_pair": ["B", "D"], "label": [1, 0]}
    assert task.evaluation[key].to_dict() == {"text": ["E"], "text_pair": ["F"], "label": [0]}
    assert task.metrics == ("accuracy", "f1")


@pytest.mark.parametrize(
    ("name", "columns", "labels"),
    [
        ("RTE", ("sentence1", "sentence2"), ("entailment", "not_entailment")),
        ("QNLI", ("question", "sentence"), ("entailment", "not_entailment")),
        ("WNLI", ("sentence1", "sentence2"), ("0", "1")),
    ],
)
def test_inference_pairs(tmp_path, name, columns, labels):
    header = tabs("index", *columns, "label")
    write(tmp_path / name / "train.tsv", header, tabs("0", '"A"', "B", labels[1]), tabs("1", "C", 'D "', labels[0]))
    write(tmp_path / name / "dev.tsv", header, tabs("0", "E", "F", labels[1]))
    task = load_task(name.lower(), data_dir=tmp_path)  # the folder of GLUE's folders
    assert task.train.to_dict() == {"text": ['"A"', "C"], "text_pair": ["B", 'D "'], "label": [1, 0]}
    assert task.evaluation["validation"].to_dict() == {"text": ["E"], "text_pair": ["F"], "label": [1]}
    assert (task.num_labels, task.metrics) == (2, ("accuracy",))


STSB_HEADER = tabs("index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score")


def stsb_line(score):
    return tabs("0", "news", "MSRvid", "2012", "1", "none", "none", "A plane.", "An air plane.", score)


def test_stsb_is_a_regression(tmp_path):
    write(tmp_path / "train.tsv", STSB_HEADER, stsb_line("5.000"), stsb_line("3.8"))
    write(tmp_path / "dev.tsv", STSB_HEADER, stsb_line("0"))
    task = load_task("STS-B", data_dir=tmp_path)
    assert (task.regression, task.num_labels, task.label_names, task.metric) == (True, 1, None, "pearson")
    assert task.train["label"][:] == pytest.approx([5.0, 3.8])
    assert task.train.features["label"].dtype == "float32"
    write(tmp_path / "dev.tsv", STSB_HEADER, stsb_line("high"))
    with pytest.raises(TaskError, match=r"dev\.tsv, line 2: the label 'high' is not a finite number"):
        load_task("stsb", data_dir=tmp_path)


def test_qqp_leaves_out_and_counts_malformed_lines(tmp_path, caplog):
    header = tabs("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
    good = tabs("1", "2", "3", 'Why "so?', "Why?", "1")
    malformed = (tabs("1", "2", "3", "cut"), tabs("4", "5", "6", "", "empty", "0"), good + "\textra")
    write(tmp_path / "train.tsv", header, good, *malformed)
    write(tmp_path / "dev.tsv", header, good)
    task = load_task("QQP", data_dir=tmp_path)
    assert task.train.to_dict() == {"text": ['Why "so?'], "text_pair": ["Why?"], "label": [1]}
    assert task.skipped_lines == {"train.tsv": 3}
    assert "3 malformed lines left out of 4" in caplog.text
    write(tmp_path / "dev.tsv", header, "cut")
    with pytest.raises(TaskError, match="has no examples; all 1 lines are malformed"):
        load_task("QQP", data_dir=tmp_path)


def test_mnli_has_two_validation_sets_with_other_columns(tmp_path):
    train_header = tabs("index", "genre", "sentence1", "sentence2", "label1", "gold_label")
    dev_header = tabs("index", "genre", "sentence1", "sentence2", "label1", "label2", "gold_label")
    write(tmp_path / "train.tsv", train_header, tabs("0", "g", "A", "B", "-", "neutral"), tabs("1", "g", "C", "D", "-", "-"))
    for kind, label in (("matched", "entailment"), ("mismatched", "contradiction")):
        write(tmp_path / f"dev_{kind}.tsv", dev_header, tabs("0", "g", kind, "F", "neutral", "neutral", label))
    task = load_task("mnli", data_dir=tmp_path)
    assert task.train.to_dict() == {"text": ["A"], "text_pair": ["B"], "label": [1]}
    assert task.skipped_lines == {"train.tsv": 1}
    assert list(task.evaluation) == ["validation_matched", "validation_mismatched"]
    assert task.evaluation["validation_matched"].to_dict() == {"text": ["matched"], "text_pair": ["F"], "label": [0]}
    assert task.evaluation["validation_mismatched"].to_dict() == {"text": ["mismatched"], "text_pair": ["F"], "label": [2]}
    assert task.label_names == ("entailment", "neutral", "contradiction")


def test_own_csv_with_quotes_newlines_and_string_labels(tmp_path):
    train = write(tmp_path / "mine.csv", "topic,body", 'b,"one, ""two""\nthree"', "a,four", bom=True)
    validation = write(tmp_path / "held.csv", "body,topic", "five, b ")
    task = load_task(None, train_file=train, validation_file=str(validation), text_columns=["body"], label_column="topic")
    assert (task.name, task.label_names, task.metric) == (f"{tmp_path.name}/mine.csv", ("a", "b"), "accuracy")
    assert task.folder == f"{tmp_path.name}-mine"
    assert task.train.to_dict() == {"text": ['one, "two"\nthree', "four"], "label": [1, 0]}
    assert task.evaluation["validation"].to_dict() == {"text": ["five"], "label": [1]}


def test_own_jsonl_pairs_with_integer_labels_sorted_as_numbers(tmp_path):
    rows = [{"a": "x", "b": "y", "label": 10}, {"label": "9", "b": "w", "a": "z"}, {"a": "p", "b": "q", "label": 10.0}]
    train = write(tmp_path / "t.jsonl", *map(json.dumps, rows), end="\r\n")
    task = load_task(train_file=train, validation_file=train, text_columns=("a", "b"))
    assert task.label_names == ("9", "10")
    assert task.train.to_dict() == {"text": ["x", "z", "p"], "text_pair": ["y", "w", "q"], "label": [1, 0, 1]}


def test_own_tsv_names_with_an_underscore_or_a_dash_are_classes(tmp_path):
    train = write(tmp_path / "t.tsv", tabs("text", "label"), tabs('"a', "1_2"), tabs("b", "12"), tabs("c", "-"))
    task = load_task(train_file=train, validation_file=train)
    assert task.label_names == ("-", "12", "1_2")
    assert task.train["text"][0] == '"a'


def test_own_fractional_labels_are_a_regression(tmp_path):
    train = write(tmp_path / "t.csv", "text,label", "a,1", "b,2.5")
    validation = write(tmp_path / "v.csv", "text,label", "a,3")
    task = load_task(train_file=train, validation_file=validation)
    assert (task.regression, task.num_labels, task.metrics) == (True, 1, ("pearson", "spearman"))
    assert task.train["label"][:] == [1.0, 2.5]
    assert task.evaluation["validation"]["label"][:] == [3.0]


@pytest.mark.parametrize("token_types", [False, True])
def test_tokenize_truncates_and_does_not_pad(tmp_path, token_types, monkeypatch):
    monkeypatch.setattr("kmq_kernels.tasks.task.TOKENIZE_BATCH", 2)
    train = write(tmp_path / "t.csv", "text,other,label", "aa b,cccc,0", "d,e,1", "f g h i,j,1")
    task = load_task(train_file=train, validation_file=train, text_columns=("text", "other"))
    tokens = tokenize(task.train, WordTokenizer(token_types), max_length=3)
    assert tokens["input_ids"][:] == [[2, 1, 4], [1, 1], [1, 1, 1]]
    assert tokens["attention_mask"][:] == [[1, 1, 1], [1, 1], [1, 1, 1]]
    assert tokens["labels"][:] == [0, 1, 1]
    assert ("token_type_ids" in tokens.column_names) == token_types
    assert "text" not in tokens.column_names


def glue_task(tmp_path, name):
    """A task with GLUE's metrics and one-line files."""
    layout = GLUE[name]
    columns = layout.columns or (*layout.text_columns, layout.label_column)
    line = tabs(*((layout.labels or ("1.5",))[0] if column == layout.label_column else "x" for column in columns))
    for file in ("train.tsv", *layout.evaluation_files.values()):
        write(tmp_path / file, *([] if layout.columns else [tabs(*columns)]), line)
    return load_task(name, data_dir=tmp_path)


def logits(classes, num_labels=2):
    return np.eye(num_labels, dtype=np.float32)[classes]


def test_classification_metrics_by_hand(tmp_path):
    # Against labels 1 1 1 0 0 0: 2 true and 1 false positives, 2 true and 1 false negatives.
    predictions, labels = logits([1, 1, 0, 1, 0, 0]), np.array([1, 1, 1, 0, 0, 0])
    metrics = glue_task(tmp_path / "mrpc", "mrpc").compute_metrics((predictions, labels))
    assert metrics == pytest.approx({"accuracy": 4 / 6, "f1": 2 / 3})
    matthews = glue_task(tmp_path / "cola", "cola").compute_metrics(((predictions, "hidden states"), labels))
    assert matthews == pytest.approx({"matthews_correlation": (2 * 2 - 1 * 1) / 9})
    assert load_task().compute_metrics((logits([3, 76, 5, 5], 77), np.array([3, 76, 5, 0]))) == {"accuracy": 0.75}


def test_regression_metrics_by_hand(tmp_path):
    task = glue_task(tmp_path, "stsb")
    # Deviations of x: -3 -2 -1 6 (sum of squares 50), of y: -1 -2 1 2 (10); their products add up to 3 + 4 - 1 + 12 = 18.
    # Ranks 1 2 3 4 and 2 1 3 4 differ by 1 twice: 1 - 6 * 2 / (4 * 15).
    predictions, labels = np.array([[0], [1], [2], [9]], np.float32), np.array([2, 1, 4, 5], np.float32)
    metrics = task.compute_metrics((predictions, labels))
    assert metrics == pytest.approx({"pearson": 18 / np.sqrt(50 * 10), "spearman": 0.8})


@pytest.mark.filterwarnings("error")
def test_a_constant_prediction_correlates_with_nothing(tmp_path):
    regression, cola, qqp = (glue_task(tmp_path / name, name) for name in ("stsb", "cola", "qqp"))
    constant = (np.full((3, 1), 0.1, np.float32), np.array([0.0, 1.0, 2.0]))
    assert regression.compute_metrics(constant) == {"pearson": 0.0, "spearman": 0.0}
    assert cola.compute_metrics((logits([1, 1, 1]), np.array([0, 1, 1]))) == {"matthews_correlation": 0.0}
    assert qqp.compute_metrics((logits([0, 0]), np.array([0, 0]))) == {"accuracy": 1.0, "f1": 0.0}


def test_refused_names_and_arguments(tmp_path):
    known = r"name: unknown task 'sst3'; the tasks are banking77, sst2, cola, .*mnli, or your own .*; nearest: sst2"
    with pytest.raises(TaskError, match=known):
        load_task("sst3")
    with pytest.raises(TaskError, match="rte needs a data folder"):
        load_task("RTE")
    with pytest.raises(TaskError, match=r"data_dir: the data folder .*nowhere does not exist"):
        load_task("rte", data_dir=tmp_path / "nowhere")
    with pytest.raises(TaskError, match=r"The data file .*train\.tsv does not exist"):
        load_task("rte", data_dir=tmp_path)
    with pytest.raises(TaskError, match="banking77 ships with the package"):
        load_task("banking77", data_dir=tmp_path)
    with pytest.raises(TaskError, match="name: which task is in the data folder"):
        load_task(data_dir=tmp_path)
    file = write(tmp_path / "t.csv", "text,label", "a,0", "b,1")
    for name in ("rte", "banking77"):
        with pytest.raises(TaskError, match=f"name: give either the task '{name}' or own files"):
            load_task(name, train_file=file, validation_file=file)
    with pytest.raises(TaskError, match="validation_file: a validation file is missing"):
        load_task(train_file=file)
    with pytest.raises(TaskError, match="train_file: a training file is missing"):
        load_task(validation_file=file)
    with pytest.raises(TaskError, match=r"The data file .*gone\.csv does not exist"):
        load_task(train_file=file, validation_file=tmp_path / "gone.csv")
    with pytest.raises(TaskError, match=r"must end in \.csv, \.tsv or \.jsonl"):
        load_task(train_file=file, validation_file=tmp_path / "t.xlsx")
    for columns in ("text", (), ("a", "b", "c")):
        with pytest.raises(TaskError, match="text_columns: expected the name of one column, or two"):
            load_task(train_file=file, validation_file=file, text_columns=columns)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.csv", b"", r"The data file .*t\.csv is empty\."),
        ("t.csv", b"\n\n", r"is empty\."),
        ("t.csv", b"text,label\n", "has no examples"),
        ("t.csv", b"body,label,id\na,0,1\n", "has no column 'text'; its columns are body, label, id"),
        ("t.csv", b"text,topic\na,0\n", "has no column 'label'; its columns are text, topic"),
        ("t.csv", b'text,label\n"a\nb",0\n  ,1\n', "line 4: the text 'text' is empty"),
        ("t.csv", b"text,label\na,0\n\nb,\n", "line 4: the label 'label' is missing"),
        ("t.csv", b"text,label\na,0\nb\n", "line 3: 1 fields, expected 2"),
        ("t.tsv", b"text\tlabel\na\tb\t0\n", "line 2: 3 fields, expected 2"),
        ("t.csv", b"text,label\na,0.5\nb,nan\n", "line 3: the label 'nan' is not a finite number"),
        ("t.csv", b"text,label\na,0.5\nb,big\n", "line 3: the label 'big' is not a finite number"),
        ("t.csv", b"text,label\na,0\nb,0\n", "all labels are '0'"),
        ("t.csv", b"text,label\na,0\ncaf\xe9,1\n", r"line 3: the file is not UTF-8 \(byte 0xe9\)"),
        ("t.csv", b'text,label\na,0\n"b,1\n', r"line 3: the record cannot be read"),
        ("t.jsonl", b'{"text": "a", "label": 0}\n{"text": \n', "line 2: not JSON"),
        ("t.jsonl", b"[1]\n", "line 1: expected one JSON object a line"),
        ("t.jsonl", b'{"text": "a", "label": 0}\n{"text": "b"}\n', "line 2: the label 'label' is missing"),
        ("t.jsonl", b'{"text": 3, "label": 0}\n', "line 1: the text 'text' is not a string but 3"),
        ("t.jsonl", b'{"text": "a", "label": [0]}\n', "line 1: the label 'label' is neither a string nor a number"),
    ],
)
def test_refused_files(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=sentence):
        load_task(train_file=tmp_path / name, validation_file=tmp_path / name)


@pytest.mark.parametrize("label", ["c", "2.5"])
def test_refused_validation_label(tmp_path, label):
    train = write(tmp_path / "t.csv", "text,label", "x,1", "y,2")
    validation = write(tmp_path / "v.csv", "text,label", "x,2.0", f"y,{label}")
    sentence = rf"v\.csv, line 3: the label '{label}' is not one of the labels of the training file \(1, 2\)"
    with pytest.raises(TaskError, match=sentence):
        load_task(train_file=train, validation_file=validation)


def test_refused_glue_label(tmp_path):
    write(tmp_path / "train.tsv", tabs("sentence", "label"), tabs("good", "yes"))
    write(tmp_path / "dev.tsv", tabs("sentence", "label"), tabs("good", "1"))
    with pytest.raises(TaskError, match=r"train\.tsv, line 2: the label 'yes' is not one of SST-2's labels \(0, 1\)"):
        load_task("sst2", data_dir=tmp_path)


@pytest.mark.parametrize("package", ["datasets", "sklearn", "scipy"])
def test_missing_packages_are_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'kmq_kernels\[train\]'"):
        load_task(train_file="no/such/file.csv")  # said before anything else


def test_all_bad_rows_are_said_at_once(tmp_path):
    rows = ["text,label", *(f"{'' if i % 2 else 'x'},{i % 3}" for i in range(14)), "short"]
    train = write(tmp_path / "t.csv", *rows)
    with pytest.raises(TaskError) as refused:
        load_task(train_file=train, validation_file=train)
    empty = "the text 'text' is empty"
    some = "; ".join(f"line {line}: {empty}" for line in (3, 5, 7, 9, 11))
    assert str(refused.value) == f"{train}: 8 rows cannot be used: {some}; and 3 more."
    validation = write(tmp_path / "v.csv", "text,label", "x,a", "y,0", "z,b")
    train = write(tmp_path / "t.csv", "text,label", "x,0", "y,1")
    with pytest.raises(TaskError, match=r"2 rows cannot be used: line 2: the label 'a' is not one of .*; line 4: the label 'b'"):
        load_task(train_file=train, validation_file=validation)
    (tmp_path / "t.csv").write_bytes(b"text,label\ncaf\xe9,0\nb,1\n\xff,1\n")
    with pytest.raises(TaskError, match=r"2 rows cannot be used: line 2: .* \(byte 0xe9\); line 4: .* \(byte 0xff\)"):
        load_task(train_file=tmp_path / "t.csv", validation_file=validation)


def test_large_integers_stay_apart(tmp_path):
    rows = ["text,label", "a,9007199254740993", "b,9007199254740992", "c,5", "d,9007199254740992.0", "e,005"]
    train = write(tmp_path / "t.csv", *rows)
    task = load_task(train_file=train, validation_file=train)
    assert task.label_names == ("5", "9007199254740992", "9007199254740993")
    assert task.train["label"][:] == [2, 1, 0, 1, 0]
    lines = [
        '{"text": "a", "label": 9007199254740993.0}',
        '{"text": "b", "label": 9007199254740992}',
        '{"text": "c", "label": 1e2}',
    ]
    train = write(tmp_path / "t.jsonl", *lines)
    assert load_task(train_file=train, validation_file=train).label_names == ("100", "9007199254740992", "9007199254740993")


@pytest.mark.parametrize("spelled", ["nan", "NaN", "inf"])
def test_no_number_among_numbers_is_a_missing_label(tmp_path, spelled):
    train = write(tmp_path / "t.csv", "text,label", "a,1", "b,0", f"c,{spelled}")
    with pytest.raises(TaskError, match=rf"t\.csv, line 4: the label 'label' is missing \('{spelled}'\)"):
        load_task(train_file=train, validation_file=train)
    names = write(tmp_path / "n.csv", "text,label", "a,cdo", f"b,{spelled}")  # the languages Min Dong and Min Nan, for example
    assert spelled in (load_task(train_file=names, validation_file=names).label_names or ())


def test_json_nan_is_a_missing_label(tmp_path):
    lines = ['{"text": "a", "label": "x"}', '{"text": "b", "label": NaN}', '{"text": "b", "label": null}']
    with pytest.raises(TaskError, match=r"line 2: the label 'label' is missing \(nan\); line 3: the label 'label' is missing"):
        load_task(train_file=write(tmp_path / "t.jsonl", *lines), validation_file=tmp_path / "t.jsonl")


@pytest.mark.parametrize("place", ["text", "label"])
def test_half_a_character_is_said_with_its_line(tmp_path, place):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y", place: "q \ud83d"}]
    train = write(tmp_path / "t.jsonl", *map(json.dumps, rows))
    with pytest.raises(TaskError, match=rf"t\.jsonl, line 2: the {place} .* half a character"):
        load_task(train_file=train, validation_file=train)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_texts_of_any_length(tmp_path, name):
    long = "rain " * 30_000
    gap = "," if name == "t.csv" else "\t"
    train = write(tmp_path / name, f"text{gap}label", f"{long}{gap}0", f"sun{gap}1")
    limit = csv.field_size_limit()
    assert load_task(train_file=train, validation_file=train).train["text"][0] == long
    assert csv.field_size_limit() == limit


def test_what_was_understood_is_said(tmp_path):
    train = write(tmp_path / "t.csv", "text,score", "a,1", "b,2.5", "c,2.5")
    task = load_task(train_file=train, validation_file=train, label_column="score")
    assert task.regression
    assert task.notes == ("label column 'score': 2 different numbers, a regression; --problem classification for classes",)
    task = load_task(train_file=train, validation_file=train, label_column="score", problem="classification")
    assert (task.label_names, task.notes) == (("1", "2.5"), ())
    whole = write(tmp_path / "w.csv", "text,label", "a,1", "b,2")
    task = load_task(train_file=whole, validation_file=whole, problem="regression")
    assert (task.regression, task.notes, task.train["label"][:]) == (True, (), [1.0, 2.0])
    with pytest.raises(TaskError, match="problem: expected classification or regression, got 'ranking'"):
        load_task(train_file=whole, validation_file=whole, problem="ranking")
    with pytest.raises(TaskError, match="problem: it is for own files"):
        load_task(problem="regression")


def test_rows_without_a_label_can_be_left_out(tmp_path):
    train = write(tmp_path / "t.csv", "text,label", "a,1", "b,-1", "c,0", ",-1")
    held = write(tmp_path / "v.csv", "text,label", "a,1", "b,-1")
    with pytest.raises(TaskError, match="line 5: the text 'text' is empty"):
        load_task(train_file=train, validation_file=held)
    task = load_task(train_file=train, validation_file=held, ignore_labels=["-1"])
    assert (task.label_names, task.train["text"][:]) == (("0", "1"), ["a", "c"])
    assert task.notes == (f"{train}: 2 rows left out for their label", f"{held}: 1 rows left out for their label")
    write(train, "text,label", "a,1", "b,-1", "c,0", "d,-1")
    task = load_task(train_file=train, validation_file=held)
    assert task.label_names == ("-1", "0", "1")
    assert task.notes == (
        f"{train}: 2 rows have the label -1, which is a class like the others; --ignore-label -1 leaves them out",
    )
    two = write(tmp_path / "two.csv", "text,label", "a,1", "b,-1")  # two classes of polarity
    assert load_task(train_file=two, validation_file=two).notes == ()


def test_a_task_can_be_loaded_again_by_its_source(tmp_path, monkeypatch):
    train = write(tmp_path / "t.csv", "body,topic", "a,x", "b,y", "c,?")
    monkeypatch.chdir(tmp_path)
    task = load_task(train_file="t.csv", validation_file="t.csv", text_columns=["body"], label_column="topic", ignore_labels="?")
    monkeypatch.chdir("/")
    again = load_task(**json.loads(json.dumps(task.source)))
    assert again.train.to_dict() == task.train.to_dict() == {"text": ["a", "b"], "label": [0, 1]}
    assert again.name == f"{train.parent.name}/t.csv"
    assert load_task(**load_task().source).name == "banking77"


def test_mistyped_columns_are_answered_with_the_nearest(tmp_path):
    train = write(tmp_path / "t.csv", "review,stars", "a,x", "b,y")
    with pytest.raises(TaskError, match=r"text_columns: .*t\.csv has no column 'reviw'; .* review, stars; nearest: review\."):
        load_task(train_file=train, validation_file=train, text_columns=["reviw"], label_column="stars")
    with pytest.raises(TaskError, match=r"label_column: .* has no column 'star'; .*; nearest: stars\."):
        load_task(train_file=train, validation_file=train, text_columns=["review"], label_column="star")


def test_reading_imports_neither_torch_nor_the_packages_of_data_sets(tmp_path, run_python):
    write(tmp_path / "t.csv", "text,label", ",0", "b,1")
    code = f"""
import json, sys
HEAVY = ("torch", "transformers", "datasets", "sklearn", "scipy", "pandas")
from kmq_kernels.tasks import TaskError, load_task
try:
    load_task(train_file={str(tmp_path / "t.csv")!r}, validation_file={str(tmp_path / "t.csv")!r})
except TaskError:
    print(json.dumps([name for name in HEAVY if name in sys.modules]))
"""
    assert run_python(code) == []

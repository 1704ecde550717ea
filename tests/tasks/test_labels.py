"""Classes of a model and of a task, matched by name: what is matched, what is taken in order and said, what is refused."""

import numpy as np
import pytest
from datasets import Dataset

from kmq_kernels.tasks import Task, TaskError, class_names, load_task, match_classes

MNLI = ("entailment", "neutral", "contradiction")


@pytest.mark.parametrize(
    ("model", "task", "order"),
    [
        (MNLI, MNLI, (0, 1, 2)),
        (("contradiction", "neutral", "entailment"), MNLI, (2, 1, 0)),
        (("CONTRADICTION", " Neutral", "Entailment"), MNLI, (2, 1, 0)),
        (("Not Entailment", "entailment"), ("entailment", "not_entailment"), (1, 0)),
        (("a", "A"), ("A", "a"), (1, 0)),  # case alone tells them apart, so it counts
        (("joy", "anger", "fear"), ("fear", "joy"), (2, 0)),  # the model knows more classes than the task has
        (("10", "9"), ("9", "10"), (1, 0)),  # the same numbers are the same classes
    ],
)
def test_classes_with_the_same_names_are_matched_in_silence(model, task, order):
    assert match_classes(model, task) == (order, "")


@pytest.mark.parametrize(
    ("model", "task"),
    [
        (("LABEL_0", "LABEL_1"), ("bad", "good")),
        (("label 0", "label 1"), ("bad", "good")),
        (("0", "1"), ("bad", "good")),
        (("bad", "good"), ("0", "1")),
    ],
)
def test_classes_without_names_are_taken_in_order_and_that_is_said(model, task):
    order, sentence = match_classes(model, task)
    assert order == (0, 1)
    assert sentence.startswith("class i of the model is taken for class i of the task, for those of the")


@pytest.mark.parametrize(
    ("model", "task", "sentence"),
    [
        (("joy", "anger"), ("bad", "good"), "the classes of the model (joy, anger) are not those of the task (bad, good)"),
        (("joy", "bad"), ("bad", "good"), "the classes of the model (joy, bad) are not those of the task (bad, good)"),
        (("LABEL_0",) * 3, ("bad", "good"), "the model has 3 classes (LABEL_0, LABEL_0, LABEL_0), the task has 2 (bad, good)"),
    ],
)
def test_other_classes_are_not_matched(model, task, sentence):
    assert match_classes(model, task) == (None, sentence)


def test_class_names_come_in_the_order_of_the_model():
    assert class_names({"1": "b", "0": "a"}, 2) == ("a", "b")
    assert class_names(None, 2) == ("LABEL_0", "LABEL_1")


def task_of(labels, names=MNLI, metrics=("accuracy",)):
    split = Dataset.from_dict({"text": ["x"] * len(labels), "label": labels})
    return Task("t", len(names), names, False, metrics, split, {"validation": split})


def test_labels_become_those_of_the_model_and_metrics_stay_those_of_the_task():
    task, sentence = task_of([0, 0, 1, 2]).for_model(("contradiction", "neutral", "entailment"))
    assert sentence == ""
    assert task.train["label"][:] == [2, 2, 1, 0]
    logits = np.eye(3)[[2, 0, 1, 0]]  # entailment, contradiction, neutral, contradiction
    assert task.compute_metrics((logits, np.array([2, 2, 1, 0]))) == {"accuracy": 0.75}
    again, _ = task.for_model(("contradiction", "neutral", "entailment"))
    assert again.train["label"][:] == [2, 2, 1, 0]  # not turned twice


def test_f1_is_that_of_the_class_the_task_counts_whatever_the_order():
    # Of the positives (label 1 of the task) 2 of 3 are found, and 2 of 3 found ones are right: f1 is 2/3.
    labels, predictions = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]
    names = ("not_duplicate", "duplicate")
    plain = task_of(labels, names, ("f1",))
    turned, _ = plain.for_model(("duplicate", "not_duplicate"))
    assert plain.compute_metrics((np.eye(2)[predictions], np.array(labels))) == pytest.approx({"f1": 2 / 3})
    other = (np.eye(2)[[1 - p for p in predictions]], np.array(turned.train["label"][:]))
    assert turned.compute_metrics(other) == pytest.approx({"f1": 2 / 3})


def test_a_class_that_only_the_model_has_is_a_wrong_answer():
    task, _ = task_of([0, 1], ("bad", "good"), ("accuracy", "f1")).for_model(("good", "mixed", "bad"))
    assert task.train["label"][:] == [2, 0]
    # mixed for bad, good for good: accuracy 1/2; precision and recall of "good" are 1.
    assert task.compute_metrics((np.eye(3)[[1, 0]], np.array([2, 0]))) == pytest.approx({"accuracy": 0.5, "f1": 1.0})


def test_a_regression_and_classes_do_not_go_together():
    with pytest.raises(TaskError, match=r"the model has 1 classes \(LABEL_0\), the task has 2"):
        task_of([0, 1], ("bad", "good")).for_model(("LABEL_0",))
    split = Dataset.from_dict({"text": ["x"], "label": [0.5]})
    with pytest.raises(TaskError, match="the model has 3 classes, t is a regression"):
        Task("t", 1, None, True, ("pearson",), split, {"validation": split}).for_model(MNLI)


@pytest.fixture
def validation(tmp_path):
    def write(*labels):
        path = tmp_path / "dev.csv"
        path.write_text("text,label\n" + "".join(f"x,{label}\n" for label in labels))
        return path

    return write


@pytest.mark.parametrize(
    ("model", "labels", "names", "expected"),
    [
        (("no", "yes"), ("yes", "No"), ("No", "yes"), [1, 0]),
        (("LABEL_0", "LABEL_1"), ("1", "0"), ("0", "1"), [1, 0]),
        (("9", "10"), ("10", "9.0"), ("9", "10"), [1, 0]),
        (("bad", "good"), ("1", "1"), ("0", "1"), [1, 1]),
        (("a", "b", "c"), ("c", "a"), ("a", "b", "c"), [2, 0]),
    ],
)
def test_a_validation_file_alone_has_the_classes_of_the_model(validation, model, labels, names, expected):
    task = load_task(validation_file=validation(*labels), model_classes=model)
    assert (len(task.train), task.label_names) == (0, names)
    assert task.evaluation["validation"]["label"][:] == expected
    assert task.for_model(model)[0].evaluation["validation"]["label"][:] == expected


def test_a_validation_file_with_labels_that_the_model_has_not(validation):
    with pytest.raises(TaskError, match=r"line 3: the label 'maybe' is not one of the classes of the model \(no, yes\)"):
        load_task(validation_file=validation("yes", "maybe"), model_classes=("no", "yes"))
    regression = load_task(validation_file=validation("1", "2.5"), model_classes=("LABEL_0",))
    assert regression.evaluation["validation"]["label"][:] == [1.0, 2.5]

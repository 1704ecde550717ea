"""Models and tasks that do not fit are refused or said, and what was learned for other classes is never renamed."""

import json
import logging

import pytest
import tiny_task
import torch
import transformers
from conftest import family_model

import kmq_kernels as kmq
from kmq_kernels import training
from kmq_kernels.files import CheckpointError
from kmq_kernels.tasks import TaskError, load_task

SHORT = training.TrainingSettings(steps=1, batch_size=4, learning_rate=1e-12, max_length=8)


@pytest.fixture
def folder(tmp_path):
    tiny_task.write_task(tmp_path)
    return tmp_path


@pytest.fixture
def task(folder):
    return load_task(train_file=folder / "train.csv", validation_file=folder / "dev.csv")


@pytest.fixture(autouse=True)
def _said_once():
    """What is said once is said in every test."""
    training.finetune.__globals__["_say"].cache_clear()


def model_with(folder, names=None, **options):
    """A model whose class 0 always wins, with these names of classes."""
    named = {} if names is None else {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = family_model("bert", **{"num_labels": len(names or "ab"), **named, **options})
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.fill_(-5.0)
        model.classifier.bias[0] = 5.0
    model.save_pretrained(folder / "model")
    return model


def kept(model):
    return bool((model.classifier.bias == torch.tensor([5.0] + [-5.0] * (len(model.classifier.bias) - 1))).all())


@pytest.mark.parametrize(
    ("names", "stays", "after", "said"),
    [
        (("no", "yes"), True, ["no", "yes"], ""),
        (("YES", "no"), True, ["YES", "no"], ""),
        (("LABEL_0", "LABEL_1"), True, ["no", "yes"], "class i of the model is taken for class i of the task"),
        (("joy", "anger"), False, ["no", "yes"], "layer for 2 (joy, anger) is made anew for 2 classes (no, yes)"),
        (("no", "yes", "maybe"), False, ["no", "yes"], "layer for 3 (no, yes, maybe) is made anew for 2 classes (no, yes)"),
    ],
)
def test_a_head_keeps_its_classes_or_is_new(names, stays, after, said, folder, task, caplog):
    model_with(folder, names)
    with caplog.at_level(logging.WARNING, "kmq_kernels"):
        model, tokenizer = training.load_for_task(str(folder / "model"), task, seed=0)
    assert kept(model) == stays
    assert [model.config.id2label[i] for i in range(2)] == after
    assert model.config.label2id == {name: i for i, name in enumerate(after)}
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("kmq_kernels")]
    assert len(ours) == bool(said)
    assert said in "".join(ours)
    metrics = training.evaluate(model, tokenizer, task, SHORT, folder / "scratch")
    if stays:  # class 0 always wins; half of the texts are of either class
        assert metrics == {"accuracy": 0.5}
    training.finetune(model, tokenizer, task, SHORT, folder / "scratch")
    assert torch.isfinite(model.classifier.weight).all()


def test_evaluation_matches_classes_by_name(folder, task, caplog):
    lines = ["text,label", *["good film,yes"] * 8, *["bad film,no"] * 2]
    (folder / "dev.csv").write_text("\n".join(lines) + "\n")
    task = load_task(train_file=folder / "train.csv", validation_file=folder / "dev.csv")
    tokenizer = training.load_tokenizer(str(folder / "model"))

    def accuracy(*names):
        return training.evaluate(model_with(folder, names), tokenizer, task, SHORT, folder / "scratch")["accuracy"]

    assert (accuracy("yes", "no"), accuracy("No", "Yes"), accuracy(" yes", "maybe", "no")) == (0.8, 0.2, 0.8)
    assert not caplog.text
    assert accuracy("LABEL_0", "LABEL_1") == 0.2
    assert "taken for class i of the task" in caplog.text
    with pytest.raises(TaskError, match=r"the classes of the model \(joy, anger\) are not those of the task \(no, yes\)"):
        accuracy("joy", "anger")


def test_calibration_and_stages_of_a_run_keep_the_order_of_the_model(folder, task):
    model_with(folder, ("yes", "no"))
    run = training.Run(
        str(folder / "model"), task, folder / "out", {"k": kmq.KMQConfig(bits=4, weighting="fisher")}, SHORT, SHORT
    )
    run.sensitivity = training.SensitivitySettings(fisher_batches=2)
    results = run()
    assert results["stage1"]["metrics"] == results["quantized"]["k"]["stage3"]["metrics"] == {"accuracy": 0.5}
    for stage in ("stage1", "k/stage2", "k/stage3"):
        config = json.loads((folder / "out" / stage / "config.json").read_text())
        assert config["id2label"] == {"0": "yes", "1": "no"}
    batch = run._calibration(kmq.load(folder / "out/stage1"), training.load_tokenizer(str(folder / "out/stage1")), 4, 1)[0]
    rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    words = [*tiny_task.SPECIAL, *tiny_task.WORDS]
    for ids, label in rows:  # "good" and "fine" are yes, which is class 0 of this model
        said = {words[i] for i in ids}
        assert label == (0 if said & {"good", "fine"} else 1)


@pytest.mark.parametrize(
    ("kind", "labels"), [("regression", 1), ("multi_label_classification", 6), ("multi_label_classification", 2)]
)
def test_an_older_problem_type_does_not_decide_the_loss(kind, labels, folder, task):
    family_model("bert", num_labels=labels, problem_type=kind).save_pretrained(folder / "model")
    model, tokenizer = training.load_for_task(str(folder / "model"), task, seed=0)
    assert (model.config.problem_type, model.classifier.weight.shape[0]) == ("single_label_classification", 2)
    losses = training.finetune(model, tokenizer, task, SHORT, folder / "scratch")
    assert 0.3 < losses[0] < 3.0
    batch = training.calibration_batches(task, tokenizer, 4, 1, 8, 0)[0]
    model.eval()
    expected = torch.nn.functional.cross_entropy(model(**batch).logits, batch["labels"])
    assert model(**batch).loss.item() == pytest.approx(expected.item())


def test_classes_and_multi_label_models_become_regressions(folder):
    (folder / "scores.csv").write_text("text,label\n" + "".join(f"good film,{i}.5\n" for i in range(8)))
    task = load_task(train_file=folder / "scores.csv", validation_file=folder / "scores.csv")
    for labels, kind in ((3, "single_label_classification"), (2, "multi_label_classification"), (1, None)):
        family_model("bert", num_labels=labels, problem_type=kind).save_pretrained(folder / "model")
        model, _ = training.load_for_task(str(folder / "model"), task, seed=0)
        assert (model.config.problem_type, model.classifier.weight.shape[0]) == ("regression", 1)


@pytest.mark.parametrize("left", [(), ("tokenizer_config.json",)])
def test_a_folder_without_a_tokenizer_is_refused(left, folder, task):
    for path in (folder / "model").iterdir():
        if path.name not in ("config.json", "model.safetensors", *left):
            path.unlink()
    with pytest.raises(CheckpointError, match=r"(has no|cannot read its) (tokenizer|vocabulary for its tokenizer)") as refused:
        training.load_for_task(str(folder / "model"), task, seed=0)
    assert "\n" not in str(refused.value)


def test_tokenizers_without_a_vocabulary_are_no_mistake(tmp_path):
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    assert training.load_tokenizer(str(tmp_path))("a")["input_ids"] == [100, 1]  # the byte, and the end of the text


def test_many_unknown_words_are_said_with_their_share(folder, caplog):
    for name in ("train", "dev"):
        rows = [f"{'quux' if i % 4 == 0 else 'very'} good film,{('no', 'yes')[i % 2]}" for i in range(8)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    task = load_task(train_file=folder / "train.csv", validation_file=folder / "dev.csv")
    model, tokenizer = training.load_for_task(str(folder / "model"), task, seed=0)
    training.evaluate(model, tokenizer, task, SHORT, folder / "scratch")
    assert not caplog.text  # 2 of 24 words, 8 %
    rows = [f"{'quux' if i % 2 == 0 else 'very'} good film,{('no', 'yes')[i % 2]}" for i in range(8)]
    (folder / "dev.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    task = load_task(train_file=folder / "train.csv", validation_file=folder / "dev.csv")
    training.evaluate(model, tokenizer, task, SHORT, folder / "scratch")
    assert "validation set: 17% of the tokens are unknown to the tokenizer" in caplog.text  # 4 of 24
    assert len(caplog.records) == 1
    training.evaluate(model, tokenizer, task, SHORT, folder / "scratch")
    assert len(caplog.records) == 1  # once


@pytest.mark.parametrize(
    ("family", "usable"),
    [("bert", 40), ("roberta", 38), ("mpnet", 38), ("distilbert", 40), ("electra", 40), ("albert", 40), ("deberta-v2", None)],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_texts_longer_than_the_model_are_refused(family, usable, quantized):
    model = family_model(family)
    if quantized:
        kmq.quantize_(model, kmq.KMQConfig(bits=3))
    tokenizer = tiny_task.word_tokenizer()
    if usable is None:  # positions are relative
        training.check_fits(model, tokenizer, 1000)
        return
    training.check_fits(model, tokenizer, usable)
    ids = torch.full((1, usable), 7)
    assert torch.isfinite(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits).all()
    with pytest.raises(training.PipelineError, match=f"max_length: the model has {usable} positions, got {usable + 1}"):
        training.check_fits(model, tokenizer, usable + 1)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_tokenizer_larger_than_the_embedding_is_refused(quantized):
    model = family_model("bert", vocab_size=13)
    if quantized:
        kmq.quantize_(model, kmq.KMQConfig(bits=3))
    with pytest.raises(training.PipelineError, match="tokenizer: it has 14 words, the model 13"):
        training.check_fits(model, tiny_task.word_tokenizer(), 8)
    training.check_fits(family_model("bert", vocab_size=14), tiny_task.word_tokenizer(), 8)


def test_everything_is_refused_before_anything_runs(folder, task):
    model, tokenizer = training.load_for_task(str(folder / "model"), task, seed=0)
    long = training.TrainingSettings(max_length=41)
    for work in (training.finetune, training.evaluate):
        with pytest.raises(training.PipelineError, match="max_length: the model has 40 positions, got 41"):
            work(model, tokenizer, task, long, folder / "scratch")
    only = load_task(validation_file=folder / "dev.csv", model_classes=("no", "yes"))
    with pytest.raises(training.PipelineError, match=r"train_file: .* has no training set"):
        training.finetune(model, tokenizer, only, SHORT, folder / "scratch")


def test_a_model_of_characters_has_no_table_of_words(folder, task):
    """CANINE hashes characters into several embeddings; stage 3 with fixed assignments works all the same."""
    config = transformers.CanineConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_hash_buckets=64,
        max_position_embeddings=128, local_transformer_stride=16, num_labels=2,
    )  # fmt: skip
    transformers.CanineForSequenceClassification(config).save_pretrained(folder / "canine")
    transformers.CanineTokenizer().save_pretrained(folder / "canine")
    few = training.TrainingSettings(steps=1, batch_size=8, max_length=64)
    configs = {"four": kmq.KMQConfig(bits=4)}
    found = training.Run(str(folder / "canine"), task, folder / "characters", configs, stage1=few, stage3=few, control=False)()
    assert found["quantized"]["four"]["stage3"]["metrics"]

"""The three stages end to end on a tiny model: resuming, refusing, repeating bit for bit."""

import copy
import dataclasses
import json
import re
import shutil

import pytest
import torch
from conftest import family_model
from huggingface_hub import ModelCard
from tiny_task import kmq_command, write_task

import kmq_kernels as kmq
from kmq_kernels import training
from kmq_kernels.files import CheckpointError
from kmq_kernels.layers import CodebookModule
from kmq_kernels.training import load_task
from kmq_kernels.training.distillation import Teacher

OWN_FILES = ["--train-file", "{}/train.csv", "--validation-file", "{}/dev.csv"]


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT with its tokenizer, and a csv task it can learn."""
    write_task(tmp_path)
    return tmp_path


def _run(folder, out="out", **options):
    task = load_task(None, train_file=folder / "train.csv", validation_file=folder / "dev.csv")
    settings = {
        "stage1": training.TrainingSettings(steps=60, batch_size=16, learning_rate=2e-3, max_length=8),
        "stage3": training.TrainingSettings(steps=4, batch_size=8, learning_rate=1e-3, max_length=8),
        "configs": {"kmeans-2bit": kmq.KMQConfig(bits=2), "linear-3bit": kmq.KMQConfig(bits=3, scheme="linear")},
    }
    return training.Run(str(folder / "model"), task, folder / out, **{**settings, **options})


@pytest.mark.parametrize("quantized", [False, True])
def test_a_head_of_other_labels_is_made_anew_and_nothing_else(folder, quantized):
    task = load_task(None, train_file=folder / "train.csv", validation_file=folder / "dev.csv")
    source = family_model("bert", num_labels=5)
    if quantized:
        kmq.quantize_(source, kmq.KMQConfig(bits=3))
    source.save_pretrained(folder / "model")
    model, _ = training.load_for_task(str(folder / "model"), task, seed=0)
    assert model.classifier.weight.shape == (2, 32)
    before = dict(source.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if not name.startswith("classifier"))
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps({**config, "vocab_size": 130}))
    with pytest.raises(CheckpointError, match="word_embeddings"):
        training.load_for_task(str(folder / "model"), task, seed=0)


def test_stages_resume_and_repeat(folder):
    results = _run(folder)()
    assert results == json.loads((folder / "out/results.json").read_text())
    assert results["stage1"]["metrics"]["accuracy"] > 0.9
    assert results["quantized"]["kmeans-2bit"]["stage3"]["metrics"]["accuracy"] > 0.6
    card = ModelCard.load(folder / "out/kmeans-2bit/stage3/README.md")
    assert "import kmq_kernels" in card.text
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    third = results["quantized"]["kmeans-2bit"]["stage3"]["metrics"]
    assert measured == {name: pytest.approx(third[name], abs=1e-5) for name in measured}
    assert f"| {results['control']['metrics']['accuracy']:.4f} | {third['accuracy']:.4f} |" in card.text

    second = kmq.load(folder / "out/kmeans-2bit/stage2")
    third = kmq.load(folder / "out/kmeans-2bit/stage3")
    stages = {n: m for n, m in second.named_modules() if isinstance(m, CodebookModule)}
    for name, module in ((n, m) for n, m in third.named_modules() if isinstance(m, CodebookModule)):
        assert torch.equal(module.packed, stages[name].packed)
        assert not torch.equal(module.codebook, stages[name].codebook) or "token_type" in name or "position" in name
    first = kmq.load(folder / "out/stage1")
    assert torch.equal(second.classifier.weight, first.classifier.weight)

    # An interrupted run: a stage is missing, the rest stays as it is.
    weights = (folder / "out/kmeans-2bit/stage3/model.safetensors").read_bytes()
    shutil.rmtree(folder / "out/kmeans-2bit/stage3")
    announced = []
    again = _run(folder, announce=announced.append)()
    assert sum("finished earlier" in line for line in announced) == len(announced) - 1
    assert (folder / "out/kmeans-2bit/stage3/model.safetensors").read_bytes() == weights
    assert again["quantized"]["kmeans-2bit"]["stage3"]["metrics"] == results["quantized"]["kmeans-2bit"]["stage3"]["metrics"]

    _run(folder, "other")()
    for name in ("stage1", "control", "kmeans-2bit/stage3", "linear-3bit/stage3"):
        same = [(folder / out / name / "model.safetensors").read_bytes() for out in ("out", "other")]
        assert same[0] == same[1], name


def test_configurations_can_be_added_to_a_finished_run(folder):
    one = {"kmeans-2bit": kmq.KMQConfig(bits=2)}
    short = training.TrainingSettings(steps=3, batch_size=8, max_length=8)
    _run(folder, configs=one, stage1=short)()
    announced = []
    more = {"kmeans-3bit": kmq.KMQConfig(bits=3)}
    results = _run(folder, configs=more, stage1=short, announce=announced.append, stage3_of={"kmeans-3bit": None})()
    assert list(results["quantized"]) == ["kmeans-2bit", "kmeans-3bit"]
    assert results["quantized"]["kmeans-3bit"]["stage3"] is None
    assert sum("finished earlier" in line for line in announced) == 2
    # The first command still goes on from there; the same name with another meaning is refused.
    assert _run(folder, configs=one, stage1=short)()["quantized"]["kmeans-3bit"]["stage2"] is not None
    for change in ({"configs": {"kmeans-2bit": kmq.KMQConfig(bits=4)}}, {"configs": more}):
        with pytest.raises(training.PipelineError, match="another run"):
            _run(folder, stage1=short, **change)()


def test_distillation_follows_the_teacher(folder):
    few = training.TrainingSettings(steps=30, batch_size=16, learning_rate=2e-3, max_length=8)
    runs = {}
    for distill in (False, True):
        settings = dataclasses.replace(few, distill=distill)
        name = f"distill-{distill}"
        one = {"kmeans-1bit": kmq.KMQConfig(bits=1)}
        runs[distill] = _run(folder, name, configs=one, stage1=few, stage3=settings, control=False)
        runs[distill]()
    task = runs[True].task
    teacher, tokenizer = training.load_for_task(str(folder / "distill-True/stage1"), task, 0)
    batch = training.calibration_batches(task, tokenizer, 32, 1, 8, 0)[0]
    labels = batch.pop("labels")

    def distance(distill):
        model = kmq.load(folder / f"distill-{distill}/kmeans-1bit/stage3").eval()
        with torch.no_grad():
            out, theirs = (m(**batch, output_hidden_states=True) for m in (model, teacher.eval()))
        return float(training.distillation_loss(out, theirs, batch["attention_mask"], False))

    assert distance(True) < distance(False)
    with torch.no_grad():
        same = teacher(**batch, output_hidden_states=True)
    assert float(training.distillation_loss(same, same, batch["attention_mask"], False)) == pytest.approx(0.0, abs=1e-6)
    assert labels.shape == (32,)
    with pytest.raises(training.PipelineError, match="expected a model to distill from"):
        training.finetune(teacher, tokenizer, task, dataclasses.replace(few, distill=True), folder / "scratch")


def test_distillation_has_no_dropout():
    """A model that follows itself is where it should be, however much it drops otherwise."""
    model = family_model("bert", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train()
    teacher = Teacher(copy.deepcopy(model))
    batch = {"input_ids": torch.arange(1, 25).reshape(3, 8), "attention_mask": torch.ones(3, 8, dtype=torch.long)}
    ours, theirs = teacher.outputs(model, batch)
    assert float(training.distillation_loss(ours, theirs, batch["attention_mask"], False)) == pytest.approx(0.0, abs=1e-6)
    assert all(module.training for module in model.modules())
    frozen = model.bert.embeddings.eval()
    with pytest.raises(IndexError):
        teacher.outputs(model, {**batch, "input_ids": batch["input_ids"] + 10**6})
    assert model.training
    assert not frozen.training
    assert ours.logits.requires_grad
    assert not theirs.logits.requires_grad


def test_interrupt_leaves_nothing_half_written(folder, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("kmq_kernels.training.run.evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _run(folder)()
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["run.json", "task.json"]


def test_full_disk_leaves_nothing_half_written(folder, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kmq_kernels.training.run.save", full)
    with pytest.raises(OSError, match="No space left"):
        _run(folder)()
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["run.json", "task.json"]


def test_other_request_and_foreign_folder_are_refused(folder):
    _run(folder)._open_folder()
    with pytest.raises(training.PipelineError, match="another run"):
        _run(folder, control=False)()
    (folder / "mine").mkdir()
    (folder / "mine/thesis.txt").write_text("x")
    with pytest.raises(training.PipelineError, match="it exists"):
        _run(folder, "mine")()


def test_codebooks_have_their_own_group():
    model = family_model("bert")
    kmq.quantize_(model, kmq.KMQConfig(bits=2))
    settings = training.TrainingSettings(learning_rate=1e-4, codebook_lr_mult=5.0)
    groups = training.parameter_groups(model, settings)
    books = {id(m.codebook) for m in model.modules() if isinstance(m, CodebookModule)}
    assert {id(p) for p in groups[-1]["params"]} == books
    assert groups[-1]["weight_decay"] == 0.0
    assert groups[-1]["lr"] == pytest.approx(5e-4)
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())


def test_command_line(folder, monkeypatch, capsys):
    assert kmq_command(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{kmq.__version__}\n"
    files = ["--train-file", folder / "train.csv", "--validation-file", folder / "dev.csv", "--max-length", 8]
    few = ["--steps", 2, "--batch-size", 8]
    assert kmq_command(monkeypatch, "finetune", folder / "model", "-o", folder / "tuned", *few, *files) == 0
    assert (
        kmq_command(monkeypatch, "run", folder / "tuned", "-o", folder / "run", *few, "--second-steps", 2, "--bits", 3, *files)
        == 0
    )
    assert "kmeans-3bit" in capsys.readouterr().out
    third = folder / "run/kmeans-3bit/stage3"
    assert kmq_command(monkeypatch, "evaluate", third, "--json", *files) == 0
    assert 0 <= json.loads(capsys.readouterr().out.strip().splitlines()[-1])["accuracy"] <= 1
    assert kmq_command(monkeypatch, "inspect", third, "--json") == 0
    layers = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["model"]["layers"]
    assert {layer["bits"] for layer in layers} == {3}
    assert kmq_command(monkeypatch, "inspect", third) == 0
    # A quantized model goes on training with its indices fixed.
    assert kmq_command(monkeypatch, "finetune", third, "-o", folder / "more", *few, *files) == 0
    assert torch.equal(kmq.load(folder / "more").bert.pooler.dense.packed, kmq.load(third).bert.pooler.dense.packed)


COMPARED = [
    {"name": "kmeans-2bit", "bits": 2},
    {"name": "int8", "preset": "int8"},
    {"name": "fisher-7bpw", "allocation": "fisher", "bits_per_weight": 7.0, "stage3": False},
    {"name": "hessian-7bpw", "preset": "hessian", "bits_per_weight": 7.0, "stage3": False},
    {"name": "outliers-2bit", "bits": 2, "outlier_fraction": 0.02, "row_scale": True, "distill": True},
]


def compare_arguments(folder):
    """`kmq run --compare` on the tiny model, two seeds, into folder/cmp."""
    (folder / "list.json").write_text(json.dumps(COMPARED))
    files = ["--train-file", folder / "train.csv", "--validation-file", folder / "dev.csv", "--max-length", 8]
    few = ["--steps", 4, "--second-steps", 3, "--batch-size", 8, "--fisher-batches", 4, "--hessian-batches", 1]
    return ["run", folder / "model", "--compare", folder / "list.json", "--seeds", 2, *few, *files, "-o", folder / "cmp"]


def test_compare_resumes_and_reports(folder, monkeypatch, capsys):
    arguments = compare_arguments(folder)
    calls = []
    evaluate = training.evaluate

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr("kmq_kernels.training.run.evaluate", interrupted)
    assert kmq_command(monkeypatch, *arguments) == 130
    monkeypatch.setattr("kmq_kernels.training.run.evaluate", evaluate)
    capsys.readouterr()
    assert kmq_command(monkeypatch, *arguments) == 0
    out = capsys.readouterr().out
    assert out.count("finished earlier") == 5
    assert all(entry["name"] in out for entry in COMPARED)
    page = (folder / "cmp/report.html").read_text()
    assert re.search(r"<dt>stage3 of outliers-2bit</dt><dd>[^<]*distill True", page)
    assert "<dt>stage3 of hessian-7bpw</dt><dd>none</dd>" in page
    for seed in (0, 1):
        run = folder / f"cmp/{folder.name}-train/seed{seed}"
        results = json.loads((run / "results.json").read_text())
        assert results["quantized"]["fisher-7bpw"]["stage3"] is None
        assert results["quantized"]["fisher-7bpw"]["stage2"]["bits_per_weight"] <= 7.0
        assert results["quantized"]["kmeans-2bit"]["stage3"]["losses"]
        assert results["request"]["configs"]["int8"]["seed"] == seed
        assert not list(run.glob("*/stage[23]/*.safetensors"))  # a comparison keeps figures, not weights
        layers = json.loads((run / "outliers-2bit/stage3/layers.json").read_text())
        assert all("error" in layer for layer in layers if "bits" in layer)
    # All is there: nothing is computed, and the page can be made again.
    assert kmq_command(monkeypatch, *arguments) == 0
    assert capsys.readouterr().out.count("finished earlier") == 20
    assert kmq_command(monkeypatch, "report", folder / "cmp", "-o", folder / "page.html") == 0
    assert (folder / "page.html").read_bytes() == (folder / "cmp/report.html").read_bytes()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "not a list of configurations in JSON"),
        ("[]", "expected a list of objects, at least one"),
        ('[{"bits": 2}]', "entry 0: expected a name that can be a folder's, got None"),
        ('[{"name": "../x"}]', "expected a name that can be a folder's"),
        ('[{"name": "a"}, {"name": "a"}]', "entry 1: the name 'a' is taken"),
        ('[{"name": "stage1"}]', "the name 'stage1' is taken"),
        ('[{"name": "a", "bits": 9}]', "entry 0, a: bits: expected an integer from 1 to 8, got 9"),
        ('[{"name": "a", "colour": 1}]', "unknown keys colour"),
    ],
)
def test_lists_of_configurations_that_are_wrong(tmp_path, content, sentence):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(training.PipelineError, match=sentence):
        training.read_variants(tmp_path / "list.json")


def test_standard_list_has_all_systems_and_no_name_twice():
    names = [variant.name for variant in training.standard_variants()]
    assert len(names) == len(set(names))
    wanted = {"kmeans-1bit", "linear-1bit", "int8", "paper-3bit", "hessian-2.5bpw", "fisher-3bpw", "kmeans-distill-2bit"}
    assert wanted <= set(names)


def test_ctrl_c_says_how_to_go_on(folder, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("kmq_kernels.training.run.evaluate", interrupted)
    files = ["--train-file", folder / "train.csv", "--validation-file", folder / "dev.csv", "--max-length", 8]
    assert kmq_command(monkeypatch, "run", folder / "model", "-o", folder / "run", "--steps", 1, *files) == 130
    assert "interrupted" in capsys.readouterr().err
    assert sorted(p.name for p in (folder / "run").iterdir()) == ["run.json", "task.json"]


TEXTS = ["run", "{}/model", "--task", "texts", "--train-file", "{}/train.csv", "--bits", "2"]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["run", "{}/nowhere"], 1, "no such model folder"),
        (["run", "{}/model", "--task", "poetry"], 1, "poetry"),
        (["run", "{}/model", "--bits", "9"], 1, "--bits: expected an integer from 1 to 8, got 9"),
        (["run", "{}/model", "--steps", "0"], 1, "steps: expected at least 1"),
        (["run", "{}/model", "--size", "much"], 1, "size: expected a size such as"),
        (
            ["run", "{}/model", "--size", "2KB", "--max-length", "8", *OWN_FILES],
            1,
            "size: the smallest possible for this model is",
        ),
        (["run", "{}/model", "--compare", "{}/none.json"], 1, "none.json: there is no such file; expected a list"),
        (["run", "{}/model", "--moving-steps", "7"], 1, "--moving-steps: no assignments move here; --assignments moving lets"),
        (["run", "{}/model", "--latent-lr-mult", "7"], 1, "--latent-lr-mult: no assignments move here"),
        (["run", "{}/model", "--group-rows", "4"], 1, "--group-rows: it is for --granularity group, got tensor"),
        ([*TEXTS, "--steps", "9"], 1, "--steps: it is for stage 1, which the task texts does not have"),
        ([*TEXTS, "--label-column", "x"], 1, "--label-column: the task texts has no labels"),
        ([*TEXTS, "--no-distill"], 1, "distill: to follow the model itself is all that the task texts has to learn"),
        (["run", "{}/model", "--bits", "2", "--bits", "2"], 1, "kmeans-2bit-output: asked for twice"),
        (["report", "{}"], 1, "no results of `kmq run`"),
        (["finetune", "{}/model", "-o", "{}"], 1, "it exists"),
        (["evaluate", "{}/nowhere"], 1, "no such model folder"),
        (["run", "--colour", "red"], 2, "No such option"),
        (["inspect", "{}/nowhere"], 1, "no such model folder"),
    ],
)
def test_mistakes_end_in_one_sentence(folder, monkeypatch, capsys, arguments, code, sentence):
    monkeypatch.chdir(folder)
    assert kmq_command(monkeypatch, *[a.format(folder) for a in arguments]) == code
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


def test_embedded_model_is_found_without_importing(monkeypatch):
    monkeypatch.setattr("kmq_kernels.training.models._EMBEDDED_PACKAGE", "no_such_package_here")
    with pytest.raises(training.PipelineError, match=r"kmq_kernels\[demo\]"):
        training.resolve_model("minilm")

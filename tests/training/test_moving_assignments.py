"""Stage 3 with moving assignments: what is saved is what was evaluated, a killed stage gives the same bits, what is refused."""

import dataclasses
import json
import re

import pytest
import torch
import transformers
from conftest import family_model
from tiny_task import kmq_command, write_task

import kmq_kernels as kmq
from kmq_kernels import training
from kmq_kernels.layers import CodebookModule
from kmq_kernels.training import load_task
from kmq_kernels.training import run as run_module

FEW = training.TrainingSettings(steps=12, batch_size=16, learning_rate=2e-3, max_length=8)
MOVING = dataclasses.replace(FEW, steps=8, assignments="moving", distill=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT with its tokenizer, and a csv task."""
    folder = tmp_path_factory.mktemp("moving")
    write_task(folder)
    return folder


def _run(folder, out, **options):
    task = load_task(None, train_file=folder / "train.csv", validation_file=folder / "dev.csv")
    settings = {"stage1": FEW, "stage3": MOVING, "configs": {"two": kmq.KMQConfig(bits=2)}, "control": False}
    return training.Run(str(folder / "model"), task, folder / out, **{**settings, **options})


def _codes(folder):
    return {name: m.packed for name, m in kmq.load(folder).named_modules() if isinstance(m, CodebookModule)}


def test_what_is_saved_is_what_was_evaluated(folder, monkeypatch):
    seen = {}

    def evaluate(model, *args, **kwargs):
        seen.clear()
        seen.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return evaluated(model, *args, **kwargs)

    evaluated = run_module.evaluate
    monkeypatch.setattr(run_module, "evaluate", evaluate)
    results = _run(folder, "saved")()
    third = kmq.load(folder / "saved/two/stage3")
    assert {name: tensor.shape for name, tensor in third.state_dict().items()} == {n: t.shape for n, t in seen.items()}
    assert all(torch.equal(tensor, seen[name]) for name, tensor in third.state_dict().items())
    again = training.evaluate(third, training.load_tokenizer(folder / "model"), _run(folder, "saved").task, MOVING, folder / "x")
    assert again == results["quantized"]["two"]["stage3"]["metrics"]

    before, after = _codes(folder / "saved/two/stage2"), _codes(folder / "saved/two/stage3")
    assert any(not torch.equal(codes, before[name]) for name, codes in after.items())
    assert (folder / "saved/two/stage3/model.safetensors").stat().st_size == (
        folder / "saved/two/stage2/model.safetensors"
    ).stat().st_size


def test_a_killed_stage_gives_the_same_bits(folder, monkeypatch):
    _run(folder, "whole")()

    class Killed(BaseException):
        pass

    def after_five_steps(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        if self._settings.assignments == "moving" and len(self.losses) == 5:
            raise Killed
        return loss

    trainer = training.finetune.__globals__["_StageTrainer"]
    step = trainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_step", after_five_steps)
        with pytest.raises(Killed):
            _run(folder, "killed")()
    assert (folder / "killed/two/stage2").is_dir()
    assert not (folder / "killed/two/stage3").exists()
    _run(folder, "killed")()
    weights = [(folder / out / "two/stage3/model.safetensors").read_bytes() for out in ("whole", "killed")]
    assert weights[0] == weights[1]


def test_latent_weights_begin_at_the_weights_of_the_first_stage(folder, monkeypatch):
    begun = {}

    def start(modules, weights, share):
        begun.update({name: weight.clone() for name, weight in weights.items()})
        return started(modules, weights, share)

    module = training.default_assignments.__globals__
    started = module["start_moving"]
    monkeypatch.setitem(module, "start_moving", start)
    _run(folder, "begun", stage3=dataclasses.replace(MOVING, steps=1))()
    first = kmq.load(folder / "begun/stage1")
    assert set(begun) == set(_codes(folder / "begun/two/stage2"))
    assert all(torch.equal(weight, first.get_submodule(name).weight) for name, weight in begun.items())


def test_learning_rates_of_latent_weights_and_codebooks():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.LayerNorm(6))
    kmq.quantize_(layer, kmq.KMQConfig(bits=2))
    settings = training.TrainingSettings(learning_rate=1e-3, codebook_lr_mult=3, latent_lr_mult=7, weight_decay=0.1)
    with training.moving(layer) as latents:
        groups = training.parameter_groups(layer, settings)
        rates = {id(p): (group.get("lr", 1e-3), group["weight_decay"]) for group in groups for p in group["params"]}
        assert rates[id(latents[0])] == (pytest.approx(7e-3), 0.0)
        assert rates[id(layer[0].codebook)] == (pytest.approx(3e-3), 0.0)
        assert rates[id(layer[1].weight)] == (1e-3, 0.0)
        assert sum(len(group["params"]) for group in groups) == len(list(layer.parameters()))
    assert len(list(layer.parameters())) == 4


def test_defaults_by_bits():
    moves = [kmq.KMQConfig(bits=1), kmq.KMQConfig(bits=2, granularity="row"), kmq.KMQConfig(bits=2, scheme="linear")]
    stays = [kmq.KMQConfig(bits=3), kmq.KMQConfig(bits=2, preset="paper"), kmq.KMQConfig(bits=2, allocation="distortion")]
    assert [training.default_assignments(config) for config in moves] == ["moving"] * 3
    assert [training.default_assignments(config) for config in stays] == ["fixed"] * 3


def test_what_cannot_move_is_refused(folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(training.PipelineError, match="assignments: expected 'fixed' or 'moving', got 'soft'"):
        training.TrainingSettings(assignments="soft")
    sentence = "assignments: preset 'paper' keeps its indices fixed in stage 3, got 'moving'"
    with pytest.raises(training.PipelineError, match=sentence):
        _run(folder, "paper", configs={"paper": kmq.KMQConfig(preset="paper", bits=2)})()
    assert not (folder / "paper").exists()
    with pytest.raises(training.PipelineError, match="stage1: expected fixed assignments and no distillation"):
        _run(folder, "first", stage1=MOVING)()
    with pytest.raises(training.PipelineError, match="expected a quantized model for 'moving', got one without codebooks"):
        training.moving(torch.nn.Linear(3, 3)).__enter__()
    listed = [{"name": "a", "preset": "paper", "bits": 2, "assignments": "moving"}]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    with pytest.raises(training.PipelineError, match=f"list.json, entry 0, a: {sentence}"):
        training.read_variants(tmp_path / "list.json")
    (tmp_path / "list.json").write_text(json.dumps([{"name": "a", "steps": "many"}]))
    with pytest.raises(training.PipelineError, match="a: steps: expected an integer, got 'many'"):
        training.read_variants(tmp_path / "list.json")
    data = ["--train-file", folder / "train.csv", "--validation-file", folder / "dev.csv"]
    command = ["run", folder / "model", *data, "--preset", "paper", "--bits", 2, "--assignments", "moving"]
    assert kmq_command(monkeypatch, *command, "-o", tmp_path / "out") == 1
    assert capsys.readouterr().err.strip().endswith(f"--{sentence}")


def test_the_command_names_what_moves(folder, tmp_path, monkeypatch, capsys):
    data = ["--train-file", folder / "train.csv", "--validation-file", folder / "dev.csv", "--max-length", 8]
    few = ["--steps", 2, "--second-steps", 3, "--no-control", "--json", "-o", tmp_path / "out"]
    common = ["run", folder / "model", *data, *few, "--bits", 2, "--bits", 3]
    assert kmq_command(monkeypatch, *common) == 0
    assert kmq_command(monkeypatch, *common, "--assignments", "moving", "--moving-steps", 2, "--no-distill") == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    steps = {name: len(stages["stage3"]["losses"]) for name, stages in results["quantized"].items()}
    assert steps == {"kmeans-2bit-output": 3, "kmeans-3bit": 3, "kmeans-2bit-output-moving": 2, "kmeans-3bit-output-moving": 2}
    settings = results["request"]["stage3_of"]
    assert "kmeans-3bit" not in settings
    chosen = {name: (each["assignments"], each["distill"]) for name, each in settings.items()}
    assert chosen["kmeans-2bit-output"] == ("moving", True)
    assert chosen["kmeans-2bit-output-moving"] == chosen["kmeans-3bit-output-moving"] == ("moving", False)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--bits", 1], {"kmeans-1bit-output"}),
        (["--bits", 2, "--scheme", "kmeans", "--scheme", "linear"], {"kmeans-2bit-output", "linear-2bit"}),
        (["--bits", 2, "--objective", "weights"], {"kmeans-2bit"}),
        (["--bits", 2, "--assignments", "fixed"], {"kmeans-2bit"}),
        (["--bits-per-weight", 2, "--allocation", "distortion"], {"kmeans-distortion-2bpw"}),
        (["--bits", 2, "--preset", "paper"], {"paper-2bit"}),
        (["--bits", 2, "--weighting", "fisher"], {"kmeans-2bit"}),
    ],
)
def test_codebooks_are_against_outputs_where_assignments_move(options, wanted, folder, tmp_path, monkeypatch):
    """Unless the command says otherwise."""
    asked = {}

    def noted(comparison):
        asked.update({variant.name: variant.config.objective for variant in comparison.variants})
        raise training.PipelineError("noted")

    monkeypatch.setattr(training.Comparison, "run_of", lambda comparison, *_: noted(comparison))
    data = ["--train-file", folder / "train.csv", "--validation-file", folder / "dev.csv"]
    assert kmq_command(monkeypatch, "run", folder / "model", *data, *options, "-o", tmp_path / "out") == 1
    assert set(asked) == wanted
    assert all((objective == "output") == ("output" in name) for name, objective in asked.items())


def test_a_packed_model_follows_its_teacher_by_itself(folder, tmp_path, monkeypatch):
    """`kmq finetune packed --teacher stage1`: moving at 2 bits, distilled, from the teacher's weights on."""
    _run(folder, "alone")()
    packed, teacher, task = str(folder / "alone/two/stage2"), str(folder / "alone/stage1"), _run(folder, "alone").task
    asked = {}

    def noted(model, tokenizer, task, settings, scratch, followed, resumable):
        asked.update(dataclasses.asdict(settings), followed=followed)
        return []

    with monkeypatch.context() as patch:
        patch.setattr("kmq_kernels.training.single.finetune", noted)
        training.finetune_folder(packed, task, FEW, tmp_path / "noted", teacher)
        assert (asked["assignments"], asked["distill"], asked["followed"] is None) == ("moving", True, False)
        assert asked["learning_rate"] == FEW.learning_rate
        training.finetune_folder(packed, task, FEW, tmp_path / "slower", teacher, moving_rate=1e-4)
        assert asked["learning_rate"] == 1e-4
        training.finetune_folder(packed, task, FEW, tmp_path / "other", assignments="fixed", moving_rate=1e-4)
        assert (asked["assignments"], asked["distill"], asked["followed"]) == ("fixed", False, None)
        assert asked["learning_rate"] == FEW.learning_rate
    before = _codes(packed)
    training.finetune_folder(packed, task, FEW, tmp_path / "fixed", teacher, "fixed")
    assert all(torch.equal(codes, before[name]) for name, codes in _codes(tmp_path / "fixed").items())
    training.finetune_folder(packed, task, FEW, tmp_path / "moved")
    assert any(not torch.equal(codes, before[name]) for name, codes in _codes(tmp_path / "moved").items())
    assert f"| accuracy, {folder.name}/dev.csv |" in (tmp_path / "moved/README.md").read_text()
    family_model("bert", num_labels=3).save_pretrained(tmp_path / "three")
    with pytest.raises(training.PipelineError, match=r"teacher: .*three is no BertForSequenceClassification with the classes of"):
        training.finetune_folder(packed, task, FEW, tmp_path / "no", str(tmp_path / "three"))


def test_codebooks_that_are_frozen_do_not_move():
    model = family_model("bert")
    kmq.quantize_(model, kmq.KMQConfig(bits=2))
    model.requires_grad_(False)
    with pytest.raises(training.PipelineError, match="'moving' needs codebooks that train"), training.moving(model):
        pass


def test_entries_of_a_list_move_for_as_many_steps_and_options_of_their_own_are_refused(folder, tmp_path, monkeypatch, capsys):
    listed = [{"name": "a", "bits": 2, "assignments": "moving"}, {"name": "b", "bits": 2}]
    (tmp_path / "list.json").write_text(json.dumps([*listed, {**listed[0], "name": "c", "steps": 5}]))
    steps = []

    def noted(comparison):
        steps.append([variant.steps for variant in comparison.variants])
        assert all(variant.distill == (variant.assignments == "moving") for variant in comparison.variants[:3])
        raise training.PipelineError("noted")

    monkeypatch.setattr(training.Comparison, "run_of", lambda comparison, *_: noted(comparison))
    data = ["--train-file", folder / "train.csv", "--validation-file", folder / "dev.csv", "-o", tmp_path / "out"]
    command = ["run", folder / "model", *data, "--compare", tmp_path / "list.json"]
    for more in ([], ["--second-steps", 40], ["--second-steps", 40, "--moving-steps", 123]):
        assert kmq_command(monkeypatch, *command, *more) == 1
    assert steps == [[300, None, 5], [40, None, 5], [123, None, 5]]
    capsys.readouterr()
    for more in (["--objective", "output"], ["--assignments", "moving"], ["--no-distill"], ["--bits", 3], ["--scheme", "linear"]):
        assert kmq_command(monkeypatch, *command, *more) == 1
        assert re.search(r"--\w+: every entry of a list has its own; leave it out, or --compare", capsys.readouterr().err)
    assert len(steps) == 3
    assert kmq_command(monkeypatch, *command[:-1], "standard", "--bits", 3) == 1
    assert len(steps) == 4


def test_a_model_without_hidden_states_to_follow_is_refused_at_once(tmp_path):
    config = transformers.FunnelConfig(
        vocab_size=64, d_model=16, n_head=2, d_head=8, d_inner=32, block_sizes=[1, 1], num_decoder_layers=1, num_labels=2
    )
    write_task(tmp_path)
    transformers.FunnelForSequenceClassification(config).save_pretrained(tmp_path / "model")
    with pytest.raises(training.PipelineError, match=r"distill: Funnel\S+ gives hidden states of another length than the text"):
        _run(tmp_path, "out")()
    assert not (tmp_path / "out").exists()


def test_a_teacher_stays_as_it_was(folder, tmp_path):
    task = _run(folder, "x").task
    teacher = training.load_for_task(str(folder / "model"), task, 0)[0].train()
    teacher.bert.encoder.layer[0].eval()
    before = {name: module.training for name, module in teacher.named_modules()}
    model, tokenizer = training.load_for_task(str(folder / "model"), task, 0)
    kmq.quantize_(model, kmq.KMQConfig(bits=2))
    training.finetune(model, tokenizer, task, dataclasses.replace(MOVING, steps=2), tmp_path / "scratch", teacher)
    assert {name: module.training for name, module in teacher.named_modules()} == before
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())

"""kmq quantize with objective "output": what quantize_ makes, the same bytes after an interruption, and what is refused."""

import json
import shutil

import pytest
import tiny_task
import torch
from checkpoints import content, rewrite

import kmq_kernels as kmq
from kmq_kernels import cli
from kmq_kernels.checkpoint import Ranks, make_plan, quantize_checkpoint
from kmq_kernels.files import CheckpointError
from kmq_kernels.quantization import objective

pytestmark = pytest.mark.filterwarnings("ignore:calibration. fewer tokens:UserWarning")
CONFIG = kmq.KMQConfig(bits=2, objective="output")


def batches(count=6, seed=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 120, (count, 8, 12), generator=generator)
    return [{"attention_mask": torch.ones_like(each), "input_ids": each} for each in ids]


def quantized(source, out, given, config=CONFIG, **options):
    return quantize_checkpoint(make_plan(source, config, shard_bytes=20_000), out, calibration=given, **options)


def test_same_model_as_quantize_(bert, tmp_path):
    said = []
    summary = quantized(bert, tmp_path / "out", batches(), on_progress=lambda state: said.append((state.done, state.total)))
    model = kmq.load(bert)
    kmq.quantize_(model, CONFIG, calibration=batches())
    again = kmq.load(tmp_path / "out", verify=True).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert summary.shards > 1
    assert summary.times.cluster > summary.times.total / 2  # the search is clustering
    assert said == sorted(said)
    assert said[-1][0] == said[-1][1]
    before = content(tmp_path / "out")
    quantized(bert, tmp_path / "out", batches())
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize(
    "budget",
    [
        {"bits_per_weight": 5.5, "allocation": "uniform"},
        {"bits_per_weight": 11.0, "allocation": "distortion"},
        {"size": 60_000, "allocation": "distortion"},
    ],
    ids=lambda budget: f"{next(iter(budget))}-{budget['allocation']}",
)
def test_bits_that_a_budget_found(bert, tmp_path, budget):
    config = kmq.KMQConfig(objective="output", **budget)
    summary = quantize_checkpoint(make_plan(bert, config), tmp_path / "out", calibration=batches())  # one file, as in memory
    found = kmq.load(tmp_path / "out", verify=True)
    assert set(summary.module_bits) - {4}  # not those of the default
    model = kmq.load(bert)
    kmq.quantize_(model, config, calibration=batches())
    again = found.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("stop_at", [0, 3, "shard"])
def test_goes_on_where_it_was_interrupted(bert, tmp_path, stop_at, monkeypatch):
    quantized(bert, tmp_path / "whole", batches())
    calls = []

    def stop(progress):
        calls.append(progress.shard)
        if calls[-1] if stop_at == "shard" else len(calls) > stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(bert, tmp_path / "out", batches(), on_progress=stop)
    searched, group = [], objective._Search._group
    monkeypatch.setattr(objective._Search, "_group", lambda self, *given: searched.append(given) or group(self, *given))
    with pytest.raises(CheckpointError, match="begun with other texts, or another tokenizer"):
        quantized(bert, tmp_path / "out", batches(seed=4))
    other = tmp_path / "other"
    shutil.copytree(bert, other)
    rewrite(other, lambda tensors: tensors["bert.encoder.layer.0.output.dense.weight"].mul_(2))
    with pytest.raises(CheckpointError, match=r"begun from another .* \(bert.encoder.layer.0.output.dense.weight has other"):
        quantized(other, tmp_path / "out", batches())
    assert not searched
    quantized(bert, tmp_path / "out", batches())
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    every = 12  # 3 embeddings, 4 groups in each of 2 layers, the pooler
    assert len(searched) == (0 if stop_at == "shard" else every - stop_at - 1)


def test_what_is_refused(bert, tmp_path):
    with pytest.raises(ValueError, match="calibration: objective 'output' needs batches"):
        quantized(bert, tmp_path / "out", None)
    with pytest.raises(ValueError, match="calibration: objective 'weights' takes no batches"):
        quantized(bert, tmp_path / "out", batches(), kmq.KMQConfig())

    two = Ranks()
    two.size = 2
    with pytest.raises(ValueError, match="objective: 'output' goes layer after layer in one process"):
        quantized(bert, tmp_path / "out", batches(), ranks=two)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command(*arguments) -> exit code and what was said, on a tiny model with its tokenizer."""
    tiny_task.write_task(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["kmq", "quantize", str(tmp_path / "model"), *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code or 0, "".join(capsys.readouterr())

    return run


def test_command(command, tmp_path):
    texts = tmp_path / "corpus.txt"
    texts.write_text("\n".join(f"{'very ' * (i % 4)}good film\n\n not bad food {'day ' * i}" for i in range(20)))
    options = ["--bits", 2, "--objective", "output"]
    settings = tmp_path / "model/config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "pad_token_id": 100}))  # above all positions
    code, said = command(*options, "--calibration-file", texts, "-o", tmp_path / "out")
    assert code == 0, said
    assert "20 lines without a text left out" in said or "19 lines without a text left out" in said
    assert kmq.load(tmp_path / "out").config.quantization_config.objective == "output"
    code, said = command(*options, "--calibration-file", tmp_path / "train.csv", "-o", tmp_path / "out")
    assert (code, "begun with other texts" in said) == (1, True)
    code, said = command(*options, "--calibration-file", tmp_path / "train.csv", "--text-column", "body", "-o", tmp_path / "two")
    assert (code, "no column 'body'" in said) == (1, True)
    (tmp_path / "empty.txt").write_text("\n \n")
    for given, sentence in [
        (options, "objective 'output' needs a calibration file"),
        (["--calibration-file", texts], "objective 'weights' needs no calibration file"),
        ([*options, "--calibration-file", tmp_path / "empty.txt"], "has no texts"),
        ([*options, "--calibration-file", tmp_path / "absent.txt"], "does not exist"),
    ]:
        code, said = command(*given, "-o", tmp_path / "two")
        assert (code, sentence in said) == (1, True), said
    assert not (tmp_path / "two").exists()

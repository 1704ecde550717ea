"""Stage 2 with objective "output" takes the training texts."""

import json

import tiny_task

import kmq_kernels as kmq
from kmq_kernels import training
from kmq_kernels.training import run as runs

STEP = training.TrainingSettings(steps=1, batch_size=8, max_length=8)


def test_stage_2_takes_the_training_texts(tmp_path, monkeypatch):
    tiny_task.write_task(tmp_path)
    task = training.load_task(None, train_file=tmp_path / "train.csv", validation_file=tmp_path / "dev.csv")
    configs = {"plain": kmq.KMQConfig(bits=2), "output": kmq.KMQConfig(bits=2, objective="output")}
    how = training.SensitivitySettings(output_batches=6, output_batch_size=8)
    seen = []

    def quantize_(model, config, *, calibration=None, **options):
        seen.append(None if calibration is None else [tuple(batch["input_ids"].shape[:1]) for batch in calibration])
        return kmq.quantize_(model, config, calibration=calibration, **options)

    monkeypatch.setattr(runs, "quantize_", quantize_)
    run = training.Run(
        str(tmp_path / "model"), task, tmp_path / "out", configs, stage1=STEP, stage3=STEP, control=False, sensitivity=how
    )
    run()
    assert seen == [None, [(8,)] * 6]
    config = json.loads((tmp_path / "out/output/stage3/config.json").read_text())["quantization_config"]
    assert (config["objective"], config["bits"]) == ("output", 2)

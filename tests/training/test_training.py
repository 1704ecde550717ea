"""The second fine-tuning as a whole: losses of the reference path, the same bits for any number of threads, DDP, autocast."""

import importlib
import sys
import types
from pathlib import Path

import bench_training_step
import pytest
import torch
import torch.nn.functional as F
from codebook_net import Net
from conftest import family_model
from torch import nn

import kmq_kernels as kmq


def dequantizing_(model: nn.Module) -> None:
    """Has every codebook layer decode its weight and compute with the dense one: a weight gradient is made, and reduced."""
    for module in model.modules():
        if isinstance(module, kmq.CodebookLinear):
            module.forward = types.MethodType(lambda self, x: F.linear(x, self.weight, self.bias), module)
        elif isinstance(module, kmq.CodebookEmbedding):
            module.forward = types.MethodType(lambda self, ids: F.embedding(ids, self.weight, self.padding_idx), module)


def losses(model: nn.Module, batches: list, lr: float = 5e-4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    return [bench_training_step.step(model, optimizer, inputs) for inputs in batches]


def assert_close_losses(ours: list[float], theirs: list[float]) -> None:
    assert max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)) <= 1e-4


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("family", ["bert", "albert"])  # ALBERT uses the layers of one block several times in a step
def test_losses_of_50_steps_are_those_of_the_dequantizing_path(family, reduction):
    generator = torch.Generator().manual_seed(5)
    all_ids = torch.randint(5, 120, (2, 8, 16), generator=generator)
    batches = [{"input_ids": ids, "labels": ids[:, 0] % 3} for ids in all_ids] * 25
    both = []
    for reference in (False, True):
        model = family_model(family)
        kmq.quantize_(model, kmq.KMQConfig(bits=3, grad_reduction=reduction))
        if reference:
            dequantizing_(model)
        both.append(losses(model, batches, lr=2e-3))
    assert_close_losses(*both)
    assert both[0][-1] < both[0][0] * 0.9  # something was learned


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_gradients_of_a_tied_head_are_those_of_the_dequantizing_path(family):
    """One codebook, used by the embedding of the ids and by the output layer over the vocabulary."""
    ids = torch.randint(5, 120, (4, 12), generator=torch.Generator().manual_seed(3))
    both = []
    for reference in (False, True):
        model = family_model(family, "MaskedLM")
        kmq.quantize_(model, kmq.KMQConfig(bits=3))
        assert model.get_output_embeddings().codebook is model.get_input_embeddings().codebook
        if reference:
            dequantizing_(model)
        model(input_ids=ids, labels=ids).loss.backward()
        both.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(both[0]) > 10
    for name, grad in both[0].items():
        torch.testing.assert_close(grad, both[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_losses_of_50_steps_of_minilm():
    batches = [bench_training_step.batch(32, 64, number) for number in range(50)]
    both = []
    for reference in (False, True):
        model = bench_training_step.classifier()
        optimizer = bench_training_step.prepare("stage 3", model, 4)
        if reference:
            dequantizing_(model)
        both.append([bench_training_step.step(model, optimizer, inputs) for inputs in batches])
    assert_close_losses(*both)


def test_training_gives_the_same_bits_for_1_and_2_threads():
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(10):
        ids = torch.randint(0, 2000, (16, 40), generator=generator)
        batches.append({"input_ids": ids, "labels": ids[:, 0] % 50})
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            model = Net()
            runs.append((losses(model, batches), list(model.parameters())))
    finally:
        torch.set_num_threads(threads)
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_autocast_gradients_are_those_of_bf16_activations():
    model, dense = Net(), Net()
    dequantizing_(dense)
    ids = torch.randint(1, 2000, (16, 40))
    for net in (model, dense):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            net(ids, ids[:, 0] % 50).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), dense.parameters(), strict=True):
        if ours.requires_grad:
            assert ours.grad.dtype == torch.float32
            error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
            assert error < 0.02, f"{name}: {error}"  # bf16 has 8 bits


DDP = """
import json, os, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from codebook_net import Net
def work(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    net = torch.nn.parallel.DistributedDataParallel(Net())
    ids = torch.randint(0, 2000, (8, 20), generator=torch.Generator().manual_seed(9))[4 * rank : 4 * rank + 4]
    net(ids, ids[:, 0] % 50).loss.backward()
    if rank == 0:
        torch.save({n.removeprefix("module."): p.grad for n, p in net.named_parameters() if p.requires_grad}, sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
if __name__ == "__main__":
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    mp.start_processes(work, (port,), 2, start_method="fork")
"""


def test_ddp_gradients_are_those_of_the_whole_batch(tmp_path):
    import os
    import subprocess

    script, result = tmp_path / "ddp.py", tmp_path / "grads.pt"
    script.write_text(DDP)
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script, result], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    grads = torch.load(result)
    net = Net()
    ids = torch.randint(0, 2000, (8, 20), generator=torch.Generator().manual_seed(9))
    net(ids, ids[:, 0] % 50).loss.backward()
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_bar_shows_the_mean_loss_of_the_last_steps(monkeypatch, capsys):
    module = importlib.import_module("kmq_kernels.training.finetune")

    monkeypatch.setattr(module, "draws_bars", lambda: True)
    losses = []
    bar = module._Bar("stage", losses)
    bar.on_train_begin(None, types.SimpleNamespace(max_steps=2 * module.LOOK_EVERY, global_step=0), None)
    for step in range(2 * module.LOOK_EVERY):
        losses.append(torch.tensor(float(step >= module.LOOK_EVERY) + 0.25))
        bar.on_step_end(None, None, None)
    bar._bar.refresh()
    assert "loss=1.250" in capsys.readouterr().err
    bar.on_train_end(None, None, None)

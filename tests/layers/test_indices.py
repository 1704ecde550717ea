"""What does not train is no parameter: averages, optimizers and unfreezing over parameters() leave the indices alone."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import family_model
from torch import nn

import kmq_kernels as kmq
from kmq_kernels.layers import CodebookModule


def _net(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    kmq.quantize_(net, kmq.KMQConfig(bits=2, outlier_fraction=0.1, **options))
    return net


def _indices(model):
    return {
        f"{name}.{part}": getattr(module, part).clone()
        for name, module in model.named_modules()
        if isinstance(module, CodebookModule)
        for part in ("packed", "outlier_index")
        if getattr(module, part) is not None
    }


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_unfreezing_all_parameters():
    net = _net()
    net.requires_grad_(False)
    net.requires_grad_(True)
    for parameter in net.parameters():  # as SetFit does
        parameter.requires_grad = True
    assert all(parameter.requires_grad and parameter.is_floating_point() for parameter in net.parameters())
    assert not any(buffer.requires_grad for buffer in net.buffers())


def test_a_moving_average_over_parameters():
    net, x = _net(), torch.randn(20, 8)
    average, before = copy.deepcopy(net), _indices(net)
    shadow = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    start = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    net(x).square().sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    with torch.no_grad():
        for mine, theirs in zip(average.parameters(), net.parameters(), strict=True):
            mine.mul_(0.9).add_(theirs, alpha=0.1)
        for name, parameter in net.named_parameters():
            shadow[name] = 0.9 * shadow[name] + 0.1 * parameter
    assert _same(_indices(average), before)
    for name, parameter in average.named_parameters():
        torch.testing.assert_close(parameter, 0.9 * start[name] + 0.1 * net.get_parameter(name))
        torch.testing.assert_close(parameter.detach(), shadow[name])


def test_lbfgs_and_vectors_of_parameters():
    net, x = _net(), torch.randn(40, 8)
    target, before = net(x).detach() + 0.1 * torch.randn(40, 1), _indices(net)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=30)

    def closure():
        optimizer.zero_grad()
        loss = (net(x) - target).square().mean()
        loss.backward()
        return loss

    first = float(closure())
    optimizer.step(closure)
    assert float(closure()) < 0.9 * first
    vector = nn.utils.parameters_to_vector(net.parameters())
    nn.utils.vector_to_parameters(vector * 0.5, net.parameters())
    torch.testing.assert_close(nn.utils.parameters_to_vector(net.parameters()), vector * 0.5)
    assert _same(_indices(net), before)


def test_an_average_of_state_dicts_is_refused_where_it_turned_indices_into_numbers():
    net = _net()
    average = {name: 0.9 * value + 0.1 * value for name, value in net.state_dict().items()}
    before = _indices(net)
    with pytest.raises(RuntimeError, match=r"0\.packed: expected torch\.uint8, got torch\.float32"):
        net.load_state_dict(average)
    with pytest.raises(TypeError, match=r"packed: expected torch\.uint8, got torch\.int64"):
        net[0].packed = net[0].packed.long()
    assert _same(_indices(net), before)


def test_tied_layers_stay_tied_wherever_they_go(tmp_path):
    model = family_model("bert", "MaskedLM")
    kmq.quantize_(model, kmq.KMQConfig(bits=3, outlier_fraction=0.02))

    def tied(model):
        one, other = model.get_input_embeddings(), model.get_output_embeddings()
        return all(value is other.stored()[part] for part, value in one.stored().items())

    assert tied(model)
    indices = _indices(model)
    torch.save(model, tmp_path / "model.pt")
    model.save_pretrained(tmp_path / "folder")
    for again in (
        copy.deepcopy(model),
        copy.deepcopy(model).to(torch.float64),
        copy.deepcopy(model).to("meta").to_empty(device="cpu"),
        torch.load(tmp_path / "model.pt", weights_only=False),
        kmq.load(tmp_path / "folder"),
    ):
        again.load_state_dict(model.state_dict())
        again.tie_weights()
        assert tied(again)
        assert _same(_indices(again), indices)


def test_trace_of_packed_layers(tmp_path):
    embedding = kmq.CodebookEmbedding(10, 16, 3, padding_idx=0, outliers=4, row_scale=True)
    net = nn.Sequential(embedding, kmq.CodebookLinear(16, 5, 2, outliers=3))
    with torch.no_grad():
        for module in net:
            module.codebook.normal_()
            module.outlier_index.copy_(torch.arange(len(module.outlier_index)) * 7)
            module.outlier_values.normal_()
    net.eval()
    traced = torch.jit.trace(net, torch.tensor([[1, 2], [3, 4]]))
    traced.save(tmp_path / "net.pt")
    for ids in (torch.tensor([[7]]), torch.arange(10)[None]):
        assert torch.equal(torch.jit.load(tmp_path / "net.pt")(ids), net(ids))


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from conftest import family_model
import kmq_kernels as kmq
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from kmq_kernels.layers import CodebookModule
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=2)

def make():
    model = family_model("bert")
    kmq.quantize_(model, kmq.KMQConfig(bits=3, outlier_fraction=0.02))
    return model

ids = torch.randint(5, 120, (4, 12), generator=torch.Generator().manual_seed(3))
labels = torch.arange(4) % 3
whole = make()
(whole(input_ids=ids, labels=labels).loss + whole(input_ids=ids.flip(1), labels=labels).loss).backward()
expected = {name: p.grad for name, p in whole.named_parameters()}
half = slice(2 * rank, 2 * rank + 2)

# Two passes before one backward, as losses of pairs have them; DDP writes the buffers before each pass.
ddp = torch.nn.parallel.DistributedDataParallel(make())
(ddp(input_ids=ids[half], labels=labels[half]).loss + ddp(input_ids=ids[half].flip(1), labels=labels[half]).loss).backward()
for name, p in ddp.module.named_parameters():
    torch.testing.assert_close(p.grad, expected[name], atol=1e-6, rtol=1e-4)

model = make()
before = {name: m.packed.clone() for name, m in model.named_modules() if isinstance(m, CodebookModule)}
mesh = init_device_mesh("cpu", (2,))
for layer in model.bert.encoder.layer:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
model.requires_grad_(False)
model.requires_grad_(True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
(model(input_ids=ids[half], labels=labels[half]).loss + model(input_ids=ids[half].flip(1), labels=labels[half]).loss).backward()
for name, p in model.named_parameters():
    torch.testing.assert_close(p.grad.full_tensor(), expected[name], atol=1e-6, rtol=1e-4)
optimizer.step()
assert all(torch.equal(model.get_submodule(name).packed, packed) for name, packed in before.items())
print("same gradients")
"""


def test_ddp_and_fsdp2(tmp_path):
    tests = str(Path(__file__).parents[1])
    arguments = [tests, str(tmp_path / "rendezvous")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", DISTRIBUTED, str(rank), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for rank in ranks:
        out, err = rank.communicate(timeout=300)
        assert rank.returncode == 0, err.decode()[-3000:]
        assert b"same gradients" in out

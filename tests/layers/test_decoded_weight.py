"""`.weight` of a codebook layer: it reads like any tensor, and whatever would be lost in it raises."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kmq_kernels as kmq


@pytest.fixture
def layer():
    """A layer with 8 rows of 16."""
    model = nn.Sequential(nn.Linear(16, 8))
    kmq.quantize_(model, kmq.KMQConfig(bits=3))
    return model[0]


WRITES = {
    "in place": lambda w: w.mul_(0),
    "an entry": lambda w: w.__setitem__(2, 0.0),
    "an entry of a row": lambda w: w[2].__setitem__(3, 1.0),
    "a view": lambda w: w.view(-1)[3:5].zero_(),
    "a piece": lambda w: w.split(2)[1].zero_(),
    "transposed": lambda w: w.T.fill_(1.0),
    "data": lambda w: w.data.mul_(0),
    "data set": lambda w: setattr(w, "data", torch.zeros(8, 16)),
    "detached": lambda w: w.detach().add_(1),
    "copied into": lambda w: w.copy_(torch.zeros(8, 16)),
    "out": lambda w: torch.add(torch.zeros(8, 16), 1.0, out=w),
    "a list of tensors": lambda w: torch._foreach_mul_([w], 0.0),
    "initialised": lambda w: nn.init.normal_(w),
    "frozen": lambda w: setattr(w, "requires_grad", False),
    "frozen by a call": lambda w: w.requires_grad_(False),
    "a hook": lambda w: w.register_hook(lambda grad: grad * 2),
    "as numpy": lambda w: w.detach().numpy().__setitem__(0, 1.0),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_raises_and_changes_nothing(write, layer):
    before = layer.weight.clone()
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, ValueError), match=r"weight: it is decoded|read-only"):
            WRITES[write](layer.weight)
    assert torch.equal(layer.weight, before)


def test_augmented_assignment_and_assignment_raise(layer):
    weight = layer.weight.data
    with pytest.raises(RuntimeError, match="would be lost"):
        weight += 1.0  # what PEFT's merge does
    for value in (nn.Parameter(torch.zeros(8, 16)), torch.zeros(8, 16)):
        with pytest.raises(AttributeError, match="would be lost"):
            layer.weight = value


def test_reading_gives_plain_tensors(layer):
    weight = layer.weight
    x = torch.randn(3, 16)
    index = kmq.unpack(layer.packed, 3, 16).long()
    expected = layer.codebook[0][index]
    for read in (weight + 0, F.linear(x, weight), weight.clone(), weight.double(), weight @ x.T, torch.cat([weight, weight])):
        assert type(read) is torch.Tensor
    assert torch.equal(F.linear(x, weight), x @ expected.T)
    assert torch.equal(weight, expected)
    assert (weight.shape, weight.dtype, weight.requires_grad) == ((8, 16), torch.float32, True)
    assert weight.detach().numpy().sum() == pytest.approx(float(expected.sum()), rel=1e-5)
    assert torch.equal(torch.zeros(8, 16).copy_(weight), expected)  # it may be read by what writes elsewhere
    own = weight.clone()
    own.data.mul_(0)
    assert not own.any()
    (grad,) = torch.autograd.grad(F.linear(x, weight).sum(), layer.codebook)
    torch.testing.assert_close(grad[0], torch.zeros(8).index_add_(0, index.flatten(), x.sum(0).repeat(8)))


def test_copies_and_files_hold_plain_tensors(layer):
    with torch.no_grad():
        weight = layer.weight
    assert type(copy.deepcopy(weight)) is torch.Tensor
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    again = torch.load(buffer)
    assert type(again) is torch.Tensor
    assert torch.equal(again, weight)


def test_compile_sees_it(layer):
    x = torch.randn(3, 16)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return F.linear(x, self.layer.weight)

    compiled = torch.compile(Tied(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), F.linear(x, layer.weight))

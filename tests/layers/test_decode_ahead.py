"""DecodeAhead: results, and the order of what it gives to its two streams, without a device and on one."""

import contextlib

import pytest
import torch
from torch import nn

import kmq_kernels as kmq
from kmq_kernels.layers import DecodeAhead

ROWS = 20  # of the input: more than the plan of fp32 has a fused kernel for


def filled(rows, cols, **options):
    layer = kmq.CodebookLinear(cols, rows, bits=options.pop("bits", 4), **options)
    layer.packed.data = kmq.pack(torch.randint(0, 2**layer.bits, (rows, cols), dtype=torch.uint8), layer.bits)
    layer.codebook.data = torch.randn_like(layer.codebook)
    if layer.bias is not None:
        layer.bias.data = torch.randn(rows)
    return layer


def chain(**options):
    """Five layers of different shapes, widths and extras, with something between them."""
    scaled = filled(24, 20, row_scale=True, outliers=3, group_rows=8)
    scaled.row_scale.data = torch.rand(24)
    scaled.outlier_index.data, scaled.outlier_values.data = torch.tensor([1, 70, 200], dtype=torch.int32), torch.randn(3)
    layers = filled(30, 16), filled(20, 30, bits=3, bias=False), scaled, filled(24, 24, bits=8), filled(5, 24)
    return nn.Sequential(layers[0], nn.GELU(), *layers[1:])


class OnTwoClocks(DecodeAhead):
    """The streams are clocks. What runs on one is known to come after what the other did only where it waited for it.

    Two accesses to a buffer, at least one of which writes, must be ordered. late: what is on the side stream runs only when the
    main stream waits for it, else at once.
    """

    def __init__(self, model, dtype=None, late=False):
        self.late, self.waiting, self.log = late, [], []
        self.here, self.done, self.seen = "main", {"main": 0, "side": 0}, {"main": {"side": 0}, "side": {"main": 0}}
        super().__init__(model, dtype)
        self._buffers.fill_(torch.nan)

    def _new_stream(self):
        return None

    @contextlib.contextmanager
    def _on_side(self):
        self.here = "side"
        yield
        self.here = "main"

    def _fork(self):
        self.seen["side"]["main"] = self.done["main"]

    def _join(self):
        if self._pending is not None:
            self.seen["main"]["side"] = self.done["side"]
            for run in self.waiting:
                run()
            self.waiting.clear()
            self._pending = None

    def _access(self, buffer, writes):
        self.done[self.here] += 1
        for stream, time, other_buffer, other_writes in self.log:
            if stream != self.here and buffer == other_buffer and (writes or other_writes):
                assert time <= self.seen[self.here][stream], "two streams at one buffer"
        self.log.append((self.here, self.done[self.here], buffer, writes))

    def _decode(self, i):
        self._access(i % 2, True)
        if self.here == "side" and self.late:
            self.waiting.append(lambda: DecodeAhead._decode(self, i))
        else:
            super()._decode(i)

    def _multiply(self, i, input, bias):
        self._access(i % 2, False)
        return super()._multiply(i, input, bias)

    @property
    def decoded(self):
        """How many weights each stream decoded."""
        return [sum(writes and stream == on for stream, _, _, writes in self.log) for on in ("main", "side")]


@pytest.mark.parametrize("late", [False, True])
@torch.no_grad()
def test_a_pass(late):
    model, input = chain(), torch.randn(2, ROWS // 2, 16)
    expected = model(input)
    ahead = OnTwoClocks(model, late=late)
    with ahead:
        for _ in range(3):
            torch.testing.assert_close(model(input), expected, rtol=1e-5, atol=1e-5)
    assert ahead.decoded == [3, 12]
    assert all(layer.ahead is None for layer in ahead.layers)
    assert torch.equal(model(input), expected)


@pytest.mark.parametrize("late", [False, True])
@torch.no_grad()
def test_any_order_of_the_layers(late):
    """Layers left out, taken twice, backwards, few rows in between: the results stay right and the buffers apart."""
    layers = [filled(16, 16, bits=bits) for bits in (1, 2, 3, 4, 5, 6)]
    for layer in layers:
        layer.codebook.data /= 4
    ahead = OnTwoClocks(nn.ModuleList(layers), late=late)
    generator = torch.Generator().manual_seed(4)
    with ahead:
        for turn in torch.randint(0, 6, (60,), generator=generator).tolist():
            x = torch.randn(3 if turn % 4 == 1 else ROWS, 16)
            expected = nn.functional.linear(x, layers[turn].weight, layers[turn].bias)
            torch.testing.assert_close(layers[turn](x), expected, rtol=1e-5, atol=1e-5)
    assert not ahead.waiting


@torch.no_grad()
def test_new_codebooks_between_passes():
    """A pass that stopped early leaves a decoded weight behind, which the next pass must not take."""
    model, input = chain(), torch.randn(ROWS, 16)
    with OnTwoClocks(model):
        model[0](input)
        for layer in model:
            if isinstance(layer, kmq.CodebookLinear):
                layer.codebook.mul_(-0.5)
        got = model(input)
    torch.testing.assert_close(got, model(input), rtol=1e-5, atol=1e-5)


def test_gradients_few_rows_and_other_dtypes_are_left_to_the_op():
    model = chain()
    ahead = OnTwoClocks(model)
    with ahead:
        model(torch.randn(ROWS, 16)).sum().backward()
        with torch.no_grad():
            model(torch.randn(2, 16))
            model(torch.randn(0, 16))
            model(torch.randn(ROWS, 16).bfloat16())
    assert ahead.decoded == [0, 0]
    assert model[0].codebook.grad is not None


@torch.no_grad()
def test_compiled_layers_are_as_they_were():
    model, input = chain(), torch.randn(ROWS, 16)
    expected = torch.compile(model, fullgraph=True, backend="aot_eager")(input)
    ahead = OnTwoClocks(model)
    with ahead:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(input), expected)
    assert ahead.decoded == [0, 0]


def test_refusals():
    with pytest.raises(ValueError, match="on a CUDA device, got cpu"):
        DecodeAhead(chain())
    with pytest.raises(ValueError, match=r"got devices \[\]"):
        DecodeAhead(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got fp64"):
        DecodeAhead(chain(), torch.float64)
    model = chain()
    with OnTwoClocks(model), pytest.raises(RuntimeError, match="already"), OnTwoClocks(model):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@torch.no_grad()
def test_on_a_device(dtype):
    """Eager, on another stream, and captured in a graph: the bits of the op."""
    model = nn.Sequential(*(filled(512, 512, bits=bits) for bits in (4, 2, 3, 8, 4, 4))).cuda()
    for layer in model:
        layer.codebook.data = layer.codebook.data.to(dtype) / 32
    input = torch.randn(2048, 512, device="cuda").to(dtype)
    expected = model(input)
    ahead = DecodeAhead(model, dtype)
    with ahead:
        for _ in range(20):
            assert torch.equal(model(input), expected)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            aside = model(input)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(aside, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), ahead:
        captured = model(input)
    for _ in range(20):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)

"""codebook_linear on a CUDA device against cuBLAS and the 4-bit kernels of other packages; run by `make gpu`, or alone:

    python -m benchmarks.gpu_codebook_linear          # all shapes, M and widths; prints a line and a row for each figure

All contenders stand in one loop: a repeat times each of them once, in shuffled order, and a ratio is the median over repeats of
(time of cuBLAS) / (time of the contender) in the same repeat. One timing is the replay of a CUDA graph that calls every layer of
a ring once. The layers of a ring differ, and their packed weights alone are larger than twice the L2 cache, so that each call
reads its weight from memory; every contender has the same number of layers. Results are checked against float64 before anything
is timed.
"""

import contextlib
import importlib.metadata
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kmq_kernels as kmq
from benchmarks.gpu_keys import steady_keys
from benchmarks.gpu_steps import emit
from benchmarks.shapes import GPU_LINEAR_M, GPU_LINEARS
from kmq_kernels import ops

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.1e-2}  # relative RMS error against float64 of the dequantized weight
MOST_BYTES = 6 * 2**30  # of one contender's ring
L2_ON_A_CPU = 2**10  # the test runs on a CPU, with rings of few layers

Layer = Callable[[Tensor, Tensor], Tensor]


def ring_length(OUT: int, IN: int, bits: int, l2_bytes: int) -> int:
    """Layers whose packed weights fill twice the L2 cache, as far as their 16-bit form fits."""
    wanted = math.ceil(2 * l2_bytes / (OUT * IN * bits / 8))
    return max(2, min(wanted, MOST_BYTES // (OUT * IN * 2)))


def ours(bits: int, weights: list[Tensor]) -> tuple[dict[str, list[Layer]], Tensor]:
    """Contenders by name, and what the first layer's weight stands for: as dispatched, always fused, always decoded first."""
    from kmq_kernels.triton_kernels import codebook_linear as kernels
    from kmq_kernels.triton_kernels.dequantize import decode_rows

    OUT, IN = weights[0].shape
    dtype, device = weights[0].dtype, weights[0].device
    tiles = kernels.PLANS[max(plan for plan in kernels.PLANS if plan <= capability(device))]
    contenders: dict[str, list[Layer]] = {f"kmq {bits} bits": [], f"kmq {bits} bits, fused": [], f"kmq {bits} bits, decoded": []}
    dispatched, fused, decoded = contenders.values()
    first = None
    for _ in weights:
        packed = kmq.pack(torch.randint(0, 2**bits, (OUT, IN), dtype=torch.uint8, device=device), bits)
        codebook = (torch.randn(1, 2**bits, device=device).sort().values / 10).to(dtype)
        first = ops.dequantize(packed, codebook, IN) if first is None else first

        def run_fused(x: Tensor, b: Tensor, p: Tensor = packed, c: Tensor = codebook) -> Tensor:
            tile = next((tile for limit, tile in tiles.items() if limit >= len(x)), [*tiles.values()][-1])
            return kernels.fused_linear(x, p, c, b, OUT, tile)

        dispatched.append(lambda x, b, p=packed, c=codebook: kmq.codebook_linear(x, p, c, b))
        fused.append(run_fused)
        decoded.append(lambda x, b, p=packed, c=codebook: F.linear(x, decode_rows(None, p, c, IN, OUT, x.dtype), b))
    assert first is not None
    return contenders, first


def fp8(bits: int, weights: list[Tensor]) -> tuple[dict[str, list[Layer]], Tensor]:
    """Our layers in E4M3, with their activations rounded at each call; for devices whose tensor cores take it."""
    from kmq_kernels.triton_kernels.fp8_linear import fp8_linear, round_codebook

    OUT, IN = weights[0].shape
    layers: list[Layer] = []
    first = None
    for weight in weights:
        packed = kmq.pack(torch.randint(0, 2**bits, (OUT, IN), dtype=torch.uint8, device=weight.device), bits)
        codebook = torch.randn(1, 2**bits, device=weight.device).sort().values / 10
        first = ops.dequantize(packed, codebook, IN) if first is None else first
        table, scale = round_codebook(codebook)
        layers.append(lambda x, b, p=packed, t=table, s=scale: fp8_linear(x, p, t, s, b, bits, OUT))
    assert first is not None
    return {f"kmq {bits} bits, fp8": layers}, first


def scaled_mm(weights: list[Tensor]) -> tuple[dict[str, list[Layer]], Tensor]:
    """cuBLAS in E4M3: a scale for each row of the weight and of the activations, which are rounded at each call."""
    layers: list[Layer] = []
    first = None
    for weight in weights:
        scale = weight.abs().amax(1, keepdim=True).float() / 448
        rounded = (weight.float() / scale).to(torch.float8_e4m3fn)
        first = rounded.to(weight.dtype) * scale.to(weight.dtype) if first is None else first

        def run(x: Tensor, b: Tensor, w: Tensor = rounded, s: Tensor = scale) -> Tensor:
            mine = x.abs().amax(1, keepdim=True).float() / 448
            y = torch._scaled_mm((x.float() / mine).to(torch.float8_e4m3fn), w.T, mine, s.T, out_dtype=torch.bfloat16)
            return y.to(x.dtype) + b

        layers.append(run)
    assert first is not None
    return {"cuBLAS fp8": layers}, first


def bitsandbytes(weights: list[Tensor]) -> tuple[dict[str, list[Layer]], Tensor]:
    import bitsandbytes as bnb

    layers, dense = [], []
    for weight in weights:
        quantized, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
        layers.append(lambda x, b, q=quantized, s=state: bnb.matmul_4bit(x, q.t(), quant_state=s, bias=b))
        dense = dense or [bnb.functional.dequantize_4bit(quantized, state)]
    return {f"bitsandbytes {importlib.metadata.version('bitsandbytes')} NF4": layers}, dense[0]


def torchao(weights: list[Tensor]) -> tuple[dict[str, list[Layer]], Tensor]:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layers, dense = [], []
    for weight in weights:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=torch.bfloat16)
        linear.weight.data = weight.bfloat16()
        quantize_(linear, Int4WeightOnlyConfig(group_size=64))
        layers.append(lambda x, b, w=linear.weight: F.linear(x.bfloat16(), w, b.bfloat16()))
        dense = dense or [linear.weight.dequantize()]
    return {f"torchao {importlib.metadata.version('torchao')} int4 (bf16)": layers}, dense[0]


PEERS = (bitsandbytes, torchao)
FP8_TOLERANCE = 0.06  # of products whose operands have 3 bits of mantissa


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def relative_rms(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def replayable(calls: list[Callable[[], Any]], device: torch.device) -> Callable[[], None]:
    """One function that makes all calls: the replay of a CUDA graph, after a warm-up that compiles what they need."""
    if device.type != "cuda":
        return lambda: [call() for call in calls] and None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Time of one run on the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def compared(runs: dict[str, Callable[[], None]], base: str, calls: int, repeats: int, device: torch.device) -> dict[str, dict]:
    """Microseconds of a call (median, 10th and 90th percentile) and the ratio to `base`, all contenders in one shuffled loop."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 2):
        for name in random.sample(list(runs), len(runs)):
            elapsed = seconds(runs[name], device) / calls
            if repeat >= 2:  # two rounds to warm up
                times[name].append(elapsed)
    out = {}
    for name, taken in times.items():
        ordered = sorted(taken)
        out[name] = {
            "us": statistics.median(taken) * 1e6,
            "us_p10": ordered[len(ordered) // 10] * 1e6,
            "us_p90": ordered[-1 - len(ordered) // 10] * 1e6,
            "times_as_fast_as_cublas": statistics.median(b / t for b, t in zip(times[base], taken, strict=True)),
        }
    return out


def bandwidth(device: torch.device, numel: int = 2**29) -> float:
    """Bytes a second that this device reads and writes in a copy of 1 GiB: what the others are a percentage of."""
    source = torch.ones(numel, dtype=torch.float16, device=device)
    target = torch.empty_like(source)
    run = replayable([lambda: target.copy_(source)], device)
    return 2 * source.nbytes / min(seconds(run, device) for _ in range(10))


def linear_rows(
    device: torch.device,
    shapes: list[tuple[int, int]],
    sizes: list[int],
    widths: list[int],
    repeats: int,
    dtype: torch.dtype,
    peers: tuple[Any, ...] = PEERS,
    in_fp8: bool = False,
) -> list[dict[str, Any]]:
    """Rows for all shapes, sizes M and widths beside cuBLAS and peers, each emitted as soon as it is measured. in_fp8: ours then
    compute in E4M3, and cuBLAS, which they are a multiple of, in `dtype` all the same."""
    rows = []
    measured = bandwidth(device) if device.type == "cuda" else bandwidth(device, 2**20)
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else L2_ON_A_CPU
    for OUT, IN in shapes:
        length = ring_length(OUT, IN, min(widths), l2_bytes)
        weights = [torch.randn(OUT, IN, device=device).div_(10).to(dtype) for _ in range(length)]
        contenders = {"cuBLAS": ([lambda x, b, w=w: F.linear(x, w, b) for w in weights], weights[0], OUT * IN * 2)}
        for bits in widths:
            layers, dense = (fp8 if in_fp8 else ours)(bits, weights)
            contenders |= {name: (ring, dense, OUT * IN * bits // 8) for name, ring in layers.items()}
        for peer in peers:
            try:
                layers, dense = peer(weights)
                for ring in layers.values():
                    ring[0](torch.randn(1, IN, device=device, dtype=dtype), torch.randn(OUT, device=device, dtype=dtype))
            except Exception as error:  # not installed, or not for this device: said, and left out
                print(f"{peer.__name__}: skipped, {type(error).__name__}: {str(error).partition(chr(10))[0]}", flush=True)
                continue
            contenders |= {name: (ring, dense, OUT * IN * 9 // 16) for name, ring in layers.items()}  # 4 bits, a scale for 64
        bias = torch.randn(OUT, device=device, dtype=dtype)
        for M in sizes:
            input = torch.randn(M, IN, device=device, dtype=dtype)
            runs, errors = {}, {}
            for name, (ring, dense, _) in contenders.items():
                expected = F.linear(input.double(), dense.double(), bias.double())
                errors[name] = relative_rms(ring[0](input, bias), expected)
                if name.startswith("kmq") and not errors[name] <= (FP8_TOLERANCE if in_fp8 else TOLERANCE[dtype]):
                    raise SystemExit(f"{name}, {OUT}x{IN}, M={M}: error {errors[name]:.2e}, not timed")
                runs[name] = replayable([partial(layer, input, bias) for layer in ring], device)
            for name, figures in compared(runs, "cuBLAS", length, repeats, device).items():
                moved = contenders[name][2] + (M * IN + M * OUT) * 2
                row = {"OUT": OUT, "IN": IN, "M": M, "name": name, "layers": length, "error": errors[name], **figures}
                row["percent_of_bandwidth"] = 100 * moved / (figures["us"] / 1e6) / measured
                rows.append(emit(row))
                print(
                    f"{OUT}x{IN} M={M:<4} {name:32} {row['us']:9.2f} us  {row['percent_of_bandwidth']:5.1f} % of bandwidth"
                    f"  {row['times_as_fast_as_cublas']:5.2f}x cuBLAS  error {row['error']:.1e}",
                    flush=True,
                )
            del runs
    return rows


def ahead_rows(
    device: torch.device, shapes: list[tuple[int, int]], sizes: list[int], bits: int, repeats: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Chains of layers at a large M: dense, each weight decoded before its product, and decoded one layer ahead."""
    rows = []
    for OUT, IN in shapes:
        length = min(ring_length(OUT, IN, bits, L2_ON_A_CPU), 16)
        dense = [torch.randn(OUT, IN, device=device).div_(10).to(dtype) for _ in range(length)]
        layers = torch.nn.ModuleList(kmq.CodebookLinear(IN, OUT, bits, device=device, dtype=dtype) for _ in dense)
        for layer in layers:
            layer.packed.copy_(kmq.pack(torch.randint(0, 2**bits, (OUT, IN), dtype=torch.uint8, device=device), bits))
            layer.codebook.copy_(torch.randn(1, 2**bits, device=device).sort().values / 10)
        for M in sizes:
            input = torch.randn(M, IN, device=device, dtype=dtype)
            block = kmq.DecodeAhead(layers, dtype) if device.type == "cuda" else contextlib.nullcontext()

            def run_ahead(input: Tensor = input, layers: Any = layers, block: Any = block) -> list[Tensor]:
                with block:
                    return [layer(input) for layer in layers]

            name = f"kmq {bits} bits, decoded ahead"
            if not all(torch.equal(a, layer(input)) for a, layer in zip(run_ahead(), layers, strict=True)):
                raise SystemExit(f"{name}, {OUT}x{IN}, M={M}: not the bits of the op, not timed")
            runs = {
                "cuBLAS": replayable([partial(F.linear, input, w, b.bias) for w, b in zip(dense, layers, strict=True)], device),
                f"kmq {bits} bits": replayable([partial(layer, input) for layer in layers], device),
                name: replayable([run_ahead], device),
            }
            for contender, figures in compared(runs, "cuBLAS", length, repeats, device).items():
                rows.append(emit({"OUT": OUT, "IN": IN, "M": M, "chain": length, "name": contender, **figures}))
                ratio = figures["times_as_fast_as_cublas"]
                print(f"chain of {length} {OUT}x{IN} M={M}: {contender:26} {figures['us']:9.1f} us  {ratio:5.2f}x", flush=True)
    return rows


def encoder_rows(device: torch.device, batches: list[int], length: int, repeats: int, **size: int) -> list[dict[str, Any]]:
    """Forward pass of a BERT encoder (BERT-base unless `size` says otherwise), fp16 and packed with 4 bits."""
    from transformers import BertConfig, BertModel

    config = BertConfig(**size)
    plain = BertModel(config).eval()
    packed = BertModel(config).eval()
    packed.load_state_dict(plain.state_dict())
    kmq.quantize_(packed, kmq.KMQConfig(bits=4))
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    plain, packed = plain.to(device, dtype), packed.to(device, dtype)
    rows = []
    for batch in batches:
        hidden = torch.randn(batch, length, config.hidden_size, device=device, dtype=dtype)
        runs = {
            "cuBLAS": replayable([partial(plain.encoder, hidden)], device),
            "kmq 4 bits": replayable([partial(packed.encoder, hidden)], device),
        }
        block = kmq.DecodeAhead(packed.encoder, dtype) if device.type == "cuda" else contextlib.nullcontext()
        with block:
            runs["kmq 4 bits, decoded ahead"] = replayable([partial(packed.encoder, hidden)], device)
        for name, figures in compared(runs, "cuBLAS", 1, repeats, device).items():
            rows.append(emit({"encoder": "BERT", "batch": batch, "length": length, "name": name, **figures}))
            ratio = figures["times_as_fast_as_cublas"]
            print(f"encoder, batch {batch}: {name:26} {figures['us']:9.1f} us  {ratio:5.2f}x", flush=True)
    return rows


@torch.inference_mode()
def rows() -> list[dict[str, Any]]:
    """All figures of this benchmark, for the result file."""
    device = torch.device("cuda")
    random.seed(0)
    torch.manual_seed(0)
    found = linear_rows(device, GPU_LINEARS, GPU_LINEAR_M, [2, 3, 4, 8], 41, torch.float16)
    large = [shape for shape in GPU_LINEARS if min(shape) >= 1024]
    found += ahead_rows(device, large, [1024, 4096], 4, 41, torch.float16)
    return found + encoder_rows(device, [1, 32], 128, 41)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("gpu_codebook_linear: torch finds no CUDA device here")
    steady_keys()
    rows()

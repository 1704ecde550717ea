"""codebook_linear and int8_linear on the CPU against torch's fp32 linear and the 4-bit kernels of other packages.

    python benchmarks/bench_codebook_linear.py [--bits 4] [--m 1 16] [--shapes 768x768] [--repeats 41] [--json out.json]

One process; every repeat times all implementations once, in shuffled order. `cold`: each call takes the next of a ring of
weights whose fp32 form is larger than four times the last-level cache, as the system reports it (every implementation has the
same number of layers, which may repeat their values, never their memory); `hot`: always the same weight. Each ratio is the
median over repeats of (time of torch fp32) / (time of the implementation) in one repeat. Results are checked against float64
before anything is timed; rounding the input to int8 costs about half a per cent. A peer's weight has its own format: its error
is against its own dequantized weight, and its time is what counts.

To stand for a machine without AVX-512, set KMQ_CPU_PATH=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2
ONEDNN_MAX_CPU_ISA=AVX2.
"""

import argparse
import copy
import importlib.metadata
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from shapes import BERT_BASE_LINEARS, LINEAR_M
from torch import Tensor

import kmq_kernels as kmq
from kmq_kernels import ops

TOLERANCE, TOLERANCE_INT8 = 1e-6, 2e-2  # relative RMS error against float64 of the dequantized weight
BASE = "torch fp32"
Layer = Callable[[Tensor, Tensor], Tensor]
Contender = tuple[str, list[Layer], Tensor]  # name, one call a layer, the weight of the first layer


def last_level_cache() -> int:
    """Bytes of the largest cache that the first processor sees; 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes), default=32 * 2**20)


def dense_layer(weight: Tensor) -> Layer:
    return lambda x, b: F.linear(x, weight, b)


def ours(bits: int, weight: Tensor, count: int) -> list[Contender]:
    """The same packed weight in fp32 and in int8 arithmetic."""
    assignments = torch.randint(0, 2**bits, weight.shape, dtype=torch.uint8)
    codebook = torch.randn(1, 2**bits).sort().values / 10
    packed = kmq.pack(assignments, bits)
    table, scale, row_sum = ops.int8_codebook(packed, codebook, weight.shape[1])
    factor = scale.repeat(len(packed))

    def layer(packed: Tensor) -> Layer:
        return lambda x, b: kmq.codebook_linear(x, packed, codebook, b)

    def layer_int8(packed: Tensor) -> Layer:
        return lambda x, b: ops.int8_linear(x, packed, table, factor, row_sum, b)

    dense = codebook[0][assignments.int()]
    name = f"kmq {bits} bits"
    return [
        (name, [layer(packed.clone()) for _ in range(count)], dense),
        (f"{name}, int8 input", [layer_int8(packed.clone()) for _ in range(count)], dense),
    ]


def bitsandbytes(weight: Tensor, count: int) -> Contender:
    import bitsandbytes as bnb

    quantized, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)

    def layer(quantized: Tensor, state: object) -> Layer:
        return lambda x, b: bnb.matmul_4bit(x, quantized.t(), quant_state=state, bias=b)

    layers = [layer(quantized.clone(), copy.deepcopy(state)) for _ in range(count)]
    dense = bnb.functional.dequantize_4bit(quantized, state)
    return f"bitsandbytes {importlib.metadata.version('bitsandbytes')} NF4", layers, dense


def torchao(weight: Tensor, count: int) -> Contender:
    from torchao.dtypes import Int4CPULayout
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    quantize_(linear, Int4WeightOnlyConfig(group_size=64, layout=Int4CPULayout(), version=1))
    layers = [dense_layer(copy.deepcopy(linear.weight)) for _ in range(count)]
    return f"torchao {importlib.metadata.version('torchao')} int4", layers, linear.weight.dequantize().float()


def onnx_layers(op: str, weight: Tensor, count: int, inputs: list[np.ndarray], **attributes: int) -> list[Layer]:
    """`count` sessions of a model that is one node com.microsoft::`op`."""
    import onnx
    import onnxruntime

    OUT, IN = weight.shape
    names = [f"constant{i}" for i in range(len(inputs))]
    constants = [onnx.numpy_helper.from_array(array, name) for array, name in zip(inputs, names, strict=True)]
    node = onnx.helper.make_node(op, ["x", *names], ["y"], domain="com.microsoft", K=IN, N=OUT, block_size=64, **attributes)
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["M", size]) for n, size in (("x", IN), ("y", OUT))]
    graph = onnx.helper.make_graph([node], "layer", ends[:1], ends[1:], constants)
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads of a session would spin after a call, on the cores of the others.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def layer() -> Layer:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return lambda x, b: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]).add_(b)

    return [layer() for _ in range(count)]


def blocks_of_64(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int4 codes (OUT, IN) of blocks of 64, zero point 8, and scales (OUT, IN / 64)."""
    blocks = weight.unflatten(1, (-1, 64))
    scale = blocks.abs().amax(-1, keepdim=True) / 7
    return (blocks / scale).round().clamp(-8, 7).add(8).to(torch.uint8).flatten(1), scale[..., 0]


def matmul_nbits(weight: Tensor, count: int, accuracy_level: int) -> Contender:
    codes, scale = blocks_of_64(weight)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).unflatten(1, (-1, 32)).contiguous()
    dense = (codes.float() - 8) * scale.repeat_interleave(64, 1)
    inputs = [packed.numpy(), scale.contiguous().numpy().ravel()]
    layers = onnx_layers("MatMulNBits", weight, count, inputs, bits=4, accuracy_level=accuracy_level)
    kept = "int8" if accuracy_level == 4 else "fp32"
    return f"onnxruntime {importlib.metadata.version('onnxruntime')} MatMulNBits, {kept} input", layers, dense


def onnxruntime_fp32(weight: Tensor, count: int) -> Contender:
    return matmul_nbits(weight, count, 1)


def onnxruntime_int8(weight: Tensor, count: int) -> Contender:
    return matmul_nbits(weight, count, 4)


PEERS = [bitsandbytes, torchao, onnxruntime_fp32, onnxruntime_int8]


def usable(peer: Callable, weight: Tensor, count: int) -> Contender | None:
    """What `peer` made of the weight, None (and the reason in print) where it is not installed or cannot run here."""
    try:
        name, layers, dense = peer(weight, count)
        OUT, IN = weight.shape
        layers[0](torch.randn(1, IN), torch.randn(OUT))
    except Exception as error:
        print(f"{peer.__name__}: skipped, {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return None
    return name, layers, dense


def relative_rms(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def ratios(layers: dict[str, list], indices: Iterable[int], input: Tensor, bias: Tensor) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in layers}
    for index in indices:
        for name in random.sample(list(layers), len(layers)):
            layer = layers[name][index % len(layers[name])]
            start = time.perf_counter()
            layer(input, bias)
            times[name].append(time.perf_counter() - start)
    base = times[BASE]
    return {
        name: {"us": statistics.median(t) * 1e6, "ratio": statistics.median(b / o for b, o in zip(base, t, strict=True))}
        for name, t in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="*", default=list(range(1, 9)))
    parser.add_argument("--m", type=int, nargs="*", default=LINEAR_M)
    parser.add_argument("--shapes", nargs="*", default=[f"{OUT}x{IN}" for OUT, IN in BERT_BASE_LINEARS], help="OUTxIN")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    ring_bytes = 4 * last_level_cache()
    conditions = {
        "threads": args.threads,
        "torch": torch.__version__,
        "torch uses": torch.backends.cpu.get_cpu_capability(),
        "ring MiB of fp32": ring_bytes // 2**20,
        "load": os.getloadavg()[0],
        "build": kmq.build_info()["extension"],
    }
    print(conditions)
    rows = []
    for shape in args.shapes:
        OUT, IN = map(int, shape.split("x"))
        count = -(-ring_bytes // (OUT * IN * 4)) + 1
        weight = torch.randn(OUT, IN) / 10
        contenders = [(BASE, [dense_layer(weight.clone()) for _ in range(count)], weight)]
        contenders += [contender for bits in args.bits for contender in ours(bits, weight, count)]
        if not args.no_peers:
            contenders += [found for peer in PEERS if (found := usable(peer, weight, count))]
        calls = {name: layers for name, layers, _ in contenders}
        bias = torch.randn(OUT)
        for M in args.m:
            input = torch.randn(M, IN)
            errors = {}
            with torch.inference_mode():
                for name, layers, dense in contenders:
                    expected = F.linear(input.double(), dense.double(), bias.double())
                    errors[name] = relative_rms(layers[0](input, bias), expected)
                    if name.startswith("kmq") and errors[name] > (TOLERANCE_INT8 if "int8" in name else TOLERANCE):
                        raise SystemExit(f"{name} at M={M}, {OUT}x{IN}: error {errors[name]:.2e}, not timed")
                cold = ratios(calls, range(args.repeats), input, bias)
                hot = ratios(calls, [0] * args.repeats, input, bias)
            for name in calls:
                row = {"OUT": OUT, "IN": IN, "M": M, "name": name, "error": errors[name], "cold": cold[name], "hot": hot[name]}
                rows.append(row)
                print(
                    f"{OUT}x{IN} M={M:<4} {name:46} cold {row['cold']['us']:9.1f} us {row['cold']['ratio']:6.2f}x"
                    f"   hot {row['hot']['us']:9.1f} us {row['hot']['ratio']:6.2f}x   error {row['error']:.1e}",
                    flush=True,
                )
        del contenders, calls  # one shape at a time: a ring of fp32 is large
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"conditions": conditions, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()

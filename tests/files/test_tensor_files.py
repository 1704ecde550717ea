"""Strangers' checkpoints are refused with a sentence, quickly, in little memory; headers are those of safetensors."""

import json
import os
import random
import shutil
import struct
import time

import pytest
import torch
from checkpoints import content, quantize, rewrite
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

import kmq_kernels as kmq
from kmq_kernels import files
from kmq_kernels.checkpoint import make_plan, verify_checkpoint
from kmq_kernels.files import CheckpointError


@pytest.fixture
def strange(tmp_path):
    """A folder of two weight files and an index, to be damaged."""
    torch.manual_seed(5)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    BertModel(config).save_pretrained(tmp_path / "strange", max_shard_size="30KB")
    assert len(list((tmp_path / "strange").glob("*.safetensors"))) >= 2
    return tmp_path / "strange"


def header_of(file):
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def store(file, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def flip(file, chance, begin=0):
    data = bytearray(file.read_bytes())
    data[chance.randrange(begin, len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def mutate_header(chance, file):
    header, data = header_of(file)
    names = [name for name in header if name != "__metadata__"]
    entry = header[chance.choice(names)]
    kind = chance.randrange(12)
    if kind == 0:  # a bit, beyond the metadata, which says nothing that counts
        raw = bytearray(file.read_bytes())
        at = chance.randrange(raw.index(b"}") + 1, len(raw) - len(data))
        raw[at] ^= 1 << chance.randrange(8)
        file.write_bytes(raw)
        return
    if kind == 1:
        file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])
        return
    if kind == 2:
        store(file, header, data, chance.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(json.dumps(header)) + len(data) + 9]))
        return
    if kind == 3:
        entry["data_offsets"] = [chance.randrange(-5, 2**40), chance.randrange(-5, 2**66)]
    elif kind == 4:
        entry["data_offsets"] = [entry["data_offsets"][0] + 4, entry["data_offsets"][1] + 4]
    elif kind == 5:
        entry["shape"] = chance.choice([[2**62, 2**62], [-1, 4], [2**40], [1.5], ["3"], [True], None, [2**40] * 60, [0]])
    elif kind == 6:
        entry["dtype"] = chance.choice(["F31", "", None, 7, "F64", "F16", "U8"])
    elif kind == 7:
        del entry[chance.choice(["dtype", "shape", "data_offsets"])]
    elif kind == 8:  # a name twice
        text = json.dumps(header, separators=(",", ":"))
        name = json.dumps(chance.choice(names))
        store(file, (text[:-1] + f",{name}:{json.dumps(entry)}}}").encode(), data)
        return
    elif kind == 9:
        text = chance.choice([b"", b"{", b"[]", b"null", b"7", b"[" * 20000, b"\xff\xfe", b'{"a":NaN}', b"{}" + b"x"])
        store(file, text, data)
        return
    elif kind == 10:
        data = chance.choice([data + b"\0", data[:-1], data + bytes(4096), b""])
    else:
        other = header.pop(chance.choice(names))
        header[chance.choice(["x", "\0", "..", "encoder.layer.9.output.dense.weight"])] = other
    store(file, header, data)


def mutate_index(chance, folder):
    path = folder / "model.safetensors.index.json"
    index = {"weight_map": json.loads(path.read_text())["weight_map"]}
    name = chance.choice(sorted(index["weight_map"]))
    kind = chance.randrange(7)
    if kind == 0:
        path.write_text(json.dumps(index, separators=(",", ":")))
        flip(path, chance)
        return
    if kind == 1:
        path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size - 2)])
        return
    if kind == 2:
        outside = folder.parent / "outside.safetensors"
        shutil.copy(folder / index["weight_map"][name], outside)
        ways = ["../outside.safetensors", str(outside), "x/../../outside.safetensors", "..", "", "."]
        index["weight_map"][name] = chance.choice(ways)
    elif kind == 3:
        index["weight_map"][name] = chance.choice(["model-9.safetensors", "config.json", "\0.safetensors", 5, None, ["a"]])
    elif kind == 4:
        index["weight_map"]["no.such.weight"] = index["weight_map"][name]
    elif kind == 5:
        files = sorted(set(index["weight_map"].values()))
        index["weight_map"][name] = next(file for file in files if file != index["weight_map"][name])
    else:
        maps = ['{"weight_map": []}', '{"weight_map": 3}', '{"weight_map": {}}']
        path.write_text(chance.choice(["", "[]", "{}", "[" * 50000, *maps]))
        return
    path.write_text(json.dumps(index))


def test_three_hundred_damaged_checkpoints(strange, tmp_path):
    """Each is refused with a sentence, quickly, and no file makes us allocate more than twice its size."""
    import tracemalloc

    quantize(strange, tmp_path / "packed", shard_bytes=4000)
    verify_checkpoint(tmp_path / "packed")
    chance = random.Random(7)
    kinds = {"header": 0, "index": 0, "output": 0}
    for turn in range(300):
        kind = chance.choice(["header", "header", "index", "output"])
        kinds[kind] += 1
        work = tmp_path / f"turn{turn}"
        shutil.copytree(strange if kind != "output" else tmp_path / "packed", work)
        if kind == "header":
            mutate_header(chance, chance.choice(sorted(work.glob("*.safetensors"))))
        elif kind == "index":
            mutate_index(chance, work)
        else:
            file = chance.choice([path for path in sorted(work.rglob("*")) if path.is_file()])
            if chance.randrange(2):
                flip(file, chance)
            else:
                file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])
        size = sum(path.stat().st_size for path in work.rglob("*"))
        before = content(work)
        tracemalloc.start()
        begin = time.monotonic()
        with pytest.raises(CheckpointError) as caught:
            verify_checkpoint(work) if kind == "output" else quantize(work, tmp_path / "out", shard_bytes=4000)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.monotonic() - begin < 5
        assert len(str(caught.value)) > 20, (turn, kind)
        assert "\n" not in str(caught.value)
        assert peak < 2 * size + 20_000_000
        assert content(work) == before
        assert not list((tmp_path / "out").glob("*.safetensors"))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(work)
    assert min(kinds.values()) > 40


def test_a_header_of_many_values_is_not_parsed(tmp_path):
    """30 MB of brackets would become 600 MB of lists."""
    import tracemalloc

    text = b'{"a":[' + b"[]," * 10_000_000 + b"[]]}"
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="values in"):
        files.read_header(tmp_path / "model.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(text)


def test_links_pipes_and_pickles(bert, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    (bert / "notes.txt").symlink_to(secret)
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        quantize(bert, tmp_path / "out")
    (bert / "notes.txt").unlink()
    (bert / "notes.txt").symlink_to(bert / "vocab.txt")
    quantize(bert, tmp_path / "out")
    assert not (tmp_path / "out/notes.txt").is_symlink()
    assert (tmp_path / "out/notes.txt").read_text() == "[PAD]\n"
    (bert / "notes.txt").unlink()
    (bert / "model.safetensors").rename(tmp_path / "model.safetensors")
    (bert / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        quantize(bert, tmp_path / "out2")
    (bert / "model.safetensors").unlink()
    os.mkfifo(bert / "model.safetensors")
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        quantize(bert, tmp_path / "out2")
    (bert / "model.safetensors").unlink()
    (bert / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle.*convert it with"):
        quantize(bert, tmp_path / "out2")
    shutil.copy(bert / "pytorch_model.bin", bert / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        quantize(bert, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_labels": 10**9}, "num_labels is 1000000000"),
        ({"hidden_size": 64}, "config.json asks for"),
        ({"hidden_size": 2**40}, "hidden_size is"),
        ({"num_attention_heads": 0}, "does not describe a Bert"),
        ({"num_hidden_layers": 3}, r"needs bert\.encoder\.layer\.2.* more, which the checkpoint does not hold"),
        ({"architectures": ["os.system"]}, "no model class os.system"),
        ({"architectures": ["AutoConfig"]}, "no model class AutoConfig"),
        ({"model_type": "no-such"}, "transformers cannot read it"),
        ({"dtype": "uint8"}, "dtype 'uint8'"),
        ({"dtype": 5}, "dtype 5"),
    ],
)
def test_configurations_that_do_not_fit(change, sentence, bert, tmp_path):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=sentence):
        quantize(bert, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_the_class_does_not_have_are_named(bert, tmp_path):
    rewrite(bert, lambda tensors: tensors.update({"extra.weight": torch.zeros(3)}))
    plan = make_plan(bert, kmq.KMQConfig())
    assert plan.left_out == ("extra.weight",)


def test_headers_are_those_of_safetensors(tmp_path):
    """Every dtype, empty tensors, names that need escapes: the same header as save_file writes."""
    chance = random.Random(3)
    tensors = {}
    for i in range(40):
        dtype = chance.choice(list(files.DTYPE_NAMES))
        shape = tuple(chance.choice([0, 1, 3, 8]) for _ in range(chance.randrange(3)))
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        tensor = torch.arange(nbytes, dtype=torch.uint8).view(dtype).view(shape) if nbytes else torch.empty(shape, dtype=dtype)
        tensors[chance.choice(["a", "é", '"', "\n", "层", "/"]) + f".{i}"] = tensor
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    entries = [(n, files.DTYPE_NAMES[t.dtype], tuple(t.shape), t.nbytes) for n, t in tensors.items()]
    start, at = files.header_bytes(entries)
    assert (tmp_path / "model.safetensors").read_bytes().startswith(start)
    read = files.read_header(tmp_path / "model.safetensors")
    assert {name: tensor.begin for name, tensor in read.items()} == at

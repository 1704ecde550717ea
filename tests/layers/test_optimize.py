"""optimize_: encoders in one call of compiled code, against transformers' own modules in float64."""

import copy
import functools
import inspect
import io
import json
import pickle
import threading
import warnings

import pytest
import torch
import transformers
from conftest import family_model
from oracles import relative_rms
from torch import nn

import kmq_kernels as kmq
from kmq_kernels.layers.encoder import describe
from kmq_kernels.layers.optimize import FastEncoder, Int8CodebookLinear

FAMILIES = ["bert", "roberta", "distilbert", "albert", "electra", "mpnet", "modernbert"]
SMALL = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


def model_of(family, head="SequenceClassification", config=None, **options):
    """A small random model, packed; its normalizations and biases are random, too."""
    if family == "modernbert":
        own = {
            "global_attn_every_n_layers": 2,
            "local_attention": 6,
            "pad_token_id": 0,
            "max_position_embeddings": 64,
            "num_labels": 3,
        }
        made = transformers.ModernBertConfig(**{**SMALL, **own, **options})
        torch.manual_seed(1)
        model = getattr(transformers, f"AutoModelFor{head}").from_config(made).eval()
    elif family in ("xlm-roberta", "camembert"):
        name = {"xlm-roberta": "XLMRobertaConfig", "camembert": "CamembertConfig"}[family]
        torch.manual_seed(1)
        made = getattr(transformers, name)(
            **{**SMALL, "max_position_embeddings": 40, "pad_token_id": 1, "num_labels": 3, **options}
        )
        model = getattr(transformers, f"AutoModelFor{head}").from_config(made).eval()
    else:
        model = family_model(family, head, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    kmq.quantize_(model, kmq.KMQConfig(**{"bits": 4, **(config or {})}))
    return model


def base(model):
    return model.base_model


def texts(batch=5, length=12, pad=1):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 120, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    for b in range(batch):
        mask[b, length - 2 * b :] = 0 if b else 1
    return torch.where(mask.bool(), ids, pad), mask


def states(model, **inputs):
    with torch.inference_mode():
        return base(model)(**inputs).last_hidden_state


def ran_fast(model, **inputs):
    """The output, and whether compiled code ran the encoder: the modules inside of it are then not called."""
    called, inside, original = [], set(base(model).modules()), nn.LayerNorm.forward
    try:
        nn.LayerNorm.forward = lambda self, x: (called.append(1) if self in inside else None) or original(self, x)
        with torch.inference_mode():
            out = model(**inputs)
    finally:
        nn.LayerNorm.forward = original
    return out, not called


@pytest.mark.parametrize("family", [*FAMILIES, "xlm-roberta", "camembert"])
def test_float_states_against_float64(family):
    model = model_of(family)
    exact = copy.deepcopy(model).double()
    kmq.optimize_(model, compute="float")
    ids, mask = texts()
    holes = mask.clone()
    holes[:, 3] = 0
    for given in (
        {},
        {"attention_mask": mask},
        {"attention_mask": holes},
        {"attention_mask": holes.bool()},
        {"attention_mask": holes.float()},
    ):
        want = states(exact, input_ids=ids, **given)
        got = states(model, input_ids=ids, **given)
        kept = given.get("attention_mask", torch.ones_like(ids)).bool()
        assert got.dtype == torch.float32
        assert float((got.double() - want)[kept].abs().max()) <= 2e-5
        assert not got[~kept].any()
    _, fast = ran_fast(model, input_ids=ids, attention_mask=mask)
    assert fast


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_states_against_the_same_integers_in_transformers_modules(family):
    model = model_of(family, config={"granularity": "row"})
    exact = copy.deepcopy(model)
    for module in exact.modules():
        if type(module) is kmq.CodebookLinear:
            module.__class__ = Int8CodebookLinear
    ids, mask = texts()
    want, plain = (states(m, input_ids=ids, attention_mask=mask)[mask.bool()] for m in (exact, model))
    kmq.optimize_(model, compute="int8")
    out, fast = ran_fast(model, input_ids=ids, attention_mask=mask)
    assert fast
    got = states(model, input_ids=ids, attention_mask=mask)[mask.bool()]
    # A number that is on the verge of two integers falls to either side.
    assert relative_rms(got, want.double()) <= 5e-3
    assert relative_rms(got, plain.double()) <= 0.1
    assert torch.cosine_similarity(got, plain, -1).min() >= 0.99
    assert out.logits.shape == (5, 3)


@pytest.mark.parametrize("length", [1, 16, 47, 270])
def test_long_texts_and_shares(length):
    model = model_of("bert", max_position_embeddings=300)
    exact = copy.deepcopy(model).double()
    kmq.optimize_(model, compute="float")
    for batch in (1, 3, 9):
        ids = torch.randint(5, 120, (batch, length))
        assert float((states(model, input_ids=ids).double() - states(exact, input_ids=ids)).abs().max()) <= 2e-5


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet"])
def test_ids_that_are_given(family):
    model = model_of(family)
    exact = copy.deepcopy(model).double()
    kmq.optimize_(model, compute="float")
    ids, mask = texts()
    positions = torch.arange(12).flip(0)[None] + 2
    given = {"position_ids": positions} | ({"token_type_ids": torch.arange(60).view(5, 12) % 2} if family == "bert" else {})
    _, fast = ran_fast(model, input_ids=ids, attention_mask=mask, **given)
    assert fast
    want = states(exact, input_ids=ids, attention_mask=mask, **given)
    assert float((states(model, input_ids=ids, attention_mask=mask, **given).double() - want)[mask.bool()].abs().max()) <= 2e-5
    with torch.inference_mode():  # by place, as in the signature
        assert torch.equal(base(model)(ids, mask).last_hidden_state, states(model, input_ids=ids, attention_mask=mask))


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "MaskedLM", "QuestionAnswering"])
@pytest.mark.parametrize("family", ["bert", "albert", "electra", "modernbert"])
def test_heads(family, head):
    model = model_of(family, head, num_labels=2)
    ids, mask = texts()
    with torch.inference_mode():
        want = copy.deepcopy(model).double()(input_ids=ids, attention_mask=mask)
        got = kmq.optimize_(model, compute="float")(input_ids=ids, attention_mask=mask)
    for name in want:
        kept = mask.bool() if got[name].shape[:2] == mask.shape else slice(None)
        assert float((got[name].double() - want[name])[kept].abs().max()) <= 1e-4, name


@pytest.mark.parametrize("compute", ["float", "int8"])
def test_layers_with_row_factors_outliers_mixed_bits_and_narrow_parameters(compute):
    options = [
        {"row_scale": True, "outlier_fraction": 0.02},
        {"granularity": "group", "group_rows": 3, "module_bits": {r"layer\.0\.attention": 7, r"query": 2, r"key": 8}},
    ]
    for config in options:
        model = model_of("bert", config=config)
        exact = copy.deepcopy(model).double()
        ids, mask = texts()
        want = states(exact, input_ids=ids, attention_mask=mask)[mask.bool()]
        got = states(kmq.optimize_(model, compute=compute), input_ids=ids, attention_mask=mask)[mask.bool()]
        assert relative_rms(got, want) <= (1e-5 if compute == "float" else 0.1)
        half = kmq.optimize_(copy.deepcopy(model).to(torch.bfloat16), compute=compute)
        got = states(half, input_ids=ids, attention_mask=mask)
        assert got.dtype == torch.bfloat16
        assert relative_rms(got[mask.bool()], want) <= 0.15


@pytest.mark.parametrize("compute", ["float", "int8"])
def test_what_the_fast_code_does_not_have_runs_as_before(compute):
    model = model_of("bert", attn_implementation="eager")
    plain = copy.deepcopy(model)
    kmq.optimize_(model, compute=compute)
    ids, mask = texts()
    left = mask.flip(1)
    cubic = mask[:, None, :].expand(-1, 12, -1).contiguous()
    embedded = base(plain).embeddings.word_embeddings(ids).detach()
    cases = [
        {"input_ids": ids, "output_hidden_states": True},
        {"input_ids": ids, "output_attentions": True},
        {"input_ids": ids, "return_dict": False},
        {"input_ids": ids, "attention_mask": left},
        {"input_ids": ids, "attention_mask": torch.zeros_like(mask)},
        {"input_ids": ids, "attention_mask": (1.0 - cubic[:, None]) * -1e4},
        {"inputs_embeds": embedded, "attention_mask": mask},
    ]
    for given in cases:
        with torch.inference_mode():
            want = base(plain)(**given)
            got = base(model)(**given)
        if isinstance(want, tuple) and not hasattr(want, "keys"):
            want, got = {"0": want[0]}, {"0": got[0]}
        for name in want:
            if name == "pooler_output" and compute == "int8":
                continue  # the pooler's linear layer computes in integers
            for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (want[name], got[name])), strict=True):
                assert torch.equal(a, b), (name, given.keys())
    for one in (plain, model):  # transformers itself takes no masks of 3 dimensions
        with torch.inference_mode(), pytest.raises((ValueError, RuntimeError)):
            base(one)(input_ids=ids, attention_mask=cubic)


def test_hooks_training_and_gradients_take_the_ordinary_way():
    model = kmq.optimize_(model_of("bert"), compute="float")
    ids, mask = texts()
    seen = []
    hook = base(model).encoder.layer[1].register_forward_hook(lambda *_: seen.append(1))
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=mask)
    assert seen
    hook.remove()
    assert ran_fast(model, input_ids=ids)[1]
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not ran_fast(model, input_ids=ids)[1]
    everywhere.remove()
    with pytest.warns(UserWarning, match="gradients are being recorded"):
        loss = model(input_ids=ids, labels=torch.zeros(5, dtype=torch.long)).loss
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("codebook") and "position" not in n)
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(input_ids=ids, labels=torch.zeros(5, dtype=torch.long)).loss.requires_grad
        model.eval()
        base(model).encoder.layer[0].attention.output.dropout.train()  # one module alone
        assert not ran_fast(model, input_ids=ids)[1]


@pytest.mark.parametrize("compute", ["float", "int8"])
@pytest.mark.parametrize(
    "kind", [torch.optim.SGD, functools.partial(torch.optim.SGD, fused=True), functools.partial(torch.optim.AdamW, fused=True)]
)
def test_weights_that_change_are_seen(compute, kind):
    model = kmq.optimize_(model_of("bert"), compute=compute)
    ids, mask = texts()
    inputs = {"input_ids": ids, "attention_mask": mask}

    def fresh():
        return states(kmq.optimize_(copy.deepcopy(kmq.optimize_(copy.deepcopy(model), None)), compute), **inputs)

    first = states(model, **inputs)
    assert torch.equal(first, fresh())
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(**inputs, labels=torch.tensor([0, 1, 2, 0, 1])).loss.backward()
    optimizer.step()
    model.eval()
    second = states(model, **inputs)
    assert not torch.equal(first, second)
    assert torch.equal(second, fresh())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in state:
        if name.endswith("query.codebook"):
            state[name] *= -1.5
    for assign in (False, True):
        model.load_state_dict(state, assign=assign)
        third = states(model, **inputs)
        assert not torch.equal(second, third)
        assert torch.equal(third, fresh())
    layer = base(model).encoder.layer[0].attention.self
    layer.query, layer.key = layer.key, layer.query  # modules in each other's place
    assert torch.equal(states(model, **inputs), fresh())
    layer.query = nn.Linear(32, 32)  # not packed: the ordinary forward
    assert not ran_fast(model, **inputs)[1]


def test_nothing_stored_changes_and_none_undoes_it(tmp_path):
    model = model_of("roberta")
    kinds = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    kmq.optimize_(model, compute="int8")
    assert list(model.state_dict()) == keys
    assert type(base(model)) is not kinds["roberta"]
    assert type(base(model)).__name__ == "RobertaModel"
    assert isinstance(base(model), transformers.RobertaModel)
    model.save_pretrained(tmp_path / "fast")
    kmq.optimize_(model, compute="float")
    assert not any(type(m) is Int8CodebookLinear for m in model.modules())
    kmq.optimize_(model, compute=None)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    model.save_pretrained(tmp_path / "plain")
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "fast" / file.name).read_bytes(), file.name
    kmq.optimize_(base(model), compute="int8").save_pretrained(tmp_path / "base")
    assert json.loads((tmp_path / "base/config.json").read_text())["architectures"] == ["RobertaModel"]


@pytest.mark.parametrize("compute", ["float", "int8"])
def test_copies_and_pickles_stay_fast(compute):
    model = kmq.optimize_(model_of("bert"), compute=compute)
    ids, mask = texts()
    want = states(model, input_ids=ids, attention_mask=mask)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        _, fast = ran_fast(other, input_ids=ids, attention_mask=mask)
        assert fast
        assert isinstance(base(other), FastEncoder)
        assert torch.equal(states(other, input_ids=ids, attention_mask=mask), want)


def test_threads_on_one_model_and_threads_within():
    model = kmq.optimize_(model_of("bert"), compute="int8")
    ids, mask = texts(batch=6)
    want = states(model, input_ids=ids, attention_mask=mask)
    results = {}

    def run(i):
        results[i] = states(model, input_ids=ids, attention_mask=mask)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], want) for i in range(6))
    before = torch.get_num_threads()
    for count in (1, 2, 3):  # sums of integers, and rows on their own: the same bits for any number of threads
        torch.set_num_threads(count)
        assert torch.equal(states(model, input_ids=ids, attention_mask=mask), want)
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(method, run_python):
    code = f"""
import json, multiprocessing, torch, warnings
warnings.simplefilter("ignore")
def run(model, ids, queue):
    with torch.inference_mode():
        queue.put(model(input_ids=ids).last_hidden_state.numpy())
if __name__ == "__main__":
    import sys; sys.path.insert(0, "tests/layers")
    from test_optimize import model_of, texts
    import kmq_kernels as kmq
    torch.set_num_threads(1)
    model = kmq.optimize_(model_of("bert").base_model, compute="int8")
    ids, _ = texts()
    context = multiprocessing.get_context("{method}")
    queue = context.Queue()
    with torch.inference_mode():
        want = model(input_ids=ids).last_hidden_state
    child = context.Process(target=run, args=(model, ids, queue))
    child.start()
    got = torch.from_numpy(queue.get(timeout=200))
    child.join()
    print(json.dumps(bool(torch.equal(got, want))))
"""
    if method == "fork":  # spawn needs a file to import from
        assert run_python(code) is True
        return
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.py"
        path.write_text(code.replace('"tests/layers"', repr(str(Path(__file__).parent))))
        assert run_python(f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')") is True


def test_compile_and_export():
    model = model_of("bert")
    ids, _ = texts(batch=2)
    want = states(model, input_ids=ids)
    kmq.optimize_(model, compute="int8")
    program = torch.export.export(base(model), (ids,))
    with torch.inference_mode():
        assert torch.allclose(program.module()(ids).last_hidden_state, want, atol=1e-5)
        compiled = torch.compile(base(model), backend="eager")
        assert torch.allclose(compiled(ids).last_hidden_state, want, atol=1e-5)


def test_other_models_get_integer_layers_and_a_sentence():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).eval()
    kmq.quantize_(net, kmq.KMQConfig(bits=4, skip=[]))
    input = torch.randn(3, 64)
    want = net(input).detach()
    with pytest.warns(
        UserWarning, match="no encoder that runs in one call was found: its packed linear layers compute in integers"
    ):
        kmq.optimize_(net, compute="int8")
    with torch.inference_mode():
        got = net(input)
    assert not torch.equal(got, want)
    assert relative_rms(got, want.double()) <= 0.05
    assert torch.equal(net(input), want)  # gradients are recorded
    with pytest.warns(UserWarning, match="everything stays as it was"):
        kmq.optimize_(net, compute="float")
    kmq.optimize_(net, compute=None)
    with torch.inference_mode():
        assert torch.equal(net(input), want)


def test_encoders_that_are_not_all_packed_say_why():
    model = model_of("bert", config={"skip": [r"layer\.1\.output", "classifier"]})
    with pytest.warns(UserWarning, match="BertModel: a linear layer is Linear, not packed"):
        kmq.optimize_(model, compute="int8")
    ids, _ = texts()
    assert not ran_fast(model, input_ids=ids)[1]
    decoder = model_of("bert", "CausalLM", is_decoder=True)
    with pytest.warns(UserWarning, match="BertModel: it is a decoder"):
        kmq.optimize_(decoder, compute="float")
    odd = model_of("bert", hidden_act="gelu_10")
    with pytest.warns(UserWarning, match="its activation is ClippedGELUActivation"):
        kmq.optimize_(odd, compute="float")


def test_ids_out_of_range_and_bad_arguments():
    model = kmq.optimize_(model_of("bert"), compute="float")
    with torch.inference_mode():
        with pytest.raises(IndexError, match=r"ids: expected values in \[0, 120\), got 120"):
            model(input_ids=torch.tensor([[3, 120]]))
        with pytest.raises(IndexError, match=r"ids: expected values in \[0, 40\), got 40"):
            model(input_ids=torch.ones(1, 41, dtype=torch.long))
    with pytest.raises(ValueError, match="compute: expected 'float', 'int8', 'fp8' or None, got 'int4'"):
        kmq.optimize_(model, compute="int4")
    assert inspect.signature(kmq.optimize_).parameters["compute"].default == "float"  # what changes outputs is asked for
    with pytest.raises(ValueError, match="model: expected packed layers"):
        kmq.optimize_(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model: expected a torch module"):
        kmq.optimize_("bert")


def test_containers_of_encoders():
    """A SentenceTransformer is a Sequential of modules; older CrossEncoders are objects with a `model`."""

    class Around:
        def __init__(self, model):
            self.model = model

    inner = model_of("mpnet").base_model
    around = Around(nn.Sequential(nn.ModuleDict({"auto_model": inner})))
    assert kmq.optimize_(around, compute="int8") is around
    assert isinstance(inner, FastEncoder)
    assert describe(inner, "int8")["hidden"] == 32
    kmq.optimize_(around, compute=None)
    assert not isinstance(inner, FastEncoder)

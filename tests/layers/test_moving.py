"""Assignments that move: nearest centroids by brute force, gradients by hand, what is tied stays tied, nothing is left behind."""

import copy

import pytest
import torch
from conftest import family_model
from torch import nn

import kmq_kernels as kmq
from kmq_kernels.layers import CodebookEmbedding, CodebookLinear, CodebookModule, settle, start_moving, stop_moving

KINDS = [
    {},
    {"granularity": "row"},
    {"granularity": "group", "group_rows": 5},
    {"row_scale": True, "outlier_fraction": 0.02},
    {"grad_reduction": "mean"},
]


def _modules(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, CodebookModule)}


def _quantized(bits=2, **options):
    model = family_model("bert")
    source = copy.deepcopy(model)
    kmq.quantize_(model, kmq.KMQConfig(bits=bits, **options))
    return model, source


def _decoded_by_brute_force(module):
    """The weight whose every entry is the entry of its row's codebook that is nearest to the latent weight."""
    latent = module.latent.detach().double()
    scale = torch.ones(module.rows).double() if module.row_scale is None else module.row_scale.detach().double()
    books = module.codebook.detach().double()[torch.arange(module.rows) // module.group_rows]
    distance = (latent / scale[:, None])[:, :, None] - books[:, None, :]
    chosen = books.gather(1, distance.abs().argmin(-1)) * scale[:, None]
    if module.outlier_values is not None:
        chosen.view(-1)[module.outlier_index.long()] = module.outlier_values.detach().double()
    return chosen


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_settle_takes_the_nearest_centroids_of_codebooks_in_any_order(bits, options):
    model, source = _quantized(bits, **options)
    modules = _modules(model)
    start_moving(modules, {name: source.get_submodule(name).weight for name in modules})
    with torch.no_grad():
        for module in modules.values():
            module.latent.add_(0.02 * torch.randn(module.rows, module.cols))
            module.codebook.copy_(module.codebook[:, torch.randperm(2**bits)])  # training may let two centroids pass each other
    settle(modules.values())
    for name, module in modules.items():
        torch.testing.assert_close(module.decoded().double(), _decoded_by_brute_force(module), rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.7])
def test_within_cells_the_indices_stay(options, share):
    """The latent weight begins at the weight, but no further from its centroid than a share of the way to the next cell."""
    model, source = _quantized(3, **options)
    modules = _modules(model)
    weights = {name: source.get_submodule(name).weight.detach() for name in modules}
    with torch.no_grad():
        for module in modules.values():
            other = torch.randint(0, 8, (module.rows, module.cols), dtype=torch.uint8)
            index = kmq.unpack(module.packed, module.bits, module.cols)
            module.packed.copy_(kmq.pack(torch.where(torch.rand(index.shape) < 0.2, other, index), module.bits))
            module.codebook.copy_(module.codebook[:, torch.randperm(8)])
    before = {name: (module.decoded(), module.packed.clone()) for name, module in modules.items()}
    start_moving(modules, weights, share)
    for name, module in modules.items():
        decoded, packed = before[name]
        assert torch.equal(module.decoded(), decoded), name  # of centroids that are equal the first is taken
        scale = torch.ones(module.rows, 1) if module.row_scale is None else module.row_scale.detach()[:, None]
        books = module.codebook.detach()[torch.arange(module.rows) // module.group_rows]
        code = kmq.unpack(packed, 3, module.cols).long()
        centroid = books.gather(1, code)
        wanted = (weights[name] / scale).double()
        for row in range(0, module.rows, 5):
            if not float(scale[row]):  # the row of the padding token: nothing of it is ever another value
                continue
            for col in range(0, module.cols, 7):
                c, book = float(centroid[row, col]), books[row].double()
                above, below = book[book > c], book[book < c]
                high = c + share / 2 * (float(above.min()) - c) if len(above) else float("inf")
                low = c - share / 2 * (c - float(below.max())) if len(below) else -float("inf")
                value = min(max(float(wanted[row, col]), low), high) * float(scale[row])
                assert abs(value - float(module.latent.detach()[row, col])) < 1e-6, name


@pytest.mark.parametrize("options", KINDS[:4])
def test_gradients_are_those_of_the_quantized_weight(options):
    """The latent weight gets the gradient of the weight; the codebook, factors and exact values that of a fixed layer."""
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Embedding(11, 20), nn.Linear(20, 13))
    config = kmq.KMQConfig(bits=2, **options)
    moves, stays = copy.deepcopy(plain), copy.deepcopy(plain)
    for model in (moves, stays):
        kmq.quantize_(model, config)
    modules = _modules(moves)
    start_moving(modules, {})
    before = {name: module.packed.clone() for name, module in _modules(stays).items()}
    assert all(torch.equal(module.packed, before[name]) for name, module in modules.items())
    ids = torch.randint(0, 11, (7, 3))
    weights = [module.weight.detach().clone().requires_grad_() for module in stays]
    torch.tanh(nn.functional.linear(nn.functional.embedding(ids, weights[0]), weights[1], stays[1].bias)).sum().backward()
    for model in (moves, stays):
        torch.tanh(model(ids)).sum().backward()
    for ours, theirs, weight in zip(moves, stays, weights, strict=True):
        torch.testing.assert_close(ours.latent.grad, weight.grad, rtol=1e-4, atol=1e-6)
        for name in ("codebook", "row_scale", "outlier_values"):
            if getattr(theirs, name) is not None:
                torch.testing.assert_close(getattr(ours, name).grad, getattr(theirs, name).grad, rtol=1e-4, atol=1e-6)


def test_every_forward_is_quantized_and_nothing_stays_behind(ids):
    model, source = _quantized()
    keys = set(model.state_dict())
    modules = _modules(model)
    latents = start_moving(modules, {name: source.get_submodule(name).weight for name in modules})
    with torch.no_grad():
        for latent in latents:
            latent.add_(0.05 * torch.randn_like(latent))
    settle(modules.values())
    trained = model(ids).logits
    assert trained.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(trained, model(ids).logits, rtol=1e-4, atol=1e-6)
    stop_moving(modules.values())
    with torch.no_grad():
        torch.testing.assert_close(trained, model(ids).logits, rtol=1e-4, atol=1e-6)
    assert set(model.state_dict()) == keys
    assert not any("latent" in name for name, _ in model.named_parameters())


def test_layers_that_share_their_indices_share_the_latent_weight():
    model = family_model("bert", head="MaskedLM")
    kmq.quantize_(model, kmq.KMQConfig(bits=2, module_bits={"decoder": 2}))
    modules = _modules(model)
    shared = [module for module in modules.values() if module.packed is modules["bert.embeddings.word_embeddings"].packed]
    assert len(shared) == 2
    latents = start_moving(modules, {})
    assert shared[0].latent is shared[1].latent
    assert len(latents) == len(modules) - 1


def test_what_does_not_train_does_not_move():
    model, _ = _quantized()
    modules = _modules(model)
    frozen = modules["bert.pooler.dense"]
    frozen.requires_grad_(False)
    start_moving(modules, {})
    assert frozen.latent is None
    assert all(module.latent is not None for module in modules.values() if module is not frozen)


def test_half_precision_layers_keep_their_dtype():
    layer = CodebookLinear(20, 12, 2, dtype=torch.bfloat16)
    table = CodebookEmbedding(9, 20, 2, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.codebook.copy_(torch.tensor([[-1.0, -0.25, 0.25, 1.0]]))
        table.codebook.copy_(torch.tensor([[-1.0, -0.25, 0.25, 1.0]]))
    start_moving({"table": table, "layer": layer}, {"layer": torch.randn(12, 20), "table": torch.randn(9, 20)})
    out = layer(table(torch.tensor([[1, 2]])))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.latent.grad.dtype == table.latent.grad.dtype == torch.float32


def test_weights_that_do_not_fit_are_refused():
    layer = CodebookLinear(20, 12, 2)
    with pytest.raises(ValueError, match=r"layer: expected a weight of shape \(12, 20\) to begin at, got \(12, 21\)"):
        start_moving({"layer": layer}, {"layer": torch.randn(12, 21)})
    with pytest.raises(ValueError, match="layer: the weight to begin at holds NaN or Inf"):
        start_moving({"layer": layer}, {"layer": torch.full((12, 20), float("nan"))})
    assert layer.latent is None


def test_cluster_sizes_are_counted_anew_for_any_iterable():
    model, _ = _quantized(grad_reduction="mean")
    modules = _modules(model)
    start_moving(modules, {})
    for module in modules.values():
        module.trained_codebook()
    settle(module for module in modules.values())
    assert all(module._inverse_counts is None for module in modules.values())


def test_a_latent_weight_is_in_no_state_dict(tmp_path, ids):
    """What is saved while assignments move loads, here and elsewhere."""
    model, _ = _quantized()
    modules = _modules(model)
    names = list(model.state_dict())
    start_moving(modules, {})
    assert list(model.state_dict()) == names
    model.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)
    again = kmq.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    stop_moving(modules.values())

"""nn.MultiheadAttention's projections, against the same attention written out with linear layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from condzoo.probe import Probe, measure
from condzoo.probe.attention import has_bias, projections

WIDTH = 6


class WithModule(nn.Module):
    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(WIDTH, 2, batch_first=True), nn.Linear(WIDTH, 3)
        self.cross = cross

    def forward(self, x: Tensor) -> Tensor:
        keys = x.flip(1) * 2 if self.cross else x
        return self.head(self.attention(x, keys, keys, need_weights=False)[0].mean(1))


class WrittenOut(nn.Module):
    """The same function; q and kv are layers of their own where keys differ from queries."""

    def __init__(self, model: WithModule) -> None:
        super().__init__()
        weight, bias = model.attention.in_proj_weight.detach(), model.attention.in_proj_bias.detach()
        self.cross, self.head, self.out = model.cross, model.head, model.attention.out_proj
        split = (WIDTH, 2 * WIDTH) if model.cross else (3 * WIDTH,)
        self.inner = nn.ModuleList(nn.Linear(WIDTH, rows) for rows in split)
        for layer, w, b in zip(self.inner, weight.split(split), bias.split(split), strict=True):
            layer.weight, layer.bias = nn.Parameter(w), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.inner[0](x), self.inner[1](x.flip(1) * 2)] if self.cross else [self.inner[0](x)]
        q, k, v = (t.unflatten(2, (2, 3)).transpose(1, 2) for t in torch.cat(parts, dim=2).chunk(3, dim=2))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.out(h).mean(1))


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn((8, 5, WIDTH), generator=generator).double(), torch.randint(3, (8,), generator=generator)


@pytest.mark.parametrize("training", [True, False])
def test_projections_of_self_attention_equal_those_written_out(training):
    torch.manual_seed(0)
    model = WithModule(cross=False).double().train(training)
    found, expected = measure(model, batch()), measure(WrittenOut(model).double(), batch())
    assert list(found) == ["attention.in_proj", "attention.out_proj", "head"]
    for name, other in (("attention.in_proj", "inner.0"), ("attention.out_proj", "out"), ("head", "head")):
        for side in ("input", "output_grad"):
            a, b = (getattr(c[n], side) for c, n in ((found, name), (expected, other)))
            assert torch.allclose(a.eigenvalues, b.eigenvalues, rtol=1e-9, atol=1e-10 * b.lambda_max)
        assert found[name].weight == pytest.approx(expected[other].weight, rel=1e-12)
        assert found[name].weight_grad == pytest.approx(expected[other].weight_grad, rel=1e-9)


def test_a_packed_weight_used_in_parts_is_named_and_the_function_is_restored():
    torch.manual_seed(0)
    before = F.linear
    model = WithModule(cross=True).double()
    found, expected = measure(model, batch()), measure(WrittenOut(model).double(), batch())
    assert list(found) == ["attention.q_proj", "attention.kv_proj", "attention.out_proj", "head"]
    for name, other in (("attention.q_proj", "inner.0"), ("attention.kv_proj", "inner.1")):
        a, b = found[name].output_grad, expected[other].output_grad
        assert torch.allclose(a.eigenvalues, b.eigenvalues, rtol=1e-9, atol=1e-10 * b.lambda_max)
    assert F.linear is before


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("asked", ["in_proj", "out_proj"])
def test_a_projection_that_is_asked_for_is_measured_alone(asked, cross):
    found = measure(WithModule(cross).double(), batch(), layers=[f"attention.{asked}"])
    names = {"in_proj": ["q_proj", "kv_proj"] if cross else ["in_proj"], "out_proj": ["out_proj"]}[asked]
    assert list(found) == [f"attention.{name}" for name in names]


def test_the_function_is_restored_when_attention_raises():
    before = F.linear
    model = WithModule(cross=False).double()
    with pytest.raises(AssertionError, match="embedding dimension"), Probe(model):
        model(torch.zeros(2, 3, 5).double())
    assert F.linear is before


def test_separate_weights_for_keys_and_values_are_three_layers():
    class Separate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 2, kdim=4, vdim=5, batch_first=True)
            self.head = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return self.head(self.attention(x, keys, values, need_weights=False)[0].mean(1))

    class AsLayers(nn.Module):
        def __init__(self, model: Separate) -> None:
            super().__init__()
            self.head, self.out, inner = model.head, model.attention.out_proj, model.attention
            weights = inner.q_proj_weight, inner.k_proj_weight, inner.v_proj_weight
            self.inner = nn.ModuleList(nn.Linear(w.shape[1], WIDTH) for w in weights)
            biases = inner.in_proj_bias.detach().split(WIDTH)
            for layer, w, b in zip(self.inner, weights, biases, strict=True):
                layer.weight, layer.bias = nn.Parameter(w.detach()), nn.Parameter(b)

        def forward(self, *inputs: Tensor) -> Tensor:
            parts = [layer(x) for layer, x in zip(self.inner, inputs, strict=True)]
            q, k, v = (t.unflatten(2, (2, 3)).transpose(1, 2) for t in parts)
            return self.head(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1))

    torch.manual_seed(0)
    model = Separate().double()
    x, y = batch()
    arguments = (x, torch.randn(8, 7, 4).double(), torch.randn(8, 7, 5).double())
    found, expected = measure(model, [(arguments, y)]), measure(AsLayers(model).double(), [(arguments, y)])
    names = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj", "head"]
    assert list(found) == names
    for name, other in zip(names, ["inner.0", "inner.1", "inner.2", "out", "head"], strict=True):
        for side in ("input", "output_grad"):
            a, b = getattr(found[name], side), getattr(expected[other], side)
            # the gradient of keys sums to zero over tokens: tiny eigenvalues differ by round-off
            assert float((a.eigenvalues - b.eigenvalues).abs().max()) < 1e-10 * b.lambda_max
        assert found[name].weight == pytest.approx(expected[other].weight, rel=1e-12)
        assert found[name].weight_grad == pytest.approx(expected[other].weight_grad, rel=1e-9)


@pytest.mark.parametrize("kind", ["self", "cross", "separate", "without"])
def test_a_bias_is_one_more_input_of_every_projection(kind):
    torch.manual_seed(0)
    sizes = {"kdim": 5, "vdim": 5} if kind == "separate" else {}

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, bias=kind != "without", **sizes)
            self.head = nn.Linear(WIDTH, 3)

        def forward(self, x):
            keys = {"self": x, "cross": 2 * x.flip(1), "separate": x[..., :5], "without": 2 * x.flip(1)}[kind]
            return self.head(self.attention(x, keys, keys, need_weights=False)[0].mean(1))

    model, (x, y) = Network().double(), batch()
    plain, found = measure(model, (x, y)), measure(model, (x, y), bias=True)
    assert list(found) == list(plain)
    inner = [name for name in found if name.startswith("attention.")]
    assert len(inner) == {"self": 2, "cross": 3, "separate": 4, "without": 3}[kind]
    for name in inner:
        assert found[name].input.dim == plain[name].input.dim + (kind != "without")
    if kind == "cross":
        rows = torch.cat([x, torch.ones_like(x[..., :1])], dim=2).flatten(0, 1)
        expected = torch.linalg.svdvals(rows).square() / len(rows)
        assert torch.allclose(found["attention.q_proj"].input.eigenvalues, expected, rtol=1e-10)


def test_a_bias_that_is_gathered_only_for_the_forward_pass_has_parts_all_the_same():
    """As under FullyShardedDataParallel: in between it has a shape and no storage."""
    attention, flat = nn.MultiheadAttention(8, 2, kdim=6, vdim=5), torch.zeros(30, requires_grad=True)
    del attention.in_proj_bias
    attention.in_proj_bias = flat.split([6, 24])[1]
    flat.untyped_storage().resize_(0)
    layers = projections(attention)
    assert {name: layer.in_features for name, layer in layers.items()} == {"q_proj": 8, "k_proj": 6, "v_proj": 5}
    assert all(has_bias(layer) and layer.bias is None for layer in layers.values())


def test_a_packed_projection_in_parts_is_not_said_to_be_uncalled():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.attention(x[:, :2], x, x)[0].mean(1))

    found = measure(Cross(), (torch.randn(6, 5, 4), torch.arange(6) % 3))
    assert (
        found.skipped["attention.in_proj"] == "its parts are layers of their own: attention.q_proj, attention.kv_proj"
    )


class Attends(nn.Module):
    """Attention of one kind, on tokens or between them and others."""

    def __init__(self, kind):
        super().__init__()
        sizes = {"kdim": 4, "vdim": 4} if kind == "separate" else {}
        self.attention, self.head = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **sizes), nn.Linear(WIDTH, 3)
        self.kind = kind

    def forward(self, x):
        keys = {"self": x, "cross": 2 * x.flip(1), "separate": x[..., :4]}[self.kind]
        return self.head(self.attention(x, keys, keys, need_weights=False)[0].mean(1))


def computing(model, how):
    """The attention's weights and bias computed by parametrizations of torch's."""
    names = ["in_proj_weight"] if model.kind != "separate" else [f"{x}_proj_weight" for x in "qkv"]
    for name in names:
        getattr(parametrizations, how)(model.attention, name)
    getattr(parametrizations, how)(model.attention.out_proj)
    parametrize.register_parametrization(model.attention, "in_proj_bias", nn.Identity())
    return model


def plain(model):
    """The same function without parametrizations."""
    other = Attends(model.kind).double()
    other.head.load_state_dict(model.head.state_dict())
    pairs = (model.attention, other.attention), (model.attention.out_proj, other.attention.out_proj)
    with torch.no_grad():
        for computing, with_parameters in pairs:
            for name in computing.parametrizations:
                getattr(with_parameters, name).copy_(getattr(computing, name))
        other.attention.out_proj.bias.copy_(model.attention.out_proj.bias)
    return other


@pytest.mark.parametrize("kind", ["self", "cross", "separate"])
@pytest.mark.parametrize("how", ["spectral_norm", "weight_norm", "orthogonal"])
@pytest.mark.parametrize("probed", [False, True])
def test_projections_whose_weights_are_computed_are_those_of_the_plain_ones(kind, how, probed):
    torch.manual_seed(0)
    computed, (x, y) = computing(Attends(kind).double(), how), batch()
    model, found = plain(computed.eval()).eval(), []
    for network in (computed, model):
        if probed:
            with Probe(network.train(), bias=True) as probe, parametrize.cached():
                network.attention.eval()  # spectral_norm's vectors are left alone: the weight is the plain one's
                F.cross_entropy(network(x), y).backward()
                probe.step()
            found.append(probe.latest)
        else:
            found.append(measure(network, (x, y), bias=True))
    one, other = found
    assert list(one) == list(other)
    assert len(one) == {"self": 3, "cross": 4, "separate": 5}[kind]
    assert one.skipped == other.skipped
    for name in other:
        for side in ("input", "output_grad"):
            a, b = getattr(one[name], side), getattr(other[name], side)
            assert float((a.eigenvalues - b.eigenvalues).abs().max()) < 1e-10 * b.lambda_max
        assert one[name].weight == (None if other[name].weight is None else pytest.approx(other[name].weight))
        grad = other[name].weight_grad
        assert one[name].weight_grad == (None if grad is None else pytest.approx(grad, rel=1e-9))


@pytest.mark.parametrize("kind", ["self", "separate"])
def test_norms_of_a_pruned_projection_are_those_of_the_weight_that_runs(kind):
    torch.manual_seed(0)
    model, (x, y) = Attends(kind).double(), batch()
    local = "in_proj" if kind == "self" else "k_proj"
    prune.l1_unstructured(model.attention, f"{local}_weight", amount=0.5)
    found = measure(model, (x, y))[f"attention.{local}"]
    loss = F.cross_entropy(model(x), y)
    weight = getattr(model.attention, f"{local}_weight")
    (grad,) = torch.autograd.grad(loss, weight)
    assert found.weight == pytest.approx(float(torch.linalg.matrix_norm(weight.detach(), 2)))
    assert found.weight_grad == pytest.approx(float(torch.linalg.matrix_norm(grad, 2)))


@pytest.mark.parametrize("kind", ["self", "separate"])
def test_weights_that_change_as_they_are_read_are_read_by_the_network_alone(kind):
    def trained(every):
        torch.manual_seed(0)
        model, (x, y) = computing(Attends(kind).double(), "spectral_norm").train(), batch()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3) if every is None else ():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        if every is not None:
            with Probe(model, every=every) as probe:
                for _ in range(3):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()
                    probe.step()
        return model

    expected = trained(None)
    for every in (0, 2):
        found = trained(every).state_dict()
        assert all(torch.equal(value, found[name]) for name, value in expected.state_dict().items())
    losses = [measure(expected, batch()).loss for _ in range(2)]
    x, y = batch()
    assert losses == [float(F.cross_entropy(expected(x), y).detach())] * 2

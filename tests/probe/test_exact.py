"""Exact curvature against matrices built from torch.func, one sample and one class at a time."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev
from torch.utils import checkpoint as checkpoint_module
from torch.utils.checkpoint import checkpoint

from condzoo.probe import (
    costs,
    curvature,
    curvature_blocks,
    exact,
    kronecker_report,
    label_draws,
    measure,
    row_spectra,
    sample_gradients,
    second_derivatives,
    top_curvature,
)

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")  # torch.func.hessian's own


def layer_parameters(model, block=None):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    chosen = layers if block is None else {block: layers[block]}
    return {f"{n}.{k}": p.detach() for n, m in chosen.items() for k, p in m.named_parameters()}


def flat(tree):
    return torch.cat([t.flatten() for t in tree.values()])


def dense(model, x, y, matrix, block=None):
    """The matrix itself, by per-sample gradients, or by torch.func.hessian and jacrev of the batch."""
    parameters = layer_parameters(model, block)

    def logits(p, inputs):
        buffers = {k: b.clone() for k, b in model.named_buffers()}
        return functional_call(model, {**p, **buffers}, (inputs,))

    if matrix == "hessian":
        tree = hessian(lambda p: F.cross_entropy(logits(p, x), y))(parameters)
        rows = [torch.cat([b.flatten(parameters[i].ndim) for b in tree[i].values()], parameters[i].ndim) for i in tree]
        return torch.cat([r.reshape(-1, r.shape[-1]) for r in rows]).detach()
    total = 0
    for n in range(len(x)):
        one = x[n : n + 1]
        p = logits(parameters, one).softmax(1)[0].detach()
        if matrix == "ggn":
            tree = jacrev(lambda q, one=one: logits(q, one)[0])(parameters)
            jacobian = torch.cat([t.flatten(1) for t in tree.values()], dim=1)
            total = total + jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
            continue
        draws = [(1.0, y[n])] if matrix == "grad_moment" else [(p[c], torch.tensor(c)) for c in range(len(p))]
        for weight, label in draws:
            tree = grad(lambda q, one=one, label=label: F.cross_entropy(logits(q, one), label[None]))(parameters)
            total = total + weight * torch.outer(flat(tree), flat(tree))
    return total.detach() / len(x)


def spectrum_of(matrix):
    return torch.linalg.eigvalsh(matrix).flip(0)


@pytest.fixture(params=["many", "few"])
def samples(request):
    return {"many": 60, "few": 5}[request.param]  # either Gram side is the smaller one


def networks(kit, name):
    if name == "mlp":
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(48, 3), nn.ReLU(), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)
        ).double()
    if name == "conv":
        torch.manual_seed(0)
        body = [nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2)]
        return nn.Sequential(*body, nn.Flatten(), nn.Linear(4, 4)).double()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 4)).double()
    return model.eval()


@pytest.mark.parametrize("matrix", ["fisher", "grad_moment", "hessian", "ggn"])
@pytest.mark.parametrize("name", ["mlp", "conv", "bn_eval"])
def test_full_matrices_equal_the_dense_ones(kit, name, matrix, samples):
    model, (x, y) = networks(kit, name), kit.images(samples)
    found = curvature(model, x, y, matrix).eigenvalues
    expected = spectrum_of(dense(model, x, y, matrix))
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize("matrix", ["fisher", "grad_moment", "hessian", "ggn"])
@pytest.mark.parametrize(("name", "block"), [("mlp", "3"), ("conv", "2")])
def test_blocks_equal_the_dense_ones(kit, name, block, matrix):
    model, (x, y) = networks(kit, name), kit.images(12)
    found = curvature(model, x, y, matrix, block=block).eigenvalues
    expected = spectrum_of(dense(model, x, y, matrix, block))
    assert float((found - expected).abs().max()) < 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize("matrix", ["fisher", "grad_moment", "ggn"])
def test_a_layer_that_is_not_called_has_no_block_whatever_the_others_are(kit, matrix):
    class RowByRow(nn.Sequential):
        def forward(self, x):
            return torch.stack([super(RowByRow, self).forward(row.flatten()) for row in x])

    x, y = kit.images(12)
    found = []
    for kind in (nn.Sequential, RowByRow):
        torch.manual_seed(0)
        model = kind(nn.Flatten(-1), nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        if kind is nn.Sequential:
            model[0] = nn.Flatten()
        model[1].spare = nn.Linear(3, 3).double()
        found.append(curvature_blocks(model, x, y, matrix))
    factored, alone = found
    assert list(alone) == list(factored) == [None, "1", "3"]
    for block in alone:
        assert alone[block].dim == factored[block].dim
        assert float((alone[block].eigenvalues - factored[block].eigenvalues).abs().max()) < 1e-12


class Unused(nn.Linear):
    """A layer whose own call is none, and changes nothing."""

    def __call__(self, x):
        return x


@pytest.mark.parametrize("matrix", ["fisher", "grad_moment", "hessian", "ggn"])
@pytest.mark.parametrize("name", ["mlp", "conv", "bn_eval", "bn_train", "two layers", "uncalled"])
def test_all_blocks_at_once_are_the_blocks_one_by_one(kit, name, matrix):
    kind, (x, y) = name.removesuffix("_train").removesuffix("_eval"), kit.images(12)
    if name == "two layers":
        model, (x, y) = Tied(name).double(), (torch.arange(10) % 5, torch.arange(10) % 3)
    else:
        model = networks(kit, "mlp" if name == "uncalled" else kind).train(name == "bn_train")
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    if name == "uncalled":
        model.add_module("spare", Unused(2, 2).double())
    found = curvature_blocks(model, x, y, matrix)
    assert [n for n in found if n != "spare"] == [None, *names]
    for block in (None, *names):
        alone = curvature(model, x, y, matrix, block=block)
        assert found[block].dim == alone.dim
        assert torch.allclose(found[block].eigenvalues, alone.eigenvalues, rtol=1e-9, atol=1e-13 * alone.lambda_max)


def test_a_relu_networks_hessian_blocks_equal_its_ggn_blocks(kit):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    x, y = kit.images(32)
    for block in ("1", "3"):
        h, g = (curvature(model, x, y, matrix, block=block).eigenvalues for matrix in ("hessian", "ggn"))
        assert float((h - g).abs().max()) < 1e-12 * float(g.max())
    full_h, full_g = (curvature(model, x, y, matrix).eigenvalues for matrix in ("hessian", "ggn"))
    assert float((full_h - full_g).abs().max()) > 1e-3 * float(full_g.max())


def test_batch_statistics_make_a_gradient_layer_by_layer(kit):
    """Row i of a layer is n * dL/dh_i x_i^T: from the parameter gradient of a linear layer's copy a sample."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 4)).double()
    x, y = kit.images(10)
    weight = model[1].weight.detach().expand(10, 3, 48).clone().requires_grad_()
    bias = model[1].bias.detach().expand(10, 3).clone().requires_grad_()
    h = torch.einsum("noi,ni->no", weight, x.flatten(1)) + bias
    gradients = torch.autograd.grad(F.cross_entropy(model[2:](h), y), (weight, bias))
    rows = 10 * torch.cat([g.flatten(1) for g in gradients], dim=1)
    found = curvature(model, x, y, "grad_moment", block="1").eigenvalues
    assert torch.allclose(found, spectrum_of(rows.T @ rows / 10), rtol=1e-10, atol=1e-14)


def test_ggn_under_batch_statistics_is_that_of_the_batch_as_one_function(kit):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Linear(2, 3)).double()
    x = kit.images(6)[0]
    parameters = layer_parameters(model)

    def logits(p):
        fresh = {k: b.clone() for k, b in model.named_buffers()}
        return functional_call(model, {**p, **fresh}, (x,))

    tree = jacrev(logits)(parameters)
    jacobian = torch.cat([t.flatten(2) for t in tree.values()], dim=2)
    p = logits(parameters).softmax(1).detach()
    expected = sum(j.T @ (torch.diag(q) - torch.outer(q, q)) @ j for j, q in zip(jacobian, p, strict=True)) / 6
    found = curvature(model, x, None, "ggn").eigenvalues
    assert torch.allclose(found, spectrum_of(expected), rtol=1e-10, atol=1e-13)


def test_one_sample_makes_the_kronecker_product_exact(kit):
    model, (x, y) = networks(kit, "mlp"), kit.images(1)
    exact = curvature(model, x, y, "grad_moment", block="3")
    product = measure(model, (x, y), bias=True)["3"].fisher
    assert exact.lambda_max == pytest.approx(product.lambda_max, rel=1e-12)


def test_the_model_is_untouched_and_ranks_are_said(kit):
    model, (x, y) = networks(kit, "mlp"), kit.images(5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = curvature(model, x, y, "grad_moment")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert (found.rank, found.status(), found.rows) == (5, "rank-limited", 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"matrix": "fischer"}, r"matrix must be one of 'fisher', .*got 'fischer'; did you mean 'fisher'\?"),
        ({"block": "9"}, "no layer matches '9'; did you mean"),
        ({"matrix": "hessian", "y": None}, "matrix='hessian' needs targets y; 'fisher' does without"),
    ],
)
def test_wrong_arguments_are_explained(kit, arguments, message):
    x, y = kit.images()
    with pytest.raises(ValueError, match=message):
        curvature(networks(kit, "mlp"), **{"x": x, "y": y, **arguments})


def test_too_large_a_matrix_is_refused_before_it_is_computed():
    model = nn.Linear(200, 200)
    with pytest.raises(ValueError, match=r"has side 40,200, at most 20,000 is possible; pass fewer samples"):
        curvature(model, torch.randn(4, 200), torch.zeros(4, dtype=torch.long), "hessian")


@pytest.mark.parametrize("matrix", ["fisher", "grad_moment", "hessian", "ggn"])
def test_over_a_minute_is_announced_before_it_starts_and_less_is_not(kit, matrix, monkeypatch, recwarn):
    """On a machine a billion times slower than this one."""
    model, (x, y) = networks(kit, "conv"), kit.images(6)
    if matrix == "ggn":  # the batch as one function
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2), nn.BatchNorm1d(2), nn.Linear(2, 3)).double()
    curvature(model, x, y, matrix)
    assert not recwarn.list
    monkeypatch.setattr(costs, "products_a_second", lambda *_: 30.0)
    started = []
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda a: started.append(a) or torch.ones(len(a)).double())
    warned = r"exact .*: about [\d.]+ minutes and 0.0 GB for a matrix of side \d+; fewer samples or block="
    with pytest.warns(UserWarning, match=warned) as records:
        curvature(model, x, y, matrix)
    assert len(records) == len(started) == 1


def test_the_operations_are_those_of_the_smaller_side():
    """2 n m k operations an [n, k] by [k, m] product; the eigenvalues 16 / 3 d^3 on top."""
    model, y = nn.Linear(5, 3), torch.zeros(400, dtype=torch.long)
    seen = {}
    for samples in (4, 400):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(row_spectra, "announce", lambda expected, what, n=samples: seen.update({n: expected}))
            patch.setattr(costs, "products_a_second", lambda *_: 1.0)
            curvature(model, torch.randn(samples, 5), y[:samples], "grad_moment")
    assert (seen[4].side, seen[4].operations) == (4, 2 * 4 * 4 * (5 + 3))
    assert (seen[400].side, seen[400].operations) == (18, 400 * 18**2)
    assert seen[4].seconds == pytest.approx(2 * 16 * 8 + 16 / 3 * 4**3)
    assert seen[400].bytes == 2 * 8 * 18**2


class Named(nn.Module):
    """Takes its input by name, folds frames [n, k, 1, 3, 3] into the batch, and calls a layer by keyword."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(1, 4, 2, groups=1), nn.Linear(16, 4)
        self.mix = nn.Linear(4, 4)

    def forward(self, frames, scale=1.0):
        h = torch.tanh(self.conv(frames.flatten(0, 1))).flatten(1)
        h = self.mix(input=torch.tanh(self.fc(scale * h)))
        return h.unflatten(0, frames.shape[:2]).mean(1)


@pytest.mark.parametrize("matrix", ["fisher", "grad_moment", "hessian", "ggn"])
def test_inputs_may_be_a_dict_or_a_tuple_and_a_layers_rows_a_samples_frames(matrix):
    model, x, y = Named().double(), torch.randn(5, 3, 1, 3, 3).double(), torch.tensor([0, 1, 2, 3, 0])
    expected = spectrum_of(dense(model, x, y, matrix))
    for inputs in (x, {"frames": x}, (x, 1.0), {"frames": x.float()}):
        found = curvature(model, inputs, y, matrix).eigenvalues
        tolerance = 1e-5 if isinstance(inputs, dict) and inputs["frames"].dtype == torch.float32 else 1e-12
        assert float((found - expected).abs().max()) < tolerance * float(expected.abs().max())
    top = top_curvature(model, {"frames": x}, y, matrix)
    assert float(top.values[0]) == pytest.approx(float(expected.max()), rel=1e-6)
    assert list(kronecker_report(model, {"frames": x}, y, layers=["fc"])) == ["fc"]


class Partly(nn.Module):
    """Beside the layers of the loss: one never called, one whose output is not used, one called once in vain."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.unused, self.aside = first, nn.Linear(3, 2), nn.Linear(5, 3)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        h = self.first(x).flatten(1).tanh()[:, :5]
        self.aside(h)
        self.head(h.cos())
        return self.head(h)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("matrix", ["fisher", "grad_moment", "hessian", "ggn"])
def test_layers_without_a_part_in_the_loss_have_eigenvalues_of_zero(kit, matrix, kind, samples):
    torch.manual_seed(0)
    first = nn.Linear(4, 5) if kind == "linear" else nn.Conv2d(3, 3, 2, stride=2, groups=3)
    model = Partly(first).double()
    x, y = kit.images(samples)
    x = x[:, 0, 0] if kind == "linear" else x
    reached = sum(p.numel() for m in (model.first, model.head) for p in m.parameters())
    expected = torch.linalg.eigvalsh(dense(model, x, y, matrix)).flip(0)
    found = curvature(model, x, y, matrix)
    assert found.dim == sum(p.numel() for p in model.parameters()) > reached
    assert float((found.eigenvalues - expected).abs().max()) <= 1e-10 * float(expected[0])
    top = top_curvature(model, x, y, matrix, k=2)
    assert torch.allclose(top.values, expected[:2], rtol=1e-7)


def test_a_block_that_is_not_called_and_weights_that_are_computed_are_explained(kit):
    model = Partly(nn.Linear(4, 5)).double()
    x, y = torch.randn(6, 4).double(), torch.randint(4, (6,))
    for of in (curvature, top_curvature):
        with pytest.raises(ValueError, match="calls none of the layers asked for"):
            of(model, x, y, block="unused")
    nn.utils.parametrizations.weight_norm(model.first)
    for of in (curvature, top_curvature):
        for matrix in ("fisher", "hessian"):
            with pytest.raises(ValueError, match="layer 'first' is a layer whose weight is computed"):
                of(model, x, y, matrix)
    assert curvature(model, x, y, block="head").dim == 24
    report = kronecker_report(model, x, y)
    assert report.skipped["first"] == "the exact block of a layer whose weight is computed is not available"


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_fused_attention_has_second_derivatives(kit, matrix):
    model, (x, y) = kit.build("tokens"), kit.images(6)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch.linalg.eigvalsh(dense(model, x, y, matrix)).flip(0)
    found = curvature(model, x, y, matrix).eigenvalues
    assert float((found - expected).abs().max()) <= 1e-10 * float(expected[0])
    top = top_curvature(model, x, y, matrix, k=2).values
    assert torch.allclose(top, expected[:2], rtol=1e-7)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (1, 48)], ids=["features", "one token"])
def test_fisher_under_batch_statistics_is_over_independent_labels(kit, shape, bias):
    """Against the expectation by all label combinations of the batch, each with its probability."""
    torch.manual_seed(0)
    first, rest = nn.Linear(48, 2, bias=bias), [nn.Flatten(), nn.BatchNorm1d(2), nn.Tanh(), nn.Linear(2, 3)]
    model = nn.Sequential(nn.Flatten(), nn.Unflatten(1, shape), first, *rest).double()
    x, samples = kit.images(3)[0], 3
    h = first(x.flatten(1)).detach().requires_grad_()
    log_p = model[3:](h).log_softmax(1)
    inputs = torch.cat([x.flatten(1), torch.ones(samples, int(bias))], dim=1)
    expected = 0
    for probability, g in kit.labellings(log_p, h):
        rows = torch.einsum("no,ni->noi", g, inputs).flatten(1)
        expected = expected + probability * rows.T @ rows / samples
    found = curvature(model, x, None, "fisher", block="2").eigenvalues
    assert torch.allclose(found, spectrum_of(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("limit", [0, 10**9], ids=["random signs beyond the limit", "sums of products"])
def test_fisher_under_batch_statistics_of_more_labels_than_single_passes(kit, monkeypatch, limit):
    """Against the logits' whole Jacobian: of 60 samples and 10 classes, more than passes of their own are made for."""
    monkeypatch.setattr(label_draws, "MOST", limit)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 10)).double()
    x, samples = kit.images(60)[0], 60
    inputs = {"1": x.flatten(1), "4": model[:4](x).detach()}
    outputs = {"1": model[1](inputs["1"]).detach(), "4": model(x).detach()}
    tails = {"1": lambda h: model[2:](h), "4": lambda h: h}
    p = outputs["4"].softmax(1)
    hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    jacobians = [torch.autograd.functional.jacobian(tails[name], h) for name, h in outputs.items()]
    j = torch.cat([part.permute(2, 0, 1, 3) for part in jacobians], dim=3)  # [sample n, logits of m, k, o of both]
    products = torch.einsum("nmko,mkl,nmlp->nop", j, hessians, j)
    columns = [torch.cat([inputs[name], torch.ones(samples, 1)], dim=1) for name in inputs]
    rows = [
        torch.einsum("nro,ni->nroi", part, i)
        for part, i in zip(roots(products).split([6, 10], 2), columns, strict=True)
    ]
    gradients = torch.cat([part.flatten(2) for part in rows], dim=2).flatten(0, 1)
    expected = spectrum_of(gradients.T @ gradients / samples)
    close = dict(rtol=1e-9, atol=1e-11 * float(expected[0]))
    found = curvature(model, x, None, "fisher").eigenvalues
    assert torch.allclose(found, expected, **close) == bool(limit)
    if limit:
        assert torch.allclose(top_curvature(model, x, None, "fisher", k=3).values, expected[:3], rtol=1e-7)
        of_first = rows[0].flatten(0, 1).flatten(1)
        expected = spectrum_of(of_first.T @ of_first / samples)
        assert torch.allclose(kronecker_report(model, x)["1"].exact.eigenvalues, expected, **close)
        assert torch.allclose(curvature(model, x, None, "fisher", block="1").eigenvalues, expected, **close)


@pytest.mark.parametrize("ask", [curvature, curvature_blocks, top_curvature])
@pytest.mark.parametrize("matrix", ["fisher", "hessian"])
def test_a_network_without_layers_is_one_error(kit, ask, matrix):
    with pytest.raises(ValueError, match="the network has no linear or convolution layer"):
        ask(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48)), *kit.images(4), matrix)


@pytest.mark.parametrize("ask", [curvature, curvature_blocks, top_curvature])
def test_a_model_that_is_split_over_devices_is_one_error(kit, ask):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.Linear(4, 4, device="meta"))
    with pytest.raises(ValueError, match=r"split over cpu, meta; exact curvature takes layers that are on one device"):
        ask(model, *kit.images(4))


class Repeated(nn.Module):
    """BN, and dropout that activation checkpointing repeats within the backward pass."""

    def __init__(self, on):
        super().__init__()
        torch.manual_seed(0)
        self.on = on
        body = [nn.Linear(48, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(6, 5)]
        self.body, self.head = nn.Sequential(*body), nn.Linear(5, 4)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(checkpoint(self.body, x, use_reentrant=False) if self.on else self.body(x))


def test_passes_that_cannot_run_as_one_run_one_by_one(kit):
    """vmap refuses random operations."""
    x = kit.images(20)[0]
    expected, found = (curvature(Repeated(on), x, None, "fisher").eigenvalues for on in (False, True))
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-15)


def roots(products):
    """[n, r, o] with sum_r of r's outer products the given [n, o, o]."""
    values, vectors = torch.linalg.eigh(products)
    return (vectors * values.clamp_min(0).sqrt()[:, None]).mT


class Tied(nn.Module):
    """A weight that is used by two layers, by an embedding and a layer, or by a function instead of its layer."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.first, self.last = kind, nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
        self.embedding = nn.Embedding(5, 5)
        if kind == "two layers":
            self.last.weight = self.first.weight
        if kind == "embedding":
            self.last.weight = self.embedding.weight

    def forward(self, x):
        h = self.embedding(x) if self.kind == "embedding" else F.one_hot(x, 5).to(self.first.weight)
        h = F.linear(h, self.first.weight) if self.kind == "function" else self.first(h)
        return self.last(h.tanh())


def dense_of_parameters(model, parameters, x, y, matrix):
    """M, F or G over these parameters, a sample and a class at a time, by plain autograd."""

    def flat_grad(value):
        grads = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True, allow_unused=True)
        return torch.cat([g.flatten() for g in grads])

    total = 0
    for n in range(len(x)):
        log_p = model(x[n : n + 1]).log_softmax(1)[0]
        draws = (
            [(1.0, int(y[n]))]
            if matrix == "grad_moment"
            else [(float(p), c) for c, p in enumerate(log_p.detach().exp())]
        )
        for weight, label in draws:
            g = flat_grad(-log_p[label])
            total = total + weight * torch.outer(g, g)
    return total / len(x)


class Attending(nn.Module):
    """Attention of torch's own module, a transposed convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.up, self.head = nn.ConvTranspose1d(3, 2, 2), nn.Linear(5, 3)

    def forward(self, x):
        h = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.up(h).tanh().mean(1))


class TimeFirst(nn.Module):
    """A layer whose rows cannot be told apart by sample."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x.transpose(0, 1)).mean(0)


class Disordered(nn.Module):
    """Layers that see the batch twice over, or in another order: their rows add up, and are other samples'."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.first, self.last = kind, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = x[:, 0]
        if self.kind == "flipped":
            return self.last(self.first(x.flip(0)).tanh().flip(0))
        if self.kind == "inside":  # the first and the last sample stay
            order = torch.tensor([0, 3, 1, 4, 2, 5])[: len(x)]
            return self.last(self.first(x[order]).tanh()[order.argsort()])
        return self.last(self.first(x.repeat(2, 1)).tanh()).unflatten(0, (2, -1)).mean(0)


@pytest.mark.parametrize("matrix", ["grad_moment", "fisher", "ggn"])
@pytest.mark.parametrize(
    ("build", "layer"),
    [
        (lambda: Disordered("flipped"), "first"),
        (lambda: Disordered("repeated"), "last"),
        (lambda: Disordered("inside"), "first"),
        (lambda: Tied("two layers"), "first"),
        (lambda: Tied("embedding"), "last"),
        (lambda: Tied("function"), "first"),
        (Attending, "up"),
        (Attending, "attention.in_proj"),
        (TimeFirst, "fc"),
    ],
)
def test_layers_without_factors_have_their_gradients_themselves(build, layer, matrix):
    torch.manual_seed(0)
    model = build().double()
    x = torch.arange(6) % 5 if isinstance(model, Tied) else torch.randn(6, 3, 4).double()
    y = torch.arange(6) % 3
    own = {n: p for n, p in model.named_parameters() if not n.startswith("embedding")}
    if isinstance(model, Tied) and model.kind == "embedding":
        own["last.weight"] = model.last.weight
    expected = spectrum_of(dense_of_parameters(model, [*own.values()], x, y, matrix))
    found = curvature(model, x, y, matrix).eigenvalues
    assert float((found - expected).abs().max()) < 1e-10 * float(expected.max())
    assert float(top_curvature(model, x, y, matrix).values[0]) == pytest.approx(float(expected[0]), rel=1e-7)
    prefix = layer.replace("in_proj", "in_proj_") if "in_proj" in layer else f"{layer}."
    block = [p for n, p in own.items() if n.startswith(prefix)]
    expected = spectrum_of(dense_of_parameters(model, block, x, y, matrix))
    found = curvature(model, x, y, matrix, block=layer).eigenvalues
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 1e-10 * float(expected.max())


class Separate(nn.Module):
    """Attention from one width to two others: its weights are three parameters, its biases one."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True)
        self.head = nn.Linear(4, 3)
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x):
        return self.head(self.attention(x, x[..., :3], x[..., :2])[0].mean(1))


@pytest.mark.parametrize("matrix", ["grad_moment", "fisher", "hessian"])
def test_a_packed_bias_is_in_the_matrix_and_its_parts_in_the_blocks_of_their_projections(matrix):
    torch.manual_seed(0)
    model = Separate().double()
    x, y = torch.randn(6, 3, 4).double(), torch.arange(6) % 3
    own = {n: p.detach() for n, p in model.named_parameters()}
    if matrix == "hessian":
        tree = hessian(lambda p: F.cross_entropy(functional_call(model, p, (x,)), y))(own)
        whole = torch.cat([torch.cat([tree[a][b].reshape(own[a].numel(), -1) for b in own], dim=1) for a in own])
    else:
        whole = dense_of_parameters(model, list(model.parameters()), x, y, matrix)
    of_all = spectrum_of(whole)
    tolerance = 1e-10 * float(of_all.max())
    found = curvature_blocks(model, x, y, matrix)
    assert torch.allclose(found[None].eigenvalues, of_all, rtol=0, atol=tolerance)
    assert torch.allclose(curvature(model, x, y, matrix).eigenvalues, of_all, rtol=0, atol=tolerance)
    assert float(top_curvature(model, x, y, matrix).values[0]) == pytest.approx(float(of_all[0]), rel=1e-7)
    places = dict(zip(own, torch.arange(len(whole)).split([p.numel() for p in own.values()]), strict=True))
    for name, part in zip("qkv", places["attention.in_proj_bias"].chunk(3), strict=True):
        columns = torch.cat([places[f"attention.{name}_proj_weight"], part])
        expected = spectrum_of(whole[columns][:, columns])
        block = f"attention.{name}_proj"
        assert torch.allclose(found[block].eigenvalues, expected, rtol=0, atol=tolerance)
    alone = curvature(model, x, y, matrix, block=block)
    assert torch.allclose(alone.eigenvalues, expected, rtol=0, atol=tolerance)
    top = top_curvature(model, x, y, matrix, block=block)
    assert float(top.values[0]) == pytest.approx(float(expected[0]), rel=1e-7)
    assert [name for name, _ in model.named_parameters()] == list(own)


def test_under_batch_statistics_such_a_layer_is_an_error():
    model = nn.Sequential(nn.ConvTranspose1d(3, 2, 2), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(10, 3))
    x, y = torch.randn(6, 3, 4), torch.arange(6) % 3
    with pytest.raises(ValueError, match="layer '0' is a ConvTranspose1d, whose exact curvature is not available"):
        curvature(model, x, y, "grad_moment")
    assert curvature(model.eval(), x, y, "grad_moment").lambda_max > 0


def test_a_loss_that_sees_more_than_the_logits_has_no_gradients_a_sample():
    class Penalized(nn.Module):
        """Returns its own loss, as Hugging Face's models do."""

        def __init__(self):
            super().__init__()
            self.up, self.head, self.penalty = nn.ConvTranspose1d(3, 2, 2), nn.Linear(5, 3), 0.0

        def forward(self, x):
            logits = self.head(self.up(x).tanh().mean(1))
            loss = F.cross_entropy(logits, torch.arange(6) % 3) + self.penalty * self.head.weight.square().sum()
            return {"loss": loss, "logits": logits}

    torch.manual_seed(0)
    model = Penalized().double()
    x, y = torch.randn(6, 3, 4).double(), torch.arange(6) % 3
    assert curvature(model, x, y, "grad_moment").lambda_max > 0
    model.penalty = 0.1
    with pytest.raises(ValueError, match="'up' is a ConvTranspose1d, whose exact"):
        curvature(model, x, y, "grad_moment")


def test_a_loss_without_gradients_is_one_error_for_layers_without_factors_too():
    model = nn.Sequential(nn.ConvTranspose1d(3, 2, 2), nn.Flatten())
    with pytest.raises(ValueError, match="the loss does not depend on the model's parameters, or it has none"):
        curvature(model, torch.randn(6, 3, 4), torch.arange(6), "grad_moment", loss=lambda h, y: h.detach().sum())


def test_too_many_gradients_are_refused(monkeypatch):
    monkeypatch.setattr(sample_gradients, "MOST", 1000)
    with pytest.raises(
        ValueError, match=r"18 gradients of 1\d\d parameters are .* GB, .* pass fewer samples, or block="
    ):
        curvature(Attending(), torch.randn(6, 3, 4), None, "fisher")


def test_a_shared_weight_counts_once_in_the_hessian():
    torch.manual_seed(0)
    model = Tied("two layers").double()
    x, y = torch.arange(5).repeat(2), torch.arange(10) % 5
    found = curvature(model, x, y, "hessian")
    own = {id(p): p for m in (model.first, model.last) for p in m.parameters()}
    assert found.dim == sum(p.numel() for p in own.values())
    top = top_curvature(model, x, y, "hessian").values[0]
    assert float(top) == pytest.approx(float(found.eigenvalues.max()), rel=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("matrix", ["grad_moment", "fisher", "hessian", "ggn"])
def test_activation_checkpointing_changes_nothing(kit, matrix, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.on = nn.Linear(48, 5), nn.Linear(5, 4), False

        def forward(self, x):
            def inner(h):
                return self.body(h).tanh()

            x = x.flatten(1).requires_grad_()
            return self.head(checkpoint(inner, x, use_reentrant=reentrant) if self.on else inner(x))

    torch.manual_seed(0)
    model, (x, y), found = Checkpointed().double(), kit.images(7), []
    for model.on in (False, True):
        found.append((curvature(model, x, y, matrix).eigenvalues, measure(model, (x, y))["body"].output_grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1].eigenvalues, found[1][1].eigenvalues)
    apply = checkpoint_module.CheckpointFunction.apply
    assert apply.__self__ is checkpoint_module.CheckpointFunction, "torch's own is there again"


def test_class_weights_follow_the_model_into_float64(kit):
    model, (x, y) = kit.build("mlp"), kit.images(6)
    weight = torch.tensor([1.0, 2, 3, 4])
    for matrix in ("grad_moment", "hessian"):
        wide = curvature(model, x, y, matrix, block="5", loss=nn.CrossEntropyLoss(weight=weight.double())).eigenvalues
        for loss in (nn.CrossEntropyLoss(weight=weight), functools.partial(F.cross_entropy, weight=weight)):
            assert torch.equal(curvature(model, x, y, matrix, block="5", loss=loss).eigenvalues, wide)


def test_a_gradient_that_sums_to_zero_is_not_taken_for_another_layers_part():
    """BatchNorm's backward pass over identical rows: each has a gradient, and their sum is rounding alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[1].bias.fill_(1.0)
    x, y = torch.randn(1, 3).repeat(6, 1), torch.tensor([0, 1, 1, 0, 1, 1])
    found = curvature(model, x, y, "grad_moment", block="0")
    assert found.lambda_max > 1e-4


class OneByOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return torch.stack([self.b(torch.tanh(self.a(row))) for row in x])


def test_layers_called_on_a_row_at_a_time_have_their_gradients_themselves():
    torch.manual_seed(0)
    model, x, y = OneByOne().double(), torch.randn(2, 4).double(), torch.tensor([0, 2])  # 4 is a multiple of 2
    grads = [
        torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), [*model.parameters()]) for i in (0, 1)
    ]
    rows = torch.stack([torch.cat([g.flatten() for g in own]) for own in grads])
    expected = torch.linalg.eigvalsh(rows @ rows.T / 2).flip(0)
    assert torch.allclose(curvature(model, x, y, "grad_moment").eigenvalues[:2], expected, rtol=1e-10)


class Behind(nn.Module):
    """A backbone under torch.no_grad, on which the head alone is trained; or all of it."""

    def __init__(self, everything):
        super().__init__()
        torch.manual_seed(0)
        self.everything, self.backbone, self.head = everything, nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        with torch.no_grad():
            h = self.backbone(x).tanh()
            if self.everything:
                return self.head(h)
        return self.head(h)


@pytest.mark.parametrize("matrix", ["fisher", "grad_moment", "hessian", "ggn"])
def test_a_layer_without_gradients_counts_as_one_that_is_not_called(matrix):
    model, x, y = Behind(False).double(), torch.randn(8, 6).double(), torch.arange(8) % 3
    head = curvature(model, x, y, matrix, block="head").eigenvalues
    whole = curvature(model, x, y, matrix).eigenvalues
    expected = torch.cat([head, torch.zeros(35).double()]).sort(descending=True).values
    assert torch.allclose(whole, expected, atol=1e-15)
    assert float(top_curvature(model, x, y, matrix).values[0]) == pytest.approx(float(head[0]))
    assert torch.equal(curvature_blocks(model, x, y, matrix)["head"].eigenvalues, head)
    if matrix in ("fisher", "grad_moment"):
        report = kronecker_report(model, x, y, matrix)
        assert list(report) == ["head"]
        assert report.skipped == {"backbone": "not called in the forward pass, or only without gradients"}


@pytest.mark.parametrize("classes", [3, 70])
@pytest.mark.parametrize("matrix", ["fisher", "grad_moment", "hessian", "ggn"])
def test_an_output_without_gradients_is_one_error(matrix, classes):
    model, x, y = Behind(True).double(), torch.randn(8, 6).double(), torch.arange(8) % 3
    model.head = nn.Linear(5, classes).double()
    asked = [curvature, curvature_blocks, top_curvature]
    for ask in [*asked, kronecker_report] if matrix in ("fisher", "grad_moment") else asked:
        with pytest.raises(ValueError, match="the loss does not depend on the model's parameters, or it has none"):
            ask(model, x, y, matrix)


def test_a_loss_beside_detached_logits_is_the_outputs_own():
    class Own(nn.Sequential):
        def forward(self, x):
            logits = super().forward(x)
            return {"loss": F.cross_entropy(logits, torch.arange(8) % 3), "logits": logits.detach()}

    torch.manual_seed(0)
    model, x, y = Own(nn.Linear(6, 3)).double(), torch.randn(8, 6).double(), torch.arange(8) % 3
    found, expected = (curvature(m, x, y, "grad_moment").eigenvalues for m in (model, model[0]))
    assert torch.allclose(found, expected, atol=1e-15)


class Focal(nn.CrossEntropyLoss):
    def forward(self, output, y):
        each = F.cross_entropy(output, y, reduction="none")
        return ((1 - (-each).exp()) ** 2 * each).mean()


def test_the_ggn_is_of_plain_cross_entropy_alone(kit):
    model, (x, y), weight = networks(kit, "mlp"), kit.images(6), torch.tensor([1.0, 5, 20, 2])
    weighted = functools.partial(F.cross_entropy, weight=weight)
    for loss in (nn.CrossEntropyLoss(weight=weight), weighted, functools.partial(weighted), Focal()):
        for ask in (curvature, curvature_blocks, top_curvature):
            with pytest.raises(ValueError, match="needs the cross-entropy loss of torch without class weights, got"):
                ask(model, x, y, "ggn", loss=loss)
    plain = curvature(model, x, y, "ggn", block="5").eigenvalues
    smooth = functools.partial(F.cross_entropy, label_smoothing=0.1, weight=None)  # the same second derivatives
    for loss in (nn.CrossEntropyLoss(), F.cross_entropy, smooth):
        assert torch.equal(curvature(model, x, y, "ggn", block="5", loss=loss).eigenvalues, plain)


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_fewer_vectors_at_once_go_through_a_network_of_many_outputs(kit, monkeypatch, matrix):
    model, (x, y), pulled = networks(kit, "conv").train(), kit.images(6), []
    model.append(nn.BatchNorm1d(4).double())  # G of the batch as one function
    expected = curvature(model, x, y, matrix).eigenvalues
    of_rows = second_derivatives._rows
    monkeypatch.setattr(
        second_derivatives, "_rows", lambda o, p, some, b: pulled.append(len(some)) or of_rows(o, p, some, b)
    )
    outputs = 6 * (16 + 16 + 4 + 4 + 4 + 4)  # of the convolutions, the ReLU, and what follows
    monkeypatch.setattr(second_derivatives, "NUMBERS", 7 * outputs)
    announced = []
    monkeypatch.setattr(exact, "announce", lambda expected, what: announced.append(expected.held))
    assert torch.allclose(curvature(model, x, y, matrix).eigenvalues, expected, rtol=1e-9, atol=1e-12)
    assert max(pulled) == {"hessian": 7, "ggn": 4}[matrix]
    assert announced == [7 * outputs]

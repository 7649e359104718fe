"""Exact curvature of networks and batches that are unusual: right, or one line that says what is wrong."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode

from condzoo.probe import (
    costs,
    curvature,
    curvature_blocks,
    gradient_rows,
    kronecker_report,
    layer_rows,
    matrix_free,
    measure,
    sample_gradients,
    top_curvature,
)

MATRICES = ["fisher", "grad_moment", "hessian", "ggn"]


def network(norm=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4) if norm else nn.Tanh(), nn.Linear(4, 3))


def data(samples=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn((samples, 5), generator=generator), torch.randint(3, (samples,), generator=generator)


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_inference_mode_changes_nothing(norm, made_inside):
    def numbers(model, x, y):
        found = [curvature(model, x, y, matrix).lambda_max for matrix in MATRICES]
        found += [float(top_curvature(model, x, y, matrix).values[0]) for matrix in ("fisher", "hessian")]
        found += [curvature_blocks(model, x, y, "hessian")["0"].lambda_max]
        found += [layer.lambda_ratio for layer in kronecker_report(model, x).values()]
        measured = measure(model, (x, y), certify=True)
        found += [layer.output_grad.lambda_max for layer in measured.values()]
        return found, measured.certificate

    expected = numbers(network(norm), *data())
    model, (x, y) = network(norm), data()
    with torch.inference_mode():
        if made_inside:
            model, (x, y) = network(norm), data()
        found = numbers(model, x, y)
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    assert found[1] == expected[1]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("matrix", "where"),
    [
        *((matrix, where) for matrix in MATRICES for where in ("input", "weight")),
        ("grad_moment", "target"),  # the other two see no targets
        ("hessian", "target"),
    ],
)
def test_nan_is_one_error_that_names_it(matrix, where, norm):
    model, (x, y) = network(norm), data()
    loss = None
    if where == "input":
        x[3, 2] = torch.nan
    elif where == "weight":
        with torch.no_grad():
            model[2].weight[0, 0] = torch.inf
    else:
        loss, y = nn.MSELoss(), torch.full((12, 3), torch.nan)
    what = "the loss" if where == "target" else "the network's output"
    asked = [curvature, top_curvature, curvature_blocks]
    for ask in [*asked, kronecker_report] if matrix in ("fisher", "grad_moment") else asked:
        with pytest.raises(ValueError, match=rf"{what} holds NaN or Inf; condzoo.measure\(...\).first_nonfinite names"):
            ask(model, x, y, matrix, loss=loss)


class Rooted(nn.Module):
    """Its output is finite, and what flows back into its first layer is 0 times infinity."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(5, 4), nn.Linear(9, 3)

    def forward(self, x):
        return self.head(torch.cat([x, (0 * self.first(x)).sqrt()], dim=1))


@pytest.mark.parametrize("matrix", MATRICES)
def test_nan_of_the_backward_pass_alone_is_said_too(matrix):
    model, (x, y) = Rooted(), data()
    for ask in (curvature, top_curvature):
        with pytest.raises(ValueError, match=r"gradients? .*holds NaN or Inf; condzoo.measure\(...\).first_nonfinite"):
            ask(model, x, y, matrix)
    if matrix in ("fisher", "grad_moment"):
        report = kronecker_report(model, x, y, matrix)
        assert list(report) == ["head"]
        assert "a layer whose input or output gradient holds NaN or Inf" in report.skipped["first"]


def test_classes_that_are_masked_by_minus_infinity_are_no_fault():
    class Masked(nn.Sequential):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.tensor([False, False, False, True]), -torch.inf)

    torch.manual_seed(0)
    model, (x, y) = Masked(nn.Linear(5, 4)).double(), data()
    plain = nn.Linear(5, 3).double()
    with torch.no_grad():
        plain.weight.copy_(model[0].weight[:3])
        plain.bias.copy_(model[0].bias[:3])
    for matrix in ("fisher", "grad_moment", "hessian"):
        expected = curvature(plain, x, y, matrix).eigenvalues
        assert torch.allclose(curvature(model, x, y, matrix).eigenvalues[:18], expected, atol=1e-12)


@pytest.mark.parametrize("ask", [curvature, top_curvature, curvature_blocks, kronecker_report])
def test_an_empty_batch_is_one_error(ask):
    x, y = data()
    with pytest.raises(ValueError, match="the batch holds no sample: its leading dimension is 0"):
        ask(network(), x[:0], y[:0], "grad_moment")


def test_the_hessian_of_a_linear_loss_is_zero():
    x, _ = data()
    y = torch.randn(12, 3)
    options = {"matrix": "hessian", "loss": lambda output, target: (output * target).mean()}
    assert curvature(nn.Linear(5, 3), x, y, **options).eigenvalues.tolist() == [0.0] * 18
    assert top_curvature(nn.Linear(5, 3), x, y, **options).values.tolist() == [0.0]


class Bytes(nn.Module):
    """Makes float32 in its forward pass: of an image's bytes, and of a time's embedding."""

    def __init__(self, wide):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.first, self.time, self.head = wide, nn.Linear(12, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(5, affine=False)

    def forward(self, x):
        dtype = torch.float64 if self.wide else torch.float32
        h = self.first(x.to(dtype) / 256)  # exact in both
        return self.head(torch.tanh(self.norm(h) + self.time(input=torch.ones(len(x), 4, dtype=dtype))))


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_network_that_makes_float32_has_curvature_and_a_certificate(matrix):
    x, y = torch.randint(256, (30, 12), dtype=torch.uint8), torch.randint(3, (30,))
    expected = curvature(Bytes(wide=True).double(), x, y, matrix).eigenvalues
    model = Bytes(wide=False)
    assert torch.allclose(curvature(model, x, y, matrix).eigenvalues, expected, rtol=1e-9, atol=1e-12)
    if matrix == "fisher":
        found = measure(model, (x, y), certify=True).certificate
        assert list(found) == ["first", "time", "head"]
        assert all(0 <= layer["output_grad_lambda_max"] < 1e-5 for layer in found.values())
        assert not model.first._forward_pre_hooks


class Adapted(nn.Linear):
    """A linear layer with parameters of its own beside weight and bias, as loralib has them."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_layers_further_parameters_are_in_every_matrix(matrix):
    torch.manual_seed(0)
    model, (x, y) = Adapted(5, 3).double(), data(40)
    x = x.double()
    dim = sum(p.numel() for p in model.parameters())
    found = curvature(model, x, y, matrix)
    assert found.dim == dim
    if matrix == "grad_moment":
        losses = [F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) for i in range(40)]
        grads = [torch.autograd.grad(loss, [*model.parameters()]) for loss in losses]
        rows = torch.stack([torch.cat([g.flatten() for g in own]) for own in grads])
        expected = torch.linalg.eigvalsh(rows.T @ rows / 40).flip(0)
        assert torch.allclose(found.eigenvalues, expected, atol=1e-12 * float(expected[0]))
        with pytest.raises(ValueError, match="'0' is a layer with parameters of its own beside weight and bias, whose"):
            curvature(nn.Sequential(Adapted(5, 3), nn.BatchNorm1d(3)).double(), x, y, matrix)
        report = kronecker_report(nn.Sequential(model, nn.Linear(3, 3)).double(), x)
        assert "a layer with parameters of its own" in report.skipped["0"]
        assert list(report) == ["1"]


class Doubled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, 2 * self.bias)


class Biased(nn.Module):
    """Two layers whose bias is one, or the first of which has its bias used once more, or not as it is."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.first = how, (Doubled if how == "doubled" else nn.Linear)(5, 5)
        self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 3)
        if how == "shared":
            self.second.bias = self.first.bias

    def forward(self, x):
        h = self.second(torch.tanh(self.first(x)))
        return self.head(torch.tanh(h - self.first.bias * x if self.how == "again" else h))


@pytest.mark.parametrize("samples", [8, 90])
@pytest.mark.parametrize("how", ["shared", "again", "doubled"])
def test_a_bias_that_is_not_only_added_to_its_own_layers_output_counts_as_it_is_used(how, samples):
    model, (x, y) = Biased(how).double(), data(samples)
    x = x.double()
    losses = [F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) for i in range(samples)]
    grads = [torch.autograd.grad(loss, [*model.parameters()]) for loss in losses]
    rows = torch.stack([torch.cat([g.flatten() for g in own]) for own in grads])
    expected = torch.linalg.eigvalsh(rows.T @ rows / samples).flip(0)
    for found in (curvature(model, x, y, "grad_moment"), curvature_blocks(model, x, y, "grad_moment")[None]):
        assert torch.allclose(found.eigenvalues, expected, atol=1e-12 * float(expected[0]))
    assert float(top_curvature(model, x, y, "grad_moment").values) == pytest.approx(float(expected[0]))
    report = kronecker_report(model, x)
    assert "whose weight or bias is used otherwise" in report.skipped["first"]
    assert ("second" in report) == (how != "shared")


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_bias_that_is_computed_is_one_error(matrix):
    model, (x, y) = network(), data()
    register_parametrization(model[0], "bias", nn.Softplus())
    for of in (curvature, curvature_blocks, top_curvature):
        with pytest.raises(ValueError, match="layer '0' is a layer whose bias is computed"):
            of(model, x, y, matrix)
    assert curvature(model, x, y, matrix, "2").dim == 15
    assert "a layer whose bias is computed" in kronecker_report(model, x).skipped["0"]


class Table(nn.Module):
    """One layer reads a table and not the batch, as Swin v2's position bias does."""

    def __init__(self, tokens_first=False):
        super().__init__()
        torch.manual_seed(0)
        self.tokens_first, self.table, self.body, self.head = (
            tokens_first,
            nn.Linear(2, 5),
            nn.Linear(5, 4),
            nn.Linear(4, 3),
        )
        self.register_buffer("positions", torch.randn(1, 7, 2))

    def forward(self, x):
        return self.head(torch.tanh(self.body(x + self.table(self.positions).mean(1))))


@pytest.mark.parametrize("matrix", ["fisher", "grad_moment"])
def test_a_layer_without_rows_by_sample_is_skipped_by_the_report_alone(matrix):
    model, (x, y) = Table(), data(10)
    report = kronecker_report(model, x, y, matrix)
    assert list(report) == ["body", "head"]
    assert report.skipped == {
        "table": "the exact block of a layer that reads an input [1, 7, 2], whose rows cannot be told apart by sample "
        "(the first dimension must be the 10 samples) is not available"
    }
    for name in report:
        assert report[name].exact.lambda_max == pytest.approx(curvature(model, x, y, matrix, block=name).lambda_max)
    assert curvature(model, x, y, matrix).dim == sum(p.numel() for p in model.parameters())


class Tokens(nn.Module):
    """A language model whose logits are [n * tokens, classes]."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x))).flatten(0, 1)


@pytest.mark.parametrize("few", [0, 1 << 27])
@pytest.mark.parametrize("matrix", ["fisher", "ggn"])
def test_flattened_tokens_are_not_taken_for_samples(matrix, few, monkeypatch):
    """Those of one sample would be added up before they are multiplied with each other."""
    monkeypatch.setattr(matrix_free, "FEW", few)
    x, y = torch.randn(6, 7, 5), torch.arange(42) % 3
    for ask in (curvature, top_curvature, curvature_blocks):
        with pytest.raises(ValueError, match=r"first dimension is the 6 samples, got \[42, 3\]; return tokens as"):
            ask(Tokens(), x, y, matrix)
    assert curvature(Tokens(), x, y, "grad_moment").rows == 6


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that is made inside."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.most = max(self.most, found.numel())
        return found


def test_many_samples_of_few_parameters_are_added_up_in_parts():
    """Their inputs' products, [n, (d + 1)^2], were formed at once: 46 GB for MNIST's test images."""
    torch.manual_seed(0)
    x, y = torch.randn(6000, 60).double(), torch.randint(2, (6000,))
    model = nn.Linear(60, 2).double()
    with Largest() as seen:
        found = curvature(model, x, y, "grad_moment").eigenvalues
    assert seen.most <= 1 << 24 < 6000 * 61**2
    p = model(x).softmax(1).detach() - F.one_hot(y, 2)
    rows = torch.einsum("no,ni->noi", p, torch.cat([x, torch.ones(6000, 1)], dim=1)).flatten(1)
    expected = torch.linalg.eigvalsh(rows.T @ rows / 6000).flip(0)
    assert torch.allclose(found, expected, atol=1e-12 * float(expected[0]))


def test_gradients_of_convolutions_meet_in_parts_of_bounded_size(kit, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 9, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 4)).double()
    x, y = kit.images(150)
    expected = curvature(model, x, y, "grad_moment").eigenvalues
    monkeypatch.setattr(layer_rows, "NUMBERS", 0)
    monkeypatch.setattr("condzoo.probe.costs.products_a_second", lambda *_: 1e12)
    with Largest() as seen:
        found = curvature(model, x, y, "grad_moment").eigenvalues
    assert torch.allclose(found, expected, atol=1e-13 * float(expected[0]))
    assert seen.most < 150 * model[0].weight.numel(), "the largest is the Gram matrix"


def test_too_large_a_matrix_is_refused_before_its_backward_passes(kit, monkeypatch):
    def never(*_):
        raise AssertionError("a backward pass was made")

    monkeypatch.setattr(gradient_rows, "_backward", never)
    monkeypatch.setattr("condzoo.probe.costs.LARGEST", 40)
    for model in (kit.build("conv"), kit.build("bn_mlp"), kit.build("residual")):
        with pytest.raises(ValueError, match=r"has side [\d,]+, at most 40 is possible; pass fewer samples"):
            curvature(model, kit.images()[0], None, "fisher")


@pytest.mark.parametrize(
    ("name", "passes"),
    [("conv", "4 backward passes, one a class;"), ("residual", "48 backward passes, one a sample and class: in train")],
)
def test_long_passes_and_much_memory_are_announced_after_the_first(kit, monkeypatch, name, passes):
    model, (x, y) = kit.build(name), kit.images()
    monkeypatch.setattr("condzoo.probe.costs.MUCH", 100)
    with pytest.warns(UserWarning, match=rf"exact curvature: about \d+\.\d minutes and 0\.0 GB for {passes}.*fewer"):
        curvature(model, x, y, "fisher")


def test_passes_for_the_gradients_themselves_are_announced(monkeypatch):
    monkeypatch.setattr("condzoo.probe.costs.LONG", -1.0)
    x, y = data(10)
    asked = []
    monkeypatch.setattr(sample_gradients, "now", lambda device: asked.append(device.type) or 0.0)
    with pytest.warns(UserWarning, match="exact curvature: about") as records:
        curvature(Table(), x, y, "fisher")
    assert asked == ["cpu", "cpu"]
    assert "for 30 backward passes, one a sample and class; fewer samples cost less" in str(records[0].message)


@pytest.mark.parametrize(
    ("module", "name", "matrix"),
    [("exact", "conv", "hessian"), ("gradient_rows", "conv", "fisher"), ("label_draws", "bn_mlp", "fisher")],
)
def test_passes_are_timed_by_a_clock_that_waits_for_a_gpu(kit, module, name, matrix, monkeypatch):
    asked = []
    monkeypatch.setattr(f"condzoo.probe.{module}.now", lambda device: asked.append(device.type) or 0.0)
    curvature(kit.build(name), *kit.images(4), matrix)
    assert asked == ["cpu", "cpu"]


def test_the_clock_and_the_rate_of_products_are_of_the_device(monkeypatch):
    waited, of = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    costs.now(torch.device("cuda", 1))
    costs.now(torch.device("cpu"))
    assert waited == [torch.device("cuda", 1)]
    monkeypatch.setattr(costs, "products_a_second", lambda threads, device: of.append(device.type) or 1e12)
    costs.cost(3, 0.0, device=torch.device("cuda", 1))
    costs.cost(3, 0.0)
    curvature(network(), *data(), "grad_moment")
    curvature(network(), *data(), "hessian")
    assert of == ["cuda", "cpu", "cpu", "cpu"]


def test_draws_are_counted_before_they_are_made(monkeypatch):
    monkeypatch.setattr(sample_gradients, "MOST", 100)

    def never(*_):
        yield pytest.fail("a draw was made")

    monkeypatch.setattr(gradient_rows, "weighted_gradients", never)
    with pytest.raises(ValueError, match="30 gradients of 54 parameters are"):
        curvature(Table(), data(10)[0], None, "fisher")


class Once(torch.autograd.Function):
    """Has a first derivative, and a second one that is not its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad.detach()


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("few", [0, 1 << 27])
def test_dropout_is_the_same_whichever_way_the_eigenvalues_are_found(matrix, few, monkeypatch):
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).double(), data()
    monkeypatch.setattr(matrix_free, "FEW", few)
    expected = curvature(model, x, y, matrix, seed=3).lambda_max
    assert float(top_curvature(model, x, y, matrix, seed=3).values[0]) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("matrix", ["fisher", "ggn"])
@pytest.mark.parametrize("name", ["mlp", "conv", "tokens", "once", "no part"])
def test_largest_eigenvalues_of_many_classes_need_no_factors(kit, monkeypatch, matrix, name):
    """A softmax's F and G are the same, and products with J take as much memory as a few backward passes."""
    model, (x, y) = kit.build("mlp" if name in ("once", "no part") else name).eval(), kit.images(7)
    if name == "once":
        model[2].forward = Once.apply
    if name == "no part":
        model.spare = nn.Identity()
        model.spare.layer = nn.Linear(3, 3).double()
    block = "spare.layer" if name == "no part" else None
    expected = None if block else curvature(model, x, y, matrix).eigenvalues[:2]
    monkeypatch.setattr(matrix_free, "FEW", 0)
    if name in ("mlp", "conv", "tokens"):
        monkeypatch.setattr(matrix_free, "rows_of", lambda *_, **__: pytest.fail("factors were collected"))
    if block:
        with pytest.raises(ValueError, match="calls none of the layers asked for"):
            top_curvature(model, x, y, matrix, block)
    else:
        found = top_curvature(model, x, y, matrix, k=2)
        assert torch.allclose(found.values, expected, rtol=1e-7, atol=1e-10 * float(expected[0]))


class Views(nn.Module):
    """Two views of each sample are rows of one layer, a sample's together or all first ones before all second ones."""

    def __init__(self, together, norm=None):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.together = nn.Linear(5, 4), norm or nn.Identity(), together

    def forward(self, x):  # [n, 2, 5]
        h = torch.tanh(self.norm(self.body(x.flatten(0, 1) if self.together else torch.cat([*x.unbind(1)]))))
        return (h[::2], h[1::2]) if self.together else h.chunk(2)


def distance(views, y):
    return (views[0] - views[1]).square().sum(1)


@pytest.mark.parametrize("samples", [2, 7])
@pytest.mark.parametrize("norm", [None, "train", "eval"])
def test_rows_that_are_other_samples_are_refused_where_the_logits_do_not_show_them(norm, samples):
    def network(together):
        model = Views(together, None if norm is None else nn.BatchNorm1d(4)).double()
        return model.train(norm == "train")

    x = torch.randn(samples, 2, 5, generator=torch.Generator().manual_seed(1)).double()
    found = curvature(network(True), x, torch.zeros(samples), "grad_moment", loss=distance)
    if norm != "train":
        model = network(True)
        losses = [distance(model(x[i : i + 1]), None).sum() for i in range(samples)]
        rows = torch.stack(
            [torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.body.parameters()])]) for loss in losses]
        )
        expected = torch.linalg.svdvals(rows).square() / samples
        assert torch.allclose(found.eigenvalues[: len(expected)], expected, atol=1e-12 * float(expected[0]))
    for of in (curvature, curvature_blocks, top_curvature):
        with pytest.raises(ValueError, match="'body' is a layer whose rows are not in the order of the samples"):
            of(network(False), x, torch.zeros(samples), "grad_moment", loss=distance)
    report = kronecker_report(network(False), x, torch.zeros(samples), "grad_moment", loss=distance)
    assert "not in the order of the samples" in report.skipped["body"]


@pytest.mark.parametrize("matrix", ["fisher", "grad_moment"])
def test_rows_that_are_other_samples_are_refused_under_batch_statistics(matrix):
    class Headed(Views):
        def forward(self, x):
            return self.head(torch.cat(super().forward(x), dim=1))

    for together in (True, False):
        model = Headed(together, nn.BatchNorm1d(4))
        model.head = nn.Linear(8, 3)
        batch = torch.randn(6, 2, 5), torch.arange(6) % 3
        if together:
            assert curvature(model, *batch, matrix).dim == 51
        else:
            with pytest.raises(ValueError, match="'body' is a layer whose rows are not in the order of the samples"):
                curvature(model, *batch, matrix)

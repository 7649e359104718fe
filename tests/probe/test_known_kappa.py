"""Layers whose condition number is known beforehand: reported right, or declared unknown, never wrong."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from condzoo.probe import Probe, finishing, measure
from condzoo.probe.arithmetic import in_tf32
from condzoo.probe.finishing import spectra_of
from condzoo.probe.losses import masked_labels
from condzoo.probe.moments import RunningMoment

pytestmark = pytest.mark.usefixtures("products")

TOLERANCE = {torch.float64: 0.01, torch.float32: 0.05, torch.bfloat16: 0.05}


def inputs(kappa: float, dim: int, rows: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """[rows, dim] with a second moment of condition number kappa, eigenvalues even in the logarithm."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn((rows, dim), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn((dim, dim), generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -math.log10(kappa), dim, dtype=torch.float64)
    return ((left * (values * rows).sqrt()) @ right.T).to(dtype)


def measured(x, precision):
    torch.manual_seed(0)
    model = nn.Linear(x.shape[1], 3).to(x.dtype)
    return measure(model, (x, torch.zeros(len(x), dtype=torch.long)), precision=precision)[""].input


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["auto", "float64", "fast"])
@pytest.mark.parametrize("dim", [16, 64])
def test_kappa_is_right_or_declared_unknown(dtype, precision, dim):
    for exponent in range(1, 13):
        found = measured(inputs(10.0**exponent, dim, 2048, dtype), precision)
        kappa = found.condition_number()
        if found.status() == "ok":
            assert kappa == pytest.approx(10.0**exponent, rel=TOLERANCE[dtype])
        else:
            assert (found.status(), kappa) == ("bound", math.inf)
            assert found.at_least() < 1.05 * 10.0**exponent
        known_to = {torch.float64: 9, torch.float32: 5, torch.bfloat16: 1}[dtype]
        assert found.status() == "ok" or exponent > known_to


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_middle_of_a_spectrum_is_known_where_its_end_is_not(dtype):
    found = measured(inputs(1e15, 64, 2048, dtype), "auto")
    assert found.status(0.05) == "ok"
    assert found.condition_number(0.05) == pytest.approx(10 ** (15 * 3 / 63), rel=0.05)
    assert found.status(1.0) == "bound"


def test_auto_uses_float64_products_only_where_fast_ones_do_not_reach(torch_products):
    near, far = (measured(inputs(kappa, 32, 2048, torch.float32), "auto") for kappa in (1e2, 1e8))
    assert near.arithmetic == "float32 products of float32 data"
    assert far.arithmetic == "float64 products of float32 data"
    assert far.condition_number() == pytest.approx(1e8, rel=0.05)
    fast = measured(inputs(1e8, 32, 2048, torch.float32), "fast")
    assert (fast.status(), fast.condition_number()) == ("bound", math.inf)


def test_fewer_rows_than_dimensions_is_said_and_not_a_large_number():
    found = measured(inputs(10.0, 64, 64, torch.float64)[:20], "auto")
    assert (found.status(), found.condition_number(), found.rank) == ("rank-limited", math.inf, 20)
    assert found.complement_condition_number() < 1e3


def test_dead_and_copied_coordinates_are_named_as_nulls():
    x = inputs(10.0, 8, 512, torch.float32)
    x[:, 2] = 0
    x[:, 5] = -3 * x[:, 4]
    x[:, 6], x[:, 7] = 0.25, -1.5
    found = measured(x, "auto")
    assert (found.nulls, found.rank, found.status()) == (3, 5, "structural null")
    assert found.null_reason == "1: coordinates always 0, 2: coordinates that copy another"
    assert found.complement_condition_number() < 1e4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("confidence", [0.0, 3.0, 8.0, 12.0, 18.0, 25.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_the_softmax_null_is_never_a_condition_number(dtype, confidence, classes):
    """Confident logits leave p - y few digits: its rows sum to zero only roughly."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (512,), generator=generator)
    x = nn.functional.one_hot(y, classes) * confidence + torch.randn((512, classes), generator=generator)
    model = nn.Linear(classes, classes).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.eye(classes))
        model.bias.zero_()
    found = measure(model, (x.to(dtype), y))[""].output_grad
    assert found.condition_number() == math.inf
    assert found.status() in ("structural null", "bound")
    if confidence == 0 and classes > 2:
        assert found.null_reason == "1: rows sum to 0 (softmax, LayerNorm)"
        assert found.complement_condition_number() < 100
    if classes == 2 or confidence > 12:
        assert found.nulls == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_null_before_a_layernorm_is_not_called_a_softmax(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)).to(dtype)
    found = measure(model, (torch.randn(64, 5, dtype=dtype), torch.arange(64) % 3))["0"].output_grad
    assert (found.nulls, found.null_reason) == (1, "1: rows sum to 0 (softmax, LayerNorm)")


@pytest.mark.parametrize("exponent", [6, 8, 9])
def test_a_sum_of_all_coordinates_that_is_small_and_not_zero_is_a_number_in_float64(exponent):
    """The smallest direction of these gradients is (1, ..., 1), along which a softmax has none."""
    basis = torch.ones((1, 1), dtype=torch.float64)
    while len(basis) < 16:  # Hadamard's matrices, whose first column is that direction
        basis = torch.cat([torch.cat([basis, basis], 1), torch.cat([basis, -basis], 1)])
    generator = torch.Generator().manual_seed(exponent)
    white = torch.linalg.qr(torch.randn((256, 16), generator=generator, dtype=torch.float64)).Q * 16
    g = white * torch.logspace(-exponent / 2, 0, 16, dtype=torch.float64) @ basis.T / 4
    model, x = nn.Linear(4, 16).double(), torch.randn((256, 4), generator=generator, dtype=torch.float64)
    found = measure(model, [(x, g)], loss=lambda h, y: (h * y).sum() / 256)[""].output_grad
    assert (found.status(), found.null_reason) == ("ok", "")
    assert found.condition_number() == pytest.approx(10.0**exponent, rel=0.01)


def test_a_cross_entropy_with_a_z_loss_has_no_null_in_float64(kit):
    torch.manual_seed(0)
    model, x, y = nn.Linear(12, 10).double(), torch.randn(300, 12).double(), torch.arange(300) % 10

    def loss(h, y):
        return nn.functional.cross_entropy(h, y) + 1e-4 * h.logsumexp(1).square().mean()

    logits = model(x).detach().requires_grad_(True)
    (g,) = torch.autograd.grad(300 * loss(logits, y), logits)
    expected = kit.eigenvalues(g, 1, 300)
    found = measure(model, (x, y), loss=loss)[""].output_grad
    assert found.status() == "ok"
    assert found.condition_number() == pytest.approx(float(expected[0] / expected[-1]), rel=0.01)


@pytest.mark.parametrize("confidence", [0.0, 8.0, 16.0])
def test_the_null_of_a_float32_loss_is_named_in_a_float64_network(confidence):
    """As Hugging Face's language models have it: p - y has the digits of float32, whatever reads it."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (512,), generator=generator)
    x = nn.functional.one_hot(y, 10) * confidence + torch.randn((512, 10), generator=generator)
    model = nn.Linear(10, 10).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(10))
        model.bias.zero_()
    found = measure(model, (x.double(), y), loss=lambda h, y: nn.functional.cross_entropy(h.float(), y))[""]
    assert (found.output_grad.status(), found.output_grad.nulls) == ("structural null", 1)


def head_of(way, model, x, y, loss, autocast=None, softmax=None):
    """The last layer's output gradients, in a `Probe` or in `measure`."""
    if way == "measure":
        found = measure(model, (x, y), loss=loss)
    else:
        with Probe(model, every=1, softmax=softmax) as probe:
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                output = model(x)
            loss(output.float(), y).backward()
            probe.step()
        found = probe.latest
    return found.last.output_grad


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("error", [1.0, 0.01])
@pytest.mark.parametrize("kind", ["image", "table"])
def test_small_gradients_of_a_regression_are_not_taken_for_a_softmaxs_round_off(kind, error, dtype):
    """A mean over a picture divides the gradients by its size; a table's errors are small by themselves."""
    torch.manual_seed(0)
    if kind == "image":
        model, x = (
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)),
            torch.randn(4, 3, 32, 32),
        )
    else:
        model, x = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(64, 12)
    with torch.no_grad():
        y = model(x) + error * torch.randn_like(model(x))
    found = head_of("probe", model, x, y, nn.functional.mse_loss, autocast=dtype)
    assert (found.rank, found.status(), found.null_reason) == (found.dim, "ok", "")


def test_float32_gradients_of_a_mean_over_a_large_picture_are_no_round_off():
    torch.manual_seed(0)
    model, x = nn.Conv2d(3, 3, 1), torch.randn(2, 3, 512, 512)
    with torch.no_grad():
        y = model(x) + 0.04 * torch.randn(2, 3, 512, 512)
    for way in ("measure", "probe"):
        assert head_of(way, model, x, y, lambda h, y: nn.functional.mse_loss(h, y)).status() == "ok"


@pytest.mark.parametrize("way", ["measure", "probe"])
@pytest.mark.parametrize("of", ["regression", "softmax"])
def test_a_factor_on_the_loss_changes_no_rank_and_no_reason(way, of):
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4), torch.randn(64, 6)
    y = torch.randn(64, 4) if of == "regression" else torch.arange(64) % 4
    plain = nn.functional.mse_loss if of == "regression" else nn.functional.cross_entropy
    whole = head_of(way, model, x, y, plain)
    for factor in (1e-3, 1e-7, 1e-9):
        found = head_of(way, model, x, y, lambda h, y, factor=factor: factor * plain(h, y))
        assert found.lambda_max == pytest.approx(factor**2 * whole.lambda_max, rel=1e-4)
        assert (found.rank, found.status(), found.null_reason) == (whole.rank, whole.status(), whole.null_reason)
    assert whole.null_reason == ("" if of == "regression" else "1: rows sum to 0 (softmax, LayerNorm)")


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 1e-6])
@pytest.mark.parametrize("confidence", [8.0, 12.0, 16.0])
def test_the_null_of_a_softmax_is_named_late_in_a_training(confidence, factor, autocast):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (512,), generator=generator)
    x = nn.functional.one_hot(y, 10) * confidence + torch.randn((512, 10), generator=generator)
    model = nn.Linear(10, 10)
    with torch.no_grad():
        model.weight.copy_(torch.eye(10))
        model.bias.zero_()
    found = head_of("probe", model, x, y, lambda h, y: factor * nn.functional.cross_entropy(h, y), autocast)
    assert (found.status(), found.nulls) == ("structural null", 1)
    assert found.null_reason == "1: rows sum to 0 (softmax, LayerNorm)"


@pytest.mark.parametrize("confidence", [20.0, 25.0])
def test_a_probe_that_knows_of_the_softmax_names_its_null_among_gradients_that_are_round_off(confidence):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (512,), generator=generator)
    x = nn.functional.one_hot(y, 10) * confidence + torch.randn((512, 10), generator=generator)
    model = nn.Linear(10, 10, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(10))
    found = head_of("probe", model, x, y, nn.functional.cross_entropy, softmax=True)
    assert (found.status(), found.nulls) == ("structural null", 1)
    unknown = head_of("probe", model, x, y, nn.functional.cross_entropy)
    assert (unknown.status(), unknown.nulls) == ("ok", 0)  # as the documentation says of it


class Words(nn.Sequential):
    def forward(self, x):
        return super().forward(x).mT  # [n, tokens, classes] -> [n, classes, tokens]


@pytest.mark.parametrize("loss", [None, nn.CrossEntropyLoss(ignore_index=7)])
@pytest.mark.parametrize("masked", [0.0, 0.9, 0.99])
def test_the_null_of_a_softmax_is_named_where_most_tokens_are_masked(masked, loss):
    """The mean is over the others, whose gradients are so much larger, and their round-off with them."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (64, 50), generator=generator)
    x = nn.functional.one_hot(y, 10) * 16.0 + torch.randn((64, 50, 10), generator=generator)
    model = Words(nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(10))
    y[torch.rand((64, 50), generator=generator) < masked] = -100 if loss is None else 7
    found = measure(model, (x, y), loss=loss).last.output_grad
    assert (found.status(), found.nulls) == ("structural null", 1)


def test_labels_that_are_masked_are_those_of_the_losss_index():
    y = torch.tensor([[0, -100], [7, -100]])
    seven = partial(nn.functional.cross_entropy, ignore_index=7)
    for loss, masked in ((None, 2), (nn.CrossEntropyLoss(ignore_index=7), 1), (seven, 1), (partial(seven), 1)):
        assert masked_labels(loss, y) == (masked, 4)
    for loss, target in ((SimpleNamespace(ignore_index=None), y), (None, y.float()), (None, None)):
        assert masked_labels(loss, target) == (0, 0)


def probed(x):
    torch.manual_seed(0)
    model = nn.Linear(x.shape[1], 3)
    with Probe(model, every=1) as probe:
        nn.functional.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)).backward()
        probe.step()
    return probe.latest[""].input


def test_data_of_a_training_in_tf32_has_float16s_digits(monkeypatch):
    """cuDNN's default for float32 on GPUs, whose setting alone is played here."""
    x = inputs(1e8, 16, 2048, torch.float32)
    assert probed(x).status() == "ok"
    monkeypatch.setattr(finishing, "in_tf32", lambda device, convolution: convolution)
    assert probed(x).status() == "ok", "no convolution in it"
    monkeypatch.setattr(finishing, "in_tf32", lambda device, convolution: not convolution)
    found = probed(x)
    assert (found.status(), found.arithmetic) == ("bound", "float64 products of float16 data")
    assert found.noise_floor == pytest.approx(
        20 * (2 * 2**-11) ** 2 / 3 * float(x.double().square().mean(0).max()), 0.01
    )
    assert measured(x, "auto").status() == "ok", "measure multiplies in float32"


@pytest.mark.parametrize(("setting", "convolution"), [("conv", True), ("matmul", False)])
def test_tf32_is_what_torch_is_set_to(setting, convolution, monkeypatch):
    asked = []
    monkeypatch.setattr("condzoo.probe.arithmetic._precision", lambda *names: asked.append(names) or "tf32")
    assert in_tf32(torch.device("cuda", 1), convolution=convolution)
    assert asked == [("cuda", setting)]
    assert not in_tf32(torch.device("cpu"), convolution=convolution)
    monkeypatch.setattr("condzoo.probe.arithmetic._precision", lambda *names: "ieee")
    assert not in_tf32(torch.device("cuda"), convolution=convolution)


@pytest.mark.parametrize("kappa", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("loss_scale", [1.0, 2.0**10])
def test_gradients_in_float16_below_its_full_digits_are_right_or_declared_unknown(kappa, loss_scale):
    """Under 6e-5 its numbers are 6e-8 apart, however small they are."""
    generator = torch.Generator().manual_seed(0)
    true = torch.logspace(0, -math.log10(kappa), 16).double()
    basis = torch.linalg.qr(torch.randn((16, 16), generator=generator, dtype=torch.float64)).Q
    white = torch.linalg.qr(torch.randn((2048, 16), generator=generator, dtype=torch.float64)).Q * 2048**0.5
    for size in (1e-3, 1e-5, 1e-6, 3e-7):
        moment = RunningMoment()
        moment.add((white * true.sqrt() @ basis.T * size).half().T[None, None], "auto", 2048.0)
        moment.rescale(1 / loss_scale)
        found = spectra_of([moment, moment])[0]
        known = found.eigenvalues > found.noise_floor
        error = (found.eigenvalues / (true * (size * 2048 / loss_scale) ** 2) - 1).abs()
        assert float(error[known].max()) < 0.05
        assert known.all() or size < 1e-3 or kappa > 1e3


@pytest.mark.parametrize("precision", ["auto", "float64", "fast"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_of_a_depthwise_layer_every_channel_is_known_but_for_float16s_smallest_numbers(dtype, precision):
    """Its moment is a sum of squares a channel, which rounding moves by a part of itself."""
    generator = torch.Generator().manual_seed(0)
    for exponent in (2, 4, 8, 12, 42):
        size = torch.logspace(0, -exponent / 2, 4, dtype=torch.float64)
        x = torch.randn((64, 4, 8, 8), generator=generator, dtype=torch.float64) * size[:, None, None]
        model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(dtype)
        found = measure(model, (x.to(dtype), torch.arange(64) % 4), precision=precision)["0"].input
        true = x.square().mean((0, 2, 3)).sort(descending=True).values
        known = found.eigenvalues > found.noise_floor
        assert float((found.eigenvalues / true - 1).abs()[known].max()) < 0.05
        if dtype == torch.float16:
            assert known.all() or exponent > 8
        else:
            assert known.all() or (exponent == 42 and precision == "fast")  # their squares vanish in float32
            assert found.status() == ("ok" if known.all() else "bound")


def test_gradients_of_a_depthwise_layer_before_a_confident_softmax_are_right_or_declared_unknown():
    """Digits that p - y loses are lost in all layers before it."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(4, (512,), generator=generator)
    x = nn.functional.one_hot(y, 4) * 10.0 + torch.randn((512, 4), generator=generator)
    model = nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 4, 1, groups=4, bias=False), nn.Flatten())
    model.append(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[1].weight.fill_(1.0)
        model[3].weight.copy_(torch.diag(torch.logspace(0, -3, 4)) + 1e-3)
    found = measure(model, (x, y))["1"].output_grad
    true = measure(model.double(), (x.double(), y))["1"].output_grad
    known = found.eigenvalues > found.noise_floor
    assert float((found.eigenvalues / true.eigenvalues - 1).abs()[known].max()) < 0.05


def test_a_coordinate_close_to_another_is_no_copy_of_it_where_products_are_in_float32():
    """Float32 products of such data have a correlation of exactly 1 more often than not."""
    found = {}
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        first, rest, *others = torch.randn((4, 64, 1), generator=generator)
        x = torch.cat([first, 0.7 * first + 3e-5 * rest, *others], dim=1)
        true = torch.linalg.cond(x.double()).item() ** 2
        for precision in ("fast", "auto"):
            spectrum = measured(x, precision)
            found.setdefault(precision, set()).add(spectrum.status())
            assert spectrum.nulls == 0
            assert spectrum.at_least() <= 1.05 * true
            if spectrum.status() == "ok":
                assert spectrum.condition_number() == pytest.approx(true, rel=0.05)
    # In "fast" it is "ok", by float64, where errors of so few sums look like roundings in one direction.
    assert found["auto"] == {"ok"}
    assert {"bound"} <= found["fast"] <= {"bound", "ok"}
    copies = torch.randn((64, 1), generator=torch.Generator().manual_seed(0)).expand(64, 4)
    assert [measured(copies, precision).nulls for precision in ("fast", "auto")] == [0, 3]


@pytest.mark.parametrize(
    ("seed", "shape", "share", "smallest"),  # [pieces, 1, coordinates, rows]; what is not constant; its least scale
    [
        (520, (4, 1, 2, 64), 0.05, 2.3e-3),
        (1100, (2, 1, 2, 64), 0.05, 2.3e-3),
        (591, (4, 1, 2, 64), 0.05, 2.3e-3),
        (173, (2, 1, 11, 256), 0.25, 2e-2),
        (351, (8, 1, 14, 1024), 0.25, 2e-2),
    ],
)
@pytest.mark.parametrize("precision", ["auto", "fast"])
def test_of_a_few_coordinates_that_are_nearly_constant_kappa_is_right(seed, shape, share, smallest, precision):
    """Where none of their roundings averages out: such kappas were 6 to 8 % wrong."""
    pieces, _, dim, rows = shape
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(shape, generator=generator, dtype=torch.float64)
    maps = torch.where(torch.rand((pieces, 1, 1, rows), generator=generator) < share, maps, maps[:1, :, :, :1])
    rotation = torch.linalg.qr(torch.randn((dim, dim), generator=generator, dtype=torch.float64)).Q
    scales = torch.ones(dim, dtype=torch.float64)
    scales[-1] = smallest
    maps = torch.einsum("ij,j,bgjk->bgik", rotation, scales, maps).float()
    moment = RunningMoment()
    moment.add(maps, precision)
    true = torch.linalg.cond(maps.double().transpose(0, 2).flatten(1)).item() ** 2
    assert spectra_of([moment])[0].condition_number() == pytest.approx(true, rel=0.05)


def grey_pictures(side, seed=0):
    """[1, 3, side, side]: one picture in three channels, normalized as ImageNet's: of rank 2."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.rand((1, 1, side, side), generator=generator) > 0.05
    grey = torch.where(white, 1.0, torch.rand((1, 1, side, side), generator=generator).mul(255).round() / 255)
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (grey - mean) / std


def nearly_constant(shape, seed=0):
    """Channels that are constant but for a few pixels."""
    generator = torch.Generator().manual_seed(seed)
    x = (0.3 + 2.7 * torch.rand(shape[1], generator=generator))[:, None, None].expand(shape).clone()
    for pixel in range(9):
        row, column = (int(torch.randint(size, (), generator=generator)) for size in shape[2:])
        x[pixel % shape[0], :, row, column] += 0.05 * torch.randn(shape[1], generator=generator)
    return x


def on_a_background():
    """[8, 12, 32, 32]: one pixel in a hundred is not the background."""
    generator = torch.Generator().manual_seed(2)
    background = (0.3 + 2.7 * torch.rand(12, generator=generator))[:, None, None].expand(8, 12, 32, 32)
    drawn = torch.rand((8, 1, 32, 32), generator=generator) < 0.01
    return torch.where(drawn, background + 0.14 * torch.randn(background.shape, generator=generator), background)


def constant_after_the_first():
    """[32, 16, 32, 32]: the maps that float32 adds first are noise."""
    generator = torch.Generator().manual_seed(0)
    x = (0.3 + 2.7 * torch.rand(16, generator=generator))[:, None, None].expand(32, 16, 32, 32).clone()
    x[:8] = 0.02 * torch.randn((8, 16, 32, 32), generator=generator)
    return x


@pytest.mark.parametrize("precision", ["auto", "fast"])
@pytest.mark.parametrize("conv", ["channels", "patches"])
@pytest.mark.parametrize(
    "x",
    [
        pytest.param(grey_pictures(384), id="grey pictures"),
        pytest.param(on_a_background(), id="background"),
        pytest.param(constant_after_the_first(), id="constant after the first"),
        *(
            pytest.param(nearly_constant(shape), id=str(shape))
            for shape in [(1, 2, 224, 224), (8, 3, 96, 96), (16, 16, 32, 32), (1, 16, 224, 224)]
        ),
        pytest.param(nearly_constant((1, 16, 128, 128)).double(), id="float64"),
    ],
)
def test_maps_whose_roundings_are_all_in_one_direction_have_no_kappa_of_round_off(x, conv, precision):
    torch.manual_seed(0)
    kernel = 1 if conv == "channels" else 2
    model = nn.Sequential(nn.Conv2d(x.shape[1], 2, kernel), nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(x.dtype)
    found = measure(model, (x, torch.zeros(len(x), dtype=torch.long)), conv=conv, precision=precision)["0"].input
    rows = x.double().flatten(2).mT.flatten(0, 1)
    if conv == "patches":
        rows = nn.functional.unfold(x.double(), 2).mT.flatten(0, 1)
    true = torch.linalg.svdvals(rows).square()
    for j in range(1, len(true) + 1):
        kappa = found.condition_number(j / len(true))
        if math.isfinite(kappa):
            assert kappa == pytest.approx(float(true[0] / true[j - 1]), rel=TOLERANCE[x.dtype])
    assert found.condition_number(1 / len(true)) == 1.0

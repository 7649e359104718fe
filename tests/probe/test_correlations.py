"""Patch moments from correlations and border terms, or as weight gradients, against patches cut out one by one."""

import pytest
import torch
from torch import nn

from condzoo.probe import measure
from condzoo.probe.arithmetic import SAFETY, float32_noise, gram_float64
from condzoo.probe.correlations import patch_gram
from condzoo.probe.patch_products import patch_products
from condzoo.probe.patches import padded, unfolded
from condzoo.probe.strided import strided_gram
from tests.probe.on_gpus import OnGPU

STRIDED = {
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "steps over pixels": {"kernel_size": 2, "stride": 3},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "all of them": {"kernel_size": (3, 2), "stride": (1, 2), "dilation": (2, 3), "padding": (0, 2)},
    "circular": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"},
    "same, of an even kernel": {"kernel_size": (4, 3), "dilation": (1, 2), "padding": "same"},
    "as large as the map": {"kernel_size": (6, 7)},
}
LAYERS = {
    "3x3": nn.Conv2d(17, 2, 3, padding=1),
    "no padding": nn.Conv2d(17, 2, 3),
    "wide padding": nn.Conv2d(17, 2, 3, padding=3),
    "5x2": nn.Conv2d(17, 2, (5, 2), padding=(1, 0)),
    "same": nn.Conv2d(17, 2, (4, 3), padding="same"),
    "as large as the map": nn.Conv2d(17, 2, (6, 7)),
    "larger than the map": nn.Conv2d(17, 2, (7, 9), padding=(3, 4)),
}


def way(conv, x):
    """How the patches are multiplied without unfolding them, if so."""
    found = patch_products(conv, x)
    return None if found is None else found.multiply.func


def direct(x, conv):
    rows = torch.cat([part.double().permute(0, 1, 3, 2).flatten(0, 2) for part in unfolded(x, conv)])
    return rows.T @ rows


def of_kind(x, kind):
    if kind == "smooth":
        return nn.functional.avg_pool2d(x, 5, stride=1, padding=2) + 0.1
    return 1 + 0.01 * x if kind == "nearly constant" else x


def assert_within_noise(multiply, x, conv):
    found, exact = multiply(x, conv, wide=False), direct(x, conv)
    error = float(torch.linalg.matrix_norm(found[0] - exact, 2))
    assert 0 < error < float32_noise(found, patch_products(conv, x).pieces) / SAFETY


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("wide", [True, False])
def test_it_is_the_sum_over_patches(name, wide):
    torch.manual_seed(0)
    x = torch.randn(40, 17, 6, 7, dtype=torch.float64) + 0.5
    if not wide and way(LAYERS[name], x) is not patch_gram:
        pytest.skip("border terms cancel most of the sum: never taken in float32")
    expected = direct(x, LAYERS[name])
    found = patch_gram(x, LAYERS[name], wide)[0]
    noise = 0.0 if wide else float32_noise(found[None], patch_products(LAYERS[name], x).pieces)
    assert float((found - expected).abs().max()) < (1e-13 * float(expected.abs().max()) if wide else noise / SAFETY)


@pytest.mark.parametrize("name", ["3x3", "no padding", "wide padding", "5x2", "same", "larger than the map"])
@pytest.mark.parametrize("wide", [True, False])
def test_coordinates_that_no_patch_reaches_are_zero_exactly(name, wide):
    """Channels that are 0 but at a border, as zero padding leaves of a dying one, and one that is 0 altogether."""
    torch.manual_seed(0)
    x, at = torch.randn(40, 17, 6, 7), torch.zeros(17, 6, 7)
    for channels, where in ((range(4), (-1, slice(None))), (range(4, 8), (slice(None), 0)), (range(8, 12), (0, -1))):
        at[(list(channels), *where)] = 1.0
    at[13:] = 1.0
    found, expected = patch_gram(x * at, LAYERS[name], wide)[0], direct(x * at, LAYERS[name])
    dead = expected.diagonal() == 0
    assert dead.any()
    assert torch.equal(found.diagonal() == 0, dead)
    assert not found[dead].any()
    assert not found[:, dead].any()
    assert float((found - expected).abs().max()) < (1e-13 if wide else 1e-5) * float(expected.abs().max())


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("wide", [True, False])
def test_with_strides_and_dilation_it_is_the_sum_over_patches(name, wide):
    torch.manual_seed(0)
    x, conv = torch.randn(150, 17, 6, 7, dtype=torch.float64) + 0.5, nn.Conv2d(17, 2, **STRIDED[name])
    assert (way(conv, x) is strided_gram) == (name != "as large as the map")  # that has fewer patches than coordinates
    expected, found = direct(x, conv), strided_gram(x, conv, wide)[0]
    pieces = 1.0 if name == "as large as the map" else patch_products(conv, x).pieces
    allowed = 1e-13 * float(expected.abs().max()) if wide else float32_noise(found[None], pieces) / SAFETY
    assert float((found - expected).abs().max()) < allowed
    assert found.shape == expected.shape
    assert torch.allclose(found, found.T, rtol=1e-12 if wide else 1e-5)


@pytest.mark.parametrize("rows", [1, 13, 40, 10_000])
@pytest.mark.parametrize(
    "options",
    [{"stride": 2, "padding": 1}, {"dilation": 2}, {"groups": 3, "padding": (0, 1), "padding_mode": "circular"}],
)
def test_images_side_by_side_have_the_same_patches(rows, options):
    """Pieces of any width, with images left over, against torch's own unfolding."""
    torch.manual_seed(0)
    x, conv = torch.randn(7, 6, 5, 7, dtype=torch.float64), nn.Conv2d(6, 6, 3, **options).double()
    plain = {key: options.get(key, default) for key, default in (("dilation", 1), ("stride", 1))}
    patches = nn.functional.unfold(padded(x, conv), 3, **plain)  # [n, c * k, positions]
    blocks = patches.unflatten(1, (conv.groups, -1))
    expected = torch.einsum("ngap,ngbp->gab", blocks, blocks)
    found = sum(gram_float64(part) for part in unfolded(x, conv, rows))
    assert float((found - expected).abs().max()) < 1e-13 * float(expected.abs().max())


@pytest.mark.parametrize("kind", ["even", "smooth", "nearly constant"])
@pytest.mark.parametrize(
    "shape",
    [
        (128, 16, 32, 32),
        (8, 16, 32, 32),
        (7, 20, 100, 100),
        (128, 64, 8, 8),
        (5, 16, 3, 2000),
        (20, 16, 16, 500),
        (1, 16, 224, 224),
        (3000, 16, 5, 5),
        (301, 16, 16, 16),
    ],
)
def test_the_float32_error_is_under_the_noise_said_of_it(shape, kind):
    """Maps of many pixels and few channels: a convolution adds them in one long chain."""
    torch.manual_seed(0)
    x, conv = torch.randn(shape), nn.Conv2d(shape[1], 2, 3, padding=1)
    if shape[2] == 16:  # many border lines, of an odd number of images
        conv = nn.Conv2d(shape[1], 2, 5)
    assert way(conv, x) is patch_gram
    assert_within_noise(patch_gram, of_kind(x, kind), conv)


@pytest.mark.parametrize("kind", ["even", "smooth", "nearly constant"])
@pytest.mark.parametrize(
    "shape", [(128, 16, 32, 32), (7, 20, 100, 100), (128, 32, 16, 16), (5, 16, 5, 3000), (1, 16, 224, 224)]
)
def test_the_float32_error_with_a_stride_is_under_the_noise_said_of_it(shape, kind):
    torch.manual_seed(0)
    x, conv = torch.randn(shape), nn.Conv2d(shape[1], 2, 3, stride=2, padding=1)
    if shape[2] == 224:  # many positions of one image
        conv = nn.Conv2d(shape[1], 2, 3, dilation=2)
    assert_within_noise(strided_gram, of_kind(x, kind), conv)


def test_it_is_used_where_it_is_exact_and_only_there():
    x = torch.randn(64, 16, 8, 8)
    assert way(nn.Conv2d(16, 2, 3, padding=1), x) is patch_gram
    for other in (
        nn.Conv2d(16, 2, 3, stride=2),
        nn.Conv2d(16, 2, 3, dilation=2),
        nn.Conv2d(16, 2, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(16, 2, 5, padding=0),  # 16 positions of 64 pixels: the border terms would cancel most of the sum
    ):
        assert way(other, x) is strided_gram
    assert way(nn.Conv2d(16, 2, 13, padding=6), x.repeat(1, 1, 3, 3)) is strided_gram  # many border terms
    assert way(nn.Conv2d(16, 2, 3, groups=2), x) is None
    assert way(nn.Conv2d(16, 2, 1), x) is None
    assert way(nn.Conv2d(15, 2, 3, padding=1), x[:, :15]) is None
    assert way(nn.Conv2d(16, 2, 3), x[:1, :, :5, :5]) is None  # 9 rows, 144 coordinates
    assert way(nn.Conv2d(16, 2, 3, padding=1), OnGPU(x)) is None  # cuDNN's noise was not measured


@pytest.mark.parametrize("precision", ["auto", "fast"])
def test_an_eigenvalue_above_the_floor_is_right_to_five_percent(precision):
    """Smooth images: neighbouring pixels nearly equal, so patch moments are badly conditioned."""
    torch.manual_seed(0)
    for smoothing in (1, 2, 3):
        x = torch.randn(256, 3, 16, 16)
        for _ in range(smoothing):
            x = nn.functional.avg_pool2d(x, 3, stride=1, padding=1)
        conv = nn.Conv2d(3, 4, 3, padding=1)
        model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        found = measure(model, (x, torch.zeros(256, dtype=torch.long)), conv="patches", precision=precision)["0"].input
        expected = torch.linalg.eigvalsh(direct(x, conv) / (256 * 256)).flip(0)
        known = expected[: found.rank]
        assert found.rank > 9
        assert bool(((found.eigenvalues[: found.rank] - known).abs() < 0.05 * known).all())


def measured(conv, x):
    torch.manual_seed(0)
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    return measure(model, (x, torch.zeros(len(x), dtype=torch.long)), conv="patches")


@pytest.mark.parametrize(
    ("built", "settings"),
    [
        ({"dilation": 2, "padding": 2}, {"stride": (1, 1), "dilation": (2, 2), "padding": (2, 2)}),
        ({"dilation": 2, "padding": 2}, {"stride": 1, "dilation": 2, "padding": 2}),
        ({"padding": 3}, {"stride": (1, 1), "padding": (3, 3)}),
        ({"padding": (0, 2)}, {"stride": 1, "padding": (0, 2)}),
        ({"dilation": 2, "padding": "same"}, {"stride": 1, "dilation": (2, 2), "padding": "same"}),
        ({}, {"stride": 1, "padding": "valid"}),
    ],
)
@pytest.mark.parametrize("channels", [3, 16])
def test_padding_that_is_set_after_construction_is_the_one_that_torch_takes(channels, built, settings):
    """As networks for segmentation are made of classifiers: smaller strides, dilation and padding to match."""
    torch.manual_seed(0)
    x = torch.randn(20, channels, 9, 10).double()
    late = nn.Conv2d(channels, 4, 3, stride=2, padding=1)
    for name, value in settings.items():
        setattr(late, name, value)
    found, expected = (measured(conv, x) for conv in (late, nn.Conv2d(channels, 4, 3, **built)))
    assert not found.skipped
    assert torch.allclose(found["0"].input.eigenvalues, expected["0"].input.eigenvalues, rtol=1e-9)
    assert found["0"].input.rows == expected["0"].input.rows

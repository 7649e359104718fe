"""The layers that stand out, against medians worked out by hand and by numpy."""

import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import condzoo
from condzoo.probe.conditioning import Conditioning, LayerConditioning
from condzoo.probe.outliers import Outlier, _namesakes
from condzoo.probe.spectra import Spectrum


def spectrum_of(*eigenvalues: float, **known: float) -> Spectrum:
    return Spectrum(torch.tensor(eigenvalues, dtype=torch.float64), **known)


def layer(
    x: Spectrum | None = None,
    g: Spectrum | None = None,
    weight: float | None = 1.0,
    weight_grad: float | None = 1.0,
    positions: int = 1,
) -> LayerConditioning:
    flat = spectrum_of(1.0, 1.0)
    return LayerConditioning("Linear", x or flat, g or flat, weight, weight_grad, samples=8, positions=positions)


def found(layers: dict[str, LayerConditioning], *arguments: float) -> list[tuple[str, str, float]]:
    return [(o.quantity, o.layer, o.ratio) for o in Conditioning(layers).outliers(*arguments)]


def test_a_layer_far_from_the_median_is_named_with_its_ratio():
    layers = {"a": layer(), "b": layer(), "c": layer(spectrum_of(40.0, 40.0)), "d": layer(spectrum_of(0.05, 0.05))}
    assert Conditioning(layers).outliers() == [Outlier("c", "lmax(x)", 40.0, 1.0), Outlier("d", "lmax(x)", 0.05, 1.0)]
    assert found(layers, 30.0) == [("lmax(x)", "c", 40.0)]
    assert found(layers, 50.0) == []


def test_columns_come_in_the_tables_order_and_the_furthest_first():
    layers = {
        "a": layer(weight_grad=0.01),
        "b": layer(spectrum_of(20.0, 0.1), spectrum_of(30.0, 30.0)),
        "c": layer(spectrum_of(1000.0, 1000.0), spectrum_of(1.0, 0.05)),
        "d": layer(),
        "e": layer(),
    }
    assert found(layers, 10.0, 1.0) == [
        ("lmax(x)", "c", 1000.0),
        ("lmax(x)", "b", 20.0),
        ("k100(x)", "b", 200.0),
        ("lmax(g)", "b", 30.0),
        ("k100(g)", "c", 20.0),
        ("dW/W", "a", 0.01),
    ]


def test_a_small_condition_number_is_no_fault():
    wide = spectrum_of(50.0, 1.0)
    layers = {"a": layer(wide), "b": layer(wide), "c": layer(spectrum_of(50.0, 50.0))}
    assert found(layers, 10.0, 1.0) == []


def test_output_gradients_are_compared_among_layers_with_as_many_positions():
    small = spectrum_of(1e-4, 1e-4)
    layers = {f"conv{i}": layer(g=small, positions=64) for i in range(3)}
    layers |= {f"fc{i}": layer() for i in range(3)}
    assert found(layers) == []
    layers["conv9"] = layer(g=spectrum_of(1e-2, 1e-2), positions=64)
    assert found(layers) == [("lmax(g)", "conv9", pytest.approx(100.0))]


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["0", "2", "10"], 1),
        (["features.0", "features.3"], 1),
        (["blocks.0.mlp.fc1", "blocks.11.mlp.fc1", "blocks.0.mlp.fc2", "head"], 3),
        (["layers.0.blocks.1.attn.qkv", "layers.3.blocks.0.attn.qkv"], 1),
        (["blocks.0.mlp.0", "blocks.0.mlp.2", "blocks.1.mlp.0", "blocks.1.mlp.2"], 2),
        (["encoder.encoder_layer_0.mlp.0", "encoder.encoder_layer_1.mlp.0", "encoder.encoder_layer_1.mlp.3"], 2),
        (["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "fc", ""], 4),
        (["conv_1", "conv_2"], 2),
    ],
)
def test_namesakes_differ_in_the_block_alone(names, groups):
    assert len({_namesakes(name) for name in names}) == groups


def test_a_layer_is_compared_with_its_namesakes_in_other_blocks():
    large, small = layer(spectrum_of(100.0, 100.0)), layer(spectrum_of(0.1, 0.1))
    layers = {f"blocks.{i}.{name}": one for i in range(6) for name, one in (("fc1", large), ("fc2", small))}
    assert found(layers) == []
    layers["blocks.3.fc2"] = layer()
    assert found(layers) == [("lmax(x)", "blocks.3.fc2", pytest.approx(10.0))]
    layers["head"] = layer(spectrum_of(1e5, 1e5))  # it has no namesakes: all layers are the measure
    assert [name for _, name, _ in found(layers)] == ["head", "blocks.3.fc2"]
    three = {name: one for name, one in layers.items() if name[7:8] in ("0", "1", "2")}
    assert len(found(three)) == 3, "of three namesakes all layers are the measure"
    silent = {f"blocks.{i}.fc2": layer(spectrum_of(0.0, 0.0)) for i in range(5)}
    assert Conditioning(layers | silent).outliers()[:5] == [Outlier(name, "lmax(x)", 0.0, 100.0) for name in silent]


def test_a_healthy_transformer_is_no_crowd_of_outliers_and_a_zeroed_layer_is_named():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, num_heads=3, num_classes=5, depth=6
    )
    batch = torch.randn(16, 3, 16, 16), torch.randint(5, (16,))
    assert len(condzoo.measure(model, batch).outliers()) <= 4
    nn.init.zeros_(model.blocks[3].mlp.fc1.weight)
    nn.init.zeros_(model.blocks[3].mlp.fc1.bias)
    named = {(o.layer, o.quantity) for o in condzoo.measure(model, batch).outliers()}
    assert {("blocks.3.mlp.fc2", "lmax(x)")} <= named


def test_unknown_condition_numbers_count_by_what_is_known():
    usual = [layer(spectrum_of(1.0, 0.5)) for _ in range(3)]
    bound = layer(spectrum_of(1.0, 0.0, noise_floor=1e-3))  # kappa is 1000 at least
    null = layer(spectrum_of(1.0, 0.0, noise_floor=1e-3, nulls=1))
    layers = dict(zip("abcde", [*usual, bound, null], strict=True))
    assert layers["d"].input.status(1.0) == "bound"
    assert layers["e"].input.status(1.0) == "structural null"
    assert found(layers, 10.0, 1.0) == [("k100(x)", "d", pytest.approx(500.0))]


def test_what_is_missing_or_not_finite_is_left_out():
    layers = {"a": layer(), "b": layer(), "c": layer(), "d": layer(spectrum_of(math.nan, math.nan), weight=None)}
    assert found(layers) == []


def test_a_layer_without_a_signal_stands_out_and_a_dead_network_does_not_divide_by_zero():
    dead = layer(g=spectrum_of(0.0, 0.0), weight_grad=0.0)
    assert found({"a": layer(), "b": layer(), "c": dead}) == [("lmax(g)", "c", 0.0), ("dW/W", "c", 0.0)]
    silent = layer(spectrum_of(0.0, 0.0), spectrum_of(0.0, 0.0), weight_grad=0.0)
    assert found({"a": silent, "b": silent, "c": silent}, 10.0, 1.0) == [
        (quantity, name, 0.0) for quantity in ("lmax(x)", "lmax(g)", "dW/W") for name in "abc"
    ]


def test_layers_that_get_nothing_are_named_apart_and_left_out_of_the_median():
    dead = layer(g=spectrum_of(0.0, 0.0), weight_grad=0.0)
    layers = {f"dead{i}": dead for i in range(6)} | {"a": layer(), "b": layer(), "c": layer(g=spectrum_of(30.0, 30.0))}
    layers["silent"] = layer(spectrum_of(0.0, 0.0), weight_grad=0.0)
    assert ("lmax(g)", "c", 30.0) in found(layers)
    assert Conditioning(layers).table().splitlines()[12:16] == [
        "no signal arrives (lmax(x) = 0): silent",
        "no gradient arrives (lmax(g) = 0): dead0, dead1, dead2, dead3 and 2 more",
        "stand out, having 10 times the median of the layers like them or more, or a 10th or less:",
        "  lmax(g): c 30x",
    ]
    still = {name: layer() for name in "abc"} | {"d": layer(weight_grad=0.0)}
    assert "the weight gets no gradient (dW/W = 0): d\nlmax:" in Conditioning(still).table()


def test_no_gradient_before_a_head_of_zeros():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))
    nn.init.zeros_(model[-1].weight)
    table = condzoo.measure(model, (torch.randn(32, 6), torch.randint(3, (32,)))).table()
    assert "\nno gradient arrives (lmax(g) = 0): 0, 2, 4\n" in table


def test_a_frozen_weight_is_not_the_one_that_changes_most(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    nn.init.orthogonal_(model[1].weight, gain=1e-3)
    batch = torch.randn(32, 6), torch.randint(6, (32,))
    trained = condzoo.measure(model, batch)
    assert "1" in {o.layer for o in trained.outliers() if o.quantity == "dW/W"}
    model[1].requires_grad_(False)
    measured = condzoo.measure(model, batch)
    assert measured["1"].weight_domination == trained["1"].weight_domination
    measured.to_json(tmp_path / "frozen.json")
    for c in (measured, Conditioning.from_json(tmp_path / "frozen.json")):
        assert {name: layer.frozen for name, layer in c.items()} == {"0": False, "1": True, "2": False, "3": False}
        assert "1" not in {o.layer for o in c.outliers() if o.quantity == "dW/W"}
        assert next(line for line in c.table().splitlines() if line.startswith("1 ")).endswith(" -        -")
    assert "  -: the weight has no gradient, is frozen, or is 0" in measured.table()


def test_two_layers_are_not_compared():
    layers = {"a": layer(), "b": layer(spectrum_of(1e6, 1e6))}
    assert found(layers) == []
    assert "stand out" not in Conditioning(layers).table()


@pytest.mark.parametrize("factor", [1.0, 0.5, -3.0, math.nan])
def test_a_factor_that_is_not_above_one_is_refused(factor):
    with pytest.raises(ValueError, match=r"factor must be above 1: "):
        Conditioning({"a": layer()}).outliers(factor)


@given(st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=12), st.floats(1.5, 100.0), st.floats(1e-3, 1e3))
def test_outliers_are_numpys_and_do_not_change_with_the_unit(values, factor, unit):
    def of(scale: float) -> set[str]:
        layers = {str(i): layer(spectrum_of(v * scale, v * scale)) for i, v in enumerate(values)}
        return {o.layer for o in Conditioning(layers).outliers(factor) if o.quantity == "lmax(x)"}

    distance = np.abs(np.log(np.array(values) / np.median(values))) - math.log(factor)
    clear = np.abs(distance) > 1e-9  # of a layer at the very factor rounding decides
    expected = {str(i) for i in np.flatnonzero(clear & (distance > 0))}
    tied = {str(i) for i in np.flatnonzero(~clear)}
    assert of(1.0) - tied == of(unit) - tied == expected


def test_the_table_names_them():
    layers = {"a": layer(), "b": layer(), "c": layer(spectrum_of(40.0, 40.0))}
    text = Conditioning(layers).table()
    head = "stand out, having 10 times the median of the layers like them or more, or a 10th or less:"
    assert f"{head}\n  lmax(x): c 40x\n" in text
    even = {name: layer() for name in "abc"}
    assert "no layer stands out: none has 10 times the median of the layers like it, or a 10th\n" in (
        Conditioning(even).table()
    )
    many = {f"l{i}": layer() for i in range(12)} | {f"big{i}": layer(spectrum_of(50.0, 50.0)) for i in range(6)}
    assert "  lmax(x): big0 50x, big1 50x, big2 50x, big3 50x and 2 more" in Conditioning(many).table()


def test_in_a_plain_resnet_it_is_the_last_layer_and_a_last_bn_mends_it():
    torch.manual_seed(0)
    batch = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    plain = condzoo.measure(condzoo.create_model("cifar_resnet14_nobn"), batch).outliers()
    assert {"lmax(x)", "k50(x)"} <= {o.quantity for o in plain if o.layer == "fc" and o.ratio > 1}
    mended = condzoo.measure(condzoo.create_model("cifar_resnet14_nobn_lastbn"), batch).outliers()
    assert not [o for o in mended if o.layer == "fc"]


def layer_of(size, positions, rows):
    g = Spectrum(torch.full((2,), size, dtype=torch.float64), rows=rows)
    return LayerConditioning("Conv2d", Spectrum(torch.ones(2).double()), g, 1.0, 1.0, samples=8, positions=positions)


def test_a_strided_convolution_is_compared_with_maps_of_its_outputs_size():
    layers = {f"before{i}": layer_of(1e-4, 64, 8 * 64) for i in range(3)}
    layers |= {"down": layer_of(1e-2, 64, 8 * 16)}  # it reads 64 positions and makes 16
    layers |= {f"after{i}": layer_of(1e-2, 16, 8 * 16) for i in range(2)}
    assert Conditioning(layers).outliers() == []


def test_measured_strided_convolutions_are_grouped_by_their_output():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(64, 3)]
    found = condzoo.measure(nn.Sequential(*body), (torch.randn(6, 3, 8, 8), torch.arange(6) % 3))
    assert [c.output_grad.rows // c.samples for c in found.values()] == [64, 16, 1]

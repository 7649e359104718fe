"""The records that validate holds the zoo against: up to date, complete, and compared as they say."""

import json
import math

import pytest
import torch

from condzoo.catalog import list_models
from condzoo.validation import fingerprint, initial_conditioning, promises, record_zoo

UP_TO_DATE = ["mlp4x24", "mlp8x24_bn", "mlp8x24_lastbn", "cifar_resnet8", "cifar_vgg8_nobn", "cifar_preresnet8_lastbn"]


@pytest.mark.parametrize("name", UP_TO_DATE)
def test_the_record_of_conditioning_is_up_to_date(name):
    now, shipped = record_zoo.conditioning(name), initial_conditioning.initial_records()[name]
    assert now.mean.keys() == shipped.mean.keys()
    for layer, values in shipped.mean.items():
        assert now.mean[layer] == [value if value is None else pytest.approx(value, rel=2e-3) for value in values]
        wanted = [value if value is None else pytest.approx(value, rel=0.1) for value in shipped.spread[layer]]
        assert now.spread[layer] == wanted


@pytest.mark.parametrize("name", UP_TO_DATE)
def test_the_fingerprints_are_up_to_date(name):
    assert record_zoo.logits(name) == pytest.approx(fingerprint.read_fingerprints()[name], abs=1e-6, rel=1e-6)


def test_every_model_of_the_zoo_has_both_records():
    assert list(initial_conditioning.initial_records()) == list(fingerprint.read_fingerprints()) == list_models()
    without = [name for name, value in fingerprint.read_fingerprints().items() if value is None]
    assert {name.removesuffix("_lastbn") for name in without} <= {"cifar_vgg230", "cifar_vgg1202", "mlp100x256_bn"}


def test_the_record_is_written_model_by_model_in_the_zoos_order(tmp_path, monkeypatch):
    for module in (fingerprint, initial_conditioning):
        monkeypatch.setattr(module, "RECORD", tmp_path / module.RECORD.name)
    monkeypatch.setattr(record_zoo, "SEEDS", range(2))
    record_zoo.main(["mlp4x24", "cifar_resnet8"])
    written = json.loads((tmp_path / "conditioning.json").read_text())["models"]
    assert {"mlp4x24", "cifar_resnet8"} <= written.keys()
    assert list(written) == list_models()
    assert list(json.loads((tmp_path / "fingerprints.json").read_text())) == list_models()


def test_a_number_beside_the_record_is_off_by_their_ratio():
    seeds = [{"a": [2.0 * factor, 3.0, None, 1.0]} for factor in (0.5, 1.0, 2.0)]
    record = initial_conditioning.combine(seeds)
    assert record.mean == {"a": [pytest.approx(2.0), pytest.approx(3.0), None, pytest.approx(1.0)]}
    assert record.spread["a"][0] == pytest.approx(math.log(2))
    (worst, *others) = initial_conditioning.deviations({"a": [8.0, 3.0, 5.0, None]}, record)
    assert (worst.what, worst.excess) == ("output gradient kappa of a", math.inf)
    assert others[0].factor == pytest.approx(4.0)
    assert others[0].allowed == pytest.approx(2.0**initial_conditioning.SPREADS)
    assert others[0].excess == pytest.approx(2 / initial_conditioning.SPREADS)


def test_further_seeds_widen_a_record_and_do_not_move_it():
    """So that a fault which all of them have is still one."""
    record = initial_conditioning.combine([{"a": [factor, 3.0 * factor, None, 1.0]} for factor in (0.9, 1.0, 1.1)])
    moved = [{"a": [8.0 * factor, 3.0 * factor**4, 5.0, None]} for factor in (0.9, 1.0, 1.1)]
    wider = record.widened(moved)
    assert wider.mean == record.mean
    tail = initial_conditioning.TAIL
    assert wider.spread == {
        "a": pytest.approx([tail * record.spread["a"][0], tail * 4 * record.spread["a"][1], None, 0.0])
    }
    assert initial_conditioning.deviations({"a": [8.0, 3.0, None, 1.0]}, wider)[0].excess > 1


def test_further_seeds_are_others_than_the_records():
    """Of a seed torch's generators take 32 bits: 2**32 draws what 0 does."""
    first = promises.FURTHER_SEED
    seeds = [*record_zoo.SEEDS, *range(first, first + promises.FURTHER_LAYERS)]
    drawn = {float(torch.rand((), generator=torch.Generator().manual_seed(s), dtype=torch.float64)) for s in seeds}
    assert len(drawn) == len(seeds)


def test_deep_networks_are_recorded_at_layers_spread_evenly():
    names = [str(i) for i in range(100)]
    chosen = initial_conditioning.spread_over(names)
    assert (len(chosen), chosen[0], chosen[-1]) == (initial_conditioning.LAYERS, "0", "99")
    assert initial_conditioning.spread_over(names[:5]) == names[:5]

"""What TensorBoard reads back from the event files is what was measured."""

import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from condzoo.probe import Probe, measure, read_records, write_tensorboard
from condzoo.probe.records import append_record
from condzoo.probe.spectra import Spectrum
from condzoo.probe.tensorboard import open_writer, settled

pytest.importorskip("tensorboard")


def events(folder):
    """TensorBoard's own reader, of everything in a folder, without thinning."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()


def read(reader, tag):
    return {e.step: e.value for e in reader.Scalars(tag)}


def run(model, kit, steps, **settings):
    with Probe(model, every=2, **settings) as probe:
        for step in range(steps):
            x, y = kit.images(64, seed=step, dtype=torch.float32)
            F.cross_entropy(model(x), y).backward()
            model.zero_grad()
            probe.step()


def test_a_probe_writes_scalars_and_histograms_that_tensorboard_reads_back(kit, tmp_path):
    run(kit.build("conv", torch.float32), kit, 5, out=tmp_path / "run", tensorboard=tmp_path / "events")
    records, reader = read_records(tmp_path / "run"), events(tmp_path / "events")
    assert [r.step for r in records] == [0, 2, 4]
    for name in records[0]:
        for side in ("input", "output_grad"):
            wanted = {r.step: getattr(r[name], side) for r in records}
            assert read(reader, f"{side}_lambda_max/{name}") == pytest.approx(
                {step: s.lambda_max for step, s in wanted.items()}, rel=1e-6
            )
            known = {step: s.condition_number(0.5) for step, s in wanted.items() if s.status(0.5) == "ok"}
            assert len(known) == 3
            assert read(reader, f"{side}_kappa50/{name}") == pytest.approx(known, rel=1e-6)
            for event in reader.Histograms(f"{side}_log10_eigenvalues/{name}"):
                s = wanted[event.step]
                assert event.histogram_value.num == s.rank
                assert event.histogram_value.max == pytest.approx(np.log10(s.lambda_max))
        domination = {r.step: r[name].weight_domination for r in records}
        assert read(reader, f"weight_domination/{name}") == pytest.approx(domination, rel=1e-6)
    for name in records[0].neurons:
        dying = {r.step: r.neurons[name].dying_share for r in records}
        assert read(reader, f"dying_share/{name}") == pytest.approx(dying, rel=1e-6)
        assert len(read(reader, f"full_share/{name}")) == 3


def test_an_unknown_condition_number_is_left_out(kit, tmp_path):
    c = measure(kit.build("mlp"), kit.images())
    assert c["5"].output_grad.status(1.0) == "structural null"
    write_tensorboard([replace(c, step=7)], tmp_path)
    tags = events(tmp_path).Tags()["scalars"]
    assert "output_grad_kappa50/5" in tags
    assert "output_grad_kappa100/5" not in tags
    assert read(events(tmp_path), "output_grad_rank/5") == {7: 3.0}


def test_what_float32_does_not_hold_is_left_out_but_for_its_log10(kit, tmp_path):
    """lambda_max of a deep plain network is under float32's smallest number; it was read back as 0, or as inf."""
    c = measure(kit.build("mlp"), kit.images())
    (first, one), (second, other), *rest = c.items()
    tiny = Spectrum(torch.tensor([1e-60, 1e-61, 1e-62], dtype=torch.float64), noise_floor=1e-70)
    huge = Spectrum(torch.tensor([1e60, 1e50, 0.0], dtype=torch.float64), noise_floor=1e-70)
    zero = Spectrum(torch.zeros(3, dtype=torch.float64))
    layers = {first: replace(one, input=tiny, output_grad=huge), second: replace(other, input=zero), **dict(rest)}
    write_tensorboard(replace(c, layers=layers), tmp_path)
    reader = events(tmp_path)
    for tag in reader.Tags()["scalars"]:
        (value,) = read(reader, tag).values()
        assert value == 0 or 1.2e-38 < abs(value) < 3.4e38
    for side, log10 in (("input", -60), ("output_grad", 60)):
        assert f"{side}_lambda_max/{first}" not in reader.Tags()["scalars"]
        assert read(reader, f"{side}_log10_lambda_max/{first}") == {0: pytest.approx(log10)}
    assert read(reader, f"input_kappa100/{first}") == {0: pytest.approx(100)}
    assert read(reader, f"input_lambda_max/{second}") == {0: 0.0}
    assert f"input_log10_lambda_max/{second}" not in reader.Tags()["scalars"]


def test_what_a_folder_has_already_is_still_shown(kit, tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(3):
            writer.add_scalar("loss", 1.0, step)
    c = measure(kit.build("mlp"), kit.images())
    for step in (0, 1):
        write_tensorboard(replace(c, step=step), tmp_path)
    reader = events(tmp_path)
    assert sorted(read(reader, "loss")) == [0, 1, 2]
    assert sorted(read(reader, "input_lambda_max/1")) == [0, 1]


def test_records_are_taken_by_their_path_and_one_fraction_by_itself(kit, tmp_path):
    append_record(tmp_path / "conditioning.jsonl", replace(measure(kit.build("mlp"), kit.images()), step=7))
    write_tensorboard(str(tmp_path), tmp_path / "events", p=0.25)
    tags = events(tmp_path / "events").Tags()["scalars"]
    assert "input_kappa25/1" in tags
    assert "input_kappa50/1" not in tags
    with pytest.raises(TypeError, match=r"records must be a conditioning.jsonl or measurements, got a int"):
        write_tensorboard(iter([5]), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_run_that_goes_on_replaces_what_it_repeats(kit, tmp_path):
    model = kit.build("mlp", torch.float32)
    run(model, kit, 5, tensorboard=tmp_path)
    written = int(time.time())
    while int(time.time()) == written:  # files are read in the order of their names: the second, then a bare count
        time.sleep(0.02)
    run(model, kit, 1, tensorboard=tmp_path, start_step=2)
    assert sorted(read(events(tmp_path), "input_lambda_max/1")) == [0, 2]


def test_a_writer_of_ones_own_stays_open(kit, tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        run(kit.build("mlp", torch.float32), kit, 1, tensorboard=writer)
        writer.add_scalar("loss", 1.0, 0)
    assert {"loss", "input_lambda_max/1"} <= set(events(tmp_path).Tags()["scalars"])


def test_without_tensorboard_the_error_says_how_to_install_it(kit, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with (
        pytest.raises(ModuleNotFoundError, match=r"TensorBoard is not installed; pip install 'condzoo\[tensorboard\]'"),
        Probe(kit.build("mlp"), tensorboard=tmp_path),
    ):
        pass


def test_an_address_stays_one_and_a_tilde_is_the_home(monkeypatch):
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", lambda folder, purge_step: folder)
    monkeypatch.setenv("HOME", "/home/me")
    for folder, expected in (("s3://bucket/run", "s3://bucket/run"), ("~/run", "/home/me/run")):
        assert open_writer(folder, start_step=None) == expected
        assert str(settled(folder)) == expected

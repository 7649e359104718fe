"""`Probe` in the ways people train: scaled losses, checkpointing, compilation, models that are not called."""

from contextlib import ExitStack

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from condzoo.probe import Probe, measure


def close(a, b, tolerance=1e-12):
    assert list(a) == list(b)
    for name in a:
        for side in ("input", "output_grad"):
            x, y = getattr(a[name], side).eigenvalues, getattr(b[name], side).eigenvalues
            assert float((x - y).abs().max()) <= tolerance * float(y.max())
        assert a[name].weight == pytest.approx(b[name].weight, rel=1e-12)
        assert a[name].weight_grad == pytest.approx(b[name].weight_grad, rel=1e-9)
        assert a[name].samples == b[name].samples


def once(model, x, y, forward=None, **settings):
    """The measurement of one step without an update; `forward` stands in for the model."""
    with Probe(model, **settings) as probe:
        F.cross_entropy((forward or model)(x), y).backward()
        probe.step()
    model.zero_grad()
    return probe.latest


def test_a_grad_scaler_is_undone_also_after_it_has_moved_on(kit):
    model, (x, y) = kit.build("conv"), kit.images()
    plain = once(model, x, y)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Probe(model, scaler=scaler) as probe:
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        probe.step()
    assert scaler.get_scale() == 8192.0
    close(probe.latest, plain, 1e-10)


def test_a_grad_scaler_and_accumulation_are_both_undone(kit):
    model, (x, y) = kit.build("conv"), kit.images()
    plain = once(model, x, y)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    with Probe(model, scaler=scaler, loss_scale=0.5) as probe:
        for half in (slice(0, 6), slice(6, 12)):
            scaler.scale(F.cross_entropy(model(x[half]), y[half]) / 2).backward()
        probe.step()
    close(probe.latest, plain, 1e-10)


def test_loss_scale_alone_is_undone_and_must_be_positive(kit):
    model, (x, y) = kit.build("conv"), kit.images()
    plain = once(model, x, y)
    with Probe(model) as probe:
        (4096 * F.cross_entropy(model(x), y)).backward()
        probe.loss_scale = 4096.0
        probe.step()
    close(probe.latest, plain, 1e-10)
    with Probe(model) as probe:
        model(x).sum().backward()
        probe.loss_scale = 0.0
        with pytest.raises(ValueError, match=r"loss_scale must be a number above 0, got 0"):
            probe.step()


def fp16_training(kit, steps, initial_scale, probed):
    """ResNet-like training in fp16 on the CPU; the model, the probe and the scales over the steps."""
    model = kit.build("residual", torch.float32)
    x, y = kit.images(64, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=initial_scale)
    records, scales = [], []
    with Probe(model, every=int(probed), scaler=scaler) as probe:
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            probe.step()
            records.append(probe.latest)
            scales.append(scaler.get_scale())
    return model, records, scales


def test_a_step_that_fp16_skips_names_the_layers_that_overflowed_and_the_next_ones_are_measured(kit):
    plain, _, _ = fp16_training(kit, 4, 2.0**24, probed=False)
    model, records, scales = fp16_training(kit, 4, 2.0**24, probed=True)
    assert scales[0] == 2.0**23  # the first step was skipped
    skipped = records[0]
    assert skipped.skipped["7"] == "the gradient of its output holds NaN or Inf"
    assert skipped.first_nonfinite == {"backward": "7"}
    assert skipped.dtype == "float16"
    for name, a in plain.state_dict().items():
        assert torch.equal(a, model.state_dict()[name]), name
    _, records, scales = fp16_training(kit, 1, 1024.0, probed=True)
    assert scales == [1024.0]
    exact = once(kit.build("residual", torch.float32), *kit.images(64, dtype=torch.float32))
    assert list(records[0]) == list(exact)
    for name, layer in exact.items():
        assert records[0][name].output_grad.lambda_max == pytest.approx(layer.output_grad.lambda_max, rel=0.05)
        assert records[0][name].weight_grad == pytest.approx(layer.weight_grad, rel=0.05)


@pytest.mark.parametrize(("name", "size"), [("test_resnet", 32), ("test_vit", 160)])
def test_timms_checkpointing_changes_nothing(name, size):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4).double()
    x, y = torch.randn(2, 3, size, size, dtype=torch.float64), torch.tensor([1, 3])
    found = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        found.append(once(model, x, y))
    assert len(found[0]) > 5
    close(found[1], found[0])
    assert found[1].neurons == found[0].neurons


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_whole_model_changes_nothing(kit, reentrant):
    model, (x, y) = kit.build("conv"), kit.images()
    plain = once(model, x, y)
    whole = once(model, x.requires_grad_(), y, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    close(whole, plain)
    assert (whole.samples, whole.batches, whole.neurons) == (12, 1, plain.neurons)


def counting_backend(calls):
    def backend(graph, inputs):
        def run(*args):
            calls.append(1)
            return graph.forward(*args)

        return run

    return backend


@pytest.mark.parametrize("how", ["wrapper", "in place", "a part", "a function", "whole graph"])
def test_what_is_compiled_runs_eagerly_in_the_steps_that_are_due_and_only_then(kit, how):
    torch.compiler.reset()
    model, (x, y) = kit.build("mlp", torch.float32), kit.images(dtype=torch.float32)
    plain, calls = once(model, x, y), []
    backend = counting_backend(calls)
    forward = given = model
    if how == "wrapper":
        forward = given = torch.compile(model, backend=backend)
    elif how == "in place":
        model.compile(backend=backend)
    elif how == "a part":
        model[1] = torch.compile(model[1], backend=backend)
    elif how == "a function":
        forward = torch.compile(lambda x: model(x), backend=backend)
    else:
        forward = given = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    with Probe(given, every=2) as probe:
        for step in range(4):
            before = len(calls)
            F.cross_entropy(forward(x), y).backward()
            assert (len(calls) > before) == (step % 2 == 1)
            probe.step()
            model.zero_grad()
    assert probe.latest.step == 2
    close(probe.latest, plain)


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_probes_that_end_in_any_order_leave_compilation_as_it_was(kit, first_out):
    torch.compiler.reset()
    (x, _), calls = kit.images(dtype=torch.float32), []
    compiled = torch.compile(kit.build("mlp", torch.float32), backend=counting_backend(calls))
    open_probes = [ExitStack(), ExitStack()]
    for probe in open_probes:
        probe.enter_context(Probe(kit.build("mlp"), every=1))
    open_probes.pop(first_out).close()
    compiled(x)
    assert not calls
    open_probes.pop().close()
    compiled(x)
    assert calls


def test_compiled_training_is_bitwise_the_same_where_the_compiler_keeps_the_arithmetic(kit):
    def trained(every):
        torch.compiler.reset()
        model = kit.build("residual", torch.float32)
        compiled = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with Probe(compiled, every=every) as probe:
            for step in range(4):
                x, y = kit.images(seed=step, dtype=torch.float32)
                optimizer.zero_grad()
                F.cross_entropy(compiled(x), y).backward()
                optimizer.step()
                probe.step()
        return model.state_dict(), probe.latest

    (plain, nothing), (probed, latest) = trained(0), trained(2)
    assert (nothing, latest.step) == (None, 2)
    for name, a in plain.items():
        assert torch.equal(a, probed[name]), name


class Parts(nn.Module):
    """A model whose methods are called instead of itself."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(48, 8), nn.Linear(8, 4)

    def encode(self, x):
        return self.body(x.flatten(1)).relu()

    def forward(self, x):
        return self.head(self.encode(x))


def test_a_model_that_is_not_called_is_measured_once_told_that_a_batch_begins(kit):
    torch.manual_seed(0)
    model, (x, y) = Parts().double(), kit.images()
    plain = once(model, x, y)
    with Probe(model) as probe:
        probe.begin({"pixels": x, "labels": y})
        F.cross_entropy(model.head(model.encode(x)), y).backward()
        probe.step()
    close(probe.latest, plain)
    assert (probe.latest.samples, probe.latest.batches) == (12, 1)
    with Probe(model) as probe:
        probe.begin((x, y))
        F.cross_entropy(model(x), y).backward()  # called after all: counted once
        probe.step()
    close(probe.latest, plain)
    assert probe.latest.samples == 12


def test_data_parallel_is_measured_on_one_device_and_refused_on_several(kit):
    model, (x, y) = kit.build("conv"), kit.images()
    expected = measure(model, (x, y))
    wrapped = nn.DataParallel(model)
    close(measure(wrapped, (x, y)), expected, 0.0)
    with Probe(wrapped) as probe:
        F.cross_entropy(wrapped(x), y).backward()
        probe.step()
    close(probe.latest, expected)
    model[2] = nn.DataParallel(model[2])
    assert list(measure(model, (x, y))) == list(expected)
    wrapped.device_ids = [0, 1]  # as on two GPUs
    with pytest.raises(ValueError, match=r"DataParallel over several .* train with DistributedDataParallel"):
        Probe(wrapped)
    close(measure(wrapped, (x, y)), expected, 0.0)  # the model inside, by itself
    model[2].device_ids = [0, 1]
    with pytest.raises(ValueError, match="measure the model inside it"):
        measure(model, (x, y))


def test_a_copy_that_data_parallel_runs_is_refused_where_the_probe_was_given_the_model_inside(kit):
    model, (x, y) = kit.build("conv"), kit.images()
    with Probe(model) as probe:
        with pytest.raises(ValueError, match=r"DataParallel over several .* train with DistributedDataParallel"):
            model._replicate_for_data_parallel()(x)
        F.cross_entropy(model(x), y).backward()
        probe.step()
    assert probe.latest.samples == 12

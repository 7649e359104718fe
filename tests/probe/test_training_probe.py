"""`Probe` in a training loop: the same numbers as `measure`, and the same weights as without it."""

import gc
from contextlib import ExitStack, nullcontext
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from timm.utils import NativeScaler
from torch import nn
from torch.overrides import BaseTorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from condzoo.probe import Probe, measure, read_records


def train(model, kit, steps, probe=None, evaluate=False):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        x, y = kit.images(seed=step, dtype=next(model.parameters()).dtype)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if probe is not None:
            probe.step()
        if evaluate:
            model.eval()
            model(kit.images(5, dtype=x.dtype)[0])
            model.train()
            with torch.no_grad():
                model(kit.images(5, dtype=x.dtype)[0])
    return model


def close(a, b, tolerance=1e-12):
    assert list(a) == list(b)
    for name in a:
        for side in ("input", "output_grad"):
            x, y = getattr(a[name], side).eigenvalues, getattr(b[name], side).eigenvalues
            assert float((x - y).abs().max()) <= tolerance * float(y.max())
        assert a[name].weight == pytest.approx(b[name].weight, rel=1e-12)
        assert a[name].weight_grad == pytest.approx(b[name].weight_grad, rel=1e-9)


@pytest.mark.parametrize("name", ["bn_mlp", "conv", "residual"])
def test_weights_are_bitwise_those_of_training_without_it(kit, name):
    plain = train(kit.build(name, torch.float32), kit, 5)
    model = kit.build(name, torch.float32)
    with Probe(model, every=2) as probe:
        train(model, kit, 5, probe)
    for (key, a), (_, b) in zip(plain.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("name", ["mlp", "conv", "residual", "tokens"])
def test_it_sees_what_measure_sees_on_the_same_batch(kit, name):
    model = kit.build(name)
    expected = measure(model, kit.images(seed=0))
    with Probe(model) as probe:
        train(model, kit, 1, probe)
    close(probe.latest, expected)
    assert probe.latest.neurons == expected.neurons
    assert (probe.latest.step, probe.latest.samples, probe.latest.mode) == (0, 12, "train")


@pytest.mark.parametrize("name", ["conv", "residual"])
def test_without_neurons_and_weights_the_moments_are_the_same(kit, name):
    with Probe(kit.build(name)) as probe:
        train(probe.model, kit, 2, probe)
    with Probe(kit.build(name), neurons=False, weights=False) as bare:
        assert not any(m._forward_hooks for m in bare.model.modules() if isinstance(m, nn.ReLU))
        train(bare.model, kit, 2, bare)
    assert probe.latest.neurons
    assert not bare.latest.neurons
    assert bare.latest.skipped == probe.latest.skipped
    assert list(bare.latest) == list(probe.latest)
    for layer, whole in probe.latest.items():
        part = bare.latest[layer]
        assert torch.equal(part.input.eigenvalues, whole.input.eigenvalues)
        assert torch.equal(part.output_grad.eigenvalues, whole.output_grad.eigenvalues)
        assert (part.weight, part.weight_grad, part.weight_domination) == (None, None, None)
        assert whole.weight_domination > 0


def test_it_measures_the_steps_that_are_due_and_writes_them(kit, tmp_path):
    model = kit.build("mlp")
    with Probe(model, every=3, out=tmp_path / "run") as probe:
        train(model, kit, 8, probe)
    records = read_records(tmp_path / "run")
    assert [r.step for r in records] == [0, 3, 6]
    close(records[-1], probe.latest, 0.0)


def test_a_run_that_goes_on_appends_after_a_torn_line(kit, tmp_path):
    model = kit.build("mlp")
    with Probe(model, every=2, out=tmp_path) as probe:
        train(model, kit, 3, probe)
    with (tmp_path / "conditioning.jsonl").open("a") as file:
        file.write('{"schema": "condzoo.cond')
    with Probe(model, every=2, out=tmp_path, start_step=1) as probe:
        train(model, kit, 4, probe)
    assert [r.step for r in read_records(tmp_path)] == [0, 2, 4]


def test_a_loop_that_changes_its_working_folder_writes_where_it_began(kit, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    model, elsewhere = kit.build("mlp"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    probe = Probe(model, every=1, out="runs/x", tensorboard="runs/x/events")
    monkeypatch.chdir(elsewhere)
    with probe:
        train(model, kit, 2, probe)
    assert [r.step for r in read_records(tmp_path / "runs" / "x")] == [0, 1]
    (events,) = (tmp_path / "runs" / "x" / "events").iterdir()
    assert events.stat().st_size > 0
    assert list(elsewhere.iterdir()) == []


def test_forwards_between_steps_are_not_recorded(kit):
    model, other = kit.build("conv"), kit.build("conv")
    with Probe(model, every=1) as probe, Probe(other, every=1) as with_evaluation:
        train(model, kit, 2, probe)
        train(other, kit, 2, with_evaluation, evaluate=True)
    close(with_evaluation.latest, probe.latest, 0.0)


def test_accumulated_batches_are_one_measurement(kit):
    model = kit.build("conv")
    x, y = kit.images(24)
    expected = measure(model, [(x[:8], y[:8]), (x[8:16], y[8:16]), (x[16:], y[16:])])
    with Probe(model, loss_scale=1 / 3) as probe:
        for part in range(3):
            mine = slice(8 * part, 8 * part + 8)
            (F.cross_entropy(model(x[mine]), y[mine]) / 3).backward()
        probe.step()
    assert (probe.latest.samples, probe.latest.batches) == (24, 3)
    for name, layer in expected.items():
        found = probe.latest[name]
        assert torch.allclose(found.input.eigenvalues, layer.input.eigenvalues, rtol=1e-10, atol=1e-14)
        assert torch.allclose(found.output_grad.eigenvalues, layer.output_grad.eigenvalues, rtol=1e-9, atol=1e-14)
        assert found.weight_grad == pytest.approx(layer.weight_grad, rel=1e-9)


def test_a_sum_over_the_batch_is_known_by_its_reduction(kit):
    model = kit.build("mlp")
    x, y = kit.images()
    expected = measure(model, (x, y))
    with Probe(model, reduction="sum") as probe:
        F.cross_entropy(model(x), y, reduction="sum").backward()
        probe.step()
    close(probe.latest, expected, 1e-10)


def test_bf16_autocast_is_measured_and_recorded(kit):
    model = kit.build("residual", torch.float32)
    x, y = kit.images(64, dtype=torch.float32)
    plain = measure(model, (x, y))
    with Probe(model) as probe:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(x)
        F.cross_entropy(output.float(), y).backward()
        probe.step()
    assert (plain.dtype, probe.latest.dtype) == ("float32", "bfloat16")
    for name, layer in plain.items():
        assert probe.latest[name].input.lambda_max == pytest.approx(layer.input.lambda_max, rel=0.05)
        assert probe.latest[name].output_grad.lambda_max == pytest.approx(layer.output_grad.lambda_max, rel=0.2)


def test_the_scale_of_timms_scaler_is_undone(kit):
    model, (x, y), scaler = kit.build("mlp"), kit.images(), NativeScaler("cpu")
    expected = measure(model, (x, y))
    with Probe(model, scaler=scaler) as probe:
        scaler(F.cross_entropy(model(x), y), torch.optim.SGD(model.parameters(), lr=0.1))
        probe.step()
    assert scaler.state_dict()["scale"] > 1
    close(probe.latest, expected)


def test_channels_last_changes_nothing_but_round_off(kit):
    model, (x, y) = kit.build("residual"), kit.images()
    plain = measure(model, (x, y))
    model.to(memory_format=torch.channels_last)
    with Probe(model) as probe:
        F.cross_entropy(model(x.to(memory_format=torch.channels_last)), y).backward()
        probe.step()
    close(probe.latest, plain, 1e-10)


def test_hooks_come_off_when_the_loop_raises(kit):
    model = kit.build("conv")
    with pytest.raises(RuntimeError, match="mat1 and mat2"), Probe(model):
        model(torch.zeros(2, 3, 9, 9, dtype=torch.float64))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Interrupted(nn.MultiheadAttention):
    """Ends by Ctrl-C while a batch has more than 8 samples."""

    def forward(self, x, *rest):
        h = super().forward(x, *rest)
        if len(x) > 8:
            raise KeyboardInterrupt
        return h


class Interruptible(nn.Module):
    """A functional ReLU, and attention that may be interrupted."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(16, 8), nn.Linear(8, 4)
        self.mix = Interrupted(8, 2, batch_first=True)

    def forward(self, x):
        h = F.relu(self.stem(x.flatten(2)))
        return self.head(self.mix(h, h, h)[0].mean(1))


def run_probed(model, x, how):
    with ExitStack() as outer, ExitStack() as inner:
        (inner if how.endswith("first") else outer).enter_context(Probe(model))
        if how.startswith("two"):
            outer.enter_context(Probe(model))
        with BaseTorchFunctionMode() if how == "inside a mode" else nullcontext():
            model(x)


@pytest.mark.parametrize("how", ["measure", "a probe", "two probes", "two probes, first out first", "inside a mode"])
def test_an_interrupted_forward_pass_leaves_nothing_behind(kit, how):
    model, linear, (x, y) = Interruptible(), F.linear, kit.images(dtype=torch.float32)
    with pytest.raises(KeyboardInterrupt):
        _ = measure(model, (x, y)) if how == "measure" else run_probed(model, x, how)
    assert F.linear is linear
    assert _get_current_function_mode_stack() == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("at", ["the beginning", "a step"])
def test_hooks_that_were_going_on_as_ctrl_c_came_are_taken_off(kit, monkeypatch, at):
    def interrupted(hook, **how):
        if how.get("always_call"):  # one of the last
            raise KeyboardInterrupt
        return register(hook, **how)

    model, (x, _) = Interruptible(), kit.images(dtype=torch.float32)
    register = model.mix.register_forward_hook
    probe = Probe(model, every=2, start_step=0 if at == "the beginning" else 1)
    monkeypatch.setattr(model.mix, "register_forward_hook", interrupted)
    with pytest.raises(KeyboardInterrupt), probe:
        probe.step()
    monkeypatch.undo()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model(x[:8])
    assert _get_current_function_mode_stack() == []
    with probe:
        pass


def test_an_interrupted_pass_and_those_after_it_in_its_step_are_forgotten(kit):
    model, (x, y), mode = Interruptible(), kit.images(dtype=torch.float32), BaseTorchFunctionMode()
    with Probe(model) as probe:
        F.cross_entropy(model(x[:8]), y[:8]).backward()
        probe.step()
    model.zero_grad()
    with mode, Probe(model) as other:
        for part in (slice(8), slice(12), slice(8)):  # a notebook's cell, interrupted and run again
            with pytest.raises(KeyboardInterrupt) if part.stop > 8 else nullcontext():
                F.cross_entropy(model(x[part]), y[part]).backward()
        other.step()
        assert _get_current_function_mode_stack()[0] is mode
    same_record(other.latest, probe.latest)


def test_what_an_interruption_leaves_of_a_probe_that_nobody_closed_is_garbage_with_its_model(kit):
    model, linear, (x, y) = Interruptible(), F.linear, kit.images(dtype=torch.float32)
    probe = ExitStack().enter_context(Probe(model))  # as in a notebook's cell
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert len(_get_current_function_mode_stack()) == 1
    left = ref(model), ref(probe)
    del model, probe
    gc.collect()
    assert [each() for each in left] == [None, None]
    with Probe(kit.build("mlp")) as other:
        assert _get_current_function_mode_stack() == []
        F.cross_entropy(other.model(x.double()), y).backward()
        other.step()
    assert F.linear is linear


def test_a_probe_takes_off_the_mode_that_an_interrupted_one_left_on(kit):
    model, (x, y), found = Interruptible(), kit.images(dtype=torch.float32), []
    for interrupted in (False, True):
        first = ExitStack().enter_context(Probe(model))
        with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
            model(x if interrupted else x[:8])
        with Probe(model) as probe:
            assert _get_current_function_mode_stack() == []
            F.cross_entropy(model(x[:8]), y[:8]).backward()
            assert _get_current_function_mode_stack() == []
            probe.step()
        first.__exit__(None, None, None)
        found.append(probe.latest)
        model.zero_grad()
    same_record(*found)


def test_a_probe_that_is_opened_within_a_pass_leaves_its_mode_on(kit):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.opens = nn.Linear(48, 4).double(), True

        def forward(self, x):
            h = self.layer(x.flatten(1))
            if self.opens:
                with Probe(kit.build("mlp")) as probe:
                    train(probe.model, kit, 1, probe)
            return F.relu(h)

    model, (x, y) = Inside(), kit.images()
    with Probe(model) as probe:
        F.cross_entropy(model(x), y).backward()
        probe.step()
    assert probe.latest.neurons["relu()"].rows == 12


def test_memory_does_not_grow_with_the_number_of_measurements(kit):
    def alive():
        gc.collect()
        objects = gc.get_objects()
        return sum(1 for o in objects if type(o) in (torch.Tensor, nn.Parameter)), len(objects)

    model, counts = kit.build("residual", torch.float32), []
    with Probe(model) as probe:
        for _ in range(4):
            train(model, kit, 3, probe)
            model.zero_grad()
            measure(model, kit.images(dtype=torch.float32))
            counts.append(alive())
    assert counts[1][0] == counts[2][0] == counts[3][0]
    assert counts[3][1] - counts[1][1] < 200  # Python objects after 8 more measurements


def test_a_due_step_without_a_forward_pass_warns(kit):
    with Probe(kit.build("mlp")) as probe, pytest.warns(RuntimeWarning, match="step 0 was due, but no forward"):
        probe.step()


def test_every_zero_measures_nothing_and_negative_is_an_error(kit, tmp_path):
    model = kit.build("mlp")
    with Probe(model, every=0, out=tmp_path) as probe:
        train(model, kit, 2, probe)
    assert probe.latest is None
    assert not (tmp_path / "conditioning.jsonl").exists()


def test_wrong_settings_are_errors_before_the_training_starts(kit):
    model = kit.build("mlp")
    with pytest.raises(ValueError, match="every must be 0 or more, got -1"):
        Probe(model, every=-1)
    with pytest.raises(ValueError, match="start_step must be 0 or more, got -2"):
        Probe(model, start_step=-2)
    for scale in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"loss_scale must be a number above 0, got {scale}"):
            Probe(model, loss_scale=scale)
    with pytest.raises(ValueError, match="layers must name at least one layer, got none; leave it out"):
        Probe(model, layers=[])
    with pytest.raises(TypeError, match=r"scaler must be a torch\.amp\.GradScaler or None, got float; a factor that"):
        Probe(model, scaler=128.0)


def test_a_pass_that_is_told_takes_the_place_of_one_that_has_not_run(kit):
    model, (x, y), records = kit.build("mlp"), kit.images(), []
    for skipped in (0, 2):
        model.zero_grad()
        with Probe(model, loss_scale=0.5) as probe:
            for part in (slice(8), slice(8, 12)):
                for _ in range(skipped):
                    probe.begin(x)
                probe.begin(x[part])
                loss = F.cross_entropy(model(x[part]), y[part]) / 2
                if skipped and part.start is None:
                    probe.begin(x)  # takes no gradient along that comes after it
                loss.backward()
            probe.step()
        records.append(probe.latest)
    same_record(*records)
    assert records[0].samples == 12


def test_steps_outside_with_are_an_error_and_leave_no_hooks(kit, tmp_path):
    model = kit.build("mlp")
    probe = Probe(model, every=1, out=tmp_path / "run")
    with pytest.raises(RuntimeError, match=r"probe\.step\(\) outside `with`: put the training loop inside `with Probe"):
        train(model, kit, 1, probe)
    with pytest.raises(RuntimeError, match=r"probe\.begin\(\) outside `with`"):
        probe.begin(kit.images())
    with probe, pytest.raises(RuntimeError, match="this Probe is open already"), probe:
        pass
    with probe:  # a notebook's cell, run again
        train(model, kit, 1, probe)
    with pytest.raises(RuntimeError, match="outside `with`"):
        probe.step()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [r.step for r in read_records(tmp_path / "run")] == [0]


def same_record(raised, calm):
    close(raised, calm, tolerance=0)
    assert (raised.samples, raised.batches, raised.neurons) == (calm.samples, calm.batches, calm.neurons)
    for a, b in zip(raised.values(), calm.values(), strict=True):
        assert (a.samples, a.weight, a.weight_grad) == (b.samples, b.weight, b.weight_grad)


class Fragile(nn.Module):
    """Raises in the middle of a forward pass over more than `most` samples, as a GPU out of memory does."""

    def __init__(self, body, most):
        super().__init__()
        self.first, self.rest, self.most = body[:3], body[3:], most

    def forward(self, x):
        h = self.first(x)
        if len(x) > self.most:
            raise MemoryError
        return self.rest(h)


@pytest.mark.parametrize("tried", [[32, 8], [8, 32, 8], [8, 8, 32], [32, 32, 8, 32]])
def test_a_forward_pass_that_raised_is_forgotten(kit, tried):
    """Batches too large are given up or tried again smaller; what is left is measured, and nothing else."""
    found = []
    for also_large in (True, False):
        model = Fragile(kit.build("conv"), most=8)
        with Probe(model) as probe:
            for i, size in enumerate(tried):
                x, y = kit.images(size, seed=i)
                if size == 8:
                    F.cross_entropy(model(x), y).backward()
                elif also_large:
                    with pytest.raises(MemoryError):
                        model(x)
                    model.eval()(kit.images(8)[0])
                    model.train()
            probe.step()
        found.append(probe.latest)
    same_record(*found)
    assert found[0].samples == 8 * tried.count(8)


class Brittle(torch.autograd.Function):
    """Raises in the middle of a backward pass over more than 8 samples."""

    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, grad):
        if len(grad) > 8:
            raise MemoryError
        return grad


def brittle(kit):
    """A network whose first layer's backward pass raises over more than 8 samples."""
    model = kit.build("conv")
    front = model[0].forward
    model[0].forward = lambda x: Brittle.apply(front(x))
    return model


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("checkpointed", [None, False, True])  # use_reentrant
@pytest.mark.parametrize("tried", [[32, 8], [8, 32, 8], [8, 8, 32], [32, 32, 8, 32]])
def test_a_backward_pass_that_raised_is_forgotten(kit, tried, checkpointed, told):
    found = []
    for also_large in (True, False):
        model = brittle(kit)
        if checkpointed is not None:
            last = model[-1]
            body = last.forward
            last.forward = lambda x, body=body: checkpoint(body, x, use_reentrant=checkpointed)
        with Probe(model) as probe:
            for i, size in enumerate(tried):
                x, y = kit.images(size, seed=i)
                if size == 8 or also_large:
                    if told:
                        probe.begin(x)
                    loss = F.cross_entropy(model(x), y)
                    with pytest.raises(MemoryError) if size > 8 else nullcontext():
                        loss.backward()
            probe.step()
        found.append(probe.latest)
    same_record(*found)
    assert found[0].samples == 8 * tried.count(8)


def test_nothing_is_measured_where_every_backward_pass_raised(kit):
    model = brittle(kit)
    x, y = kit.images(32)
    with Probe(model) as probe:
        with pytest.raises(MemoryError):
            F.cross_entropy(model(x), y).backward()
        with pytest.warns(RuntimeWarning, match="whose backward pass did, does not count"):
            probe.step()
    assert probe.latest is None


class InParts(Fragile):
    """Tries the whole batch in a call of itself, and where that raises the halves."""

    def forward(self, x):
        if len(x) <= self.most:
            return super().forward(x)
        try:
            return super().forward(x)
        except MemoryError:
            return torch.cat([self(half) for half in x.chunk(2)])


class Chunks(nn.Module):
    """Takes a large batch in parts, by calls of itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(48, 8), nn.Linear(8, 4)
        self.double()

    def forward(self, x):
        return torch.cat([self(part) for part in x.split(5)]) if len(x) > 5 else self.head(self.body(x.flatten(1)))


class Again(Chunks):
    """Has a layer that runs after a call of itself, on fewer samples."""

    def forward(self, x, again=True):
        h = F.relu(self.body(x.flatten(1)))
        return self.head(h) + (self(x[:3], again=False).mean(0) if again else 0)


@pytest.mark.parametrize("make", [Chunks, Again, InParts])
def test_a_pass_inside_a_pass_is_a_part_of_it(kit, make):
    model = InParts(kit.build("conv"), most=8) if make is InParts else make()
    x, y = kit.images(16)
    expected = measure(model, (x, y))
    with Probe(model) as probe:
        F.cross_entropy(model(x), y).backward()
        probe.step()
    close(probe.latest, expected)
    assert (probe.latest.samples, probe.latest.batches) == (16, 1)
    assert probe.latest.neurons == expected.neurons
    assert [a.samples for a in probe.latest.values()] == [a.samples for a in expected.values()]


def test_a_pass_inside_a_pass_that_raised_is_forgotten_alone(kit):
    class Careful(Again):
        def forward(self, x, again=True, fails=False):
            if again and fails:
                with pytest.raises(MemoryError):
                    self(x[:3], again=False, fails=True)
            elif fails:
                super().forward(x, again)
                raise MemoryError
            return super().forward(x, again)

    (x, y), found = kit.images(16), []
    for fails in (True, False):
        model = Careful()
        with Probe(model) as probe:
            F.cross_entropy(model(x, fails=fails), y).backward()
            probe.step()
        found.append(probe.latest)
    same_record(*found)
    assert found[0].samples == 16

"""What `Probe` leaves behind: the same weights, no hook in steps that are not due, no memory that grows."""

import copy
import gc
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from condzoo.probe import Probe


class Dropping(nn.Module):
    """Random numbers in every forward pass, also inside a checkpoint that draws them again."""

    def __init__(self, how):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(48, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.norm, self.relu, self.drop, self.how = nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.3), how

    def inner(self, h):
        return self.drop(self.relu(self.norm(self.body(h))))

    def forward(self, x):
        h = self.drop(self.stem(x.flatten(1)))
        h = self.inner(h) if self.how == "plain" else checkpoint(self.inner, h, use_reentrant=self.how == "reentrant")
        return self.head(h)


def train(kit, model, every, steps=5, after_step=None, **settings):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(3)
    with Probe(model, every=every, **settings) as probe:
        for step in range(steps):
            for half in range(2):
                x, y = kit.images(seed=2 * step + half, dtype=torch.float32)
                (F.cross_entropy(model(x), y) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            probe.step()
            if after_step is not None:
                after_step(probe)
    return torch.random.get_rng_state()


@pytest.mark.parametrize("how", ["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("precision", ["auto", "float64"])
def test_weights_statistics_and_random_numbers_are_bitwise_those_of_training_without_it(kit, how, precision):
    torch.manual_seed(0)
    without = Dropping(how)
    model = copy.deepcopy(without)
    stream = train(kit, without, 0)
    assert torch.equal(train(kit, model, 2, precision=precision), stream)
    for (name, a), (_, b) in zip(without.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def hooks_of(model):
    """Everything that hangs on modules and parameters."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    on_modules = [hook for m in model.modules() for kind in kinds for hook in getattr(m, kind)]
    on_weights = [hook for p in model.parameters() for hook in (p._backward_hooks or ())]
    return on_modules + on_weights + [p for p in model.parameters() if p._post_accumulate_grad_hooks]


def test_steps_that_are_not_due_have_no_hook_and_cost_a_counter(kit):
    model, seen, calls = kit.build("residual", torch.float32), [], []

    def look(probe):
        seen.append((probe.due, bool(hooks_of(model))))

    train(kit, model, 3, steps=7, after_step=look)
    assert seen == [(False, False), (False, False), (True, True)] * 2 + [(False, False)]
    assert not hooks_of(model)
    with Probe(model, every=1000, start_step=1) as probe:
        sys.setprofile(lambda frame, event, argument: calls.append((event, frame.f_code)))
        probe.step()
        sys.setprofile(None)
        assert not hooks_of(model)
    own = {code.co_name for event, code in calls if event == "call" and "condzoo" in code.co_filename}
    assert own == {"step", "due", "_must_be_open"}  # no work that a model's size could make longer


def test_no_memory_grows_with_the_number_of_probes(kit, tmp_path):
    model, sizes = Dropping("not reentrant"), []

    def look(probe):
        if probe._step in (4, 16):
            gc.collect()
            objects = gc.get_objects()
            tensors = [o for o in objects if issubclass(type(o), torch.Tensor)]
            tensors = [t for t in tensors if not is_lazy(t)]  # other tests' have no size, and sparse ones no nbytes
            held = sum(t.numel() * t.element_size() for t in tensors)
            sizes.append((len(tensors), held, len(objects)))

    train(kit, model, 1, steps=16, after_step=look, out=tmp_path)
    early, late = sizes
    assert late[0] <= early[0], "tensors stay"  # fewer where what other tests left is gone by then
    assert late[1] <= early[1]
    assert late[2] - early[2] < 12 * 3, "a probe leaves several objects behind"


class Listening(TorchFunctionMode):
    """Every torch function that runs while it is on, by name."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_a_torch_function_mode_sees_the_network_and_not_the_measuring(kit):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    x, y = kit.images(dtype=torch.float32)
    model(x)
    with Probe(model, every=1) as probe, Listening() as mode:
        F.cross_entropy(model(x), y % 5).backward()
        seen = set(mode.names)
        probe.step()
    assert {"conv2d", "relu", "linear", "backward"} <= seen
    assert not seen & {"bmm", "matmul", "vector_norm", "cholesky_ex", "sum", "amax", "amin"}
    assert probe.latest.neurons["1"].units == 4
    assert probe.latest["0"].input.lambda_max > 0


@pytest.mark.parametrize("told", [False, True])
def test_a_flop_counter_counts_the_network_alone(kit, told):
    def counted(every):
        model = kit.build("conv")
        with Probe(model, every=every) as probe, FlopCounterMode(display=False) as counter:
            x, y = kit.images()
            if told:
                probe.begin(x)
            F.cross_entropy(model(x), y).backward()
            probe.step()
        return counter.get_total_flops()

    assert counted(1) == counted(0) > 0

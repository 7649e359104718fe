"""A Probe beside other things on the same model: another Probe, `measure`, copies, what is compiled or scripted."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from condzoo.probe import Probe, curvature, measure

SAMPLES = 6


class Net(nn.Module):
    """Attention, a functional ReLU and a linear layer."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(F.relu(self.mix(x, x, x)[0]).mean(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


def batch(samples=SAMPLES):
    generator = torch.Generator().manual_seed(samples)
    return torch.randn((samples, 5, 8), generator=generator), torch.randint(3, (samples,), generator=generator)


def train_a_step(model):
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()


def numbers(c):
    layers = {n: (v.input.lambda_max, v.output_grad.lambda_max, v.weight_grad, v.samples) for n, v in c.items()}
    return c.samples, c.batches, c.neurons, layers


def alone(model):
    model = copy.deepcopy(model)
    with Probe(model, every=1) as probe:
        train_a_step(model)
        probe.step()
    return numbers(probe.latest)


def test_two_probes_at_once_see_the_same_and_leave_nothing_behind(model):
    linear, expected = F.linear, alone(model)
    with Probe(model, every=1) as one, Probe(model, every=1) as other:
        train_a_step(model)
        one.step(), other.step()
    assert F.linear is linear
    assert not _get_current_function_mode_stack()
    assert numbers(one.latest) == numbers(other.latest) == expected


@pytest.mark.parametrize(
    "between",
    [
        lambda model: measure(model, batch(4)),
        lambda model: measure(model, batch(4), labels="model"),
        lambda model: curvature(model, *batch(4), block="head"),
    ],
)
def test_a_measurement_in_a_step_that_is_due_is_none_of_its(model, between):
    linear, expected = F.linear, alone(model)
    with Probe(model, every=1) as probe:
        between(model)
        train_a_step(model)
        between(model)
        probe.step()
    assert F.linear is linear
    assert numbers(probe.latest) == expected


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_probed_model_is_not_probed(model, copied, tmp_path):
    pytest.importorskip("tensorboard")
    expected = alone(model)
    with Probe(model, every=1, tensorboard=tmp_path) as probe:
        twin = copied(model)
        twin(batch()[0]).sum().backward()
        train_a_step(model)
        probe.step()
    assert numbers(probe.latest) == expected


def test_a_compiled_model_is_measured_uncompiled(model):
    expected = numbers(measure(model, batch()))
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    compiled(batch()[0])
    before = len(calls)
    assert before
    assert numbers(measure(compiled, batch())) == expected
    assert len(calls) == before


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripted_parts_are_skipped_by_name():
    model = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 3))
    c = measure(model, (torch.randn(6, 8), torch.randint(3, (6,))))
    assert list(c) == ["0", "2"]
    assert "1.0" in c.skipped


@pytest.mark.parametrize("checkpointed", [False, True])
def test_two_networks_that_share_a_trunk_have_their_own_rows_each(checkpointed):
    class Task(nn.Module):
        def __init__(self, trunk, classes):
            super().__init__()
            self.stem, self.trunk, self.head = nn.Linear(6, 6), trunk, nn.Linear(5, classes)

        def forward(self, x):
            h = self.stem(x)
            return self.head(checkpoint(self.trunk, h, use_reentrant=False) if checkpointed else self.trunk(h))

    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True))
    models = [Task(trunk, 3).double(), Task(trunk, 2).double()]
    batches = [(torch.randn(n, 6).double(), torch.arange(n) % k) for n, k in ((9, 3), (14, 2))]
    alone = []
    for model, (x, y) in zip(models, batches, strict=True):
        with Probe(model) as probe:
            F.cross_entropy(model(x), y).backward()
            probe.step()
        alone.append(probe.latest)
    with Probe(models[0]) as first, Probe(models[1]) as second:
        for model, (x, y) in zip(models, batches, strict=True):
            F.cross_entropy(model(x), y).backward()
        for model, (x, _) in zip(models, batches, strict=True):
            model.trunk(model.stem(x)).sum().backward()  # a part, outside of a call of the network
        first.step()
        second.step()
    for probe, expected in zip((first, second), alone, strict=True):
        assert (probe.latest.samples, probe.latest.neurons) == (expected.samples, expected.neurons)
        assert list(probe.latest) == list(expected)
        for name in expected:
            for side in ("input", "output_grad"):
                a, b = getattr(probe.latest[name], side), getattr(expected[name], side)
                assert (a.rows, a.eigenvalues.tolist()) == (b.rows, b.eigenvalues.tolist())


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_network_that_is_scripted_as_a_whole_is_refused_by_a_probe_and_its_layers_are_named():
    model = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)))
    with pytest.raises(
        ValueError, match=r"the model is a RecursiveScriptModule, which takes no hooks; train the module"
    ):
        Probe(model)
    found = measure(model, (torch.randn(6, 8), torch.arange(6) % 3))
    assert (len(found), set(found.skipped)) == (0, {"0", "2"})


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # of jaxtyping, which checks here
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_export_in_a_step_that_is_due_is_of_the_network_alone(mode, strict):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    x, y = torch.randn(10, 6), torch.arange(10) % 4
    expected = [node.target for node in torch.export.export(model, (x,), strict=strict).graph.nodes]
    with Probe(model) as probe:
        with torch.no_grad():
            exported = torch.export.export(model.train(mode == "train"), (x,), strict=strict)
        F.cross_entropy(model.train()(x), y).backward()
        probe.step()
    assert [node.target for node in exported.graph.nodes] == expected
    assert (probe.latest.samples, probe.latest["0"].input.rows) == (10, 10)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_network_that_is_scripted_in_a_step_that_is_due_says_why_it_cannot_be():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with Probe(model, every=2) as probe:
        with pytest.raises(AttributeError, match=r"of a condzoo.Probe; script the model in a step that is not due"):
            torch.jit.script(model)
        F.cross_entropy(model(torch.randn(10, 6)), torch.arange(10) % 4).backward()
        probe.step()
        torch.jit.script(model)

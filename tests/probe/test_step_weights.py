"""Which weights and which of their gradients a `Probe` takes for those of its training step."""

import warnings
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.multiprocessing  # tells ForkingPickler how to take tensors
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from condzoo.probe import Probe


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4)).double()


def batch(seed=0, samples=10):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn((samples, 6), generator=generator), torch.randint(4, (samples,), generator=generator)
    return x.double(), y


def largest(matrix):
    return float(torch.linalg.matrix_norm(matrix.detach(), 2))


def pruned(layer):
    prune.l1_unstructured(layer, "weight", amount=0.3)


def old_norm(kind):
    def applied(layer):
        if not hasattr(layer, "weight_g") and not hasattr(layer, "weight_u"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                getattr(nn.utils, kind)(layer)

    return applied


def doubled(layer):
    if "weight" in layer._parameters:
        original = layer._parameters.pop("weight")
        layer.register_parameter("original", original)
        layer.register_forward_pre_hook(lambda module, args: setattr(module, "weight", 2 * module.original))


COMPUTED = {"pruned": pruned, "spectral_norm": old_norm("spectral_norm"), "weight_norm": old_norm("weight_norm")}


@pytest.mark.parametrize("compute", [*COMPUTED.values(), doubled], ids=[*COMPUTED, "by_a_hook"])
@pytest.mark.parametrize("at", [{0}, {1, 2}])
def test_a_weight_that_a_hook_comes_to_compute_is_the_one_of_the_pass(compute, at):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Probe(model, every=1) as probe:
        for step in range(4):
            if step in at:
                compute(model[2])
            x, y = batch(step)
            optimizer.zero_grad()
            output = model(x)
            used = model[2].weight
            used.retain_grad()
            F.cross_entropy(output, y).backward()
            expected = largest(used), largest(used.grad)
            optimizer.step()
            probe.step()
            assert (probe.latest["2"].weight, probe.latest["2"].weight_grad) == pytest.approx(expected, rel=1e-9)


def test_a_packed_weight_that_comes_to_be_pruned_is_the_one_of_the_pass():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 4)

        def forward(self, x):
            return self.head(self.mix(x, x, x)[0].mean(1))

    torch.manual_seed(0)
    model = Mixing().double()
    x, y = batch()
    with Probe(model) as probe:
        prune.l1_unstructured(model.mix, "in_proj_weight", amount=0.3)
        output = model(torch.stack([x, x.roll(1, 1)], 1))
        used = model.mix.in_proj_weight
        used.retain_grad()
        F.cross_entropy(output, y).backward()
        expected = largest(used), largest(used.grad)
        probe.step()
    found = probe.latest["mix.in_proj"]
    assert (found.weight, found.weight_grad) == pytest.approx(expected, rel=1e-9)


def fisher(model, x, y):
    """As of elastic weight consolidation."""
    model.eval()
    for one in range(3):
        torch.autograd.grad(F.cross_entropy(model(x[one : one + 1]), y[one : one + 1]), list(model.parameters()))


def validation(model, x, y):
    """A gradient of other data, which is then put aside."""
    model.eval()
    kept = {p: p.grad for p in model.parameters()}
    F.cross_entropy(model(x.flip(1)), y).backward()
    for parameter, grad in kept.items():
        parameter.grad = grad


def trace_of_hessian(model, x, y):
    model.eval()
    parameters = list(model.parameters())
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
    torch.autograd.grad(sum(grad.sum() for grad in grads), parameters)


def averaged(model, x, y):
    """Other weights in the place of the model's own."""
    model.eval()
    others = {name: (2 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    F.cross_entropy(functional_call(model, others, (x,)), y).backward()


def a_part(model, x, y):
    """No call of the model, though in train mode."""
    model[2](model[1](model[0](x))).square().sum().backward()


def nested(model, x, y):
    """On sequences of several lengths."""
    model.eval()
    output = model[:3](torch.nested.nested_tensor([x[:3], x[3:]]))  # tanh has no backward pass for these
    sum(part.sum() for part in output.unbind()).backward()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("beside", [fisher, validation, trace_of_hessian, averaged, a_part, nested])
@pytest.mark.parametrize("when", ["before", "between", "after"])
@pytest.mark.parametrize("layers", [None, ["2"]], ids=["all", "one"])
def test_backward_passes_of_what_is_not_read_are_no_part_of_a_weights_gradient(beside, when, layers):
    def measured(beside):
        model = net()
        with Probe(model, layers=layers, loss_scale=1 / 2) as probe:
            for seed in range(2):
                x, y = batch(seed)
                for now in ("before", "between", "after"):
                    if beside is not None and now == when:
                        beside(model, x, y)
                        model.train()
                    if now == "before":
                        loss = F.cross_entropy(model(x), y) / 2
                    elif now == "between":
                        loss.backward()
            probe.step()
        return probe.latest

    alone, found = measured(None), measured(beside)
    assert list(found) == list(alone)
    for name, layer in alone.items():
        assert (found[name].weight, found[name].weight_grad) == (layer.weight, layer.weight_grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_nor_are_they_under_checkpoints(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inside, self.last = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 4)

        def forward(self, x):
            h = torch.tanh(self.first(x))
            h = checkpoint(self.inside, h, use_reentrant=reentrant) if self.training else self.inside(h)
            return self.last(torch.tanh(h))

    def measured(beside):
        torch.manual_seed(0)
        model = Checkpointed().double()
        x, y = batch()
        with Probe(model) as probe:
            loss = F.cross_entropy(model(x), y)
            if beside is not None:
                beside(model, x, y)
            model.train().zero_grad()
            loss.backward()
            expected = {name: largest(m.weight.grad) for name, m in model.named_children()}
            if beside is not None:
                beside(model, x, y)
            probe.step()
        assert {name: layer.weight_grad for name, layer in probe.latest.items()} == pytest.approx(expected, rel=1e-9)

    for beside in (None, fisher, validation):
        measured(beside)


class Recomputed(torch.autograd.Function):
    """As checkpoints of other libraries."""

    @staticmethod
    def forward(ctx, run, x, *parameters):
        ctx.run, ctx.parameters = run, parameters
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            torch.autograd.backward(ctx.run(x), grad)
        return (None, x.grad, *[None] * len(ctx.parameters))


class Adjoint(Recomputed):
    """As torchdiffeq's: the parameters' gradients are handed on."""

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            return None, *torch.autograd.grad(ctx.run(x), [x, *ctx.parameters], grad)


@pytest.mark.parametrize("function", [Recomputed, Adjoint])
def test_a_gradient_that_a_function_takes_and_hands_on_in_its_backward_counts_once(function):
    class Within(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inside, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            h = torch.tanh(self.first(x))
            for _ in range(2):
                h = function.apply(lambda x: torch.tanh(self.inside(x)), h, *self.inside.parameters())
            return self.last(self.inside(h))

    torch.manual_seed(0)
    model = Within().double()
    with Probe(model, loss_scale=1 / 2) as probe:
        for seed in range(2):
            x, y = batch(seed)
            (F.cross_entropy(model(x), y) / 2).backward()
        expected = {name: largest(layer.weight.grad) for name, layer in model.named_children()}
        probe.step()
    assert {name: layer.weight_grad for name, layer in probe.latest.items()} == pytest.approx(expected, rel=1e-9)


def test_a_weight_that_is_made_of_the_layers_own_counts_once():
    class Adapted(nn.Module):
        """A low-rank change is put in for the call of the layer."""

        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
            self.up, self.down = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 6))

        def forward(self, x):
            weight = self.inner.weight + self.up @ self.down
            return self.head(torch.tanh(functional_call(self.inner, {"weight": weight}, (x,))))

    torch.manual_seed(0)
    model = Adapted().double()
    with Probe(model, loss_scale=1 / 2) as probe:
        for seed in range(2):
            x, y = batch(seed)
            (F.cross_entropy(model(x), y) / 2).backward()
        expected = largest(model.inner.weight.grad), largest(model.inner.weight + model.up @ model.down)
        probe.step()
    found = probe.latest["inner"]
    assert (found.weight_grad, found.weight) == pytest.approx(expected, rel=1e-9)


def test_a_penalty_that_is_differentiated_by_itself_is_one_pass_of_two():
    """Of a network of ReLUs: no gradient of the penalty comes to the output of a layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)).double()
    x, _ = batch()
    with Probe(model) as probe:
        x.requires_grad_()
        output = model(x).sum()
        (slope,) = torch.autograd.grad(output, x, create_graph=True)
        output.backward(retain_graph=True)
        slope.square().sum().backward()
        expected = {name: largest(model[int(name)].weight.grad) / 2 for name in ("0", "2")}
        probe.step()
    assert {name: layer.weight_grad for name, layer in probe.latest.items()} == pytest.approx(expected, rel=1e-9)


def test_a_model_that_is_sent_to_another_process_in_a_step_that_is_due_warns_of_nothing():
    model = net()
    with Probe(model) as probe, warnings.catch_warnings():
        warnings.simplefilter("error")
        x, y = batch()
        F.cross_entropy(model(x), y).backward()
        assert ForkingPickler.dumps(model)
        probe.step()


class Gathers(nn.Module):
    """Puts its layer's weight together for each pass, as sharded training does, and calls a function on it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.flat = nn.Parameter(self.fc.weight.detach().flatten())
        del self.fc.weight

    def forward(self, x):
        self.fc.weight = self.flat.view(3, 4)
        return F.linear(x, self.fc.weight, self.fc.bias)


def test_a_gathered_weight_that_a_function_uses_has_norms():
    torch.manual_seed(0)
    model, x, y = Gathers(), torch.randn(6, 4), torch.randint(3, (6,))
    with Probe(model) as probe:
        F.cross_entropy(model(x), y).backward()
        probe.step()
    found = probe.latest["fc"]
    assert found.weight == pytest.approx(largest(model.fc.weight), rel=1e-6)
    assert found.weight_grad == pytest.approx(largest(model.flat.grad.view(3, 4)), rel=1e-6)

"""`Probe` under activation checkpointing, which repeats forward passes within the backward pass."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from condzoo.probe import Probe, measure


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(kit, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body, self.head = nn.Linear(48, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.relu, self.on = nn.ReLU(), False

        def inner(self, h):
            return self.relu(self.body(h))

        def forward(self, x):
            h = self.stem(x.flatten(1))
            h = checkpoint(self.inner, h, use_reentrant=reentrant) if self.on else self.inner(h)
            return self.head(h)

    torch.manual_seed(0)
    model = Checkpointed().double()
    found = []
    for model.on in (False, True):
        with Probe(model) as probe:
            F.cross_entropy(model(kit.images()[0]), kit.images()[1]).backward()
            probe.step()
        model.zero_grad()
        found.append(probe.latest)
    plain, checkpointed = found
    assert list(plain) == list(checkpointed) == ["stem", "body", "head"]
    for name in plain:
        assert torch.equal(plain[name].input.eigenvalues, checkpointed[name].input.eigenvalues)
        assert torch.equal(plain[name].output_grad.eigenvalues, checkpointed[name].output_grad.eigenvalues)
        assert checkpointed[name].samples == 12
    assert checkpointed.neurons["relu"] == plain.neurons["relu"]


@pytest.mark.parametrize("order", ["outside, inside", "inside, outside", "twice inside", "two checkpoints", "nested"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_layer_that_is_called_twice_is_measured_once_a_call_under_checkpointing(order, reentrant):
    def run(f, h):
        return checkpoint(f, h, use_reentrant=reentrant) if model.on else f(h)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body, self.head, self.relu = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3), nn.ReLU()

        def forward(self, x):
            h, f = self.relu(self.stem(x)), lambda h: self.relu(self.body(h))
            return self.head(
                {
                    "outside, inside": lambda: run(f, f(h)),
                    "inside, outside": lambda: f(run(f, h)),
                    "twice inside": lambda: run(lambda h: f(f(h)), h),
                    "two checkpoints": lambda: run(f, run(f, h)),
                    "nested": lambda: run(lambda h: f(run(f, h)), h),
                }[order]()
            )

    torch.manual_seed(0)
    model, found = Shared().double(), []
    x, y = torch.randn(9, 6).double(), torch.randint(3, (9,))
    for model.on in (False, True):
        with Probe(model) as probe:
            F.cross_entropy(model(x), y).backward()
            probe.step()
        model.zero_grad()
        found.append(probe.latest)
    plain, checkpointed = found
    assert plain["body"].input.rows == 18
    assert checkpointed.neurons == plain.neurons
    assert list(plain) == list(checkpointed)
    for name in plain:
        a, b = plain[name], checkpointed[name]
        assert (a.samples, a.input.rows, a.output_grad.rows) == (b.samples, b.input.rows, b.output_grad.rows)
        assert torch.allclose(a.input.eigenvalues, b.input.eigenvalues, rtol=1e-10, atol=1e-14)
        assert torch.allclose(a.output_grad.eigenvalues, b.output_grad.eigenvalues, rtol=1e-10, atol=1e-14)
        assert b.weight_grad == pytest.approx(a.weight_grad, rel=1e-12)


class Checkpointed(nn.Module):
    """A layer inside a checkpoint, between two outside."""

    def __init__(self, reentrant):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x):
        return self.head(checkpoint(self.body, self.stem(x), use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("between", ["no_grad", "eval"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_validation_pass_before_the_backward_pass_hides_no_repetition(between, reentrant):
    torch.manual_seed(0)
    model, x, y = Checkpointed(reentrant).double(), torch.randn(9, 6).double(), torch.randint(3, (9,))
    found = []
    for validated in (False, True):
        with Probe(model) as probe:
            loss = F.cross_entropy(model(x), y)
            if validated:
                with torch.set_grad_enabled(between == "eval"):
                    model.train(between == "no_grad")
                    model(x[:4])
                    model.train()
            loss.backward()
            probe.step()
        found.append(probe.latest)
    plain, validated = found
    assert list(plain) == list(validated) == ["stem", "body", "head"]
    for name in plain:
        assert torch.equal(plain[name].output_grad.eigenvalues, validated[name].output_grad.eigenvalues)


def test_a_pass_without_gradients_within_a_pass_hides_nothing_after_it():
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x, own=None):
            h = self.first(x)
            if own is None:
                with torch.no_grad():
                    own = self(x, own=torch.zeros_like(x))
            return self.second(h + own)

    torch.manual_seed(0)
    model, x = Conditioned().double(), torch.randn(9, 6).double()
    with Probe(model) as probe:
        model(x).square().mean().backward()
        probe.step()
    assert list(probe.latest) == ["first", "second"]
    assert probe.latest.samples == 9


class Repeated(torch.autograd.Function):
    """A checkpoint that is not torch's, as Megatron's and RevNet's are."""

    @staticmethod
    def forward(ctx, run, x, *weights):
        ctx.run, ctx.count = run, len(weights)
        ctx.save_for_backward(x)
        return run(x)  # without gradients

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            torch.autograd.backward(ctx.run(x), grad)
        return None, x.grad, *[None] * ctx.count


class Repeating(nn.Module):
    """Layers inside such a checkpoint, between two outside; one that only runs without gradients."""

    def __init__(self, on):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.inner, self.stem = (
            nn.Linear(5, 3),
            nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 5)),
            nn.Linear(6, 7),
        )
        self.target, self.unused, self.on = nn.Linear(6, 7), nn.Linear(6, 7), on
        self.double()

    def forward(self, x):
        with torch.no_grad():
            start = self.head(torch.ones(2, 5, dtype=x.dtype)).mean(0) + self.target(x).mean()
        h = self.stem(x)
        h = Repeated.apply(self.inner, h, *self.inner.parameters()) if self.on else self.inner(h)
        return self.head(h.relu()) + start


@pytest.mark.parametrize("by", ["Probe", "measure"])
def test_layers_inside_checkpoints_that_are_not_torchs_are_in_forward_order(by):
    torch.manual_seed(1)
    x, y, found = torch.randn(9, 6).double(), torch.randint(3, (9,)), []
    for on in (False, True):
        model = Repeating(on)
        if by == "measure":
            found.append(measure(model, (x, y)))
            continue
        with Probe(model) as probe:
            F.cross_entropy(model(x), y).backward()
            probe.step()
        found.append(probe.latest)
    plain, repeated = found
    assert list(repeated) == list(plain) == ["stem", "inner.0", "inner.1", "head"]
    assert repeated.skipped == plain.skipped
    assert all("only without gradients" in plain.skipped[name] for name in ("target", "unused"))
    for name, layer in plain.items():
        assert torch.allclose(
            repeated[name].output_grad.eigenvalues, layer.output_grad.eigenvalues, rtol=1e-9, atol=1e-15
        )


@pytest.mark.parametrize("order", ["each at once", "all before all", "one twice", "one twice, around another"])
def test_each_of_several_passes_counts_once_whatever_the_order_of_their_backward_passes(order):
    backwards = {
        "each at once": "f0 b0 f1 b1",
        "all before all": "f0 f1 b0 b1",
        "one twice": "f0 b0 b0 f1 b1",
        "one twice, around another": "f0 f1 b0 b1 b0",
    }[order]
    x, y = torch.randn(9, 6).double(), torch.randint(3, (9,))
    x, y, found = x.split([2, 7]), y.split([2, 7]), []
    for reentrant in (False, True):
        torch.manual_seed(0)
        model, losses = Checkpointed(reentrant).double(), {}
        with Probe(model, loss_scale=0.5) as probe:
            for what, i in ((call[0], int(call[1])) for call in backwards.split()):
                if what == "f":
                    losses[i] = F.cross_entropy(model(x[i]), y[i]) / 2
                else:
                    losses[i].backward(retain_graph=True)
            probe.step()
        found.append(probe.latest)
    kept, repeated = found
    assert list(repeated) == list(kept) == ["stem", "body", "head"]
    for name, layer in kept.items():
        a, b = layer, repeated[name]
        assert (a.samples, a.input.rows, a.output_grad.rows) == (b.samples, b.input.rows, b.output_grad.rows)
        assert torch.allclose(a.input.eigenvalues, b.input.eigenvalues, rtol=1e-9, atol=1e-15)
        assert torch.allclose(a.output_grad.eigenvalues, b.output_grad.eigenvalues, rtol=1e-9, atol=1e-15)


class ByProducts(nn.Module):
    """Attention as products of matrices, one layer's weight computed."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.out = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))

    def forward(self, x):
        return F.relu(self.out((self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("saved", ["bmm", "all products"])
def test_activation_checkpointing_that_saves_some_products_trains_as_without_a_probe(saved, whole):
    aten = torch.ops.aten
    more = [] if saved == "bmm" else [aten.mm.default, aten.addmm.default, aten.sum.default, aten.gt.Scalar]
    contexts = partial(create_selective_checkpoint_contexts, [aten.bmm.default, *more])

    def trained(every, selective=True):
        torch.manual_seed(0)
        model = nn.Sequential(ByProducts(), ByProducts(), nn.Linear(6, 4)).double()
        for module in ([model] if whole else list(model)) if selective else ():
            body = type(module).forward.__get__(module)
            module.forward = partial(checkpoint, body, use_reentrant=False, context_fn=contexts)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Probe(model, every=every) as probe:
            for step in range(2):
                x = torch.randn((12, 5, 6), generator=torch.Generator().manual_seed(step)).double()
                optimizer.zero_grad()
                F.cross_entropy(model(x).mean(1), torch.arange(12) % 4).backward()
                optimizer.step()
                probe.step()
        return model.state_dict(), probe.latest

    (alone, _), (probed, latest), (_, plain) = trained(0), trained(1), trained(1, selective=False)
    assert all(torch.equal(value, probed[name]) for name, value in alone.items())
    assert list(latest) == list(plain)
    for name in plain:
        a, b = latest[name], plain[name]
        assert (a.samples, a.output_grad.rows) == (b.samples, b.output_grad.rows)
        assert torch.allclose(a.output_grad.eigenvalues, b.output_grad.eigenvalues, rtol=1e-9, atol=1e-15)

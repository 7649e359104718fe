"""Batches and outputs of every form give the numbers of the plain pair."""

import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from condzoo.probe import Probe, measure
from condzoo.probe.batches import batch_size, on_device
from tests.forked import forks, run_anew


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


class Keyword(nn.Module):
    """Called as Hugging Face's classifiers are: by keywords, labels or not, an output object."""

    def __init__(self, factor=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head, self.factor = nn.Linear(4, 6), nn.Linear(6, 3), factor

    def forward(self, pixel_values, mask=None, labels=None):
        logits = self.head(torch.tanh(self.first(pixel_values)))
        return Output(logits, None if labels is None else self.factor * F.cross_entropy(logits, labels))


class Plain(Keyword):
    def forward(self, x, scale=None):
        return super().forward(x if scale is None else x * scale).logits


def data(samples=10):
    generator = torch.Generator().manual_seed(0)
    return torch.randn((samples, 4), generator=generator).double(), torch.randint(3, (samples,), generator=generator)


def same(a, b, factor=1.0):
    assert list(a) == list(b)
    for name in a:
        assert torch.allclose(a[name].input.eigenvalues, b[name].input.eigenvalues, rtol=1e-12)
        mine, others = a[name].output_grad.eigenvalues, factor * b[name].output_grad.eigenvalues
        assert torch.allclose(mine, others, rtol=1e-10, atol=1e-15)


@pytest.fixture
def expected():
    return measure(Plain().double(), data())


def test_a_dict_with_labels_is_a_batch_and_the_models_own_loss_is_measured(expected):
    x, y = data()
    model = Keyword(factor=2.0).double()
    for batches in ({"pixel_values": x, "labels": y}, [{"pixel_values": x, "mask": None, "labels": y}]):
        found = measure(model, batches)
        same(found, expected, 4.0)
        assert (found.loss_name, expected.loss_name) == ("output.loss", "cross_entropy")
        assert found.loss == pytest.approx(2 * expected.loss)


def test_a_given_loss_is_used_instead_and_labels_do_not_reach_the_model(expected):
    x, y = data()
    model = Keyword(factor=2.0).double()
    for loss in (nn.CrossEntropyLoss(), lambda output, target: F.cross_entropy(output.logits, target)):
        same(measure(model, {"pixel_values": x, "labels": y}, loss=loss), expected)
    same(measure(model, ({"pixel_values": x}, y)), expected)


class Open(Keyword):
    def forward(self, **arguments):
        return super().forward(**arguments)


def test_labels_reach_a_model_whose_forward_takes_them_alone(expected):
    x, y = data()
    plain = measure(Plain().double(), {"x": x, "labels": y})
    same(plain, expected)
    assert plain.loss_name == "cross_entropy"
    for model in (Keyword(factor=2.0), Open(factor=2.0)):
        found = measure(model.double(), {"pixel_values": x, "labels": y})
        same(found, expected, 4.0)
    same(measure(Keyword(factor=2.0).double(), {"pixel_values": x, "label": y}), expected, 4.0)
    same(measure(torch.compile(Plain().double(), backend="eager"), {"x": x, "labels": y}), expected)


def test_labels_of_the_model_come_from_its_logits():
    x, y = data()
    same(
        measure(Keyword().double(), {"pixel_values": x, "labels": y}, labels="model"),
        measure(Plain().double(), (x, y), labels="model"),
    )


def test_tuples_of_arguments_and_named_tuples(expected):
    class Pair(NamedTuple):
        x: Tensor
        scale: Tensor

    x, y = data()
    ones = torch.ones(10, 1).double()
    same(measure(Plain().double(), [((x, ones), y)]), expected)
    same(measure(Plain().double(), [(Pair(x, ones), y)]), expected)


@pytest.mark.parametrize(
    ("loss", "reduction"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), None),
        (functools.partial(F.cross_entropy, reduction="sum"), None),
        (lambda output, y: F.cross_entropy(output, y, reduction="sum"), "sum"),
        (lambda output, y: F.cross_entropy(output, y), "mean"),
        (lambda output, y: F.cross_entropy(output, y, reduction="none"), None),
    ],
)
def test_reductions_are_known_by_name_or_given(expected, loss, reduction):
    x, y = data()
    found = measure(Plain().double(), [(x[:7], y[:7]), (x[7:], y[7:])], loss=loss, reduction=reduction)
    same(found, expected)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert found["head"].weight_grad == pytest.approx(expected["head"].weight_grad, rel=1e-10)


def test_mean_squared_error_and_binary_cross_entropy_on_data(expected):
    x, _ = data()
    target = torch.rand(10, 3, generator=torch.Generator().manual_seed(2)).double()
    model = Plain().double()
    p = model(x).detach()
    for loss, g in ((nn.MSELoss(), 2 / 3 * (p - target)), (nn.BCEWithLogitsLoss(), (p.sigmoid() - target) / 3)):
        found = measure(model, [(x[:4], target[:4]), (x[4:], target[4:])], loss=loss)["head"].output_grad
        assert torch.allclose(found.eigenvalues, torch.linalg.svdvals(g).square() / 10, rtol=1e-10)


def test_a_probe_takes_the_batch_from_the_first_tensor_anywhere(expected):
    x, y = data()
    model = Keyword().double()
    with Probe(model) as probe:
        model(mask=None, pixel_values=x, labels=y).loss.backward()
        probe.step()
    same(probe.latest, expected)
    assert probe.latest.samples == 10

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Plain()

        def forward(self, batch):
            return self.inner(batch["images"][0])

    nested = Nested().double()
    with Probe(nested) as probe:
        F.cross_entropy(nested({"images": [x]}), y).backward()
        probe.step()
    assert probe.latest["inner.head"].output_grad.lambda_max == pytest.approx(expected["head"].output_grad.lambda_max)


def test_what_is_no_batch_is_explained():
    x, y = data()
    model = Plain().double()
    with pytest.raises(
        TypeError, match=r"a dict must hold 'labels', got a dict with image, class; pass adapter=lambda"
    ):
        measure(model, [{"image": x, "class": y}])
    with pytest.raises(TypeError, match="must hold a tensor with a leading batch dimension, got dict of NoneType"):
        measure(model, [({"x": None}, y)])
    with pytest.raises(ValueError, match=r"logits .* got tuple and Tensor; pass loss=lambda output, y"):
        measure(nn.Sequential(model, Split()), (x, y))
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', got 'none'"):
        measure(model, (x, y), reduction="none")


class OfObjects(Plain):
    """Called on an object that holds the tensor, as networks of graphs are."""

    def forward(self, data):
        return super().forward(data.x)


def test_a_call_on_an_object_is_explained_and_measured_once_told_of_its_batch():
    (x, y), model = data(), OfObjects().double()
    with (
        Probe(model),
        pytest.raises(
            TypeError, match=r"called on SimpleNamespace, .* put probe\.begin\(batch\) before each such call"
        ),
    ):
        model(SimpleNamespace(x=x))
    found = []
    for told, call in ((model, SimpleNamespace(x=x)), (Plain().double(), x)):
        with Probe(told) as probe:
            probe.begin(y)
            F.cross_entropy(told(call), y).backward()
            probe.step()
        found.append(probe.latest)
    same(*found)
    assert found[0].samples == len(y)


def test_two_batches_are_not_taken_for_a_pair_nor_a_pair_for_two():
    x, y = data()
    plain = Plain().double()
    batch = {"x": x, "labels": y}
    adapter = lambda b: (b["x"], b["labels"])  # noqa: E731
    assert measure(plain, [batch, batch], adapter=adapter).samples == 2 * len(x)
    image = {"image": x, "target": y}
    assert measure(plain, [image, image], adapter=lambda b: (b["image"], b["target"])).samples == 2 * len(x)
    assert measure(plain, [(x, y), (x, y)]).samples == 2 * len(x)
    assert measure(plain, ((x,), y)).samples == len(x)
    for none in ({"target": y}, None, "train"):  # no batch, and so what belongs to the arguments
        assert measure(plain, ((x,), none), loss=lambda output, _: F.cross_entropy(output, y)).samples == len(x)
    assert measure(plain, [((x,), y), batch]).samples == 2 * len(x)


@forks
def test_arguments_of_a_wrong_kind_are_explained(tmp_path):
    """Imported anew: the tests' type checks would be first."""
    script = """
import torch
from condzoo.probe import Probe, curvature, kronecker_report, measure, spectrum
model, batch = torch.nn.Linear(4, 3), (torch.randn(9, 4), torch.randint(3, (9,)))
for call in (
    lambda: measure(model, batch, loss="mse"),
    lambda: measure(model, batch, loss=torch.nn.MSELoss),
    lambda: measure(model, batch, layers="fc"),
    lambda: measure(model, batch, layers=[0]),
    lambda: measure(model, None),
    lambda: measure("mlp4x24", batch),
    lambda: Probe("mlp4x24"),
    lambda: Probe(model, every="10"),
    lambda: Probe(model, every=1.5),
    lambda: Probe(model, every=True),
    lambda: Probe(model, start_step=None),
    lambda: Probe(model, loss_scale=None),
    lambda: Probe(model, out=5),
    lambda: Probe(model, tensorboard=5),
    lambda: curvature("mlp4x24", *batch),
    lambda: kronecker_report("mlp4x24", *batch),
):
    try:
        call()
    except (TypeError, ValueError) as error:
        print(error)
print(Probe(model, every=torch.tensor(10)).every)
print(spectrum([[2, 0], [0, 1]]).eigenvalues.tolist())
"""
    assert run_anew(script, tmp_path).splitlines() == [
        "loss must be a callable of (output, y), got 'mse'; for example torch.nn.MSELoss()",
        "loss must be a callable of (output, y), got <class 'torch.nn.modules.loss.MSELoss'>; make one: loss=MSELoss()",
        "layers must be a list of names, got a string; write layers=['fc']",
        "layers must be a list of names, got [0]",
        "batches must be a pair (x, y), or an iterable of such pairs, got None",
        "model must be a torch.nn.Module, got str 'mlp4x24'",
        "model must be a torch.nn.Module, got str 'mlp4x24'",
        "every must be a whole number of steps, got '10'",
        "every must be a whole number of steps, got 1.5",
        "every must be a whole number of steps, got True",
        "start_step must be a whole number of steps, got None",
        "loss_scale must be a number above 0, got None",
        "out must be a folder (a str or Path) or None, got 5",
        "tensorboard must be a folder or an open SummaryWriter, got 5",
        "model must be a torch.nn.Module, got str 'mlp4x24'",
        "model must be a torch.nn.Module, got str 'mlp4x24'",
        "10",
        "[2.0, 1.0]",
    ]


def test_what_cannot_be_measured_is_explained():
    x, y = data()
    model = Plain().double()
    with pytest.raises(ValueError, match="hold no sample: their leading dimension is 0"):
        measure(model, (x[:0], y[:0]), loss=lambda output, y: output.sum())
    with pytest.raises(ValueError, match="the loss does not depend on the model's parameters"):
        measure(model, (x, y), loss=lambda output, y: torch.ones(()))
    with pytest.raises(ValueError, match="the targets be a tensor, got Tensor and NoneType"):
        measure(model, (x, None))
    assert measure(model, (x, None), loss=lambda output, y: output.square().mean()).loss > 0


class Split(nn.Module):
    def forward(self, x):
        return x, x


def test_real_models_of_hugging_face(expected):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).double()
    batch = {"pixel_values": torch.randn(4, 3, 8, 8).double(), "labels": torch.tensor([0, 1, 2, 0])}
    found = measure(model, [batch])
    by_hand = measure(model, ({"pixel_values": batch["pixel_values"]}, batch["labels"]), loss=nn.CrossEntropyLoss())
    assert found.loss_name == "output.loss"
    assert len(found) == 8
    same(found, by_hand)
    assert measure(model, [batch], labels="model").labels == "model"


def test_the_linear_layers_of_gpt2_whose_weights_are_transposed():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 6}
    torch.manual_seed(0)
    model = (
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).double().eval()
    )
    ids = torch.randint(20, (4, 6))
    found = measure(model, {"input_ids": ids, "labels": ids})
    for module in [*model.modules()]:
        for name, layer in [*module.named_children()]:
            if type(layer).__name__ == "Conv1D":
                plain = nn.Linear(*layer.weight.shape).double()
                plain.weight, plain.bias = nn.Parameter(layer.weight.detach().mT.clone()), layer.bias
                setattr(module, name, plain)
    expected = measure(model, {"input_ids": ids, "labels": ids})
    assert [layer.kind for layer in found.values()] == ["Conv1D"] * 4 + ["Linear"]
    assert [layer.kind for layer in expected.values()] == ["Linear"] * 5
    same(found, expected)
    assert found.skipped == expected.skipped


def test_tensors_of_inference_mode_and_callers_in_it_are_measured(expected):
    model = Plain().double()
    with torch.inference_mode():
        same(measure(model, data()), expected)


def test_a_models_own_sum_is_divided_by_the_batch_where_that_is_said():
    class Summed(nn.Module):
        def __init__(self, reduction):
            super().__init__()
            self.head, self.reduction = nn.Linear(4, 3), reduction

        def forward(self, x, labels):
            logits = self.head(x)
            loss = nn.functional.cross_entropy(logits, labels, reduction=self.reduction)
            return {"logits": logits, "loss": loss}

    generator = torch.Generator().manual_seed(0)
    batch = {
        "x": torch.randn((20, 4), generator=generator),
        "labels": torch.randint(3, (20,), generator=generator),
    }
    found = []
    for reduction in ("mean", "sum"):
        torch.manual_seed(0)
        found.append(measure(Summed(reduction), batch, reduction=reduction))
    of_mean, of_sum = found
    assert of_sum.loss == pytest.approx(of_mean.loss, rel=1e-6)
    expected = of_mean["head"].output_grad.eigenvalues
    assert torch.allclose(of_sum["head"].output_grad.eigenvalues, expected, rtol=1e-5, atol=1e-12)
    assert of_sum["head"].weight_grad == pytest.approx(of_mean["head"].weight_grad, rel=1e-5)


class Detector(nn.Module):
    """Takes images of several sizes in a list, as torchvision's detection models do, and returns its loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, 2)

    def forward(self, images, targets=None):
        logits = self.head(torch.stack([image.mean((1, 2)) for image in images]))
        return Output(logits, None if targets is None else F.cross_entropy(logits, torch.stack(list(targets))))


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_images_is_a_batch_of_its_length(kind):
    generator = torch.Generator().manual_seed(0)
    images = kind(torch.randn((3, 4, 4 + i), generator=generator).double() for i in range(5))
    targets = kind(torch.randint(2, (5,), generator=generator))
    model, plain = Detector().double(), Detector().double().head
    x = torch.stack([image.mean((1, 2)) for image in images])
    expected = measure(plain, (x, torch.stack(list(targets))))[""].output_grad.eigenvalues
    for batch in ((images, targets), {"images": images, "targets": targets}):
        with Probe(model) as probe:
            (model(*batch) if isinstance(batch, tuple) else model(**batch)).loss.backward()
            probe.step()
        at_rest = measure(model, [(batch, None)], loss=lambda output, y: output.loss)
        for found in (probe.latest, at_rest):
            assert found.samples == 5
            assert torch.allclose(found["head"].output_grad.eigenvalues, expected, rtol=1e-10)
    of_detectron2 = [{"image": image, "height": 4} for image in images]
    assert batch_size(of_detectron2) == batch_size([(of_detectron2,), {}]) == batch_size((of_detectron2, targets)) == 5
    source, target = torch.ones(6, 9, 2), torch.ones(6, 7, 2)
    assert batch_size((source, target)) == batch_size([(source, target), {}]) == batch_size(([source, target],)) == 6


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[1][0][-1])


def test_a_packed_sequence_is_one_argument_and_as_many_samples_as_sequences():
    x = torch.randn((3, 7, 4), generator=torch.Generator().manual_seed(0))
    packed, y = pack_padded_sequence(x, torch.full((3,), 7), batch_first=True), torch.tensor([0, 2, 1])
    model = Recurrent()
    expected = measure(model, (x, y))["head"].output_grad.eigenvalues
    with Probe(model) as probe:
        F.cross_entropy(model(packed), y).backward()
        probe.step()
    at_rest = measure(model, (packed, y), certify=True)
    assert at_rest.certificate["head"]["output_grad_lambda_max"] < 1e-4
    for found in (probe.latest, at_rest):
        assert found.samples == 3
        assert torch.allclose(found["head"].output_grad.eigenvalues, expected, rtol=1e-4, atol=1e-9)
    moved = on_device(packed._replace(sorted_indices=torch.arange(3)), torch.device("meta"))
    assert [t.device.type for t in (moved.data, moved.sorted_indices, moved.batch_sizes)] == ["meta", "meta", "cpu"]


@dataclass(frozen=True)
class Held:
    """A batch as a dataclass; its first field is no tensor."""

    name: str
    x: Tensor
    y: Tensor


def test_a_dataclass_is_looked_into_where_there_is_no_other_tensor():
    (x, y), model = data(), OfObjects().double()
    batch = Held("a", x, y)
    expected = measure(Plain().double(), (x, y))["head"].output_grad.eigenvalues
    with Probe(model) as probe:
        F.cross_entropy(model(batch), y).backward()
        probe.step()
    for found in (probe.latest, measure(model, (batch, y))):
        assert found.samples == len(x)
        assert torch.equal(found["head"].output_grad.eigenvalues, expected)
    assert batch_size([(Held("a", x[:3], y), x), {}]) == len(x)
    assert on_device(batch, torch.device("meta")).x.is_meta
    assert batch.x is x
    assert measure(model, (batch, y), certify=True).certificate["head"]["output_grad_lambda_max"] < 1e-9


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_has_as_many_samples_as_parts_and_what_reads_it_is_named(layout):
    class Ragged(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, x):
            return self.head(torch.stack([part.mean(0) for part in torch.relu(self.inner(x)).unbind()]))

    model, y = Ragged(), torch.tensor([0, 1, 3])
    x = torch.nested.nested_tensor([torch.randn(t, 6) for t in (3, 5, 2)], layout=layout)
    with Probe(model) as probe:
        F.cross_entropy(model(x), y).backward()
        probe.step()
    for found in (probe.latest, measure(model, [(x, y)])):
        assert found.samples == 3
        assert list(found) == ["head"]
        assert "nested" in found.skipped["inner"]
    assert batch_size((x, x)) == 3

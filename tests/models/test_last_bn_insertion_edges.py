"""insert_last_bn: what it leaves as it was, where the layer goes, and what it refuses."""

import copy
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from condzoo.models.last_bn_insertion import insert_last_bn
from condzoo.models.registry import create_model


class Net(nn.Module):
    """A classifier of no library: its head is its last layer."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.hidden, self.drop, self.out = nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # [B, ..., 6] -> [B, ..., 3]
        return self.out(self.drop(self.hidden(x).relu()))


def data(n: int = 40) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(0))


def test_head_by_position_dropout_after_and_leading_dimensions_flattened():
    plain = Net().eval()
    x = data().reshape(4, 10, 6)
    model = insert_last_bn(copy.deepcopy(plain), x)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)
    seen = []
    model.drop.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model(x)
    h = seen[0].reshape(-1, 8)
    torch.testing.assert_close(h.mean(0), torch.zeros(8), rtol=0, atol=1e-5)  # normalized before the dropout


def test_a_head_without_a_bias_gets_one():
    plain = Net(bias=False).eval()
    model = insert_last_bn(copy.deepcopy(plain), data())
    torch.testing.assert_close(model(data()), plain(data()), rtol=1e-5, atol=1e-5)
    assert model.out.bias.abs().max() > 0
    again = copy.deepcopy(model)
    again.load_state_dict(plain.state_dict())  # which has none
    assert torch.equal(again.out.bias, torch.zeros(3))
    torch.testing.assert_close(again(data()), plain(data()))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(data()), model(data()))
    with pytest.raises(RuntimeError, match=r"hidden\.weight"):
        again.load_state_dict({"out.weight": plain.out.weight})
    assert insert_last_bn(plain).out.bias is None  # the identity needs none


def test_statistics_weigh_examples_and_do_not_cancel():
    net = Net().double().eval()
    net.hidden.bias.data += 1e4  # mean^2 is 1e8 of the variance and more
    x = data(23).double()
    model = insert_last_bn(copy.deepcopy(net), [x[:20], x[20:22], x[22:]])
    with torch.no_grad():
        h = net.hidden(x).relu()
    torch.testing.assert_close(model.last_bn.running_mean, h.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(model.last_bn.running_var, h.var(0, correction=0), rtol=1e-9, atol=0)


def test_batches_may_carry_labels_and_come_from_a_loader():
    x = data()
    one = insert_last_bn(seeded_net(), x).state_dict()
    loader = DataLoader(TensorDataset(x, torch.zeros(40)), batch_size=7, shuffle=True)
    pair = (x, torch.zeros(len(x), dtype=torch.long))
    for batches in ([(x[:30], None), [x[30:], 1]], loader, pair, list(pair)):
        other = insert_last_bn(seeded_net(), batches).state_dict()
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-6)


def seeded_net() -> Net:
    torch.manual_seed(1)
    return Net()


def test_a_feature_without_variance_stays_finite():
    net = Net().eval()
    with torch.no_grad():
        net.hidden.weight[0] = 0
        net.hidden.bias[0] = -1  # dead: always zero
        net.hidden.weight[1] = 0
        net.hidden.bias[1] = 5  # constant
    model = insert_last_bn(copy.deepcopy(net), data())
    assert all(t.isfinite().all() for t in model.state_dict().values())
    torch.testing.assert_close(model(data()), net(data()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_modes_buffers_hooks_and_rng_stay(training: bool):
    net = timm.create_model("test_resnet", num_classes=3).train(training)
    net.layer1.train(not training)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    modes = {name: m.training for name, m in net.named_modules()}
    rng = torch.get_rng_state()
    insert_last_bn(net, DataLoader(torch.randn(8, 3, 32, 32, generator=torch.Generator()), batch_size=4, shuffle=True))
    assert torch.equal(torch.get_rng_state(), rng)
    assert {name: m.training for name, m in net.named_modules() if name != "last_bn"} == modes
    assert net.last_bn.training is training
    assert all(p.grad is None for p in net.parameters())
    for key, value in before.items():
        assert key.startswith("fc.") or torch.equal(net.state_dict()[key], value), key
    assert sum(len(m._forward_pre_hooks) for m in net.modules()) == 1


def test_an_error_while_calibrating_leaves_the_model_alone():
    net = Net().train()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError):
        insert_last_bn(net, [data(), torch.ones(3, 99)])
    assert all(m.training for m in net.modules())
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert net.state_dict().keys() == before.keys()


def test_trains():
    net = insert_last_bn(Net(), data()).train()
    net(data()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert net.last_bn.num_batches_tracked == 1


def test_works_on_meta_and_compiles():
    with torch.device("meta"):
        assert insert_last_bn(Net()).last_bn.weight.is_meta
    net = insert_last_bn(Net(), data()).eval()
    program = torch.export.export(net, (data(),))
    torch.testing.assert_close(program.module()(data()), net(data()))


def test_a_plain_network_of_the_zoo_takes_one_before_its_dropout():
    net = create_model("cifar_resnet8", drop_rate=0.5).eval()
    x = torch.randn(6, 3, 32, 32)
    expected = net(x)
    insert_last_bn(net, x)
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)
    assert len(net.head_drop._forward_pre_hooks) == 1
    net.reset_classifier(4, "max")
    assert len(net.head_drop._forward_pre_hooks) == 1  # moved, not added
    assert net(x).shape == (6, 4)


@pytest.mark.parametrize("name", ["efficientvit_m0", "shvit_s1"])
@torch.no_grad()
def test_a_classifier_that_timm_cannot_find_any_more_is_reset(name):
    net = insert_last_bn(timm.create_model(name, num_classes=7)).eval()
    nn.init.constant_(net.last_bn.bias, 3.0)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    before = net(x)
    net.reset_classifier(0)
    torch.testing.assert_close(net(x), net.forward_head(net.forward_features(x), pre_logits=True) + 3)
    net.reset_classifier(7)
    assert net(x).shape == before.shape


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: insert_last_bn(Net()), r"this Net already has a last BN, model.last_bn; it takes only one"),
        (lambda: create_model("cifar_resnet8_lastbn"), r"this CifarResNet already has a last BN"),
        (lambda: timm.create_model("test_resnet", num_classes=0), r"ResNet has no classifier \(num_classes=0\?\)"),
        (lambda: timm.create_model("resnetv2_18", num_classes=3), r"the head of ResNetV2 ends in Conv2d"),
        (lambda: torchvision.models.squeezenet1_1(), r"the head of SqueezeNet ends in Conv2d"),
        (
            lambda: VisionTransformerDistilled(32, 16, embed_dim=12, depth=1, num_heads=2),
            r"VisionTransformerDistilled has 2 heads; a last BN needs one linear head",
        ),
        (lambda: timm.create_model("repvit_m0_9", num_classes=3), r"RepVit has 2 heads"),
        (lambda: nn.ReLU(), r"ReLU has no classifier"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), r"an nn.Sequential would run model.last_bn as its last layer"),
        (
            lambda: timm.create_model("test_resnet", drop_rate=0.3),
            r"applies its dropout \(drop_rate=0.3\) by a function",
        ),
    ],
)
def test_what_it_refuses(build, text):
    model = build()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=text):
        insert_last_bn(model)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("batches", "error", "text"),
    [
        ([], ValueError, r"at least 2 examples, got 0"),
        (torch.ones(1, 6), ValueError, r"at least 2 examples, got 1; pass more batches, or None"),
        ([torch.ones(4, 6).long()], TypeError, r"batch 0 is a tensor of torch.int64; batches are one tensor"),
        ([torch.ones(4, 6), "x"], TypeError, r"batch 1 is a str"),
        (torch.full((4, 6), torch.nan), ValueError, r"not finite on these batches"),
    ],
)
def test_what_calibration_refuses(batches, error, text):
    with pytest.raises(error, match=text):
        insert_last_bn(Net(), batches)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_pruned_head_keeps_its_function_or_is_refused(name):
    """What it computes from other parameters in each forward pass would forget what it absorbed."""
    net, other, x = Net().eval(), Net().eval(), data()
    other.load_state_dict(net.state_dict())
    for each in (net, other):
        torch.manual_seed(0)
        prune.random_unstructured(each.out, name, amount=0.5)
    expected = net(x)
    with pytest.raises(ValueError, match=rf"the head's {name} is computed from other parameters \(pruning"):
        insert_last_bn(net, x)
    assert torch.equal(net(x), expected)
    torch.testing.assert_close(insert_last_bn(other)(x), expected)  # the identity is nothing to absorb
    prune.remove(net.out, name)
    torch.testing.assert_close(insert_last_bn(net, x)(x), expected, rtol=1e-5, atol=1e-5)


def test_one_example_in_training_mode_is_one_clear_error():
    net = insert_last_bn(Net()).train()
    with pytest.raises(ValueError, match="needs at least 2 examples in training mode, got a batch of 1"):
        net(data(1))


def test_a_name_is_no_model():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str 'resnet18'"):
        insert_last_bn("resnet18")


def data_parallel_copy(model: nn.Module) -> nn.Module:
    """As nn.DataParallel makes one a device, whose own function for it needs several."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in copies.items():
        for name, child in module.named_children():
            setattr(copied, name, copies[child])
        for name in module._parameters:
            value = getattr(module, name)
            setattr(copied, name, None if value is None else value.detach().clone())
        for name, value in module.named_buffers(recurse=False):
            setattr(copied, name, value.clone())
    return copies[model]


def test_a_copy_by_data_parallel_says_what_to_use():
    """Its hook would take the original's last BN, on another device."""
    with pytest.raises(RuntimeError, match="use DistributedDataParallel, or a network that is built with it"):
        data_parallel_copy(insert_last_bn(Net().eval()))(data())
    built = create_model("cifar_resnet8_lastbn").eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(data_parallel_copy(built)(images), built(images), rtol=0, atol=0)


class DropsTwice(nn.Module):
    """One dropout module for every layer, registered right before the head."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, hidden), nn.Linear(hidden, 8)
        self.dropout, self.out = nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(self.second(self.dropout(self.first(x).relu())).relu()))


class DropsEarly(DropsTwice):
    """Dropout on the first layer alone; its place among the modules says otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.dropout(self.first(x).relu())).relu())


@pytest.mark.parametrize("net", [DropsTwice(), DropsTwice(12), DropsEarly(), DropsEarly(12)])
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_dropout_that_runs_elsewhere_is_no_place_for_it(net: nn.Module, calibrated: bool) -> None:
    plain = net.eval()
    model = insert_last_bn(copy.deepcopy(plain), data() if calibrated else None)
    torch.testing.assert_close(model(data()), plain(data()), rtol=1e-5, atol=1e-5)
    seen: list[Tensor] = []
    model.last_bn.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model.train()(data())
    assert len(seen) == 1
    assert seen[0].shape == (40, 8)
    hidden: list[Tensor] = []
    model.out.register_forward_hook(lambda module, args, out: hidden.append(args[0]))
    model.eval()(data())
    assert torch.equal(hidden[0], model.last_bn(seen[1]))


class ChangesInPlace(DropsTwice):
    """What the dropout gives out is changed in the same memory, and flattened, before the head."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.relu(self.dropout(self.second(self.first(x))), inplace=True).flatten(1))


class FirstToken(DropsTwice):
    """The head takes the first of the rows that are dropped out, which lies at the start of their memory."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(self.second(self.first(x.reshape(-1, 2, 6))))[:, 0])


@pytest.mark.parametrize("net", [ChangesInPlace(), FirstToken()])
@pytest.mark.parametrize("inference", [False, True])
def test_a_dropout_whose_output_is_not_all_that_the_head_takes_is_no_place_for_it(
    net: nn.Module, inference: bool
) -> None:
    plain = net.eval()
    with torch.inference_mode(inference):
        x = data()
        model = insert_last_bn(copy.deepcopy(plain), x)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)
    assert len(model.out._forward_pre_hooks) == 1


def test_without_batches_a_dropout_of_no_library_is_not_taken_to_feed_the_head() -> None:
    model = insert_last_bn(Net())
    seen: list[Tensor] = []
    model.last_bn.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model.train()(data())
    assert (seen[0] == 0).double().mean() > 0.6  # relu's and the dropout's zeros: it stands after both


def test_a_dropout_module_in_two_places_is_not_taken() -> None:
    drop = nn.Dropout(0.3)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), drop)
            self.classifier = nn.Sequential(drop, nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.features(x))

    for batches in (None, data()):
        plain = Shared().eval()
        model = insert_last_bn(copy.deepcopy(plain), batches)
        torch.testing.assert_close(model(data()), plain(data()), rtol=1e-5, atol=1e-5)


class TwoLinear(nn.Module):
    def __init__(self, hidden: str, last: str, classes: int | None = None) -> None:
        super().__init__()
        setattr(self, hidden, nn.Linear(6, 8))
        setattr(self, last, nn.Linear(8, 3))
        self.names = hidden, last
        if classes is not None:
            self.num_classes = classes

    def forward(self, x: Tensor) -> Tensor:
        hidden, last = (getattr(self, name) for name in self.names)
        return last(hidden(x).relu())


@pytest.mark.parametrize(("hidden", "last"), [("fc", "out"), ("fc", "classifier"), ("classifier", "head")])
def test_a_hidden_layer_with_a_heads_name(hidden: str, last: str) -> None:
    with pytest.raises(ValueError, match=f"the head of TwoLinear may be {hidden} or {last}; set model.num_classes, or"):
        insert_last_bn(TwoLinear(hidden, last))
    model = insert_last_bn(TwoLinear(hidden, last, classes=3), data())
    assert model.last_bn.num_features == 8
    with pytest.raises(ValueError, match="may be"):
        insert_last_bn(TwoLinear(hidden, last, classes=5))


def test_a_head_that_is_registered_before_another_kind_of_layer_keeps_its_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.body = nn.Linear(8, 3), nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(x))

    assert insert_last_bn(Net(), data()).last_bn.num_features == 8


def test_wrapped_and_compiled_models_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"DataParallel would not know the last BN; insert it into model\.module first"
    ):
        insert_last_bn(nn.DataParallel(Net()))
    compiled = torch.compile(Net(), backend="eager")
    assert isinstance(compiled, nn.Module)
    in_place = Net()
    in_place.compile(backend="eager")
    for model in (compiled, in_place):
        with pytest.raises(ValueError, match="would not run the last BN; insert it first, then compile the model"):
            insert_last_bn(model, data())


def test_ddp_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(Net())
        with pytest.raises(ValueError, match="DistributedDataParallel would not know the last BN"):
            insert_last_bn(parallel)
    finally:
        torch.distributed.destroy_process_group()


def test_empty_batches_count_for_nothing() -> None:
    plain = Net().eval()
    expected = insert_last_bn(copy.deepcopy(plain), data()).last_bn
    for batches in ([data()[:0], data()], [data()[:7], data()[:0], data()[7:]], [data(), data()[:0]]):
        found = insert_last_bn(copy.deepcopy(plain), batches).last_bn
        torch.testing.assert_close(found.running_mean, expected.running_mean)
        torch.testing.assert_close(found.running_var, expected.running_var)
    with pytest.raises(ValueError, match="calibration needs at least 2 examples, got 0"):
        insert_last_bn(Net(), data()[:0])
    assert insert_last_bn(Net().eval())(data()[:0]).shape == (0, 3)


def test_an_empty_pooled_map_passes() -> None:
    model = insert_last_bn(torchvision.models.GoogLeNet(num_classes=3, aux_logits=False, init_weights=False)).eval()
    assert model.dropout(torch.randn(0, 1024, 1, 1)).shape == (0, 1024, 1, 1)


class Tied(nn.Module):
    """A decoder whose last layer has the weight of its embedding, here of weighted tokens [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(10, 4), nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 10, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, p: Tensor) -> Tensor:
        return self.lm_head(self.mix(p @ self.embed.weight).relu())


class SameMemory(Tied):
    """Tied by memory alone: the head's weight is a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head.weight = nn.Parameter(self.embed.weight.detach())
        self.last_bn = None


class ByFunction(Tied):
    """Uses the head's weight, which no other module has, by a function call."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Identity()

    def forward(self, p: Tensor) -> Tensor:
        return self.lm_head(self.mix(p @ self.lm_head.weight).relu())


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (Tied, r"the head's weight is also that of 'embed', so it cannot absorb .* untie it \(head.weight = nn.Param"),
        (SameMemory, r"a last BN changes the outputs of this SameMemory by .* used outside of the head's call"),
        (ByFunction, r"a last BN changes the outputs of this ByFunction by"),
    ],
)
def test_a_head_whose_weight_is_used_elsewhere_is_refused_and_left_alone(build: type[Tied], text: str) -> None:
    torch.manual_seed(0)
    net, x = build().eval(), torch.rand(40, 10)
    before, keys = net(x), list(net.state_dict())
    with pytest.raises(ValueError, match=text):
        insert_last_bn(net, x)
    assert torch.equal(net(x), before)
    assert list(net.state_dict()) == keys
    assert getattr(net, "last_bn", None) is None
    assert net.lm_head.bias is None
    torch.testing.assert_close(insert_last_bn(copy.deepcopy(net))(x), before)  # the identity is nothing to absorb
    if build is not ByFunction:
        net.lm_head.weight = nn.Parameter(net.lm_head.weight.detach().clone())
        torch.testing.assert_close(insert_last_bn(net, x)(x), before, rtol=1e-5, atol=1e-5)


def test_an_error_in_the_last_pass_leaves_the_model_as_it_was() -> None:
    """Ctrl-C, or no memory, when the last BN is in and its outputs are looked at."""
    model, x = seeded_net().eval(), data()
    before, keys = model(x), list(model.state_dict())
    passes: list[int] = []

    def third(module: nn.Module, args: tuple) -> None:
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt

    with model.register_forward_pre_hook(third), pytest.raises(KeyboardInterrupt):
        insert_last_bn(model, x)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(insert_last_bn(model, x)(x), before, rtol=1e-5, atol=1e-5)


def test_the_rounding_of_autocast_is_no_change_of_the_function() -> None:
    """Which keeps the weights that it has cast, whatever changes them, until it ends."""
    model, x = seeded_net().eval(), data()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x)
        insert_last_bn(model, x)
        torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.02)
    torch.testing.assert_close(model(x), seeded_net().eval()(x), rtol=1e-5, atol=1e-5)


class TwoHeads(nn.Module):
    """Two heads under names that say nothing, of k classes and of 3."""

    def __init__(self, k: int = 3, first: str = "age", last: str = "gender", between: bool = False) -> None:
        super().__init__()
        self.body, self.names = nn.Linear(6, 8), (first, last)
        setattr(self, first, nn.Linear(8, k))
        self.norm = nn.LayerNorm(8) if between else nn.Identity()
        setattr(self, last, nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.body(x).relu())
        return torch.cat([getattr(self, name)(h) for name in self.names], 1)


@pytest.mark.parametrize(
    ("net", "calibrated", "text"),
    [
        (TwoHeads(), False, "TwoHeads has 2 heads of the same sizes; a last BN needs one linear head: age, gender; wh"),
        (TwoHeads(), True, "has 2 heads of the same sizes"),
        (TwoHeads(5), True, "TwoHeads has 2 heads that read the same features; .*: age, gender"),
        (TwoHeads(between=True), True, "has 2 heads that read the same features"),
        (TwoHeads(3, "distillation", "classifier", True), True, "that read the same features; .*: distillation, clas"),
    ],
)
def test_two_heads_under_other_names_are_refused(net: nn.Module, calibrated: bool, text: str) -> None:
    keys = list(net.state_dict())
    with pytest.raises(ValueError, match=text):
        insert_last_bn(net, data() if calibrated else None)
    assert list(net.state_dict()) == keys
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_a_name_or_a_method_says_which_of_two_heads_is_meant() -> None:
    plain = TwoHeads(5, "auxiliary", "classifier").eval()  # of other sizes, beside the one with a head's name
    model = insert_last_bn(copy.deepcopy(plain), data())
    torch.testing.assert_close(model(data()), plain(data()), rtol=1e-5, atol=1e-5)

    class Says(TwoHeads):
        def get_classifier(self) -> nn.Module:
            return self.age

    told = Says().eval()
    expected = told(data())
    torch.testing.assert_close(insert_last_bn(told, data())(data()), expected, rtol=1e-5, atol=1e-5)
    assert len(told.age._forward_pre_hooks) == 1
    same = nn.Module()  # square layers one after the other are no two heads
    same.first, same.second = nn.Linear(8, 8), nn.Linear(8, 8)
    same.forward = lambda x: same.second(same.first(x))
    assert insert_last_bn(same, torch.randn(9, 8)).last_bn.num_features == 8

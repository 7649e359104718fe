"""Weights of other projects: akamaster's channel order, wrapped and nested state dicts, pickles with code in them."""

import argparse
import json
import pickle
import re
import zipfile

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from condzoo.checkpoints import load_checkpoint, verify_checkpoint
from condzoo.checkpoints.foreign import from_akamaster, read_foreign, translate
from condzoo.conversion import convert
from condzoo.models import create_model


def akamaster_forward(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """akamaster's ResNet, written out as functions of its state dict (an independent formulation)."""

    def bn(name, h):
        return F.batch_norm(h, *(state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    h = F.relu(bn("bn1", F.conv2d(x, state["conv1.weight"], padding=1)))
    for stage, planes in ((1, 16), (2, 32), (3, 64)):
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in state:
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            out = F.relu(bn(f"{name}.bn1", F.conv2d(h, state[f"{name}.conv1.weight"], stride=stride, padding=1)))
            out = bn(f"{name}.bn2", F.conv2d(out, state[f"{name}.conv2.weight"], padding=1))
            if stride == 2:  # option A, the empty channels on both sides
                h = F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4))
            h = F.relu(out + h)
            block += 1
    return F.linear(F.avg_pool2d(h, h.shape[3]).flatten(1), state["linear.weight"], state["linear.bias"])


def akamaster_state(depth: int) -> dict[str, torch.Tensor]:
    """Made-up weights under akamaster's names: every value drawn, so that no channel is like another."""
    generator = torch.Generator().manual_seed(depth)
    state = {}
    for key, value in create_model(f"cifar_resnet{depth}").state_dict().items():
        drawn = torch.rand(value.shape, generator=generator) + 0.5 if value.ndim else value
        state[key.replace("fc.", "linear.")] = drawn - 1 if value.ndim == 4 else drawn
    return state


@pytest.mark.parametrize("depth", [8, 20])
def test_akamasters_network_is_the_same_function(depth):
    theirs = akamaster_state(depth)
    network = create_model(f"cifar_resnet{depth}").eval().double()
    state, note = translate(theirs, network, "file")
    network.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = akamaster_forward({k: v.double() for k, v in theirs.items()}, x)
    torch.testing.assert_close(network(x), wanted, rtol=1e-10, atol=0)
    assert "order" in note


def test_a_last_bn_put_into_akamasters_network_is_renumbered_too():
    theirs = akamaster_state(8)
    d = theirs["linear.weight"].shape[1]
    drawn = {
        name: torch.rand(d, generator=torch.Generator().manual_seed(9)) + 0.5 for name in ("weight", "running_var")
    }
    drawn |= {name: torch.randn(d, generator=torch.Generator().manual_seed(9)) for name in ("bias", "running_mean")}
    last = {f"last_bn.{name}": value for name, value in drawn.items()}
    network = create_model("cifar_resnet8_lastbn").eval().double()
    state, _ = translate(theirs | last | {"last_bn.num_batches_tracked": torch.tensor(3)}, network, "file")
    network.load_state_dict(state)
    # the same in the linear layer: W (scale h + shift) + b
    drawn = {name: value.double() for name, value in drawn.items()}
    scale = drawn["weight"] / (drawn["running_var"] + 1e-5).sqrt()
    shift = drawn["bias"] - drawn["running_mean"] * scale
    absorbed = {key: value.double() for key, value in theirs.items()}
    absorbed["linear.bias"] = absorbed["linear.bias"] + absorbed["linear.weight"] @ shift
    absorbed["linear.weight"] = absorbed["linear.weight"] * scale
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(x), akamaster_forward(absorbed, x), rtol=1e-9, atol=1e-9)


def test_without_the_new_order_of_channels_the_function_is_another():
    theirs = akamaster_state(8)
    network = create_model("cifar_resnet8").eval()
    network.load_state_dict({key.replace("linear.", "fc."): value for key, value in theirs.items()})
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    difference = (network(x) - akamaster_forward(theirs, x)).abs().max() / network(x).abs().max()
    assert difference > 1e-3


def test_renumbering_keeps_every_value():
    theirs = akamaster_state(8)
    ours = from_akamaster(theirs)
    for key, value in theirs.items():
        assert torch.equal(value.flatten().sort().values, ours[key.replace("linear.", "fc.")].flatten().sort().values)


def chenyaofo_network(depth: int) -> nn.Module:
    """chenyaofo's CIFAR ResNet, whose blocks are torchvision's, with drawn weights."""
    torch.manual_seed(depth)
    network = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    blocks, c_in = (depth - 2) // 6, 16
    network.conv1, network.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
    network.maxpool = nn.Identity()
    for stage, c in ((1, 16), (2, 32), (3, 64)):
        stride = 1 if stage == 1 else 2
        down = nn.Sequential(nn.Conv2d(c_in, c, 1, stride, bias=False), nn.BatchNorm2d(c)) if stride == 2 else None
        first = BasicBlock(c_in, c, stride, down)
        rest = [BasicBlock(c, c) for _ in range(blocks - 1)]
        network.add_module(f"layer{stage}", nn.Sequential(first, *rest))
        c_in = c
    network.layer4, network.fc = nn.Identity(), nn.Linear(64, 10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.running_var, module.weight, module.bias):
                nn.init.uniform_(values, 0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize("depth", [8, 20])
@pytest.mark.parametrize("akamasters_names", [False, True])
def test_option_b_networks_are_the_same_function(tmp_path, depth, akamasters_names):
    theirs = chenyaofo_network(depth)
    state = theirs.state_dict()
    if akamasters_names:
        state = {k.replace("downsample", "shortcut").replace("fc.", "linear."): v for k, v in state.items()}
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "w.pth")
    made = convert(tmp_path / "w.pth", f"cifar_resnet{depth}", out=tmp_path)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for network in (load_checkpoint(made), timm.create_model(f"local-dir:{made}", pretrained=True).eval()):
        torch.testing.assert_close(network(x), theirs(x), rtol=1e-5, atol=1e-5)
    twin = load_checkpoint(convert(tmp_path / "w.pth", f"cifar_resnet{depth}_lastbn", out=tmp_path))
    torch.testing.assert_close(twin(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_option_b_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in create_model("cifar_resnet20", projection=True).parameters()) == 272_474


def test_option_b_weights_do_not_go_into_a_net_without_shortcuts(tmp_path):
    torch.save(chenyaofo_network(8).state_dict(), tmp_path / "w.pth")
    message = r"w\.pth: 'layer2\.0\.shortcut\.0\.weight' is \[32, 16, 1, 1\] float32, and the network has no such key"
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "w.pth", "cifar_vgg8", out=tmp_path)
    with pytest.raises(ValueError, match="projection=True is a kind of shortcut, and this network has none"):
        create_model("cifar_vgg8", projection=True)


def test_the_net_without_shortcuts_is_refused_although_its_keys_are_equal():
    with pytest.raises(ValueError, match="akamaster's networks have shortcuts, this one has none"):
        translate(akamaster_state(8), create_model("cifar_vgg8"), "file")


def test_a_wrong_depth_names_the_first_key_and_its_shape():
    message = r"file: 'layer1\.1\.conv1\.weight' is missing; the network has it as \[16, 16, 3, 3\]"
    with pytest.raises(ValueError, match=message):
        translate(akamaster_state(8), create_model("cifar_resnet20"), "file")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "model.", "ema.", "net.module."]
)
@pytest.mark.parametrize(
    "nest", [None, "state_dict", "model", "state_dict_ema", "model_state_dict", "model_state", "ema", "params"]
)
def test_wrapped_and_nested_state_dicts_are_unwrapped(tmp_path, prefix, nest):
    state = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}
    wrapped = {prefix + key: value for key, value in state.items()}
    torch.save({nest: wrapped, "epoch": 3} if nest else wrapped, tmp_path / "w.pth")
    _, read, _ = read_foreign(tmp_path / "w.pth")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)


def test_the_average_comes_first_and_what_only_looks_like_it_does_not_count(tmp_path):
    mean, last = {"fc.bias": torch.zeros(2)}, {"fc.bias": torch.ones(2)}
    around = {"epoch": 3, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}}
    for content, wanted in (
        ({"model": last, "ema": mean}, mean),
        ({"model": last, "ema": {"decay": 0.99, "state_dict": mean}}, mean),
        ({"model": last, "ema": {"decay": 0.99}}, last),
        ({"checkpoint": {"state_dict": last}}, last),
    ):
        torch.save(around | content, tmp_path / "w.pth")
        assert torch.equal(read_foreign(tmp_path / "w.pth")[1]["fc.bias"], wanted["fc.bias"])


@pytest.mark.parametrize(
    ("nest", "said"),
    [(("model",), "w.pth['model']"), (("ema", "module"), "w.pth['ema']['module']"), ((), "w.pth")],
)
def test_which_of_a_files_entries_was_taken_is_said(tmp_path, nest, said):
    content = {"a": torch.ones(2)}
    for name in reversed(nest):
        content = {name: content, "epoch": 3}
    torch.save(content, tmp_path / "w.pth")
    assert read_foreign(tmp_path / "w.pth")[2] == said


def test_a_file_is_what_it_holds_whatever_its_name(tmp_path):
    state = {"a": torch.ones(2)}
    save_file(state, tmp_path / "w.pth")
    torch.save(state, tmp_path / "zip.safetensors")
    torch.save(state, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    for name in ("w.pth", "zip.safetensors", "old.safetensors"):
        assert torch.equal(read_foreign(tmp_path / name)[1]["a"], state["a"])
    (tmp_path / "junk.safetensors").write_bytes(b"hello, world")
    with pytest.raises(ValueError, match=r"junk\.safetensors is not a readable safetensors file"):
        read_foreign(tmp_path / "junk.safetensors")


def test_the_options_of_a_training_stand_beside_the_weights(tmp_path):
    """timm's train.py saves what argparse gave it; nothing else of an object is built with it."""
    options = argparse.Namespace(lr=0.1, data="imagenet")
    torch.save({"state_dict": {"a": torch.ones(2)}, "args": options}, tmp_path / "w.pth")
    assert read_foreign(tmp_path / "w.pth")[1].keys() == {"a"}
    torch.save({"args": argparse.Namespace(path=Payload(tmp_path / "run"))}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="without running code: it asks for"):
        read_foreign(tmp_path / "w.pth")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("core", [b"numpy._core", b"numpy.core"])  # of numpy 2, and before
def test_numpys_numbers_and_arrays_may_stand_beside_the_weights(tmp_path, core):
    beside = {"best_acc": np.float64(93.2), "epoch": np.int64(3), "losses": np.arange(3.0), "names": np.array(["a"])}
    path = tmp_path / "w.pth"
    torch.save({**beside, "state_dict": {"a": torch.ones(2)}}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(re.sub(rb"numpy\._?core", core, path.read_bytes()))
    assert read_foreign(path)[1].keys() == {"a"}


def test_of_numpys_arrays_nothing_is_built_or_run(tmp_path):
    torch.save({"a": np.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="holds no state dict: it is a dict of other things than tensors by name"):
        read_foreign(tmp_path / "w.pth")
    hidden = np.array([Payload(tmp_path / "run")], dtype=object)
    torch.save({"state_dict": {"a": torch.ones(2)}, "best": hidden}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"without running code: it asks for (_?io|builtins)\.open"):
        read_foreign(tmp_path / "w.pth")
    assert not (tmp_path / "run").exists()


def test_a_pickle_that_holds_itself_ends(tmp_path):
    loop = {"epoch": 3}
    loop["model"] = loop
    torch.save(loop, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="holds no state dict: it is a dict of other things"):
        read_foreign(tmp_path / "w.pth")


def test_an_averaged_model_is_the_network_in_it(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(3, 2))
    torch.save(averaged.state_dict(), tmp_path / "w.pth")
    assert read_foreign(tmp_path / "w.pth")[1].keys() == {"weight", "bias"}


def test_a_link_to_the_file_is_followed(tmp_path):
    """As the Hub's cache has them: the name in a snapshot, the content in a blob without one."""
    (tmp_path / "blobs").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "blobs" / "0123")
    (tmp_path / "model.safetensors").symlink_to("blobs/0123")
    assert read_foreign(tmp_path / "model.safetensors")[1].keys() == {"a"}


def test_safetensors_are_read_too(tmp_path):
    save_file({"module.a": torch.ones(2)}, tmp_path / "w.safetensors")
    assert read_foreign(tmp_path / "w.safetensors")[1].keys() == {"a"}


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", [2, 5])
def test_code_in_a_pickle_is_not_run(tmp_path, protocol):
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": Payload(tmp_path / "run")}, protocol))
    torch.save({"a": Payload(tmp_path / "run")}, tmp_path / "zip.pth")
    for name in ("plain.pth", "zip.pth"):
        with pytest.raises(ValueError, match="no state dict that can be read without running code: ") as why:
            read_foreign(tmp_path / name)
        assert "arbitrary code" not in str(why.value), "torch's advice to run it is not passed on"
    assert re.search(r"it asks for (_?io|builtins)\.open; torch\.save\(model\.state_dict\(\), FILE\)", str(why.value))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"\x80\x02.", b"\x80\x02J\x00", b"\x80\x02h\x07.", b"\x80\x02X\xff\xff"])
def test_a_damaged_pickle_is_one_clear_line(tmp_path, content):
    """The unpickler ends in an IndexError, a struct.error, ..."""
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"running code: torch's weights-only reader does not take it \(\w+\); torch\.save\("
    ):
        read_foreign(tmp_path / "w.pth")


def test_a_file_that_is_no_pickle_is_said(tmp_path):
    (tmp_path / "junk.pth").write_bytes(b"hello")
    with pytest.raises(
        ValueError, match=r"running code: torch's weights-only reader does not take it \(\w+\); torch\.save\("
    ):
        read_foreign(tmp_path / "junk.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no state dict: it is a list"),
        ({}, "holds no state dict"),
        ({"a": 3}, "of other things than tensors"),
        ({"a": torch.tensor([float("nan")])}, "'a' has values that are not finite"),
        ({"a": torch.ones(2).to_sparse()}, r"'a' is no tensor with all its values: torch\.sparse_coo on cpu"),
        ({"a": torch.ones(2, device="meta")}, r"'a' is no tensor with all its values: torch\.strided on meta"),
        ({"a": torch.zeros(1).expand(10**7, 10**7)}, r"'a' is \[10000000, 10000000\] float32, which the [\d,]+ bytes"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message):
        read_foreign(tmp_path / "w.pt")


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no numbers of 4 bits")
def test_numbers_of_four_bits_are_refused(tmp_path):
    torch.save({"a": torch.zeros(2, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: 'a' is .* float4_e2m1fn_x2, a type that torch cannot convert here"):
        read_foreign(tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_nested_tensors_are_refused(tmp_path):
    torch.save({"a": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: 'a' is no tensor with all its values: nested"):
        read_foreign(tmp_path / "w.pt")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_an_archive_that_unpacks_to_more_than_itself_is_not_unpacked(tmp_path, monkeypatch, compression):
    torch.save({"a": torch.zeros(10**5)}, tmp_path / "w.pt")
    whole = read_foreign(tmp_path / "w.pt")[1]
    assert whole["a"].shape == (10**5,)  # torch.save's own is not compressed
    with zipfile.ZipFile(tmp_path / "w.pt") as plain, zipfile.ZipFile(tmp_path / "b.pt", "w", compression) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(
        ValueError, match=r"b\.pt is a compressed archive, and torch\.save's are not; save the state di"
    ):
        read_foreign(tmp_path / "b.pt")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="no state dict"):
        read_foreign(tmp_path / "w.pt")


def test_torchvisions_weights_go_into_the_last_bn_network():
    plain = torchvision.models.resnet18(weights=None).eval()
    nn.init.normal_(plain.fc.bias)
    network = create_model("resnet18_lastbn").eval()
    state, note = translate(plain.state_dict(), network, "file")
    network.load_state_dict(state)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(network(x), plain(x), rtol=1e-5, atol=1e-5)
    assert "last BN is the identity" in note


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_any_type_of_float_is_read(tmp_path, dtype):
    torch.save({"a": torch.tensor([1.0, 2.0]).to(dtype)}, tmp_path / "w.pth")
    assert read_foreign(tmp_path / "w.pth")[1]["a"].tolist() == [1.0, 2.0]
    torch.save({"a": torch.tensor([1.0, float("nan")]).to(dtype)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="'a' has values that are not finite"):
        read_foreign(tmp_path / "w.pth")


def test_values_beyond_float32_are_named():
    state = create_model("cifar_resnet8").double().state_dict()
    state["fc.weight"] *= 1e300
    with pytest.raises(ValueError, match=r"file: 'fc\.weight' has values beyond those of torch\.float32"):
        translate(state, create_model("cifar_resnet8"), "file")


@pytest.mark.parametrize(
    ("wrapped", "words"),
    [
        (lambda state: state, "The network's own keys, and its order of channels."),
        (
            lambda state: {f"module.{key}": value.double() for key, value in state.items()},
            "The network's own keys, and its order of channels. Values cast from torch.float64 to torch.float32.",
        ),
    ],
)
def test_the_record_says_what_was_done_to_the_weights(tmp_path, wrapped, words):
    torch.save(wrapped(create_model("mlp4x24").state_dict()), tmp_path / "w.pth")
    made = convert(tmp_path / "w.pth", "mlp4x24", out=tmp_path)
    assert json.loads((made / "conversion.json").read_text())["note"] == words


def test_weights_are_converted_whatever_the_default_dtype_is(tmp_path):
    torch.save(create_model("mlp4x24").state_dict(), tmp_path / "w.pth")
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = convert(tmp_path / "w.pth", "mlp4x24", out=tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert verify_checkpoint(made).ok


def test_weights_of_a_diverged_training_are_no_checkpoint(tmp_path):
    state = {key: value * 1e30 for key, value in create_model("mlp4x24").state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"mlp4x24\.converted: the network's logits are not finite on the fixed input"):
        convert(tmp_path / "w.pth", "mlp4x24", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_old_files_without_batch_counters_and_in_half_precision_load():
    network = create_model("cifar_resnet8")
    state = {k: v.half() for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    translated, _ = translate(state, network, "file")
    assert {v.dtype for k, v in translated.items() if v.is_floating_point()} == {torch.float32}
    network.load_state_dict(translated)


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_a_file_in_half_precision_throughout_loads(tmp_path, save):
    """Its batch counters too: beyond 65,504 they are infinite."""
    network = create_model("cifar_resnet8")
    network.bn1.num_batches_tracked.fill_(70_000)
    save({key: value.half() for key, value in network.state_dict().items()}, tmp_path / "w.bin")
    state, _ = translate(read_foreign(tmp_path / "w.bin")[1], network, "file")
    network.load_state_dict(state)
    assert network.bn1.num_batches_tracked == 0


def test_other_networks_with_a_layer_called_linear_are_refused_by_their_first_key(tmp_path):
    """kuangliu's MobileNet and the like: no akamaster's, whatever their classifier is called."""
    network = create_model("cifar_resnet8")
    whole = akamaster_state(8)
    mobile = {"conv1.weight": whole["conv1.weight"], "layers.0.conv1.weight": torch.zeros(2)}
    mobile["linear.weight"] = torch.zeros(10, 4)
    deeper = whole | {"layer4.0.conv1.weight": torch.zeros(2)}
    short = {key: value for key, value in whole.items() if not key.startswith("layer1.0.conv2")}
    for state, message in (
        (mobile, r"f: 'bn1\.weight' is missing"),
        (deeper, r"f: 'layer4\.0\.conv1\.weight' is \[2\] float32, and the network has no such key"),
        (short, r"f: 'layer1\.0\.conv2\.weight' is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            translate(state, network, "f")
    for content in ({0: torch.ones(1)}, torch.ones(3)):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(ValueError, match="holds no state dict"):
            read_foreign(tmp_path / "w.pt")

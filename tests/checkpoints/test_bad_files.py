"""Damaged and hostile checkpoints: each is one clear error before a model is handed out, and nothing is executed."""

import io
import json
import os
import pickle
import random
import re
import shutil
import struct
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from condzoo.checkpoints import load_checkpoint, verify_checkpoint
from condzoo.checkpoints.folder import read_folder, write_sums
from condzoo.checkpoints.loading import check_results
from condzoo.checkpoints.records import Metrics, SeedResult
from condzoo.conversion import convert
from condzoo.models import create_model, released
from condzoo.models.weight_files import parse_weights, read_plain_file, sha256

WEIGHTS = "model.safetensors"


def resum(checkpoint):
    """What someone would do who changes files on purpose: new sums, and the weights' hash in metrics.json."""
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    metrics["sha256"] = sha256((checkpoint / WEIGHTS).read_bytes())
    (checkpoint / "metrics.json").write_text(json.dumps(metrics))
    write_sums(checkpoint)


def edit_json(checkpoint, name, change):
    record = json.loads((checkpoint / name).read_text())
    change(record)
    (checkpoint / name).write_text(json.dumps(record))


def safetensors_file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("percent", range(100))
def test_truncated_weights_are_refused_by_sum_and_by_parser(checkpoint, percent):
    content = (checkpoint / WEIGHTS).read_bytes()
    cut = content[: len(content) * percent // 100]
    (checkpoint / WEIGHTS).write_bytes(cut)
    with pytest.raises(ValueError, match=r"model\.safetensors is not as it was summed"):
        load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        parse_weights(cut, "file")


def test_a_thousand_flipped_bits_are_each_noticed(checkpoint):
    rng = random.Random(0)
    files = sorted(checkpoint.iterdir())
    for _ in range(1000):
        path = rng.choice(files)
        content = bytearray(path.read_bytes())
        bit = rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        original = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(checkpoint))):
            load_checkpoint(checkpoint)
        path.write_bytes(original)
    read_folder(checkpoint)


def test_every_bit_of_the_ends_of_lines_of_the_sums_is_noticed(checkpoint):
    """One bit from a newline is a vertical tab, at which str.splitlines splits as well."""
    path = checkpoint / "SHA256SUMS"
    original = path.read_bytes()
    ends = [i for i, byte in enumerate(original) if byte == ord("\n")]
    assert len(ends) > 5
    for i in ends:
        for bit in range(8):
            content = bytearray(original)
            content[i] ^= 1 << bit
            path.write_bytes(content)
            with pytest.raises(ValueError, match=re.escape(str(checkpoint))):
                load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "arguments", [{"no_such_argument": 1}, {"drop_rate": "0.5"}, {"drop_rate": -1.0}, {"init": "none"}]
)
def test_arguments_that_build_no_network_are_the_configs_fault(checkpoint, arguments):
    edit_json(checkpoint, "config.json", lambda config: config["model_args"].update(arguments))
    write_sums(checkpoint)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        load_checkpoint(checkpoint)
    assert str(checkpoint) in str(caught.value)
    rows = verify_checkpoint(checkpoint)
    assert not rows.ok


def test_a_thousand_flipped_bits_of_the_weights_are_noticed_by_name_too(index):
    """A release by its name is held against the index alone, whatever its folder's own sums say."""
    path = released.cache_folder() / "mlp4x24_bn.digits" / WEIGHTS
    original = path.read_bytes()
    rng = random.Random(1)
    for _ in range(1000):
        content = bytearray(original)
        bit = rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is not the file released as mlp4x24_bn\.digits: its SHA-256 is"):
            released.read_release(released.find_release("mlp4x24_bn", None))
    path.write_bytes(original)
    load_checkpoint("mlp4x24_bn")


def test_a_folder_that_links_out_of_itself_is_refused_without_reading_there(checkpoint, tmp_path):
    """A name that is fine in SHA256SUMS and leads elsewhere on the disk."""
    (tmp_path / "secret").write_text("do not read")
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").symlink_to("../secret")
    write = "0" * 64 + "  config.json\n"
    sums = [line for line in (checkpoint / "SHA256SUMS").read_text().splitlines(True) if "config.json" not in line]
    (checkpoint / "SHA256SUMS").write_text("".join([*sums, write]))
    with pytest.raises(ValueError, match=r"config\.json is a symbolic link") as caught:
        load_checkpoint(checkpoint)
    assert "do not read" not in str(caught.value)


def test_release_names_that_lead_elsewhere_are_no_names(index):
    for name in ("mlp4x24_bn.../../secret", "../mlp4x24_bn.digits", "mlp4x24_bn.digits/.."):
        with pytest.raises((ValueError, FileNotFoundError)):
            load_checkpoint(name)
    for name in ("mlp4x24_bn...", "mlp4x24_bn..digits"):
        with pytest.raises(ValueError, match="unknown tag"):
            load_checkpoint(name)


FLOAT = {"dtype": "F32", "shape": [1]}
HOSTILE = {
    "empty": b"",
    "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "a header that is no JSON": safetensors_file(b"not json"),
    "a header that is a list": safetensors_file([1, 2]),
    "a deeply nested header": safetensors_file(b'{"a":' * 5000),
    "overlapping offsets": safetensors_file(
        {"a": FLOAT | {"data_offsets": [0, 4]}, "b": FLOAT | {"data_offsets": [2, 6]}}, b"\0" * 6
    ),
    "offsets that leave a hole": safetensors_file(
        {"a": FLOAT | {"data_offsets": [0, 4]}, "b": FLOAT | {"data_offsets": [6, 10]}}, b"\0" * 10
    ),
    "offsets past the end": safetensors_file({"a": FLOAT | {"data_offsets": [0, 4]}}, b"\0" * 2),
    "negative offsets": safetensors_file({"a": FLOAT | {"data_offsets": [-4, 0]}}, b"\0" * 4),
    "bytes that belong to nothing": safetensors_file({"a": FLOAT | {"data_offsets": [0, 4]}}, b"\0" * 8),
    "a shape larger than its bytes": safetensors_file(
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "an unknown dtype": safetensors_file({"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "two tensors of one name": safetensors_file(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b"\0" * 8,
    ),
    "two tensors of one name in one place": safetensors_file(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"\0" * 4,
    ),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_weights_are_one_clear_error(checkpoint, content):
    (checkpoint / WEIGHTS).write_bytes(content)
    resum(checkpoint)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file: .*; get it again"):
        load_checkpoint(checkpoint)


def test_whole_weights_may_begin_with_the_bytes_of_a_pickle():
    """The file begins with the length of its header, in steps of 8: one length in 32 begins as a pickle, with 0x80."""
    state, first = {"a": torch.arange(3.0)}, set()
    for length in range(0, 256, 8):
        content = save(state, metadata={"format": "x" * length})
        first.add(content[0])
        assert torch.equal(parse_weights(content, "file")["a"], state["a"])
    assert 0x80 in first


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("dump", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_renamed_to_safetensors_is_not_run(checkpoint, tmp_path, dump):
    dump({"a": Payload(tmp_path / "run")}, checkpoint / WEIGHTS)
    resum(checkpoint)
    with pytest.raises(ValueError, match="is a pickle, not safetensors; `condzoo convert`"):
        load_checkpoint(checkpoint)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fc.bias"), r"'fc.bias' is missing; the network has it as \[10\] float32"),
        (lambda s: s.update(more=torch.ones(2)), r"'more' is \[2\] float32, and the network has no such key"),
        (
            lambda s: s.update({"fc.bias": torch.ones(3)}),
            r"'fc.bias' is \[3\] float32, the network's is \[10\] float32",
        ),
        (lambda s: s.update({"fc.bias": s["fc.bias"].half()}), r"'fc.bias' is \[10\] float16, the network's is"),
        (lambda s: s["fc.bias"].fill_(float("nan")), r"'fc.bias' has values that are not finite"),
        (lambda s: s["fc.bias"].fill_(float("inf")), r"'fc.bias' has values that are not finite"),
    ],
)
def test_weights_that_do_not_fit_name_the_key(checkpoint, change, message):
    state = load_file(checkpoint / WEIGHTS)
    change(state)
    save_file(state, checkpoint / WEIGHTS)
    resum(checkpoint)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "SHA256SUMS"])
def test_a_symbolic_link_is_not_followed(checkpoint, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    (checkpoint / name).rename(elsewhere)
    (checkpoint / name).symlink_to(elsewhere)
    with pytest.raises(ValueError, match="is a symbolic link; a checkpoint's files must be plain files"):
        load_checkpoint(checkpoint)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a plain file"):
        read_plain_file(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["../secret", "sub/file", "/etc/hostname", "..", "a b", ".hidden"])
def test_a_name_that_leaves_the_folder_is_refused(checkpoint, name):
    with (checkpoint / "SHA256SUMS").open("a") as sums:
        sums.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(ValueError, match="line that is not one sum and one plain file name"):
        load_checkpoint(checkpoint)


def test_a_file_that_is_not_listed_is_refused(checkpoint):
    (checkpoint / "more.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"more\.bin is not listed in SHA256SUMS"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "recipe.toml", "README.md", WEIGHTS])
def test_a_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    write_sums(checkpoint)
    with pytest.raises(ValueError, match=rf"lacks {name}"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda c: c.update(architecture="mlp4x24"), r"the model: in config\.json mlp4x24, in metrics"),
        (
            "metrics.json",
            lambda m: m.update(tag="other"),
            "disagree on the tag: in config.json digits, in metrics.json other",
        ),
        ("metrics.json", lambda m: m.update(sha256="0" * 64), "disagree on the SHA-256 of the weights"),
        ("config.json", lambda c: c.update(num_classes=11), "disagree on the number of classes: in config.json 11"),
        ("config.json", lambda c: c.update(architecture="local-dir:/etc"), "config.json: architecture: String should"),
        ("config.json", lambda c: c.update(num_classes="10"), "config.json: num_classes: Input should be"),
        (
            "config.json",
            lambda c: c.update(model_args={"checkpoint_path": "/x"}),
            r"config.json: model_args\.checkpoint_path",
        ),
        (
            "config.json",
            lambda c: c["pretrained_cfg"].update(input_size=[1, 10**9, 12]),
            r"input_size\.1: Input should",
        ),
        (
            "expected.json",
            lambda e: e.update(shape=[8, 1, 2000, 2000]),
            r"expected\.json: the file: .* shape \(8, 1, 2000, 2000\) is too large to try out",
        ),
        *(
            (
                "config.json",
                lambda c, size=size: c["pretrained_cfg"].update(test_input_size=size),
                r"config\.json: pretrained_cfg: .* test_input_size must be 1 channels, height and width, got",
            )
            for size in ("224", [224], [3, 12, 12], [1, 12, 10**9], [1, 12.0, 12])
        ),
        (
            "config.json",
            lambda c: c["pretrained_cfg"].update(test_crop_pct="1"),
            r"config\.json: pretrained_cfg: .* test_crop_pct must be a number above 0, got '1'",
        ),
        ("metrics.json", lambda m: m.pop("seeds"), "metrics.json: seeds: Field required"),
        ("metrics.json", lambda m: m.update(more=1), "metrics.json: more: Extra inputs"),
        ("metrics.json", lambda m: m.update(released_seed=3), r"the seed: in recipe\.toml 2, in metrics\.json 3"),
        ("metrics.json", lambda m: m["seeds"].pop(0), "seeds lacks the released one, 2"),
        ("metrics.json", lambda m: m["seeds"].append(m["seeds"][1]), "two of its seeds are the same"),
        ("metrics.json", lambda m: m.update(test_correct=361), "361 of 360 test images right is no test error of"),
        ("metrics.json", lambda m: m.update(test_correct=m["test_correct"] - 9), "test images right is no test error"),
        ("metrics.json", lambda m: m["seeds"][0].update(test_error=None), "is no test error of None, which seed 2 has"),
        ("metrics.json", lambda m: m["seeds"][1].update(test_error=-0.1), r"metrics.json: seeds\.1\.test_error: Input"),
        (
            "metrics.json",
            lambda m: m["seeds"][0].update(epochs=3.0),
            r"epochs: in recipe\.toml 2, in metrics\.json 3\.0",
        ),
        ("config.json", lambda c: c.update(num_features=25), "num_features is 25, the network has 24"),
        (
            "config.json",
            lambda c: c["pretrained_cfg"].update(first_conv="conv1"),
            "first_conv is 'conv1', a layer that",
        ),
        (
            "config.json",
            lambda c: c["pretrained_cfg"].update(classifier=["fc"]),
            r"classifier is \['fc'\], a layer that",
        ),
        (
            "config.json",
            lambda c: c["pretrained_cfg"].update(mean=[0.1, 0.2, 0.3]),
            "3 means and 1 stds for images of 1 channels",
        ),
        (
            "config.json",
            lambda c: c["pretrained_cfg"].update(std=[0.0]),
            r"_cfg\.std\.0: Input should be gre",
        ),
        (
            "config.json",
            lambda c: c["pretrained_cfg"].update(crop_pct=0.0),
            r"_cfg\.crop_pct: Input should be",
        ),
        (
            "config.json",
            lambda c: c["pretrained_cfg"].update(interpolation="x"),
            r"_cfg\.interpolation: Input",
        ),
        ("metrics.json", lambda m: m["data"].update(name="mnist"), r"data\.name: in recipe\.toml digits"),
        ("metrics.json", lambda m: m["data"].update(resize=28), r"data\.resize: in recipe\.toml 12"),
        ("metrics.json", lambda m: m.update(parameters=5003), "recorded with 5,003 parameters and has 5,002"),
        ("metrics.json", lambda m: m.update(test_images=0), "test_images: Input should be greater than or equal to 1"),
        ("expected.json", lambda e: e.clear(), "expected.json: shape: Field required"),
        ("expected.json", lambda e: e["shape"].__setitem__(3, 13), "disagree on the size of an image"),
        (
            "expected.json",
            lambda e: e["logits"].pop(),
            r"shape of the logits: in config\.json \(2, 10\), in \S+ \(1, 10\)",
        ),
        ("expected.json", lambda e: e["logits"][0].pop(), "disagree on the shape of the logits"),
        ("expected.json", lambda e: e["logits"][0].reverse(), "disagree on the function"),
        ("conditioning.json", lambda c: c.pop("at_init"), r"conditioning\.json lacks a record"),
        ("conditioning.json", lambda c: c["at_end"].update(layers={}), r"conditioning\.json: at_end has no layers"),
        (
            "conditioning.json",
            lambda c: c["at_end"]["layers"].pop("layers.1.linear"),
            r"conditioning\.json: at_end is of another network: it lacks the layer 'layers\.1\.linear'",
        ),
        (
            "conditioning.json",
            lambda c: c["at_init"]["layers"].update(conv1=c["at_init"]["layers"]["fc"]),
            r"conditioning\.json: at_init is of another network: it has a layer 'conv1', the network has none",
        ),
        (
            "conditioning.json",
            lambda c: c["at_end"]["layers"].update({"fc": c["at_end"]["layers"]["layers.0.linear"]}),
            r"of 'fc' it has \(144, 24\) inputs and outputs, the network \(24, 10\)",
        ),
        (  # the first where types are not checked, as they are in tests
            "conditioning.json",
            lambda c: c["at_end"].update(skipped=5),
            r"conditioning\.json(: at_end: skipped is no table of layers| lacks a record)",
        ),
        ("config.json", lambda c: c.update(model_args={"num_classes": 7}), r"config.json: model_args\.num_classes"),
        ("config.json", lambda c: c.update(model_args={"drop_rate": 0.5}), "a trained one has in_chans at most"),
    ],
)
def test_files_that_disagree_or_are_wrong_name_the_field(checkpoint, name, change, message):
    edit_json(checkpoint, name, change)
    write_sums(checkpoint)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(checkpoint)


def test_a_layer_that_was_skipped_is_no_other_network_s(checkpoint):
    def skip(record):
        record["at_end"]["layers"].pop("layers.1.linear")
        record["at_end"]["skipped"]["layers.1.linear"] = "its output gradient holds NaN"

    edit_json(checkpoint, "conditioning.json", skip)
    write_sums(checkpoint)
    load_checkpoint(checkpoint)


def test_steps_of_a_recipe_are_held_against_those_taken(checkpoint):
    steps = json.loads((checkpoint / "metrics.json").read_text())["seeds"][0]["steps"]
    recipe = checkpoint / "recipe.toml"
    for taken in (steps, steps + 1):
        recipe.write_text(re.sub(r"(?m)^(epochs|iterations) = \d+$", f"iterations = {taken}", recipe.read_text()))
        write_sums(checkpoint)
        match = rf"the number of steps: in recipe\.toml {taken}, in metrics\.json {steps}"
        with nullcontext() if taken == steps else pytest.raises(ValueError, match=match):
            load_checkpoint(checkpoint)


@pytest.mark.parametrize(("right", "accepted"), [(57, False), (58, True), (60, True), (61, False)])
def test_of_few_test_images_two_may_be_counted_otherwise(right, accepted):
    """Of 60 images, of which the training had 58 or 60 right, one is more than 1 %."""
    trained = SeedResult.model_construct(seed=1, test_error=2 / 60 if right > 58 else 0.0)
    metrics = Metrics.model_construct(released_seed=1, seeds=[trained], test_correct=right, test_images=60)
    with nullcontext() if accepted else pytest.raises(ValueError, match=f"m: {right} of 60 test images right is no"):
        check_results(metrics, "m")


def test_a_file_larger_than_memory_is_named(tmp_path, monkeypatch):
    class Large(io.BytesIO):
        def read(self, *_):
            raise MemoryError

    (tmp_path / WEIGHTS).write_bytes(b"x" * 1234)
    with monkeypatch.context() as patch:
        patch.setattr("condzoo.models.weight_files.os.fdopen", lambda handle, mode: os.close(handle) or Large())
        with pytest.raises(ValueError, match=r"model\.safetensors has 1,234 bytes, more than there is memory for"):
            read_plain_file(tmp_path / WEIGHTS)


def test_files_are_opened_as_bytes_where_a_system_tells_them_from_text(tmp_path, monkeypatch):
    """On Windows text ends at a byte of 26, and its ends of lines are changed."""
    binary, opened, flags_given = 1 << 29, os.open, []
    (tmp_path / WEIGHTS).write_bytes(b"a\r\n\x1ab")
    monkeypatch.setattr("os.O_BINARY", binary, raising=False)
    monkeypatch.setattr("os.open", lambda path, flags: flags_given.append(flags) or opened(path, flags & ~binary))
    assert read_plain_file(tmp_path / WEIGHTS) == b"a\r\n\x1ab"
    assert [bool(flags & binary) for flags in flags_given] == [True]


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        (
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 7 bytes. Error code 12",
            MemoryError,
            r"digits: too little memory to run its network on expected\.json: .*DefaultCPUAllocator",
        ),
        (
            "could not create a primitive",
            ValueError,
            "takes no images of its input_size, or there is too little memory",
        ),
    ],
)
def test_too_little_memory_is_not_the_files_fault(checkpoint, monkeypatch, said, kind, message):
    def fail(*_):
        raise RuntimeError(said)

    monkeypatch.setattr("condzoo.checkpoints.loading.logits_difference", fail)
    with pytest.raises(kind, match=message):
        load_checkpoint(checkpoint)


def test_a_config_of_a_giant_builds_nothing(checkpoint):
    def enlarge(config):
        config["num_classes"] = config["pretrained_cfg"]["num_classes"] = 10**13

    edit_json(checkpoint, "config.json", enlarge)
    write_sums(checkpoint)
    with pytest.raises(
        ValueError, match=r"the logits: in config\.json \(2, 10000000000000\), in expected\.json \(2, 10\)"
    ):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "nan", ""])
def test_json_that_is_none_names_the_file(checkpoint, text):
    (checkpoint / "config.json").write_text(text)
    write_sums(checkpoint)
    with pytest.raises(ValueError, match=r"config\.json: the file: "):
        load_checkpoint(checkpoint)


def test_parsing_gives_back_what_was_saved():
    state = {"a": torch.randn(3, 2), "n": torch.tensor(5)}
    parsed = parse_weights(save(state), "file")
    assert all(torch.equal(parsed[key], state[key]) for key in state)


def test_values_beyond_float32_are_finite():
    state = {"a": torch.tensor([1e300], dtype=torch.float64)}
    assert torch.equal(parse_weights(save(state), "file")["a"], state["a"])


@pytest.mark.parametrize("text", ["[]", "{", '{"at_init": 1, "at_end": 2}'])
def test_a_record_of_conditioning_that_is_none_names_the_file(checkpoint, text):
    (checkpoint / "conditioning.json").write_text(text)
    write_sums(checkpoint)
    with pytest.raises(ValueError, match=r"conditioning\.json lacks a record"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("field", "number"),
    [
        *(("eigenvalues", number) for number in ("NaN", "Infinity", "1e400", "-1.0")),
        *(("noise_floor", number) for number in ("NaN", "Infinity", "1e400", "-1.0", '"5"', "null", "[]", "{}")),
        ("loss", "NaN"),
    ],
)
def test_numbers_that_no_measurement_gives_are_refused_by_load_and_verify(checkpoint, field, number):
    text = (checkpoint / "conditioning.json").read_text()
    found = re.search(rf'"{field}": (?:\[\s*)?([^,\s]+)', text)
    (checkpoint / "conditioning.json").write_text(text[: found.start(1)] + number + text[found.end(1) :])
    write_sums(checkpoint)
    with pytest.raises(ValueError, match=r"conditioning\.json lacks a record: .*(eigenvalues|noise_floor|holds) "):
        load_checkpoint(checkpoint)
    assert not verify_checkpoint(checkpoint).ok


def test_an_mlp_for_images_of_another_shape_is_refused_although_the_values_are_as_many(checkpoint):
    edit_json(checkpoint, "config.json", lambda c: c["pretrained_cfg"].update(input_size=[1, 9, 16]))
    edit_json(checkpoint, "expected.json", lambda e: e.update(shape=[2, 1, 9, 16]))
    write_sums(checkpoint)
    with pytest.raises(ValueError, match=r"input_size is \(1, 9, 16\), the network takes \(1, 12, 12\)"):
        load_checkpoint(checkpoint)


def test_a_folder_that_is_both_trained_and_converted_is_refused(checkpoint):
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    fields = {key: metrics[key] for key in ("model", "tag", "sha256", "parameters")}
    record = fields | {"origin": "w.pth", "origin_sha256": None, "note": "", "license": "mit"}
    (checkpoint / "conversion.json").write_text(json.dumps(record))
    write_sums(checkpoint)
    with pytest.raises(ValueError, match=r"has both metrics\.json and conversion\.json"):
        load_checkpoint(checkpoint)


@pytest.fixture(scope="session")
def made_conversion(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("converted")
    torch.save(create_model("cifar_resnet8").state_dict(), root / "w.pth")
    return convert(root / "w.pth", "cifar_resnet8", out=root / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_pool": "nonsense"}, r"config\.json describes no network"),
        ({"global_pool": "max"}, "its files disagree on the function: .* off those of expected.json"),
        ({"in_chans": 1}, r"'conv1.weight' is \[16, 3, 3, 3\] float32"),
    ],
)
def test_a_config_that_makes_another_function_of_the_weights_is_refused(made_conversion, tmp_path, arguments, message):
    folder = shutil.copytree(made_conversion, tmp_path / made_conversion.name)
    load_checkpoint(folder)
    edit_json(folder, "config.json", lambda config: config["model_args"].update(arguments))
    write_sums(folder)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_folder_in_the_place_of_a_file_is_refused(checkpoint, name):
    (checkpoint / name).unlink()
    (checkpoint / name).mkdir()
    with pytest.raises(ValueError, match=rf"{name} is not a plain file"):
        load_checkpoint(checkpoint)
    (row,) = verify_checkpoint(checkpoint).rows
    assert row.ok is False
    assert "is not a plain file" in row.detail


def test_a_recipe_of_another_model_is_refused(checkpoint):
    recipe = checkpoint / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("mlp4x24_bn", "mlp4x24"))
    write_sums(checkpoint)
    with pytest.raises(ValueError, match=r"the model: in recipe\.toml mlp4x24, in metrics\.json mlp4x24_bn"):
        load_checkpoint(checkpoint)

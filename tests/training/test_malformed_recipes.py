"""Wrong recipes: each says the field, what came, what is allowed; none gives anything but a RecipeError."""

import copy
import datetime
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from condzoo.training import Recipe, RecipeError, consistency
from condzoo.training.consistency import _forward_fault
from condzoo.training.recipe import dump_recipe, load_recipe, parse_recipe, set_field
from condzoo.training.recipe_errors import field_paths

GOOD: dict[str, Any] = {
    "epochs": 3,
    "model": {"name": "mlp4x24"},
    "data": {"name": "digits", "batch_size": 64},
    "optim": {"name": "sgd", "lr": 0.1},
    "schedule": {"name": "step", "milestones": [1, 2]},
}
EXAMPLES = int(os.environ.get("CONDZOO_FUZZ", "300"))  # recipes made at random; 10000 takes some minutes
NONE = object()  # take the field out

# (field, value, the whole message after "recipe: ")
MALFORMED: list[tuple[str, Any, str]] = [
    ("epochs", 0, "epochs: got 0, must be greater than 0"),
    ("epochs", -3, "epochs: got -3, must be greater than 0"),
    ("epochs", 2.5, "epochs: got 2.5, must be a whole number"),
    ("epochs", True, "epochs: got true, must be a whole number"),
    ("epochs", "3", "epochs: got '3', must be a whole number"),
    ("epochs", NONE, "epochs: got neither of epochs and iterations, give exactly one"),
    ("iteration", 3, "iteration: unknown field; did you mean 'iterations'?"),
    ("seed", -1, "seed: got -1, must be greater than or equal to 0"),
    ("seed", 2**63, "seed: got 9223372036854775808, must be less than 9223372036854775808"),
    ("seed", "one", "seed: got 'one', must be a whole number"),
    ("sed", 1, "sed: unknown field; did you mean 'seed'?"),
    ("precision", "fp8", "precision: got 'fp8', must be one of: auto, fp32, bf16, fp16"),
    ("precision", 32, "precision: got 32, must be one of: auto, fp32, bf16, fp16"),
    ("channels_last", 1, "channels_last: got 1, must be one of: true, false, auto"),
    ("channels_last", "autp", "channels_last: got 'autp', must be one of: true, false, auto; did you mean 'auto'?"),
    ("compile", 1, "compile: got 1, must be true or false"),
    ("compile", "yes", "compile: got 'yes', must be true or false"),
    ("sync_bn", "yes", "sync_bn: got 'yes', must be true or false"),
    ("model.name", "z" * 3000, f"model.name: unknown model '{'z' * 56}...; condzoo.list_models() lists them all"),
    ("model.name", "a" * 99 + ".x", f"model.name: got '{'a' * 56}..., and .x names trained weights"),
    ("freeze", ["b c " * 99], f"freeze: '{'b c ' * 14}... matches no parameter; they are called like layers.0"),
    ("schedule.milestones", [*range(99, 0, -1)], "schedule.milestones: got [99, 98, 97, 96, 95, 94, 93, 92, 91, 90, "),
    ("k" * 99, 1, f"{'k' * 57}...: unknown field; a recipe has"),
    ("ema", 1.0, "ema: got 1.0, must be less than 1"),
    ("ema", 0, "ema: got 0, must be greater than 0"),
    ("ema", float("nan"), "ema: got nan, must be a finite number"),
    ("grad_clip", 0, "grad_clip: got 0, must be greater than 0"),
    ("grad_clip", float("inf"), "grad_clip: got inf, must be a finite number"),
    ("accumulate", 0, "accumulate: got 0, must be greater than 0"),
    ("accumulate", 10**30, "accumulate: got 1000000000000000000000000000000, must be less than or equal to 1e+09"),
    ("accumulate", datetime.date(1979, 5, 27), "accumulate: got 1979-05-27, must be a whole number"),
    ("accumulate", datetime.time(7, 32), "accumulate: got 07:32:00, must be a whole number"),
    ("accumulate", 65, "accumulate: got 65, must be at most data.batch_size (64)"),
    ("freeze", "fc.*", "freeze: got 'fc.*', must be a list [...], such as freeze=[\"fc.*\"]"),
    ("freeze", [1], "freeze[0]: got 1, must be a text in quotes"),
    ("freeze", ["fc.*", "nope"], "freeze: 'nope' matches no parameter; they are called like "),
    ("freeze", ["*"], "freeze: every parameter of the network is frozen; nothing is left to train"),
    ("probe.layers", ["nope"], "probe.layers: no layer matches 'nope'; did you mean 'layers.2.linear'?"),
    (
        "model.name",
        "vit_tiny_patch16_224",
        "model: takes no images of 1 x 8 x 8: Input height (8) doesn't match model (224). Try model.args.img_size = 8",
    ),
    ("model.name", "cifar_vgg16", "model: takes no images of 1 x 8 x 8: Given input size: (512x1x1). "),
    (
        "model",
        {"name": "resnet18", "args": {"features_only": True}},
        "model: gives a list for 2 images of 1 x 8 x 8, must be [2, 10]: one number a class",
    ),
    ("eval_every", -1, "eval_every: got -1, must be greater than or equal to 0"),
    ("eval_every", 0.5, "eval_every: got 0.5, must be a whole number"),
    ("save_every", 0, "save_every: got 0, must be greater than 0"),
    ("log_every", "all", "log_every: got 'all', must be a whole number"),
    ("on_divergence", "ignore", "on_divergence: got 'ignore', must be one of: stop, record"),
    ("model", NONE, "model: missing; it has no default"),
    ("model", "mlp4x24", "model: got 'mlp4x24', must be a table"),
    ("model.name", NONE, "model.name: missing; it has no default"),
    ("model.name", 3, "model.name: got 3, must be a text in quotes"),
    ("model.name", "mlp4x24_bm", "model.name: unknown model 'mlp4x24_bm'; did you mean 'mlp4x24_bn'"),
    ("model.name", "cifar_resnet57", "model: depth must be 6n + 2, got 57; nearest are 56 and 62"),
    ("model.init", "hee", "model: unknown init 'hee'; did you mean 'he'"),
    ("model.drop_rate", 1, "model.drop_rate: got 1, must be less than 1"),
    ("model.nam", "x", "model.nam: unknown field; did you mean 'model.name'?"),
    ("model.depth", 20, "model.depth: unknown field; model has: name, init, last_bn_init, drop_rate, args"),
    ("model.args", [1], "model.args: got [1], must be a table"),
    ("model.args.num_classes", 3, "model.args.num_classes: follows data.name; leave it out"),
    ("model.args.init", "he", "model.args.init: has a field of its own; use model.init"),
    (
        "model.args.checkpoint_path",
        "x.pt",
        "model.args.checkpoint_path: loads weights, which as a pickle run code, and",
    ),
    ("model.args.pretrained_cfg", {"file": "x.pt"}, "model.args.pretrained_cfg: loads weights, which as a pickle run"),
    ("model.args.pretrained", True, "model.args.pretrained: loads weights, which as a pickle run code, and a recipe"),
    ("model.args.cache_dir", "x", "model.args.cache_dir: loads weights, which as a pickle run code, and a recipe"),
    ("model.args", {"x": [None]}, "model.args.x: got None, which TOML has no word for; leave it out"),
    ("model.args.x", float("nan"), "model.args.x: got nan, must be a finite number"),
    ("model.args", {"x": {"y": [1, -math.inf]}}, "model.args.x: got -inf, must be a finite number"),
    ("model.args.x", datetime.date(2026, 1, 2), "model.args.x: got 2026-01-02, must be a number, a text, true or"),
    (
        "model.name",
        "resnet18.a1_in1k",
        "model.name: got 'resnet18.a1_in1k', and .a1_in1k names trained weights; a recipe trains from its "
        "initialization: give 'resnet18'",
    ),
    ("model.name", "hf-hub:timm/resnet18", "model.name: got 'hf-hub:timm/resnet18', a place that would be asked for"),
    ("data", [], "data: got [], must be a table"),
    ("data.name", "CIFAR10", "data.name: unknown data set 'CIFAR10'; did you mean 'cifar10'? one of: digits"),
    ("data.name", "cifar01", "data.name: unknown data set 'cifar01'; did you mean 'cifar10'? one of: digits"),
    ("data.batch_size", NONE, "data.batch_size: missing; it has no default"),
    ("data.batch_size", 0, "data.batch_size: got 0, must be greater than 0"),
    (
        "data.batch_size",
        10**30,
        "data.batch_size: got 1000000000000000000000000000000, must be less than or equal to 1e+09",
    ),
    ("data.resize", 10**30, "data.resize: got 1000000000000000000000000000000, must be less than or equal to 100000"),
    ("data.batch_size", True, "data.batch_size: got true, must be a whole number"),
    ("data.batchsize", 3, "data.batchsize: unknown field; did you mean 'data.batch_size'?"),
    ("data.augment", "cutout", "data.augment: got 'cutout', must be one of: none, paper, standard, alternating"),
    (
        "data",
        {"name": "digits", "batch_size": 64, "augment": "paper", "resize": 4},
        "data.augment: got 'paper', which reflects 4 pixels at each border and needs images over 4 pixels a side, and "
        "these have 4",
    ),
    ("data.drop_last", 0, "data.drop_last: got 0, must be true or false"),
    ("data.crop", 9, "data.crop: got 9, must be at most 8, the size of digits"),
    ("data.cutout", 0, "data.cutout: got 0, must be greater than 0"),
    ("data.cutout", 8, "data.cutout: got 8, must be under 8, the side of an image"),
    ("data.resize", -1, "data.resize: got -1, must be greater than 0"),
    ("data.root", 3, "data.root: got 3, must be a text in quotes"),
    ("optim", "sgd", "optim: got 'sgd', must be a table"),
    ("optim.name", NONE, "optim.name: missing; must be one of: sgd, gd, adam, adamw"),
    ("schedule.name", NONE, "schedule.name: missing; must be one of: constant, step, cosine, onecycle"),
    ("optim.name", "adamm", "optim.name: got 'adamm', must be one of: sgd, gd, adam, adamw; did you mean 'adam'?"),
    ("optim.lr", NONE, "optim.lr: missing; it has no default"),
    ("optim.lr", -1, "optim.lr: got -1, must be greater than 0"),
    ("optim.lr", 0, "optim.lr: got 0, must be greater than 0"),
    ("optim.lr", 1e39, "optim.lr: got 1e+39, must be less than or equal to 1e+30"),
    ("optim.weight_decay", 1e39, "optim.weight_decay: got 1e+39, must be less than or equal to 1e+06"),
    ("save_every", 1e308, "save_every: got 1e+308, must be less than or equal to 1e+09"),
    ("epochs", 10**400, "epochs: got 1000"),
    ("schedule.gamma", 1e300, "schedule.gamma: got 1e+300, must be less than or equal to 1e+30"),
    (
        "schedule.gamma",
        1e20,
        "schedule.gamma: got 1e+20, which takes optim.lr beyond 1e+30 in 2 milestones; take a smal",
    ),
    ("schedule.warmup_epochs", 1e308, "schedule.warmup_epochs: got 1e+308, must be less than or equal to 1e+09"),
    ("optim.lr", "0.1", "optim.lr: got '0.1', must be a number"),
    ("optim.lr", True, "optim.lr: got true, must be a number"),
    ("optim.lr", float("nan"), "optim.lr: got nan, must be a finite number"),
    ("optim.lrr", 0.1, "optim.lrr: unknown field; did you mean 'optim.lr'?"),
    ("optim.momentum", 1, "optim.momentum: got 1, must be less than 1"),
    ("optim.nesterov", True, "optim.nesterov: got true, needs optim.momentum above 0"),
    ("optim.betas", [0.9, 0.99], "optim.betas: unknown field of this kind; it belongs to: adam, adamw; leave it "),
    ("optim", {"name": "adam", "lr": 1.0, "betas": [0.9]}, "optim.betas: got [0.9], must be a list of at least 2"),
    (
        "optim",
        {"name": "adam", "lr": 1.0, "betas": [0.9] * 3},
        "optim.betas: got [0.9, 0.9, 0.9], must be a list of at",
    ),
    ("optim", {"name": ["sgd"], "lr": 1.0}, "optim.name: got ['sgd'], must be one of: sgd, gd, adam, adamw"),
    ("optim.name", "SGD", "optim.name: got 'SGD', must be one of: sgd, gd, adam, adamw; did you mean 'sgd'?"),
    (
        "optim.dampening",
        0.1,
        "optim.dampening: unknown field; optim has: name, lr, momentum, nesterov, weight_decay, decay_norm",
    ),
    ("data", {"batch_size": 3}, "data.name: missing; it has no default"),
    ("MODEL", {}, "MODEL: unknown field; did you mean 'model'?"),
    ("model.args.name", "x", "model.args.name: has a field of its own; use model.name"),
    (
        "model",
        {"name": "resnet18", "args": {"norm_layer": "nonorm"}},
        "model: KeyError: 'nonorm'",
    ),
    ("optim.weight_decay", -1e-4, "optim.weight_decay: got -0.0001, must be greater than or equal to 0"),
    ("lr", 0.1, "lr: unknown field; did you mean 'optim.lr'?"),
    ("modle", {}, "modle: unknown field; did you mean 'model'?"),
    ("schedule.name", "steps", "schedule.name: got 'steps', must be one of: constant, step, cosine, onecycle; did"),
    ("schedule.milestones", [2, 1], "schedule.milestones: got [2, 1], must be ascending"),
    ("schedule.milestones", [0], "schedule.milestones[0]: got 0, must be greater than 0"),
    ("schedule.milestones", [1.5], "schedule.milestones[0]: got 1.5, must be a whole number"),
    ("schedule.milestones", 3, "schedule.milestones: got 3, must be a list [...]"),
    (
        "schedule.milestones",
        "4, 6",
        "schedule.milestones: got '4, 6', must be a list [...], such as schedule.milestones",
    ),
    ("schedule.unit", "step", "schedule.unit: got 'step', must be one of: epoch, iteration"),
    (
        "schedule.min_lr",
        0.1,
        "schedule.min_lr: unknown field of this kind; it belongs to: cosine; leave it out (--set ",
    ),
    ("schedule.warmup_iterations", 0.5, "schedule.warmup_iterations: got 0.5, must be a whole number"),
    (
        "schedule",
        {"name": "cosine", "warmup_epochs": 1, "warmup_iterations": 5},
        "schedule.warmup_iterations: got both this and schedule.warmup_epochs, give one",
    ),
    ("schedule.warmup_epochs", -1, "schedule.warmup_epochs: got -1, must be greater than or equal to 0"),
    ("loss.label_smoothing", 1, "loss.label_smoothing: got 1, must be less than 1"),
    ("loss.smoothing", 0.1, "loss.smoothing: unknown field; did you mean 'loss.label_smoothing'?"),
    ("probe.every", -1, "probe.every: got -1, must be greater than or equal to 0"),
    ("probe.conv", "patch", "probe.conv: got 'patch', must be one of: channels, patches; did you mean 'patches'?"),
    ("probe.layers", "fc,a", 'probe.layers: got \'fc,a\', must be a list [...], such as probe.layers=["fc", "a"]'),
]


def changed(field: str, value: Any) -> dict[str, Any]:
    tables = copy.deepcopy(GOOD)
    set_field(tables, field, None if value is NONE else value)
    return tables


IDS = [f"{i} {f}={'no field' if v is NONE else repr(v)}"[:40] for i, (f, v, _) in enumerate(MALFORMED)]


@pytest.mark.parametrize(("field", "value", "message"), MALFORMED, ids=IDS)
def test_a_malformed_recipe_says_what_is_wrong(field: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(changed(field, value))
    assert str(caught.value).startswith(f"recipe: {message}")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


def test_what_is_said_to_mend_a_recipe_mends_it() -> None:
    name = "digits/resnet20_nobn"
    with pytest.raises(RecipeError, match=r"leave it out \(--set optim\.momentum=none\)"):
        load_recipe(name, ["optim.name=adamw"])
    others = ["optim.name=adamw", "optim.momentum=none", "optim.nesterov=none"]
    assert load_recipe(name, others).optim.name == "adamw"
    with pytest.raises(RecipeError, match=r'such as freeze=\["conv1\*"\]$'):
        load_recipe(name, ["freeze=conv1*"])
    assert load_recipe(name, ['freeze=["conv1*"]']).freeze == ["conv1*"]
    with pytest.raises(RecipeError, match=r"Try model\.args\.img_size = 16$"):
        load_recipe(name, ["model.name=vit_tiny_patch16_224"])
    assert load_recipe(name, ["model.name=vit_tiny_patch16_224", "model.args.img_size=16"]).model.args["img_size"] == 16


def test_an_unknown_field_of_a_table_without_its_name_is_still_explained() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(changed("data", {"batchsize": 3}))
    assert "data.batchsize: unknown field; did you mean 'data.batch_size'?" in str(caught.value).splitlines()[-1]


HEAD = 'epochs = 1\n[model]\nname = "mlp4x24"\n[data]\nname = "digits"\nbatch_size = 64\n'
OPTIM = '[optim]\nname = "sgd"\nlr = 0.1\n'
DEEP = ".".join(["a"] * 3000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "'schedule.warmup' = 5\n" + HEAD + OPTIM,
            "'schedule.warmup': unknown field; a name in quotes is no path: write sched",
        ),
        (
            "'optim.x' = 5\n" + HEAD,
            "'optim.x': unknown field; a name in quotes is no path: write optim.x without quotes",
        ),
        ("'optim.x' = 5\n" + HEAD + "[optim]\nlr = 1\n", "'optim.x': unknown field; a name in quotes is no path"),
        (
            "'optim.lr' = 5\n" + HEAD + OPTIM,
            "'optim.lr': unknown field; a name in quotes is no path: write optim.lr without",
        ),
        ("'optim.x' = 5\noptim = 1\n" + HEAD, "'optim.x': unknown field; a name in quotes is no path"),
        ("seed = 1" + "0" * 5000 + "\n" + HEAD + OPTIM, "not a TOML file: Exceeds the limit"),
        ("seed = 0x1" + "0" * 5000 + "\n" + HEAD + OPTIM, "seed: got what is too long to be shown, must be"),
        (f"seed.{DEEP} = 1\n" + HEAD + OPTIM, "seed: got "),  # Python 3.13 writes such tables, and 3.11 does not
        (HEAD + f"[model.args]\n{DEEP} = 1\n" + OPTIM, "tables are nested too deep"),
        (f"[variants.x]\n{DEEP} = 1\n" + HEAD + OPTIM, "tables are nested too deep"),
    ],
)
def test_keys_that_are_no_fields_of_anything_are_faults_of_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as said:
        load_recipe(path)
    assert f"{path}: {message}" in str(said.value)


def test_an_override_of_too_many_digits_is_a_fault_of_its_field() -> None:
    with pytest.raises(RecipeError, match=r"seed: got '9{56}\.\.\., must be a whole number$"):
        load_recipe("digits/resnet20_nobn", ["seed=" + "9" * 5000])


def test_the_list_is_long_enough_and_the_good_recipe_is_good() -> None:
    assert len(MALFORMED) >= 60
    assert isinstance(parse_recipe(copy.deepcopy(GOOD)), Recipe)
    touched = {re.split(r"\.", field)[0] for field, _, _ in MALFORMED}
    assert touched >= set(Recipe.model_fields) - {"iterations"}


TOML_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["sgd", "adam", "step", "auto", "mlp4x24", "cifar10", "none"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(sorted({path for path, _ in field_paths()} | {"model", "optim", "schedule", "data", "x"}))


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.dictionaries(FIELDS, TOML_VALUES, max_size=4))
def test_any_change_gives_a_recipe_or_a_recipe_error(changes: dict[str, Any]) -> None:
    tables = copy.deepcopy(GOOD)
    try:
        for field, value in changes.items():
            set_field(tables, field, value)
        recipe = parse_recipe(tables)
    except RecipeError:
        return
    assert dump_recipe(recipe)


@settings(max_examples=EXAMPLES // 3, deadline=None)
@given(st.text(max_size=60) | st.lists(FIELDS.map(lambda f: f"{f} = 1\n")).map("".join))
def test_any_text_gives_a_recipe_or_a_recipe_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RecipeError):
        load_recipe(path)


class Calls(nn.Module):
    """A network that is a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def test_a_network_that_looks_at_values_is_not_judged_by_shapes():
    """The meta device has none, which torch says in many ways."""
    looks = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.nonzero, torch.unique)
    for look in (
        *looks,
        lambda x: x[x > 0],
        lambda x: float(x.mean()),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: torch.equal(x, x),
    ):
        assert _forward_fault(Calls(look), (1, 1, 1), 10) == ""


def test_a_network_without_a_forward_pass_is_a_fault():
    assert "images of 1 x 8 x 8: Module [Module] is missing" in _forward_fault(nn.Module(), (1, 8, 8), 10)


def test_a_network_that_was_mended_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook, whose cell that registers it is run again."""
    outputs = iter((7, 10, 10))
    monkeypatch.setattr(consistency, "network_of", lambda *_: nn.Sequential(nn.Flatten(), nn.Linear(64, next(outputs))))
    given = changed("model", {"name": "a_network_of_a_notebook"})
    with pytest.raises(RecipeError, match=r"model: gives \[2, 7\] for 2 images of 1 x 8 x 8, must be \[2, 10\]"):
        parse_recipe(given)
    assert parse_recipe(given) == parse_recipe(given)
    assert next(outputs) == 10, "one without a fault is not built again"

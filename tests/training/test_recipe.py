"""Reading recipes: overrides, names, round trips, and what is shipped."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from condzoo.training import RecipeError, dump_recipe, load_recipe, parse_grid, plan_sweep, recipe_files
from condzoo.training.recipe import parse_override
from condzoo.training.schema import Adam, AdamW, Constant, Cosine, FullBatch, OneCycle, Sgd, Step

MINIMAL = """
epochs = 3
[model]
name = "mlp4x24"
[data]
name = "digits"
batch_size = 64
[optim]
name = "sgd"
lr = 1
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL)
    return path


def test_a_minimal_recipe_has_every_field_resolved(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.optim == Sgd(name="sgd", lr=1.0)
    assert isinstance(recipe.optim.lr, float)
    assert recipe.schedule == Constant(name="constant")
    assert (recipe.seed, recipe.precision, recipe.probe.every) == (0, "auto", 0)


def test_the_resolved_recipe_reads_back_equal(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file, ["ema=0.999", "model.args.bias=false", "schedule.name=onecycle", "freeze=['fc.*']"])
    again = tmp_path / "again.toml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe
    assert dump_recipe(load_recipe(again)) == again.read_text()


def test_a_recipe_is_found_by_path_and_by_name() -> None:
    by_name = load_recipe("cifar10/resnet20_lastbn")
    assert load_recipe("recipes/cifar10/resnet20_lastbn.toml") == by_name
    assert load_recipe(recipe_files()["cifar10/resnet20_lastbn"]) == by_name
    assert by_name.schedule == Step(name="step", milestones=[79, 119], reset_momentum=True)


def test_missing_recipes_name_the_closest() -> None:
    message = r"no recipe 'cifar10/resnet20_lastbm': .* did you mean 'cifar10/resnet20_lastbn'"
    with pytest.raises(FileNotFoundError, match=message):
        load_recipe("cifar10/resnet20_lastbm")
    with pytest.raises(FileNotFoundError, match=r"; `condzoo recipes` lists them"):
        load_recipe("/no/such/???.toml")


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("optim.lr=0.05", "lr", 0.05),
        ("optim.lr = 1e-3", "lr", 1e-3),
        ("optim.lr=2", "lr", 2.0),
        ("optim.momentum=0.9", "momentum", 0.9),
        ("optim.decay_norm=false", "decay_norm", False),
    ],
)
def test_overrides_are_toml_values(override: str, field: str, value: Any, file: Path) -> None:
    assert getattr(load_recipe(file, [override]).optim, field) == value


def test_the_mark_that_windows_puts_before_a_text_is_none_of_it(file: Path, tmp_path: Path) -> None:
    marked = tmp_path / "marked.toml"
    marked.write_text(file.read_text(), encoding="utf-8-sig", newline="\r\n")
    assert marked.read_bytes().startswith(b"\xef\xbb\xbf")
    assert load_recipe(marked) == load_recipe(file)


def test_one_override_may_be_a_text(file: Path) -> None:
    assert load_recipe(file, "optim.lr=0.05") == load_recipe(file, ["optim.lr=0.05"])


def test_an_override_is_one_value(file: Path) -> None:
    """What comes after a line break was left out in silence."""
    with pytest.raises(RecipeError, match=r"optim\.lr: got '0\.1\\nseed=5', must be a number"):
        load_recipe(file, ["optim.lr=0.1\nseed=5"])


def test_overrides_may_be_bare_words_lists_and_none(file: Path) -> None:
    recipe = load_recipe(file, ["model.name=mlp5x256", "precision=fp32", "probe.layers=['fc']", "data.crop=6"])
    assert (recipe.model.name, recipe.precision, recipe.probe.layers) == ("mlp5x256", "fp32", ["fc"])
    assert load_recipe(file, ["data.crop=6", "data.crop=none"]).data.crop is None


def test_an_argument_that_is_not_there_is_not_taken_out(file: Path) -> None:
    """Some networks take the text "none", and would be trained as if it had not been given."""
    message = r"""none takes a field out, and model\.args\.bias is not in the recipe; leave it out, or for the text """
    message += r"""none write model\.args\.bias='"none"'"""
    with pytest.raises(RecipeError, match=message):
        load_recipe(file, ["model.args.bias=none"])
    with pytest.raises(RecipeError, match=message):
        plan_sweep(load_recipe(file), parse_grid(["model.args.bias=false,none"]))
    text = load_recipe(file, ["model.name=resnet10t", 'model.args.norm_layer="none"', "data.crop=none"])
    assert text.model.args == {"norm_layer": "none"}
    assert load_recipe(file, ["model.args.bias=false", "model.args.bias=none"]).model.args == {}
    planned = plan_sweep(load_recipe(file, ["model.args.bias=false"]), parse_grid(["model.args.bias=false,none"]))
    assert [recipe.model.args for recipe in planned.values()] == [{"bias": False}, {}]


def test_of_epochs_and_iterations_the_override_stays(file: Path) -> None:
    recipe = load_recipe(file, ["iterations=100"])
    assert (recipe.epochs, recipe.iterations) == (None, 100)
    assert load_recipe(file, ["iterations=100", "epochs=5"]).epochs == 5
    assert load_recipe(file, ["iterations=100", "epochs=none"]).iterations == 100


def test_variants_that_are_known_to_diverge_record_it() -> None:
    assert load_recipe("mnist/mlp20x256").on_divergence == "stop"
    assert [load_recipe(f"mnist/mlp20x256_lr{lr}").on_divergence for lr in ("0.1", "1")] == ["record"] * 2


def test_milestones_beyond_the_end_are_not_reached() -> None:
    assert load_recipe("cifar10/resnet20_lastbn", ["epochs=2"]).epochs == 2


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim..lr=1", ".lr=1", ""])
def test_an_override_must_be_field_equals_value(override: str) -> None:
    with pytest.raises(RecipeError, match=r"must be FIELD=VALUE, e\.g\. optim\.lr=0\.05"):
        parse_override(override)


def test_an_override_through_a_value_is_an_error(file: Path) -> None:
    with pytest.raises(RecipeError, match=r"override epochs.lr=1: epochs is a value, not a table"):
        load_recipe(file, ["epochs.lr=1"])


@pytest.mark.parametrize(
    ("table", "kind"),
    [
        ({"name": "sgd", "lr": 0.1}, Sgd),
        ({"name": "gd", "lr": 0.1}, FullBatch),
        ({"name": "adam", "lr": 0.1, "betas": [0.9, 0.99]}, Adam),
        ({"name": "adamw", "lr": 0.1}, AdamW),
    ],
)
def test_optimizers_by_name(table: dict[str, Any], kind: type, tiny: Any) -> None:
    assert type(tiny(optim=table).optim) is kind


@pytest.mark.parametrize(
    ("table", "kind"),
    [
        ({"name": "constant"}, Constant),
        ({"name": "step", "milestones": [3]}, Step),
        ({"name": "cosine", "warmup_epochs": 1}, Cosine),
        ({"name": "onecycle", "pct_start": 0.2}, OneCycle),
    ],
)
def test_schedules_by_name(table: dict[str, Any], kind: type, tiny: Any) -> None:
    assert type(tiny(schedule=table).schedule) is kind


def test_toml_errors_give_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("epochs = 3\nseed = = 1\n")
    with pytest.raises(RecipeError, match=r"broken\.toml: not a TOML file: .*line 2"):
        load_recipe(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"broken\.toml: not a TOML file: "):
        load_recipe(path)


def test_several_faults_are_all_told(file: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, ["optim.lrr=1", "data.batch_size=-1", "probe.conv=channel"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{file}: ") for line in lines)
    assert tomllib.loads(MINIMAL)["optim"]["lr"] == 1


def test_a_schedule_has_a_name_wherever_it_comes_from(file: Path) -> None:
    """Left out it was a constant one to the code, missing to a file, and lost by a sweep."""
    with pytest.raises(RecipeError, match=r"schedule\.name: missing; must be one of: constant, step, cosine, onecycle"):
        load_recipe(file, ["schedule.warmup_epochs=5"])
    with pytest.raises(ValidationError, match="name"):
        Constant(warmup_epochs=1.0)
    warm = load_recipe(file).model_copy(update={"schedule": Constant(name="constant", warmup_epochs=1.0)})
    assert [recipe.schedule for recipe in plan_sweep(warm, {}, [1, 2]).values()] == [warm.schedule] * 2

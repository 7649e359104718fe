"""The recipes that come with condzoo: each loads, says what it is, and has the steps of its source; variants."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from condzoo.training import Recipe, RecipeError, dump_recipe, load_recipe, recipe_files, recipe_headers, train
from condzoo.training.data_sets import class_count, image_shape
from condzoo.training.recipe import parse_recipe, recipe_tables
from condzoo.training.recipe_files import read_tables, recipe_sources
from condzoo.training.schedules import learning_rate

SOURCES = recipe_sources()
NAMES = list(SOURCES)
IMAGES = {"digits": 1437, "mnist": 60_000, "cifar10": 50_000, "cifar100": 50_000, "imagefolder": 1_281_167}
DEPTHS = (20, 32, 44, 56, 110, 230, 1202)
TABLE_B = (20, 44, 56, 110)


def steps(recipe: Recipe) -> tuple[int, int]:
    """(steps an epoch, steps of the run) on the data set as published."""
    images, batch = IMAGES[recipe.data.name], recipe.data.batch_size
    an_epoch = 1 if recipe.optim.name == "gd" else images // batch if recipe.data.drop_last else -(-images // batch)
    return an_epoch, recipe.iterations or (recipe.epochs or 0) * an_epoch


def drops_at(recipe: Recipe, *milestones: int) -> bool:
    """Whether the learning rate starts as the optimizer's and is divided by 10 at these steps, and only there."""
    an_epoch, total = steps(recipe)

    def rate(step: int) -> float:
        return learning_rate(recipe.schedule, recipe.optim.lr, step, steps_per_epoch=an_epoch, total_steps=total)

    edges = [0, *milestones, total]
    return all(
        rate(first) == rate(after - 1) == pytest.approx(recipe.optim.lr / 10**drops)
        for drops, (first, after) in enumerate(pairwise(edges))
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads_by_name_and_builds_its_network(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)  # checking builds the network on the meta device, for these images
    again = tmp_path / "again.toml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe
    assert load_recipe(f"{SOURCES[name].path}:{SOURCES[name].variant}" if SOURCES[name].variant else name) == recipe
    assert (image_shape(recipe.data)[0], class_count(recipe.data)) == {
        "mnist": (1, 10),
        "digits": (1, 10),
        "cifar10": (3, 10),
        "cifar100": (3, 100),
        "imagefolder": (3, 1000),
    }[recipe.data.name]


@pytest.mark.parametrize("name", [name for name in NAMES if SOURCES[name].variant is None])
def test_every_file_says_what_it_is(name: str) -> None:
    header = [line for line in SOURCES[name].path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert f"condzoo train recipes/{name}.toml" in text
    for word in ("Expected:", "Source:", "Departs:"):
        assert f"# {word}" in text
    assert recipe_headers()[name] == header[0].strip("# ")
    for line in header:
        words = line.split()
        if words[:3] == ["#", "condzoo", "train"] and not words[3].startswith("recipes/"):
            assert words[3] in NAMES


def test_every_network_of_the_scope_has_its_recipe() -> None:
    wanted = {f"cifar10/{family}{d}{s}" for d in DEPTHS for family, s in (("resnet", ""), ("resnet", "_lastbn"))}
    wanted |= {f"cifar10/preresnet{d}{s}" for d in DEPTHS for s in ("", "_nofinalbn")}
    wanted |= {name.replace("cifar10", "cifar100") for name in wanted}
    wanted |= {f"cifar10/{net}{d}_nobn{s}" for d in TABLE_B for net in ("resnet", "vgg") for s in ("", "_lastbn")}
    wanted |= {f"cifar10/vgg{d}" for d in TABLE_B}
    wanted |= {"cifar10/vgg16", *(f"cifar10/vgg16_{groups}" for groups in ("00001", "00011", "00111", "01111"))}
    wanted |= {f"imagenet/resnet{d}{s}{c}" for d in (18, 50) for s in ("", "_lastbn") for c in ("", "_wd0.0002")}
    wanted |= {f"imagenet/resnet{d}{s}_dropout0.3" for d in (18, 50) for s in ("", "_lastbn")}
    wanted |= {f"mnist/mlp20x256{bn}{way}" for bn in ("", "_bn") for way in ("", "_gd", "_adam", "_adam_lr0.0005")}
    assert wanted <= set(NAMES)
    for name in NAMES:  # a name says which network it trains
        group, _, own = name.rpartition("/")
        model = load_recipe(name).model.name.removeprefix("cifar_")
        assert own.startswith(model) or model.startswith(own)
        assert group.partition("/")[0] in ("digits", "mnist", "cifar10", "cifar100", "imagenet")


AUTHORS = [n for n in NAMES if n.startswith(("cifar10/resnet", "cifar10/preresnet", "cifar100/")) and "_nobn" not in n]


@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_cifar_training(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.data.batch_size, recipe.data.augment, steps(recipe)) == (128, "paper", (390, 160 * 390))
    assert recipe.optim.model_dump() == load_recipe("cifar10/resnet20").optim.model_dump()
    assert recipe.optim.lr == 0.1
    assert drops_at(recipe, 79 * 390, 119 * 390)
    assert recipe.model.last_bn_init == ("uniform" if "_lastbn" in name else None)
    optim = recipe_tables(recipe)["optim"]
    assert (optim["momentum"], optim["nesterov"], optim["weight_decay"], optim["decay_norm"]) == (0.9, True, 1e-4, True)


@pytest.mark.parametrize("name", [name for name in NAMES if "_nobn" in name and name.startswith("cifar10/")])
def test_table_b(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.optim.lr == 0.01
    assert drops_at(recipe, 32_000, 48_000)
    assert (steps(recipe)[1], recipe.data.augment, recipe_tables(recipe)["optim"]["weight_decay"]) == (
        64_000,
        "standard",
        0.0,
    )
    assert "the paper has" in recipe_headers()[name] or "20_nobn" in name


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("imagenet/resnet")])
def test_table_a(name: str) -> None:
    recipe, bare = load_recipe(name), name.split("_wd")[0].split("_dropout")[0]
    assert steps(recipe) == (5005, 100 * 5005)
    assert recipe.optim.lr == 0.1
    assert drops_at(recipe, 30 * 5005, 60 * 5005, 90 * 5005)
    assert recipe_tables(recipe)["optim"]["weight_decay"] == (2e-4 if "_wd" in name else 1e-4)
    assert recipe.model.drop_rate == (0.3 if "_dropout" in name else None)
    assert recipe.model.name == bare.removeprefix("imagenet/")
    assert (recipe.data.image_size, recipe.data.eval_resize, recipe.data.augment) == (224, 256, "paper")


@pytest.mark.parametrize("groups", ["00001", "00011", "00111", "01111"])
def test_blocked_groups(groups: str) -> None:
    blocked = [f"group{number}.*" for number, learns in enumerate(groups, 1) if learns == "0"]
    assert load_recipe(f"cifar10/vgg16_{groups}").freeze == blocked
    assert load_recipe("cifar10/vgg16").freeze == []


SMALL = {  # a recipe -> a network of its family that a test can afford; None: its own
    "cifar10/resnet1202": "cifar_resnet8",
    "cifar10/preresnet20_nofinalbn": "cifar_preresnet8_nofinalbn",
    "cifar10/vgg110_nobn_lastbn": "cifar_vgg8_nobn_lastbn",
    "cifar10/modern/resnet56_lastbn": "cifar_resnet8_lastbn",
    "cifar10/modern/preresnet20_lastbn": "cifar_preresnet8_lastbn",
    "cifar10/modern/vgg16_long": "cifar_vgg8",
    "mnist/mlp20x256_bn_gd_random": "mlp4x24_bn",
    "mnist/mlp20x256_adam": "mlp4x24",
}


@pytest.mark.parametrize("name", SMALL)
def test_one_of_each_family_takes_two_steps_on_digits(name: str, tmp_path: Path) -> None:
    tables = recipe_tables(load_recipe(name))
    tables["model"] |= {"name": SMALL[name]}
    tables["data"] |= {"name": "digits", "batch_size": 32}
    if "cutout" in tables["data"]:
        tables["data"]["cutout"] = 2  # of images 8 pixels wide
    run = train(parse_recipe(tables), out=tmp_path / "run", max_steps=2, device="cpu")
    assert (run.summary["status"], run.summary["steps"]) == ("done", 2)


def test_an_imagenet_recipe_takes_two_steps_on_folders(folders: Any, tmp_path: Path) -> None:
    small = ["data.num_classes=none", "data.image_size=32", "data.eval_resize=36", "data.batch_size=4", "probe.every=1"]
    recipe = load_recipe("imagenet/resnet18_lastbn_dropout0.3", small)
    run = train(recipe, out=tmp_path / "run", max_steps=2, device="cpu", data_root=folders())
    assert (run.summary["steps"], run.summary["num_classes"]) == (2, 3)


MINE = """
epochs = 3
[model]
name = "mlp4x24"
[data]
name = "digits"
batch_size = 64
[optim]
name = "sgd"
lr = 0.1
[variants]
"""


def written(tmp_path: Path, variants: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(MINE + variants)
    return path


def test_a_variant_changes_its_file_and_overrides_change_it(tmp_path: Path) -> None:
    path = written(tmp_path, 'deep = { "model.name" = "mlp8x24", iterations = 5, about = "deeper" }\n')
    assert (load_recipe(path).model.name, load_recipe(path).epochs) == ("mlp4x24", 3)
    deep = load_recipe(f"{path}:deep")
    assert (deep.model.name, deep.epochs, deep.iterations) == ("mlp8x24", None, 5)
    assert load_recipe(f"{path}:deep", ["model.name=mlp5x256"]).model.name == "mlp5x256"


@pytest.mark.parametrize(
    "variants",
    [
        'deep = { "model.name" = "mlp8x24_lastbn", "probe.every" = 5 }',
        'deep = { model.name = "mlp8x24_lastbn", probe.every = 5 }',
        '[variants.deep]\nmodel.name = "mlp8x24_lastbn"\nprobe = { every = 5 }',
        '[variants.deep.model]\nname = "mlp8x24_lastbn"\n[variants.deep.probe]\nevery = 5',
    ],
)
def test_a_variant_changes_the_fields_that_it_names_however_it_is_written(variants: str, tmp_path: Path) -> None:
    """Tables of TOML's own took the place of the file's."""
    path = written(tmp_path, variants)
    more = 'drop_rate = 0.5\n[model.args]\nbias = false\n[probe]\nevery = 10\nlayers = ["fc"]\n[data]'
    path.write_text(path.read_text().replace("[data]", more, 1))
    deep = load_recipe(f"{path}:deep")
    assert (deep.model.name, deep.model.drop_rate, deep.model.args) == ("mlp8x24_lastbn", 0.5, {"bias": False})
    assert (deep.probe.every, deep.probe.layers) == (5, ["fc"])


def test_a_table_that_is_an_argument_of_the_network_is_a_value(tmp_path: Path) -> None:
    variants = {"a": {"model": {"args": {"cfg": {"x": 1}, "y": 2}, "init": "he"}, "about": "w"}, "b": {"probe": {}}}
    path = written(tmp_path, tomli_w.dumps({"variants": variants}).removeprefix("[variants]\n"))
    fields = {"model.args.cfg": {"x": 1}, "model.args.y": 2, "model.init": "he", "about": "w"}
    assert read_tables(path)[1] == {"a": fields, "b": {"probe": {}}}


@pytest.mark.parametrize(
    ("variants", "name", "message"),
    [
        ('deep = { "optim.lr" = 1 }', "dep", r"mine\.toml: no variant 'dep'; did you mean 'deep'\? it has: deep"),
        ("", "deep", r"mine\.toml: no variant 'deep'; it has none"),
        ("deep = 3", "deep", r"mine\.toml: variants\.deep: got 3, must be a table of changes, \{ \"optim\.lr\" = 0"),
        ('deep = { about = 3, "optim.lr" = 1 }', "deep", r"variants\.deep\.about: got 3, must be a text in quotes"),
        ('deep = { about = "same" }', "deep", r"mine\.toml: variants\.deep: changes nothing"),
        ('"a:b" = { epochs = 3 }', "b", r"mine\.toml: variants\.'a:b': a variant is called by FILE:NAME"),
        ('"" = { epochs = 3 }', "", r"mine\.toml: variants\.'': a variant is called by FILE:NAME"),
        ('deep = { "optim.lrr" = 1 }', "deep", r"mine\.toml:deep: optim\.lrr: unknown field; did you mean 'optim\.lr'"),
    ],
)
def test_faulty_variants(variants: str, name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(f"{written(tmp_path, variants)}:{name}")


@pytest.mark.parametrize(
    ("value", "said"),
    [("3", "3"), (repr("x" * 5000), r"'x{56}\.\.\."), ("0x" + "f" * 5000, "what is too long to be shown")],
    ids=["number", "long text", "number of more digits than Python writes"],
)
def test_variants_must_be_a_table(value: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"variants = {value}\n" + MINE.replace("[variants]\n", ""))
    with pytest.raises(RecipeError, match=rf"variants: got {said}, must be a table of variants"):
        load_recipe(path)


def test_a_recipe_is_listed_with_what_it_changes() -> None:
    headers = recipe_headers()
    assert headers["cifar10/resnet44_nobn"].startswith(
        "cifar10/resnet20_nobn with model.name = cifar_resnet44_nobn; the"
    )
    assert list(headers) == NAMES == list(recipe_files())

"""Every file of recipes/paper/: it parses, its claims can be judged, its runs are recipes, and it can be drawn."""

import inspect
import json
from pathlib import Path

import matplotlib
import pytest

from condzoo.experiments import collect, draw, experiment_ids, judge, load_experiment
from condzoo.experiments.claims import Verdict
from condzoo.experiments.data_files import read_data_file
from condzoo.experiments.loading import parse_experiment, planned_runs, settings_of, training_of
from condzoo.experiments.measures import MEASURES
from condzoo.experiments.training import digest, row_name, run_folder
from condzoo.models.released import recipes_by_model
from condzoo.training import load_recipe

IDS = experiment_ids()
DATA = sorted((Path(__file__).parents[2] / "docs" / "data").glob("*.json"))


def test_the_appendix_is_there():
    figures = {f"fig{number:02}" for number in range(1, 16)}
    assert {"prop1", "thm1", "thm2", "cost", "table_a", "table_b"} | figures == set(IDS)


@pytest.mark.parametrize("name", IDS)
def test_claims_name_measures_with_arguments_they_take(name):
    experiment = load_experiment(name)
    for claim in experiment.claims:
        assert claim.measure in MEASURES, claim.text
        inspect.signature(MEASURES[claim.measure]).bind({}, **claim.args)
        assert claim.reason
    assert {"paper", "cpu"} == set(experiment.scales)


@pytest.mark.parametrize("name", [name for name in IDS if load_experiment(name).kind == "training"])
def test_every_run_is_a_recipe_at_both_scales(name):
    experiment = load_experiment(name)
    labels = {spec.label for spec in training_of(experiment).training.runs}
    for scale in ("cpu", "paper"):
        planned = planned_runs(experiment, scale)
        assert {run.label for run in planned} <= labels
        assert {run.recipe.seed for run in planned} == set(training_of(experiment).scales[scale].seeds)
    named = {value for claim in experiment.claims for key, value in claim.args.items() if key in ("label", "to")}
    assert named <= labels, "a claim names a curve that there is not"


@pytest.mark.parametrize("name", IDS)
def test_it_runs_and_is_drawn(name, tiny, tmp_path):
    experiment = tiny(name)
    data = collect(experiment, "cpu", tmp_path)
    assert read_data_file(tmp_path / f"{name}.json") == json.loads(json.dumps(data))
    for run in data.get("runs", []):
        assert run["status"] in ("done", "diverged"), run
    verdicts = judge(experiment, data)
    assert all(isinstance(verdict, Verdict) for verdict in verdicts)
    with matplotlib.rc_context({"text.usetex": True}):  # a user's style; there need be no LaTeX here
        draw(experiment, data, tmp_path / "figure.png")
    size = (tmp_path / "figure.png").stat().st_size
    assert 5_000 < size < 300_000
    with pytest.raises(ValueError, match=f"these are the data of {name}, not of other"):
        draw(experiment.model_copy(update={"id": "other"}), data, tmp_path / "other.png")


def test_a_long_matrix_is_announced_by_the_file_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("condzoo.probe.costs.LONG", 0.0)  # seconds from which curvature warns; warnings are errors here
    collect(tiny("fig03"), "cpu", tmp_path)


def test_table_b_at_full_length_is_the_recipes_whose_runs_are_released():
    for run in planned_runs(load_experiment("table_b"), "paper", [1]):
        assert run.recipe == load_recipe(recipes_by_model()[run.recipe.model.name]), run.label


@pytest.mark.parametrize("name", ["fig10", "table_a"])
def test_imagenet_at_full_length_is_seen_and_trained_as_its_recipes_have_it(name):
    """ResNet-18 and its twin, ResNet-50 and its twin; the standard column, and fig. X's BN."""
    for run in planned_runs(load_experiment(name), "paper", [1]):
        if run.label.endswith("standard") or run.label.startswith("BN"):
            recipe = load_recipe(f"imagenet/{run.recipe.model.name}")
            for part in ("epochs", "model", "optim", "schedule", "loss"):
                assert getattr(run.recipe, part) == getattr(recipe, part), (run.label, part)
            unlike = {"num_classes", "image_size", "eval_resize"}  # said in the recipe, the same by default
            assert run.recipe.data.model_dump(exclude=unlike) == recipe.data.model_dump(exclude=unlike), run.label


def test_fig_xv_at_full_length_is_the_authors_training_of_its_networks():
    """Their scripts cover depth 1202; what two cores ran of it keeps its own recipe, see below."""
    for run in planned_runs(load_experiment("fig15"), "paper", [1]):
        recipe = load_recipe(f"cifar10/{run.recipe.model.name.removeprefix('cifar_')}")
        for part in ("epochs", "iterations", "model", "data", "optim", "schedule", "loss"):
            assert getattr(run.recipe, part) == getattr(recipe, part), (run.label, part)


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_measured_data_are_of_the_recipes_or_settings_that_their_files_have(path):
    data = read_data_file(path)
    experiment = load_experiment(data["id"])
    if settings := settings_of(experiment, data["scale"]):
        assert data.get("settings") in (None, digest(settings))
        return
    rows = [row for row in data["runs"] if row.get("recipe")]
    roots = [{"root": row["root"]} for row in rows if row.get("root")]
    planned = planned_runs(experiment, data["scale"], data["seeds"], roots[0] if roots else None) if rows else []
    recipes = {run_folder(run): digest(run.recipe) for run in planned}
    assert [row_name(row) for row in rows if row["recipe"] != recipes[row_name(row)]] == []
    assert all(set(experiment.training.quantities) <= row["quantities"].keys() for row in data["runs"] if row["chosen"])


@pytest.mark.parametrize("name", ["fig14", "table_a", "table_b"])
def test_gamma_of_every_last_bn_is_drawn_as_the_authors_have_it(name):
    experiment = load_experiment(name)
    runs = [run.recipe.model for scale in ("cpu", "paper") for run in planned_runs(experiment, scale, [1])]
    drawn = {model.name: model.last_bn_init for model in runs if model.name.endswith("_lastbn")}
    assert drawn
    assert set(drawn.values()) == {"uniform"}, drawn


def test_no_other_experiment_has_a_last_bn():
    trained = [name for name in IDS if load_experiment(name).kind == "training"]
    models = {
        name: {run.recipe.model.name for run in planned_runs(load_experiment(name), "paper", [1])} for name in trained
    }
    assert {name for name in trained if any("_lastbn" in model for model in models[name])} == {
        "fig14",
        "table_a",
        "table_b",
    }


def test_an_unknown_field_is_named():
    tables = load_experiment("thm1").model_dump(exclude_none=True)
    tables["claims"][0]["treshold"] = 1.0
    with pytest.raises(ValueError, match=r"file: claims\.0\.treshold: Extra inputs are not permitted"):
        parse_experiment(tables, "file")


def test_a_scale_changes_some_curves_only_and_names_a_pattern_that_matches_none():
    tables = load_experiment("table_b").model_dump(exclude_none=True)
    tables["scales"]["cpu"] |= {"recipe": {"iterations": 8, "log_every": 1}, "runs": {"*-110*": {"iterations": 2}}}
    lengths = {run.label: run.recipe.iterations for run in planned_runs(parse_experiment(tables, "file"), "cpu", [1])}
    assert lengths["VGG-110"] == lengths["ResNet-110 LastBN"] == 2
    assert {length for label, length in lengths.items() if "110" not in label} == {8}

    tables["scales"]["cpu"]["runs"] = {"*-111*": {"iterations": 2}}
    message = r"scales\.cpu\.runs: no run like '\*-111\*'; there are: VGG-20, VGG-20 LastBN, "
    with pytest.raises(ValueError, match=message):
        parse_experiment(tables, "file")


def test_a_claim_needs_a_bound_and_an_experiment_one_kind():
    tables = load_experiment("thm1").model_dump(exclude_none=True)
    del tables["claims"][0]["below"]
    with pytest.raises(ValueError, match="a claim needs a bound"):
        parse_experiment(tables, "file")
    tables = load_experiment("thm1").model_dump(exclude_none=True)
    del tables["theory"]
    with pytest.raises(ValueError, match="exactly one of training, initialization, theory, growth; this one has none"):
        parse_experiment(tables, "file")


def test_an_unknown_id_gets_the_closest():
    with pytest.raises(ValueError, match="unknown experiment 'fig5'; did you mean 'fig05'"):
        load_experiment("fig5")

"""The command `condzoo reproduce`: what it prints and refuses, going on where it stopped, the report."""

import importlib
import json
import shutil
from pathlib import Path

import pytest

from condzoo.cli import main
from condzoo.commands.reproduce import run_experiments
from condzoo.experiments import collect, draw, estimated_minutes, experiment_ids, load_experiment, report
from condzoo.experiments.data_files import SCHEMA
from condzoo.experiments.initialization import measure_network
from condzoo.experiments.loading import labels_run, planned_runs
from condzoo.experiments.reductions import folder_reduction
from condzoo.experiments.report import command, error_table
from condzoo.experiments.training import mark_chosen, thinned
from condzoo.training import Stopped
from condzoo.training.loop import train
from tests.experiments.made_up import run_of

ATTEMPTS = importlib.import_module("condzoo.training.attempts")
OPTIONS = {"seeds": None, "only": None, "engine": "local", "data_root": None, "device": None}
DOCS = Path(__file__).parents[2] / "docs"


def condzoo(*args: str) -> int:
    """The exit code of a command line run in this process."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    return int(stop.value.code or 0)


def test_the_list_names_every_experiment(capsys):
    assert condzoo("reproduce", "--list") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in experiment_ids())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], r"takes experiments by their id (--list shows them), or --all"),
        (["fig05", "--all"], r"takes experiments by their id (--list shows them), or --all"),
        (["fig5"], "unknown experiment 'fig5'; did you mean 'fig05'?"),
        (["thm1", "--scale", "gpu"], "thm1 has no scale 'gpu'; it has: cpu, paper"),
        (["table_b", "--only", "*-21*"], "table_b has no run like '*-21*'; it has: VGG-20, VGG-20 LastBN, "),
        (["thm1", "--only", "x"], "thm1 trains nothing, so there is no run to choose; leave --only out"),
        (["thm1", "--engine", "slurm"], "engine: got 'slurm', must be one of: local, ray"),
        (["table_a", "--imagenet", "nowhere"], "--imagenet nowhere: no class folders in train/ and val/; it must hold"),
        (["table_b", "--engine", "slurm"], "engine: got 'slurm', must be one of: local, ray"),
        (["table_a", "fig10"], "table_a, fig10: on ImageNet; name a folder with train/ and val/ class folders by --im"),
        (["thm1", "--seeds", "x"], "seeds 'x': must be like 1-5 or 1,3,7"),
    ],
)
def test_wrong_input_is_one_line(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert condzoo("reproduce", *args) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs" / "reproduce" / "runs").exists(), "a directory was made for a run that cannot start"


def test_a_second_call_runs_nothing_and_the_figure_is_drawn_again(tiny, tmp_path, monkeypatch, capsys):
    experiment = tiny("thm1")
    monkeypatch.setattr("condzoo.experiments.load_experiment", lambda _: experiment)
    assert condzoo("reproduce", "thm1", "--out", str(tmp_path)) == 0
    first = capsys.readouterr().out
    assert "1 experiment at scale cpu: about 0.1 minutes in all" in first
    assert "held" in first

    monkeypatch.setattr("condzoo.experiments.collecting.collect_theory", lambda *_: pytest.fail("ran again"))
    written = (tmp_path / "thm1.json").read_bytes()
    assert condzoo("reproduce", "thm1", "--out", str(tmp_path)) == 0
    assert "about 0 minutes in all; 1 finished before" in capsys.readouterr().out
    assert (tmp_path / "thm1.json").read_bytes() == written

    picture = (tmp_path / "thm1.png").read_bytes()
    (tmp_path / "thm1.png").unlink()
    assert condzoo("plot", str(tmp_path / "thm1.json")) == 0
    assert (tmp_path / "thm1.png").read_bytes() == picture
    assert condzoo("plot", str(tmp_path / "thm1.json"), "--out", str(tmp_path / "other.png")) == 0
    assert (tmp_path / "other.png").read_bytes() == picture


def test_a_claim_that_did_not_hold_is_an_error_only_when_asked(tiny, tmp_path, monkeypatch):
    experiment = tiny("thm1")
    impossible = experiment.claims[0].model_copy(update={"below": -1.0})
    failing = experiment.model_copy(update={"claims": [impossible]})
    monkeypatch.setattr("condzoo.experiments.load_experiment", lambda _: failing)
    assert condzoo("reproduce", "thm1", "--out", str(tmp_path)) == 0
    assert condzoo("reproduce", "thm1", "--out", str(tmp_path), "--strict") == 1


def test_it_goes_on_where_it_was_stopped(tiny, tmp_path, monkeypatch):
    experiment = tiny("fig11")
    trained = []

    def stopping(recipe, **options):
        if len(trained) == 1:
            raise Stopped("stopped by SIGINT at step 1; run the same command to go on")
        trained.append(recipe.model.name)
        return train(recipe, **options)

    monkeypatch.setattr(ATTEMPTS, "train", stopping)
    with pytest.raises(Stopped):
        collect(experiment, "cpu", tmp_path)
    assert not (tmp_path / "fig11.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    assert len(finished) == 1

    monkeypatch.setattr(ATTEMPTS, "train", train)
    data = collect(experiment, "cpu", tmp_path)
    assert [run["status"] for run in data["runs"]] == ["done", "done"]
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items()), "a finished run was trained again"


def test_curves_of_an_earlier_call_stay_even_where_their_runs_are_gone(tiny, tmp_path):
    experiment = tiny("fig11")
    labels = [spec.label for spec in experiment.training.runs]
    first = collect(experiment, "cpu", tmp_path, only=labels[:1])
    shutil.rmtree(tmp_path / "runs")
    both = collect(experiment, "cpu", tmp_path)
    assert [run["label"] for run in both["runs"]] == labels
    assert json.dumps(both["runs"][0]) == json.dumps(first["runs"][0])
    assert both["made"]["hardware"] == first["made"]["hardware"]
    assert len(list((tmp_path / "runs").glob("*/*/model.safetensors"))) == 1

    shutil.rmtree(tmp_path / "runs")
    again = collect(experiment, "cpu", tmp_path, only=labels[1:])
    assert json.dumps(again["runs"]) == json.dumps(both["runs"][1:])
    assert again["made"] == both["made"]
    assert not (tmp_path / "runs").exists()

    scale = experiment.scales["cpu"]
    slower = scale.model_copy(update={"recipe": {**scale.recipe, "optim.lr": 0.01}})
    collect(experiment.model_copy(update={"scales": {"cpu": slower}}), "cpu", tmp_path, seeds=[1, 2])
    assert len(list((tmp_path / "runs").glob("*/*/model.safetensors"))) == 4, "another recipe is another run"


def test_the_report_names_the_machines_of_kept_runs_alone(tiny, tmp_path):
    experiment = tiny("fig11")
    labels = [spec.label for spec in experiment.training.runs]
    path = tmp_path / "fig11.json"
    data = collect(experiment, "cpu", tmp_path, only=labels[:1])
    here = data["made"]["hardware"]
    data["made"]["hardware"] = "another machine"
    path.write_text(json.dumps(data))
    assert collect(experiment, "cpu", tmp_path)["made"]["hardware"] == f"another machine; {here}"
    path.write_text(json.dumps(data))
    assert collect(experiment, "cpu", tmp_path, only=labels[1:])["made"]["hardware"] == here


def test_the_report_s_command_is_the_one_that_was_run():
    experiment = load_experiment("table_b")
    run = {"label": "VGG-20 LastBN"}
    some = {"seeds": [1, 3], "runs": [run, run]}
    assert command(experiment, "paper", some) == (
        "condzoo reproduce table_b --scale paper --seeds 1,3 --only 'VGG-20 LastBN'"
    )
    every = {"seeds": [1, 2, 3], "runs": [{"label": label} for label in labels_run(experiment, "cpu")]}
    assert command(experiment, "cpu", every) == command(experiment, "cpu") == "condzoo reproduce table_b"


def test_a_network_measured_at_initialization_is_not_measured_again(tiny, tmp_path, monkeypatch):
    experiment = tiny("fig01")
    measured = []

    def stopping(name, *rest):
        if measured:
            raise KeyboardInterrupt
        measured.append(name)
        return measure_network(name, *rest)

    monkeypatch.setattr("condzoo.experiments.initialization.measure_network", stopping)
    with pytest.raises(Stopped, match="stopped within one of the networks; run the same command to go on"):
        collect(experiment, "cpu", tmp_path)
    assert not (tmp_path / "fig01.json").exists()

    def counting(name, *rest):
        measured.append(name)
        return measure_network(name, *rest)

    monkeypatch.setattr("condzoo.experiments.initialization.measure_network", counting)
    data = collect(experiment, "cpu", tmp_path)
    assert measured == ["mlp3x8", "mlp3x8_bn"]
    assert [network["label"] for network in data["networks"]] == ["plain", "BN"]
    collect(experiment, "cpu", tmp_path / "other")
    assert json.loads((tmp_path / "other" / "fig01.json").read_text())["networks"] == data["networks"]

    (tmp_path / "fig01.json").unlink()
    scale = experiment.scales["cpu"]
    fewer = scale.model_copy(update={"settings": {**scale.settings, "examples": 12}})
    collect(experiment.model_copy(update={"scales": {"cpu": fewer}}), "cpu", tmp_path)
    assert len(measured) == 6, "other settings are another measurement"


def test_a_run_that_failed_is_tried_again(tiny, tmp_path, monkeypatch):
    experiment = tiny("fig11")
    monkeypatch.setattr(ATTEMPTS, "train", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    data = collect(experiment, "cpu", tmp_path)
    assert [(run["status"], run["error"]) for run in data["runs"]] == [("failed", "disk full")] * 2
    monkeypatch.setattr(ATTEMPTS, "train", train)
    data = collect(experiment, "cpu", tmp_path)
    assert [run["status"] for run in data["runs"]] == ["done", "done"]


def test_a_run_that_failed_is_an_error_at_the_end_of_all_others(tiny, tmp_path, monkeypatch, capsys):
    experiment = tiny("fig11")
    monkeypatch.setattr("condzoo.experiments.load_experiment", lambda _: experiment)

    def one_fails(recipe, **options):
        if recipe.model.name.startswith("mlp"):
            raise OSError("disk full")
        return train(recipe, **options)

    monkeypatch.setattr(ATTEMPTS, "train", one_fails)
    assert condzoo("reproduce", "fig11", "--out", str(tmp_path)) == 1
    assert "failed: _a_100-layer_BN_MLP-seed1: disk full" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "fig11.png").is_file()
    monkeypatch.setattr(ATTEMPTS, "train", train)
    assert condzoo("reproduce", "fig11", "--out", str(tmp_path)) == 0


def test_only_some_curves(tiny, tmp_path):
    table = load_experiment("table_b")
    labels = ["VGG-20", "VGG-20 LastBN", "ResNet-20", "ResNet-20 LastBN"]
    assert labels_run(table, "paper", ["*-20*"]) == labels
    planned = planned_runs(table, "paper", [1], only=["*-20*"])
    assert [run.label for run in planned] == labels
    assert {run.recipe.iterations for run in planned} == {64000}

    experiment = tiny("fig11")
    data = collect(experiment, "cpu", tmp_path, only=["(a)*"])
    assert [run["label"] for run in data["runs"]] == ["(a) 100-layer BN MLP"]
    assert data["reductions"][-1] == "without (b) 110-layer BN VGG"
    data = collect(experiment, "cpu", tmp_path)
    assert len(data["runs"]) == 2
    assert not any("without" in reduction for reduction in data["reductions"])


def test_the_time_ahead_counts_shared_runs_once_and_goes_with_what_is_asked_for():
    fig05, fig06, fig13, fig11 = (load_experiment(name) for name in ("fig05", "fig06", "fig13", "fig11"))
    minutes = [experiment.scales["cpu"].minutes for experiment in (fig05, fig11)]
    assert estimated_minutes([fig05, fig06, fig13, fig11], "cpu") == pytest.approx(sum(minutes))
    assert estimated_minutes([fig05, fig06, fig11], "cpu", [7]) == pytest.approx(sum(minutes) / 3)
    assert estimated_minutes([fig13], "cpu") == pytest.approx(minutes[0] / 4), "one of fig. V's four curves"
    assert estimated_minutes([fig05], "cpu", [7], ["plain*"]) == pytest.approx(minutes[0] / 6)


def test_fewer_seeds_than_the_scale_has_are_a_reduction(tiny, tmp_path):
    experiment = tiny("thm1")
    three = experiment.scales["cpu"].model_copy(update={"seeds": [1, 2, 3]})
    data = collect(experiment.model_copy(update={"scales": {"cpu": three}}), "cpu", tmp_path, seeds=[1])
    assert data["reductions"][-1] == "1 of 3 seeds"


def test_data_that_are_not_there_are_said_before_a_run_directory_is_made(tmp_path, capsys):
    assert condzoo("reproduce", "fig11", "--data-root", str(tmp_path), "--out", str(tmp_path / "out")) == 2
    assert capsys.readouterr().err.startswith("error: data set 'mnist' was not found; looked for")
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder_is_said_before_anything_runs(tmp_path, capsys):
    (tmp_path / "out").touch()
    assert condzoo("reproduce", "thm1", "--out", str(tmp_path / "out")) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: --out ")
    assert "a file; it must be a folder" in captured.err
    assert not captured.out


def test_all_without_a_folder_of_images_leaves_those_that_need_one_out_aloud(monkeypatch, tmp_path, capsys):
    names = []
    monkeypatch.setattr(
        "condzoo.commands.reproduce.run_experiments",
        lambda experiments, *_: names.extend(e.id for e in experiments) or (True, True),
    )
    assert condzoo("reproduce", "--all", "--out", str(tmp_path)) == 0
    assert set(experiment_ids()) - set(names) == {"fig10", "fig14", "table_a"}
    assert "left out: fig10, fig14, table_a: on ImageNet" in " ".join(capsys.readouterr().out.split())


def test_the_folder_of_images_is_theirs_alone(monkeypatch, tmp_path):
    asked = {}

    def collected(experiment, scale, out, **options):
        asked[experiment.id] = (options.get("data"), options["data_root"])
        raise Stopped("enough")

    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
    monkeypatch.setattr("condzoo.experiments.collect", collected)
    monkeypatch.setattr("condzoo.experiments.planning.read_data_sets", lambda *_, **__: None)
    for name in ("fig10", "fig11"):
        experiments = [load_experiment(name)]
        with pytest.raises(Stopped):
            run_experiments(experiments, "cpu", tmp_path, tmp_path, {**OPTIONS, "data_root": Path("sets")})
    assert asked == {"fig10": ({"root": str(tmp_path)}, None), "fig11": (None, Path("sets"))}


def test_a_folder_that_is_not_imagenet_is_called_that(tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(3):
            (tmp_path / "train" / name / f"{index}.jpeg").touch()
    assert folder_reduction(tmp_path) == [
        "not ImageNet: 2 classes and 6 training images in place of 1,000 and 1,281,167"
    ]
    assert folder_reduction(None) == []
    monkeypatch.setattr("condzoo.experiments.reductions.IMAGENET", (2, 6))
    assert folder_reduction(tmp_path) == []


def test_nobody_takes_a_figure_or_the_report_for_imagenet(tiny, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda _, text, **__: titles.append(text))
    experiment = tiny("fig14")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    for folder in (None, tmp_path):
        found = collect(experiment, "cpu", tmp_path / str(folder is None), only=["ResNet-18*"])
        found["reductions"] += folder_reduction(folder)
        draw(experiment, found, tmp_path / "figure.png")
        (tmp_path / "fig14.json").write_text(json.dumps(found))
        row = next(line for line in report(tmp_path).splitlines() if line.startswith("| [fig14]"))
        assert ("(**not on ImageNet**)" in row) is (folder is not None)
    beside = "not ImageNet: 1 classes and 0 training images in place of 1,000 and 1,281,167"
    assert [title.replace("\n", " ") for title in titles] == [experiment.title, f"{experiment.title} {beside}"]
    assert "\nnot ImageNet: 1 classes" in titles[1]


def test_another_file_is_refused(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text("{")
    assert condzoo("plot", str(path)) == 2
    assert "; if it is damaged, delete it, and give the `reproduce` command again" in capsys.readouterr().err
    path.write_text(json.dumps({"schema": "condzoo.experiment/9"}))
    assert condzoo("plot", str(path)) == 2
    assert f"expected schema {SCHEMA!r}" in capsys.readouterr().err


def test_the_report_is_up_to_date():
    page = (DOCS / "reproduction.md").read_text(encoding="utf-8")
    assert page == report(DOCS / "data"), "run `condzoo reproduce --report` in the repository's root"


def test_a_table_of_errors_stands_beside_the_papers():
    runs = [run_of("VGG-20", seed, test_error=error) for seed, error in ((1, 0.5), (2, 0.7), (3, 0.6))]
    runs += [run_of("VGG-20 LastBN", seed, status="diverged", test_error=None) for seed in (1, 2)]
    rows = list(error_table(load_experiment("table_b"), {"runs": runs}))
    assert "| VGG-20 | 14.88 +- 0.47 | 60.00 (50.00 to 70.00, n = 3) |  |" in rows
    assert "| VGG-20 LastBN | 12.89 +- 0.20 | - | 2 of 2 |" in rows
    assert "| ResNet-110 | 8.93 +- 0.22 | not run |  |" in rows


def test_each_file_of_the_report_has_its_figure_and_none_is_large():
    data = {path.stem: path for path in (DOCS / "data").glob("*.json")}
    figures = {path.stem: path for path in (DOCS / "figures").glob("*.png")}
    assert data.keys() == figures.keys()
    assert {name.split(".")[0] for name in data} <= set(experiment_ids())
    assert all(path.stat().st_size < 1_000_000 for path in data.values())
    assert all(5_000 < path.stat().st_size < 300_000 for path in figures.values())


def test_the_file_that_is_all_that_is_left_of_a_run_is_kept_beside_the_new_one(tiny, tmp_path):
    experiment = tiny("fig11")
    labels = [spec.label for spec in experiment.training.runs]
    collect(experiment, "cpu", tmp_path)
    before = (tmp_path / "fig11.json").read_bytes()
    collect(experiment, "cpu", tmp_path, only=labels[:1])
    assert not (tmp_path / "fig11.json.bak").exists(), "the other's folder is there"
    (tmp_path / "fig11.json").write_bytes(before)
    shutil.rmtree(tmp_path / "runs")
    collect(experiment, "cpu", tmp_path, only=labels[:1])
    assert (tmp_path / "fig11.json.bak").read_bytes() == before


def test_data_of_another_recipe_are_not_taken_for_finished(tiny, tmp_path):
    experiment = tiny("fig11")
    labels = [spec.label for spec in experiment.training.runs]
    first = collect(experiment, "cpu", tmp_path, only=labels[:1])
    assert collect(experiment, "cpu", tmp_path, only=labels[:1]) == first
    scale = experiment.scales["cpu"]
    slower = experiment.model_copy(
        update={"scales": {"cpu": scale.model_copy(update={"recipe": {**scale.recipe, "optim.lr": 0.01}})}}
    )
    shutil.rmtree(tmp_path / "runs")
    again = collect(slower, "cpu", tmp_path, only=labels[:1])
    assert again["runs"][0]["recipe"] != first["runs"][0]["recipe"]


def test_a_damaged_file_of_a_network_is_measured_again_and_damaged_data_are_named(tiny, tmp_path):
    experiment = tiny("fig01")
    first = collect(experiment, "cpu", tmp_path)
    for content in (b"{", b"{}", b"[1]"):
        (tmp_path / "fig01.json").unlink()
        for path in (tmp_path / "runs" / "fig01-cpu").glob("*.json"):
            path.write_bytes(content)
        assert collect(experiment, "cpu", tmp_path)["networks"] == first["networks"]
    (tmp_path / "fig01.json").write_text(json.dumps({"schema": SCHEMA}))
    with pytest.raises(ValueError, match=r"fig01\.json is damaged: it has no id; delete it"):
        collect(experiment, "cpu", tmp_path)


def test_what_is_kept_of_a_long_run_is_little_and_stays_when_it_is_taken_again():
    values = [[float(step), 1.0] for step in range(1000)]
    long = run_of(
        "a",
        1,
        loss=[[step, 1.0] for step in range(5000)],
        epochs=[{"step": step} for step in range(333)],
        probed=list(range(1000)),
        quantities={"q": {"layers": ["x", "y"], "values": values}},
    )
    once = thinned(long)
    assert (len(once["loss"]), len(once["epochs"]), len(once["probed"])) == (200, 100, 100)
    assert (once["loss"][0], once["loss"][-1]) == ([0, 1.0], [4999, 1.0])
    assert [row[0] for row in once["quantities"]["q"]["values"]] == once["probed"]
    assert once["probed"][-1] == 999
    assert thinned(once) == once


def test_of_two_seeds_the_rate_with_the_lower_median_is_chosen():
    experiment = load_experiment("fig05")
    label = experiment.training.runs[0].label
    losses = {0.1: (0.1, 0.9), 0.2: (0.6, 0.7)}
    rows = [
        run_of(label, seed, variant={"optim.lr": rate}, train_loss=loss)
        for rate, own in losses.items()
        for seed, loss in enumerate(own)
    ]
    mark_chosen(rows, experiment)
    assert [row["variant"]["optim.lr"] for row in rows if row["chosen"]] == [0.1, 0.1]

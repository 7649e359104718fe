"""What a figure shows, read off its axes: which seed's layers, what diverged, values known of some seeds only."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from condzoo.experiments import load_experiment
from condzoo.experiments.curve_figures import curves, errors
from condzoo.experiments.loading import planned_runs
from condzoo.experiments.matrix_figures import draw_values, growth, theory
from condzoo.experiments.training_figures import (
    draw_losses,
    explosion,
    labels_of,
    last_layer,
    layers,
    plain_numbers,
    title_of,
)
from tests.experiments.made_up import run_of

QUANTITIES = ("input_kappa50", "grad_kappa50")


def probed_run(label: str, seed: int, steps: int, status: str = "done") -> dict:
    """A run of three layers, probed at every step, layer k's values being seed * 10^k."""
    values = [[seed * 10.0**k for k in range(3)] for _ in range(steps)]
    kept = {"layers": ["a", "b", "c"], "values": values}
    return run_of(
        label,
        seed,
        status=status,
        probed=list(range(steps)),
        quantities=dict.fromkeys(QUANTITIES, kept),
        loss=[[step, 2.0 + seed] for step in range(steps)],
    )


def test_the_layers_of_the_longest_run_are_drawn_and_its_seed_is_named():
    experiment = load_experiment("fig09")
    runs = [probed_run("plain", 1, 1, "diverged"), probed_run("plain", 2, 5)]
    runs += [probed_run("BN", 1, 5), probed_run("BN", 2, 5), probed_run("one seed", 1, 5)]
    figure = Figure()
    layers(figure, {"scale": "cpu", "runs": runs}, experiment)
    plain, bn, alone = figure.axes[0], figure.axes[3], figure.axes[6]
    assert [line.get_ydata()[0] for line in plain.lines] == [2.0, 20.0, 200.0]
    assert [line.get_ydata()[0] for line in bn.lines] == [1.0, 10.0, 100.0]
    assert plain.get_ylabel() == "plain\n1 of 2 diverged\nlayers: seed 2"
    assert bn.get_ylabel() == "BN\nlayers: seed 1"
    assert alone.get_ylabel() == "one seed"
    assert labels_of({"runs": runs}) == ["plain", "BN", "one seed"]


def test_a_run_that_diverged_is_a_cross_of_its_own_colour():
    figure = Figure()
    runs = [probed_run("plain", 1, 5), probed_run("plain", 2, 1, "diverged")]
    layers(figure, {"scale": "cpu", "runs": runs}, load_experiment("fig09"))
    _, line, cross = figure.axes[2].lines
    assert cross.get_marker() == "x"
    assert cross.get_color() == line.get_color()
    assert [text.get_text() for text in figure.axes[2].get_legend().get_texts()] == ["seed 1", "seed 2 (x: diverged)"]


def test_a_run_whose_last_loss_is_not_known_is_a_cross_where_the_one_before_was():
    figure = Figure()
    lost = probed_run("plain", 2, 1, "diverged") | {"loss": [[0, 4.0], [1, 9.0], [2, None]]}
    layers(figure, {"scale": "cpu", "runs": [probed_run("plain", 1, 5), lost]}, load_experiment("fig11"))
    (cross,) = [line for line in figure.axes[1].lines if line.get_marker() == "x"]
    assert (list(cross.get_xdata()), list(cross.get_ydata())) == ([1], [9.0])


def epochs_of(*errors: float) -> list[dict]:
    """A row for each end of an epoch of 390 steps."""
    return [
        {"step": 390 * n, "train_loss": 1.0, "train_error": error, "test_error": error}
        for n, error in enumerate(errors, start=1)
    ]


def test_a_seed_that_diverged_is_no_part_of_the_median_and_is_said():
    """It has a row at the step where it ended, which no other seed has."""
    good = [run_of("11111", seed, epochs=epochs_of(0.5, 0.4, 0.3)) for seed in (1, 2)]
    end = {"step": 1000, "train_loss": None, "train_error": 0.9, "test_error": 0.9}
    lost = run_of("11111", 3, status="diverged", epochs=[*epochs_of(0.6, 0.7), end])
    none_ended = run_of("00001", 1, status="diverged", epochs=epochs_of(0.8), loss=[[0, 7.0]])
    figure = Figure()
    curves(figure, {"scale": "paper", "runs": [*good, lost, none_ended]}, load_experiment("fig12"))
    loss, _, error = figure.axes
    line, cross, empty, other = error.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1.0, 2.0, 3.0], [50.0, 40.0, 30.0])
    assert (cross.get_marker(), list(cross.get_ydata()), cross.get_color()) == ("x", [90.0], line.get_color())
    assert cross.get_xdata()[0] == pytest.approx(1000 / 390)
    assert (len(empty.get_xdata()), other.get_marker()) == (0, "x")
    assert [list(line.get_ydata()) for line in loss.lines if line.get_marker() == "x"] == [[1.0], [7.0]]
    names = [text.get_text() for text in error.get_legend().get_texts()]
    assert names == ["11111 (x: 1 of 3 diverged)", "00001 (x: 1 of 1 diverged)"]


def test_the_last_layer_of_a_run_that_diverged_ends_in_a_cross():
    experiment = load_experiment("fig15")

    def run(seed: int, steps: int, status: str) -> dict:
        kept = {name: {"layers": ["fc"], "values": [[2.0]] * steps} for name in experiment.figure.quantities}
        return probed_run("ResNet", seed, steps, status) | {"quantities": kept}

    figure = Figure()
    last_layer(figure, {"runs": [run(1, 5, "done"), run(2, 3, "diverged")]}, experiment)
    for ax in figure.axes:
        (cross,) = [line for line in ax.lines if line.get_marker() == "x"]
        assert list(cross.get_xdata()) == [2]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["ResNet (x: 1 of 2 diverged)"]


def test_the_seed_whose_first_iterations_are_whole_is_drawn_and_named():
    experiment = load_experiment("fig11")

    def run(seed: int, steps: int, status: str) -> dict:
        run = probed_run("a", seed, steps, status)
        return run | {"quantities": dict.fromkeys(experiment.figure.quantities, run["quantities"]["input_kappa50"])}

    figure = Figure()
    explosion(figure, {"runs": [run(1, 1, "diverged"), run(2, 7, "done"), run(3, 7, "done")]}, experiment)
    (ax,) = figure.axes
    assert ax.get_title() == "a\n1 of 3 diverged\nlayers: seed 2"
    assert [line.get_ydata()[0] for line in ax.lines] == [2.0] * 7


def test_one_point_is_seen():
    figure = Figure()
    layers(figure, {"scale": "cpu", "runs": [probed_run("plain", 1, 1, "diverged")]}, load_experiment("fig09"))
    assert {line.get_marker() for line in figure.axes[0].lines} == {"."}
    assert title_of("plain", [probed_run("plain", 1, 1)]) == "plain"


def test_a_run_within_an_epoch_is_drawn_by_the_losses_that_were_logged():
    epoch = {"step": 50, "train_loss": 7.0, "train_error": 0.8, "test_error": 0.9}
    losses = [[step, 3.0 + (step == 20)] for step in range(50)]  # a single spike is no level
    experiment = load_experiment("fig14")
    experiment = experiment.model_copy(
        update={"figure": experiment.figure.model_copy(update={"columns": ["train_loss", "train_error"]})}
    )
    figure = Figure()
    curves(figure, {"runs": [run_of("a", seed, epochs=[epoch], loss=losses) for seed in (1, 2)]}, experiment)
    loss, error = figure.axes[0].lines[0], figure.axes[1].lines[0]
    assert (list(loss.get_xdata()), set(loss.get_ydata()), loss.get_marker()) == (list(range(50)), {3.0}, "None")
    assert (list(error.get_xdata()), list(error.get_ydata()), error.get_marker()) == ([50], [80.0], "o")
    longer = [epoch, epoch | {"step": 100}]
    figure = Figure()
    curves(figure, {"runs": [run_of("a", 1, epochs=longer, loss=losses)]}, experiment)
    assert list(figure.axes[0].lines[0].get_xdata()) == [50, 100]


def test_a_short_logarithmic_axis_has_plain_numbers():
    ax = Figure().subplots()
    ax.set(yscale="log", ylim=(1.5, 2.6))
    plain_numbers(ax)
    ticks = [2.0, 1.6]
    assert ax.yaxis.get_minor_formatter().format_ticks(ticks) == ["2", "1.6"]
    ax.set_ylim(0.01, 2.6)
    plain_numbers(ax)
    assert ax.yaxis.get_minor_formatter().format_ticks(ticks) == ["", ""]


def test_the_range_over_seeds_is_drawn_where_only_some_layers_are_known():
    def network(seed: int, kappas: tuple[float | None, float, float]) -> dict:
        blocks = {f"layer{k}": {"kappa": {"0.5": kappa}} for k, kappa in enumerate(kappas)}
        return {"label": "plain", "seed": seed, "matrices": {"fisher": {"full": {"kappa": {"0.5": None}}, **blocks}}}

    data = {"networks": [network(1, (None, 2.0, 8.0)), network(2, (None, 4.0, 16.0))]}
    ax = Figure().subplots()
    draw_values(ax, data, "fisher", 0.5)
    corners = np.concatenate([path.vertices for path in ax.collections[0].get_paths()])
    assert {2.0, 4.0, 8.0, 16.0} <= set(corners[:, 1])
    assert ax.get_xlim() == (0.6, 4.4), "the layer that is not known, and the whole matrix, keep their places"


@pytest.mark.parametrize(("draw", "name"), [(explosion, "fig11"), (last_layer, "fig15")])
def test_a_run_that_failed_has_no_lines_and_is_no_error(draw, name):
    experiment = load_experiment(name)
    good = probed_run("a", 1, 4)
    good["quantities"] = dict.fromkeys(experiment.figure.quantities, good["quantities"]["input_kappa50"])
    failed = run_of("b", 1, status="failed", loss=[], epochs=[], probed=[], quantities={})
    figure = Figure()
    draw(figure, {"runs": [good, failed]}, experiment)
    texts = {text.get_text() for ax in figure.axes for text in ax.texts}
    assert texts == ({"not measured (failed)"} if draw is explosion else set())


def test_what_became_of_runs_without_an_error_is_told_apart():
    runs = [
        run_of("a", 1),
        run_of("a", 2, status="diverged", test_error=None),
        run_of("a", 3, status="failed", test_error=None),
    ]
    figure = Figure()
    errors(figure, {"runs": runs}, load_experiment("table_b"))
    assert [text.get_text() for text in figure.axes[0].texts] == ["1 of 3 diverged, 1 of 3 failed"]


def test_losses_and_errors_are_drawn_by_epoch_where_the_paper_s_are():
    experiment, batch = load_experiment("fig12"), 64  # 781 of which are an epoch of 50,000 images
    epochs = [{"step": 781 * n, "train_loss": 1.0, "train_error": 0.5, "test_error": 0.5} for n in (1, 2)]
    assert planned_runs(experiment, "cpu")[0].recipe.data.batch_size == batch
    figure = Figure()
    curves(figure, {"scale": "cpu", "runs": [run_of("a", 1, epochs=epochs)]}, experiment)
    assert {ax.get_xlabel() for ax in figure.axes} == {"epoch"}
    assert all(list(ax.lines[0].get_xdata()) == [1.0, 2.0] for ax in figure.axes)

    figure = Figure()
    run = probed_run("plain", 1, 5) | {"loss": [[0, 2.0], [195, 1.0]]}  # half of 390, at batch 128
    layers(figure, {"scale": "cpu", "runs": [run]}, load_experiment("fig08"))
    assert [ax.get_xlabel() for ax in figure.axes[:3]] == ["iteration", "iteration", "epoch"]
    assert list(figure.axes[2].lines[0].get_xdata()) == [0.0, 0.5]
    assert list(figure.axes[0].lines[0].get_xdata()) == [0, 1, 2, 3, 4]


def test_times_are_medians_over_seeds_and_exponents_too():
    points = [
        {"seed": seed, "varied": varied, "examples": 2, "layers": 2, "widths": 2, varied: size, "seconds": seconds}
        for seed, factor, power in ((1, 1.0, 1.0), (2, 3.0, 2.0), (3, 9.0, 3.0))
        for varied in ("examples", "layers", "widths")
        for size in (2, 4, 8)
        for seconds in [dict.fromkeys(("full", "blocks", "kronecker"), factor * size**power)]
    ]
    figure = Figure()
    growth(figure, {"points": points}, load_experiment("cost"))
    line = figure.axes[0].lines[0]
    assert list(line.get_ydata()) == [12.0, 48.0, 192.0]
    assert line.get_label() == "exact, whole: exponent 2.00"


def test_every_seed_of_many_is_told_apart():
    seeds = list(range(1, 11))
    figure = Figure()
    trials = [{"seed": seed, "errors": {"input": 1e-7}} for seed in seeds]
    theory(figure, {"seeds": seeds, "trials": trials}, load_experiment("thm1"))
    losses = Figure().subplots()
    draw_losses(losses, [probed_run("plain", seed, 5) for seed in seeds])
    for ax in (figure.axes[0], losses):
        looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in ax.lines]
        assert len(set(looks)) == len(looks) == 10

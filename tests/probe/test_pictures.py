"""Pictures of many layers, many records, long names and unknown values: what a figure holds before it is saved."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from condzoo.probe import Probe, measure, plot_comparison, plot_records
from condzoo.probe.heatmaps import LAST, Panel, value_range
from condzoo.probe.picture_style import LABEL, NAME, shortened, wrapped
from condzoo.probe.spectra import Spectrum


@pytest.fixture
def record(kit):
    return replace(measure(kit.build("mlp"), kit.images()), step=0)


@pytest.fixture
def figures(monkeypatch):
    """Those that are drawn, before they are saved."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    return drawn


def heatmaps(figure):
    drawn = (ax for ax in figure.axes if any(isinstance(artist, QuadMesh) for artist in ax.collections))
    return [ax for ax in drawn if ax.get_title(loc="left")]  # a colour bar has no title


def last_layers(figure):
    return [ax for ax in figure.axes if ax.get_title().startswith("Input of the last layer")]


def named(record, names):
    return replace(record, layers=dict.fromkeys(names, record.last))


SWEPT = "model.name=resnet20_nobn_lastbn-optim.lr={}-optim.weight_decay=0.0005-data.batch_size=128-seed{}"
ADAPTED = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.default"


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (["conv1", "fc"], "conv1"),
        ([SWEPT.format(0.1, seed) for seed in (1, 2)], "...data.batch_size=128-seed1"),
        ([SWEPT.format(lr, 1) for lr in (0.1, 0.01)], "...optim.lr=0.1..."),
        ([SWEPT.format(0.1, 1), "short"], "model.name=resne...ize=128-seed1"),
        ([ADAPTED.format(i, q, x) for i in range(32) for q in "qv" for x in "AB"], "...0.self_attn.q_proj.lora_A..."),
        ([f"encoder.layers.{i}.attention.projection.weight.original" for i in range(3)], "encoder.layers.0..."),
        (["a" * 50 + letter + "a" * 50 for letter in "abc"], None),
        ([*("x" * length for length in (80, 90, 100)), "x", ""], None),
    ],
)
def test_long_names_are_shortened_and_still_told_apart(names, first):
    shown = shortened(names, 32 if first and first.startswith("model") else NAME)
    assert len(set(shown)) == len(names)
    assert max(map(len, shown)) <= 40
    assert first is None or shown[0] == first
    assert all(short == name for name, short in zip(names, shown, strict=True) if len(name) <= NAME)


def test_a_title_is_wrapped_but_for_formulas():
    assert wrapped("a run") == "a run"
    assert max(map(len, wrapped(SWEPT.format(0.1, 1) + "/" + "y" * 99).split("\n"))) <= 80
    assert wrapped(formula := "$" + "x " * 60 + "$") == formula


def test_long_labels_and_layer_names_leave_the_heat_maps_their_room(record, figures, tmp_path):
    run = named(record, [ADAPTED.format(i, "v", x) for i in range(6) for x in "AB"])
    labels = [SWEPT.format(0.1, seed) for seed in (1, 2)]
    plot_comparison(dict.fromkeys(labels, run), tmp_path / "x.png")
    run.plot(tmp_path / "y.png")
    comparison, depth = figures
    for figure in figures:
        figure.draw_without_rendering()  # where the layout found no room, it warned
    for ax in heatmaps(comparison):
        assert ax.bbox.width > 0.2 * comparison.bbox.width
        ticks = [text.get_text() for text in ax.get_yticklabels()]
        assert len(set(ticks)) == len(ticks)
    titles = [ax.title.get_window_extent() for ax in heatmaps(comparison) if ax.get_title()]
    assert len(titles) == 2
    assert not titles[0].overlaps(titles[1])
    for ax in last_layers(comparison):
        assert ax.get_legend().get_window_extent().y0 >= ax.bbox.y1  # not over the lines
    legend = [text.get_text() for text in last_layers(comparison)[0].get_legend().get_texts()]
    assert len(set(legend)) == 2
    assert max(map(len, legend)) <= LABEL + 6
    for ax in depth.axes:
        for text in (ax.xaxis.label, ax.title):
            box = text.get_window_extent()
            assert box.x0 >= 0
            assert box.x1 <= depth.bbox.width


@pytest.mark.parametrize("count", [3, 200])
def test_the_last_of_many_layers_has_a_strip_of_its_own(count, record, figures, tmp_path):
    plot_records(named(record, [f"l{i}" for i in range(count)]), tmp_path / "x.png")
    for ax in heatmaps(figures[0]):
        low, high = sorted(ax.get_ylim())
        (mesh,) = ax.collections
        rows = mesh.get_coordinates()[:, 0, 1]
        assert rows[-1] - rows[-2] >= 0.999 * LAST * (high - low)
        assert np.allclose(np.diff(rows[:-1]), 1.0)
        ticks = dict(zip((text.get_text() for text in ax.get_yticklabels()), ax.get_yticks(), strict=True))
        assert ticks[f"l{count - 1}"] == pytest.approx((rows[-1] + rows[-2]) / 2)


def test_a_network_that_died_is_black_and_its_lines_go_on_to_the_end(figures, tmp_path):
    """Zeros are known; they were drawn as what is not, and the axes ended where the network had died."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    records = []
    with Probe(model, every=1) as probe:
        for step in range(10):
            if step == 3:
                torch.nn.init.constant_(model[0].bias, -100.0)
            torch.nn.functional.cross_entropy(model(torch.randn(64, 8)), torch.randint(3, (64,))).backward()
            probe.step()
            records.append(probe.latest)
    plot_records(records, tmp_path / "x.png")
    inputs, _, gradients, kappas, _ = heatmaps(figures[0])
    for ax, row in ((inputs, 1), (gradients, 0)):
        values, zeros = (mesh.get_array() for mesh in ax.collections)
        assert values.mask[row].tolist() == [False] * 3 + [True] * 7
        assert zeros.mask.tolist() == [[i != row or step < 3 for step in range(10)] for i in range(2)]
        assert "black: 0" in ax.get_title(loc="left")
    assert "not known" in kappas.get_title(loc="left")
    assert "not known" not in inputs.get_title(loc="left")
    lines = [ax for ax in figures[0].axes if ax.get_title().startswith("Input of the last layer")]
    assert [ax.get_xlim()[1] >= 9 for ax in lines] == [True, True]


def test_a_run_that_diverged_reaches_to_its_last_record_and_the_units_of_many_runs_are_named_beside_them(
    record, figures, tmp_path
):
    run = [replace(record, step=0), replace(record, step=40, layers={})]
    plot_comparison({f"a run with a long label, {i}": run for i in range(8)}, tmp_path / "x.png")
    figures[0].draw_without_rendering()
    assert [ax.get_xlim()[1] >= 40 for ax in last_layers(figures[0])] == [True, True]
    (units,) = (ax for ax in figures[0].axes if ax.get_title().startswith("ReLU units"))
    assert units.get_title() == "ReLU units by depth,\nlast record with a layer"
    assert units.get_legend().get_window_extent().x0 >= units.bbox.x1
    assert figures[0].get_figwidth() < 20, "on a page nobody could read it"
    for titles in zip(*[(ax.title, ax._left_title) for ax in heatmaps(figures[0])[:8]], strict=True):
        boxes = [text.get_window_extent() for text in titles]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    for ax in last_layers(figures[0]):
        assert ax.get_legend().get_window_extent().y0 >= ax.bbox.y1
        assert ax.title.get_window_extent().y0 >= ax.get_legend().get_window_extent().y1 - 1


def test_weight_domination_is_a_heat_map_where_weights_were_recorded(record, figures, tmp_path):
    last = replace(record.last, weight=2.0, weight_grad=0.02)
    weights = [last, replace(last, weight_grad=0.0), replace(last, frozen=True), replace(last, weight_grad=None)]
    run = replace(record, layers={f"l{i}": layer for i, layer in enumerate(weights)})
    without = replace(record, layers={"fc": replace(last, weight=None, weight_grad=None)})
    plot_records(run, tmp_path / "x.png")
    plot_records(without, tmp_path / "y.png")
    plot_comparison({"without": without, "with": run}, tmp_path / "z.png")
    *others, ax = heatmaps(figures[0])
    assert ax.get_title(loc="left").startswith("weight domination $dW/W$  (black: 0; grey, hatched: not known)")
    values, zeros = (mesh.get_array() for mesh in ax.collections)
    assert values[0, 0] == pytest.approx(-2.0)
    assert values.mask[:, 0].tolist() == [False, True, True, True]
    assert zeros.mask[:, 0].tolist() == [True, False, True, True]
    assert len(heatmaps(figures[1])) == len(others) == 4
    assert len(heatmaps(figures[2])) == 10


def test_one_value_far_from_all_others_does_not_take_their_colours(record, figures, tmp_path):
    """A gradient that vanished to 1e-48 once left those of all runs one yellow."""

    def panel(*values):
        return Panel("", [str(i) for i in range(len(values))], [0], np.array(values)[:, None])

    bulk = np.linspace(-3.0, 1.0, 50)
    assert value_range([panel(*bulk)]) == (-3.0, 1.0, "neither")
    low, high, beyond = value_range([panel(-48.0, *bulk), panel(*bulk, 2.0)])
    assert (low, high, beyond) == (pytest.approx(-6.5, abs=0.3), 2.0, "min")
    assert value_range([panel(-np.inf, *bulk, 9.0, np.nan, 7.0)])[1:] == (7.0, "max"), "the last layer is within"
    assert value_range([panel(*bulk, 30.0)]) == (-3.0, 30.0, "neither")
    assert value_range([panel(2.0, 2.0)]) == (1.5, 2.5, "neither")
    assert value_range([panel(np.nan, -np.inf)]) == (0.0, 1.0, "neither")
    small = replace(record.last, output_grad=Spectrum(torch.full((4,), 1e-48, dtype=torch.float64)))
    layers = {f"l{i}": small if i == 3 else record.last for i in range(40)}
    plot_records(replace(record, layers=layers), tmp_path / "x.png")
    mesh = heatmaps(figures[0])[2].collections[0]
    assert mesh.norm.vmin > -10
    assert mesh.colorbar.extend == "min"


def test_what_is_not_known_is_hatched(record, figures, tmp_path):
    """In print in grey a plain background looked like viridis's largest value."""
    plot_records(record, tmp_path / "x.png")
    assert all(ax.patch.get_hatch() for ax in heatmaps(figures[0]))


def test_of_many_runs_those_of_another_network_have_its_names(record, figures, tmp_path):
    names = [["a", "fc"], ["a", "fc"], ["blocks", "head"]]
    plot_comparison({str(i): named(record, each) for i, each in enumerate(names)}, tmp_path / "x.png")
    written = [sorted(text.get_text() for text in ax.get_yticklabels()) for ax in heatmaps(figures[0])[:3]]
    assert written == [["a", "fc"], ["0", "1"], ["blocks", "head"]]


@pytest.mark.parametrize(
    ("steps", "runs"),
    [
        ([*range(0, 1000, 10), *range(1000, 64000, 1000)], 1),
        ([64_000, 128_000, 1_280_000], 1),
        ([0], 1),
        ([3, 4], 1),
        ([0, 2, 4], 1),
        ([0, 500_000], 1),
        ([0, 190_000], 4),
    ],
)
def test_iterations_are_written_whole_and_beside_each_other(steps, runs, record, figures, tmp_path):
    run = [replace(record, step=step) for step in steps]
    plot_comparison({f"run {i}": run for i in range(runs)}, tmp_path / "x.png")
    figures[0].draw_without_rendering()
    for ax in (heatmaps(figures[0])[-1], *last_layers(figures[0])):
        low, high = ax.get_xlim()
        places = zip(ax.get_xticks(), ax.get_xticklabels(), strict=True)
        shown = [(tick, text) for tick, text in places if low <= tick <= high]
        assert shown
        assert [text.get_text() for _, text in shown] == [f"{tick:.0f}" for tick, _ in shown]
        assert ax in last_layers(figures[0]) or all(steps[0] <= tick <= steps[-1] for tick, _ in shown)
        boxes = [text.get_window_extent() for _, text in shown]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_where_the_last_layer_was_skipped_its_line_has_a_gap_and_not_another_layers_values(record, figures, tmp_path):
    *before, (last, _) = record.items()
    without = replace(record, layers=dict(before), skipped={last: "its input holds NaN or Inf"})
    head = replace(record, layers=dict(before) | {"new head": replace(record.last, input=before[0][1].input)})
    run = [record, without, replace(record, layers={}), record, head]
    run = [replace(each, step=step) for step, each in enumerate(run)]
    plot_records(run, tmp_path / "x.png")
    (line,) = last_layers(figures[0])[0].get_lines()
    size = record.last.input.lambda_max
    assert np.array_equal(line.get_ydata(), [size, np.nan, np.nan, size, head.last.input.lambda_max], equal_nan=True)


def test_lines_of_hundreds_of_records_have_markers_here_and_there_and_where_a_value_is_alone(record, figures, tmp_path):
    unknown = replace(record.last, input=Spectrum(torch.zeros(4, dtype=torch.float64)))
    gap = replace(record, layers={**record.layers, list(record)[-1]: unknown})
    several = [replace(gap if 303 <= i <= 307 and i != 305 else record, step=i) for i in range(400)]
    plot_records(several, tmp_path / "x.png")
    for ax in last_layers(figures[0]):
        (line,) = ax.get_lines()
        assert np.flatnonzero(line.get_markevery()).tolist() == sorted([*range(0, 400, 20), 305])


def test_a_measurements_panels_by_depth_show_every_layer_and_no_legend_lies_over_lines(record, figures, tmp_path):
    unknown = Spectrum(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), noise_floor=0.5)
    layers = {f"l{i}": record.last if i == 21 else replace(record.last, input=unknown) for i in range(45)}
    run = replace(record, layers=layers | {"l9": replace(record.last, weight=2.0, weight_grad=0.5)})
    run.plot(tmp_path / "x.png")
    figures[0].draw_without_rendering()
    axes = {ax.get_title().split(" by depth")[0]: ax for ax in figures[0].axes}
    for ax in axes.values():
        if ax.get_legend() and "ReLU" not in ax.get_title():  # that one has room above the largest share
            assert ax.get_legend().get_window_extent().y0 >= ax.bbox.y1
    by_depth = [ax for ax in axes.values() if "by depth" in ax.get_title() and "ReLU" not in ax.get_title()]
    assert [ax.get_xlim() for ax in by_depth] == [pytest.approx((-2.2, 46.2))] * 4
    kappas = next(ax for title, ax in axes.items() if title.startswith("Condition number"))
    assert kappas.get_lines()[0].get_markevery()[21], "a value alone has no line beside it"
    ratios = next(ax for title, ax in axes.items() if title.startswith("Weight domination"))
    assert ratios.get_lines()[0].get_ydata()[9] == 0.25
    rows = [line.split() for line in run.table().splitlines()[1:46]]
    assert rows[0][:3] == ["layer", "kind", "#"]
    assert rows[22][:3] == ["l21", "Linear", "21"]


def test_panels_without_a_value_say_so(record, figures, tmp_path):
    zero = Spectrum(torch.zeros(4, dtype=torch.float64))
    nothing = replace(record, layers={"fc": replace(record.last, input=zero, output_grad=zero)})
    nothing.plot(tmp_path / "x.png")
    plot_records(nothing, tmp_path / "y.png")
    record.plot(tmp_path / "z.png")
    titles = [[ax.get_title() for ax in figure.axes] for figure in figures]
    assert sum("none is known" in title for title in titles[0]) == 3  # kappa, and either side's spectra
    assert sum("all are 0" in title for title in titles[0]) == 1
    assert "Last layer, fc (no eigenvalue is known)" in titles[0]
    assert sum(title.endswith((": all are 0", ": none is known")) for title in titles[1]) == 2
    assert not any("all are 0" in title or "is known" in title for title in titles[2])

"""JSON there and back, the log's rules, columns, tables and pictures."""

import inspect
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from torch import nn

from condzoo.probe import (
    Conditioning,
    Neurons,
    measure,
    plot_comparison,
    plot_records,
    read_records,
    record_columns,
    to_pandas,
)
from condzoo.probe.heatmaps import panels
from condzoo.probe.records import append_record, drop_torn_line
from condzoo.probe.serialization import from_record, to_record
from condzoo.probe.spectra import Spectrum
from condzoo.probe.tables import lower_bound, shown


def same(a, b):
    assert list(a) == list(b)
    for name, layer in a.items():
        for side in ("input", "output_grad"):
            x, y = getattr(layer, side), getattr(b[name], side)
            assert torch.equal(x.eigenvalues, y.eigenvalues)
            assert (x.blocks is None) == (y.blocks is None)
            assert x.blocks is None or torch.equal(x.blocks, y.blocks)
            kept = ("noise_floor", "rows", "nulls", "null_reason", "arithmetic")
            assert [getattr(x, k) for k in kept] == [getattr(y, k) for k in kept]
        kept = ("kind", "weight", "weight_grad", "samples", "positions", "weight_frobenius", "weight_grad_frobenius")
        assert [getattr(layer, k) for k in kept] == [getattr(b[name], k) for k in kept]
    rest = [k for k in vars(a) if k != "layers"]
    assert [getattr(a, k) for k in rest] == [getattr(b, k) for k in rest]


@pytest.fixture
def measured(kit):
    return measure(kit.build("conv", torch.float32), kit.images(64, dtype=torch.float32))


@pytest.fixture
def log(measured, tmp_path):
    for step in (0, 10, 20):
        append_record(tmp_path / "conditioning.jsonl", replace(measured, step=step))
    return tmp_path / "conditioning.jsonl"


def test_json_gives_exactly_the_same_back(measured, tmp_path):
    measured.to_json(tmp_path / "c.json")
    same(measured, Conditioning.from_json(tmp_path / "c.json"))
    json.loads((tmp_path / "c.json").read_text(), parse_constant=lambda word: pytest.fail(word))


def test_other_files_are_rejected_by_name(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"schema": "other/1"}')
    with pytest.raises(ValueError, match=r"c.json: not a conditioning record: expected schema 'condzoo.*got 'other/1'"):
        Conditioning.from_json(path)
    with pytest.raises(FileNotFoundError):
        Conditioning.from_json(tmp_path / "none.json")


def test_a_record_of_an_older_version_is_read_and_one_without_layers_is_not(log):
    record = json.loads(log.read_text().splitlines()[0])
    del record["certificate"]
    for layer in record["layers"].values():
        del layer["weight_frobenius"], layer["weight_grad_frobenius"]
    log.write_text(json.dumps(record) + "\n")
    old = read_records(log)[0]
    assert old.certificate == {}
    assert all(layer.weight_frobenius is None for layer in old.values())
    assert np.isnan(record_columns([old])["weight_frobenius"]).all()
    assert "F(dW/W)" in old.table()
    layer = next(iter(record["layers"].values()))
    log.write_text(json.dumps(record | {"layers": {"fc": {k: v for k, v in layer.items() if k != "kind"}}}) + "\n")
    with pytest.raises(ValueError, match=r":1: conditioning record does not fit its schema: .*'kind'; was the file ed"):
        read_records(log)
    del record["layers"]
    log.write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match="lacks the field 'layers'; was the file edited"):
        read_records(log)


def test_a_torn_last_line_is_skipped_with_a_warning_and_cut_off_before_appending(log, measured):
    whole = log.read_bytes()
    log.write_bytes(whole + whole[:100])
    with pytest.warns(UserWarning, match=r"conditioning.jsonl:4: skipped a torn last line"):
        assert [r.step for r in read_records(log)] == [0, 10, 20]
    drop_torn_line(log)
    assert log.read_bytes() == whole


def test_a_log_of_raw_letters_is_read_by_its_lines_and_torn_within_one(log):
    """As `jq -c` writes it: U+2028 and U+0085, which end a line of text, are letters of a name."""
    record = json.loads(log.read_text().splitlines()[0])
    name = "a\u2028b\u0085\u00e9"
    record["skipped"] = {name: "none"}
    whole = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    log.write_bytes(whole)
    assert [list(r.skipped) for r in read_records(log)] == [[name]]
    torn = whole[: whole.index("\u2028".encode()) + 1]
    log.write_bytes(whole + torn)
    with pytest.warns(UserWarning, match=r"conditioning.jsonl:2: skipped a torn last line"):
        assert [list(r.skipped) for r in read_records(log)] == [[name]]
    for other in (torn + b"\n", b"\x89PNG"):
        log.write_bytes(whole + other)
        with pytest.raises(ValueError, match=r"conditioning.jsonl is no file of conditioning records: line 2: 'utf-8'"):
            read_records(log)


def test_a_broken_line_within_is_an_error_that_names_it(log):
    lines = log.read_text().splitlines(keepends=True)
    log.write_text(lines[0] + "{}\n" + lines[2])
    with pytest.raises(ValueError, match=r"conditioning.jsonl:2: not a conditioning record"):
        read_records(log)


def test_brackets_without_end_are_an_error_that_names_the_line(log):
    log.write_text("[" * 100_000 + "\n{}\n")
    with pytest.raises(ValueError, match=r"conditioning.jsonl:1: it is nested too deep for a record"):
        read_records(log)


@pytest.mark.parametrize("step", ["10", 2.5, [], True])
def test_a_step_that_is_no_whole_number_names_its_line(log, step):
    record = {**json.loads(log.read_text().splitlines()[0]), "step": step}
    log.write_text(log.read_text() + json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=r"conditioning.jsonl:4: .*step must be a whole number or null, got "):
        read_records(log)


def test_a_run_that_went_on_from_an_older_step_replaces_what_came_after(log, measured):
    append_record(log, replace(measured, step=10, samples=7))
    assert [(r.step, r.samples) for r in read_records(log.parent)] == [(0, 64), (10, 7)]


@pytest.mark.parametrize(
    "eigenvalues",
    [[1.0, 2.0], [2.0, float("nan"), 1.0], [float("inf"), 1.0], [1.0, -1e-30], [[2.0, 1.0], [1.0, 2.0]], 5.0],
)
def test_eigenvalues_that_no_measurement_gives_name_their_layer(measured, eigenvalues):
    record = to_record(measured)
    record["layers"]["2"]["output_grad"]["eigenvalues"] = eigenvalues
    with pytest.raises(
        ValueError, match=r"conditioning record, output_grad of '2': eigenvalues must be .*; was the fi"
    ):
        from_record(record)


def test_a_log_with_nan_is_no_strict_json(log):
    first = log.read_text().splitlines()[0]
    log.write_text(first.replace('"step":0', '"step":NaN') + "\n")
    with pytest.raises(ValueError, match=r"conditioning\.jsonl:1: it holds NaN, which no record has"):
        read_records(log)


def test_no_records_says_where_they_were_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no conditioning records at .*conditioning.jsonl; was the run probed"):
        read_records(tmp_path)
    for name in ("no/such/run", "no/conditioning.jsonl", "typo.json"):
        with pytest.raises(FileNotFoundError, match=rf"no conditioning records at .*{name}: there is no such file"):
            read_records(tmp_path / name)


def test_columns_hold_one_entry_a_step_and_layer(log, measured):
    columns = record_columns(read_records(log), p=(0.5, 1.0))
    assert all(len(column) == 3 * len(measured) for column in columns.values())
    one = (columns["step"] == 10) & (columns["layer"] == "2")
    layer = measured["2"]
    assert columns["input_lambda_max"][one] == layer.input.lambda_max
    assert columns["output_grad_kappa50"][one] == layer.output_grad.condition_number(0.5)
    assert columns["depth"][one] == 1
    assert columns["kind"][one] == "grouped Conv2d"
    assert columns["input_lambda_max"].dtype == np.float64
    for path in (log, str(log.parent)):
        np.testing.assert_equal(record_columns(path), columns)
    np.testing.assert_equal(record_columns(measured), record_columns([measured]))
    with pytest.raises(TypeError, match=r"records must be a conditioning.jsonl or measurements, got a str"):
        record_columns(iter(["runs/x"]))
    np.testing.assert_equal(record_columns(measured, p=0.5), record_columns(measured, p=(0.5,)))


def test_columns_become_a_data_frame_where_pandas_is_installed(log, measured, monkeypatch):
    pandas = pytest.importorskip("pandas")
    records = read_records(log)
    frame = to_pandas(log)
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == list(record_columns(records))
    assert len(frame) == 3 * len(measured)
    one = frame[(frame.step == 10) & (frame.layer == "2")].iloc[0]
    assert one.input_lambda_max == measured["2"].input.lambda_max
    assert one.weight_frobenius == measured["2"].weight_frobenius
    pandas.testing.assert_frame_equal(to_pandas(records), frame)
    assert len(to_pandas(measured, p=(0.25,))) == len(measured)
    assert "input_kappa25" in to_pandas(measured, p=(0.25,))
    assert to_pandas([]).empty
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"needs pandas \(pip install pandas\); record_columns does without"):
        to_pandas(measured)


def test_the_table_names_every_layer_its_numbers_and_what_was_skipped(measured):
    text = replace(measured, skipped={"embed": "its input is indices"}).table(p=0.5)
    for name, layer in measured.items():
        line = next(line for line in text.splitlines()[2:] if line.startswith(f"{name} "))
        assert layer.kind in line
        assert f"{layer.input.lambda_max:.3g}" in line
        assert f"{layer.weight_domination:.2g}" in line
        assert line.endswith(f" {layer.weight_grad_frobenius / layer.weight_frobenius:.2g}")
    assert "0! " in text  # the classifier's softmax null
    assert "skipped embed: its input is indices\n" in text
    assert "train mode, 64 samples, labels from the data" in text


def test_a_measurement_prints_as_its_table_and_is_shown_in_short(measured):
    assert str(measured) == f"{measured}" == measured.table()
    shown = repr(replace(measured, step=10))
    assert shown.startswith(f"<Conditioning: step 10, {len(measured)} layers, train mode, 64 samples; ")
    assert len(shown) < 100


def test_the_table_names_the_relus_that_have_most_dying_and_full_units(measured):
    counts = {"a": (10, 1, 0), "b": (20, 0, 0), "c": (32, 28, 1), "d": (5, 1, 0), "e": (5, 2, 0), "f": (28, 3, 0)}
    neurons = {name: Neurons(units, dying, full, 64) for name, (units, dying, full) in counts.items()}
    dying = "dying 35.0% (c 28 of 32, e 2 of 5, d 1 of 5, f 3 of 28 and 1 more), full 1.0% (c 1 of 32)"
    assert f"ReLU units: 100, {dying}\n" in replace(measured, neurons=neurons).table()
    none = replace(measured, neurons={"a": Neurons(10, 0, 0, 64)}).table()
    assert "ReLU units: 10, dying 0.0%, full 0.0%\n" in none


def test_the_table_says_once_why_many_layers_were_skipped(measured):
    skipped = {f"body.{i}": "no gradient" for i in range(4)} | {f"aside.{i}": "not called" for i in range(3)}
    lines = replace(measured, skipped=skipped).table().splitlines()
    assert [line for line in lines if line.startswith("skipped")] == [
        "skipped 4 layers, body.0 to body.3: no gradient",
        *(f"skipped aside.{i}: not called" for i in range(3)),
    ]


@pytest.mark.parametrize(("known", "text"), [(1.55e5, ">1e+05"), (9.99e5, ">9e+05"), (2e5, ">2e+05"), (1.0, ">1e+00")])
def test_a_lower_bound_in_the_table_is_never_above_what_is_known(known, text):
    assert lower_bound(known) == text
    s = Spectrum(torch.tensor([known, 1e-3], dtype=torch.float64), noise_floor=1.0)
    assert (s.status(), shown(s, 1.0)) == ("bound", text)


def test_nothing_known_at_all_is_an_infinite_lower_bound():
    assert lower_bound(float("inf")) == ">inf"


def test_pictures_are_drawn_without_pyplot(log, measured, tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    plot_records(log, tmp_path / "one" / "run.png", title="a run")
    plot_comparison({"plain": log, "again": read_records(log)}, tmp_path / "two.pdf")
    measured.plot(tmp_path / "single.svg")
    for name, begin in (("one/run.png", b"\x89PNG"), ("two.pdf", b"%PDF"), ("single.svg", b"<?xml")):
        assert (tmp_path / name).read_bytes().startswith(begin)
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_pictures_do_not_depend_on_the_users_style(log, measured, monkeypatch, tmp_path):
    """Of which LaTeX need not even be here; the style is looked up as the figure is made and as it is saved."""
    style = {"text.usetex": True, "axes.facecolor": "black", "lines.linewidth": 9.0, "savefig.bbox": "tight"}
    defaults = {name: matplotlib.rcParamsDefault[name] for name in style}
    drawn = []

    def look(figure, *args, **kwargs):
        assert {name: matplotlib.rcParams[name] for name in style} == defaults
        drawn.append(figure)

    monkeypatch.setattr(Figure, "savefig", look)
    with matplotlib.rc_context(style):
        plot_records(log, tmp_path / "run.png", title="a_run")
        measured.plot(tmp_path / "one.png")
        assert {name: matplotlib.rcParams[name] for name in style} == style
    assert len(drawn) == 2
    assert not any(text.get_usetex() for figure in drawn for text in figure.findobj(Text))


def test_units_and_the_last_layer_are_in_the_pictures(measured, monkeypatch, tmp_path):
    """What the lines show, read back from the figure before it is saved."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    units = {"a": Neurons(10, 2, 0, 64), "b": Neurons(10, 5, 1, 64)}
    replace(measured, neurons=units).plot(tmp_path / "one.png")
    plot_records([replace(measured, neurons=units, step=0)], tmp_path / "run.png")
    for figure in drawn:
        by_title = {ax.get_title(): ax for ax in figure.axes}
        ax = next(ax for title, ax in by_title.items() if title.startswith("ReLU units by depth"))
        lines = {line.get_label(): list(line.get_ydata()) for line in ax.get_lines()}
        assert lines == {"dying": [0.2, 0.5], "full": [0.0, 0.1]}
    last = next(ax for ax in drawn[0].axes if ax.get_title().startswith("Last layer, 6"))
    s = measured["6"].input
    assert list(last.get_lines()[0].get_ydata()) == s.eigenvalues[: s.rank].tolist()
    styles = [(line.get_marker(), line.get_linestyle()) for line in last.get_lines() if len(line.get_xdata()) > 2]
    assert len(set(styles)) == len(styles)  # told apart without colour


def figures_of(monkeypatch, draw):
    """The figures that a call draws, before they are saved."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    draw()
    return drawn


def draw_texts(figure):
    """Draw a figure whose layout nobody looks at, which takes most of the time: a text that cannot be is an error."""
    figure.set_layout_engine("none")
    figure.draw_without_rendering()


def lines_of(figure, title):
    (ax,) = (ax for ax in figure.axes if ax.get_title().startswith(title))
    return ax.get_lines()


def test_every_one_of_many_runs_is_told_apart(measured, monkeypatch, tmp_path):
    record = replace(measured, step=0, neurons={"a": Neurons(10, 2, 0, 64), "b": Neurons(10, 5, 1, 64)})
    runs = {f"run{i}": [record] for i in range(15)}
    (figure,) = figures_of(monkeypatch, lambda: plot_comparison(runs, tmp_path / "x.png"))
    last = lines_of(figure, "Input of the last layer, $\\lambda")
    units = lines_of(figure, "ReLU units by depth")
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in last]
    assert len(set(looks)) == len(looks) == 15
    assert len(set(looks[:7])) == len({marker for _, marker, _ in looks[:7]}) == 7
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle(), line.get_fillstyle()) for line in units]
    assert len(set(looks)) == len(looks) == 30
    (ax,) = (ax for ax in figure.axes if ax.get_title().startswith("ReLU units by depth"))
    figure.draw_without_rendering()
    assert ax.get_legend().get_window_extent().x0 >= ax.bbox.x1  # beside the lines
    assert ax.bbox.height == pytest.approx(figure.axes[-2].bbox.height)  # one column of 30 entries left it none


def test_the_legend_of_units_stands_over_their_lines(measured, monkeypatch, tmp_path):
    record = replace(measured, step=0, neurons={"a": Neurons(10, 10, 0, 64), "b": Neurons(10, 5, 1, 64)})
    draw = partial(plot_comparison, {"one": [record], "two": [record]}, tmp_path / "x.png")
    (figure,) = figures_of(monkeypatch, draw)
    (ax,) = (ax for ax in figure.axes if ax.get_title().startswith("ReLU units by depth"))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["dying", "full"]
    assert ax.get_ylim()[1] > 1.15  # of 100 %
    assert max(ax.get_yticks()) == pytest.approx(1.0)


def test_places_of_layers_are_whole_numbers_also_of_one_layer(monkeypatch, tmp_path):
    torch.manual_seed(0)
    batches = [(torch.randn(8, 3), torch.randn(8, 2))]
    record = measure(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), batches, loss=F.mse_loss)
    (figure,) = figures_of(monkeypatch, lambda: record.plot(tmp_path / "x.png"))
    for title in ("Largest eigenvalue", "Condition number", "ReLU units"):
        (ax,) = (ax for ax in figure.axes if ax.get_title().startswith(title))
        low, high = ax.get_xlim()
        assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [0]


def test_names_of_runs_are_written_as_they_are(measured, monkeypatch, tmp_path):
    names = ["a$b_c^$", "_hidden", "plain_name"]
    runs = dict.fromkeys(names, measured)
    run = tmp_path / "lr$0.1$"
    run.mkdir()
    append_record(run / "conditioning.jsonl", measured)
    (figure,) = figures_of(monkeypatch, lambda: plot_records(run, tmp_path / "x.png"))
    assert figure.get_suptitle() == r"lr\$0.1\$"
    (figure,) = figures_of(monkeypatch, lambda: plot_comparison(runs, tmp_path / "x.png"))
    draw_texts(figure)  # a formula that is none was an error
    axes = [ax for ax in figure.axes if ax.get_title().startswith("Input of the last layer")]
    for ax in axes:
        texts = [text.get_text().strip() for text in ax.get_legend().get_texts()]
        assert [text.replace("\\$", "$") for text in texts] == names


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "written"), [(os.fsdecode(b"caf\xe9"), r"caf\udce9"), ("実験", "実験")])
def test_names_of_other_letters_are_drawn(measured, name, written, monkeypatch, tmp_path):
    run = tmp_path / name
    run.mkdir()
    append_record(run / "conditioning.jsonl", measured)
    plot_comparison({name: measured, "b": measured}, tmp_path / "x.png")  # a letter that the font has not was a warning
    (figure,) = figures_of(monkeypatch, lambda: plot_records(run, tmp_path / "x.png"))
    assert figure.get_suptitle() == written


def test_iterations_are_whole_numbers_also_of_one_measurement(measured, monkeypatch, tmp_path):
    (figure,) = figures_of(monkeypatch, lambda: plot_records(measured, tmp_path / "x.png"))
    for ax in figure.axes:
        if ax.get_title().startswith("Input of the last layer"):
            assert all(tick == round(tick) for tick in ax.get_xticks())


@pytest.mark.parametrize("mark", ["w_$y^$", "$\\frac$", "cost_$"])
def test_names_of_layers_are_written_as_they_are(measured, mark, monkeypatch, tmp_path):
    named = replace(measured, layers={f"{mark}.{name}": layer for name, layer in measured.items()})
    figures = figures_of(monkeypatch, lambda: [named.plot(tmp_path / "x"), plot_records(named, tmp_path / "y")])
    for figure in figures:
        draw_texts(figure)  # a formula that is none was an error
    depth, maps = figures
    last = list(named)[-1].replace("$", r"\$")
    below = f"layer, in forward order (ringed: the last, {last})"
    assert [ax.get_xlabel() for ax in depth.axes].count(below) == 4
    assert f"Last layer, {last}" in [ax.get_title() for ax in depth.axes]
    assert [text.get_text() for ax in maps.axes for text in ax.get_yticklabels()].count(last) == 5


def test_one_measurement_is_taken_for_a_run_of_one(measured, monkeypatch, tmp_path):
    figures = figures_of(monkeypatch, lambda: [plot_records(m, tmp_path / "x") for m in (measured, [measured])])
    points = [lines_of(figure, "Input of the last layer, $\\lambda")[0].get_xydata().tolist() for figure in figures]
    assert points[0] == points[1] == [[0.0, measured.last.input.lambda_max]]
    plot_comparison({"a": measured, "b": [measured]}, tmp_path / "two.png")
    with pytest.raises(TypeError, match=r"records must be a conditioning.jsonl or measurements, got a str"):
        plot_comparison({"a": iter(["runs/x"])}, tmp_path / "x.png")


def test_several_runs_without_labels_are_answered_by_what_is_to_be_passed(log, measured, tmp_path):
    unchecked = inspect.unwrap(plot_comparison)  # without the checks of types, which only tests have
    for runs in ([log, log], str(log), measured):
        with pytest.raises(TypeError, match=r"must be a dict of label to run, got a .*'runs/plain'.* plot_records$"):
            unchecked(runs, tmp_path / "x.png")
    with pytest.raises(TypeError, match=r"got a \w+ among several; .* plot_comparison draws {label: path, ...}$"):
        plot_records(iter([log, str(log)]), tmp_path / "x.png")


@pytest.mark.parametrize("name", ["x.png", "x.pdf", "x.svg", "x.json"])
def test_what_finds_no_room_names_its_file_and_leaves_the_one_of_before(measured, monkeypatch, tmp_path, name):
    def full(path, content):
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    (tmp_path / name).write_bytes(b"before")
    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(Figure, "savefig", lambda figure, drawn, **options: drawn.write(options["format"].encode()))
    for write in (measured.to_json,) if name == "x.json" else (measured.plot, partial(plot_records, measured)):
        with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / name}'$"):
            write(tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_is_no_file_is_written_into(measured, tmp_path):
    """/dev/stdout stays what it is, and so does a link, whose file is written."""
    (tmp_path / "link.json").symlink_to(tmp_path / "there.json")
    measured.to_json(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    measured.to_json("/dev/null")
    assert Path("/dev/null").is_char_device()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "there.json"]
    assert list(Conditioning.from_json(tmp_path / "there.json")) == list(measured)


def test_nothing_to_plot_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no record with a measured layer"):
        plot_records([], tmp_path / "x.png")
    (tmp_path / "empty.jsonl").write_text("{")
    named = r"no record with a measured layer to plot in .*empty\.jsonl; was the run"
    with pytest.raises(ValueError, match=named), pytest.warns(UserWarning, match="skipped a torn last line"):
        plot_records(tmp_path / "empty.jsonl", tmp_path / "x.png")
    with pytest.raises(ValueError, match="no run to plot"):
        plot_comparison({}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="no layer was measured"):
        Conditioning(layers={}).plot(tmp_path / "x.png")


def test_layers_that_come_later_stand_where_the_forward_pass_has_them(measured):
    names = list(measured)
    assert len(names) > 2
    last = replace(measured, layers={names[-1]: measured[names[-1]]}, step=0)
    middle = replace(measured, layers={n: measured[n] for n in names if n != names[1]}, step=1)
    assert panels([last, middle, replace(measured, step=2)])[0].layers == names
    assert panels([last])[0].layers == names[-1:]


@pytest.mark.filterwarnings("error")
def test_a_last_layer_that_sees_zeros_alone_is_plotted_without_a_warning(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    torch.nn.init.constant_(model[0].bias, -99.0)
    record = replace(measure(model, (torch.randn(8, 3), torch.randint(2, (8,)))), step=0)
    assert record["2"].input.lambda_max == 0.0
    plot_records([record], tmp_path / "dead.png")
    record.plot(tmp_path / "depth.png")
    assert (tmp_path / "dead.png").exists()


def test_measurements_at_rest_stand_one_beside_the_other(measured, tmp_path):
    """Without steps of their own, they are drawn as if made at 0, 1 and 2."""
    assert measured.step is None
    stepped = [replace(measured, step=step) for step in range(3)]
    for name, records in (("rest", [measured] * 3), ("steps", stepped), ("same", [stepped[2]] * 3)):
        plot_records(records, tmp_path / f"{name}.png", title="a run")
    rest, steps, same_step = (imread(tmp_path / f"{name}.png") for name in ("rest", "steps", "same"))
    assert np.array_equal(rest, steps)
    assert np.array_equal(same_step, steps)

"""What is less than the paper's is said wherever a result is shown: seeds, and images that are not ImageNet's."""

import pytest

from condzoo.cli import main
from condzoo.experiments import load_experiment, reductions_of
from condzoo.experiments.figures import small_print
from condzoo.experiments.reductions import folder_read, reductions

MADE = {"hardware": "a machine", "date": "today"}


def test_seeds_are_counted_against_the_paper_s():
    fig12, fig10 = load_experiment("fig12"), load_experiment("fig10")
    labels = [spec.label for spec in fig12.training.runs]
    assert reductions(fig12, "cpu", [1, 2, 3], labels)[-1] == "3 of 5 seeds"
    assert not any("seeds" in text for text in reductions(fig12, "cpu", [1, 2, 3, 4, 5], labels))
    assert reductions(fig10, "cpu", [1], None)[-1] == "1 of 3 seeds", "scale cpu has more than the paper"
    assert reductions(fig12, "paper", [1], labels)[-1] == "1 of 5 seeds"


def test_seeds_of_older_data_are_counted_where_they_are_shown():
    fig12 = load_experiment("fig12")
    data = {"id": "fig12", "scale": "cpu", "seeds": [1, 2], "made": MADE}
    for kept in (["short"], ["short", "2 of 3 seeds"]):
        assert reductions_of(fig12, data | {"reductions": kept}) == ["short", "2 of 5 seeds"]
        printed = small_print(data | {"reductions": kept}, fig12)
        assert "Less than the paper's: short; 2 of 5 seeds. a machine" in printed


def test_the_folder_that_was_read_is_marked_whoever_named_it(tmp_path, monkeypatch):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    fig10 = load_experiment("fig10")
    monkeypatch.delenv("CONDZOO_DATA", raising=False)
    assert folder_read(fig10, "cpu", {"root": str(tmp_path)}, None) == tmp_path
    assert folder_read(fig10, "cpu", {"root": "elsewhere"}, tmp_path) == tmp_path
    monkeypatch.setenv("CONDZOO_DATA", str(tmp_path))
    assert folder_read(fig10, "cpu", None, None) == tmp_path
    assert folder_read(load_experiment("fig05"), "cpu", None, tmp_path) is None
    assert folder_read(load_experiment("thm1"), "cpu", None, tmp_path) is None


def test_reductions_are_printed_before_the_verdicts(tiny, tmp_path, monkeypatch, capsys):
    experiment = tiny("thm1")
    monkeypatch.setattr("condzoo.experiments.load_experiment", lambda _: experiment)
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "thm1", "--out", str(tmp_path)])
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "less than the paper's: two steps on digits" in printed
    assert printed.index("less than") < printed.index("held")

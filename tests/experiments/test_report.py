"""The report's rows: what a claim's origin is, where the paper gives no number, on what and how it was run."""

from pathlib import Path

from condzoo.experiments import load_experiment, report
from condzoo.experiments.claims import Verdict
from condzoo.experiments.report import claim_row

DATA = Path(__file__).parents[2] / "docs" / "data"


def test_a_claim_written_down_after_the_data_were_seen_is_marked():
    claims = load_experiment("fig07").claims
    rows = {claim.after: claim_row(Verdict(claim, "held", {1: 0.5, 2: 0.5})) for claim in claims}
    assert "below 0.3: the bound over which fig. V counts them as shrinking; written down after the data" in rows[True]
    assert "written down after" not in rows[False]
    assert [claim.after for claim in claims] == [False] * 4 + [True] * 3
    page = report(DATA)
    assert "before the run, but for those that are marked" in page
    assert "were written down on 28 November 2026, when the data of figs. VI, VII and X had" in " ".join(page.split())


def test_no_number_of_the_paper_is_said():
    claim = load_experiment("fig07").claims[0]
    assert "| no number given |" in claim_row(Verdict(claim, "held", {1: 0.5, 2: 0.5}))
    numbered = load_experiment("table_b").claims[0]
    assert f"| {numbered.paper} |" in claim_row(Verdict(numbered, "held", {1: -0.5, 2: -0.5}))


def test_the_overview_names_hardware_and_command():
    lines = report(DATA).splitlines()
    head = next(line for line in lines if line.startswith("| experiment |"))
    row = next(line for line in lines if line.startswith("| [fig05]"))
    assert head.endswith("| hardware | date | command |")
    assert row.endswith("| `condzoo reproduce fig05` |")
    assert "EPYC" in row.split("|")[8]
    assert head.count("|") == row.count("|")

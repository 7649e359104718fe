"""Every claim of every experiment, on data made to satisfy it and on data made to violate it; and how verdicts fall."""

import math
from pathlib import Path

import pytest

from condzoo.experiments import experiment_ids, judge, load_experiment, read_data_file
from condzoo.experiments.claims import judge_claim
from condzoo.experiments.measures import MEASURES
from condzoo.experiments.readings import Missing, finals, spearman
from condzoo.experiments.schema import Claim
from tests.experiments.made_up import BUILDERS, SEEDS, by_layer, entry, made_up, network, run_of, targets

CLAIMS = [(name, i) for name in experiment_ids() for i in range(len(load_experiment(name).claims))]
RATIO = Claim(text="", measure="loss_ratio", args={"label": "a", "to": "b"}, below=1, reason="")


@pytest.mark.parametrize(("name", "index"), CLAIMS)
def test_a_claim_holds_where_it_should_and_only_there(name, index):
    claim = load_experiment(name).claims[index]
    inside, outside = targets(claim)
    assert inside
    assert outside
    for values, expected in ((inside, "held"), (outside, "did not hold")):
        for value in values:
            verdict = judge_claim(claim, made_up(claim, dict.fromkeys(SEEDS, value)), name)
            assert verdict.outcome == expected, (value, verdict)
            assert all(found == pytest.approx(value, rel=1e-9) for found in verdict.values.values())


def test_every_measure_can_be_made_up():
    used = {load_experiment(name).claims[i].measure for name, i in CLAIMS}
    assert used <= set(BUILDERS) <= set(MEASURES)


def test_one_seed_out_of_the_bound_leaves_a_claim_undecided():
    verdict = judge_claim(RATIO, made_up(RATIO, {1: 0.5, 2: 0.6, 3: 1.5}), "here")
    assert verdict.outcome == "not decided"
    assert verdict.why == "1 of 3 seeds are out of the bound"
    assert verdict.median == pytest.approx(0.6)
    assert verdict.measured == "0.6 (0.5 to 1.5, n = 3)"
    assert verdict.bound == "below 1"
    assert judge_claim(RATIO, made_up(RATIO, {1: 0.5, 2: 1.6, 3: 1.5}), "here").outcome == "did not hold"


def test_what_is_missing_is_said():
    verdict = judge_claim(RATIO, {"runs": [run_of("b", 1)]}, "here")
    assert (verdict.outcome, verdict.measured) == ("not decided", "no run 'a'")
    verdict = judge_claim(RATIO, {"runs": [run_of("a", 1, status="diverged"), run_of("b", 1)]}, "here")
    assert verdict.why == "no run 'a' ended with a train_loss"
    slope = Claim(text="", measure="slope_over_depth", args={"label": "a", "quantity": "q"}, below=1, reason="")
    verdict = judge_claim(slope, {"runs": [run_of("a", 1, status="diverged")]}, "here")
    assert verdict.why == "a, seed 1: q was not measured (diverged)"


def test_a_run_that_was_not_chosen_does_not_count():
    data = made_up(RATIO, {1: 0.5})
    data["runs"].append(run_of("a", 1, train_loss=50.0, chosen=False))
    assert judge_claim(RATIO, data, "here").values == {1: pytest.approx(0.5)}


def test_a_diverged_run_has_the_error_of_chance():
    lower = Claim(text="", measure="error_difference", args={"label": "a", "to": "b"}, below=0, reason="")
    data = {"runs": [run_of("a", 1, test_error=0.4), run_of("b", 1, status="diverged", test_error=None)]}
    assert judge_claim(lower, data, "here").values == {1: pytest.approx(-50.0)}


def test_the_last_loss_is_the_median_of_the_last_tenth_of_what_was_logged():
    losses = [[step, 100.0] for step in range(18)] + [[18, 1.0], [19, 3.0], [20, None]]
    assert finals({"runs": [run_of("a", 1, loss=losses)]}, "a", "last_loss") == {1: 2.0}
    assert finals({"runs": [run_of("a", 1, loss=[[0, 5.0]])]}, "a", "last_loss") == {1: 5.0}
    with pytest.raises(Missing, match="no run 'a' ended with a last_loss"):
        finals({"runs": [run_of("a", 1, loss=[])]}, "a", "last_loss")


def test_the_worst_trial_of_a_seed_counts():
    rows = [{"seed": 1, "trial": t, "errors": {"q": v}} for t, v in enumerate((0.2, 0.9, 0.4))]
    largest = Claim(text="", measure="largest_error", args={"quantity": "q"}, below=1, reason="")
    smallest = Claim(text="", measure="smallest_error", args={"quantity": "q"}, above=0, reason="")
    assert judge_claim(largest, {"trials": rows}, "here").values == {1: 0.9}
    assert judge_claim(smallest, {"trials": rows}, "here").values == {1: 0.2}


def test_nan_is_within_no_bound():
    largest = Claim(text="", measure="largest_error", args={"quantity": "q"}, below=1, reason="")
    rows = [{"seed": 1, "trial": 0, "errors": {"q": math.nan}}]
    assert judge_claim(largest, {"trials": rows}, "here").outcome == "did not hold"


def test_an_unknown_measure_names_the_known_ones():
    wrong = RATIO.model_copy(update={"measure": "loss_ration"})
    with pytest.raises(ValueError, match="here: unknown measure 'loss_ration'; there are: slope_over_depth"):
        judge_claim(wrong, {"runs": []}, "here")


def test_spearman_equals_scipys():
    stats = pytest.importorskip("scipy.stats")
    for values in ([3.0, 1.0, 2.0, 5.0, 4.0], [1.0, 1.0, 2.0, 3.0], [5.0, 4.0, 3.0]):
        assert spearman(values) == pytest.approx(stats.spearmanr(values, range(len(values))).statistic)
    assert spearman([1.0, 1.0, 1.0]) == 0.0


def test_all_claims_of_an_experiment_are_judged():
    experiment = load_experiment("table_b")
    runs = [run for seed in (1, 2) for run in (run_of("VGG-20", seed), run_of("VGG-20 LastBN", seed, test_error=0.4))]
    verdicts = judge(experiment, {"scale": "cpu", "runs": runs})
    assert [v.outcome for v in verdicts] == ["held"] + ["not decided"] * 7


@pytest.mark.parametrize(("error", "where"), [(0.4, "within"), (0.6, "out of")])
def test_one_seed_of_a_training_decides_nothing(error, where):
    runs = [run_of("VGG-20", 1), run_of("VGG-20 LastBN", 1, test_error=error)]
    for scale in ("cpu", "paper"):
        verdict = judge(load_experiment("table_b"), {"scale": scale, "runs": runs})[0]
        assert (verdict.outcome, verdict.why) == ("not decided", f"one seed alone, {where} the bound")
        assert list(verdict.values) == [1]


def test_times_of_before_they_were_taken_by_seed_are_judged():
    exponent = next(claim for claim in load_experiment("cost").claims if claim.measure == "exponent")
    data = made_up(exponent, {0: 0.5}) | {"seeds": [0]}
    for point in data["points"]:
        del point["seed"]
    verdict = judge(load_experiment("cost").model_copy(update={"claims": [exponent]}), data)[0]
    assert (verdict.outcome, verdict.values) == ("held", {0: pytest.approx(0.5)})


def test_what_older_data_do_not_have_is_said():
    claim = Claim(text="", measure="largest_error", args={"quantity": "eps_exponent"}, below=1, reason="")
    verdict = judge_claim(claim, {"trials": [{"seed": 1, "errors": {"input": 0.0}}]}, "here")
    assert (verdict.outcome, verdict.measured) == ("not decided", "the data have no eps_exponent")


def test_a_layer_s_kappa_that_is_not_known_is_infinite():
    """Leaving it out would flatter the network whose smallest eigenvalues are under the noise."""
    args = {"label": "a", "to": "b", "matrix": "fisher", "value": "kappa 0.5"}
    lower = Claim(text="", measure="share_of_blocks_lower", args=args, above=0.5, reason="")

    def data(own, other):
        kappas = {"a": own, "b": other}
        blocks = {x: {f"fc{k}": entry(1.0, kappa) for k, kappa in enumerate(kappas[x])} for x in "ab"}
        return {"networks": [network(x, 1, "fisher", full=entry(1.0), **blocks[x]) for x in "ab"]}

    assert judge_claim(lower, data([1.0, None, None], [2.0, 2.0, 2.0]), "here").values == {1: pytest.approx(1 / 3)}
    assert judge_claim(lower, data([1.0, 1.0, None], [None, None, None]), "here").values == {1: 1.0}
    verdict = judge_claim(lower, data([None], [None]), "here")
    assert verdict.measured == "kappa 0.5 of fisher is known of no block of a or b"


def test_the_training_error_at_the_end_is_the_last_epoch_s():
    epochs = [{"step": 2, "train_error": 0.9}, {"step": 4, "train_error": 0.3}]
    runs = [run_of("a", 1, epochs=epochs), run_of("a", 2, epochs=[])]
    assert finals({"runs": runs}, "a", "train_error") == {1: 0.3}


def test_a_seed_without_a_value_leaves_a_claim_undecided():
    experiment = load_experiment("table_b")
    runs = [run for seed in (1, 2) for run in (run_of("VGG-20", seed), run_of("VGG-20 LastBN", seed, test_error=0.4))]
    runs += [run_of("VGG-20", 3, status="failed", test_error=None), run_of("VGG-20 LastBN", 3)]
    verdict = judge(experiment, {"scale": "cpu", "seeds": [1, 2, 3], "runs": runs})[0]
    assert (verdict.outcome, verdict.why) == ("not decided", "no value of seed 3")


def test_one_seed_of_networks_at_initialization_decides_nothing():
    data = read_data_file(Path(__file__).parents[2] / "docs" / "data" / "fig01.json")
    assert {v.outcome for v in judge(load_experiment("fig01"), data)} == {"held"}
    data = {**data, "seeds": [1], "networks": [n for n in data["networks"] if n["seed"] == 1]}
    verdicts = judge(load_experiment("fig01"), data)
    assert {v.outcome for v in verdicts} == {"not decided"}
    assert {v.why for v in verdicts} == {"one seed alone, within the bound"}


def test_a_diverged_seed_beside_good_ones_is_no_error():
    fall = Claim(text="", measure="loss_fall", args={"label": "a"}, above=1.5, reason="")
    runs = [run_of("a", 1), run_of("a", 2, status="diverged", train_loss=None), run_of("a", 3, train_loss=0.0)]
    verdict = judge_claim(fall, {"runs": runs}, "here", seeds=[1, 2, 3])
    assert verdict.values == {1: pytest.approx(2.0), 3: math.inf}
    assert verdict.why == "no value of seed 2"


def test_a_run_that_failed_has_neither_converged_nor_not():
    stays = Claim(text="", measure="converged", args={"label": "a", "below": 2.0}, below=0.5, reason="")
    failed = [run_of("a", seed, status="failed", train_loss=None) for seed in (1, 2)]
    verdict = judge_claim(stays, {"runs": failed}, "here")
    assert (verdict.outcome, verdict.measured) == ("not decided", "every run 'a' failed")
    runs = [*failed, run_of("a", 3, status="diverged", train_loss=None), run_of("a", 4, train_loss=0.0)]
    assert judge_claim(stays, {"runs": runs}, "here").values == {3: 0.0, 4: 1.0}


def test_the_final_loss_of_a_run_within_an_epoch_is_the_last_and_not_the_mean_of_all():
    losses = [[0, 9.0], [1, 5.0], [2, 1.9]]
    short = run_of("a", 1, train_loss=5.3, loss=losses, epochs=run_of("a", 1)["epochs"][:1])
    assert finals({"runs": [short]}, "a", "train_loss") == {1: 1.9}
    assert finals({"runs": [short | {"loss": []}]}, "a", "train_loss") == {1: 5.3}
    assert finals({"runs": [run_of("a", 1, train_loss=5.3, loss=losses)]}, "a", "train_loss") == {1: 5.3}
    trains = Claim(text="", measure="converged", args={"label": "a", "below": 2.2}, above=0.5, reason="")
    assert judge_claim(trains, {"runs": [short]}, "here").values == {1: 1.0}


def test_chance_is_that_of_the_classes():
    lower = Claim(text="", measure="error_difference", args={"label": "a", "to": "b"}, below=0, reason="")
    lost = run_of("a", 1, status="diverged", test_error=None, classes=100)
    data = {"runs": [lost, run_of("b", 1, test_error=0.97, classes=100)]}
    assert judge_claim(lower, data, "here").values == {1: pytest.approx(2.0)}


def test_a_kappa_that_is_not_known_is_larger_than_any_that_is():
    """Leaving it out would flatter the network whose smallest eigenvalues are under the noise."""
    args = {"label": "a", "to": "b", "quantity": "input_kappa50"}
    better = Claim(text="", measure="ratio_between", args=args, below=1, reason="")

    def data(plain):
        rows = {"a": [[10.0] * 3] * 2, "b": [plain] * 2}
        return {"runs": [run_of(label, 1, quantities=by_layer("input_kappa50", r)) for label, r in rows.items()]}

    assert judge_claim(better, data([1.1, None, None]), "here").values == {1: 0.0}
    assert judge_claim(better, data([1.1, 100.0, None]), "here").values == {1: pytest.approx(0.1)}
    assert judge_claim(better, data([None, None, None]), "here").outcome == "not decided"
    unknown = {"runs": [run_of(x, 1, quantities=by_layer("input_kappa50", [[5.0, None, None]] * 2)) for x in "ab"]}
    assert judge_claim(better, unknown, "here").why == "input_kappa50 of a and b is not known at most layers"


def test_a_first_layer_that_fell_to_zero_has_collapsed():
    args = {"label": "a", "quantity": "fisher_lambda_max"}
    collapsed = Claim(text="", measure="collapse", args=args, above=1, reason="")
    run = run_of("a", 1, quantities=by_layer("fisher_lambda_max", [[1e6, 1.0], [0.0, 1.0]]))
    assert judge_claim(collapsed, {"runs": [run]}, "here").outcome == "held"
    run = run_of("a", 1, quantities=by_layer("fisher_lambda_max", [[1e6, 1.0], [None, 1.0]]))
    assert judge_claim(collapsed, {"runs": [run]}, "here").outcome == "not decided"


LATER = {
    *("slope_over_depth", "ratio_between", "variation_ratio", "median_share", "upper_minus_lower", "collapse")
}  # what they measure follows the start, unless they are asked for it


@pytest.mark.parametrize(("name", "index"), [x for x in CLAIMS if load_experiment(x[0]).claims[x[1]].measure in LATER])
def test_what_a_diverged_run_recorded_is_its_start_alone(name, index):
    claim = load_experiment(name).claims[index]
    data = made_up(claim, dict.fromkeys(SEEDS, targets(claim)[0][0]))
    own = [run for run in data["runs"] if run["label"] == claim.args["label"]]
    own[1]["status"] = "diverged"
    verdict = judge_claim(claim, data, name, several=True, seeds=SEEDS)
    if claim.args.get("at") == "start":
        assert (verdict.outcome, list(verdict.values)) == ("held", list(SEEDS))
        return
    assert (verdict.outcome, verdict.why) == ("not decided", "no value of seed 2")
    assert list(verdict.values) == [1, 3]
    for run in own:
        run["status"] = "diverged"
    verdict = judge_claim(claim, data, name, several=True, seeds=SEEDS)
    assert (verdict.outcome, verdict.measured) == ("not decided", f"no run {claim.args['label']!r} ended")


@pytest.mark.parametrize("at", ["start", "end", "all"])
def test_one_step_is_the_start_and_nothing_after_it(at):
    args = {"label": "a", "to": "b", "quantity": "input_kappa50", "at": at}
    better = Claim(text="", measure="ratio_between", args=args, below=1, reason="")
    rows = {"a": [[2.0] * 3], "b": [[8.0] * 3]}
    data = {"runs": [run_of(label, 1, quantities=by_layer("input_kappa50", r)) for label, r in rows.items()]}
    verdict = judge_claim(better, data, "here")
    if at == "start":
        assert verdict.values == {1: pytest.approx(0.25)}
    else:
        assert verdict.outcome == "not decided"
        assert verdict.why == "a, seed 1: input_kappa50 was measured at one step alone"


def test_no_ratio_of_nothing_to_nothing():
    """Features that have died in both networks: lambda_max is 0, and 0 / 0 is not 1."""
    args = {"label": "a", "to": "b", "quantity": "input_lambda_max"}
    level = Claim(text="", measure="ratio_between", args=args, above=0.5, reason="")
    dead = [[1e4]] * 2 + [[0.0]] * 5
    data = {"runs": [run_of(x, seed, quantities=by_layer("input_lambda_max", dead)) for x in "ab" for seed in SEEDS]}
    verdict = judge_claim(level, data, "here", several=True, seeds=SEEDS)
    assert (verdict.outcome, verdict.measured) == ("not decided", "input_lambda_max of a and b is 0 at most layers")


@pytest.mark.parametrize("place", SEEDS)
def test_nan_of_a_training_is_no_value_whichever_seed_has_it(place):
    args = {"label": "a", "to": "b", "quantity": "input_lambda_max"}
    stabler = Claim(text="", measure="variation_ratio", args=args, below=1, reason="")
    data = made_up(stabler, dict.fromkeys(SEEDS, 0.5))
    for run in data["runs"]:
        if run["seed"] == place:  # neither curve moves: 0 decades over 0
            run["quantities"] = by_layer("input_lambda_max", [[1.0] * 3] * 4)
    for seeds in (SEEDS, ()):
        verdict = judge_claim(stabler, data, "here", several=True, seeds=seeds)
        assert (verdict.outcome, verdict.why) == ("not decided", f"no value of seed {place}")
        assert list(verdict.values) == [seed for seed in SEEDS if seed != place]


@pytest.mark.parametrize("kept", [math.nan, None])
@pytest.mark.parametrize("place", SEEDS)
def test_nan_of_a_theorem_is_a_failure_whichever_seed_has_it(place, kept):
    holds = Claim(text="", measure="largest_error", args={"quantity": "q"}, below=1, reason="")
    rows = [{"seed": seed, "errors": {"q": kept if seed == place else 0.0}} for seed in SEEDS]
    verdict = judge_claim(holds, {"trials": rows}, "here", seeds=SEEDS)
    assert (verdict.outcome, verdict.measured) == ("did not hold", "nan (nan to nan, n = 3)")


def zeros_below(depth: int, label: str, seed: int = 1) -> dict:
    """A run whose magnitudes fall to exactly 0 from the layer `depth` on, at every step but the first."""
    rows = [[1.0, 2.0, 4.0, 8.0, 16.0, 1.0]] + [[1.0, 2.0, 4.0, 8.0, 16.0, 1.0][:depth] + [0.0] * (6 - depth)] * 3
    return run_of(label, seed, quantities=by_layer("input_lambda_max", rows))


def test_a_layer_that_dies_goes_through_infinitely_many_decades():
    args = {"label": "a", "to": "b", "quantity": "input_lambda_max"}
    stabler = Claim(text="", measure="variation_ratio", args=args, below=1, reason="")
    varied = run_of("b", 1, quantities=by_layer("input_lambda_max", [[1.0] * 6, [100.0] * 6]))
    verdict = judge_claim(stabler, {"runs": [zeros_below(1, "a"), varied]}, "here")
    assert (verdict.outcome, verdict.values) == ("did not hold", {1: math.inf})
    verdict = judge_claim(stabler, {"runs": [{**varied, "label": "a"}, zeros_below(1, "b")]}, "here")
    assert (verdict.outcome, verdict.values) == ("held", {1: 0.0})


def test_a_network_that_has_died_is_not_level_over_its_depth():
    args = {"label": "a", "quantity": "input_lambda_max", "at": "end"}
    level = Claim(text="", measure="slope_over_depth", args=args, below=1, above=-1, reason="")
    assert judge_claim(level, {"runs": [zeros_below(5, "a")]}, "here").outcome == "held", "the classifier is left out"
    verdict = judge_claim(level, {"runs": [zeros_below(3, "a")]}, "here")
    assert (verdict.outcome, verdict.why) == ("not decided", "a, seed 1: input_lambda_max is 0 at 2 layers")
    spread = Claim(text="", measure="spread_over_depth", args=args, below=5, reason="")
    assert judge_claim(spread, {"runs": [zeros_below(3, "a")]}, "here").values == {1: math.inf}
    verdict = judge_claim(spread, {"runs": [zeros_below(0, "a")]}, "here")
    assert verdict.why == "a: input_lambda_max is not known at enough layers"

"""Made-up data from which a claim's measure must read a number chosen beforehand, each built from its definition."""

import itertools
from collections.abc import Callable
from typing import Any

from condzoo.experiments.naive_cost import naive_counts
from condzoo.experiments.schema import Claim

SEEDS = (1, 2, 3)
LAYERS, STEPS = 9, 4


def made_up(claim: Claim, values: dict[int, float]) -> dict[str, Any]:
    """An experiment's data whose value of the claim is values[seed]."""
    return BUILDERS[claim.measure](claim.args, values)


def run_of(label: str, seed: int, **fields: Any) -> dict[str, Any]:
    """A finished run of nine layers and four probed steps, with some fields of its own."""
    row = {
        "label": label,
        "variant": {},
        "seed": seed,
        "status": "done",
        "chosen": True,
        "train_loss": 1.0,
        "test_error": 0.5,
        "loss": [[0, 2.0], [3, 1.0]],
        "epochs": [{"step": s, "train_loss": 1.0, "train_error": 0.5, "test_error": 0.5} for s in (2, 4)],
        "probed": list(range(STEPS)),
        "quantities": {},
    }
    return row | fields


def by_layer(quantity: str, rows: list[list[float | None]]) -> dict[str, Any]:
    return {quantity: {"layers": [f"fc{k}" for k in range(len(rows[0]))], "values": rows}}


def sloped(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
    """10^(slope k) at the steps asked for and level elsewhere; the last layer, which is left out, is far off."""
    runs = []
    for seed, slope in values.items():
        line = [10 ** (slope * k) for k in range(LAYERS - 1)] + [1e30]
        level = [1.0] * (LAYERS - 1) + [1e30]
        rows = {
            "start": [line, level, level, level],
            "end": [level, level, level, line],
            "all": [level, line, line, line],
        }
        runs.append(run_of(args["label"], seed, quantities=by_layer(args["quantity"], rows[args.get("at", "start")])))
    return {"runs": runs}


def levels(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
    """One curve level at the ratio, the other at 1; step 0 is far off where the claim leaves it out."""
    runs = []
    for seed, ratio in values.items():
        for label, level in ((args["label"], ratio), (args["to"], 1.0)):
            rows = [[level] * LAYERS for _ in range(STEPS)]
            if args.get("at", "all") == "all":
                rows[0] = [1e9 / level] * LAYERS
            if args.get("last"):
                rows = [[1e9 / level] * (LAYERS - 1) + row[-1:] for row in rows]
            runs.append(run_of(label, seed, quantities=by_layer(args["quantity"], rows)))
    return {"runs": runs}


def varying(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
    """One curve goes through `value` decades on each layer, the other through one, at levels far from each other."""
    runs = []
    for seed, ratio in values.items():
        for label, decades, level in ((args["label"], ratio, 1e-3), (args["to"], 1.0, 1e5)):
            rows = [[level * 10 ** (decades * share + k) for k in range(LAYERS)] for share in (0.3, 1.0, 0.0, 0.6)]
            runs.append(run_of(label, seed, quantities=by_layer(args["quantity"], rows)))
    return {"runs": runs}


def shares(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
    """Every layer has the share at the end, and none before."""
    rows = {s: [[0.0] * LAYERS] * (STEPS - 1) + [[v] * LAYERS] for s, v in values.items()}
    return {"runs": [run_of(args["label"], s, quantities=by_layer(args["quantity"], r)) for s, r in rows.items()]}


def uneven_shares(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
    """The upper half of the layers has `value` more than the lower one."""
    runs = []
    for seed, difference in values.items():
        lower, upper = (0.2, 0.2 + difference) if difference > 0 else (0.2 - difference, 0.2)
        rows: list[list[float | None]] = [[lower] * 4 + [upper] * 4] * STEPS
        runs.append(run_of(args["label"], seed, quantities=by_layer(args["quantity"], rows)))
    return {"runs": runs}


def pair_of(metric: str, factor: float) -> Callable[[dict[str, Any], dict[int, float]], dict[str, Any]]:
    """Two curves whose metric differs by value * factor."""

    def build(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
        runs = []
        for seed, value in values.items():
            runs += [
                run_of(args["label"], seed, **{metric: 0.5 + factor * value}),
                run_of(args["to"], seed, **{metric: 0.5}),
            ]
        return {"runs": runs}

    return build


def loss_ratios(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
    pairs = [
        run_of(label, seed, train_loss=loss)
        for seed, v in values.items()
        for label, loss in ((args["label"], 3.0 * v), (args["to"], 3.0))
    ]
    return {"runs": pairs}


def single(field: str, factor: float = 1.0) -> Callable[[dict[str, Any], dict[int, float]], dict[str, Any]]:
    """One curve whose summary has value * factor."""

    def build(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
        return {"runs": [run_of(args["label"], seed, **{field: factor * v}) for seed, v in values.items()]}

    return build


def ordered(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
    """A metric that grows along the labels (1), falls (-1), or does neither (0)."""
    runs = []
    for seed, correlation in values.items():
        for place, label in enumerate(args["labels"]):
            value, metric = 1.0 + correlation * place / 10, args.get("metric", "test_error")
            fields: dict[str, Any] = {metric: value}
            if metric == "last_loss":
                fields = {"loss": [[0, 9.0], [3, value]]}
            elif metric == "train_error":
                fields = {"epochs": [{"step": 2, metric: 1.0 - value}, {"step": 4, metric: value}]}
            runs.append(run_of(label, seed, **fields))
    return {"runs": runs}


def falling(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
    last = 0.7 if args.get("metric") == "last_loss" else 0.1
    runs = [run_of(args["label"], s, train_loss=0.7, loss=[[0, 0.7 * v], [3, last]]) for s, v in values.items()]
    return {"runs": runs}


def converging(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
    """Seeds of value 1 end below the loss asked for, those of value 0 above it."""
    losses = {seed: args["below"] * (0.9 if value else 1.1) for seed, value in values.items()}
    return {"runs": [run_of(args["label"], seed, train_loss=loss) for seed, loss in losses.items()]}


def collapsing(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
    runs = []
    for seed, decades in values.items():
        rows: list[list[float | None]] = [[1.0] * LAYERS for _ in range(STEPS)]
        rows[0][0] = 10.0**decades
        runs.append(run_of(args["label"], seed, quantities=by_layer(args["quantity"], rows)))
    return {"runs": runs}


def entry(top: float, kappa: float | None = 10.0, negative: int = 0) -> dict[str, Any]:
    return {
        "lambda_max": top,
        "kappa": {"0.1": kappa, "0.5": kappa, "0.8": kappa},
        "negative": negative,
        "dim": 9,
        "rank": 9,
    }


def network(label: str, seed: int, matrix: str, **entries: dict[str, Any]) -> dict[str, Any]:
    return {"label": label, "seed": seed, "matrices": {matrix: entries}}


def curvatures(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
    """Whole and blocks, lambda_max and kappa, all at the ratio."""
    networks = []
    for seed, v in values.items():
        for label, level in ((args["label"], v), (args["to"], 1.0)):
            each = entry(level, level)
            networks.append(network(label, seed, args["matrix"], full=each, fc1=each, fc2=each))
    return {"networks": networks}


def largest_blocks(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
    networks = [
        network(args["label"], s, args["matrix"], full=entry(3.0 * v), fc1=entry(3.0), fc2=entry(0.1))
        for s, v in values.items()
    ]
    return {"networks": networks}


def lower_blocks(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
    """Of ten blocks, the share has a tenth of the other network's kappa; the whole says the opposite."""
    networks = []
    for seed, share in values.items():
        own = {f"fc{k}": entry(1.0, 1.0 if k < round(10 * share) else 100.0) for k in range(10)}
        other = {f"fc{k}": entry(1.0, 10.0) for k in range(10)}
        networks.append(
            network(args["label"], seed, args["matrix"], full=entry(1.0, 10.0 if share > 0.5 else 1.0), **own)
        )
        networks.append(network(args["to"], seed, args["matrix"], full=entry(1.0, 5.0), **other))
    return {"networks": networks}


def negatives(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
    matrix = args.get("matrix", "hessian")
    networks = [network(args["label"], s, matrix, full=entry(1.0, negative=int(v))) for s, v in values.items()]
    return {"networks": networks}


def trials(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
    """Three equal trials a seed; see `mixed_trials` in the tests for which of unequal ones counts."""
    rows = [
        {"seed": s, "trial": t, "errors": {args["quantity"]: v, "other": 1e9}}
        for s, v in values.items()
        for t in (0, 1)
    ]
    return {"trials": rows}


def point(seed: int, varied: str, size: int, **seconds: float) -> dict[str, Any]:
    sizes = {"examples": 2, "layers": 2, "widths": 2, varied: size}
    return {"seed": seed, "varied": varied, **sizes, "seconds": seconds}


def times(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
    """At the largest size of one row the ratio, of the others half of it; at the smaller one the opposite of it."""
    points = []
    for seed, ratio in values.items():
        for varied, share in (("examples", 0.5), ("layers", 1.0), ("widths", 0.5)):
            for size, seconds in ((2, 1 / ratio), (4, share * ratio)):
                points.append(point(seed, varied, size, **{args["of"]: seconds, args["to"]: 1.0}))
    return {"points": points}


def powers(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
    """One way's seconds are a power of the size varied, the other's its square; elsewhere nothing grows."""
    points = []
    for seed, power in values.items():
        for varied, size in itertools.product(("examples", "layers", "widths"), (2, 4, 8)):
            grows = varied == args["over"]
            ways = {"other": 1.0, args.get("than", "other"): size**2.0 if grows else 1.0}
            own = power + 2.0 * ("than" in args)
            points.append(point(seed, varied, size, **{**ways, args["way"]: size**own if grows else 1.0}))
    return {"points": points}


def over_counts(args: dict[str, Any], values: dict[int, float]) -> dict[str, Any]:
    """One way's seconds are its naive count times a power of the size varied."""
    data = powers(args, values)
    for each in data["points"]:
        each["seconds"][args["way"]] *= naive_counts(each)[args["way"]]
    return data


BUILDERS: dict[str, Callable[[dict[str, Any], dict[int, float]], dict[str, Any]]] = {
    "slope_over_depth": sloped,
    "ratio_between": levels,
    "variation_ratio": varying,
    "median_share": shares,
    "upper_minus_lower": uneven_shares,
    "final_loss": single("train_loss"),
    "loss_ratio": loss_ratios,
    "final_error": single("test_error", 0.01),
    "error_difference": pair_of("test_error", 0.01),
    "rank_correlation": ordered,
    "loss_fall": falling,
    "converged": converging,
    "collapse": collapsing,
    "curvature_ratio": curvatures,
    "full_over_largest_block": largest_blocks,
    "share_of_blocks_lower": lower_blocks,
    "negative_eigenvalues": negatives,
    "largest_error": trials,
    "smallest_error": trials,
    "time_ratio": times,
    "exponent": powers,
    "exponent_difference": powers,
    "exponent_over_naive": over_counts,
}
TARGETS = {
    "converged": (0.0, 1.0),
    "rank_correlation": (-1.0, 0.0, 1.0),
    "share_of_blocks_lower": (0.0, 0.3, 0.7, 1.0),
    "negative_eigenvalues": (0.0, 3.0),
    "median_share": (0.0, 0.001, 0.4),
    "upper_minus_lower": (-0.3, 0.3),
    "error_difference": (-7.0, 7.0),
}
"""Values that a measure can take, where not every number will do."""


def targets(claim: Claim) -> tuple[list[float], list[float]]:
    """Values within the claim's bound, and outside it."""
    bounds = [bound for bound in (claim.below, claim.above) if bound is not None]
    around = [b + step for b in bounds for step in (-abs(b) - 1, -0.4 * abs(b), 0.4 * abs(b), abs(b) + 1)]
    if len(bounds) == 2:
        around.append(sum(bounds) / 2)
    positive = claim.measure not in ("slope_over_depth", "collapse", "exponent_difference", "exponent_over_naive")
    chosen = TARGETS.get(claim.measure, tuple(v for v in around if v > 0 or not positive))
    inside = [v for v in chosen if claim.above is None or v > claim.above]
    inside = [v for v in inside if claim.below is None or v < claim.below]
    return inside, [v for v in chosen if v not in inside]

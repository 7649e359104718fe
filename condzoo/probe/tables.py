"""A measurement as text that reads at a glance."""

from __future__ import annotations

import decimal

from condzoo.probe.conditioning import Conditioning
from condzoo.probe.outliers import first_of, outlier_lines
from condzoo.probe.spectra import Spectrum

LEGEND = """\
lmax: largest eigenvalue of the second moment of the layer's inputs x and output gradients g
k50, k: condition numbers over half and all of the spectrum; >: at least this much (the rest is noise);
  0!: structural zero, rows!: fewer rows than dimensions (k of the rest stands behind)
dW/W: largest singular value of the weight's gradient over the weight's; F(dW/W): the same of Frobenius norms;
  -: the weight has no gradient, is frozen, or is 0
#: the layer's place in forward order, which pictures count by"""

MANY = 4  # layers skipped for one reason that are one line
DOWN = decimal.Context(prec=1, rounding=decimal.ROUND_FLOOR)


def lower_bound(value: float) -> str:
    """A bound to one digit, rounded down: ">1e+05" of 1.9e5; rounded up it would claim more than is known."""
    return f">{float(DOWN.create_decimal(value)):.0e}"


def shown(spectrum: Spectrum, p: float) -> str:
    """kappa_p as text: "3.1e+04", ">1e+12", "0! 7.1", "rows! 2.0e+03"."""
    status = spectrum.status(p)
    if status == "not computed":
        return "-"
    if status == "ok":
        return f"{spectrum.condition_number(p):.2g}"
    if status == "bound":
        return lower_bound(spectrum.at_least(p))
    rest = spectrum.complement_condition_number(p)
    return ("0! " if status == "structural null" else "rows! ") + f"{rest:.2g}"


def conditioning_table(conditioning: Conditioning, p: float = 0.5) -> str:
    """One line a layer, a header that says what was measured, and what was skipped."""
    head = ["layer", "kind", "#", "d(x)", "lmax(x)", f"k{100 * p:g}(x)", "k(x)", "d(g)", "lmax(g)"]
    rows = [[*head, f"k{100 * p:g}(g)", "k(g)", "dW/W", "F(dW/W)"]]
    for place, (name, layer) in enumerate(conditioning.items()):
        rows.append([name or "(model)", layer.kind, str(place)])
        for s in (layer.input, layer.output_grad):
            rows[-1] += [str(s.dim), f"{s.lambda_max:.3g}", shown(s, p), shown(s, 1.0)]
        ratios = layer.weight_domination, _ratio(layer.weight_grad_frobenius, layer.weight_frobenius)
        rows[-1] += ["-" if ratio is None or layer.frozen else f"{ratio:.2g}" for ratio in ratios]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(map(_aligned, range(len(row)), row, widths)) for row in rows]
    legend = LEGEND.replace("k50", f"k{100 * p:g}").replace("half", f"{100 * p:g} %")
    return "\n".join([_title(conditioning), *lines, *outlier_lines(conditioning, p), *_below(conditioning), legend])


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _aligned(column: int, cell: str, width: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def _title(c: Conditioning) -> str:
    loss = "" if c.loss is None else f", loss {c.loss:.4g}"
    only = "" if c.kappa else ", lambda_max only"
    labels = f"labels from the {c.labels}" + (" (random signs)" if c.random_signs else "")
    step = "" if c.step is None else f"step {c.step}: "
    return (
        f"{step}{len(c)} layers, {c.mode} mode, {c.samples} samples, {labels}{loss}, "
        f"{c.dtype} pass, conv={c.conv}, precision={c.precision}{only}"
    )


def _below(c: Conditioning) -> list[str]:
    lines = [f"first {what} with NaN or Inf: {name}" for what, name in c.first_nonfinite.items()]
    units = {name or "(model)": n.units for name, n in c.neurons.items()}
    if sum(units.values()):
        dying, full = ([getattr(n, what) for n in c.neurons.values()] for what in ("dying", "full"))
        lines.append(f"ReLU units: {sum(units.values())}, dying {_share(dying, units)}, full {_share(full, units)}")
    return lines + _skipped(c.skipped)


def _share(counts: list[int], units: dict[str, int]) -> str:
    """ "8.8% (d2.2 28 of 32)": the share of all units, and the ReLUs that have most of them."""
    some = [(count / n, f"{name} {count} of {n}") for count, (name, n) in zip(counts, units.items(), strict=True)]
    worst = first_of([text for share, text in sorted(some, key=lambda one: one[0], reverse=True) if share])
    return f"{sum(counts) / sum(units.values()):.1%}" + (f" ({worst})" if worst else "")


def _skipped(skipped: dict[str, str]) -> list[str]:
    """A line each, and one for all that share a reason where they are many: a frozen body's."""
    named: dict[str, list[str]] = {}
    for name, why in skipped.items():
        named.setdefault(why, []).append(name or "(model)")
    lines = []
    for why, names in named.items():
        many = len(names) >= MANY
        who = [f"{len(names)} layers, {names[0]} to {names[-1]}"] if many else names
        lines += [f"skipped {one}: {why}" for one in who]
    return lines

"""An experiment's figure, of its data alone: panels, the reductions, seeds, hardware and date in small print."""

import io
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from condzoo.experiments import curve_figures, matrix_figures, training_figures
from condzoo.experiments.made import made_on
from condzoo.experiments.reductions import NOT_IMAGENET, reductions_of
from condzoo.experiments.schema import Experiment
from condzoo.probe.files import expanded, write_whole
from condzoo.probe.picture_style import usual_style

DPI = 104
SMALL_PRINT = 150  # characters a line, at 10 inches
TITLE = 10.5  # characters an inch

DRAWERS: dict[str, Callable[[Any, dict[str, Any], Experiment], None]] = {
    "layers": training_figures.layers,
    "units": training_figures.layers,
    "curves": curve_figures.curves,
    "errors": curve_figures.errors,
    "last_layer": training_figures.last_layer,
    "explosion": training_figures.explosion,
    "initialization": matrix_figures.initialization,
    "theory": matrix_figures.theory,
    "growth": matrix_figures.growth,
}


@usual_style()
def draw(experiment: Experiment, data: dict[str, Any], png: str | Path) -> None:
    """Draw an experiment's figure.

    Args:
        experiment: its file.
        data: of `collect`, or read back from its JSON.
        png: the picture (also .pdf, .svg).

    Raises:
        ValueError: data of another experiment.
    """
    if data["id"] != experiment.id:
        raise ValueError(f"these are the data of {data['id']}, not of {experiment.id}")
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    DRAWERS[experiment.figure.kind](figure, data, experiment)
    width = figure.get_figwidth()
    elsewhere = [text for text in data["reductions"] if text.startswith(NOT_IMAGENET)]
    titles = [line for text in (experiment.title, *elsewhere) for line in textwrap.wrap(text, int(TITLE * width))]
    figure.suptitle("\n".join(titles), fontsize=12)
    wrapped = textwrap.wrap(small_print(data, experiment), int(SMALL_PRINT * width / 10))
    figure.supxlabel("\n".join(wrapped), fontsize=7, x=0.01, ha="left", color="0.3")
    save(figure, expanded(png))


def save(figure: Figure, path: Path) -> None:
    """Write the picture; a PNG without the transparency that it does not use, a tenth smaller for it."""
    drawn, smaller = io.BytesIO(), io.BytesIO()
    if path.suffix.lower() not in (".png", ""):
        figure.savefig(drawn, format=path.suffix[1:])
        write_whole(path, drawn.getvalue())
        return
    figure.savefig(drawn, dpi=DPI, format="png")
    Image.open(drawn).convert("RGB").save(smaller, format="png", optimize=True)
    write_whole(path, smaller.getvalue())


def small_print(data: dict[str, Any], experiment: Experiment) -> str:
    """Scale, reductions, seeds, hardware and date."""
    seeds = ", ".join(map(str, data["seeds"]))
    less = reductions_of(experiment, data)
    reduced = f" Less than the paper's: {'; '.join(less)}." if less else ""
    began = f"condzoo reproduce {data['id']}, scale {data['scale']}, seeds {seeds}."
    return f"{began}{reduced} {made_on(data)}, {data['made']['date']}."

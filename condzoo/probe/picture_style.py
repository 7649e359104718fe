"""Pictures look alike, whatever style the user's matplotlib has; how many lines are told apart; how one is saved."""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from condzoo.probe.files import write_whole

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^v<>"  # as many as there are colours
DASHES = ("-", "--", ":", "-.")
FILLS = ("full", "none", "left", "right", "top", "bottom")
ENTRIES = 6  # of a legend, one below the other: more would leave the axes no height


@contextlib.contextmanager
def usual_style() -> Iterator[None]:
    """Inside, matplotlib has its own defaults; a matplotlibrc may ask for LaTeX, which need not be here.

    The backend stays, and afterwards all is as it was. Also a decorator.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def run_style(index: int) -> dict[str, Any]:
    """Colour, marker and dash of one run's line: the colours come again after seven, another marker and dash with them.

    The first seven differ in both colour and marker, for print in grey.
    """
    turn, color = divmod(index, len(OKABE_ITO))
    marker = MARKERS[(index + turn) % len(MARKERS)]
    return {"color": OKABE_ITO[color], "marker": marker, "linestyle": DASHES[turn % len(DASHES)]}


def as_written(label: object) -> str:
    """A label for matplotlib to write as it is: no formula between two "$", no entry left out for a "_" in front.

    Bytes of a file's name that are no UTF-8, which Python holds as half a letter each, are written by their numbers.
    """
    text = str(label).encode("utf-8", "backslashreplace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def legend(ax: Axes, fontsize: int) -> None:
    """A legend in as many columns as its entries need."""
    columns = math.ceil(len(ax.get_legend_handles_labels()[1]) / ENTRIES)
    ax.legend(fontsize=fontsize, frameon=False, ncols=max(1, columns))


def save(figure: Figure, path: Path) -> None:
    """Write a picture, its folder made if need be; PNG where its name does not say.

    Raises:
        OSError: it cannot be written; names the file. A picture of before stays.
    """
    drawn = io.BytesIO()
    with warnings.catch_warnings():  # letters that the font has not are drawn as boxes, and nobody can mend that here
        warnings.filterwarnings("ignore", r"Glyph \d+ ", UserWarning)
        figure.savefig(drawn, dpi=130, format=path.suffix[1:] or "png")
    write_whole(path, drawn.getvalue())

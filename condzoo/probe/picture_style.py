"""Pictures look alike, whatever the user's matplotlib style; how lines and names are told apart; how one is saved."""

import contextlib
import io
import itertools
import math
import re
import textwrap
import warnings
from collections.abc import Collection, Iterator, Sequence
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
ENTRY = 12  # points of height that a line of a legend takes
NAME, LABEL, TITLE = 28, 36, 80  # letters of a layer's name, of a run's label, of a title's line
CUT = re.compile(r"[/, ]|[-.](?=[^\W\d])|\.(?=\d+\.)")  # between the parts of a name, but not within a number


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


def shortened(names: Sequence[str], most: int) -> list[str]:
    """Names of at most about so many letters, still told apart, for pictures that long ones would leave no room.

    Of those that are longer, as much as need be of what all of them end and begin with is left out, then the middle.
    """
    long = [name for name in names if len(name) > most]
    begin, end = _shared(long, most) if len(long) > 1 else (0, 0)
    rests = {name: "..." * (begin > 0) + name[begin : len(name) - end] + "..." * (end > 0) for name in long}
    middle = most // 2
    for head in sorted(range(most - 2), key=lambda letters: abs(letters - middle)):
        shown = [_without_middle(rests.get(name, name), head, most) for name in names]
        if len(set(shown)) == len(shown):
            return shown
    shown = [_without_middle(rests.get(name, name), middle, most) for name in names]
    return [f"{name} ({i})" if shown.count(name) > 1 else name for i, name in enumerate(shown)]


def _shared(names: Sequence[str], most: int) -> tuple[int, int]:
    """How many letters of the beginning and of the end may be left out: whole parts, which all names have."""
    one = names[0]
    same = _common(names)
    begins = [0, *(m.end() for m in CUT.finditer(one) if m.end() <= same)]
    same = _common([name[begins[-1] :][::-1] for name in names])
    end = max((len(one) - m.start() for m in CUT.finditer(one) if len(one) - m.start() <= same), default=0)
    longest = max(map(len, names)) - end
    return next((begin for begin in begins if longest - begin <= most), begins[-1]), end


def _common(names: Sequence[str]) -> int:
    """How many letters all begin with."""
    return sum(1 for _ in itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False)))


def _without_middle(name: str, head: int, most: int) -> str:
    if len(name) <= most + 6:  # with the "..." of a beginning and an end
        return name
    return f"{name[:head]}...{name[len(name) - (most - 3 - head) :]}"


def wrapped(title: str) -> str:
    """A title in as many lines as it needs, but for one with formulas, which have no second line."""
    if "$" in title.replace(r"\$", ""):
        return title
    return "\n".join(textwrap.fill(line, TITLE) for line in title.split("\n"))


def headed(ax: Axes, title: str, columns: int | None = None) -> None:
    """A title, and under it, above the axes, the legend: inside it would lie over some run's or network's lines.

    Args:
        ax: the axes, whose lines are drawn.
        title: what they show.
        columns: of the legend; None for all entries in one line.
    """
    entries = len(ax.get_legend_handles_labels()[1])
    columns = entries if columns is None else columns
    ax.set_title(title, fontsize=10, pad=8 + ENTRY * math.ceil(entries / columns) if entries else None)
    if entries:
        small: dict[str, Any] = {"fontsize": 8, "frameon": False, "columnspacing": 1, "handlelength": 1.8}
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), borderaxespad=0.1, ncols=columns, **small)


def legend_columns(labels: Collection[str], inches: float) -> int:
    """How many entries of a legend above axes of this width stand beside each other: as many as have room, equally."""
    longest = max(map(len, labels))
    room = max(1, int(72 * inches / (5 * longest + 34)))
    return math.ceil(len(labels) / math.ceil(len(labels) / room))


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

"""Pictures look alike, whatever style the user's matplotlib has."""

import contextlib
from collections.abc import Iterator

import matplotlib


@contextlib.contextmanager
def usual_style() -> Iterator[None]:
    """Inside, matplotlib has its own defaults; a matplotlibrc may ask for LaTeX, which need not be here.

    The backend stays, and afterwards all is as it was. Also a decorator.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield

"""SIGTERM and Ctrl-C where nothing is trained: what is finished is kept, and the same command goes on."""

import contextlib
from collections.abc import Callable, Iterator

from condzoo.training.distributed import launched
from condzoo.training.signals import Stopped, stop_signals

GO_ON = "run the same command to go on"


@contextlib.contextmanager
def stopping(what: str) -> Iterator[Callable[[], None]]:
    """Note signals while a row of pieces is worked through; a second Ctrl-C ends the piece at work.

    Args:
        what: the pieces, in the plural.

    Yields:
        What to call before each piece; it raises `Stopped` where a signal has come.

    Raises:
        Stopped: on a second Ctrl-C, or one that Python turned into a KeyboardInterrupt.
    """
    with stop_signals(patient=launched()) as request:

        def stop_where_asked() -> None:
            if request.asked:
                raise Stopped(f"stopped by {request.asked} between two {what}; {GO_ON}")

        try:
            yield stop_where_asked
        except KeyboardInterrupt:
            raise Stopped(f"stopped within one of the {what}; {GO_ON}") from None

"""What Ctrl-C and SIGTERM do: end the process while nothing is at stake, ask a run to save itself while it trains.

The command imports this file first: it imports next to nothing itself.
"""

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


class EndingAtOnce:
    """Within, Ctrl-C ends the process on the spot.

    For imports, where nothing can be lost: a KeyboardInterrupt in the middle of one surfaces as any error, a
    RecursionError or an AttributeError.
    """

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, _end)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)


def _end(_number: int, _frame: FrameType | None) -> None:
    os.write(2, b"\nInterrupted.\n")
    os._exit(128 + signal.SIGINT)


class Stop:
    """Whether the process was told to end, and by which signal."""

    signal: int | None = None


@contextmanager
def stopping() -> Generator[Stop]:
    """Within, Ctrl-C and SIGTERM ask the run to save and stop; a second one ends the process as usual."""
    stop = Stop()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def note(number: int, _frame: FrameType | None) -> None:
        stop.signal = number
        for each in signals:
            signal.signal(each, before[each])

    for each in signals:
        signal.signal(each, note)
    try:
        yield stop
    finally:
        for each in signals:
            signal.signal(each, before[each])

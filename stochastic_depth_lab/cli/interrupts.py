"""Ctrl-C and SIGTERM: they end the process at once, or, during training, ask the run to save and stop.

The command imports this file first, so it imports almost nothing.
"""

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


class EndingAtOnce:
    """A context in which Ctrl-C ends the process at once.

    For imports: a KeyboardInterrupt during an import can surface as a RecursionError or an AttributeError.
    """

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, _end)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)


def _end(_number: int, _frame: FrameType | None) -> None:
    os.write(2, b"\nInterrupted.\n")
    os._exit(128 + signal.SIGINT)


class Stop:
    """The signal that asked the process to stop, or None."""

    signal: int | None = None


@contextmanager
def stopping() -> Generator[Stop]:
    """A context in which Ctrl-C and SIGTERM ask the run to save and stop; a second one ends the process as usual."""
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

"""Ending a training well when it is told to stop."""

import signal
from types import FrameType


class StopRequest:
    """Within its context, SIGTERM and SIGINT are remembered instead of obeyed; a second one ends the process.

    with StopRequest() as stop:
        while not stop.signal:
            ...
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.signal: signal.Signals | None = None

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def __enter__(self) -> "StopRequest":
        self._before = {each: signal.signal(each, self._note) for each in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

"""Ending a training well when it is asked to stop, or when its launcher has died."""

import os
import signal
from types import FrameType


# `accelerate launch` and `torchrun` set these for the processes that they start.
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


_launcher: int | None = None


def note_launcher() -> None:
    """Remembers the launcher of this process, if it has one; to be called first of all, for imports take seconds."""
    global _launcher
    _launcher = os.getppid() if any(name in os.environ for name in LAUNCHER_VARIABLES) else None


class StopRequest:
    """Within its context, SIGTERM and SIGINT are remembered instead of obeyed; a second one ends the process.

    with StopRequest() as stop:
        while not stop.signal:
            ...

    A launcher that ends leaves its processes behind: `signal` is then SIGTERM as well, see [`note_launcher`].
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self._received: signal.Signals | None = None

    @property
    def signal(self) -> signal.Signals | None:
        """The signal that asks to stop, if any."""
        if self._received is None and _launcher not in (None, os.getppid()):
            return signal.SIGTERM
        return self._received

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received = signal.Signals(number)
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def __enter__(self) -> "StopRequest":
        self._before = {each: signal.signal(each, self._note) for each in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

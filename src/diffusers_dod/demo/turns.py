"""Which drawing a page shows: a user's latest wish ends the one before.

Not gradio's `cancels`: on a busy machine both drawings continued, and a cancelled one could end as an error.
"""


class Turn:
    """A user's wishes, counted: a drawing continues while its own is the latest."""

    def __init__(self):
        self.latest, self.stopped = 0, False

    def take(self) -> int:
        self.latest, self.stopped = self.latest + 1, False
        return self.latest

    def stop(self) -> None:
        self.latest, self.stopped = self.latest + 1, True

"""Which drawing a page shows: a user's latest wish ends the one before.

Not gradio's `cancels`, which is lost when the browser does not know the running event's id yet.
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

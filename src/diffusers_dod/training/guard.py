"""Keeps updates of broken batches out of a training."""

import math

from ..cli import CommandError


class TooManyBadSteps(CommandError):
    """The guard has seen enough."""

    status = 3


class StepGuard:
    """Decides which updates to skip: those that are not finite, and those far above the usual gradient norm.

    Args:
        spike_factor (`float`, *optional*):
            a gradient norm above this multiple of its running mean is a spike; `None` looks for infinity and NaN only.
        max_skipped (`int`): updates in a row that may be skipped.
        warmup (`int`): good steps before spikes are looked for; the mean's memory is as long.
    """

    STATE = ("mean", "steps", "skipped", "in_a_row")

    def __init__(self, spike_factor: float | None = None, max_skipped: int = 10, warmup: int = 100):
        self.spike_factor, self.max_skipped, self.warmup = spike_factor, max_skipped, warmup
        self.mean, self.steps, self.skipped, self.in_a_row = 0.0, 0, 0, 0

    def reason_to_skip(self, loss: float, grad_norm: float) -> str | None:
        """Looks at a step before its update, and counts; `None` is a good one."""
        reason = None
        if not math.isfinite(loss):
            reason = f"its loss is {loss}"
        elif not math.isfinite(grad_norm):
            reason = f"its gradient norm is {grad_norm}"
        elif self.spike_factor and self.steps >= self.warmup and grad_norm > self.spike_factor * self.mean:
            reason = f"its gradient norm is {grad_norm:.3g}, after {self.mean:.3g} on average"
        if reason is not None:
            self.skipped += 1
            self.in_a_row += 1
            return reason
        self.in_a_row = 0
        self.steps += 1
        self.mean += (grad_norm - self.mean) / min(self.steps, self.warmup)
        return None

    @property
    def exhausted(self) -> bool:
        """Whether more than `max_skipped` updates in a row were skipped."""
        return self.in_a_row > self.max_skipped

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: dict) -> None:
        for name in self.STATE:
            setattr(self, name, state[name])

"""Whether something optional pays: it is tried for a while, kept while it saves time, and tried again after a rest."""

from __future__ import annotations

from dataclasses import dataclass, field

WARM_UP = 256  # chances before the first trial, in which read speed and hit rate settle
TRIAL = 256  # chances taken before its balance counts,
GLANCE = 64  # but one that has lost so much of the time by then is over
LOST = 0.05
REST = 2048  # chances left out after a trial that did not pay; twice as many after the next one
LONGEST_REST = 65536
MEMORY = 0.99  # weight of the past in the running means, per chance


@dataclass
class Mean:
    """A running mean; its first values weigh the same."""

    value: float = 0.0
    count: int = 0

    def add(self, x: float) -> None:
        self.count += 1
        self.value += max(1 - MEMORY, 1 / self.count) * (x - self.value)


@dataclass
class Payoff:
    """Of one thing that may be done at every chance (`next`), costs time (`took`), and may save some (`saved`).

    What it costs is how much longer the work takes in which it is done: nothing that it might disturb is left out.
    """

    on: bool = False
    without: Mean = field(default_factory=Mean)  # seconds of work per chance that was not taken
    doing: Mean = field(default_factory=Mean)  # the same while it is on
    gain: Mean = field(default_factory=Mean)  # seconds of waiting that it saved, per chance taken
    _left: int = field(default=WARM_UP, repr=False)  # chances until it may be switched
    _rest: int = field(default=REST, repr=False)

    def next(self) -> bool:
        """A chance: take it?"""
        self._left -= 1
        if self.on:
            lost = self._left == TRIAL - GLANCE and self.balance < -LOST * self.without.value
            if lost or (self._left <= 0 and self.balance <= 0):
                self.on, self._left = False, self._rest
                self._rest = min(LONGEST_REST, 2 * self._rest)
                self.without = Mean()
            elif self._left == 0:
                self._rest = REST  # it paid: the next trial need not wait long
        elif self._left <= 0:
            self.on, self._left = True, TRIAL
            self.doing, self.gain = Mean(), Mean()
        return self.on

    def took(self, seconds: float) -> None:
        """From the last chance to this one, without waiting for reads."""
        (self.doing if self.on else self.without).add(seconds)

    def saved(self, seconds: float) -> None:
        """How much less was waited because the chance was taken; negative if more."""
        if self.on:
            self.gain.add(seconds)

    @property
    def balance(self) -> float:
        """Seconds saved per chance taken, its cost taken off."""
        cost = self.doing.value - self.without.value if self.doing.count else 0.0
        return self.gain.value - max(0.0, cost)

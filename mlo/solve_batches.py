"""Which batches the Hessian and the mixed products of a stage are taken from."""

from __future__ import annotations

from collections.abc import Sequence

from mlo.member import Member, MicroBatch
from mlo.random_state import RandomState


def with_present_state(member: Member, batches: Sequence[object]) -> list[MicroBatch]:
    """Return batches with the present random state for each."""
    state = RandomState.capture(member.devices, host=member.host_draws.found)
    return [(batch, state) for batch in batches]


class SolveBatches:
    """The batches of every stage for one hypergradient in training: those of its last step, or new ones."""

    def __init__(self) -> None:
        """Draw nothing yet."""
        self._drawn: set[str] = set()

    def __call__(self, member: Member) -> list[MicroBatch]:
        """Return a stage's batches, the same at each call."""
        if member.solve_feed is None:
            assert member.micro_batches is not None, member.name  # responses are made fresh before they are read
            return member.micro_batches
        if member.name not in self._drawn:
            self._drawn.add(member.name)
            member.solve_micro_batches = with_present_state(member, member.solve_feed.next_batches(member.solve_count))
        assert member.solve_micro_batches is not None
        return member.solve_micro_batches


class Previews:
    """The batches for a hypergradient outside of training, which draws nothing: the last ones, or the first.

    Before the first step they are what a fresh run through the data begins with.
    """

    def __init__(self, differentiated: Member, state: RandomState) -> None:
        """Take note of whose loss is differentiated, on the batches of its steps, and of the present random state."""
        self._differentiated = differentiated
        self._state = state
        self._found: dict[str, list[MicroBatch]] = {}

    def __call__(self, member: Member) -> list[MicroBatch]:
        """Return a problem's batches, the same at each call."""
        if member.name not in self._found:
            self._found[member.name] = self._find(member)
        return self._found[member.name]

    def _find(self, member: Member) -> list[MicroBatch]:
        feed = None if member is self._differentiated else member.solve_feed
        kept = member.micro_batches if feed is None else member.solve_micro_batches
        if kept is not None:
            return kept
        count = member.problem.accumulate if feed is None else member.solve_count
        state = self._state if member.host_draws.possible else self._state._replace(host=None)
        return [(batch, state) for batch in (feed or member.feed).preview(count, member.devices)]

"""Binding: the span in which a problem's loss sees given tensors in the place of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor

from mlo.errors import EvaluationError
from mlo.frame import Frame, ModuleSlots, Parameters, ParameterSlots
from mlo.member import Member
from mlo.vectors import Vector


class Binding:
    """The span of one evaluation: the loss of `member` sees `values` for itself and for what it depends on.

    A context manager whose value is the `Frame`. With `own_parameters` the problem sees its parameters themselves, with
    `spare_buffers` it writes to copies of its buffers.

    Raises:
        EvaluationError: (at the end, with `checked`) the block wrote to one of the tensors in place. Autograd refuses
            such writes to what needs a gradient; this finds those to constants and those under `torch.no_grad()`.

    """

    __slots__ = (
        "_before",
        "_checked",
        "_member",
        "_own",
        "_slots",
        "_spare",
        "_spared",
        "_swapped",
        "_values",
        "_versions",
        "_watched",
    )

    def __init__(
        self,
        member: Member,
        values: Mapping[str, Vector],
        *,
        own_parameters: bool,
        spare_buffers: bool,
        checked: bool = True,
    ) -> None:
        """Take note of what to swap; nothing is touched yet."""
        self._member, self._values, self._checked = member, values, checked
        self._own, self._spare = own_parameters, spare_buffers

    def __enter__(self) -> Frame:
        """Swap the tensors in."""
        member, values = self._member, self._values
        place, seen = member.problem.__dict__, member.seen
        tensors: list[Tensor] = []
        for name in seen:
            tensors += values[name]
        self._before = place.get("_frame")
        self._slots = member.slots_read if self._own else member.slots_seen
        self._swapped = self._slots.put(tensors)
        self._spared: list[tuple[ModuleSlots, list[Any]]] = []
        if self._spare:
            for m in seen.values():
                if m.slots.has_buffers:
                    self._spared.append((m.slots, m.slots.copy_buffers()))
        if self._checked:
            for m in seen.values():
                if m.names.constant:
                    tensors += m.names.constant.values()
            self._watched, self._versions = tensors, [t._version for t in tensors]
        frame = place["_frame"] = Frame(values, seen)  # past the checks of options, at every evaluation
        return frame

    def renew_buffers(self) -> None:
        """Begin with the problems' own buffers again, where they are spared."""
        if self._spared:
            self._restore_buffers()
            for slots, _ in self._spared:
                slots.copy_buffers()

    def _restore_buffers(self) -> None:
        # Backwards: modules of two problems may share a part, and the second has then copied the copies of the first.
        for slots, kept in reversed(self._spared):
            slots.restore_buffers(kept)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Swap them out again, whatever has happened."""
        self._member.problem.__dict__["_frame"] = self._before
        if self._spared:
            self._restore_buffers()
        self._slots.restore(self._swapped)
        if kind is None and self._checked and self._versions != [t._version for t in self._watched]:
            self._raise_for_in_place()

    def _raise_for_in_place(self) -> None:
        seen = self._member.seen.values()
        named = [(m.name, n) for m in seen for n in m.names.trainable]
        named += [(m.name, n) for m in seen for n in m.names.constant]
        changed = [
            place for place, before, t in zip(named, self._versions, self._watched, strict=True) if before != t._version
        ]
        owner, name = changed[0]
        raise EvaluationError(
            f"the loss of problem {self._member.name!r} changed the parameter {name!r} of problem {owner!r} in place "
            "(it keeps its new value); expected a loss that only reads parameters. Use an out-of-place operation, or "
            "clone() first; a running average belongs in a buffer (register_buffer)."
        )


class SharedBinding:
    """The span in which the losses of several problems all see the same tensors, and write to the same spare buffers.

    A context manager whose value is the `Frame` of the first of `evaluated`.

    Args:
        evaluated: the problems whose losses are evaluated.
        members: the problems whose tensors they see.
        slots: the places of their trainable parameters, in the order of `members`.
        values: the tensors.

    Attributes:
        wrote_buffers: (afterwards) whether a loss wrote to buffers or replaced one, so that another one saw that.

    """

    __slots__ = ("_before", "_evaluated", "_slots", "_spared", "_spares", "_swapped", "_values", "wrote_buffers")

    def __init__(
        self,
        evaluated: Sequence[Member],
        members: Sequence[Member],
        slots: ParameterSlots,
        values: Mapping[str, Vector],
    ) -> None:
        """Take note of what to swap; nothing is touched yet."""
        self._evaluated, self._slots, self._values = evaluated, slots, values
        self._spared = [m.slots for m in members if m.slots.has_buffers]
        self.wrote_buffers = False

    def __enter__(self) -> Frame:
        """Swap the tensors in."""
        values = self._values
        self._swapped = self._slots.put([t for tensors in values.values() for t in tensors])
        self._spares: list[tuple[ModuleSlots, list[Any], list[Tensor], list[int]]] = []
        for slots in self._spared:
            kept = slots.copy_buffers()
            copies = slots.buffers
            self._spares.append((slots, kept, copies, [b._version for b in copies]))
        parameters: dict[str, Parameters] = {}
        frames = [Frame(values, m.seen, parameters) for m in self._evaluated]
        self._before = [m.problem.__dict__.get("_frame") for m in self._evaluated]
        for m, frame in zip(self._evaluated, frames, strict=True):
            m.problem.__dict__["_frame"] = frame
            m.prepare(frame)
        return frames[0]

    def __exit__(self, *_: object) -> None:
        """Swap them out again, whatever has happened."""
        for m, before in zip(self._evaluated, self._before, strict=True):
            m.problem.__dict__["_frame"] = before
        for slots, kept, copies, versions in reversed(self._spares):
            same = len(slots.buffers) == len(copies) and all(map(is_, slots.buffers, copies))
            self.wrote_buffers = self.wrote_buffers or not same or versions != [b._version for b in copies]
            slots.restore_buffers(kept)
        self._slots.restore(self._swapped)

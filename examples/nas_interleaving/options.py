"""Settings that check themselves, and the kinds of values that they have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

Kind = TypeVar("Kind", bound="Settings")


class SettingsError(ValueError):
    """A setting is out of range, or unknown."""


def setting(default: Any, text: str, check: Callable[[Any], bool], expected: str, shown: str = "") -> Any:
    """Return a field with its help text, the check of its value, what that expects, and its default in words."""
    return field(default=default, metadata={"help": text, "check": check, "expected": expected, "shown": shown})


def count(default: int, text: str, least: int = 1) -> Any:
    """Return a field for an integer of at least `least`."""
    return setting(default, text, lambda v: _integer(v) and v >= least, f"an integer of at least {least}")


def even(default: int, text: str) -> Any:
    """Return a field for a positive even integer."""
    return setting(default, text, lambda v: _integer(v) and v > 0 and v % 2 == 0, "an even number")


def number(default: float, text: str, *, zero: bool = False) -> Any:
    """Return a field for a positive number, or zero if that is allowed."""
    if zero:
        return setting(default, text, lambda v: _real(v) and 0 <= v < float("inf"), "a number of at least 0")
    return setting(default, text, lambda v: _real(v) and 0 < v < float("inf"), "a positive number")


def choice(default: str, text: str, choices: Sequence[str]) -> Any:
    """Return a field for one of several texts."""
    return setting(default, text, lambda v: isinstance(v, str) and v in choices, f"one of {', '.join(choices)}")


def flag(default: bool, text: str) -> Any:
    """Return a field for yes or no."""
    return setting(default, text, lambda v: isinstance(v, bool), "true or false")


def text(default: str, help_: str, shown: str = "", *, empty: bool = False) -> Any:
    """Return a field for a text, which may be empty if that is allowed."""
    return setting(default, help_, lambda v: isinstance(v, str) and (empty or bool(v)), "a text", shown)


def texts(default: tuple[str, ...], text: str, example: str) -> Any:
    """Return a field for one text or more."""
    return setting(default, text, _are_texts, f'a tuple of texts, e.g. ("{example}",)')


def counts(default: tuple[int, ...], text: str, shown: str, *, least: int = 1) -> Any:
    """Return a field for any number of integers of at least `least`."""
    return setting(
        default,
        text,
        lambda v: isinstance(v, tuple) and all(_integer(n) and n >= least for n in v),
        f"a tuple of integers of at least {least}",
        shown,
    )


def numbers(
    default: tuple[float, ...], text: str, shown: str, *, below: float = float("inf"), zero: bool = False
) -> Any:
    """Return a field for any number of positive numbers below a limit, or zeros if they are allowed."""
    least = "of at least 0" if zero else "above 0"
    return setting(
        default,
        text,
        lambda v: isinstance(v, tuple) and all(_real(n) and (n > 0 or (zero and n == 0)) and n < below for n in v),
        f"a tuple of numbers {least}" + (f" and below {below:g}" if below < float("inf") else ""),
        shown,
    )


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    return isinstance(value, float) or _integer(value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(v, str) for v in value)


@dataclass(frozen=True)
class Settings:
    """Settings that check themselves, and travel as JSON.

    Raises:
        SettingsError: one of them is out of range.

    """

    def __post_init__(self) -> None:
        """Check every field by its own rule."""
        for f in fields(self):
            value = getattr(self, f.name)
            if not f.metadata["check"](value):
                raise SettingsError(f"{f.name} = {value!r}: expected {f.metadata['expected']}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read settings from JSON's types."""
        if not isinstance(values, Mapping):
            raise SettingsError(f"expected settings by their names, got {values!r:.100}.")
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise SettingsError(f"unknown settings {', '.join(unknown)}.")
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})

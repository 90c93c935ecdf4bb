"""The squared distance of two sets of parameters, for proximal terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mlo.errors import ConfigurationError

Tensors = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def squared_distance(a: Tensors, b: Tensors) -> Tensor:
    """Return ‖a − b‖², the sum of squared differences over all entries of all tensors.

    Args:
        a: a tensor, a sequence of tensors, or tensors by name such as `self.params`.
        b: the same structure: as many tensors, the same names, the same shapes.

    Returns:
        A scalar, differentiable in both.

    Raises:
        ConfigurationError: the two do not correspond, or are empty.

    >>> import torch
    >>> squared_distance({"w": torch.ones(3)}, {"w": torch.zeros(3)}).item()
    3.0

    """
    pairs = _pairs(a, b)
    if not pairs:
        raise ConfigurationError("squared_distance: expected at least one tensor on each side, got none.")
    terms = []
    for name, x, y in pairs:
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise ConfigurationError(
                f"squared_distance: expected tensors; {name} is {type(x).__name__} on the left and "
                f"{type(y).__name__} on the right."
            )
        if x.shape != y.shape:
            raise ConfigurationError(
                f"squared_distance: {name} has shape {tuple(x.shape)} on the left and {tuple(y.shape)} on the right; "
                "expected equal shapes."
            )
        terms.append((x - y).square().sum())
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _pairs(a: Tensors, b: Tensors) -> list[tuple[str, Tensor, Tensor]]:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [("the tensor", a, b)]
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            left, right = (", ".join(map(repr, x.keys() - y.keys())) or "none" for x, y in ((a, b), (b, a)))
            raise ConfigurationError(
                f"squared_distance: expected the same names on both sides; only on the left: {left}; only on the "
                f"right: {right}. Select the common ones."
            )
        return [(repr(name), a[name], b[name]) for name in a]
    if isinstance(a, Sequence) and isinstance(b, Sequence):
        if len(a) != len(b):
            raise ConfigurationError(
                f"squared_distance: expected as many tensors on both sides; got {len(a)} and {len(b)}."
            )
        return [(f"tensor {i}", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    raise ConfigurationError(
        "squared_distance: expected two tensors, two sequences or two mappings of tensors; got "
        f"{type(a).__name__} and {type(b).__name__}."
    )

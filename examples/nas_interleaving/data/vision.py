"""torchvision, imported where it is needed only: it takes a second."""

from __future__ import annotations

from types import ModuleType

import torch

_WITHOUT_ITS_OPERATORS = "operator torchvision::nms does not exist"
_UNDECLARED = ("nms", "qnms")

#: Holds the declarations; they end with it.
_declared: list[torch.library.Library] = []


def torchvision() -> ModuleType:
    """Return torchvision.

    A torchvision that was built for CUDA cannot load its compiled operators beside a PyTorch for the CPU. It goes on
    without them, and readers and transforms of images need none; but it then describes the results of two of them to
    PyTorch, which refuses to hear of operators that do not exist. Only then their signatures are declared here, which
    is all that the import wants.
    """
    try:
        import torchvision as found  # noqa: PLC0415
    except RuntimeError as error:
        if _WITHOUT_ITS_OPERATORS not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in _UNDECLARED:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        import torchvision as found  # noqa: PLC0415
    import torchvision.transforms.v2  # noqa: PLC0415  (which torchvision does not import by itself)

    return found

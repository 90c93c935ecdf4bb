"""One encoder for several tasks, each with a stem and a head of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from examples.nas_interleaving.supernet import Encoder


class SharedNetwork(nn.Module):
    """A network for several tasks.

    Args:
        stems: one for each task.
        encoder: what the tasks share.
        classes: for each task the number of its classes.

    """

    def __init__(self, stems: Sequence[nn.Module], encoder: Encoder, classes: Sequence[int]) -> None:
        super().__init__()
        self.stems = nn.ModuleList(stems)
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(encoder.features, count) for count in classes)

    def forward(self, images: Tensor, logits: Mapping[str, Tensor], task: int) -> Tensor:
        """Return the class scores of images of a task, (N, classes), under the parameters of an `Architecture`."""
        return self.heads[task](self.encoder(*self.stems[task](images), logits))

"""What stands before the cells of a network, and differs from task to task."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from examples.nas_interleaving.operations import HalvedFit, ReluConvNorm, normalisation
from examples.nas_interleaving.options import SettingsError

STEMS = ("auto", "cifar", "imagenet")

#: Images with sides of at least this many pixels get the form of ImageNet, if the choice is "auto".
LARGE = 128

_WIDTH = 3


class CifarStem(nn.Module):
    """One 3×3 convolution, at the images' own resolution.

    `fit` brings what the first cell reads first to its width; everything else that cells read is fitted by them.
    """

    def __init__(self, image_channels: int, channels: int, width: int, derived: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(image_channels, width, 3, padding=1, bias=False), normalisation(width, derived)
        )
        self.fit = ReluConvNorm(width, channels, derived)
        self.width = width

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the first cell reads: (N, channels, H, W) and (N, width, H, W)."""
        found = self.conv(images)
        return self.fit(found), found


class ImageNetStem(nn.Module):
    """Three 3×3 convolutions of stride 2; the first cell reads after the second (fitted) and after the third."""

    def __init__(self, image_channels: int, channels: int, width: int, derived: bool) -> None:
        super().__init__()
        self.conv0 = nn.Sequential(
            nn.Conv2d(image_channels, width // 2, 3, stride=2, padding=1, bias=False),
            normalisation(width // 2, derived),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1, bias=False),
            normalisation(width, derived),
        )
        self.conv1 = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
            normalisation(width, derived),
        )
        self.fit = HalvedFit(width, channels, derived)
        self.width = width

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the first cell reads: (N, channels, ⌈H/8⌉, ⌈W/8⌉) and (N, width, ⌈H/8⌉, ⌈W/8⌉)."""
        quarter = self.conv0(images)
        return self.fit(quarter), self.conv1(quarter)


def make_stem(form: str, image_shape: Sequence[int], channels: int, derived: bool) -> CifarStem | ImageNetStem:
    """Return the stem for images of a shape.

    Args:
        form: "cifar" (Liu, Simonyan and Yang, ICLR 2019, section 3.1), "imagenet" (section 3.3; 224×224 pixels
            become 28×28), or "auto": the latter for sides of at least 128 pixels.
        image_shape: channels, height and width.
        channels: channels of a node in the first cell.
        derived: whether it is for the network of a genotype rather than for a supernet.

    Raises:
        SettingsError: there is no such form.

    """
    if form not in STEMS:
        raise SettingsError(f"stem = {form!r}: expected one of {', '.join(STEMS)}.")
    image_channels, height, width = image_shape
    if form == "imagenet" or (form == "auto" and min(height, width) >= LARGE):
        # The stem of a network for ImageNet is as wide as a node in DARTS; PC-DARTS searches with three times that.
        return ImageNetStem(image_channels, channels, channels if derived else _WIDTH * channels, derived)
    return CifarStem(image_channels, channels, _WIDTH * channels, derived)

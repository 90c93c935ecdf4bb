"""The data sets of the packaged example: files, splits, sizes, augmentation, and what is said when they are missing."""

import pytest
import torch

from examples.nas_interleaving.data.augmentation import cutout


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("height", "width"), [(6, 6), (5, 8)])
@pytest.mark.parametrize("length", [1, 3, 4])
def test_cutout_zeroes_one_square_that_may_lie_across_the_border(height, width, length):
    images = torch.rand(400, 3, height, width) + 1
    out = cutout(images, length, _generator())
    kept = out != 0
    assert torch.equal(out, torch.where(kept, images, 0))
    assert (kept == kept[:, :1]).all(), "the channels are cut at one place"
    sizes, centres = set(), torch.zeros(height, width)
    for hole in ~kept[:, 0]:
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert hole.sum() == len(rows) * len(columns) > 0
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        sizes.add((len(rows), len(columns)))
        centres[hole] += 1
    assert max(sizes) == (length, length)
    assert min(r for r, _ in sizes) == (length + 1) // 2, "a centre at the border leaves at least a half"
    assert centres.min() > 0, "every pixel is cut at some time"


def test_cutout_is_drawn_from_its_generator_and_leaves_its_images():
    images = torch.ones(8, 1, 9, 9)
    first, again, other = (cutout(images, 4, _generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(images, torch.ones(8, 1, 9, 9))
    assert torch.equal(cutout(images, 0, _generator()), images)
    assert (cutout(images, 18, _generator()) == 0).all()

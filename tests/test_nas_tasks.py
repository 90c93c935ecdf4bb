"""The tasks of the packaged example: names, checks, and batches."""

import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from examples.nas_interleaving.tasks import SideBySide, Task, TaskError, batches, check_compatible, load_tasks


def test_the_tasks_share_no_class_and_their_parts_no_image():
    first, second = load_tasks(["digits:0-4", "digits:5-9"])
    assert (first.classes, second.classes, first.image_shape) == (5, 5, (1, 8, 8))
    images = {}
    for task in (first, second):
        for part in ("train", "validation", "test"):
            data = getattr(task, part)
            assert {int(label) for _, label in data} == set(range(5))
            images[task.name, part] = {image.numpy().tobytes() for image, _ in data}
        # The digits hold few or no duplicates, so parts that overlapped would share many images.
        assert not images[task.name, "train"] & images[task.name, "validation"]
        assert not images[task.name, "test"] & (images[task.name, "train"] | images[task.name, "validation"])
        assert len(task.final_train) == len(task.train) + len(task.validation)
    assert sum(len(t.final_train) + len(t.test) for t in (first, second)) == 1797
    train = torch.stack([image for image, _ in first.train])
    assert abs(train.mean().item()) < 1e-5
    assert abs(train.std(unbiased=False).item() - 1) < 1e-5


def test_tasks_come_from_any_list_of_classes():
    tasks = load_tasks(["digits:0-1", "digits:2,4,9", "digits", "digits:9,0-7"])
    assert [task.classes for task in tasks] == [2, 3, 10, 9]
    nines = [image for image, label in tasks[3].test if label == 0]
    assert len(nines) == sum(label == 2 for _, label in tasks[1].test) == 54, "9 is the first class that is named"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["svhn"],
            "unknown task 'svhn'; expected one of digits, fashion-mnist, mnist, cifar10, cifar100, imagenet, or",
        ),
        (["svhn:0-4"], "unknown task 'svhn:0-4'"),
        (["digits:5-10"], "expected classes from 0 to 9, got '5-10'"),
        (["digits:"], "expected classes such as 0-4 or 1,3,7; got ''"),
        (["digits:4-0,1"], "expected classes such as 0-4 or 1,3,7; got '4-0'"),
        (["digits:7"], "at least two classes"),
        (["digits:1,1-3"], "each once"),
        (["digits:1-"], "expected classes such as"),
        (["digits:0-4", "digits:0-4"], "given twice"),
        ([], "at least one task"),
    ],
)
def test_unknown_tasks_are_refused(names, message):
    with pytest.raises(TaskError, match=message):
        load_tasks(names)


def test_tasks_may_differ_in_channels_size_and_classes():
    def task(name, channels, size, classes):
        data = [(torch.zeros(channels, size, size), 0)]
        return Task(name, classes, data, data, data, data)

    check_compatible([task("a", 1, 8, 2), task("b", 3, 9, 5)])


IMAGES, LABELS = torch.zeros(8, 1, 4, 4, dtype=torch.float64), torch.arange(8) % 2


def _listed(images, labels):
    return list(zip(images, labels, strict=True))


class _Endless(IterableDataset):
    def __iter__(self):
        yield IMAGES[0], 0


@pytest.mark.parametrize("part", ["train", "validation", "final_train", "test"])
@pytest.mark.parametrize("kind", [TensorDataset, _listed])
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[:, 0], LABELS, r"expected images of shape \(C, H, W\), got \(4, 4\).*unsqueeze"),
        (IMAGES.flatten(1), LABELS, r"expected images of shape \(C, H, W\), got \(16,\)"),
        (IMAGES.float(), LABELS, r"expected images of torch.float64, as the networks, got torch.float32"),
        (IMAGES, LABELS.float(), r"expected the class of an image to be one number, torch.int64; got torch.float32"),
        (
            IMAGES,
            torch.eye(8, 2).long(),
            r"expected the class .* one number, torch.int64; got torch.int64 of shape \(2,\)",
        ),
        (IMAGES, LABELS + 1, "expected classes from 0 to 1, got 2"),
        (IMAGES, LABELS - 1, "expected classes from 0 to 1, got -1"),
        (IMAGES[:0], LABELS[:0], "expected images, got none"),
    ],
)
def test_data_that_cannot_be_used_are_refused(images, labels, message, kind, part):
    parts = dict.fromkeys(("train", "validation", "final_train", "test"), TensorDataset(IMAGES, LABELS))
    with pytest.raises(TaskError, match=f"task 'mine', {part}: {message}"):
        Task("mine", 2, **(parts | {part: kind(images, labels)}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_Endless(), "expected a data set with a length, got _Endless"),
        ([IMAGES[0]], r"expected items \(image, class\), got tensor"),
        (TensorDataset(IMAGES), r"expected items \(image, class\), got \(tensor"),
        ([("picture", 0)], r"expected items \(image, class\), got \('picture', 0\)"),
        ([(object(), 0)], r"expected items \(image, class\) that make a batch.*found <class 'object'>"),
        ([(IMAGES[0], 0), (IMAGES[0, :, 1:], 1)], "that make a batch, with images of one shape"),
    ],
)
def test_data_that_are_no_images_with_classes_are_refused(data, message):
    with pytest.raises(TaskError, match=f"(?s)task 'mine', train: .*{message}"):
        Task("mine", 2, data, data, data, data)


def test_a_wrong_class_is_found_wherever_it_stands():
    labels = torch.zeros(5000, dtype=torch.int64)
    labels[1234] = 2
    good = TensorDataset(IMAGES, LABELS)
    with pytest.raises(TaskError, match="'mine', test: expected classes from 0 to 1, got 2"):
        Task("mine", 2, good, good, good, TensorDataset(torch.zeros(5000, 1, 1, 1), labels))
    # Where items are read one by one, the ends and some between: enough for classes in order.
    in_order = [(IMAGES[0], i // 100) for i in range(300)]
    with pytest.raises(TaskError, match="'mine', test: expected classes from 0 to 1, got 2"):
        Task("mine", 2, good, good, good, in_order)


def test_a_task_needs_two_classes():
    good = TensorDataset(IMAGES, LABELS)
    with pytest.raises(TaskError, match="task 'mine': classes = 1: expected an integer of at least 2"):
        Task("mine", 1, good, good, good, good)


@pytest.mark.parametrize("part", ["train", "validation", "final_train", "test"])
def test_a_part_smaller_than_a_batch_is_named(part):
    parts = {p: TensorDataset(IMAGES, LABELS) for p in ("train", "validation", "final_train", "test")}
    task = Task("mine", 2, **(parts | {part: TensorDataset(IMAGES[:7], LABELS[:7])}))
    message = rf"'mine' has 7 images in {part}; expected at least one batch of batch_size = 8\. Lower batch_size"
    with pytest.raises(TaskError, match=message):
        task.batches(part, 8, 0, option="batch_size")


def test_batches_in_order_hold_every_image():
    labels = torch.arange(8) % 2
    task = Task(
        "mine", 2, **dict.fromkeys(("train", "validation", "final_train", "test"), TensorDataset(IMAGES, labels))
    )
    found = [batch for _, batch in task.in_order("test", 3)]
    assert [len(batch) for batch in found] == [3, 3, 2]
    assert torch.equal(torch.cat(found), labels)


def test_batches_side_by_side_end_with_the_shorter_and_shuffle_by_their_seed():
    short, long = list(range(8)), list(range(100, 130))
    pairs = SideBySide([batches(short, 4, 1), batches(long, 4, 2)])
    first, second = list(pairs), list(pairs)
    assert len(first) == len(pairs) == 2
    assert sorted(torch.cat([a for a, _ in first]).tolist()) == short
    assert not torch.equal(torch.cat([b for _, b in first]), torch.cat([b for _, b in second]))
    again = list(SideBySide([batches(short, 4, 1), batches(long, 4, 2)]))
    assert all(torch.equal(x, y) for p, q in zip(first, again, strict=True) for x, y in zip(p, q, strict=True))

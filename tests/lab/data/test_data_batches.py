"""An epoch's batches: every image once, and the same batches from any start."""

import pytest
import torch

from stochastic_depth_lab.data import Augmentation, Normalization, Split, batches, num_batches

IDENTITY = Normalization(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))


def numbered(num_images: int) -> Split:
    """Image k is filled with the number k and has label k."""
    numbers = torch.arange(num_images)
    return Split(numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous(), numbers)


def epoch_of(split: Split, batch_size: int = 16, **options: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    options = {"normalization": IDENTITY, "augmentation": Augmentation(), "seed": 7, **options}
    return list(batches(split, batch_size, **options))  # type: ignore[arg-type]


def assert_same_batches(
    actual: list[tuple[torch.Tensor, torch.Tensor]], expected: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    assert len(actual) == len(expected)
    for (inputs, labels), (expected_inputs, expected_labels) in zip(actual, expected, strict=True):
        assert torch.equal(inputs, expected_inputs)
        assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [16] * 6 + [4]), (True, [16] * 6)], ids=["kept", "dropped"])
def test_last_short_batch(drop_last: bool, sizes: list[int]) -> None:
    epoch = epoch_of(numbered(100), drop_last=drop_last)
    assert [len(labels) for _, labels in epoch] == sizes
    assert num_batches(100, 16, drop_last=drop_last) == len(sizes)


def test_every_image_once_with_its_own_label() -> None:
    epoch = epoch_of(numbered(100), augmentation=None)
    labels = torch.cat([labels for _, labels in epoch])
    inputs = torch.cat([inputs for inputs, _ in epoch])
    assert sorted(labels.tolist()) == list(range(100))
    assert labels.tolist() != list(range(100))
    assert torch.equal(inputs, labels.float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8))


def test_without_seed_the_split_as_it_is() -> None:
    epoch = epoch_of(numbered(100), augmentation=None, seed=None)
    assert torch.equal(torch.cat([labels for _, labels in epoch]), torch.arange(100))
    assert torch.equal(torch.cat([inputs for inputs, _ in epoch]), numbered(100).images.float())


@pytest.mark.parametrize("start", [0, 1, 3, 6, 7])
def test_entered_in_the_middle_the_rest_is_identical(start: int) -> None:
    assert_same_batches(epoch_of(numbered(100), start=start, epoch=2), epoch_of(numbered(100), epoch=2)[start:])


def test_what_each_image_becomes_does_not_depend_on_the_batch_size() -> None:
    small, large = epoch_of(numbered(100), batch_size=3), epoch_of(numbered(100), batch_size=50)
    assert torch.equal(torch.cat([inputs for inputs, _ in small]), torch.cat([inputs for inputs, _ in large]))


@pytest.mark.parametrize("other", [{"seed": 8}, {"epoch": 1}], ids=["seed", "epoch"])
def test_another_seed_or_epoch_is_another_order_and_another_augmentation(other: dict[str, int]) -> None:
    split = Split(torch.ones(100, 1, 8, 8, dtype=torch.uint8), torch.arange(100))
    inputs, labels = zip(*epoch_of(split), strict=True)
    other_inputs, other_labels = zip(*epoch_of(split, **other), strict=True)
    assert not torch.equal(torch.cat(labels), torch.cat(other_labels))
    assert not torch.equal(torch.cat(inputs), torch.cat(other_inputs))


def test_fill_is_zero_after_normalization_which_happens_before_the_shift() -> None:
    images = torch.randint(0, 256, (64, 2, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalization = Normalization.fit(images, "pixel")
    normalized = normalization(images)
    augmentation = Augmentation(translation=2)
    ((inputs, labels),) = batches(
        Split(images, torch.arange(64)), 64, normalization=normalization, augmentation=augmentation, seed=0
    )
    for image, label in zip(inputs, labels.tolist(), strict=True):
        shifts = [(y, x, flip) for y in range(-2, 3) for x in range(-2, 3) for flip in (0, 1)]
        candidates = [augmentation(normalized[label : label + 1], torch.tensor([shift]))[0] for shift in shifts]
        assert any(torch.equal(image, candidate) for candidate in candidates)


def test_global_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    first, state = epoch_of(numbered(50)), torch.get_rng_state()
    torch.manual_seed(2)
    second = epoch_of(numbered(50))
    assert_same_batches(first, second)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, but is 0"),
        ({"start": 8}, r"start must be in 0\.\.7, the batches of this epoch, but is 8"),
        ({"start": -1}, r"start must be in 0\.\.7"),
        ({"seed": None}, "augmentation is random and needs a seed"),
    ],
    ids=["batch size", "start", "negative start", "seed"],
)
def test_bad_arguments_are_refused_at_the_call(options: dict[str, int | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        epoch_of(numbered(100), **options)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["pixel", "channel"])
def test_gpu_sees_the_epoch_of_the_cpu(kind: str) -> None:
    images = torch.randint(0, 256, (100, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(100))
    normalization = Normalization.fit(images, kind)  # type: ignore[arg-type]
    on_gpu = epoch_of(split.to("cuda"), normalization=normalization)
    assert on_gpu[0][0].is_cuda
    for (inputs, labels), (cpu_inputs, cpu_labels) in zip(
        on_gpu, epoch_of(split, normalization=normalization), strict=True
    ):
        torch.testing.assert_close(inputs.cpu(), cpu_inputs)
        assert torch.equal(labels.cpu(), cpu_labels)

from __future__ import annotations

import pytest
import torch

from mulki.clip.teachers import Teacher


class Encoder:
    """Maps an image to (its mean, 1) and remembers how many images it was asked for."""

    def __init__(self, images):
        self.images = images
        self.asked: list[int] = []
        self.weight = torch.ones((), requires_grad=True)

    def of(self, places):
        """The encoder of a batch of these images."""
        self.batch = self.images[places]
        return self

    def __call__(self, new):
        self.asked.append(len(new))
        means = self.batch[new].flatten(1).mean(dim=1) * self.weight
        return torch.stack([means, torch.ones_like(means)], dim=1)


@pytest.fixture
def images():
    return torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 3, 2, 2)


def teacher(num_images):
    return Teacher(torch.eye(2), torch.tensor(10.0), -torch.eye(2), num_images)


def test_features_hold_the_constants_of_the_task(images):
    t = teacher(None)
    features = t.features(torch.arange(6), Encoder(images).of(torch.arange(6)))
    assert features.texts is t.texts
    assert features.scale is t.scale
    assert features.prototypes is t.prototypes
    assert features.images[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_each_image_is_encoded_once_and_looked_up_by_its_place(images):
    t, encode = teacher(6), Encoder(images)
    places = torch.tensor([4, 1])
    assert t.features(places, encode.of(places)).images[:, 0].tolist() == [4, 1]
    places = torch.tensor([1, 5, 4, 0])
    assert t.features(places, encode.of(places)).images[:, 0].tolist() == [1, 5, 4, 0]
    assert t.features(places, encode.of(places)).images[:, 0].tolist() == [1, 5, 4, 0]
    assert encode.asked == [2, 2]


def test_without_a_size_nothing_is_kept(images):
    t, encode = teacher(None), Encoder(images)
    t.remember(images=torch.zeros(6, 2))
    for _ in range(2):
        t.features(torch.tensor([4, 1]), encode.of([4, 1]))
    assert encode.asked == [2, 2]


def test_what_is_remembered_is_not_encoded(images):
    t, encode = teacher(6), Encoder(images)
    whole = torch.randn(6, 2)
    t.remember(images=whole)
    places = torch.tensor([3, 0])
    assert t.features(places, encode.of(places)).images.equal(whole[places])
    assert encode.asked == []
    with pytest.raises(ValueError, match="features: got 5 rows, wanted 6"):
        t.remember(images=whole[:5])


def test_a_batch_is_a_copy_of_what_is_kept(images):
    t, encode = teacher(6), Encoder(images)
    t.features(torch.tensor([0, 1]), encode.of([0, 1])).images.zero_()
    assert t.features(torch.tensor([0, 1]), encode.of([0, 1])).images[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize("num_images", [None, 6])
def test_no_graph_is_kept_even_of_a_model_that_is_not_frozen(images, num_images):
    features = teacher(num_images).features(torch.arange(6), Encoder(images).of(torch.arange(6)))
    assert not features.images.requires_grad

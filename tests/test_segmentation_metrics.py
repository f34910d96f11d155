"""mIoU and pixel accuracy by hand and against torchmetrics; looking at images in parts."""

import itertools
import math
from typing import Any, cast

import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

import repvgg
from repvgg.errors import InputError
from repvgg.preprocessing import Preprocessing
from repvgg.segmentation.data import VOID
from repvgg.segmentation.evaluation import View, probabilities, starts
from repvgg.segmentation.metrics import confusion, scores


def test_the_figures_of_a_small_map_by_hand():
    labels = torch.tensor([[0, 0, 0, 1], [1, 1, 2, VOID]])
    predicted = torch.tensor([[0, 0, 1, 1], [1, 2, 0, 2]])
    matrix = confusion(predicted, labels, 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 2, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    found = scores(matrix)
    # Class 0: 2 of 3 + 1 taken for it; 1: 2 of 3 + 1; 2: none of 1 + 1; 3: not there at all.
    assert found.iou[:3] == pytest.approx((2 / 4, 2 / 4, 0 / 2))
    assert math.isnan(found.iou[3])
    assert found.miou == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert found.pixel_accuracy == pytest.approx(4 / 7)


def test_a_map_without_any_class_has_no_figures():
    labels = torch.full((3, 3), VOID)
    assert math.isnan(scores(confusion(torch.zeros(3, 3), labels, 2)).miou)


@pytest.mark.parametrize("seed", range(3))
def test_the_figures_are_those_of_torchmetrics(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 7, (4, 30, 40), generator=generator)
    wrong = torch.rand(labels.shape, generator=generator) < 0.4
    predicted = torch.where(wrong, torch.randint(0, 7, labels.shape, generator=generator), labels)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = VOID
    # In parts, as scenes come.
    total = sum(confusion(p, t, 7) for p, t in zip(predicted, labels, strict=True))
    found = scores(torch.as_tensor(total))
    for average, ours in (("macro", found.miou), ("none", torch.tensor(found.iou))):
        theirs = MulticlassJaccardIndex(7, average=cast(Any, average), ignore_index=VOID)
        torch.testing.assert_close(
            theirs(predicted, labels).double(), torch.as_tensor(ours).double(), rtol=1e-6, atol=0
        )
    accuracy = MulticlassAccuracy(7, average="micro", ignore_index=VOID)
    assert accuracy(predicted, labels).item() == pytest.approx(found.pixel_accuracy, rel=1e-6)


class Brightness(nn.Module):
    """Class 0 where the red of a pixel is below the mean, class 1 above: sees one pixel alone."""

    num_classes = 2
    preprocessing = Preprocessing(size=8)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        red = self.weight * x[:, 0]
        return torch.stack([-red, red], dim=1)


BRIGHTNESS = cast(Any, Brightness())
IMAGES = torch.randint(0, 256, (2, 3, 21, 30), dtype=torch.uint8)


@pytest.mark.parametrize("window", [8, 13, 21, 30, 50])
@pytest.mark.parametrize("flip", [False, True])
def test_windows_and_flips_see_what_the_whole_shows(window, flip):
    """Of a network that sees single pixels every look gives the same, or a window is misplaced."""
    whole = probabilities(BRIGHTNESS, IMAGES)
    torch.testing.assert_close(whole.sum(1), torch.ones(2, 21, 30))
    torch.testing.assert_close(probabilities(BRIGHTNESS, IMAGES, View(window, flip=flip)), whole)


def test_several_scales_are_averaged_at_the_size_of_the_image():
    smooth = torch.arange(30, dtype=torch.uint8).mul(8).expand(1, 3, 20, 30).contiguous()
    whole = probabilities(BRIGHTNESS, smooth)
    both = probabilities(BRIGHTNESS, smooth, View(scales=(0.5, 1.0, 2.0)))
    assert both.shape == whole.shape
    assert (both[..., 3:-3] - whole[..., 3:-3]).abs().max() < 0.02
    assert not torch.equal(both, whole)
    twice = probabilities(BRIGHTNESS, smooth, View(scales=(1.0, 1.0)))
    torch.testing.assert_close(twice, whole)


@pytest.mark.parametrize(
    ("extent", "window", "expected"),
    [
        (5, 8, [0]),
        (8, 8, [0]),
        (9, 8, [0, 1]),
        (20, 9, [0, 6, 11]),
        (2048, 713, [0, 445, 890, 1335]),
    ],
)
def test_windows_cover_an_extent_by_hand(extent, window, expected):
    assert starts(extent, window) == expected
    covered = {pixel for start in expected for pixel in range(start, start + window)}
    assert set(range(extent)) <= covered
    gaps = [b - a for a, b in itertools.pairwise(expected)]
    assert all(gap <= 2 * window / 3 + 1 for gap in gaps)


def test_a_view_names_what_it_cannot_be():
    with pytest.raises(InputError, match="window"):
        View(window=-1)
    with pytest.raises(InputError, match="scales"):
        View(scales=(0.0,))


def test_a_network_in_training_is_evaluated_as_at_inference():
    network: Any = repvgg.create_model("pspnet_repvgg_small", num_classes=3, width=8).train()
    found = probabilities(network, IMAGES)
    assert network.training
    torch.testing.assert_close(found, probabilities(network.eval(), IMAGES))

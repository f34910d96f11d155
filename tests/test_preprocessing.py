"""What is done to images: timm's arithmetic, and nothing unusable from a file."""

import json
import math

import pytest
from timm.data.transforms_factory import create_transform
from torchvision.transforms import CenterCrop, Resize

from repvgg.errors import InputError
from repvgg.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing


@pytest.mark.parametrize("size", [8, 32, 63, 64, 160, 224, 299, 384])
@pytest.mark.parametrize("crop_pct", [0.7, 0.875, 0.9, 0.95, 1.0])
def test_sizes_are_those_of_timm(size, crop_pct):
    transforms = create_transform(size, crop_pct=crop_pct).transforms  # pyright: ignore
    resize = next(step for step in transforms if isinstance(step, Resize))
    crop = next(step for step in transforms if isinstance(step, CenterCrop))
    assert Preprocessing(size=size, crop_pct=crop_pct).resize_size == resize.size
    assert tuple(crop.size) == (size, size)


def test_colour_is_normalized_as_imagenet():
    found = Preprocessing.for_channels(3, 224)
    assert found == Preprocessing()
    assert (found.mean, found.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert (found.channels, found.resize_size) == (3, 256)


@pytest.mark.parametrize("channels", [1, 2, 4, 12])
def test_other_channels_get_the_mean_of_the_three(channels):
    found = Preprocessing.for_channels(channels, 64)
    assert found.channels == channels
    assert found.mean == pytest.approx([0.449] * channels, abs=1e-12)
    assert found.std == pytest.approx([0.226] * channels, abs=1e-12)


@pytest.mark.parametrize(("size", "crop_pct"), [(8, 1), (63, 1), (64, 0.875), (224, 0.875)])
def test_small_images_are_taken_whole(size, crop_pct):
    assert Preprocessing.for_channels(3, size).crop_pct == crop_pct


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(),
        Preprocessing(32, 1, "bicubic", (0.5,), (1,)),
        Preprocessing.for_channels(4, 9),
    ],
)
def test_it_comes_back_from_json(preprocessing):
    fields = json.loads(json.dumps(preprocessing.to_dict()))
    assert Preprocessing.from_dict(fields) == preprocessing


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("size", [0, -1, 16385, 224.0, "224", True, None]),
        ("crop_pct", [0, 1.01, "1", math.nan, None, [1]]),
        ("interpolation", ["lanczos", 2, None, ["bilinear"]]),
        ("mean", [0.5, None, [], ["0"] * 3, [0.5] * 2, [math.nan] * 3, [10**400] * 3, [[0.5]] * 3]),
        ("std", [0.5, [1, 1, 0], [1, 1, -1], [math.inf] * 3, [True] * 3]),
        ("colour", ["red"]),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(field, values):
    for value in values:
        with pytest.raises(InputError, match=field if field != "colour" else "fields"):
            Preprocessing.from_dict({field: value})


def test_what_is_no_mapping_is_refused():
    with pytest.raises(InputError, match="preprocessing: fields"):
        Preprocessing.from_dict([224])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("channels", [0, -3, 2.0, "3", 10**9])
def test_an_unusable_number_of_channels_is_refused(channels):
    with pytest.raises(InputError, match="in_chans"):
        Preprocessing.for_channels(channels, 224)

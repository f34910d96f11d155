"""Scenes from folders, CamVid and Cityscapes: what they hold, how they change, what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Cityscapes

from repvgg.errors import InputError
from repvgg.preprocessing import Preprocessing
from repvgg.segmentation.data import (
    CAMVID,
    VOID,
    Scene,
    cityscapes_classes,
    open_scenes,
    palette,
)
from repvgg.segmentation.transforms import evaluation_transform, training_transform


def write_scene(root, split, name, image, labels, **saving):
    for folder, pixels, ending in (("images", image, "jpg"), ("labels", labels, "png")):
        (root / split / folder).mkdir(parents=True, exist_ok=True)
        picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        picture.save(root / split / folder / f"{name}.{ending}", **saving)


def write_classes(root, names=("road", "sky"), **fields):
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.json").write_text(json.dumps({"names": names, **fields}))


IMAGE = np.zeros((20, 30, 3), np.uint8)
LABELS = np.zeros((20, 30), np.uint8)


@pytest.fixture
def folder(tmp_path):
    write_classes(tmp_path, ignore=7)
    labels = LABELS.copy()
    labels[:5], labels[5:8] = 1, 7
    write_scene(tmp_path, "train", "b", IMAGE, labels)
    write_scene(tmp_path, "train", "a", IMAGE, LABELS)
    return tmp_path


def test_camvid_as_it_is(camvid):
    counts = [len(open_scenes(f"camvid:{camvid}", split)) for split in ("train", "val", "test")]
    assert counts == [367, 101, 233]
    scenes = open_scenes(f"camvid:{camvid}", "test")
    assert scenes.class_names == CAMVID.names
    assert len(CAMVID.names) == len(CAMVID.colors) == 11
    scene = scenes.decode(0)
    assert scene.image.size == scene.labels.size == (480, 360)
    found = set(np.unique(np.asarray(scene.labels)).tolist())
    assert found <= {*range(11), VOID}
    path = scenes.names[0].replace("images", "labels").replace(".jpg", ".png")
    with Image.open(path) as file:
        values = np.asarray(file)
    labels = np.asarray(scene.labels)
    assert np.array_equal(labels == VOID, values == 11)
    assert np.array_equal(labels[labels != VOID], values[values != 11])
    # The sky is above the road.
    heights = [np.nonzero(labels == CAMVID.names.index(name))[0].mean() for name in ("sky", "road")]
    assert heights[0] < heights[1]


def test_a_folder_says_what_its_labels_mean(folder):
    scenes = open_scenes(str(folder), "train")
    assert scenes.class_names == ("road", "sky")
    assert [name.rpartition("/")[2] for name in scenes.names] == ["a.jpg", "b.jpg"]
    labels = np.asarray(scenes.decode(1).labels)
    assert [labels[0, 0], labels[6, 0], labels[10, 0]] == [1, VOID, 0]


def test_a_palette_is_read_as_numbers(folder):
    labels = Image.fromarray(np.ones((20, 30), np.uint8)).convert("P")
    labels.putpalette([0, 0, 0, 9, 99, 199])
    labels.putdata([1] * 600)
    write_scene(folder, "train", "a", IMAGE, labels)
    assert set(np.asarray(open_scenes(str(folder), "train").decode(0).labels).flat) == {1}


def test_a_label_that_is_no_class_is_named(folder):
    labels = LABELS.copy()
    labels[3, 3] = 2
    write_scene(folder, "train", "a", IMAGE, labels)
    with pytest.raises(InputError, match=r"a\.png: labels of 2 classes or 7 .* found 2"):
        open_scenes(str(folder), "train").decode(0)


def test_an_image_without_its_label_map_is_named(folder):
    (folder / "train" / "labels" / "a.png").unlink()
    with pytest.raises(InputError, match=r"a\.jpg: has no label map .* 1 of 2 images"):
        open_scenes(str(folder), "train")


def test_a_label_map_without_its_image_is_named(folder):
    (folder / "train" / "images" / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"a\.png: has no image"):
        open_scenes(str(folder), "train")


def test_two_files_of_one_stem_are_named(folder):
    Image.fromarray(IMAGE).save(folder / "train" / "images" / "a.png")
    with pytest.raises(InputError, match="one file of a stem"):
        open_scenes(str(folder), "train")


def test_sizes_that_differ_are_named(folder):
    write_scene(folder, "train", "a", IMAGE, LABELS[:, :29])
    with pytest.raises(InputError, match=r"a\.png: 30×20 pixels needed, .* found 29×20"):
        open_scenes(str(folder), "train").decode(0)


def test_labels_in_color_are_refused(folder):
    write_scene(folder, "train", "a", IMAGE, IMAGE)
    with pytest.raises(InputError, match="one channel of 8 bits needed, found mode RGB"):
        open_scenes(str(folder), "train").decode(0)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_damaged_label_map_is_named(folder, content):
    (folder / "train" / "labels" / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png: cannot be decoded"):
        open_scenes(str(folder), "train").decode(0)


def test_folders_that_are_missing_are_named(folder, tmp_path):
    with pytest.raises(InputError, match="val/images: a folder is needed"):
        open_scenes(str(folder), "val")
    with pytest.raises(InputError, match=r"classes\.json"):
        open_scenes(str(tmp_path / "nowhere"), "train")
    with pytest.raises(InputError, match="none given"):
        open_scenes("", "train")


@pytest.mark.parametrize(
    "text",
    [
        "not JSON",
        "[1]",
        "{}",
        '{"names": ["a"]}',
        '{"names": ["a", "b"], "ignore": 1}',
        '{"names": ["a", "b"], "ignore": 256}',
        '{"names": ["a", "b"], "colors": [[1, 2, 3]]}',
        '{"names": ["a", "b"], "colors": [1, 2]}',
        '{"names": 3}',
    ],
)
def test_a_classes_file_that_cannot_be_used_is_named(folder, text):
    (folder / "classes.json").write_text(text)
    with pytest.raises(InputError, match=r"classes\.json"):
        open_scenes(str(folder), "train")


@pytest.fixture
def cityscapes(tmp_path):
    """Two scenes of one city, laid out and named as Cityscapes is."""
    for split in ("train", "val"):
        for kind in ("leftImg8bit", "gtFine"):
            (tmp_path / kind / split / "ulm").mkdir(parents=True)
        for index in range(2):
            stem = f"ulm_00000{index}_000019"
            Image.fromarray(IMAGE).save(
                tmp_path / "leftImg8bit" / split / "ulm" / f"{stem}_leftImg8bit.png"
            )
            ids = LABELS.copy()
            ids[0, :8] = (7, 8, 11, 26, 33, 0, 6, 16)
            Image.fromarray(ids).save(
                tmp_path / "gtFine" / split / "ulm" / f"{stem}_gtFine_labelIds.png"
            )
    return tmp_path


def test_cityscapes_has_the_19_classes_that_are_trained(cityscapes):
    scenes = open_scenes(f"cityscapes:{cityscapes}", "val")
    assert len(scenes) == 2
    assert len(scenes.class_names) == 19
    assert scenes.class_names[:3] == ("road", "sidewalk", "building")
    labels = np.asarray(scenes.decode(0).labels)
    # road, sidewalk, building, car, bicycle; unlabeled, ground and tunnel are not trained on.
    assert labels[0, :8].tolist() == [0, 1, 2, 13, 18, VOID, VOID, VOID]
    ids = {c.name: c.id for c in Cityscapes.classes}
    assert [scenes.class_names[label] for label in labels[0, :5]] == [
        next(name for name, number in ids.items() if number == i) for i in (7, 8, 11, 26, 33)
    ]


def test_cityscapes_that_is_not_complete_is_named(cityscapes, tmp_path):
    (cityscapes / "gtFine" / "val" / "ulm" / "ulm_000001_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(InputError, match="has no label map"):
        open_scenes(f"cityscapes:{cityscapes}", "val")
    with pytest.raises(InputError, match="nowhere: leftImg8bit/train and gtFine/train"):
        open_scenes(f"cityscapes:{tmp_path / 'nowhere'}", "train")


def test_each_class_has_a_color_of_its_own():
    assert palette(CAMVID.names, 11) == CAMVID.colors
    assert palette(cityscapes_classes().names, 19)[0] == (128, 64, 128)
    for count in (2, 20, 100):
        assert len(set(palette(None, count))) == count


# --- Changes -------------------------------------------------------------------------------------

MEAN = [round(255 * value) for value in Preprocessing().mean]


def checkered(width, height):
    """A scene whose image says the label of each pixel: 100 for class 1, 200 for class 2."""
    labels = np.random.default_rng(0).integers(1, 3, (height // 5, width // 5)).astype(np.uint8)
    labels = np.kron(labels, np.ones((5, 5), np.uint8))
    image = np.repeat(labels[..., None] * np.uint8(100), 3, axis=2)
    return Scene(Image.fromarray(image), Image.fromarray(labels))


def test_at_a_test_a_scene_stays_as_it_is():
    scene = checkered(30, 20)
    image, labels = evaluation_transform(scene)
    assert image.shape == (3, 20, 30)
    assert torch.equal(image[0], labels * 100)


@pytest.mark.parametrize(
    ("changes", "agreement"),
    [
        ({"scale": (1, 1), "rotate": 0, "blur": False}, 1.0),
        ({"scale": (2, 2), "rotate": 0, "blur": False}, 0.9),
        ({"scale": (1, 1), "rotate": 10, "blur": False}, 0.8),
        ({"scale": (1, 1), "rotate": 0, "blur": True}, 0.9),
        ({}, 0.8),
    ],
)
def test_image_and_labels_change_together(changes, agreement):
    """Where the image shows a class, the labels say it, but for pixels between two of them."""
    transform = training_transform(Preprocessing(size=40), **changes)
    shown = set()
    for seed in range(8):
        torch.manual_seed(seed)
        image, labels = transform(checkered(100, 80))
        assert image.shape == (3, 40, 40)
        assert labels.shape == (40, 40)
        assert image.dtype == labels.dtype == torch.uint8
        counted = labels != VOID
        assert set(labels.unique().tolist()) <= {1, 2, VOID}
        nearest = torch.where(image[0].int() < 150, 1, 2)
        assert (nearest == labels)[counted].float().mean() >= agreement
        shown.add(tuple(image.flatten().tolist()))
    assert len(shown) == 8


def test_half_of_the_scenes_are_flipped():
    scene = checkered(40, 40)
    image, _ = evaluation_transform(scene)
    transform = training_transform(Preprocessing(size=40), scale=(1, 1), rotate=0, blur=False)
    flipped = []
    for seed in range(60):
        torch.manual_seed(seed)
        changed, labels = transform(scene)
        assert torch.equal(changed[0], 100 * labels)
        flipped.append(not torch.equal(changed, image))
    assert 15 < sum(flipped) < 45


def test_a_crop_larger_than_the_image_is_filled_up():
    scene = checkered(30, 20)
    transform = training_transform(Preprocessing(size=64), scale=(1, 1), rotate=0, blur=False)
    for seed in range(5):
        torch.manual_seed(seed)
        image, labels = transform(scene)
        outside = labels == VOID
        assert outside.sum() == 64 * 64 - 30 * 20  # all of the image is there, once
        for channel, mean in zip(image, MEAN, strict=True):
            assert set(channel[outside].tolist()) == {mean}
        assert torch.equal(image[0][~outside], labels[~outside] * 100)


def test_corners_that_a_rotation_leaves_are_void():
    scene = Scene(Image.new("RGB", (64, 64), (100, 100, 100)), Image.new("L", (64, 64), 1))
    transform = training_transform(Preprocessing(size=64), scale=(1, 1), rotate=45, blur=False)
    seen = 0
    for seed in range(8):
        torch.manual_seed(seed)
        image, labels = transform(scene)
        void = labels == VOID
        seen += int(void.any())
        assert set(labels.unique().tolist()) <= {1, VOID}
        inside = ~void
        assert (image[0][inside] == 100).float().mean() > 0.9
        if void.any():
            assert (image[0][void] == MEAN[0]).float().mean() > 0.8
    assert 0 < seen < 8


def test_the_same_seed_changes_a_scene_alike():
    transform = training_transform(Preprocessing(size=40))
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(transform(checkered(60, 50)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

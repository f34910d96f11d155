"""Segmentation runs: loss by hand, what they leave, exact resume, commands, on small scenes."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import repvgg
from repvgg.cli import main
from repvgg.errors import InputError, Interrupted
from repvgg.segmentation.config import SEGMENT_RECIPES, SegmentConfig
from repvgg.segmentation.data import VOID, open_scenes
from repvgg.segmentation.evaluation import View, evaluate, evaluation_loader
from repvgg.segmentation.prediction import overlay
from repvgg.segmentation.train import Segmentation, class_weights, cross_entropy, train
from repvgg.training.distributed import World
from repvgg.training.loop import Run
from repvgg.training.optimizer import build_optimizers, schedule

ALONE = World(0, 1, torch.device("cpu"))
MODEL = "pspnet_repvgg_small:depths=1-1-1-2-1,widths=8-8-12-16-16"
COLORS = ((30, 60, 200), (200, 60, 30), (40, 180, 60))


def scene(seed):
    """Three stripes, each of the color of its class with noise, and a few pixels without class.

    Of 8 n + 1 pixels a side, for which a PSPNet of output stride 8 brings its logits to where they
    were computed; at other sizes the stripes' borders are up to some pixels off.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(3)
    labels = np.repeat(order, 11).astype(np.uint8)[:, None].repeat(41, axis=1)
    image = np.array(COLORS)[labels] + random.integers(-30, 30, (33, 41, 3))
    labels[random.random(labels.shape) < 0.02] = 9
    return Image.fromarray(image.clip(0, 255).astype(np.uint8)), Image.fromarray(labels)


@pytest.fixture(scope="session")
def stripes(tmp_path_factory):
    root = tmp_path_factory.mktemp("stripes")
    description = {"names": ["sea", "brick", "lawn"], "colors": COLORS, "ignore": 9}
    (root / "classes.json").write_text(json.dumps(description))
    for split, count in (("train", 37), ("val", 5), ("test", 2)):
        for index in range(count):
            for folder, picture in zip(
                ("images", "labels"), scene(100 * count + index), strict=True
            ):
                (root / split / folder).mkdir(parents=True, exist_ok=True)
                picture.save(root / split / folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def config(stripes):
    return SegmentConfig(
        model=MODEL,
        width=16,
        data=str(stripes),
        epochs=10,
        batch_size=4,
        base_batch_size=4,
        learning_rate=0.04,
        crop_size=33,
        scale_min=0.8,
        scale_max=1.25,
        rotate=5.0,
        workers=0,
        device="cpu",
    )


@pytest.fixture(scope="session")
def finished(config, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "stripes"
    train(config, output)
    return output


def history(output):
    with open(output / "history.csv", newline="") as file:
        return [{name: float(v) for name, v in row.items()} for row in csv.DictReader(file)]


def test_the_default_is_the_papers_setting():
    config = SEGMENT_RECIPES["cityscapes"]()
    assert (config.learning_rate, config.schedule, config.weight_decay) == (0.01, "poly", 1e-4)
    assert (config.epochs, config.batch_size, config.auxiliary_weight) == (40, 16, 0.4)
    assert config.sync_bn
    assert (config.crop_size, config.scaled_learning_rate) == (713, 0.01)


def test_the_rate_falls_as_the_power_0_9_of_what_is_left():
    rates = [schedule(SegmentConfig(), epochs) for epochs in (0, 10, 20, 39, 40)]
    expected = [(1 - done / 40) ** 0.9 for done in (0, 10, 20, 39, 40)]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 1),
        ("crop_size", 4),
        ("scale_min", 0.0),
        ("scale_min", 3.0),
        ("rotate", -1.0),
        ("head_rate", -1.0),
        ("auxiliary_weight", -0.1),
        ("schedule", "poli"),
        ("epochs", 0),
    ],
)
def test_a_config_names_the_field_that_is_wrong(field, value):
    with pytest.raises(InputError, match=field):
        dataclasses.replace(SegmentConfig(), **{field: value})


def test_what_cannot_be_trained_is_named(config, stripes, tmp_path):
    for changes, message in (
        ({"model": "repvgg_a0"}, "model: one of list_models"),
        ({"data": ""}, "none given"),
        ({"backbone": str(tmp_path / "nothing")}, "a file is needed"),
    ):
        with pytest.raises(InputError, match=message):
            Segmentation(dataclasses.replace(config, **changes), ALONE)


def test_the_loss_counts_the_pixels_that_have_a_class():
    logits = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 5, 7))
    labels[0, :3] = VOID
    of_pixels = -logits.log_softmax(1).gather(1, labels.clamp(max=2)[:, None])[:, 0]
    expected = of_pixels[labels != VOID].mean()
    torch.testing.assert_close(cross_entropy(logits, labels), expected)
    assert cross_entropy(logits, torch.full_like(labels, VOID)) == 0


def test_classes_can_be_balanced(config):
    """Weights by hand: the power of the median share over the share of the class."""
    scenes = open_scenes(config.data, "train")
    counts = np.zeros(3)
    for index in range(len(scenes)):
        labels = np.asarray(scenes.decode(index).labels)
        counts += [(labels == label).sum() for label in range(3)]
    expected = (np.median(counts) / counts) ** 0.5
    weights = class_weights(scenes, 0.5)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)
    logits = torch.randn(2, 3, 5, 7)
    labels = torch.randint(0, 3, (2, 5, 7))
    labels[0, :3] = VOID
    theirs = F.cross_entropy(logits, labels, weight=weights, ignore_index=VOID)
    torch.testing.assert_close(cross_entropy(logits, labels, weights), theirs)


def test_the_loss_of_a_step_is_that_of_both_heads(config):
    task = Segmentation(config, ALONE)
    batch = next(iter(task.loader.epoch(1)))
    assert batch.images.shape == (4, 3, 33, 33)
    assert batch.labels.shape == (4, 33, 33)
    network = task.network.train()
    torch.manual_seed(0)
    loss, right = task.loss(network, batch.images, batch.labels, batch.mix)
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in (network.preprocessing.mean, network.preprocessing.std)
    )
    torch.manual_seed(0)
    logits, auxiliary = network((batch.images / 255 - mean) / std)
    labels = batch.labels.long()
    parts = [F.cross_entropy(x, labels, ignore_index=VOID) for x in (logits, auxiliary)]
    torch.testing.assert_close(loss, parts[0] + 0.4 * parts[1])
    hits = (logits.argmax(1) == labels).sum() / (labels != VOID).sum()
    torch.testing.assert_close(right, 4 * hits)


def test_the_heads_learn_faster_than_the_backbone(config):
    task = Segmentation(config, ALONE)
    (optimizer,) = build_optimizers(task.network, config, task.faster, task.factor)
    factor_of = {
        id(p): group["initial_lr"] / config.learning_rate
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for name, parameter in task.network.named_parameters():
        expected = 1.0 if name.startswith("backbone.") else 10.0
        assert factor_of.pop(id(parameter)) == pytest.approx(expected)
    assert not factor_of
    decayed = [group["weight_decay"] for group in optimizer.param_groups]
    assert decayed == [1e-4, 0, 1e-4, 0]


def test_a_run_leaves_what_one_of_classification_does(finished, config):
    names = {path.name for path in finished.iterdir()}
    files = {"config.json", "history.csv", "history.png", "last.safetensors", "best.safetensors"}
    assert names == files | {"checkpoints", "tensorboard"}
    assert SegmentConfig(**json.loads((finished / "config.json").read_text())) == config
    rows = history(finished)
    assert [row["epoch"] for row in rows] == list(range(1, 11))
    assert set(rows[0]) == {
        *("epoch", "train_loss", "train_pixel_accuracy", "test_loss", "test_miou"),
        *("test_pixel_accuracy", "images_per_second", "seconds"),
    }
    assert rows[-1]["test_miou"] > 0.85
    assert rows[-1]["test_miou"] > rows[0]["test_miou"]


def test_the_best_model_is_that_of_the_highest_miou(finished, config):
    best = max(row["test_miou"] for row in history(finished))
    network = repvgg.load(finished / "best.safetensors")
    loader = evaluation_loader(open_scenes(config.data, "val"))
    assert evaluate(network, loader).miou == pytest.approx(best, abs=1e-6)


def test_the_figures_are_the_same_after_conversion(finished, config):
    network = repvgg.load(finished / "last.safetensors")
    plain: Any = repvgg.reparameterize(network)
    loader = evaluation_loader(open_scenes(config.data, "val"))
    for view in (None, View(window=17, scales=(1.0, 1.5), flip=True)):
        before, after = evaluate(network, loader, view), evaluate(plain, loader, view)
        assert after.miou == pytest.approx(before.miou, abs=1e-4)
        assert after.loss == pytest.approx(before.loss, rel=1e-4)
    assert evaluate(network, loader).miou == pytest.approx(
        history(finished)[-1]["test_miou"], abs=1e-6
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_that_goes_on_on_a_gpu_ends_with_the_same_bits(config, tmp_path):
    config = dataclasses.replace(
        config, device="cuda", epochs=2, checkpoint_minutes=0, kept_checkpoints=100
    )
    run = train(config, tmp_path / "run")
    expected = repvgg.load(run.last).state_dict()
    kept = sorted((run.path / "checkpoints").iterdir())
    for state in kept[5:]:
        state.unlink()
    train(config, run.path)
    found = repvgg.load(run.last).state_dict()
    assert len(kept) > 10
    assert [n for n, tensor in expected.items() if not torch.equal(tensor, found[n])] == []


def test_a_run_that_was_stopped_within_an_epoch_ends_with_the_same_bits(config, finished, tmp_path):
    output = tmp_path / "run"
    run = Run(config, output, ALONE, task=Segmentation)
    run.received, run.kept_at = [int(signal.SIGTERM)], time.monotonic()
    with pytest.raises(Interrupted, match="stopped at step 1 of epoch 1"):
        run._train_epoch()
    train(config, output)
    expected = repvgg.load(finished / "last.safetensors").state_dict()
    found = repvgg.load(output / "last.safetensors").state_dict()
    assert [n for n, tensor in expected.items() if not torch.equal(tensor, found[n])] == []


def test_a_folder_of_another_config_or_task_is_refused(finished, config):
    with pytest.raises(InputError, match="crop_size 33 → 65"):
        train(dataclasses.replace(config, crop_size=65), finished)


def test_options_of_the_trainer_work_for_segmentation_too(config, tmp_path):
    changed = dataclasses.replace(
        config, epochs=1, accumulate=2, ema_decay=0.5, gradient_checkpointing=True, precision="bf16"
    )
    train(changed, tmp_path / "run")
    assert len(history(tmp_path / "run")) == 1


def test_scenes_without_any_class_are_refused(config, finished, tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / "val" / folder).mkdir(parents=True)
    image, _ = scene(0)
    image.save(tmp_path / "val" / "images" / "0.png")
    Image.new("L", image.size, 9).save(tmp_path / "val" / "labels" / "0.png")
    (tmp_path / "classes.json").write_text('{"names": ["sea", "brick", "lawn"], "ignore": 9}')
    loader = evaluation_loader(open_scenes(str(tmp_path), "val"))
    with pytest.raises(InputError, match="no pixel of these scenes has a class"):
        evaluate(repvgg.load(finished / "last.safetensors"), loader)


# --- Commands ------------------------------------------------------------------------------------


def succeed(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def refuse(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_evaluate_and_convert_from_the_command_line(finished, stripes, tmp_path, capsys):
    model, plain = finished / "best.safetensors", tmp_path / "plain.safetensors"
    said = succeed(capsys, "segment", "evaluate", model, "--data", stripes, "--split", "test")
    assert "mIoU" in said
    assert "brick" in said
    assert "verified on 5 images" in succeed(capsys, "convert", model, plain, "--data", stripes)
    arguments = ("--data", stripes, "--split", "test", "--flip", "--scales", "1", "1.5")
    succeed(capsys, "segment", "evaluate", plain, *arguments, "--window", "24")
    assert "Conv 3×3, 12 → 16, dilation 2" in succeed(capsys, "profile", plain)


@pytest.mark.slow
def test_export_from_the_command_line(finished, tmp_path, capsys):
    said = succeed(capsys, "export", finished / "best.safetensors", tmp_path / "net.onnx")
    assert "equal in onnxruntime" in said


def test_predict_draws_overlays(finished, stripes, tmp_path, capsys):
    model, images = finished / "best.safetensors", stripes / "test" / "images"
    said = succeed(capsys, "segment", "predict", model, images, "--output", tmp_path / "drawn")
    assert "written: 2 images" in said
    with Image.open(tmp_path / "drawn" / "0.png") as drawn, Image.open(images / "0.png") as image:
        assert drawn.format == "PNG"
        assert drawn.size == image.size
        drawn.load()
    succeed(
        capsys, "segment", "predict", model, images, "--output", tmp_path / "numbers", "--labels"
    )
    with Image.open(tmp_path / "numbers" / "0.png") as file:
        numbers = np.asarray(file)
    with Image.open(stripes / "test" / "labels" / "0.png") as file:
        labels = np.asarray(file)
    assert (numbers == labels)[labels != 9].mean() > 0.9


def test_an_overlay_mixes_image_and_color_by_hand():
    image = Image.new("RGB", (2, 1), (100, 0, 50))
    drawn = overlay(image, np.array([[1, 7]], np.uint8), ((0, 0, 0), (200, 100, 50)), 0.6)
    assert np.asarray(drawn).tolist() == [[[160, 60, 50], [100, 0, 50]]]


def test_a_broken_image_is_named_and_the_others_are_drawn(finished, stripes, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG nothing")
    good = stripes / "test" / "images" / "1.png"
    output = tmp_path / "drawn"
    arguments = ("segment", "predict", finished / "best.safetensors", broken, good)
    said = refuse(capsys, *arguments, "--output", output)
    assert "broken.png: cannot be decoded" in said
    assert "1 of 2 images could not be decoded" in said
    assert [path.name for path in output.iterdir()] == ["1.png"]


def test_wrong_input_ends_in_one_line(finished, stripes, camvid, tmp_path, capsys):
    model, image = finished / "best.safetensors", stripes / "test" / "images" / "0.png"
    classifier = tmp_path / "classifier.safetensors"
    repvgg.save(repvgg.create_model("repvgg_digits", num_classes=10), classifier)
    for arguments, message in (
        (("segment", "evaluate", classifier, "--data", stripes), "a PSPNet is needed"),
        (("segment", "evaluate", model, "--data", f"camvid:{camvid}"), "the classes of"),
        (("segment", "predict", model), "at least one image"),
        (("segment", "predict", model, image, image), "written twice"),
        (("segment", "predict", model, image, "--opacity", "2"), "opacity"),
        (("segment", "train", "--output", tmp_path / "run", "--model", "pspnet_x"), "data"),
        (("evaluate", model, "--data", "digits"), "a network that classifies"),
        (("predict", model, image), "a network that classifies"),
        (("train", "--model", MODEL, "--data", "digits", "--output", tmp_path / "x"), "segment"),
    ):
        assert message in refuse(capsys, *arguments)


def test_train_goes_by_its_recipe(tmp_path, capsys):
    text = succeed(
        capsys, "segment", "train", "--recipe", "camvid", "--output", tmp_path, "--print-config"
    )
    assert json.loads(text) == SEGMENT_RECIPES["camvid"]().to_dict()
    text = succeed(capsys, "segment", "train", "--output", tmp_path, "--print-config")
    assert json.loads(text) == SegmentConfig().to_dict()


@pytest.mark.slow
def test_two_processes_share_the_steps_and_the_test(config, tmp_path):
    output, python = tmp_path / "run", Path(sys.executable)
    fields = {"model": MODEL, "width": 16, "data": config.data, "epochs": 2, "batch_size": 4}
    fields |= {"crop_size": 33, "workers": 0}
    flags = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    start = [python.with_name("torchrun"), "--standalone", "--nproc-per-node=2", "--no-python"]
    command = [*start, python.with_name("repvgg"), "segment", "train", "--output", str(output)]
    flags = [flag.replace("_", "-") if flag.startswith("--") else flag for flag in flags]
    result = subprocess.run(
        [*command, *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    network = repvgg.load(output / "last.safetensors")
    found = evaluate(network, evaluation_loader(open_scenes(config.data, "val")))
    row = history(output)[-1]
    assert row["test_miou"] == pytest.approx(found.miou, abs=2e-3)
    assert row["test_loss"] == pytest.approx(found.loss, rel=1e-3)

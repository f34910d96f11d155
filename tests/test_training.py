"""Config, optimizer, schedule and the loop, on the real digits."""

import csv
import dataclasses
import json
import math
import time
from typing import cast, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import repvgg
from repvgg.data.images import open_images
from repvgg.data.pack import Pack
from repvgg.errors import InputError
from repvgg.lean import IMPLEMENTATIONS
from repvgg.training.classification import build_network, open_both_splits
from repvgg.training.config import Implementation, TrainConfig
from repvgg.training.distributed import World
from repvgg.training.evaluation import evaluate, evaluation_loader, with_classes_of
from repvgg.training.loop import Run, train
from repvgg.training.optimizer import build_optimizers, schedule, set_rates
from repvgg.training.recipes import RECIPES, digits
from repvgg.training.setup import choose_device

ALONE = World(0, 1, torch.device("cpu"))
SHORT = dataclasses.replace(digits(), epochs=3, batch_size=256, base_batch_size=256, device="cpu")


def test_the_default_recipe_is_the_papers():
    config = RECIPES["imagenet-120"]()
    assert (config.epochs, config.batch_size, config.learning_rate) == (120, 256, 0.1)
    assert (config.momentum, config.weight_decay) == (0.9, 1e-4)
    assert config.augmentation == "crop-flip"


def test_the_cifar10_recipe_trains_a_whitened_network_of_at_most_2_5_million_parameters():
    config = dataclasses.replace(RECIPES["cifar10"](), epochs=1)
    images = open_images("digits", "train")
    network = build_network(config, dataclasses.replace(images, channels=3, decode=coloured))
    stem = network.get_parameter("stages.0.0.branches.conv3x3.conv.weight")
    assert [name for name, p in network.named_parameters() if not p.requires_grad] == [
        "stages.0.0.branches.conv3x3.conv.weight"
    ]
    assert torch.equal(stem[24:], -stem[:24])
    plain = repvgg.reparameterize(network)
    assert sum(p.numel() for p in plain.parameters()) == 2_102_090 <= 2_500_000


def test_the_other_branches_of_a_block_can_begin_smaller():
    images = open_images("digits", "train")
    networks = [
        build_network(dataclasses.replace(SHORT, branch_scale=scale), images)
        for scale in (1.0, 0.25)
    ]
    expected = networks[0].state_dict()
    for name, tensor in networks[1].state_dict().items():
        is_smaller = name.endswith(("conv1x1.bn.weight", "identity.bn.weight"))
        assert torch.equal(tensor, expected[name] * (0.25 if is_smaller else 1))
    # The stem's 1×1 branch has a batch norm, and no layer of this network lacks one.
    assert sum(name.endswith("conv1x1.bn.weight") for name in expected) > 3
    for block in ("plain", "only_3x3", "norm_after_addition"):
        with pytest.raises(InputError, match="branch_scale: blocks with several branches"):
            build_network(dataclasses.replace(SHORT, branch_scale=0.25, block=block), images)
    with pytest.raises(InputError, match="branch_scale: for a network without pretrained"):
        TrainConfig(branch_scale=0.1, pretrained="hub")


def coloured(index):
    """Random pixels."""
    pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "field", ["epochs", "batch_size", "learning_rate", "momentum", "weight_decay", "workers"]
)
def test_a_config_names_the_field_that_is_wrong(field):
    with pytest.raises(InputError, match=field):
        dataclasses.replace(TrainConfig(), **{field: -1})
    with pytest.raises(InputError, match="learning_rate"):
        TrainConfig(learning_rate=math.nan)


def test_the_rate_falls_along_half_a_cosine():
    shares = [schedule(TrainConfig(), epochs) for epochs in (0, 40, 60, 80, 120)]
    np.testing.assert_allclose(shares, [1, 0.75, 0.5, 0.25, 0], atol=1e-15)


def test_the_rate_rises_over_the_warm_up_and_scales_with_the_batch():
    config = TrainConfig(epochs=25, warmup_epochs=5, batch_size=1024)
    (optimizer,) = build_optimizers(nn.Linear(2, 2), config)
    rates = []
    for epochs in (0, 2.5, 5, 15, 25):
        set_rates([optimizer], schedule(config, epochs))
        rates.append([group["lr"] for group in optimizer.param_groups])
    np.testing.assert_allclose(
        rates, [[0, 0], [0.2, 0.2], [0.4, 0.4], [0.2, 0.2], [0, 0]], atol=1e-15
    )


def test_a_linear_schedule_falls_to_0_in_proportion():
    config = TrainConfig(epochs=25, warmup_epochs=5, schedule="linear")
    shares = [schedule(config, epochs) for epochs in (2.5, 5, 10, 15, 25)]
    np.testing.assert_allclose(shares, [0.5, 1, 0.75, 0.5, 0], atol=1e-15)


def test_nesterovs_momentum_is_on_if_asked_for_and_needs_a_momentum():
    model = repvgg.create_model("repvgg_digits", num_classes=10)
    for wanted in (True, False):
        (optimizer,) = build_optimizers(model, TrainConfig(nesterov=wanted))
        assert optimizer.defaults["nesterov"] is wanted
    with pytest.raises(InputError, match="nesterov: a momentum above 0 needed"):
        TrainConfig(nesterov=True, momentum=0)


def test_weight_decay_is_on_the_kernels_of_conv_and_linear_layers_only():
    model = repvgg.create_model("repvgg_digits", num_classes=10)
    (optimizer,) = build_optimizers(model, TrainConfig(weight_decay=0.01))
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.01, 0)
    assert {p.dim() for p in decayed["params"]} == {2, 4}
    assert {p.dim() for p in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_one_step_is_that_of_sgd_by_hand():
    """The loop's step against w ← w − lr · (g + wd · w), the first step of momentum."""
    network = repvgg.create_model("repvgg_digits", num_classes=10, in_chans=1)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    images = torch.randn(16, 1, 8, 8)
    labels = torch.arange(16) % 10
    (optimizer,) = build_optimizers(network, TrainConfig(learning_rate=0.5, weight_decay=0.01))
    F.cross_entropy(network(images), labels).backward()
    gradients = {name: cast(torch.Tensor, p.grad) for name, p in network.named_parameters()}
    optimizer.step()
    for name, p in network.named_parameters():
        decay = 0.01 if p.dim() > 1 else 0.0
        expected = before[name] - 0.5 * (gradients[name] + decay * before[name])
        torch.testing.assert_close(p.detach(), expected)


def csv_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "digits"
    train(SHORT, output)
    return output


def test_a_run_leaves_what_it_promises(finished):
    names = {path.name for path in finished.iterdir()}
    files = {"config.json", "history.csv", "history.png", "last.safetensors", "best.safetensors"}
    assert names == files | {"checkpoints", "tensorboard"}
    states = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert states == ["step-000000005.pt", "step-000000010.pt", "step-000000015.pt"]
    assert TrainConfig(**json.loads((finished / "config.json").read_text())) == SHORT
    with Image.open(finished / "history.png") as drawn:
        assert drawn.size > (500, 200)
    rows = csv_rows(finished / "history.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]


def test_the_history_tells_the_accuracy_of_the_files(finished):
    tops = [float(row["test_top1"]) for row in csv_rows(finished / "history.csv")]
    for name, expected in (("last", tops[-1]), ("best", max(tops))):
        network = repvgg.load(finished / f"{name}.safetensors")
        assert network.class_names == tuple("0123456789")
        result = evaluate(network, evaluation_loader(network, open_images("digits", "test")))
        assert result.top1 == pytest.approx(expected, abs=1e-5)


def test_evaluation_equals_a_direct_count(finished):
    network = repvgg.load(finished / "last.safetensors")
    images = open_images("digits", "test")
    pixels = torch.stack([torch.from_numpy(np.array(images.decode(i))) for i in range(360)])
    mean, std = network.preprocessing.mean[0], network.preprocessing.std[0]
    labels = torch.tensor(images.labels)
    with torch.no_grad():
        logits = network.double()((pixels[:, None].double() / 255 - mean) / std)
    network.float().train()
    result = evaluate(network, evaluation_loader(network, images, batch_size=77))
    assert network.training
    assert result.predictions.tolist() == logits.argmax(1).tolist()
    assert result.top1 == (logits.argmax(1) == labels).double().mean().item()
    ranks = (logits > logits[torch.arange(360), labels][:, None]).sum(1)
    assert result.top5 == pytest.approx((ranks < 5).double().mean().item())
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def one_epoch(run):
    run.received, run.kept_at = [], time.monotonic()
    run._train_epoch()
    run._end_epoch()


def test_a_run_that_goes_on_ends_with_the_same_bits(finished, tmp_path):
    one_epoch(Run(SHORT, tmp_path / "run", ALONE))
    train(SHORT, tmp_path / "run")
    expected = repvgg.load(finished / "last.safetensors").state_dict()
    found = repvgg.load(tmp_path / "run" / "last.safetensors").state_dict()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_a_damaged_state_is_passed_over_for_the_one_before(finished, tmp_path, capsys):
    run = Run(SHORT, tmp_path / "run", ALONE)
    one_epoch(run)
    one_epoch(run)
    newest = tmp_path / "run" / "checkpoints" / "step-000000010.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    again = Run(SHORT, tmp_path / "run", ALONE)
    assert len(again.history) == 1
    assert (
        "step-000000010.pt: cannot be read, going on from the one before" in capsys.readouterr().err
    )


def test_another_config_in_the_same_folder_is_refused_naming_the_fields(finished):
    before = (finished / "config.json").read_text()
    with pytest.raises(InputError, match=r"batch_size 256 → 64, epochs 3 → 5.*--restart"):
        train(dataclasses.replace(SHORT, epochs=5, batch_size=64), finished)
    assert (finished / "config.json").read_text() == before
    train(dataclasses.replace(SHORT, workers=1), finished)  # where it runs may change


@pytest.mark.parametrize("content", ["", "[]", "3", "[" * 100_000])
def test_a_config_that_is_none_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json: the settings of a run are needed"):
        train(SHORT, tmp_path)


def test_restart_begins_anew(tmp_path):
    one = dataclasses.replace(SHORT, epochs=1)
    train(dataclasses.replace(one, seed=1), tmp_path / "run")
    train(one, tmp_path / "run", restart=True)
    train(one, tmp_path / "other")
    found = repvgg.load(tmp_path / "run" / "last.safetensors").state_dict()
    expected = repvgg.load(tmp_path / "other" / "last.safetensors").state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_a_folder_with_other_files_is_not_taken(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for restart in (False, True):
        with pytest.raises(InputError, match="empty folder or one of a run"):
            train(SHORT, tmp_path, restart=restart)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    wild = dataclasses.replace(SHORT, learning_rate=1e30, augmentation="none")
    with pytest.raises(InputError, match=r"no longer a number at step \d+ of epoch \d"):
        train(wild, tmp_path / "run")


def image_folder(root, broken=0, count=12):
    for split in ("train", "val"):
        for label in range(2):
            (root / split / f"class{label}").mkdir(parents=True)
            for index in range(count):
                pixels = np.full((20, 24, 3), 60 + 120 * label + index % 40, dtype=np.uint8)
                path = root / split / f"class{label}" / f"{index:05}.png"
                Image.fromarray(pixels).save(path)
                if split == "train" and index < broken and label == 0:
                    path.write_bytes(b"broken")
    return root


FOLDER_CONFIG = TrainConfig(
    model="repvgg_cifar:widths=4-4-4-8,depths=1-1-1-1", epochs=1, batch_size=8, image_size=16
)


def test_a_folder_of_photographs_is_trained_on(tmp_path):
    root = image_folder(tmp_path / "data")
    folder = train(dataclasses.replace(FOLDER_CONFIG, data=str(root)), tmp_path / "run")
    network = repvgg.load(folder.best)
    assert network.class_names == ("class0", "class1")
    assert network.preprocessing.size == 16


def test_shards_are_trained_on_as_the_folder_is(tmp_path, capsys):
    root = image_folder(tmp_path / "data", count=40)
    Pack(root, tmp_path / "shards").run()
    capsys.readouterr()
    rows = {}
    for source in ("data", "shards"):
        config = dataclasses.replace(FOLDER_CONFIG, data=str(tmp_path / source), epochs=2)
        folder = train(config, tmp_path / f"run of {source}")
        rows[source] = folder.read_history()
        network = repvgg.load(folder.last)
        assert network.class_names == ("class0", "class1")
        result = evaluate(network, evaluation_loader(network, open_images(str(root), "test")))
        assert rows[source][-1]["test_top1"] == pytest.approx(result.top1, abs=1e-6)
        assert rows[source][-1]["test_loss"] == pytest.approx(result.loss, rel=1e-4, abs=1e-6)
        assert "going on at step 0 of epoch 3 of 2" not in capsys.readouterr().out
        train(config, tmp_path / f"run of {source}")
        assert "going on at step 0 of epoch 3 of 2" in capsys.readouterr().out


def test_too_many_broken_images_stop_the_run_naming_one(tmp_path):
    root = image_folder(tmp_path / "data", broken=1)
    with pytest.raises(InputError, match=r"0000\d\.png: cannot be decoded.*more than 1 in 1000"):
        train(dataclasses.replace(FOLDER_CONFIG, data=str(root)), tmp_path / "run")


def test_few_broken_images_are_left_out_and_named(tmp_path, capsys):
    root = image_folder(tmp_path / "data", broken=1, count=500)
    train(dataclasses.replace(FOLDER_CONFIG, data=str(root), batch_size=250), tmp_path / "run")
    assert "left out: " in capsys.readouterr().err


def test_a_broken_test_image_is_an_error(tmp_path):
    root = image_folder(tmp_path / "data")
    (root / "val" / "class1" / "00003.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"val/class1/00003\.png: cannot be decoded"):
        train(dataclasses.replace(FOLDER_CONFIG, data=str(root)), tmp_path / "run")


def test_classes_that_differ_between_the_splits_are_named(tmp_path):
    root = image_folder(tmp_path / "data")
    (root / "val" / "class1").rename(root / "val" / "klass1")
    with pytest.raises(InputError, match="class1, klass1 in one alone"):
        train(dataclasses.replace(FOLDER_CONFIG, data=str(root)), tmp_path / "run")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["val/ant", "val/bee"], "train/ and val/ are needed in it, .* found no train/"),
        (["ant", "bee"], "train/ and val/ are needed in it, .* found no train/"),
        (["train/ant", "train/bee"], "a folder val .* beside train is needed"),
        (["train/all", "val/all"], "2 classes or more are needed, found all alone"),
    ],
)
def test_folders_that_cannot_be_trained_on_are_named(folders, message, tmp_path):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "0.png")
    with pytest.raises(InputError, match=message):
        open_both_splits(str(tmp_path))


def test_other_images_than_the_run_was_begun_with_are_refused(tmp_path):
    root = image_folder(tmp_path / "data")
    config = dataclasses.replace(FOLDER_CONFIG, data=str(root))
    train(config, tmp_path / "run")
    (root / "train" / "class0" / "00000.png").unlink()
    with pytest.raises(InputError, match="begun with 24 images of 2 classes, found 23 of 2"):
        train(config, tmp_path / "run")


def test_classes_are_matched_by_name_then_by_order():
    images = open_images("digits", "test")
    network = repvgg.create_model("repvgg_digits", num_classes=12, in_chans=1)
    network.set_class_names([*"xy9876543210"])
    matched, note = with_classes_of(network, images)
    assert [12 - 1 - label for label in images.labels] == list(matched.labels)
    assert note == ""
    other = repvgg.create_model("repvgg_digits", num_classes=10, in_chans=1)
    assert with_classes_of(other, images)[0].labels == images.labels
    other.set_class_names([*"abcdefghij"])
    assert "by order: 0 is a" in with_classes_of(other, images)[1]
    network.set_class_names([*"abcdefghijkl"])
    with pytest.raises(InputError, match="10 classes, the network 12, and does not know 0, 1, 2"):
        with_classes_of(network, images)


def test_images_of_other_channels_are_refused():
    network = repvgg.create_model("repvgg_digits", num_classes=10)
    with pytest.raises(InputError, match="1 channels, the network needs 3"):
        evaluation_loader(network, open_images("digits", "test"))


def test_a_device_that_is_not_there_is_refused():
    assert choose_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="cuda"):
            choose_device("cuda")


OPTIONS = {
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "fp64": {"precision": "fp64"},
    "contiguous": {"channels_last": False},
    "accumulate": {"accumulate": 4},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "smoothing and mixup": {"label_smoothing": 0.1, "mixup": 0.2},
    "ema": {"ema_decay": 0.8},
    "warm-up": {"warmup_epochs": 1},
    "recomputed": {"implementation": "recompute_all"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_training_lowers_the_loss_with_every_option(options, tmp_path):
    config = dataclasses.replace(SHORT, epochs=2, batch_size=128, **options)
    history = train(config, tmp_path / "run").read_history()
    assert history[-1]["train_loss"] < 0.9 * history[0]["train_loss"]
    weights = repvgg.load(tmp_path / "run" / "last.safetensors").parameters()
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    assert {parameter.dtype for parameter in weights} == {dtype}


@pytest.mark.slow
def test_a_compiled_network_trains_as_an_eager_one(tmp_path):
    config = dataclasses.replace(SHORT, epochs=1, batch_size=128, precision="fp64")
    rows = [
        train(dataclasses.replace(config, compile=on), tmp_path / str(on)).read_history()[-1]
        for on in (False, True)
    ]
    assert rows[1]["train_loss"] == pytest.approx(rows[0]["train_loss"], rel=1e-5)
    assert rows[1]["test_top1"] == rows[0]["test_top1"]


def test_the_plain_network_of_a_trained_one_agrees_on_every_test_image(finished):
    network = repvgg.load(finished / "best.safetensors")
    plain = cast(repvgg.RepVGG, repvgg.reparameterize(network))
    loader = evaluation_loader(network, open_images("digits", "test"))
    before, after = evaluate(network, loader), evaluate(plain, loader)
    assert torch.equal(before.predictions, after.predictions)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules()) == 0


def test_the_implementations_are_those_there_are():
    assert set(get_args(Implementation)) == set(IMPLEMENTATIONS)


def weights_after(tmp_path, name, **options):
    config = dataclasses.replace(SHORT, epochs=1, precision="fp64", **options)
    return repvgg.load(train(config, tmp_path / name).last).state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"implementation": "branches"},
        {"implementation": "merged"},
        {"channels_last": False},
    ],
    ids=str,
)
def test_what_saves_time_or_memory_changes_no_result(options, tmp_path):
    expected, found = weights_after(tmp_path, "usual"), weights_after(tmp_path, "other", **options)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-8, atol=1e-10)

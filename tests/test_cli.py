"""The command line: what works, and one clear line for each thing that cannot."""

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import repvgg
from repvgg.cli import COMMANDS, main
from repvgg.training.config import TrainConfig
from repvgg.training.recipes import RECIPES

REPVGG = Path(sys.executable).with_name("repvgg")
NEEDED = {
    "quickstart": [],
    "train": [],
    "evaluate": ["model", "--data", "digits"],
    "convert": ["model", "output"],
    "predict": ["model", "image"],
    "profile": ["repvgg_a0"],
    "recipes": [],
    "pack": ["folder", "output"],
    "export": ["model", "output"],
    "ablate": [],
    "bench": ["model"],
    "compare": ["resnet18"],
    "reproduce": ["table4"],
    "segment": ["predict", "model", "image"],
}


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments):
    """The command line in this process, which saves the import of torch."""
    out, error = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = int(exit.code or 0)
    return Result(code, out.getvalue(), error.getvalue())


def run_process(*arguments, cwd=None):
    command = [REPVGG, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def succeed(*arguments):
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refuse(*arguments, run=run, **options):
    """What a command that ends with exit code 2 says on the standard error."""
    result = run(*arguments, **options)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    succeed(
        *("train", "--recipe", "digits", "--epochs", 2, "--batch-size", 128, "--seed", 3),
        *("--workers", 0, "--output", folder / "run"),
    )
    return folder / "run" / "best.safetensors"


@pytest.fixture(scope="module")
def digit(tmp_path_factory):
    from repvgg.data.images import open_images

    folder = tmp_path_factory.mktemp("digits")
    images = open_images("digits", "test")
    for index in range(12):
        images.decode(index).save(folder / f"{index:02}.png")
    return folder / "00.png"


def test_help_names_every_command_and_imports_no_torch():
    script = "import sys; sys.argv = ['repvgg', '--help']\nfrom repvgg.cli import main\n"
    script += "try: main()\nexcept SystemExit: print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.endswith("False\n")
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", [*COMMANDS, "segment"])
def test_every_command_explains_its_flags_and_refuses_unknown_ones(command):
    text = succeed(command, "--help")
    assert f"usage: repvgg {command}" in text
    assert "--no-such-flag" in refuse(command, *NEEDED[command], "--no-such-flag", "1")


def test_a_recipe_shows_its_own_defaults():
    assert "(default: repvgg_digits)" in succeed("train", "--recipe", "digits", "--help")
    assert "(default: 120)" in succeed("train", "--help")
    assert "sgdr" in refuse("train", "--recipe=sgdr", "--output", "x")


def test_recipes_are_listed_and_a_config_is_shown_whole():
    text = succeed("recipes")
    assert all(name in text for name in RECIPES)
    shown = succeed("train", "--recipe", "imagenet-200", "--print-config")
    config = TrainConfig(**json.loads(shown))
    assert config == RECIPES["imagenet-200"]()
    assert (config.epochs, config.warmup_epochs, config.label_smoothing) == (200, 5, 0.1)
    assert (config.mixup, config.augmentation) == (0.2, "autoaugment-crop-flip")


def test_a_run_without_output_is_named_after_recipe_and_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = "repvgg_digits:depths=1-1-1-1"
    text = succeed("train", "--recipe", "digits", "--epochs", 1, "--workers", 0, "--model", model)
    folder = Path("runs/digits-repvgg_digits-depths=1-1-1-1")
    assert f"models: {folder / 'best.safetensors'}" in text
    assert (folder / "last.safetensors").is_file()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --epochs 0", "--epochs: 1 or more needed, found 0"),
        ("train --recipe cifar10 --batch-size 1", "--batch-size: 2 or more needed, found 1"),
        ("ablate --auxiliary-weight -1", "--auxiliary-weight: 0 or more needed, found -1.0"),
        ("compare resnet18 --rounds 0", "--rounds: 1 or more needed, found 0"),
        (
            "reproduce table4 --runtime openvino --precision bf16",
            "--precision: openvino is measured in fp32 alone, found bf16",
        ),
    ],
)
def test_values_that_a_config_refuses_are_named_by_their_option_in_one_line(command, message):
    assert refuse(*command.split()) == f"repvgg: {message}\n"


def test_the_same_command_again_goes_on_and_another_is_refused(trained):
    train = ("train", "--recipe", "digits", "--batch-size", 128, "--seed", 3, "--output")
    assert "going on at step 0 of epoch 3 of 2" in succeed(*train, trained.parent, "--epochs", 2)
    assert "epochs 2 → 3" in refuse(*train, trained.parent, "--epochs", 3)


def test_convert_verifies_and_writes_a_plain_network_that_evaluates_alike(trained, tmp_path):
    plain = tmp_path / "plain.safetensors"
    text = succeed("convert", trained, plain, "--data", "digits")
    assert "8 blocks and 0 conv-BN pairs folded; nothing remains to fold" in text
    assert "verified on 360 images of digits" in text
    assert "top-1 agreement 100.00 % of 360" in text
    assert repvgg.load(plain).block == "plain"
    of_trained = succeed("evaluate", trained, "--data", "digits")
    of_plain = succeed("evaluate", plain, "--data", "digits", "--batch-size", 50)
    assert of_trained == of_plain
    assert "a training-time network is needed" in refuse("convert", plain, tmp_path / "x")


def test_convert_refuses_with_the_figures_and_writes_nothing(trained, tmp_path):
    output = tmp_path / "plain.safetensors"
    text = refuse("convert", trained, output, "--max-rel-error", "1e-12")
    assert "the networks differ: max abs error" in text
    assert "the first layer that differs is stages.0.0" in text
    assert list(tmp_path.iterdir()) == []


def test_convert_refuses_a_network_that_a_batch_norm_makes_infinite(trained, tmp_path):
    state = load_file(trained)
    state["stages.1.0.branches.conv3x3.bn.running_var"].fill_(-1)
    with_nan = tmp_path / "nan.safetensors"
    from safetensors import safe_open

    with safe_open(trained, "pt") as file:
        save_file(state, with_nan, metadata=file.metadata())
    assert "differ" in refuse("convert", with_nan, tmp_path / "plain.safetensors")
    assert not (tmp_path / "plain.safetensors").exists()


def test_a_weight_file_of_timm_is_converted_by_its_name(tmp_path):
    import timm

    torch.manual_seed(0)
    torch.save(timm.create_model("repvgg_a0", num_classes=4).state_dict(), tmp_path / "a0.pth")
    plain = tmp_path / "plain.safetensors"
    text = succeed("convert", tmp_path / "a0.pth", plain, "--name", "repvgg_a0")
    assert "train network in timm naming" in text
    assert repvgg.load(plain).num_classes == 4
    text = refuse("convert", tmp_path / "a0.pth", plain, "--name", "repvgg_b0")
    assert "not these weights" in text


def test_predict_names_classes_of_files_and_folders(trained, digit):
    lines = succeed("predict", trained, digit, digit.parent, "--top-k", 2).splitlines()
    assert len(lines) == 1 + 12
    assert lines[0] == lines[1]
    path, _, classes = lines[0].partition(": ")
    assert Path(path) == digit
    percentages = [float(entry.split()[1]) for entry in classes.split(", ")]
    assert len(percentages) == 2
    assert percentages[0] >= percentages[1]


def test_predict_goes_on_after_a_broken_image_and_ends_with_2(trained, digit, tmp_path):
    (tmp_path / "a.png").write_bytes(b"broken")
    (tmp_path / "b.png").write_bytes(digit.read_bytes())
    result = run("predict", trained, tmp_path)
    assert result.returncode == 2
    assert "a.png: cannot be decoded" in result.stderr
    assert "1 of 2 images could not be decoded" in result.stderr
    assert result.stdout.startswith(f"{tmp_path / 'b.png'}: ")


def test_profile_prints_layers_and_totals():
    text = succeed("profile", "repvgg_a0")
    assert "stages.4.0.conv" in text
    assert "8,309,384" in text
    trained_text = succeed("profile", "repvgg_a0:a=0.5,strides=1-2-2-2-2", "--block", "repvgg")
    assert "branches.conv1x1" in trained_text


def test_export_writes_onnx_that_agrees(trained, tmp_path):
    text = succeed("export", trained, tmp_path / "net.onnx")
    assert "equal in onnxruntime" in text
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    assert "ends in .onnx or .rvgg" in refuse("export", trained, tmp_path / "net.pt")


@pytest.fixture
def files(tmp_path, trained):
    (tmp_path / "empty").mkdir()
    (tmp_path / "data" / "train" / "a").mkdir(parents=True)
    (tmp_path / "data" / "train" / "b").mkdir()
    (tmp_path / "data" / "val" / "a").mkdir(parents=True)
    for split in ("train", "val"):
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / split / "a" / "0.png")
    (tmp_path / "cut.safetensors").write_bytes(trained.read_bytes()[:-100])
    (tmp_path / "text.safetensors").write_text("not a network at all")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("evaluate absent.safetensors --data digits", "absent.safetensors: a file is needed"),
        ("evaluate cut.safetensors --data digits", "cut.safetensors: not a complete safetensors"),
        ("evaluate text.safetensors --data digits", "text.safetensors: not a complete safetensors"),
        ("evaluate {model} --data nowhere", "nowhere: a folder of images is needed, found nothing"),
        (
            "evaluate {model} --data empty",
            "empty: a folder for each class is needed, found no folder in it",
        ),
        ("evaluate {model} --data data/val", "1 classes, the network 10, and does not know a"),
        ("evaluate {model} --data digits --batch-size 0", "batch-size: 1 or more needed"),
        ("convert {model} empty --data digits", "empty: a file name is needed, found a folder"),
        ("convert cut.safetensors out.safetensors", "cut.safetensors: not a complete"),
        ("predict {model} empty", "empty: holds no image"),
        ("predict {model} absent.jpg", "absent.jpg: an image or a folder of images is needed"),
        ("profile repvgg_z9", "'repvgg_z9' is unknown; one of repvgg_a0"),
        ("profile repvgg_a0:c=1", "no field 'c'"),
        ("profile repvgg_a0 --compact", "--compact: needs --engine"),
        ("profile repvgg_a0 --threads 2", "--threads: needs --engine"),
        ("profile {model} --block repvgg", "--block: is for a name, not a file"),
        ("train --data data --output run --model repvgg_cifar", "data/train: Found no valid file"),
        ("train --data nowhere --output run", "nowhere: a folder of images is needed"),
        ("train --output run", "data: a folder of images is needed"),
        ("train --data digits --output run --epochs 0", "epochs: 1 or more needed, found 0"),
        ("train --data digits --output run --epochs many", "epochs"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(files, trained, command, message, monkeypatch):
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    assert message in refuse(*command.format(model=trained).split())
    assert sorted(files.rglob("*")) == before


def test_a_real_process_behaves_alike(files, trained):
    text = refuse("evaluate", "absent.safetensors", "--data", "digits", run=run_process, cwd=files)
    assert text == "repvgg: absent.safetensors: a file is needed, found nothing\n"
    result = run_process("evaluate", trained, "--data", "digits", cwd=files)
    assert result.returncode == 0
    assert result.stdout == succeed("evaluate", trained, "--data", "digits")


def test_a_broken_pipe_is_no_error(trained, digit):
    command = f"{REPVGG} predict {trained} {digit.parent} | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert result.stdout.startswith(str(digit))
    assert result.stderr == ""

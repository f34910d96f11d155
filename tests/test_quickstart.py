"""The whole of it, as a user runs it."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import repvgg
from repvgg.data.images import open_images
from repvgg.export.onnx import run_onnx
from repvgg.quickstart import _as_batch


@pytest.mark.slow
def test_quickstart_ends_with_two_networks_that_are_the_same(tmp_path):
    command = [Path(sys.executable).with_name("repvgg"), "quickstart"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    folder = tmp_path / "quickstart"
    network = repvgg.load(folder / "run" / "best.safetensors")
    plain = repvgg.load(folder / "plain.safetensors")
    inputs, labels = _as_batch(open_images("digits", "test"), network)
    with torch.inference_mode():
        logits = [network(inputs), plain(inputs), run_onnx(folder / "plain.onnx", inputs)]
    classes = [part.argmax(1) for part in logits]
    assert torch.equal(classes[0], classes[1])
    assert torch.equal(classes[0], classes[2])
    right = int((classes[0] == labels).sum())
    assert right / len(labels) >= 0.98
    assert re.search(rf"test accuracy .*\({right} of 360\).*\({right} of 360\)", result.stdout)
    assert "360 of 360" in result.stdout
    with Image.open(folder / "quickstart.png") as figure:
        assert figure.size > (1000, 300)
    with open(folder / "run" / "history.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 30

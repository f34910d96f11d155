"""Files of networks: round trips, and files that are damaged, hostile or of something else."""

import json
import os
import stat
import struct
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import repvgg
from repvgg.spec import Spec

SPEC = Spec((1, 2, 1), widths=(8, (8, 12), 16), strides=(1, 2, 2), groups=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    network: Any = repvgg.create_model(SPEC, num_classes=3, class_names=["ant", "bee", "cicada"])
    with torch.no_grad():
        network(torch.randn(8, 3, 16, 16))  # running statistics that are not the initial ones
    return network


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["train", "plain"])
def test_a_saved_network_comes_back_whole_from_its_path_alone(model, dtype, form, tmp_path):
    network: Any = model if form == "train" else repvgg.reparameterize(model)
    network.to(dtype)
    path = tmp_path / "new folder" / "net.safetensors"
    repvgg.save(network, path)
    loaded = repvgg.load(path)
    assert loaded.config() == network.config()
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
        assert tensor.dtype == loaded.state_dict()[name].dtype


def test_a_channels_last_network_in_a_wrapper_is_saved(model, tmp_path):
    wrapped = nn.DataParallel(model.to(memory_format=torch.channels_last))
    repvgg.save(wrapped, tmp_path / "net.safetensors")
    images = torch.randn(2, 3, 16, 16)
    expected = model.eval()(images)
    torch.testing.assert_close(repvgg.load(tmp_path / "net.safetensors")(images), expected)


def test_a_file_can_be_read_by_others_as_the_umask_says(model, tmp_path):
    repvgg.save(model, tmp_path / "net.safetensors")
    (tmp_path / "other").touch()
    modes = [stat.S_IMODE(os.stat(tmp_path / n).st_mode) for n in ("net.safetensors", "other")]
    assert modes[0] == modes[1]


def test_saving_refuses_what_could_not_be_loaded(model, tmp_path):
    path = tmp_path / "net.safetensors"
    with pytest.raises(repvgg.InputError, match="RepVGG is needed, found a Linear"):
        repvgg.save(nn.Linear(2, 2), path)
    model.stages[0][0].branches.conv1x1 = nn.Identity()
    with pytest.raises(repvgg.InputError, match=r"6 missing: stages.0.0.branches.conv1x1"):
        repvgg.save(model, path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda block: setattr(block, "activation", nn.SiLU()),
            r"stages\.1\.0\.activation is ReLU; found SiLU",
        ),
        (
            lambda block: setattr(block.branches.conv3x3.bn, "eps", 0.1),
            r"stages\.1\.0\.branches\.conv3x3\.bn is batch norm, eps=1e-05; found .* eps=0\.1",
        ),
        (
            lambda block: setattr(block.branches.conv3x3.conv, "dilation", (2, 2)),
            r"stages\.1\.0\.branches\.conv3x3\.conv is Conv2d\(.*\); found .* dilation=\(2, 2\)",
        ),
    ],
)
def test_saving_refuses_what_a_file_would_not_keep(model, change, message, tmp_path):
    change(model.stages[1][0])
    with pytest.raises(repvgg.InputError, match=message):
        repvgg.save(model, tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_saving_refuses_a_plain_network_of_another_activation(model, tmp_path):
    model.stages[1][0].activation = nn.SiLU()
    plain = repvgg.reparameterize(model)
    with pytest.raises(repvgg.InputError, match=r"stages\.1\.0\.relu is ReLU; found not there"):
        repvgg.save(plain, tmp_path / "net.safetensors")


def test_all_forms_of_batch_norm_and_relu_are_saved_alike(model, tmp_path):
    from repvgg.training.distributed import synchronized

    synchronized(model, torch.device("cpu"))
    model.stages[1][0].activation = nn.ReLU()
    repvgg.save(model, tmp_path / "net.safetensors")
    images = torch.randn(2, 3, 16, 16)
    expected = model.eval()(images)
    torch.testing.assert_close(repvgg.load(tmp_path / "net.safetensors")(images), expected)


def test_a_failed_save_leaves_the_earlier_file(model, tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    repvgg.save(model, path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        repvgg.save(model, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused_by_name(model, tmp_path, share):
    path = tmp_path / "net.safetensors"
    repvgg.save(model, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(repvgg.InputError, match=r"net\.safetensors: not a complete safetensors"):
        repvgg.load(path)


def rewritten(path, **changes):
    """The file with other fields in its description."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    description = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["repvgg"])
    metadata = {"repvgg": json.dumps({**description, **changes})}
    save_file(load_file(path), path, metadata=metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "format 1 needed"),
        ({"spec": 5}, "spec: fields"),
        ({"spec": {"depths": [10**9]}}, "depths"),
        ({"spec": {"depths": [1, 1], "strides": [1, 1], "widths": [8, 10**12]}}, "widths of stage"),
        ({"spec": {"depths": [1, 1], "widths": [8, 8]}}, "strides=.*: one for each of the 2"),
        ({"num_classes": 10**9}, "num_classes"),
        ({"num_classes": 4}, "class_names: a list of 4"),
        ({"class_names": "abc"}, "class_names"),
        ({"in_chans": -1}, "in_chans|channels"),
        ({"drop_rate": "x"}, "drop_rate"),
        ({"block": "os.system"}, "block"),
        ({"preprocessing": {"size": 10**9}}, "size"),
        ({"preprocessing": {"crop_pct": float("nan")}}, "crop_pct"),
        ({"extra": 1}, "fields"),
    ],
)
def test_a_description_that_lies_is_refused_naming_the_field(model, tmp_path, changes, message):
    path = tmp_path / "net.safetensors"
    repvgg.save(model, path)
    rewritten(path, **changes)
    with pytest.raises(repvgg.InputError, match=message):
        repvgg.load(path)


def test_a_description_of_a_huge_network_takes_no_memory(model, tmp_path):
    path = tmp_path / "net.safetensors"
    repvgg.save(model, path)
    rewritten(path, spec={"depths": [1, 900, 1], "strides": [1, 1, 1], "widths": [65536] * 3})
    with pytest.raises(repvgg.InputError, match="not these weights"):
        repvgg.load(path)


def test_deeply_nested_json_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"repvgg": "[" * 100_000})
    with pytest.raises(repvgg.InputError, match="not JSON"):
        repvgg.load(path)


def test_a_file_without_spec_points_to_load_weights(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(repvgg.InputError, match="load_weights"):
        repvgg.load(path)
    with pytest.raises(repvgg.InputError, match="found nothing"):
        repvgg.load(tmp_path / "absent.safetensors")


def test_the_hub_mixin_saves_and_loads_a_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = repvgg.RepVGG.from_pretrained(tmp_path)
    assert loaded.config() == model.config()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), model.eval()(images))

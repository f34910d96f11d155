"""Weights of timm and of the authors, proven on files made with timm's own RepVGG."""

import io
import pickle
import subprocess
import sys
import warnings
import zipfile
from typing import Any, cast

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils.model import reparameterize_model
from torch import nn

import repvgg
from repvgg.checkpoint import network_from_weights

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def timm_model(randomized):
    torch.manual_seed(0)
    return randomized(timm.create_model("repvgg_a0", num_classes=10)).eval()


@pytest.fixture(scope="module")
def timm_plain(randomized):
    torch.manual_seed(0)
    model = randomized(timm.create_model("repvgg_a0", num_classes=10)).eval()
    return reparameterize_model(model)


def authors_names(state):
    """timm's names → the authors', written from the naming in the authors' code."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in (
            ("conv_kxk", "rbr_dense"),
            ("conv_1x1", "rbr_1x1"),
            ("identity", "rbr_identity"),
            ("reparam_conv", "rbr_reparam"),
            ("stages.3.", "stage4."),
            ("stages.2.", "stage3."),
            ("stages.1.", "stage2."),
            ("stages.0.", "stage1."),
            ("stem.", "stage0."),
            ("head.fc.", "linear."),
        ):
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


WRAPPINGS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state},
    "module.": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "all": lambda state: {"state_dict": {f"module._orig_mod.{n}": t for n, t in state.items()}},
}


@pytest.mark.parametrize(
    ("form", "naming", "wrapping"),
    [
        ("train", "timm", "bare"),
        ("plain", "timm", "state_dict"),
        ("train", "authors", "module."),
        ("plain", "authors", "model"),
        ("plain", "authors", "all"),
    ],
)
def test_logits_equal_timms(
    timm_model, timm_plain, form, naming, wrapping, relative_error, tmp_path
):
    source = timm_model if form == "train" else timm_plain
    state = source.state_dict()
    state = authors_names(state) if naming == "authors" else state
    path = tmp_path / "weights.pth"
    torch.save(WRAPPINGS[wrapping](state), path)
    block = "repvgg" if form == "train" else "plain"
    model = repvgg.create_model("repvgg_a0", num_classes=10, block=block).eval()
    found = repvgg.load_weights(model, path)
    assert (found.naming, found.form, found.converted, found.head_note) == (naming, form, False, "")
    with torch.no_grad():
        assert relative_error(source(IMAGES), model(IMAGES)) <= 1e-5


@pytest.mark.parametrize("name", ["repvgg_b1g4", "repvgg_a1"])
def test_groupwise_and_other_variants_equal_timms(name, randomized, tmp_path):
    torch.manual_seed(0)
    source = randomized(timm.create_model(name, num_classes=7)).eval()
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    network, found = network_from_weights(name, path)
    assert found.naming == "timm"
    with torch.no_grad():
        # In fp64, since these deep random networks amplify the rounding of fp32.
        logits, expected = network.double()(IMAGES.double()), source.double()(IMAGES.double())
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_training_time_weights_are_folded_into_a_plain_model(timm_model, relative_error, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm_model.state_dict(), path)
    plain = repvgg.create_model("repvgg_a0", num_classes=10, block="plain").eval()
    assert repvgg.load_weights(plain, path).converted
    with torch.no_grad():
        assert relative_error(timm_model(IMAGES), plain(IMAGES)) <= 1e-5


def test_plain_weights_do_not_fill_a_training_time_model(timm_plain, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm_plain.state_dict(), path)
    with pytest.raises(repvgg.InputError, match="block='plain'"):
        repvgg.load_weights(repvgg.create_model("repvgg_a0", num_classes=10), path)


def test_our_own_file_is_read_too(tmp_path):
    model = repvgg.create_model("repvgg_digits", num_classes=10)
    repvgg.save(model, tmp_path / "net.safetensors")
    other = repvgg.create_model("repvgg_digits", num_classes=10)
    assert repvgg.load_weights(other, tmp_path / "net.safetensors").naming == "repvgg"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def test_another_number_of_classes_keeps_the_models_head_and_says_so(
    timm_model, relative_error, tmp_path
):
    path = tmp_path / "weights.pth"
    torch.save(timm_model.state_dict(), path)
    model = repvgg.create_model("repvgg_a0", num_classes=3).eval()
    head = model.state_dict()["classifier.weight"].clone()
    with pytest.warns(UserWarning, match="10 classes, the model 3: its linear layer stays"):
        repvgg.load_weights(model, path)
    assert torch.equal(model.state_dict()["classifier.weight"], head)
    with torch.no_grad():
        expected = cast(Any, timm_model).forward_features(IMAGES)
        features = model.forward_features(IMAGES)
    assert relative_error(expected, features) <= 1e-5


def test_missing_unknown_and_misshapen_tensors_are_named_and_nothing_is_loaded(tmp_path):
    source = timm.create_model("repvgg_a0", num_classes=10).state_dict()
    path = tmp_path / "weights.pth"
    model = repvgg.create_model("repvgg_a0", num_classes=10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changes = {
        "1 missing: stages.1.0.branches.conv3x3.conv.weight": {
            "stages.0.0.conv_kxk.conv.weight": 0
        },
        "1 not of this network: stages.9.0.se.weight": {"stages.8.0.se.weight": torch.zeros(1)},
        r"classifier.bias: shape \(10,\) needed, found \(11,\)": {"head.fc.bias": torch.zeros(11)},
    }
    for message, change in changes.items():
        state = {k: v for k, v in {**source, **change}.items() if isinstance(v, torch.Tensor)}
        torch.save(state, path)
        with pytest.raises(repvgg.InputError, match=message):
            repvgg.load_weights(model, path)
    for name, tensor in before.items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_another_variant_is_refused(timm_model, tmp_path):
    torch.save(timm_model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(repvgg.InputError, match=r"shape \(64, 3, 3, 3\) needed, found \(48, 3, 3"):
        repvgg.load_weights(
            repvgg.create_model("repvgg_a1", num_classes=10), tmp_path / "weights.pth"
        )


def test_something_that_is_no_repvgg_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(repvgg.InputError, match="tensor names of a RepVGG"):
        repvgg.load_weights(repvgg.create_model("repvgg_a0"), tmp_path / "weights.pth")


class Hostile:
    """Unpickled by a careless reader, this writes a file."""

    def __reduce__(self):
        return (exec, ("open('pwned', 'w').close()",))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"state_dict": Hostile()}),
        pickle.dumps({"a": 1}),
        pickle.dumps([torch.zeros(1)]),
        b"",
        b"no pickle at all",
    ],
)
def test_hostile_and_damaged_pickles_are_refused_and_run_nothing(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(repvgg.InputError, match=r"weights\.pth"):
        repvgg.load_weights(repvgg.create_model("repvgg_digits"), tmp_path / "weights.pth")
    assert not (tmp_path / "pwned").exists()


def test_a_truncated_pickle_is_refused(timm_model, tmp_path):
    buffer = io.BytesIO()
    torch.save(timm_model.state_dict(), buffer)
    (tmp_path / "weights.pth").write_bytes(buffer.getvalue()[:-1000])
    with pytest.raises(repvgg.InputError, match="damaged"):
        repvgg.load_weights(repvgg.create_model("repvgg_a0"), tmp_path / "weights.pth")


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10_000_000))
    with pytest.raises(repvgg.InputError, match="compressed"):
        repvgg.load_weights(repvgg.create_model("repvgg_digits"), path)


OFFLINE_SCRIPT = """
import sys, torch, repvgg
model = repvgg.create_model("repvgg_a0", pretrained=True).eval()
torch.save((model(torch.load(sys.argv[1], weights_only=True)), model.class_names), sys.argv[2])
"""


def test_pretrained_comes_from_the_hubs_offline_cache(randomized, relative_error, tmp_path):
    torch.manual_seed(0)
    source = randomized(timm.create_model("repvgg_a0")).eval()
    folder = tmp_path / "hub" / "models--timm--repvgg_a0.rvgg_in1k"
    revision = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    (folder / "snapshots" / revision).mkdir(parents=True)
    save_file(source.state_dict(), folder / "snapshots" / revision / "model.safetensors")
    torch.save(IMAGES, tmp_path / "images.pt")
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "PATH": ""}
    command = [sys.executable, "-c", OFFLINE_SCRIPT, tmp_path / "images.pt", tmp_path / "out.pt"]
    subprocess.run(command, check=True, env=environment)
    logits, names = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.no_grad():
        assert relative_error(source(IMAGES), logits) <= 1e-5
    assert names[0] == "tench"
    assert len(names) == 1000

    failed = subprocess.run(
        [sys.executable, "-c", "import repvgg; repvgg.create_model('repvgg_a1', pretrained=True)"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "timm/repvgg_a1.rvgg_in1k is neither in the hub's cache" in failed.stderr


def test_pretrained_of_a_network_without_published_weights_is_refused():
    with warnings.catch_warnings(), pytest.raises(repvgg.InputError, match="no published weights"):
        repvgg.create_model("repvgg_b1g2", pretrained=True)

"""ONNX files against torch, at other batch sizes, and for models that are not ours."""

import onnx
import pytest
import torch
from torch import nn

import repvgg
from repvgg.errors import InputError
from repvgg.export.onnx import export_onnx, require, run_onnx

SPEC = repvgg.Spec((1, 2, 1), widths=(8, 12, 16), strides=(1, 2, 2), groups=2)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_onnxruntime_gives_the_logits_of_torch(batch, randomized, tmp_path):
    torch.manual_seed(0)
    model = randomized(repvgg.create_model(SPEC, num_classes=5)).eval()
    images = torch.randn(batch, 3, 32, 32)
    export_onnx(model, tmp_path / "net.onnx", torch.zeros(1, 3, 32, 32))
    with torch.inference_mode():
        torch.testing.assert_close(
            run_onnx(tmp_path / "net.onnx", images), model(images), rtol=1e-4, atol=1e-5
        )


def test_the_file_holds_a_plain_network_alone(tmp_path):
    export_onnx(repvgg.create_model("repvgg_digits", num_classes=10), tmp_path / "net.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Conv") == kinds.count("Relu") == 8
    assert not set(kinds) & {"BatchNormalization", "Add"}


def test_what_could_not_be_folded_is_said(tmp_path):
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)).eval()
    with pytest.warns(UserWarning, match="not folded: 1 \\(BatchNorm2d\\)"):
        export_onnx(model, tmp_path / "net.onnx", torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match="`image`, an example"):
        export_onnx(nn.Sequential(nn.ReLU()), tmp_path / "other.onnx")


def test_a_file_that_is_no_onnx_is_refused(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"net\.onnx: not a usable ONNX model"):
        run_onnx(tmp_path / "net.onnx", torch.zeros(1, 3, 8, 8))


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    with pytest.raises(InputError, match=r"no_such_package needed.*pip install 'repvgg\[export\]'"):
        require("torch", "no_such_package")

"""PSPNets: strides, dilations and parameters by hand, conversion, files, backbones, ONNX."""

import json
import struct
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import repvgg
from repvgg.costs import cost
from repvgg.errors import InputError
from repvgg.export.onnx import export_onnx, run_onnx
from repvgg.preprocessing import Preprocessing
from repvgg.segmentation.dilated import PSPNETS, dilated
from repvgg.segmentation.pspnet import PSPNet, PyramidPooling, interpolation, pooled
from repvgg.spec import VARIANTS, Spec, list_models, parse_spec

SMALL = Spec((1, 1, 2, 6, 1), widths=(4, 8, 8, 12, 16), groups=2)
ROWS = (
    "pspnet_repvgg_b1g2_fast",
    "pspnet_resnet50",
    "pspnet_repvgg_b1g2",
    "pspnet_repvgg_b2_fast",
    "pspnet_resnet101",
    "pspnet_repvgg_b2",
)


def small(randomized, **options) -> Any:
    torch.manual_seed(0)
    options = {"num_classes": 5, "width": 8, **options}
    return randomized(PSPNet(dilated(SMALL, fast=True), **options)).eval()


def on_meta(name, **options) -> Any:
    with torch.device("meta"):
        return repvgg.create_model(name, **options)


def test_every_variant_of_the_paper_has_both_forms():
    names = list_models("pspnet*")
    assert {f"pspnet_{name}{form}" for name in VARIANTS for form in ("", "_fast")} <= set(names)
    assert set(ROWS) <= set(names) == set(PSPNETS)
    assert repvgg.create_model("pspnet_repvgg_a0:a=0.25,b=0.25").num_classes == 19


@pytest.mark.parametrize(
    ("name", "fourth"),
    [
        ("pspnet_repvgg_b1g2", [2] * 16),
        ("pspnet_repvgg_b1g2_fast", [1] * 12 + [2] * 4),
        ("pspnet_repvgg_b2", [2] * 16),
        ("pspnet_repvgg_b2_fast", [1] * 12 + [2] * 4),
        ("pspnet_repvgg_a0_fast", [1] * 10 + [2] * 4),
    ],
)
@pytest.mark.parametrize("form", ["train", "plain"])
def test_dilations_and_strides_of_each_layer(name, fourth, form):
    network = on_meta(name)
    if form == "plain":
        network = repvgg.reparameterize(network)
    depths = parse_spec(name.removeprefix("pspnet_").removesuffix("_fast")).depths
    dilations = [1] * depths[0] + [1] * depths[1] + [1] * depths[2] + fourth + [4]
    starts = {0, depths[0], sum(depths[:2])}
    strides = [2 if index in starts else 1 for index in range(sum(depths))]
    convs = [m for m in network.stages.modules() if isinstance(m, nn.Conv2d)]
    of_3x3 = [conv for conv in convs if conv.kernel_size == (3, 3)]
    assert [conv.dilation for conv in of_3x3] == [(d, d) for d in dilations]
    assert [conv.padding for conv in of_3x3] == [(d, d) for d in dilations]
    assert [conv.stride for conv in of_3x3] == [(s, s) for s in strides]


@pytest.mark.parametrize(("name", "depth"), [("pspnet_resnet50", 6), ("pspnet_resnet101", 23)])
def test_the_official_resnet_is_dilated_from_its_first_block_on(name, depth):
    stages = on_meta(name).stages
    middle = {
        index: [m for n, m in stages[index].named_modules() if n.endswith("conv2")]
        for index in range(1, 5)
    }
    assert [len(convs) for convs in middle.values()] == [3, 4, depth, 3]
    for index, (first, dilation) in {1: (1, 1), 2: (2, 1), 3: (1, 2), 4: (1, 4)}.items():
        assert {conv.dilation for conv in middle[index]} == {(dilation, dilation)}
        assert {conv.padding for conv in middle[index]} == {(dilation, dilation)}
        assert [conv.stride for conv in middle[index]] == [(first, first)] + [(1, 1)] * (
            len(middle[index]) - 1
        )
    stem = [m.out_channels for m in stages[0].modules() if isinstance(m, nn.Conv2d)]
    assert stem == [64, 64, 128]


@pytest.mark.parametrize("name", ROWS)
def test_the_output_stride_is_8(name):
    network = on_meta(name)
    assert network.feature_info.reduction() == [8, 8]
    before, last = network.backbone(torch.empty(1, 3, 713, 713, device="meta"))
    assert before.shape[-2:] == last.shape[-2:] == (90, 90)
    logits = network.eval()(torch.empty(1, 3, 713, 713, device="meta"))
    assert logits.shape == (1, 19, 713, 713)


def of_heads(before, last, width=512, classes=19):
    """Parameters of a folded pyramid and head, each convolution with its bias."""
    reduced = last // 4
    pyramid = 4 * (last * reduced + reduced)
    return pyramid + 2 * last * width * 9 + width + width * classes + classes


@pytest.mark.parametrize(
    ("name", "before", "last"),
    [
        ("repvgg_b1g2", 512, 2048),
        ("repvgg_b2", 640, 2560),
        ("resnet50", 1024, 2048),
        ("resnet101", 1024, 2048),
    ],
)
def test_parameters_of_the_six_rows_are_those_of_the_backbone_and_of_the_heads(name, before, last):
    """Against timm's networks, and the published PSPNet's layers counted by hand."""
    if name.startswith("repvgg"):
        plain = repvgg.create_model(name, num_classes=0, block="plain")
        backbone = sum(p.numel() for p in plain.parameters())
        backbone_names = [f"pspnet_{name}", f"pspnet_{name}_fast"]
    else:
        # timm's `s` networks have the stem of the official PSPNet. Folding takes from each batch
        # norm its scale and shift, and gives its convolution a bias.
        theirs = timm.create_model(f"{name}s", num_classes=0)
        norms = [m for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)]
        backbone = sum(p.numel() for p in theirs.parameters())
        backbone -= sum(norm.num_features for norm in norms)
        backbone_names = [f"pspnet_{name}"]
    for pspnet in backbone_names:
        network = on_meta(pspnet)
        trained = sum(p.numel() for p in network.auxiliary.parameters())
        assert trained == before * 256 * 9 + 2 * 256 + 256 * 19 + 19
        found = cost(repvgg.reparameterize(network), 65)
        assert found.params == backbone + of_heads(before, last)


@given(
    bins=st.sampled_from([1, 2, 3, 6]),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
)
@settings(max_examples=40, deadline=None)
def test_pooling_is_that_of_torch(bins, height, width):
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    torch.testing.assert_close(pooled(x, bins), F.adaptive_avg_pool2d(x, bins))


def test_the_pyramid_keeps_its_input_and_adds_a_quarter_for_each_level():
    pyramid = PyramidPooling(8).eval()
    x = torch.randn(1, 8, 9, 7)
    result = pyramid(x)
    assert result.shape == (1, 16, 9, 7)
    assert torch.equal(result[:, :8], x)
    # The first level is one value a channel: what its layers make of the mean of x.
    reduction: Any = pyramid.reductions[0]
    expected = reduction(x.mean((2, 3), keepdim=True)).expand(1, 2, 9, 7)
    torch.testing.assert_close(result[:, 8:10], expected)


@pytest.mark.parametrize("size", [(713, 713), (131, 97), (33, 64), (9, 9)])
def test_the_whole_network_is_converted(size, randomized, relative_error):
    network = small(randomized)
    conversion = repvgg.convert(network)
    assert not conversion.remaining
    assert (len(conversion.blocks), len(conversion.pairs)) == (11, 5)
    images = torch.randn(1, 3, *size)
    with torch.inference_mode():
        expected = network(images)
        assert expected.shape == (1, 5, *size)
        assert relative_error(expected, conversion.model(images)) < 1e-5
    kinds = {type(module) for module in conversion.model.modules()}
    assert nn.BatchNorm2d not in kinds
    assert conversion.model.auxiliary is None
    assert network.auxiliary is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pspnet_repvgg_b1g2_fast", "pspnet_repvgg_b1g2"])
@pytest.mark.parametrize("size", [(713, 713), (187, 233)])
def test_a_row_of_table_8_is_converted(name, size, randomized, relative_error):
    torch.manual_seed(0)
    network = randomized(repvgg.create_model(name)).eval()
    plain = repvgg.reparameterize(network)
    images = torch.randn(1, 3, *size)
    with torch.inference_mode():
        assert relative_error(network(images), plain(images)) < 1e-5


def test_a_resnet_pspnet_is_folded(relative_error):
    network = repvgg.create_model("pspnet_resnet50", num_classes=3).eval()
    conversion = repvgg.convert(network)
    assert not conversion.remaining
    images = torch.randn(1, 3, 65, 49)
    with torch.inference_mode():
        assert relative_error(network(images), conversion.model(images)) < 1e-5


def test_both_heads_speak_in_training_alone(randomized):
    network = small(randomized).train()
    images = torch.randn(2, 3, 41, 33)
    logits, auxiliary = network(images)
    assert logits.shape == auxiliary.shape == (2, 5, 41, 33)
    assert not torch.allclose(logits, auxiliary)
    plain = repvgg.reparameterize(network).train()
    assert plain(images).shape == (2, 5, 41, 33)


@pytest.mark.parametrize("form", ["train", "plain"])
def test_a_file_holds_the_whole_network(form, randomized, tmp_path):
    network = small(randomized, class_names=list("abcde"), preprocessing=Preprocessing(size=97))
    if form == "plain":
        network = repvgg.reparameterize(network)
    repvgg.save(network, tmp_path / "net.safetensors")
    loaded = repvgg.load(tmp_path / "net.safetensors")
    assert isinstance(loaded, PSPNet)
    assert loaded.config() == network.config()
    assert loaded.config()["block"] == {"train": "repvgg", "plain": "plain"}[form]
    images = torch.randn(1, 3, 50, 61)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), network(images))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "os.system"}, "architecture one of"),
        ({"architecture": ["pspnet"]}, "architecture one of"),
        ({"architecture": "repvgg"}, "fields"),
        ({"backbone": "resnet9000"}, "backbone"),
        ({"backbone": 5}, "spec: fields"),
        ({"backbone": {"depths": [10**9]}}, "depths"),
        ({"backbone": dilated(SMALL).to_dict() | {"dilations": [1, 1, 1, 10**9, 1]}}, "dilations"),
        ({"backbone": dilated(SMALL).to_dict() | {"widths": [65536] * 5}}, "not these weights"),
        ({"num_classes": 10**6}, "num_classes"),
        ({"width": 10**9}, "width"),
        ({"drop_rate": "x"}, "drop_rate"),
        ({"block": ["plain"]}, "block"),
        ({"in_chans": -1}, "in_chans"),
        ({"class_names": ["a"]}, "class_names"),
        ({"extra": 1}, "fields"),
    ],
)
def test_a_description_that_lies_is_refused(changes, message, randomized, tmp_path):
    path = tmp_path / "net.safetensors"
    repvgg.save(small(randomized), path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    description = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["repvgg"])
    metadata = {"repvgg": json.dumps({**description, **changes})}
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(InputError, match=message):
        repvgg.load(path)


def test_the_backbone_begins_with_the_weights_of_a_classification_network(tmp_path, randomized):
    spec = "repvgg_small:strides=1-2-2-2-1"
    classifier = randomized(repvgg.create_model(spec, num_classes=10)).eval()
    repvgg.save(classifier, tmp_path / "classifier.safetensors")
    network: Any = repvgg.create_model("pspnet_repvgg_small", num_classes=5)
    network.load_backbone(tmp_path / "classifier.safetensors")
    theirs = classifier.stages.state_dict()
    assert theirs.keys() == network.stages.state_dict().keys()
    assert all(torch.equal(t, theirs[n]) for n, t in network.stages.state_dict().items())
    other: Any = repvgg.create_model("pspnet_repvgg_a0:a=0.25,b=0.25")
    with pytest.raises(InputError, match="not these weights"):
        other.load_backbone(tmp_path / "classifier.safetensors")
    with pytest.raises(InputError, match="for a RepVGG, not for resnet50"):
        on_meta("pspnet_resnet50").load_backbone(tmp_path / "classifier.safetensors")


@pytest.mark.parametrize(
    ("name", "reductions", "channels"),
    [
        ("pspnet_repvgg_a0", [2, 4, 8, 8, 8], [48, 48, 96, 192, 1280]),
        ("pspnet_repvgg_a0_fast", [2, 4, 8, 8, 8], [48, 48, 96, 192, 1280]),
        ("pspnet_resnet50", [4, 4, 8, 8, 8], [128, 256, 512, 1024, 2048]),
        ("repvgg_a0", [2, 4, 8, 16, 32], [48, 48, 96, 192, 1280]),
    ],
)
def test_other_heads_can_take_the_features_of_any_stage(name, reductions, channels):
    backbone = on_meta(name, features_only=True)
    assert backbone.feature_info.reduction() == reductions
    assert backbone.feature_info.channels() == channels
    features = backbone(torch.empty(2, 3, 64, 96, device="meta"))
    for feature, reduction, count in zip(features, reductions, channels, strict=True):
        assert feature.shape == (2, count, 64 // reduction, 96 // reduction)
    last = on_meta(name, features_only=True, out_indices=(2,))
    assert last.feature_info.reduction() == reductions[2:3]
    assert len(last.stages) == 3


def test_wrong_arguments_are_named():
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"model": "pspnet_vgg16"}, "unknown; one of pspnet_repvgg_a0"),
        ({"model": "pspnet_repvgg_digits"}, "unknown"),
        ({"model": "pspnet_repvgg_small", "num_classes": 0}, "num_classes=0"),
        ({"model": "pspnet_repvgg_small", "width": 1}, "width=1"),
        ({"model": "pspnet_repvgg_small", "drop_rate": 1}, "drop_rate=1"),
        ({"model": "pspnet_repvgg_small", "global_pool": "avg"}, "unknown arguments"),
        ({"model": "pspnet_resnet50", "pretrained": True}, "no published weights"),
        ({"model": "pspnet_resnet50", "features_only": True, "out_indices": (5,)}, "out_indices"),
    )
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            repvgg.create_model(**arguments)
    with pytest.raises(InputError, match="the same resolution needed"):
        PSPNet(SMALL)
    with pytest.raises(InputError, match="five stages"):
        dilated(Spec((1, 1), widths=(4, 8), strides=(1, 2)))
    with pytest.raises(InputError, match="dilations of stage 2: 2 found, 1 needed"):
        Spec((1, 1), widths=(4, 8), strides=(1, 2), dilations=(1, (1, 2)))


@pytest.mark.slow
def test_onnx_takes_any_size(randomized, relative_error, tmp_path):
    network = small(randomized, preprocessing=Preprocessing(size=65))
    export_onnx(network, tmp_path / "net.onnx", dynamic_size=True)
    for shape in ((1, 3, 65, 65), (2, 3, 40, 72), (1, 3, 33, 49)):
        images = torch.randn(shape)
        with torch.inference_mode():
            found = run_onnx(tmp_path / "net.onnx", images)
            assert relative_error(network(images), found) < 1e-5


@pytest.mark.parametrize("sizes", [(9, 5), (33, 5), (40, 7), (7, 1), (1, 4), (6, 6), (5, 12)])
def test_upsampling_by_products_is_bilinear_interpolation(sizes):
    outputs, inputs = sizes
    x = torch.randn(2, 3, inputs, 4, dtype=torch.float64)
    found = interpolation(outputs, inputs, x) @ x @ interpolation(11, 4, x).T
    expected = F.interpolate(x, size=(outputs, 11), mode="bilinear", align_corners=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_in_training_a_network_computes_what_it_does_with_interpolation(monkeypatch):
    """Gradients too: the two ways of upsampling are one function."""
    torch.manual_seed(0)
    fields = ":depths=1-1-1-2-1,widths=8-8-12-16-24"
    network = repvgg.create_model("pspnet_repvgg_a0" + fields, num_classes=5, width=10)
    network = network.double().train()
    for module in network.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    images = torch.randn(3, 3, 50, 41, dtype=torch.float64)

    def outcome():
        network.zero_grad()
        logits, auxiliary = network(images)
        (logits.square().mean() + auxiliary.square().mean()).backward()
        return [logits, auxiliary, *(parameter.grad for parameter in network.parameters())]

    found = outcome()

    def interpolated(x, like, *, training):
        return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True)

    monkeypatch.setattr("repvgg.segmentation.pspnet._resized", interpolated)
    torch.testing.assert_close(found, outcome(), rtol=1e-9, atol=1e-12)

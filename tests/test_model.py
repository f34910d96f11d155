"""Networks and timm's interface, beside timm's own RepVGG."""

import json
from typing import Any

import pytest
import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

from repvgg.errors import InputError
from repvgg.model import RepVGG, create_model
from repvgg.preprocessing import Preprocessing
from repvgg.spec import Spec, list_models

SPEC = Spec((1, 2, 2), strides=(2, 2, 1), widths=(8, (8, 16), 24))
NAMES = [name for name in list_models() if name in timm.list_models("repvgg_*")]


def both(name: str, **options: Any) -> tuple[Any, Any]:
    """Our network and timm's, without weights."""
    with torch.device("meta"):
        ours: Any = create_model(name, **options)
        return ours.eval(), timm.create_model(name, **options).eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# --- Beside timm ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_feature_maps_are_those_of_timm(name):
    ours, theirs = both(name, features_only=True)
    x = torch.empty(2, 3, 96, 64, device="meta")
    assert [f.shape for f in ours(x)] == [f.shape for f in theirs(x)]
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction() == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("out_indices", [(0,), (4,), (1, 3), (-1,), (-2, 0)])
def test_chosen_feature_maps_are_those_of_timm(out_indices):
    ours, theirs = both("repvgg_a1", features_only=True, out_indices=out_indices)
    x = torch.empty(1, 3, 64, 64, device="meta")
    shapes = {tuple(f.shape) for f in theirs(x)}
    assert [tuple(f.shape) for f in ours(x)] == sorted(shapes, key=lambda shape: -shape[2])
    assert ours.feature_info.channels() == [f.shape[1] for f in ours(x)]
    assert ours.feature_info.reduction() == [64 // f.shape[2] for f in ours(x)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_classes": 7},
        {"num_classes": 0},
        {"num_classes": 0, "global_pool": ""},
        {"in_chans": 1},
        {"in_chans": 5, "num_classes": 2, "drop_rate": 0.5},
    ],
)
def test_each_step_has_the_shape_that_timm_gives(options):
    ours, theirs = both("repvgg_a0", **options)
    assert ours.num_features == theirs.num_features
    assert ours.num_classes == theirs.num_classes
    x = torch.empty(2, options.get("in_chans", 3), 64, 96, device="meta")
    features = ours.forward_features(x)
    assert features.shape == theirs.forward_features(x).shape
    assert ours.forward_head(features).shape == theirs.forward_head(features).shape
    pre_logits = ours.forward_head(features, pre_logits=True)
    assert pre_logits.shape == theirs.forward_head(features, pre_logits=True).shape
    assert ours(x).shape == theirs(x).shape
    assert type(ours.get_classifier()) is type(theirs.get_classifier())


@pytest.mark.parametrize("arguments", [(5,), (0,), (0, ""), (9, "avg")])
def test_the_classifier_is_reset_as_that_of_timm(arguments):
    ours, theirs = both("repvgg_a0", num_classes=3)
    x = torch.empty(2, 3, 64, 64, device="meta")
    for model in (ours, theirs):
        model.reset_classifier(*arguments)
    assert ours(x).shape == theirs(x).shape
    assert ours.num_classes == theirs.num_classes == arguments[0]
    assert type(ours.get_classifier()) is type(theirs.get_classifier())


@pytest.mark.parametrize("name", NAMES)
def test_timms_tools_read_the_pretrained_cfg(name):
    ours, theirs = both(name)
    found = resolve_model_data_config(ours.pretrained_cfg)
    assert found == resolve_model_data_config(theirs.pretrained_cfg)
    assert ours.pretrained_cfg["num_classes"] == theirs.pretrained_cfg["num_classes"] == 1000


@pytest.mark.parametrize("block", ["repvgg", "plain"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_the_pretrained_cfg_names_the_first_and_the_last_layer(block, in_chans):
    model = create_model(SPEC, num_classes=4, in_chans=in_chans, block=block)
    config = model.pretrained_cfg
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    first = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels == in_chans]
    assert [model.get_submodule(name) for name in config["first_conv"]] == first
    assert config["input_size"] == (in_chans, 224, 224)
    assert len(config["mean"]) == len(config["std"]) == in_chans


# --- What it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["repvgg", "plain"])
def test_logits_are_a_linear_layer_of_the_mean_of_the_last_feature_map(block):
    model = create_model(SPEC, num_classes=5, block=block).eval()
    x = images(2, 3, 32, 32)
    features = x
    for stage in model.stages:
        features = stage(features)
    weight, bias = model.classifier.parameters()
    expected = features.mean((2, 3)) @ weight.T + bias
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.forward_features(x), features)


def test_feature_maps_are_what_the_stages_give():
    model = create_model(SPEC).eval()
    extractor = create_model(SPEC, features_only=True).eval()
    extractor.stages.load_state_dict(model.stages.state_dict())
    expected, x = [], images(2, 3, 32, 32)
    for stage in model.stages:
        expected.append(x := stage(x))
    features = extractor(images(2, 3, 32, 32))
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))


def test_dropout_comes_before_the_classifier_and_only_in_training():
    model = create_model(SPEC, num_classes=4, drop_rate=1.0)
    x = images(2, 3, 32, 32)
    dropped = model.train()(x)
    assert torch.equal(dropped, model.classifier.get_parameter("bias").expand(2, 4))
    assert not torch.equal(model.eval()(x), dropped)


def test_a_new_classifier_is_like_the_rest_of_the_network():
    model = create_model(SPEC, num_classes=3, class_names=["a", "b", "c"]).double()
    model.reset_classifier(2)
    assert model(images(2, 3, 32, 32).double()).dtype == torch.float64
    assert model.class_names is None


def test_a_refused_reset_changes_nothing():
    model = create_model(SPEC, num_classes=2, class_names=["a", "b"])
    modules = dict(model.named_modules())
    for arguments in [(-1,), (2, ""), (2, "max"), (True,), (2.0,)]:
        with pytest.raises(InputError):
            model.reset_classifier(*arguments)
    assert dict(model.named_modules()) == modules
    assert (model.num_classes, model.global_pool, model.class_names) == (2, "avg", ("a", "b"))


@pytest.mark.parametrize(("name", "size"), [("repvgg_a0", 224), ("repvgg_digits", 8)])
def test_a_named_network_knows_its_image_size(name, size):
    with torch.device("meta"):
        model = create_model(f"{name}:groups=2", num_classes=3)
    assert model.preprocessing == Preprocessing.for_channels(3, size)
    assert model(torch.empty(2, 3, size, size, device="meta")).shape == (2, 3)


@pytest.mark.parametrize("block", ["repvgg", "plain"])
def test_a_network_is_built_again_from_its_config(block):
    model = create_model(
        SPEC,
        num_classes=2,
        in_chans=1,
        drop_rate=0.1,
        block=block,
        preprocessing=Preprocessing(32, 1.0, "nearest", (0.5,), (0.25,)),
        class_names=["cat", "dog"],
    )
    again = RepVGG.from_config(json.loads(json.dumps(model.config())))
    assert again.config() == model.config()
    again.load_state_dict(model.state_dict())
    x = images(2, 1, 32, 32)
    assert torch.equal(again.eval()(x), model.eval()(x))


# --- What it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_classes": -1}, "num_classes=-1"),
        ({"num_classes": 2.5}, "num_classes=2.5"),
        ({"num_classes": True}, "num_classes=True"),
        ({"in_chans": 0}, "in_chans=0"),
        ({"in_chans": "3"}, "in_chans='3'"),
        ({"in_chans": 1, "preprocessing": Preprocessing()}, "in_chans=1"),
        ({"drop_rate": 1.1}, "drop_rate=1.1"),
        ({"drop_rate": "0.1"}, "drop_rate='0.1'"),
        ({"global_pool": "max"}, "global_pool='max'"),
        ({"global_pool": ""}, "global_pool='avg'"),
        ({"block": "resnet"}, "block='resnet'"),
        ({"class_names": ["a", "b"]}, "class_names: .*1000.* found 2"),
        ({"num_classes": 3, "class_names": "abc"}, "class_names: .* found 'abc'"),
        ({"out_indices": (0,)}, "out_indices"),
        ({"features_only": True, "out_indices": (3,)}, "out_indices"),
        ({"features_only": True, "out_indices": (-4,)}, "out_indices"),
        ({"features_only": True, "out_indices": ()}, "out_indices"),
        ({"drop_path": 0.1}, "'drop_path'"),
        ({"pretrained": True}, "pretrained"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(options, named):
    with pytest.raises(InputError, match=named):
        create_model(SPEC, **options)


@pytest.mark.parametrize("name", ["repvgg_b1g2", "repvgg_b2g2", "repvgg_b3g2", "repvgg_a0:a=1"])
def test_without_published_weights_there_are_none(name):
    with (
        torch.device("meta"),
        pytest.raises(InputError, match=f"no published weights for '{name}'"),
    ):
        create_model(name, pretrained=True)


@pytest.mark.parametrize("model", [123, None, ("repvgg_a0",)])
def test_what_is_neither_a_name_nor_a_spec_is_refused(model):
    with pytest.raises(InputError, match=r"model=.*: a name or a Spec needed"):
        create_model(model)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"'repvgg_z9' is unknown; one of repvgg_a0, .* needed"):
        create_model("repvgg_z9")

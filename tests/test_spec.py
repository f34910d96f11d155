"""Specs against the tables of the paper, typed in by hand, and against timm's networks."""

import json

import pytest
import timm
import torch

from repvgg.errors import InputError
from repvgg.spec import (
    LATER_VARIANTS,
    SMALL_IMAGE_VARIANTS,
    VARIANTS,
    Layer,
    Spec,
    list_models,
    parse_spec,
)

A, B = (1, 2, 4, 14, 1), (1, 4, 6, 16, 1)

# Table 3 put into Table 2: layers and width of each stage, min(64, 64a), 64a, 128a, 256a, 512b.
TABLES_2_AND_3 = {
    "repvgg_a0": (A, (48, 48, 96, 192, 1280)),
    "repvgg_a1": (A, (64, 64, 128, 256, 1280)),
    "repvgg_a2": (A, (64, 96, 192, 384, 1408)),
    "repvgg_b0": (B, (64, 64, 128, 256, 1280)),
    "repvgg_b1": (B, (64, 128, 256, 512, 2048)),
    "repvgg_b2": (B, (64, 160, 320, 640, 2560)),
    "repvgg_b3": (B, (64, 192, 384, 768, 2560)),
}
GROUPWISE = {  # Sect. 3.4, layers counted from 1
    A: [3, 5, 7, 9, 11, 13, 15, 17, 19, 21],
    B: [3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27],
}
TIMM_NAMES = [name for name in VARIANTS if name in timm.list_models("repvgg_*")]


def flat(spec: Spec) -> list[Layer]:
    return [layer for stage in spec.layers() for layer in stage]


def test_the_variants_are_those_of_the_paper():
    grouped = [f"repvgg_{b}{g}" for b in ("b1", "b2", "b3") for g in ("g2", "g4")]
    assert set(VARIANTS) == {*TABLES_2_AND_3, *grouped}
    assert len(VARIANTS) == 13


@pytest.mark.parametrize("name", VARIANTS)
def test_depths_and_widths_are_those_of_tables_2_and_3(name):
    depths, widths = TABLES_2_AND_3[name[: len("repvgg_a0")]]
    stages = VARIANTS[name].layers()
    assert tuple(map(len, stages)) == depths
    assert [{layer.out_channels for layer in stage} for stage in stages] == [{w} for w in widths]


@pytest.mark.parametrize("name", VARIANTS)
def test_only_the_first_layer_of_a_stage_down_samples(name):
    strides = [[layer.stride for layer in stage] for stage in VARIANTS[name].layers()]
    assert strides == [[2] + [1] * (depth - 1) for depth in VARIANTS[name].depths]


@pytest.mark.parametrize("name", VARIANTS)
def test_channels_are_handed_on_from_layer_to_layer(name):
    layers = flat(VARIANTS[name])
    channels = [3, *(layer.out_channels for layer in layers)]
    assert [layer.in_channels for layer in layers] == channels[:-1]


@pytest.mark.parametrize("depths", [A, B])
@pytest.mark.parametrize("groups", [2, 4])
def test_every_other_layer_from_the_third_is_groupwise(depths, groups):
    layers = flat(Spec(depths, groups=groups))
    found = {index: layer.groups for index, layer in enumerate(layers, 1) if layer.groups > 1}
    assert found == dict.fromkeys(GROUPWISE[depths], groups)


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_layers_are_those_of_timm_in_both_branches(name):
    with torch.device("meta"):
        blocks = [
            module for module in timm.create_model(name).modules() if hasattr(module, "conv_kxk")
        ]
    for branch in ("conv_kxk", "conv_1x1"):
        convs = [getattr(block, branch).conv for block in blocks]
        theirs = [(c.in_channels, c.out_channels, c.stride[0], c.groups) for c in convs]
        ours = [
            (layer.in_channels, layer.out_channels, layer.stride, layer.groups)
            for layer in flat(VARIANTS[name])
        ]
        assert ours == theirs
    has_identity = [block.identity is not None for block in blocks]
    assert [layer.keeps_shape for layer in flat(VARIANTS[name])] == has_identity


def test_depths_widths_and_strides_are_free():
    spec = Spec(depths=(1, 3), strides=(1, 2), widths=(8, (12, 20, 16)), groups=2)
    assert spec.layers(in_chans=5) == (
        (Layer(5, 8),),
        (Layer(8, 12, stride=2), Layer(12, 20, groups=2), Layer(20, 16)),
    )


def test_lists_mean_the_same_as_tuples():
    from_lists = Spec(depths=[1, 2], strides=[1, 2], widths=[4, [4, 8]])  # pyright: ignore[reportArgumentType]
    from_tuples = Spec(depths=(1, 2), strides=(1, 2), widths=(4, (4, 8)))
    assert from_lists == from_tuples
    assert hash(from_lists) == hash(from_tuples)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"depths": 5}, "depths"),
        ({"depths": None}, "depths"),
        ({"depths": (1, 0, 1, 1, 1)}, "depths"),
        ({"depths": (1, 2.0, 1, 1, 1)}, "depths"),
        ({"depths": (1, True, 1, 1, 1)}, "depths"),
        ({"depths": (1, 2, 4)}, "strides"),
        ({"depths": (1, 2, 4), "strides": (1, 2, 2)}, "widths"),
        ({"depths": (900, 200, 1, 1, 1)}, "layers"),
        ({"depths": (), "strides": ()}, "depths"),
        ({"strides": 2}, "strides"),
        ({"strides": (2, 2, 2, 2, 0)}, "strides"),
        ({"strides": (2, 2, 2, 2, 17)}, "strides"),
        ({"a": 0}, "a="),
        ({"a": float("nan")}, "a="),
        ({"b": "2.5"}, "b="),
        ({"b": float("inf")}, "b="),
        ({"groups": 0}, "groups"),
        ({"groups": 3}, "layer 3 of the network: groups=3"),
        ({"widths": 64}, "widths"),
        ({"widths": "abcde"}, "widths"),
        ({"widths": (64, 64, 64, 64)}, "widths"),
        ({"widths": (64, (64, 64, 64), 64, 64, 64)}, "widths of stage 2: 3 found, 2 needed"),
        ({"widths": (64, 64, 64, 64, -1)}, "widths of stage 5"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_spec_that_cannot_be_built_names_its_field(fields, named):
    with pytest.raises(InputError, match=named):
        Spec.from_dict(fields)


def test_a_spec_that_is_no_mapping_is_refused():
    with pytest.raises(InputError, match="spec: fields"):
        Spec.from_dict([("depths", (1,))])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"in_channels": 0}, "in_channels"),
        ({"out_channels": 1.5}, "out_channels"),
        ({"stride": 0}, "stride"),
        ({"dilation": 0}, "dilation"),
        ({"groups": 3}, "groups=3"),
        ({"padding_mode": "mirror"}, "padding_mode='mirror'"),
    ],
)
def test_a_layer_that_cannot_be_built_names_its_field(fields, named):
    with pytest.raises(InputError, match=named):
        Layer(**{"in_channels": 4, "out_channels": 8, **fields})


@pytest.mark.parametrize(
    "spec",
    [
        *VARIANTS.values(),
        *SMALL_IMAGE_VARIANTS.values(),
        Spec((1, 2), strides=(1, 3), widths=(5, (6, 7))),
    ],
)
def test_a_spec_comes_back_from_json(spec):
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_models_are_listed_by_pattern():
    assert list_models("repvgg*") == [*VARIANTS, *LATER_VARIANTS, *SMALL_IMAGE_VARIANTS]
    assert set(list_models()) == {*list_models("repvgg*"), *list_models("pspnet*")}
    assert list_models("repvgg_b*g4") == ["repvgg_b1g4", "repvgg_b2g4", "repvgg_b3g4"]
    assert list_models("resnet*") == []


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("repvgg_a1", Spec(A, a=1, b=2.5)),
        ("repvgg_a0:", Spec(A, a=0.75, b=2.5)),
        (
            "repvgg_a0:a=0.5,strides=1-1-2-2-2,groups=2",
            Spec(A, a=0.5, strides=(1, 1, 2, 2, 2), groups=2),
        ),
        (
            "repvgg_b0:depths=1-1,widths=8-16,strides=1-2",
            Spec((1, 1), 1, strides=(1, 2), widths=(8, 16)),
        ),
    ],
)
def test_a_name_can_be_given_with_other_fields(text, spec):
    assert parse_spec(text) == spec


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("repvgg_c0", "'repvgg_c0' is unknown"),
        ("", "'' is unknown"),
        ("repvgg_a0:depth=3", "no field 'depth'"),
        ("repvgg_a0:a=wide", "'wide' as a"),
        ("repvgg_a0:a", "'' as a"),
        ("repvgg_a0:groups=1.5", "'1.5' as groups"),
        ("repvgg_a0:strides=1-x-2-2-2", "'1-x-2-2-2' as strides"),
        ("repvgg_a0:groups=5", "groups=5 must divide"),
        ("repvgg_a0:a=nan", "a=nan"),
    ],
)
def test_a_name_that_cannot_be_read_is_refused_with_the_reason(text, named):
    with pytest.raises(InputError, match=named):
        parse_spec(text)

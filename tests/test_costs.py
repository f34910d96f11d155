"""Costs: Tables 4 and 5 to the printed digit, a closed form, and torch's own counter."""

import math
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from repvgg.costs import built_without_memory, cost
from repvgg.errors import InputError
from repvgg.model import create_model
from repvgg.reparam import reparameterize
from repvgg.spec import VARIANTS, Spec

# Params (M), theoretical FLOPs (B) and Wino MULs (B), as printed in Tables 4 and 5. Parameters are
# cut off after two decimals (A1 has 12,789,864 and is printed as 12.78); the others are rounded.
TABLES_4_AND_5 = {
    "repvgg_a0": ("8.30", "1.4", "0.7"),
    "repvgg_a1": ("12.78", "2.4", "1.3"),
    "repvgg_a2": ("25.49", "5.1", "2.7"),
    "repvgg_b0": ("14.33", "3.1", "1.6"),
    "repvgg_b1": ("51.82", "11.8", "5.9"),
    "repvgg_b1g2": ("41.36", "8.8", "4.6"),
    "repvgg_b1g4": ("36.12", "7.3", "3.9"),
    "repvgg_b2": ("80.31", "18.4", "9.1"),
    "repvgg_b2g4": ("55.77", "11.3", "6.0"),
    "repvgg_b3": ("110.96", "26.2", "12.9"),
    "repvgg_b3g4": ("75.62", "16.1", "8.4"),
}

# a, b and groups of Table 3 and Sect. 3.4.
MULTIPLIERS = {
    "repvgg_a0": (0.75, 2.5, 1),
    "repvgg_a1": (1, 2.5, 1),
    "repvgg_a2": (1.5, 2.75, 1),
    "repvgg_b0": (1, 2.5, 1),
    **{f"repvgg_b1{g}": (2, 4, n) for g, n in (("", 1), ("g2", 2), ("g4", 4))},
    **{f"repvgg_b2{g}": (2.5, 5, n) for g, n in (("", 1), ("g2", 2), ("g4", 4))},
    **{f"repvgg_b3{g}": (3, 5, n) for g, n in (("", 1), ("g2", 2), ("g4", 4))},
}

SMALL = Spec((1, 2, 3), strides=(2, 2, 1), widths=(8, 16, 16), groups=2)


def on_meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **options)


@pytest.mark.parametrize("name", TABLES_4_AND_5)
def test_plain_networks_cost_what_the_paper_prints(name):
    found = cost(on_meta(name, block="plain"), image_size=224)
    params = f"{math.floor(found.params / 1e4) / 100:.2f}"
    flops, multiplies = f"{found.macs / 1e9:.1f}", f"{found.winograd_multiplies / 1e9:.1f}"
    assert (params, flops, multiplies) == TABLES_4_AND_5[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_plain_networks_cost_what_the_formula_says(name):
    a, b, g = MULTIPLIERS[name]
    depths = (1, 2, 4, 14, 1) if "_a" in name else (1, 4, 6, 16, 1)
    params, macs, multiplies = 1000 * 512 * b + 1000, 1000 * 512 * b, 1000 * 512 * b
    channels, size, index = 3, 224, 0
    for depth, width in zip(
        depths, (min(64, 64 * a), 64 * a, 128 * a, 256 * a, 512 * b), strict=True
    ):
        size //= 2
        for position in range(depth):
            index += 1
            groups = g if index >= 3 and index % 2 else 1
            weights = width * channels / groups * 9
            params += weights + width
            macs += weights * size**2
            multiplies += weights * size**2 * (4 / 9 if position else 1)
            channels = width
    found = cost(on_meta(name, block="plain"))
    assert (found.params, found.macs) == (params, macs)
    assert found.winograd_multiplies == pytest.approx(multiplies, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name in timm.list_models("repvgg*")])
def test_training_time_networks_have_the_parameters_of_timm(name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
    assert cost(on_meta(name)).params == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: create_model(SMALL), 33),
        (lambda: reparameterize(create_model(SMALL)), (20, 30)),
        (torchvision.models.mobilenet_v3_small, 64),
        (torchvision.models.squeezenet1_1, 65),
        (lambda: nn.ConvTranspose2d(3, 8, 3, stride=2), 10),
    ],
)
def test_multiply_adds_are_half_of_torchs_flops(make, size):
    model = make().eval()
    height, width = (size, size) if isinstance(size, int) else size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, height, width))
    found = cost(model, size)
    assert 2 * found.macs == counter.get_total_flops() > 0
    assert found.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("conv", "is_winograd"),
    [
        (nn.Conv2d(8, 8, 3), True),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), True),
        (nn.Conv2d(8, 8, 3, groups=4), True),
        (nn.Conv2d(8, 8, 3, dilation=2), True),
        (nn.Conv2d(8, 8, 3, stride=2), False),
        (nn.Conv2d(8, 8, 3, stride=(1, 2)), False),
        (nn.Conv2d(8, 8, 1), False),
        (nn.Conv2d(8, 8, (1, 3)), False),
        (nn.Conv2d(8, 8, 5), False),
        (nn.ConvTranspose2d(8, 8, 3), False),
    ],
)
def test_winograd_saves_five_ninths_of_a_3x3_convolution_of_stride_1(conv, is_winograd):
    found = cost(conv, 9, in_chans=8)
    share = 4 / 9 if is_winograd else 1
    assert found.winograd_multiplies == pytest.approx(found.macs * share, rel=1e-15)


def test_the_rows_say_what_each_layer_costs():
    found = cost(reparameterize(create_model(SMALL, num_classes=10)), 32)
    rows = [(row.name, row.module, row.output_shape, row.params, row.macs) for row in found.layers]
    assert rows == [
        ("stages.0.0.conv", "Conv 3×3, 3 → 8, stride 2", (8, 16, 16), 224, 216 * 256),
        ("stages.1.0.conv", "Conv 3×3, 8 → 16, stride 2", (16, 8, 8), 1168, 1152 * 64),
        ("stages.1.1.conv", "Conv 3×3, 16 → 16, groups 2", (16, 8, 8), 1168, 1152 * 64),
        ("stages.2.0.conv", "Conv 3×3, 16 → 16", (16, 8, 8), 2320, 2304 * 64),
        ("stages.2.1.conv", "Conv 3×3, 16 → 16, groups 2", (16, 8, 8), 1168, 1152 * 64),
        ("stages.2.2.conv", "Conv 3×3, 16 → 16", (16, 8, 8), 2320, 2304 * 64),
        ("classifier", "Linear", (10,), 170, 160),
    ]


@pytest.mark.parametrize("block", ["repvgg", "plain"])
def test_the_rows_add_up(block):
    found = cost(create_model(SMALL, block=block), 32)
    for field in ("params", "macs", "winograd_multiplies"):
        assert sum(getattr(row, field) for row in found.layers) == getattr(found, field)


def test_shared_weights_count_once_and_work_as_often_as_it_is_done():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
            self.alias, self.tied.weight = self.layer, self.layer.weight
            self.scale = nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            return self.tied(self.alias(self.layer(x[0, 0]))) @ self.scale

    model = Tied()
    before = dict(model.named_parameters(remove_duplicate=False))
    found = cost(model, (5, 4))
    assert [(row.name, row.params, row.macs) for row in found.layers] == [
        ("", 16, 80),
        ("layer", 20, 160),
        ("tied", 4, 80),
    ]
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [32, 0, (-1, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("block", ["repvgg", "plain"])
def test_the_model_is_not_changed(training, size, dtype, block):
    model = create_model(SMALL, block=block).to(dtype).train(training)
    model.stages[0].train(not training)
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if size == 32:
        assert cost(model, size).macs > 0
    else:
        with pytest.raises(InputError, match="image_size"):
            cost(model, size)
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {tensor.device.type for tensor in after.values()} == {"cpu"}


def test_channels_are_those_of_the_model_if_it_says_so():
    assert cost(create_model(SMALL, in_chans=5), 32).macs > cost(create_model(SMALL), 32).macs
    assert cost(nn.Conv2d(5, 2, 1), 4, in_chans=5).macs == 5 * 2 * 16


@pytest.mark.parametrize(
    ("model", "size", "found"),
    [
        (nn.Conv2d(3, 4, 5), 4, "3×4×4"),
        (nn.Conv2d(8, 4, 1), (6, 7), "3×6×7"),
        (timm.create_model("vit_tiny_patch16_224", depth=1), 100, "3×100×100"),
    ],
)
def test_an_image_that_does_not_fit_is_refused_and_the_model_left_as_it_was(model, size, found):
    model.train()
    with pytest.raises(InputError, match=f"^the model cannot take an image of {found}: .+$"):
        cost(model, size)
    assert all(module.training for module in model.modules())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_compiled_model_costs_what_the_model_costs():
    model = create_model(SMALL)
    assert cost(torch.compile(model), 32).macs == cost(model, 32).macs  # pyright: ignore[reportArgumentType]


class Computed(nn.Sequential):
    """A network whose width is the value of a tensor, as in timm's RegNets."""

    def __init__(self):
        width = torch.linspace(1, 4, 4).sum().long().item()
        super().__init__(nn.Conv2d(3, int(width), 3))


@pytest.mark.parametrize(
    ("build", "device"), [(lambda: nn.Conv2d(3, 10, 3), "meta"), (Computed, "cpu")]
)
def test_no_memory_is_needed_unless_the_constructor_computes(build, device):
    network = built_without_memory(build)
    assert next(network.parameters()).device.type == device
    assert cost(network, 8).params == 280

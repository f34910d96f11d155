"""Auxiliary heads: where they were published to be, part of the loss, gone afterwards."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import repvgg
from repvgg.errors import InputError
from repvgg.model import create_model
from repvgg.spec import LATER_VARIANTS, Spec
from repvgg.training.auxiliary import Supervised
from repvgg.training.classification import auxiliary_weight
from repvgg.training.config import TrainConfig
from repvgg.training.distributed import World
from repvgg.training.loop import Run, train
from repvgg.training.recipes import digits

SPEC = Spec((1, 2, 3, 5, 1), strides=(1, 2, 2, 1, 1), widths=(4, 6, 8, (10, 12, 12, 12, 12), 16))
SHORT = dataclasses.replace(
    digits(), epochs=2, batch_size=256, base_batch_size=256, auxiliary_weight=0.3, workers=0
)
HERE = World(0, 1, torch.device("cpu"))


def published_params(depths, widths, classes):
    """Of RepVGGplus while it trains, by the layers of the authors' repvggplus.py."""
    total, inputs = 0, 3
    for depth, width in zip(depths, widths, strict=True):
        for position in range(depth):
            conv3x3, conv1x1 = 9 * inputs * width + 2 * width, inputs * width + 2 * width
            identity = 2 * width if position else 0
            squeezed = width // 4
            total += conv3x3 + conv1x1 + identity
            total += width * squeezed + squeezed + squeezed * width + width
            inputs = width
    heads = sum(9 * w * w + 2 * w + w * classes + classes for w in widths[1:4])
    return total + widths[-1] * classes + classes, heads


def test_repvggplus_is_as_large_as_its_published_code_says():
    with torch.device("meta"):
        network = create_model("repvggplus_l2pse")
        supervised = Supervised(network)
    spec = LATER_VARIANTS["repvggplus_l2pse"]
    alone, heads = published_params(spec.depths, (64, 160, 320, 640, 2560), 1000)
    assert sum(p.numel() for p in network.parameters()) == alone
    assert sum(p.numel() for p in supervised.parameters()) == alone + heads
    assert [len(part) for part in supervised.parts] == [1 + 8, 14, 12, 12 + 1]


def test_heads_see_the_stages_in_the_middle_and_half_of_the_last_of_them():
    torch.manual_seed(0)
    network: Any = create_model(SPEC, num_classes=3).eval()
    supervised: Any = Supervised(network).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        features = network.stages[:3](x)
        half = network.stages[3][:2](features)
        inputs = network.stages[:2](x), features, half
        expected = [network(x)]
        for head, seen in zip(supervised.heads, inputs, strict=True):
            normed = F.conv2d(seen, head.conv.weight, stride=2, padding=1) / (1 + 1e-5) ** 0.5
            pooled = normed.relu().mean((2, 3))
            expected.append(pooled @ head.classifier.weight.T + head.classifier.bias)
        torch.testing.assert_close(supervised(x), torch.stack(expected))


def test_blocks_of_two_layers_have_heads_too():
    spec = Spec((1, 4, 4, 1), strides=(1, 2, 2, 1), widths=(4, 6, (8, 8, 10, 10), 12))
    supervised: Any = Supervised(create_model(spec, num_classes=3, block="residual_reorg"))
    assert [head.conv.in_channels for head in supervised.heads] == [6, 8]
    assert supervised(torch.randn(2, 3, 16, 16)).shape == (3, 2, 3)


@pytest.mark.parametrize(("spec", "classes"), [(Spec((1, 1), strides=(1, 1), widths=(4, 4)), 3)])
def test_a_network_without_a_middle_is_refused(spec, classes):
    with pytest.raises(InputError, match=r"auxiliary_weight: .* found 2 stages and 3 classes"):
        Supervised(create_model(spec, num_classes=classes))


def test_the_weight_is_the_models_own_unless_another_is_given():
    own = {model: auxiliary_weight(TrainConfig(model=model)) for model in LATER_VARIANTS}
    assert own == {"repvgg_d2se": 0.0, "repvggplus_l2pse": 0.1}
    config = TrainConfig(model="repvggplus_l2pse:depths=1-2-2-2-1", auxiliary_weight=0.0)
    assert auxiliary_weight(config) == 0
    assert auxiliary_weight(dataclasses.replace(config, auxiliary_weight=None)) == 0.1
    with pytest.raises(InputError, match="auxiliary_weight: 0 or more needed, found -1"):
        TrainConfig(auxiliary_weight=-1)


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_the_loss_by_hand(mixup, tmp_path):
    config = dataclasses.replace(SHORT, precision="fp64", mixup=mixup, label_smoothing=0.1)
    run = Run(config, tmp_path / "run", HERE)
    images = torch.randint(0, 255, (8, 1, 8, 8), dtype=torch.uint8)
    labels, mix = torch.arange(8), torch.linspace(0.1, 0.9, 8)
    loss, _ = run.task.loss(run.model.train(), images, labels, mix)
    x = setup_normalized(run, images)
    share = mix[:, None].double() if mixup else torch.ones(8, 1, dtype=torch.float64)
    if mixup:
        x = share[..., None, None] * x + (1 - share[..., None, None]) * x.roll(1, 0)
    one_hot = 0.9 * F.one_hot(labels, 10) + 0.01
    target = share * one_hot + (1 - share) * one_hot.roll(1, 0)
    losses = [-(target * o.log_softmax(1)).sum(1).mean() for o in run.trained.train()(x)]
    torch.testing.assert_close(loss, losses[0] + 0.3 * sum(losses[1:]))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in run.trained.parameters())


def setup_normalized(run, images):
    pre = run.network.preprocessing
    return (images / 255 - pre.mean[0]).double() / pre.std[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True, "ema_decay": 0.9}, {"accumulate": 2, "mixup": 0.2}],
)
def test_a_run_with_heads_leaves_a_network_without_and_goes_on_exactly(options, tmp_path):
    config = dataclasses.replace(SHORT, **options)
    whole = train(config, tmp_path / "whole")
    network = repvgg.load(whole.last)
    assert (
        network.state_dict().keys()
        == create_model("repvgg_digits", num_classes=10, in_chans=1).state_dict().keys()
    )
    plain = repvgg.reparameterize(network)
    repvgg.verify(network, plain, torch.randn(4, 1, 8, 8), max_rel_error=1e-4)
    history = whole.read_history()
    assert history[1]["train_loss"] < history[0]["train_loss"]
    newest = sorted((whole.path / "checkpoints").iterdir())[-1]
    newest.unlink()  # as if killed in the second epoch
    again = train(config, tmp_path / "whole")
    state = repvgg.load(again.last).state_dict()
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())


def test_gradient_checkpointing_changes_no_weight(tmp_path):
    config = dataclasses.replace(SHORT, epochs=1, precision="fp64")
    leaner = dataclasses.replace(config, gradient_checkpointing=True)
    expected, found = (
        repvgg.load(train(each, tmp_path / str(each.gradient_checkpointing)).last).state_dict()
        for each in (config, leaner)
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-8, atol=1e-10)

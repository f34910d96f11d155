"""Memory of activations: Figure 3 by hand, and what is computed against what is counted."""

import pytest
import torch
from torch import nn

from repvgg.baselines import create_named
from repvgg.errors import InputError
from repvgg.memory import activation_memory, measured_memory
from repvgg.model import create_model
from repvgg.reparam import reparameterize
from repvgg.reproduce.figures import blocks, figure3


def test_a_residual_block_keeps_twice_its_input_and_a_plain_stack_once():
    channels, side, batch = 8, 10, 3
    unit = 4 * batch * channels * side**2
    found = {
        name: activation_memory(block, (batch, 1, side, side))
        for name, block in blocks(channels).items()
    }
    # Between operations as drawn in Fig. 3. While the second convolution of the residual block
    # runs, its input, its output and the shortcut exist; in the plain stack no shortcut.
    assert found["residual block"].between == 2 * unit
    assert found["residual block"].during == 3 * unit
    assert found["two plain layers"].between == unit
    assert found["two plain layers"].during == 2 * unit


def test_a_plain_network_is_as_large_as_its_largest_neighbours():
    network = create_model("repvgg_a0", block="plain").eval()
    found = activation_memory(network, (2, 3, 224, 224))
    stem, second = 2 * 4 * 48 * 112**2, 2 * 4 * 48 * 56**2
    assert found.between == stem
    assert found.during == stem + second


@pytest.mark.parametrize(
    "name", ["repvgg_a0", "ResNet-18", "ResNet-50", "EfficientNet-B0", "RegNetX-3.2GF"]
)
def test_what_is_computed_is_what_running_it_takes(name):
    network = reparameterize(create_named(name, num_classes=10))
    shape = 2, 3, 64, 64
    computed = activation_memory(network, shape).during
    measured = measured_memory(network, torch.zeros(shape))
    # Eager Python lets go of a tensor when its name is bound again, which can be one operation
    # later than its last use.
    assert computed <= measured <= 1.5 * computed


def test_views_and_in_place_operations_take_no_memory():
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(inplace=True), nn.Flatten()).eval()
    assert activation_memory(network, (1, 1, 8, 8)).during == 4 * 4 * 64


def test_the_network_itself_is_not_changed():
    network = create_model("repvgg_digits", block="plain").eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    activation_memory(network, (1, 3, 8, 8))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_a_network_that_cannot_be_traced_is_named():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(InputError, match="Branching cannot be traced"):
        activation_memory(Branching(), (1, 3, 4, 4))


def test_figure_3_is_what_the_paper_draws():
    report = figure3(1, torch.device("cpu"))
    by_name = {row[0]: row for row in report.rows}
    assert by_name["residual block"][1] == 2
    assert by_name["two plain layers"][1] == 1
    assert by_name["residual block"][2] == by_name["residual block"][3] == 3
    assert by_name["two plain layers"][2] == by_name["two plain layers"][3] == 2

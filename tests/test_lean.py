"""The cheaper forms of the training-time block, against the three branches in fp64."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from repvgg import lean_ops
from repvgg.branches import ConvBN, MultiBranchBlock, repvgg_block
from repvgg.errors import InputError
from repvgg.lean import IMPLEMENTATIONS, use_implementation
from repvgg.model import RepVGG
from repvgg.spec import Layer, Spec

FORMS = [name for name in IMPLEMENTATIONS if name not in ("auto", "branches")]

LAYERS = [
    Layer(4, 4),
    Layer(4, 6),
    Layer(1, 9, stride=2),
    Layer(4, 4, groups=2, dilation=2),
    Layer(4, 8, stride=2, groups=4),
]


@pytest.fixture(autouse=True, scope="module")
def small_pieces():
    """One image a piece, so that the small inputs of these tests are worked on in pieces too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lean_ops, "PIECE_BYTES", 1)
        patch.setattr(lean_ops, "PIECE_KERNELS", 0)
        yield


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    groups = draw(st.sampled_from([1, 2, 4]))
    inputs, outputs = draw(st.tuples(*[st.integers(1, 16 // groups)] * 2))
    return Layer(
        inputs * groups,
        (inputs if draw(st.booleans()) else outputs) * groups,
        stride=draw(st.sampled_from([1, 2, 3])),
        groups=groups,
        dilation=draw(st.sampled_from([1, 2])),
    )


def block_of(layer: Layer, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    block = repvgg_block(layer).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    return use_implementation(block, "branches")


def twin(module: nn.Module, name: str) -> Any:
    return use_implementation(copy.deepcopy(module), name)


def images(layer: Layer, count: int = 3, high: int = 7, wide: int = 6) -> Tensor:
    return torch.randn(count, layer.in_channels, high, wide, dtype=torch.float64)


def outcome(model: nn.Module, x: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """Output, gradients and buffers after one forward and backward pass."""
    x = x.detach().clone().requires_grad_()
    output = model(x)
    random = torch.Generator().manual_seed(seed)
    direction = torch.randn(output.shape, dtype=torch.float64, generator=random)
    model.zero_grad()
    (output * direction.to(output.dtype)).sum().backward()
    assert x.grad is not None
    found = {"output": output.detach(), "x": x.grad, **dict(model.named_buffers())}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad
    return {name: value.clone() for name, value in found.items()}


def assert_same(expected: dict[str, Tensor], actual: dict[str, Tensor], bound: float = 1e-12):
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        difference = (value - actual[name]).abs().max().item()
        # Where a sum cancels out, relative to its terms, which are of size one.
        assert difference <= bound * max(1.0, value.abs().max().item()), name


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=60, deadline=None)
@given(
    layer=layers(),
    size=st.tuples(st.integers(2, 4), st.integers(4, 9), st.integers(4, 9)),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_form_is_the_three_branches(name, layer, size, channels_last, seed):
    block = block_of(layer, seed)
    x = images(layer, *size)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    other = twin(block, name)
    for step in range(2):  # the second one shows that the running statistics moved alike
        assert_same(outcome(block, x, step), outcome(other, x, step))
    assert_same(dict(block.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_gradients_are_those_of_differences(name, layer):
    block = twin(block_of(layer), name)
    names = [path for path, _ in block.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in block.parameters()]
    x = images(layer, 2, 4, 5).requires_grad_()
    assert block.implementation(block, x) is not None

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(block, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


def stored(run: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that autograd keeps, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # else another one may come to lie at its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


KEPT = {"fused": 4, "recompute_cheap": 3, "recompute_all": 2}  # input and output among them


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("layer", [Layer(8, 8), Layer(8, 8, groups=2)], ids=str)
def test_what_is_kept(name, layer):
    block = twin(block_of(layer), name)
    x = images(layer).to(memory_format=torch.channels_last).requires_grad_()
    statistics = 3 * 3 * layer.out_channels  # mean, 1/σ and scale of each branch
    assert stored(lambda: block(x), block) == 8 * (KEPT[name] * x.numel() + statistics)


def test_a_cheap_3x3_output_is_computed_again():
    layer = Layer(3, 27, stride=2)
    block = twin(block_of(layer), "recompute_cheap")
    x = images(layer).to(memory_format=torch.channels_last).requires_grad_()
    assert stored(lambda: block(x), block) == 8 * (x.numel() + 27 * 3 * 4 * 3 + 2 * 3 * 27)


def test_what_the_merged_form_keeps():
    layer = Layer(8, 8, groups=2)
    block = twin(block_of(layer), "merged")
    x = images(layer).to(memory_format=torch.channels_last).requires_grad_()
    statistics = 3 * 3 * 8 + 8 + 2 * 4 * 4  # and the mean and covariances of the input
    assert stored(lambda: block(x), block) == 8 * (3 * x.numel() + statistics)


@pytest.mark.parametrize("name", KEPT)
def test_what_a_strided_block_keeps(name):
    layer = Layer(4, 8, stride=2)
    block = twin(block_of(layer), name)
    x = images(layer).to(memory_format=torch.channels_last).requires_grad_()
    output = 3 * 8 * 4 * 3
    expected = x.numel() + (KEPT[name] - 1) * output + 2 * 3 * 8
    assert stored(lambda: block(x), block) == 8 * expected


@pytest.mark.parametrize("name", [*FORMS, "auto"])
def test_a_network_trains_alike(name):
    torch.manual_seed(0)
    spec = Spec((1, 2, 2), strides=(2, 2, 1), widths=(8, 8, 16), groups=2)
    network = use_implementation(RepVGG(spec, num_classes=5).double(), "branches")
    other = twin(network, name)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (network, other)]
    for _ in range(10):
        x, y = torch.randn(4, 3, 17, 16, dtype=torch.float64), torch.randint(5, (4,))
        losses = []
        for model, optimizer in zip((network, other), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(nn.functional.cross_entropy(model(x), y))
            losses[-1].backward()
            optimizer.step()
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-9)
    assert list(network.state_dict()) == list(other.state_dict())
    assert_same(network.state_dict(), other.state_dict(), 1e-9)
    x = torch.randn(2, 3, 17, 16, dtype=torch.float64)
    assert torch.allclose(network.eval()(x), other.eval()(x), rtol=1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_stem_in_fp32_channels_last(relative_error, name):
    """Where oneDNN's strided 1×1 convolution writes out of bounds (uxlfoundation/oneDNN 6035)."""
    truth = block_of(Layer(3, 16, stride=2))
    block = twin(truth, name).float()
    x = torch.randn(2, 3, 112, 112, dtype=torch.float64)
    expected = outcome(truth, x)
    actual = outcome(block, x.float().to(memory_format=torch.channels_last))
    for key, value in expected.items():
        assert relative_error(value, actual[key]) <= 1e-4, key


@pytest.mark.parametrize("name", FORMS)
def test_frozen_parameters(name):
    for frozen in ("conv3x3.conv", "conv1x1.conv", "conv3x3.bn", "identity.bn", "conv"):
        block = block_of(Layer(4, 4))
        for path, parameter in block.named_parameters():
            parameter.requires_grad_(frozen not in path)
        other, x = twin(block, name), images(Layer(4, 4))
        assert_same(outcome(block, x), outcome(other, x))


@pytest.mark.parametrize("name", FORMS)
def test_images_need_no_gradient(name):
    block, x = block_of(Layer(4, 4)), images(Layer(4, 4))
    other = twin(block, name)
    for model in (block, other):
        model(x).square().sum().backward()
    for ours, theirs in zip(other.parameters(), block.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-12)


@pytest.mark.parametrize("name", FORMS)
def test_a_block_may_be_used_twice(name):
    class Twice(nn.Module):
        def __init__(self, block: nn.Module):
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            first = self.block(x)
            return self.block(first) + first

    twice = Twice(block_of(Layer(4, 4)))
    other, x = twin(twice, name), images(Layer(4, 4))
    assert_same(outcome(twice, x), outcome(other, x))


@pytest.mark.parametrize("name", FORMS)
def test_checkpointed_blocks(name):
    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module):
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.block, x, use_reentrant=False)

    block, x = Checkpointed(block_of(Layer(4, 4))), images(Layer(4, 4))
    other = twin(block, name)
    assert_same(outcome(block, x), outcome(other, x))


@pytest.mark.parametrize("name", FORMS)
def test_distributed_blocks(name):
    block, x = block_of(Layer(4, 4)), images(Layer(4, 4))
    other = twin(block, name)
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        expected, actual = (outcome(DistributedDataParallel(m), x) for m in (block, other))
    finally:
        torch.distributed.destroy_process_group()
    assert_same(expected, actual)


@pytest.mark.parametrize("name", FORMS)
def test_the_backward_pass_may_be_repeated(name):
    block, x = twin(block_of(Layer(4, 4)), name), images(Layer(4, 4))
    loss = block(x).square().sum()
    grads = [torch.autograd.grad(loss, block.parameters(), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_no_gradient_is_needed(name):
    block, x = block_of(Layer(4, 4)), images(Layer(4, 4))
    other = twin(block, name)
    with torch.no_grad():
        assert torch.allclose(block(x), other(x), rtol=1e-12)
    assert_same(block.state_dict(), other.state_dict())


def change_activation(block: Any) -> None:
    block.activation = nn.GELU()


def add_hook(block: Any) -> None:
    block.branches.conv1x1.conv.register_forward_hook(lambda module, inputs, output: 2 * output)


def freeze_statistics(block: Any) -> None:
    block.branches.identity.bn.eval()


def average_all_batches(block: Any) -> None:
    block.branches.conv3x3.bn.momentum = None


def keep_no_statistics(block: Any) -> None:
    block.branches.conv3x3.bn = nn.BatchNorm2d(4, track_running_stats=False).double()


def drop_affine(block: Any) -> None:
    block.branches.conv1x1.bn = nn.BatchNorm2d(4, affine=False).double()


def add_branch(block: Any) -> None:
    block.branches["conv1x3"] = ConvBN(Layer(4, 4), (1, 3)).double()


def normalize_weights(block: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(block.branches.conv3x3.conv)


@pytest.mark.parametrize(
    "change",
    [
        change_activation,
        add_hook,
        freeze_statistics,
        average_all_batches,
        keep_no_statistics,
        drop_affine,
        add_branch,
        normalize_weights,
        nn.Module.eval,
    ],
)
@pytest.mark.parametrize("name", ["fused", "merged"])
def test_other_blocks_go_through_their_branches(name, change):
    block = block_of(Layer(4, 4))
    change(block)
    other, x = twin(block, name), images(Layer(4, 4))
    expected, actual = outcome(block, x), outcome(other, x)
    assert all(torch.equal(value, actual[key]) for key, value in expected.items())


def test_what_falls_back():
    block = block_of(Layer(4, 4))
    form, x = IMPLEMENTATIONS["fused"], images(Layer(4, 4))
    assert form(block, x) is not None
    assert form(block, x.float()) is None
    assert form(block, x[:1, :, :1, :1]) is None
    assert form(block, torch.randn(2, 3, 4, 4, dtype=torch.float64)) is None
    assert form(repvgg_block(Layer(4, 4, padding_mode="reflect")).double(), x) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert form(block, x) is None


def test_compiled_and_traced_blocks_go_through_their_branches():
    block = twin(block_of(Layer(4, 4)), "auto")
    x = images(Layer(4, 4))
    expected = block(x)
    changed: list[Any] = [torch.compile(block, backend="eager"), torch.fx.symbolic_trace(block)]
    for module in changed:
        assert torch.allclose(module(x), expected, rtol=1e-12)


def test_the_block_of_the_paper_takes_the_fastest_form():
    assert repvgg_block(Layer(4, 4)).implementation is IMPLEMENTATIONS["auto"]


def test_the_backward_pass_has_no_second_derivative():
    block, x = twin(block_of(Layer(4, 4)), "fused"), images(Layer(4, 4)).requires_grad_()
    (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_an_unknown_name_is_refused():
    with pytest.raises(InputError, match=r"'fastest'.*recompute_cheap"):
        use_implementation(nn.Sequential(), "fastest")


def test_a_block_with_a_form_can_be_pickled():
    block = twin(block_of(Layer(4, 4)), "recompute_all")
    again: MultiBranchBlock = pickle.loads(pickle.dumps(block))
    assert again.implementation is IMPLEMENTATIONS["recompute_all"]

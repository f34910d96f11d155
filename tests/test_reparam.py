"""Conversion of whole models: equal outputs, nothing left behind, and the input untouched."""

import copy
from typing import Any, cast

import pytest
import timm
import torch
import torchvision
from timm.layers.norm_act import freeze_batch_norm_2d
from timm.layers.std_conv import StdConv2d
from timm.utils.model import reparameterize_model
from torch import Tensor, distributed, fx, nn

from repvgg.branches import MultiBranchBlock, repvgg_block
from repvgg.errors import InputError
from repvgg.model import RepVGG, create_model
from repvgg.reparam import convert, reparameterize
from repvgg.spec import Layer, Spec

SPEC = Spec((1, 2, 3), strides=(2, 2, 1), widths=(8, 16, 16), groups=2)
BLOCKS = ("stages.0.0", "stages.1.0", "stages.1.1", "stages.2.0", "stages.2.1", "stages.2.2")


@pytest.fixture
def network(randomized) -> RepVGG:
    torch.manual_seed(0)
    return randomized(create_model(SPEC, num_classes=10))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- The result ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_plain_network_computes_the_same(relative_error, network, images, dtype, bound):
    network, images = network.to(dtype), images.to(dtype)
    plain = reparameterize(network)
    assert relative_error(network.eval()(images), plain(images)) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_algebra_is_done_in_fp64_and_rounded_once(network, dtype):
    network = network.to(dtype)
    exact = reparameterize(copy.deepcopy(network).double())
    plain = reparameterize(network)
    assert {parameter.dtype for parameter in plain.parameters()} == {dtype}
    assert same_weights(plain, exact.to(dtype))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.01), (torch.bfloat16, 0.08)])
def test_a_half_precision_network_stays_one(relative_error, network, images, dtype, bound):
    network = network.to(dtype)
    expected = copy.deepcopy(network).float().eval()(images.to(dtype).float())
    assert relative_error(expected, reparameterize(network)(images.to(dtype))) <= bound


def test_the_plain_network_is_made_of_torchs_modules_only(network):
    plain = cast(RepVGG, reparameterize(network))
    assert {type(module) for module in plain.stages.modules()} == {
        nn.Sequential,
        nn.Conv2d,
        nn.ReLU,
    }
    convs: list[Any] = [m for m in plain.modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.kernel_size == (3, 3) and conv.bias is not None for conv in convs)
    heads = [plain.pool, plain.dropout, plain.classifier]
    assert [type(m).__name__ for head in heads for m in head.modules()] == [
        *("Sequential", "AdaptiveAvgPool2d", "Flatten", "Dropout", "Linear")
    ]
    built = create_model(SPEC, num_classes=10, block="plain")
    assert plain.block == built.block == "plain"
    assert {n: p.shape for n, p in plain.named_parameters()} == {
        n: p.shape for n, p in built.named_parameters()
    }


def test_the_result_is_in_eval_mode_and_trains_what_was_trained(network):
    network.stages[0].requires_grad_(False)
    plain = reparameterize(network.train())
    assert not any(module.training for module in plain.modules())
    for name, parameter in plain.named_parameters():
        assert parameter.requires_grad == (not name.startswith("stages.0"))
        assert parameter.is_leaf


def test_the_account_says_what_was_done(network):
    conversion = convert(network)
    assert conversion.blocks == BLOCKS
    assert conversion.pairs == ()
    assert conversion.remaining == {}
    assert str(conversion) == "6 blocks and 0 conv-BN pairs folded; nothing remains to fold"


def test_a_plain_network_converts_to_itself(network):
    plain = reparameterize(network)
    again = convert(plain)
    assert again.blocks == again.pairs == ()
    assert again.model is not plain
    assert same_weights(again.model, plain)


def test_the_plain_network_can_be_traced_and_exported(network, images):
    plain = reparameterize(network)
    expected = plain(images)
    graph = fx.symbolic_trace(plain)
    assert torch.equal(graph(images), expected)
    assert {node.op for node in graph.graph.nodes} == {"placeholder", "call_module", "output"}
    exported = torch.export.export(plain, (images,))
    assert torch.equal(exported.module()(images), expected)


@pytest.mark.parametrize("training", [True, False])
def test_the_input_is_only_read(network, training):
    network.train(training)
    network.stages[1].train(not training)
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    before = copy.deepcopy(network)
    modules, random_state = dict(network.named_modules()), torch.get_rng_state()
    reparameterize(network)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert dict(network.named_modules()) == modules
    assert same_weights(network, before)
    assert [m.training for m in network.modules()] == [m.training for m in before.modules()]
    assert all(parameter.grad is not None for parameter in network.parameters())


# --- Blocks in other people's models -------------------------------------------------------------


class Segmenter(nn.Module):
    """Blocks in a dict, in a list and outside of any container; a forward that takes two images."""

    def __init__(self):
        super().__init__()
        self.encoders = nn.ModuleDict({"left": create_model(SPEC, features_only=True)})
        self.necks = nn.ModuleList([repvgg_block(Layer(16, 16, groups=4)) for _ in range(2)])
        self.head = repvgg_block(Layer(16, 5))
        self.head.activation = nn.Hardswish()
        self.not_registered = [self.head]

    def forward(self, left: Tensor, right: Tensor | None = None) -> Tensor:
        x = self.encoders["left"](left)[-1]
        x = self.necks[0](x) + (0 if right is None else self.encoders["left"](right)[-1])
        if x.sum() > 0:
            x = self.necks[1](x)
        return self.not_registered[0](x)


def test_blocks_are_found_wherever_they_are(relative_error, randomized, images):
    torch.manual_seed(0)
    model: Any = randomized(Segmenter().double())
    conversion = convert(model)
    plain: Any = conversion.model
    images = images.double()
    expected = model.eval()(images, images.flip(0))
    assert relative_error(expected, plain(images, images.flip(0))) <= 1e-12
    encoder = tuple(f"encoders.left.{name}" for name in BLOCKS)
    assert conversion.blocks == (*encoder, "necks.0", "necks.1", "head")
    assert conversion.remaining == {}
    assert not any(isinstance(module, MultiBranchBlock) for module in plain.modules())
    assert isinstance(plain.head.activation, nn.Hardswish)
    assert plain.not_registered[0] is plain.head


def test_a_block_alone_converts(relative_error, randomized):
    block = randomized(repvgg_block(Layer(4, 4)).double())
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    conversion = convert(block)
    assert relative_error(block.eval()(x), conversion.model(x)) <= 1e-12
    assert conversion.blocks == ("",)


def test_a_block_without_parameters_converts():
    from repvgg.ablations.branches import Identity

    block = MultiBranchBlock(Layer(4, 4, groups=2), {"identity": Identity(Layer(4, 4, groups=2))})
    plain = reparameterize(block)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(plain(x), x.relu())
    assert {(p.dtype, p.requires_grad) for p in plain.parameters()} == {(torch.float32, False)}


def test_what_is_shared_stays_shared(relative_error, randomized):
    block, other = repvgg_block(Layer(4, 4)), repvgg_block(Layer(4, 4))
    block.activation = other.activation = nn.PReLU()
    model = randomized(nn.Sequential(block, nn.Sequential(block), block, other).double())
    plain: Any = reparameterize(model)
    assert plain[0] is plain[1][0] is plain[2] is not plain[3]
    assert plain[0].activation is plain[3].activation is not block.activation
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    assert relative_error(model.eval()(x), plain(x)) <= 1e-12


def test_shared_weights_are_folded_with_the_statistics_of_each_block(relative_error, randomized):
    blocks: list[Any] = [repvgg_block(Layer(4, 4)) for _ in range(2)]
    blocks[1].branches.conv3x3.conv.weight = blocks[0].branches.conv3x3.conv.weight
    model = randomized(nn.Sequential(*blocks).double())
    model.append(nn.Linear(6, 6, dtype=torch.float64)).append(nn.Linear(6, 6, dtype=torch.float64))
    model[3].weight = model[2].weight
    plain: Any = reparameterize(model)
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    assert relative_error(model.eval()(x), plain(x)) <= 1e-12
    assert not torch.equal(plain[0].conv.weight, plain[1].conv.weight)
    assert plain[3].weight is plain[2].weight


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def compiled_block(network: RepVGG) -> RepVGG:
    stage: Any = network.stages[0]
    stage[0] = torch.compile(stage[0])
    return network


def compiled_in_place(network: RepVGG) -> RepVGG:
    network.compile()
    return network


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
        lambda network: torch.compile(nn.parallel.DistributedDataParallel(network)),
        compiled_block,
        compiled_in_place,
    ],
)
def test_wrappers_are_taken_off(network, wrap):
    expected = reparameterize(network)
    wrapped = wrap(network)
    for model, prefix in [(wrapped, ""), (nn.Sequential(nn.Identity(), wrapped), "1.")]:
        conversion = convert(model)
        plain = conversion.model.get_submodule(prefix[:-1])
        assert conversion.blocks == tuple(prefix + name for name in BLOCKS)
        assert isinstance(plain, RepVGG)
        assert plain._compiled_call_impl is None
        assert same_weights(plain, expected)
        assert list(dict(plain.named_modules())) == list(dict(expected.named_modules()))


@pytest.mark.parametrize("with_kwargs", [False, True])
def test_hooks_of_a_block_see_the_same_on_the_plain_one(relative_error, network, with_kwargs):
    network = network.double()
    seen: list[Tensor] = []
    block: Any = network.stages[1].get_submodule("1")

    def before(_block, inputs, *kwargs):
        assert kwargs == ({},) * with_kwargs
        seen.append(inputs[0].clone())

    def after(_block, _inputs, *kwargs_and_output):
        assert kwargs_and_output[:-1] == ({},) * with_kwargs
        seen.append(kwargs_and_output[-1].clone())

    block.register_forward_pre_hook(before, with_kwargs=with_kwargs)
    block.register_forward_hook(after, with_kwargs=with_kwargs)
    plain = reparameterize(network)
    assert not seen
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    network.eval()(images)
    plain(images)
    assert len(seen) == 4
    assert relative_error(seen[0], seen[2]) <= 1e-12
    assert relative_error(seen[1], seen[3]) <= 1e-12


def test_a_block_that_is_not_linear_is_refused_by_name(network):
    norm = nn.BatchNorm2d(16, track_running_stats=False)
    network.stages[1].get_submodule("1.branches.identity").bn = norm
    with pytest.raises(InputError, match=r"block stages\.1\.1 cannot be folded.*statistics"):
        convert(network)


# --- Conv-BN pairs -------------------------------------------------------------------------------


def count_norms(model: nn.Module) -> int:
    return sum(isinstance(getattr(m, "running_mean", None), Tensor) for m in model.modules())


@pytest.mark.parametrize(
    "make",
    [
        torchvision.models.resnet18,
        torchvision.models.regnet_y_400mf,
        torchvision.models.mobilenet_v3_small,
        torchvision.models.shufflenet_v2_x0_5,  # its channel shuffle is traced too
        lambda: timm.create_model("resnet26"),
        lambda: timm.create_model("efficientnet_b0"),
        lambda: timm.create_model("tf_efficientnet_lite0"),
        lambda: timm.create_model("regnetx_002"),
        lambda: freeze_batch_norm_2d(timm.create_model("resnet18")),
        lambda: freeze_batch_norm_2d(timm.create_model("regnetx_002")),
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(torchvision.models.resnet18()),
    ],
)
def test_conv_bn_pairs_of_the_baselines_are_folded(relative_error, randomized, make):
    torch.manual_seed(0)
    model = randomized(make().double()).eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    conversion = convert(model)
    assert len(conversion.pairs) == count_norms(model) > 0
    assert conversion.remaining == {}
    assert count_norms(conversion.model) == 0
    assert not any(module.training for module in conversion.model.modules())
    assert relative_error(model(images), conversion.model(images)) <= 1e-12


def test_pairs_are_named_and_folded_in_one_and_three_dimensions_too(relative_error, randomized):
    for conv, norm, size in [
        (nn.Conv1d(2, 4, 3, bias=False), nn.BatchNorm1d(4), (8,)),
        (nn.Conv3d(2, 4, 3, groups=2), nn.BatchNorm3d(4, affine=False), (4, 5, 6)),
    ]:
        model = randomized(nn.Sequential(nn.ReLU(), conv, norm).double()).eval()
        conversion = convert(model)
        assert conversion.pairs == (("1", "2"),)
        x = torch.randn(2, 2, *size, dtype=torch.float64)
        assert relative_error(model(x), conversion.model(x)) <= 1e-12


class Pair(nn.Module):
    """A convolution, then a batch norm, with something in the way."""

    def __init__(self, **modules: nn.Module):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class UsedTwice(Pair):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.bn(x) + x


class CalledTwice(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.conv(x)))


class AfterRelu(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).relu())


class NormFirst(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(x))


class TiedWeight(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return torch.conv2d(super().forward(x), self.conv.weight)


class TiedScale(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.bn.weight.sum()


def hooked(name: str) -> Pair:
    pair = Pair()
    pair.get_submodule(name).register_forward_hook(lambda *given: given[-1].abs())
    return pair


def parametrized() -> Pair:
    pair = Pair()
    nn.utils.parametrizations.weight_norm(pair.conv)
    return pair


def hooked_around() -> Pair:
    pair = Pair(conv=nn.Sequential(nn.Conv2d(3, 3, 3)))
    pair.conv.register_forward_hook(lambda *given: given[-1].abs())
    return pair


def shared_weight() -> Pair:
    pair = Pair(other=(other := nn.Conv2d(3, 3, 3)))
    other.weight = pair.conv.weight
    return pair


@pytest.mark.parametrize(
    "make",
    [
        UsedTwice,
        CalledTwice,
        AfterRelu,
        NormFirst,
        TiedWeight,
        TiedScale,
        lambda: hooked("conv"),
        lambda: hooked("bn"),
        hooked_around,
        parametrized,
        shared_weight,
        lambda: Pair(conv=StdConv2d(3, 3, 3)),
        lambda: Pair(conv=nn.ConvTranspose2d(3, 3, 3)),
        lambda: Pair(bn=nn.BatchNorm2d(3, track_running_stats=False)),
    ],
)
def test_a_batch_norm_that_cannot_be_folded_stays_and_is_reported(randomized, make):
    model = make().double().eval()
    if model.bn.track_running_stats:
        randomized(model)
    conversion = convert(model)
    assert conversion.pairs == ()
    assert conversion.remaining == {"bn": "BatchNorm2d"}
    assert str(conversion).endswith("not folded: bn (BatchNorm2d)")
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(model(x), conversion.model(x))


def test_pairs_inside_a_hooked_module_are_folded_and_the_hook_sees_no_tracer(randomized):
    seen: list[type] = []
    model = randomized(nn.Sequential(Pair(), nn.ReLU()).double()).eval()
    model[0].register_forward_hook(lambda _module, _inputs, output: seen.append(type(output)))
    assert convert(model).pairs == (("0.conv", "0.bn"),)
    assert seen == []


class Branching(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module):
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) if x.sum() > 0 else self.right(x)


def test_pairs_are_folded_in_the_parts_of_a_model_that_cannot_be_traced(randomized):
    conversion = convert(randomized(Branching(Pair(), Pair())))
    assert conversion.pairs == (("left.conv", "left.bn"), ("right.conv", "right.bn"))


@pytest.mark.parametrize("shared", ["conv", "bn"])
def test_a_part_of_two_pairs_is_not_folded(relative_error, randomized, shared):
    left = Pair()
    right = Pair(**{shared: left.get_submodule(shared)})
    model = randomized(Branching(left, right).double()).eval()
    conversion = convert(model)
    assert conversion.pairs == ()
    for sign in (1, -1):
        x = sign * torch.rand(1, 3, 6, 6, dtype=torch.float64)
        assert torch.equal(model(x), conversion.model(x))


def test_pairs_can_be_left_alone(network):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), network)
    conversion = convert(model, fold_pairs=False)
    assert conversion.pairs == ()
    assert conversion.blocks == tuple(f"2.{name}" for name in BLOCKS)
    assert conversion.remaining == {"1": "BatchNorm2d"}


def test_blocks_of_another_package_are_reported_until_they_are_folded(relative_error, randomized):
    theirs = randomized(timm.create_model("repvgg_a0", num_classes=4).double()).eval()
    conversion = convert(theirs)
    assert [kind for kind in conversion.remaining.values() if kind == "RepVggBlock"] == (
        ["RepVggBlock"] * 22
    )
    assert "22 blocks" not in str(conversion)
    assert "stages.0.0 (RepVggBlock)" in str(conversion)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert relative_error(theirs(images), conversion.model(images)) <= 1e-12
    assert convert(reparameterize_model(theirs)).remaining == {}

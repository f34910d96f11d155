"""Tables 6 and 7: each block is what its row says, and folds exactly, or is refused."""

import dataclasses
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from timm.layers.squeeze_excite import SEModule
from timm.models.byobnet import LayerFn, RepVggBlock
from torch import nn

import repvgg
from repvgg.ablations import run
from repvgg.ablations.branches import Dirac, PointwiseThen, Trivial, dirac_kernel
from repvgg.ablations.jobs import Job
from repvgg.ablations.residual import ResidualBlock, replace_conv3x3
from repvgg.baselines import create_named
from repvgg.blocks import BLOCKS, PLAIN_OF, STAGES, is_plain, plain_name, trained_name
from repvgg.branches import MultiBranchBlock
from repvgg.errors import InputError
from repvgg.model import create_model
from repvgg.reparam import convert, reparameterize
from repvgg.reproduce.printed import TABLE6, TABLE7
from repvgg.spec import Layer, Spec
from repvgg.training.recipes import digits
from repvgg.training.run_folder import RunFolder

FOLDING = [name for name in BLOCKS if not is_plain(name) and name != "relu_in_branches"]
WITH_RELU = [name for name in FOLDING if name not in PLAIN_OF]
SPEC = Spec((1, 2, 4, 1), strides=(1, 2, 2, 1), widths=(4, 8, 8, 12), groups=2)


def random_block(name, layer, randomized, seed=0):
    torch.manual_seed(seed)
    block = randomized(nn.Sequential(BLOCKS[name](layer)), seed).double()
    for parameter_name, parameter in block.named_parameters():
        if parameter_name.endswith((".a", ".b")):
            parameter.data.uniform_(-2, 2)
    return block.eval()


@pytest.mark.parametrize("name", WITH_RELU)
@settings(deadline=None, max_examples=12)
@given(
    channels=st.sampled_from([(4, 4), (4, 8), (8, 4)]),
    stride=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 4]),
    dilation=st.sampled_from([1, 2]),
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    seed=st.integers(0, 1000),
)
def test_a_block_folds_exactly(
    name, channels, stride, groups, dilation, size, seed, randomized, relative_error
):
    layer = Layer(*channels, stride=stride, groups=groups, dilation=dilation)
    block = random_block(name, layer, randomized, seed)
    plain = reparameterize(block)
    assert [type(m) for m in plain.modules() if not list(m.children())] == [nn.Conv2d, nn.ReLU]
    x = torch.randn(2, channels[0], *size, dtype=torch.float64)
    before, conv = block[0].branches, plain.get_submodule("0.conv")
    with torch.no_grad():
        expected = sum(branch(x) for branch in before.values())
        assert relative_error(expected, conv(x)) <= 1e-12
        single = relative_error(expected, conv.float()(x.float()).double())
    assert single <= 1e-5


@pytest.mark.parametrize("name", FOLDING)
def test_every_network_becomes_the_same_plain_one(name, randomized, relative_error):
    network = randomized(create_model(SPEC, num_classes=3, block=name))
    plain: Any = reparameterize(network)
    usual = create_model(SPEC, num_classes=3, block=PLAIN_OF.get(name, "plain"))
    assert (plain.block, trained_name(usual.block)) == (plain_name(name), trained_name(plain.block))
    assert {k: v.shape for k, v in plain.state_dict().items()} == {
        k: v.shape for k, v in usual.state_dict().items()
    }
    assert str(plain.stages) == str(usual.stages)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert relative_error(network.eval()(x), plain(x)) <= 1e-5


@pytest.mark.parametrize("name", [*BLOCKS, *STAGES])
def test_every_network_trains_and_is_saved_and_loaded(name, tmp_path):
    torch.manual_seed(0)
    network = create_model(SPEC, num_classes=3, block=name)
    network(torch.randn(4, 3, 16, 16)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    repvgg.save(network, tmp_path / "network.safetensors")
    loaded = repvgg.load(tmp_path / "network.safetensors")
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(network.eval()(x), loaded(x))


def test_relu_in_the_branches_is_refused_with_the_reason():
    network = create_model(SPEC, block="relu_in_branches")
    with pytest.raises(InputError, match=r"block stages\.0\.0 cannot be folded: .*ends in a ReLU"):
        reparameterize(network)


def test_the_rows_of_the_paper_are_there():
    blocks = {row.block for row in (*TABLE6, *TABLE7)}
    assert blocks <= {*BLOCKS, *STAGES}
    assert set(run.ROWS) == {name for name in (*BLOCKS, *STAGES) if not is_plain(name)}


@pytest.mark.parametrize(
    ("name", "same", "other"),
    [
        ("only_3x3", ["conv3x3"], ["conv3x3"]),
        ("without_1x1", ["conv3x3", "identity"], ["conv3x3"]),
        ("without_identity", ["conv3x3", "conv1x1"], ["conv3x3", "conv1x1"]),
        ("repvgg", ["conv3x3", "conv1x1", "identity"], ["conv3x3", "conv1x1"]),
        ("asymmetric", ["conv3x3", "conv1x3", "conv3x1"], ["conv3x3", "conv1x3", "conv3x1"]),
    ],
)
def test_blocks_have_the_branches_of_their_row(name, same, other):
    for layer, expected in ((Layer(4, 4), same), (Layer(4, 8), other)):
        block: Any = BLOCKS[name](layer)
        assert list(block.branches) == expected


def test_the_norm_comes_after_the_addition():
    block: Any = BLOCKS["norm_after_addition"](Layer(4, 4)).double().train()
    (total,) = block.branches.values()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    parts = total.branches
    added = (
        F.conv2d(x, parts.conv3x3.conv.weight, padding=1)
        + F.conv2d(x, parts.conv1x1.conv.weight)
        + x
    )
    torch.testing.assert_close(block(x), F.batch_norm(added, None, None, training=True).relu())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in block.modules()) == 1


def test_diracnet_and_trivial_kernels_by_hand():
    torch.manual_seed(0)
    dirac, trivial = Dirac(Layer(4, 4)), Trivial(Layer(4, 4))
    dirac.a.data, dirac.b.data = torch.tensor([1.0, 2, 3, 4]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    for o in range(4):
        eye = torch.zeros(4, 3, 3)
        eye[o, 1, 1] = 1
        weight = dirac.conv.weight[o]
        expected = (1.0 + o) * eye + 0.1 * (1 + o) * weight / weight.square().sum().sqrt()
        torch.testing.assert_close(dirac.kernel()[o], expected)
        torch.testing.assert_close(trivial.kernel()[o], eye + trivial.conv.weight[o])
    changing = Trivial(Layer(4, 8))
    assert torch.equal(changing.kernel(), changing.conv.weight)
    wide = dirac_kernel(torch.empty(8, 2, 3, 3), groups=2)
    assert torch.equal(wide, nn.init.dirac_(torch.empty(8, 2, 3, 3), groups=2))


def test_a_branch_in_sequence_needs_zero_padding():
    with pytest.raises(InputError, match="padding_mode='zeros'"):
        PointwiseThen(Layer(4, 4, padding_mode="reflect"))


def test_residual_reorg_has_the_blocks_that_the_paper_says():
    with torch.device("meta"):
        network = create_model("repvgg_b0", block="residual_reorg")
        plain = create_model("repvgg_b0", block="plain")
    stages = network.stages.children()
    counts = [sum(isinstance(m, ResidualBlock) for m in stage.children()) for stage in stages]
    assert counts == [0, 2, 3, 8, 0]

    def convs(model):
        return [
            m.weight.shape
            for m in model.modules()
            if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
        ]

    assert convs(network) == convs(plain)
    with pytest.raises(InputError, match="two layers, found a stage of 3"):
        create_model(Spec((1, 3), strides=(2, 2), widths=(4, 4)), block="residual_reorg")


def test_residual_reorg_computes_a_shortcut(randomized, relative_error):
    spec = Spec((1, 2, 1), strides=(1, 2, 1), widths=(4, 6, 4))
    network = randomized(create_model(spec, block="residual_reorg")).double().eval()
    block: Any = network.stages.get_submodule("1.0")
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)

    def conv_bn(conv, bn, x, stride=None):
        x = F.conv2d(x, conv.weight, None, stride or conv.stride, conv.padding)
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)

    first, second = block.first.branches.conv3x3, block.second.branches.conv3x3
    y = conv_bn(second.conv, second.bn, conv_bn(first.conv, first.bn, x).relu())
    shortcut = conv_bn(block.shortcut.conv, block.shortcut.bn, x, stride=2)
    expected = (y + shortcut).relu()
    torch.testing.assert_close(block(x), expected)
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    conversion = convert(network)
    assert conversion.remaining == {}
    assert relative_error(network(images), conversion.model(images)) <= 1e-12


def test_every_3x3_convolution_of_resnet_50_becomes_a_block_and_back(randomized, relative_error):
    torch.manual_seed(0)
    network = create_named("ResNet-50", num_classes=10)
    replaced = randomized(replace_conv3x3(network)).eval()
    blocks = [m for m in replaced.modules() if isinstance(m, MultiBranchBlock)]
    assert len(blocks) == 16
    assert sum("identity" in block.branches for block in blocks) == 16  # strides are in the 1×1
    assert not any(isinstance(m, MultiBranchBlock) for m in network.modules())
    conversion = convert(replaced)
    assert conversion.remaining == {}
    folded = reparameterize(network)
    assert [p.shape for p in conversion.model.parameters()] == [
        p.shape for p in folded.parameters()
    ]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(replaced(x), conversion.model(x)) <= 1e-4
    with pytest.raises(InputError, match="a 3×3 convolution is needed"):
        replace_conv3x3(nn.Linear(3, 3))


def test_a_converted_network_with_attention_is_saved_and_loaded(randomized, tmp_path):
    network = randomized(create_model(SPEC, num_classes=3, block="squeeze_excite"))
    plain = reparameterize(network)
    repvgg.save(plain, tmp_path / "plain.safetensors")
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(repvgg.load(tmp_path / "plain.safetensors")(x), plain(x))


def test_d2se_is_timms(relative_error):
    def shapes(model):
        return sorted(tuple(p.shape) for p in model.parameters())

    with torch.device("meta"):
        assert shapes(create_model("repvgg_d2se")) == shapes(timm.create_model("repvgg_d2se"))
    torch.manual_seed(0)
    ours = create_model(Spec((2,), strides=(1,), widths=(32,)), block="squeeze_excite")
    attention: Any = squeeze_of_timm
    theirs: Any = RepVggBlock(32, 32, layers=LayerFn(act=nn.SiLU, attn=attention)).eval()
    block: Any = ours.stages.get_submodule("0.1").eval()
    pairs = {
        "conv_kxk": block.branches.conv3x3,
        "conv_1x1": block.branches.conv1x1,
    }
    for name, branch in pairs.items():
        getattr(theirs, name).conv.load_state_dict(branch.conv.state_dict())
    squeeze = block.activation[0]
    theirs.attn.fc1.load_state_dict(squeeze.fc1.state_dict())
    theirs.attn.fc2.load_state_dict(squeeze.fc2.state_dict())
    x = torch.randn(2, 32, 5, 5)
    with torch.no_grad():
        assert relative_error(theirs(x), block(x)) <= 1e-6


def squeeze_of_timm(channels, **options):
    return SEModule(channels, rd_ratio=1 / 16, rd_divisor=1, **options)


SHORT = dataclasses.replace(
    digits(), model="repvgg_digits:widths=4-8-8-8", epochs=1, batch_size=256, base_batch_size=256
)


def test_an_ablation_trains_every_row_and_goes_on(tmp_path, capsys):
    rows = ("repvgg", "relu_in_branches", "residual_reorg")
    outcomes = run.ablate(SHORT, tmp_path, rows, range(2))
    assert [(o.block, o.seed) for o in outcomes] == [(b, s) for s in range(2) for b in rows]
    assert [o.conversion_error is None for o in outcomes[:3]] == [False, True, False]
    assert run.read_outcomes(tmp_path / run.RESULTS) == outcomes
    capsys.readouterr()
    assert run.ablate(SHORT, tmp_path, rows, range(2)) == outcomes
    assert "loss" not in capsys.readouterr().out  # nothing is trained again
    more = run.ablate(SHORT, tmp_path, ("trivial",), range(1))
    assert more[:6] == outcomes
    assert [(o.block, o.seed) for o in more[6:]] == [("trivial", 0)]
    assert run.read_outcomes(tmp_path / run.RESULTS) == more
    with pytest.raises(InputError, match="epochs 1 → 2"):
        run.ablate(dataclasses.replace(SHORT, epochs=2), tmp_path, rows, range(1))
    times = run.speeds(tmp_path, outcomes)
    assert [plain is None for _, plain in times.values()] == [False, True, False]
    report = run.report(outcomes, "Title", times)
    assert len(set(report.columns)) == len(report.columns)  # a column of a CSV is found by its name
    cells = dict(zip(report.columns, report.rows[0], strict=True))
    before = times[rows[0]][0]
    assert cells["images/s before"] == round(32 / before.median, 1)
    assert cells["± before (%)"] == round(100 * before.spread, 1)
    assert [row[0] for row in report.rows] == [b for b in run.ROWS if b in rows]
    run.draw(tmp_path / "chart.png", outcomes, "Title")
    with pytest.raises(InputError, match="rows: sgd unknown"):
        run.ablate(SHORT, tmp_path, ("sgd",), range(1))


def test_the_time_left_counts_the_epochs_that_runs_side_by_side_have_done(tmp_path):
    config = dataclasses.replace(SHORT, epochs=3)
    jobs = [Job(name, config, tmp_path / name) for name in ("begun", "new")]
    assert run._epochs_left(jobs) == 6
    folder = RunFolder(tmp_path / "begun", config)
    assert run._epochs_left(jobs) == 6
    folder.write_history([{"epoch": 1}, {"epoch": 2}])
    assert run._epochs_left(jobs) == 4


def test_wrong_data_can_be_mended_in_the_same_folder(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        run.ablate(dataclasses.replace(SHORT, data="nowhere"), tmp_path, ("repvgg",), range(1))
    (outcome,) = run.ablate(SHORT, tmp_path, ("repvgg",), range(1))
    assert outcome.block == "repvgg"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"\xc9\x00", "UnicodeDecodeError"),
        (b"block,seed\nrepvgg,0\n", "no 'top1'"),
        (b"block,seed,top1,train_top1,conversion_error\nrepvgg,0,high,1,\n", "'high'"),
        (b"block,seed,top1,train_top1,conversion_error\nvgg,0,1,1,\n", "rows vgg unknown"),
    ],
)
def test_other_files_are_no_results(content, found, tmp_path):
    (tmp_path / run.RESULTS).write_bytes(content)
    with pytest.raises(InputError, match=rf"results\.csv.*{found}"):
        run.read_outcomes(tmp_path / run.RESULTS)


@pytest.mark.parametrize(
    ("shift", "said"), [(0.17, "holds"), (0.14, "open"), (-0.14, "open"), (-0.17, "reversed")]
)
def test_an_order_is_judged_as_by_the_t_test(shift, said):
    plain = [0.70, 0.72, 0.83]
    outcomes = [
        run.Outcome(block, seed, top, 0.9, 1e-7)
        for block, more in (("only_3x3", 0), ("repvgg", shift))
        for seed, top in enumerate(value + more for value in plain)
    ]
    ((*_, here),) = run.orders(outcomes, TABLE6).rows
    halves = ([o.top1 for o in half] for half in (outcomes[:3], outcomes[3:]))
    test: Any = stats.ttest_ind(*halves)
    assert here == said
    assert (test.pvalue < 0.05) == (said != "open")


def test_one_seed_orders_nothing(capsys):
    outcomes = [run.Outcome(block, 0, 0.8, 0.9, 1e-7) for block in ("only_3x3", "repvgg")]
    orders = run.orders(outcomes, TABLE6, "Orders")
    assert orders.rows == ()
    assert "two seeds" in orders.notes[0]
    orders.show()
    assert capsys.readouterr().out == f"{orders.notes[0]}\n"


def test_orders_and_means_by_hand():
    tops = {"only_3x3": (0.70, 0.72, 0.74), "repvgg": (0.80, 0.81, 0.85)}
    outcomes = [
        run.Outcome(block, seed, top, 0.9, 1e-7)
        for block, values in tops.items()
        for seed, top in enumerate(values)
    ]
    (row,) = run.orders(outcomes, TABLE6).rows
    # Squares 8 and 14 over 2 + 2 degrees of freedom: variance 5.5; √(5.5 (1/3 + 1/3)) = 1.91.
    assert row == ("both branches > neither branch", 2.75, 10, 1.91, "holds")
    by_block = {row[0]: row for row in run.report(outcomes, "Title").rows}
    assert by_block["only_3x3"][2:6] == (72.39, 72.0, 2.0, 3)

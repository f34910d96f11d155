"""The native engine against a convolution in double, against PyTorch, and against hostile files."""

import json
import threading
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import repvgg
from repvgg.data.images import decode_image, find_images
from repvgg.data.transforms import evaluation_transform, normalize
from repvgg.engine import Engine, instruction_sets
from repvgg.preprocessing import Preprocessing

native = pytest.importorskip("repvgg._native", reason="no C++ compiler built the native part")

# Of the largest output, in the worst case that a search through small maps with few channels finds.
# Larger tiles amplify the rounding of fp32.
WORST = {0: 1.2e-6, 2: 2e-6, 3: 2e-6, 4: 2e-6, 5: 1e-5, 6: 1e-5, 7: 3e-5}
# In layers such as networks have.
USUAL = {2: 1e-6, 3: 1e-6, 4: 2e-6, 5: 4e-6, 6: 1e-5, 7: 3e-5}


@pytest.fixture(autouse=True)
def own_plans(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def plain(name="repvgg_a0", num_classes=1000, seed=0):
    """A plain network with varied statistics folded in."""
    torch.manual_seed(seed)
    model = repvgg.create_model(name, num_classes=num_classes).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(cast(Tensor, module.running_mean), 0, 0.2)
            nn.init.uniform_(cast(Tensor, module.running_var), 0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return repvgg.reparameterize(model)


def photographs(folder, count):
    """(count, 3, 224, 224), normalized."""
    preprocessing = Preprocessing.for_channels(3, 224)
    transform = evaluation_transform(preprocessing)
    files = find_images(folder)[:count]
    return normalize(
        torch.stack([transform(decode_image(file, 3)) for file in files]), preprocessing
    )


def relative_error(found, network, images):
    with torch.no_grad():
        truth = network.double()(images.double())
        network.float()
    return float((found.double() - truth).abs().max() / truth.abs().max())


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 4]))
    stride = draw(st.sampled_from([1, 1, 2, 3]))
    dilation = draw(st.sampled_from([1, 1, 2, 4])) if stride == 1 else 1
    size = st.integers(1, 200 // groups).map(lambda n: n * groups)
    side = st.integers(1, 70)
    tile = st.sampled_from([0, 2, 3, 4, 5, 6, 7])
    rows = draw(tile)
    return {
        "in": draw(size),
        "out": draw(size),
        "groups": groups,
        "stride": stride,
        "dilation": dilation,
        "kernel": draw(st.sampled_from([3, 3, 3, 1])),
        "images": draw(st.integers(1, 5)),
        "height": draw(side),
        "width": draw(side),
        "relu": draw(st.booleans()),
        "threads": draw(st.integers(1, 4)),
        "rows": rows,
        "columns": draw(tile.filter(bool)) if rows else 0,
        "vectors": draw(st.integers(1, 3)),
        "block": draw(st.sampled_from([1, 5, 12, 48])),
        "order": draw(st.integers(0, 4)),
        "seed": draw(st.integers(0, 1000)),
    }


def run_one(case, isa):
    rng = np.random.default_rng(case["seed"])
    shape = (case["images"], case["in"], case["height"], case["width"])
    x = np.maximum(rng.standard_normal(shape), -0.5).astype(np.float32)
    kernel = (case["kernel"], case["kernel"])
    weight = rng.standard_normal((case["out"], case["in"] // case["groups"], *kernel))
    bias = rng.standard_normal(case["out"]).astype(np.float32)
    weight = weight.astype(np.float32)
    rest = (case["groups"], case["stride"], case["dilation"], case["relu"])
    builder = native.Builder([0.0] * case["in"], [1.0] * case["in"])
    first = builder.conv("conv", 0, weight, bias, *rest)
    assert first == 1
    algorithm = " ".join(
        str(int(case[key])) for key in ("rows", "columns", "vectors", "block", "order")
    )
    engine = native.Engine(builder, case["threads"], False, "none", isa, "fp32", False, algorithm)
    found = engine(x).reshape(-1)
    again = engine(x).reshape(-1)
    x64, weight64, bias64 = (torch.from_numpy(a).double() for a in (x, weight, bias))
    padding = case["kernel"] // 2 * case["dilation"]
    dilation = case["dilation"] if case["kernel"] == 3 else 1
    truth = F.conv2d(x64, weight64, bias64, case["stride"], padding, dilation, case["groups"])
    truth = (truth.relu() if case["relu"] else truth).numpy()
    # A few outputs can be small by chance; this is what outputs of such data are like.
    terms = weight[0].size
    usual = terms**0.5 * float(np.sqrt(np.mean(x**2)) * np.sqrt(np.mean(weight**2)))
    return found, again, truth.reshape(-1), usual


# 1,620 products a sum: added up one after another they had an error of 2.2e-6.
LONG_SUMS = {"in": 180, "out": 66, "groups": 1, "stride": 3, "dilation": 1, "kernel": 3}
LONG_SUMS |= {"images": 3, "height": 14, "width": 24, "relu": False, "threads": 1, "seed": 38}
LONG_SUMS |= {"rows": 0, "columns": 0, "vectors": 1, "block": 1, "order": 0}


@settings(max_examples=60, deadline=None)
@example(case=LONG_SUMS, isa=instruction_sets()[0])
@given(case=convolutions(), isa=st.sampled_from(instruction_sets()))
def test_every_algorithm_is_a_convolution(case, isa):
    found, again, truth, usual = run_one(case, isa)
    np.testing.assert_array_equal(found, again)
    error = np.abs(found - truth).max() / max(np.abs(truth).max(), usual)
    assert error <= WORST[max(case["rows"], case["columns"])]


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("channels", [640, 2560])
def test_errors_of_direct_sums_do_not_grow_with_the_channels(isa, kernel, channels):
    case = LONG_SUMS | {"in": channels, "kernel": kernel, "vectors": 2}
    found, _, truth, usual = run_one(case, isa)
    assert np.abs(found - truth).max() / max(np.abs(truth).max(), usual) <= WORST[0]


@pytest.mark.parametrize(
    ("tile", "stride"), [(2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1), (2, 2), (4, 2), (7, 2)]
)
@pytest.mark.parametrize("order", [0, 3, 4])
def test_errors_of_usual_layers(tile, stride, order):
    case = {"in": 192, "out": 64, "groups": 1, "stride": stride, "dilation": 1, "kernel": 3}
    case |= {"images": 1, "height": 28, "width": 28, "relu": True, "threads": 2, "seed": 0}
    case |= {"rows": tile, "columns": tile, "vectors": 2, "block": 12, "order": order}
    found, _, truth, _ = run_one(case, instruction_sets()[0])
    assert np.abs(found - truth).max() / np.abs(truth).max() <= USUAL[tile]


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("rows", [2, 4, 7])
def test_forced_tile_is_the_one_in_use(rows, isa):
    # Whole vectors of AVX-512: an input of fewer channels than a vector has is convolved directly.
    builder = native.Builder([0.0] * 16, [1.0] * 16)
    weight = np.ones((16, 16, 3, 3), np.float32)
    builder.conv("conv", 0, weight, np.zeros(16, np.float32), 1, 1, 1, True)
    engine = native.Engine(builder, 1, False, "none", isa, "fp32", algorithm=f"{rows} 4 1 12 0")
    layers = engine.profile(1, 28, 28, 1)
    assert layers[1]["algorithm"] == f"F({rows}x4)"
    assert engine.isa == isa
    tiles = -(-28 // rows) * 7
    assert layers[1]["multiplications"] == tiles * (rows + 2) * 6 * 256
    assert layers[1]["multiply_adds"] == 28 * 28 * 9 * 256


@pytest.mark.parametrize(
    ("name", "tune"), [("repvgg_a0", "fast"), ("repvgg_a0", None), ("repvgg_b1g4", None)]
)
def test_whole_network(name, tune, imagenet_sample):
    network = plain(name)
    images = photographs(imagenet_sample, 2)
    engine = repvgg.compile(network, threads=2, tune=tune)
    assert relative_error(engine(images), network, images) < 1e-5


@pytest.mark.parametrize("tune", ["fast", None])
def test_a_compact_engine_keeps_the_weights_as_they_are(tune):
    network = plain("repvgg_a0", 10)
    images = torch.randn(2, 3, 96, 96)
    engine = repvgg.compile(network, threads=2, tune=tune, compact=True)
    assert relative_error(engine(images), network, images) < 1e-5
    parameters = 4 * sum(p.numel() for p in network.parameters())
    # Each layer's are padded to whole vectors and large pages.
    assert parameters <= engine.memory.weights < 1.5 * parameters
    assert {row.algorithm for row in engine.plan} - {"", "direct"}


@pytest.mark.parametrize("isa", instruction_sets())
def test_weights_in_half_precision_are_numpys(isa):
    """An input of one 1 gives the weights themselves."""
    values = np.array([0, 1, -1, 65504, 6e-8, -3.1e-7, 1e-9, 0.1, 1 / 3, 2049, 2051, -5.96e-8])
    weight = values.astype(np.float32).reshape(12, 1, 1, 1)
    builder = native.Builder([0.0], [1.0])
    builder.conv("conv", 0, weight, np.zeros(12, np.float32), 1, 1, 1, False)
    engine = native.Engine(builder, 1, False, "none", isa, "fp16")
    found = engine(np.ones((1, 1, 1, 1), np.float32))
    np.testing.assert_array_equal(found.ravel(), values.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("tune", ["fast", None])
def test_half_precision_is_near(tune):
    network = plain("repvgg_a0", 10)
    images = torch.randn(2, 3, 64, 64)
    half = repvgg.compile(network, threads=1, tune=tune, weights="fp16")
    assert 1e-5 < relative_error(half(images), network, images) < 2e-3


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("algorithm", ["0 0 1 12 0", "4 4 1 12 0"])
def test_half_precision_is_half_of_the_memory(algorithm, isa):
    weight = np.ones((256, 256, 3, 3), np.float32)
    found = {}
    for weights in ("fp32", "fp16"):
        builder = native.Builder([0.0] * 256, [1.0] * 256)
        builder.conv("conv", 0, weight, np.zeros(256, np.float32), 1, 1, 1, True)
        engine = native.Engine(builder, 1, False, "none", isa, weights, algorithm=algorithm)
        engine(np.ones((1, 256, 8, 8), np.float32))
        found[weights], _, _ = engine.memory()
    taps = 9 if algorithm.startswith("0") else 36
    for weights, size in (("fp16", 2), ("fp32", 4)):
        expected = size * taps * 256**2
        assert expected <= found[weights] < expected + (2 << 20) + 8192  # a large page, and biases


def test_weights_beyond_half_precision_are_refused():
    conv = nn.Conv2d(3, 4, 1)
    nn.init.constant_(conv.weight, 1e5)
    network = nn.Sequential(conv).eval()
    engine = repvgg.compile(network, weights="fp16", tune=None)
    with pytest.raises(repvgg.InputError, match="beyond 65504"):
        engine(torch.zeros(1, 3, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name", repvgg.list_models("repvgg_[ab]*"))
def test_every_variant(name, imagenet_sample):
    network = plain(name)
    images = photographs(imagenet_sample, 40)
    engine = repvgg.compile(network, tune=None)
    assert relative_error(engine(images[:1]), network, images[:1]) < 1e-5
    assert_same_top1(engine, network, images)


@pytest.mark.slow
def test_every_photograph_gets_the_same_class(imagenet_sample):
    network = plain()
    images = photographs(imagenet_sample, 1000)
    assert len(images) == 1000
    assert_same_top1(repvgg.compile(network), network, images)


def assert_same_top1(engine, network, images):
    with torch.inference_mode():
        logits = torch.cat([network(batch) for batch in images.split(20)])
    found = torch.cat([engine(batch) for batch in images.split(20)])
    # Random weights give nearly all images the same class, unless a bias takes out the mean.
    classes = (logits - logits.mean(0)).argmax(1)
    assert len(classes.unique()) > 10
    assert torch.equal((found - logits.mean(0)).argmax(1), classes)


def test_odd_sizes_and_batches():
    network = plain("repvgg_a0", 10)
    engine = repvgg.compile(network, threads=2, tune=None)
    for n, h, w in [(3, 33, 70), (1, 1, 1), (5, 64, 32), (40, 48, 40)]:
        images = torch.randn(n, 3, h, w)
        assert relative_error(engine(images), network, images) < 1e-5
    assert engine(torch.zeros(0, 3, 32, 32)).shape == (0, 10)


def test_bytes_are_normalized_by_the_engine():
    network = plain("repvgg_a0", 10)
    pixels = torch.randint(0, 256, (2, 64, 48, 3), dtype=torch.uint8)
    mean = torch.tensor(network.preprocessing.mean).double()
    std = torch.tensor(network.preprocessing.std).double()
    images = ((pixels.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    engine = repvgg.compile(network, threads=1, tune=None)
    assert relative_error(engine(pixels), network, images) < 1e-5


def test_numpy_in_numpy_out_without_a_copy():
    network = plain("repvgg_digits", 10)
    engine = repvgg.compile(network, threads=1)
    images = torch.randn(4, 1, 8, 8) if network.in_chans == 1 else torch.randn(4, 3, 8, 8)
    as_tensor, as_array = engine(images), engine(images.numpy())
    assert isinstance(as_tensor, torch.Tensor)
    assert isinstance(as_array, np.ndarray)
    np.testing.assert_array_equal(as_tensor.numpy(), as_array)


def test_images_beyond_what_it_counts_are_refused():
    engine = repvgg.compile(plain("repvgg_a0", 10), threads=1, tune=None)
    images = np.zeros((1, 1, 1, 1), np.float32)
    huge = np.lib.stride_tricks.as_strided(images, (1, 3, 32768, 32768), (0, 0, 0, 0))
    with pytest.raises(repvgg.InputError, match="32768 x 32768 is too large for"):
        engine(huge)


def test_any_order_of_memory():
    engine = repvgg.compile(plain("repvgg_a0", 10), threads=1, tune=None)
    images = torch.randn(2, 3, 40, 36)
    logits = engine(images)
    assert torch.equal(logits, engine(images.to(memory_format=torch.channels_last)))
    assert torch.equal(logits, engine(images.transpose(2, 3).contiguous().transpose(2, 3)))
    every_second = torch.zeros(2, 3, 80, 72)
    every_second[:, :, ::2, ::2] = images
    assert torch.equal(logits, engine(every_second[:, :, ::2, ::2]))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), "float64"),
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\)"),
        (torch.zeros(1, 4, 32, 32), "3 channels"),
        (torch.zeros(1, 3, 0, 32), "a size"),
        ([1.0], "list"),
    ],
)
def test_bad_images(images, words):
    engine = repvgg.compile(plain("repvgg_a0", 10), threads=1, tune=None)
    with pytest.raises(repvgg.InputError, match=words):
        engine(images)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threads": -1}, "threads: 1 to"),
        ({"threads": 100_000}, "threads: 1 to"),
        ({"isa": "mmx"}, "found mmx"),
        ({"tune": "slow"}, "tune: 'fast', 'full'"),
        ({"weights": "int1"}, "weights: 'fp32' or 'fp16'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(repvgg.InputError, match=words):
        repvgg.compile(plain("repvgg_digits", 10), **options)


class Head(nn.Module):
    """A little of a segmentation network: bins, concatenation, upsampling, dilation."""

    def __init__(self, corners):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 20, 3, 2, 1), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(20, 12, 3, 1, 2, dilation=2), nn.ReLU())
        self.bins = nn.AdaptiveAvgPool2d(3)
        self.reduce = nn.Sequential(nn.Conv2d(12, 5, 1), nn.ReLU())
        self.out = nn.Conv2d(17, 4, 1)
        self.corners = corners

    def forward(self, x):
        y = self.deep(self.stem(x))
        z = self.reduce(self.bins(y))
        z = F.interpolate(z, size=y.shape[-2:], mode="bilinear", align_corners=self.corners)
        z = self.out(torch.cat([y, z], dim=1))
        return F.interpolate(z, size=x.shape[2:], mode="bilinear", align_corners=self.corners)


@pytest.mark.parametrize("corners", [True, False])
def test_segmentation_head(corners):
    torch.manual_seed(0)
    network = Head(corners).eval()
    engine = repvgg.compile(network, threads=2)
    for n, h, w in [(1, 57, 41), (3, 32, 32)]:
        images = torch.randn(n, 3, h, w)
        found = engine(images)
        assert found.shape == (n, 4, h, w)
        assert relative_error(found, network, images) < 1e-5


@pytest.mark.parametrize("name", ["pspnet_repvgg_a0", "pspnet_repvgg_a0_fast"])
def test_pspnet(name):
    """Dilation, pooling to bins that overlap, upsampling, concatenation."""
    torch.manual_seed(0)
    fields = ":depths=1-1-1-5-1,widths=8-8-12-16-24"
    model = repvgg.create_model(name + fields, num_classes=5, width=10).eval()
    network = repvgg.reparameterize(model)
    engine = repvgg.compile(network, threads=2, tune=None)
    for n, h, w in [(1, 97, 65), (2, 50, 121)]:
        images = torch.randn(n, 3, h, w)
        assert relative_error(engine(images), network, images) < 1e-5


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (repvgg.create_model("repvgg_digits"), "repvgg.reparameterize first"),
        (nn.Sequential(nn.Conv2d(3, 4, 5, padding=2)), r"layer 0: .*\(5, 5\)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), r"layer 0: .*padding \(0, 0\)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU()), "layer 1: .*found GELU"),
        (nn.Sequential(nn.ReLU()), "layer 0: .*a ReLU that does not"),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), "padding_mode"),
        (nn.Sequential(nn.MaxPool2d(2)), "found MaxPool2d"),
    ],
)
def test_what_it_does_not_run_is_named(network, words):
    with pytest.raises(repvgg.InputError, match=words):
        repvgg.compile(network.eval())


def test_saved_and_loaded(tmp_path):
    network = plain("repvgg_a0", 5)
    network.set_class_names(list("abcde"))
    engine = repvgg.compile(network, threads=1, tune=None)
    engine.save(tmp_path / "net.rvgg")
    loaded = Engine.load(tmp_path / "net.rvgg", threads=1, tune=None)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(engine(images), loaded(images))
    assert loaded.class_names == tuple("abcde")
    loaded.save(tmp_path / "again.rvgg")
    assert (tmp_path / "net.rvgg").read_bytes() == (tmp_path / "again.rvgg").read_bytes()


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.rvgg"
    repvgg.compile(plain("repvgg_digits", 10), threads=1, tune=None).save(path)
    return path.read_bytes()


def test_cut_files_are_refused(small_file, tmp_path):
    path = tmp_path / "cut.rvgg"
    for length in [0, 1, 31, 32, 100, len(small_file) // 2, len(small_file) - 1]:
        path.write_bytes(small_file[:length])
        with pytest.raises(repvgg.InputError, match=r"cut\.rvgg"):
            Engine.load(path)
    path.write_bytes(small_file + b"\0")
    with pytest.raises(repvgg.InputError, match="cut or extended"):
        Engine.load(path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_altered_files_are_refused(data, small_file, tmp_path_factory):
    place = data.draw(st.integers(0, len(small_file) - 1))
    altered = bytearray(small_file)
    altered[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("altered") / "net.rvgg"
    path.write_bytes(altered)
    if 24 <= place < 32:  # not used
        Engine.load(path, tune=None)
        return
    with pytest.raises(repvgg.InputError, match=r"net\.rvgg"):
        Engine.load(path)


def test_several_threads_and_engines():
    network = plain("repvgg_a0", 10)
    engines = [repvgg.compile(network, threads=2, tune=None) for _ in range(2)]
    images = {n: torch.randn(n, 3, 16 * n, 40) for n in (1, 2, 3)}
    truth = {n: engines[0](x) for n, x in images.items()}
    wrong = []

    def work(engine, order):
        for n in order:
            if not torch.equal(engine(images[n]), truth[n]):
                wrong.append(n)

    threads = [
        threading.Thread(target=work, args=(engines[i % 2], [1 + (i + k) % 3 for k in range(12)]))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_plans_are_kept_on_disk(tmp_path):
    network = plain("repvgg_digits", 10)
    channels = network.in_chans
    first = repvgg.compile(network, threads=1)
    first(torch.randn(3, channels, 8, 8))
    (path,) = (tmp_path / "cache/repvgg/plans").iterdir()
    known = json.loads(path.read_text())
    assert len(known) >= 4
    second = repvgg.compile(network, threads=1)
    second(torch.randn(3, channels, 8, 8))
    assert json.loads(path.read_text()) == known
    path.write_text("{broken")  # no reason to fail: it is measured again
    repvgg.compile(network, threads=1)(torch.randn(3, channels, 8, 8))
    assert json.loads(path.read_text()).keys() == known.keys()


def test_plan_is_a_table():
    network = plain("repvgg_a0", 10)
    engine = repvgg.compile(network, threads=1, tune=None)
    engine(torch.zeros(2, 3, 64, 64))
    plan = engine.plan
    convs = [row for row in plan if row.algorithm]
    assert len(convs) == 23  # 22 layers of 3×3 and the classifier
    assert plan[1].shape == (48, 32, 32)
    assert all(0 < row.share_of_limit < 1.5 for row in convs)
    lines = str(plan).splitlines()
    assert any(line.startswith("stages.3.13.conv ") for line in lines)
    # Right-aligned below their headings, however long the names are.
    place = lines[0].index("ms") + 2
    assert all(line[place - 3 : place].isdigit() for line in lines[1:])
    assert engine.memory.weights > 0


def test_environment_forces_the_instruction_set(monkeypatch):
    monkeypatch.setenv("RVGG_ISA", "portable")
    assert repvgg.compile(plain("repvgg_digits", 10), threads=1).isa == "portable"
    monkeypatch.setenv("RVGG_ISA", "vax")
    with pytest.raises(repvgg.InputError, match="portable can run here, found vax"):
        repvgg.compile(plain("repvgg_digits", 10), threads=1)

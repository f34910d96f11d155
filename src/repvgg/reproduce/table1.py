"""Table 1: the speed of kernel sizes, and which of them the library runs by Winograd (Sect. 2.4).

A convolution's *density* is what it would have to compute in a second if it did all of its
multiply-adds. Whether Winograd's algorithm is behind it is found as in the paper's footnote 3: a
layer of stride 2 with as many multiply-adds cannot be run by it; where that is much slower, the
layer of stride 1 was. Since a library may be slow with strides for other reasons, the density must
also stand out from that of the other kernel sizes.
"""

import statistics

from torch import nn

from repvgg.reproduce.printed import TABLE1
from repvgg.reproduce.report import Report
from repvgg.speed import Contender, Speed

# Channels and height of the input and the output: the paper's, and one for small machines.
PAPER_SHAPE, SMALL_SHAPE = (2048, 56), (256, 56)
SIZES = tuple(row.kernel_size for row in TABLE1)
# So much slower a layer of stride 2 must be, and so much denser than the others that of stride 1.
# F(2×2, 3×3) saves a factor of 2.25 at best.
SIGNIFICANTLY = 1.3


def contenders(shape: tuple[int, int]) -> list[Contender]:
    """A layer of stride 1 and one of stride 2 for each kernel size."""
    channels, side = shape

    def conv(size: int, stride: int) -> nn.Module:
        layer = nn.Conv2d(channels, channels, size, stride, size // 2, bias=False)
        return nn.Sequential(layer).eval()

    return [
        Contender(
            name_of(size, stride), lambda s=size, t=stride: conv(s, t), side * stride, channels
        )
        for size in SIZES
        for stride in (1, 2)
    ]


def name_of(size: int, stride: int) -> str:
    """Of a row of the record."""
    return f"{size}×{size}, stride {stride}"


def report(speeds: list[Speed], shape: tuple[int, int], title: str) -> Report:
    """The paper's figures beside ours."""
    channels, side = shape
    by_name = {speed.name: speed for speed in speeds}
    density = {
        size: size**2 / by_name[name_of(size, 1)].times.median
        for size in SIZES
        if name_of(size, 1) in by_name
    }
    rows = []
    for printed in TABLE1:
        size = printed.kernel_size
        one, two = (by_name.get(name_of(size, stride)) for stride in (1, 2))
        if one is None or two is None:
            continue
        macs = one.batch * (channels * side * size) ** 2
        seconds = one.times.median
        ratio = two.times.median / seconds
        others = [value for other, value in density.items() if other != size]
        stands_out = bool(others) and density[size] > SIGNIFICANTLY * statistics.median(others)
        rows.append(
            (
                f"{size}×{size}",
                printed.macs,
                macs / 1e9,
                printed.milliseconds,
                1000 * seconds,
                f"{100 * one.times.spread:.1f} %",
                printed.tflops,
                2 * macs / seconds / 1e12,
                ratio,
                "yes" if ratio > SIGNIFICANTLY and stands_out else "no",
            )
        )
    columns = (
        "kernel", "paper: FLOPs (B)", "FLOPs (B)", "paper: ms", "ms", "±", "paper: TFLOPS",
        "TFLOPS", "stride 2 ÷ stride 1", "Winograd",
    )  # fmt: skip
    notes = (
        f"{channels} → {channels} channels, {side}×{side}, batch {speeds[0].batch}; the paper: "
        "2048 channels, batch 32, on a 1080Ti. FLOPs are multiply-adds, TFLOPS count each as two. "
        f"Winograd is assumed where the layer of stride 2 takes over {SIGNIFICANTLY} of the time, "
        f"and the density is over {SIGNIFICANTLY} of that of the other sizes.",
    )
    return Report(title, columns, tuple(rows), notes)

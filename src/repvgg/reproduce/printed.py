"""What the paper prints in its tables: accuracy in %, speed in examples a second on a 1080Ti."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Printed:
    """A row of Table 4 or 5.

    Attributes:
        name: of the network, as printed.
        top1: accuracy on ImageNet in %.
        speed: examples a second on a 1080Ti, fp32, batches of 128.
        params: millions, of the network as it is run.
        macs: theoretical FLOPs, in billions of multiply-adds.
        winograd_multiplies: Wino MULs in billions; None where a dash is printed.
    """

    name: str
    top1: float
    speed: int
    params: float
    macs: float
    winograd_multiplies: float | None


@dataclass(frozen=True)
class PrintedKernel:
    """A row of Table 1: a convolution of 2048 to 2048 channels, batch 32, 56×56 pixels."""

    kernel_size: int
    macs: float
    milliseconds: float
    tflops: float


TABLE1 = (
    PrintedKernel(1, 420.9, 84.5, 9.96),
    PrintedKernel(3, 3788.1, 198.8, 38.10),
    PrintedKernel(5, 10522.6, 2092.5, 10.57),
    PrintedKernel(7, 20624.4, 4394.3, 9.38),
)

# 120 epochs, simple augmentation.
TABLE4 = (
    Printed("RepVGG-A0", 72.41, 3256, 8.30, 1.4, 0.7),
    Printed("ResNet-18", 71.16, 2442, 11.68, 1.8, 1.0),
    Printed("RepVGG-A1", 74.46, 2339, 12.78, 2.4, 1.3),
    Printed("RepVGG-B0", 75.14, 1817, 14.33, 3.1, 1.6),
    Printed("ResNet-34", 74.17, 1419, 21.78, 3.7, 1.8),
    Printed("RepVGG-A2", 76.48, 1322, 25.49, 5.1, 2.7),
    Printed("RepVGG-B1g4", 77.58, 868, 36.12, 7.3, 3.9),
    Printed("EfficientNet-B0", 75.11, 829, 5.26, 0.4, None),
    Printed("RepVGG-B1g2", 77.78, 792, 41.36, 8.8, 4.6),
    Printed("ResNet-50", 76.31, 719, 25.53, 3.9, 2.8),
    Printed("RepVGG-B1", 78.37, 685, 51.82, 11.8, 5.9),
    Printed("RegNetX-3.2GF", 77.98, 671, 15.26, 3.2, 2.9),
    Printed("RepVGG-B2g4", 78.50, 581, 55.77, 11.3, 6.0),
    Printed("ResNeXt-50", 77.46, 484, 24.99, 4.2, 4.1),
    Printed("RepVGG-B2", 78.78, 460, 80.31, 18.4, 9.1),
    Printed("ResNet-101", 77.21, 430, 44.49, 7.6, 5.5),
    Printed("VGG-16", 72.21, 415, 138.35, 15.5, 6.9),
    Printed("ResNet-152", 77.78, 297, 60.11, 11.3, 8.1),
    Printed("ResNeXt-101", 78.42, 295, 44.10, 8.0, 7.9),
)

# 200 epochs, AutoAugment, label smoothing, mixup.
TABLE5 = (
    Printed("RepVGG-B2g4", 79.38, 581, 55.77, 11.3, 6.0),
    Printed("RepVGG-B3g4", 80.21, 464, 75.62, 16.1, 8.4),
    Printed("RepVGG-B3", 80.52, 363, 110.96, 26.2, 12.9),
    Printed("RegNetX-12GF", 80.55, 277, 46.05, 12.1, 10.9),
    Printed("EfficientNet-B3", 79.31, 224, 12.19, 1.8, None),
)

# The RepVGG that the text of Sect. 4.1 sets against a ResNet, and by how many times it is faster.
PAIRS = {
    ("RepVGG-A0", "ResNet-18"): 1.33,
    ("RepVGG-A1", "ResNet-34"): 1.64,
    ("RepVGG-A2", "ResNet-50"): 1.83,
    ("RepVGG-B1g4", "ResNet-101"): 2.01,
    ("RepVGG-B1g2", "ResNet-152"): 2.66,
}


@dataclass(frozen=True)
class PrintedAblation:
    """A row of Table 6 or 7, of RepVGG-B0 and 120 epochs.

    Attributes:
        block: its name in blocks.py.
        name: as printed, or in words for Table 6, which prints check marks.
        top1: accuracy on ImageNet in %.
        speed: examples a second of the network before conversion, 1080Ti, batches of 128.
    """

    block: str
    name: str
    top1: float
    speed: int | None = None


TABLE6 = (
    PrintedAblation("only_3x3", "neither branch", 72.39, 1810),
    PrintedAblation("without_1x1", "identity branch", 74.79, 1569),
    PrintedAblation("without_identity", "1×1 branch", 73.15, 1230),
    PrintedAblation("repvgg", "both branches", 75.14, 1061),
)

TABLE7 = (
    PrintedAblation("identity_without_norm", "Identity w/o BN", 74.18),
    PrintedAblation("norm_after_addition", "Post-addition BN", 73.52),
    PrintedAblation("repvgg", "Full-featured reparam", 75.14),
    PrintedAblation("relu_in_branches", "+ReLU in branch", 75.69),
    PrintedAblation("diracnet", "DiracNet", 73.97),
    PrintedAblation("trivial", "Trivial Re-param", 73.51),
    PrintedAblation("asymmetric", "ACB", 73.58),
    PrintedAblation("residual_reorg", "Residual Reorg", 74.56),
)


@dataclass(frozen=True)
class PrintedSegmentation:
    """A row of Table 8: a PSPNet on the validation images of Cityscapes.

    Attributes:
        backbone: as printed.
        model: its name in `list_models("pspnet*")`.
        miou: mean intersection over union in %.
        pixel_accuracy: in %.
        speed: examples a second on a 1080Ti, fp32, batches of 16, 713×713 pixels.
    """

    backbone: str
    model: str
    miou: float
    pixel_accuracy: float
    speed: float


TABLE8 = (
    PrintedSegmentation("RepVGG-B1g2-fast", "pspnet_repvgg_b1g2_fast", 78.88, 96.19, 10.9),
    PrintedSegmentation("ResNet-50", "pspnet_resnet50", 77.17, 95.99, 10.4),
    PrintedSegmentation("RepVGG-B1g2", "pspnet_repvgg_b1g2", 78.70, 96.27, 8.0),
    PrintedSegmentation("RepVGG-B2-fast", "pspnet_repvgg_b2_fast", 79.52, 96.36, 6.9),
    PrintedSegmentation("ResNet-101", "pspnet_resnet101", 78.51, 96.30, 6.7),
    PrintedSegmentation("RepVGG-B2", "pspnet_repvgg_b2", 80.57, 96.50, 4.5),
)

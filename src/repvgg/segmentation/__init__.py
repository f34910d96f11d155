"""Semantic segmentation: PSPNet with a RepVGG backbone (paper, Sect. 4.3, Table 8)."""

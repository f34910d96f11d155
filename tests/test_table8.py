"""Table 8: the paper's figures, networks and costs, and the command on small images."""

import csv
import json

import pytest

from repvgg.protocol import Protocol
from repvgg.reproduce import table8
from repvgg.reproduce.command import Reproduce
from repvgg.reproduce.page import write_page
from repvgg.reproduce.printed import TABLE8
from repvgg.speed import Speed
from repvgg.timing import Times


def test_the_papers_figures_are_those_of_its_text():
    by_name = {row.backbone: row for row in TABLE8}
    fast, b2_fast, b2 = (by_name[f"RepVGG-{n}"] for n in ("B1g2-fast", "B2-fast", "B2"))
    r50, r101 = by_name["ResNet-50"], by_name["ResNet-101"]
    assert fast.miou - r50.miou == pytest.approx(1.71)
    assert b2_fast.miou - r101.miou == pytest.approx(1.01)
    assert fast.miou - r101.miou == pytest.approx(0.37)
    assert fast.speed / r101.speed - 1 == pytest.approx(0.62, abs=0.01)
    assert b2.miou - b2_fast.miou == pytest.approx(1.05)


def test_dilation_changes_neither_parameters_nor_multiply_adds():
    """As Sect. 4.3 says of the dilated and the fast form: "the FLOPs is the same"."""
    for name in ("pspnet_repvgg_b1g2", "pspnet_repvgg_b2"):
        dense, fast = (table8.cost_of(f"{name}{form}", 97) for form in ("", "_fast"))
        assert (dense.params, dense.macs) == (fast.params, fast.macs)


def test_multiply_adds_of_a_row_by_hand():
    """RepVGG-B1g2 at 97×97: maps of 49, 25 and 13 pixels, then 13 to the end."""
    widths, depths, sides = (64, 128, 256, 512, 2048), (1, 4, 6, 16, 1), (49, 25, 13, 13, 13)
    macs, channels, index = 0, 3, 0
    for width, depth, side in zip(widths, depths, sides, strict=True):
        for _ in range(depth):
            index += 1
            groups = 2 if index >= 3 and index % 2 else 1
            macs += 9 * channels * width * side**2 // groups
            channels = width
    pixels = 13**2
    cells = (1, 2, 3, 6)
    pooling = sum(2048 * (n * pixels + n * n * 13) for n in cells)  # rows, then columns
    reductions = sum(2048 * 512 * n * n for n in cells)
    head = (9 * 4096 * 512 + 512 * 19) * pixels
    found = table8.cost_of("pspnet_repvgg_b1g2", 97).macs
    assert found == macs + pooling + reductions + head


def test_the_table_has_the_paper_beside_what_was_measured():
    speeds = [Speed("ResNet-50", 713, 3, 16, Times((2.0, 4.0, 5.0)))]
    found = table8.report(speeds, "Table 8")
    rows = {row[0]: dict(zip(found.columns, row, strict=True)) for row in found.rows}
    assert list(rows) == [row.backbone for row in TABLE8]
    row = rows["ResNet-50"]
    assert (row["paper: mIoU (%)"], row["paper: images/s"], row["images/s"]) == (77.17, 10.4, 4.0)
    assert rows["RepVGG-B2"]["images/s"] is None
    assert rows["RepVGG-B1g2"]["params (M)"] == 62.39


@pytest.mark.slow
def test_the_command_measures_all_six(tmp_path, capsys):
    Reproduce("table8", quick=True, output=tmp_path, protocol=Protocol(warmup=0, rounds=1)).run()
    assert "RepVGG-B1g2-fast" in capsys.readouterr().out
    stem = tmp_path / "table8-257px-torch-fp32-batch1"
    record = json.loads(stem.with_suffix(".json").read_text())
    assert len(record["rows"]) == 6
    assert {row["image_size"] for row in record["rows"]} == {257}
    with open(stem.with_suffix(".csv"), newline="") as file:
        assert len(list(csv.DictReader(file))) == 6
    assert stem.with_suffix(".png").exists()
    write_page(tmp_path, tmp_path / "page.md")
    assert "## Table 8 (torch, fp32, batch 1" in (tmp_path / "page.md").read_text()

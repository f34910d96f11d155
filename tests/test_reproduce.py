"""Tables beside the paper's: figures by hand, files that can be read, commands as used."""

import csv
import dataclasses
import xml.etree.ElementTree as ET

import pytest
from PIL import Image
from torch import nn

from repvgg.errors import InputError
from repvgg.protocol import Protocol
from repvgg.reproduce import command, table1, table6, tables
from repvgg.reproduce.command import Compare, Reproduce
from repvgg.reproduce.figures import _label, draw_figure1
from repvgg.reproduce.page import side_by_side, write_page
from repvgg.reproduce.printed import PAIRS, TABLE1, TABLE4, TABLE5
from repvgg.reproduce.report import Report
from repvgg.speed import Contender, Record, Speed
from repvgg.timing import Times

SHORT = Protocol(batch=1, warmup=0, rounds=2, device="cpu")


def speed(name, seconds, size=224, channels=3, batch=8):
    return Speed(name, size, channels, batch, Times(seconds))


def test_the_papers_columns_agree_with_one_another():
    # TFLOPS of Table 1 are its multiply-adds, twice, over its time; speed-ups as stated are those
    # of its speeds.
    for row in TABLE1:
        tflops = 10.06 if row.kernel_size == 5 else row.tflops  # 10.57 is printed, a slip
        assert 2 * row.macs / row.milliseconds == pytest.approx(tflops, rel=2e-3)
        exact = 32 * (2048 * 56 * row.kernel_size) ** 2 / 1e9
        assert exact == pytest.approx(row.macs, rel=2e-3)
    speeds = {row.name: row.speed for row in TABLE4}
    for (ours, theirs), stated in PAIRS.items():
        assert speeds[ours] / speeds[theirs] == pytest.approx(stated, abs=0.015)


def test_table_4_shows_the_paper_beside_what_was_measured():
    found = tables.report(TABLE4, [speed("ResNet-18", (0.1, 0.2, 0.4))], "Table 4")
    by_name = {row[0]: dict(zip(found.columns, row, strict=True)) for row in found.rows}
    assert list(by_name) == [row.name for row in TABLE4]
    row = by_name["ResNet-18"]
    assert (row["paper: images/s"], row["images/s"]) == (2442, 40.0)
    assert (row["paper: params (M)"], row["params (M)"]) == (11.68, 11.68)
    assert (row["paper: Wino MULs (B)"], row["Wino MULs (B)"]) == (1.0, 0.98)
    assert by_name["RepVGG-A0"]["images/s"] is None
    assert "RegNetX-3.2GF has 2.63 B Winograd multiplies, 2.9 printed" in " ".join(found.notes)


def test_speed_ups_are_ratios_of_the_medians():
    pair = [speed("RepVGG-A0", (1.0, 2.0, 3.0)), speed("ResNet-18", (3.0, 3.0, 3.0))]
    found = tables.speedups(TABLE4, pair, "where")
    assert [row[:4] for row in found.rows] == [("RepVGG-A0 / ResNet-18", 1.33, 1.333, 1.5)]


def test_table_1_finds_winograd_by_the_layer_of_stride_2():
    times = {(1, 1): 1.0, (1, 2): 1.5, (3, 1): 2.0, (3, 2): 4.0, (5, 1): 25.0, (5, 2): 35.0}
    speeds = [
        speed(table1.name_of(*key), (value,) * 3, 56 * key[1], 256, batch=4)
        for key, value in times.items()
    ]
    found = table1.report(speeds, (256, 56), "Table 1")
    rows = [dict(zip(found.columns, row, strict=True)) for row in found.rows]
    assert [row["Winograd"] for row in rows] == ["no", "yes", "no"]
    macs = 4 * 256 * 256 * 56 * 56 * 9
    assert rows[1]["FLOPs (B)"] == pytest.approx(macs / 1e9)
    assert rows[1]["TFLOPS"] == pytest.approx(2 * macs / 2.0 / 1e12)
    assert rows[1]["stride 2 ÷ stride 1"] == 2


def test_table_6_times_networks_that_are_not_folded():
    contenders = table6.contenders()
    assert [c.name for c in contenders] == ["only_3x3", "without_1x1", "without_identity", "repvgg"]
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in c.build().modules()) for c in contenders]
    # 28 layers; all but the first of each of five stages have an identity branch.
    assert norms == [28, 28 + 23, 28 + 28, 28 + 28 + 23]
    seconds = {"only_3x3": 1.0, "without_1x1": 1.25, "without_identity": 2.0, "repvgg": 4.0}
    speeds = [Speed(name, 224, 3, 8, Times((value,))) for name, value in seconds.items()]
    rows = table6.report(speeds, "Table 6").rows
    assert [row[3] for row in rows] == [8.0, 6.4, 4.0, 2.0]
    assert [row[5] for row in rows] == [1.0, 0.867, 0.68, 0.586]  # 1569, 1230, 1061 over 1810
    assert [row[6] for row in rows] == [1.0, 0.8, 0.5, 0.25]


def test_both_layers_of_a_row_of_table_1_do_the_same_work():
    from repvgg.costs import cost

    macs = [
        cost(contender.build(), contender.image_size, contender.channels).macs
        for contender in table1.contenders((4, 14))
    ]
    assert macs[::2] == macs[1::2]
    assert macs[2] == 9 * macs[0]


def test_a_report_is_a_csv_and_a_section_of_a_page(tmp_path):
    report = Report("Title", ("network", "images/s"), (("a", 110.96), ("b", None)), ("Note.",))
    report.write_csv(tmp_path / "report.csv")
    with open(tmp_path / "report.csv", newline="") as file:
        assert list(csv.reader(file)) == [["network", "images/s"], ["a", "110.96"], ["b", ""]]
    assert report.markdown().splitlines() == [
        *("## Title", "", "| network | images/s |", "| --- | ---: |"),
        *("| a | 110.96 |", "| b |  |", "", "Note."),
    ]


def test_figure_1_is_drawn_twice(tmp_path):
    names = dict.fromkeys(row.name for row in TABLE4 + TABLE5)
    speeds = [speed(name, (0.01 * (index + 1),) * 2) for index, name in enumerate(names)]
    draw_figure1(tmp_path / "figure1.png", speeds, "a machine")
    with Image.open(tmp_path / "figure1.png") as image:
        assert min(image.size) > 500
    text = "".join(ET.parse(tmp_path / "figure1.svg").getroot().itertext())
    assert all(name in text for name in names)


def test_labels_of_close_points_do_not_touch():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5))
    canvas = FigureCanvasAgg(figure)
    ax = figure.subplots()
    points = {f"RepVGG-B{n}": (10 + 0.1 * n, 78 + 0.02 * n) for n in range(5)}
    ax.plot(*zip(*points.values(), strict=True), "o")
    ax.set(xlim=(5, 15), ylim=(77, 79))
    canvas.draw()
    _label(ax, points)
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in ax.texts]
    assert [text.get_text() for text in ax.texts] == list(points)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


@pytest.fixture
def small_networks(monkeypatch):
    """The commands as they are, on networks of the paper small enough for a test."""
    from repvgg.baselines import create_named
    from repvgg.reparam import reparameterize

    def contenders(names):
        return [
            Contender(name, lambda n=name: reparameterize(create_named(n)), 32)
            for name in names
            if name in ("RepVGG-A0", "ResNet-18")
        ]

    monkeypatch.setattr(tables, "contenders", contenders)


def test_reproduce_measures_once_and_fills_table_figure_and_page(small_networks, tmp_path, capsys):
    def reproduce(what):
        Reproduce(what, output=tmp_path, protocol=SHORT).run()
        return capsys.readouterr().out

    text = reproduce("table4")
    assert "RepVGG-A0 / ResNet-18" in text
    assert "Table 4" in text
    record = tmp_path / f"speeds-{SHORT.slug}.json"
    written = record.read_bytes()
    assert (tmp_path / f"table4-{SHORT.slug}.png").exists()
    assert "RepVGG-A0 / ResNet-18" in reproduce("speedups")
    reproduce("figure1")
    assert record.read_bytes() == written
    assert (tmp_path / f"figure1-{SHORT.slug}.svg").exists()
    memory = Report("Fig. 3", ("network", "measured"), (("residual block", 3.0),))
    memory.write_csv(tmp_path / "figure3-cpu-batch1.csv")
    reproduce("page")
    page = (tmp_path / "results.md").read_text()
    assert f"![figure1-{SHORT.slug}](figure1-{SHORT.slug}.png)" in page
    assert "## Table 4 (torch, fp32, batch 1, channels-last)" in page
    assert "| RepVGG-A0 | 72.41 | 3256 |" in page
    assert "## Fig. 3: peak memory of activations (figure3-cpu-batch1)" in page
    assert "| residual block | 3.0 |" in page
    assert Record.read(record).facts["machine"] in page


def test_what_takes_hours_is_refused_unless_asked_for(small_networks, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "LONG_SECONDS", 0)
    with pytest.raises(InputError, match="--quick is needed"):
        Reproduce("table4", output=tmp_path).run()
    Reproduce("table4", output=tmp_path, protocol=SHORT).run()


def test_a_page_without_results_is_refused(tmp_path):
    with pytest.raises(InputError, match="results of `repvgg reproduce` are needed"):
        write_page(tmp_path, tmp_path / "page.md")


def test_networks_of_any_name_are_compared(tmp_path, capsys):
    Compare(("repvgg_a0", "resnet18"), output=tmp_path, protocol=SHORT).run()
    text = capsys.readouterr().out
    assert "repvgg_a0" in text
    assert "resnet18" in text
    with open(tmp_path / f"speeds-{SHORT.slug}.csv", newline="") as file:
        rows = {row["network"]: row for row in csv.DictReader(file)}
    assert rows["resnet18"]["params (M)"] == "11.68"
    assert float(rows["repvgg_a0"]["images/s"]) > 0


def test_runtimes_of_one_machine_and_batch_stand_side_by_side(tmp_path):
    measured = {
        ("torch", 1): {"RepVGG-A0": [0.5, 0.5], "ResNet-18": [1.0, 1.0]},
        ("native", 1): {"RepVGG-A0": [0.25, 0.25]},
        ("torch", 8): {"RepVGG-A0": [1.0, 1.0]},
    }
    records = []
    for (runtime, batch), seconds in measured.items():
        protocol = dataclasses.replace(SHORT, runtime=runtime, batch=batch)
        record = Record(tmp_path / f"speeds-{protocol.slug}.json", protocol)
        record.seconds, record.shapes = seconds, dict.fromkeys(seconds, (224, 3))
        record.write()
        records.append(record)
    (report,) = side_by_side(records)  # of batch 8 there is one alone
    assert report.columns == ("network", "torch", "native")
    assert report.rows == (("RepVGG-A0", 2.0, 4.0), ("ResNet-18", 1.0, None))
    write_page(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "## Runtimes side by side, images a second (fp32, batch 1, " in page
    assert "| network | native | torch |" in page

"""The record of a measurement: it goes on after a stop, and refuses what is not its own."""

import dataclasses
import json
from importlib.metadata import version

import pytest
from torch import nn

from repvgg.errors import InputError
from repvgg.protocol import Protocol
from repvgg.speed import Contender, Record, estimated_seconds, measure

PROTOCOL = Protocol(batch=2, warmup=1, rounds=3, device="cpu")


class Counting(nn.Module):
    """A convolution that counts its calls, and can be interrupted as by Ctrl-C."""

    def __init__(self, calls, stop_at=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.calls, self.stop_at = calls, stop_at

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        self.calls.append(tuple(x.shape))
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        return self.conv(x).flatten(1)


def contender(name, size=8, stop_at=None):
    calls = []
    return Contender(name, lambda: Counting(calls, stop_at).eval(), size), calls


def test_networks_are_timed_in_turn_after_warming_up(tmp_path):
    (first, of_first), (second, of_second) = contender("first"), contender("second", 9)
    record = Record(tmp_path / "new" / "speeds.json", PROTOCOL)
    speeds = measure([first, second], record)
    assert of_first == [(2, 3, 8, 8)] * 4
    assert of_second == [(2, 3, 9, 9)] * 4
    assert [speed.name for speed in speeds] == ["first", "second"]
    content = json.loads(record.path.read_text())
    assert content["protocol"] == dataclasses.asdict(PROTOCOL)
    assert content["torch"] == version("torch")
    for row, speed in zip(content["rows"], speeds, strict=True):
        assert len(row["seconds"]) == row["rounds"] == 3
        low, middle, high = sorted(row["seconds"])
        assert row["median_ms"] == pytest.approx(1000 * middle, abs=2e-3)
        assert (row["min_ms"], row["max_ms"]) == pytest.approx((1000 * low, 1000 * high), abs=2e-3)
        assert speed.images_per_second == pytest.approx(2 / middle, rel=1e-2)


def test_an_interrupted_measurement_keeps_what_it_has_and_goes_on(tmp_path):
    path = tmp_path / "speeds.json"
    (first, _), (second, _) = contender("first"), contender("second", stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        measure([first, second], Record(path, PROTOCOL))
    kept = Record(path, PROTOCOL)
    assert {name: len(values) for name, values in kept.seconds.items()} == {
        "first": 2,
        "second": 1,
    }
    (again, of_first), (other, of_second) = contender("first"), contender("second")
    before = {name: list(values) for name, values in kept.seconds.items()}
    measure([again, other], kept)
    assert (len(of_first), len(of_second)) == (1 + 1, 1 + 2)  # one to warm up, and the rest
    for name, values in before.items():
        assert kept.seconds[name][: len(values)] == values
        assert len(kept.seconds[name]) == 3


def test_what_is_complete_is_not_measured_again(tmp_path):
    path = tmp_path / "speeds.json"
    measure([contender("first")[0]], Record(path, PROTOCOL))
    again, calls = contender("first")
    measure([again], Record(path, PROTOCOL))
    assert calls == []
    measure([again], Record(path, PROTOCOL, restart=True))
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"machine": "Another 9000"}, "another machine"),
        ({"torch": "1.0"}, "another torch"),
        ({"protocol": {}}, "another protocol"),
    ],
)
def test_a_record_of_something_else_is_refused(change, message, tmp_path):
    path = tmp_path / "speeds.json"
    measure([contender("first")[0]], Record(path, PROTOCOL))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        Record(path, PROTOCOL)


def test_a_runtime_that_is_not_used_may_be_another(tmp_path):
    path = tmp_path / "speeds.json"
    measure([contender("first")[0]], Record(path, PROTOCOL))
    path.write_text(json.dumps({**json.loads(path.read_text()), "ncnn": "0.1", "mnn": "0.1"}))
    assert Record(path, PROTOCOL).seconds.keys() == {"first"}


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"rows": [{}]}', '{"rows": 3}', "[" * 100_000]
)
def test_a_broken_record_is_named(content, tmp_path):
    path = tmp_path / "speeds.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"speeds\.json: a file of results is needed"):
        Record(path, PROTOCOL)
    with pytest.raises(InputError, match=r"speeds\.json: a file of results is needed"):
        Record.read(path)


def test_the_estimate_grows_with_the_work():
    few = estimated_seconds([contender("small", 32)[0]], PROTOCOL)
    more = dataclasses.replace(PROTOCOL, batch=200, rounds=399)
    assert estimated_seconds([contender("small", 32)[0]], more) > 100 * few

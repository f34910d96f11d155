"""What a network's latency costs the first pass over shards behind a URL.

`python benchmarks/remote_shards.py --data DIR [--quick] [--json FILE]`, where DIR is an image
folder such as the extracted imagenet_sample.tar. It is packed into shards of 1 MB; a server on this
machine answers each request after a latency. Timed in turn, round after round, each with an empty
cache: a pass over the shards on disk; one over those behind the server; and one that fetches each
shard only when its first image is needed.
"""

import dataclasses
import functools
import http.server
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from repvgg.console import say, show_table
from repvgg.data.images import Images
from repvgg.data.loader import Loader
from repvgg.data.pack import Pack
from repvgg.data.shards import open_shards
from repvgg.data.transforms import training_transform
from repvgg.machine import machine_facts
from repvgg.preprocessing import Preprocessing
from repvgg.timing import time_in_turn

BATCH = 32


@dataclass(frozen=True)
class Options:
    """Images a second of the first pass over shards behind a URL."""

    data: Path = Path(".data/imagenet_sample")
    """Image folder."""
    latencies: tuple[float, ...] = (0.0, 0.1, 0.5)
    """Seconds between a request and the first byte of the answer."""
    quick: bool = False
    """Two rounds in place of seven."""
    json: Path | None = None
    """File to write the rows to."""


class Slow(http.server.SimpleHTTPRequestHandler):
    """A server of files that answers after a latency."""

    def __init__(self, *args, latency: float, **options):
        self.latency = latency
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        """Answer a request."""
        time.sleep(self.latency)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def passes(location: str, *, ahead: bool = True) -> Callable[[], None]:
    """A function that opens shards and passes over them once, with an empty cache."""
    transform = training_transform(Preprocessing.for_channels(3, 224), "crop-flip")

    def run() -> None:
        with tempfile.TemporaryDirectory() as cache:
            images: Images = open_shards(location, "test", Path(cache))
            if not ahead:
                images = dataclasses.replace(images, fetch=None)
            for _ in Loader(images, transform, BATCH, seed=0, workers=0).epoch(1):
                pass

    return run


def rows_of(folder: Path, latency: float, rounds: int) -> list[dict[str, float | str]]:
    """Seconds of a pass for one latency."""
    handler = functools.partial(Slow, directory=str(folder), latency=latency)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        things = {
            "on disk": passes(str(folder)),
            "fetched ahead": passes(url),
            "fetched when needed": passes(url, ahead=False),
        }
        times = time_in_turn(things, rounds, warmup=1)
        server.shutdown()
    return [
        {
            "what": name,
            "latency_s": latency,
            "median_s": seconds.median,
            "spread": seconds.spread,
            "ratio_to_disk": seconds.median / times["on disk"].median,
        }
        for name, seconds in times.items()
    ]


def main(options: Options) -> None:
    """Measure and show."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "shards"
        Pack(options.data, folder, shard_megabytes=1).run()
        count = len(list(folder.glob("*.tar")))
        rows = [
            row
            for latency in options.latencies
            for row in rows_of(folder, latency, 2 if options.quick else 7)
        ]
    cells = [
        [
            f"{row['latency_s']:g} s",
            str(row["what"]),
            f"{row['median_s']:.2f} s",
            f"{100 * float(row['spread']):.1f} %",
            f"{row['ratio_to_disk']:.2f}",
        ]
        for row in rows
    ]
    title = f"the first pass over {count} shards, 224×224, crop-flip, no workers"
    show_table(title, ["latency", "", "a pass", "spread", "to disk"], cells)
    if options.json:
        content = {
            **machine_facts(),
            "load_average": os.getloadavg()[0],
            "shards": count,
            "rows": rows,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")
        say(f"written: {options.json}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""The command `ablate`."""

from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from repvgg.console import say
from repvgg.errors import InputError
from repvgg.training.config import TrainConfig

ABLATION_FOLDER = Path("ablation")


@dataclass(frozen=True)
class Ablate:
    """Train the rows of Tables 6 and 7 on your images, under the same settings and seeds.

    A stopped ablation goes on where it was, within a run too.
    """

    output: Path = ABLATION_FOLDER
    """Folder, which gets a run for each row and seed, the results and a chart."""
    rows: tuple[str, ...] = ("all",)
    """Names of blocks, `all`, or `paper` for those of Tables 6 and 7."""
    seeds: int = 3
    """Runs of each row."""
    jobs: int = 1
    """Runs side by side, which share the cores: faster where the network is small."""
    config: OmitArgPrefixes[TrainConfig] = field(
        default_factory=lambda: TrainConfig(model="repvgg_b0")
    )

    def run(self) -> None:
        from repvgg.ablations import run
        from repvgg.reproduce.printed import TABLE6, TABLE7

        if self.seeds < 1:
            raise InputError(f"seeds: 1 or more needed, found {self.seeds}")
        if self.jobs < 1:
            raise InputError(f"jobs: 1 or more needed, found {self.jobs}")
        usual = TrainConfig()
        for name, instead in (("seed", "seeds"), ("block", "rows")):
            if getattr(self.config, name) != getattr(usual, name):
                raise InputError(f"{name}: an ablation takes --{instead} in its place")
        named = {"all": run.ROWS, "paper": tuple(run.PRINTED)}
        rows = named.get(self.rows[0], self.rows) if len(self.rows) == 1 else self.rows
        outcomes = run.ablate(self.config, self.output, rows, range(self.seeds), self.jobs)
        plural = "" if self.config.epochs == 1 else "s"
        title = f"{self.config.model}, {self.config.epochs} epoch{plural} of {self.config.data}"
        report = run.report(outcomes, title, run.speeds(self.output, outcomes))
        report.show()
        report.write_csv(self.output / "table.csv")
        for name, table in (("Table 6", TABLE6), ("Table 7", TABLE7)):
            run.orders(outcomes, table, f"Orders of {name}").show()
        run.draw(self.output / "ablation.png", outcomes, title)
        say(f"written: {self.output}/{run.RESULTS}, table.csv, ablation.png and .svg")

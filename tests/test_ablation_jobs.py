"""Trainings side by side: real processes, some of them stopped or killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repvgg.ablations.run import read_outcomes

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
ROWS = ("repvgg", "only_3x3", "relu_in_branches")


def command(output, jobs, *more, epochs=1):
    settings = {"model": "repvgg_digits:widths=4-8-8-8", "data": "digits", "augmentation": "shift"}
    settings |= {"batch-size": 128, "base-batch-size": 128, "epochs": epochs, "seeds": 1}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    rows = ("--rows", *ROWS, f"--jobs={jobs}", f"--output={output}")
    return [BIN / "repvgg", "ablate", *flags, *rows, *more]


def finish(output, jobs, *more, **settings):
    return subprocess.run(
        command(output, jobs, *more, **settings),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_side_by_side_gives_what_one_after_the_other_gives(tmp_path):
    results = {}
    for jobs in (1, 3):
        done = finish(tmp_path / str(jobs), jobs)
        assert done.returncode == 0, done.stderr
        outcomes = read_outcomes(tmp_path / str(jobs) / "results.csv")
        results[jobs] = {(o.block, o.seed): (o.top1, o.train_top1) for o in outcomes}
    assert results[1] == results[3]
    assert set(results[1]) == {(row, 0) for row in ROWS}
    assert "3 of 3 runs done, about 0:00:00 left" in done.stdout
    assert "only_3x3, seed 0: epoch 1/1" in done.stdout


def test_a_job_that_fails_stops_the_others_and_is_named(tmp_path):
    done = finish(tmp_path, 2, "--pretrained", "nowhere.safetensors")
    assert done.returncode == 2
    assert "seed 0: nowhere.safetensors" in done.stderr
    assert "failed with exit code 2" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_jobs_end_with_the_command_and_go_on_with_the_next(number, tmp_path):
    arguments = command(tmp_path, 2, epochs=12)
    with subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
        states = [tmp_path / f"{row}-seed0" / "history.csv" for row in ROWS[:2]]
        wait_until(lambda: all(path.exists() for path in states))
        process.send_signal(number)
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    wait_until(lambda: not trainings_in(tmp_path))
    assert not (tmp_path / "results.csv").exists()
    done = finish(tmp_path, 2, epochs=12)
    assert done.returncode == 0, done.stderr
    for row in ROWS[:2]:
        assert f"{row}, seed 0: going on at step" in done.stdout
    assert len(read_outcomes(tmp_path / "results.csv")) == len(ROWS)


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def trainings_in(folder):
    """Processes that have a file of the folder open or its path among their arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:
            continue
        if process.name != str(os.getpid()) and any(str(folder) in link for link in links):
            found.append(process.name)
    return found

"""Trainings side by side, each in a process of its own.

Small networks do not fill many threads: two runs on one core each are done sooner than one after
the other on both.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from repvgg.console import speak_as, warn
from repvgg.data.loader import granted_cores
from repvgg.errors import InputError, Interrupted
from repvgg.training.config import TrainConfig
from repvgg.training.loop import signals_kept, train

# How often a process that waits looks whether a signal came.
SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """A training.

    Attributes:
        name: in front of the lines that it prints.
        config: of the run.
        path: its folder.
    """

    name: str
    config: TrainConfig
    path: Path


def side_by_side(jobs: Sequence[Job], count: int) -> Iterator[Job]:
    """Train `count` at a time; gives each job when it is done.

    Raises:
        InputError: one failed, after a message of its own; the others are stopped.
        Interrupted: SIGINT or SIGTERM came. All have kept their states.
    """
    context = multiprocessing.get_context("spawn")  # a process with threads should not fork
    waiting, running = list(jobs), dict[BaseProcess, Job]()
    with signals_kept() as received:
        try:
            while waiting or running:
                while waiting and len(running) < count:
                    job = waiting.pop(0)
                    process = context.Process(target=_train, args=(job, count))
                    process.start()
                    running[process] = job
                multiprocessing.connection.wait([p.sentinel for p in running], timeout=SECONDS)
                if received:
                    raise Interrupted("stopped; the same command goes on from there", received[0])
                for process in [p for p in running if p.exitcode is not None]:
                    job = running.pop(process)
                    if process.exitcode:
                        raise InputError(f"{job.path}: failed with exit code {process.exitcode}")
                    yield job
        finally:
            for process in running:
                process.terminate()  # it keeps its state
            for process in running:
                process.join()


def _train(job: Job, count: int) -> None:
    """In a process of its own, one of so many that share the cores."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, granted_cores() // count))
    os.environ["LOCAL_WORLD_SIZE"] = str(count)  # by which the loader chooses its workers
    speak_as(job.name)
    try:
        train(job.config, job.path)
    except InputError as error:
        warn(error)
        sys.exit(2)
    except Interrupted as stop:
        sys.exit(stop.exit_code)

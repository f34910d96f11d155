"""Real processes that are killed, and go on to the very bits of one that never was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import repvgg

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
STEPS = 11  # of an epoch: 1,437 images, 128 a step
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
# A state after every step, so that there is something to go on from wherever the kill hits.
TRAIN = (
    *("train", "--recipe", "digits", "--epochs", "3", "--batch-size", "128"),
    *("--checkpoint-minutes", "0", "--ema-decay", "0.9", "--mixup", "0.2"),
    *("--auxiliary-weight", "0.1"),
    *("--optimizer", "muon", "--bias-rate", "4", "--whiten-stem", "--augmentation"),
    "shift-alternate-flip",
)


def command(output, processes=1):
    if processes == 1:
        return [BIN / "repvgg", *TRAIN, "--output", str(output)]
    run = [BIN / "torchrun", "--standalone", f"--nproc-per-node={processes}", "--max-restarts=2"]
    return [*run, "--no-python", BIN / "repvgg", *TRAIN, "--output", str(output)]


def finish(output, processes=1):
    result = subprocess.run(
        command(output, processes), env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def weights(output):
    return repvgg.load(output / "last.safetensors").state_dict()


def assert_same_bits(expected, output):
    found = weights(output)
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    assert different == []


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    finish(output)
    return weights(output)


def steps_kept(output):
    return [int(path.stem.split("-")[1]) for path in (output / "checkpoints").glob("step-*.pt")]


def in_the_middle_of_an_epoch(output):
    return any(step % STEPS for step in steps_kept(output) if step > STEPS)


def during_a_checkpoint_write(output):
    return max(steps_kept(output), default=0) > 3 and any(output.glob("checkpoints/.*.tmp.pt"))


def between_epochs(output):
    """An epoch's last step is done, and no step of the next is kept yet."""
    newest = max(steps_kept(output), default=0)
    return newest > 0 and newest % STEPS == 0


def stop_when(process, condition, output):
    """Freeze the process at a moment at which the condition holds."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before the moment came"
        if condition(output):
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.02)
            if condition(output):
                return
            process.send_signal(signal.SIGCONT)
    raise AssertionError("the moment never came")


@pytest.mark.parametrize(
    "moment", [in_the_middle_of_an_epoch, during_a_checkpoint_write, between_epochs]
)
def test_a_run_that_is_killed_goes_on_to_the_same_bits(moment, never_killed, tmp_path):
    output = tmp_path / "run"
    with subprocess.Popen(command(output), env=ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
        stop_when(process, moment, output)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert "going on at step" in finish(output)
    assert_same_bits(never_killed, output)
    assert not any(output.glob("checkpoints/.*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_keeps_that_very_step(number, never_killed, tmp_path):
    output = tmp_path / "run"
    arguments = command(output)
    arguments[arguments.index("--checkpoint-minutes") + 1] = "60"
    process = subprocess.Popen(
        arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not (output / "history.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert "the same command goes on from there" in said
    assert max(steps_kept(output)) > STEPS
    finish(output)
    assert_same_bits(never_killed, output)


def test_a_killed_worker_of_torchrun_comes_back_by_itself(tmp_path):
    finish(tmp_path / "whole", processes=2)
    output = tmp_path / "killed"
    with subprocess.Popen(
        command(output, processes=2),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as launcher:
        deadline = time.monotonic() + 300
        while not any(step > STEPS for step in steps_kept(output)):
            assert time.monotonic() < deadline
            assert launcher.poll() is None
            time.sleep(0.02)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert launcher.wait(timeout=300) == 0
    assert_same_bits(weights(tmp_path / "whole"), output)


LOSSES = """
import dataclasses, sys, torch
from pathlib import Path
from repvgg.training import loop
from repvgg.training.distributed import joined
from repvgg.training.recipes import digits

def threads():
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]

config = dataclasses.replace(
    digits(), epochs=1, batch_size=128, base_batch_size=128, precision="fp64", sync_bn=True
)
with joined(torch.device("cpu")) as world:
    run = loop.Run(config, Path(sys.argv[1]) / "run", world)
    losses, step = [], run._step
    def recorded(batch):
        loss, right = step(batch)
        losses.append(world.sum(loss.item())[0] / world.size)
        return loss, right
    run._step = recorded
    run.finish()
    assert ("pt_gloo_runloop" in threads()) == (world.size > 1), threads()
    if world.is_first:
        torch.save(losses, Path(sys.argv[1]) / "losses.pt")
# A thread that outlives its group aborts the process if the interpreter ends meanwhile.
assert "pt_gloo_runloop" not in threads(), threads()
"""


def test_two_processes_have_the_loss_curve_of_one(tmp_path):
    script = tmp_path / "losses.py"
    script.write_text(LOSSES)
    curves, rows = [], []
    for size in (1, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        start = [sys.executable]
        if size > 1:
            start = [BIN / "torchrun", "--standalone", f"--nproc-per-node={size}"]
        subprocess.run([*start, script, folder], env=ENVIRONMENT, check=True, capture_output=True)
        curves.append(torch.tensor(torch.load(folder / "losses.pt"), dtype=torch.float64))
        rows.append((folder / "run" / "history.csv").read_text().splitlines()[1].split(",")[:5])
    assert len(curves[0]) == STEPS
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-5, atol=0)
    # The 360 test images are shared without counting any twice: the very same figures.
    assert rows[0] == rows[1]


def test_processes_that_cannot_share_a_batch_evenly_are_refused(tmp_path):
    arguments = [*command(tmp_path / "run", processes=2)]
    arguments[arguments.index("--batch-size") + 1] = "127"
    arguments.remove("--max-restarts=2")
    result = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "batch_size: a multiple of 2 processes × accumulate 1 needed" in result.stderr

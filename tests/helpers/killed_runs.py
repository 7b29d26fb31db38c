"""Train in child processes that are killed: DATA OUTPUT KILLS SEED. Forked, so that each start is quick."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import pretrain.train  # noqa: F401  # once, before the children are forked
from pretrain.__main__ import main as command
from pretrain.common.cli import save_settings
from tests.helpers.training import slower

EPOCHS = 12  # of 10 steps: more than 20 children reach before they are killed
SAVE_EVERY = 3  # steps, which take longer than to write a checkpoint


def start(data: Path, output: Path, workers: int) -> int:
    """Fork a child that trains, or goes on training, in `output`; the process id."""
    settings = slower(data, output, batch_global=64, save_every=SAVE_EVERY, workers=workers, epochs=EPOCHS)
    save_settings(settings, output.with_suffix(".yaml"))
    pid = os.fork()
    if pid == 0:
        os._exit(command(["--recipe", str(output.with_suffix(".yaml"))]))
    return pid


def killed(pid: int, output: Path, rng: random.Random) -> str | None:
    """Kill the child at a random moment, by lot while it writes a checkpoint or not; None if it was done."""
    until = time.monotonic() + rng.uniform(0.1, 1.5)
    in_writing = rng.random() < 0.5
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        writing = any(output.glob(".checkpoint.pt.*.tmp"))
        if time.monotonic() > until and writing == in_writing:
            time.sleep(rng.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "writing" if any(output.glob(".checkpoint.pt.*.tmp")) else "between"
        time.sleep(0.001)
    return None


def main(data: Path, output: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(seed)
    moments = []
    while len(moments) < kills:
        moment = killed(start(data, output, workers=rng.choice([0, 1])), output, rng)
        if moment is None:
            break
        moments.append(moment)
    print(*moments, flush=True)
    _, status = os.waitpid(start(data, output, workers=0), 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))

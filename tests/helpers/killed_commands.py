"""Run a command in forked children that are killed at random moments: COMMAND FOLDER KILLS SEED WORDS...

FOLDER/whole holds an undisturbed run, FOLDER/cut0, cut1, ... the others: each is run again until it ends,
then the next begins. Prints how many there are. "{output}" in WORDS is the folder of a run.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

MODULES = {
    "linear": "transfer.evaluators.linear", "semisup": "transfer.evaluators.semisup",
    "report": "transfer.report.command", "train-net": "transfer.train_net",
    "suite": "tests.helpers.tiny_suite",
}  # fmt: skip
LOADED_LATE = {"train-net": "transfer.detection.run"}
SHARE = {"suite": 0.2}
"""Of the undisturbed run's time, in which kills fall, else 0.4: a suite's jobs go on meanwhile."""
MOST_RUNS = 100
TOLD = "folders with kills:"


def after_kills(command: str, words: list[str], folder: Path, kills: int = 20) -> tuple[Path, list[Path]]:
    """The folders of an undisturbed run and of those that had the kills; all have ended well."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-m", "tests.helpers.killed_commands", command, str(folder), str(kills), "0"]
    done = subprocess.run(
        [*script, *words], cwd=root, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    count = next(line.split()[-1] for line in done.stdout.splitlines() if line.startswith(TOLD))
    cuts = [folder / f"cut{i}" for i in range(int(count))]
    assert not [p for cut in cuts for p in cut.rglob(".*.tmp")]
    return folder / "whole", cuts


def start(main: Callable[[list[str]], object], words: list[str]) -> int:
    """Fork a child that runs the command; its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            code = main(words)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            code = 1
        os._exit(int(code or 0))  # type: ignore[call-overload]
    return pid


def finished(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def code_unless_killed(pid: int, after_s: float) -> int | None:
    """The child's exit code; None where it was still running and is killed."""
    until = time.monotonic() + after_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.001)


def main(command: str, folder: Path, kills: int, seed: int, words: list[str]) -> int:
    torch.set_num_threads(1)
    run = importlib.import_module(MODULES[command]).main
    if command in LOADED_LATE:  # once, and not in every child
        importlib.import_module(LOADED_LATE[command])

    def go(name: str) -> int:
        return start(run, [w.replace("{output}", str(folder / name)) for w in words])

    began = time.monotonic()
    assert finished(go("whole")) == 0
    most_s = SHARE.get(command, 0.4) * (time.monotonic() - began)
    rng, cut, hit = random.Random(seed), 0, 0
    for _ in range(MOST_RUNS):
        code = code_unless_killed(go(f"cut{cut}"), rng.uniform(0, most_s))
        if code is None:
            hit += 1
            if hit == kills:
                break
        elif code != 0:
            return code
        else:
            cut += 1
    assert hit == kills, f"only {hit} of {MOST_RUNS} runs were under way when they were to be killed"
    print(TOLD, cut + 1, flush=True)
    return finished(go(f"cut{cut}"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]))

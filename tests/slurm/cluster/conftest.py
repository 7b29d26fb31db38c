"""Real SLURM clusters on this host, one node and two, for as long as the tests last."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from slurm.execution import submit
from slurm.execution.snapshot import pin
from slurm.state.local_process import LocalProcess
from slurm.steps.graph import Graph, Step
from slurm.steps.resources import KINDS, Resources

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Cluster:
    """A running cluster; its commands find it by SLURM_CONF."""

    folder: Path
    nodes: int

    def call(self, *command: str, check: bool = True) -> str:
        """What a SLURM command prints."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """`scontrol show job`, as names and values."""
        words = self.call("scontrol", "show", "job", job_id).split()
        return dict(w.split("=", 1) for w in words if "=" in w)

    def down(self, node: str) -> None:
        """An administrator marks a node down."""
        self.call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def up(self, node: str) -> None:
        """... and back; refused where the node has come back by itself."""
        self.call("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        wait_for(
            lambda: (
                self.call("sinfo", "-h", "-n", node, "-p", "low", "-o", "%t").strip()
                in ("idle", "mix", "alloc")
            )
        )

    def stop(self, daemon: str) -> None:
        """End slurmctld or slurmdbd, and wait until it is gone."""
        pid = int((self.folder / f"{daemon}.pid").read_text())
        process = LocalProcess.of(pid)
        process.send(signal.SIGTERM)
        wait_for(lambda: not process.is_alive, 30)

    def start(self, daemon: str, **settings: str) -> None:
        """Start slurmctld, with other settings in slurm.conf, or slurmdbd."""
        conf = self.folder / "slurm.conf"
        text = conf.read_text()
        for name, value in settings.items():
            text = re.sub(rf"(?m)^{name}=.*$", f"{name}={value}", text)
        conf.write_text(text)
        self.call(daemon)
        wait_for(lambda: self.call("squeue" if daemon == "slurmctld" else "sacctmgr", "--version"), 30)

    def preempt(self) -> str:
        """Take the whole cluster for three seconds at a higher priority."""
        out = self.call(
            "sbatch", "--parsable", "--partition=high", "--exclusive", f"--nodes={self.nodes}",
            "--output=/dev/null", "--wrap=sleep 3",
        )  # fmt: skip
        return out.strip()


def wait_for(what: Callable[[], object], timeout_s: float = 120, every_s: float = 0.2) -> None:
    """Wait until `what` is true; fail with its name after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain"
        time.sleep(every_s)


def step(root: Path, name: str, what: str = "work", *more: str, kind: str = "knn", **rest) -> Step:
    """A step that tiny_steps.py runs as `what`."""
    return Step(
        name=name, kind=kind, command="tiny_steps", argv=(what, str(root / name), *more), output=root / name,
        makes=(root / name / "made",), **rest,
    )  # fmt: skip


def send(root: Path, *steps: Step, redo: Collection[str] = (), **changes: object) -> dict[str, str]:
    """Submit what is missing, or of `redo`; job ids by step. `changes` are of the resources."""
    asked: dict[str, Any] = {"partition": "low", "timeout_min": 60, "signal_delay_s": 20, **changes}
    resources = dict.fromkeys(KINDS, Resources(**asked))
    graph = Graph(list(steps))
    return submit.submit(graph, submit.plan(graph, root, set(redo)), root, resources, pin(root))


def write_recipe(path: Path, **changes: object) -> Path:
    """A pretraining of seconds."""
    values = {
        "arch": "resnet18", "projector_hidden": 64, "projector_output": 64, "epochs": 30, "batch_global": 32,
        "lr": 0.1, "view_sizes": [32, 32], "workers": 0, **changes,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    return path


def _free_ports() -> int:
    """The first of seven ports in a row that nobody uses."""
    while True:
        first = random.randrange(20000, 32000)
        try:
            for port in range(first, first + 7):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


def _run(nodes: int, cpus: int) -> Iterator[Cluster]:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("a private SLURM cluster wants root and Debian's packages")
    folder = Path(tempfile.mkdtemp(prefix="sl", dir="/var/tmp"))  # short path; pytest's own is not
    env = {**os.environ, "NODES": str(nodes), "CPUS": str(cpus), "PORT": str(_free_ports())}
    before = os.environ.get("SLURM_CONF")
    try:
        done = subprocess.run(
            [HERE / "start_slurm.sh", folder], env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        yield Cluster(folder, nodes)
    finally:
        subprocess.run([HERE / "stop_slurm.sh", folder], capture_output=True, timeout=120)
        if before is None:
            os.environ.pop("SLURM_CONF", None)
        else:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One node with eight cores and two fake GPUs."""
    yield from _run(nodes=1, cpus=8)


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    """Two nodes of four cores on this host."""
    yield from _run(nodes=2, cpus=4)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs import tiny_steps from here."""
    monkeypatch.setenv("PYTHONPATH", str(HERE.parents[1] / "helpers"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

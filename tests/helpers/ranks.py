"""Ranks on this machine: a command as torchrun starts it, or a function forked into a gloo group."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import multiprocessing as mp

from pretrain.common.cli import save_settings
from pretrain.common.process_group import process_group
from pretrain.settings import Settings
from tests.helpers.forked import Child, start


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def variables(r: int, world: int, port: int) -> dict[str, str]:
    """What torchrun tells rank `r` on this machine."""
    return {
        "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


def start_command(*words: str, world: int = 2) -> list[Child]:
    """Python with these words as torchrun would start it; output and error are kept apart for each rank."""
    port = free_port()
    command = [sys.executable, *words]
    return [start(command, env={**os.environ, **variables(r, world, port)}) for r in range(world)]


def start_ranks(settings: Settings, *options: str, world: int = 2) -> list[Child]:
    """`python -m pretrain` as torchrun would start it on this machine."""
    config = Path(settings.output).with_suffix(".yaml")
    save_settings(settings, config)
    return start_command("-m", "pretrain", "--recipe", str(config), *options, world=world)


def wait_ranks(ranks: list[Child], expected: int) -> list[str]:
    """Standard output of each rank; all of them end with the exit code `expected`."""
    said = [rank.communicate(timeout=180) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [expected] * len(ranks), [err for _, err in said]
    return [out for out, _ in said]


def fork_ranks(world: int, work: Callable[..., None], *arguments: Any) -> list[mp.Process]:
    """Fork `world` processes that call `work(*arguments)` inside a gloo group."""
    port = free_port()
    context = mp.get_context("fork")  # imports nothing anew
    ranks = [context.Process(target=_forked, args=(r, world, port, work, arguments)) for r in range(world)]
    for process in ranks:
        process.start()
    return ranks


def _forked(r: int, world: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(variables(r, world, port))
    try:
        with process_group():
            work(*arguments)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def run_on_ranks(world: int, work: Callable[..., None], *arguments: Any) -> None:
    """`fork_ranks`, and all of them end well."""
    assert finish_ranks(fork_ranks(world, work, *arguments)) == [0] * world


def finish_ranks(ranks: list[mp.Process]) -> list[int | None]:
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks]


def kill_ranks(ranks: list[mp.Process]) -> None:
    for process in ranks:
        process.kill()
        process.join()

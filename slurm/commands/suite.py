"""`slurm suite`: run or submit what a suite asks for."""

from __future__ import annotations

import os
import sys
from dataclasses import fields, replace
from pathlib import Path

from pretrain.common.cli import parse_settings, save_settings
from pretrain.common.errors import UserError
from pretrain.common.output_folder import check_folder
from pretrain.common.progress import counted
from pretrain.common.word_lists import spread
from pretrain.settings import Settings as PretrainSettings
from pretrain.settings import refuse_code
from slurm.commands.outcome import show_outcome
from slurm.execution.local import LocalRun, Machine
from slurm.execution.snapshot import code_files, pin, untracked
from slurm.state.suite_lock import WRITES, is_suite, locked, refuse_other_configuration, set_aside
from slurm.steps import checks
from slurm.steps.graph import Graph
from slurm.steps.resources import Resources, load_profile
from slurm.steps.suite import WITH_OPTIONS, Suite, suite_graph

SUBMIT_LOCK_WAIT_S = 120
DESCRIPTION = """Pretrain by a recipe or take checkpoints, evaluate them, report: on SLURM or on this machine.

pretrain ─▶ k-NN, linear, semi-supervised (x seeds) ─▶ report
    └─────▶ conversion ─▶ detection (x seeds) ───────────┘
"""
GROUPS = {
    "output": "what to evaluate", "branch": "how to read --weights", "tasks": "how to evaluate it",
    "dataset": "data", "knn_protocol": "protocols, and further options of the steps",
    "cluster": "where it runs", "dry_run": "this call",
}  # fmt: skip
"""The first option of each group of --help, and the group's title."""
HINTS = {
    f"--{name.replace('_', '-')}": f'pretraining has it: --pretrain-options "--{name.replace("_", "-")} ..."'
    for name in {f.name for f in fields(PretrainSettings)} - {f.name for f in fields(Suite)}
}
LISTS = (
    "--weights",
    "--sweep",
    "--include",
    "--tasks",
    "--override",
    "--force",
    "--detection-data",
    "--sem-seg-data",
)
TEXTS = tuple(f"--{kind}-options" for kind in WITH_OPTIONS)


def main(argv: list[str]) -> int | None:
    """Check, then submit or run what is missing."""
    asked = parse_settings(
        Suite,
        spread(argv, LISTS, TEXTS),
        prog="python -m slurm suite",
        description=DESCRIPTION,
        groups=GROUPS,
        hints=HINTS,
    )
    if asked.pretraining is not None and not any(w.startswith("--pretrain-options") for w in argv):
        refuse_code(asked.pretraining, "the suite's file", "--pretrain-options '{}'")
    root = Path(os.path.realpath(asked.output))  # resolve() fails at links in a circle
    check_folder(root, "slurm suite", writes=WRITES, earlier=is_suite)
    resources = load_profile(asked.profile or "local", asked.override or [])
    if asked.cluster == "local" and any(r.partition for r in resources.values()):
        raise UserError(
            f"--profile {asked.profile or 'local'} names a partition and --cluster is local: add --cluster "
            "slurm, or leave the profile out to run all of it on this machine"
        )
    if asked.cluster == "local":  # detectron2 takes its number of GPUs as an option
        here = len(Machine.here().gpus)
        resources = {
            kind: replace(r, gpus_per_node=min(r.gpus_per_node, here)) for kind, r in resources.items()
        }
    graph = suite_graph(root, asked, resources)
    redo = graph.forced(asked.force or [])
    if asked.dry_run:
        refuse_other_configuration(root, graph, redo)
        return _dry_run(asked, graph, root, resources, redo)
    problems = checks.check(asked, graph, root, resources)
    if problems:
        raise UserError("nothing was submitted:\n  " + "\n  ".join(problems))
    if left_out := sorted(set(untracked()) - {str(p) for p in code_files(asked.own_files)}):
        print(
            f"jobs will not have {', '.join(left_out)}: git does not track it; --include takes files along",
            file=sys.stderr,
        )
    if asked.cluster == "slurm":
        return _to_slurm(asked, graph, root, resources, redo)
    return _here(asked, graph, root, resources, redo)


def _dry_run(
    asked: Suite, graph: Graph, root: Path, resources: dict[str, Resources], redo: set[str]
) -> int | None:
    """Say all that would happen; exit code 2 when a check fails."""
    from slurm.execution import submit

    if asked.cluster == "slurm":
        planned = submit.plan(graph, root, redo)
        for batch in submit.in_order(planned.batches):
            waits = ", ".join((*batch.depends_on, *batch.after))
            print(f"== {', '.join(s.name for s in batch.steps)}" + (f"  (after {waits})" if waits else ""))
            for step in batch.steps:
                print(f"   {step.shell}")
            text = submit.sbatch_text(batch, resources, root / "code" / "PINNED", root)
            print("\n".join(f"   {line}" for line in text.splitlines() if line.startswith("#SBATCH")))
        hours = sum(resources[b.kind].gpu_hours * len(b.steps) for b in planned.batches)
        print(
            f"{counted(planned.count, 'job')} in {counted(len(planned.batches), 'submission')}, "
            f"at most {hours:.1f} GPU-hours (every job up to its time limit, once); "
            f"{counted(len(planned.done), 'step')} done, {len(planned.live)} queued or running"
        )
    else:
        machine = Machine.here()
        for step in graph:
            fit = machine.fit(resources[step.kind])
            waits = ", ".join((*step.depends_on, *step.after))
            print(
                f"== {step.name}: {fit.tasks} x {counted(int(fit.cpus_per_task), 'CPU')}, "
                + counted(fit.gpus_per_node, "GPU")
                + (f"  (after {waits})" if waits else "")
            )
            print(f"   {step.shell}")
        cores, gpus = counted(machine.cpus, "CPU core"), counted(len(machine.gpus), "GPU")
        print(f"{len(graph)} steps on {cores} and {gpus}")
    problems = checks.check(asked, graph, root, resources)
    unseen = asked.cluster == "slurm" and not checks.has_slurm()
    if unseen:
        print("note: there is no sbatch on this machine, so partition, account and qos were not looked up")
    for problem in problems:
        print(f"check failed: {problem}")
    if problems:
        raise UserError(f"{counted(len(problems), 'check')} failed; nothing would be submitted")
    print(f"all {'other ' if unseen else ''}checks passed; nothing was submitted")
    return None


def _to_slurm(
    asked: Suite, graph: Graph, root: Path, resources: dict[str, Resources], redo: set[str]
) -> int | None:
    """Submit what is missing, under the folder's lock."""
    import subprocess

    from slurm.execution import submit

    with locked(root, SUBMIT_LOCK_WAIT_S):
        refuse_other_configuration(root, graph, redo)
        for step in graph:
            submit.Record(root, step.name).clean()
        planned = submit.plan(graph, root, redo)
        if planned.superseded:
            ids = [str(submit.Record(root, n).submitted["job_id"]) for n in planned.superseded]
            subprocess.run(["scancel", *ids], timeout=60, check=True)
        set_aside(root, graph, redo)
        save_settings(asked, root / "config.yaml")
        sent = (
            submit.submit(graph, planned, root, resources, pin(root, asked.own_files))
            if planned.batches
            else {}
        )
    for name, job_id in sent.items():
        print(f"submitted {name} as {job_id}")
    for name, state in planned.live.items():
        if name not in sent:
            word, _, reason = state.partition(" ")
            print(f"left alone {name}: {word.lower()} {reason}".rstrip())
    print(f"{len(sent)} submitted, {len(planned.done)} done before; python -m slurm status {root} --watch")
    return None


def _here(
    asked: Suite, graph: Graph, root: Path, resources: dict[str, Resources], redo: set[str]
) -> int | None:
    """Run the graph on this machine, and stay until it has ended."""
    from slurm.execution.slurm_queue import live_steps

    with locked(root):
        elsewhere = [n for n in live_steps(root) if not _is_local(root, n)]
        if elsewhere:
            raise UserError(f"{', '.join(elsewhere)}: on SLURM; `python -m slurm cancel {root}` first")
        refuse_other_configuration(root, graph, redo)
        set_aside(root, graph, redo)
        save_settings(asked, root / "config.yaml")
        views = LocalRun(graph, root, resources, pin(root, asked.own_files)).run()
    return show_outcome(root, views)


def _is_local(root: Path, name: str) -> bool:
    from slurm.state.step_files import Record

    return Record(root, name).submitted.get("cluster") == "local"

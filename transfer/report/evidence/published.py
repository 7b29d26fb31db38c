"""Which published figures may stand beside a task's results."""

from __future__ import annotations

from transfer.report.evidence.grouping import Task
from transfer.zoo.figures import Published, load_published


def same_protocol(task: Task) -> list[Published]:
    """Published figures that may stand beside this task's: same task, images and protocol, unaltered."""
    return [p for p in _of(task) if not why_not(p, task)]


def other_protocols(task: Task) -> list[Published]:
    """Published figures of the task's data set under other protocols: never ranked against ours."""
    return [p for p in _of(task) if why_not(p, task)]


def why_not(p: Published, task: Task) -> str:
    """Why a figure and a task's results are not comparable; empty where they are."""
    if not p.protocol:
        return f"no protocol here repeats what its source did{f' ({p.note})' if p.note else ''}"
    if p.protocol_name != task.protocol:
        return f"it is by {p.protocol_name}, ours by {task.protocol}"
    if task.altered:
        return f"ours was not by {p.protocol_name} as it is: {task.altered}"
    if not _same_images(p, task):
        ours = f"ours of {task.images:,} of {task.dataset} {task.split}"
        return f"it is of {p.n:,} images of {p.dataset}, {ours}"
    return ""


def _same_images(p: Published, task: Task) -> bool:
    """A split that says more than its name is another one, or a part."""
    same_split = p.split == task.split if p.split else " (" not in task.split
    return same_split and (p.dataset, p.n) == (task.dataset, task.images)


def _of(task: Task) -> list[Published]:
    whole = " (" not in task.split
    return [p for p in load_published() if whole and p.task == task.name and p.dataset == task.dataset]

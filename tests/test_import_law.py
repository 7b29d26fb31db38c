"""Imports point one way, heavy libraries stay at the edges, importing does nothing: read from the source."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from slurm.__main__ import COMMANDS as SLURM
from slurm.state.step_files import Record
from slurm.steps.graph import Step
from transfer.options.commands import SETTINGS

ROOT = Path(__file__).parents[1]
PACKAGES = ("pretrain", "transfer", "slurm")
MAY_IMPORT = {"pretrain": {"pretrain"}, "transfer": {"pretrain", "transfer"}, "slurm": set(PACKAGES)}
LAYERS = {
    "pretrain.profile": (
        "pretrain",
        "pretrain.views",
        "pretrain.data",
        "pretrain.network",
        "pretrain.objectives",
        "pretrain.common",
    ),
    "pretrain": (
        "pretrain.views",
        "pretrain.data",
        "pretrain.network",
        "pretrain.objectives",
        "pretrain.common",
    ),
    "pretrain.views": ("pretrain.data", "pretrain.common"),
    "pretrain.objectives": ("pretrain.common",),
    "pretrain.data": ("pretrain.common",),
    "pretrain.network": ("pretrain.common",),
    "pretrain.common": (),
    "transfer.zoo": (),
    "transfer.checkpoints": ("transfer.checkpoints.families", "transfer.zoo"),
    "transfer.checkpoints.families": (),
    "transfer.evaluation": ("transfer.checkpoints",),
    "transfer.evaluators": ("transfer.evaluation", "transfer.checkpoints"),
    "transfer.conversion": ("transfer.checkpoints",),
    "transfer.detection": (
        "transfer.detection.annotations",
        "transfer.detection.semantic",
        "transfer.conversion",
        "transfer.evaluation",
        "transfer.checkpoints",
    ),
    "transfer.detection.annotations": (),
    "transfer.detection.semantic": (),
    "transfer.spectrum": ("transfer.evaluators", "transfer.evaluation", "transfer.checkpoints"),
    "transfer.report": ("transfer.report.pages", "transfer.report.evidence"),
    "transfer.report.pages": ("transfer.report.evidence", "transfer.evaluators", "transfer.evaluation"),
    "transfer.report.evidence": ("transfer.evaluation", "transfer.zoo"),
    "slurm.commands": ("slurm.execution", "slurm.state", "slurm.steps"),
    "slurm.execution": ("slurm.state", "slurm.steps"),
    "slurm.state": ("slurm.steps",),
    "slurm.steps": (),
}
"""Each sub-package, and those of its own package that it may import."""
LEAVES = {
    "transfer.options.commands",
    "transfer.options.weights",
    "transfer.options.evaluation",
    "transfer.correlation",
    "transfer.network_cost",
}
"""Modules on top that anything may import: they import nothing of their package."""
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@functools.cache
def imported(path: Path, *, top_level: bool = False) -> frozenset[str]:
    """Dotted names of the modules that a file imports; `top_level`: only when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    names: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it leads"
            assert node.module is not None
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                names.add(str(argument.value))
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not (top_level and (inside or typing_only)):
            pending += ast.iter_child_nodes(node)
    return frozenset(names)


def uses(path: Path, library: str) -> bool:
    return any(name.split(".")[0] == library for name in imported(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_is_something_to_check():
    assert {name_of(path) for path in FILES} >= {"pretrain/common/cli.py", "transfer/checkpoints/backbone.py"}
    assert uses(ROOT / "transfer/checkpoints/backbone.py", "pretrain") and uses(
        ROOT / "transfer/checkpoints/backbone.py", "torch"
    )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path):
    package = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[0] for name in imported(path)} & {*PACKAGES, "tests", "benchmarks"}
    assert ours <= MAY_IMPORT[package]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_sub_packages_import_those_below_them(path: Path):
    """... and nothing beside or above, inside functions and by import_module either."""
    home = ".".join(path.relative_to(ROOT).parts[:-1])
    known = [p for p in LAYERS if p.split(".")[0] == home.split(".")[0]]
    for name in imported(path):
        there = max((p for p in known if name == p or name.startswith(f"{p}.")), key=len, default=home)
        if home in LAYERS and there != home and name not in LEAVES:
            assert there in LAYERS[home], f"{home} imports {name}"


def test_there_is_no_circle():
    """By strongly connected components: a lazy import in a function counts as well."""
    modules = {name_of(p)[:-3].replace("/", "."): p for p in FILES if p.name != "__init__.py"}
    graph = {m: {n for n in imported(p) if n in modules and n != m} for m, p in modules.items()}
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, pending = set(), [start]
        while pending:
            new = graph[pending.pop()] - seen
            seen |= new
            pending += new
        reached[start] = seen
    assert [m for m, seen in reached.items() if m in seen] == []
    assert "pretrain.common.files" in reached["slurm.commands.suite"]  # the graph is not empty


def test_no_folder_is_crowded():
    count = Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert {name_of(folder): n for folder, n in count.items() if n > 14} == {}


def test_every_package_says_what_it_is_for():
    for init in (p for p in FILES if p.name == "__init__.py"):
        assert ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))), name_of(init)


def test_detectron2_is_imported_by_detection_alone():
    users = {name_of(path.parent) for path in FILES if uses(path, "detectron2")}
    assert users == {"transfer/conversion", "transfer/detection", "transfer/detection/semantic"}


def test_submitit_is_imported_by_slurm_alone():
    assert {name_of(path).split("/")[0] for path in FILES if uses(path, "submitit")} <= {"slurm"}


def test_the_foundation_needs_no_heavy_library():
    for name in ("cli", "errors", "files", "progress", "signals"):
        path = ROOT / f"pretrain/common/{name}.py"
        names = {module.split(".")[0] for module in imported(path, top_level=True)}
        assert not names & {"torch", "torchvision", "timm", "numpy", "matplotlib"}, name


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("pretrain --help", 0),
        ("pretrain --data-dir d --output o --lr fast", 2),
        ("transfer --help", 0),
        ("transfer formats --markdown", 0),
        *((f"transfer {name} --help", 0) for name in ("protocols", "plan", *SETTINGS)),
        ("transfer knn --weigths w", 2),
        ("transfer.train_net --help", 0),
        ("pretrain.profile.__main__ --help", 0),
        ("slurm --help", 0),
        *((f"slurm {name} --help", 0) for name in SLURM),
        ("slurm status SUITE", 0),
        ("benchmarks --help", 0),
    ],
)
def test_the_front_door_opens_without_torch(command: str, code: int, tmp_path: Path):
    """Help, status and a wrong option are answered at once: a heavy module slows nobody but its users."""
    step = Step(name="a", kind="knn", command="m", argv=(), output=tmp_path)
    Record(tmp_path, "a").describe(step, "key", 0)
    module, *words = command.replace("SUITE", str(tmp_path)).split()
    entry = module if "." in module else f"{module}.__main__"
    script = (
        "import importlib, sys\n"
        f"main = importlib.import_module({entry!r}).main\n"
        "try:\n"
        f"    code = main({words!r})\n"
        "except SystemExit as left:\n"
        "    code = left.code\n"
        "heavy = {'torch', 'timm', 'torchvision', 'detectron2', 'matplotlib', 'scipy'} & {*sys.modules}\n"
        "print(code or 0, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith(f"{code} []\n"), done.stdout + done.stderr


def test_commands_of_transfer_exist_and_say_what_they_do(capsys: pytest.CaptureFixture):
    from transfer.__main__ import COMMANDS, main

    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, (module, text) in COMMANDS.items():
        assert f"  {name} " in shown and text in shown
        path = ROOT / (module.replace(".", "/") + ".py")
        functions = {n.name: n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
        assert "main" in functions and len(functions["main"].args.args) == 1, module
    assert main(["knnn"]) == 2
    assert "did you mean knn?" in capsys.readouterr().err
    assert main([]) == 2

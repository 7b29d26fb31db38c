"""The documentation says what the code does: generated tables, links, commands and their options."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
from pathlib import Path

import pytest

from transfer import formats, protocol

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(p for p in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))
HEADS = {
    "protocols.md": """# Protocols

Written from `transfer/protocols/*.yaml` (CONTRIBUTING says how). A protocol's name on the command line is
`NAME@VERSION`; the hash beside it covers its task and values, goes into every result, and results of two
hashes are never ranked against each other. Your own protocol is a file of the same form:
`--protocol path/to/mine@1.yaml`.
""",
    "formats.md": """# Checkpoint formats

Written from `transfer/formats.py` (CONTRIBUTING says how). `python -m transfer inspect FILE` says which of
them a file has, what would be used and what dropped. Prefixes `module.` (DDP) and `_orig_mod.`
(torch.compile) may stand anywhere.
""",
}


def generated() -> dict[str, str]:
    return {
        "protocols.md": f"{HEADS['protocols.md']}\n{protocol.as_markdown().strip()}\n",
        "formats.md": f"{HEADS['formats.md']}\n{formats.markdown().strip()}\n",
    }


@pytest.mark.parametrize("name", HEADS)
def test_generated_page_is_up_to_date(name: str) -> None:
    page, wanted = ROOT / "docs" / name, generated()[name]
    if os.environ.get("UPDATE_DOCS"):
        page.parent.mkdir(exist_ok=True)
        page.write_text(wanted, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == wanted, "UPDATE_DOCS=1 python -m pytest tests/test_docs.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target) and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


def commands() -> list[tuple[str, str]]:
    """Every shell command in a fenced block of the documentation."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:sh|bash|shell|console)\n(.*?)```", page.read_text("utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ")
                if line:
                    found.append((page.name, line))
    return found


CONSOLE = {"intl-pretrain": "pretrain", "intl-transfer": "transfer", "intl-slurm": "slurm"}


def parts(line: str) -> tuple[str, str, list[str]] | None:
    """(module, subcommand, options) of a command of this project; None for others (git, make, pip …)."""
    words = [w for w in shlex.split(line) if not re.fullmatch(r"[A-Z_0-9]+=.*", w)]
    if not words:
        return None
    if words[0] in CONSOLE:
        module, rest = CONSOLE[words[0]], words[1:]
    elif Path(words[0]).name.startswith("python") and words[1:2] == ["-m"]:
        module, rest = words[2], words[3:]
    else:
        return None
    if module.partition(".")[0] not in ("pretrain", "transfer", "slurm"):
        return None
    sub = rest[0] if module in ("transfer", "slurm") and rest and not rest[0].startswith("-") else ""
    return module, sub, [w.partition("=")[0] for w in rest if w.startswith("--")]


def help_of(module: str, sub: str) -> str:
    loaded = importlib.import_module(f"{module}.__main__" if "." not in module else module)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
        loaded.main([*([sub] if sub else []), "--help"])
    return out.getvalue()


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda v: v[:60])
def test_documented_command_exists_with_its_options(page: str, line: str) -> None:
    if line.startswith("make "):
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        named = [w for w in shlex.split(line)[1:] if "=" not in w and not w.startswith("-")]
        assert set(named) <= set(targets), f"{page}: {line}"
        return
    found = parts(line)
    if found is None:
        pytest.skip("no command of this project")
    module, sub, options = found
    text = help_of(module, sub)
    assert "usage" in text.lower() or options == [], f"{page}: {line}: no help: {text[:200]}"
    missing = [o for o in options if o != "--help" and not re.search(rf"{re.escape(o)}\b", text)]
    assert not missing, f"{page}: {line}: {', '.join(missing)} unknown to {module} {sub}"


def test_the_check_of_options_can_fail() -> None:
    assert parts("python -m transfer report runs --no-such 1") == ("transfer", "report", ["--no-such"])
    text = help_of("transfer", "report")
    assert "--output" in text and "--no-such" not in text

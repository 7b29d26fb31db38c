"""The documentation says what the code does: generated tables, links, commands and their options."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import io
import os
import re
import shlex
from dataclasses import MISSING
from pathlib import Path
from typing import NamedTuple

import pytest

from pretrain.data import transfer_sets
from pretrain.data.datasets import DATASETS
from slurm.steps.resources import Resources
from tests.helpers import results_schema
from transfer import formats_command
from transfer.evaluation import protocol
from transfer.protocols_command import explained
from transfer.zoo import listing

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(p for p in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))
HEADS = {
    "protocols.md": """# Protocols

Written from `transfer/protocols/*.yaml` (CONTRIBUTING says how). A protocol's name on the command line is
`NAME@VERSION`; the hash beside it covers its task and values, goes into every result, and results of two
hashes are never ranked against each other. Your own protocol is a file of the same form under a name of its
own: `--protocol path/to/mine@1.yaml`.

Values that are not listed have the defaults of `transfer/evaluators/`; fine-tuning is in float32 unless
`--precision` says otherwise. The last column says in what a protocol is still known to differ from what its
authors do; a result says in `deviations` where its run did (another `--precision` or `--image-size`), and in
`evaluated_under` everything beside the protocol that its number hangs on.

The authors' own k-NN functions (DINO, solo-learn, lightly, INTL) give the same top-1 on the same features,
for k from 1 to 200, and the same top-5 from k = 10 on; below, theirs also count classes without a vote.
""",
    "formats.md": """# Checkpoint formats

Written from `transfer/checkpoints/formats.py` (CONTRIBUTING says how). `intl-transfer inspect FILE` says
which of them a file has, what would be used and what dropped. Prefixes `module.` (DDP) and `_orig_mod.`
(torch.compile) may stand anywhere. A file of no known writer, what cannot be known from any file, and how to
say it: [reading_checkpoints.md](reading_checkpoints.md).
""",
    "datasets.md": """# Data sets

What `--dataset NAME --data-dir DIR` wants in DIR.

- `imagenet`, `imagenet100` (CMC's classes, alone or among all) and `imagefolder` (any classes):
  `{train,val}/<class>/<images>`, `test` or `validation` in place of `val` too; `webdataset`: `train-*.tar`,
  `val-*.tar`.
- `cifar10`, `cifar100`: torchvision's files, or class folders; `fashion_mnist`: its four idx files. `voc07`:
  `VOC2007/`, for `linear` with an SVM's protocol.

Of a class folder the files named .bmp, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff and .webp are taken,
however deep; hidden names and those of systems (`__MACOSX`, `@eaDir`, `Thumbs.db`) are left out, and what
else is left out is counted in a warning. Pretraining needs no labels: with `--dataset imagefolder` its
images may lie in `train/` itself. An image that cannot be read stops no evaluation on cached features before
all such images are listed, and `--max-broken-images` allows for some. Of more than 100,000 images the list is
kept in the user's cache folder, for as long as no folder changes; `touch` the folder of a file that was
overwritten in place.

They are reported in top-1 (`voc07` in mAP), the sets below in the metric of their row: it is the headline of
the report, and held-out heads, C and best epochs are chosen by it. Mean per class is the mean over classes of
the share of their images that is classified right, `mean_per_class` in results.

The sets below are read by torchvision's own classes and never downloaded. DIR is torchvision's root or the
set's own folder, under any name (with `--stage-to` that: all of DIR is copied). Images are evaluated in
ImageNet's way, resized and cropped as the protocol says; `--image-size` takes another size. Of every set,
images are normalised as the weights' file records, else with CIFAR's mean and standard deviation for another
project's file with a CIFAR stem, else with ImageNet's; `--mean` and `--std` say otherwise. A result's
`split` says which split of several it is, and of how many images where some are missing. A split made here
trains on the images of each class whose SHA-256 of `0 CLASS/FILE` comes first (`0` is its seed).

Written from `pretrain/data/transfer_sets.py` (CONTRIBUTING says how).
""",
    "zoo.md": """# Published checkpoints by name

`--weights zoo:NAME` takes a published checkpoint wherever a checkpoint file is taken. It is fetched once into
the user's cache folder (`$XDG_CACHE_HOME/intl-bench/zoo`), goes on where a download was cut off, is compared
with the hash that its source states, and is proved complete as any other file. Without a network, the error
says which file to fetch by hand and where to put it. `intl-transfer zoo dino_resnet50` says where one comes
from. Where a file holds two networks, the one that was evaluated is read, unless `--branch` names the other.
None of the files was opened when this was written: a format is what its writer's code says, and
`inspect zoo:NAME` shows what it really is.

## Is a published figure reproduced?

```sh
intl-transfer reproduce dino_resnet50 --data-dir /data/imagenet --output out/dino
```

evaluates it by each protocol that repeats how one of its figures was made, and says of every figure:
reproduced; outside tolerance, and by how much; or not comparable, and why. What counts as within tolerance
stands in `transfer/zoo/figures.yaml`. A figure is set beside a result only where the report would do so: the
protocol unaltered, the same images, the epoch chosen in the same way. `reproduction.json` holds the outcome,
one entry a figure; run again, it goes on. `--tasks reproduce` has a suite do it for each of its zoo:NAMEs.

## A manifest of your own

`--zoo FILE` has the form of `transfer/zoo/zoo.yaml`; figures of an entry stand under it:

```
checkpoints:
  ours_ep100:
    url: https://example.org/ours_ep100.pth
    source: https://example.org/paper
    sha256: "0f1e2d3c"
    figures:
      - {task: knn, dataset: imagenet, protocol: dino_knn@2, metrics: {top1_k20: 70.1}}
```

## What comes with the project

Written from `transfer/zoo/zoo.yaml` and `transfer/zoo/figures.yaml` (CONTRIBUTING says how).
""",
}


def generated() -> dict[str, str]:
    return {
        "protocols.md": f"{HEADS['protocols.md']}\n{protocol.as_markdown().strip()}\n",
        "formats.md": f"{HEADS['formats.md']}\n{formats_command.markdown().strip()}\n",
        "zoo.md": f"{HEADS['zoo.md']}\n{listing.markdown()}\n",
        "datasets.md": f"{HEADS['datasets.md']}\n{transfer_sets.markdown()}\n",
        "cluster.md": f"{written_by_hand('cluster.md')}{resources_table()}\n",
        "results.schema.json": results_schema.as_text(),
    }


def written_by_hand(name: str) -> str:
    """What of a page stands before its one generated table."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8").partition("| key ")[0]


def resources_table() -> str:
    """What a profile may ask for, from the docstrings of its class."""
    defaults = {f.name: f.default for f in dataclasses.fields(Resources)}
    shown = {name: "" if value in (None, (), MISSING) else f"`{value}`" for name, value in defaults.items()}
    rows = [f"| `{name}` | {shown[name]} | {text} |" for name, text in explained(Resources).items()]
    return "\n".join(["| key | default | what it asks for |", "| --- | --- | --- |", *rows])


@pytest.mark.parametrize("name", [*HEADS, "cluster.md", "results.schema.json"])
def test_generated_page_is_up_to_date(name: str) -> None:
    page, wanted = ROOT / "docs" / name, generated()[name]
    if os.environ.get("UPDATE_DOCS"):
        page.parent.mkdir(exist_ok=True)
        page.write_text(wanted, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == wanted, "UPDATE_DOCS=1 python -m pytest tests/test_docs.py"


def test_every_data_set_is_named_where_they_are_listed() -> None:
    help_text = " ".join(help_of("transfer", "knn").split())
    evaluation, page = (
        (ROOT / p).read_text(encoding="utf-8") for p in ("docs/evaluation.md", "docs/datasets.md")
    )
    for name in DATASETS:
        assert f"`{name}`" in evaluation and f"`{name}`" in page and re.search(rf"\b{name}\b", help_text), (
            name
        )


def test_messages_to_look_up_are_those_of_the_code() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(.*?)`", page, re.M)
    sources = [p for package in ("pretrain", "transfer", "slurm") for p in (ROOT / package).rglob("*.py")]
    said = "".join(re.sub(r'"\s*f?"', "", p.read_text(encoding="utf-8")) for p in sources)
    assert len(told) == 20 and [words for words in told if words not in said] == []


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 70


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target) and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


class Command(NamedTuple):
    """A shell command of the documentation, and where it stands."""

    page: str
    section: str
    line: str

    @property
    def is_a_name(self) -> bool:
        """Whether it names a subcommand, as a sentence does, and is not to be run as it stands."""
        return re.fullmatch(r"intl-\w+ [a-z][a-z-]*", self.line) is not None


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
PROGRAMS = r"make|python|torchrun|intl-\w+|(?:\S*/)?bin/python"
STARTS_A_COMMAND = re.compile(rf"(?:\$ )?(?:[A-Z_0-9]+=\S+ )*(?:{PROGRAMS}) +(\S.*)")


def commands_of(page: str, text: str) -> list[Command]:
    """Every shell command in a ```sh block, and every one in the text between backticks."""
    found = []
    outside = FENCE.sub(lambda m: re.sub("(?m)^#", " #", m[0]), text)  # a comment in a block is no heading
    for part in re.split(r"^## +", outside, flags=re.M):
        section = "" if part.startswith("# ") else part.partition("\n")[0].strip()
        for block in (body for kind, body in FENCE.findall(part) if kind == "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ")
                if line:
                    found.append(Command(page, section, line))
        for words in re.findall(r"`([^`\n]+)`", FENCE.sub("", part)):
            if STARTS_A_COMMAND.fullmatch(words):
                found.append(Command(page, section, words))
    return list(dict.fromkeys(found))


def commands() -> list[Command]:
    """Every shell command of the documentation."""
    return [c for page in PAGES for c in commands_of(page.name, page.read_text(encoding="utf-8"))]


CONSOLE = {"intl-pretrain": "pretrain", "intl-transfer": "transfer", "intl-slurm": "slurm"}


def parts(line: str) -> tuple[str, str, list[str]] | None:
    """(module, subcommand, options) of a command of this project; None for others (git, pip, pytest …)."""
    words = [w for w in shlex.split(line) if not re.fullmatch(r"[A-Z_0-9]+=.*", w)]
    if not words:
        return None
    console = next((i for i, word in enumerate(words) if word in CONSOLE), None)
    if console is not None:  # alone, or behind torchrun --no-python
        module, rest = CONSOLE[words[console]], words[console + 1 :]
    elif Path(words[0]).name.startswith(("python", "torchrun")) and "-m" in words:
        at = words.index("-m") + 1
        module, rest = words[at], words[at + 1 :]
    else:
        return None
    if module.partition(".")[0] not in ("pretrain", "transfer", "slurm"):
        return None
    sub = rest[0] if module in ("transfer", "slurm") and rest and not rest[0].startswith("-") else ""
    # a word with a space is the quoted text of an option, such as --linear-options "--seed 1"
    names = [w.partition("=")[0] for w in rest if w.startswith("--")]
    return module, sub, [name for name in names if " " not in name]


KINDS = {
    "make": {"demo", "test", "test-faults", "lint", "bench", "env"},
    "pretrain": {""},
    "transfer": {"inspect", "knn", "linear", "report", "convert", "plan", "train-net"},
    "slurm": {"suite", "status", "logs", "cancel"},
}
"""What the documentation has at least: found fewer, the search for commands is at fault, or the pages."""


def kind_of(line: str) -> tuple[str, str]:
    """(program or module, target or subcommand)."""
    if line.startswith("make "):
        return "make", next(w for w in shlex.split(line)[1:] if "=" not in w and not w.startswith("-"))
    module, sub, _ = parts(line) or (shlex.split(line)[0], "", [])
    return module, sub


def test_every_kind_of_command_is_found() -> None:
    found = {kind_of(c.line) for c in commands()}
    missing = {(program, name) for program, names in KINDS.items() for name in names} - found
    assert not missing, f"not in any block marked sh nor between backticks: {sorted(missing)}"
    assert any(c.line.startswith("torchrun ") for c in commands())
    assert {c.page for c in commands()} >= {"README.md", "CONTRIBUTING.md", "formats.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_command_stands_in_a_block_that_is_not_marked_sh(page: Path) -> None:
    for kind, body in FENCE.findall(page.read_text(encoding="utf-8")):
        assert kind in ("", "sh", "python"), f"{page.name}: ```{kind}: commands are looked for in ```sh alone"
        if kind == "":
            lost = [line for line in body.splitlines() if STARTS_A_COMMAND.match(line.strip())]
            assert not lost, f"{page.name}: mark the block ```sh: {lost}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_compile_and_import_what_exists(page: Path) -> None:
    for kind, body in FENCE.findall(page.read_text(encoding="utf-8")):
        if kind == "python":
            imports = [n for n in ast.parse(body).body if isinstance(n, (ast.Import, ast.ImportFrom))]
            exec(compile(ast.Module(imports, []), page.name, "exec"), {})


def test_commands_are_found_where_they_stand() -> None:
    text = """# Title
```sh
make one   # why
## no heading
```
Says `python -m transfer inspect FILE`, `--branch ema` and `make()`; names `intl-transfer spectrum`.
## Second
```sh
$ torchrun --nproc-per-node 2 \\
  -m pretrain
```
```
images -> pretrain
```
"""
    assert commands_of("p", text) == [
        ("p", "", "make one"),
        ("p", "", "python -m transfer inspect FILE"),
        ("p", "", "intl-transfer spectrum"),
        ("p", "Second", "torchrun --nproc-per-node 2    -m pretrain"),
    ]
    assert [c.is_a_name for c in commands_of("p", text)] == [False, False, True, False]
    assert parts("torchrun --nproc-per-node 2 -m pretrain --seed 1") == ("pretrain", "", ["--seed"])


def help_of(module: str, sub: str) -> str:
    loaded = importlib.import_module(module)
    if hasattr(loaded, "__path__"):
        loaded = importlib.import_module(f"{module}.__main__")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
        loaded.main([*([sub] if sub else []), "--help"])
    return out.getvalue()


@pytest.mark.parametrize("command", commands(), ids=lambda c: f"{c.page}: {c.line[:60]}")
def test_documented_command_exists_with_its_options(command: Command) -> None:
    page, line = command.page, command.line
    if line.startswith("make "):
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        named = [w for w in shlex.split(line)[1:] if "=" not in w and not w.startswith("-")]
        assert set(named) <= set(targets), f"{page}: {line}"
        return
    found = parts(line)
    if found is None:
        assert "-m pytest " in line, f"{page}: {line}: no command of this project"
        return
    module, sub, options = found
    if sub == "train-net":
        pytest.importorskip("detectron2")
    text = help_of(module, sub)
    assert "usage" in text.lower() or options == [], f"{page}: {line}: no help: {text[:200]}"
    missing = [o for o in options if o != "--help" and not re.search(rf"{re.escape(o)}\b", text)]
    assert not missing, f"{page}: {line}: {', '.join(missing)} unknown to {module} {sub}"


def test_the_check_of_options_can_fail() -> None:
    assert parts("python -m transfer report runs --no-such 1") == ("transfer", "report", ["--no-such"])
    text = help_of("transfer", "report")
    assert "--output" in text and "--no-such" not in text

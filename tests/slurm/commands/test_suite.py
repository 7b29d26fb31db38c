"""The suite's command: its graph, its refusals, its dry run, and one run on this machine."""

from __future__ import annotations

import importlib
import json
import shlex
from pathlib import Path

import pytest
import timm
import torch

from pretrain.common.errors import UserError
from pretrain.common.files import read_jsonl, sha256_of
from slurm.__main__ import main
from slurm.execution import submit
from slurm.execution.snapshot import SOURCE
from slurm.steps import checks
from slurm.steps.graph import Graph, Step
from slurm.steps.resources import load_profile
from slurm.steps.suite import Suite, _files, suite_graph
from slurm.steps.tasks import DETECTION, detection_config
from tests.helpers import checkpoint_zoo as zoo
from tests.helpers.pixel_data import write_pixels
from transfer.__main__ import main as transfer


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text("dataset: imagefolder\narch: resnet18\nprojector_hidden: 64\nprojector_output: 64\n")
    return path


def graph_of(root: Path, recipe: Path, **rest):
    asked = Suite(
        output=str(root), recipe=str(recipe), data_dir=str(root), seeds=3,
        tasks=["knn", "linear", "semisup1", "coco_c4_2x"], **rest,
    )  # fmt: skip
    return suite_graph(root, asked, load_profile("slurm_gpu", []))


def test_the_graph_is_the_one_asked_for(tmp_path: Path, recipe: Path) -> None:
    graph = graph_of(tmp_path, recipe)
    assert list(graph.steps) == [
        "pretrain", "convert/intl", "knn/intl", *(f"linear/intl/seed{i}" for i in range(3)),
        *(f"semisup1/intl/seed{i}" for i in range(3)),
        *(f"detection/coco_c4_2x/intl/seed{i}" for i in range(3)),
        "report",
    ]  # fmt: skip
    assert graph.steps["knn/intl"].depends_on == graph.steps["convert/intl"].depends_on == ("pretrain",)
    assert graph.steps["detection/coco_c4_2x/intl/seed1"].depends_on == ("convert/intl",)
    assert "--label-percent" in graph.steps["semisup1/intl/seed0"].argv
    assert set(graph.steps["report"].after) == set(graph.steps) - {"convert/intl", "report"}


def test_protocols_are_those_that_the_field_reports_by(tmp_path: Path, recipe: Path) -> None:
    def of(**rest) -> tuple[str, str]:
        asked = Suite(output=str(tmp_path), data_dir=str(tmp_path), tasks=["knn", "linear"], **rest)
        chosen = asked.protocols
        return chosen["knn"], chosen["linear"]

    assert of(recipe=str(recipe)) == ("solo_knn@2", "intl_linear@2")
    assert of(weights=["w.pth"], dataset="imagenet") == ("dino_knn@2", "intl_linear@2")
    assert of(weights=["w.pth"], dataset="voc07") == ("solo_knn@2", "voc07_svm@2")
    assert of(recipe="cifar10_ep1000") == ("intl_cifar_5nn@2", "intl_cifar_linear@2")
    assert of(recipe="cifar10_ep1000", linear_protocol="logreg@1") == ("intl_cifar_5nn@2", "logreg@1")


EMA = ["--pretrain-options", "--ema --max-steps 2 --batch-global 32 --view-sizes [32,32] --hook null"]


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ("--hook null", "INTL"),
        ("--objective vicreg", "VICReg"),
        ("--power 0.5", "INTL"),  # so it stands in steps that are recorded as done
        ("--transform 'min(λ^-0.5, 10)'", "g(λ) = min(λ^-0.5, 10)"),
    ],
)
def test_the_row_has_the_name_of_the_objective(
    options: str, label: str, tmp_path: Path, recipe: Path
) -> None:
    argv = graph_of(tmp_path, recipe, pretrain_options=options).steps["knn/intl"].argv
    assert argv[argv.index("--label") + 1] == label


def test_the_branch_asked_for_is_the_one_that_is_judged(
    tmp_path: Path, recipe: Path, cifar_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps are called one after the other, as their jobs would."""
    asked = Suite(
        output=str(tmp_path), recipe=str(recipe), data_dir=str(cifar_folder), tasks=["knn", "small_R18_FPN"],
        branch="ema", control=True, pretrain_options=f"{EMA[1]} --workers 0",
    )  # fmt: skip
    graph = suite_graph(tmp_path, asked, load_profile("local", []))
    for name in ("pretrain", "knn/intl"):
        step = graph.steps[name]
        assert not importlib.import_module(step.module).main(list(step.argv)), name
        assert all(path.exists() for path in step.makes)
    trained = tmp_path / "pretrain" / "backbone_ema.safetensors"
    assert trained in graph.steps["pretrain"].makes
    (result, *_) = read_jsonl(tmp_path / "knn" / "intl" / "results.jsonl")
    assert result["weights"]["branch"] == "ema" and result["weights"]["sha256"] == sha256_of(trained)
    converted = graph.steps["convert/intl"].argv
    assert converted[:4] == ("--weights", str(trained), "--branch", "ema")
    control = graph.steps["knn/control"].argv  # untrained, both branches are one network
    assert control[control.index("--branch") + 1] == "online" and "backbone.safetensors" in control[1]


def test_an_ema_branch_is_refused_where_the_recipe_trains_none(
    tmp_path: Path, recipe: Path, cifar_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["suite", "--recipe", str(recipe), "--data-dir", str(cifar_folder), "--tasks", "knn"]
    words += ["--output", str(tmp_path / "out"), "--branch", "ema"]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert f"--branch ema: --recipe {recipe} trains without an EMA encoder" in told
    assert main([*words, "--dry-run"]) == 2
    assert capsys.readouterr().out.count("check failed: --branch ema") == 1
    assert main([*words, "--dry-run", *EMA]) == 0
    assert "--branch ema" in capsys.readouterr().out


def test_how_the_weights_are_read_is_said_once_for_every_step(
    tmp_path: Path, recipe: Path, cifar_folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A file that no format explains: refused with the words to type, which the suite then takes itself."""
    monkeypatch.chdir(tmp_path)
    odd = zoo.pre("net.trunk.", zoo.backbone()) | {"net.neck.weight": torch.ones(2)}
    torch.save({"run": {"w": odd}}, "odd.pth")
    words = ["suite", "--weights", "odd.pth", "--dataset", "cifar10", "--data-dir", str(cifar_folder)]
    words += ["--output", "out", "--tasks", "knn"]
    assert main([*words, "--dry-run"]) == 2
    assert "Take it with --prefix net.trunk. --drop net.neck." in capsys.readouterr().out
    said = ["--container", "run.w", "--prefix", "net.trunk.", "--drop", "net.neck.", "--last-stride", "1"]
    assert main([*words, *said, "--dry-run"]) == 0
    assert f"--branch online {' '.join(said)}" in capsys.readouterr().out
    Path("mine.yaml").write_text("online: [{container: run.w, prefix: net.trunk.}]\ndrop: {net.neck.: neck}")
    asked = Suite(
        output="out", weights=["odd.pth"], dataset="cifar10", data_dir=str(cifar_folder),
        tasks=["knn", "linear", "semisup1", "small_R18_FPN"], weights_format="mine.yaml", last_stride=1,
        channels="bgr", stem="imagenet", arch="resnet18", stride_in_1x1=False,
    )  # fmt: skip
    graph = suite_graph(tmp_path / "out", asked, load_profile("local", []))
    layout = str(tmp_path / "mine.yaml")
    all_words = [
        "--branch", "online", "--arch", "resnet18", "--stem", "imagenet", "--stride-in-1x1", "false",
        "--last-stride", "1", "--channels", "bgr", "--weights-format", layout,
    ]  # fmt: skip
    for name in ("knn/odd", "linear/odd/seed0", "semisup1/odd/seed0", "convert/odd"):
        step = graph.steps[name]
        assert shlex.join(all_words) in step.shell and Path(layout) in step.inputs
    step = graph.steps["knn/odd"]
    assert not importlib.import_module(step.module).main(list(step.argv))
    (result, *_) = read_jsonl(step.makes[0])
    assert result["weights"]["read_with"] == (
        "--stem imagenet --stride-in-1x1 false --last-stride 1 --channels bgr "
        f"--weights-format {layout} (sha256 {sha256_of(layout)[:12]})"
    )
    first = graph.keys["knn/odd"]
    Path("mine.yaml").write_text(Path("mine.yaml").read_text() + "\n# another")
    assert suite_graph(tmp_path / "out", asked, load_profile("local", [])).keys["knn/odd"] != first
    trained = ["suite", "--recipe", str(recipe), *words[3:]]
    for option, wrong in (
        (["--prefix", "a."], "--prefix a.: how to read --weights; a recipe's own"),
        (["--arch", "resnet50"], "--arch resnet50: how to read --weights"),
        (["--weights-format", "no.yaml"], "--weights-format no.yaml: "),
        (["--stem-padding", "99"], "--stem-padding 99: wanted 0 to 8 px"),
    ):
        assert main([*trained, *option]) == 2
        assert wrong in capsys.readouterr().err


def test_a_hook_in_a_suites_file_is_asked_for_on_the_command_line(
    tmp_path: Path, recipe: Path, cifar_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text(f"recipe: {recipe}\ntasks: [knn]\npretrain_options: --hook my.module:look\n")
    words = ["suite", "--config", str(file), "--data-dir", str(cifar_folder), "--dry-run"]
    words += ["--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert "give --pretrain-options '--hook my.module:look' yourself" in capsys.readouterr().err
    assert main([*words, "--pretrain-options", "--hook my.module:look"]) == 0
    assert main([*words, "--pretrain-options", "--hook transfer.hooks:knn"]) == 0
    capsys.readouterr()


def test_further_options_are_quoted_as_in_a_shell(tmp_path: Path, recipe: Path) -> None:
    words = "--wandb 'two words' --epochs 2 --epochs=3"
    asked = Suite(
        output=str(tmp_path), recipe=str(recipe), data_dir=str(tmp_path), tasks=["knn", "linear"],
        control=True, pretrain_options=words, knn_options="--image-size 24",
        linear_options='--label "my INTL"',
    )  # fmt: skip
    assert asked.pretraining is not None
    assert (asked.pretraining.wandb, asked.pretraining.epochs) == ("two words", 3)
    steps = suite_graph(tmp_path, asked, load_profile("local", [])).steps
    assert "two words" in steps["pretrain"].argv and steps["linear/intl/seed0"].argv[-1] == "my INTL"
    assert steps["knn/intl"].argv[-2:] == ("--image-size", "24")
    assert [w for w in steps["control"].argv if w.startswith("--epochs")] == ["--epochs"]
    with pytest.raises(UserError, match="--linear-options --label 'my: No closing quotation"):
        Suite(output="o", weights=["w"], data_dir=".", tasks=["linear"], linear_options="--label 'my")


def test_alike_steps_become_arrays_with_dependencies(tmp_path: Path, recipe: Path) -> None:
    graph = graph_of(tmp_path, recipe)
    batches = submit.in_order(submit.plan(graph, tmp_path, set()).batches)
    sizes = {b.title: len(b.steps) for b in batches}
    assert sizes["linear/intl"] == 3 and sizes["detection/coco_c4_2x/intl"] == 3 and sizes["knn/intl"] == 1
    linear = next(b for b in batches if b.title == "linear/intl")
    assert submit.dependency(linear, {"pretrain": "5", "convert/intl": "6"}) == "afterok:5"
    assert submit.dependency(linear, {"convert/intl": "6"}) is None  # pretrain was done before
    report = batches[-1]
    assert submit.dependency(report, {"knn/intl": "7", "linear/intl/seed2": "8_2"}) == "afterany:7:8_2"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "knn"], "either --recipe NAME|FILE or --weights FILE"),
        (["--recipe", "r", "--weights", "w", "--tasks", "knn"], "either --recipe"),
        (["--weights", "w.pth"], "wanted --tasks, of: knn, linear"),
        (["--weights", "w.pth", "--tasks", "kmn", "--data-dir", "."], "--tasks kmn: unknown; known: knn"),
        (["--weights", "w.pth", "--tasks", "knn"], "wanted --data-dir"),
        (["--weights", "w.pth", "--tasks", "knn", "--data-dir", "."], "w.pth: no such file"),
        (["--weights", "w.pth", "--tasks", "knn", "--data-dir", ".", "--seeds", "0"], "--seeds 0"),
        (["--weights", "w", "--tasks", "knn", "--data-dir", ".", "--cluster", "slurm"], "wants --profile"),
        (
            ["--weights", "w", "--tasks", "knn", "--data-dir", ".", "--profile", "slurm_gpu"],
            "names a partition and --cluster is local: add --cluster slurm",
        ),
        (["--recipe", "nope", "--tasks", "knn", "--data-dir", "."], "nope: no such file; known names: "),
    ],
)
def test_mistakes_are_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert main(["suite", *words, "--output", str(out)]) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith("error: ") and "Traceback" not in told
    assert not out.exists()


def test_a_dry_run_finds_what_would_fail(
    tmp_path: Path, recipe: Path, cifar_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no checkpoint")
    words = ["--tasks", "knn", "--knn-protocol", "nope@1", "--dataset", "imagefolder"]
    words += ["--output", str(tmp_path / "out"), "--dry-run"]
    assert main(["suite", "--weights", str(broken), "--data-dir", str(tmp_path / "void"), *words]) == 2
    told = capsys.readouterr()
    assert told.out.count("check failed") == 3 and "void" in told.out and "nope@1" in told.out
    assert "== knn/broken" in told.out and not (tmp_path / "out").exists()
    good = ["--knn-protocol", "solo_knn@1", "--data-dir", str(cifar_folder)]
    assert main(["suite", "--recipe", str(recipe), *words[:2], *words[4:], *good]) == 0
    assert "all checks passed" in capsys.readouterr().out


def test_a_dry_run_prints_commands_that_run(
    tmp_path: Path, recipe: Path, cifar_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "two words"
    words = ["--recipe", str(recipe), "--data-dir", str(cifar_folder), "--output", str(folder), "--dry-run"]
    assert main(["suite", *words, "--tasks", "knn,linear,semisup1,small_R18_FPN"]) == 2  # without its images
    told = [shlex.split(x) for x in capsys.readouterr().out.splitlines() if x.startswith("   python ")]
    assert {" ".join(x[2:4]) if x[2] == "transfer" else x[2] for x in told} == {
        "pretrain", "transfer knn", "transfer linear", "transfer semisup",
        "transfer convert", "transfer.train_net", "transfer report",
    }  # fmt: skip
    knn = next(x for x in told if x[3] == "knn")
    assert transfer(knn[3:]) == 2  # it runs, and misses what the first step would have made
    assert f"{folder}/pretrain/backbone.safetensors" in capsys.readouterr().err


def test_a_dry_run_for_a_cluster_needs_no_slurm_on_this_machine(
    tmp_path: Path, recipe: Path, cifar_folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where no program at all is found; submission itself is refused, and so is what another check finds."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    out = tmp_path / "out"
    words = ["suite", "--recipe", str(recipe), "--data-dir", str(cifar_folder), "--output", str(out)]
    words += ["--tasks", "knn,linear", "--seeds", "3", "--cluster", "slurm", "--profile", "slurm_gpu"]
    small = ["--override", "knn.mem_gb=1.5", "knn.timeout_min=90"]
    assert main([*words, *small, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "note: there is no sbatch on this machine" in told and "all other checks passed" in told
    headers = {x.splitlines()[0].split("  (after")[0]: set(x.splitlines()) for x in told.split("== ")[1:]}
    assert {"   #SBATCH --mem=1536MB", "   #SBATCH --time=90"} <= headers["knn/intl"]
    linear = headers["linear/intl/seed0, linear/intl/seed1, linear/intl/seed2"]
    assert "   #SBATCH --array=0-2%3" in linear and "   #SBATCH --mem=64GB" in linear
    assert "   #SBATCH --dependency='afterok:<pretrain>'" in linear
    assert main([*words, "--dry-run", "--knn-protocol", "nope@1"]) == 2
    assert capsys.readouterr().out.count("check failed") == 1
    assert main(words) == 2
    assert "there is no sbatch here; run this on a login node" in capsys.readouterr().err
    assert not out.exists()


def test_a_detector_that_the_backbone_does_not_suit_is_refused(
    tmp_path: Path, recipe: Path, cifar_folder: Path, coco_mini: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As train_net and convert would, hours later; the config of the right depth is the control."""
    pytest.importorskip("detectron2")
    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "w.pth")
    data = [f"small_{s}={coco_mini / 'instances.json'}:{coco_mini / 'images'}" for s in ("train", "test")]
    classes = len(json.loads((coco_mini / "instances.json").read_text())["categories"])
    suits = f"MODEL.ROI_HEADS.NUM_CLASSES {classes} INPUT.MASK_FORMAT bitmask"
    from_weights = ["--weights", str(tmp_path / "w.pth")]
    pretrained = ["--recipe", str(recipe), "--data-dir", str(cifar_folder)]
    mismatch = "the weights are those of a resnet18, the config says MODEL.RESNETS.DEPTH 50"

    def problems(*words: str, options: str = suits) -> list[str]:
        shared = ["--output", str(tmp_path / "out"), "--dry-run", "--detection-data", *data]
        code = main(["suite", *shared, "--detection-options", options, *words])
        lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("check failed: ")]
        assert code == (2 if lines else 0)
        return lines

    for target in (from_weights, pretrained):
        (told,) = problems(*target, "--tasks", "small_R18_FPN,small_R50_FPN")
        assert f"--tasks small_R50_FPN with {' '.join(target[:2])}: {mismatch}" in told
    assert not problems(*pretrained, "--pretrain-options", "--arch resnet50", "--tasks", "small_R50_FPN")
    cifar = [*pretrained, "--pretrain-options", "--stem cifar"]
    (told,) = problems(*cifar, "--tasks", "small_R18_FPN")
    assert "a CIFAR stem" in told and "pretrain with the ImageNet stem" in told
    assert not problems(*cifar, "--tasks", "knn")
    elsewhere = f"{suits} DATASETS.TEST \"('elsewhere',)\""
    (told,) = problems(*from_weights, "--tasks", "small_R18_FPN", options=elsewhere)
    assert "give --detection-data elsewhere=ANNOTATIONS.json:IMAGES" in told


def test_semantic_segmentation_is_checked_and_run_beside_other_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("detectron2")
    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "w.pth")
    write_pixels(tmp_path / "pixels", 2)
    data = [f"small_{s}={tmp_path / 'pixels/images'}:{tmp_path / 'pixels/masks'}" for s in ("train", "test")]
    words = ["suite", "--weights", str(tmp_path / "w.pth"), "--output", str(tmp_path / "out"), "--dry-run"]
    words += ["--tasks", "small_R18_linear", "--seeds", "2", "--sem-seg-data", *data, "--detection-options"]
    for visible, gpus in (("3,4", 1), ("", 0)):  # one each of what the machine has
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert main([*words, "MODEL.SEM_SEG_HEAD.NUM_CLASSES 4"]) == 0
        (line, _) = [x for x in capsys.readouterr().out.splitlines() if "--config-file small_R18_linear" in x]
        assert all(f"--sem-seg {one}" in line for one in data) and f" --num-gpus {gpus} " in line
    assert main([*words, "MODEL.SEM_SEG_HEAD.NUM_CLASSES 3"]) == 2
    assert "2 of 2 masks hold labels beyond 0 to 2" in capsys.readouterr().out
    assert main([*words, "DATASETS.TEST \"('nowhere',)\""]) == 2
    assert "give --sem-seg-data nowhere=IMAGES:MASKS" in capsys.readouterr().out
    wanted = ["knn", "sem_seg_voc12_linear"]
    asked = Suite(output=str(tmp_path), weights=[str(tmp_path / "w.pth")], tasks=wanted, data_dir=".")
    steps = suite_graph(tmp_path, asked, load_profile("local", [])).steps
    argv = steps["detection/sem_seg_voc12_linear/w/seed0"].argv
    assert argv[:2] == ("--config-file", "sem_seg_voc12_R50_linear_40k") and "knn/w" in steps


def test_a_share_of_labels_without_rates_is_refused_before_anything_is_submitted(
    tmp_path: Path, recipe: Path, cifar_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Barlow Twins published 1 % alone; SwAV has both shares."""
    words = ["--recipe", str(recipe), "--data-dir", str(cifar_folder), "--output", str(tmp_path / "out")]
    words += ["--tasks", "semisup1,semisup10", "--semisup-protocol"]
    assert main(["suite", *words, "barlow_semisup@1"]) == 2
    told = capsys.readouterr().err
    assert "--tasks semisup10: barlow_semisup@1 has rates for 1 % of the labels alone" in told
    assert "swav_semisup@1" in told and "barlow_semisup@1," not in told and "--tasks semisup1:" not in told
    assert not (tmp_path / "out").exists()
    assert main(["suite", *words, "barlow_semisup@1", "--dry-run"]) == 2
    assert capsys.readouterr().out.count("check failed") == 1
    assert main(["suite", *words, "swav_semisup@1", "--dry-run"]) == 0


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [tmp_path / p for p in ("a/pretrain/backbone.pth", "b/pretrain/backbone.pth", "moco.pth")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    a, b, moco = map(str, paths)
    assert list(_files([a, moco])) == ["backbone", "moco"]
    named = _files([a, b])
    assert named == {"a-pretrain-backbone": paths[0], "b-pretrain-backbone": paths[1]}
    with pytest.raises(UserError, match=r"moco[.]pth twice"):
        _files([moco, a, moco])
    (tmp_path / "moco.pt").touch()
    with pytest.raises(UserError, match="rename one"):
        _files([moco, str(tmp_path / "moco.pt")])


def test_names_that_mean_something_to_a_shell_are_plain_in_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's file name becomes no line of a job script; `%` in the folder's would be replaced."""
    evil = tmp_path / "a\n#SBATCH --uid=0\nrm %j.pth"
    evil.touch()
    asked = Suite(output="out", weights=[str(evil)], data_dir=".", tasks=["knn"])
    graph = suite_graph(tmp_path, asked, load_profile("local", []))
    assert list(graph.steps) == ["knn/a__SBATCH_--uid=0_rm__j", "report"]
    odd = Graph([Step(name="b\nc%j", kind="knn", command="m", argv=(), output=tmp_path)])
    (batch,) = submit.plan(odd, tmp_path, set()).batches
    text = submit.sbatch_text(batch, load_profile("slurm_cpu", []), tmp_path, tmp_path)
    assert "#SBATCH --job-name=b_c_j" in text.splitlines()
    assert "--cpus-per-task=16" in next(x for x in text.splitlines() if x.startswith("srun"))
    for word in ("%j", "x\ny"):
        (told,) = checks._place(tmp_path / word)
        assert told.startswith("--output is ")
    assert checks._place(tmp_path) == []


def test_the_users_own_files_reach_the_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A protocol and a data set named as seen from here; another content of the protocol is another step."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "mine@1.yaml"
    own.write_text("task: knn")
    for name in ("w.pth", "a.json"):
        Path(name).touch()

    def steps() -> dict[str, Step]:
        asked = Suite(
            output="out", weights=["w.pth"], data_dir=".", tasks=["knn", "small_R18_FPN"],
            knn_protocol="mine@1.yaml", detection_data=["s=a.json:b"],
        )  # fmt: skip
        graph = suite_graph(tmp_path / "out", asked, load_profile("local", []))
        return {step.name: step for step in graph} | {"key": graph.keys["knn/w"]}

    first = steps()
    assert str(own) in first["knn/w"].argv
    assert f"s={tmp_path}/a.json:{tmp_path}/b" in first["detection/small_R18_FPN/w/seed0"].argv
    own.write_text("task: knn # another")
    assert steps()["key"] != first["key"]


def test_unknown_commands_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["statsu"]) == 2
    assert "did you mean status?" in capsys.readouterr().err
    assert main(["suite", "--lr", "0.1"]) == 2
    assert 'pretraining has it: --pretrain-options "--lr ..."' in capsys.readouterr().err
    assert main([]) == 2 and main(["--help"]) == 0
    assert "suite" in capsys.readouterr().out
    assert (SOURCE / "slurm" / "steps" / "suite.py").exists()


def test_every_detection_task_has_its_config() -> None:
    assert all((SOURCE / "detection_configs" / f"{name}.yaml").is_file() for name in DETECTION.values())


def test_a_detection_task_is_named_as_train_net_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of this project are looked up in the pinned code; a job does not run where the user's file is."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own.yaml"
    own.write_text("_BASE_: none\n")
    assert detection_config("coco_c4_2x") == "coco_R50_C4_2x"
    names = ("small_R50_FPN", "small_R50_FPN.yaml", "detection_configs/small_R50_FPN.yaml")
    assert {detection_config(name) for name in names} == {"small_R50_FPN"}
    assert detection_config("own.yaml") == str(own)
    asked = Suite(
        output=str(tmp_path), recipe="demo_cifar10", data_dir=".", tasks=["own.yaml", "small_R18_FPN"]
    )
    steps = suite_graph(tmp_path, asked, load_profile("local", [])).steps
    assert steps["detection/own/intl/seed0"].inputs == (own,)
    assert steps["detection/small_R18_FPN/intl/seed0"].argv[:2] == ("--config-file", "small_R18_FPN")
    with pytest.raises(UserError, match=r"--tasks none[.]yaml: unknown; known: knn"):
        Suite(output=str(tmp_path), weights=["w.pth"], tasks=["none.yaml"])

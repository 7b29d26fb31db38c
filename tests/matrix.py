"""`make test-matrix`: the numerically delicate tests by instruction set, threads and order of tests; a table.

Vector units and threads sum in other orders, and so round otherwise: a limit that is what one processor
printed falls here. With VENV=DIR the same in an environment of other versions. Words given to it are tests to
run in place of DELICATE.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
DELICATE = (
    "tests/pretrain/objectives", "tests/pretrain/test_tuning.py",
    "tests/pretrain/test_train.py", "tests/transfer/evaluation/test_features.py",
    "tests/transfer/evaluation/test_pooled_features.py", "tests/transfer/evaluators/test_knn.py",
    "tests/transfer/evaluators/test_linear.py", "tests/transfer/conversion",
)  # fmt: skip
# Name, what the processor must have for it, oneDNN's and ATen's limits.
SETS = (
    ("AVX2", "avx2", "AVX2", "avx2"),
    ("AVX-512", "avx512bw", "AVX512_CORE", "avx512"),
    ("AVX-512 bfloat16", "avx512_bf16", "AVX512_CORE_BF16", "avx512"),
    ("all", "", "", ""),
)
COLUMNS = "{:18} {:>7} {:>5}  {:44} {:>5}"


def run(onednn: str, aten: str, threads: int, seed: int, tests: list[str]) -> tuple[bool, str, list[str]]:
    """Whether all passed, pytest's count, and the names of those that failed."""
    env = {**os.environ, "TEST_THREADS": str(threads), "TEST_ORDER": str(seed), "PYTHONPATH": str(ROOT)}
    env |= {"ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": aten} if onednn else {}
    words = [sys.executable, "-m", "pytest", "-rf", "-p", "no:cacheprovider", "-m", "not faults", *tests]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    lines = (done.stdout or done.stderr).strip().splitlines()
    counts = re.sub(r" in [\d.]+s.*", "", lines[-1].strip("= ")) if lines else "nothing was said"
    return done.returncode == 0, counts, [x for x in lines if x.startswith("FAILED")]


def main(tests: list[str]) -> int:
    """Print a row for each combination as it is done; 1 when a test failed."""
    import numpy
    import timm
    import torch

    print(f"torch {torch.__version__}, timm {timm.__version__}, numpy {numpy.__version__}")
    print(COLUMNS.format("instructions", "threads", "order", "tests", "s"), flush=True)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    bad = 0
    for name, needs, onednn, aten in SETS:
        if needs and needs not in flags:
            print(COLUMNS.format(name, "-", "-", "this processor does not have them", ""), flush=True)
            continue
        for seed, threads in enumerate((1, 2)):
            began = time.monotonic()
            good, counts, failed = run(onednn, aten, threads, seed, tests or list(DELICATE))
            spent = f"{time.monotonic() - began:.0f}"
            print(COLUMNS.format(name, threads, seed, counts, spent), *failed, sep="\n   ", flush=True)
            bad += not good
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

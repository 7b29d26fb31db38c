"""Speed and memory beside a plain reference, in the same run on the same machine.

    python -m benchmarks [NAME ...] [--quick] [--threads 1] [--output benchmarks/results]

writes NAME.json and NAME.md. To add a benchmark, add a module here and its name to `BENCHMARKS`; it has

    TITLE: str                                       what is compared, one line
    def measure(quick: bool) -> list[Comparison]     `quick` asks for small sizes and few repeats
    def tables(quick: bool) -> list[Table]           other figures; one of the two may be missing

and builds its comparisons with `benchmarks.harness`: `interleave` for times, `peak_extra_bytes` for memory.
Shares and ratios travel between machines, seconds do not: targets are stated as ratios.
"""

BENCHMARKS = (
    "loss",
    "augment",
    "loader",
    "step",
    "small_maps",
    "knn",
    "linear",
    "coco_ap",
    "convert",
    "features",
    "growth",
)

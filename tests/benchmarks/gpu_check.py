"""Is a GPU's result the CPU's, and how fast is it? `make gpu-check` prints a page in Markdown, in at most 8 minutes.

    python -m tests.benchmarks.gpu_check [--methods norm_occ,uniad] [--parts right] [--seconds 480] [--output FILE]

Without a GPU it says so and exits with 0. `--device cpu --small` tries the script itself on a CPU.
All images are drawn and all weights are random, so that it needs no network and no data.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import lightning
import torch

from anomalib_lite.runs.devices import device_name
from tests.benchmarks import gpu_correct, gpu_speed
from tests.helpers.run_programs import ROOT

METHODS = sorted(file.stem for file in (ROOT / "conf" / "method").glob("*.yaml"))
PARTS = ("right", "devices", "speed", "features", "patches", "compiled")


class Page:
    """The page so far, and the time that is left. A part that fails becomes a line of the page."""

    def __init__(self, seconds: float):
        self.end, self.failed = time.monotonic() + seconds, 0
        self.lines: list[str] = []

    def add(self, *lines: str) -> None:
        self.lines += lines
        print(*lines, sep="\n", flush=True)

    def table(self, title: str, names: Sequence[str], row: Callable[[str], dict[str, str]]) -> None:
        """A heading and a table with a row for each of `names`, as long as there is time."""
        self.add("", f"## {title}", "")
        columns: list[str] = []
        left = []
        for name in names:
            if time.monotonic() > self.end:
                left.append(name)
                continue
            try:
                cells = row(name)
            except Exception as error:  # the next row may still say something
                self.failed += 1
                cells = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            if not columns and "error" not in cells:
                columns = list(cells)
                self.add(f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns))
            if "FAILED" in cells.values():
                self.failed += 1
            shown = [cells.get(column, "") for column in columns] if "error" not in cells else [cells["error"]]
            self.add(f"| {name} | {' | '.join(shown)} |")
        if left:
            self.add("", f"No time was left for: {', '.join(left)}.")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="gpu", choices=("gpu", "cpu"))
    parser.add_argument("--methods", default=",".join(METHODS), help="names of methods, separated by commas")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help=f"parts of the page, separated by commas: {', '.join(PARTS)}"
    )
    parser.add_argument("--seconds", type=float, default=480, help="no row begins after so many seconds")
    parser.add_argument("--output", type=Path, help="a file for the page")
    parser.add_argument("--small", action="store_true", help="tiny networks and few steps, to try the script itself")
    options = parser.parse_args(arguments)
    methods, parts = options.methods.split(","), options.parts.split(",")
    for name, given, known in (("methods", methods, METHODS), ("parts", parts, PARTS)):
        if unknown := set(given) - set(known):
            parser.error(f"--{name}: there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if options.device == "gpu" and not torch.cuda.is_available():
        print("gpu-check: no GPU is visible here, so there is nothing to check; --device cpu --small tries the script")
        return 0

    page = Page(options.seconds)
    page.add(*heading(options.device))
    with tempfile.TemporaryDirectory() as folder:
        correct = gpu_correct.Checks(Path(folder), options.device)
        speed = gpu_speed.Timings(Path(folder), options.device, options.small)
        tables: dict[str, tuple[str, Sequence[str], Callable[[str], dict[str, str]]]] = {
            "right": (f"Is it right? (drawn images of {gpu_correct.SIDE}², few steps)", methods, correct.row),
            "devices": ("Several devices", [name for name in ("norm_occ", "uniad") if name in methods], correct.ranks),
            "speed": ("Speed at the published settings (random weights)", methods, speed.row),
            "features": (
                "Where frozen features come from: ms a step",
                [name for name in speed.FEATURES if name in methods],
                speed.features,
            ),
            "patches": ("PatchCore's bank and the metrics", speed.PARTS, speed.part),
            "compiled": (
                "method.compile=true",
                [name for name in gpu_correct.COMPILED if name in methods],
                speed.compiled,
            ),
        }
        for part in parts:
            if part == "speed":
                page.add("", speed.limits())
            page.table(*tables[part])
    page.add("", f"{page.failed} rows failed." if page.failed else "Every row passed.")
    if options.output:
        options.output.write_text("\n".join(page.lines) + "\n")
    return 1 if page.failed else 0


def heading(device: str) -> list[str]:
    """The card, its driver, the versions and the commit."""
    driver = printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device == "gpu" else ""
    name = device_name(torch.device("cuda" if device == "gpu" else "cpu"))
    versions = f"torch {torch.__version__}, lightning {lightning.__version__}"
    return [
        f"# {name}",
        "",
        f"driver {driver or 'none'}, {versions}, Python {sys.version.split()[0]}, commit "
        f"{printed('git', 'rev-parse', '--short', 'HEAD') or 'unknown'}; {torch.get_num_threads()} CPU threads",
    ]


def printed(*command: str) -> str:
    """The first line that a command prints; "" if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    except OSError:
        return ""
    return done.stdout.partition("\n")[0] if done.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())

"""Run the settings that published.yaml lists on the data at hand, and put our figures beside the published ones.

    make reproduce DATA=DIR [ARGS="--only recontrast --dry-run trainer.max_steps=20 ..."]
    python experiments/reproduce.py DIR [--only METHOD,...] [--output DIR] [--dry-run] [KEY=VALUE ...]

DIR holds the data sets: MVTec AD in mvtec/, mvtec_ad/ or parts/ (or in DIR itself), VisA in visa/. Categories that are
missing are left out, and the board says so. The settings run one sweep after the other. The same command goes on where
an earlier one was stopped: finished runs stay, and interrupted ones resume.
KEY=VALUE holds for all runs; runs with other values, or of other categories in one model, get folders of their own. The
first start prints what will run, with an estimate of the time on this device; --dry-run prints only this. Ctrl-C and
SIGTERM end it after the runs have written a checkpoint.
"""

import argparse
import functools
import json
import math
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate

from anomalib_lite.cli import program
from anomalib_lite.cli.schema import is_free
from anomalib_lite.cli.values import as_typed
from anomalib_lite.comparison.published import Published, read
from anomalib_lite.data.readers import COUNTS
from anomalib_lite.errors import UserError
from anomalib_lite.splits import without_files
from anomalib_lite.sweeps.command import quoted
from anomalib_lite.sweeps.job import DECISIVE

HERE = Path(__file__).resolve().parent
FILE = HERE / "published.yaml"
FOLDERS = {"mvtec": ("mvtec", "mvtec_ad", "MVTec_AD", "parts", "."), "visa": ("visa", "VisA")}
TRIAL_COUNTS = {"train": 16, "good": 2, "defective": 1}  # drawn images; wood has several kinds of defects
# on a CPU, a step of the published networks may take a minute; on a GPU, the start takes longer than many steps
TRIAL_STEPS = 50 if torch.cuda.is_available() else 2


@dataclass
class Study:
    """A published setting as a command: its experiment, the data that are there, and its cost."""

    entry: Published
    root: Path
    categories: list[str]
    output: Path
    extra: list[str]

    def arguments(self, category: str | None = None) -> list[str]:
        """Those of the sweep, or those of its runs on one category."""
        names = category or ",".join(self.categories)
        chosen = f"[{names}]" if self.entry.setting == "unified" and not category else names
        data = [f"data.root={quoted(self.root)}", f"data.category={chosen}"]
        return [f"+experiments={self.entry.experiment}", *self.entry.overrides, *data, *self.extra]

    @property
    def name(self) -> str:
        """Of the sweep's folder. A sweep goes on with more seeds, hardware and categories, but not with another run."""
        unified = self.entry.setting == "unified"
        own = [*self.entry.overrides, *(each for each in self.extra if not may_change(each.partition("=")[0]))]
        own += self.categories if unified and len(self.categories) < self.entry.categories else []
        return "_".join([self.entry.experiment or "", *own]).replace("=", "-").replace("/", "-")

    def run(self) -> int:
        """The sweep; its exit code. Exits after a signal, once the sweep has ended."""
        place = f"hydra.sweep.dir={quoted(self.output / self.name)}"
        command = [sys.executable, "-m", "anomalib_lite.train", "-m", *self.arguments(), place]
        print(f"\n== {self.name}: {shlex.join(command[1:])}", flush=True)
        sweep, stopped = subprocess.Popen(command, process_group=0), 0  # each signal reaches it once, through `hand_on`

        def hand_on(number: int, frame: object) -> None:
            nonlocal stopped
            stopped = 130 if number == signal.SIGINT else 143
            sweep.send_signal(number)

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, hand_on)
        code = sweep.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
        if stopped or code in (130, 143):
            raise SystemExit(stopped or code)
        return code


def may_change(key: str) -> bool:
    """Whether a sweep goes on where this key has another value."""
    return key.startswith(("seed", "hydra.", "hydra/")) or (is_free(key, "resume") and key not in DECISIVE)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DIR")
    parser.add_argument("--only", default="", help="names of methods, separated by commas")
    parser.add_argument("--output", type=Path, default=Path("outputs/reproduce"))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args(arguments)
    if not options.data.is_dir():
        parser.error(f"DIR: {options.data} is no folder; give the folder that holds mvtec/ and visa/")
    entries = [entry for entry in read(FILE) if not options.only or entry.method in options.only.split(",")]
    if not entries:
        parser.error(f"--only {options.only}: {FILE.name} has {', '.join(dict.fromkeys(e.method for e in read(FILE)))}")

    studies, absent = plan(entries, options.data.resolve(), options.output.resolve(), options.overrides)
    for line in absent:
        print(f"left out: {line}")
    if not studies:
        parser.error(
            f"DIR: no data set of a published setting lies in {options.data}; see --help for the folders' names"
        )
    if options.dry_run or not options.output.exists():  # minutes, which a start that goes on does not wait for
        estimate(studies)
    if options.dry_run:
        return 0
    failed = [study.name for study in studies if study.run()]
    options.output.mkdir(parents=True, exist_ok=True)
    board = ["--published", FILE, "--markdown", options.output / "board.md", "--html", options.output / "board.html"]
    compare = [sys.executable, "-m", "anomalib_lite.compare", options.output, *board]
    subprocess.run(list(map(str, compare)), check=True)
    print(f"the board: {options.output / 'board.md'} and {options.output / 'board.html'}")
    if failed:
        print(f"failed, see above: {', '.join(failed)}; the same command tries them again")
    return 1 if failed else 0


def plan(entries: Sequence[Published], data: Path, output: Path, extra: Sequence[str]) -> tuple[list[Study], list[str]]:
    """The studies that the data at hand allow, and why the others are left out."""
    studies, absent = [], []
    for entry in entries:
        found = next(categories_below(data, entry.dataset), None)
        if entry.experiment is None:
            absent.append(f"{entry.method} on {entry.dataset} ({entry.setting}): there is no experiment for it")
        elif found is None:
            absent.append(f"{entry.method} on {entry.dataset}: no such data set below {data}")
        elif entry.setting == "unified" and len(found[1]) == 1:  # a run on one category has the setting `single`
            absent.append(f"{entry.method} on {entry.dataset} (unified): {found[0]} holds {found[1][0]} alone")
        else:
            studies.append(Study(entry, *found, output, list(extra)))
    return studies, absent


def categories_below(data: Path, dataset: str) -> Iterator[tuple[Path, list[str]]]:
    """(root, categories) of the folders that may hold this data set."""
    for name in FOLDERS.get(dataset, ()):
        root = data / name
        places = [root / part for part in ("1cls", ".")]
        found = [
            name
            for name in COUNTS[dataset]
            if any((place / name / sub).is_dir() for place in places for sub in ("train/good", "Data"))
        ]
        if found:
            yield root.resolve(), found


def estimate(studies: Sequence[Study]) -> None:
    """Print what will run and how long it will take: a few training steps and test batches of each are timed."""
    total = 0.0
    print(f"{'study':60} {'runs':>5} {'steps each':>10} {'estimate':>10}")
    for study in studies:
        try:
            runs, steps, seconds = timed(study)
            total += runs * seconds
            print(f"{study.name[:60]:60} {runs:5} {steps:10} {runs * seconds / 3600:8.1f} h", flush=True)
        except Exception as error:  # the study may run nevertheless
            print(f"{study.name[:60]:60} can't be estimated: {' '.join(str(error).split())[:300]}", flush=True)
    print(f"{'together, without finished runs being left out':60} {'':16} {total / 3600:8.1f} h\n")


def timed(study: Study) -> tuple[int, int, float]:
    """The number of runs, the steps of one, and its seconds: from a few steps on drawn images with random weights."""
    known = COUNTS[study.entry.dataset]
    arguments, seeds = first_of_sweep(study.arguments(study.categories[0]))
    cfg, swept = program.composed([*map(as_typed, arguments)])
    seeds *= math.prod(
        len(str(values).split(","))
        for key, values in swept.items()
        if key != "data.category" and not any(given.startswith(f"{key}=") for given in arguments)
    )
    models = [study.categories] if study.entry.setting == "unified" else [[name] for name in study.categories]
    split, runs = instantiate(cfg["split"]), seeds * len(models)
    kept = [len(split(without_files(study.entry.dataset, names)).train) for names in models]
    train = sum(kept) // len(models)
    test = sum(good + bad for name in study.categories for _, good, bad in [known[name]]) // len(models)
    trainer, batch = cfg["trainer"], cfg["data"]["batch_size"]
    limits = [trainer["max_steps"], trainer["max_epochs"] and trainer["max_epochs"] * -(-train // batch)]
    steps = min(limit for limit in limits if limit is not None)
    real = ("data=", "data.root=", "data.category=", "split", "augment", "trainer.max")
    result = trial(bool(steps), *(argument for argument in arguments if not argument.startswith(real)))
    timing, data = result["timing"], result["data"]
    scored = data["train_counts"]["wood"] + sum(data["test_counts"]["wood"].values())
    step = timing["fit_s"] / timing["steps"] if timing["steps"] else 0.0
    phases = timing["steps"] / TRIAL_STEPS
    # features or a fit, the test, and the scores of training images for thresholds
    passes = train * cfg["data"].get("copies", 1) + test + train
    return runs, round(steps * phases), steps * phases * step + passes * timing["test_s"] / scored


def first_of_sweep(arguments: Sequence[str]) -> tuple[list[str], int]:
    """The arguments of a sweep's first run, and the number of its runs."""
    first, runs = [], 1
    for argument in arguments:
        override = OverridesParser.create().parse_override(as_typed(argument))
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else []
        first.append(f"{override.input_line.partition('=')[0]}={values[0]}" if values else argument)
        runs *= len(values) or 1
    return first, runs


@functools.cache  # several studies differ in their data alone
def trial(has_steps: bool, *arguments: str) -> dict[str, Any]:
    """The result of a short run on drawn images with random weights."""
    counts = TRIAL_COUNTS if has_steps else TRIAL_COUNTS | {"train": 4}
    drawn = ["data=synthetic", "data.category=wood", *(f"+data.reader.{part}={n}" for part, n in counts.items())]
    budget = ["trainer.max_epochs=null", f"trainer.max_steps={TRIAL_STEPS}"]
    without_steps = ["hardware.feature_memory_gb=0"]  # all images pass through the backbone when they are scored
    options = ["hydra.mode=RUN", "logger=csv", "cache.enabled=false", "backbone.weights=none"]
    options += ["hardware.measure_cost=false", *(budget if has_steps else without_steps)]
    with tempfile.TemporaryDirectory() as folder:
        place = f"hydra.run.dir={quoted(Path(folder, 'run'))}"
        command = [sys.executable, "-m", "anomalib_lite.train", *arguments, *drawn, *options, place]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(done.stderr.strip().rpartition("\n")[2])
        return json.loads(Path(folder, "run", "result.json").read_text())


if __name__ == "__main__":
    sys.exit(main())

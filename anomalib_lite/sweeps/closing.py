"""What is printed below a sweep's table: notes on its jobs, and the command that uploads its W&B runs."""

import json
import shlex
from pathlib import Path

from anomalib_lite.runs.folder import WANDB
from anomalib_lite.sweeps.job import Job, key_of


def closing_lines(folder: Path, jobs: list[Job]) -> list[str]:
    """The lines for the finished jobs of the sweep in `folder`."""
    lines = [f"note: {note}" for note in seed_notes(jobs)]
    offline = sorted(str(run) for job in jobs for run in (job.folder / WANDB).glob("offline-run-*"))
    if offline:
        place = f"{shlex.quote(str(folder))}/*/{WANDB}/offline-run-*"  # one word for the shell to expand
        is_flat = all(job.folder.parent == folder for job in jobs)
        lines.append(f"W&B: to upload these runs: wandb sync {place if is_flat else shlex.join(offline)}")
    return lines


def seed_notes(jobs: list[Job]) -> list[str]:
    """A note for each method whose jobs with several seeds have equal results, to the last digit."""
    alike: dict[tuple[str, str], dict[int, str]] = {}
    for job in jobs:
        if job.result:
            others = key_of([override for override in job.overrides if not override.startswith("seed=")])
            measured = json.dumps([job.result.get(key) for key in ("per_category", "thresholds", "validation")])
            alike.setdefault((job.result["method"], others), {})[job.plain["seed"]] = measured
    several = {key: found for key, found in alike.items() if len(found) > 1}
    return [
        f"the results of {method} do not depend on the seed ({', '.join(map(str, seeds))}): one seed is enough"
        for method, seeds in {method: sorted(found) for (method, _), found in several.items()}.items()
        if all(len(set(found.values())) == 1 for (name, _), found in several.items() if name == method)
    ]

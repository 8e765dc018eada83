"""The lines below a sweep's table."""

import subprocess
from pathlib import Path
from typing import Any

from anomalib_lite.sweeps.job import Job
from anomalib_lite.sweeps.view import closing_lines, seed_notes


def job(folder: Path, number: int, seed: int, score: float, method: str = "mine", *more: str) -> Job:
    plain = {"seed": seed, "objective": None}
    result: dict[str, Any] = {"method": method, "per_category": {"bottle": {"image_auroc": 1.0}}, "validation": None}
    result["thresholds"] = {"image": score}
    overrides = [f"method={method}", f"seed={seed}", *more]
    return Job(number, overrides, folder / str(number), None, plain, 0, False, "done", result=result)


def test_a_method_that_ignores_the_seed(tmp_path):
    """It is named; one that has another result for one of its seeds, or a single seed, is not."""
    jobs = [job(tmp_path, n, n, 0.5, "still", "data.category=a") for n in range(3)]
    jobs += [job(tmp_path, 3 + n, n, 0.7, "still", "data.category=b") for n in range(3)]
    jobs += [job(tmp_path, 6 + n, n, 0.5 + n * 1e-15, "drawn") for n in range(2)]
    jobs += [job(tmp_path, 8, 0, 0.5, "once")]
    failed = job(tmp_path, 9, 4, 0.1, "still", "data.category=a")
    failed.result = None
    assert seed_notes([*jobs, failed]) == [
        "the results of still do not depend on the seed (0, 1, 2): one seed is enough"
    ]


def test_one_command_uploads_all_runs(tmp_path):
    folder = tmp_path / "a sweep"
    assert closing_lines(folder, [job(folder, 0, 0, 0.5)]) == []
    expected = [folder / str(n) / "wandb" / f"offline-run-{n}" for n in range(2)]
    for place in expected:
        place.mkdir(parents=True)
    jobs = [job(folder, n, 0, 0.5) for n in range(2)]
    for sweep in (folder, tmp_path):  # in the second, the jobs' folders have a name of two parts
        (line,) = closing_lines(sweep, jobs)
        command = line.partition("upload these runs: ")[2]
        shown = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
        assert shown.stdout.splitlines() == ["wandb", "sync", *map(str, expected)]

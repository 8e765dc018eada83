"""The README's examples work as they stand there: its method, its Python, and every command."""

import json
import re
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec, make_visa

ROOT = runs.ROOT
README = (ROOT / "README.md").read_text()
PREFIX = "python -m anomalib_lite."

#: commands that are only composed (--cfg job; of a sweep its first job), by a part of them, and why
COMPOSED = {
    "-m method=norm_occ,": "a sweep of 12 runs; tests/sweeps runs sweeps",
    "+experiments=norm_occ_norms": "needs real images and ImageNet weights",
    "hydra/sweeper=random": "a search of 20 runs; tests/sweeps runs searches",
    "hydra.launcher.partition=gpu": "needs a SLURM cluster; tests/sweeps runs it on a stand-in",
}
#: commands that are not run, by their beginning, and why
NOT_RUN = {
    "make ": "test_targets checks that the target exists; CI runs setup, lint and test",
    "pip install .": "test_wheel installs the package",
    "python -m anomalib_lite.train --config-dir": "test_the_method_of_the_readme_trains runs it",
    "python -m anomalib_lite.train resume=true": "test_resume_alone runs it",
    "python -m anomalib_lite.export run=RUN output=part.onnx": "test_export exports runs with these two options",
}
#: options that make any training run small
SMALL = [*runs.SMALL, "trainer.max_steps=2", "trainer.max_epochs=null", "method=norm_occ"]


def block(language: str, part: str) -> str:
    return next(b for b in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if part in b)


def commands() -> list[str]:
    """All lines of the README's shell blocks, continued lines joined, without comments."""
    lines = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+# .*", "", line) for line in lines]


def listed(command: str) -> bool:
    return any(part in command for part in COMPOSED) or command.startswith(tuple(NOT_RUN))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A user's folder: data sets, photos, and a finished run."""
    home = tmp_path_factory.mktemp("readme")
    for category in ("bottle", "cable", "screws"):
        make_mvtec(home / "DIR", category)
    for category in ("candle", "cashew"):
        make_visa(home / "DIR", category)
    make_mvtec(home / "run_data")
    runs.result_of(*runs.folder_data(home / "run_data"), *runs.SMALL, run_dir=home / "RUN")
    for name, part in (("OK", "train/good"), ("BAD", "test/broken"), ("MASKS", "ground_truth/broken")):
        shutil.copytree(home / "DIR" / "screws" / part, home / name)
    (home / "PHOTOS").mkdir()
    image = np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8)
    for name in (home / "PHOTOS" / "photo.png", home / "photo.png"):
        cv2.imwrite(str(name), image)
    return home


def program(command: str, *more: str) -> runs.Outcome:
    """A command of the README in this process, with `more` instead of its own values of the same keys."""
    import importlib

    name, *arguments = shlex.split(command.removeprefix(PREFIX))
    given = {argument.split("=")[0] for argument in more}
    arguments = [argument for argument in arguments if argument.split("=")[0] not in given]
    return runs.run(importlib.import_module(f"anomalib_lite.{name}").main, *arguments, *more)


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith(PREFIX) and not listed(c)])
def test_command(command, folder, tmp_path, monkeypatch):
    """Run as written, with images of 32 pixels and two steps. DIR, RUN and PHOTOS are folders of those names."""
    monkeypatch.chdir(folder)
    more = []
    if command.startswith(f"{PREFIX}train") and "--help" not in command:
        default = "data=" not in command  # draws the synthetic set: only composed
        chosen = [option for option in SMALL if "method=" not in option or "method=" not in command]
        more = ["--cfg", "job"] if default else [*chosen, f"hydra.run.dir={tmp_path / 'run'}"]
    if "output=DIR" in command:
        more = [f"output={tmp_path / 'output'}"]
    if "compare" in command:
        command = command.replace("outputs/sweeps", "RUN").replace("page.html", f"{tmp_path}/page.html")
        command = command.replace("runs.csv", f"{tmp_path}/runs.csv")
    if "--write" in command:
        command = command.replace("meta.json", f"{tmp_path}/meta.json")
    runs.succeeded(program(command, *more))
    if any(option.startswith("hydra.run.dir") for option in more):
        assert (tmp_path / "run" / "result.json").exists()


def first_job(command: str) -> str:
    """A sweep's command without -m and with one value per key: Hydra composes single runs only."""
    words = [word for word in shlex.split(command) if word != "-m"]
    words = [re.sub(r"=tag\(.*interval\(([^,]+),.*", r"=\1", word) for word in words]
    return shlex.join(re.sub(r"^([\w.]+=[^\[,]+),.*", r"\1", word) for word in words)


@pytest.mark.parametrize("part", COMPOSED)
def test_composed_command(part, monkeypatch):
    monkeypatch.setenv("ANOMALIB_LITE_DATA", "anywhere")
    (command,) = [c for c in commands() if part in c]
    outcome = runs.succeeded(program(PREFIX + first_job(command.removeprefix(PREFIX)), "--cfg", "job"))
    assert "_target_" in outcome.out


def test_all_commands_are_tested():
    assert [c for c in commands() if c and not c.startswith(PREFIX) and not listed(c)] == []
    for beginning in NOT_RUN:
        assert any(c.startswith(beginning) for c in commands()), f"{beginning} is no longer in the README"


def test_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_resume_alone(folder):
    """Of a finished run; tests/programs/test_resume.py interrupts runs."""
    (command,) = [c for c in commands() if "resume=true" in c]
    runs.succeeded(program(command, f"hydra.run.dir={folder / 'RUN'}"))


def test_the_method_of_the_readme_trains(own_folder):
    make_mvtec(own_folder / "data")
    (own_folder / "mine.py").write_text(block("python", "# mine.py"))
    (own_folder / "my_conf" / "method").mkdir(parents=True)
    (own_folder / "my_conf" / "method" / "mine.yaml").write_text(block("yaml", "my_conf/method/mine.yaml"))
    command = block("sh", f"{PREFIX}train --config-dir").strip()
    small = ["hardware=cpu", "data.image_size=64", "trainer.max_steps=3", "logger=csv"]
    outcome = program(command, "data=folder", "data.root=data", *small, "hydra.run.dir=run")
    assert (outcome.code, outcome.err) == (0, "")
    assert "mine on folder" in outcome.out
    result = json.loads((own_folder / "run" / "result.json").read_text())
    assert result["method"] == "mine"
    assert result["timing"]["steps"] == 3
    assert runs.evaluate("run=run", "output=again").code == 0
    assert json.loads((own_folder / "again" / "result.json").read_text())["metrics"] == result["metrics"]


def test_python_that_scores_arrays(folder, monkeypatch, capsys):
    """It gives what predict gives for the same image."""
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(block("python", "load_run"), names)
    printed = capsys.readouterr().out.split()
    runs.succeeded(runs.predict("run=RUN", "input=photo.png", f"output={folder / 'predicted'}"))
    _, row = (folder / "predicted" / "scores.csv").read_text().splitlines()
    _, score, threshold, decision, _ = row.split(",")
    assert (names["scores"][0], names["run"].thresholds["image"]) == (np.float32(score), float(threshold))
    assert printed[1] == str(decision == "defective")
    assert names["maps"][0].shape == (32, 32)
    from anomalib_lite.errors import UserError

    with pytest.raises(UserError, match=r"images\[1\]: float64 \(4, 4, 3\)"):
        names["run"].predict([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3))])


def test_run_table_names_what_a_run_leaves(folder):
    table = README[README.index("| file | content |") : README.index("Features of frozen backbones")]
    named = {name.rstrip("/") for name in re.findall(r"`([\w.]+/?)`", table)}
    left = {path.name for path in (folder / "RUN").iterdir()}
    assert left <= named
    assert named - left <= {"wandb"}  # logger=csv


def test_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_files_that_the_readme_names_are_there():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists(), link

"""experiments/reproduce.py: which studies run, with which arguments, and the estimate of their time."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from anomalib_lite.cli import values
from anomalib_lite.cli.program import composed
from anomalib_lite.comparison.published import read
from experiments import reproduce

ENTRIES = {" ".join([entry.method, entry.dataset, *entry.overrides]): entry for entry in read(reproduce.FILE)}


def study(name: str, root: Path, *categories: str) -> reproduce.Study:
    return reproduce.Study(ENTRIES[name], root, list(categories), root / "output", [])


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_waits_for_the_sweep(sent, code, tmp_path, monkeypatch):
    """The sweep may take seconds to write its checkpoints; a signal to all processes of a terminal reaches it once."""
    program = tmp_path / "python"
    program.write_text(
        f"#!/bin/sh\ntrap 'echo x >> {tmp_path}/received' INT TERM\nsleep 0.8\ntouch '{tmp_path}/ended'\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    numbers = (signal.SIGALRM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(sent))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(SystemExit) as end:
            study("recontrast mvtec", tmp_path, "bottle").run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert end.value.code == code
    assert (tmp_path / "ended").exists()
    assert (tmp_path / "received").read_text() == "x\n"


def test_folders(tmp_path):
    """What a sweep can't go on with has a folder of its own."""

    def name(*extra: str, of: str = "uniad mvtec method=uniad", categories: int = 15) -> str:
        chosen = [*reproduce.COUNTS["mvtec"]][:categories]
        return reproduce.Study(ENTRIES[of], tmp_path, chosen, tmp_path, list(extra)).name

    assert name() == "unified_published_method-uniad"
    assert name("seed=0,1,2", "hardware.devices=2", "data.workers=1", "hydra/launcher=ray") == name()
    assert name("hardware.precision=32") == "unified_published_method-uniad_hardware.precision-32"
    assert name("trainer.max_steps=20") == "unified_published_method-uniad_trainer.max_steps-20"
    assert name(categories=2) == "unified_published_method-uniad_bottle_cable"
    assert name(of="ssae mvtec", categories=2) == name(of="ssae mvtec") == "ssae_mvtec"


def test_which_studies_run(tmp_path):
    """Those whose data are there; one model for all categories needs two of them."""
    for categories in ("bottle",), ("bottle", "cable"):
        for category in categories:
            (tmp_path / "mvtec" / category / "train" / "good").mkdir(parents=True, exist_ok=True)
        studies, absent = reproduce.plan(list(ENTRIES.values()), tmp_path, tmp_path / "output", [])
        assert all(each.categories == [*categories] and each.entry.dataset == "mvtec" for each in studies)
        few = f"uniad on mvtec (unified): {tmp_path / 'mvtec'} holds bottle alone"
        assert (few in absent) == (len(categories) == 1)
        assert ("uniad" in {each.entry.method for each in studies}) == (len(categories) == 2)


def test_any_folder_name(tmp_path, monkeypatch):
    """Hydra would read a comma as two values, and can't read a bracket."""
    started = Mock()
    monkeypatch.setattr(subprocess, "Popen", started)
    chosen = study("uniad mvtec method=uniad", tmp_path / "MVTec (2021), all", "bottle")
    chosen.run()
    *arguments, place = started.call_args.args[0][4:]
    assert composed([*map(values.as_typed, arguments)])[0]["data"]["root"] == str(chosen.root)
    assert values.read(place) == str(chosen.output / chosen.name)


@pytest.fixture
def trials(monkeypatch):
    """The arguments of the trials that the estimate starts; each has images that take 0.1 s to score."""
    started: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        arguments = command[3:]
        folder = Path(next(a for a in arguments if a.startswith("hydra.run.dir=")).partition("=")[2].strip('"'))
        steps = 2 * ("trainer.max_steps=2" in arguments)
        train = next(int(a.partition("=")[2]) for a in arguments if a.startswith("+data.reader.train="))
        folder.mkdir(parents=True)
        data = {"train_counts": {"wood": train}, "test_counts": {"wood": {"good": 2, "defective": 4}}}
        timing = {"fit_s": 1.0, "steps": steps, "test_s": 0.1 * (train + 6)}
        (folder / "result.json").write_text(json.dumps({"data": data, "timing": timing}))
        started.append(arguments)
        return subprocess.CompletedProcess(command, 0, "", "")

    reproduce.trial.cache_clear()
    monkeypatch.setattr(subprocess, "run", run)
    yield started
    reproduce.trial.cache_clear()


def test_the_estimate(tmp_path, trials, capsys):
    """It starts nothing else and leaves nothing behind. Studies with other data have one trial, without the split and
    the rotations; a method without steps passes few images, all of them through the backbone.
    """
    for category in ("bottle", "cable"):
        (tmp_path / "data" / "mvtec" / category / "train" / "good").mkdir(parents=True)
    for category in ("candle", "cashew"):
        (tmp_path / "data" / "visa" / category / "Data").mkdir(parents=True)
    output = tmp_path / "output"
    given = [str(tmp_path / "data"), "--output", str(output), "--only", "subspace_ad,uniad", "--dry-run"]
    assert reproduce.main(given) == 0
    assert "can't be estimated" not in capsys.readouterr().out
    assert not output.exists()
    uniad, subspace_ad = trials
    assert not any(argument.startswith(("split", "augment", "data.root")) for argument in subspace_ad)
    assert {"+data.reader.train=4", "hardware.feature_memory_gb=0"} < set(subspace_ad)
    assert {"+data.reader.train=16", "trainer.max_steps=2"} < set(uniad)


@pytest.mark.parametrize(
    ("name", "runs", "steps", "scored"),
    [
        ("uniad mvtec method=uniad", 3, 1000 * 454, 3629 + 1725 + 3629),  # batches of 8
        ("ltad mvtec method=ltad split=exp100", 3, 500 * 173, 1378 + 1725 + 1378),
        ("subspace_ad mvtec split=shots split.shots=1 augment=rotations_random", 15, 0, 31 + 115 + 1),
    ],
)
@pytest.mark.usefixtures("trials")
def test_the_estimate_counts_the_images_of_the_split(name, runs, steps, scored, tmp_path):
    chosen = study(name, tmp_path, *reproduce.COUNTS["mvtec"])
    *counts, seconds = reproduce.timed(chosen)
    assert counts == [runs, steps]
    chosen.extra.append("seed=0,1,2,3,4")  # it takes the place of the study's seeds
    assert reproduce.timed(chosen) == (75 if runs == 15 else 5, steps, seconds)
    assert seconds == pytest.approx(0.5 * steps + 0.1 * scored)

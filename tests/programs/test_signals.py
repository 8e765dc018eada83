"""SIGTERM and clusters' warning signals: a message, a checkpoint at the next batch, exit code 143. Ctrl-C: 130."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from anomalib_lite.cli import signals
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.runs.artifacts import read_result
from anomalib_lite.runs.efficiency import cpu_times
from anomalib_lite.runs.folder import CLAIM
from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec
from tests.helpers.interrupt import until
from tests.helpers.ranks import PROCESSES
from tests.programs import test_resume
from tests.programs.test_resume import Noisy

TERM, USR1, USR2, HUP = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_mvtec(tmp_path_factory.mktemp("data"), train=10).parent


@pytest.fixture(scope="module")
def arguments(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("conf")
    (folder / "method").mkdir()
    text = test_resume.CONFIG.format(module=test_resume.__name__, name="Noisy")
    (folder / "method" / "noisy.yaml").write_text(text)
    options = ["hardware=cpu", "logger=csv", *runs.folder_data(root), "data.image_size=32", "trainer.log_every=4"]
    return [f"--config-dir={folder}", "method=noisy", "hardware.measure_cost=false", *options]


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert runs.train(*arguments, f"hydra.run.dir={run}", small=False).code == 0
    return (run / "scores.csv").read_bytes()


@pytest.fixture
def send(monkeypatch):
    """Sends signals to this process at the beginning of a batch, or of testing (0)."""

    def at(batch: int, *numbers: int) -> None:
        def kill(module: Any, *_: Any) -> None:
            if not batch or module.trainer.callbacks[0].steps == batch - 1:
                for number in numbers:
                    os.kill(os.getpid(), number)

        monkeypatch.setattr(AnomalyModule, "on_train_batch_start" if batch else "on_test_start", kill, raising=False)

    return at


def assert_stopped(outcome: Any, name: str) -> None:
    assert outcome.code == 143, outcome
    assert outcome.err.startswith(f"interrupted by {name}")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("batch", "numbers", "steps"),
    [(1, (TERM,), 1), (2, (USR2, USR2, TERM), 2), (4, (HUP,), 4), (9, (TERM,), 9), (0, (USR1,), 9)],
)
def test_train(batch, numbers, steps, arguments, undisturbed, send, tmp_path, monkeypatch):
    """Checkpoints are due every 5 minutes; the one of the signal's batch is there, and the run continues from it."""
    run = tmp_path / "run"
    before = [signal.getsignal(number) for number in (TERM, USR1, signal.SIGINT)]
    send(batch, *numbers)
    outcome = runs.train(*arguments, f"hydra.run.dir={run}", small=False)
    assert_stopped(outcome, signal.Signals(numbers[0]).name)
    assert outcome.err.endswith(f"; resume=true hydra.run.dir={run} continues this run from its last checkpoint\n")
    assert not (run / CLAIM).exists()
    assert [signal.getsignal(number) for number in (TERM, USR1, signal.SIGINT)] == before
    monkeypatch.undo()
    outcome = runs.succeeded(runs.train("resume=true", f"hydra.run.dir={run}", f"{arguments[0]}", small=False))
    assert f"resuming after batch {steps}" in outcome.out or steps == 9
    assert (run / "scores.csv").read_bytes() == undisturbed
    assert read_result(run)["timing"]["steps"] == 9


@pytest.mark.parametrize(("numbers", "steps"), [((signal.SIGINT,), 5), ((signal.SIGINT, signal.SIGINT), 0)])
def test_ctrl_c(numbers, steps, arguments, undisturbed, send, tmp_path, monkeypatch, capfd):
    """The first one ends the run after its batch, with a checkpoint; the second one at once."""
    run = tmp_path / "run"
    send(5, *numbers)
    outcome = runs.train(*arguments, f"hydra.run.dir={run}", small=False)
    assert outcome.code == 130
    assert outcome.err.startswith("interrupted; ")
    assert capfd.readouterr().err.count("a second Ctrl-C ends it at once") == 1
    assert (run / "checkpoints" / "last.ckpt").exists() == bool(steps)
    monkeypatch.undo()
    outcome = runs.succeeded(runs.train("resume=true", f"hydra.run.dir={run}", f"{arguments[0]}", small=False))
    assert (f"resuming after batch {steps}" in outcome.out) == bool(steps)
    assert (run / "scores.csv").read_bytes() == undisturbed


def test_before_the_first_batch(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(Noisy, "setup", lambda *_, **__: os.kill(os.getpid(), TERM), raising=False)
    outcome = runs.train(*arguments, f"hydra.run.dir={tmp_path / 'run'}", small=False)
    assert_stopped(outcome, "SIGTERM")
    assert outcome.err.endswith("from the beginning: there is no checkpoint yet\n")


def test_an_ignored_signal_stays_ignored(arguments, send, tmp_path):
    """As nohup leaves SIGHUP."""
    before = signal.signal(HUP, signal.SIG_IGN)
    try:
        send(2, HUP)
        assert runs.train(*arguments, f"hydra.run.dir={tmp_path / 'run'}", small=False).code == 0
        assert signal.getsignal(HUP) == signal.SIG_IGN
    finally:
        signal.signal(HUP, before)


def test_signals_to_all_processes_of_a_sweep():
    """The fork server ignores them, and its jobs do not, except what the launcher ignores already, as with nohup."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (TERM, HUP)}
    try:
        signal.signal(HUP, signal.SIG_IGN)
        signals.leave_to_launcher()
        assert [signal.getsignal(number) for number in (TERM, HUP)] == [signal.SIG_IGN, signal.SIG_IGN]
        signals.stop_ignoring()
        assert [signal.getsignal(number) for number in (TERM, HUP)] == [signal.SIG_DFL, signal.SIG_IGN]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_evaluate_and_predict(arguments, root, send, tmp_path, monkeypatch):
    """They end without a part of a result; the same command then works."""
    run = tmp_path / "run"
    assert runs.train(*arguments, f"hydra.run.dir={run}", small=False).code == 0
    send(0, TERM)
    evaluate = (f"run={run}", f"output={tmp_path / 'again'}")
    assert_stopped(runs.evaluate(*evaluate), "SIGTERM")
    assert list((tmp_path / "again").iterdir()) == []
    monkeypatch.undo()
    assert runs.evaluate(*evaluate).code == 0
    predict = (f"run={run}", f"input={root}", f"output={tmp_path / 'new'}")
    monkeypatch.setattr("anomalib_lite.runs.predictions.overlay", lambda *_: os.kill(os.getpid(), USR1))
    assert_stopped(runs.predict(*predict), "SIGUSR1")
    assert list((tmp_path / "new").iterdir()) == []
    monkeypatch.undo()
    assert runs.predict(*predict).code == 0


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_all_processes_of_a_run(arguments, undisturbed, tmp_path, monkeypatch):
    """As docker stop and scancel signal them: the loader's processes do not end before the checkpoint."""
    run = tmp_path / "run"
    options = [*arguments, "method.pause=0.4", "data.workers=2"]
    started = PROCESSES.Process(target=_led, args=(options, run))
    started.start()
    until(lambda: sum(parent == started.pid for parent, _ in (cpu_times() or {}).values()) >= 2)  # the loader's
    time.sleep(0.6)
    assert started.pid
    os.killpg(started.pid, TERM)
    started.join()
    assert started.exitcode == 143
    stored = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert 1 <= stored["callbacks"]["Training"]["steps"] < 9
    monkeypatch.setattr(Noisy, "training_step", lambda self, batch, batch_idx: self.loss(batch))  # without the pause
    assert runs.train("resume=true", f"hydra.run.dir={run}", arguments[0], small=False).code == 0
    assert (run / "scores.csv").read_bytes() == undisturbed


def _led(arguments: list[str], run: Path) -> None:
    os.setpgid(0, 0)
    multiprocessing.set_start_method(None, force=True)  # the loader's processes start as in a single run
    os._exit(runs.train(*arguments, f"hydra.run.dir={run}", small=False).code)


ABANDONED = """
import os, signal, sys
from torch.utils.data import DataLoader
from anomalib_lite.cli.signals import as_interrupts
from anomalib_lite.data.loader import one_thread
with as_interrupts():
    iterator = iter(DataLoader(list(range(4)), num_workers=1, worker_init_fn=one_thread))
    next(iterator)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(iterator._workers[0].pid, number)
    print(int(next(iterator)[0]))
sys.exit(3)
"""


def test_a_program_ends_with_its_loader_processes():
    """Also when an iterator is abandoned, as by an exception: multiprocessing then sends SIGTERM and waits."""
    outcome = runs.python("-c", ABANDONED, cwd=runs.ROOT, timeout=60)
    assert (outcome.code, outcome.out, outcome.err) == (3, "1\n", "")

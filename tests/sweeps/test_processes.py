"""Sweeps: every job in a process of its own, equal to a single run; a sweep that was killed continues."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from anomalib_lite.sweeps import sweep
from anomalib_lite.sweeps.job import Job, key_of, match
from tests.helpers.interrupt import logged, until
from tests.helpers.run_programs import Outcome, holding
from tests.helpers.user_folder import Started, assert_refused, in_process, result_of, state_of

# --- what comes out ---

ENDS = ("no", "exception", "exit", "segfault", "missing")
SAME = ("seed=3", "data.val_fraction=0.3")
VARIED = ("method=crash", f"method.how={','.join(ENDS)}", "data.category=bottle,cup", *SAME)
HYDRA = ("hydra.launcher.jobs=2", "+hydra.job.env_set.SWEPT=yes", "hydra.sweep.subdir=${hydra:job.num}")


@pytest.fixture(scope="module")
def swept(home, tmp_path_factory) -> tuple[Path, Outcome]:
    """The folder of a sweep from the command line, and what it printed: two jobs are done, eight fail."""
    folder = tmp_path_factory.mktemp("swept") / "a sweep"
    return folder, Started(home, *VARIED, *HYDRA, f'hydra.sweep.dir="{folder}"').end()


def test_jobs_equal_single_runs(swept, tmp_path):
    """With a method of the user; each job stores its own Hydra settings."""
    folder, outcome = swept
    assert "2 of 10 done, 8 failed, best validation.image_auroc" in outcome.out
    for number, category in enumerate(("bottle", "cup")):
        job, single = folder / str(number), tmp_path / category
        own = ["method.how=no", f"data.category={category}", *SAME]
        alone = in_process("method=crash", *own, "hardware.threads=1", f"hydra.run.dir={single}")
        assert alone.code == 0, alone.err
        assert state_of(job) == state_of(single)
        hydra: Any = OmegaConf.load(job / ".hydra" / "hydra.yaml")
        hydra = hydra.hydra
        assert (hydra.job.num, hydra.mode, hydra.runtime.choices.method) == (number, "RUN", "crash")
        assert (hydra.runtime.output_dir, hydra.sweep.dir) == (str(job), str(job.parent))
        assert hydra.job.env_set == {"SWEPT": "yes"}
        assert set(own) < set(hydra.overrides.task)
        assert "crash on folder" not in outcome.out
        assert "crash on folder" in (job / "output.log").read_text()
        assert (job / "train.log").is_file()


def test_failures_stay_in_their_jobs(swept):
    folder, outcome = swept
    assert outcome.code == 1
    *lines, last = outcome.err.splitlines()
    last_line = r"\d\d:.*"  # which says more than the exit code
    reasons = ("RuntimeError: as asked", last_line, "killed by SIGSEGV", "marker: no such file")
    for number, line in enumerate(lines, 2):
        why = reasons[number // 2 - 1]
        assert re.match(rf"error: job {number} \(.*\): ({why}).*; see {folder}/{number}/output.log$", line)
    assert last.startswith("error: 8 of 10 jobs failed; the same command retries them")
    assert "Traceback" not in outcome.err
    assert re.search(rf"^10 jobs in {folder}: (2 done, 8 failed|8 failed, 2 done)$", outcome.out, re.MULTILINE)


def test_the_next_launch(swept, tmp_path):
    """It retries what failed, and evaluates again where a result was damaged; overrides may change their order. A job's
    folder may hold an evaluation of the job.
    """
    folder = shutil.copytree(swept[0], tmp_path / "a sweep")
    done = state_of(folder / "0")
    time = (folder / "1" / "result.json").stat().st_mtime_ns
    (folder / "0" / "result.json").write_text("{")
    stored = json.loads((folder / "1" / "checkpoints" / "config.json").read_text())
    stored["digests"]["module sweep_methods"] = "as of another file"
    (folder / "1" / "checkpoints" / "config.json").write_text(json.dumps(stored))
    (folder / "1" / "again").mkdir()
    shutil.copy(folder / "1" / "result.json", folder / "1" / "again")
    Path("marker").touch()
    outcome = in_process("-m", *HYDRA, *reversed(VARIED), f'hydra.sweep.dir="{folder}"')
    assert outcome.code == 1
    assert "error: 6 of 10 jobs failed" in outcome.err
    assert f"{folder}/0/result.json: not readable as a result" in outcome.out
    assert "the module sweep_methods has changed since these jobs ended, whose results remain: 1; " in outcome.out
    assert outcome.out.count("1 done before") == 2  # at the start and at the end
    assert state_of(folder / "0") == done
    assert (folder / "1" / "result.json").stat().st_mtime_ns == time
    assert [result_of(folder / number)["method"] for number in "89"] == ["crash"] * 2


SPACE = ("method.optimizer.lr=tag(log, interval(0.01, 10))", "data.batch_size=int(interval(2, 4))", "seed=3,4")


@pytest.mark.parametrize(("sweeper", "jobs"), [("random", ()), ("tpe", ("hydra.sweeper.n_jobs=2",))])
def test_a_search_continues(sweeper, jobs, tmp_path):
    """More trials: the first ones stay. The best is what validation says."""
    pytest.importorskip("optuna.storages.journal")
    study = ("method=mean", "data.category=bottle", "data.val_fraction=0.3", "objective=validation.pixel_ap",
             f"hydra/sweeper={sweeper}", *jobs, f"hydra.sweep.dir={tmp_path}", "hydra.launcher.jobs=2")  # fmt: skip
    first = in_process("-m", *study, *SPACE, "hydra.sweeper.n_trials=2")
    assert first.code == 0, first.err
    jobs_before = json.loads((tmp_path / "sweep.json").read_text())["jobs"]
    times = [(tmp_path / number / "result.json").stat().st_mtime_ns for number in "01"]
    more = in_process("-m", *reversed(SPACE), *study, "hydra.sweeper.n_trials=3")
    assert more.code == 0, more.err
    assert more.out.count("2 done before") == 2  # at the start and at the end
    assert f"3 jobs in {tmp_path}: 2 done before, 1 done\n" in more.out
    assert times == [(tmp_path / number / "result.json").stat().st_mtime_ns for number in "01"]
    entries = json.loads((tmp_path / "sweep.json").read_text())["jobs"]
    assert [entry["folder"] for entry in entries] == ["0", "1", "2"]
    assert entries[:2] == jobs_before
    measured = [result_of(tmp_path / number)["validation"]["pixel_ap"] for number in "012"]
    assert len(set(measured)) > 1
    best: Any = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert best.best_evaluated_result == max(measured)
    assert {f"{key}={value}" for key, value in best.best_evaluated_params.items()} < set(
        entries[measured.index(max(measured))]["overrides"]
    )
    assert f"best validation.pixel_ap {max(measured):.4f}: data.batch_size=" in more.out
    fewer = in_process("-m", *study, *SPACE, "hydra.sweeper.n_trials=2")  # nothing is left to do
    assert fewer.code == 0, fewer.err
    assert f"best validation.pixel_ap {max(measured[:2]):.4f}: " in fewer.out
    assert "validation" in more.out.split("in percent")[-1]  # a column of the table


@pytest.mark.parametrize(
    ("name", "content", "warning"),
    [
        ("result.json", "[1]", "result.json: not a result of this version"),
        ("result.json", '{"schema": 1, "metrics": {}}', "result.json: no 'validation' in it; job 0 is evaluated again"),
        ("checkpoints/config.json", "{", "config.json: damaged .*; job 0 starts again"),
    ],
)
def test_damaged_files_of_a_job(name, content, warning, tmp_path, caplog):
    """They are named and put aside, and the job does not count as done."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "config.json").write_text('{"config": {}, "names": {}}')
    (tmp_path / "checkpoints" / "last.ckpt").write_text("weights")
    (tmp_path / name).write_text(content)
    job = Job(0, [], tmp_path, None, {}, 0, False)
    job.find_earlier_run()
    assert re.search(warning, caplog.text)
    assert (job.state, job.result) == ("waiting", None)
    assert job.resume == (name == "result.json")
    assert not (tmp_path / name).exists()
    assert (tmp_path / "checkpoints" / "last.ckpt").exists() == job.resume


def test_paths_are_absolute_as_in_a_stored_run(home, tmp_path, monkeypatch):
    """Else a job with a relative one would seem to be another run when the sweep continues."""
    names: list[str] = []
    monkeypatch.setattr(sweep.Sweep, "run", lambda _, jobs: names.extend(job.plain["backbone"]["name"] for job in jobs))
    given = ("backbone.name=local-dir:model", "backbone.layers=[1]", f"hydra.sweep.dir={tmp_path}")
    assert in_process("-m", "method=mean", "seed=0", *given).code == 0
    assert names == [f"local-dir:{home / 'model'}"]


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("", "exit code 3"),
        ("12:00 training\nerror: marker: no such file\nnote: that is all\n\n", "marker: no such file"),
        (
            'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    f()\n    ~^^\n'
            "RuntimeError: CUDA error: no memory\nCompile with TORCH_USE_CUDA_DSA\n\n",
            "RuntimeError: CUDA error: no memory",
        ),
        ("12:00 training\n  12:01 evaluating\n", "12:01 evaluating"),
    ],
)
def test_the_reason_of_a_failure(output, reason, tmp_path):
    """What this attempt wrote counts: output.log holds the earlier ones too."""
    job = Job(0, [], tmp_path, None, {}, 0, False)
    job.output.write_text("error: an earlier one\n")
    job.start()
    with job.output.open("a") as file:
        file.write(output)
    job.finish(3)
    assert job.failure == reason


@pytest.mark.parametrize(
    ("stored", "given", "is_continued"),
    [
        (["seed=0", "seed=1"], ["seed=0 hardware.threads=2", "seed=1 hardware.threads=2"], True),
        (["seed=0", "seed=1"], ["seed=1 logger=csv"], True),
        (["seed=0 data.workers=1"], [f"seed={seed} hardware.accelerator=gpu" for seed in (0, 1)], True),
        (["seed=0"], ["seed=0 hardware=gpu"], False),  # a group of the user's may hold another precision
        (["seed=0 data.root=a"], ["seed=0 data.root=b"], False),
        (["seed=0"], ["seed=0 objective=null"], False),
        (["seed=0 hardware.precision=32"], ["seed=0 hardware.precision=bf16"], False),
        (["seed=0"], ["seed=0 scoring.threshold_images=9"], False),
        (["seed=0"], ["seed=0 hardware.deterministic=true"], False),
        (["seed=0"], ["seed=0 cache.dtype=float16"], False),
        (["data.workers=1", "data.workers=2"], ["data.workers=1 debug=true logger=csv"], False),
        (["hardware.threads=1"], ["data.workers=1", "data.workers=2"], False),
    ],
)
def test_which_jobs_continue(stored, given, is_continued):
    """Overrides that may change on resume identify a job only where they are swept, or where they decide results."""
    known = {key_of(overrides.split()): overrides for overrides in stored}
    entries = {key: {"overrides": overrides.split()} for key, overrides in known.items()}
    batch = {key_of(overrides.split()): overrides.split() for overrides in given}
    found = match(entries, batch, [])
    assert list(found.values()) == list(entries.values())
    assert bool(found.keys() & batch.keys()) == is_continued
    for key in found.keys() & batch.keys():
        assert {*batch[key]} & {"seed=0", "seed=1"} == {*found[key]["overrides"]} & {"seed=0", "seed=1"}
    assert match(entries, batch, entries.keys()) == entries  # a search's next batch does not continue the previous one


@pytest.mark.slow
def test_overhead(home, tmp_path):
    """The time that a sweep adds to a job after the first one, compared with a loop in one process: best of seven."""
    done = Started(
        home, "method=empty", "seed=range(8)", f"hydra.sweep.dir={tmp_path}", "hydra.launcher.threads=1"
    ).end()
    assert done.code == 0, done.err
    ends = [(tmp_path / str(number) / "result.json").stat().st_mtime for number in range(8)]
    swept = min(after - before for before, after in itertools.pairwise(ends))
    alone = []
    for seed in range(8):
        start = time.perf_counter()
        in_process("method=empty", f"seed={seed}", "hardware.threads=1", f"hydra.run.dir={tmp_path / 'alone'}/{seed}")
        alone.append(time.perf_counter() - start)
    print(f"a job takes {swept:.2f} s in a sweep, {min(alone):.2f} s in a loop")
    assert swept - min(alone) < 0.5  # the goal is 0.25; measured 0.25 and 0.34 beside other work


@pytest.mark.slow
def test_two_devices_and_one(home, tmp_path):
    arguments = ("hardware.devices=1,2", "method=mean", "hardware.threads=1")
    done = Started(home, *arguments, f"hydra.sweep.dir={tmp_path}", "hydra.launcher.jobs=2").end()
    assert done.code == 0, done.err
    one, two = (result_of(tmp_path / number) for number in "01")
    assert one["timing"]["steps"] == two["timing"]["steps"] == 9
    assert one["data"] == two["data"]
    rows = [(tmp_path / number / "scores.csv").read_text().splitlines() for number in "01"]
    assert len(rows[0]) == len(rows[1]) == 13
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "multirun.yaml", "sweep.json"]


# --- what is killed, and goes on ---

PAUSE = "method.pause=0.1"
STUDY = ("method=mean", "seed=0,1,2", "hydra.launcher.jobs=2", "trainer.checkpoint_minutes=0", "trainer.log_every=1")


@pytest.fixture(scope="module")
def undisturbed(home, tmp_path_factory) -> list[Any]:
    """What the study's jobs give as single runs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for seed in "012":
            arguments = (*STUDY[2:], PAUSE, "method=mean", f"seed={seed}", "hardware.threads=1")
            assert in_process(*arguments, f"hydra.run.dir={folder / seed}").code == 0
    return [state_of(folder / seed) for seed in "012"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killed_again_and_again(home, undisturbed, tmp_path):
    """A job, the server, the launcher while it imports and while it works; the last launch is not disturbed."""
    arguments = (*STUDY, PAUSE, f"hydra.sweep.dir={tmp_path}")
    started = Started(home, *arguments)
    for victim, step in (("job", 2), ("server", 4), ("launcher", 0), ("launcher", 6)):
        until(lambda: logged(tmp_path / "1", step) if step else bool(started.find("server")))  # noqa: B023
        process = started.find(victim)
        assert process is not None
        os.kill(process, signal.SIGKILL)
        if victim == "launcher":  # at once: the new one waits until the jobs of the old one have ended
            killed, started = started, Started(home, *arguments)
            assert killed.end().code == -9
        else:
            outcome = started.end()
            assert outcome.code == 1
            assert re.match(
                r"error: job 1 \(seed=1\): killed by SIGKILL; see .*\nerror: 1 of 3 jobs failed", outcome.err
            )
            assert [state_of(tmp_path / number) for number in "02"] == undisturbed[::2]  # the others were done
            started = Started(home, *arguments)
    done = started.end()
    assert done.code == 0, done.err
    assert [state_of(tmp_path / number) for number in "012"] == undisturbed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_killed_at_ten_random_moments(home, undisturbed, tmp_path):
    """The launcher, the fork server or a job. The next launches end as if nothing had happened."""
    number = random.Random(4)
    sweeps, kills = 0, list[tuple[str, float]]()
    victims = ["launcher", "server", "job"] * 3 + ["job"]
    number.shuffle(victims)
    while len(kills) < len(victims):
        folder = tmp_path / str(sweeps)
        started = Started(home, *STUDY, PAUSE, f"hydra.sweep.dir={folder}")
        role = victims[len(kills)]
        until(lambda: bool(started.find(role)) or started.process.poll() is not None)  # noqa: B023
        moment = number.uniform(0, 3)
        time.sleep(moment)
        if victim := started.find(role):
            os.kill(victim, signal.SIGKILL)
            kills.append((role, round(moment, 2)))
        code = started.end().code  # which waits until none of its processes is left
        if code == 0:  # it was done before
            assert [state_of(folder / job) for job in "012"] == undisturbed
            sweeps += 1
        else:
            assert code == (-signal.SIGKILL if role == "launcher" else 1)
    folder = tmp_path / str(sweeps)
    done = Started(home, *STUDY, PAUSE, f"hydra.sweep.dir={folder}").end()
    assert done.code == 0, done.err
    assert [state_of(folder / job) for job in "012"] == undisturbed
    print(f"{len(kills)} kills over {sweeps + 1} sweeps: {kills}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "send"), [(signal.SIGINT, os.kill), (signal.SIGTERM, os.kill), (signal.SIGTERM, os.killpg)]
)
def test_interrupted_beside_another(home, undisturbed, tmp_path, number, send):
    """Two sweeps at once; one of them is ended, which does not affect the other. A signal comes to the launcher alone
    or, as from a terminal or from `timeout`, to its process group; the jobs are interrupted and not killed.
    """
    both = [Started(home, *STUDY, PAUSE, f"hydra.sweep.dir={tmp_path / name}", in_own_group=True) for name in "ab"]
    until(lambda: logged(tmp_path / "a" / "1", 2))
    send(both[0].process.pid, number)
    start = time.monotonic()
    outcome = both[0].end()
    assert time.monotonic() - start < 8
    assert outcome.code == (130 if number == signal.SIGINT else 143)
    assert f"0 of 3 jobs are done; to continue: the same command, hydra.sweep.dir={tmp_path / 'a'}\n" in outcome.err
    assert "Traceback" not in outcome.err
    assert "interrupted by SIGTERM" in (tmp_path / "a" / "1" / "output.log").read_text()
    done = both[1].end()
    assert done.code == 0, done.err
    assert [state_of(tmp_path / "b" / job) for job in "012"] == undisturbed


# --- what is refused ---


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("hydra.launcher.job=2", "hydra.launcher.job: no such option; did you mean hydra.launcher.jobs"),
        ("+hydra.launcher.job=2", "hydra.launcher.job: no such option of processes; see --cfg hydra"),
        ("hydra.launcher.jobs=many", "jobs.*many"),
        ("hydra.sweeper.max_batch_size=2", "max_batch_size=2: .*; leave it out, and give hydra.launcher.jobs=2"),
        ("data.check=only", "data.check=only: makes no run; leave out -m"),
        ("objective=validation.aupro_5", "objective=validation.aupro_5: no such metric; choose from"),
        ("hydra.sweep.subdir=same", "hydra.sweep.subdir: two jobs share the folder same"),
    ],
)
def test_refused(argument, message, tmp_path):
    assert_refused(
        message,
        "method=mean",
        "seed=0,1" if "subdir" in argument else "seed=0",
        argument,
        f"hydra.sweep.dir={tmp_path}",
    )
    assert not (tmp_path / "0").exists()


def test_folder_of_another_sweep(tmp_path):
    job = {"number": 0, "folder": "0", "overrides": ["method=mean", "seed=7"]}
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": [job]}))
    assert_refused(
        "holds another sweep: a job of it has seed=7 where this command has .*seed=0; repeat",
        "method=mean",
        "seed=0",
        f"hydra.sweep.dir={tmp_path}",
    )
    (tmp_path / "sweep.json").write_text("{")
    assert_refused("sweep.json: damaged", "method=mean", "seed=0", f"hydra.sweep.dir={tmp_path}")


def test_folder_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "PATIENCE", 0.1)
    with holding(tmp_path, ".sweeping") as holder:
        message = f"process {holder.pid} on .* works in this folder since .*choose another hydra.sweep.dir=DIR"
        assert_refused(message, "method=mean", "seed=0", f"hydra.sweep.dir={tmp_path}")

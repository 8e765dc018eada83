"""Weights & Biases: what a run logs there, read back from W&B's own files, and that no failure of W&B stops a run."""

import csv
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import yaml
from PIL import Image

from anomalib_lite.cli import keys
from anomalib_lite.cli import schema as configuration
from anomalib_lite.runs import artifacts as results
from anomalib_lite.tracking import wandb_logger
from tests.helpers import run_programs as runs
from tests.helpers import wandb_file
from tests.helpers.image_trees import make_mvtec

KEY = "0123456789" * 4
PARTS = ("metrics", "validation")
STOPS = """
from anomalib_lite.methods.norm_occ import NormOCC


class Stops(NormOCC):
    stops = True

    def training_step(self, batch, index):
        if Stops.stops and self.trainer.callbacks[0].steps == 7:
            Stops.stops = False
            raise KeyboardInterrupt
        self.log("term", 1.0)
        return super().training_step(batch, index)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for category in ("bottle", "screw"):
        make_mvtec(root, category, train=9, good=4, defects={"broken": 3, "bent": 2}, size=64)
    return root


#: variables that the tests themselves set, after WANDB_
ALLOWED = {"API_KEY", "BASE_URL", "MODE", "SWEEP_ID", "RUN_ID", "DISABLED", "PROJECT", "TAGS"}


def without_account(patch: pytest.MonkeyPatch, home: Path) -> None:
    """No W&B account, and another home."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)
    patch.setenv("HOME", str(home))
    patch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())  # a new one takes ten seconds


@pytest.fixture(autouse=True)
def own_home(monkeypatch, tmp_path_factory):
    """A home where no file and an environment where no variable of W&B may appear."""
    home = tmp_path_factory.mktemp("home")
    without_account(monkeypatch, home)
    yield
    assert not [path for path in home.rglob("*") if "wandb" in path.name]
    assert not [name for name in os.environ if name.startswith("WANDB_") and name[6:] not in ALLOWED]


def train(run: Path, root: Path, *more: str, category: str = "bottle", code: int = 0) -> str:
    """A run with W&B; its output and its log."""
    data = runs.folder_data(root, category)
    outcome = runs.train("logger=default", *data, *more, f"hydra.run.dir={run}")
    assert outcome.code == code, outcome.err
    return outcome.out + outcome.err + "".join(log.read_text() for log in run.glob("train.log"))


def warnings(text: str) -> list[str]:
    return list(dict.fromkeys(line.partition(" WARNING ")[2] for line in text.splitlines() if " WARNING " in line))


#: a unified run with everything that is logged
EVERYTHING = (
    "method=norm_occ", "data.val_fraction=0.4", "data.image_size=64", "trainer.max_epochs=3", "trainer.log_every=2",
    "method.optimizer.lr=0.01", "scoring.quantile=0.5", "scoring.pixel_smooth=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def logged(root, tmp_path_factory):
    """The folder and the output of a run of EVERYTHING, started in a folder of its own."""
    run = tmp_path_factory.mktemp("logged") / "run"
    with pytest.MonkeyPatch.context() as patch:
        without_account(patch, run.parent)
        patch.chdir(run.parent)
        text = train(run, root, *EVERYTHING, category="[bottle,screw]")
    return run, text


@pytest.fixture(scope="module")
def read(logged):
    (folder,) = wandb_file.folders(logged[0])
    return wandb_file.read(folder)


@pytest.fixture(scope="module")
def row(read):
    """The row of the results: one call logs all of them."""
    rows = [row for row in read["history"] if any("metrics" in key or "cases" in key for key in row)]
    assert len(rows) == 1
    assert rows == read["history"][-1:]
    return rows[0]


def table(logged, row, key: str) -> list[dict]:
    (folder,) = wandb_file.folders(logged[0])
    stored = json.loads((folder / "files" / row[key]["path"]).read_text())
    return [dict(zip(stored["columns"], values, strict=True)) for values in stored["data"]]


def test_the_run_says_what_it_is(logged, read):
    run = read["run"]
    assert (run.project, run.display_name, run.job_type) == ("anomalib_lite", "norm_occ folder unified seed 0", "train")
    assert list(run.tags) == ["norm_occ", "folder", "unified", "full", "test_resnet.r160_in1k"]
    assert run.run_group == ""
    stored = json.loads((logged[0] / "checkpoints" / "config.json").read_text())
    config = {key: value for key, value in read["config"].items() if not key.startswith("_")}
    environment = results.read_result(logged[0])["environment"]
    assert config == stored["config"] | {"choices": stored["names"], "environment": environment}
    assert read["exit"] == 0
    assert min(read["count"]["stats"], read["count"]["environment"]) >= 1  # the machine is watched


def test_the_losses_are_those_of_metrics_csv(logged, read):
    with (logged[0] / "metrics.csv").open() as file:
        expected = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    found = [row for row in read["history"] if "loss" in row]
    assert [{key: row[key] for key in ("step", "loss", "epoch")} for row in found] == expected
    assert [row["_step"] for row in found] == [row["step"] for row in expected]
    assert read["metric"]["loss"].step_metric == read["metric"]["*"].step_metric == "step"
    assert read["summary"]["loss"] == expected[-1]["loss"]  # plain, to sort runs by


def measured(metrics: dict[str, Any]) -> dict[str, float]:
    """Without those that can't be computed: AUPIMO of tiny images alone."""
    assert [key for key, value in metrics.items() if value is None] == ["aupimo"]
    assert {"pixel_iou", "pixel_dice"} < set(metrics)
    return {key: value for key, value in metrics.items() if value is not None}


def test_the_summary_is_the_result(logged, read, row):
    result = results.read_result(logged[0])
    for group in PARTS:
        assert read["summary"][group] == row[group] == measured(result[group])
        assert all(read["metric"][f"{group}.{key}"].step_metric == "step" for key in measured(result[group]))
    for key in ("timing", "efficiency", "thresholds", "decisions", "cache", "data"):
        assert read["summary"][key] == result[key]
    assert read["summary"]["notes"].splitlines() == result["notes"]


def test_tables(logged, row):
    result = results.read_result(logged[0])
    with (logged[0] / "scores.csv").open() as file:
        expected = [r | {"label": int(r["label"]), "score": float(r["score"])} for r in csv.DictReader(file)]
    assert table(logged, row, "scores") == expected
    decided = result["decisions"]["per_category"]
    assert table(logged, row, "per_category") == [
        {"category": name} | metrics | decided[name] for name, metrics in result["per_category"].items()
    ]
    defects = {(r["category"], r["defect"]): r["image_auroc"] for r in table(logged, row, "per_defect")}
    assert defects == {(c, d): m["image_auroc"] for c, found in result["per_defect"].items() for d, m in found.items()}


def test_curves_enclose_their_areas(logged, row):
    result = results.read_result(logged[0])
    for key, metric in (("image_roc", "image_auroc"), ("pixel_roc", "pixel_auroc")):
        for category in ("bottle", "screw"):
            points = [p for p in table(logged, row, f"curves/{key}_table") if p["lineKey"] == category]
            area = np.trapezoid([p["lineVal"] for p in points], [p["step"] for p in points])
            assert area == pytest.approx(result["per_category"][category][metric], abs=1e-3)  # about 200 points
    assert all(table(logged, row, f"curves/{key}_table") for key in ("image_pr", "pixel_pr", "pro"))


def test_pictures_have_masks_that_can_be_switched_on(logged, read, row, root):
    (folder,) = wandb_file.folders(logged[0])
    result = results.read_result(logged[0])
    with np.load(logged[0] / "maps.npz") as file:
        maps = dict(zip(file["paths"].tolist(), file["maps"].astype(np.float32) * file["scale"], strict=True))
    kinds, marked = set(), 0
    for category in ("bottle", "screw"):
        cases, threshold = row[f"cases/{category}"], result["thresholds"]["per_category"][category]["pixel"]
        assert cases["count"] == len(set(cases["captions"])) == 5 + 3
        for name, caption, masks in zip(cases["filenames"], cases["captions"], cases["all_masks"], strict=True):
            kinds.add(caption.partition(":")[0].partition(",")[0])
            path = caption.rpartition(", ")[2]
            picture = np.asarray(Image.open(folder / "files" / name))
            np.testing.assert_array_equal(picture[:, :64], np.asarray(Image.open(root / path)))
            gt_mask, found = (
                np.asarray(Image.open(folder / "files" / masks[key]["path"])) for key in ("ground_truth", "prediction")
            )
            if "/good/" in path:
                expected = np.zeros((64, 64), bool)
            else:
                file = root / path.replace("/test/", "/ground_truth/").replace(".png", "_mask.png")
                expected = np.asarray(Image.open(file)) > 0
            np.testing.assert_array_equal(gt_mask, np.tile(expected, 2))
            near = np.abs(maps[path] - threshold) < 2e-3 * threshold  # half precision
            differs = (found[:, :64] == 2) != (maps[path] > threshold)
            assert not (differs & ~near).any()
            np.testing.assert_array_equal(found[:, :64], found[:, 64:])
            marked += int((found == 2).sum())
            # the heat map is brighter where more is above the threshold
            assert picture[:, 64:].std() > 0
    assert kinds == {"clear defect", "weakest defect", "highest good"}
    assert marked
    labels = read["config"]["_wandb"]["mask/class_labels"]
    assert labels["cases/bottle_wandb_delimeter_ground_truth"]["value"] == {"1": "defect"}
    assert labels["cases/bottle_wandb_delimeter_prediction"]["value"] == {"2": "above the threshold"}


def test_all_of_it_lies_in_the_run(logged):
    run, text = logged
    assert not [path for path in run.parent.rglob("*") if "wandb" in path.name and run not in path.parents]
    files = {".hydra", "train.log", "checkpoints", "result.json", "scores.csv", "maps.npz", "metrics.csv", "figures"}
    assert {path.name for path in run.iterdir()} == files | {"wandb"}
    (line,) = {line.partition("W&B: ")[2] for line in text.splitlines() if "W&B" in line}
    (folder,) = wandb_file.folders(run)
    assert line == f"to upload this run: wandb sync {folder}"


def test_an_offline_run_can_be_uploaded(logged, row, tmp_path):
    """To a server, with the command that the run reports."""
    words = shlex.split(logged[1].rpartition("upload this run: ")[2].splitlines()[0])
    with wandb_file.Server() as server:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            env=os.environ | {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url, "HOME": str(tmp_path / "else")},
            capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path,
        )  # fmt: skip
    for marker in logged[0].glob("wandb/*/*.synced"):
        marker.unlink()
    assert done.returncode == 0, done.stderr
    (run,) = server.runs.values()
    assert run["given"]["displayName"] == "norm_occ folder unified seed 0"
    assert (run["given"]["jobType"], len(run["given"]["tags"])) == ("train", 5)
    assert {key: run["summary"][key] for key in PARTS} == {key: row[key] for key in PARTS}
    assert run["exit"] == 0
    pictures = [file for file in server.uploaded if file.startswith("media/images/cases/")]
    assert set(pictures) == {name for c in ("bottle", "screw") for name in row[f"cases/{c}"]["filenames"]}


def test_wandb_changes_no_result(logged, root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # disabled, it is not even imported: an import would raise
    stored = json.loads((logged[0] / "checkpoints" / "config.json").read_text())["config"]
    train(tmp_path / "run", root, *EVERYTHING, "logger.wandb.mode=disabled", category="[bottle,screw]")
    assert stored["logger"]["wandb"]["mode"] == "auto"
    assert (tmp_path / "run" / "scores.csv").read_bytes() == (logged[0] / "scores.csv").read_bytes()
    assert not (tmp_path / "run" / "wandb").exists()


def test_a_resumed_run_continues_under_its_id(root, tmp_path, monkeypatch):
    """A job of a sweep is interrupted between two checkpoints; together both parts are one run without a gap."""
    (tmp_path / "stops.py").write_text(STOPS)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = tmp_path / "run"
    more = (
        "method=norm_occ", "method._target_=stops.Stops", "trainer.max_epochs=6", "trainer.log_every=2",
        "trainer.checkpoint_minutes=0", "hydra.job.num=3", f"hydra.sweep.dir={tmp_path}/my_sweep",
    )  # fmt: skip
    train(run, root, *more, code=130)
    text = train(run, root, *more, "resume=true")
    first, second = wandb_file.folders(run)
    parts = [wandb_file.read(folder) for folder in (first, second)]
    assert len({part["run"].run_id for part in parts}) == 1
    assert [part["exit"] for part in parts] == [1, 0]
    assert [part["run"].run_group for part in parts] == ["my_sweep"] * 2
    steps = [[row["step"] for row in part["history"] if "loss" in row] for part in parts]
    assert steps[0] == [1, 2, 4, 6]
    assert sorted({*steps[0], *steps[1]}) == [1, *range(2, 19, 2)]
    command = shlex.split(text.rpartition("upload this run: ")[2].splitlines()[0])
    assert command == ["wandb", "sync", str(first), str(second)]
    assert (run / "wandb" / "run_id").read_text().strip() == parts[0]["run"].run_id


def test_two_runs_of_a_process_stay_apart(root, tmp_path):
    """A sweep in one process. The sweep is the runs' group."""
    outcome = runs.train(
        "-m", "hydra/launcher=basic", "logger=default", "method=norm_occ_closed_form", *runs.folder_data(root),
        "seed=0,1", f"hydra.sweep.dir={tmp_path / 'both'}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = [wandb_file.read(folder) for n in (0, 1) for folder in wandb_file.folders(tmp_path / "both" / str(n))]
    assert [made["run"].display_name for made in found] == [f"norm_occ_closed_form bottle seed {n}" for n in (0, 1)]
    assert len({made["run"].run_id for made in found}) == 2
    assert {made["run"].run_group for made in found} == {"both"}
    assert [made["config"]["seed"] for made in found] == [0, 1]
    for n, made in enumerate(found):
        result = results.read_result(tmp_path / "both" / str(n))
        assert [row["metrics"] for row in made["history"]] == [measured(result["metrics"])]


def test_names_of_few_shots(root, tmp_path):
    """A sweep's parentheses don't repeat what the name says."""
    outcome = runs.train(
        "-m", "hydra/launcher=basic", "logger=default", "method=norm_occ_closed_form", *runs.folder_data(root),
        "split=shots", "split.shots=2", "split.seed=0,1", f"hydra.sweep.dir={tmp_path / 'both'}",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    for n in (0, 1):
        (folder,) = wandb_file.folders(tmp_path / "both" / str(n))
        run = wandb_file.read(folder)["run"]
        assert run.display_name == f"norm_occ_closed_form bottle 2 shots split.seed {n} seed 0"
        assert "2 shots" in run.tags


def test_a_failed_run_with_given_names(root, tmp_path):
    given = ("logger.wandb.name=one", "logger.wandb.group=ours", "logger.wandb.tags=[a,b]", "logger.wandb.project=p")
    diverges = ("method=norm_occ", "method.optimizer.lr=1e30", "trainer.max_epochs=20")
    train(tmp_path / "run", root, *diverges, *given, code=2)
    (folder,) = wandb_file.folders(tmp_path / "run")
    made = wandb_file.read(folder)
    run = made["run"]
    assert (run.display_name, run.run_group, list(run.tags), run.project) == ("one", "ours", ["a", "b"], "p")
    assert made["exit"] == 1


def test_a_start_that_fails_names_no_upload(root, tmp_path):
    """Its folder is emptied, with the offline run in it."""
    text = train(tmp_path / "run", root, "method=norm_occ", "method.optimizer.lr=-1", code=2)
    assert "wandb sync" not in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["unreachable", "wrong key", "broken", "silent", "no key at all"])
def test_a_server_that_fails_leaves_the_run_offline(root, tmp_path, monkeypatch, how):
    """One line says so, and the wait is bounded."""
    monkeypatch.setenv("WANDB_API_KEY", "short" if how == "no key at all" else KEY)
    status = {"wrong key": 401, "broken": 503}.get(how, 200)
    with wandb_file.Server(bad=status) as server, socket.create_server(("127.0.0.1", 0)) as deaf:
        silent = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        monkeypatch.setenv(
            "WANDB_BASE_URL", {"unreachable": "http://127.0.0.1:9", "silent": silent}.get(how, server.url)
        )
        started = time.monotonic()
        text = train(tmp_path / "run", root, "method=norm_occ_closed_form", "logger.wandb.timeout=1")
        assert time.monotonic() - started < 15
    (line,) = warnings(text)
    assert line.startswith("W&B: ")
    assert line.endswith(": this run is logged offline")
    assert results.read_result(tmp_path / "run")["metrics"]
    (folder,) = wandb_file.folders(tmp_path / "run")
    assert "metrics" in wandb_file.read(folder)["summary"]
    assert KEY not in text


def test_a_resumed_run_online(root, tmp_path, monkeypatch):
    """The server gets everything, live: two rows for each step, of the loss and of the method's own term, and no step
    is missing."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (tmp_path / "stops_online.py").write_text(STOPS)
    monkeypatch.syspath_prepend(str(tmp_path))
    more = (
        "method=norm_occ", "method._target_=stops_online.Stops", "trainer.max_epochs=6", "trainer.log_every=1",
        "trainer.checkpoint_minutes=0", "logger.wandb.timeout=4",
    )  # fmt: skip
    with wandb_file.Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        train(tmp_path / "run", root, *more, code=130)
        text = train(tmp_path / "run", root, *more, "resume=true")
    ((name, run),) = server.runs.items()
    assert f"W&B: {server.url}/me/anomalib_lite/runs/{name}" in text
    assert "wandb sync" not in text
    assert not warnings(text)
    assert run["summary"]["metrics"] == measured(results.read_result(tmp_path / "run")["metrics"])
    assert run["exit"] == 0
    for key in ("loss", "term"):
        assert [row["step"] for row in run["history"] if key in row] == list(range(1, 19))


def test_an_online_start_names_the_offline_parts(tmp_path, monkeypatch, caplog):
    """Those of this run that are not uploaded yet: `wandb sync` leaves a marker in a folder."""
    parts = [tmp_path / "wandb" / f"offline-run-{n}" for n in ("1-mine", "2-mine", "3-other")]
    for part in parts:
        part.mkdir(parents=True)
    (parts[0] / "run-mine.wandb.synced").touch()
    monkeypatch.setattr(wandb_logger, "online_obstacle", lambda *_: "")
    monkeypatch.setattr("wandb.init", lambda **_: SimpleNamespace(url="URL"))
    wandb_logger.WandbRun(str(tmp_path))._init(None, "online", {"id": "mine"})
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.endswith(f"part of this run was logged offline; to upload it too: wandb sync {parts[1]}")


def test_a_server_that_goes_away(root, tmp_path, monkeypatch):
    """The server disappears after the start: the run has its results, and they can be uploaded later."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with wandb_file.Server(until="mutation UpsertBucket") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        started = time.monotonic()
        limits = ("logger.wandb.timeout=4", "logger.wandb.upload_timeout=1")
        text = train(tmp_path / "run", root, "method=norm_occ_closed_form", *limits)
        assert time.monotonic() - started < 20
    assert results.read_result(tmp_path / "run")["metrics"]
    (folder,) = wandb_file.folders(tmp_path / "run")
    assert f"wandb sync --include-online {folder}" in text
    assert "metrics" in wandb_file.read(folder)["summary"]


@pytest.mark.parametrize("where", ["wandb", "wandb/run_id"])
def test_a_folder_that_cannot_be_written(root, tmp_path, where):
    run = tmp_path / "run"
    if where == "wandb":
        run.mkdir()
        (run / where).write_text("a file where a folder belongs")
    else:
        (run / where).mkdir(parents=True)
    text = train(run, root, "method=norm_occ_closed_form")
    assert [line.startswith("logger.wandb is left out: ") for line in warnings(text)] == [True]
    assert results.read_result(run)["metrics"]


def agent_command(study: dict, values: dict) -> list[str]:
    """The command that a W&B agent runs for these values, made by the agent's own functions."""
    from wandb.sdk.launch.sweeps import utils

    parts = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    parts |= {"interpreter": [sys.executable], "program": [study["program"]]}
    command: list[str] = []
    for part in utils.create_sweep_command(list(study["command"])):
        command += parts[part[2:-1]] if part.startswith("${") and part.endswith("}") else [part]
    return command


def test_the_sweep_file_of_wandb():
    """Its parameters are valid options, and its metric is one on held-out images."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    study = yaml.safe_load((runs.ROOT / "experiments" / "wandb_sweep.yaml").read_text())
    assert configuration.OBJECTIVE.fullmatch(study["metric"]["name"])
    assert study["metric"]["goal"] == "maximize"
    values = {key: how.get("min", how.get("values", [None])[-1]) for key, how in study["parameters"].items()}
    interpreter, flag, program, *options = agent_command(study, values)
    assert [interpreter, flag, program] == [sys.executable, "-m", "anomalib_lite.train"]
    with runs.restored(), initialize_config_dir(str(runs.ROOT / "conf"), version_base="1.3"):
        composed = compose("train", [option for option in options if not option.startswith("hydra.")])
    plain: Any = OmegaConf.to_container(composed, resolve=True)
    configuration.check(plain)
    assert plain["data"]["val_fraction"] > 0
    for key, value in values.items():
        assert keys.lookup(plain, key) == value


@pytest.mark.slow
def test_an_agent_runs_it(root, tmp_path, monkeypatch):
    """With the agent's own code: the run has the id that the agent gave, and no group beside the agent's sweep."""
    study = yaml.safe_load((runs.ROOT / "experiments" / "wandb_sweep.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(runs.ROOT)}
    with wandb_file.Server() as server:
        for key, value in (environment | {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.url}).items():
            monkeypatch.setenv(key, value)
        program = f"""
import os, time
from wandb.wandb_agent import Agent
os.environ["WANDB_SWEEP_ID"] = "sweep1"
agent = Agent(None, None, sweep_id="sweep1")
agent._sweep_command = {study["command"]!r}
values = {{"method.norm": 0.5, "data": "folder", "data.root": {str(root)!r}, "data.category": "bottle",
          "data.image_size": 32, "backbone.weights": "none", "trainer.max_steps": 5, "hardware": "cpu"}}
agent._command_run({{"program": {study["program"]!r}, "run_id": "given123",
                    "args": {{key: {{"value": value}} for key, value in values.items()}}}})
raise SystemExit(agent._run_processes["given123"].wait())
"""
        outcome = runs.python("-c", program, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    ((name, run),) = server.runs.items()
    assert (name, run["given"]["sweep"]) == ("given123", "sweep1")
    assert not run["given"].get("groupName")
    stored = results.read_result(tmp_path / "outputs" / "wandb" / "sweep1" / "given123")
    assert run["summary"]["validation"]["image_auroc"] == stored["validation"]["image_auroc"]
    assert json.loads(run["given"]["config"])["method"]["value"]["norm"] == 0.5


@pytest.mark.slow
def test_several_ranks_are_one_run(root, tmp_path):
    options = ("hardware=ddp", "hardware.accelerator=cpu", "hardware.devices=2", "hardware.precision=32")
    small = ("backbone=resnet18", "backbone.weights=none", "data.image_size=32", "data.batch_size=4")
    outcome = runs.python(
        "-m", "anomalib_lite.train", "method=norm_occ", "trainer.max_epochs=1", *options, *small,
        *runs.folder_data(root), f"hydra.run.dir={tmp_path / 'run'}", cwd=runs.ROOT,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    (folder,) = wandb_file.folders(tmp_path / "run")
    assert "metrics" in wandb_file.read(folder)["summary"]


@pytest.mark.slow
def test_jobs_of_a_sweep(root, tmp_path):
    """Forks of one process at the same time: each has its pictures, and no process or temporary folder remains."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    outcome = runs.python(
        "-m", "anomalib_lite.train", *runs.defaults("logger"), "-m", "logger=default", "method=norm_occ_closed_form",
        *runs.folder_data(root), "seed=0,1,2,3", f"hydra.sweep.dir={tmp_path / 'jobs'}", "hydra.launcher.jobs=2",
        cwd=runs.ROOT, TMPDIR=str(temporary),
    )  # fmt: skip
    assert outcome.code == 0, outcome.out + outcome.err
    for n in range(4):
        (folder,) = wandb_file.folders(tmp_path / "jobs" / str(n))
        made = wandb_file.read(folder)
        assert made["run"].run_group == "jobs"
        names = made["history"][-1]["cases/bottle"]["filenames"]
        assert names
        assert all((folder / "files" / name).is_file() for name in names)
    assert not list(temporary.glob("*wandb*"))
    commands = [file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline")] if sys.platform == "linux" else []
    assert not [command for command in commands if b"wandb-core" in command and str(tmp_path).encode() in command]

"""Variables that a launcher of ranks has left in the environment of a shell, a container or a notebook."""

import json
import os

import pytest
from lightning.pytorch.utilities import rank_zero_only

from anomalib_lite.errors import UserError
from anomalib_lite.runs import ranks
from anomalib_lite.runs.load import load_run
from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NNODES": "1"}
LEFT = [
    {"RANK": "1"},
    {"LOCAL_RANK": "1"},
    {"NODE_RANK": "1", "GROUP_RANK": "1"},
    {"WORLD_SIZE": "2", "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "1"},
    {name: TORCHRUN[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")},
    {"TORCHELASTIC_RUN_ID": "none"},
    {"RANK": "", "LOCAL_RANK": "x"},
    SLURM,
    SLURM | {"SLURM_JOB_NAME": "interactive", "SLURM_STEP_ID": "0"},
    SLURM | {"SLURM_STEP_ID": "0", "SLURM_PTY_PORT": "40000", "RANK": "2"},
    {"KUBERNETES_PORT": "1", "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "1"},
    {"JSM_NAMESPACE_RANK": "1", "LSB_JOBID": "1"},
]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in list(os.environ):
        if name in ranks.VARIABLES or name.startswith("SLURM_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_mvtec(tmp_path_factory.mktemp("data"), train=5, good=2, defects={"broken": 2}).parent


def small(root) -> list[str]:
    return [*runs.folder_data(root), "backbone.name=test_resnet.r160_in1k"]


@pytest.fixture(scope="module")
def expected(root, tmp_path_factory):
    """The scores of both seeds without such variables."""
    found = []
    for seed in (1, 2):
        run = tmp_path_factory.mktemp("clean") / "run"
        runs.result_of(*small(root), f"seed={seed}", run_dir=run)
        found.append((run / "scores.csv").read_bytes())
    assert found[0] != found[1]
    return found


@pytest.mark.parametrize("left", LEFT, ids=lambda left: "+".join(left))
def test_variables_of_another_launch_are_removed(left, monkeypatch):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert ranks.settle(hardware())
    assert not set(ranks.VARIABLES) & os.environ.keys()


@pytest.mark.parametrize(
    "left",
    [*LEFT[:2], *(left for left in LEFT if not left.keys() <= set(ranks.VARIABLES))],
    ids=lambda left: "+".join(left),
)
def test_one_device_is_rank_0(left, root, expected, tmp_path, monkeypatch):
    """Train does what it does without the variables; so do evaluate and predict, and another seed is refused. load_run
    leaves them to its caller, which may be a rank of another training.
    """
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    runs.result_of(*small(root), "seed=1", run_dir=run)
    assert (run / "scores.csv").read_bytes() == expected[0]
    assert {".hydra", "metrics.csv", "checkpoints"} <= {each.name for each in run.iterdir()}
    assert json.loads((run / "checkpoints" / "config.json").read_text())["config"]["seed"] == 1
    if left in LEFT[:2]:
        again = runs.train(*small(root), "seed=2", f"hydra.run.dir={run}")
        assert (again.code, again.err.count("\n")) == (2, 1)
        assert runs.evaluate(f"run={run}", f"output={tmp_path / 'again'}").code == 0
        assert (tmp_path / "again" / "scores.csv").read_bytes() == expected[0]
        outcome = runs.predict(f"run={run}", f"input={root / 'bottle' / 'test'}", f"output={tmp_path / 'new'}")
        assert outcome.code == 0, outcome.err
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        with runs.restored():
            os.environ.update(TORCHRUN)
            load_run(run)
            assert os.environ.items() >= TORCHRUN.items()
        assert rank_zero_only.rank == 1  # type: ignore[attr-defined]


def hardware(devices=1, nodes=1, **more):
    return {"accelerator": "cpu", "devices": devices, "nodes": nodes, **more}


@pytest.mark.parametrize(
    ("wanted", "environment", "first"),
    [
        (hardware(2), {"RANK": "1", "NODE_RANK": "1", "MASTER_ADDR": "10.255.255.1"}, True),  # it starts the others
        (hardware(2), {"LOCAL_RANK": "1", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "0"}, False),
        (hardware(2), {"LOCAL_RANK": "0", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "1"}, True),
        (hardware(2), TORCHRUN, False),
        (hardware(2), TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}, True),
        (hardware(1, 2), {"NODE_RANK": "1", "RANK": "0", "MASTER_ADDR": "host", "MASTER_PORT": "1"}, False),
        (hardware(1, 2), {"NODE_RANK": "0", "RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "1"}, True),
        (hardware(1, 2), TORCHRUN | {"LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),
        (hardware(4, ranks="slurm"), SLURM | {"SLURM_STEP_ID": "0", "RANK": "0"}, False),
        (hardware(4, ranks="slurm"), SLURM | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "LOCAL_RANK": "1"}, True),
        (hardware(1, ranks="slurm"), SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, True),  # a script of one task
        (hardware("auto"), {"RANK": "1"}, True),
    ],
)
def test_ranks_of_real_launchers(wanted, environment, first, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranks.settle(wanted) == first


@pytest.mark.parametrize(
    ("wanted", "environment", "message"),
    [
        (hardware(1), TORCHRUN, "hardware.devices=1: torchrun has started WORLD_SIZE=2 ranks"),
        (hardware(2), TORCHRUN | {"WORLD_SIZE": "4"}, "hardware.devices=2: torchrun has started WORLD_SIZE=4 ranks"),
        (hardware(2), {"LOCAL_RANK": "1"}, "hardware.devices=2: the environment has LOCAL_RANK=1"),
        (hardware(2), {"LOCAL_RANK": "3", "MASTER_PORT": "1"}, "hardware.devices=2: the environment has LOCAL_RANK=3"),
        (hardware(2), {"LOCAL_RANK": "1", "MASTER_PORT": "1", "WORLD_SIZE": "8"}, "has LOCAL_RANK=1 of another launch"),
    ],
)
def test_ranks_that_do_not_fit(wanted, environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        ranks.settle(wanted)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"SLURM_STEP_ID": "4294967290"},
        {"SLURM_STEP_ID": "0", "SLURM_PTY_PORT": "40000"},
        {"SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "bash"},
    ],
)
def test_a_batch_script_without_srun_is_refused(more, monkeypatch):
    """It would wait for ranks that do not exist. Of a shell within SLURM the same holds."""
    for name, value in (SLURM | {"SLURM_PROCID": "0"} | more).items():
        monkeypatch.setenv(name, value)
    wanted = hardware("auto", ranks="slurm")
    assert not ranks.under_slurm(wanted)
    with pytest.raises(UserError, match=r"hardware=slurm: SLURM has reserved 4 tasks, .* start it with srun"):
        ranks.check(wanted, None)


def test_two_steps_of_a_job_have_two_ports(monkeypatch):
    ports = set()
    for job, step in (("1234567", "0"), ("1234567", "1"), ("1234568", "0"), ("1244567", "0")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_STEP_ID", step)
        ports.add(ranks.slurm_port())
    assert len(ports) == 4
    assert all(10000 <= port < 30000 for port in ports)

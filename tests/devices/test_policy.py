"""What a run asks of its device: determinism, TF32, threads; and that its cost is measured there."""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from anomalib_lite.cli import signals
from anomalib_lite.data import loader
from anomalib_lite.errors import UserError
from anomalib_lite.features.cache import key
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.runs import build, devices, extras, summary
from anomalib_lite.runs import run as run_module
from anomalib_lite.runs.callbacks import Training
from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec

HARDWARE = {
    "accelerator": "auto", "devices": 1, "nodes": 1, "precision": "auto", "deterministic": "auto", "threads": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _restored():
    """Settings of the process that these tests change."""
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with runs.restored():
        yield
    torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that there are four GPUs beside 64 cores."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.init", lambda: None)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.setattr("anomalib_lite.data.cores.cores", lambda: 64)
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    devices._own = None


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_mvtec(tmp_path_factory.mktemp("data"), train=6, good=2, defects={"broken": 2}).parent


def small(root: Path) -> list[str]:
    return [*runs.folder_data(root), "backbone.name=test_resnet.r160_in1k"]


def options(**changes: Any) -> dict[str, Any]:
    return devices.lightning_options(HARDWARE | changes, multirun=False)


# --- what is refused ---


def too_old() -> None:
    raise RuntimeError("The NVIDIA driver on your system\nis too old (found version 11040).")


def test_a_gpu_that_cannot_be_used(gpus, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **given: given["including_emulation"])
    options(accelerator="auto")
    with pytest.raises(UserError, match=r"^hardware\.precision=bf16: this GPU does not compute in bf16; choose auto"):
        options(precision="bf16")
    options(precision="bf16", accelerator="cpu")
    monkeypatch.setattr("torch.cuda.init", too_old)
    with pytest.raises(UserError, match=r"system is too old \(found version 11040\)\.\); .* choose hardware=cpu$"):
        options(accelerator="auto")
    options(accelerator="cpu")


def test_ranks_wait_for_a_long_coreset(gpus):
    assert options(devices=2)["strategy"]._timeout.total_seconds() == 24 * 3600


# --- determinism ---


@pytest.mark.parametrize(
    ("wanted", "on_cpu", "on_gpu"),
    [
        ("auto", ("warn", False), (False, True)),
        (True, (True, False), (True, False)),
        (False, (False,) * 2, (False, True)),
    ],
)
def test_determinism_that_the_trainer_gets(wanted, on_cpu, on_gpu, gpus):
    for accelerator, expected in (("cpu", on_cpu), ("gpu", on_gpu)):
        given = options(accelerator=accelerator, deterministic=wanted)
        assert (given["deterministic"], given["benchmark"]) == expected


def test_memory_is_not_filled(tmp_path):
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    build.make_trainer(options(accelerator="cpu"), tmp_path, [], [], 1)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [1, 2])
def test_checkpoints_need_no_temporary_files(count, tmp_path, monkeypatch):
    """Their folder may be small or full; here it does not exist."""
    trainer = build.make_trainer(options(accelerator="cpu", devices=count), tmp_path, [], [], 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    trainer.strategy.checkpoint_io.save_checkpoint({"weight": torch.ones(3)}, tmp_path / "last.part")
    assert torch.load(tmp_path / "last.part", weights_only=True)["weight"].sum() == 3


@pytest.mark.parametrize("method", ["norm_occ", "uniad"])
def test_a_deterministic_run(method, root, tmp_path):
    """An operation without a deterministic version would end the run."""
    seen = []

    def note(*_: Any) -> None:
        seen.append(
            (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
        )

    given = (*runs.method(method), *small(root), "data.image_size=48", "hardware.deterministic=true")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnomalyModule, "on_test_start", note, raising=False)
        result = runs.result_of(*given, run_dir=tmp_path)
    assert seen == [(True, False)]
    assert result["environment"]["deterministic"] is True


def test_determinism_is_recorded(root, tmp_path):
    given = (*small(root), "hardware.deterministic=false")
    assert runs.result_of(*given, run_dir=tmp_path)["environment"]["deterministic"] is False


# --- TF32 ---


class OnGPU(AnomalyModule):
    device = torch.device("cuda")

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)


def tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("precision", "expected"), [("auto", True), ("bf16", True), (32, False)])
def test_tf32_is_for_training_alone(precision, expected, gpus, tmp_path):
    devices.allow_tf32(True)
    options(accelerator="gpu")
    assert tf32() == (False, False)
    cfg = {"seed": 0, "trainer": {"log_every": 1, "checkpoint_minutes": 1}, "hardware": {"precision": precision}}
    training: Any = Training(cfg, tmp_path / "last.ckpt", 1)
    trainer, module = SimpleNamespace(datamodule=SimpleNamespace(val_samples=[]), is_global_zero=False), OnGPU()
    try:
        training.on_train_start(trainer, module)
        assert tf32() == (expected, expected)
        training.on_train_end(trainer, module)
        assert tf32() == (False, False)
    finally:
        signals.release(silently=True)


def test_what_the_result_says_of_tf32(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: False)
    model: Any = SimpleNamespace(backbone=None, autocasted=False, total_steps=4)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert summary.precision("auto", model, gpu) == "float32, TF32 in training"
    assert summary.precision("bf16", model, gpu) == "bf16, TF32 in training"
    assert summary.precision(32, model, gpu) == "float32"
    assert [summary.precision(wanted, model, cpu) for wanted in ("auto", 32, "bf16")] == ["float32", "float32", "bf16"]
    model.total_steps = 0  # a closed form
    assert summary.precision("auto", model, gpu) == "float32"


def test_the_key_of_features_on_a_gpu(monkeypatch):
    """Those of a CPU keep their key, so that stored files stay valid."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "card")
    backbone: Any = SimpleNamespace(
        net=nn.Linear(1, 1), norm=False, tokens=0, name="net", layers=[1], low_precision=lambda device: False
    )
    pipeline: Any = SimpleNamespace(description=lambda: "as in test")
    on_gpu, on_cpu = (key(backbone, pipeline, torch.device(name), "auto") for name in ("cuda", "cpu"))
    assert on_gpu["float32"] == "ieee"
    assert set(on_gpu) - set(on_cpu) == {"float32", "batch"}


# --- threads ---


@pytest.mark.parametrize(
    ("accelerator", "ranks", "expected", "workers"), [("gpu", 1, 16, 8), ("gpu", 4, 16, 8), ("cpu", 1, 64, 8)]
)
def test_threads(accelerator, ranks, expected, workers, gpus):
    """A rank beside a GPU takes its share of the cores, up to 16; a rank that another one has started does as well."""
    options(accelerator=accelerator, devices=ranks)
    assert loader.threads() == expected
    assert loader.worker_count("auto") == workers
    devices._own = None  # as in a process that has inherited OMP_NUM_THREADS
    options(accelerator=accelerator, devices=ranks)
    assert loader.threads() == expected


def test_threads_of_a_small_share(gpus, monkeypatch):
    monkeypatch.setattr("anomalib_lite.data.cores.cores", lambda: 12)
    options(accelerator="gpu", devices=4)
    assert (loader.threads(), loader.worker_count("auto"), loader.worker_count(5)) == (3, 2, 5)
    monkeypatch.setattr("anomalib_lite.runs.ranks.under_slurm", lambda hardware: True)
    monkeypatch.setattr("anomalib_lite.runs.ranks.slurm_tasks", lambda hardware: 4)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "7")
    options(accelerator="gpu", devices=4)
    assert loader.threads() == 7


# --- cost and figures ---


def test_cost_and_figures_are_made_on_the_runs_device(root, tmp_path, monkeypatch):
    """Lightning moves the method to the CPU after the test. Here "cpu:0" stands for the run's GPU."""
    asked, seen = [], dict[str, str]()
    original: Any = run_module.write_with_extras

    def elsewhere(*given: Any) -> None:
        asked.append(given[6])
        original(*given[:6], torch.device("cpu", 0), *given[7:])

    def note(name: str, at: int) -> Any:
        return lambda *given: seen.update({name: str(given[at].device)})

    monkeypatch.setattr(run_module, "write_with_extras", elsewhere)
    for name, at in (("measure_cost", 0), ("write_figures", -1), ("training_figure", -1)):
        monkeypatch.setattr(extras, name, note(name, at))
    given = (*small(root), "hardware.measure_cost=true")
    runs.result_of(*given, run_dir=tmp_path / "run")
    assert asked == [torch.device("cpu")]
    assert seen == dict.fromkeys(("measure_cost", "write_figures", "training_figure"), "cpu:0")


def test_the_device_of_the_cost_is_stored(root, tmp_path: Path):
    timing = runs.result_of(*small(root), "hardware.measure_cost=true", run_dir=tmp_path / "run")["timing"]
    assert timing["device"].startswith("CPU (")
    assert timing["latency_ms"] > 0

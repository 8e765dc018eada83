"""CPU threads on a shared machine: the affinity, quotas of containers as the kernel writes them, OMP_NUM_THREADS."""

import os
import pwd
from pathlib import Path

import pytest
import torch

from anomalib_lite import paths
from anomalib_lite.data import cores
from anomalib_lite.runs.devices import lightning_options
from tests.helpers.run_programs import restored

V2, V1 = "0::/{}\n", "3:cpuset:/\n2:cpu,cpuacct:/{}\n0::/\n"
HARDWARE = {"accelerator": "cpu", "devices": 1, "nodes": 1, "precision": 32}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """64 cores, none of them reserved."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Writes the control groups' files."""
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(cores, "OWN_CGROUPS", tmp_path / "own")

    def write(own: str, files: dict[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            file = tmp_path / "fs" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    return write


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        (V2.format(""), {}, 64),
        (V2.format(""), {"cpu.max": "max 100000\n"}, 64),
        (V2.format(""), {"cpu.max": "200000 100000\n"}, 2),  # docker --cpus=2
        (V2.format(""), {"cpu.max": "50000 100000\n"}, 1),
        (V2.format(""), {"cpu.max": "150000 100000\n"}, 2),
        (V2.format("pod/box"), {"pod/cpu.max": "300000 100000\n", "pod/box/cpu.max": "max 100000\n"}, 3),
        (V2.format("pod/box"), {"pod/cpu.max": "300000 100000\n", "pod/box/cpu.max": "20000 10000\n"}, 2),
        (V2.format("../../elsewhere"), {"cpu.max": "400000 100000\n"}, 4),  # seen from within a name space
        (V1.format("docker/1"), {"cpu,cpuacct/docker/1/cpu.cfs_quota_us": "-1\n"}, 64),
        (V1.format("docker/1"), {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        (
            V1.format("d"),
            {"cpu,cpuacct/d/cpu.cfs_quota_us": "70000\n", "cpu,cpuacct/d/cpu.cfs_period_us": "10000\n"},
            7,
        ),
        ("", {"cpu.max": "100000 100000"}, 64),
        (V2.format(""), {"cpu.max": "nonsense\n"}, 64),
        (V2.format(""), {"cpu.max": "9900000 100000\n"}, 64),  # more than there are
    ],
)
def test_quotas(own, files, expected, cgroups):
    cgroups(own, files)
    assert cores.threads() == cores.cores() == expected


@pytest.mark.parametrize(
    ("given", "expected"), [("3", 3), ("3,2", 3), (" 3 ", 3), ("", 8), ("many", 8), ("0", 8), ("99", 8)]
)
def test_the_smallest_counts(given, expected, cgroups, monkeypatch):
    cgroups(V2.format(""), {"cpu.max": "1000000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert cores.threads() == expected
    assert cores.cores() == 8


def test_a_run_sets_its_threads(cgroups, monkeypatch):
    """hardware.threads counts for all that a run starts; the next run of the process is free of it."""
    cgroups(V2.format(""), {"cpu.max": "300000 100000"})
    with restored():
        for wanted, expected in ((None, 3), (2, 2), (None, 3), (5, 5)):
            lightning_options(HARDWARE | {"threads": wanted}, multirun=False)
            assert torch.get_num_threads() == expected
            assert cores.threads() == min(expected, 3)
        os.environ["OMP_NUM_THREADS"] = "1"  # given anew
        lightning_options(HARDWARE | {"threads": None}, multirun=False)
        assert torch.get_num_threads() == 1


def test_a_user_without_a_home(tmp_path, monkeypatch):
    """As with docker --user: no passwd entry and no HOME, or the HOME / where the user may not write."""
    monkeypatch.delenv("ANOMALIB_LITE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.cache_folder() == tmp_path / ".cache" / "anomalib_lite"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert paths.cache_folder().name == f"anomalib_lite-{os.getuid()}"
    monkeypatch.undo()
    monkeypatch.delenv("ANOMALIB_LITE_CACHE", raising=False)
    monkeypatch.delenv("HOME")

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError):
        Path.home()
    assert os.access(paths.cache_folder().parent, os.W_OK)
    monkeypatch.setenv("ANOMALIB_LITE_CACHE", str(tmp_path / "given"))
    assert paths.cache_folder() == tmp_path / "given"

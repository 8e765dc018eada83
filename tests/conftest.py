import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile

import pytest

# Before torch is imported: waiting threads of OpenMP otherwise spin, and beside other work on the same cores a small
# convolution takes a hundred times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A worker of pytest-xdist has one core for itself. On images of 32 pixels, two threads only wait for each other: they
# took a third more of the processor's time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# What runs share (synthetic images, features of frozen backbones) lies in a folder of this session.
if "ANOMALIB_LITE_CACHE" not in os.environ:
    os.environ["ANOMALIB_LITE_CACHE"] = tempfile.mkdtemp(prefix="anomalib_lite_cache_")
    atexit.register(shutil.rmtree, os.environ["ANOMALIB_LITE_CACHE"], ignore_errors=True)


# A background job of a shell starts with SIGINT ignored. Tests of Ctrl-C would then wait forever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """The objects of the imports stay, so the garbage collector leaves them out: it then searches half as many."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _hydra_reads_each_file_once():
    from tests.helpers.hydra_files import read_once

    with read_once():
        yield


@pytest.fixture(scope="session", autouse=True)
def _torch_waits_less_for_workers():
    """After an error torch waits up to five seconds for each worker process of a loader before it terminates it.

    Tests that import torch have imported it here, when all of them are collected. It is not imported for the others.
    """
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules:
            patch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)
        yield


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a run as the program leaves it: the written runs are copies of it."""
    from tests.helpers.written_runs import real_run

    return real_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a small run, for tests that predict with it and leave it as it is."""
    from tests.helpers.image_trees import make_mvtec
    from tests.helpers.run_programs import folder_data, result_of

    run = tmp_path_factory.mktemp("trained") / "run"
    make_mvtec(run.parent / "data")
    result_of(*folder_data(run.parent / "data"), run_dir=run)
    return run


@pytest.fixture
def write(finished_run, tmp_path):
    """Writes runs with chosen numbers into tmp_path/runs: see tests/helpers/written_runs.py."""
    from tests.helpers.written_runs import Writer

    return Writer(finished_run, tmp_path / "runs")

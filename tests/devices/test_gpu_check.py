"""`make gpu-check`: its script on a CPU, and without a GPU."""

import pytest
import torch

from tests.benchmarks import gpu_check, gpu_correct
from tests.helpers import run_programs as runs


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert gpu_check.main([]) == 0
    assert "no GPU is visible" in capsys.readouterr().out


def test_a_page_of_one_method(tmp_path, capsys):
    """All parts run, with a CPU in the place of the GPU."""
    file = tmp_path / "page.md"
    assert gpu_check.main(["--device", "cpu", "--small", "--methods", "norm_occ", "--output", str(file)]) == 0
    page = file.read_text()
    assert "| norm_occ | 0.0e+00 | equal | equal |" in page
    assert page.count("| norm_occ |") == 4  # right, ranks, speed, features
    assert "FAILED" not in page
    assert page.rstrip().endswith("Every row passed.")
    assert not torch.distributed.is_initialized()


def test_several_gpus_are_ranks_of_another_process(tmp_path, monkeypatch):
    """Lightning would start this process's own command as rank 1."""
    started: list[tuple[str, ...]] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    monkeypatch.setattr(gpu_correct, "assert_close", lambda *_: None)
    monkeypatch.setattr(runs, "train", lambda *_: runs.Outcome(0, "", ""))
    monkeypatch.setattr(runs, "python", lambda *given, cwd: started.append(given) or runs.Outcome(0, "", ""))  # type: ignore[func-returns-value]
    assert gpu_correct.Checks(tmp_path, "gpu").ranks("norm_occ")["all cards"] == "equal"
    assert started[0][:2] == ("-m", "anomalib_lite.train")
    assert {"hardware=ddp", "hardware.devices=2"} < set(started[0])


def test_a_row_that_fails_is_counted(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of\nmemory")

    page = gpu_check.Page(60)
    page.table("Title", ["a", "b"], lambda name: fail() if name == "a" else {"x": "FAILED"})
    assert page.failed == 2
    assert "| a | RuntimeError: out of memory |" in page.lines
    late = gpu_check.Page(-1)
    late.table("Title", ["a"], fail)
    assert late.lines[-1] == "No time was left for: a."


@pytest.mark.parametrize(("option", "name"), [("--methods", "norm_oc"), ("--parts", "fast")])
def test_unknown_names_are_refused(capsys, option, name):
    with pytest.raises(SystemExit) as end:
        gpu_check.main([option, name])
    assert end.value.code == 2
    assert f"{option}: there is no {name}; there are" in capsys.readouterr().err

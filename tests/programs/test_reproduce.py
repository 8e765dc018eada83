"""experiments/reproduce.py: which studies run, with which arguments, and the estimate of their time."""

import signal
import sys
from pathlib import Path

import pytest

from anomalib_lite.comparison.published import read
from experiments import reproduce

ENTRIES = {" ".join([entry.method, entry.dataset, *entry.overrides]): entry for entry in read(reproduce.FILE)}


def study(name: str, root: Path, *categories: str) -> reproduce.Study:
    return reproduce.Study(ENTRIES[name], root, list(categories), root / "output", [])


def test_ctrl_c_waits_for_the_sweep(tmp_path, monkeypatch):
    """The sweep may take seconds to write its checkpoints."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nsleep 0.8\ntouch '{tmp_path}/ended'\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(SystemExit) as end:
            study("recontrast mvtec", tmp_path, "bottle").run()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert end.value.code == 130
    assert (tmp_path / "ended").exists()

"""Runs as version 0.1 left them (tests/data/run_before): predicted, evaluated, resumed and compared by this one.

`finished` is norm_occ on timm's test_resnet with random weights; `interrupted` is ssae after 4 of 7 batches, and
`uninterrupted` holds what the same version made of the same command without an interruption.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anomalib_lite.compare import main as compare
from tests.helpers import run_programs
from tests.helpers.run_programs import evaluate, predict, train

BEFORE = Path(__file__).resolve().parents[1] / "data" / "run_before"
ROOT = f"data.root={BEFORE / 'data'}"


@pytest.fixture
def run(request, tmp_path) -> Path:
    """A copy of one of the runs."""
    return shutil.copytree(BEFORE / request.param, tmp_path / request.param)


scores_of = partial(run_programs.scores_of, below="bottle/test/")


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


finished = pytest.mark.parametrize("run", ["finished"], indirect=True)
interrupted = pytest.mark.parametrize("run", ["interrupted"], indirect=True)


@finished
def test_predict(run, tmp_path):
    given = (f"run={run}", f"input={BEFORE / 'data' / 'bottle' / 'test'}", f"output={tmp_path / 'out'}", "precision=32")
    outcome = predict(*given)  # in float32, as then: this machine may compute in bf16
    assert (outcome.code, outcome.err) == (0, "")
    assert "note:" not in outcome.out
    assert scores_of(tmp_path / "out") == pytest.approx(scores_of(run), rel=1e-5)


@finished
def test_evaluate(run, tmp_path):
    outcome = evaluate(f"run={run}", f"output={tmp_path / 'out'}", ROOT, "hardware.precision=32")
    assert (outcome.code, outcome.err) == (0, "")
    assert "the run was tested in" not in outcome.out
    first, again = result_of(run), result_of(tmp_path / "out")
    assert scores_of(tmp_path / "out") == pytest.approx(scores_of(run), rel=1e-5)
    assert {key: again["metrics"][key] for key in first["metrics"]} == pytest.approx(first["metrics"], abs=1e-6)
    assert again["metrics"].keys() - first["metrics"] == {"aupimo", "pixel_iou", "pixel_dice"}  # metrics since then
    for key in ("data", "protocol", "split", "backbone", "seed"):
        assert again[key] == first[key], key


@finished
def test_evaluate_a_run_whose_test_was_killed(run, tmp_path):
    (run / "result.json").unlink()
    outcome = evaluate(f"run={run}", f"output={tmp_path / 'out'}", ROOT)
    assert (outcome.code, outcome.err) == (0, "")
    assert "the run was tested in" not in outcome.out
    assert result_of(tmp_path / "out")["metrics"]["image_auroc"] is not None


@finished
def test_another_precision_is_noted(run, tmp_path):
    """As on a machine that computes in bf16, or does not, where the run's own did the opposite."""
    note = "note: the run was tested in float32, and this is bf16: scores differ in their third or fourth digit; "
    (tmp_path / "in").mkdir()
    shutil.copy(BEFORE / "data" / "bottle" / "test" / "good" / "001.png", tmp_path / "in")
    outcome = predict(f"run={run}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "precision=bf16")
    assert (outcome.code, outcome.err) == (0, "")
    assert note + "precision=32 and precision=bf16 choose one\n" in outcome.out
    expected = scores_of(run)["good/001.png"]
    assert 0 < abs(scores_of(tmp_path / "out")["001.png"] - expected) < 0.01 * expected
    outcome = evaluate(f"run={run}", f"output={tmp_path / 'again'}", ROOT, "hardware.precision=bf16")
    assert (outcome.code, outcome.err) == (0, "")
    assert note + "hardware.precision=32 and bf16 choose one\n" in outcome.out
    outcome = predict(f"run={run}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'none'}", "precision=16")
    assert (outcome.code, outcome.err) == (2, "error: precision=16: choose auto, 32 or bf16\n")


@finished
def test_resume_a_finished_run(run):
    before = (run / "result.json").read_bytes()
    outcome = train("resume=true", f"hydra.run.dir={run}", small=False)
    assert (outcome.code, outcome.err) == (0, "")
    assert "this run is finished" in outcome.out
    assert (run / "result.json").read_bytes() == before


@interrupted
@pytest.mark.parametrize("whole", [False, True])
def test_resume_an_interrupted_run(run, whole, tmp_path):
    """Alone, or with the command line of then in today's words; an exact continuation, up to another CPU's rounding:
    a batch more or less would move every weight by about 1e-4."""
    line = [
        "data=folder", "data.category=bottle", "hardware=cpu", "logger=csv", "data.batch_size=4", "method=ssae",
        "method.width=4", "method.eval_every=2", "method.patience=9", "data.val_fraction=0.25", "data.image_size=32",
        "trainer.max_steps=7", "trainer.log_every=1", "trainer.checkpoint_minutes=0",
        "method.noise=0.0", "method.input_skip=false", "method.calibrate=false",  # defaults have changed since then
    ]  # fmt: skip
    here = (ROOT, "resume=true", f"hydra.run.dir={run}", "hardware.precision=32")
    outcome = train(*(line if whole else []), *here, small=False)
    assert (outcome.code, outcome.err) == (0, "")
    expected = load_file(BEFORE / "uninterrupted" / "weights.safetensors")
    found = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].double() - tensor.double()).abs().mean() < 2e-6, key
    first, again = result_of(BEFORE / "uninterrupted"), result_of(run)
    assert {key: again["metrics"][key] for key in first["metrics"]} == pytest.approx(first["metrics"], abs=1e-3)
    assert again["timing"]["steps"] == first["timing"]["steps"]
    assert scores_of(run) == pytest.approx(scores_of(BEFORE / "uninterrupted"), rel=1e-3)
    if not whole:
        assert "method=ssae" in again["overrides"]  # the command line of then stays known

    outcome = run_programs.run(compare, BEFORE / "finished", run)
    assert (outcome.code, outcome.err) == (0, "")
    assert {"norm_occ", "ssae"} <= set(outcome.out.split())

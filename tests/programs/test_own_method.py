"""A user's own method: its file is found again from another folder; one line names the switch of a missing key."""

import csv
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from anomalib_lite.errors import UserError
from anomalib_lite.runs import own_modules
from tests.helpers.image_trees import make_mvtec
from tests.helpers.run_programs import evaluate, folder_data, predict, train
from tests.programs.test_bad_input import assert_one_line, own_method


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root)
    return root


KEYS = {
    "image": ("training_step", "uses_images = False", r"batch\['image'\]: .*set uses_images = True"),
    "mask": ("anomaly_map", "uses_images = False", r"batch\['mask'\]: .*set uses_images = True"),
    "features": (
        "training_step",
        "frozen_features = False",
        r"batch\['features'\]: .*self\.features\(batch\).*frozen_",
    ),
    "clean": ("training_step", "uses_images = True", r"batch\['clean'\]: .*give data\.corrupt"),
    "img": (
        "training_step",
        "uses_images = True",
        r"batch\['img'\]: no such key; this batch has category, features, im",
    ),
}


@pytest.mark.parametrize("key", KEYS)
def test_own_method_that_reads_a_missing_key(key, data, own_folder):
    place, switch, pattern = KEYS[key]
    code = f"""from anomalib_lite.methods.norm_occ import NormOCC\n\n
class Mine(NormOCC):
    {switch}
    def {place}(self, batch, *args):
        batch["{key}"]
        return super().{place}(batch, *args)
"""
    assert_one_line(train(*own_method(own_folder, code), *folder_data(data), "hydra.run.dir=run"), pattern)


BRIGHTNESS = """from anomalib_lite.methods.base import AnomalyModule\n\n
class Mine(AnomalyModule):
    def anomaly_map(self, batch):
        return batch["image"].mean(1)
"""


MINE = """import torch

from anomalib_lite.methods.base import AnomalyModule


class Mine(AnomalyModule):
    frozen_features = True

    def __init__(self, {arguments}):
        super().__init__({handed_on})
        self.net = torch.nn.Conv2d(self.backbone.channels[0], 4, 1)
        {construct}

    def training_step(self, batch, batch_idx):
        loss = self.anomaly_map(batch).mean()
        {step}
        return loss

    def anomaly_map(self, batch):
        return self.net(self.features(batch)[0]).square().sum(1)

    {more}
"""
CONTEXT = {"arguments": "**context", "handed_on": "**context", "construct": "pass", "step": "pass", "more": ""}
LOST = {
    "context": ({"handed_on": "backbone=context['backbone']"}, "hand image_size, test_size, .*steps, scoring on to"),
    "steps": (
        {"arguments": "backbone, scoring, image_size, test_size, optimizer, **context", "handed_on":
         "backbone, optimizer, scoring=scoring, image_size=image_size, test_size=test_size"},
        r"mine\.Mine: its constructor does not hand categories, steps on to AnomalyModule; write def __init__\(",
    ),
    "optimizer": (
        {"arguments": "optimizer, **context"},
        "method.optimizer: Mine would train without an optimizer, and its weights would stay as they are; configure",
    ),
    "optimizer of the configuration": ({}, "Mine would train without an optimizer"),
    "late buffer": (
        {"more": "def on_fit_start(self):\n        self.register_buffer('bank', torch.ones(3))"},
        r"Mine: the constructor does not make bank, so no checkpoint could be loaded; .*register_buffer\(NAME, torch",
    ),
    "object": (
        {"more": "def on_save_checkpoint(self, checkpoint):\n        checkpoint['net'] = self.net"},
        "Mine: its checkpoint holds an object of torch.nn.modules.conv.Conv2d; on_save_checkpoint and",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOST)
def test_a_method_whose_run_would_be_of_no_use(case, data, own_folder):
    """It would not be trained, would ignore options, or leave a checkpoint that no program loads: refused in a line."""
    changes, pattern = LOST[case]
    given = own_method(own_folder, MINE.format(**CONTEXT | changes))
    without = ["~method.optimizer"] * (case == "optimizer of the configuration")
    assert_one_line(train(*given, *folder_data(data), *without, "hydra.run.dir=run"), pattern)
    assert not (own_folder / "run" / "result.json").exists()


PARTS = {
    "no map": ("def anomaly_map(", "def anomaly_maps(", "Mine defines no anomaly_map; see", False),
    "no loss": ("return loss", "return None", "Mine.training_step has returned no loss, so nothing", False),
    "channels": (".sum(1)", ".sum(1, keepdim=True)", r"Mine.anomaly_map has returned a tensor \[.*, 1, .*\]; it", True),
    "scores": (".sum(1)", ".sum(1).mean((1, 2))", r"Mine.anomaly_map has returned a tensor \[\d+\]; it", True),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_method_with_a_wrong_part(case, data, own_folder):
    """A missing part is found before training, a wrong map once there is one."""
    old, new, pattern, trained = PARTS[case]
    code = MINE.format(**CONTEXT | {"step": "loss = self.net.weight.square().sum()"}).replace(old, new)
    assert code.count(new) == 1
    assert_one_line(train(*own_method(own_folder, code), *folder_data(data), "hydra.run.dir=run"), pattern)
    assert (own_folder / "run" / "checkpoints" / "last.ckpt").exists() == trained


def test_a_class_that_is_no_method(data, own_folder):
    given = own_method(own_folder, "class Mine:\n    def __init__(self, **context):\n        pass\n")
    assert_one_line(
        train(*given, *folder_data(data), "hydra.run.dir=run"), "mine.Mine: Mine is no AnomalyModule; derive"
    )


def test_hyperparameters_and_fitted_buffers_of_an_own_method(data, own_folder):
    """Its checkpoint can be loaded: without the objects of save_hyperparameters, with buffers of other shapes."""
    more = """def on_fit_start(self):
        means = torch.cat([self.features(batch)[0].mean((2, 3)) for batch in self.fit_batches()])
        self.bank, self.inner.means = means.mean(0), means.half()

    def score(self, batch):
        scored = super().score(batch)
        return scored | {"score": scored["score"] + self.bank.sum() + self.inner.means.float().sum()}
"""
    construct = """self.save_hyperparameters(ignore=["backbone"])
        self.register_buffer("bank", torch.empty(0))
        self.inner = torch.nn.Module()
        self.inner.register_buffer("means", torch.empty(0))
"""
    given = own_method(own_folder, MINE.format(**CONTEXT | {"construct": construct, "more": more}))
    assert train(*given, *folder_data(data), "hydra.run.dir=run").code == 0
    outcome = predict("run=run", f"input={data / 'bottle/test'}", "output=out")
    assert (outcome.code, outcome.err) == (0, "")
    scores = [sorted(float(row["score"]) for row in rows(f"{folder}/scores.csv")) for folder in ("run", "out")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_what_a_method_logs_is_in_the_rows_of_its_loss(data, own_folder):
    given = own_method(own_folder, MINE.format(**CONTEXT | {"step": "self.log('part', 2 * loss)"}))
    budget = ("trainer.max_epochs=null", "trainer.max_steps=7", "trainer.log_every=2")
    assert train(*given, *folder_data(data), *budget, "hydra.run.dir=run").code == 0
    logged = rows("run/metrics.csv")
    assert [row["step"] for row in logged] == ["1", "2", "4", "6", "7"]
    assert [float(row["part"]) for row in logged[1:]] == pytest.approx([2 * float(row["loss"]) for row in logged[1:]])


def test_a_module_that_has_changed_since_the_run(data, own_folder):
    """Every program that uses the run says so, and the result has the hash of the module."""
    given = [*own_method(own_folder, MINE.format(**CONTEXT)), *folder_data(data), "hydra.run.dir=run"]
    assert train(*given).code == 0
    used = json.loads((own_folder / "run" / "result.json").read_text())["environment"]["modules"]
    assert evaluate("run=run", "output=same").code == 0
    assert not [note for note in notes("same") if "the module" in note]
    (own_folder / "mine.py").write_text(MINE.format(**CONTEXT | {"step": "loss = 2 * loss"}))
    assert evaluate("run=run", "output=other").code == 0
    assert "the module mine is not as it was when the run was started" in notes("other")
    now = json.loads((own_folder / "other" / "result.json").read_text())["environment"]["modules"]
    assert used.keys() == now.keys() == {"mine"}
    assert used != now

    (own_folder / "run" / "result.json").unlink()  # as of a run that was killed in its test
    for _ in range(2):  # the hash of the start remains
        assert train("resume=true", "hydra.run.dir=run", small=False).code == 0
        assert "the module mine is not as it was when the run was started" in notes("run")
        (own_folder / "run" / "result.json").unlink()
    (own_folder / "run" / "checkpoints" / "last.ckpt").unlink()  # nothing of the earlier version remains
    assert train("resume=true", "hydra.run.dir=run", small=False).code == 0
    assert not [note for note in notes("run") if "the module" in note]


def notes(folder):
    return json.loads(Path(folder, "result.json").read_text())["notes"]


def rows(file):
    with Path(file).open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_a_run_of_an_own_method_resumes_from_another_folder(data, own_folder, tmp_path, monkeypatch):
    """Its configuration names the folder of the module, also afterwards."""
    run, smooth = tmp_path / "run", "scoring.pixel_smooth=null"
    given = [*own_method(tmp_path, BRIGHTNESS), *folder_data(data), "backbone=none", smooth, f"hydra.run.dir={run}"]
    outcome = train(*given)
    assert (outcome.code, outcome.err) == (0, "")
    before = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()  # as of a run that was killed in its test
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    sys.modules.pop("mine")
    outcome = train("resume=true", f"hydra.run.dir={run}", small=False)
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads((run / "result.json").read_text())["metrics"] == before["metrics"]
    assert json.loads((run / "checkpoints" / "config.json").read_text())["modules"] == {"mine": str(tmp_path)}


def test_the_folders_of_own_modules(tmp_path, monkeypatch):
    """Files, packages and folders without __init__.py are stored; what is installed or Python's own is not."""
    for name in ("own_file.py", "own_package/__init__.py", "own_folder/part.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    config = {
        "method": {"_target_": "own_file.A", "optimizer": {"_target_": "torch.optim.AdamW"}},
        "data": {"augment": [{"_target_": "own_package.B"}], "name": "own_file"},
        "logger": {"a": {"_target_": "own_folder.part.C"}, "b": {"_target_": "__main__.D"}},
        "other": [{"_target_": name} for name in ("builtins.dict", "json.loads", "no_such.E", "anomalib_lite.F", "")],
    }
    path = list(sys.path)
    monkeypatch.setattr(sys, "path", [*path, str(tmp_path)])
    stored = own_modules.places(config)
    assert stored == dict.fromkeys(("own_file", "own_package", "own_folder"), str(tmp_path))

    monkeypatch.setattr(sys, "path", list(path))
    with pytest.raises(UserError, match=r"^method\._target_=own_file\.A: the module own_file is not found; start in"):
        own_modules.make_importable(config, {})
    own_modules.make_importable(config, stored)
    assert sys.path == [*path, str(tmp_path)]


def test_the_hash_of_a_module(tmp_path, monkeypatch):
    """Of what Python imports: a package with all its files, a file rather than a folder without __init__.py."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    for name in ("own_package/__init__.py", "own_package/part/net.py", "own_file.py", "own_file/net.py", "own/net.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one = 1\n")
    config = {"list": [{"_target_": f"{name}.A"} for name in ("own_package", "own_file", "own.net")]}

    def hashes():
        own_modules.digest.cache_clear()
        return own_modules.digests(config)

    for name, other in (("own_package/part/net.py", "own_package"), ("own_file.py", "own_file"), ("own/net.py", "own")):
        before = hashes()
        (tmp_path / name).write_text("one = 2\n")
        (tmp_path / "own_file" / "net.py").write_text(f"one = '{name}'\n")
        assert {key for key, value in hashes().items() if before[key] != value} == {other}


def test_predict_without_the_method_file(data, own_folder, tmp_path, capfd):
    """Hydra's block about it, which would come more than once, is left out."""
    code = "from anomalib_lite.methods.padim import PaDiM\n\n\nclass Mine(PaDiM):\n    pass\n"
    assert train(*own_method(tmp_path, code), *folder_data(data), "hydra.run.dir=run").code == 0
    (tmp_path / "mine.py").write_text(code.replace("Mine", "MyMine"))
    sys.modules.pop("mine")
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    importlib.invalidate_caches()
    outcome = predict("run=run", f"input={data / 'bottle/test/good'}", "output=out")
    assert_one_line(outcome, r"mine.Mine: can't be imported \(mine has no Mine\); did you mean mine.MyMine\?")
    assert "Error getting" not in "".join(capfd.readouterr())

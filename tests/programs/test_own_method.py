"""A user's own method that reads what a batch does not hold: one line that names the switch."""

import importlib
import shutil
import sys

import pytest

from tests.helpers.image_trees import make_mvtec
from tests.helpers.run_programs import folder_data, predict, train
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
def test_own_method_that_reads_a_missing_key(key, data, tmp_path, monkeypatch):
    place, switch, pattern = KEYS[key]
    code = f"""from anomalib_lite.methods.norm_occ import NormOCC\n\n
class Mine(NormOCC):
    {switch}
    def {place}(self, batch, *args):
        batch["{key}"]
        return super().{place}(batch, *args)
"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert_one_line(train(*own_method(tmp_path, code), *folder_data(data), "hydra.run.dir=run"), pattern)
    monkeypatch.delitem(sys.modules, "mine", raising=False)


def test_predict_without_the_method_file(data, tmp_path, monkeypatch, capfd):
    """Hydra's block about it, which would come more than once, is left out."""
    code = "from anomalib_lite.methods.padim import PaDiM\n\n\nclass Mine(PaDiM):\n    pass\n"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert train(*own_method(tmp_path, code), *folder_data(data), "hydra.run.dir=run").code == 0
    (tmp_path / "mine.py").write_text(code.replace("Mine", "MyMine"))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    importlib.invalidate_caches()
    outcome = predict("run=run", f"input={data / 'bottle/test/good'}", "output=out")
    assert_one_line(outcome, r"mine.Mine: can't be imported \(mine has no Mine\); did you mean mine.MyMine\?")
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert "Error getting" not in "".join(capfd.readouterr())

"""With frozen features, what changes training images acts on training: augmentations, corruptions, crops."""

import shutil

import pytest
import timm
from safetensors.torch import save_file

from tests.helpers.image_trees import make_mvtec
from tests.helpers.interrupt import assert_same_run, interrupted_after
from tests.helpers.run_programs import folder_data, result_of, train

CORRUPT = "+data.corrupt={_target_: anomalib_lite.data.corruptions.corrupt, _partial_: true}"
CHANGES = {
    "augment": ["data.augment=[{_target_: albumentations.VerticalFlip, p: 1}]"],
    "corrupt": [CORRUPT.lstrip("+")],
    "crops": ["data.treatment=texture", "data.texture_size=48"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, "bottle", train=5, good=2, defects={"broken": 2}, size=48)
    return root


@pytest.fixture(scope="module")
def scores(root, tmp_path_factory):
    """Image scores of a run with some changes, from a cache of their own that all runs share."""
    place = tmp_path_factory.mktemp("runs")

    def run(method: str, *options: str) -> bytes:
        folder = place / str(len(list(place.iterdir())))
        common = [*folder_data(root), f"method={method}", f"cache.folder={place / 'cache'}"]
        result_of(*common, *options, run_dir=folder)
        return (folder / "scores.csv").read_bytes()

    return run


@pytest.mark.parametrize("method", ["norm_occ", "patchcore"])
def test_changes_of_training_images_act(method, scores):
    """Crops of 32² are compared with whole images of 48², the size of both tests."""
    plain = {size: scores(method, f"data.image_size={size}") for size in (32, 48)}
    assert scores(method, "data.image_size=32") == plain[32]  # runs repeat
    for change, options in CHANGES.items():
        assert scores(method, "data.image_size=32", *options) != plain[48 if change == "crops" else 32], change


@pytest.mark.parametrize("cache", ["true", "false"])
def test_a_resumed_run_computes_features_with_its_backbone(cache, root, tmp_path):
    """The weights file is not read again: the checkpoint has the backbone, before features are computed."""
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet.r160_in1k", pretrained=False).state_dict(), weights)
    options = [*folder_data(root), "method=norm_occ", "trainer.max_epochs=2", f"backbone.weights={weights}"]
    options += ["trainer.checkpoint_minutes=0", "trainer.log_every=1"]
    for name, stop in (("whole", None), ("resumed", 2)):
        more = [f"cache.enabled={cache}", f"cache.folder={tmp_path / name / 'cache'}"]
        if stop:
            with interrupted_after(stop):
                train(*options, *more, f"hydra.run.dir={tmp_path / name}")
            shutil.rmtree(tmp_path / name / "cache", ignore_errors=True)
            more.append("resume=true")
        result_of(*options, *more, run_dir=tmp_path / name)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_a_method_of_ones_own_may_look_at_images(root, tmp_path, monkeypatch):
    """frozen_features = True alone gives `image` beside the stored features, as the README's example has it."""
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "looks.py").write_text(
        "from anomalib_lite.methods.norm_occ import NormOCC\n"
        "class Looks(NormOCC):\n"
        "    uses_images = True\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        assert batch['image'].shape[1:] == (3, 32, 32) and 'features' in batch\n"
        "        return super().training_step(batch, batch_idx)\n"
    )
    yaml = "# @package _global_\ndefaults: [norm_occ]\nmethod:\n  _target_: looks.Looks\n"
    (tmp_path / "conf" / "method" / "looks.yaml").write_text(yaml)
    monkeypatch.chdir(tmp_path)
    common = [*folder_data(root), f"cache.folder={tmp_path / 'cache'}"]
    result = result_of(f"--config-dir={tmp_path / 'conf'}", "method=looks", *common, run_dir=tmp_path / "run")
    assert result["cache"]["used"]

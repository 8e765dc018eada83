"""What a user gets wrong is one line on stderr that says what to do, exit code 2, and a folder that stays usable."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file

from anomalib_lite.cli import schema, values
from anomalib_lite.cli.annotations import check_types
from anomalib_lite.errors import UserError
from anomalib_lite.paths import HOME
from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec
from tests.helpers.run_programs import Outcome, evaluate, folder_data, result_of, train


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A root in the MVTec layout with the category bottle."""
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root)
    return root


def assert_one_line(outcome: Outcome, pattern: str) -> None:
    runs.assert_refused(outcome, pattern)
    assert "Error getting" not in outcome.out  # Hydra's block about a wrong _target_


def assert_refused(pattern: str, *arguments: str | Path, run_dir: Path, small: bool = True) -> None:
    """`train` with these arguments is refused by one line that matches, and leaves nothing behind."""
    before = {run_dir, *run_dir.rglob("*")} if run_dir.exists() else set()
    assert_one_line(train(*arguments, f"hydra.run.dir={run_dir}", small=small), pattern)
    assert ({run_dir, *run_dir.rglob("*")} if run_dir.exists() else set()) == before


def assert_accepted(*arguments: str | Path, run_dir: Path) -> None:
    """The same folder takes the corrected run, without resume=true."""
    assert result_of(*arguments, run_dir=run_dir)["timing"]["steps"] > 0


# --- options ---

VALUES = {
    "backbone.layers=[]": r"backbone.layers=\[\]: give",
    "backbone.layers=3": "backbone.layers=3: give",
    "backbone.layers=[3,2]": "backbone.layers=.*ascending",
    "seed=abc": "seed=abc: give a whole number",
    "seed=-1": "seed=-1: give",
    "seed=null": "seed=null: give",
    "seed=1.5": "seed=1.5: give",
    "seed=4294967296": "seed=4294967296: give",
    "seed=true": "seed=true: give",
    "data.batch_size=0": "data.batch_size=0: give a whole number from 1",
    "data.batch_size=8.0": "data.batch_size=8.0: give",
    "data.eval_batch_size=0": "data.eval_batch_size=0: give",
    "data.image_size=3": "data.image_size=3: give",
    "data.image_size=[32,32,3]": "data.image_size=.*give",
    "data.workers=-1": "data.workers=-1: give",
    "data.val_fraction=2": "data.val_fraction=2: give a share",
    "data.check=foo": "data.check=foo: give fast, thorough or only",
    "data.normalize=foo": "data.normalize=foo: give imagenet, none or backbone",
    "data.value_range=[5,5]": r"data.value_range=\[5, 5\]: give \[low, high\] with low < high, or null",
    "data.value_range=4095": "data.value_range=4095: give",
    "data.tiling={size: [64,32], overlap: 40}": "data.tiling=.*an overlap from 0 below them",
    "data.tiling={size: 32, overlap: 32}": r"data.tiling=.*: give \{size: 512, overlap: 64\}",
    "data.tiling={overlap: 8}": r"data.tiling=.*: give \{size: 512, overlap: 64\}",
    "data.tiling={size: 8}": r"data.tiling=.*: give \{size: 512, overlap: 64\}",
    "data.tiling={size: 32, step: 1}": r"data.tiling=.*: give \{size: 512, overlap: 64\}",
    "data.tiling=32": r"data.tiling=.*: give \{size: 512, overlap: 64\}",
    "data.test_fraction=1": "data.test_fraction=1: give a share from 0, below 1",
    "data.treatment=foo": "data.treatment=foo: give auto, object or texture",
    "data.drop_last=maybe": "data.drop_last=maybe: give true or false",
    "data.balanced=3": "data.balanced=3: give true or false",
    "data.category=[]": r"data.category=\[\]: give a name",
    "trainer.max_epochs=-1": "trainer.max_epochs=-1: give",
    "trainer.max_steps=0": "trainer.max_steps=0: give",
    "trainer.log_every=0": "trainer.log_every=0: give",
    "trainer.checkpoint_minutes=foo": "trainer.checkpoint_minutes=foo: give",
    "scoring.image_score=best": "scoring.image_score=best: give max, mean",
    "scoring.pixel_smooth=-1": "scoring.pixel_smooth=-1: give",
    "scoring.quantile=2": "scoring.quantile=2: give",
    "scoring.fpr_limits=[2]": "scoring.fpr_limits=.*give",
    "hardware.devices=0": "hardware.devices=0: give",
    "hardware.accelerator=tpu": "hardware.accelerator=tpu: give auto, cpu or gpu",
    "hardware.precision=16": "hardware.precision=16: give",
    "hardware.deterministic=maybe": "hardware.deterministic=maybe: give auto, true or false",
    "cache.enabled=maybe": "cache.enabled=maybe: give true or false$",
    "cache.limit_gb=-1": "cache.limit_gb=-1: give gigabytes from 0$",
    "cache.dtype=int8": "cache.dtype=int8: give auto, bfloat16, float16 or float32$",
    "logger.wandb.project=a/b": "logger.wandb.project=a/b: give at most 128 characters",
    "logger.wandb.project=50%": "logger.wandb.project=50%: give",
    f"logger.wandb.project={'a' * 129}": "logger.wandb.project=.*a: give at most 128",
    "logger.wandb.tags=[a,'']": "logger.wandb.tags=.*: give a list of tags",
    f"logger.wandb.tags=[{'a' * 65}]": "logger.wandb.tags=.* a list of tags, each of 1 to 64",
    "logger.wandb.tags=a": "logger.wandb.tags=a: give",
    "logger.wandb.mode=on": "logger.wandb.mode=on: give",
    "logger.wandb.timeout=0": "logger.wandb.timeout=0: give",
    "logger.wandb.upload_timeout=soon": "logger.wandb.upload_timeout=soon: give",
    "split.shots=0": "split.shots=0: give a whole number of images from 1",
    "split.shots=1.5": "split.shots=1.5: give a whole number of images from 1",
    "split.shots=true": "split.shots=true: give a whole number of images from 1",
    "split.seed=first": "split.seed=first: give a whole number from 0",
    "split.seed=0.5": "split.seed=0.5: give a whole number from 0",
    "split.seed=-1": "split.seed=-1: give a whole number from 0",
    "split.imbalance=0.5": "split.imbalance=0.5: give a number from 1",
    "split.imbalance=inf": "split.imbalance=inf: give a number from 1",
    "method.optimizer.lr=-1": "method.optimizer.lr=-1: give a number from 0$",
    "method.optimizer.lr=abc": "method.optimizer.lr=abc: give a number from 0$",
    "method.optimizer.lr=inf": "method.optimizer.lr=inf: give a number from 0$",
    "resume=maybe": "resume=maybe: give true or false",
}  # fmt: skip


@pytest.fixture(scope="module")
def configuration():
    with initialize_config_dir(str(HOME / "conf"), version_base="1.3"):
        return compose("train", ["data=folder", "data.root=DIR", "data.category=bottle"])


@pytest.mark.parametrize("argument", VALUES)
def test_value(argument, configuration):
    """Refused by the rules of its key, which hold before a run begins; test_option goes through the whole program."""
    given = configuration.copy()
    OmegaConf.update(given, argument.partition("=")[0], values.read(values.as_typed(argument)), force_add=True)
    cfg: Any = OmegaConf.to_container(given, resolve=True)
    with pytest.raises(UserError, match=f"^{VALUES[argument]}"):
        schema.check(cfg)


def test_a_stored_run_may_hold_an_experiment_that_is_no_study(configuration):
    """Earlier versions accepted such a choice, which had no effect; `evaluate` reads their runs."""
    cfg: Any = OmegaConf.to_container(configuration, resolve=True)
    cfg["experiments"] = {"seed": 1}
    schema.check(cfg)
    with pytest.raises(UserError, match=r"^experiments: the chosen file is no study"):
        schema.check_composed(cfg)


OPTIONS = {
    "method=foo": "method=foo: .*choose from .*norm_occ",
    "hardware=foo": "hardware=foo: .*choose from auto, cpu, ddp, gpu",
    "backbone=foo": "backbone=foo: .*resnet18.*--config-dir",
    "split=foo": "split=foo: .*full",
    "+experiments=foo": "experiments=foo: .*no such choice",
    "+experiments=published": "experiments: the chosen file is no study",
    "--config-name=foo": "foo",
    "--config-dir=nowhere": "--config-dir nowhere: no such folder",
    "method=null": "method=null: .*name of a choice",
    "backbone.name=foo": "backbone.name=foo: ",
    "backbone.weights=null": "null: no such file; give a weights file, auto, or none",
    "backbone=none": "backbone=none: NormOCC needs a backbone",
    "data.foo=1": r"data.foo: no such option; data has .*batch_size.*\+data.foo=VALUE",
    "trainer.max_step=3": "trainer.max_step: no such option; did you mean trainer.max_steps",
    "method.nrm=1": "method.nrm: no such option; did you mean method.norm",
    "foo=1": "foo: no such option; the configuration has .*seed",
    "+method.foo=1": "NormOCC: can't be made from its options .*'foo'",
    "seed=1,2": "seed=1,2: several values; a sweep over the values needs --multirun",
    "method=ssae,norm_occ": "method=ssae,norm_occ: several values; a sweep over the values needs --multirun",
    "data.category=a,b": r"one value .* quotes: 'data.category=\"a,b\"'; a list .*: 'data.category=\[a,b\]'; a sweep",
    "data.root=/Böses,1e3": r"data.root=/Böses,1e3: several values; .* quotes: 'data.root=\"/Böses,1e3\"'; a sweep",
    "data.resample=foo": "data.resample=foo .*bilinear",
    "data.transform=[foo]": r"data.transform=\['foo'\] must be a list of albumentations",
    "data.transform=[{_target_: albumentations.HorizontalFlip, p: 0.5}]": "HorizontalFlip draws random numbers",
    "data.transform=[{_target_: albumentations.RandomRotate90, p: 1}]": "RandomRotate90 draws random numbers; move it",
    "data.augment=[{_target_: albumentations.Blur, blur: 3}]": r"Argument\(s\) 'blur' are not valid for transform Blur",
    "data.transform=[{_target_: albumentations.CenterCrop, height: 24, width: 24}]": (
        "data.transform: CenterCrop leaves test images of 24×24 pixels, but data.image_size is 32×32; give"
    ),
    "data.augment=[{_target_: albumentations.RandomCrop, height: 64, width: 64, p: 0.01}]": (
        "data.augment: RandomCrop can't be applied"
    ),
    "data.augment=foo": "data.augment=foo must be a list",
    "+data.copies=0": "data.copies=0: give a whole number from 1",
    "+data.copies=8": "data.copies=8: all copies are equal; give data.augment too, or 1",
    "augment=foo": "augment=foo: no such choice",
    "augment=rotations_45 data.augment.0.step=wide": "data.augment: Turn can't be applied",
    "data.reader=foo": "data.reader=foo must be a _target_",
    "data.split=foo": "split=foo must be a _target_",
    "data.category=": "data.category is empty",
    "trainer.max_epochs=null trainer.max_steps=null": "trainer.max_epochs and trainer.max_steps are both null",
    "method.target=foo": "method.target=foo: choose point, shell or zero",
    "method.p=-inf": "method.p=-inf: choose 1, 2 or inf$",
    "method.norm=abc": 'method.norm="abc": give a finite number',
    "method.norm=inf": 'method.norm="inf": give a finite number',
    "+method.optimizer.foo=1": r"method.optimizer: .*'foo'; check its values \(lr=0.5, foo=1\)",
    "method=ssae +method.optimizer.betas=[0.9,high]": (
        r"method.optimizer.betas=\[0.9, 'high'\]: give a list of shares from 0, below 1, such as \[0.9,0.999\]$"
    ),
    "method=ssae +method.optimizer.weight_decay=much": "method.optimizer.weight_decay=much: give a number from 0$",
    "method=recontrast method.variants.unified.optimizer.eps=small": (
        "method.variants.unified.optimizer.eps=small: give a number from 0$"
    ),
    "method=uniad method.neighbours=1 method.dim=16 method.drop.at=80": "method.drop={'at': 80, 'factor': 0.1}: give",
    "seed=${foo}": "seed: .*'foo' not found",
    "data.category=[a": r"no category '\[a'",
    "seed=[a": r"seed=\[a: can't be read",
    "foo": "foo: can't be read .*KEY=VALUE",
    "--foo": "--foo: no such argument",
    "--cfg=foo": "--cfg.*'foo'.*--help",
    "--resolve": "--resolve: goes with --cfg",
    "--multirun --run": "--run and --multirun: give one of them",
    "objective=validation.aupro_5": "choose from validation.aupro_30, validation.aupro_05; aupro_05 stands for .* 0.05",
    "cache.type=auto": "cache.type: .*new name; give cache.dtype",
    "+cache.type=auto": "cache.type: this key has a new name; give cache.dtype",
    "method=ltad method.semantic=0": "method.semantic: this key has a new name; give method.classifier_weight",
    "method=ssae ++method.look_every=0": "method.look_every: this key has a new name; give method.eval_every",
    "-m method=ssae method.look_every=1,2": "method.look_every: this key has a new name; give method.eval_every",
    "method._target_=no.such.Thing": "no.such.Thing: can't be imported .*No module named 'no'",
    "method._target_=anomalib_lite.methods.norm_occ.Foo": r"methods.norm_occ.Foo: can't be imported .*_target_",
    "method._target_=anomalib_lite.methods.norm_occ.NormOC": r"has no NormOC\); did you mean .*norm_occ.NormOCC\?",
    "backbone._target_=anomalib_lite.features.backbones.Backbones": r"\); did you mean .*features.backbones.Backbone\?",
    "method.optimizer._target_=torch.optim.Foo": "torch.optim.Foo: can't be imported",
}  # fmt: skip


@pytest.mark.parametrize("argument", OPTIONS)
def test_option(argument, data, tmp_path):
    arguments = [argument] if "[{" in argument else argument.split()
    given = {part.partition("=")[0] for part in arguments}
    sound = [each for each in folder_data(data) if each.partition("=")[0] not in given]
    assert_refused(OPTIONS[argument], *sound, *arguments, run_dir=tmp_path / "run")


def test_the_folder_takes_the_corrected_run(data, tmp_path):
    assert_refused("method.target=foo", *folder_data(data), "method.target=foo", run_dir=tmp_path)
    assert_accepted(*folder_data(data), run_dir=tmp_path)
    again = train(*folder_data(data), f"hydra.run.dir={tmp_path}")
    assert_one_line(again, "already holds a run: add resume=true")  # a run that was begun is not overwritten


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_without_gpu(data, tmp_path):
    assert_refused(
        "hardware.accelerator=gpu: no GPU.*hardware=cpu", *folder_data(data), "hardware=gpu", run_dir=tmp_path
    )


def test_batch_size_that_devices_cant_share(data, tmp_path):
    devices = ["hardware=ddp", "hardware.accelerator=cpu", "hardware.devices=2"]
    assert_refused(
        "data.batch_size=3 is not divisible by 2 devices; use a multiple of 2",
        *folder_data(data),
        *devices,
        "data.batch_size=3",
        run_dir=tmp_path,
    )


@pytest.mark.parametrize(
    ("argument", "pattern"),
    [
        ("method=norm_occ,foo", "method=foo: no such choice"),
        ("data.batch_size=4,0", "data.batch_size=0: give"),
        ("seed=range(0,0)", r"seed=range\(0,0\): no value, so the sweep has no job; give at least one"),
        ("method=glob(foo*)", r"method=glob\(foo\*\): no value"),
    ],
)
def test_sweep_that_is_refused(argument, pattern, data, tmp_path):
    (tmp_path / "mine").mkdir()
    sweep_dir = tmp_path / "mine" / "sweeps" / "first"
    outcome = train("-m", *folder_data(data), argument, f"hydra.sweep.dir={sweep_dir}")
    assert_one_line(outcome, pattern)
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]  # an empty folder that was there before stays


@pytest.mark.parametrize("place", ["below_a_file", "in_proc"])
def test_output_that_cant_be_written(place, data, tmp_path):
    (tmp_path / "file").write_text("")
    if place == "in_proc" and not sys.platform.startswith("linux"):
        pytest.skip("no /proc")
    folder = tmp_path / "file" / "run" if place == "below_a_file" else Path("/proc/anomalib_lite")
    assert_refused(f"{folder}: .*hydra.run.dir=DIR", *folder_data(data), run_dir=folder)
    outcome = train("-m", *folder_data(data), "seed=0,1", f"hydra.sweep.dir={folder}")
    assert_one_line(outcome, str(folder))


# --- data ---


def test_root_not_set(tmp_path):
    assert_refused("data.root is not set: .*data.root=DIR", "data=folder", run_dir=tmp_path)


def test_no_such_root(tmp_path):
    assert_refused(f"{tmp_path}/none: no such folder; set data.root", *folder_data(tmp_path / "none"), run_dir=tmp_path)


def test_root_without_categories(tmp_path):
    assert_refused("no category in this folder; set data.root", *folder_data(tmp_path), run_dir=tmp_path / "run")


def test_unknown_category(data, tmp_path):
    assert_refused("data.category.*bottle", *folder_data(data, "botle"), run_dir=tmp_path)


def test_data_set_that_is_not_there(tmp_path):
    assert_refused("data=foo: no such choice; choose from btad, cifar10, folder", "data=foo", run_dir=tmp_path)


def test_category_of_the_synthetic_set(tmp_path):
    root = f"data.root={tmp_path / 'set'}"
    small = [
        f"+data.reader.{key}={value}" for key, value in {"size": 64, "train": 1, "good": 1, "defective": 1}.items()
    ]
    assert_refused("no category 'foo'", "data=synthetic", root, *small, "data.category=foo", run_dir=tmp_path / "run")


def no_training_images(folder: Path) -> None:
    for path in (folder / "train" / "good").iterdir():
        path.unlink()


def truncated_training_image(folder: Path) -> None:
    path = folder / "train" / "good" / "002.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (no_training_images, "train/good: no training images"),
        (truncated_training_image, "train/good/002.png: can't be decoded"),
    ],
)
def test_spoilt_folder(spoil, pattern, tmp_path):
    """An error of the reader and one of the check of the files; tests/unit/test_readers.py has the others."""
    spoil(make_mvtec(tmp_path / "data"))
    assert_refused(pattern, *folder_data(tmp_path / "data"), run_dir=tmp_path / "run")


def test_damage_that_only_decoding_shows(tmp_path):
    """The fast check reads headers and ends; what it can't see is met in the run, in a worker process as well."""
    path = make_mvtec(tmp_path / "data") / "test" / "broken" / "001.png"
    content = bytearray(path.read_bytes())
    content[100:1000] = bytes(900)
    path.write_bytes(content)
    run = [*folder_data(tmp_path / "data"), f"hydra.run.dir={tmp_path / 'run'}"]
    for more in ([], ["data.workers=1"]):
        assert_one_line(train(*run, *more, "resume=true"), "test/broken/001.png: can't be decoded")
    assert_refused(
        "test/broken/001.png: can't be decoded", *run[:-1], "data.check=thorough", run_dir=tmp_path / "checked"
    )


# --- weights ---


def test_damaged_weights(data, tmp_path):
    file = tmp_path / "text.pth"
    file.write_text("these are no weights")
    pattern = "text.pth: damaged, or not a weights file"
    assert_refused(pattern, *folder_data(data), f"backbone.weights={file}", run_dir=tmp_path / "run")


def test_weights_without_an_unused_layer_are_fine(data, tmp_path):
    file, run = tmp_path / "without_layer3.safetensors", tmp_path / "run"
    state = timm.create_model("test_resnet").state_dict()
    save_file({key: tensor for key, tensor in state.items() if not key.startswith("layer3.")}, file)
    given = (*folder_data(data), f"backbone.weights={file}")
    assert_refused("lacks", *given, "backbone.layers=[2,3]", run_dir=run)
    assert_accepted(*given, "backbone.layers=[1,2]", run_dir=run)


# --- a user's own method ---


def own_method(folder: Path, code: str) -> list[str]:
    (folder / "conf" / "method").mkdir(parents=True)
    optimizer = "{_target_: torch.optim.SGD, _partial_: true, lr: 0.1}"
    (folder / "conf" / "method" / "mine.yaml").write_text(
        f"# @package _global_\nmethod:\n  _target_: mine.Mine\n  optimizer: {optimizer}\n"
    )
    (folder / "mine.py").write_text(code)
    return ["--config-dir", str(folder / "conf"), "method=mine", "trainer.max_epochs=1"]


BROKEN = {
    "import": (
        "import no_such_module\n",
        "mine.Mine: can't be imported .*No module named 'no_such_module'.*debug=true",
    ),
    "syntax": ("class Mine(:\n", r"mine.Mine: can't be imported \(SyntaxError: .*mine.py, line 1"),
    "construction": (
        "class Mine:\n    def __init__(self, **options):\n        1 / 0\n",
        "mine.Mine: can't be made from its options .*division by zero.*debug=true",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_own_method_that_is_broken(case, data, own_folder):
    code, pattern = BROKEN[case]
    arguments = own_method(own_folder, code)
    assert_refused(pattern, *arguments, *folder_data(data), run_dir=own_folder / "run")


def test_own_configuration_that_is_no_yaml(data, tmp_path):
    arguments = own_method(tmp_path, "")
    (tmp_path / "conf" / "method" / "mine.yaml").write_text("method: [1,\n")
    assert_refused("mine.yaml", *arguments, *folder_data(data), run_dir=tmp_path / "run")


# --- evaluate ---


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished")
    result_of(*folder_data(data), run_dir=run)
    return run


EVALUATE = {
    "nothing": ([], "run=DIR.*output=DIR"),
    "no output": (["run={run}"], "run=DIR.*output=DIR"),
    "no such run": (["run={run}/none", "output={out}"], "run=.*none: no such folder"),
    "a folder that is no run": (["run={run}/figures", "output={out}"], "no such file; is run=.* a finished run"),
    "key that is trained on": (["run={run}", "output={out}", "seed=1"], "seed can't be changed without training anew"),
    "method": (["run={run}", "output={out}", "method.norm=1"], "method.norm can't be changed"),
    "unknown key": (["run={run}", "output={out}", "scoring.foo=1"], "scoring.foo: the run's configuration has no such"),
    "renamed key": (
        ["run={run}", "output={out}", "cache.type=auto"],
        "cache.type: .*new name; give cache.dtype",
    ),
    "bad value": (["run={run}", "output={out}", "scoring.image_score=best"], "scoring.image_score=best: give"),
    "check alone": (["run={run}", "output={out}", "data.check=only"], "data.check=only: evaluates nothing"),
    "no value": (["run={run}", "output={out}", "seed"], "seed: arguments are KEY=VALUE"),
    "unreadable value": (
        ["run={run}", "output={out}", "hardware.devices=[1"],
        r"hardware.devices=\[1: can't be read",
    ),
    "root that is gone": (["run={run}", "output={out}", "data.root={run}/none"], "none: no such folder; set data.root"),
    "output that is taken": (["run={run}", "output={run}"], "already holds results: choose another output=DIR"),
    "output below a file": (["run={run}", "output={run}/result.json/out"], "result.json/out: .*output=DIR"),
    "output in proc": (["run={run}", "output=/proc/anomalib_lite"], "/proc/anomalib_lite: .*output=DIR"),
}


@pytest.mark.parametrize("case", EVALUATE)
def test_evaluate(case, finished, tmp_path):
    arguments, pattern = EVALUATE[case]
    assert_one_line(evaluate(*(text.format(run=finished, out=tmp_path / "out") for text in arguments)), pattern)


def test_evaluate_without_checkpoint(finished, tmp_path):
    stored = tmp_path / "run" / "checkpoints" / "config.json"
    stored.parent.mkdir(parents=True)
    arguments = [f"run={tmp_path / 'run'}", f"output={tmp_path / 'out'}"]
    stored.write_text((finished / "checkpoints" / "config.json").read_text())
    assert_one_line(evaluate(*arguments), "last.ckpt: no such file; is run=.* the folder of a finished run")
    whole = (finished / "checkpoints" / "last.ckpt").read_bytes()
    (stored.parent / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    assert_one_line(evaluate(*arguments), "last.ckpt: damaged")
    stored.write_text("{")
    assert_one_line(evaluate(*arguments), "config.json: damaged")


def test_no_weights_without_a_network(data, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    pattern = "backbone.weights=auto: the weights of resnet18.tv_in1k were not found.*local file"
    assert_refused(pattern, *folder_data(data), "backbone=resnet18", "backbone.weights=auto", run_dir=tmp_path / "run")


def test_traceback_on_request(data, tmp_path):
    """The error itself leaves the program: Python then prints a traceback."""
    with pytest.raises(UserError, match=r"^data.batch_size=0: give"):
        train(*folder_data(data), "data.batch_size=0", "debug=true", f"hydra.run.dir={tmp_path}")


# --- types of options ---


class Options:
    def __init__(
        self,
        count: int = 1,
        share: float | None = None,
        flag: bool = True,
        names: list[str] | None = None,
        sizes: Sequence[int] = (),
        parts: dict[str, float] | None = None,
        anything: Any = None,
    ):
        pass


class More(Options):
    def __init__(self, name: str = "a", **context: Any):
        super().__init__(**context)


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("count", 1.5, "a whole number"),
        ("count", True, "a whole number"),
        ("share", "a", "a finite number, or null"),
        ("flag", 1, "true or false"),
        ("names", "a", r"a list such as \[a, b\], or null"),
        ("names", [1], "a list"),
        ("sizes", 3, r"a list such as \[3, 5\]"),
        ("sizes", [3, 0.5], "a list"),
        ("parts", {"a": "b"}, r"\{key: value, ...\}, or null"),
        ("name", 3, "a name"),
    ],
)
def test_an_option_of_a_wrong_type(option, value, wanted):
    right = {"count": 2, "share": 1, "flag": False, "names": ["a"], "sizes": [1], "parts": {"a": 1}, "name": "b"}
    check_types("method", More, right | {"anything": object(), "_target_": "x", "unknown": 1})
    check_types("method", More, {"share": None, "names": None, "parts": None, "sizes": []})
    with pytest.raises(UserError, match=rf"^method.{option}={re.escape(json.dumps(value))}: give {wanted}"):
        check_types("method", More, right | {option: value})

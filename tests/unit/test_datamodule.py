import hashlib
import math
import re
import shutil
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import albumentations as A
import lightning as L
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from anomalib_lite.data import splits
from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.pipeline import Pipeline
from anomalib_lite.data.readers import read_folder
from anomalib_lite.data.sampler import TrainBatchSampler
from anomalib_lite.data.samples import Sample
from anomalib_lite.data.stored_features import StoredFeatures
from anomalib_lite.errors import UserError
from anomalib_lite.runs.build import make_data
from anomalib_lite.runs.run import check_fingerprint
from tests.helpers.image_trees import make_mvtec, save_image


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, "bottle", train=11, good=3, defects={"broken": 2})
    make_mvtec(root, "wood", train=8, good=2, defects={"scratch": 1}, masks=False)
    return root


def module(root, rank=None, world=1, **options):
    defaults: dict[str, Any] = {"reader": read_folder, "category": "all", "image_size": 16, "batch_size": 6}
    if rank is not None:
        options["ranks"] = lambda: (rank, world)
    data = AnomalyDataModule(root=root, **(defaults | options))
    data.setup("fit")
    return data


def epoch_of(loader, epoch):
    """The batches of an epoch."""
    loader.batch_sampler.next_batch = epoch * len(loader)
    return list(loader)


def order(loader, epoch=0):
    """Positions of the batches of an epoch, counted from 0."""
    return [batch["index"].tolist() for batch in epoch_of(loader, epoch)]


def flat(lists):
    return list(chain.from_iterable(lists))


def equal(a, b):
    same = [torch.equal(a[k], b[k]) for k in a if k != "path"]
    return a.keys() == b.keys() and a["path"] == b["path"] and all(same)


def test_setup_tells_what_there_is(root):
    data = module(root, name="folder", split=splits.full)
    assert data.categories == ["bottle", "wood"]
    assert data.train_counts == {"bottle": 11, "wood": 8}
    assert data.test_counts == {"bottle": {"good": 3, "defective": 2}, "wood": {"good": 2, "defective": 1}}
    assert data.has_masks == {"bottle": True, "wood": False}
    assert data.notes == ["wood: no ground_truth, pixel metrics are left out"]
    assert data.val_dataloader() == []
    samples = data.train_samples
    data.setup("test")
    assert data.train_samples is samples


def test_batches(root):
    data = module(root)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (6, 3, 16, 16)
    assert batch["mask"].shape == (6, 16, 16)
    kinds = {key: batch[key].dtype for key in ("image", "mask", "label", "category", "index")}
    assert list(kinds.values()) == [torch.float32, torch.bool, torch.int64, torch.int64, torch.int64]
    assert batch["path"] == [str(data.train_samples[i].path) for i in batch["index"]]
    for batch in data.test_dataloader():
        for i, index in enumerate(batch["index"].tolist()):
            sample = data.test_samples[index]
            assert data.categories[batch["category"][i]] == sample.category
            assert batch["label"][i] == sample.label
            assert batch["mask"][i].any() == (sample.mask is not None)


def test_fingerprint_follows_the_data_only(root, tmp_path):
    first = module(root)
    moved = shutil.copytree(root, tmp_path / "elsewhere", copy_function=shutil.copyfile)  # new times of change
    assert module(moved).fingerprint == first.fingerprint == module(root, category=["wood", "bottle"]).fingerprint
    assert module(moved, category="bottle").fingerprint != first.fingerprint
    save_image(moved / "wood" / "train" / "good" / "000.png", seed=12345, size=33)
    changed = module(moved)
    assert changed.fingerprint != first.fingerprint
    (moved / "wood" / "test" / "scratch" / "000.png").rename(moved / "wood" / "test" / "good" / "100.png")
    assert module(moved).fingerprint != changed.fingerprint


# --- the order of training ---


def test_shuffling_follows_seed_and_epoch(root):
    loader = module(root).train_dataloader()
    epochs = [order(loader, e) for e in range(3)]
    assert [len(batch) for batch in epochs[0]] == [6, 6, 6, 1]
    assert all(sorted(flat(epoch)) == list(range(19)) for epoch in epochs)
    assert all(a != b for a, b in pairwise(epochs))
    again = module(root).train_dataloader()
    assert [order(again, e) for e in (2, 0, 1)] == [epochs[2], epochs[0], epochs[1]]
    assert order(module(root, seed=1).train_dataloader()) != epochs[0]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_global_batches(root, world):
    alone = order(module(root).train_dataloader(), 4)
    shares = [order(module(root, rank, world).train_dataloader(), 4) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    unions = [flat(parts) for parts in zip(*shares, strict=True)]
    assert [sorted(union) for union in unions[:-1]] == [sorted(batch) for batch in alone[:-1]]
    # The last batch of one image is filled up from the epoch's beginning, so that no rank goes without.
    assert unions[-1] == alone[-1] + alone[0][: world - 1]


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 12, 13])
def test_no_rank_goes_without(length):
    for world in (1, 2, 3):
        for drop_last in (False, True):
            shares = [list(TrainBatchSampler(length, 6, 0, rank, world, drop_last)) for rank in range(world)]
            wanted = max(1, length // 6) if drop_last else -(-length // 6)
            assert {len(share) for share in shares} == {wanted}
            assert len(TrainBatchSampler(length, 6, 0, 0, world, drop_last)) == wanted
            for parts in zip(*shares, strict=True):
                assert len({len(part) for part in parts}) == 1
                assert len(parts[0]) > 0


def test_drop_last(root):
    assert [len(batch) for batch in order(module(root, drop_last=True).train_dataloader())] == [6, 6, 6]
    assert [len(batch) for batch in order(module(root, drop_last=True, batch_size=50).train_dataloader())] == [19]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_continues_the_undisturbed_order(root, workers):
    options = {"workers": workers, "augment": [A.HorizontalFlip(p=0.5), A.GaussNoise(p=0.5)]}
    loader = module(root, **options).train_dataloader()
    undisturbed = [epoch_of(loader, e) for e in (3, 4)]
    loader = module(root, first_batch=14, **options).train_dataloader()
    assert len(loader) == 4
    iter(loader)  # Lightning asks for an iterator that it does not use
    resumed = [list(loader), list(loader)]
    assert [len(epoch) for epoch in resumed] == [2, 4]
    for a, b in zip(undisturbed[0][2:] + undisturbed[1], flat(resumed), strict=True):
        assert equal(a, b)


def test_loaders_leave_the_global_generator_alone(root):
    data = module(root)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(data.train_dataloader())
    list(data.test_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.tested = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch["index"].tolist()))
        return self.weight * batch["image"].mean()

    def test_step(self, batch, batch_idx):
        self.tested += batch["index"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_trainer(root, tmp_path, workers):
    """Epoch after epoch, with persistent workers too."""
    data, model = module(root, workers=workers), Recorder()
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    loader = module(root).train_dataloader()
    assert model.seen == [(e, batch) for e in range(3) for batch in order(loader, e)]
    assert model.tested == list(range(8))


# --- evaluation ---


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_shares_the_batches_of_one_device(root, world):
    """Unevenly and whole: 5 test images in batches of 2 are 3 batches; a fourth rank has none."""
    shares = [module(root, rank, world, category="bottle", eval_batch_size=2) for rank in range(world)]
    indices = [[batch["index"].tolist() for batch in data.test_dataloader()] for data in shares]
    assert indices == [[[0, 1], [2, 3], [4]][rank::world] for rank in range(world)]


def test_train_eval_dataloader(root):
    data = module(root, 1, 2, augment=[A.HorizontalFlip(p=1)], eval_batch_size=8)
    batches = list(data.train_eval_dataloader())
    assert flat(b["index"].tolist() for b in batches) == list(range(19))
    plain = next(iter(module(root, eval_batch_size=8).train_eval_dataloader()))
    assert torch.equal(plain["image"], batches[0]["image"])
    sharded = data.train_eval_dataloader(sharded=True)
    assert flat(b["index"].tolist() for b in sharded) == list(range(8, 16))


def test_copies_are_augmented_as_in_the_first_epochs(root):
    data = module(root, augment=[A.Rotate([-180, 180], p=1)], copies=3, eval_batch_size=7)
    batches = list(data.fit_dataloader())
    assert [index for batch in batches for index in batch["index"].tolist()] == [*range(19)] * 3
    images = torch.cat([batch["image"] for batch in batches])
    for copy in range(3):
        assert torch.equal(images[19 * copy : 19 * copy + 19], data.training_batch(range(19), copy)["image"])
    assert sum(len(batch["path"]) for batch in data.train_eval_dataloader()) == 19
    with pytest.raises(UserError, match=r"^data\.copies=3: all copies are equal; give data\.augment too, or 1$"):
        module(root, copies=3)


def numbered(
    data: Any, shapes: list[tuple[int, ...]], samples: list[Sample] | None = None, tables: int = 1
) -> StoredFeatures:
    """Stored features of the samples (None: of training), in some tables: every number is the sample's position."""
    stored, size = StoredFeatures(data.eval_pipeline, shapes), sum(math.prod(shape) for shape in shapes)
    paths = [str(sample.path) for sample in samples or data.train_samples]
    for first in range(tables):
        chosen = range(first, len(paths), tables)
        stored.add(torch.tensor(chosen).float()[:, None].repeat(1, size), {paths[i]: n for n, i in enumerate(chosen)})
    return stored


def test_without_images_nothing_is_decoded(root, tmp_path):
    moved = shutil.copytree(root, tmp_path / "data")
    data = module(moved, workers=2)
    for sample in data.train_samples:
        sample.path.unlink()
    data = data.with_features(numbered(data, [(1, 1, 2), (2, 2, 1)], tables=3), uses_images=False)
    for loader in (data.train_dataloader(), data.fit_dataloader(), data.train_eval_dataloader()):
        assert loader.num_workers == 0
        for batch in loader:
            assert batch.keys() == {"label", "category", "index", "path", "features"}
            assert [level.shape[1:] for level in batch["features"]] == [(1, 1, 2), (2, 2, 1)]
            assert all((level.flatten(1) == batch["index"][:, None]).all() for level in batch["features"])
    assert order(data.train_dataloader(), 1) == order(module(root).train_dataloader(), 1)
    assert "image" in next(iter(data.test_dataloader()))


@pytest.mark.parametrize(
    "change",
    [
        {"augment": [A.HorizontalFlip(p=0.5)]},
        {"treatment": "texture", "texture_size": 32},
        {"corrupt": lambda image, rng: (image, np.zeros(image.shape[:2], bool))},
    ],
)
def test_changed_training_images_have_no_stored_features(root, change):
    """Crops, augmentations and corruptions: training gets images, and test and thresholds the stored features."""
    data = module(root, **change)
    data = data.with_features(numbered(data, [(1, 1, 1)], [*data.train_samples, *data.test_samples]), uses_images=False)
    for loader in (data.train_dataloader(), data.fit_dataloader(), [data.training_batch([0, 2], 1)]):
        assert all("image" in batch and "features" not in batch for batch in loader)
    for loader in (data.train_eval_dataloader(), data.test_dataloader()):
        assert all("features" in batch for batch in loader)


# --- reproducible pixels ---


def test_workers_change_nothing(root):
    options = {"augment": [A.RandomBrightnessContrast(p=0.7), A.VerticalFlip(p=0.5)], "val_fraction": 0.3}
    alone, helped = module(root, **options), module(root, workers=2, **options)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        pairs = list(zip(getattr(alone, loader)(), getattr(helped, loader)(), strict=True))
        assert pairs
        assert all(equal(a, b) for a, b in pairs)


def test_augmentation_differs_from_epoch_to_epoch(root):
    loader = module(root, augment=[A.GaussNoise(p=1)], batch_size=19).train_dataloader()

    def pixels(epoch):
        (batch,) = epoch_of(loader, epoch)
        return batch["image"][batch["index"].argsort()]

    assert torch.equal(pixels(1), pixels(1))
    assert all((a != b).any() for a, b in zip(pixels(1), pixels(2), strict=True))


def test_held_out_images(root):
    data = module(root, val_fraction=0.4)
    assert data.train_counts == {"bottle": 7, "wood": 5}
    assert [(s.category, s.label) for s in data.val_samples] == [
        *[("bottle", 0), ("bottle", 1)] * 2,
        *[("wood", 0), ("wood", 1), ("wood", 0)],
    ]
    assert not {s.path for s in data.train_samples} & {s.path for s in data.val_samples}
    assert "data.val_fraction=0.4: 7 training images held out for validation" in data.notes
    (batch,) = data.val_dataloader()
    assert batch["mask"].flatten(1).any(1).tolist() == [s.defect == "corrupted" for s in data.val_samples]
    assert batch["label"].tolist() == [s.label for s in data.val_samples]
    assert all(equal(batch, again) for again in data.val_dataloader())
    alone = module(root, val_fraction=0.4, category="wood")  # what is held out does not depend on other categories
    assert alone.val_samples == data.val_samples[4:]
    assert module(root, val_fraction=0.4, seed=1).val_samples != data.val_samples


def test_a_defect_that_is_called_corrupted_is_not_painted(tmp_path):
    """Its images and masks are those of the files, and stored features are those of its images."""
    batches = []
    for defect in ("broken", "corrupted"):
        make_mvtec(tmp_path / defect, defects={defect: 2})
        loader = module(tmp_path / defect).test_dataloader()
        batches += list(loader)
        assert not loader.dataset.corrupts
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in ("label", "image", "mask"))


def test_holding_out_leaves_something(root, tmp_path):
    make_mvtec(tmp_path, "one", train=1)
    make_mvtec(tmp_path, "two", train=2)
    data = module(tmp_path, val_fraction=0.9)
    assert data.train_counts == {"one": 1, "two": 1}
    assert data.notes[0] == "one: 1 training images are too few to validate on a share of them"
    assert module(root, val_fraction=0.001).train_counts == {"bottle": 10, "wood": 7}


# --- errors ---


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_one_line(tmp_path, workers):
    folder = make_mvtec(tmp_path)
    data = module(tmp_path, workers=workers)
    whole = folder / "test" / "good" / "001.png"
    whole.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(UserError) as caught:
        list(data.test_dataloader())
    assert re.fullmatch(rf"{whole}: can't be decoded as an image \(.*\); replace or remove the file", str(caught.value))


@pytest.mark.parametrize("workers", [0, 2])
def test_sizes_differ(tmp_path, workers):
    save_image(make_mvtec(tmp_path) / "train" / "good" / "000.png", size=48)
    with pytest.raises(UserError, match=r"^data.transform leaves test images of 48×48 pixels, .* add a Resize to it"):
        module(tmp_path, transform=[], image_size=32, workers=workers)
    data = module(tmp_path, workers=workers, treatment="texture", eval_batch_size=8)
    data.eval_batch_size = 8  # images of their own sizes come one by one
    with pytest.raises(UserError, match=r"^/.*\.png: its size differs .* add a Resize to data.transform$"):
        list(data.train_eval_dataloader())


def test_a_new_image_of_another_size_is_named(tmp_path):
    """Beside images of the run's size in its batch; where images have their own sizes, none is refused."""
    root = make_mvtec(tmp_path / "data").parent
    square, tall = save_image(tmp_path / "a.png"), tmp_path / "b.png"
    Image.new("RGB", (32, 64)).save(tall)
    data = module(root, transform=[A.SmallestMaxSize(max_size=16)])
    (batch,) = data.new_dataloader([square, tall], 0, 8, 0)
    assert batch["path"] == [str(square)]
    assert batch["damaged"] == [f"{tall}: data.transform leaves 32×16 pixels, and the run's images have 16×16"]
    own_sizes = module(root, treatment="texture").new_dataloader([square, tall], 0, 8, 0)
    assert [tuple(batch["image"].shape[2:]) for batch in own_sizes] == [(32, 32), (64, 32)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": None}, "data.root is not set"),
        ({"normalize": "x"}, "data.normalize=x is not known"),
        ({"resample": "x"}, "data.resample=x is not known"),
        ({"image_size": -3}, "data.image_size=-3 must be"),
        ({"split": lambda data: splits.Split([], {"bottle": 11, "wood": 8})}, "it left no training images of 'bottle'"),
    ],
)
def test_options_are_checked(root, options, message):
    with pytest.raises(UserError, match=message):
        module(**({"root": root} | options))


def test_batch_size_must_divide(root):
    with pytest.raises(UserError, match=r"data\.batch_size=6 is not divisible by 4 devices; use a multiple of 4"):
        module(root, 0, 4).train_dataloader()


def fails(image, rng):
    raise ValueError("no\nreason")


TRANSFORMS: dict[str, tuple[dict[str, Any], str]] = {
    "crop that changes the size": (
        {"transform": [A.Resize(24, 24), A.CenterCrop(20, 20)]},
        r"data.transform: CenterCrop leaves test images of 20×20 pixels, but data.image_size is 16×16; give "
        r"data.image_size=20 \(first: /",
    ),
    "crop that is too large": (
        {"augment": [A.RandomCrop(64, 64)]},
        r"data.augment: RandomCrop can't be applied \(.*64",
    ),
    "rare crop": ({"augment": [A.RandomCrop(64, 64, p=1e-3)]}, "data.augment: RandomCrop can't be applied"),
    "crop inside": (
        {"augment": [A.OneOf([A.HorizontalFlip(), A.RandomCrop(64, 64)], p=0.1)] * 3},
        "data.augment: OneOf can't be applied",
    ),
    "crop of training images": (
        {"augment": [A.RandomCrop(8, 8)]},
        "data.augment: RandomCrop leaves training images of 8×8 .* give data.treatment=texture",
    ),
    "normalisation": ({"transform": [A.Resize(16, 16), A.Normalize()]}, "data.transform: Normalize leaves float32"),
    "gray": ({"augment": [A.ToGray(num_output_channels=1, p=1)]}, "data.augment: ToGray leaves uint8"),
    "exception": (
        {"augment": [A.Lambda(image=lambda image, **_: 1 / 0)]},
        r"Lambda can't be applied \(division by zero",
    ),
    "corruption that fails": ({"corrupt": fails}, r"data.corrupt: fails can't be applied \(no reason\)"),
    "corruption of another kind": (
        {"corrupt": lambda image, rng: (image.astype(float), image[..., 0] > 0)},
        "data.corrupt: <lambda> must give a uint8 image and a bool mask",
    ),
    "texture that is too small": (
        {"treatment": "texture", "texture_size": 16, "image_size": 32},
        "data.image_size: the crops of 32×32",
    ),
}


@pytest.mark.parametrize("case", TRANSFORMS)
def test_transforms_are_tried_before_the_start(case, root):
    options, message = TRANSFORMS[case]
    with pytest.raises(UserError, match=f"^{message}|{message}") as caught:
        module(root, **options)
    assert "\n" not in str(caught.value)


def test_trial_of_the_smallest_image(tmp_path):
    """The first image is large enough; the probabilities of transforms stay."""
    folder = make_mvtec(tmp_path, size=32)
    flip = A.HorizontalFlip(p=0.25)
    options: dict[str, Any] = {"transform": [A.CenterCrop(24, 24)], "augment": [flip], "image_size": 24}
    module(tmp_path, **options)
    assert flip.p == 0.25
    save_image(folder / "test" / "good" / "001.png", size=20)
    with pytest.raises(UserError, match=r"data.transform: CenterCrop can't be applied"):
        module(tmp_path, **options)


def test_an_exception_in_training_is_one_line(root):
    """What only some images or random numbers meet names the transform and the key, also from OneOf."""
    data = module(root)
    bad = A.Lambda(image=lambda image, **_: 1 / 0, p=1)
    for key, pipeline in (("augment", Pipeline([], [A.OneOf([bad])])), ("transform", Pipeline([bad]))):
        data.train_pipeline = pipeline
        with pytest.raises(UserError, match=rf"^data.{key}: Lambda can't be applied \(division by zero\); change"):
            list(data.train_dataloader())


# --- configuration ---


@pytest.mark.parametrize("name", ["mvtec", "visa", "folder", "synthetic"])
def test_configuration(name, root):
    conf = Path(__file__).parents[2] / "conf"
    with initialize_config_dir(str(conf), version_base="1.3"):
        config = compose(overrides=[f"+data={name}", "+split=full", "+seed=3", f"data.root={root}"])
    built = instantiate(config.data)
    assert (built.name, built.seed) == (name, 3)
    assert built.split.func is splits.full
    assert built.reader.func.__name__ == f"read_{name}"
    if name == "mvtec":
        built.setup()
        assert built.train_counts == {"bottle": 11}


def test_transforms_from_configuration(root):
    config = {
        "_target_": "anomalib_lite.data.datamodule.AnomalyDataModule",
        "_convert_": "all",
        "reader": {"_target_": "anomalib_lite.data.readers.read_folder", "_partial_": True},
        "root": str(root),
        "image_size": 16,
        "transform": [
            {"_target_": "anomalib_lite.data.transforms.Resize", "size": [20, 24], "resample": "lanczos"},
            {"_target_": "albumentations.CenterCrop", "height": 16, "width": 16},
        ],
    }
    data = instantiate(OmegaConf.create(config))
    data.setup()
    assert next(iter(data.test_dataloader()))["image"].shape == (8, 3, 16, 16)


def test_a_category_whose_folder_has_another_name_by_now(tmp_path):
    """A trained run finds its category under the name that it had, and holds out the same images."""

    def read(folder, stored=None):
        reader = {"_target_": "anomalib_lite.data.readers.read_folder", "_partial_": True}
        options = {"reader": reader, "root": str(folder), "image_size": 16, "val_fraction": 0.5}
        target = "anomalib_lite.data.datamodule.AnomalyDataModule"
        return make_data({"data": {"_target_": target, "_convert_": "all", **options}, "scoring": {}}, stored)

    before = read(make_mvtec(tmp_path, "bottle", train=9, masks=False))
    stored = {"steps": 0, "categories": ["bottle"], "pixels": ["8-bit", None], "fingerprint": before.fingerprint}
    now = read((tmp_path / "bottle").rename(tmp_path / "flask"), stored)
    assert now.notes == before.notes
    assert [sample.path.name for sample in now.val_samples] == [sample.path.name for sample in before.val_samples]
    check_fingerprint({}, now, stored, Path("last.ckpt"))
    several = stored | {"categories": ["bottle", "cable"]}
    with pytest.raises(UserError, match=r"data.category: last.ckpt was trained on bottle, cable, .* called bottle now"):
        check_fingerprint({}, now, several, Path("last.ckpt"))


def test_reading_leaves_the_files_alone(root):
    def state():
        return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*.png"))}

    before = state()
    list(module(root, val_fraction=0.3).val_dataloader())
    assert state() == before
    assert np.all([p.suffix == ".png" for p in root.rglob("*") if p.is_file()])

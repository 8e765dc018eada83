"""Features and images where the work is: a table on a GPU, rows that a thread gathers, uint8 images; without a GPU."""

import math
from types import SimpleNamespace
from typing import Any

import albumentations as A
import pytest
import torch

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.dataset import Batch
from anomalib_lite.data.loader import ahead
from anomalib_lite.data.readers import read_folder
from anomalib_lite.data.stored_features import StoredFeatures
from anomalib_lite.errors import UserError
from anomalib_lite.features.precompute import as_rows, shapes_of
from anomalib_lite.runs import held_features
from tests.helpers.fake_cuda import Counted, FakeTrainer, fake_cuda, to_fake
from tests.helpers.image_trees import make_mvtec
from tests.methods.test_contract import CASES, FROM_FEATURES, SIDE, arguments, built, checkpoints, composed, resolved  # noqa: F401  fixtures

META = torch.device("meta")  # a device that any machine has: tensors with a shape and without values
BATCH = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, "bottle", train=9, good=2, defects={"broken": 2})
    make_mvtec(root, "tile", train=2, good=1, defects={"crack": 1})
    return root


def module(root, **options: Any) -> AnomalyDataModule:
    given: dict[str, Any] = {"category": "bottle", "image_size": SIDE, "batch_size": BATCH, "eval_batch_size": 3}
    data = AnomalyDataModule(read_folder, root, **given | options)
    data.setup()
    return data


def stored_of(data: AnomalyDataModule, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> StoredFeatures:
    """Random rows for all images."""
    stored = StoredFeatures(data.eval_pipeline, shapes)
    paths = [str(sample.path) for sample in [*data.train_samples, *data.test_samples]]
    size = sum(math.prod(shape) for shape in shapes)
    stored.add(torch.randn(len(paths), size).to(dtype), {path: row for row, path in enumerate(paths)})
    return stored


# --- a table on the device ---


@pytest.mark.parametrize("name", FROM_FEATURES)
def test_a_step_copies_the_batchs_numbers_alone(name, composed, root):  # noqa: F811
    """24 bytes an image: index, label, category. LTAD draws a second batch, of the classes that it chooses."""
    case = CASES[name]
    data = module(root, category=["bottle", "tile"] if case.category != "bottle" else "bottle")
    model: Any = built(resolved(composed(name)), data.categories)
    with torch.no_grad():
        shapes = shapes_of(model.stored_levels(model.backbone(torch.zeros(1, 3, SIDE, SIDE))))
    stored = stored_of(data, shapes, torch.bfloat16)
    train = [str(sample.path) for sample in data.train_samples]
    with fake_cuda():
        to_fake(model)
        device = torch.device("cuda", 0)
        assert not stored.to_device(train, device, 0)
        assert stored.to_device(train, device, 1e9)
        assert stored.on_device is not None
        assert (stored.on_device[1].dtype, len(stored.on_device[1])) == (torch.bfloat16, len(train))
        data = data.with_features(stored, uses_images=False, device=device)
        model._trainer, model.steps = FakeTrainer(data.categories, SIDE), 4
        model._trainer.datamodule = data
        model.train().on_train_start()
        batches = iter(data.train_dataloader())
        for step in (0, 3):  # of LTAD's two phases, one each
            model._trainer.global_step = step
            with Counted() as count:
                batch = next(batches)
                assert {level.device.type for level in batch["features"]} == {"cuda"}
                model.training_step(model.transfer_batch_to_device(batch, device, 0), 0)
            drawn = 2 if case.method == "ltad" else 0
            assert 0 < count.bytes_to_gpu <= 24 * BATCH * (1 + drawn) + 8 * BATCH * drawn, count.bytes_to_gpu
            assert count.waits <= (case.method == "ltad"), count.waits


def test_rows_of_the_table_are_the_stored_ones(root):
    """In memory, on a `device` that is the CPU: equal numbers, by index and in any order."""
    data = module(root)
    stored = stored_of(data, [(2, 3, 4), (1, 1, 5)], torch.float32)
    train = [str(sample.path) for sample in data.train_samples]
    plain = list(data.with_features(stored).train_dataloader())
    assert stored.to_device(train, torch.device("cpu"), 1e9)
    for batch, expected in zip(data.with_features(stored).train_dataloader(), plain, strict=True):
        assert stored.rows_of(data.train_dataloader().dataset).on_device is not None  # type: ignore[union-attr, arg-type]
        assert all(torch.equal(*both) for both in zip(batch["features"], expected["features"], strict=True))
    test = next(iter(data.with_features(stored).test_dataloader()))  # not in the table
    assert torch.equal(test["features"][1][0].flatten(), stored.row(test["path"][0])[-5:])


def test_rows_from_one_table_and_from_several():
    levels = [torch.randn(7, 3, 2, 2), torch.randn(7, 4, 1, 1)]
    rows, paths = as_rows(levels, torch.float16), [str(i) for i in range(7)]
    one, several = (StoredFeatures(None, shapes_of(levels)) for _ in range(2))  # type: ignore[arg-type]
    one.add(rows, {path: i for i, path in enumerate(paths)})
    several.add(rows[:3], {path: i for i, path in enumerate(paths[:3])})
    several.add(rows[3:], {path: i for i, path in enumerate(paths[3:])})
    dataset: Any = SimpleNamespace(
        samples=[SimpleNamespace(path=p) for p in paths[::-1]], pipeline=None, corrupts=False
    )
    for stored in (one, several):
        found = stored.rows_of(dataset)
        assert found is not None
        assert torch.equal(found.gathered(torch.tensor([6, 0, 2])), rows[[0, 6, 4]])
        split = found.levels(rows)
        assert all(torch.equal(part.movedim(-1, 1), level.half()) for part, level in zip(split, levels, strict=True))


# --- rows and images from the host ---


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_go_to_a_device(workers, root):
    """A thread is one batch ahead; the sampler counts what was handed out."""
    data = module(root, workers=workers, val_fraction=0.3, corrupt=lambda image, rng: (image, image[..., 0] > 9))
    data = data.with_features(None, True, META)
    for loader, keys in ((data.train_dataloader(), {"image", "clean"}), (data.test_dataloader(), {"image"})):
        for batch in loader:
            assert keys <= batch.keys()
            for key in keys:
                assert (batch[key].device, batch[key].dtype, batch[key].shape[1:]) == (
                    META,
                    torch.float32,
                    (3, SIDE, SIDE),
                )
            assert batch["index"].device == batch["label"].device == META
    plain = module(root, workers=workers)
    stored = stored_of(plain, [(2, 2, 3)], torch.bfloat16)
    loader = plain.with_features(stored, False, META).train_dataloader()
    for number, batch in enumerate(loader):
        assert (batch["features"][0].device, batch["features"][0].shape[1:]) == (META, (2, 2, 3))
        assert loader.batch_sampler.next_batch == number + 1  # type: ignore[union-attr]
        if number == 1:
            break
    assert "image" not in batch


def test_images_are_normalised_as_on_the_cpu(root):
    pixels = torch.randint(0, 256, (2, 5, 6, 3), dtype=torch.uint8)
    pipeline = module(root).eval_pipeline
    for found, image in zip(pipeline.normalised(pixels), pixels.numpy(), strict=True):
        assert torch.equal(found, pipeline.tensor(image))
    assert pipeline.normalised(pixels).is_contiguous()


def test_masks_stay_on_the_host(root, composed):  # noqa: F811
    """In training and test: a step of a method that sees images copies the images and three numbers each."""
    model: Any = built(resolved(composed("recontrast unified")), ["bottle", "tile"])
    batch = next(iter(module(root).train_dataloader()))
    with fake_cuda():
        fake = {key: torch.empty_like(each) if isinstance(each, torch.Tensor) else each for key, each in batch.items()}
        with Counted() as count:
            moved = model.transfer_batch_to_device(Batch(fake), torch.device("cuda", 0), 0)
        assert (moved["image"].device.type, moved["mask"].device.type) == ("cuda", "cpu")
        assert count.bytes_to_gpu == batch["image"].nbytes + 24 * BATCH


def test_a_thread_ahead_changes_nothing():
    assert list(ahead(iter(range(5)))) == list(range(5))
    assert list(ahead(iter([]))) == []

    def fails():
        yield 1
        raise ValueError("second")

    batches = ahead(fails())
    assert next(batches) == 1
    with pytest.raises(ValueError, match="second"):
        next(batches)
    left = iter(range(9))
    batches = ahead(left)
    assert next(batches) == 0
    batches.close()
    assert next(left) == 2  # one more was made, and no thread goes on


def test_a_second_batch_starts_no_process_and_looks_nothing_up(root, monkeypatch):
    """LTAD draws one in every step, also where features are not stored."""
    for stored in (False, True):
        data = module(root, workers=2)
        held = data.with_features(stored_of(data, [(2, 2, 3)], torch.float32) if stored else None, False)
        looked: list[Any] = []
        rows_of = StoredFeatures.rows_of
        monkeypatch.setattr(StoredFeatures, "rows_of", lambda self, d: looked.append(1) or rows_of(self, d))  # type: ignore[func-returns-value]  # noqa: B023
        monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter", None)
        batches = [held.training_batch([3, 1], epoch) for epoch in range(4)]
        assert all(batch["index"].tolist() == [3, 1] and ("features" in batch) == stored for batch in batches)
        assert len(looked) <= 2 * stored
        monkeypatch.undo()


# --- what a method that needs images does on a GPU ---


@pytest.mark.parametrize(
    ("gigabytes", "fit", "used", "steps"),
    [(1, True, True, 4), (0, True, False, 4), (1e-9, True, False, 4), (1, False, False, 4), (1, True, False, 0)],
)
def test_the_cache_makes_no_step_slower(gigabytes, fit, used, steps, root, monkeypatch):
    """A method that needs images takes features from a table on the GPU, or computes them; test images' never.

    A closed form, which has no steps, has no table.
    """
    asked: dict[str, Any] = {}

    def precompute(*_: Any, of_test: bool) -> Any:
        asked["of_test"] = of_test
        return stored_of(data, [(2, 2, 3)], torch.bfloat16), {"used": True}

    data, gpu = module(root), torch.device("cuda", 0)
    monkeypatch.setattr(held_features, "precompute", precompute)
    monkeypatch.setattr(held_features, "row_bytes", lambda *_: 24)
    monkeypatch.setattr(StoredFeatures, "to_device", lambda self, paths, device, limit: device == gpu and limit > 0)
    model, trainer = on_gpu(steps)
    cfg = {"hardware": {"feature_memory_gb": 1, "feature_gpu_gb": gigabytes}, "cache": {"enabled": True}}
    found, report = held_features.with_features(cfg, trainer, data, model, fit)
    assert (report["used"], found.stored is not None) == (used, used)
    assert asked == ({"of_test": False} if used else {})
    model.uses_images = False
    assert held_features.with_features(cfg, trainer, data, model, fit)[1]["used"]
    assert asked == {"of_test": True}


def on_gpu(steps: int) -> tuple[Any, Any]:
    """What is asked of a method that needs images, and of its trainer."""
    strategy = SimpleNamespace(
        root_device=torch.device("cuda", 0), reduce_boolean_decision=lambda decision, all=True: decision
    )
    backbone = SimpleNamespace(to=lambda device: None)
    model = SimpleNamespace(
        uses_images=True, frozen_features=True, stored_levels=None, keeps="", total_steps=steps, backbone=backbone
    )
    return model, SimpleNamespace(strategy=strategy)


def test_a_table_that_finds_no_memory(root, monkeypatch):
    """With `auto` the rows stay on the host; a size that was given is an error."""

    def full(*_: Any) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory")

    data = module(root)
    found = stored_of(data, [(2, 2, 3)], torch.bfloat16), {"used": True}
    monkeypatch.setattr(held_features, "precompute", lambda *_, of_test: found)
    monkeypatch.setattr(held_features, "row_bytes", lambda *_: 24)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda *_: (2**36, 2**36))
    monkeypatch.setattr(StoredFeatures, "to_device", full)
    model, trainer = on_gpu(steps=4)
    hardware: dict[str, Any] = {"feature_memory_gb": 1}
    assert held_features.with_features({"hardware": hardware}, trainer, data, model, fit=True)[1] == {"used": True}
    with pytest.raises(UserError, match=r"the features' table does not fit .* a smaller hardware\.feature_gpu_gb"):
        held_features.with_features({"hardware": hardware | {"feature_gpu_gb": 1}}, trainer, data, model, fit=True)


@pytest.mark.parametrize("options", [{"treatment": "texture"}, {"tiling": {"size": 16}}])
def test_images_that_pass_one_by_one_have_no_stored_features(options, root):
    data, cpu = module(root, **options), SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    model: Any = SimpleNamespace(uses_images=False, frozen_features=True, backbone=SimpleNamespace())
    found, report = held_features.with_features({}, cpu, data, model, fit=True)  # type: ignore[arg-type]
    assert (found.stored, report["used"]) == (None, False)


# --- images that are not decoded, or once ---


@pytest.mark.parametrize("map_size", [None, [20, 24], "original"])
def test_masks_without_images_are_the_same(map_size, root):
    data = module(root, map_size=map_size)
    stored = stored_of(data, [(2, 2, 3)], torch.float32)
    decoded, plain = (data.with_features(stored, uses_images).test_dataloader() for uses_images in (True, False))
    count = 0
    for one, other in zip(decoded, plain, strict=True):
        assert one.keys() - {"image"} == other.keys()
        assert torch.equal(one["mask"], other["mask"])
        if map_size:
            assert all(torch.equal(*both) for both in zip(one["gt_mask"], other["gt_mask"], strict=True))
            count += sum(int(mask.sum()) for mask in other["gt_mask"])
        if map_size == "original":
            assert torch.equal(one["size"], other["size"])
    assert count or not map_size


@pytest.mark.parametrize("place", ["memory", "file"])
@pytest.mark.parametrize(("workers", "options"), [
    (0, {}),
    (2, {"augment": [A.HorizontalFlip(p=0.5), A.GaussNoise(p=0.7), A.Rotate([-90, 90], p=0.5)]}),
    (0, {"treatment": "texture", "texture_size": 48}),
    (0, {"val_fraction": 0.4, "corrupt": lambda image, rng: (255 - image, image[..., 0] > rng.integers(250))}),
])  # fmt: skip
def test_kept_images_change_no_bit(place, workers, options, root, monkeypatch):
    """Two epochs of training, and evaluation, with images decoded once and decoded every time."""
    loads: list[Any] = []
    first, again = (module(root, workers=workers, image_memory_gb=gb, **options)
                    for gb in (0, 1e-9 if place == "file" else 1))  # fmt: skip
    load = type(first.eval_pipeline).load

    def counted(self: Any, path: Any) -> Any:
        loads.append(path)
        return load(self, path)

    monkeypatch.setattr(type(first.eval_pipeline), "load", counted)
    names = ["train_dataloader", "test_dataloader", *([] if workers else ["train_eval_dataloader", "val_dataloader"])]
    for epoch in range(2):
        for loader in names:
            for one, other in zip(getattr(first, loader)(), getattr(again, loader)(), strict=True):
                assert one.keys() == other.keys()
                tensors = [key for key, value in one.items() if isinstance(value, torch.Tensor)]
                assert all(torch.equal(one[key], other[key]) for key in tensors), (epoch, loader)
    if not workers:
        for samples, times in ((first.train_samples, 2), (first.val_samples, 1)):
            counts = {loads.count(sample.path) for sample in samples}
            assert counts <= {2 * times + 1}  # the first one's in two epochs, and once


def test_images_are_decoded_anew_where_there_is_no_room(root, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr("os.posix_fallocate", full)
    data = module(root, image_memory_gb=1e-9)
    assert data.kept_images is not None
    assert not data.kept_images.rows
    assert len(list(data.train_dataloader())) == 3

"""The base class of all methods: what a method must define, and what every method inherits."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from anomalib_lite.data.tiling import Tiling
from anomalib_lite.errors import UserError
from anomalib_lite.features.backbones import Backbone, has_bf16
from anomalib_lite.methods import graphs
from anomalib_lite.methods.fitted_buffers import make_room
from anomalib_lite.methods.options import configured_optimizer
from anomalib_lite.methods.schedules import after_every_batch
from anomalib_lite.methods.scoring import maps_and_scores, smoothed_and_scored
from anomalib_lite.methods.tiles import tiled_map, tiles_of

Batch = dict[str, Any]


class AnomalyModule(L.LightningModule):
    """A method: its networks, its loss and its anomaly map, in one file.

    A subclass defines `training_step(batch, batch_idx) -> loss` and `anomaly_map(batch) -> Tensor[B, h, w]`
    (float32, higher is more anomalous, at any resolution). It may also define

    - `check_training()`, which refuses options that would be useless in a new run; stored runs may have such options;
    - `on_fit_start()`, which computes a closed form before training: `for batch in self.fit_batches(): ...`. The
      constructor registers its results as buffers of any shape, as `self.register_buffer("bank", torch.empty(0))`;
    - `configure_optimizers()`, if `optimizer` and `scheduler` from the configuration are not enough;
    - `visualize(batch)` -> {title: [B, 1 or 3, H, W] in [0, 1]}: images for the figures, such as reconstructions;
    - `notes()` -> list of str: what result.json should say of the fitted method, such as its size;
    - `without_effect()` -> {option: setting}: options that another setting leaves without effect, for notes;
    - `held_out_loss(batch)` -> [B]: the loss that is logged over held-out images (data.val_fraction) after every epoch;
    - `phases`, set in the constructor: the number of training phases, each of which has the whole budget;
    - `stopped_early`: a property that ends training after the current batch if it is True;
    - `uses_backbone = False`: the method needs no backbone and ignores a configured one, as in a sweep over methods;
    - `frozen_features = True`: training and test see a frozen backbone's outputs, which `self.features(batch)` returns.
      These features are computed once and shared by runs, unless training crops, augments or corrupts its images;
    - `uses_tokens = True`: `self.tokens(batch)` returns the class and register tokens of a transformer;
    - `kept(levels)`: what the method keeps of the backbone's outputs, such as means of levels, and the text `keeps`,
      which names it in the key of the stored features;
    - `uses_images = False` with frozen_features: neither training nor test uses `image`, and training no `mask`. Images
      whose features are stored are not decoded, and their batches come without these keys;
    - `clip`, set in the constructor: the largest norm of a step's gradient;
    - `lay_out(device)`, which prepares the networks for their device, such as their memory format;
    - `networks()`: what method.compile=true compiles, each called with tensors of one shape in all batches;
    - `unused_parameters = True`: a training step may leave some weights unused, which several devices must know;
    - `own_image_score = True`: `anomaly_map` returns (maps, image scores [B]) for scoring.image_score=own;
    - `on_save_checkpoint(checkpoint)`, which adds plain Python values and tensors to it, and nothing else.

    A batch is a dict: `image` float32 [B, 3, H, W], `mask` bool [B, H, W] (on the host), `label` int64 [B], `category`
    int64 [B], `path` list of str, `index` int64 [B] (positions in the data set). The error for a missing key names it.
    With `data.corrupt`, `image` in training batches is a corrupted version of `clean`; `corruption_mask` marks where.
    Evaluation batches have `is_train_image`: True for training images, which are scored to find the thresholds.
    With scoring.map_size=original, evaluation batches have `size` int64 [B, 2], each image's own (H, W).

    Args:
        backbone: feature extractor, or None.
        optimizer: parameters -> optimizer. scheduler: optimizer -> scheduler, stepped after every batch.
        scoring: the `scoring` group of the configuration.
        image_size: (H, W) of the input; maps are resized to it unless scoring.map_size is another size.
        test_size: (H, W) of test images, or "original" (each image's own size); None: image_size.
        tiling: the grid of tiles of `image_size` into which evaluated images are cut: `anomaly_map` sees batches of
            tiles. None: it sees whole images.
        categories: names of the classes; more than one name is the unified setting.
        precision: hardware.precision, for `autocast`.
        steps: the budget of each training phase, in batches.
        compile: whether `networks()` run as CUDA graphs while training, on a CPU through torch.compile.
    """

    uses_backbone = True
    frozen_features = False
    uses_images = True
    own_image_score = False
    uses_tokens = False
    keeps = ""
    unused_parameters = False
    phases = 1
    stopped_early = False
    clip: float | None = None

    def __init__(
        self,
        backbone: Backbone | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        scoring: dict[str, Any] | None = None,
        image_size: Sequence[int] = (256, 256),
        test_size: Sequence[int] | str | None = None,
        categories: Sequence[str] = ("",),
        precision: str | int = "auto",
        steps: int = 0,
        tiling: Tiling | None = None,
        compile: bool = False,
    ):
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # test may have fewer batches than devices
        if self.frozen_features and backbone is None:
            raise UserError(f"backbone=none: {type(self).__name__} needs a backbone; give one, as backbone=resnet18")
        self.backbone = backbone
        self.optimizer, self.scheduler = optimizer, scheduler
        defaults = {"pixel_smooth": None, "image_smooth": "same", "image_score": "max", "map_size": None}
        self.scoring = defaults | (scoring or {})
        if self.scoring["image_score"] == "own" and not self.own_image_score:
            raise UserError(f"scoring.image_score=own: {type(self).__name__} has no image score of its own; give max")
        self.image_size, self.categories = tuple(image_size), list(categories)
        self.test_size = test_size if isinstance(test_size, str) else tuple(test_size or image_size)
        self.tiling, self.precision = tiling, str(precision)
        self.steps, self.compiles = steps, compile
        self.register_load_state_dict_pre_hook(make_room)
        self.autocasted = False  # whether the method's own networks have run under `self.autocast()`

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} defines no training_step(batch, batch_idx)")

    def anomaly_map(self, batch: Batch) -> Tensor | tuple[Tensor, Tensor]:
        """Anomaly maps of a batch, float32 [B, h, w]; higher is more anomalous."""
        raise NotImplementedError(f"{type(self).__name__} defines no anomaly_map(batch)")

    def visualize(self, batch: Batch) -> dict[str, Tensor]:
        """Further images of a batch for the figures: {title: [B, 1 or 3, H, W] in [0, 1]}."""
        return {}

    def held_out_loss(self, batch: Batch) -> Tensor | None:
        """The loss of every image of a batch without random noise, [B]; None if the method defines no such loss."""
        return None

    def notes(self) -> list[str]:
        """Notes on the fitted method for result.json."""
        return []

    def without_effect(self) -> dict[str, str]:
        """Options, or groups of options, and the setting without their effect, as {"norm": "method.target=zero"}."""
        return {}

    def networks(self) -> list[nn.Module]:
        return []

    def check_training(self) -> None:
        """Raise UserError for options that can't be used in a new run; called before features are computed."""

    def setup(self, stage: str) -> None:
        self.lay_out(self.trainer.strategy.root_device)

    def lay_out(self, device: torch.device) -> None:
        """Prepare the networks for the device that they will run on, such as their memory format."""

    def on_fit_start(self) -> None:
        """With method.compile=true compile the networks; a subclass with its own on_fit_start calls this one first."""
        if self.compiles:
            graphs.start(self)

    def on_fit_end(self) -> None:
        if self.compiles:
            graphs.stop(self)

    @property
    def total_steps(self) -> int:
        """The budget of all training phases together, in batches."""
        return self.phases * self.steps

    def kept(self, levels: list[Tensor]) -> list[Tensor]:
        """What the method keeps of the backbone's outputs for a batch, maps [B, C_i, H_i, W_i]. Features store this.

        The outputs are L maps, followed by L token maps [B, C_i, 1, T] if the backbone has T > 0 tokens. The result has
        the same order: maps, then as many token maps.
        """
        return levels

    def stored_levels(self, levels: list[Tensor]) -> list[Tensor]:
        """`kept(levels)`, rounded to bfloat16 if the backbone computes in it: means and resized levels stay small."""
        kept = self.kept(levels)
        if self.keeps and isinstance(self.backbone, Backbone) and self.backbone.low_precision(kept[0].device):
            return [level.bfloat16().float() for level in kept]
        return kept

    def features(self, batch: Batch) -> list[Tensor]:
        """The kept maps of a batch, list of float32 [B, C_i, H_i, W_i]: read from the batch, or computed."""
        return self.features_and_tokens(batch)[0]

    def tokens(self, batch: Batch) -> list[Tensor]:
        """The kept tokens of a batch, list of float32 [B, T, C_i], the class token first; empty without tokens."""
        return self.features_and_tokens(batch)[1]

    def features_and_tokens(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """`features(batch)` and `tokens(batch)`, for which the backbone runs once at most."""
        if "features" in batch:
            levels = [level.float().contiguous().movedim(-1, 1) for level in batch["features"]]
        else:
            assert self.backbone is not None
            levels = self.stored_levels(self.backbone(batch["image"]))
        if not getattr(self.backbone, "tokens", 0):
            return levels, []
        half = len(levels) // 2
        return levels[:half], [level.flatten(2).mT for level in levels[half:]]

    def autocast(self) -> torch.autocast:
        """A context for operations that tolerate bf16: bf16 if hardware.precision and the device allow it.

        In test and prediction, operations outside of it are computed in float32.
        """
        self.autocasted = True
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.low_precision(self.device))

    def low_precision(self, device: torch.device) -> bool:
        """Whether `autocast` computes in bf16 on this device."""
        return self.precision == "bf16" or (self.precision == "auto" and has_bf16(device))

    def fit_batches(self) -> Iterator[Batch]:
        """All training images in order, prepared as in training, on this device; for closed forms.

        With data.copies, each image comes as so many augmented copies, all with the image's `index`.
        """
        for batch in self.trainer.datamodule.fit_dataloader():  # type: ignore[attr-defined]
            yield self.transfer_batch_to_device(batch, self.device, 0)

    def train_eval_batches(self) -> Iterator[Batch]:
        """All training images once, in order, prepared as in test, on this device; with data.tiling all their tiles."""
        for batch in self.trainer.datamodule.train_eval_dataloader():  # type: ignore[attr-defined]
            yield from self.parts(self.transfer_batch_to_device(batch, self.device, 0))

    def parts(self, batch: Batch) -> Iterator[Batch]:
        """The batch, or with data.tiling batches of the tiles of its images."""
        if self.tiling is None:
            yield batch
        else:
            yield from (tiles for tiles, _ in tiles_of(batch, self.tiling))

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = self.make_optimizer(parameters) if parameters else None
        if optimizer is None or self.scheduler is None:
            return optimizer
        return after_every_batch(optimizer, self.scheduler(optimizer))

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if self.clip is not None:
            # not Lightning's clip_gradients, which refuses fused optimizers in bf16, as if gradients were scaled
            torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], self.clip)

    def make_optimizer(self, parameters: list[Any], **options: Any) -> torch.optim.Optimizer | None:
        """The configured optimizer for parameters or parameter groups; `options` override the configured options."""
        return configured_optimizer(self, parameters, options)

    @property
    def map_size(self) -> tuple[int, ...] | str:
        """(H, W) of the maps, or "original": each map has its image's size."""
        size = self.scoring["map_size"] or (self.tiling.image_size if self.tiling else self.test_size)
        return size if isinstance(size, str) else (size, size) if isinstance(size, int) else tuple(size)

    def score(self, batch: Batch) -> dict[str, Any]:
        """The smoothed `map`, [B, H, W] or (map_size "original") B maps [H_i, W_i], and `score` [B]; float32."""
        found = tiled_map(self.anomaly_map, batch, self.tiling) if self.tiling else self.anomaly_map(batch)
        raw, own = maps_and_scores(found, type(self).__name__, self.scoring["image_score"] == "own")
        size = batch.get("map_size", self.map_size)  # an exported file sets it: all images of its batches have one size
        if not isinstance(size, str):
            scored: dict[str, Any] = smoothed_and_scored(raw, size, self.scoring)
        else:
            sizes = map(tuple, batch["size"].tolist())
            each = [smoothed_and_scored(x, size, self.scoring) for x, size in zip(raw.split(1), sizes, strict=True)]
            scored = {"map": [x["map"][0] for x in each], "score": torch.cat([x["score"] for x in each])}
        return scored if self.scoring["image_score"] != "own" else scored | {"score": own}

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """The masks of defects stay on the host, where the metrics are computed: training images have none."""
        masks = {key: batch[key] for key in ("mask", "gt_mask") if key in batch}
        rest = type(batch)({key: value for key, value in batch.items() if key not in masks})
        return super().transfer_batch_to_device(rest, device, dataloader_idx) | masks

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return self.predict_step(batch | {"is_train_image": dataloader_idx == 1}, batch_idx)  # 1: the training images

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        with torch.autocast(self.device.type, enabled=False):  # hardware.precision=bf16 would round distances to 8 bits
            return self.score(batch)

"""ReContrast: domain-specific anomaly detection via contrastive reconstruction (Guo et al., NeurIPS 2023, arXiv
2306.02602).

A trainable encoder E_t and its frozen copy E_f feed one bottleneck and decoder. From E_t's half the decoder
reconstructs E_f's features, and from E_f's half those of E_t. Anomalies are where the six reconstructions fail.
"""

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anomalib_lite.data.sampler import rank_and_world
from anomalib_lite.errors import UserError
from anomalib_lite.features.backbones import Backbone
from anomalib_lite.methods.base import AnomalyModule, Batch
from anomalib_lite.methods.batch_norm import stabilise, sum_over_ranks
from anomalib_lite.methods.cosine import cosine, distance, products
from anomalib_lite.methods.options import check_drop, check_from_0, unused_by_variant
from anomalib_lite.methods.resizing import resize
from anomalib_lite.methods.reverse_distillation import Bottleneck, Decoder, blocks_of, check_levels, initialise
from anomalib_lite.methods.schedules import with_drop

log = logging.getLogger(__name__)

Pair = tuple[Tensor, Tensor]  # target without gradient, reconstruction; [B, C, H, W] each


class ReContrast(AnomalyModule):
    """One class, or unified (one model for several), or the one-class variant with stabilised training.

    Args:
        variant: "one_class", "unified" or "stable"; "auto" is one of the first two, by the number of categories.
        variants: for each, `activation` of the decoder ("relu", "gelu"); `warm_up`, the share of the budget over which
            α rises; `optimizer`, options that override the configured ones; `lr_drop`, null or {at: share, factor};
            `scoring`, the values for keys of `scoring` that are "auto"; `average`, true for the mean of the six maps
            instead of their sum; `stable`, null or {min_var, eps, reset_every, pause}.
        encoder_bn: E_t's batch norm while training: "eval" keeps the pretrained statistics, "train" uses the batch's;
            or the mode of each category, for models of one category. The stable variant always uses the batch's.
        encoder_lr: E_t's learning rate; the optimizer's is that of bottleneck, decoder and heads.
        mining: [first, last] α of hard mining; None mines nothing.
    """

    frozen_features = True  # E_f's

    def __init__(
        self,
        variants: dict[str, dict[str, Any]],
        variant: str = "auto",
        encoder_bn: str | dict[str, str] = "eval",
        encoder_lr: float = 1e-5,
        mining: list[float] | None = (-3.0, 1.0),  # type: ignore[assignment]
        **context: Any,
    ):
        if variant not in ("auto", *variants):
            raise UserError(f"method.variant={variant}: choose auto, {', '.join(variants)}")
        categories, scoring = context.get("categories", ("",)), context.get("scoring") or {}
        chosen = variant if variant != "auto" else "unified" if len(categories) > 1 else "one_class"
        own = variants[chosen]
        filled = {key: value for key, value in own["scoring"].items() if scoring.get(key) == "auto"}
        super().__init__(**context | {"scoring": scoring | filled})
        self.scoring_of_variant = tuple(filled)
        mode = encoder_bn if isinstance(encoder_bn, str) or len(categories) > 1 else encoder_bn.get(categories[0])
        if mode not in ("eval", "train"):
            raise UserError(f"method.encoder_bn={encoder_bn}: choose eval or train, or give the one of each category")
        if mining is not None and len(mining) != 2:
            raise UserError(f"method.mining={mining}: give null, or the first α and the last one")
        check_from_0(encoder_lr=encoder_lr)
        self.automatic, self.variant, self.own = variant == "auto", chosen, own
        self.encoder_lr, self.mining, self.variants = encoder_lr, mining, tuple(variants)
        self.encoder_trains = mode == "train" or own["stable"] is not None

        frozen = check_levels(self.backbone, self.image_size)  # E_f
        self.encoder = copy.deepcopy(frozen).unfreeze()  # E_t
        freeze_unused(self.encoder, self.image_size)
        if own["stable"]:
            stabilise(self.encoder, own["stable"]["min_var"], own["stable"]["eps"])
        ratio, counts = blocks_of(frozen)
        activation = {"relu": nn.ReLU, "gelu": nn.GELU}[own["activation"]]
        self.bottleneck = Bottleneck(frozen.channels, counts[0], ratio)
        self.decoder = Decoder(frozen.channels, counts, ratio, activation)
        self.heads = nn.ModuleList(nn.ModuleList(nn.Conv2d(c, c, 1) for c in frozen.channels) for _ in range(2))
        initialise(self.heads)
        self.lay_out(self.device)
        self.train()

    def check_training(self) -> None:
        check_drop(f"method.variants.{self.variant}.lr_drop", self.own["lr_drop"])

    def lay_out(self, device: torch.device) -> None:
        """Choose the memory format for a device: channels-last on GPUs and in bf16, where it is faster.

        In float32 on CPUs it saves no time, and PyTorch's batch norm in training is less exact with it: outputs differ
        from those in float64 by 1e-6 and gradients by 7e-6, with contiguous tensors by 5e-8 and 3e-7.
        """
        fast = device.type != "cpu" or self.low_precision(device)
        self.layout = torch.channels_last if fast else torch.contiguous_format
        self.to(memory_format=self.layout)

    def train(self, mode: bool = True) -> "ReContrast":
        super().train(mode)
        self.encoder.train(mode and self.encoder_trains)
        return self

    def pairs(self, batch: Batch) -> list[Pair]:
        """For each level E_f's features and their reconstruction, then E_t's features and their reconstruction."""
        images, frozen = batch["image"].contiguous(memory_format=self.layout), self.features(batch)
        with self.autocast():
            trained = self.encoder.maps(images)
            both = [torch.cat([t, f.to(t.dtype)]) for t, f in zip(trained, frozen, strict=True)]  # one pass over 2B
            halves = [level.unflatten(0, (2, -1)) for level in self.decoder(self.bottleneck(both))]
            of_frozen = [head(half[0]) for head, half in zip(self.heads[0], halves, strict=True)]  # type: ignore
            of_trained = [head(half[1]) for head, half in zip(self.heads[1], halves, strict=True)]  # type: ignore
        return [
            *zip(frozen, of_frozen, strict=True),
            *zip([level.detach() for level in trained], of_trained, strict=True),
        ]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """½ of the sum over pairs 1–3 and ½ of that over pairs 4–6."""
        alpha = self.alpha(self.trainer.global_step)
        pairs = self.pairs(batch)
        stacked = [
            [torch.stack(maps) for maps in zip(*both, strict=True)] for both in zip(pairs[:3], pairs[3:], strict=True)
        ]
        found = [cosine_loss(targets, reconstructions, alpha) for targets, reconstructions in stacked]
        return torch.stack(found).sum() / 2

    def alpha(self, step: int) -> float | None:
        """α before batch `step`, counted from 0: linear over the warm-up, then constant."""
        if self.mining is None:
            return None
        first, last = self.mining
        warm_up = self.own["warm_up"] * self.total_steps
        return first + (last - first) * min(step, warm_up) / warm_up if warm_up else last

    def anomaly_map(self, batch: Batch) -> Tensor:
        """Channel-wise cosine distances of the six pairs at the input's size, summed (unified: averaged)."""
        images = batch["image"]
        maps = [distance(*pair) for pair in self.pairs(batch)]
        levels = torch.zeros(images.shape[:1] + images.shape[2:], device=images.device, dtype=maps[0].dtype)
        for first, second in zip(maps[:3], maps[3:], strict=True):  # interpolation is linear: once for both
            both = (first + second)[:, None]
            levels += resize(both, images.shape[2:], align_corners=True)[:, 0]
        return levels / 6 if self.own["average"] else levels

    def without_effect(self) -> dict[str, str]:
        chosen, own = f"variants.{self.variant}", self.own
        unused = unused_by_variant(self.variants, self.variant, own["optimizer"])
        unused["scheduler"] = "method=recontrast"  # its schedule is the variant's lr_drop
        for key in own["scoring"]:
            if key not in self.scoring_of_variant:
                unused[f"{chosen}.scoring.{key}"] = f"scoring.{key}={self.scoring.get(key)}"
        if self.mining is None:
            unused[f"{chosen}.warm_up"] = "method.mining=null"
        if own["stable"] is not None:
            unused["encoder_bn"] = f"method.{chosen}.stable"
        return unused

    # --- optimisation ---

    def configure_optimizers(self) -> Any:
        rest = [p for part in (self.bottleneck, self.decoder, self.heads) for p in part.parameters()]
        encoder = [p for p in self.encoder.parameters() if p.requires_grad]
        groups = [{"params": rest}, {"params": encoder, "lr": self.encoder_lr}]
        optimizer = self.make_optimizer(groups, **self.own["optimizer"])
        drop = self.own["lr_drop"]
        return optimizer if optimizer is None or drop is None else with_drop(optimizer, drop, self.total_steps)

    def networks(self) -> list[nn.Module]:
        return [self.encoder.net, self.bottleneck, self.decoder]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.automatic:
            log.info("method.variant=auto: %s, for %d categories", self.variant, len(self.categories))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stable variant: clear the decoder's Adam state every `reset_every` batches, then pause E_t."""
        stable, step = self.own["stable"], self.trainer.global_step
        if stable is None or step < stable["reset_every"]:
            return
        since = step % stable["reset_every"]
        decoder, encoder = optimizer.param_groups
        if since == 0:
            for parameter in decoder["params"]:
                optimizer.state.pop(parameter, None)
        if since < stable["pause"]:
            for parameter in encoder["params"]:
                parameter.grad = None  # not stepped: neither moments nor weight decay


def freeze_unused(encoder: Backbone, image_size: Sequence[int]) -> None:
    """Freeze weights beyond the last level, which some timm models keep: DDP fails on weights without a gradient."""
    fixed, small = encoder.net.pretrained_cfg.get("fixed_input_size"), 2 * encoder.reductions[-1]
    outputs = encoder.maps(torch.zeros(1, 3, *(image_size if fixed else (small, small))))
    torch.stack([level.sum() for level in outputs]).sum().backward()
    for parameter in encoder.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def cosine_loss(target: Tensor, reconstruction: Tensor, alpha: float | None) -> Tensor:
    """Mean over images of 1 − cos(vec target, vec reconstruction): maps [P, B, C, H, W] of P pairs -> [P].

    Hard mining: no gradient reaches the reconstruction where its distance m over channels is below μ + α·σ, with μ and
    σ over a pair's batch and space. Both cosines consist of the same three sums over channels, so detaching these sums
    at a position detaches the reconstruction there.
    """
    dot, target2, reconstruction2 = products(target, reconstruction)
    if alpha is not None:
        with torch.no_grad():
            hardness = 1 - cosine(dot, target2, reconstruction2)
            mean, deviation = mean_and_deviation(hardness)
            hard = hardness >= mean + alpha * deviation
        dot = torch.where(hard, dot, dot.detach())
        reconstruction2 = torch.where(hard, reconstruction2, reconstruction2.detach())
    return (1 - cosine(*(x.sum((-2, -1)) for x in (dot, target2, reconstruction2)))).mean(-1)


def mean_and_deviation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased deviation of [P, B, H, W] over B, H and W of all ranks, each of which has as many values."""
    axes, count = (-3, -2, -1), x.shape[-3:].numel() * rank_and_world()[1]
    mean = sum_over_ranks(x.sum(axes, keepdim=True)) / count
    return mean, (sum_over_ranks((x - mean).square().sum(axes, keepdim=True)) / (count - 1)).sqrt()

"""Norm-based one-class classification (Gao, Luo, Shen, Zhang, arXiv 2308.11898), our reading of its abstract.

A frozen backbone's patch features φ are projected by one 1×1 convolution P. A target that is fixed independently of
the data replaces the centre of the hypersphere; the distance to it is minimised and is the score. With a global feature
the same is image-level one-class classification, as on CIFAR-10.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalib_lite.errors import UserError
from anomalib_lite.methods.base import AnomalyModule, Batch
from anomalib_lite.methods.batch_norm import mean_over_ranks
from anomalib_lite.methods.moments import check_folds, descent_time, moments
from anomalib_lite.methods.options import check_counts, check_from_0
from anomalib_lite.methods.patches import patch_features, projection


class NormFeatures(AnomalyModule):
    """The features φ of both forms: of every position, or one of the image.

    Args:
        global_feature: φ is the mean of each level over all positions, so that an image has one score and its map is
            constant. This is our reading of the paper's image-level protocol, of which we know that it exists.
    """

    frozen_features = True
    uses_images = False

    def __init__(self, global_feature: bool = False, **context: Any):
        super().__init__(**context)
        self.keeps = "means over positions" if global_feature else ""

    def kept(self, levels: list[Tensor]) -> list[Tensor]:
        """With a global feature the means of the levels, [B, C_i, 1, 1]."""
        return [level.mean((2, 3), keepdim=True) for level in levels] if self.keeps else levels

    def phi(self, batch: Batch) -> Tensor:
        """φ, [B, h, w, C], with h = w = 1 for a global feature."""
        levels = self.features(batch)
        return (torch.cat(levels, 1) if self.keeps else patch_features(levels)).movedim(1, -1)

    def notes(self) -> list[str]:
        one = "method.global_feature=true: an image has one score; its map is constant and shows no place of a defect"
        return [one] if self.keeps else []


class NormOCC(NormFeatures):
    """The trained projector.

    Features are divided by √λ, with λ the largest eigenvalue of E[φφᵀ], so that one learning rate suits all backbones.
    Plain gradient descent keeps what the score needs, the directions with little energy (see NormOCCClosedForm). Adam
    moves all weights at the same speed and so also changes those directions.

    Args:
        target: "point": ‖Pφ − c‖² with a random c of norm m; "shell": (‖Pφ‖_p − m)²; "zero": ‖Pφ‖², the infeasible
            norm, kept to show that it collapses when trained to convergence.
        norm: m / r₀, where r₀ is the mean ‖P₀φ‖ of the training patches before training.
        p: the shell's norm: 1, 2 or "inf". dim: outputs of P; None: as many as inputs.
        squared: whether the distance to a point or to zero is squared. If not, the loss is the square of the mean
            distance: it has the same minimum, and its gradient vanishes there, as plain descent needs.
        residual: training stops after the first epoch whose mean loss is at most this share, in (0, 1), of the loss
            before training; None: it uses the whole budget. The rule is ours (the paper's budget is not known to us),
            and it sees training images alone.
    """

    direction: Tensor
    radius: Tensor
    scale: Tensor
    loss_before: Tensor
    loss_sum: Tensor
    ended: Tensor

    def __init__(
        self,
        target: str = "point",
        norm: float = 0.1,
        p: float | str = 2,
        squared: bool = True,
        dim: int | None = None,
        residual: float | None = None,
        **context: Any,
    ):
        super().__init__(**context)
        if residual is not None and not 0 < residual < 1:
            raise UserError(f"method.residual={residual}: give a share above 0 and below 1, or null")
        if target not in ("point", "shell", "zero"):
            raise UserError(f"method.target={target}: choose point, shell or zero")
        if p not in (1, 2, "inf", math.inf):
            raise UserError(f"method.p={p}: choose 1, 2 or inf")
        check_from_0(norm=norm)
        check_counts(dim=dim)
        assert self.backbone is not None
        channels = sum(self.backbone.channels)
        self.target, self.norm, self.p, self.squared, self.residual = target, norm, float(p), squared, residual
        self.quadratic = squared and target != "shell"
        self.power = 1 if target == "shell" else 2  # of the mean distance, where the loss is not quadratic
        self.project = nn.Conv2d(channels, dim or channels, 1, bias=False)
        direction = torch.randn(dim or channels)  # c ~ N(0, I), seeded with the run, scaled to norm m by on_fit_start
        self.register_buffer("direction", direction / direction.norm())
        self.register_buffer("radius", torch.tensor(math.nan))
        self.register_buffer("scale", torch.ones(()))  # 1 / √λ
        self.register_buffer("loss_before", torch.zeros(()))  # training
        self.register_buffer("loss_sum", torch.zeros(()))  # of this epoch's batches
        self.register_buffer("ended", torch.tensor(False))
        self.register_load_state_dict_pre_hook(complete)

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Set the features' scale, m = norm · r₀ and the loss before training; a resumed run has them already."""
        if not self.radius.isnan():
            self.stopped_early = bool(self.ended)
            return
        moment, mean = next(moments(self, self.phi))
        self.scale.fill_(torch.linalg.eigvalsh(moment)[-1].clamp_min(1e-30) ** -0.5)
        self.radius.fill_(self.norm * self.mean(self.norms))
        if self.residual is not None:
            loss = self.quadratic_loss(moment, mean) if self.quadratic else self.mean(self.distance) ** self.power
            self.loss_before.fill_(loss)

    def quadratic_loss(self, moment: Tensor, mean: Tensor) -> Tensor:
        """E‖Pφ − c‖² = tr(P S Pᵀ) − 2 cᵀPμ + ‖c‖² from S [C, C] and μ [C] of the features before scaling, float64."""
        weight = (self.project.weight.flatten(1) * self.scale).double()
        centre = self.radius.double() * self.direction.double() * (self.target == "point")
        return ((weight @ moment) * weight).sum() - 2 * centre @ (weight @ mean) + centre.square().sum()

    def mean(self, values: Callable[[Batch], Tensor]) -> Tensor:
        """The mean of a batch's values [B, h, w] over all training patches, float64."""
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in self.fit_batches():
            found = values(batch)
            total, count = total + found.double().sum(), count + found.numel()
        return total / count

    def norms(self, batch: Batch) -> Tensor:
        """‖Pφ‖ in the target's norm, [B, h, w]."""
        return torch.linalg.vector_norm(self.projected(batch), self.p if self.target == "shell" else 2, dim=1)

    def projected(self, batch: Batch, centre: Tensor | None = None) -> Tensor:
        """Pφ − c, [B, dim, h, w]; without a centre c = 0."""
        weight = self.project.weight * self.scale
        if self.keeps:
            return F.conv2d(torch.cat(self.features(batch), 1), weight, None if centre is None else -centre)
        return projection(weight, self.features(batch), centre)

    def offset(self, batch: Batch) -> Tensor:
        """Pφ − c, [B, dim, h, w]; only the point target has c ≠ 0."""
        return self.projected(batch, self.radius * self.direction if self.target == "point" else None)

    def distance(self, batch: Batch) -> Tensor:
        """Distance of every patch to the target, [B, h, w]."""
        if self.target == "shell":
            return (torch.linalg.vector_norm(self.projected(batch).float(), self.p, dim=1) - self.radius) ** 2
        offset = self.offset(batch).float()
        return offset.square().sum(1) if self.squared else torch.linalg.vector_norm(offset, dim=1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if self.residual is not None:
            self.watch(loss.detach(), self.residual)
        return loss

    def loss(self, batch: Batch) -> Tensor:
        """The loss of the batch's patches, from their mean distance to the target."""
        with self.autocast():
            if not self.quadratic:  # a power of the mean over all ranks: that of their own means would be another loss
                return mean_over_ranks(self.distance(batch).mean()) ** self.power
            offset = self.offset(batch)
        return torch.linalg.vector_norm(offset, dtype=torch.float32) ** 2 / offset[:, 0].numel()  # one pass

    def watch(self, loss: Tensor, residual: float) -> None:
        """Add a batch's loss; after an epoch's last batch, decide whether training ends."""
        batches = self.trainer.datamodule.batches_per_epoch  # type: ignore[attr-defined]
        self.loss_sum += mean_over_ranks(loss)  # the same on all ranks: checkpoints hold one
        if (self.global_step + 1) % batches == 0:
            self.ended = self.loss_sum / batches <= residual * self.loss_before
            self.stopped_early = bool(self.ended)
            self.loss_sum.zero_()

    def without_effect(self) -> dict[str, str]:
        options = {"shell": ["squared"], "point": ["p"], "zero": ["p", "norm"]}[self.target]
        return dict.fromkeys(options, f"method.target={self.target}")

    def notes(self) -> list[str]:
        if self.residual is None or not self.steps or self.ended:  # a buffer, so a stored run has it too
            return super().notes()
        ended = f"the budget ended before the loss fell to method.residual={self.residual} of that before training"
        return [*super().notes(), ended]

    def anomaly_map(self, batch: Batch) -> Tensor:
        return self.distance(batch)


def descent(parameters: Iterable[Any], lr: float) -> torch.optim.Optimizer:
    """Plain gradient descent with a momentum of 0.9."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def complete(module: NormOCC, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Add what checkpoints of versions before 0.2 lack: their features were not scaled, and no rule ended training."""
    for name in ("scale", "loss_before", "loss_sum", "ended"):
        state.setdefault(f"{prefix}{name}", getattr(module, name).detach().clone())


class NormOCCClosedForm(NormFeatures):
    """The point target's score after gradient descent, computed without training.

    With S = E[φφᵀ], μ = E[φ] and W* = cμᵀS⁻¹, descent of E‖Wφ − c‖² gives W_t = W* + (W₀ − W*)A, A = (I − 2ηS)^t.
    In the mean over a random W₀ (zero mean, rows scaled to E‖W₀φ‖² = E‖φ‖²) the score is
    ‖Aφ‖² + ‖c‖²(1 − μᵀS⁻¹(I − A)φ)², a soft minor-subspace distance and the converged projector's score.
    Time has no unit: t runs until E‖Aφ‖² = residual · E‖φ‖².

    Args:
        norm: ‖c‖ / r₀ with r₀² = E‖φ‖². residual: share of the projection's energy that remains, in (0, 1].
        folds: 0, or a number from 2: the training images are divided into so many parts, and each part is scored by a
            model of the others. So thresholds do not come from images that the model was fitted to.
    """

    decay: Tensor
    solution: Tensor
    radius2: Tensor
    fold_decay: Tensor
    fold_solution: Tensor
    fold_radius2: Tensor

    def __init__(self, norm: float = 0.1, residual: float = 0.01, folds: int = 0, **context: Any):
        super().__init__(**context)
        if not 0 < residual <= 1:
            raise UserError(f"method.residual={residual}: give a share above 0, at most 1")
        check_from_0(norm=norm)
        check_folds(folds)
        assert self.backbone is not None
        channels = sum(self.backbone.channels)
        self.norm, self.residual, self.folds = norm, residual, folds
        models = {"": (), "fold_": (folds,)} if folds else {"": ()}
        for prefix, shape in models.items():
            self.register_buffer(f"{prefix}decay", torch.zeros(*shape, channels, channels))  # A
            self.register_buffer(f"{prefix}solution", torch.zeros(*shape, channels))  # (I − A)S⁻¹μ
            self.register_buffer(f"{prefix}radius2", torch.zeros(shape))  # ‖c‖²

    @torch.no_grad()
    def on_fit_start(self) -> None:
        models = [self.solved(*fit) for fit in moments(self, self.phi, self.folds)]
        self.decay, self.solution, self.radius2 = models[0]
        for part, model in enumerate(models[1:]):
            for buffer, value in zip((self.fold_decay, self.fold_solution, self.fold_radius2), model, strict=True):
                buffer[part] = value

    def solved(self, moment: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A, (I − A)S⁻¹μ and ‖c‖², float32, from S and μ, float64."""
        energy, axes = torch.linalg.eigh(moment)  # S = axes · diag(energy) · axesᵀ
        energy = energy.clamp_min(0)
        decay = torch.exp(-descent_time(energy, self.residual) * energy)
        # (1 − e^(−τλ)) / λ → τ as λ → 0: no division by the vanishing energies of unused directions
        solved = torch.where(energy > 1e-12 * energy[-1], (1 - decay) / energy.clamp_min(1e-300), 0)
        return (
            ((axes * decay) @ axes.T).float(),
            ((axes * solved) @ (axes.T @ mean)).float(),
            (self.norm**2 * energy.sum()).float(),
        )

    def anomaly_map(self, batch: Batch) -> Tensor:
        phi = self.phi(batch)
        if not (self.folds and batch.get("is_train_image")):
            return self.scored(phi, self.decay, self.solution, self.radius2)
        models = [
            (self.fold_decay[i], self.fold_solution[i], self.fold_radius2[i]) for i in batch["index"] % self.folds
        ]
        return torch.stack([self.scored(image, *model) for image, model in zip(phi, models, strict=True)])

    @staticmethod
    def scored(phi: Tensor, decay: Tensor, solution: Tensor, radius2: Tensor) -> Tensor:
        """The score of patches [..., C], [...]."""
        return (phi @ decay).square().sum(-1) + radius2 * (1 - phi @ solution).square()

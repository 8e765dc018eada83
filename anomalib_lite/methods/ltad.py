"""LTAD, our reading (Ho, Peng, Vasconcelos, CVPR 2024, arXiv 2403.20236): long-tailed anomaly detection.

One model serves all classes, of which some have few images. The class is known, in test too; its name is not used. We
know only the abstract and second-hand notes: sizes, losses and the synthesis of whole images are our choices.

Phase 1 learns a pseudo name of each class from a frozen vision–language model, and a VAE of patch features conditioned
on it. Phase 2 fills the tail classes up with features from the VAE, and learns UniAD's transformer Π and a classifier
of patches into normal and abnormal ones of their class. The score of a patch p of class c is S = S_rec + λ · S_sem,
where S_rec = ‖Π(p) − p‖², standardised per class on training patches, and S_sem is the classifier's probability.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomalib_lite.errors import UserError
from anomalib_lite.features.vision_language import VisionLanguage
from anomalib_lite.methods.base import Batch
from anomalib_lite.methods.conditional_vae import ConditionalVAE
from anomalib_lite.methods.options import check_from_0
from anomalib_lite.methods.prompts import PROMPTS, Prompts, TextFree
from anomalib_lite.methods.resizing import resize
from anomalib_lite.methods.transformer import jitter
from anomalib_lite.methods.uniad import UniAD, tokens_of

FILL: dict[str, Callable[[list[int]], float]] = {"median": statistics.median, "largest": max}
SYNTHESES = ("decoded", "between")


class LTAD(UniAD):
    """LTAD, our reading. A VisionLanguage backbone embeds text; other backbones have class vectors learned directly.

    Args:
        classifier_weight: λ, the weight of S_sem; 0 leaves the semantic classifier out.
        class_names: "learned" in phase 1; or "fixed": the categories' own names, without text their random start.
        fill: the count to which tail classes are filled up with synthetic images: the classes' "median" or "largest";
            None is no synthesis.
        synthesis: a synthetic image is made of a training image, either "decoded": its patches are encoded and decoded
            by the VAE; or "between": they are moved a random part of the way to those of another image of the class.
        temperature: τ of all cosines. beta: weight of the VAE's Kullback–Leibler divergence.
        strong: jitter of the classifier's abnormal patches; half of the images have patches of another class instead.
        prompts: texts for `class`, `normal` and `abnormal`, in which {} stands for the class.
        context: the options of UniAD's transformer, its `jitter` and `clip`, and the base's arguments.
    """

    unused_parameters = True  # in each phase those of the other one, and what an option leaves out

    conditions: Tensor
    fixed_states: Tensor
    error_mean: Tensor
    error_std: Tensor

    def __init__(
        self,
        classifier_weight: float = 1.0,
        class_names: str = "learned",
        fill: str | None = "median",
        synthesis: str = "decoded",
        temperature: float = 0.07,
        beta: float = 1e-3,
        strong: float = 40.0,
        prompts: dict[str, str] | None = None,
        **context: Any,
    ):
        super().__init__(**context)
        assert self.backbone is not None
        if class_names not in ("learned", "fixed"):
            raise UserError(f"method.class_names={class_names}: choose learned or fixed")
        if fill is not None and fill not in FILL:
            raise UserError(f"method.fill={fill}: choose {', '.join(FILL)} or null")
        if synthesis not in SYNTHESES:
            raise UserError(f"method.synthesis={synthesis}: choose {' or '.join(SYNTHESES)}")
        check_from_0(classifier_weight=classifier_weight, beta=beta, strong=strong)
        if temperature <= 0:
            raise UserError(f"method.temperature={temperature}: give a number above 0")
        self.classifier_weight, self.fill, self.temperature = classifier_weight, fill, temperature
        self.beta, self.strong, self.synthesis = beta, strong, synthesis
        count, channels = len(self.categories), sum(self.backbone.channels)
        self.language: Any
        if isinstance(self.backbone, VisionLanguage):
            self.language, self.variant = Prompts(self.backbone, PROMPTS | (prompts or {})), self.backbone.kind
        else:
            self.language, self.variant = TextFree(count, self.backbone.channels[-1]), "text_free"
        learned, text = class_names == "learned", self.language.dim
        self.names = nn.Parameter(self.language.start(self.categories, not learned), requires_grad=learned)  # s_c
        self.vae = ConditionalVAE(channels, text)
        self.project = nn.Sequential(nn.Linear(channels, 512), nn.GELU(), nn.Linear(512, text))
        self.phases = 2 if fill or (classifier_weight and learned) else 1  # nothing to learn in the first one otherwise
        self.register_buffer("conditions", torch.full((count, text), torch.nan))  # t_c, once phase 1 has ended
        states = 0 if self.language.learns_states else 2
        self.register_buffer("fixed_states", torch.full((count, states, text), torch.nan))
        self.register_buffer("error_mean", torch.zeros(count))
        self.register_buffer("error_std", torch.ones(count))

    def networks(self) -> list[nn.Module]:
        return [*super().networks(), self.vae, self.project]

    def without_effect(self) -> dict[str, str]:
        no_weight, fixed = not self.classifier_weight, not self.names.requires_grad
        rules = (
            (self.fill is None, "synthesis beta", "method.fill=null"),
            (self.fill and len(self.categories) == 1, "fill synthesis", "one category"),
            (no_weight, "strong prompts.normal prompts.abnormal", "method.classifier_weight=0"),
            (no_weight and fixed, "temperature", "method.classifier_weight=0 and method.class_names=fixed"),
            (
                self.phases == 1 and no_weight,
                "class_names temperature",
                "method.classifier_weight=0 and method.fill=null",
            ),
            (self.language.learns_states, "prompts", "a backbone without text"),
        )
        unused = {option: setting for holds, options, setting in rules if holds for option in options.split()}
        return super().without_effect() | unused

    # --- training images of chosen classes ---

    def on_train_start(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        samples = [(i, sample) for i, sample in enumerate(data.train_samples) if not sample.label]
        self.images = [[i for i, x in samples if x.category == name] for name in self.categories]
        counts = [len(indices) for indices in self.images]
        goal = int(FILL[self.fill](counts)) if self.fill else 0
        self.lacking = torch.tensor([max(0, goal - number) for number in counts], dtype=torch.float32)
        self.share = float(self.lacking.sum()) / sum(counts)  # synthetic images per real image
        replaced = self.lacking / (self.lacking + torch.tensor(counts))  # of each class when it is filled up
        self.replaced = replaced.to(self.device) if self.fill and data.balanced else None
        self.first_phase_ended = not bool(self.conditions[0, 0].isnan())  # read once: steps don't wait for the device

    def drawn(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, L, C] and embedding [B, e] of a random training image of each of these classes [B]."""
        indices = [self.images[c][int(torch.randint(len(self.images[c]), ()))] for c in classes.tolist()]
        batch = self.trainer.datamodule.training_batch(indices, self.global_step)  # type: ignore[attr-defined]
        levels = self.features(self.transfer_batch_to_device(batch, self.device, 0))
        return tokens_of(levels[0]), self.language.image(levels)

    # --- the two phases ---

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.phases == 2 and self.global_step < self.total_steps // 2:
            return self.first_phase(len(batch["path"]))
        if not self.first_phase_ended:
            self.end_first_phase()
        return self.second_phase(batch)

    def first_phase(self, count: int) -> Tensor:
        """For images of uniformly drawn classes: cross-entropy of their names, ‖f − f̂‖² + β · KL of their patches."""
        classes = torch.randint(len(self.categories), (count,))
        tokens, images = self.drawn(classes)
        classes = classes.to(self.device)
        with torch.set_grad_enabled(self.names.requires_grad):
            text = F.normalize(self.language.classes(self.names), dim=-1)
        loss = torch.zeros((), device=self.device)
        if self.names.requires_grad:
            loss = loss + F.cross_entropy(F.normalize(images, dim=-1) @ text.T / self.temperature, classes)
        if self.fill:
            decoded, mean, log_variance = self.coded(tokens, text.detach()[classes])  # names learn from classes alone
            divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1) / 2
            loss = loss + ((tokens - decoded).square().sum(-1) + self.beta * divergence).mean()
        return loss

    def coded(self, tokens: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with self.autocast():
            return self.vae(tokens, text)

    @torch.no_grad()
    def end_first_phase(self) -> None:
        self.first_phase_ended = True
        self.conditions.copy_(F.normalize(self.language.classes(self.names), dim=-1))
        if not self.language.learns_states:
            self.fixed_states.copy_(self.language.states(self.names))

    def second_phase(self, batch: Batch) -> Tensor:
        """MSE of Π on jittered tokens, real and synthetic, and the classifier's binary cross-entropy."""
        tokens, classes = self.filled_up(self.joined_tokens(batch), batch["category"])
        loss = F.mse_loss(self.reconstructed(jitter(tokens, self.jitter)), tokens)
        if not self.classifier_weight:
            return loss
        normal, abnormal = self.logits(tokens, classes), self.logits(self.spoiled(tokens, classes), classes)
        return loss + (F.softplus(normal).mean() + F.softplus(-abnormal).mean()) / 2

    @torch.no_grad()
    def filled_up(self, tokens: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The batch and, on average, its share of the synthetic images that classes lack.

        With data.balanced nothing is added. Instead, an image becomes synthetic with the share that synthetic images
        have in its class when the class is filled up.
        """
        if self.replaced is not None:
            chosen = torch.rand(len(tokens), device=self.device) < self.replaced[classes]
            return torch.where(chosen[:, None, None], self.synthetic(tokens, classes, len(tokens)), tokens), classes
        count = int(len(tokens) * self.share + float(torch.rand(())))
        if not count:
            return tokens, classes
        drawn = torch.multinomial(self.lacking, count, replacement=True)
        real, more = torch.cat((tokens, self.drawn(drawn)[0])), torch.cat((classes, drawn.to(self.device)))
        return torch.cat((tokens, self.synthetic(real, more, count))), more

    def synthetic(self, tokens: Tensor, classes: Tensor, count: int) -> Tensor:
        """Synthetic images [count, L, C] made of a batch's last ones. Π needs patches that belong together.

        The other image of "between" is from the batch. An image that is alone with its class stays as it is.
        """
        own, text = tokens[-count:], self.conditions[classes[-count:]]
        if self.synthesis == "decoded":
            return self.coded(own, text)[0]
        different = classes[:, None] != classes
        order = torch.rand(different.shape, device=self.device).fill_diagonal_(-1).masked_fill_(different, -2)
        with self.autocast():
            return self.vae.between(own, tokens[order.argmax(1)[-count:]], text, torch.rand(count, device=self.device))

    def spoiled(self, tokens: Tensor, classes: Tensor) -> Tensor:
        """Abnormal tokens [B, L, C]: an image's, strongly jittered, or those of an image of another class."""
        others = classes[:, None] != classes
        partner = torch.rand(others.shape, device=self.device).masked_fill(~others, -1).argmax(1)
        cut = others.any(1) & (torch.rand(len(tokens), device=self.device) < 0.5)
        return torch.where(cut[:, None, None], tokens[partner], jitter(tokens, self.strong))

    def logits(self, tokens: Tensor, classes: Tensor) -> Tensor:
        """Log odds [B, L] that patches are abnormal: (cos with t_abnormal − cos with t_normal) / τ."""
        states = self.language.states(self.names.detach()) if self.language.learns_states else self.fixed_states
        normal, abnormal = F.normalize(states, dim=-1)[classes].unbind(1)
        with self.autocast():
            patches = self.project(tokens)
        patches = F.normalize(patches.to(tokens.dtype), dim=-1)
        return (patches @ (abnormal - normal)[..., None])[..., 0] / self.temperature

    # --- the score ---

    def errors(self, tokens: Tensor) -> Tensor:
        """‖Π(p) − p‖² of patches [B, L, C] -> [B, L]."""
        return (self.reconstructed(tokens) - tokens).square().sum(-1)

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Mean and standard deviation of the training patches' errors, per class."""
        sums = torch.zeros(3, len(self.categories), dtype=torch.float64, device=self.device)
        self.eval()
        for batch in self.train_eval_batches():
            errors = self.errors(self.joined_tokens(batch)).double()
            each = torch.stack((torch.ones_like(errors), errors, errors.square())).sum(-1)
            sums.index_add_(1, batch["category"], each)
        self.train()
        count, total, squares = sums
        mean = total / count
        self.error_mean.copy_(mean)
        self.error_std.copy_((squares / count - mean.square()).clamp_min(0).sqrt().clamp_min(1e-12))

    def anomaly_map(self, batch: Batch) -> Tensor:
        tokens, classes = self.joined_tokens(batch), batch["category"]
        score = (self.errors(tokens) - self.error_mean[classes, None]) / self.error_std[classes, None]
        if self.classifier_weight:
            score = score + self.classifier_weight * self.logits(tokens, classes).sigmoid()
        grid = score.unflatten(1, self.grid)[:, None]
        return resize(grid, self.image_size, align_corners=True)[:, 0]

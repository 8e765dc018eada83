"""Vision–language models from Hugging Face checkpoints: image encoders as backbones, text encoders for prompts."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from anomalib_lite.errors import UserError
from anomalib_lite.features.backbones import Backbone
from anomalib_lite.features.hub import hub_or_cache, line_of

KINDS = ("align", "clip")


class VisionLanguage(Backbone):
    """ALIGN or CLIP from a Hugging Face checkpoint: the image encoder is a backbone like timm's, `prompt` embeds text.

    Input images [B, 3, H, W] are ImageNet-normalised; the model converts them to the checkpoint's normalisation. All
    weights stay frozen.

    Args:
        name: a checkpoint of the hub, or a local folder written by `save_pretrained`, with tokenizer and image
            processor.
        layers: indices of outputs; for ALIGN's EfficientNet the last map of each resolution (as in timm, 0 has half of
            the input's), for CLIP's transformer the blocks.
        weights: "auto" (the checkpoint's) or "none" (random).
        precision, image_sizes: as for Backbone.

    Raises:
        UserError: transformers is not installed; the checkpoint is unavailable, damaged, incomplete, or of another
            model; a layer does not exist.
    """

    casts_weights = False
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        name: str,
        layers: Sequence[int],
        weights: str = "auto",
        precision: str = "auto",
        image_sizes: Sequence[Sequence[int]] = (),
    ):
        nn.Module.__init__(self)
        if str(weights) not in ("auto", "none"):
            raise UserError(f"backbone.weights={weights}: give auto or none; backbone.name may be a folder")
        self.name, self.layers, self.weights, self.precision = name, list(layers), str(weights), str(precision)
        self.net, self.tokenizer, (scale, shift) = _load(name, self.weights)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.frozen, self.embeds = True, False
        self.requires_grad_(False).eval()
        self.kind: str = self.net.config.model_type
        self.dim: int = self.net.config.projection_dim
        side = self.net.config.vision_config.image_size if self.kind == "clip" else 64
        hidden = [self._map(x, (side, side)) for x in self._tower(torch.zeros(1, 3, side, side)).hidden_states]
        if self.kind == "clip":
            outputs = list(range(1, len(hidden)))
        else:
            sizes = [x.shape[-1] for x in hidden]
            outputs = [i for i, size in enumerate(sizes) if i + 1 == len(sizes) or sizes[i + 1] != size]
        if max(self.layers) >= len(outputs):
            raise UserError(f"backbone.layers={self.layers}: {name} has the layers 0 to {len(outputs) - 1}; give these")
        self.outputs = [outputs[i] for i in self.layers]
        patch = self.net.config.vision_config.patch_size if self.kind == "clip" else 1
        for size in image_sizes:
            if any(n % patch for n in size):
                raise UserError(
                    f"data.image_size={'×'.join(map(str, size))}: {name} takes multiples of {patch}; give one"
                )
        self.channels_last, self.grids = [False] * len(self.outputs), {}
        self.channels = [hidden[i].shape[1] for i in self.outputs]
        self.reductions = [side // hidden[i].shape[-1] for i in self.outputs]

    @classmethod
    def normalisation(cls, name: str) -> dict[str, Sequence[float]]:
        """ImageNet's mean and standard deviation: the model converts its input itself."""
        return {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}

    def embedding(self) -> "VisionLanguage":
        """From now on, `forward` appends the images' embeddings, [B, dim, 1, 1], to the outputs."""
        if not self.embeds:
            self.embeds, self.layers = True, [*self.layers, "image"]  # type: ignore[list-item]  # in the cache's key
        return self

    def unfreeze(self) -> Backbone:
        raise UserError(f"backbone.name={self.name}: this method needs a trainable backbone; give a timm model")

    def _tower(self, images: Tensor) -> Any:
        options = {"interpolate_pos_encoding": True} if self.kind == "clip" else {}
        with torch.no_grad():
            return self.net.get_image_features(pixel_values=images, output_hidden_states=True, **options)

    def _map(self, hidden: Tensor, size: Sequence[int]) -> Tensor:
        """A map [B, C, H, W] from tokens [B, 1 + H·W, C] without the class token; a map is returned as it is."""
        if self.kind != "clip":
            return hidden
        patch = self.net.config.vision_config.patch_size
        return hidden[:, 1:].mT.unflatten(2, (size[0] // patch, size[1] // patch))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return a list of float32 [B, C_i, H_i, W_i]; after `embedding()` the last one is [B, dim, 1, 1]."""
        low = self.low_precision(images.device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=low):
            out = self._tower(images * self.scale + self.shift)
        levels = [self._map(out.hidden_states[i], images.shape[-2:]).float().contiguous() for i in self.outputs]
        return [*levels, out.pooler_output.float()[..., None, None]] if self.embeds else levels

    @property
    def table(self) -> nn.Embedding:
        """The text encoder's embedding of its tokens."""
        return self.net.text_model.get_input_embeddings()

    def ids(self, text: str) -> list[int]:
        """Token ids of the text, with the start and the end token around them."""
        return list(self.tokenizer(text)["input_ids"])

    def prompt(self, text: str, tokens: Tensor) -> Tensor:
        """Text embeddings [K, dim] of `text`, whose {} is replaced by a token with embedding tokens[k], [K, width]."""
        before, _, after = text.partition("{}")
        begin, *words, end = self.ids(before)
        # the id in the slot is arbitrary, but not the end token's: CLIP finds the end token by its id
        ids = [begin, *words, begin, *self.ids(after)[1:-1], end]

        def insert(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
            slot = torch.arange(len(ids), device=embedded.device)[:, None] == 1 + len(words)
            return torch.where(slot, tokens[:, None].to(embedded.dtype), embedded)

        handle = self.table.register_forward_hook(insert)
        try:
            rows = torch.tensor(ids, device=tokens.device).expand(len(tokens), -1)
            return self.net.get_text_features(input_ids=rows, attention_mask=torch.ones_like(rows)).pooler_output
        finally:
            handle.remove()


def _load(name: str, weights: str) -> tuple[Any, Any, tuple[Tensor, Tensor]]:
    """Model, tokenizer, and (scale, shift) from ImageNet-normalised pixels to the model's input."""
    what = f"backbone.name={name}"
    try:
        import transformers
        from transformers.image_processing_utils import BaseImageProcessor
    except ImportError as error:
        raise UserError(f"{what}: this backbone needs transformers: pip install 'anomalib-lite[ltad]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with contextlib.nullcontext() if Path(name).is_dir() else hub_or_cache():
            config = transformers.AutoConfig.from_pretrained(name)
            if config.model_type not in KINDS:
                raise UserError(f"{what}: a {config.model_type} checkpoint; give one of ALIGN or CLIP")
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            processor = BaseImageProcessor.get_image_processor_dict(name)[0]
            if weights == "none":
                return transformers.AutoModel.from_config(config).float(), tokenizer, _affine(processor)
            net, report = transformers.AutoModel.from_pretrained(name, output_loading_info=True, dtype=torch.float32)
    except UserError:
        raise
    except Exception as error:  # hub clients, tokenizers and damaged files raise exceptions of many classes
        if Path(name).is_dir():
            trouble = f"damaged or no checkpoint ({line_of(error)})"
        elif name.startswith(("/", ".", "~")) or name.count("/") > 1:  # no name on the hub looks like this
            trouble = "no such folder"
        else:
            trouble = f"not found in the hub or its cache ({line_of(error)})"
        raise UserError(f"{what}: {trouble}; give a local folder written by save_pretrained") from error
    if lacking := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise UserError(
            f"{what}: the checkpoint lacks {len(lacking)} tensors of its model, {min(map(str, lacking))}; give another"
        )
    return net, tokenizer, _affine(processor)


def _affine(processor: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(scale, shift), [3, 1, 1]: images · scale + shift equals the image processor's output for the same image."""
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    factor = 255 * processor.get("rescale_factor", 1 / 255)
    scale, shift = std * factor, mean * factor - float(bool(processor.get("rescale_offset")))
    if processor.get("do_normalize", True) and processor.get("image_mean") is not None:
        own_mean, own_std = torch.tensor(processor["image_mean"]), torch.tensor(processor["image_std"])
        scale, shift = scale / own_std, (shift - own_mean) / own_std
    return scale[:, None, None], shift[:, None, None]

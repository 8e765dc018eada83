"""Vision–language models for LTAD behind one interface, and what stands in for one where there is no text encoder.

Both give `start` (what is learned of a class), `classes` and `states` (text embeddings of every class, and of its
normal and its abnormal state) and `image` (an image's embedding from a backbone's outputs).
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from anomalib_lite.errors import UserError
from anomalib_lite.features.backbones import Backbone, _hub_or_cache, _line

KINDS = ("align", "clip")
PROMPTS = {"class": "a photo of a {}", "normal": "a photo of a flawless {}", "abnormal": "a photo of a damaged {}"}


class VisionLanguage(Backbone):
    """ALIGN or CLIP from a Hugging Face checkpoint: the image tower is a backbone like timm's, `prompt` embeds text.

    Images [B, 3, H, W], ImageNet-normalised, are brought to the checkpoint's own normalisation. Frozen always.

    Args:
        name: a checkpoint of the hub, or a local folder as `save_pretrained` writes it, with tokenizer and image
            processor.
        layers: of ALIGN's EfficientNet the last map of each resolution, 0 for half of the input's, as timm counts; of
            CLIP's transformer the blocks' outputs.
        weights: "auto" (the checkpoint's) or "none" (random).
        precision: of the image tower, as Backbone's.

    Raises:
        UserError: no transformers; a checkpoint that can't be had, is damaged, incomplete, or of another kind; layers.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, name: str, layers: Sequence[int], weights: str = "auto", precision: str = "auto"):
        nn.Module.__init__(self)
        if str(weights) not in ("auto", "none"):
            raise UserError(
                f"backbone.weights={weights}: give auto or none, and the checkpoint's folder as backbone.name"
            )
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
            raise UserError(f"backbone.layers={self.layers}: {name} has the layers 0 to {len(outputs) - 1}")
        self.outputs = [outputs[i] for i in self.layers]
        self.channels = [hidden[i].shape[1] for i in self.outputs]
        self.reductions = [side // hidden[i].shape[-1] for i in self.outputs]

    def embedding(self) -> "VisionLanguage":
        """From now on the outputs end with the images' embeddings, [B, dim, 1, 1]."""
        if not self.embeds:
            self.embeds, self.layers = True, [*self.layers, "image"]  # type: ignore[list-item]  # part of the cache's key
        return self

    def unfreeze(self) -> Backbone:
        raise UserError(
            f"backbone.name={self.name}: stays frozen; this method trains its encoder: choose one of timm's"
        )

    def _tower(self, images: Tensor) -> Any:
        options = {"interpolate_pos_encoding": True} if self.kind == "clip" else {}
        with torch.no_grad():
            return self.net.get_image_features(pixel_values=images, output_hidden_states=True, **options)

    def _map(self, hidden: Tensor, size: Sequence[int]) -> Tensor:
        """[B, 1 + H·W, C] without the class token, or [B, C, H, W] -> [B, C, H, W]."""
        if self.kind != "clip":
            return hidden
        patch = self.net.config.vision_config.patch_size
        return hidden[:, 1:].mT.unflatten(2, (size[0] // patch, size[1] // patch))

    def forward(self, images: Tensor) -> list[Tensor]:
        """-> list of [B, C_i, H_i, W_i], float32, and after `embedding()` a last [B, dim, 1, 1]."""
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
        """Token ids, between those of the beginning and the end."""
        return list(self.tokenizer(text)["input_ids"])

    def prompt(self, text: str, tokens: Tensor) -> Tensor:
        """Text embeddings [K, dim] of `text`, in which {} stands for one token of embedding tokens[k], [K, width]."""
        before, _, after = text.partition("{}")
        begin, *words, end = self.ids(before)
        # the slot's own id is of no account, but CLIP looks for its end by ids
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


class Prompts:
    """A class is the embedding of a token, its pseudo name s_c, in prompts that a frozen text encoder reads."""

    learns_states = False

    def __init__(self, backbone: VisionLanguage, prompts: dict[str, str]):
        for key in PROMPTS:
            if prompts.get(key, "").count("{}") != 1:
                raise UserError(
                    f"method.prompts.{key}={prompts.get(key)}: give a text in which {{}} stands for the class"
                )
        self.backbone, self.prompts, self.dim = backbone.embedding(), prompts, backbone.dim

    def start(self, categories: Sequence[str], fixed: bool) -> Tensor:
        """[K, width]: drawn as the encoder's tokens are spread; or `fixed`, the mean of the name's tokens."""
        table = self.backbone.table.weight.detach()
        if not fixed:
            return torch.randn(len(categories), table.shape[1]) * table.std()
        return torch.stack([table[self.backbone.ids(name.replace("_", " "))[1:-1]].mean(0) for name in categories])

    def classes(self, names: Tensor) -> Tensor:
        return self.backbone.prompt(self.prompts["class"], names)

    def states(self, names: Tensor) -> Tensor:
        """[K, 2, dim]: normal, abnormal."""
        return torch.stack([self.backbone.prompt(self.prompts[key], names) for key in ("normal", "abnormal")], 1)

    def image(self, levels: list[Tensor]) -> Tensor:
        return levels[-1].flatten(1)


class TextFree(nn.Module):
    """No text: a class is a vector in the space of the deepest level's mean, and each of its two states another one
    beside it, learned directly."""

    learns_states = True

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.dim = dim
        self.offsets = nn.Parameter(torch.randn(count, 2, dim) * dim**-0.5)

    def start(self, categories: Sequence[str], fixed: bool) -> Tensor:
        return torch.randn(len(categories), self.dim) * self.dim**-0.5

    def classes(self, names: Tensor) -> Tensor:
        return names

    def states(self, names: Tensor) -> Tensor:
        """[K, 2, dim]: normal, abnormal."""
        return names[:, None] + self.offsets

    def image(self, levels: list[Tensor]) -> Tensor:
        return levels[-1].mean((2, 3))


def _load(name: str, weights: str) -> tuple[Any, Any, tuple[Tensor, Tensor]]:
    """Model, tokenizer and the affine map of ImageNet-normalised pixels to the model's input."""
    what = f"backbone.name={name}"
    try:
        import transformers
        from transformers.image_processing_utils import BaseImageProcessor
    except ImportError as error:
        raise UserError(f"{what}: needs transformers: pip install 'anomalib-lite[ltad]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with _reachable(name):
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
    except Exception as error:  # whatever a hub client, a tokenizer or a damaged file raises
        if Path(name).is_dir():
            trouble = f"damaged or no checkpoint ({_line(error)})"
        elif name.startswith(("/", ".", "~")) or name.count("/") > 1:  # no name on the hub has these
            trouble = "no such folder"
        else:
            trouble = f"can't be had from the hub or its cache ({_line(error)})"
        raise UserError(f"{what}: {trouble}; give a local folder that save_pretrained has written") from error
    if lacking := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise UserError(
            f"{what}: the checkpoint lacks {len(lacking)} tensors of its model, {sorted(map(str, lacking))[0]}"
        )
    return net, tokenizer, _affine(processor)


@contextlib.contextmanager
def _reachable(name: str) -> Iterator[None]:
    """The hub is asked for what is no local folder; if it does not answer, its cache alone."""
    with contextlib.nullcontext() if Path(name).is_dir() else _hub_or_cache():
        yield


def _affine(processor: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(scale, shift), [3, 1, 1]: images · scale + shift is what the image processor makes of the same picture."""
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    factor = 255 * processor.get("rescale_factor", 1 / 255)
    scale, shift = std * factor, mean * factor - float(bool(processor.get("rescale_offset")))
    if processor.get("do_normalize", True) and processor.get("image_mean") is not None:
        own_mean, own_std = torch.tensor(processor["image_mean"]), torch.tensor(processor["image_std"])
        scale, shift = scale / own_std, (shift - own_mean) / own_std
    return scale[:, None, None], shift[:, None, None]

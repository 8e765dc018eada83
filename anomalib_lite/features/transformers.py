"""What timm's vision transformers give besides maps: class and register tokens, and outputs after the final norm."""

from typing import Any

from timm.models._features import FeatureGetterNet  # timm exports it nowhere else
from torch import Tensor, nn

from anomalib_lite.errors import UserError


class NormedGetter(FeatureGetterNet):
    """timm's getter of a transformer's blocks, with the model's final norm on every block's output."""

    def __init__(self, model: nn.Module, **options: Any):
        if not hasattr(model, "blocks") or isinstance(getattr(model, "norm", nn.Identity()), nn.Identity):
            raise UserError(
                f"backbone.norm=true: {type(model).__name__} has no final norm that fits all of its layers; "
                "give false, or a vision transformer (backbone=dinov2_small)"
            )
        super().__init__(model, norm=True, **options)


def prefix_tokens(net: nn.Module) -> tuple[int, bool]:
    """The number of class and register tokens of a model with `features_only`, and whether a class token is among them.

    (0, False) for models without such tokens.
    """
    model = net.model if isinstance(net, FeatureGetterNet) else None
    return getattr(model, "num_prefix_tokens", 0), getattr(model, "cls_token", None) is not None


def maps_and_tokens(net: Any, images: Tensor) -> list[Tensor]:
    """L maps [B, C_i, H_i, W_i] of a transformer, followed by L token maps [B, C_i, 1, T], the class token first."""
    both = net.model.forward_intermediates(
        images,
        indices=net.out_indices,
        norm=net.norm,
        output_fmt="NCHW",
        intermediates_only=True,
        return_prefix_tokens=True,
    )
    return [*(level for level, _ in both), *(tokens.mT[:, :, None] for _, tokens in both)]

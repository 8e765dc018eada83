"""Transformers' class and register tokens, final norm and pruned blocks, and what a method keeps in the cache."""

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.pipeline import Pipeline
from anomalib_lite.data.readers import read_mvtec
from anomalib_lite.data.transforms import Resize
from anomalib_lite.errors import UserError
from anomalib_lite.features.backbones import Backbone
from anomalib_lite.features.cache import key
from anomalib_lite.features.precompute import precompute
from anomalib_lite.methods.base import AnomalyModule
from tests.helpers.image_trees import make_mvtec
from tests.helpers.run_programs import ROOT

VIT = "test_vit"  # of timm's own tests: 64 channels in 6 blocks, patches of 16, a class token
DINO2, DINO3 = "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"  # a class token and 4 registers
CPU = torch.device("cpu")


def literal(net: Any, images: torch.Tensor, layers: list[int], norm: bool) -> list[torch.Tensor]:
    """All tokens [B, T + N, C] behind the chosen blocks of a whole timm model."""
    x, found = net._pos_embed(net.patch_embed(images)), []
    x, *rope = x if isinstance(x, tuple) else (x,)  # DINOv3 has rotary positions instead of an embedding
    x = net.norm_pre(x)
    for number, block in enumerate(net.blocks[: max(layers) + 1]):
        x = block(x, *rope)
        if number in layers:
            found.append(net.norm(x) if norm else x)
    return found


@pytest.mark.parametrize(
    ("name", "patch", "size", "norm"),
    [(VIT, 16, (32, 32), False), (VIT, 16, (48, 80), True), (DINO2, 14, (56, 42), False), (DINO3, 16, (32, 48), True)],
)
def test_tokens_and_maps_are_those_of_the_whole_model(name, patch, size, norm):
    torch.manual_seed(0)
    net: Any = timm.create_model(name, dynamic_img_size=True).eval()
    backbone = Backbone(name, [0, 2], "none", "32", [size], norm=norm, tokens=True)
    assert len(backbone.net.model.blocks) == 3  # those after the last chosen one are gone
    own = net.state_dict()
    backbone.net.model.load_state_dict({key: own[key] for key in backbone.net.model.state_dict()})
    images, grid = torch.randn(2, 3, *size), (size[0] // patch, size[1] // patch)
    with torch.no_grad():
        expected = literal(net, images, [0, 2], norm)
    found, count = backbone(images), backbone.tokens
    assert (count, backbone.class_token, len(found)) == (1 if name == VIT else 5, True, 4)
    assert backbone.channels == [net.embed_dim] * 2
    assert backbone.grids == {size: [grid] * 2}
    for whole, level, tokens in zip(expected, found[:2], found[2:], strict=True):
        torch.testing.assert_close(level, whole[:, count:].mT.unflatten(2, grid))
        torch.testing.assert_close(tokens, whole[:, :count].mT[:, :, None])
    backbone.tokens = 0
    for level, same in zip(backbone(images), found[:2], strict=True):
        assert torch.equal(level, same)


@pytest.mark.parametrize("grid", [(28, 28), (7, 9)])
def test_the_position_embedding_is_resampled_to_the_grid(grid):
    """From 37² by size, bicubic and antialiased. The published code gives a scale of (28 + 0.1) / 37 and antialiases
    nothing, which differs a little."""
    torch.manual_seed(0)
    backbone = Backbone("vit_small_patch14_dinov2", [0], "none", "32", [(14 * grid[0], 14 * grid[1])])
    model = backbone.net.model
    embedding = model.pos_embed  # [1, 1 + 37 · 37, 384], as in the weights file
    with torch.no_grad():
        found = model._pos_embed(torch.zeros(1, *grid, 384))[0]
    own = embedding[0, 1:].mT.view(1, 384, 37, 37).double()
    expected = F.interpolate(own, grid, mode="bicubic", antialias=True)[0].flatten(1).mT
    torch.testing.assert_close(found[1:].double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[0], (model.cls_token + embedding[:, :1])[0, 0])
    if grid == (28, 28):
        scale = (28 + 0.1) / 37
        published = F.interpolate(own, scale_factor=scale, mode="bicubic")[0].flatten(1).mT
        assert published.shape == expected.shape
        assert 0 < float((published - expected).std() / expected.std()) < 0.7  # of white noise, the hardest case


#: the backbones of timm
READY = [
    file for file in sorted((ROOT / "conf" / "backbone").glob("*.yaml")) if file.stem not in ("align", "clip", "none")
]


@pytest.mark.parametrize("file", READY, ids=lambda file: file.stem)
def test_ready_backbones_have_their_layers(file):
    """Without memory for weights; Dinomaly's blocks have one shape."""
    cfg: Any = OmegaConf.load(file)
    with torch.device("meta"):
        net: Any = timm.create_model(cfg.name, pretrained=False, features_only=True, out_indices=list(cfg.layers))
    info = net.feature_info
    assert len(info.channels()) == len(cfg.layers)
    if file.stem.startswith("dino"):
        assert (len(cfg.layers), len(net.model.blocks)) == (8, cfg.layers[-1] + 1)
        assert set(info.channels()) == {{"small": 384, "base": 768, "large": 1024}[file.stem.rpartition("_")[2]]}
        assert set(info.reduction()) == {16 if "dinov3" in file.stem else 14}


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "swin_tiny_patch4_window7_224"])
def test_models_without_tokens_or_norm(name):
    with pytest.raises(UserError, match=r"^backbone\.norm=true: \w+ has no final norm .*; give false, or") as error:
        Backbone(name, [1], "none", norm=True)
    assert "\n" not in str(error.value)
    plain = Backbone(name, [1], "none", tokens=True)
    assert (plain.tokens, plain.class_token, len(plain(torch.randn(1, 3, 224, 224)))) == (0, False, 1)


class Fused(AnomalyModule):
    """Keeps the mean of two levels, of maps and tokens."""

    frozen_features = uses_tokens = True
    keeps = "mean"

    def kept(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        return [(levels[0] + levels[1]) / 2, (levels[2] + levels[3]) / 2]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_cache_gives_what_a_method_keeps(enabled, tmp_path):
    """From files and from memory, as the method computes it from images."""
    make_mvtec(tmp_path / "data", train=16, good=1, defects={"broken": 1})
    data = AnomalyDataModule(name="x", root=str(tmp_path / "data"), category="bottle", image_size=[32, 48],
                             reader=read_mvtec, batch_size=16, eval_batch_size=16)  # fmt: skip
    data.setup()
    model = Fused(backbone=Backbone(VIT, [1, 3], "none", "32", [(32, 48)], tokens=True))
    strategy = SimpleNamespace(
        root_device=CPU, reduce_boolean_decision=lambda decision, all=True: decision, broadcast=lambda x: x
    )
    trainer: Any = SimpleNamespace(strategy=strategy, is_global_zero=True, global_rank=0, world_size=1)
    cache = {"enabled": enabled, "folder": str(tmp_path / "cache"), "limit_gb": 1, "dtype": "auto"}
    assert model.backbone is not None
    stored, _ = precompute(trainer, data, model.backbone, cache, 1.0, True, model.kept, model.keeps)
    batch: Any = next(iter(data.with_features(stored).fit_dataloader()))
    assert [tuple(x.shape) for x in batch["features"]] == [(16, 2, 3, 64), (16, 1, 1, 64)]
    plain = {name: value for name, value in batch.items() if name != "features"}
    for read, computed in zip(model.features_and_tokens(batch), model.features_and_tokens(plain), strict=True):
        assert len(read) == len(computed) == 1
        assert torch.equal(read[0], computed[0])
    assert model.tokens(batch)[0].shape == (16, 1, 64)
    first = model.backbone(batch["image"])
    torch.testing.assert_close(model.tokens(batch)[0], (first[2] + first[3])[:, :, 0].mT / 2)


def test_the_key_tells_them_apart_and_old_keys_stay():
    pipeline = Pipeline([Resize(32)], (), "imagenet")

    def made(keeps: str = "", **options: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        return key(Backbone(VIT, [1, 3], "none", "32", **options), pipeline, CPU, "auto", keeps)

    plain = made()
    assert set(plain) == {"version", "backbone", "layers", "weights", "pipeline", "bf16", "type", "computed"}
    assert made(tokens=True) == plain | {"tokens": 1}
    assert made("fused") == plain | {"keeps": "fused"}
    assert made(norm=True)["norm"] is True

import json
import re
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from anomalib_lite.errors import ImageSizeError, UserError
from anomalib_lite.features.backbones import Backbone, has_bf16, in_half
from tests.helpers import real_images as real

RESNET = "resnet18.tv_in1k"


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def resnet():
    """A full timm model with random weights and running statistics, in evaluation mode."""
    torch.manual_seed(1)
    model = timm.create_model(RESNET, pretrained=False)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def file(resnet, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "full.safetensors"
    save_file(resnet.state_dict(), path)
    return path


def own_features(model, images, layers):
    with torch.no_grad():
        return model.forward_intermediates(images, indices=layers, intermediates_only=True)


def assert_near(found, expected, precise=True):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= (1e-5 if precise else 0.05) * b.abs().max()


@pytest.mark.parametrize(
    ("name", "layers", "channels", "reductions"),
    [
        (RESNET, [0, 1, 2, 3, 4], [64, 64, 128, 256, 512], [2, 4, 8, 16, 32]),
        (RESNET, [2, 3], [128, 256], [8, 16]),
        ("tf_efficientnet_b0.aa_in1k", [1, 3], [24, 112], [4, 16]),
    ],
)
def test_shapes_and_chosen_layers(images, name, layers, channels, reductions):
    backbone = Backbone(name, layers, weights="none")
    assert (backbone.channels, backbone.reductions) == (channels, reductions)
    levels = backbone(images)
    assert [tuple(x.shape) for x in levels] == [
        (3, c, 64 // r, 64 // r) for c, r in zip(channels, reductions, strict=True)
    ]
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in levels)


@pytest.mark.parametrize("name", [RESNET, "tf_efficientnet_lite0", "test_vit.r160_in1k", "test_convnext.r160_in1k"])
def test_weights_in_bf16_change_no_bit(name, images):
    """A GPU's copy with bf16 weights, under autocast, gives what autocast makes of float32 weights in every pass."""
    backbone = Backbone(name, [1, 2], "none", "bf16", [(64, 64)])
    half = in_half(backbone.net)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain, cast = backbone.maps(images), backbone.maps(images, half)
    assert all(torch.equal(*both) for both in zip(plain, cast, strict=True))
    assert {p.dtype for p in half.parameters()} == {
        torch.bfloat16,
        torch.float32,
    }  # of convolutions and linear layers, others
    backbone.cast_net = (half,)
    assert {p.dtype for p in backbone.state_dict().values() if p.is_floating_point()} == {torch.float32}
    backbone.load_state_dict(backbone.state_dict())
    assert not backbone.cast_net  # other weights, and a CPU


def picture(*size: int) -> torch.Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(224, 224), (64, 96)])
def test_swin_gives_channels_first_at_any_size(size):
    """Beside timm's own conversion to channels first, with the same weights."""
    torch.manual_seed(1)
    backbone = Backbone("swin_tiny_patch4_window7_224", [0, 1], "none", "32", [size])
    model = timm.create_model("swin_tiny_patch4_window7_224", strict_img_size=False).eval()
    own = {key.replace("layers_", "layers."): value for key, value in backbone.net.state_dict().items()}
    assert not model.load_state_dict(own, strict=False).unexpected_keys
    assert_near(backbone(picture(*size)), own_features(model, picture(*size), [0, 1]))
    assert [x.shape[1] for x in backbone(picture(*size))] == backbone.channels == [96, 192]


@pytest.mark.parametrize("size", [(224, 224), (112, 320)])
def test_vit_at_other_sizes_resamples_its_positions(size):
    """Beside a model that timm builds for this size, with positions that timm converts once."""
    torch.manual_seed(1)
    backbone = Backbone("vit_tiny_patch16_224", [0, 1], "none", "32", [size])
    assert backbone.net.model.pos_embed.shape == (1, 197, 192)  # as in the weights file
    model: Any = timm.create_model("vit_tiny_patch16_224", img_size=size).eval()
    model.load_state_dict(checkpoint_filter_fn(backbone.net.model.state_dict(), model), strict=False)
    found = backbone(picture(*size))
    assert_near(found, own_features(model, picture(*size), [0, 1]))
    assert backbone.grids == {size: [tuple(x.shape[2:]) for x in found]} == {size: [(size[0] // 16, size[1] // 16)] * 2}


def test_two_sizes_and_a_third():
    """A texture's crops and images have two sizes; images of a third size are one line where they don't fit."""
    backbone = Backbone("vit_tiny_patch16_224", [0], "none", "32", [(224, 224), (256, 192)])
    assert [tuple(backbone(picture(*size))[0].shape[2:]) for size in backbone.grids] == [(14, 14), (16, 12)]
    assert tuple(backbone(picture(64, 64))[0].shape[2:]) == (4, 4)
    with pytest.raises(
        ImageSizeError, match=r"images of 250×250: vit_tiny_patch16_224 can't take this size .*data\.texture_s"
    ):
        backbone(picture(250, 250))


def test_models_that_take_any_size_are_built_as_before():
    """No option goes to their constructor, so random weights follow the seed as without image sizes."""
    made = []
    for sizes in ([], [(97, 131)]):
        torch.manual_seed(0)
        made.append(Backbone("convnext_atto", [1, 2], "none", "32", sizes))
    found, expected = (backbone(picture(97, 131)) for backbone in made)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert made[1].grids == {(97, 131): [(12, 16), (6, 8)]}


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_local_weights_give_timms_own_features(resnet, images, tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        torch.save(resnet.state_dict(), path)
    else:
        save_file(resnet.state_dict(), path)
    backbone = Backbone(RESNET, [1, 2, 3], weights=str(path), precision="32")
    assert_near(backbone(images), own_features(resnet, images, [1, 2, 3]))


def test_a_file_without_an_unused_layer(resnet, images, tmp_path):
    path = tmp_path / "cut.safetensors"
    left = {k: v for k, v in resnet.state_dict().items() if not k.startswith(("layer4", "fc"))}
    save_file(left, path)
    backbone = Backbone(RESNET, [2, 3], weights=str(path), precision="32")
    assert_near(backbone(images), own_features(resnet, images, [2, 3]))
    with pytest.raises(UserError, match=r"lacks \d+ tensors that layers \[3, 4\] .* layer4\.0\.conv1\.weight"):
        Backbone(RESNET, [3, 4], weights=str(path))


def test_random_weights_follow_the_seed(images):
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(Backbone(RESNET, [2], weights="none")(images)[0])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_frozen_until_unfrozen(file, images):
    backbone = Backbone(RESNET, [2, 3], weights=str(file), precision="32")
    holder = torch.nn.Sequential(backbone)
    before = backbone(images)
    statistics = backbone.net.bn1.running_mean.clone()
    holder.train()
    assert holder.training
    assert not any(module.training for module in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    levels = backbone(images.clone().requires_grad_())
    assert not any(level.requires_grad for level in levels)
    assert all(torch.equal(a, b) for a, b in zip(levels, before, strict=True))
    assert torch.equal(backbone.net.bn1.running_mean, statistics)

    assert backbone.unfreeze() is backbone
    holder.train()
    assert all(module.training for module in backbone.modules())
    sum(level.mean() for level in backbone(images)).backward()
    used = [p for name, p in backbone.named_parameters() if p.grad is not None]
    assert len(used) == len(list(backbone.parameters()))
    assert not torch.equal(backbone.net.bn1.running_mean, statistics)
    holder.eval()
    assert not any(module.training for module in backbone.modules())


def test_bf16_is_near_and_auto_follows_the_hardware(file, images):
    exact, low, auto = (
        Backbone(RESNET, [1, 2, 3], str(file), precision)(images) for precision in ("32", "bf16", "auto")
    )
    assert_near(low, exact, precise=False)
    assert not torch.equal(low[0], exact[0])
    assert all(level.dtype == torch.float32 for level in low)
    expected = low if has_bf16(images.device) else exact
    assert all(torch.equal(a, b) for a, b in zip(auto, expected, strict=True))


def test_the_models_are_timms_again_afterwards(file):
    strict = torch.nn.Module.load_state_dict
    Backbone(RESNET, [2], str(file))
    with pytest.raises(UserError):
        Backbone("resnet34.tv_in1k", [2], str(file))
    assert torch.nn.Module.load_state_dict is strict


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("resnet81", [2], r"backbone\.name=resnet81: timm knows no such model; did you mean .*resnet18"),
        ("resnet18.no_such_tag", [2], r"backbone\.name=resnet18\.no_such_tag: timm knows no such weights; .*tv_in1k"),
        (RESNET, [7], r"backbone\.layers=\[7\]: resnet18\.tv_in1k has the layers 0 to 4; choose"),
        ("vit_tiny_patch16_224", [12], r"backbone\.layers=\[12\]: vit_tiny_patch16_224 has the layers 0 to 11; choose"),
        ("vit_tiny_patch16_224", [1], r"data\.image_size=250: vit_tiny_patch16_224 can't .*; give 240 or 256"),
        ("test_vit", [6], r"backbone\.layers=\[6\]: test_vit has the layers 0 to 5; choose"),
        ("vit_small_patch14_dinov2", [0], r"data\.image_size=250: vit_small_patch14_dinov2 .*; give 238 or 252"),
        ("vit_small_patch16_dinov3", [0], r"data\.image_size=250: vit_small_patch16_dinov3 .*; give 240 or 256"),
        ("timm/resnet18", [1], r"backbone\.name=timm/resnet18: .*hf_hub:OWNER/NAME .*local-dir:FOLDER"),
        ("local-dir:nowhere", [1], r"backbone\.name=local-dir:nowhere: not found, .*config\.json"),
    ],
)
def test_what_does_not_exist_is_named(name, layers, message):
    with pytest.raises(UserError, match=message) as raised, torch.device("meta"):
        Backbone(name, layers, "none", image_sizes=[(250, 250)])
    assert "\n" not in str(raised.value)


@pytest.fixture
def folder(resnet, tmp_path):
    """A folder that timm has written for sharing a model, with another mean and standard deviation."""
    data = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.5, 1.0]}
    timm.models.save_for_hf(resnet, tmp_path / "model", safe_serialization=True, data_config=data)
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    about["pretrained_cfg"] |= data
    (tmp_path / "model" / "config.json").write_text(json.dumps(about))
    return tmp_path / "model"


def test_a_model_in_a_folder(resnet, images, folder, file):
    name = f"local-dir:{folder}"
    for weights in ("auto", str(file)):
        assert_near(Backbone(name, [1, 2], weights, "32")(images), own_features(resnet, images, [1, 2]))
    assert Backbone.normalisation(name) == {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.5, 1.0]}
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"backbone\.name=local-dir:"):
        Backbone(name, [1, 2])


def test_the_mean_and_deviation_of_published_weights():
    """As timm's table of weights has them: ResNets by ImageNet's, the augmented ViTs by one half."""
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert Backbone.normalisation(RESNET) == imagenet
    assert Backbone.normalisation("vit_tiny_patch16_224.augreg_in21k") == {"mean": [0.5] * 3, "std": [0.5] * 3}
    with pytest.raises(UserError, match="resnet81"):
        Backbone.normalisation("resnet81")


def test_wrong_weights_are_refused(resnet, file, tmp_path):
    with pytest.raises(UserError, match=r"none\.pt: no such file"):
        Backbone(RESNET, [2], str(tmp_path / "none.pt"))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(UserError, match=re.escape(str(cut)) + ": damaged"):
        Backbone(RESNET, [2], str(cut))
    with pytest.raises(UserError, match=r"not the weights of wide_resnet50_2|lacks \d+ tensors"):
        Backbone("wide_resnet50_2.tv_in1k", [2], str(file))
    with pytest.raises(UserError, match=r"not the weights of|lacks \d+ tensors"):
        Backbone("tf_efficientnet_b0.aa_in1k", [2], str(file))
    strange = tmp_path / "strange.safetensors"
    save_file({"weight": torch.zeros(3)}, strange)
    with pytest.raises(UserError, match="the file lacks"):
        Backbone(RESNET, [2], str(strange))


def test_weights_of_other_layers_are_refused(tmp_path):
    """Of a network with more blocks, with wider layers, and without a layer; and a text."""
    state = timm.create_model("test_resnet").state_dict()
    save_file(state | {"layer1.2.conv1.weight": torch.zeros(1)}, tmp_path / "deeper.safetensors")
    wider = {key: torch.cat([tensor, tensor]) if tensor.ndim else tensor for key, tensor in state.items()}
    save_file(wider, tmp_path / "wider.safetensors")
    lacking = {key: tensor for key, tensor in state.items() if not key.startswith("layer3.")}
    torch.save(lacking, tmp_path / "without_layer3.pth")
    (tmp_path / "text.pth").write_text("these are no weights")
    name = "test_resnet.r160_in1k"
    for file, message in {
        "deeper.safetensors": rf"these are not the weights of {name} \(layer1.2",
        "wider.safetensors": rf"these are not the weights of {name} \(size mismatch",
        "without_layer3.pth": rf"lacks \d+ tensors that layers \[2, 3\] of {name} need, such as layer3.*another file",
        "text.pth": "damaged, or not a weights file",
    }.items():
        with pytest.raises(UserError, match=rf"^backbone.weights={tmp_path / file}: .*{message}"):
            Backbone(name, [2, 3], str(tmp_path / file))


def test_nothing_loads_a_strange_pickle(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    path = tmp_path / "evil.pt"
    torch.save({"conv1.weight": Evil()}, path)
    with pytest.raises(UserError, match="damaged, or not a weights file"):
        Backbone(RESNET, [2], str(path))
    assert not (tmp_path / "touched").exists()


@pytest.mark.real
def test_published_weights_from_a_local_file(images):
    path = real.weights() / "resnet18_imagenet1k_layers1-3.safetensors"
    model = timm.create_model(RESNET, pretrained=False).eval()
    missing = model.load_state_dict(load_file(path), strict=False).missing_keys
    assert missing
    assert all(key.startswith(("layer4", "fc")) or key.endswith("num_batches_tracked") for key in missing)
    backbone = Backbone(RESNET, [1, 2, 3], str(path), precision="32")
    assert_near(backbone(images), own_features(model, images, [1, 2, 3]))

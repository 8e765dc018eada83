import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from anomalib_lite.errors import UserError
from anomalib_lite.features.backbones import Backbone, has_bf16
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
        Backbone("wide_resnet50_2.tv_in1k", [2], str(file))
    assert torch.nn.Module.load_state_dict is strict


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("resnet81", [2], r"backbone\.name=resnet81: timm knows no such model; did you mean .*resnet18"),
        ("resnet18.no_such_tag", [2], r"backbone\.name=resnet18\.no_such_tag: timm knows no such weights; .*tv_in1k"),
        (RESNET, [7], r"backbone\.layers=\[7\]: resnet18\.tv_in1k has no such layer"),
    ],
)
def test_what_does_not_exist_is_named(name, layers, message):
    with pytest.raises(UserError, match=message):
        Backbone(name, layers, "none")


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

"""The self-supervised autoencoder: against a literal reading in float64, and as runs on generated images."""

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter
from torch import nn

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.readers import read_folder
from anomalib_lite.errors import UserError
from anomalib_lite.methods import dilated_autoencoder, ssae
from anomalib_lite.methods.dilated_autoencoder import DILATIONS, MARGIN, Autoencoder, ConvexCombination, DilatedStack
from anomalib_lite.methods.ssae import SSAE, losses, tone
from anomalib_lite.runs import artifacts as results
from tests.helpers import run_programs as runs
from tests.helpers.fake_cuda import to_fake
from tests.helpers.image_trees import make_mvtec
from tests.helpers.interrupt import assert_same_run, interrupted_after
from tests.helpers.kernels import Kernels, fake_gpu

TINY = (
    "method=ssae", "method.width=4", "hardware=cpu", "hardware.threads=1", "logger=csv", "data.image_size=32",
    "data.batch_size=4", "data.eval_batch_size=4", "trainer.log_every=1", "method.optimizer.lr=1e-2",
    "hardware.measure_cost=false",
)  # fmt: skip


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(shape)).float()


# --- the paper's formulas ---


def literal_loss(output: np.ndarray, clean: np.ndarray, image: np.ndarray, weight: float) -> list[float]:
    """(1−λ)/‖1−M‖₁ ‖(1−M)⊙(f−x)‖² + λ/‖M‖₁ ‖M⊙(f−x)‖², pixel by pixel, an empty mask's term left out."""
    found = []
    for f, x, corrupted in zip(output, clean, image, strict=True):
        sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
        for i in range(x.shape[1]):
            for j in range(x.shape[2]):
                # 8-bit levels, as 1/255 itself is no change
                inside = any(round(255 * float(abs(corrupted[c, i, j] - x[c, i, j]))) > 1 for c in range(3))
                sums[inside] += float(((f[:, i, j] - x[:, i, j]) ** 2).sum())
                counts[inside] += 3
        terms = [(1 - weight, False), (weight, True)]
        found.append(sum(w * sums[part] / counts[part] for w, part in terms if counts[part]))
    return found


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.9, 1.0])
def test_loss_is_the_formula(weight):
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 250, (4, 3, 9, 7)) / 255
    image = clean.copy()
    image[0, :, 2:5, 1:4] += 0.3  # a patch; of image 1 nothing, of image 2 everything
    image[0, 0, 7, 5] += 1 / 255  # no change
    image[0, 2, 8, 6] -= 2 / 255  # the smallest change, in one channel
    image[2] += 5 / 255
    image[3, 1, ::2] += 0.1
    output = rng.random(clean.shape)
    f, x, corrupted = (torch.from_numpy(array).float() for array in (output, clean, image))
    expected = literal_loss(output, clean, image, weight)
    np.testing.assert_allclose(losses(f, x, corrupted, weight).numpy(), np.array(expected), rtol=1e-5)


def test_gradient_of_a_clean_image_is_finite():
    clean = images(2, 3, 8, 8)
    output = images(2, 3, 8, 8, seed=1).requires_grad_()
    losses(output, clean, clean.clone(), 0.9).mean().backward()
    assert output.grad is not None
    assert torch.isfinite(output.grad).all()


def test_convex_combination_is_the_formula():
    torch.manual_seed(0)
    module = ConvexCombination(5).double().eval()
    beta: Any = module.beta
    (first, norm, _), second = beta
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.normal_()
        norm.bias.normal_()
    skip, decoder = (images(2, 5, 4, 3, seed=s).double() for s in (1, 2))
    found = module(skip, decoder).detach().numpy()
    for b in range(2):
        for i in range(4):
            for j in range(3):
                s, d = skip[b, :, i, j].numpy(), decoder[b, :, i, j].numpy()
                z = first.weight[:, :, 0, 0].detach().numpy() @ np.concatenate([s, d, (s - d) ** 2])
                z = (z - norm.running_mean.numpy()) / np.sqrt(norm.running_var.numpy() + norm.eps)
                z = z * norm.weight.detach().numpy() + norm.bias.detach().numpy()
                z = np.where(z > 0, z, 0.01 * z)
                z = second.weight[:, :, 0, 0].detach().numpy() @ z + second.bias.detach().numpy()
                beta = 1 / (1 + np.exp(-z))
                np.testing.assert_allclose(found[b, :, i, j], beta * s + (1 - beta) * d, rtol=1e-9)


def test_receptive_field_of_the_dilated_stack():
    """Each block reaches its dilation further in each direction: 1 + 2 · (1 + 2 + 4 + 8 + 16 + 32) = 127.

    Those whose kernel is wider than a training image keep only its centre.
    """
    assert DILATIONS == (1, 2, 4, 8, 16, 32)
    for side, reach in ((65, 63), (64, 31), (34, 31), (18, 15)):
        check_reach(side, reach)


def check_reach(side, reach):
    stack = DilatedStack(2, side).double().eval()
    for part in stack.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.constant_(part.weight, 1.0)  # positive throughout: nothing cancels
    x = torch.rand(1, 2, 141, 141, dtype=torch.float64, requires_grad=True)
    stack(x)[0, 0, 70, 70].backward()
    assert x.grad is not None
    seen = (x.grad[0, 0] != 0).numpy()
    expected = np.zeros((141, 141), bool)
    expected[70 - reach : 71 + reach, 70 - reach : 71 + reach] = True
    np.testing.assert_array_equal(seen, expected)


def test_dilated_blocks_add_to_their_input():
    torch.manual_seed(0)
    stack = DilatedStack(3, 65).double().eval()
    x = images(2, 3, 9, 9).double()
    expected = x
    for rate, block in zip(DILATIONS, stack, strict=True):
        convolution, norm = list(block.children())[:2]
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        nn.init.normal_(convolution.weight)
        y = nn.functional.conv2d(expected, convolution.weight, padding=rate, dilation=rate)
        y = y / (1 + norm.eps) ** 0.5  # an untrained batch norm
        expected = expected + torch.maximum(y, 0.01 * y)
    torch.testing.assert_close(stack(x), expected)


def test_a_larger_image_in_test_meets_no_untrained_weights():
    """Trained on 64², the bottleneck has 10 × 10 positions: kernels of dilations from 8 on are wider."""
    torch.manual_seed(0)
    net = Autoencoder(2, side=64)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        net(images(2, 3, 64, 64)).square().mean().backward()
        optimizer.step()
    for rate, block in zip(DILATIONS, net.bottleneck, strict=True):
        kernel = block[0].weight.detach().clone()  # type: ignore[index]
        assert kernel.shape[-1] == (3 if rate < 5 else 1)
        assert kernel.all()


@pytest.mark.parametrize("skip", ["none", "concat", "ccm"])
def test_network_is_fully_convolutional(skip):
    """Any size; and away from the border a shift by 8 of the image is a shift of the output."""
    torch.manual_seed(0)
    net = Autoencoder(4, skip).eval()
    del net.bottleneck[2:]  # a smaller receptive field
    with torch.no_grad():
        for height, width in ((37, 50), (16, 16), (9, 70), (64, 64)):
            assert net(images(2, 3, height, width)).shape == (2, 3, height, width)
        x = images(1, 3, 176, 176)
        whole, part = net(x), net(x[..., 8:, 8:])
    torch.testing.assert_close(whole[..., 80:96, 80:96], part[..., 72:88, 72:88], rtol=1e-4, atol=1e-5)


def test_the_margin_is_a_mirror_and_goes_again():
    """An image with its mirrored surroundings gives in its middle what the image gives, but for the padding's reach."""
    torch.manual_seed(0)
    net = Autoencoder(4).eval()
    x = images(1, 3, 32, 40)
    framed = nn.functional.pad(x, (MARGIN,) * 4, mode="reflect")
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        found = net(x)
        patch.setattr(dilated_autoencoder, "MARGIN", 0)
        expected = net(framed)[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("skip", ["none", "concat", "ccm"])
def test_skips_reach_the_output_or_not(skip):
    """A change that the bottleneck does not pass on gets through the skips only where there are some."""
    net = Autoencoder(4, skip).eval()
    with torch.no_grad():
        net.down3[1][0].weight.zero_()  # type: ignore[index]
        net.down3[1][1].bias.zero_()  # type: ignore[index]
        outputs = [net(images(1, 3, 32, 32, seed=s)) for s in (1, 2)]
    assert torch.equal(*outputs) == (skip == "none")


def test_score_is_the_formula():
    """Mean squared error of channels; pixels: box filter of 11, three times; image: maximum of the 21-averaged."""
    scoring = {"pixel_smooth": {"box": 11, "times": 3}, "image_smooth": {"box": 21}, "image_score": "max"}
    model = SSAE(width=4, scoring=scoring, image_size=(40, 56), precision="32").eval()
    batch = {"image": images(2, 3, 40, 56)}
    with torch.no_grad():
        found = model.score(batch)
        error = ((model.net(batch["image"]) - batch["image"]).double() ** 2).mean(1).numpy()
    for i in range(2):
        smooth = error[i]
        for _ in range(3):
            smooth = uniform_filter(smooth, 11, mode="reflect")
        np.testing.assert_allclose(found["map"][i], smooth, rtol=1e-4)
        np.testing.assert_allclose(found["score"][i], uniform_filter(error[i], 21, mode="reflect").max(), rtol=1e-4)


def test_output_combines_the_image_and_the_decoders():
    """The same weights without the skip give the decoder's image y and, as a fourth channel, the logit of β."""
    torch.manual_seed(0)
    net = Autoencoder(4, side=32, input_skip=True).eval()
    x = images(2, 3, 24, 32)
    with torch.no_grad():
        found = net(x).double().numpy()
        net.input_skip = False
        y, logit = np.split(net(x).double().numpy(), [3], axis=1)
    beta = 1 / (1 + np.exp(-logit))
    np.testing.assert_allclose(found, beta * x.double().numpy() + (1 - beta) * y, rtol=1e-5, atol=1e-6)


def test_noise_is_kept_in_the_target(monkeypatch):
    """Input x̂ + n, target x + n with one n ~ N(0, σ²); where x̂ = x, the mask stays empty."""
    seen: list[dict[str, torch.Tensor]] = []
    model = SSAE(width=4, noise=0.05, image_size=(32, 32), precision="32")

    def recorded(batch):
        seen.append(batch)
        return batch["image"]

    monkeypatch.setattr(model, "losses", recorded)
    clean = images(64, 3, 32, 32)
    image = clean.clone()
    image[:, :, 4:9] += 0.3
    model.training_step({"image": image, "clean": clean}, 0)
    noise = (seen[0]["clean"] - clean).double()
    torch.testing.assert_close(seen[0]["image"] - image, noise.float(), rtol=0, atol=1e-6)
    assert noise.std().item() == pytest.approx(0.05, rel=0.02)
    assert abs(noise.mean().item()) < 1e-3
    inside = ((seen[0]["image"] - seen[0]["clean"]).abs() > ssae.CHANGED).any(1)
    assert inside[:, 4:9].all()
    assert inside.sum() == 64 * 5 * 32


def test_errors_are_divided_by_the_normal_error_of_their_place_and_class(monkeypatch):
    scoring = {"pixel_smooth": {"box": 5}, "image_smooth": "same", "image_score": "max"}
    torch.manual_seed(0)
    model = SSAE(width=4, calibrate=True, image_size=(24, 32), categories=("a", "b"), scoring=scoring, precision="32")
    x, classes = images(6, 3, 24, 32), torch.tensor([0, 1, 1, 0, 1, 0])
    batches = [{"image": x[part], "category": classes[part]} for part in (slice(4), slice(4, 6))]
    monkeypatch.setattr(model, "train_eval_batches", lambda: iter(batches))
    model.on_train_end()
    assert model.training
    model.eval()
    with torch.no_grad():
        error = ((model.net(x) - x).double() ** 2).mean(1).numpy()
        found = model.anomaly_map({"image": x, "category": classes}).numpy()
    for i, name in enumerate(classes.tolist()):
        mean = uniform_filter(error[classes.numpy() == name].mean(0), 5, mode="reflect")
        np.testing.assert_allclose(found[i], error[i] / (mean + 0.2 * mean.mean()), rtol=1e-4)


def test_a_logarithmic_tone_makes_errors_relative():
    """Against float64; the loss is that of the images themselves."""
    offset = 0.1

    def reference(x: torch.Tensor) -> np.ndarray:
        return np.log1p(x.clamp(0, 1).double().numpy() / offset) / np.log1p(1 / offset)

    torch.manual_seed(0)
    model = SSAE(width=4, log_offset=offset, image_size=(24, 32), scoring={}, precision="32").eval()
    clean = images(3, 3, 24, 32)
    image = clean.clone()
    image[:, :, 4:9] += 0.2
    with torch.no_grad():
        output = model.net(image)
        expected = ((reference(output) - reference(image)) ** 2).mean(1)
        np.testing.assert_allclose(model.anomaly_map({"image": image}), expected, rtol=1e-3, atol=1e-7)
        found = model.losses({"image": image, "clean": clean})
        torch.testing.assert_close(found, losses(output, clean, image, 0.9))
    # a tenth less light counts as much in a dark part as in a bright one, as far as both are above the offset
    bright, dark = (float(tone(torch.tensor(x), 0.01) - tone(torch.tensor(0.9 * x), 0.01)) for x in (0.9, 0.3))
    assert bright == pytest.approx(dark, rel=0.05)


def test_low_precision_keeps_the_output_fine():
    """bf16 has steps of 1/256 below 1: the output must not be rounded to them."""
    torch.manual_seed(0)
    net = Autoencoder(4).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = net(images(1, 3, 32, 32))
    assert output.dtype == torch.float32
    assert not torch.equal(output, output.bfloat16().float())


# --- runs ---


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, train=10)
    return root


def run_of(root: Path, run: Path, *more: str) -> dict[str, Any]:
    outcome = runs.train(*TINY, *runs.folder_data(root), *more, f"hydra.run.dir={run}", small=False)
    assert outcome.code == 0, outcome.err
    return results.read_result(run)


def state_of(run: Path) -> dict[str, Any]:
    stored = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return stored["state_dict"] | {"optimizer": stored["optimizer_states"][0]["state"]}


def test_figures_show_reconstructions(root, tmp_path):
    result = run_of(root, tmp_path / "run", "trainer.max_steps=3")
    assert result["backbone"] is None
    assert result["protocol"]["scoring"]["image_smooth"] == {"box": 21}
    training = cv2.imread(str(tmp_path / "run/figures/training.png"))
    assert training is not None
    assert training.std() > 10
    with_row = cv2.imread(str(tmp_path / "run/figures/bottle.png"))
    assert with_row is not None
    assert with_row.shape[0] == 30 + 3 * (192 + 6) + 40  # image, reconstruction, heat map


EARLY = (
    "trainer.max_steps=8", "data.val_fraction=0.3", "method.patience=3", "method.eval_every=1",
    "method.optimizer.lr=0.1",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    """A run that waits for a better loss, for longer than one look, and finds it or gives up."""
    run, waits, look = tmp_path_factory.mktemp("undisturbed") / "run", [], SSAE.look

    def recorded(self):
        look(self)
        waits.append(int(self.waited))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SSAE, "look", recorded)
        result = run_of(root, run, *EARLY)
    assert max(waits) > 1
    return run, result


def test_the_end_of_training_is_known_on_the_host():
    """It is asked for after every batch, and the device must not be waited for."""
    model = SSAE(width=4, patience=2, image_size=(32, 32))
    with fake_gpu(), Kernels() as kernels:
        to_fake(model)
        assert not model.stopped_early
    assert not kernels.waits


@pytest.mark.parametrize("stop_at", [2, 7])  # the second batch, the last one
def test_resumed_after_any_batch(root, undisturbed, tmp_path, stop_at):
    """Weights, optimizer, held-out judgement, scores and log: to the last bit."""
    reference, expected = undisturbed
    with interrupted_after(min(stop_at, expected["timing"]["steps"])):
        run_of(root, tmp_path / "r", *EARLY, "trainer.checkpoint_minutes=0")
    run_of(root, tmp_path / "r", *EARLY, "trainer.checkpoint_minutes=0", "resume=true")
    assert_same_run(tmp_path / "r", reference)


def test_training_ends_when_held_out_images_say_so(root, tmp_path, monkeypatch):
    """With patience 2 and a look every 2 batches, a loss that never falls again ends training in batch 2 · 3 + 1."""
    seen, expected = [], []
    look = SSAE.look

    def recorded(self):
        look(self)
        seen.append(float(self.best))
        if len(seen) == 1:
            expected.append(held_out_loss(self))
            self.best.fill_(0)  # nothing is better than this

    monkeypatch.setattr(SSAE, "look", recorded)
    more = ("trainer.max_steps=50", "data.val_fraction=0.3", "method.patience=2", "method.eval_every=2")
    result = run_of(root, tmp_path / "run", *more, "hardware.precision=32")
    assert result["timing"]["steps"] == 7
    stored = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert stored["anomalib_lite"]["finished"]
    assert seen[0] == pytest.approx(expected[0], rel=1e-4)
    assert seen[1:] == [0, 0]


def held_out_loss(model: SSAE) -> float:
    """The mean loss of held-out images, one by one."""
    data: Any = model.trainer.datamodule  # type: ignore[attr-defined]
    assert [sample.label for sample in data.val_samples] == [0, 1, 0]
    model.net.eval()
    found = []
    for batch in data.val_dataloader():
        for image, clean in zip(batch["image"], batch["clean"], strict=True):
            with torch.no_grad():
                output = model.net(image[None])[0]
            f, x, corrupted = (tensor[None].double().numpy() for tensor in (output, clean, image))
            found += literal_loss(f, x, corrupted, 0.9)
    model.net.train()
    return float(np.mean(found))


def test_held_out_images_are_pairs(root):
    data = data_of(root, val_fraction=0.3, corrupt=nothing)
    data.setup()
    (batch,) = data.val_dataloader()
    (again,) = data.val_dataloader()
    assert batch["corruption_mask"].any((1, 2)).tolist() == [False, True, False]
    assert torch.equal((batch["clean"] != batch["image"]).any(1), batch["corruption_mask"])
    assert torch.equal(batch["mask"], batch["corruption_mask"])
    assert torch.equal(batch["image"], again["image"])
    other = data_of(root, val_fraction=0.3, corrupt=nothing, seed=1)
    other.setup()
    (another,) = other.val_dataloader()
    assert not torch.equal(batch["mask"], another["mask"])


def nothing(image, rng):
    return image, np.zeros(image.shape[:2], bool)


def data_of(root: Path, **options: Any) -> AnomalyDataModule:
    defaults: dict[str, Any] = {"image_size": 32, "batch_size": 4, "normalize": "none", "category": "bottle"}
    return AnomalyDataModule(read_folder, root, **defaults | options)


@pytest.mark.parametrize(("options", "message"), [
    ({"skip": "sum"}, "method.skip=sum: choose none, concat, ccm"),
    ({"corrupted_weight": 2}, "method.corrupted_weight=2: give a share"),
    ({"log_offset": 0}, "method.log_offset=0: give a number above 0"),
    ({"width": 0}, "method.width=0: give a whole number from 1"),
])  # fmt: skip
def test_options_that_mean_nothing(options, message):
    with pytest.raises(UserError, match=f"^{message}"):
        SSAE(**options)


@pytest.mark.parametrize(("option", "message"), [
    ("method.patience=2", "method.patience: needs held-out images"),
    ("data.corrupt=null", "data.corrupt=null: this method learns from corrupted images"),
    ("data.corrupt.contents={foo: 1}", r"data.corrupt.contents=.*elastic"),
    ("data.corrupt.textures=/nowhere", "data.corrupt.textures=/nowhere: no folder with images"),
    ("data.treatment=both", "data.treatment=both: give auto, object or texture"),
])  # fmt: skip
def test_mistakes_are_one_line(root, tmp_path, option, message):
    more = () if "contents" not in option and "textures" not in option else ("data.corrupt.p_clean=0",)
    textures = ("data.corrupt.contents={texture: 1}",) if "textures" in option else ()
    arguments = [*TINY, *runs.folder_data(root), *more, *textures, option, "trainer.max_steps=2"]
    outcome = runs.train(*arguments, f"hydra.run.dir={tmp_path / 'run'}", small=False)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1, outcome.err
    assert re.search(message, outcome.err), outcome.err


# --- textures ---


@pytest.fixture(scope="module")
def textures(tmp_path_factory):
    """A category whose test images have sizes of their own, none of them the crop's."""
    root = tmp_path_factory.mktemp("textures")
    make_mvtec(root, "cloth", train=5, good=2, defects={"cut": 2}, size=48)
    rng = np.random.default_rng(0)
    for n, (path, shape) in enumerate(
        zip(sorted((root / "cloth/test/cut").iterdir()), ((40, 56), (61, 33)), strict=True)
    ):
        cv2.imwrite(str(path), rng.integers(0, 256, (*shape, 3), np.uint8))
        mask = np.zeros(shape, np.uint8)
        mask[10 + n : 20, 5:15] = 255
        cv2.imwrite(str(root / f"cloth/ground_truth/cut/{path.stem}_mask.png"), mask)
    return root


def cloth(textures) -> list[str]:
    return [*runs.folder_data(textures, "cloth"), "data.treatment=texture", "trainer.max_steps=2"]


def test_textures_are_trained_on_crops_and_tested_whole(textures, tmp_path):
    run = tmp_path / "run"
    outcome = runs.train(*TINY, *cloth(textures), f"hydra.run.dir={run}", small=False)
    assert outcome.code == 0, outcome.err
    result = results.read_result(run)
    assert result["protocol"]["data"]["map_size"] == "original"
    assert result["protocol"]["data"]["transform"] == []
    assert result["metrics"]["pixel_auroc"] is not None
    outcome = runs.predict(f"run={run}", f"input={textures / 'cloth/test/cut'}", f"output={tmp_path / 'out'}")
    assert outcome.code == 0, outcome.err
    stored = {row.split(",")[0]: float(row.split(",")[4]) for row in (run / "scores.csv").read_text().splitlines()[1:]}
    for row in (tmp_path / "out/scores.csv").read_text().splitlines()[1:]:
        name, score, *_ = row.split(",")
        assert float(score) == pytest.approx(stored[f"cloth/test/cut/{name}"], rel=1e-4)


def test_crops(textures):
    data = data_of(textures, category="cloth", treatment="texture", image_size=24)
    data.setup()
    assert data.test_size == "original"
    sizes = [tuple(batch["image"].shape) for batch in data.test_dataloader()]
    assert sizes == [(1, 3, 40, 56), (1, 3, 61, 33), (1, 3, 48, 48), (1, 3, 48, 48)]
    loader = data.train_dataloader()
    (first, _), (other, _) = list(loader), list(loader)  # two epochs
    again, _ = list(data.train_dataloader())
    assert first["image"].shape == (4, 3, 24, 24)
    assert torch.equal(first["image"], again["image"])
    whole = {
        item["path"]: item["image"]
        for item in (data._images(data.train_samples, data.eval_pipeline)[i] for i in range(5))
    }
    for batch in (first, other):
        for path, crop in zip(batch["path"], batch["image"], strict=True):
            windows = whole[path].unfold(1, 24, 1).unfold(2, 24, 1).permute(1, 2, 0, 3, 4)
            assert (windows == crop).flatten(2).all(2).any()
    both = dict(zip(first["path"], first["image"], strict=True)), dict(zip(other["path"], other["image"], strict=True))
    assert any(not torch.equal(both[0][path], both[1][path]) for path in both[0].keys() & both[1].keys())


def test_resized_textures_and_those_that_are_too_small(textures, tmp_path):
    data = data_of(textures, category="cloth", treatment="texture", image_size=24, texture_size=40)
    data.setup()
    assert data.test_size == (40, 40)
    assert next(iter(data.test_dataloader()))["image"].shape == (4, 3, 40, 40)
    assert next(iter(data.train_dataloader()))["image"].shape == (4, 3, 24, 24)
    outcome = runs.train(
        *TINY, *cloth(textures), "data.image_size=64", f"hydra.run.dir={tmp_path / 'run'}", small=False
    )
    assert outcome.code == 2
    assert outcome.err.startswith("error: data.image_size: the crops of 64×64")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(("name", "category", "texture"), [
    ("mvtec", ["carpet"], True), ("mvtec", ["bottle"], False), ("mvtec", ["wood", "tile"], True),
    ("mvtec", ["wood", "bottle"], False), ("synthetic", ["fabric"], True), ("folder", ["wood"], False),
])  # fmt: skip
def test_known_textures(name, category, texture):
    data = AnomalyDataModule(read_folder, None, category, name=name, treatment="auto", texture_size=512)
    assert data.texture == texture
    assert data.test_size == ((512, 512) if texture else (256, 256))
    assert bool(data.notes) == (category == ["wood", "bottle"])


def test_corrupted_batches_depend_on_seed_epoch_and_image_only(root):
    """Neither on the batch's size nor on what was loaded before."""
    from anomalib_lite.data.corruptions import corrupt

    def by_path(loader) -> dict[str, tuple]:
        keys = ("image", "clean", "corruption_mask")
        return {path: tuple(b[k][i] for k in keys) for b in loader for i, path in enumerate(b["path"])}

    found = []
    for size, seed in ((4, 0), (3, 0), (4, 1)):
        data = data_of(root, batch_size=size, seed=seed, corrupt=corrupt)
        data.setup()
        loader = data.train_dataloader()
        found.append(by_path(loader))
        found.append(by_path(loader))  # the next epoch
    first, later, same, _, other, _ = found
    for path, (image, clean, mask) in first.items():
        assert all(torch.equal(a, b) for a, b in zip(first[path], same[path], strict=True))
        assert torch.equal((image != clean).any(0), mask)
        assert mask.any()
        assert torch.equal(clean, later[path][1])
        assert not torch.equal(image, later[path][0])
        assert not torch.equal(image, other[path][0])
    plain = data_of(root)
    plain.setup()
    assert "clean" not in next(iter(plain.train_dataloader()))


def test_a_configured_backbone_is_left_out(root, tmp_path):
    """As in a sweep over methods, where another one needs it."""
    options = [*TINY, *runs.folder_data(root), "trainer.max_steps=1"]
    results_ = []
    for backbone in ("none", "resnet18"):
        run = tmp_path / backbone
        given = [x for x in options if not x.startswith("backbone")]
        outcome = runs.train(*given, f"backbone={backbone}", f"hydra.run.dir={run}", small=False)
        assert outcome.code == 0, outcome.err
        results_.append(results.read_result(run))
    assert results_[0]["efficiency"] == results_[1]["efficiency"]
    assert results_[0]["metrics"] == results_[1]["metrics"]
    assert results_[1]["backbone"] is None


@pytest.mark.slow
def test_training_on_two_ranks_is_training_on_one(root, tmp_path):
    """Losses are of single images, batch norm is synchronised, and the held-out images are judged together."""
    from tests.helpers.ranks import on_ranks

    budget = ("trainer.max_steps=6", "data.val_fraction=0.2", "method.patience=9", "method.eval_every=2")
    for devices in (1, 2):
        options = [*TINY, *runs.folder_data(root), *budget, f"hydra.run.dir={tmp_path / str(devices)}"]
        options[2] = "hardware=ddp"
        options += ["hardware.accelerator=cpu", f"hardware.devices={devices}", "hardware.precision=32"]
        if devices == 1:
            assert runs.train(*options, small=False).code == 0
        else:
            on_ranks("train", options, 2)
    one, two = state_of(tmp_path / "1"), state_of(tmp_path / "2")
    assert float(one["best"]) == pytest.approx(float(two["best"]), rel=1e-3)
    for key in one.keys() - {"optimizer", "best"}:
        torch.testing.assert_close(two[key], one[key], rtol=1e-2, atol=1e-3, msg=key)

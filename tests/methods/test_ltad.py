"""LTAD, our reading: its losses, score and synthesis beside literal readings; text encoders from disk; its runs."""

import copy
import json
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anomalib_lite.errors import UserError
from anomalib_lite.features.backbones import Backbone
from anomalib_lite.features.vision_language import VisionLanguage
from anomalib_lite.methods.ltad import LTAD
from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec
from tests.helpers.language_checkpoints import SAVE, WORDS

NAMES = ("bottle", "metal_nut", "wood")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """kind -> the folder of a tiny checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {kind: save(folder / kind) for kind, save in SAVE.items()}


@pytest.fixture(params=["align", "clip"])
def tower(request, checkpoints):
    return VisionLanguage(str(checkpoints[request.param]), [0, 2], precision="32")


def images(side: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_text_equals_the_model_own_for_a_word_it_knows(tower):
    """With a known word's embedding in the slot, the embedding is that of the text with the word in it."""
    word = tower.ids("a")[1]  # one token in both tokenizers
    found = tower.prompt("photo of {} wood", tower.table.weight[word].expand(2, -1))
    given = tower.tokenizer("photo of a wood", return_tensors="pt")
    expected = tower.net.get_text_features(**given).pooler_output
    torch.testing.assert_close(found, expected.expand(2, -1))
    moved = tower.prompt("photo of {} wood", 5 * torch.randn(1, tower.table.embedding_dim))
    assert not torch.allclose(found[:1], moved, atol=1e-3)
    assert not tower.table._forward_hooks


def test_the_gradient_flows_into_the_slot_alone(tower):
    tokens = torch.randn(3, tower.table.embedding_dim, requires_grad=True)
    tower.prompt("a photo of a {}", tokens)[1].square().sum().backward()
    assert tokens.grad is not None
    reached = tokens.grad.abs().sum(1) > 0
    assert reached.tolist() == [False, True, False]
    assert all(p.grad is None and not p.requires_grad for p in tower.parameters())


def test_image_towers_literally(tower):
    """Blocks run one by one, and the image processor on the picture itself."""
    from transformers import AutoImageProcessor

    pixels = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    picture = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    processor = AutoImageProcessor.from_pretrained(tower.name)
    options = {
        "do_resize": False,
        "do_center_crop": False,
        "return_tensors": "pt",
        "input_data_format": "channels_first",
    }
    x = processor(pixels[0].byte().numpy(), **options)["pixel_values"]
    vision = tower.net.vision_model
    with torch.no_grad():
        if tower.kind == "align":
            outs = [vision.embeddings(x)]
            for block in vision.encoder.blocks:
                outs.append(block(outs[-1]))
            by_side = {out.shape[-1]: out for out in outs}  # the last of each resolution
            expected = [by_side[16], by_side[4], outs[-1].mean((2, 3))[..., None, None]]
        else:
            outs = [vision.pre_layrnorm(vision.embeddings(x))]
            for block in vision.encoder.layers:
                outs.append(block(outs[-1], None))
            expected = [outs[i][:, 1:].mT.reshape(1, 16, 4, 4) for i in (1, 3)]
            pooled = tower.net.visual_projection(vision.post_layernorm(outs[-1][:, 0]))
            expected.append(pooled[..., None, None])
    found = tower.embedding()(picture)
    assert [level.shape[1] for level in found[:2]] == tower.channels
    assert [32 // level.shape[-1] for level in found[:2]] == tower.reductions
    assert found[2].shape[1] == tower.dim
    for level, other in zip(found, expected, strict=True):
        torch.testing.assert_close(level, other, rtol=1e-3, atol=1e-4)


def test_other_image_sizes(tower):
    levels = tower(images(48))
    assert [48 / level.shape[-1] for level in levels] == tower.reductions


def test_random_weights_need_no_weights_file(checkpoints, tmp_path):
    import shutil

    folder = shutil.copytree(checkpoints["clip"], tmp_path / "clip")
    (folder / "model.safetensors").unlink()
    VisionLanguage(str(folder), [0], weights="none")
    with pytest.raises(UserError, match=r"backbone.name=.*: damaged or no checkpoint \(.*\); give .* save_pretrained"):
        VisionLanguage(str(folder), [0])


def test_faults_are_one_line(checkpoints, tmp_path, monkeypatch):
    import shutil

    from safetensors.torch import load_file, save_file

    with pytest.raises(UserError, match=r"layers=\[9\]: .* has the layers 0 to 2"):
        VisionLanguage(str(checkpoints["clip"]), [9])
    folder = shutil.copytree(checkpoints["clip"], tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"the checkpoint lacks 1 tensors of its model, text_projection.weight"):
        VisionLanguage(str(folder), [0])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(UserError, match="a bert checkpoint; give one of ALIGN or CLIP"):
        VisionLanguage(str(folder), [0])
    with pytest.raises(UserError, match=r"backbone.weights=file: give auto or none"):
        VisionLanguage(str(folder), [0], weights="file")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers: pip install 'anomalib-lite\[ltad\]'"):
        VisionLanguage(str(folder), [0])


# --- losses and score ---


class Levels(Backbone):
    """Stands where the backbone does, at 32²: two feature maps that the image's first pixels hold."""

    def __init__(self):
        nn.Module.__init__(self)
        self.frozen, self.precision, self.reductions, self.channels = True, "32", [4, 8], [3, 9]

    def forward(self, images):
        first, second = images.flatten(1)[:, :192], images.flatten(1)[:, 192:336]
        return [first.unflatten(1, (3, 8, 8)), second.unflatten(1, (9, 4, 4))]


def model(**options: Any) -> Any:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "dim": 16,
        "heads": 2,
        "layers": 1,
        "hidden": 24,
        "neighbours": 3,
        "dropout": 0.0,
        "categories": NAMES,
    }
    ltad = LTAD(backbone=Levels(), image_size=(32, 32), precision=32, **small | options)
    ltad.images = [[0, 1], [2], [3]]
    ltad.trainer = SimpleNamespace(
        datamodule=SimpleNamespace(training_batch=stored_batch), global_step=0, testing=False
    )  # type: ignore
    return ltad


def stored_batch(indices, epoch):
    """The stored features of four training images, as a loader hands them out."""
    rows = [torch.randn(192, generator=torch.Generator().manual_seed(i)) for i in indices]
    return {"features": [torch.stack(rows).view(-1, 4, 4, 12)]}


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def mlp(net: Any, x: torch.Tensor, activation: Any) -> torch.Tensor:
    weights = [part.detach().double() for part in (net[0].weight, net[0].bias, net[2].weight, net[2].bias)]
    return activation(x @ weights[0].T + weights[1]) @ weights[2].T + weights[3]


def test_first_phase_literally():
    ltad = model(beta=0.3, temperature=0.2)
    torch.manual_seed(5)
    found = ltad.first_phase(4)
    torch.manual_seed(5)
    classes = torch.randint(3, (4,))
    assert len(set(classes.tolist())) > 1
    tokens, pooled = (x.double() for x in ltad.drawn(classes))
    noise = torch.randn(4, 16, 64).double()
    names = ltad.names.detach().double()
    total = torch.zeros((), dtype=torch.float64)
    for i, c in enumerate(classes.tolist()):
        logits = torch.stack([unit(pooled[i]) @ unit(name) for name in names]) / 0.2
        total += (torch.logsumexp(logits, 0) - logits[c]) / 4
        for place in range(16):
            f, t = tokens[i, place], unit(names[c])
            code = mlp(ltad.vae.encode, torch.cat([f, t]), F.relu)
            mean, sigma = code[:64], (code[64:] / 2).exp()
            decoded = mlp(ltad.vae.decode, torch.cat([mean + sigma * noise[i, place], t]), F.relu)
            divergence = sum(
                -math.log(s) + (s * s + m * m) / 2 - 0.5 for m, s in zip(mean.tolist(), sigma.tolist(), strict=True)
            )
            total += (((f - decoded) ** 2).sum() + 0.3 * divergence) / (4 * 16)
    assert found.item() == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("fill", ["median", None])
def test_names_learn_from_classes_alone(fill):
    """The VAE's loss does not reach the names, and nothing but names and VAE learns in phase 1."""
    grads = []
    for beta in (1e-3, 100.0):
        ltad = model(fill=fill, beta=beta)
        torch.manual_seed(3)
        ltad.first_phase(4).backward()
        grads.append(ltad.names.grad)
        reached = {name.partition(".")[0] for name, p in ltad.named_parameters() if p.grad is not None}
        assert reached == {"names", "vae"} if fill else {"names"}
    assert torch.equal(*grads)
    assert grads[0].abs().sum() > 0


def batch(count: int = 3) -> dict[str, Any]:
    return {"image": images(32, count), "path": list("xyz")[:count], "category": torch.arange(count) % 3}


def literal_logits(ltad: Any, tokens: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    states = (ltad.names[:, None] + ltad.language.offsets).detach().double()
    out = torch.zeros(tokens.shape[:2], dtype=torch.float64)
    for i, c in enumerate(classes.tolist()):
        for place in range(tokens.shape[1]):
            p = unit(mlp(ltad.project, tokens[i, place], F.gelu))
            cosines = [p @ unit(state) / ltad.temperature for state in states[c]]
            out[i, place] = cosines[1] - cosines[0]
    return out


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_second_phase_literally(weight):
    ltad, given = model(fill=None, jitter=0.0, strong=5.0, classifier_weight=weight), batch()
    ltad.share, ltad.replaced = 0.0, None
    tokens = ltad.joined_tokens(given).double()
    rebuilt = copy.deepcopy(ltad.net).double()(tokens)
    expected = ((rebuilt - tokens) ** 2).mean()
    torch.manual_seed(7)
    found = ltad.second_phase({**given})
    if weight:
        spoiled_with: list[torch.Tensor] = []
        spoil = ltad.spoiled

        def spoiled(*args):
            spoiled_with.append(spoil(*args))
            return spoiled_with[-1]

        ltad.spoiled = spoiled
        torch.manual_seed(7)
        assert torch.equal(ltad.second_phase({**given}), found)
        normal = literal_logits(ltad, tokens, given["category"]).sigmoid()
        abnormal = literal_logits(ltad, spoiled_with[0].double(), given["category"]).sigmoid()
        both = torch.cat([(1 - normal).log(), abnormal.log()])
        expected = expected - both.mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    reached = {name.partition(".")[0] for name, p in ltad.named_parameters() if p.grad is not None}
    assert reached == ({"net", "project", "language"} if weight else {"net"})


def test_abnormal_patches_are_anothers_or_jittered():
    ltad = model(strong=40.0)
    tokens, classes = torch.randn(6, 16, 12), torch.tensor([0, 0, 1, 1, 2, 2])
    kinds = set()
    for seed in range(6):
        torch.manual_seed(seed)
        for i, spoiled in enumerate(ltad.spoiled(tokens, classes)):
            source = [j for j in range(6) if torch.equal(spoiled, tokens[j])]
            assert len(source) <= 1
            if source:
                assert classes[source[0]] != classes[i]
            else:
                noise = (spoiled - tokens[i]) * 12 / 40 / tokens[i].norm(dim=-1, keepdim=True)
                assert 0.75 < noise.std() < 1.25
            kinds.add(bool(source))
    assert kinds == {True, False}
    only = ltad.spoiled(tokens, torch.zeros(6, dtype=torch.long))
    assert not any(torch.equal(only[i], tokens[j]) for i in range(6) for j in range(6))


def started(fill: str | None, lacking: list[int], balanced: bool = False, **options: Any) -> Any:
    """A model at the beginning of its second phase, with 8, 5 and 2 training images."""
    ltad = model(fill=fill, categories=NAMES, **options)
    counts = zip(NAMES, (8, 5, 2), strict=True)
    samples = [SimpleNamespace(path="a", category=name, label=0) for name, number in counts for _ in range(number)]
    ltad._trainer = SimpleNamespace(
        datamodule=SimpleNamespace(train_samples=samples, training_batch=stored_batch, balanced=balanced),
        global_step=0,
        testing=False,
    )
    type(ltad).on_train_start(ltad)
    assert ltad.lacking.tolist() == lacking
    ltad.end_first_phase()
    torch.manual_seed(0)
    return ltad


@pytest.mark.parametrize("synthesis", ["decoded", "between"])
@pytest.mark.parametrize(("fill", "lacking"), [("median", [0, 0, 3]), ("largest", [0, 3, 6]), (None, [0, 0, 0])])
def test_tail_classes_are_filled_up(fill, lacking, synthesis):
    """Counts 8, 5, 2: as many synthetic images of each class as it lacks, on average."""
    ltad = started(fill, lacking, synthesis=synthesis)
    seen = torch.zeros(3)
    tokens, classes = torch.randn(5, 16, 12), torch.zeros(5, dtype=torch.long)
    for _ in range(300):  # 1500 real images, a hundred epochs
        both, more = ltad.filled_up(tokens, classes)
        assert torch.equal(both[:5], tokens)
        assert not both.requires_grad
        seen += torch.bincount(more[5:], minlength=3)
    assert (seen / 100).tolist() == pytest.approx(lacking, rel=0.15, abs=0)


@pytest.mark.parametrize("synthesis", ["decoded", "between"])
def test_a_balanced_batch_has_the_filled_up_classes_shares(synthesis):
    """Counts 8, 5, 2 filled up to 8: of the classes' images 0, 3/8 and 6/8 are synthetic, and none is added."""
    ltad = started("largest", [0, 3, 6], balanced=True, synthesis=synthesis)
    tokens, classes = torch.randn(300, 16, 12), torch.arange(300) % 3
    found, same = ltad.filled_up(tokens, classes)
    assert torch.equal(same, classes)
    changed = (found != tokens).any(2).any(1)
    shares = [changed[classes == c].double().mean().item() for c in range(3)]
    assert shares == pytest.approx([0, 3 / 8, 6 / 8], abs=0.14)  # three standard deviations
    assert started(None, [0, 0, 0], balanced=True).filled_up(tokens, classes)[0] is tokens


def test_between_literally():
    """Each patch is f + D(μ + w (μ' − μ)) − D(μ): one w per image, another image of the class for μ'."""
    ltad = started("largest", [0, 3, 6], synthesis="between")
    tokens, classes = torch.randn(7, 16, 12), torch.tensor([0, 0, 1, 2, 1, 1, 2])
    torch.manual_seed(0)
    found = ltad.synthetic(tokens, classes, 4)
    parts: dict[str, Any] = {}
    ltad.vae.between = lambda *given: parts.update(zip(("own", "others", "text", "way"), given, strict=True))
    torch.manual_seed(0)
    ltad.synthetic(tokens, classes, 4)
    assert torch.equal(parts["own"], tokens[3:])
    assert len(set(parts["way"].tolist())) == 4
    assert 0 <= parts["way"].min() <= parts["way"].max() < 1
    for i, (c, way) in enumerate(zip(classes[3:].tolist(), parts["way"].double(), strict=True)):
        [other] = [j for j in range(7) if torch.equal(parts["others"][i], tokens[j])]
        assert classes[other] == c
        assert other != 3 + i
        t = unit(ltad.names[c].detach().double())
        for place in range(16):
            f = tokens[3 + i, place].double()
            own, goal = (
                mlp(ltad.vae.encode, torch.cat([x, t]), F.relu)[:64] for x in (f, tokens[other, place].double())
            )
            there, here = (mlp(ltad.vae.decode, torch.cat([z, t]), F.relu) for z in (own + way * (goal - own), own))
            torch.testing.assert_close(found[i, place].double(), f + there - here, rtol=1e-5, atol=1e-5)


def test_an_image_that_is_alone_stays():
    ltad = started("largest", [0, 3, 6], synthesis="between")
    tokens = torch.randn(3, 16, 12)
    torch.testing.assert_close(ltad.synthetic(tokens, torch.tensor([0, 0, 1]), 3)[2], tokens[2])


def test_score_literally():
    ltad, given = model(classifier_weight=2.5).eval(), batch()
    ltad.error_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    ltad.error_std.copy_(torch.tensor([0.5, 2.0, 1.0]))
    maps = ltad.anomaly_map(given)
    tokens = ltad.joined_tokens(given).double()
    errors = ((copy.deepcopy(ltad.net).double()(tokens) - tokens) ** 2).sum(-1)
    classes = given["category"]
    score = (errors - torch.tensor([1.0, 2.0, 3.0])[:, None]) / torch.tensor([0.5, 2.0, 1.0])[:, None]
    score = score + 2.5 * literal_logits(ltad, tokens, classes).sigmoid()
    expected = nn.UpsamplingBilinear2d(size=32)(score.view(3, 1, 4, 4))[:, 0]
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_score_is_standardised_on_training_patches():
    ltad = model(classifier_weight=0.0)
    given = [batch(3), {**batch(2), "category": torch.tensor([1, 1])}]
    ltad.train_eval_batches = lambda: given
    ltad.on_train_end()
    ltad.eval()
    errors = [ltad.errors(ltad.joined_tokens(x)).double() for x in given]
    for c, parts in enumerate(([errors[0][0]], [errors[0][1], *errors[1]], [errors[0][2]])):
        patches = torch.cat(parts)
        assert ltad.error_mean[c].item() == pytest.approx(patches.mean().item(), rel=1e-5)
        assert ltad.error_std[c].item() == pytest.approx(patches.std(correction=0).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"class_names": "none"}, "class_names=none: choose learned or fixed"),
        ({"fill": "all"}, "fill=all: choose median, largest or null"),
        ({"synthesis": "prior"}, "synthesis=prior: choose decoded or between"),
        ({"classifier_weight": -1}, "classifier_weight=-1"),
        ({"temperature": 0}, "temperature=0"),
    ],
)
def test_wrong_options(options, match):
    with pytest.raises(UserError, match=match):
        model(**options)


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        ({}, 2),
        ({"classifier_weight": 0}, 2),
        ({"fill": None}, 2),
        ({"class_names": "fixed"}, 2),
        ({"class_names": "fixed", "fill": None}, 1),
        ({"classifier_weight": 0, "fill": None}, 1),
    ],
)
def test_a_phase_that_has_nothing_to_learn_is_left_out(options, phases):
    assert model(**options).phases == phases


# --- runs ---


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, "bottle", train=5, good=2, defects={"broken": 2})
    make_mvtec(root, "metal_nut", train=1, good=2, defects={"scratch": 2})
    return root


@pytest.fixture(scope="module")
def arguments(root, checkpoints):
    """(kind) -> the command line of a run of three batches a phase."""

    def make(kind: str = "resnet18") -> list[str]:
        tower = [f"backbone.name={checkpoints.get(kind, 'test_resnet.r160_in1k')}"]
        two = ["backbone.layers=[1,2]"]
        layers = {"resnet18": two, "align": two, "clip": ["backbone.layers=[0,2]", "backbone.weights=auto"]}
        return [
            *runs.method("ltad"), *runs.folder_data(root, "[bottle,metal_nut]"), f"backbone={kind}", *tower,
            *layers[kind], *(["backbone.weights=auto"] if kind == "align" else []), "method.dim=16",
            "method.layers=1", "method.optimizer.lr=1e-3", "data.image_size=32", "method.fill=largest",
            "trainer.max_epochs=null", "trainer.max_steps=3", "trainer.log_every=1", "trainer.checkpoint_minutes=0",
        ]  # fmt: skip

    return make


@pytest.mark.parametrize("kind", ["resnet18", "align", "clip"])
def test_phases_of_a_run(arguments, tmp_path, monkeypatch, kind):
    """Which weights each phase changes, and when the first phase ends."""
    phases: list[int] = []
    before: dict[int, dict[str, torch.Tensor]] = {}

    def note(self, batch, batch_idx):
        phases.append(1 if self.conditions[0, 0].isnan() else 2)
        before.setdefault(len(phases), {k: p.detach().clone() for k, p in self.named_parameters()})

    with monkeypatch.context() as patch:
        patch.setattr(LTAD, "on_train_batch_start", note, raising=False)
        result = runs.result_of(*arguments(kind), run_dir=tmp_path / "whole")
    assert phases == [1, 1, 1, 1, 2, 2]  # the first phase ends within the fourth batch
    assert result["timing"]["steps"] == 6
    assert result["variant"] == (kind if kind != "resnet18" else "text_free")
    changed = {k.partition(".")[0] for k in before[1] if not torch.equal(before[1][k], before[4][k])}
    assert changed == {"names", "vae"}
    later = {k.partition(".")[0] for k in before[4] if not torch.equal(before[4][k], before[6][k])}
    assert later == {"net", "project", *(["language"] if kind == "resnet18" else [])}


def test_without_held_features(arguments, tmp_path):
    """Drawn images are read anew: the same run, to the float's precision of another batch size."""
    held = runs.result_of(*arguments(), f"cache.folder={tmp_path / 'cache'}", run_dir=tmp_path / "held")
    options = ("cache.enabled=false", "hardware.feature_memory_gb=0")
    read = runs.result_of(*arguments(), *options, run_dir=tmp_path / "read")
    assert held["cache"]["used"]
    assert not read["cache"]["used"]
    assert read["metrics"]["pixel_auroc"] == pytest.approx(held["metrics"]["pixel_auroc"], abs=0.02)


def test_budgets_hold_for_each_phase(arguments, tmp_path):
    epochs = ("trainer.max_steps=null", "trainer.max_epochs=1")  # 6 images in batches of 4
    assert runs.result_of(*arguments(), *epochs, run_dir=tmp_path / "two")["timing"]["steps"] == 4
    one = ("method.classifier_weight=0", "method.fill=null")
    assert runs.result_of(*arguments(), *epochs, *one, run_dir=tmp_path / "one")["timing"]["steps"] == 2


def test_fixed_names_are_the_mean_of_their_words(checkpoints):
    tower = VisionLanguage(str(checkpoints["align"]), [2])
    ltad = LTAD(backbone=tower, image_size=(64, 64), categories=NAMES, neighbours=1, class_names="fixed")
    words = {word: row for row, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    table = tower.net.text_model.embeddings.word_embeddings.weight
    assert not ltad.names.requires_grad
    torch.testing.assert_close(ltad.names[0].data, table[words["bottle"]])
    torch.testing.assert_close(ltad.names[1].data, (table[words["metal"]] + table[words["nut"]]) / 2)


def test_prompts_need_a_place_for_the_class(checkpoints):
    tower = VisionLanguage(str(checkpoints["align"]), [2])
    with pytest.raises(UserError, match=r"method.prompts.normal=a photo: give a text"):
        LTAD(backbone=tower, image_size=(64, 64), neighbours=1, prompts={"normal": "a photo"})


@pytest.mark.parametrize(
    ("given", "trouble"),
    [
        (["backbone=align"], "not found in the hub or its cache"),
        (["backbone=clip", "backbone.name=./nowhere/clip"], "no such folder; give"),
    ],
)
def test_unavailable_checkpoint_is_one_line(arguments, tmp_path, monkeypatch, given, trouble):
    """Offline with an empty cache, and a folder that is not there; before training, and leaving no run."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = [x for x in arguments() if not x.startswith("backbone")]
    outcome = runs.train(*options, *given, "backbone.weights=auto", f"hydra.run.dir={tmp_path / 'run'}", small=False)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "backbone.name=" in outcome.err
    assert trouble in outcome.err
    assert "give a local folder" in outcome.err
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_two_ranks_train(arguments, tmp_path):
    """Weights that have no part in a phase don't stop the exchange of gradients."""
    options = [x for x in arguments() if not x.startswith("hardware")]
    run = tmp_path / "run"
    command = [*options, "hardware=ddp", "hardware.accelerator=cpu", "hardware.devices=2", "backbone.weights=none"]
    outcome = runs.python("-m", "anomalib_lite.train", *command, "logger=csv", f"hydra.run.dir={run}", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert json.loads((run / "result.json").read_text())["timing"]["steps"] == 6

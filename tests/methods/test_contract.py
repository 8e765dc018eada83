"""What every method promises, on a tiny data set: fit, resume, predict, switches that act, tensors on one device."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from anomalib_lite.cli.messages import one_line
from anomalib_lite.errors import UserError
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.methods.recontrast import ReContrast
from anomalib_lite.runs import build, efficiency, summary
from anomalib_lite.runs.devices import lightning_options
from anomalib_lite.runs.load import load_run
from anomalib_lite.runs.run import notes_of
from tests.helpers import run_programs as runs
from tests.helpers.fake_cuda import Counted, FakeTrainer, fake_batch, fake_cuda, to_fake
from tests.helpers.image_trees import make_mvtec
from tests.helpers.interrupt import assert_same_run, interrupted_after
from tests.helpers.language_checkpoints import SAVE

SIDE = 32
BOTH = "[bottle,tile]"


@dataclass(frozen=True)
class Case:
    """A method with options, and the batches after which its run is interrupted, one after the other (0: in test)."""

    method: str
    stops: tuple[int, ...] = (1, 3)
    options: tuple[str, ...] = ()
    category: str = "bottle"
    text: str = ""  # the kind of checkpoint with a text encoder


RESET = ("method.variant=stable", "method.variants.stable.stable.reset_every=2",
         "method.variants.stable.stable.pause=1")  # fmt: skip
CASES = {
    "norm_occ": Case("norm_occ"),
    "norm_occ shell": Case("norm_occ", (2,), ("method.target=shell",)),
    "norm_occ global": Case("norm_occ", (2,), ("method.global_feature=true",)),
    "norm_occ_closed_form": Case("norm_occ_closed_form", (0,)),
    "norm_occ_closed_form global": Case("norm_occ_closed_form", (0,), ("method.global_feature=true",)),
    "subspace_ad": Case("subspace_ad", (0,)),
    "padim": Case("padim", (0,), ("method.dim=16",)),
    "patchcore": Case("patchcore", (0,)),
    "rad": Case("rad", (0,), (), BOTH),
    "rd4ad": Case("rd4ad", (3,)),
    "recontrast one_class": Case("recontrast", (3,), ("method.encoder_bn=train",)),
    "recontrast unified": Case("recontrast", (2,), ("data.drop_last=true",), BOTH),
    "recontrast stable": Case("recontrast", (3,), RESET),
    "rlr": Case("rlr", (2,), (), BOTH),
    "rlr zero_fill": Case("rlr", (3,), ("method.zero_fill=true",)),
    "uniad": Case("uniad", (3,), ("method.drop.at=0.7",), BOTH),
    "dinomaly": Case("dinomaly", (3,), ("data.batch_size=4", "method.mining.warm_up=2"), BOTH),
    "dinomaly v2": Case("dinomaly", (2,), ("method.variant=v2", "data.image_size=[32,48]", "data.batch_size=4")),
    "dinomaly cnn": Case("dinomaly", (3,), ("method.groups=1", "backbone.name=test_resnet.r160_in1k",
                                            "backbone.layers=[1,2,3]")),
    "inp_former": Case("inp_former", (3,), ("data.image_size=[48,32]", "data.batch_size=4"), BOTH),
    "ssae": Case("ssae", (3,)),
    "ltad": Case("ltad", (1, 3), ("method.fill=largest",), BOTH),
    "ltad between": Case("ltad", (3,), ("method.fill=largest", "method.synthesis=between", "data.balanced=true"), BOTH),
    "ltad align": Case("ltad", (3,), ("method.fill=largest", "backbone.layers=[1,2]"), BOTH, "align"),
    "ltad clip": Case("ltad", (2,), ("method.fill=largest", "backbone.layers=[0,2]"), BOTH, "clip"),
}  # fmt: skip
#: cases whose checkpoint holds something that other cases of their method lack
RUNS = [name for name in CASES if name not in (
    "norm_occ shell", "norm_occ global", "norm_occ_closed_form global", "dinomaly cnn", "ltad align",
)]  # fmt: skip
#: the first case of every method
FIRST = list({case.method: name for name, case in reversed(CASES.items())}.values())[::-1]
#: cases whose training step takes stored features: tests/devices/test_feature_table.py counts what this step costs
FROM_FEATURES = ("norm_occ", "uniad", "rlr", "dinomaly", "inp_former", "ltad", "ltad between")
#: options that must change the scores of the case before them
SWITCHES = {
    "norm_occ": ["method.target=shell", "method.target=zero", "method.squared=false", "method.norm=2", "method.dim=8",
                 "method.global_feature=true"],
    "norm_occ_closed_form": ["method.norm=2", "method.residual=0.5", "method.global_feature=true"],
    "subspace_ad": ["method.variance=0.5"],
    "padim": ["method.dim=8", "method.regularisation=1.0"],
    "rad": ["method.k=1", "method.r=0"],
    "patchcore": ["method.coreset=0.3", "method.neighbours=1", "scoring.image_score=max"],
    "recontrast one_class": ["method.encoder_bn=eval", "method.mining=null", "method.encoder_lr=1e-2",
                             "method.variant=unified"],
    "rlr": ["method.zero_fill=true", "method.jitter=0", "method.mix=[1,1]", "method.learnable_key=false"],
    "uniad": ["method.jitter=0", "method.neighbours=null", "method.clip=null", "method.drop=null", "method.dropout=0"],
    "dinomaly": ["method.variant=v2", "method.mining=null", "method.groups=1", "method.heads=2", "method.clip=null",
                 "method.variants.v1.dropout=0", "method.variants.v1.eps=1e-2", "method.variants.v1.recentre=true",
                 "method.variants.v1.narrow=8", "method.variants.v1.optimizer.amsgrad=false", "method.warm_up=1"],
    "dinomaly v2": ["method.variants.v2.first_lr=null", "method.variants.v2.final=0"],
    "inp_former": ["method.prototypes=2", "method.coherence=0", "method.power=0", "method.dropout=0.5",
                   "method.groups=4", "method.final=1"],
    "ssae": ["method.skip=concat", "method.skip=none", "method.input_skip=true", "method.corrupted_weight=0.1",
             "method.noise=0.1", "method.log_offset=0.1"],
    "ltad": ["method.class_names=fixed", "method.fill=null", "method.classifier_weight=0", "method.strong=1",
             "method.synthesis=between"],
    "ltad clip": ["method.class_names=fixed", "method.fill=null"],
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_mvtec(root, "bottle", train=6, good=2, defects={"broken": 2})
    make_mvtec(root, "tile", train=2, good=1, defects={"crack": 1})
    return root


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {kind: save(tmp_path_factory.mktemp(kind)) for kind, save in SAVE.items()}


@pytest.fixture(scope="module")
def arguments(root, checkpoints):
    """(case) -> its command line: four batches, two to an epoch of a class, in all phases together."""

    def make(case: Case) -> list[str]:
        backbone = ["backbone=resnet18", "backbone.name=test_resnet.r160_in1k", "backbone.weights=none"]
        if case.text:
            backbone = [f"backbone={case.text}", f"backbone.name={checkpoints[case.text]}", "backbone.weights=auto"]
        if case.method in ("dinomaly", "inp_former"):
            backbone = [
                "backbone=dinov2_small",
                "backbone.name=test_vit",
                "backbone.weights=none",
                "backbone.layers=[1,2,3,4]",
            ]
        steps = 2 if case.method == "ltad" else 4
        budget = [] if case.stops == (0,) else ["trainer.max_epochs=null", f"trainer.max_steps={steps}"]
        rate = ["method.optimizer.lr=1e-2"] if budget else []
        chosen = [option for option in runs.method(case.method) if option != "method.groups=1"]  # that is for CNNs
        return [
            *backbone, *chosen, *runs.folder_data(root, case.category), f"data.image_size={SIDE}",
            *budget, *rate, "hardware.precision=32", "hardware.threads=1", "trainer.log_every=1",
            "trainer.checkpoint_minutes=0", *case.options,
        ]  # fmt: skip

    return make


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """(name of a case) -> the folder of its undisturbed run, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("run") / "run"
            runs.result_of(*arguments(CASES[name]), run_dir=made[name])
        return made[name]

    return get


@pytest.fixture(scope="module")
def composed(arguments):
    """(name of a case) -> its configuration, composed once; interpolations are still open."""
    made: dict[str, DictConfig] = {}

    def get(name: str) -> DictConfig:
        if name not in made:
            made[name] = configuration(arguments(CASES[name]))
        return made[name]

    return get


def configuration(command: list[str]) -> DictConfig:
    """The `train` configuration of a command line."""
    with runs.restored(), initialize_config_dir(str(runs.ROOT / "conf"), version_base="1.3"):
        return compose("train", [*runs.defaults(*command), *command])


def resolved(configured: DictConfig, *options: str) -> dict[str, Any]:
    """The configuration with further options, as a run receives it."""
    changed = configured.copy()
    for option in options:
        key = option.lstrip("+").partition("=")[0]
        value = OmegaConf.select(OmegaConf.from_dotlist([option.lstrip("+")]), key)
        OmegaConf.update(changed, key, value, merge=False, force_add=option.startswith("+"))
    cfg: Any = OmegaConf.to_container(changed, resolve=True)
    return cfg


class Batches(L.Callback):
    """Ends training after so many batches, and keeps what testing gives for each batch."""

    def __init__(self, steps: int):
        self.left, self.tested = steps, list[dict[str, Tensor]]()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.left -= 1
        trainer.should_stop = not self.left

    def on_test_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.tested.append(outputs)


def fitted(cfg: dict[str, Any]) -> tuple[Any, Any, dict[str, Tensor]]:
    """The data, the trained method, and `map` and `score` of the test images.

    Training and test are a run's, with the features computed in every step; no file is written.
    """
    with runs.restored():
        data, model = runs.build(cfg)
        batches = Batches(model.total_steps)
        hardware = lightning_options(cfg["hardware"], multirun=False)
        trainer = build.make_trainer(hardware, Path(), [batches], [], model.total_steps)
        trainer.fit(model, datamodule=data)
        trainer.test(model, data.test_dataloader(), verbose=False)
    return data, model, {key: torch.cat([each[key] for each in batches.tested]) for key in ("map", "score")}


def scores_and_notes(name: str, cfg: dict[str, Any]) -> tuple[Tensor, list[str]]:
    """The scores of the test images, and the notes of result.json on the data, the method and the options."""
    data, model, tested = fitted(cfg)
    return tested["score"], notes_of(cfg, CASES[name].method, data, model)


@pytest.fixture(scope="module")
def plain(composed):
    """(name of a case) -> its `scores_and_notes`, found once."""
    found: dict[str, tuple[Tensor, list[str]]] = {}

    def get(name: str) -> tuple[Tensor, list[str]]:
        if name not in found:
            found[name] = scores_and_notes(name, resolved(composed(name)))
        return found[name]

    return get


@pytest.mark.parametrize("name", RUNS)
def test_resumed_is_undisturbed(name, arguments, finished, tmp_path):
    """Weights, optimizers, log and scores to the last bit, after one interruption after the other."""
    case, run = CASES[name], tmp_path / "run"
    for stop in case.stops:
        with interrupted_after(stop):
            runs.train(*arguments(case), *(["resume=true"] if run.exists() else []), f"hydra.run.dir={run}")
    result = runs.result_of(*arguments(case), "resume=true", run_dir=run)
    assert result["timing"]["steps"] == (0 if case.stops == (0,) else 4)
    assert result["setting"] == ("unified" if case.category == BOTH else "single")
    assert_same_run(run, finished(name))


@pytest.mark.parametrize("name", RUNS)
def test_predicts_what_the_run_evaluated(name, finished, root, tmp_path):
    case = CASES[name]
    chosen = ["category=bottle"] if case.category == BOTH else []
    folder = root / "bottle" / "test"
    outcome = runs.predict(f"run={finished(name)}", f"input={folder}", f"output={tmp_path / 'out'}", *chosen)
    assert outcome.code == 0, outcome.err
    evaluated = {
        path.removeprefix("bottle/test/"): score
        for path, score in runs.scores_of(finished(name)).items()
        if path.startswith("bottle")
    }
    found = runs.scores_of(tmp_path / "out")
    assert found == pytest.approx(evaluated, rel=1e-4)
    names, values = list(evaluated), list(evaluated.values())
    others = dict(zip(names, [*values[1:], values[0]], strict=True))
    assert found != pytest.approx(others, rel=1e-4)  # another image's score would not pass
    assert len(list((tmp_path / "out" / "heatmaps").rglob("*.png"))) == 4


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.method == "recontrast"])
def test_recontrast_learns_its_encoder(name, finished):
    """The trained encoder changes, its frozen copy does not; and a variant has its own scores."""
    result = json.loads((finished(name) / "result.json").read_text())
    variant = name.removeprefix("recontrast ")
    assert result["variant"] == variant
    assert result["protocol"]["scoring"]["image_score"] == ("max" if variant == "one_class" else 0.01)
    weights = torch.load(finished(name) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    frozen, trained = (weights[f"{part}.net.conv_stem.weight"] for part in ("backbone", "encoder"))
    assert not torch.equal(frozen, trained)


def test_a_loaded_recontrast_is_laid_out_for_its_device(finished, monkeypatch):
    """A second time, after it has been made on the CPU: outside of a trainer nothing calls its `setup`."""
    run, devices = finished("recontrast one_class"), list[torch.device]()
    choose = ReContrast.lay_out

    def note(model: ReContrast, device: torch.device) -> None:
        devices.append(device)
        choose(model, device)

    monkeypatch.setattr(ReContrast, "lay_out", note)
    model = load_run(run, device="cpu").model
    assert devices == [torch.device("cpu"), model.device]


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, more in SWITCHES.items() for option in more])
def test_switches_act(name, option, composed, plain):
    """Training or the score differs: no option is ignored."""
    scores = fitted(resolved(composed(name), option))[2]["score"]
    assert scores.tolist() != pytest.approx(plain(name)[0].tolist(), rel=1e-6)


#: options that have no effect in a case, and what the run's notes say of them
WITHOUT_EFFECT = [
    ("norm_occ", "method.p=inf", "method.p has no effect with method.target=point"),
    ("norm_occ shell", "method.squared=false", "method.squared has no effect with method.target=shell"),
    ("ssae", "method.eval_every=7", "method.eval_every has no effect with method.patience=null"),
    (
        "recontrast one_class",
        "method.variants.unified.average=false",
        "method.variants.unified.average has no effect with method.variant=one_class",
    ),
    (
        "recontrast stable",
        "method.encoder_bn=train",
        "method.encoder_bn has no effect with method.variants.stable.stable",
    ),
    ("recontrast unified", "+method.optimizer.eps=1e-3",
     "method.optimizer.eps has no effect with method.variants.unified.optimizer.eps=1e-10"),
    ("ltad", "method.prompts.normal=\"a fine {}\"", "method.prompts.normal has no effect with a backbone without text"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "option", "note"), WITHOUT_EFFECT)
def test_options_without_effect_are_noted(name, option, note, composed, plain):
    expected, before = plain(name)
    scores, notes = scores_and_notes(name, resolved(composed(name), option))
    assert torch.equal(scores, expected)
    assert note in notes
    assert not any("no effect with" in text and text.startswith(note.split(" ")[0]) for text in before)


#: of combinations: options that the first one leaves without effect, with their note
COMBINATIONS = [
    ("norm_occ", ("method.target=zero",), "method.norm=2", "method.norm has no effect with method.target=zero"),
    ("rlr", ("method.mix=[1,0]",), "method.learnable_key=false",
     "method.learnable_key has no effect with method.mix=[1, 0]"),
    ("rlr", ("method.mix=[0,1]",), "method.locality=false", "method.locality has no effect with method.mix=[0, 1]"),
    ("rlr", ("method.locality=false", "method.masked=false"), "method.windows=[1,1,1]", (
        "method.windows has no effect with method.mix=[2, 1], method.locality=false and method.masked=false"
    )),
    ("rlr", ("method.zero_fill=true",), "method.clip=1", "method.clip has no effect with method.zero_fill=true"),
    ("recontrast one_class", ("method.mining=null",), "method.variants.one_class.warm_up=0.5",
     "method.variants.one_class.warm_up has no effect with method.mining=null"),
    ("ltad", ("method.fill=null",), "method.synthesis=between", "method.synthesis has no effect with method.fill=null"),
    ("ltad", ("method.classifier_weight=0",), "method.strong=1",
     "method.strong has no effect with method.classifier_weight=0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "option", "note"), COMBINATIONS)
def test_combinations_without_effect_are_noted(name, given, option, note, composed):
    without = fitted(resolved(composed(name), *given))[2]["score"]
    scores, notes = scores_and_notes(name, resolved(composed(name), *given, option))
    assert torch.equal(scores, without)
    assert note in notes


@pytest.mark.parametrize("name", FIRST)
def test_bf16_and_cost(name, composed, monkeypatch):
    """hardware.precision=bf16 fits and tests every method, and rounds neither maps nor scores to bf16's 8 bits.

    The cost of every method is measured.
    """
    data, model, tested = fitted(resolved(composed(name), "hardware.precision=bf16"))
    assert summary.precision("bf16", model, torch.device("cpu")) == "bf16"
    assert (tested["map"].dtype, tested["score"].dtype) == (torch.float32, torch.float32)
    bits = tested["map"]
    assert (bits != bits.bfloat16().float()).float().mean() > 0.9
    monkeypatch.setattr(efficiency, "WINDOW", 0)
    cost = efficiency.sizes(model)
    efficiency.measure_cost(model, data, 2, cost, efficiency.no_speed(), seconds=1e-9)
    assert 0 < cost["flops_per_image"] < 1e12


def built(cfg: dict[str, Any], categories: list[str], **context: Any) -> AnomalyModule:
    """The method of a configuration, as a run builds it."""
    with runs.restored():
        uses = get_class(cfg["method"]["_target_"]).uses_backbone  # type: ignore[attr-defined]
        tokens = get_class(cfg["method"]["_target_"]).uses_tokens  # type: ignore[attr-defined]
        tokens = {"tokens": True} if tokens else {}
        backbone = instantiate(cfg["backbone"], precision="auto", **tokens) if uses else None
        context = {"image_size": (SIDE, SIDE), "categories": categories, "precision": "auto"} | context
        return instantiate(cfg["method"], backbone=backbone, scoring=cfg["scoring"], **context, _convert_="all")


def number_options(target: Any) -> list[str]:
    """The options of a method's constructors that take numbers."""
    hints: dict[str, Any] = {}
    for each in reversed(target.__mro__):
        hints |= get_type_hints(each.__init__)
    return [name for name, hint in hints.items() if {int, float} & {hint, *get_args(hint)} and name != "steps"]


@pytest.mark.parametrize("name", [name for name in FIRST if name != "rd4ad"])  # none of its options is a number
def test_a_negative_number_is_refused_by_its_options_name(name, composed):
    cfg = resolved(composed(name))
    data = build.make_data(cfg)
    backbone = build.make_backbone(cfg)
    options = [option for option in number_options(get_class(cfg["method"]["_target_"])) if option in cfg["method"]]
    assert options
    for option in options:
        wrong = cfg | {"method": cfg["method"] | {option: -3}}
        with pytest.raises((UserError, InstantiationException)) as error:
            build.make_method(wrong, backbone, data, data.categories, 4)
        line = line_of(error.value)
        assert re.match(rf"method(\.|: ){option}=-3: ", line), line


def line_of(error: BaseException) -> str:
    """What a program prints of an error."""
    return one_line(error, outside=False, folder="") or ""


#: methods that score a training image by the others
LEAVE_OUT = ("padim", "patchcore", "rad")
#: at most so many bytes to the GPU, and so many waits for it, in a step of four images that are there already
COSTS = {"ltad": (1000, 1)}


@pytest.mark.parametrize("name", CASES)
def test_runs_on_a_fake_gpu(name, composed):
    case = CASES[name]
    categories = ["bottle", "tile"] if case.category == BOTH else ["bottle"]
    model: Any = built(resolved(composed(name)), categories)
    with fake_cuda():
        to_fake(model)
        model._trainer, model.steps = FakeTrainer(categories, SIDE), 4
        for batches in ("fit_batches", "train_eval_batches"):
            setattr(model, batches, lambda: [fake_batch(3, SIDE), fake_batch(2, SIDE, 3)])
        model.train().on_train_start()
        if name == "patchcore":  # its coreset is selected on the CPU, by comparing values
            model.bank, model.owners = torch.randn(9, model.bank.shape[1], device="cuda"), model.owners.new_zeros(9)
        else:
            model.on_fit_start()
        trains = type(model).training_step is not AnomalyModule.training_step and model.automatic_optimization
        if trains and name not in FROM_FEATURES:
            for step in (0, 3) if model.phases == 2 else (3,):  # one step of each phase
                model._trainer.global_step, batch = step, fake_batch(4, SIDE)
                with Counted() as count:
                    assert model.training_step(batch, 0).device.type == "cuda"
                most = COSTS.get(case.method, (0, 0))
                assert count.bytes_to_gpu <= most[0], count.bytes_to_gpu
                assert count.waits <= most[1], count.waits
        model.eval()
        with torch.no_grad():
            for is_train_image in (False, True) if case.method in LEAVE_OUT else (False,):
                batch = fake_batch(3, SIDE) | {"is_train_image": is_train_image}
                scored = model.score(batch)
                assert (scored["map"].device.type, scored["score"].device.type) == ("cuda", "cuda")
                assert scored["map"].shape == (3, SIDE, SIDE)


def test_the_fake_gpu_notices_a_tensor_on_the_cpu():
    with fake_cuda(), pytest.raises(RuntimeError, match="device"):
        torch.randn(3, device="cuda") + torch.randn(3)


@pytest.mark.parametrize("name", ["rlr", "uniad", "ltad", "padim"])
def test_fixed_grids_refuse_other_sizes_in_test(name, composed):
    cfg = resolved(composed(name))
    for size, shown in (("original", "original"), ((64, 64), "64×64")):
        message = rf"^data.texture_size={shown}: \w+ has a fixed grid.*data.image_size=32×32, or data.treatment=object"
        with pytest.raises(InstantiationException) as error:
            built(cfg, ["bottle", "tile"], test_size=size)
        assert re.match(message, str(error.value.__cause__))
    assert built(cfg, ["bottle", "tile"], test_size=(SIDE, SIDE)).test_size == (SIDE, SIDE)


VIT = ("backbone.name=test_vit.r160_in1k", "backbone.layers=[1,2,4]")
GRIDS = {
    "vit 3×5": (*VIT, "data.image_size=[48,80]"),
    "resnet 8×16": ("backbone.name=test_resnet.r160_in1k", "data.image_size=[32,64]"),
}
#: options for methods whose own ones are for other levels or larger grids
FOR_GRIDS = {
    "padim": ("method.dim=16",),
    "rlr": ("method.windows=[1,1,1]",),
}  # fmt: skip
METHODS = sorted(path.stem for path in (runs.ROOT / "conf" / "method").glob("*.yaml"))


#: the field's networks with random weights, at the sizes that they are used with
NETWORKS = {
    "ViT-S/14 112²": ("backbone=dinov2_small", "data.image_size=112"),
    "ViT-S/14 98×126": ("backbone=dinov2_small", "data.image_size=[98,126]"),
    "ResNet18": ("backbone=resnet18", "data.image_size=64"),
    "EfficientNet-Lite0": ("backbone=efficientnet_lite0", "data.image_size=64"),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_grids_are_fitted_and_loaded_or_refused(method, root):
    """A transformer's levels of one size, and grids that are rectangular and no powers of two."""
    needs = [option for option in runs.method(method) if not option.startswith("backbone.")]
    for name, options in GRIDS.items():
        fitted_and_loaded_or_refused(method, name, [*needs, "backbone=resnet18", *options], root)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_networks_are_fitted_and_loaded_or_refused(method, name, root):
    for_cnns = r"backbone\.|method\.(groups|blocks)" if name.startswith("ViT") else r"backbone\."
    needs = [option for option in runs.method(method) if not re.match(for_cnns, option)]
    levels = ["backbone.layers=[3,6,9]"] if method == "rlr" and name.startswith("ViT") else []  # as many as windows
    fitted_and_loaded_or_refused(method, name, [*needs, *NETWORKS[name], *levels], root)


def fitted_and_loaded_or_refused(method: str, name: str, options: list[str], root: Path) -> None:
    """Fitted, and scoring alike with its weights in a method that is built anew, as evaluate and predict do."""
    given = [*options, *FOR_GRIDS.get(method, ()), "trainer.max_epochs=null", "trainer.max_steps=2"]
    cfg = resolved(configuration([*runs.folder_data(root), *given, "hardware.threads=1"]))
    if name.lower().startswith("vit") and method in ("rd4ad", "recontrast"):
        with pytest.raises(InstantiationException) as error:
            fitted(cfg)
        assert re.match(r"backbone.layers=\[[\d, ]+\]: give three levels, each half ", line_of(error.value))
        return
    data, model, tested = fitted(cfg)
    _, other = runs.build(cfg | {"seed": 1})
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        scores = torch.cat([other.eval().score(batch)["score"] for batch in data.test_dataloader()])
    torch.testing.assert_close(scores, tested["score"], rtol=1e-4, atol=0)


def test_a_bank_that_does_not_fit_is_one_line(root, tmp_path, monkeypatch):
    monkeypatch.setattr("anomalib_lite.methods.rad.free_memory", lambda device: 0)
    outcome = runs.train("method=rad", *runs.folder_data(root), f"hydra.run.dir={tmp_path / 'run'}")
    assert outcome.code == 2
    assert re.fullmatch(r"error: method=rad: the bank of 6 training images needs .* training images\n", outcome.err)

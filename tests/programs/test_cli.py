"""The command line: quick answers, what composes with what, who overrides whom."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from anomalib_lite import compare, splits
from anomalib_lite.cli import schema, values
from anomalib_lite.cli.hydra_hooks import mode_from_flags
from anomalib_lite.errors import UserError
from anomalib_lite.paths import HOME
from anomalib_lite.runs.inputs import check_inputs
from tests.helpers.image_trees import make_mvtec
from tests.helpers.run_programs import ROOT, Outcome, evaluate, predict, python, result_of, run, succeeded, train

HEAVY = ("torch", "lightning", "timm", "numpy", "albumentations", "wandb", "matplotlib")


def choices(group: str) -> list[str]:
    """The names that a user may give a group."""
    return sorted(path.stem for path in (HOME / "conf" / group).glob("*.yaml") if not path.stem.startswith("_"))


@pytest.fixture(autouse=True)
def _no_hydra_left():
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


def composed(*overrides: str, config_dir: Path | None = None, resolve: bool = True) -> dict[str, Any]:
    search = [f"hydra.searchpath=[file://{config_dir}]"] * bool(config_dir)
    with initialize_config_dir(str(HOME / "conf"), version_base="1.3"):
        cfg: Any = OmegaConf.to_container(compose("train", [*overrides, *search]), resolve=resolve)
    return cfg


# --- at once ---


def cpu_seconds() -> float:
    """Processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def imported(outcome: Outcome) -> set[str]:
    """The packages that a process of `python -X importtime` has imported."""
    names = re.findall(r"^import time:.*\| +(\S+)$", outcome.err, re.MULTILINE)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("arguments", ["--help", "--cfg job"])
def test_answers_at_once(arguments, tmp_path):
    """Under 1.5 s at best of three, of processor time (the machine may be busy), and without what is heavy."""
    for _ in range(3):
        start = cpu_seconds()
        outcome = python("-X", "importtime", "-m", "anomalib_lite.train", *arguments.split(), cwd=tmp_path)
        took = cpu_seconds() - start
        assert outcome.code == 0, outcome.err
        assert "batch_size: 8" in outcome.out
        assert "omegaconf" in imported(outcome)
        assert not imported(outcome) & {*HEAVY, "pydantic"}
        if took < 1.5:
            break
    assert took < 1.5
    assert not list(tmp_path.iterdir())  # nothing is left behind


@pytest.mark.parametrize("arguments", ["--info", "data.batch_size=0", "method=foo"])
def test_nothing_heavy_is_imported(arguments, tmp_path):
    outcome = python("-X", "importtime", "-m", "anomalib_lite.train", arguments, cwd=tmp_path)
    assert outcome.code == (0 if arguments == "--info" else 2)
    assert "omegaconf" in imported(outcome)
    assert not imported(outcome) & set(HEAVY)
    assert ("pydantic" in imported(outcome)) == ("data.batch_size=0" in arguments)


@pytest.mark.parametrize(
    "arguments", ["data=folder data.root=none", "split=file split.path=none", "backbone.weights=none.pth"]
)
def test_missing_files_are_reported_before_torch_is_imported(arguments, tmp_path):
    outcome = python("-X", "importtime", "-m", "anomalib_lite.train", *arguments.split(), cwd=tmp_path)
    assert outcome.code == 2
    assert re.search(r"^error: .*none.*: no such f", outcome.err, re.MULTILINE)
    assert not imported(outcome) & {"torch", "lightning"}


def test_help_lists_what_a_user_may_choose(tmp_path):
    outcome = train("--help", small=False)
    groups = dict(line.split(": ", 1) for line in outcome.out.splitlines() if re.match(r"\w+: \w+, ", line))
    assert groups["data"] == (
        "btad, cifar10, folder, kolektor_sdd, kolektor_sdd2, mpdd, mvtec, mvtec_ad_2, mvtec_loco, real_iad, "
        "synthetic, table, visa"
    )
    studies = groups["experiments"].split(", ")
    assert "ltad_small" in studies
    assert not {"published", "wandb_sweep"} & {*studies}  # no studies
    assert not re.search(r"[ ,]_\w+[,\n]", outcome.out)


@pytest.mark.parametrize("method", choices("method"))
def test_help_explains_every_option(method):
    """With the comments of the chosen YAML files, each beside its key, and in lines of at most 120 characters."""
    outcome = succeeded(train(f"method={method}", "split=exp", "--help", small=False))
    config = outcome.out.partition("== Config ==")[2].partition("Examples")[0]
    assert max(map(len, config.splitlines())) <= 120
    words = " ".join(config.replace("# ", "").split())
    for file in ("train", "data/_base", f"method/{method}", "split/exp", "hardware/auto", "logger/default"):
        lines = (HOME / "conf" / f"{file}.yaml").read_text().partition("\nhydra:")[0].splitlines()
        explained = [re.fullmatch(r" *(\w+):.*? # *(.*)", line) for line in lines]
        assert any(explained)
        for found in filter(None, explained):
            assert " ".join(found[2].split()) in words, found[0]
            assert f"{found[1]}: " in words


def test_help_of_a_users_method_and_of_sweeps(own_folder):
    text = "# @package _global_\nmethod:\n  _target_: mine.Mine\n  power: 2.0   # exponent of the difference\n"
    (own_folder / "my_conf" / "method").mkdir(parents=True)
    (own_folder / "my_conf" / "method" / "mine.yaml").write_text(text)
    outcome = train("--config-dir", own_folder / "my_conf", "method=mine", "--help", small=False)
    assert "  power: 2.0  # exponent of the difference\n" in outcome.out
    assert "hydra/launcher: basic, processes, ray, submitit_local, submitit_slurm\n" in outcome.out
    assert "hydra/sweeper: basic, random, tpe\n" in outcome.out
    assert "method=patchcore --help" in outcome.out.partition("Examples")[2]


@pytest.mark.parametrize("data", sorted({*choices("data")} - {"synthetic"}))
def test_missing_data_are_refused_before_the_imports(data):
    """And before a sweep starts its first job."""
    option = "data.table=/none" if data == "table" else "data.root=/none"
    with pytest.raises(UserError, match=r"^(data\.table=)?/none: no such f"):
        check_inputs(composed(f"data={data}", option))


# --- composition ---


@pytest.mark.parametrize("method", choices("method"))
def test_everything_composes(method):
    """Each method with a CNN, a transformer, and backbones of its own; with all methods every choice occurs."""
    first = choices("method").index(method)
    backbones = ["resnet50", "dinov2_small", *choices("backbone")[first :: len(choices("method"))]]
    for number, backbone in enumerate(backbones, start=3 * first):
        data = choices("data")[number % len(choices("data"))]
        hardware = choices("hardware")[number % len(choices("hardware"))]
        cfg = composed(f"method={method}", f"backbone={backbone}", f"data={data}", f"hardware={hardware}")
        assert set(cfg) >= {"data", "split", "hardware", "trainer", "backbone", "scoring", "logger", "method", "seed"}
        assert cfg["data"]["name"] == data
        assert cfg["data"]["seed"] == cfg["seed"]
        chosen = yaml.safe_load((ROOT / "conf" / "backbone" / f"{backbone}.yaml").read_text())
        assert cfg["backbone"]["name"] == chosen["name"]
        assert cfg["backbone"]["layers"] == chosen.get("blocks", cfg["backbone"]["layers"])
        assert cfg["hardware"]["accelerator"] == (hardware if hardware in ("cpu", "gpu") else "auto")
        schema.check(cfg)


@pytest.mark.parametrize("group", ["split", "logger"])
def test_other_groups_compose(group):
    for name in choices(group):
        more = ["split.path=FILE"] if name == "file" else []
        schema.check(composed(f"{group}={name}", *more))


STUDY = """# @package _global_
defaults:
  - override /method: norm_occ
  - override /backbone: resnet50
backbone:
  layers: [1, 2]
trainer:
  max_epochs: 7
method:
  norm: 0.7
"""


def test_who_overrides_whom(tmp_path):
    """A method overrides the groups before it, an experiment overrides a method, the command line overrides both."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "study.yaml").write_text(STUDY)

    method = composed("method=norm_occ")
    assert method["backbone"]["name"] == "wide_resnet50_2.tv_in1k"
    assert method["backbone"]["layers"] == [2, 3]
    assert set(method["trainer"].values()) - set(composed("method=norm_occ_closed_form")["trainer"].values())

    study = composed("+experiments=study", config_dir=tmp_path)
    assert study["backbone"]["name"] == "resnet50.tv_in1k"
    assert (study["backbone"]["layers"], study["trainer"]["max_epochs"], study["method"]["norm"]) == ([1, 2], 7, 0.7)
    assert study["method"]["target"] == "point"

    ours = ["backbone=resnet18", "backbone.layers=[3]", "trainer.max_epochs=1", "method.norm=0.2"]
    for study in (composed(*ours), composed("+experiments=study", *ours, config_dir=tmp_path)):
        assert study["backbone"]["name"] == "resnet18.tv_in1k"
        assert (study["backbone"]["layers"], study["trainer"]["max_epochs"]) == ([3], 1)
        assert study["method"]["norm"] == 0.2
    other = composed("+experiments=study", "method=norm_occ_closed_form", config_dir=tmp_path)
    assert other["method"]["_target_"].endswith("NormOCCClosedForm")


def test_experiments_are_found(tmp_path):
    """Those in a folder of the user's and those of the package, which are the checkout's experiments/."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "study.yaml").write_text(STUDY)
    outcome = train("--config-dir", tmp_path, "+experiments=study", "--cfg", "job", small=False)
    assert (outcome.code, outcome.err) == (0, "")
    assert "max_epochs: 7" in outcome.out
    assert (HOME / "conf" / "experiments").resolve() == (ROOT / "experiments").resolve()
    for name in choices("experiments"):
        budget = composed(f"+experiments={name}", resolve=False)["trainer"]["max_steps"]
        assert re.fullmatch(r"None|\d+|\$\{.*\}", str(budget)), name  # no comment that became part of the value


@pytest.mark.parametrize(
    ("argument", "is_composed"),
    [("hydra.searchpath=[file://mine]", True), ("+experiments=mine", True), ("data.root=hydra.mode", False)],
)
def test_what_may_make_a_command_a_sweep(argument, is_composed, monkeypatch):
    """A study may set hydra.mode, also one in a folder of hydra.searchpath: it is composed to learn the mode."""
    monkeypatch.setattr(sys, "argv", ["train", argument])
    monkeypatch.setattr(Hydra, "get_mode", lambda *_: "composed")
    with mode_from_flags():
        assert (object.__new__(Hydra).get_mode("train", []) == "composed") == is_composed


def test_flags_after_overrides_and_between(tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "study.yaml").write_text(STUDY)
    outcome = succeeded(train("seed=3", "--config-dir", tmp_path, "+experiments=study", "--cfg", "job", small=False))
    assert "seed: 3" in outcome.out
    assert "max_epochs: 7" in outcome.out


AS_TYPED = {
    "data.root=2024": "2024",
    "data.root=1e3": "1e3",
    "data.root=1_000": "1_000",
    "data.root=nan": "nan",
    "data.root=TRUE": "TRUE",
    "data.root=2024-01-05": "2024-01-05",
    "data.root=[a": "[a",
    "data.root=[a]": "[a]",
    "data.root={a: 1}": "{a: 1}",
    "data.root=/photos (1)": "/photos (1)",
    "data.root=null": None,
    "data.root=trail ": "trail ",
    "data.category=日本": "日本",
    "data.category=x=y": "x=y",
    "data.category=[bold]z": "[bold]z",
    "data.category=[日本,ä]": ["日本", "ä"],
    'data.root="null"': "null",
    "split.path=1.50": "1.50",
    "backbone.weights=7": "7",
    "hydra.run.dir=1.0": "1.0",
    "hydra.sweep.dir=false": "false",
    "data.category=null": "null",
    "data.category=[01,3, 1e3,null]": ["01", "3", "1e3", "null"],
    "split.order=[2,'1, 2']": ["2", "1, 2"],
    "+logger.wandb.notes=5": "5",
    "seed=1e3": 1000.0,
    "data.image_size=[64,64]": [64, 64],
    "method.p=inf": float("inf"),
}


@pytest.mark.parametrize("override", AS_TYPED)
def test_paths_and_names_stay_as_typed(override):
    assert values.read(values.as_typed(override)) == AS_TYPED[override]
    assert values.as_typed(values.as_typed(override)) == values.as_typed(override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.category=01,1e3,true", ["01", "1e3", "true"]),
        ("data.category=[1,2],[1e3]", [["1", "2"], ["1e3"]]),
        ("data.root=choice(1,a)", ["1", "a"]),
        ("data.category=range(1,3)", [1, 2]),
        ("seed=1,1e3", [1, 1000.0]),
        ("data.category=日本,b", ["日本", "b"]),
    ],
)
def test_values_of_a_sweep_stay_as_typed(override, expected):
    (parsed,) = OverridesParser.create().parse_overrides([values.as_typed(override)])
    assert [Override._convert_value(each) for each in parsed.sweep_iterator()] == expected


def test_numbers_in_a_yaml_file_become_paths_and_names():
    cfg = composed()
    cfg["data"] |= {"root": 2024, "category": [1, True]}
    cfg["logger"]["wandb"] |= {"name": 1.5, "tags": [False]}
    schema.check(cfg)
    assert (cfg["data"]["root"], cfg["data"]["category"]) == ("2024", ["1", "true"])
    assert (cfg["logger"]["wandb"]["name"], cfg["logger"]["wandb"]["tags"]) == ("1.5", ["false"])


def test_folders_with_names_like_numbers(tmp_path, monkeypatch):
    """Of the data, a run, its evaluation, predictions and a sweep, in all programs; so are the categories."""
    monkeypatch.chdir(tmp_path)
    names = ["01", "1e3", "true", "null", "no"]
    for category in names:
        make_mvtec(Path("2024"), category, train=2, good=1, defects={"cut": 1})
    data = ["method=norm_occ_closed_form", "data=folder", "data.root=2024"]
    result = result_of(*data, f"data.category=[{','.join(names)}]", run_dir=Path("1e3"))
    assert result["categories"] == names
    for program, arguments in (
        (evaluate, ["run=1e3", "output=true", "data.root=2024"]),
        (predict, ["run=1e3", "input=2024/1e3", "output=null", "category=1e3"]),
        (predict, ["run=1e3", "input=2024/no", "output=no", "category=no"]),
        (lambda *given: run(compare.main, *given), ["1e3", "true", "--csv", "0x10"]),
        (lambda *given: run(splits.main, *given), [*data[1:], "data.category=[01,1e3]", "--write", "7.csv"]),
        (train, ["-m", "hydra/launcher=basic", *data, "data.category=01,1e3", "hydra.sweep.dir=1.50"]),
    ):
        outcome = program(*arguments)
        assert (outcome.code, outcome.err) == (0, "")
    written = ("true/result.json", "null/scores.csv", "no/scores.csv", "0x10", "7.csv")
    for file in (*written, "1.50/0/result.json", "1.50/1/result.json"):
        assert Path(file).is_file(), file


def test_a_reader_that_goes_away(tmp_path):
    """`--help | head` is no error; here nobody reads at all."""
    command = f"{sys.executable} -m anomalib_lite.train --help | true"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.stderr == ""

"""A built wheel carries its configuration and runs where the checkout is not."""

import importlib.util
import json
import zipfile
from pathlib import Path

import pytest

from tests.helpers.image_trees import make_mvtec
from tests.helpers.run_programs import ROOT, Outcome, defaults, folder_data, python
from tests.programs.test_bad_input import own_method


def pip(*arguments: str | Path) -> None:
    done = python("-m", "pip", "--disable-pip-version-check", "--quiet", *arguments, timeout=300)
    assert done.code == 0, done.err


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # with hatchling at hand, no registry is needed
    at_hand = ["--no-build-isolation"] * (importlib.util.find_spec("hatchling") is not None)
    pip("wheel", ROOT, "--no-deps", "--wheel-dir", folder, *at_hand)
    return next(folder.glob("anomalib_lite-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds the wheel's content alone; the packages it needs are those of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--target", folder, wheel)
    return folder


def below(folder: Path) -> set[str]:
    """The files that a package carries, relative to `folder`, links followed."""
    kinds = {".py", ".yaml", ".md", ".csv", ".html", ".js", ".tex"}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in kinds}
    return {path for path in found if "__pycache__" not in path}


def test_content(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert len(names) == len(set(names))
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests/")]
    carried = {name for name in names if ".dist-info/" not in name}
    package = {f"anomalib_lite/{path}" for path in below(ROOT / "anomalib_lite")}
    conf = {f"anomalib_lite/conf/{path}" for path in below(ROOT / "conf") if not path.startswith("experiments/")}
    studies = {f"anomalib_lite/conf/experiments/{path}" for path in below(ROOT / "experiments")}  # a link in conf/
    plugins = {f"hydra_plugins/{path}" for path in below(ROOT / "hydra_plugins")}
    assert package | conf | studies | plugins <= carried
    assert "anomalib_lite/conf/train.yaml" in carried
    # each study once: not as experiments/ as well
    for study in below(ROOT / "experiments"):
        assert len([name for name in names if name.endswith(f"experiments/{study}")]) == 1


@pytest.fixture
def run_installed(installed, tmp_path):
    """`python ARGUMENTS` in an empty folder, with the installed wheel in front of this checkout."""
    work = tmp_path / "work"
    work.mkdir()

    def run(*arguments: str | Path) -> Outcome:
        return python(*arguments, cwd=work, PYTHONPATH=str(installed))

    return run


def test_configuration(run_installed, installed):
    """From the wheel's own conf/, by console script and by module."""
    shown = run_installed(installed / "bin" / "anomalib-lite-train", "--cfg", "job", "method=norm_occ_closed_form")
    assert (shown.code, shown.err) == (0, "")
    assert "NormOCCClosedForm" in shown.out
    path = run_installed("-m", "anomalib_lite.train", "--info", "searchpath")
    assert str(installed / "anomalib_lite" / "conf") in path.out, path.err
    assert str(ROOT / "conf") not in path.out


def test_a_run(run_installed, installed, tmp_path):
    """By the console script, whose sys.path begins with its own folder: it finds a method in the current one."""
    make_mvtec(tmp_path / "data")
    method = own_method(tmp_path / "work", "from anomalib_lite.methods.norm_occ import NormOCC as Mine\n")
    arguments = [*defaults(*method), *method, *folder_data(tmp_path / "data"), "hydra.run.dir=run"]
    outcome = run_installed(installed / "bin" / "anomalib-lite-train", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    result = json.loads((tmp_path / "work" / "run" / "result.json").read_text())
    assert result["method"] == "mine"
    assert result["environment"]["anomalib_lite"]
    assert result["environment"]["git"] is None  # the wheel is in no repository

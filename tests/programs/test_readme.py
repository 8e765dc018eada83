"""The README's method works as it stands there, and its commands name what exists."""

import json
import re
from pathlib import Path

from tests.helpers import run_programs as runs
from tests.helpers.image_trees import make_mvtec

README = (Path(__file__).parents[2] / "README.md").read_text()


def block(language: str, first_line: str) -> str:
    return next(b for b in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if b.startswith(first_line))


def test_the_method_of_the_readme_trains(tmp_path):
    make_mvtec(tmp_path / "data")
    (tmp_path / "mine.py").write_text(block("python", "# mine.py"))
    (tmp_path / "my_conf" / "method").mkdir(parents=True)
    (tmp_path / "my_conf" / "method" / "mine.yaml").write_text(
        block("yaml", "# @package _global_\n# my_conf/method/mine.yaml")
    )
    command = block("sh", "python -m anomalib_lite.train --config-dir").split()[1:]
    small = ["data=folder", f"data.root={tmp_path / 'data'}", "data.image_size=64", "trainer.max_steps=3", "logger=csv"]
    done = runs.python(*command, *small, f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["method"] == "mine"
    assert result["timing"]["steps"] == 3


def test_files_that_the_readme_names_are_there():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (Path(__file__).parents[2] / link).exists(), link

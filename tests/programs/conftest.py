import sys

import pytest


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A current folder of the test's own, where a file mine.py is found and none of another test is remembered."""
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("mine", None)
    yield tmp_path
    sys.modules.pop("mine", None)

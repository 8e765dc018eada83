"""Hydra's configuration files, read once for all runs of a test session."""

import contextlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource

from anomalib_lite.paths import HOME


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """The files of conf/ and of Hydra's package do not change while tests run; reading them took a quarter of a start.

    The files of a user's folder are read in every start.
    """
    with pytest.MonkeyPatch.context() as patch:
        for source in (FileConfigSource, ImportlibResourcesConfigSource):
            patch.setattr(source, "load_config", stored(source.load_config))
        yield


def stored(load: Callable[..., Any]) -> Callable[..., Any]:
    """The method `load_config` of a class of sources, which gives copies of what it has read: Hydra changes them."""
    results: dict[tuple[str, str, str], bytes] = {}

    def load_config(self: Any, config_path: str) -> Any:
        if self.scheme() == "file" and self.path != str(HOME / "conf"):
            return load(self, config_path)
        key = self.provider, self.path, config_path
        if key not in results:
            results[key] = pickle.dumps(load(self, config_path))
        return pickle.loads(results[key])

    return load_config

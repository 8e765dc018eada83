"""Lets Hydra find the ready experiments: +experiments=NAME."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from anomalib_lite.cli import HOME


class AnomalibLiteSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("anomalib_lite", f"file://{HOME}")

"""split=exp10 … split=step500: the ready names of the long tails `split=exp` and `split=step` with an imbalance.

Nothing heavy is imported here: Hydra imports it for every --help too.
"""

import itertools
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin

from anomalib_lite.paths import HOME

IMBALANCES = (10, 20, 50, 100, 200, 500)


class ReadySplits(SearchPathPlugin):
    def manipulate_search_path(self, search_path: Any) -> None:
        main = next((entry.path for entry in search_path.get_path() if entry.provider == "main"), None)
        if main and Path(main.removeprefix("file://")) == HOME / "conf":  # another program's `split` stays its own
            for profile, imbalance in itertools.product(("exp", "step"), IMBALANCES):
                node = {"defaults": [profile, "_self_"], "imbalance": imbalance}
                ConfigStore.instance().store(group="split", name=f"{profile}{imbalance}", node=node)

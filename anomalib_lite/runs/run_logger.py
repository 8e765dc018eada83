"""What a run calls on its loggers."""

from typing import Any

from lightning.pytorch.loggers import Logger

from anomalib_lite.data.datamodule import AnomalyDataModule


class RunLogger(Logger):
    """A run calls these methods on each of its loggers, beside Lightning's `log_metrics`. Here they do nothing."""

    name, version = "", ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's call. The configuration is stored in .hydra/, and `start` receives all of it."""

    def start(self, cfg: dict[str, Any], names: dict[str, str], data: AnomalyDataModule) -> None:
        """The run starts with this resolved configuration; `names` are its choices of `method` and `split`."""

    def keep_until(self, step: int) -> None:
        """The run continues from a checkpoint of this step: later steps will be logged again."""

    def log_test(self, result: dict[str, Any], data: AnomalyDataModule, test: dict[str, Any], curves: dict) -> None:
        """The run's results are on disk.

        Args:
            result: the content of result.json.
            test: outputs in the order of `data.test_samples`: `scores` [N], and per image `maps`, `masks` [H, W].
            curves: points [P] by `<category>/<axis>`, see `metrics.curves.CURVES`.
        """

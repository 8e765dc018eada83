"""What lies where in a run's folder: every file and folder name is defined here. Imports nothing heavy."""

from pathlib import Path

#: written by a finished run or by `evaluate`
RESULT = "result.json"
SCORES = "scores.csv"
MAPS = "maps.npz"
FIGURES = "figures"
TRAINING_FIGURE = "training.png"  # below FIGURES
#: written while a run trains
METRICS_LOG = "metrics.csv"
CHECKPOINTS = "checkpoints"
HYDRA = ".hydra"
WANDB = "wandb"
#: written by `predict`, beside SCORES
HEATMAPS = "heatmaps"
OVERLAYS = "overlays"


def checkpoint(run: Path) -> Path:
    """The file of the last checkpoint."""
    return run / CHECKPOINTS / "last.ckpt"


def stored_config(run: Path) -> Path:
    """The file with the run's resolved configuration; a folder with this file holds a run."""
    return run / CHECKPOINTS / "config.json"


def is_run(folder: Path) -> bool:
    """Whether a run was started in this folder."""
    return stored_config(folder).is_file()


def is_finished(run: Path) -> bool:
    """Whether the run has its results: result.json is written last."""
    return (run / RESULT).is_file()

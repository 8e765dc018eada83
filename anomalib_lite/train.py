"""Train and evaluate a method: python -m anomalib_lite.train method=… data=… (see --help).

Nothing heavy is imported before the configuration has been accepted: --help and --cfg answer at once.
"""

import json
import logging
from pathlib import Path
from typing import Any

from anomalib_lite.cli import program as cli
from anomalib_lite.errors import UserError
from anomalib_lite.paths import write_text

log = logging.getLogger(__name__)


def main() -> None:
    cli.run(train, "train")


def train(cfg: Any) -> float | None:
    """One run. Gives the sweeper what was measured on held-out training images, never on the test set."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from anomalib_lite.cli import schema as configuration
    from anomalib_lite.runs import ranks

    hydra = HydraConfig.get()
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    configuration.check(plain)
    one_process = hydra.mode == RunMode.MULTIRUN  # our own launchers give every job a process and mode=RUN
    ranks.check(plain["hardware"], str(hydra.runtime.choices.get("hydra/launcher")) if one_process else None)
    configuration.make_absolute(plain)
    names = {choice: str(hydra.runtime.choices[choice]) for choice in ("method", "split")}
    run = open_run(cfg, plain, names)
    if run is None:
        return None

    from anomalib_lite.runs import terminal
    from anomalib_lite.runs.run import execute
    from anomalib_lite.tracking.wandb_logger import finish

    checkpoint = run / "checkpoints" / "last.ckpt"
    try:
        result = execute(plain, run, names, checkpoint, hydra.overrides.task, multirun=one_process)
    except BaseException as error:
        finish(1)
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            place = "its last checkpoint" if checkpoint.is_file() else "the beginning: there is no checkpoint yet"
            raise KeyboardInterrupt(
                f"interrupted; the same command with resume=true hydra.run.dir={run} goes on from {place}"
            ) from None  # Lightning exits with 1
        if isinstance(error, Exception) and ranks.is_first(plain["hardware"]) and not checkpoint.is_file():
            stored_config(run).unlink(missing_ok=True)  # there is no run yet: a corrected one may use the folder
        raise
    finish(0)
    if result is None:
        return None
    terminal.show(run, result)
    return configuration.objective(plain["objective"], result)


def open_run(cfg: Any, plain: dict[str, Any], names: dict[str, str]) -> Path | None:
    """The run's folder with its configuration written; None if the run to be continued is finished already.

    Raises:
        UserError: the folder holds another run, or the one to be continued has another configuration.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from anomalib_lite.cli import schema as configuration
    from anomalib_lite.runs import artifacts, ranks, terminal

    hydra = HydraConfig.get()
    run = Path(hydra.runtime.output_dir)
    if not ranks.is_first(plain["hardware"]):
        return run
    stored = stored_config(run)
    if stored.is_file() and not cfg.resume:
        raise UserError(f"{run} already holds a run: add resume=true to continue it, or choose another hydra.run.dir")
    if stored.is_file():
        configuration.check_unchanged(json.loads(stored.read_text())["config"], plain, run)
    if cfg.resume and (run / "result.json").is_file():
        log.info("this run is finished: nothing to do")
        terminal.show(run, artifacts.read_result(run))
        return None
    (run / "checkpoints").mkdir(exist_ok=True)
    write_text(stored, json.dumps({"config": plain, "names": names}, indent=1))
    (run / ".hydra").mkdir(exist_ok=True)
    (run / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    (run / ".hydra" / "hydra.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({"hydra": hydra})))
    (run / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(hydra.overrides.task))
    return run


def stored_config(run: Path) -> Path:
    """The file that says that a run was begun in this folder, and with which configuration."""
    return run / "checkpoints" / "config.json"


if __name__ == "__main__":
    main()

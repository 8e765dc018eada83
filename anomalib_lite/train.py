"""Train and evaluate a method: python -m anomalib_lite.train method=… data=… (see --help).

Nothing heavy is imported before the configuration has been accepted: --help and --cfg answer at once.
"""

import contextlib
import logging
from pathlib import Path
from typing import Any

from anomalib_lite.cli import program as cli
from anomalib_lite.cli import signals
from anomalib_lite.cli.messages import one_line
from anomalib_lite.runs import folder
from anomalib_lite.runs.claim import claimed
from anomalib_lite.runs.inputs import check_inputs
from anomalib_lite.runs.objective import check_objective, objective

log = logging.getLogger(__name__)


def main() -> None:
    cli.run(train, "train")


def train(cfg: Any) -> float | None:
    """One run. Returns the objective for a sweeper: measured on held-out training images, never on the test set."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from anomalib_lite.cli import schema
    from anomalib_lite.runs import ranks

    hydra = HydraConfig.get()
    run = Path(hydra.runtime.output_dir)
    overrides: Any = OmegaConf.to_container(hydra.overrides.task)  # as typed: with interpolations
    names = {choice: str(hydra.runtime.choices[choice]) for choice in ("method", "split")}
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    schema.check_composed(config)
    from anomalib_lite.runs import artifacts, terminal  # these import NumPy: after the check

    folder.make_absolute(config)
    if config["resume"]:
        config, names, overrides = folder.resumed(run, config, names, overrides)
    check_objective(config)
    one_process = hydra.mode == RunMode.MULTIRUN  # our own launchers give every job a process and mode=RUN
    ranks.check(config["hardware"], str(hydra.runtime.choices.get("hydra/launcher")) if one_process else None)
    first = ranks.settle(config["hardware"])
    if not folder.checkpoint(run).is_file():  # otherwise the checkpoint holds the weights
        check_inputs(config)
    if config["data"]["check"] == "only":
        from anomalib_lite.runs.data_report import report

        report(config, run)
        return None
    result: dict[str, Any] | None
    with claimed(run, "hydra.run.dir") if first else contextlib.nullcontext():
        if config["resume"] and first and not folder.is_run(run) and OmegaConf.is_missing(hydra.job, "num"):
            # the jobs of a sweep have a number: it may say resume=true to jobs that have not started
            log.warning("hydra.run.dir=%s: no run to resume in this folder, so this run starts from the beginning", run)
        if first and not folder.open_run(run, config, names, overrides, hydra):
            log.info("this run is finished: nothing to do")
            result = artifacts.read_result(run)
        else:
            if first:
                log.info("run in %s; importing the libraries, which can take half a minute", run)
            result = trained(run, config, names, overrides, first, one_process)
    if result is None:
        return None
    terminal.show(run, result)
    return objective(config["objective"], result)


def trained(
    run: Path, config: dict[str, Any], names: dict[str, str], overrides: list[str], first: bool, one_process: bool
) -> dict[str, Any] | None:
    """The run's result; None on other ranks than the first. A start that fails leaves the folder as it was."""
    from anomalib_lite.runs.run import execute
    from anomalib_lite.tracking.wandb_logger import finish

    checkpoint = folder.checkpoint(run)
    try:
        result = execute(config, run, names, checkpoint, overrides, multirun=one_process)
    except BaseException as error:
        stop = signals.interruption(error)
        failed_start = not stop and isinstance(error, Exception) and first and not checkpoint.is_file()
        # a user error, also one that Hydra has wrapped
        withdrawn = failed_start and one_line(error, outside=False, folder="") is not None
        finish(1, keep=not (withdrawn and folder.holds_only_a_start(run)))
        if stop:
            place = "its last checkpoint" if checkpoint.is_file() else "the beginning: there is no checkpoint yet"
            text = f"{str(stop) or 'interrupted'}; resume=true hydra.run.dir={run} continues this run from {place}"
            raise type(stop)(text) from None
        if withdrawn:
            folder.withdraw(run)
        elif failed_start:  # the log and the configuration help to find the mistake
            folder.stored_config(run).unlink(missing_ok=True)
        raise
    finish(0)
    return result


if __name__ == "__main__":
    main()

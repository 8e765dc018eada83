"""A run in Weights & Biases: its start, its scalars and its end. wandb_report.py makes what is shown of the results.

W&B never stops or delays a run: an error becomes one log line, every wait has a timeout, and the results are on disk
before W&B receives them. Only what W&B refuses of the user's options ends a run, before it trains. Nothing is written
outside the run's folder, and nothing prompts for a key.
"""

import contextlib
import inspect
import logging
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.errors import UserError
from anomalib_lite.paths import write_text
from anomalib_lite.runs.folder import WANDB
from anomalib_lite.runs.run_logger import RunLogger
from anomalib_lite.tracking.wandb_server import NO_KEY, one_line, online_obstacle, sync_command

log = logging.getLogger(__name__)

FAILED = "W&B failed, nothing more of this run is logged there"
OWN = {"id", "config", "dir", "settings", "resume", "reinit"}  # arguments of wandb.init that the run itself chooses
TRUE = ("y", "yes", "t", "true", "on", "1")  # values of an environment variable that W&B reads as true
#: this process's run in W&B: at most one at a time
_current: "WandbRun | None" = None


class WandbRun(RunLogger):
    """Logs to W&B from rank 0: `start`, then scalars, `log_test`, and at the end of the process `finish`.

    Args:
        run_dir: the run's folder.
        mode: auto (online if a key is configured, otherwise offline), online, offline or disabled.
        timeout: seconds to wait for the server at the start; if it does not answer, the run is offline.
        upload_timeout: seconds to wait at the end for what is still to be uploaded.
        options: arguments of `wandb.init`, such as project, entity, name and notes. None stands for W&B's environment
            variable, or else for our choice: see `_init_options`.
    """

    # Not derived from Lightning's WandbLogger: its `experiment` starts a run on first access, also where ours could
    # not be started, and all of its methods that a run calls would have to be overridden.

    def __init__(
        self, run_dir: str, mode: str = "auto", timeout: float = 10, upload_timeout: float = 30, **options: Any
    ):
        super().__init__()
        self.dir, self.mode, self.timeout, self.upload_timeout = Path(run_dir), mode, timeout, upload_timeout
        self.options = {key: value for key, value in options.items() if value}
        self.run: Any = None  # of type wandb.Run
        self.failed = False  # W&B raised an exception: nothing more is logged
        self.next_step = self.logged = 0  # W&B's own next step; the last of ours that a resumed run's server has
        self.variables: dict[str, str] = {}  # environment variables that are set for this run only

    @property
    def experiment(self) -> Any:
        """The `wandb.Run`; None if there is none."""
        return self.run

    @contextlib.contextmanager
    def _harmless(self, message: str) -> Iterator[None]:
        """An exception becomes a warning, and nothing more is logged."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            self.failed = True
            log.warning("%s: %s", message, one_line(error))

    @rank_zero_only
    def start(self, cfg: dict[str, Any], names: dict[str, str], data: AnomalyDataModule) -> None:
        """Start the run, or continue it if `cfg["resume"]`; offline if the server or the key does not work.

        Raise UserError for an option, or a variable of W&B's in the environment, that W&B refuses.
        """
        global _current
        off = os.environ.get("WANDB_MODE") == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in TRUE
        if self.mode == "disabled" or (self.mode == "auto" and off):
            return  # before the import of wandb, which takes a second
        _current = self
        with self._harmless("logger.wandb is left out"), _judged():
            wandb = self._import_wandb()
            unknown = self.options.keys() - inspect.signature(wandb.init).parameters.keys()
            if wrong := sorted(unknown | (self.options.keys() & OWN)):
                why = "the run sets it itself" if wrong[0] in OWN else "wandb.init has no such argument"
                raise UserError(f"logger.wandb.{wrong[0]}: {why}; remove it")
            settings = wandb.setup(wandb.Settings(silent=True)).settings
            mode = settings.mode if self.mode == "auto" else self.mode
            if mode == "disabled":  # by W&B's own settings file
                return
            self.run = self._init(settings, mode, self._init_options(cfg, names, data, bool(settings.sweep_id)))
            self.next_step, self.logged = self.run.starting_step, int(self.run.summary.get("step") or 0)
            self.run.define_metric("step", hidden=True)
            self.run.define_metric("*", step_metric="step", step_sync=True)
            self.run.define_metric("loss", step_metric="step")
            self.run.define_metric("epoch", step_metric="step", hidden=True)

    def _import_wandb(self) -> Any:
        """The module, which then writes below the run's folder only."""
        folder = self.dir / WANDB
        folder.mkdir(exist_ok=True)
        ours = {"WANDB_DATA_DIR": str(folder / "data"), "WANDB_CACHE_DIR": str(folder / "cache")}
        ours |= {"WANDB_HTTP_TIMEOUT": str(max(1, round(self.timeout)))}
        self.variables = {key: value for key, value in ours.items() if key not in os.environ}
        os.environ.update(self.variables)
        import wandb

        with contextlib.suppress(ImportError, AttributeError):  # it delays the process's end if a server fails
            from wandb.analytics.opentelemetry import opentelemetry_proxy

            opentelemetry_proxy.disable()
        with contextlib.suppress(ImportError, AttributeError, OSError):
            # a temporary folder of the process: jobs forked from one process share it, the first that ends removes it
            from wandb.sdk.data_types import _private

            _private.MEDIA_TMP.cleanup()
            _private.MEDIA_TMP.name = str(folder / "media")
        (folder / "media").mkdir(exist_ok=True)
        return wandb

    def _init_options(
        self, cfg: dict[str, Any], names: dict[str, str], data: AnomalyDataModule, by_agent: bool
    ) -> dict[str, Any]:
        """The arguments of `wandb.init` without the mode. A W&B agent itself gives the run's id, project and group."""
        from anomalib_lite.tracking import wandb_report

        id_file = self.dir / WANDB / "run_id"
        known = id_file.read_text().strip() if cfg["resume"] and id_file.is_file() else None
        run_id = os.environ.get("WANDB_RUN_ID") or known or secrets.token_hex(4)
        write_text(id_file, run_id + "\n")
        ours = {
            "name": wandb_report.run_name(cfg, names, data),
            "tags": wandb_report.tags(cfg, names, data),
            "job_type": "train",
            "run_group": None if by_agent else wandb_report.sweep_name(),
            "project": "anomalib_lite",
        }
        ours = {key.removeprefix("run_"): ours[key] for key in ours if not os.environ.get(f"WANDB_{key.upper()}")}
        timeouts = {"init_timeout": self.timeout, "finish_timeout": self.upload_timeout, "finish_timeout_raises": True}
        return (
            ours
            | self.options
            | ({"id": None, "project": None, "entity": None} if by_agent else {"id": run_id})
            | {"config": cfg | {"choices": names}, "dir": str(self.dir), "settings": {"silent": True} | timeouts}
            | {"resume": "allow", "reinit": "finish_previous"}
        )

    def _init(self, settings: Any, mode: Any, options: dict[str, Any]) -> Any:
        """The started run: online if `mode` is and the server accepts it, otherwise offline."""
        import wandb

        if mode not in ("offline", "dryrun"):
            obstacle = online_obstacle(settings, self.timeout)
            if not obstacle:
                offline = (self.dir / WANDB).glob(f"offline-run-*-{options['id']}*")
                if earlier := [part for part in offline if not any(part.glob("*.synced"))]:
                    log.warning(
                        "W&B: the earlier part of this run was logged offline; to upload it too: %s",
                        sync_command(earlier),
                    )
                try:
                    run = wandb.init(**options, mode="online" if mode == "run" else mode)
                    log.info("W&B: %s", run.url)
                    return run
                except Exception as error:
                    obstacle = one_line(error)
            if self.mode == "online" or obstacle != NO_KEY:
                log.warning("W&B: %s: this run is logged offline", obstacle)
        return wandb.init(**options, mode="offline")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log scalars; a resumed run repeats the steps after its checkpoint with the same values, which W&B has."""
        if (done := (step or 0) + 1) > self.logged:  # Lightning counts batches from 0
            with self._harmless(FAILED):
                self._log(dict(metrics) | {"step": done}, done)

    def _log(self, row: dict[str, Any], step: int | None = None) -> None:
        """W&B drops rows whose step does not grow, but several of our rows may belong to one step."""
        if self.run is None or self.failed:
            return
        self.next_step = max(self.next_step, step or 0)
        self.run.log(row, step=self.next_step, commit=True)
        self.next_step += 1

    def log_test(self, result: dict[str, Any], data: AnomalyDataModule, test: dict[str, Any], curves: dict) -> None:
        """Log the results: the numbers as the run's summary, and one row with the tables, charts and pictures."""
        if self.run is None or self.failed:
            return
        from anomalib_lite.tracking import wandb_report

        with self._harmless(FAILED):
            metrics = wandb_report.metrics(result)
            for key in (f"{group}.{name}" for group, values in metrics.items() for name in values):
                # without summary="last": it would store {"last": value}, which no sweep accepts as its objective
                self.run.define_metric(key, step_metric="step")
            row = {"step": result["timing"]["steps"]} | metrics
            self.run.summary.update(row | wandb_report.details(result))  # first: a server can refuse what follows
            self.run.config.update({"environment": result["environment"]}, allow_val_change=True)
            row |= wandb_report.pictures(result, data, test)
            try:
                self._log(row | wandb_report.tables(result, data, test) | wandb_report.charts(data.categories, curves))
            except Exception:
                self._log(row)  # tables of an online run need the server at once, the rest can wait
                raise

    def finish(self, code: int, keep: bool = True) -> None:
        """End the run with the process's exit code; also to be called after a start that failed. If the run's folder
        stays (`keep`), one line says how an offline run is uploaded."""
        global _current
        _current = None
        if self.run is not None:
            with self._harmless("W&B did not finish"):
                self.run.finish(exit_code=code)
            if keep and (self.run.offline or self.failed):
                option = [] if self.run.offline else ["--include-online"]
                parts = (self.dir / WANDB).glob(f"*run-*-{self.run.id}*")
                log.info("W&B: to upload this run: %s", sync_command(parts, *option))
        if "wandb" in sys.modules:  # ends the process of W&B's service; the next run of this process starts its own
            with contextlib.suppress(Exception, SystemExit):
                sys.modules["wandb"].teardown()
        for key in self.variables:
            os.environ.pop(key, None)


@contextlib.contextmanager
def _judged() -> Iterator[None]:
    """Options, environment variables and settings files that break the rules of `wandb.Settings` are user errors."""
    from pydantic import ValidationError

    try:
        yield
    except Exception as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            why = f"{'.'.join(map(str, first['loc']))}={first['input']}: {first['msg']}"
        elif type(error).__name__ == "UsageError":  # of wandb, whose import may have failed
            why = one_line(error)
        else:
            raise
        raise UserError(f"W&B: {why}; correct logger.wandb or W&B's environment variables") from error


def finish(code: int, keep: bool = True) -> None:
    """End this process's run in W&B, if there is one; for the arguments see `WandbRun.finish`."""
    if _current is not None:
        _current.finish(code, keep)

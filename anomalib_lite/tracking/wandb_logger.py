"""A run in Weights & Biases: what it is called there, and what is shown of it.

A fault of W&B ends no run and holds none up: whatever it raises is one line in the log, every wait is bounded, and the
results are on disk before W&B sees them. Nothing is written outside the run's folder, and nothing ever asks for a key.
"""

import contextlib
import functools
import logging
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from lightning.pytorch.loggers import Logger

from anomalib_lite.data.datamodule import AnomalyDataModule
from anomalib_lite.data.samples import load_rgb
from anomalib_lite.runs.heat_maps import chosen_cases, overlay

log = logging.getLogger(__name__)

#: charts of the curves' points: title, x, y
CURVES = {
    "image_roc": ("image ROC", "image_fpr", "image_tpr"),
    "image_pr": ("image precision over recall", "image_recall", "image_precision"),
    "pixel_roc": ("pixel ROC", "pixel_fpr", "pixel_tpr"),
    "pixel_pr": ("pixel precision over recall", "pixel_recall", "pixel_precision"),
    "pro": ("per-region overlap", "pro_fpr", "pro"),
}
#: the run of this process: there is one at a time
_current: "WandbRun | None" = None


def _harmless(method: Callable[..., None]) -> Callable[..., None]:
    """Where there is no run the method does nothing; what it raises is told once, and W&B left alone after."""

    @functools.wraps(method)
    def guarded(self: "WandbRun", *args: Any, **kwargs: Any) -> None:
        if self.run is None or self.broken:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.broken = True
            log.warning("W&B failed and gets nothing more of this run: %s", _line(error))

    return guarded


class WandbRun(Logger):
    """Begins on rank 0 with `start`, takes scalars and then the test's results, and ends with `finish`.

    Args:
        mode: auto (online where a key is configured, else offline), online, offline or disabled.
        name, group, tags: instead of ours, which are the method, what it learns and the seed; the sweep; and the
            method, data set, setting, split and backbone.
        timeout: seconds to wait for the server at the start; where it does not answer, the run is offline.
        upload_timeout: seconds to wait at the end for what is still to be uploaded.
    """

    def __init__(
        self,
        run_dir: str | Path,
        project: str | None = None,
        mode: str = "auto",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] | None = None,
        timeout: float = 10,
        upload_timeout: float = 30,
    ):
        super().__init__()
        self.dir, self.mode, self.timeout, self.upload_timeout = Path(run_dir), mode, timeout, upload_timeout
        self.given = {"project": project, "entity": entity, "name": name, "group": group, "tags": tags}
        self.run: Any = None
        self.broken = False  # it failed on the way: nothing more is logged
        self.begun = self.next = 0  # W&B's own steps: the first of this process, and the next one
        self.environ: dict[str, str | None] = {}  # variables as they were before

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return "" if self.run is None else self.run.id

    @property
    def experiment(self) -> Any:
        return self.run

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The whole configuration is there from the start."""

    def start(self, cfg: dict[str, Any], names: dict[str, str], data: AnomalyDataModule) -> None:
        """Begin the run, or go on with it where `cfg["resume"]`; offline where the server or the key is no good."""
        global _current
        if "disabled" in (self.mode, os.environ.get("WANDB_MODE") if self.mode == "auto" else None):
            return
        _current = self
        try:
            self._start(cfg, names, data)
        except Exception as error:
            log.warning("logger.wandb is left out: %s", _line(error))

    def _start(self, cfg: dict[str, Any], names: dict[str, str], data: AnomalyDataModule) -> None:
        folder = self.dir / "wandb"
        folder.mkdir(exist_ok=True)
        ours = {"WANDB_DATA_DIR": folder / "data", "WANDB_CACHE_DIR": folder / "cache"}
        for key, value in (ours | {"WANDB_HTTP_TIMEOUT": max(1, round(self.timeout))}).items():
            self.environ[key] = os.environ.get(key)
            os.environ.setdefault(key, str(value))
        import wandb

        with contextlib.suppress(ImportError, AttributeError):  # when a server fails it holds up the process's end
            from wandb.analytics.opentelemetry import opentelemetry_proxy

            opentelemetry_proxy.disable()
        with contextlib.suppress(ImportError, AttributeError):
            # made at the import: jobs forked from one process share it, and the first of them to end removes it
            from wandb.sdk.data_types import _private

            (folder / "media").mkdir(exist_ok=True)
            _private.MEDIA_TMP.name = str(folder / "media")
        settings = wandb.setup(wandb.Settings(silent=True)).settings
        mode: Any = self.mode
        why = ""
        if mode == "auto":
            mode = {"dryrun": "offline", "run": "online"}.get(settings.mode, settings.mode)
        if mode not in ("offline", "disabled"):
            why = _no_use(wandb, settings, self.timeout)
        if why:
            if self.mode == "online" or why != NO_KEY:
                log.warning("W&B: %s: this run is logged offline", why)
            mode = "offline"
        swept = bool(settings.sweep_id)  # by a W&B agent, which gives id, project and group
        identity = folder / "run_id"
        known = identity.read_text().strip() if cfg["resume"] and identity.is_file() else None
        options: dict[str, Any] = {
            "id": os.environ.get("WANDB_RUN_ID") or known or secrets.token_hex(4),
            "name": self.given["name"] or os.environ.get("WANDB_NAME") or run_name(cfg, names, data),
            "group": self.given["group"] or os.environ.get("WANDB_RUN_GROUP") or (None if swept else sweep_name()),
            "job_type": os.environ.get("WANDB_JOB_TYPE") or "train",
            "tags": self.given["tags"] or (None if os.environ.get("WANDB_TAGS") else tags(cfg, names, data)),
            "project": None if swept else self.given["project"] or os.environ.get("WANDB_PROJECT") or "anomalib_lite",
            "entity": None if swept else self.given["entity"],
            "config": cfg | {"choices": names},
            "dir": str(self.dir),
            "resume": "allow",
            "reinit": "finish_previous",
        }
        identity.write_text(options["id"] + "\n")
        if swept:
            options["id"] = None
        options["settings"] = {
            "silent": True,
            "init_timeout": self.timeout,
            "finish_timeout": self.upload_timeout,
            "finish_timeout_raises": True,
        }
        try:
            self.run = wandb.init(**options, mode=mode)
        except Exception as error:
            if mode == "offline":
                raise
            log.warning("W&B: %s: this run is logged offline", _line(error))
            self.run = wandb.init(**options, mode="offline")
        if mode == "online" and not self.run.offline:
            log.info("W&B: %s", self.run.url)
        self.begun = self.next = self.run.step
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step", step_sync=True)
        self.run.define_metric("loss", step_metric="step")
        self.run.define_metric("epoch", step_metric="step", hidden=True)

    @_harmless
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if step is not None and step < self.begun:
            return  # a resumed run comes by here a second time, with the same values
        self._log(dict(metrics) | ({} if step is None else {"step": step}), step)

    def _log(self, row: dict[str, Any], step: int | None = None) -> None:
        """W&B drops rows whose step does not grow, as those of several optimisers' steps and batches may not."""
        self.next = max(self.next, step or 0)
        self.run.log(row, step=self.next, commit=True)
        self.next += 1

    @_harmless
    def log_test(
        self, result: dict[str, Any], data: AnomalyDataModule, arrays: dict[str, Any], curves: dict[str, np.ndarray]
    ) -> None:
        """The results of a run: the numbers as its summary, and one row with all there is to look at.

        Args:
            result: result.json's content. arrays: of the test set, in the order of `data.test_samples`.
            curves: `<category>/<curve>`: points.
        """
        row: dict[str, Any] = {"step": result["timing"]["steps"]}
        for group in ("metrics", "validation"):
            row[group] = {key: value for key, value in (result[group] or {}).items() if value is not None}
            for key in row[group]:
                # without summary="last", which stores {"last": value}, and no sweep could take that for an objective
                self.run.define_metric(f"{group}.{key}", step_metric="step")
        row = {key: value for key, value in row.items() if value != {}}
        kept = ("groups", "timing", "efficiency", "thresholds", "decisions", "cache", "variant", "data")
        more = {key: result[key] for key in kept} | {"notes": "\n".join(result["notes"])}
        self.run.summary.update(row | more)  # first: a server can refuse what follows
        self.run.config.update({"environment": result["environment"]}, allow_val_change=True)
        seen = pictures(result, data, arrays)
        try:
            self._log(row | tables(result, data, arrays) | charts(data.categories, curves) | seen)
        except Exception:
            self._log(row | seen)  # a table of an online run needs the server there and then, the rest can wait
            raise

    def finish(self, code: int) -> None:
        """End the run, also one that could not begin; `code` is the process's exit code."""
        global _current
        _current = None
        wandb = sys.modules.get("wandb")
        if self.run is not None:
            try:
                self.run.finish(exit_code=code)
            except Exception as error:
                self.broken = True
                log.warning("W&B did not finish: %s", _line(error))
            if self.run.offline or self.broken:
                parts = sorted(
                    map(str, (self.dir / "wandb").glob(f"*run-*-{self.run.id}*"))
                )  # of a resumed run several
                option = [] if self.run.offline else ["--include-online"]
                log.info("W&B: to upload this run: %s", shlex.join(["wandb", "sync", *option, *parts]))
        if wandb is not None:  # with its service's process; the next run of this process begins afresh
            with contextlib.suppress(Exception, SystemExit):
                wandb.teardown()
        for key, value in self.environ.items():
            if value is None:
                os.environ.pop(key, None)


def finish(code: int) -> None:
    """End this process's run, if there is one."""
    if _current is not None:
        _current.finish(code)


NO_KEY = "there is no key"


def _no_use(wandb: Any, settings: Any, seconds: float) -> str:
    """Why an online run would not work: no key, or a server that does not answer or does not know it; else ''.

    W&B itself finds out by trying again and again. One plain question takes milliseconds.
    """
    import requests

    try:
        if not wandb.login(prompt=False, verify=False):
            return NO_KEY
    except wandb.Error as error:
        return _line(error)
    if not settings.api_key:
        return ""  # another kind of identification
    try:
        answer = requests.post(
            f"{settings.base_url.rstrip('/')}/graphql",
            json={"query": "query { viewer { id } }"},
            auth=("api", settings.api_key),
            timeout=seconds,
        )
    except requests.exceptions.SSLError:
        return ""  # W&B has its own certificates
    except requests.RequestException as error:
        return f"{settings.base_url} can't be reached ({type(error).__name__})"
    if answer.status_code in (401, 403):
        return f"{settings.base_url} refuses the key"
    return "" if answer.ok else f"{settings.base_url} answers {answer.status_code}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or repr(error)


def run_name(cfg: dict[str, Any], names: dict[str, str], data: AnomalyDataModule) -> str:
    """`norm_occ bottle seed 0`, `norm_occ mvtec unified step100 seed 0`."""
    several = len(data.categories) > 1
    what = [names["method"], *([data.name, "unified"] if several else data.categories)]
    return " ".join([*what, *[names["split"]] * (names["split"] != "full"), f"seed {cfg['seed']}"])


def tags(cfg: dict[str, Any], names: dict[str, str], data: AnomalyDataModule) -> list[str]:
    setting = "single" if len(data.categories) == 1 else "unified"
    found = (names["method"], data.name, setting, names["split"], cfg["backbone"]["name"])
    return [str(tag)[:64] for tag in dict.fromkeys(found) if tag]


def sweep_name() -> str | None:
    """The folder's name of the sweep that this is a job of."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    job = hydra.mode == RunMode.MULTIRUN or not OmegaConf.is_missing(hydra.job, "num")
    return Path(hydra.sweep.dir).name if job else None


def tables(result: dict[str, Any], data: AnomalyDataModule, arrays: dict[str, Any]) -> dict[str, Any]:
    """Metrics per category and per kind of defect, and the scores."""
    import wandb

    decided = result["decisions"]["per_category"]
    categories = [
        {"category": name} | metrics | decided.get(name, {}) for name, metrics in result["per_category"].items()
    ]
    defects = [
        {"category": name, "defect": defect} | metrics
        for name, found in result["per_defect"].items()
        for defect, metrics in found.items()
    ]
    assert data.root is not None
    scores = [
        [relative(sample.path, Path(data.root)), sample.category, sample.defect, sample.label, float(score)]
        for sample, score in zip(data.test_samples, arrays["scores"], strict=True)
    ]
    made = {"scores": wandb.Table(["path", "category", "defect", "label", "score"], scores)}
    for key, rows in (("per_category", categories), ("per_defect", defects)):
        columns = list(dict.fromkeys(column for row in rows for column in row))
        if rows:
            made[key] = wandb.Table(columns, [[row.get(column) for column in columns] for row in rows])
    return made


def charts(categories: list[str], curves: dict[str, np.ndarray]) -> dict[str, Any]:
    """A chart a curve, in it a line a category."""
    import wandb

    made = {}
    for key, (title, x, y) in CURVES.items():
        there = [name for name in categories if len(curves.get(f"{name}/{y}", ()))]
        xs, ys = ([curves[f"{name}/{axis}"].tolist() for name in there] for axis in (x, y))
        if there:
            made[f"curves/{key}"] = wandb.plot.line_series(xs, ys, keys=there, title=title, xname=x)
    return made


def pictures(result: dict[str, Any], data: AnomalyDataModule, arrays: dict[str, Any]) -> dict[str, Any]:
    """The worst and best cases of each category: image and heat map side by side, the masks over both."""
    import wandb

    made = {}
    for category in data.categories:
        rows = [i for i, sample in enumerate(data.test_samples) if sample.category == category]
        threshold = result["thresholds"]["per_category"].get(category)
        if not rows or threshold is None:
            continue
        images = []
        for kind, i in chosen_cases(rows, arrays):
            sample, (height, width) = data.test_samples[i], data.image_size
            image = cv2.resize(load_rgb(sample.path), (width, height), interpolation=cv2.INTER_AREA)
            amap = cv2.resize(arrays["maps"][i], (width, height), interpolation=cv2.INTER_LINEAR)

            def mask(where: np.ndarray, number: int, label: str, size=(width, height)) -> dict[str, Any]:
                fitted = cv2.resize(where.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
                return {"mask_data": number * np.tile(fitted, 2), "class_labels": {number: label}}

            masks = {"prediction": mask(arrays["maps"][i] > threshold["pixel"], 2, "above the threshold")}
            if data.has_masks[category]:
                masks["ground_truth"] = mask(arrays["masks"][i], 1, "defect")
            ratio = float(arrays["scores"][i]) / threshold["image"] if threshold["image"] else float("nan")
            what = kind if sample.defect == "good" else f"{kind}: {sample.defect}"
            caption = f"{what}, {ratio:.2f} x threshold, {relative(sample.path, Path(data.root or '/'))}"
            images.append(
                wandb.Image(np.hstack([image, overlay(image, amap, threshold)]), caption=caption, masks=masks)
            )
        made[f"cases/{category}"] = images
    return made


def relative(path: Path, root: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()

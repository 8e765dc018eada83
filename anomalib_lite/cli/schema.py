"""Every key of the configuration: its type and range, what an error says of it, and where it may change.

The options of the `method` group are checked against the method's constructor instead: see `annotations`.
"""

import functools
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BeforeValidator, Field, model_validator

from anomalib_lite.cli.keys import assign, each_value, flat, infinity_to_text, lookup, refuse_renamed, text_of
from anomalib_lite.errors import UserError

from anomalib_lite.cli.key_types import (  # isort: skip
    ALWAYS, FLAG, GIGABYTES, NAME, SECONDS, SHARE, SIZE, SMOOTH, WHOLE, WHOLE_OR_NULL, Auto, Ends, Group, Key, Mode,
    Names, NumberFrom0, Optimizer, Pool, Positive, Project, Share, Size, Smooth, Tag, Text, TilingKey, Whole,
    WholeFrom0, check_group, fields_of, group_of, metadata, refuse, require,
)  # fmt: skip

OBJECTIVE = re.compile(r"validation\.((image|pixel)_(auroc|ap|f1max)|aupro_\d+|pixel_(iou|dice))")
Metric = Annotated[str, require(OBJECTIVE.fullmatch)]
PLACES = "a folder, a list of folders, or a pattern such as 'parts/*/ok'"
HELD_OUT = "a metric of held-out training images, such as validation.image_auroc: the test set chooses nothing"


class Cache(Group):
    enabled: Annotated[bool, Key(FLAG)]
    folder: Annotated[Text | None, Key("a folder, or null")]
    limit_gb: Annotated[NumberFrom0, Key(GIGABYTES)]
    dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32"], Key("auto, bfloat16, float16 or float32")]


class Data(Group):
    name: Annotated[str | None, Key("a name, or null", ("compare",))] = None
    reader: Annotated[Any, Key(free=("compare",))] = None
    split: Annotated[Any, Key(free=("compare",))] = None
    root: Annotated[Text | None, Key("a folder, or null", ALWAYS)] = None
    normal: Annotated[Names | None, Key(PLACES, ALWAYS)] = None
    normal_test: Annotated[Names | None, Key(PLACES, ALWAYS)] = None
    abnormal: Annotated[Names | None, Key(PLACES, ALWAYS)] = None
    masks: Annotated[Names | None, Key(PLACES, ALWAYS)] = None
    mask_defect: Annotated[Literal["bright", "dark"], Key("bright or dark", ("compare",))] = "bright"
    test_fraction: Annotated[NumberFrom0, Field(lt=1), Key("a share from 0, below 1", ("compare",))] = 0.2
    test_seed: Annotated[WholeFrom0, Key("a whole number from 0", ("compare",))] = 0
    table: Annotated[Text | None, Key("a CSV file", ALWAYS)] = None
    category: Annotated[Names, Key("a name, a list such as [bottle,toothbrush], or all", ("compare",))]
    image_size: Annotated[Size, Key(SIZE)]
    batch_size: Annotated[Whole, Key(WHOLE)]
    eval_batch_size: Annotated[Whole, Key(WHOLE, ALWAYS)]
    workers: Annotated[Auto | WholeFrom0, Key("a whole number from 0, or auto", ALWAYS)]
    image_memory_gb: Annotated[NumberFrom0, Key(GIGABYTES, ALWAYS)] = 4
    val_fraction: Annotated[NumberFrom0, Field(lt=1), Key("a share from 0, below 1")]
    check: Annotated[Literal["fast", "thorough", "only"], Key("fast, thorough or only", ALWAYS)]
    value_range: Annotated[Ends | None, Key("[low, high] with low < high, or null", ("compare",))] = None
    normalize: Annotated[Literal["imagenet", "none", "backbone"], Key("imagenet, none or backbone")]
    treatment: Annotated[Literal["auto", "object", "texture"], Key("auto, object or texture")] = "object"
    texture_size: Annotated[Size | Literal["original"], Key(f"{SIZE}, or original")] = "original"
    tiling: TilingKey = None
    drop_last: Annotated[bool, Key(FLAG)]
    balanced: Annotated[bool | None, Key(FLAG)] = None
    copies: Annotated[Whole, Key(WHOLE)] = 1


class Split(Group):
    shots: Annotated[Whole, Key("a whole number of images from 1")] = 1
    imbalance: Annotated[float, Field(ge=1), BeforeValidator(refuse(bool)), Key("a number from 1, such as 100")] = 1
    order: Annotated[Names, Key("size, name, reverse, reverse_name, or a list of all categories, head first")] = "size"
    seed: Annotated[WholeFrom0, Key("a whole number from 0")] = 0
    path: Annotated[Text, Key("the file of the split, as in split=file split.path=FILE", ("moved",))] = "unused"
    head: Annotated[Whole | None, Key("a number of classes from 1, or null for half of them")] = None
    anomalous: Annotated[bool, Key(FLAG)] = False


class Hardware(Group):
    accelerator: Annotated[Literal["auto", "cpu", "gpu"], Key("auto, cpu or gpu", ("compare",))]
    devices: Annotated[Auto | Whole, Key("a whole number from 1, or auto", ("compare",))]
    nodes: Annotated[Whole, Key(WHOLE, ("compare",))]
    ranks: Annotated[Literal["slurm"] | None, Key("slurm, or null", ("compare",))] = None
    precision: Annotated[Literal["auto", 32, "bf16"], Key("auto, 32 or bf16")]
    deterministic: Annotated[Auto | bool, Key(f"auto, {FLAG}", ("compare",))] = "auto"
    threads: Annotated[Whole | None, Key(WHOLE_OR_NULL, ("compare",))]
    feature_memory_gb: Annotated[NumberFrom0, Key(GIGABYTES, ("compare",))]
    feature_gpu_gb: Annotated[Auto | NumberFrom0, Key(f"{GIGABYTES}, or auto", ("compare",))] = "auto"
    measure_cost: Annotated[bool, Key(FLAG, ("compare",))] = True


class Trainer(Group):
    max_epochs: Annotated[WholeFrom0 | None, Key("a whole number from 0, or null")]
    max_steps: Annotated[Whole | None, Key(WHOLE_OR_NULL)]
    log_every: Annotated[Whole, Key(WHOLE, ("resume", "compare"))]
    checkpoint_minutes: Annotated[NumberFrom0, Key("minutes from 0", ("resume", "compare"))]

    @model_validator(mode="after")
    def _has_budget(self) -> "Trainer":
        if self.max_epochs is None and self.max_steps is None:
            raise UserError("trainer.max_epochs and trainer.max_steps are both null: give a budget")
        return self


class Backbone(Group):
    name: Annotated[str | None, Key("the name of a timm model, or null", ("compare", "moved"))]
    layers: Annotated[
        list[WholeFrom0],
        require(lambda layers: layers == sorted(set(layers))),
        Key("timm's out_indices in ascending order, such as [2,3]", ("compare",)),
    ]
    weights: Annotated[Text, Key("auto, none, or a file", ("compare", "moved"))]
    blocks: Annotated[list[WholeFrom0] | None, Key("backbone.layers of a transformer", ("resume", "compare"))] = None
    norm: Annotated[bool, Key(FLAG, ("compare",))] = False

    @model_validator(mode="after")
    def _has_layers(self) -> "Backbone":
        if self.name is not None and not self.layers:
            raise UserError("backbone.layers=[]: give at least one of timm's out_indices, such as [2,3]")
        return self


class Scoring(Group):
    map_size: Annotated[Size | Literal["original"] | None, Key(f"{SIZE}, original, or null")] = None
    pixel_smooth: Annotated[Smooth | Auto | None, Key(f"{SMOOTH} or null")]
    image_smooth: Annotated[Smooth | Pool | Literal["auto", "same"] | None, Key(f"{SMOOTH}, {{pool: 16}} or null")]
    image_score: Annotated[
        Literal["auto", "own", "max", "mean"] | Share,
        BeforeValidator(refuse(int)),
        Key("max, mean, own, or a share such as 0.01 for the mean of the top 1 %"),
    ]
    quantile: Annotated[Share, Key(SHARE)]
    threshold_images: Annotated[Whole | None, Key(WHOLE_OR_NULL, ("resume",))] = None
    fpr_limits: Annotated[list[Share], Field(min_length=1), Key("a list of false positive rates above 0 and at most 1")]


class Wandb(Group):
    """The rules for names are those of `wandb.Settings`."""

    project: Annotated[Project | None, Key(r"at most 128 characters without any of / \ # ? % :, or null")] = None
    entity: Annotated[str | None, Key(NAME)] = None
    name: Annotated[str | None, Key(NAME)] = None
    group: Annotated[str | None, Key(NAME)] = None
    job_type: Annotated[str | None, Key(NAME)] = None
    notes: Annotated[str | None, Key(NAME)] = None
    tags: Annotated[list[Tag] | None, Key("a list of tags, each of 1 to 64 characters, or null")] = None
    mode: Annotated[Mode | None, Key("auto, online, offline or disabled")] = None
    timeout: Annotated[Positive | None, Key(SECONDS)] = None
    upload_timeout: Annotated[Positive | None, Key(SECONDS)] = None


class Logger(Group):
    wandb: Wandb | None = None


class Config(Group):
    """The whole configuration, in the order in which errors are reported."""

    seed: Annotated[WholeFrom0, Field(lt=2**32), Key("a whole number from 0, below 2^32")]
    resume: Annotated[bool, Key(FLAG, ("resume", "compare"))]
    debug: Annotated[bool, Key(FLAG, ALWAYS)]
    objective: Annotated[Metric | None, Key(HELD_OUT, ("resume", "compare"))]
    data: Data
    backbone: Backbone
    trainer: Trainer
    hardware: Annotated[Hardware, Key(free=("resume", "evaluate"))]
    cache: Annotated[Cache, Key(free=("resume", "compare"))]
    logger: Annotated[Logger | None, Key(free=("resume", "compare"))] = None
    scoring: Annotated[Scoring, Key(free=("evaluate", "compare"))]
    split: Annotated[Split | None, Key(free=("compare",))] = None
    method: dict[str, Any]


def check_composed(config: dict[str, Any]) -> None:
    """As `check`, of a command line's configuration. Also raise UserError for an experiment that is no study."""
    if "experiments" in config:
        raise UserError("experiments: the chosen file is no study; a study begins with the line '# @package _global_'")
    check(config)


def check(config: dict[str, Any]) -> None:
    """Raise UserError for the first invalid value, or for a key that was renamed.

    Numbers and booleans that a YAML file gives as a path or name become text, as do infinities among method's options.
    """
    refuse_renamed(config)
    names_to_text(config)
    check_group(config, Config)
    if "_target_" not in config["method"]:
        raise UserError("method: no _target_ in it; its YAML file must begin with the line '# @package _global_'")
    config["method"] = each_value(config["method"], infinity_to_text)
    groups = {key.rpartition(".")[0] for key in flat(config["method"], "method")}
    for group in sorted(group for group in groups if group.endswith(".optimizer")):
        check_group(lookup(config, group), Optimizer, group)


def names_to_text(config: dict[str, Any]) -> None:
    """Turn numbers and booleans into text where the key takes a path or a name, in place."""
    for key in fields_of(Config):
        if str in types_of(key) and (value := lookup(config, key)) is not None:
            assign(config, key, each_value(value, text_of))


@functools.cache
def types_of(key: str) -> set[Any]:
    """The types that a key admits, and those within its lists; empty for an unknown key."""
    if re.fullmatch(r"hydra\.(run|sweep)\.\w+", key):
        return {str}
    field = fields_of(Config).get(key)
    return set(_types(field.annotation)) if field else set()


def _types(annotation: Any) -> Iterator[Any]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType, Annotated, list):
        for each in inner[:1] if origin is Annotated else inner:
            yield from _types(each)
    yield origin or annotation


@functools.cache
def defaults() -> dict[str, Any]:
    """The values of keys that a stored configuration of an earlier version may lack."""
    fields = fields_of(Config).items()
    return {key: field.default for key, field in fields if not field.is_required() and not group_of(field)}


@functools.cache
def free(where: str) -> tuple[str, ...]:
    """The keys and groups that may change on "resume" or "evaluate", or between runs that "compare"."""
    return tuple(key for key, field in fields_of(Config).items() if where in metadata(field).free)


def is_free(key: str, where: str) -> bool:
    """Whether a key, or a group that it belongs to, may change."""
    return any(key == name or key.startswith(f"{name}.") for name in free(where))

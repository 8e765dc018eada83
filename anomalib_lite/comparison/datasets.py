"""The data set of a run: what it is called, and where its images and masks lie."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib_lite.comparison.find_runs import Run, dict_at
from anomalib_lite.data.data_options import reader_options
from anomalib_lite.data.own_folders import common_root
from anomalib_lite.paths import relative_path

#: each is one data set wherever its root lies
OFFICIAL = (
    "mvtec", "visa", "synthetic", "mvtec_ad_2", "mvtec_loco", "real_iad", "btad", "mpdd", "kolektor_sdd",
    "kolektor_sdd2",
)  # fmt: skip
Place = tuple[str, str]  # a data set's name in result.json, and its root: "" if it is unknown or does not matter


def places(runs: Sequence[Run]) -> dict[Run, Place]:
    """The data set of each run.

    Two roots hold the same data set where two runs with the same categories have the same fingerprint: the data was
    moved or copied. The first of such roots stands for all.
    """
    first: dict[str, Place] = {}  # by what a fingerprint says
    joined: dict[Place, Place] = {}

    def first_of(place: Place) -> Place:
        while joined.get(place, place) != place:
            place = joined[place]
        return place

    own: dict[Run, Place] = {}
    for run in sorted(runs, key=lambda run: root_of(run) is None):  # an unknown root joins no two others
        name, root = str(run.result["dataset"]), root_of(run)
        content = json.dumps([name, sorted(run.result["categories"]), run.fingerprint])
        if name in OFFICIAL:
            own[run] = name, ""
        elif root is None:
            own[run] = first.get(content, (name, ""))
        else:
            own[run] = name, os.path.realpath(root)
            joined[first_of(own[run])] = first_of(first.setdefault(content, own[run]))
    return {run: first_of(place) for run, place in own.items()}


def versions(runs: Sequence[Run]) -> dict[Run, str]:
    """Which version of the data each run has, of runs on one data set.

    A fingerprint depends on the categories, so only those of runs with the same categories can be compared. Runs from
    several folders or lists of a split share a version unless images of the same categories differ in them: a row of a
    table then has all its categories from one of them.
    """
    seen: dict[tuple[str, str], list[str]] = {}  # fingerprints by source and categories
    sources: dict[tuple[str, int], dict[str, str]] = {}  # by source, again after its images changed: by categories
    source_of: dict[Run, tuple[str, int]] = {}
    for run in runs:
        categories = json.dumps(sorted(run.result["categories"]))
        known = seen.setdefault((_source(run), categories), [])
        known += [run.fingerprint] * (run.fingerprint not in known)
        source_of[run] = _source(run), known.index(run.fingerprint)
        sources.setdefault(source_of[run], {})[categories] = run.fingerprint
    groups: list[dict[str, str]] = []
    group_of: dict[tuple[str, int], int] = {}
    for source, found in sources.items():
        common = [[found[key] == group[key] for key in found.keys() & group.keys()] for group in groups]
        fits = [number for number, equal in enumerate(common) if all(equal)]
        group_of[source] = max(fits, key=lambda number: len(common[number]), default=len(groups))
        groups += [{}] * (group_of[source] == len(groups))
        groups[group_of[source]] = groups[group_of[source]] | found
    return {run: str(group_of[source]) for run, source in source_of.items()}


def _source(run: Run) -> str:
    """The folder and the list of a split that the run's images came from."""
    root = root_of(run)
    return json.dumps([root and os.path.realpath(root), dict_at(run.result, "split").get("path")])


def titles(found: Sequence[Place]) -> dict[Place, str]:
    """A title for each data set: mvtec; with a root that matters also the end of its path, as long as is necessary."""
    texts = {}
    for name, root in found:
        others = {other for of, other in found if of == name and other not in ("", root)}
        parts = Path(root).parts
        ends = ("/".join(parts[-length:]) for length in range(1, len(parts)))
        end = next((end for end in ends if not any(f"/{other}".endswith(f"/{end}") for other in others)), root)
        texts[name, root] = name if end in ("", name) else f"{name} {end}"
    return texts


def root_of(run: Run) -> Path | None:
    """The folder that the run's images are in, or were in."""
    data = dict_at(run.config, "data")
    reader = dict_at(data, "reader")
    if data.get("root") and str(reader.get("_target_", "")).endswith(".read_cifar10"):
        from anomalib_lite.data.cifar10 import BATCHES, unpacked_root

        if Path(str(data["root"])).expanduser().joinpath(BATCHES).is_dir():
            return unpacked_root()
    if data.get("root"):
        return Path(str(data["root"])).expanduser().absolute()
    if data.get("normal"):
        return common_root(*(data.get(key) for key in ("normal", "normal_test", "abnormal", "masks")))
    if data.get("table"):
        return Path(data["table"]).parent
    if str(reader.get("_target_", "")).endswith(".read_synthetic"):
        from anomalib_lite.data.synthetic import cached_root

        options = ("seed", "size", "train", "good", "defective")
        return cached_root(**{key: reader[key] for key in options if key in reader})
    return None


def masks_of(run: Run, root: Path, category: str) -> dict[str, Any]:
    """The samples of a category that have masks, by their images' paths below the root, as the run's reader finds them.

    A reader that fails gives a warning and no masks: it may be a user's, and its data may have changed.
    """
    try:
        from hydra.utils import instantiate

        options = reader_options(dict_at(run.config, "data"))
        place = None if options.get("normal") else root
        data: Any = instantiate(dict_at(run.config, "data", "reader"))(place, category, **options)
        return {relative_path(each.path, data.root): each for each in data.test if each.mask}
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        run.problems.append(f"no outlines of the defects of {category}: {reason}")
        return {}

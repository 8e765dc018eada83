"""Print a split of the training images, and write it as a file that others can read.

    python -m anomalib_lite.splits [KEY=VALUE ...] [--counts WHICH] [--write FILE] [--format NAME] [--config-dir DIR]

KEY=VALUE        as for training: split=exp100, data=mvtec data.root=DIR data.category=[bottle,cable] (default: all),
                 split=exp split.imbalance=20 split.order=reverse, split=shots split.shots=4 split.seed=1,
                 split=file split.path=FILE
--counts WHICH   no images, the number of training images per class alone: mvtec, visa, or bottle=209,cable=224
--write FILE     the split as a file, which split=file split.path=FILE reads again
--format NAME    of that file; by its name, or
                 jsonl  JSON lines of training images (UniAD)    meta   ADer's meta.json, with the test set
                 csv    VisA's columns, with the test set        list   one path of a training image per line
                 prune  paths of images to leave out (the file must be called prune_*)
--config-dir DIR a folder of your own configuration

Exit codes: 0; 2 for a user error.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib_lite.cli import program
from anomalib_lite.console import make_console
from anomalib_lite.errors import UserError

if TYPE_CHECKING:
    from anomalib_lite.data.samples import DataSet
    from anomalib_lite.data.splits import Split

FORMAT_OF_SUFFIX = {".jsonl": "jsonl", ".json": "meta", ".csv": "csv", ".txt": "list"}


def main() -> None:
    program.run_flags(show, __doc__, outside=True, folder="--write")


def show(arguments: Sequence[str]) -> None:
    parser = program.Parser()
    parser.add_argument("overrides", nargs="*")
    for name in ("counts", "write", "format", "config-dir"):
        parser.add_argument(f"--{name}")
    options = parser.parse_intermixed_args(arguments)
    if options.format and not options.write:
        raise UserError(f"--format {options.format}: of which file? give --write FILE")
    cfg = composed(options.overrides, options.config_dir)
    if options.counts and options.write:
        raise UserError(f"--write {options.write}: a file lists images; leave out --counts and give data.root=DIR")
    if options.counts and "path" in cfg["split"]:
        raise UserError("--counts: this split is made of files; give data.root=DIR instead")

    from hydra.utils import instantiate

    from anomalib_lite.data.data_options import reader_options

    if options.counts:
        data = without_files(options.counts, cfg["data"]["category"])
    else:
        of_reader = reader_options(cfg["data"])
        data = instantiate(cfg["data"]["reader"])(cfg["data"]["root"], cfg["data"]["category"], **of_reader)
    split = instantiate(cfg["split"])(data)
    print_table(title(cfg), split)
    if not options.counts:
        for note in data.notes + split.notes:
            print(f"note: {note}")
    if options.write:
        file = Path(options.write).expanduser()
        format = write(file, options.format, data, split)
        again = [option for option in options.overrides if option.startswith("data")]
        again += ["data.category=all"] * (not any(o.startswith("data.category=") for o in again))
        again += ["split=file", f"split.path={file}", *read_as(split)]
        print(f"written: {file} ({format}); its arguments: {shlex.join(again)}")


def write(file: Path, format: str | None, data: DataSet, split: Split) -> str:
    """Write the split in the format, or in the one that the file's name tells; gives the format."""
    from anomalib_lite.data import split_files
    from anomalib_lite.data.split_formats import FORMATS

    by_name = "prune" if file.name.startswith("prune_") else FORMAT_OF_SUFFIX.get(file.suffix.lower())
    chosen = format or by_name
    if chosen not in FORMATS:
        which = f"--format {format}" if format else f"--write {file}: its name tells no format; give --format"
        raise UserError(f"{which}: choose {', '.join(FORMATS)}")
    split_files.write(file, chosen, data, split.train)
    return chosen


def read_as(split: Split) -> list[str]:
    """The arguments without which a file of this split would be refused, or read with another head and tail."""
    from anomalib_lite.data.splits import head_and_tail, ordered

    head, names = len(split.head), [*split.head, *split.tail]
    defects = ["split.anomalous=true"] * any(sample.label for sample in split.train)
    if not head or head_and_tail(ordered(split.counts, "size")) == (split.head, split.tail):
        return defects
    listed = ",".join(name if re.fullmatch(r"[A-Za-z_]\w*", name) else f'"{name}"' for name in names)
    heads = [f"split.head={head}"] * (head_and_tail(names)[0] != split.head)
    return [f"split.order=[{listed}]", *heads, *defects]


def composed(overrides: Sequence[str], folder: str | None) -> dict[str, Any]:
    """The `train` configuration with these overrides, and all categories unless some are chosen."""
    from anomalib_lite.cli import schema
    from anomalib_lite.cli.values import as_typed

    for override in overrides:
        if "=" not in override:
            raise UserError(f"{override}: arguments are KEY=VALUE, or flags; see --help")
    defaults = [] if any(o.startswith("data.category=") for o in overrides) else ["data.category=all"]
    if folder is not None:
        if not Path(folder).is_dir():
            raise UserError(f"--config-dir {folder}: no such folder")
        defaults.append(f"hydra.searchpath=[file://{Path(folder).absolute()}]")
    cfg, _ = program.composed([*defaults, *map(as_typed, overrides)])
    schema.check_composed(cfg)
    return cfg


def without_files(which: str, category: str | list[str]) -> DataSet:
    """The training images of the categories by their numbers alone: those of a known data set, or as given."""
    from anomalib_lite.data.readers import COUNTS
    from anomalib_lite.data.samples import DataSet, Sample

    if which in COUNTS:
        counts = {name: train for name, (train, _, _) in COUNTS[which].items()}
    else:
        pairs = [re.fullmatch(r"\s*([^=,]+?)\s*=\s*([1-9]\d*)\s*", part) for part in which.split(",")]
        counts = {pair[1]: int(pair[2]) for pair in pairs if pair}
        if len(counts) != len(pairs):
            raise UserError(f"--counts {which}: give mvtec, visa, or each class once, as in bottle=209,cable=224")
    chosen = [category] if isinstance(category, str | int) else category
    names = list(counts) if category == "all" else [str(name) for name in chosen]
    if unknown := [name for name in names if name not in counts]:
        raise UserError(f"data.category: '{unknown[0]}' is not in --counts, which has {', '.join(counts)}")
    root = Path("/")
    images = [Sample(root / name / str(i), name, "good", 0, None) for name in names for i in range(counts[name])]
    return DataSet(root, images, [])


def title(cfg: dict[str, Any]) -> str:
    options = [f"{key} {value}" for key, value in cfg["split"].items() if not key.startswith("_") and value is not None]
    return ", ".join(options) or "all training images"


def print_table(title: str, split: Split) -> None:
    """One row per class: its images, and a bar of those in the split among all of them."""
    from rich import box
    from rich.table import Table

    counts, full = split.counts, split.full
    groups = {"head": split.head, "tail": split.tail} if split.head else {"": list(full)}
    console = make_console()
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("class", overflow="fold")
    table.add_column("")
    for heading in ("images", "of", "kept"):
        table.add_column(heading, justify="right")
    table.add_column("")

    def add_row(name: str, group: str, number: int, of: int, drawn: str = "") -> None:
        table.add_row(name, group, str(number), str(of), f"{100 * number / of:.1f} %", drawn)

    width = max(10, console.width - max(map(len, full)) - 41)
    for group, names in groups.items():
        for name in names:
            add_row(name, group, counts[name], full[name], bar(counts[name], full[name], max(full.values()), width))
        table.add_section()
    add_row("all", "", sum(counts.values()), sum(full.values()))
    console.print(table)


def bar(number: int, full: int, largest: int, width: int) -> str:
    """Solid for the split's images, in eighths of a character, and light for the others of the class."""
    eighths = max(1, round(8 * width * number / largest))
    solid = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
    return solid + "░" * (round(width * full / largest) - len(solid))


if __name__ == "__main__":
    main()

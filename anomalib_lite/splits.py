"""Print a split of the training images, and write it as a file that others can read.

    python -m anomalib_lite.splits [KEY=VALUE ...] [--counts WHICH] [--write FILE] [--format NAME] [--config-dir DIR]

KEY=VALUE        as for training: split=exp100, data=mvtec data.root=DIR data.category=[bottle,cable] (default: all),
                 split=exp split.imbalance=20 split.order=reverse, split=file split.path=FILE
--counts WHICH   no images, the number of training images per class alone: mvtec, visa, or bottle=209,cable=224
--write FILE     the split as a file, which split=file split.path=FILE reads again
--format NAME    of that file; by its name, or
                 jsonl  JSON lines of training images (UniAD)    meta   ADer's meta.json, with the test set
                 csv    VisA's columns, with the test set        list   a training image's path a line
                 prune  paths of images to leave out (the file must be called prune_*)
--config-dir DIR a folder of your own configuration

Exit codes: 0; 2 for an error that is yours to mend.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib_lite.cli import program as cli
from anomalib_lite.errors import UserError

SUFFIXES = {".jsonl": "jsonl", ".json": "meta", ".csv": "csv", ".txt": "list"}


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print((__doc__ or "").strip())
        return
    cli.prepare()
    with cli.reported(outside=True, folder="--write"):
        show(sys.argv[1:])


def show(arguments: Sequence[str]) -> None:
    parser = cli.Parser()
    parser.add_argument("overrides", nargs="*")
    for name in ("counts", "write", "format", "config-dir"):
        parser.add_argument(f"--{name}")
    options = parser.parse_intermixed_args(arguments)
    if options.format and not options.write:
        raise UserError(f"--format {options.format}: of which file? give --write FILE")
    cfg = composed(options.overrides, options.config_dir)

    if options.counts:
        if options.write:
            raise UserError(f"--write {options.write}: a file lists images; leave out --counts and give data.root=DIR")
        full = chosen(options.counts, cfg["data"]["category"])
        kept, head, tail = profile_of(cfg["split"], full)
        draw(title(cfg), full, kept, head, tail)
        return
    from hydra.utils import instantiate

    data = instantiate(cfg["data"]["reader"])(cfg["data"]["root"], cfg["data"]["category"])
    split = instantiate(cfg["split"])(data)
    draw(title(cfg), split.full, split.counts, split.head, split.tail)
    for note in data.notes + split.notes:
        print(f"note: {note}")
    if options.write:
        from anomalib_lite.data import split_files

        file = Path(options.write).expanduser()
        form = options.format or ("prune" if file.name.startswith("prune_") else SUFFIXES.get(file.suffix.lower()))
        if form not in split_files.FORMATS:
            which = f"--format {form}" if form else f"--write {file}: its name tells no format; give --format"
            raise UserError(f"{which}: choose {', '.join(split_files.FORMATS)}")
        split_files.write(file, form, data, split.train)
        again = [o for o in options.overrides if o.startswith("data")]
        again += ["data.category=all"] * (not any(o.startswith("data.category=") for o in again))
        again += ["split=file", f"split.path={file}", *read_as(split)]
        print(f"written: {file} ({form}); its arguments: {shlex.join(again)}")


def read_as(split: Any) -> list[str]:
    """The arguments without which a file of this split would be read with another head and tail."""
    from anomalib_lite.data.splits import halves, ordered

    head, names = len(split.head), [*split.head, *split.tail]
    if not head or halves(ordered(split.counts, "size")) == (split.head, split.tail):
        return []
    listed = ",".join(name if re.fullmatch(r"[A-Za-z_]\w*", name) else f'"{name}"' for name in names)
    return [f"split.order=[{listed}]"] + [f"split.head={head}"] * (halves(names)[0] != split.head)


def composed(overrides: Sequence[str], folder: str | None) -> dict[str, Any]:
    """The `train` configuration with these overrides, and all categories unless some are chosen."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from anomalib_lite.cli import schema

    for override in overrides:
        if "=" not in override:
            raise UserError(f"{override}: arguments are KEY=VALUE, or flags; see --help")
    defaults = [] if any(o.startswith("data.category=") for o in overrides) else ["data.category=all"]
    if folder is not None:
        if not Path(folder).is_dir():
            raise UserError(f"--config-dir {folder}: no such folder")
        defaults.append(f"hydra.searchpath=[file://{Path(folder).absolute()}]")
    with initialize_config_dir(str(cli.HOME / "conf"), version_base="1.3"):
        cfg: Any = OmegaConf.to_container(compose("train", [*defaults, *overrides]), resolve=True)
    schema.check(cfg)
    return cfg


def chosen(which: str, category: Any) -> dict[str, int]:
    """Full training counts of the categories: of a known data set, or as given."""
    from anomalib_lite.data.readers import MVTEC, VISA

    known = {"mvtec": MVTEC, "visa": VISA}
    if which in known:
        counts = {name: train for name, (train, _, _) in known[which].items()}
    else:
        pairs = [re.fullmatch(r"\s*([^=,]+?)\s*=\s*([1-9]\d*)\s*", part) for part in which.split(",")]
        counts = {pair[1]: int(pair[2]) for pair in pairs if pair}
        if len(counts) != len(pairs):
            raise UserError(f"--counts {which}: give mvtec, visa, or each class once, as in bottle=209,cable=224")
    names = (
        list(counts) if category == "all" else [str(c) for c in ([category] if isinstance(category, str) else category)]
    )
    if unknown := [name for name in names if name not in counts]:
        raise UserError(f"data.category: '{unknown[0]}' is not in --counts, which has {', '.join(counts)}")
    return {name: counts[name] for name in names}


def profile_of(split: dict[str, Any], full: dict[str, int]) -> tuple[dict[str, int], list[str], list[str]]:
    """Kept counts, head and tail of a split that needs no images."""
    from anomalib_lite.data.splits import halves, kept_counts

    if len(full) == 1 or split["_target_"].endswith(".splits.full"):
        return full, [], []
    if "imbalance" not in split:
        raise UserError("--counts: this split is made of files; give data.root=DIR instead")
    kept = kept_counts(full, split["profile"], split["imbalance"], split["order"])
    return kept, *halves(list(kept))


def title(cfg: dict[str, Any]) -> str:
    told = ", ".join(f"{k} {v}" for k, v in cfg["split"].items() if not k.startswith("_") and v is not None)
    return told or "all training images"


def draw(title: str, full: dict[str, int], kept: dict[str, int], head: list[str], tail: list[str]) -> None:
    """A row a class: its images, and a bar of what is kept of what there is."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 100)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    names = [*head, *tail] or list(full)
    width = max(10, console.width - max(map(len, names)) - 34 - 7 * bool(head))
    table.add_column("class", overflow="fold")
    if head:
        table.add_column("")
    for heading in ("images", "of", "kept"):
        table.add_column(heading, justify="right")
    table.add_column("")
    most = max(full.values())
    for part in (head, tail) if head else (names,):
        for name in part:
            group = ["head" if part is head else "tail"] * bool(head)
            share = f"{100 * kept[name] / full[name]:.1f} %"
            table.add_row(
                name, *group, str(kept[name]), str(full[name]), share, bar(kept[name], full[name], most, width)
            )
        table.add_section()
    total, all_of_them = sum(kept.values()), sum(full.values())
    table.add_row("all", *[""] * bool(head), str(total), str(all_of_them), f"{100 * total / all_of_them:.1f} %", "")
    console.print(table)


def bar(kept: int, full: int, most: int, width: int) -> str:
    """Solid for what is kept, in eighths of a character, light for what is left out."""
    eighths = max(1, round(8 * width * kept / most))
    solid = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
    return solid + "░" * (round(width * full / most) - len(solid))


if __name__ == "__main__":
    main()

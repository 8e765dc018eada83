"""`train --help`: the configuration with the comments of its YAML files, and the choices of launchers and sweepers."""

import contextlib
import re
import string
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from anomalib_lite.cli.hydra_hooks import replaced

LINE = re.compile(r"(?P<indent> *)(?P<key>[\w.-]+):(?P<value>.*?)(?:(?<=\s)#(?P<comment>.*))?")
WIDTH = 120


def explained_help() -> contextlib.AbstractContextManager[None]:
    """Hydra's --help shows values alone."""
    original = Hydra.get_help

    def get_help(self: Hydra, help_cfg: Any, cfg: Any, args_parser: Any, resolve: bool) -> str:
        if help_cfg != HydraConfig.get().help:
            return original(self, help_cfg, cfg, args_parser, resolve)  # --hydra-help
        groups = [self.format_config_groups(lambda group: not group.startswith("hydra")).rstrip()]
        for group in ("hydra/launcher", "hydra/sweeper"):
            groups.append(f"{group}: {', '.join(self.config_loader.get_group_options(group))}")
        return string.Template(help_cfg.template).substitute(
            FLAGS_HELP=self.format_args_help(args_parser),
            HYDRA_CONFIG_GROUPS="",
            APP_CONFIG_GROUPS="\n".join(groups) + "\n",
            CONFIG=explained(OmegaConf.to_yaml(cfg, resolve=resolve), chosen_comments()),
        )

    return replaced(Hydra, "get_help", get_help)


def explained(text: str, comments: dict[str, str]) -> str:
    """The lines of a YAML text with a comment for each key: behind it, or above it where the line would be too long."""
    lines = []
    for path, match in paths(text):
        comment = comments.pop(path, None) if match else None
        line = match.string if match else path
        if match and comment and len(line) + 4 + len(comment) > WIDTH:
            head = f"{match['indent']}# "
            lines += textwrap.wrap(comment, WIDTH, initial_indent=head, subsequent_indent=head)
        elif comment:
            line += f"  # {comment}"
        lines.append(line)
    return "\n".join(lines)


def paths(text: str) -> Iterator[tuple[str, re.Match[str] | None]]:
    """(key such as data.root, match of LINE) for each line with a key, and (line, None) for each other line."""
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = LINE.fullmatch(line)
        if match is None:
            yield line, None
            continue
        indent = len(match["indent"])
        above = [*(each for each in above if each[0] < indent), (indent, match["key"])]
        yield ".".join(key for _, key in above), match


def chosen_comments() -> dict[str, str]:
    """{key: comment} of the primary configuration and of all chosen YAML files, also a user's own."""
    runtime = HydraConfig.get().runtime
    folders = [Path(source.path) for source in runtime.config_sources if source.schema == "file"]
    found: dict[str, str] = {}
    for group, choice in [("", HydraConfig.get().job.config_name), *runtime.choices.items()]:
        if not group.startswith("hydra/") and choice:
            for key, comment in file_comments(folders, group, str(choice)):
                if comment not in found.setdefault(key, comment):
                    found[key] = f"{found[key].rstrip('.')}; {comment}"
    return found


def file_comments(folders: list[Path], group: str, choice: str) -> Iterator[tuple[str, str]]:
    """(key, comment) of one YAML file, after those of the files of its group that it is based on."""
    file = next((file for folder in folders if (file := folder / group / f"{choice}.yaml").is_file()), None)
    if file is None:  # a choice that no file holds
        return
    text = file.read_text(encoding="utf-8", errors="replace")
    for base in re.findall(r"^  - (\w+)$", text, re.MULTILINE) if group else ():
        if base != "_self_":
            yield from file_comments(folders, group, base)
    prefix = "" if "@package _global_" in text or not group else f"{group}."
    block: list[str] = []
    is_head = True
    for path, match in paths(text):
        if match is None:
            comment = path.strip()
            block = [*block, comment.strip("# ")] if comment.startswith("#") and "@package" not in comment else []
            continue
        comments = [*block, *([match["comment"].strip()] if match["comment"] else [])]
        if is_head and group and block:  # at the top of the file: about the choice as a whole
            yield group, " ".join(block)
            comments = comments[len(block) :]
        if comments and not (is_head and not group):
            yield prefix + path, " ".join(comments)
        block, is_head = [], False

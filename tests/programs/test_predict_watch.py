"""predict's watch: files as they arrive, unfinished and damaged ones, the end by a signal, and the next start."""

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from anomalib_lite.errors import UserError
from anomalib_lite.runs import watching
from anomalib_lite.runs.prediction_table import GrowingTable, Prediction
from tests.helpers import run_programs
from tests.helpers.image_trees import save_image
from tests.helpers.interrupt import until
from tests.helpers.run_programs import Outcome, holding, predict


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    for name, seconds in (("POLL", 0.1), ("PATIENCE", 0.6), ("REFRESH", 0.0)):
        monkeypatch.setattr(watching, name, seconds)


@pytest.fixture
def place(trained, tmp_path) -> list[str]:
    (tmp_path / "in").mkdir()
    return [f"run={trained}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}"]


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The complete rows; none while there is no file."""
    file = folder / "scores.csv"
    return run_programs.rows_of(file) if file.exists() else []


def watch(*arguments: str, while_it_runs: Callable[[], None], by: int = signal.SIGINT) -> Outcome:
    """A watch that must run when the function has ended; a signal ends it then."""
    ended, problems = threading.Event(), list[BaseException]()

    def act() -> None:
        try:
            while_it_runs()
        except BaseException as error:
            problems.append(error)
        if not ended.is_set():
            os.kill(os.getpid(), by)

    thread = threading.Thread(target=act)
    thread.start()
    try:
        outcome = predict(*arguments, "--watch")
    finally:
        ended.set()
        thread.join()
    assert not problems, (problems, outcome)
    return outcome


def running(output: Path) -> Callable[[], bool]:
    return lambda: (output / "scores.csv").exists() and (output / ".running").exists()


def test_files_as_they_arrive(place, trained, tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    whole = save_image(tmp_path / "whole.png", 64, seed=5).read_bytes()
    looked: list[list[str]] = []

    def names() -> list[str]:
        return [row["path"] for row in rows_of(output)]

    def arrive() -> None:
        until(running(output))
        save_image(source / "a.png", seed=1)
        until(lambda: names() == ["a.png"])
        (source / "slow.png").write_bytes(whole[: len(whole) // 2])
        time.sleep(0.4)
        looked.append(names())
        (source / "slow.png").write_bytes(whole)
        until(lambda: names() == ["a.png", "slow.png"])
        save_image(source / "sub" / "c.jpg", seed=2)
        (source / "bad.png").write_text("no image")
        (source / "phone.heic").write_text("another kind")
        (source / "notes.txt").write_text("no image")
        (source / ".hidden.png").write_text("nobody's")
        until(lambda: names()[2:] == ["sub/c.jpg"])
        save_image(source / "a.png", seed=3)  # replaced
        until(lambda: names()[3:] == ["a.png"])
        time.sleep(1)

    outcome = watch(*place, while_it_runs=arrive, by=signal.SIGTERM)
    assert outcome.code == 0, outcome
    assert looked == [["a.png"]]
    lines = sorted(outcome.err.splitlines())
    assert len(lines) == 2, lines
    assert re.match(r"left out: .*bad.png: .*no image", lines[0])
    assert re.match(r"left out: .*phone.heic: this kind of image is not read", lines[1])
    assert "3 images scored, 2 left out" in outcome.out
    assert re.search(r"^sub/c.jpg: \d+\.\d\d x threshold, (good|defective)$", outcome.out, re.MULTILINE)
    once = {row["path"]: row for row in rows_of(output)}  # the last row of a path counts
    (source / "bad.png").unlink()
    (source / "phone.heic").unlink()
    assert predict(*place[:2], f"output={tmp_path / 'once'}").code == 0
    for row in rows_of(tmp_path / "once"):
        watched = once[row["path"]]
        assert int(watched.pop("modified")) == (source / row["path"]).stat().st_mtime_ns
        assert float(watched["score"]) == pytest.approx(float(row["score"]), rel=1e-5)
        assert [watched[key] for key in ("threshold", "decision")] == [row[key] for key in ("threshold", "decision")]
    for kind in ("overlays", "heatmaps"):
        assert {file.name for file in (output / kind).rglob("*.png")} == {"a.png.png", "slow.png.png", "c.jpg.png"}
    page = (output / "report.html").read_text()
    assert page.count('alt="overlay"') == 3
    assert not (output / ".running").exists()


def test_the_next_start_goes_on(place, tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    for i, name in enumerate(("a.png", "b.png")):
        save_image(source / name, seed=i)
    first = watch(*place, while_it_runs=lambda: until(lambda: len(rows_of(output)) == 2))
    assert (first.code, first.err) == (0, "")
    with (output / "scores.csv").open("a") as file:
        file.write("half a row,0.1")  # of a machine that lost its power
    before = (output / "overlays" / "a.png.png").stat().st_mtime_ns
    save_image(source / "c.png", seed=2)
    (source / "b.png").unlink()
    second = watch(
        *place, while_it_runs=lambda: until(lambda: [row["path"] for row in rows_of(output)][2:] == ["c.png"])
    )
    assert (second.code, second.err) == (0, "")
    assert [row["path"] for row in rows_of(output)] == ["a.png", "b.png", "c.png"]
    assert (output / "overlays" / "a.png.png").stat().st_mtime_ns == before
    assert "a.png:" not in second.out
    page = (output / "report.html").read_text()
    assert all(name in page for name in ("a.png", "b.png", "c.png"))
    assert page.count('alt="image"') == 2  # the picture of b.png is gone
    refused = predict(*place, "--watch", "threshold=3")
    assert (refused.code, refused.err.startswith("error: threshold=3.0: ")) == (2, True)
    refused = predict(*place)
    assert "scores.csv exists already" in refused.err


def test_refused(place, trained, tmp_path):
    run, source, output = place
    image = save_image(tmp_path / "in" / "a.png")
    inside = f"output={tmp_path / 'in' / 'out'}"
    (tmp_path / "once").mkdir()
    (tmp_path / "once" / "scores.csv").write_text("path,score,threshold,decision\n")
    for arguments, message in (
        ((run, f"input={image}", output), r"input=.*a.png: no such folder; watch=true takes folders"),
        ((run, f"input={tmp_path}/nowhere", output), r"input=.*nowhere: no such folder"),
        ((run, source, inside), r"output=.* lies inside input="),
        ((run, f"input={tmp_path / 'in'}", f"output={tmp_path}"), r"input=.* lies inside output="),
        ((run, source, f"output={tmp_path / 'once'}"), r"scores.csv exists already: choose another output=DIR"),
        ((run, source, output, "--watching"), r"--watching: arguments are KEY=VALUE"),
    ):
        run_programs.assert_refused(predict(*arguments, "watch=true"), message)


def test_a_table_is_never_lost(tmp_path):
    """What is no table of ours is refused and stays; half a first row is nothing yet; other line ends are read."""
    file = tmp_path / "scores.csv"
    for content in (b"path,score\n1,2\n", b"notes without a line end", b"a,b\r\nhalf", b"\xff\xfe\n"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="not the table of a watched folder; choose another output=DIR"):
            GrowingTable(file)
        assert file.read_bytes() == content
    head = "path,score,threshold,decision,ratio,modified"
    for text in ("", head[:9], head, f"{head}\r\n", f"{head}\r\nhalf,"):
        file.write_text(text, newline="")
        GrowingTable(file).close()
        assert file.read_bytes() == f"{head}\r\n".encode()
    file.write_text(f"{head}\na.png,0.5,0.25,defective,2.0,17\na.png,0.1,0.25,good,0.4,18\nb.png,0")
    with contextlib.closing(GrowingTable(file)) as table:
        assert table.modified == {"a.png": 18}
        assert (table.rows["a.png"].score, table.rows["a.png"].ratio) == (0.1, 0.4)
        table.add(Prediction('odd "name",\n.png', 0.5, 0), 19)
    with contextlib.closing(GrowingTable(file)) as table:
        assert table.modified == {"a.png": 18, 'odd "name",\n.png': 19}
    damaged = f"{head}\r\na.png,high,0.25,good,,18\r\n".encode()
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"not readable \(line 2: .*choose another output=DIR"):
        GrowingTable(file)
    assert file.read_bytes() == damaged


def test_one_watch_at_a_time(place, tmp_path):
    with holding(tmp_path / "out") as holder:
        outcome = predict(*place, "watch=true")
    assert outcome.code == 2
    assert re.search(rf"out: process {holder.pid} on .* works in this folder", outcome.err)

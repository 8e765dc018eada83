"""A comparison as one page that needs nothing but itself: every name is escaped, and the page may load nothing."""

import base64
import hashlib
import re
import string
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from anomalib_lite.comparison import export as formats
from anomalib_lite.comparison.cells import COSTS, Cell, Row, Table
from anomalib_lite.comparison.worst_cases import Case, Maps, chosen, run_of, worst_cases
from anomalib_lite.metrics.functional import CURVES

MOST_CASES = 24  # a category
MOST_TESTS = 300
MOST_CATEGORIES = 60  # with curves and heat maps, over all tables
BYTES = 8_000_000  # for pictures

PANEL = """<figure><svg viewBox="0 0 240 236" role="img" aria-label="{name}">
<text class="title" x="34" y="14">{title}</text>
<rect class="frame" x="34" y="22" width="196" height="180"/>{lines}<text x="34" y="214">0</text>
<text x="230" y="214" text-anchor="end">{limit:g}</text><text x="132" y="228" text-anchor="middle">{x}</text>
<text x="30" y="30" text-anchor="end">1</text><text x="30" y="202" text-anchor="end">0</text>
<text x="22" y="112" text-anchor="middle" transform="rotate(-90 22 112)">{y}</text></svg></figure>"""

CASES = """<p>Worst cases first: defective images with the lowest ranks, good ones with the highest, averaged over these
methods. Heat maps go from the background of normal images (dark) to twice the pixel threshold (bright); the
number is the score as a multiple of its threshold, red where the decision is wrong.</p>
<div class="wide"><table class="maps"><thead><tr><th>case</th><th>image</th>{heads}</tr></thead>
<tbody>{rows}</tbody></table></div>"""


def to_html(tables: Sequence[Table], metric: str) -> str:
    """The page, with `metric` shown first."""
    metrics = list(dict.fromkeys(name for table in tables for name in table.metrics))
    runs = sum(len(row.all_runs()) for table in tables for row in table.rows)
    options = "".join(
        f'<option value="{escape(name)}"{" selected" * (name == metric)}>{escape(formats.name_of(name))}</option>'
        for name in metrics
    )
    body = [
        f"<p>{runs} runs, {sum(len(table.rows) for table in tables)} methods and settings. Click a heading to sort.</p>"
    ]
    body.append(f'<div class="bar"><label>Metric <select id="metric">{options}</select></label></div>')
    categories = sum(len(table.categories) for table in tables)
    each = BYTES // max(min(categories, MOST_CATEGORIES), 1)
    left = MOST_CATEGORIES
    for number, table in enumerate(tables, 1):
        title = f"Table {number}: {table.title}" if len(tables) > 1 else table.title
        body.append(f"<h2>{escape(title)}</h2>")
        body += [_metric(table, f"t{number}", name, name == metric) for name in metrics]
        body += _more(table, f"t{number}")
        shown, left = table.categories[: max(left, 0)], left - len(table.categories)
        body += _pictures(table, metric, shown, each)
    script = "\n" + Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = string.Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    title = escape("Comparison: " + ", ".join(dict.fromkeys(table.title for table in tables)))
    return template.substitute(hash=digest, title=title, body="\n".join(body), script=script)


def _table(name: str, heads: Sequence[tuple[str, bool]], bodies: Iterable[str]) -> str:
    """A table that sorts; heads are (text, whether it is text that is sorted)."""
    row = "".join(
        f'<th scope="col"{" class=text" * text}><button type="button">{escape(head)}</button></th>'
        for head, text in heads
    )
    return f'<div class="wide"><table id="{escape(name)}"><thead><tr>{row}</tr></thead>{"".join(bodies)}</table></div>'


def _name(text: str) -> str:
    return f'<td class="name" data-v="{escape(text)}">{_shown(text)}</td>'


def _shown(text: str, breaking: str = "_") -> str:
    """A name that may break after these characters, none of which HTML needs."""
    return re.sub(f"([{breaking}])", r"\1<wbr>", escape(text))


def _number(value: float | None, shown: str) -> str:
    return f'<td data-v="{"" if value is None else repr(float(value))}">{escape(shown)}</td>'


def _metric(table: Table, name: str, metric: str, shown: bool) -> str:
    """The table of a metric and what is to be said under it."""
    columns, body, bodies = table.columns, table.body(metric), []
    for setting, rows in body.items():
        told = f'<tr class="setting"><th colspan="{len(columns) + 2}">{escape(setting)}</th></tr>' * (len(body) > 1)
        for row, cells in rows:
            seeds = formats.seeds_of(cells)
            numbers = "".join(_cell(cells.get(column)) for column in columns)
            told += f'<tr>{_name(row.label)}{numbers}<td data-v="{seeds.partition("–")[0]}">{seeds}</td></tr>'
        bodies.append(f"<tbody>{told}</tbody>")
    plain = all(cell.sd is None for rows in body.values() for _, cells in rows for cell in cells.values())
    heads = [("method", True), *((formats.heading(column), False) for column in columns), ("seeds", False)]
    said = "".join(f"<li>{escape(note)}</li>" for note in formats.notes(table, metric))
    tests = table.tests(metric)[0]
    if tests:
        pairs = "".join(
            f"<tr>{_name(a)}{_name(b)}{_number(d, f'{100 * d:+.1f}')}"
            f"{_number(p, formats.p_value(p))}{_number(n, str(n))}</tr>"
            for a, b, d, p, n in tests[:MOST_TESTS]
        )
        names = [
            ("method", True),
            ("against", True),
            ("difference", False),
            ("corrected p", False),
            ("categories", False),
        ]
        more = f"<p>The first {MOST_TESTS} of {len(tests)} pairs.</p>" * (len(tests) > MOST_TESTS)
        said_tests = _table(f"{name}-tests-{metric}", names, [f"<tbody>{pairs}</tbody>"]) + more
        said_tests = f"<details><summary>Paired tests</summary>{said_tests}</details>"
    else:
        said_tests = ""
    return (
        f'<div data-metric="{escape(metric)}"{" class=plain" * plain}{" hidden" * (not shown)}>'
        f"{_table(f'{name}-{metric}', heads, bodies)}"
        f"<p>{escape(formats.how(metric))}.</p><ul>{said}</ul>{said_tests}</div>"
    )


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return '<td data-v="">–</td>'
    number = f"{100 * cell.mean:.1f}"
    number = f'<span class="best">{number}</span>' if cell.best else number
    sd = f'<span class="sd">{"" if cell.sd is None else f" ± {100 * cell.sd:.1f}"}</span>'
    between = formats.between(cell)
    return (
        f'<td data-v="{cell.mean!r}">{number}{sd}' + (f'<span class="ci">{between}</span>' if between else "") + "</td>"
    )


def _more(table: Table, name: str) -> list[str]:
    """Time, memory, parameters."""
    rows = "".join(
        f"<tr>{_name(row.label)}{''.join(_number(cost, formats.amount(cost)) for cost in costs.values())}</tr>"
        for row, costs in table.costs()
    )
    heads = [("method", True), *((cost, False) for cost in COSTS)]
    return ["<h3>Time, memory, parameters</h3>", _table(f"{name}-costs", heads, [f"<tbody>{rows}</tbody>"])]


def _pictures(table: Table, metric: str, categories: list[str], budget: int) -> list[str]:
    """Curves and heat maps of the categories, a part to unfold each."""
    rows, maps = chosen(table, metric), Maps(table.problems)
    found: list[str] = []
    for category in categories:
        having = [row for row in rows if category in row.runs]
        curves = _curves(category, rows, having, maps)
        cases = worst_cases(category, having, maps, MOST_CASES, budget)
        if curves or cases:
            opened = " open" * (len(found) == 0)
            inside = curves + (_cases(cases, having) if cases else "")
            found.append(f"<details{opened}><summary>{escape(category)}</summary>{inside}</details>")
    if not found:
        return []
    told = f"The {len(rows)} best of {len(table.rows)} rows" if len(rows) < len(table.rows) else "All rows"
    told += ", the smallest seed of each"
    if len(categories) < len(table.categories):
        told += f", the first {len(categories)} of {len(table.categories)} categories"
    return ["<h3>Curves and heat maps</h3>", f"<p>{told}.</p>", *found]


def _curves(category: str, rows: list[Row], having: list[Row], maps: Maps) -> str:
    """A panel a curve, a line a method."""
    points = [(rows.index(row), maps.curves(run, category)) for row in having if (run := run_of(row, category))]
    panels = []
    for title, (_, _, x_name, y_name, limit) in CURVES.items():
        lines = "".join(_line(number, *found[title], limit) for number, found in points if title in found)
        if lines:
            name = f"{escape(title)} of {escape(category)}"
            panels.append(PANEL.format(name=name, title=title, limit=limit, x=x_name, y=y_name, lines=lines))
    names = "".join(f'<span style="--c: var(--c{rows.index(r) % 8})">{escape(r.label)}</span>' for r in having)
    return f'<div class="legend">{names}</div><div class="curves">{"".join(panels)}</div>' if panels else ""


def _line(number: int, x: np.ndarray, y: np.ndarray, limit: float) -> str:
    points = zip(34 + 196 * np.clip(x / limit, 0, 1), 202 - 180 * np.clip(y, 0, 1), strict=True)
    return f'<path style="--c: var(--c{number % 8})" d="M{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>'


def _cases(cases: list[Case], rows: list[Row]) -> str:
    """An image a row: what it is, itself, and its heat map under every method."""
    heads = "".join(f"<th>{_shown(row.label)}</th>" for row in rows)
    told = ""
    for case in cases:
        maps = ""
        for picture, ratio in case.maps:
            wrong = ratio is not None and (ratio > 1) != bool(case.label)
            number = "" if ratio is None else f'<span class="{"wrong" * wrong}">{ratio:.2f} ×</span>'
            maps += f"<td>{_picture(picture, 'no map')}{number}</td>"
        kind, path = "defective" if case.label else "good", _shown(case.path, "_/")
        told += f'<tr><td class="case"><b>{kind}</b><br><code>{path}</code><br>disagreement {case.rank:.2f}</td>'
        told += f"<td>{_picture(case.picture, 'image is gone')}</td>{maps}</tr>"
    return CASES.format(heads=heads, rows=told)


def _picture(uri: str, otherwise: str) -> str:
    return f'<img src="{uri}" alt="" loading="lazy">' if uri else f'<span class="gone">{otherwise}</span>'

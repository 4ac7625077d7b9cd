"""Reports: inert whatever the text, nothing fetched, the same bytes for the same files."""

from __future__ import annotations

import json
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toy_family  # tests are imported by path

from headwater.core.compare import Comparison, compare
from headwater.core.family import Axis
from headwater.core.figures import (
    Point,
    front_svg,
    heat_map_svg,
    in_view,
    printable,
    short_count,
    standalone,
    trajectory_svg,
)
from headwater.core.report import write_report
from headwater.core.trajectory import mean_and_range
from headwater.core.yamlio import dump_yaml

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x1b[31m\u202e$\\frac{"


class Page(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def assert_inert(self) -> None:
        """No script, no image, no handler, no address that leads out of the page."""
        assert not self.tags & {"script", "img", "iframe", "object", "embed", "form", "base", "foreignobject", "image"}
        for tag, attributes in self.elements:
            for name, value in attributes.items():
                assert not name.startswith("on"), (tag, name)
                if name in ("href", "src", "xlink:href", "action", "data"):
                    assert (value or "").startswith(("#", "data:,")), (tag, value)


@pytest.fixture(scope="module", autouse=True)
def _toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with toy_family.installed(tmp_path_factory.mktemp("site")):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "runs"
    contestants = {
        "good": {"method": "tuned", "gain": [0.3, 0.304, 0.296], "price": [0.02, 0.021, 0.02], "note": HOSTILE},
        "broken": {"method": "fails"},
        "shaky": {"method": "fails", "on": [1], "gain": [0.2], "price": [0.01]},
        "other": {"method": "tuned", "gain": [3.0, 3.1, 3.0], "unit": "<b>other</b>"},
    }
    data = {
        "family": "toyfamily.domain", "title": HOSTILE.replace("\x1b", ""), "seeds": [0, 1, 2], "forgetting_limit": 0.1,
        "tune": {"optim.lr": [0.1, 0.3]}, "contestants": contestants, "workers": 2,
    }  # fmt: skip
    compare(Comparison.parse(dump_yaml(data)), out)
    return out


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs"


def test_property_hostile_text_is_shown_and_not_obeyed(made: Path) -> None:
    html = (made / "report.html").read_text()
    page = Page(html)
    page.assert_inert()
    assert "<script>alert(1)</script>" in page.text  # the title, and the error of the failed row
    assert "broken <script>alert(1)</script> on purpose" in page.text
    assert "<b>other</b>" in page.text
    assert "\x1b" not in html
    assert "\u202e" not in html


def test_property_hostile_leaderboard_is_inert_in_every_field(directory: Path) -> None:
    """Someone hands on a directory: every string of its JSON files is hostile but those that select what is shown."""
    selecting = {
        "standing",
        "status",
        "label",
        "better",
        "format",
        "directory",
        "metric",
        "row",
        "rows",
        "x",
        "name",
        "unit",
        "baseline",
    }

    def spoil(data: Any, key: str = "") -> Any:
        if isinstance(data, dict):
            return {name: spoil(value, name) for name, value in data.items()}
        if isinstance(data, list):
            return [spoil(item, key) for item in data]
        return HOSTILE if isinstance(data, str) and key not in selecting else data

    board = spoil(json.loads((directory / "leaderboard.json").read_text()))
    for axis in (
        board["family"]["gain"],
        board["family"]["price"],
        *board["family"]["trajectories"],
        *board["columns"],
    ):
        axis["label"] = axis["unit"] = HOSTILE
    for old, new in (("good", HOSTILE), ("usual", HOSTILE + "baseline")):
        board = json.loads(json.dumps(board).replace(json.dumps(old), json.dumps(new)))
    (directory / "leaderboard.json").write_text(json.dumps(board))
    for path in directory.glob("runs/*/*/trajectory.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "x": HOSTILE}))
    page = Page(write_report(directory).read_text())
    page.assert_inert()
    assert page.text.count("<script>alert(1)</script>") > 20


def test_property_policy_forbids_scripts_and_fetching(made: Path) -> None:
    html = (made / "report.html").read_text()
    head = [attributes for tag, attributes in Page(html).elements if tag == "meta"]
    policy = next(a["content"] for a in head if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert html.index("Content-Security-Policy") < html.index("<style")
    assert not re.findall(r"@import|url\((?!#)", html)


def test_property_same_files_give_the_same_bytes(directory: Path) -> None:
    first = write_report(directory).read_bytes()
    assert write_report(directory).read_bytes() == first


def test_property_ids_are_unique_and_figures_are_well_formed(made: Path) -> None:
    html = (made / "report.html").read_text()
    ids = [attributes["id"] for _, attributes in Page(html).elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0
    figures = re.findall(r"<svg xmlns.*?</svg>", html, flags=re.DOTALL)
    assert len(figures) == 1 + 2  # a front where there are two rows, and trajectories for each of two units
    for figure in figures:
        ElementTree.fromstring(figure)
        assert "#0" not in figure  # every colour is the page's
        assert "<style" not in figure


def test_property_answer_comes_first_and_every_section_is_there(made: Path) -> None:
    text = Page((made / "report.html").read_text()).text
    order = [
        "Take good: its gain", "Leaderboard", "What gain costs in loss of ability", "On the way", "Cost",
        "Failures and warnings", "What was run, and how to run it again",
        "headwater compare runs/comparison.yaml --out runs", "Environment",
    ]  # fmt: skip
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    assert "Samples" not in text


def test_property_curves_are_headed_by_what_the_family_says_of_them(directory: Path) -> None:
    stored = directory / "leaderboard.json"
    board = json.loads(stored.read_text())
    for words in ("Measured on Sundays", None):
        board["family"]["on_the_way"] = words
        if words is None:  # written before families said it
            del board["family"]["on_the_way"]
        stored.write_text(json.dumps(board))
        text = Page(write_report(directory).read_text()).text
        assert (words or "Measured on a validation sample while training") in text


def test_property_user_text_appears_only_where_a_run_kept_samples(directory: Path) -> None:
    (run,) = directory.glob("runs/good/seed-0-*")
    (run / "samples.json").write_text(json.dumps([{"prompt": "Once <i>", "text": " upon a time"}]))
    text = Page(write_report(directory).read_text()).text
    assert "Once <i> upon a time" in text


def test_property_report_of_one_seed_shows_no_interval(tmp_path: Path) -> None:
    data = {"family": "toyfamily.domain", "seeds": [0], "contestants": {"a": {"method": "tuned", "gain": [0.2]}}}
    compare(Comparison.parse(dump_yaml(data)), tmp_path)
    text = Page((tmp_path / "report.html").read_text()).text
    assert "single observation" in text
    assert " to 0." not in text
    assert "95 %" not in text


def test_property_run_report(directory: Path) -> None:
    (run,) = directory.glob("runs/good/seed-0-*")
    (run / "result.json").write_text(
        json.dumps(
            json.loads((run / "result.json").read_text())
            | {"status": "failed", "error": HOSTILE, "metrics": {HOSTILE: 0.5}}
        )
    )
    (run / "trajectory.json").write_text(json.dumps({"x": HOSTILE, "series": {HOSTILE: [[0, 1.0], [100, 2.0]]}}))
    page = Page(write_report(run).read_text())
    page.assert_inert()
    assert "Failed after" in page.text
    assert "svg" in page.tags


def verdict(**fields: Any) -> dict[str, Any]:
    part = {
        "statement": HOSTILE, "metric": "m", "direction": "higher", "margin": 0.0, "treatment": "a", "baseline": "b",
        "per_seed": [{"seed": 0, "treatment": 0.5, "baseline": 0.4}], "difference": 0.1, "ci95": None,
        "verdict": "holds",
    }  # fmt: skip
    return {
        **part,
        "id": "toy",
        "seconds": 3.0,
        "parts": [part, {**part, "ci95": [0.05, 0.15], "decides": False}],
        **fields,
    }


@pytest.mark.parametrize(
    ("outcome", "words"),
    [("holds", "Holds here."), ("does not hold", "Does not hold here."), ("inconclusive", "Inconclusive.")],
)
def test_property_claim_report(tmp_path: Path, outcome: str, words: str) -> None:
    (tmp_path / "verdict.json").write_text(json.dumps(verdict(verdict=outcome, unmet=["the base <b> is too weak"])))
    page = Page(write_report(tmp_path).read_text())
    page.assert_inert()
    assert page.text.index(words) < page.text.index("Precondition not met: the base <b> is too weak")
    assert "no interval" in page.text
    assert "+0.050 to +0.150" in page.text


def test_rejects_directory_without_results(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no leaderboard\.json, verdict\.json, result\.json"):
        write_report(tmp_path)


# Parts of figures


def test_equation_curves_of_seeds_are_averaged_where_all_are_defined() -> None:
    # At 5 the second seed lies halfway between 2 and 4.
    curve = mean_and_range([[[0, 1.0], [5, 2.0], [10, 3.0]], [[0, 2.0], [10, 4.0], [20, 9.0]]])
    assert curve.x == [0, 5, 10]
    assert curve.mean == [1.5, 2.5, 3.5]
    assert (curve.low, curve.high) == ([1, 2, 3], [2, 3, 4])


def test_degenerate_curve_without_points_is_refused_and_gaps_are_left_out() -> None:
    with pytest.raises(ValueError, match="finite point"):
        mean_and_range([[[0, float("nan")]]])
    assert mean_and_range([[[0, 1.0], [1, float("inf")], [2, 3.0]]]).x == [0, 2]


def test_equation_far_rows_are_left_out_of_view_but_never_more_than_two() -> None:
    near = {name: (0.1 * i, 0.1 * i + 0.05) for i, name in enumerate("abc")}
    assert in_view(near) == set("abc")
    assert in_view({**near, "far": (9.0, 9.1)}) == set("abc")
    assert in_view({**near, "far": (9.0, 9.1), "farther": (-99.0, -98.0)}) == set("abc")
    assert len(in_view({**near, "x": (1e1, 1e1), "y": (1e3, 1e3), "z": (1e5, 1e5)})) == 4


def test_equation_counts_are_short() -> None:
    assert [short_count(v) for v in (0, 7, 9999, 196_608, 1.06e12)] == ["0", "7", "9,999", "197\u00a0k", "1.06\u00a0T"]


def test_property_text_keeps_its_spaces_and_loses_its_controls() -> None:
    assert printable("a\u00a0b\n\u202e\x07é") == "a\u00a0b\n\ufffd\ufffdé"


def test_degenerate_figures_of_one_point_and_of_constant_lines() -> None:
    x, y = Axis("p", "Price", "lower"), Axis("g", "Gain", "higher")
    ElementTree.fromstring(front_svg([Point("a", (None, 0.0, None), (None, 0.0, None), None, "undecided")], x, y, None))
    ElementTree.fromstring(trajectory_svg({"a": (0, [[[0, 1.0], [0, 1.0]]])}, "steps", y, "t"))


def test_property_a_heat_map_alone_has_every_name_and_number_and_no_variable() -> None:
    axis = Axis("g", "Gain", "higher", "bits/byte")
    svg = standalone(heat_map_svg([[0.25, -1.5], [0.0, 3.0]], ["after <a>", "after b"], ["<a>", "b"], axis, "m"))
    words = {node.text for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}
    assert {"after <a>", "after b", "<a>", "b", "0.250", "-1.500", "0.000", "3.000"} <= words
    assert "var(" not in svg
    assert "#1f6f8b" in svg, "above 0"
    assert "#c4572c" in svg, "below 0"
    ElementTree.fromstring(heat_map_svg([[0.0] * 21], ["a"], [str(i) for i in range(21)], axis, "m"))


def test_property_every_name_stands_once_in_a_crowded_front() -> None:
    rng = np.random.default_rng(0)
    points = [
        Point(f"contestant-{i}", (None, float(a), None), (None, float(b), None), 0.1, "front")
        for i, (a, b) in enumerate(rng.random((8, 2)))
    ]
    svg = front_svg(points, Axis("p", "Price", "lower"), Axis("g", "Gain", "higher"), 0.5)
    assert all(svg.count(f">contestant-{i}<") == 1 for i in range(8))

"""The written report: whole, self-contained, escaped, the same each time, and honest about what is missing."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_run import write_run

from fedlth import errors
from fedlth.report import read_results, summary_text, write_report
from fedlth.report.canvas import spread
from fedlth.report.tables import Table, csv_text, latex, markdown, summary_table
from fedlth.report.units import signed

NASTY = "<script>alert(1)</script> a_b% & \\x{y} | $z^2~#\n[1](http://x.y)"


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report over two seeds of a study whose name tries to get out of every format."""
    group = tmp_path_factory.mktemp("nasty")
    for seed in (0, 1):
        write_run(group / f"seed-{seed}", seed=seed, study=NASTY, method='"><img src=x>', num_clients=8, rounds=2)
    write_report(group)
    return group


class Tags(HTMLParser):
    """Collect every tag with its attributes, and check that each is closed."""

    VOID = ("meta", "img", "source", "link", "br", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_self_contained_and_escaped(nasty: Path) -> None:
    text = (nasty / "report.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "link", "iframe", "object"}
    for tag, attributes in tags.seen:
        for key in ("src", "srcset", "href"):
            value = attributes.get(key) or ""
            assert value == "" or value.startswith(("data:image/svg+xml;base64,", "#")), (tag, key, value[:60])
    assert "url(" not in text and "@import" not in text
    assert sum(tag == "img" for tag, _ in tags.seen) == 6
    assert "&lt;script&gt;" in text
    assert "seed 0, 1" in text and "hierarchical bootstrap" in text and "All of it was done with 2 seeds" in text


def test_everything_is_written(nasty: Path) -> None:
    names = {str(path.relative_to(nasty)) for folder in ("tables", "figures") for path in (nasty / folder).iterdir()}
    assert {f"tables/{t}.{e}" for t in ("summary", "clients", "bytes") for e in ("md", "tex", "csv")} <= names
    assert len([name for name in names if name.endswith(".png")]) == 6 and not any(".part" in name for name in names)
    with (nasty / "tables" / "summary.csv").open() as file:
        rows = list(csv.reader(file))
    assert len(rows) == 25 and {len(row) for row in rows} == {16}


def test_cells_are_escaped_in_every_form() -> None:
    table = Table(NASTY, ("a_b", "c"), ((NASTY, "[1, 2]"),))
    tex = latex(table)
    assert tex.splitlines()[0].startswith("% <script>") and tex.count("\n") == 8
    row = tex.splitlines()[5]
    assert r"a\_b\% \& \textbackslash{}x\{y\} | \$z\textasciicircum{}2\textasciitilde{}\#" in row
    assert not re.search(r"(?<!\\)[&%$#_](?!\s\{\[\}1)", row.replace(r"\\", "").replace(" & ", " "))
    text = markdown(table)
    assert text.count("\n") == 3 and r"\<script\>" in text and r"\|" in text and "](" not in text
    assert next(csv.reader([csv_text(Table("", ("a",), (('x,"y',),))).splitlines()[1]])) == ['x,"y']
    assert float(csv_text(Table("", ("a",), ((signed(-0.25),),))).splitlines()[1]) == -0.25


def test_inference_flops_follow_the_density_of_each_layer(fake: Path) -> None:
    found = {(row[0], row[1]): row[-1] for row in summary_table(read_results(fake)).rows}
    dense = 172_800 + 307_200 + 32_768 + 1_280
    assert found["dense twin", "1"] == f"{dense / 1000:.0f} k"
    assert found["personal ticket", "0.2"] == f"{dense / 5000:.0f} k"


def test_an_unfinished_run_has_a_report_that_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=False, num_clients=8, rounds=2)
    (run / "metrics.jsonl").unlink()
    told = [{"round": 1, "phase": "federate", "client": c, "seconds": s} for c, s in ((0, 30.0), (None, 33.0))]
    (run / "times.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    text = write_report(run).read_text()
    assert "federate 33 s (wall time" in text, "no client's time counts beside the round's"
    assert "did not finish" in text and "No client was evaluated" in text and "8 clients without any result" in text
    assert "did not finish" in summary_text(read_results(run))


def test_a_run_without_tickets_has_a_report_and_the_same_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_clients=8, rounds=2, method="fedavg")
    for path in (run / "tickets").iterdir():
        path.unlink()
    rows = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"global"' in line]
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert "The global model reaches" in write_report(run).read_text()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    write_report(run)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_without_matplotlib_the_tables_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", num_clients=8, rounds=2)
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "matplotlib" else name)
    with pytest.raises(errors.MissingExtra, match=r"pip install 'fedlth\[sim\]' \(matplotlib not installed\)"):
        write_report(run)
    assert (run / "tables" / "summary.md").exists() and not (run / "report.html").exists()
    assert "personal ticket" in summary_text(read_results(run))


def test_the_terminal_table_fits(fake: Path) -> None:
    lines = summary_text(read_results(fake)).splitlines()
    table = [line for line in lines if line.startswith(("arm", "personal", "random", "--"))]
    assert len(table) >= 10 and max(map(len, table)) <= 110


def test_labels_are_moved_apart_in_order() -> None:
    assert spread([0.0, 10.0], gap=1) == [0, 10]
    moved = spread([5.0, 5.0, 5.1, 9.0], gap=1)
    assert moved == sorted(moved) and all(b - a >= 1 - 1e-9 for a, b in zip(moved, moved[1:], strict=False))


def test_nothing_heavy_is_imported() -> None:
    heavy = ("torch", "ray", "flwr", "scipy", "matplotlib", "jinja2")
    code = f"import sys, fedlth.report; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"

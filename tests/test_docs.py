"""The docs are tested: every command, part, file and figure source named there exists, and the reverse."""

import inspect
import re
import sys
from pathlib import Path

import pytest

from fedlth import catalogue
from fedlth.cli.grammar import parser
from fedlth.experiment.resolve import read
from fedlth.lab import runner
from fedlth.lab import study as lottery
from fedlth.lab.controls import MASKS
from fedlth.lab.probes import PROBES
from fedlth.methods.table import METHODS
from fedlth.personalization.arms import ARMS
from fedlth.study import schema
from fedlth.study.yaml_text import parse
from tests import tiny
from tests.test_architecture import ORDER

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(page for room in ("docs", "benchmarks/results", "simulations") for page in (ROOT / room).rglob("*.md")),
]


def test_the_method_table_is_the_registry_and_the_readme_names_each() -> None:
    assert catalogue.methods_markdown() in (DOCS / "methods.md").read_text()
    listed = re.search(r"\*\*Methods\*\*:(.*?)each", (ROOT / "README.md").read_text(), re.S)
    assert listed and re.findall(r"`(\w+)`", listed.group(1)) == list(METHODS)


def test_the_method_table_says_all_that_goes_up() -> None:
    up = {
        line.split("`")[1]: re.split(r" (?<!\\)\| ", line)[3] for line in catalogue.methods_markdown().splitlines()[2:]
    }
    assert up["fedspa"] == "kept or shared values with their mask + mask bits" and up["fedavg"] == "values"
    assert up["prunefl"].endswith("+ scores") and up["fedtiny"] == "statistics + values + scores"
    assert up["flash"] == "statistics + values" and up["ssfl"] == up["salientgrads"] == "scores + values"
    assert up["local"] == "nothing" and up["fedpm"] == "mask bits"


def test_the_recipe_of_a_method_is_short() -> None:
    for name, recipe in METHODS.items():
        assert len(inspect.getsource(recipe).splitlines()) < 60, f"{name}: see docs/decisions.md, entry 95"


def test_every_command_is_documented_and_the_reverse() -> None:
    commands = {c for a in parser()._actions for c in (a.choices or {}) if a.dest == "command"}
    shown = set(re.findall(r"^    fedlth (\w+)", (DOCS / "commands.md").read_text(), re.M))
    assert shown == commands


def test_the_picture_of_the_rooms_is_their_order() -> None:
    picture = re.search(r"^```\n(.*?)^```", (DOCS / "architecture.md").read_text(), re.M | re.S)
    assert picture
    drawn = [name for line in picture.group(1).splitlines() for name in re.split(", ", line.strip().split("  ")[0])]
    assert drawn == [room for room in reversed(ORDER) if not room.startswith("__")]


def test_every_arm_is_in_the_protocol() -> None:
    text = (DOCS / "protocol.md").read_text()
    for arm in [*ARMS, "refined"]:
        assert f"`{arm}`" in text, arm


def test_links_point_at_files_and_headings() -> None:
    for page in PAGES:
        for target, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
            if not target.startswith("http"):
                found = page.parent / target if target else page
                assert found.exists(), f"{page.name}: {target}"
                assert not heading or heading in anchors(found), f"{page.name}: {target}#{heading}"


def anchors(page: Path) -> set[str]:
    """Return the names under which GitHub links a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_files_named_in_the_docs_exist() -> None:
    for page in PAGES:
        rooms = r"`(?:python )?((?:fedlth|tests|benchmarks|configs|simulations)/[\w./-]+)"
        for name in re.findall(rooms, page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_docs_say_how_a_federation_is_installed_into_the_environment_of_make_run() -> None:
    made, page = (ROOT / "Makefile").read_text(), (DOCS / "deploy.md").read_text()
    assert "VENV := .venv" in made and "python3 -m venv .venv" in page, "one place for both"
    (own,) = re.findall(r'^pip install -c constraints.txt --extra-index-url \S+ "\.\[(.*)\]"$', page, re.M)
    (added,) = re.findall(r'pip install -c constraints.txt -e "\.\[(.*)\]"$', page, re.M)
    assert added == own and "`make run`" in page.partition(f'-e ".[{added}]"')[0]
    assert re.search(r'-e "\.\[', made), "else the checkout would be installed as a copy in place of itself"


CONFIGS = sorted((ROOT / "configs").glob("**/*.yaml"))
LOTTERIES = [path for path in CONFIGS if "lottery" in schema.read_tree(path)]


@pytest.mark.parametrize("path", LOTTERIES, ids=lambda p: p.name)
def test_every_lottery_config_is_one(path: Path) -> None:
    made = lottery.load(path)
    runner.check(made)
    assert lottery.build(parse(lottery.dump(made), "dump")) == made


@pytest.mark.parametrize("path", [path for path in CONFIGS if path not in LOTTERIES], ids=lambda p: p.name)
def test_every_config_is_a_study_without_dead_sections(path: Path) -> None:
    experiment, notes = read(schema.load(path))
    assert not [note for note in notes if "no effect" in note]
    assert schema.build(parse(schema.dump(experiment.study), "dump")) == experiment.study


def test_the_listing_names_every_kind() -> None:
    text = catalogue.listing("")
    for kind in ("methods", "models", "datasets", "partitions", "finder", "arms", "engines"):
        assert kind in text


def test_every_key_of_a_study_is_documented() -> None:
    text = (DOCS / "study.md").read_text()
    for name, field in schema.Study.model_fields.items():
        inner = getattr(field.annotation, "model_fields", {})
        for key in inner:
            assert re.search(rf"`{name}\.[^|]*`|`{name}\.{key}`", text) and key in text, f"{name}.{key}"
        assert f"`{name}" in text, name


FINDERS = (DOCS / "finders.md").read_text()


def test_the_tables_of_finders_are_the_registry() -> None:
    for kind in catalogue.FINDER_KINDS:
        assert catalogue.finders_markdown(kind) in FINDERS, kind


@pytest.mark.parametrize("line", re.findall(r"^\| [^|`]+(?:`[^`]+`[^|]*)? \| `(\{.+\})` \|$", FINDERS, re.M))
def test_every_composition_with_a_name_is_a_finder(line: str) -> None:
    made = tiny.study(finder=parse(line, "finders.md"), federate={"rounds": 5, "clients_per_round": 2})
    assert not read(made)[1]


def test_the_parts_shown_in_the_docs_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(# mine.py.*?)```", (DOCS / "study.md").read_text(), re.S)
    assert code
    (tmp_path / "mine.py").write_text(code.group(1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # another test's file of this name
    study = tiny.study(
        finder={"score": {"name": "mine:Grown", "power": 2.0}, "densities": [0.3]}, partition={"name": "mine:Halves"}
    )
    run = tiny.run(study, tmp_path / "run")
    assert (run.root / "digests.json").exists()


def test_every_key_and_probe_of_a_lottery_study_is_documented() -> None:
    text = (DOCS / "lottery.md").read_text()
    for section, node in (("data", lottery.Data), ("model", lottery.Model), ("train", lottery.Train)):
        for key in node.model_fields:
            assert f"`{section}.{key}`" in text, f"{section}.{key}"
    for node in (lottery.Search, lottery.Arm):
        for key in node.model_fields:
            assert f"`{key}`" in text, key
    for name in [*PROBES, *MASKS]:
        assert f"`{name}`" in text, name


ROWS = ROOT / "simulations" / "lottery_rows"
RESULTS = {
    int(line.split("|")[1]): line
    for line in (ROWS / "results.md").read_text().splitlines()
    if line.split("|")[1].strip().isdigit()
}
EXPLAINED = {
    int(number): text
    for number, text in re.findall(
        r"^\*\*Row (\d+), (.*?)(?=^\*\*Rows? \d|^#|\Z)", (DOCS / "lottery.md").read_text(), re.M | re.S
    )
}


def test_every_row_is_explained() -> None:
    assert sorted(EXPLAINED) == sorted(RESULTS)


@pytest.mark.parametrize("row", RESULTS)
def test_what_the_docs_say_of_a_row_is_what_the_results_say(row: int) -> None:
    text = EXPLAINED[row]
    assert "*Found" in text and ("Not held" in text.split("**")[0]) is ("**not held**" in RESULTS[row])
    if "| not run |" in RESULTS[row]:
        return
    known = {abs(float(n)) for n in re.findall(r"\d+\.\d+", RESULTS[row])}
    for number in re.findall(r"\d+\.\d\d+", text):
        assert float(number) in known, f"row {row}: {number} is not in results.md"

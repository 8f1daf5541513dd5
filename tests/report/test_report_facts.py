"""Reading a run folder: what is there, what an unfinished run may lack, and errors that name the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_run import write_run

from fedlth.errors import StudyError
from fedlth.report.choice import Choice, densities, main_choice
from fedlth.report.facts import one_cell, read_group, read_run
from fedlth.report.headline import honest_notes, summary_text
from fedlth.report.results import results_of


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_whole_run_is_read(fake: Path) -> None:
    facts = read_run(fake)
    assert len(facts.metrics) == 20 * 24 and len(facts.tickets) == 20 and len(facts.rounds) == 30
    assert facts.notes == ()
    assert [saved.client for saved in facts.tickets] == list(range(20))


def test_without_saved_tickets_the_main_density_is_the_studys(fake: Path) -> None:
    facts = replace(read_run(fake), tickets=())
    assert main_choice([facts]) == Choice("ticket", 0.5), "the study names none"
    for main, density in (("0.1", 0.1), ("auto", 0.5), ("0.3", 0.5)):
        told = replace(facts, config=f"{facts.config}finder:\n  main: {main}\n")
        assert main_choice([told]) == Choice("ticket", density)


def test_seeds_stand_in_the_order_of_numbers(seeds: Path) -> None:
    assert [facts.header.seed for facts in read_group(seeds)] == [0, 1, 10]


def test_the_main_arm_is_the_saved_ticket(fake: Path) -> None:
    group = read_group(fake)
    assert main_choice(group) == Choice("ticket", 0.2)
    assert main_choice(group, arm="one_shot") == Choice("one_shot", 0.2)
    assert main_choice(group, arm="dense") == Choice("dense", 1.0)
    with pytest.raises(StudyError, match="expected an arm of ticket, .*, got 'nonesuch'"):
        main_choice(group, arm="nonesuch")
    with pytest.raises(StudyError, match="expected a density of 0.5, 0.2, 0.1, 0.05, got 0.3"):
        main_choice(group, density=0.3)


def test_an_arm_without_targets_is_one_cell(tmp_path: Path) -> None:
    for seed in (0, 1):
        run = write_run(tmp_path / f"seed-{seed}", seed=seed, num_clients=4, rounds=1)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        learnt = [
            row | {"arm": "own", "density": density, "target_density": density}
            for row, density in zip((row for row in rows if row["arm"] == "dense"), (0.4, 0.5, 0.6, 0.7), strict=True)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + learnt))
    found = read_group(tmp_path)
    assert densities(found, "own") == (pytest.approx(0.55),)
    assert densities(found, "ticket") == (0.5, 0.2, 0.1, 0.05)


def test_a_mean_of_equal_targets_is_the_target(fake: Path) -> None:
    """Row 6: the mean of six .2 is .19999999999999998."""
    facts = read_run(fake)
    kept = tuple(row for row in facts.metrics if row.arm == "ticket" and row.target_density == 0.2 and row.client < 6)
    assert sum([0.2] * 6) / 6 != 0.2
    (found,) = one_cell([replace(facts, metrics=kept)])
    assert densities([found], "ticket") == (0.2,)
    near = main_choice([found], density=float(np.nextafter(0.2, 1)))
    assert near == Choice("ticket", 0.2)


def test_a_method_s_own_model_stands_at_the_density_that_it_has(fake: Path) -> None:
    """Row 6, a brother: the target of a method's own model is 1, and it was shown as dense."""
    facts = read_run(fake)
    own = [replace(row, arm="own", density=0.25) for row in facts.metrics if row.arm == "dense"]
    (found,) = one_cell([replace(facts, metrics=(*facts.metrics, *own))])
    assert densities([found], "own") == (0.25,) and densities([found], "dense") == (1.0,)
    text = summary_text(results_of([found]))
    (line,) = [line for line in text.splitlines() if line.startswith("method's own ")]
    assert line.split()[2] == "0.25"


def test_an_arm_that_a_seed_lacks_is_noted(seeds: Path) -> None:
    first, *others = read_group(seeds)
    fewer = replace(first, metrics=tuple(row for row in first.metrics if row.arm != "local"))
    notes = honest_notes(results_of([fewer, *others]))
    assert "local-only model at 1: its mean is over 2 seeds of 3" in notes
    assert not any("seeds of 3" in note for note in honest_notes(results_of([first, *others])))


def test_an_unfinished_run_is_read_and_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=False, num_clients=8, rounds=4)
    (run / "metrics.jsonl").unlink()
    with (run / "ledger.jsonl").open("a") as file:
        file.write('{"round": 9, "pha')
    facts = read_run(run)
    assert facts.metrics == () and facts.ledger
    told = " ".join(facts.notes)
    assert "did not finish" in told and "half-written" in told and "metrics.jsonl is not there" in told


@pytest.mark.parametrize("name", ["header.json", "ledger.jsonl", "metrics.jsonl", "rounds.jsonl"])
def test_a_missing_or_corrupt_file_is_named(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run", num_clients=8, rounds=4)
    for content in (None, b"{", b"[]", b'"x"\n', b"{}\n", b"\xff\xfe"):
        (run / name).unlink(missing_ok=True)
        if content is not None:
            (run / name).write_bytes(content)
        if content is not None or name != "rounds.jsonl":  # a method without rounds leaves none
            with pytest.raises(StudyError, match=name.replace(".", r"\.")):
                read_run(run)


def test_a_wrong_type_names_line_and_field(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_clients=8, rounds=4)
    header = json.loads((run / "header.json").read_text())
    change(run / "header.json", layers=[*header["layers"], {"name": "fc"}])
    with pytest.raises(StudyError, match=r"header\.json: layers\[5\]: shape is required"):
        read_run(run)
    change(run / "header.json", layers=header["layers"])
    lines = (run / "ledger.jsonl").read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | {"payload_bytes": True})
    (run / "ledger.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(StudyError, match=r"ledger\.jsonl:3: payload_bytes must be int, got True"):
        read_run(run)


def test_a_corrupt_ticket_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_clients=8, rounds=4)
    (run / "tickets" / "client-0003.safetensors").write_bytes(b"nonsense")
    with pytest.raises(StudyError, match="client-0003"):
        read_run(run)


def test_a_group_of_two_studies_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "seed-0", num_clients=8, rounds=2)
    write_run(tmp_path / "seed-1", seed=1, study="another", num_clients=8, rounds=2)
    with pytest.raises(StudyError, match="compare"):
        read_group(tmp_path)


def test_a_folder_without_runs_and_another_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="got no header.json"):
        read_group(tmp_path)
    with pytest.raises(StudyError, match="nothing there"):
        read_group(tmp_path / "nowhere")
    run = write_run(tmp_path / "run", num_clients=8, rounds=2)
    change(run / "header.json", format=2)
    with pytest.raises(StudyError, match="format must be 1, got 2"):
        read_run(run)

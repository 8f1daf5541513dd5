"""fedlth audit: what masks disclose is found where it is, and not where it is not; a stop changes nothing."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth import api, cli
from fedlth.errors import StudyError
from fedlth.privacy import audit as audits
from fedlth.privacy.label_inference import Masks, matches, output_layer
from fedlth.privacy.measure import matched
from fedlth.privacy.ridge import counts, fitted, hits
from fedlth.privacy.secure_sum import coverage
from fedlth.privacy.shadows import present, shadow_task
from fedlth.privacy.subject import subject_of
from fedlth.report.audit import audit_text
from fedlth.report.audit_statistics import auc, defended, found_at, linked, membership, scores
from fedlth.report.facts import read_group
from fedlth.report.privacy import privacy_card
from fedlth.storage.audit_records import ALL, AUDIT, COMMON, HIDDEN, NONE, PRIVATE, SHUFFLED, Audit
from tests import tiny

SECTIONS: dict[str, Any] = {
    "data": {"name": "tests.audit_data:images"},
    "partition": {"name": "classes", "classes_per_client": 2},
    "clients": {"count": 12, "unseen": 0.0, "test_samples": 20, "validation": 0.1},
    "model": {"name": "mlp", "options": {"hidden": [16]}},
    "federate": {"rounds": 1, "clients_per_round": 12},
    "finder": {"schedule": "one_shot", "densities": [0.3]},
    "personalise": {"epochs": 3, "arms": ["ticket"], "clients_per_wave": 12},
    "workers": 1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.run(tiny.study(**SECTIONS), tmp_path_factory.mktemp("audit") / "run").root


@pytest.fixture(scope="module")
def found(run: Path) -> Audit:
    return api.audit(run, shadows=40)


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns(AUDIT))
    return folder


def test_classes_are_read_from_the_bits_of_a_shared_init_alone(found: Audit) -> None:
    """The attack can fail, and does: with shuffled labels, one mask for all, or weights that nobody shares."""
    told = scores(found.guesses)
    assert told[NONE, ALL].mean > 0.9 and told[NONE, HIDDEN].mean > 0.9 and told[NONE, ALL].chance == 0.25
    assert abs(told[NONE, SHUFFLED].mean - 0.25) < 0.15
    assert abs(told[COMMON, ALL].mean - 0.25) < 0.15
    assert told[PRIVATE, ALL].mean < 0.55 and told["randomised response 0.45", ALL].mean < 0.6
    assert told["randomised response 0.05", ALL].mean > 0.9, "noise on single bits is a weak defence"


def test_defences_have_a_price(found: Audit) -> None:
    price = {one.name: one for one in defended(found)}
    assert price["randomised response 0.1"].epsilon == pytest.approx(2.197, abs=1e-3) and price[NONE].epsilon is None
    assert price[NONE].density == pytest.approx(0.3, abs=0.01) and price[COMMON].mask_bytes == 0
    assert price["randomised response 0.3"].density == pytest.approx(0.3 + 0.3 * 0.4, abs=0.03)
    assert price["randomised response 0.3"].mask_bytes > price[NONE].mask_bytes  # type: ignore[operator]
    assert all(one.accuracy is not None and one.diverged == 0 for one in price.values())


def test_a_mask_is_recognised_and_members_are_as_many_as_others(found: Audit) -> None:
    link = linked(found)
    assert link is not None and link.share > 0.8 and link.chance == pytest.approx(1 / 12) and link.own > link.best_other
    told = {(one.model, one.attack): one for one in membership(found)}
    assert {model for model, _ in told} == {"ticket", "dense twin"} and len(told) == 4
    assert all(one.examples == one.others and 0.3 < one.auc < 0.9 for one in told.values())


def test_the_runs_own_ticket_is_found_again(run: Path) -> None:
    """Shadows are trained as clients are: the same code gives, on a client's data, the mask that the client has."""
    subject = subject_of(str(run.resolve()))
    for client in (0, 7):
        step = subject.step(subject.task, client, "personalise")
        assert np.array_equal(subject.mask(step), subject.states[client].masks["ticket"])


def test_shadows_have_profiles_of_clients_and_no_training_example(run: Path) -> None:
    task = subject_of(str(run.resolve())).task
    shadows = shadow_task(task, 0, 20)
    counts_of = {tuple(sorted(np.bincount(task.dataset.y_train[c.train]))) for c in task.splits.clients}
    for i, one in enumerate(shadows.splits.clients):
        assert np.count_nonzero(present(shadows, i)) == 2 and len(one.train)
        assert len(one.train) in {len(c.train) for c in task.splits.clients}
        assert set(one.train) | set(one.val) <= set(range(len(task.dataset.y_test)))
    assert counts_of and np.array_equal(shadows.dataset.x_train, task.dataset.x_test)
    more = shadow_task(task, 0, 30)
    assert np.array_equal(more.splits.clients[3].train, shadows.splits.clients[3].train), "more shadows: the same first"


def test_a_stop_and_workers_change_nothing(run: Path, found: Audit, tmp_path: Path) -> None:
    whole, cut = copied(run, tmp_path / "whole"), copied(run, tmp_path / "cut")
    told = api.audit(whole, shadows=10, victims=3, workers=2)
    original, made = audits.measured, list[int]()

    def dies(*args: Any) -> Any:
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(1)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audits, "measured", dies)
        with pytest.raises(KeyboardInterrupt):
            api.audit(cut, shadows=10, victims=3, workers=1)
    names = sorted(path.name for path in (cut / AUDIT / "clients").iterdir())
    assert len(names) == 4
    (cut / AUDIT / "clients" / names[0]).write_bytes(b"half")
    again = api.audit(cut, shadows=10, victims=3, workers=1)
    assert (again.guesses, again.prices, again.matches) == (told.guesses, told.prices, told.matches)
    files = sorted((whole / AUDIT / "clients").iterdir())
    assert len(files) == 13
    for path in files:
        assert path.read_bytes() == (cut / path.relative_to(whole)).read_bytes(), path.name
    victim = next(path for path in (whole / AUDIT / "clients").glob("victim-*"))
    assert victim.read_bytes() == (run / victim.relative_to(whole)).read_bytes(), "fewer shadows change no victim"


def test_the_command_writes_what_it_says(
    run: Path, found: Audit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    assert cli.main(["audit", str(folder), "--shadows", "40", "--workers", "1"]) == 0
    out = capsys.readouterr()
    assert "Classes read from mask bits" in out.out and "52 clients to measure, 52 done" in out.err
    told = json.loads((folder / AUDIT / "audit.json").read_text())
    rows = {(one["defence"], one["attack"]): one for one in told["label_inference"]}
    assert rows[NONE, ALL]["mean"] == scores(found.guesses)[NONE, ALL].mean and told["shadows"] == 40
    with (folder / AUDIT / "audit.csv").open() as file:
        values = {(row["what"], row["of"], row["attack"]): row for row in csv.DictReader(file)}
    assert float(values["classes right", NONE, ALL]["value"]) == rows[NONE, ALL]["mean"]
    assert audit_text(found).splitlines()[0] in (folder / AUDIT / "audit.md").read_text()
    assert (folder / AUDIT / "label_inference.png").read_bytes().startswith(b"\x89PNG")
    card = " ".join(privacy_card(read_group(folder)))
    assert "Audit of seed 0: from the bits of a ticket's mask alone an attacker names 100.0 % of the client's" in card
    assert "Personal masks, where a client finds a ticket at the end, stay with it" in card
    assert (
        "metrics.jsonl holds every client's results, header.json its label counts, state/" in card
        and "Defence of masks: none" in card
    )
    assert "Not audited" in " ".join(privacy_card(read_group(copied(run, tmp_path / "other"))))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"method": {"name": "lotteryfl"}, "finder": {}, "personalise": {"arms": None}}, "must be a run with the arm"),
        ({"finder": {"densities": [1.0]}}, "expected sparse tickets"),
        ({"model": {"name": "mlp", "options": {"hidden": [16]}, "personal": ["@head"]}}, "must exchange and train"),
    ],
)
def test_what_cannot_be_audited_is_refused(sections: dict[str, Any], words: str, tmp_path: Path) -> None:
    small = {"clients": {"count": 4, "unseen": 0.0}, "federate": {"rounds": 1, "clients_per_round": 2}}
    tiny.run(tiny.study(**{**SECTIONS, **small, **sections}), tmp_path / "r")
    with pytest.raises(StudyError, match=words):
        api.audit(tmp_path / "r", shadows=10)


def test_mistakes_name_their_place(run: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="--shadows must be at least 10, got 3"):
        api.audit(run, shadows=3)
    with pytest.raises(StudyError, match="--victims must be at least 2, got 1"):
        api.audit(run, victims=1)
    with pytest.raises(StudyError, match="expected a run's folder, got no run"):
        api.audit(tmp_path)
    unfinished = copied(run, tmp_path / "unfinished")
    told = json.loads((unfinished / "header.json").read_text())
    (unfinished / "header.json").write_text(json.dumps({**told, "finished": False}))
    with pytest.raises(StudyError, match="must have ended"):
        api.audit(unfinished)


def test_ridge_is_the_primal_solution_and_leaves_one_out() -> None:
    rng = np.random.default_rng(0)
    bits, new, y = rng.random((12, 40)) < 0.4, rng.random((5, 40)) < 0.4, rng.random((12, 3))
    whole = [slice(0, 15), slice(15, 40)]
    fit = fitted(counts(bits, bits, whole), y)
    centre = bits.mean(axis=0)
    x = bits - centre
    penalty = fit.strength * float(np.trace(x @ x.T)) / 12
    weights = np.linalg.solve(x.T @ x + penalty * np.eye(40), x.T @ (y - y.mean(axis=0)))
    wanted = (new - centre) @ weights + y.mean(axis=0)
    np.testing.assert_allclose(fit.scores(counts(new, bits, whole)), wanted, atol=1e-9)


def test_measures_on_four_numbers() -> None:
    inside, outside = np.array([3.0, 1.0]), np.array([2.0, 1.0])
    assert auc(inside, outside) == (1 + 1 + 0 + 0.5) / 4
    assert found_at(inside, outside, 0.01) == 0.5 and found_at(np.arange(100.0), np.arange(100.0), 0.01) == 0.01
    assert hits(np.array([0.1, 0.9, 0.9, 0.0]), np.array([False, True, False, True])) == 1
    assert hits(np.zeros(4), np.array([True, False, False, False])) == 1, "of equal scores the lower class"


def test_chance_counts_the_masks_that_one_is_compared_with(found: Audit) -> None:
    bits = np.eye(4, dtype=bool)
    first = Masks((0, 1, 2, 3), bits, bits)
    again = Masks((1, 3), bits[[1, 3]], bits[[1, 3]])  # the second searches of two have diverged
    told = linked(replace(found, matches=tuple(matches(first, again))))
    assert told is not None and (told.share, told.chance, told.victims) == (1.0, 0.25, 2)


def test_members_and_others_are_of_the_same_classes(run: Path) -> None:
    task = subject_of(str(run.resolve())).task
    member, other = matched(task, 2, 0)
    split = task.splits.clients[2]
    own, others = task.dataset.y_train[split.train][member], task.dataset.y_test[split.test][other]
    assert len(member) and np.array_equal(np.sort(own), np.sort(others)) and len(set(other)) == len(other)


def test_the_output_layer_has_a_row_a_class(run: Path) -> None:
    layout = subject_of(str(run.resolve())).task.layout
    found = output_layer(layout, 8)
    assert found is not None and found.shape == (8, 16) and output_layer(layout, 9) is None


def test_what_a_secure_sum_would_cost(found: Audit) -> None:
    """On four weights by hand, and for the cohorts of the run: twelve clients a round, tickets of a density of .3."""
    masks = [np.array(bits, bool) for bits in ([1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0])]
    one = coverage("refine", 2, masks, rest=3)
    assert (one.clients, one.density, one.union, one.alone, one.few) == (3, 0.5, 0.75, 1 / 3, 2 / 3)
    assert (one.common_bytes, one.union_bytes, one.dense_bytes) == (12, 14, 16)  # of 18 bits: 5, 6 and 7 numbers
    assert [(c.phase, c.round, c.clients) for c in found.coverages] == [("federate", 1, 12)]
    told = found.coverages[0]
    assert told.density == pytest.approx(0.3, abs=0.01) and told.density < told.union < 1 and 0 < told.alone < told.few
    assert told.common_bytes < told.union_bytes < told.dense_bytes
    assert "What a secure sum over tickets would cost" in audit_text(found)


def test_secure_aggregation_is_refused_and_says_why() -> None:
    with pytest.raises(StudyError, match="has no secure_aggregation: of masks that differ a sum shows what one client"):
        tiny.study(privacy={"secure_aggregation": True})

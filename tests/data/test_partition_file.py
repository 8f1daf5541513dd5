"""A division as a file: what is read, what is drawn beside it, what is refused, and that a study's own comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth.cli import main
from fedlth.data.divided import divided, loaded, write_division
from fedlth.data.split import Splits
from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.experiment.resolve import read, resolve
from fedlth.federation import session
from fedlth.study import schema
from tests import tiny

OWN = {"count": 2, "unseen": 0.0, "test": "own", "validation": 0.25}


def split_by(path: Path, content: Any, **clients: Any) -> Splits:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    study = tiny.study(partition={"name": "file", "path": str(path)}, clients={**OWN, **clients})
    return divided(loaded(study.data), study.partition, study.clients)[1]


def test_parts_are_taken_as_they_are_and_what_is_missing_is_drawn(tmp_path: Path) -> None:
    content = {
        "clients_test": "own",
        "clients": [{"train": [5, 3, 9], "val": [7], "test": [0, 2]}, {"train": list(range(20, 30)), "test": [40]}],
    }
    one, other = split_by(tmp_path / "p.json", content).clients
    assert [part.tolist() for part in (one.train, one.val, one.test)] == [[3, 5, 9], [7], [0, 2]]
    assert len(other.val) == 2 and sorted([*other.train, *other.val]) == list(range(20, 30))
    assert other.test.tolist() == [40]


def test_the_plain_form_names_a_clients_examples(tmp_path: Path) -> None:
    result = split_by(tmp_path / "p.json", {"clients": [list(range(10)), list(range(10, 30))]})
    for client, size in zip(result.clients, (10, 20), strict=True):
        assert len(client.test) == size // 5 and len(client.val) == round(0.25 * (size - size // 5))
    assert result.given == frozenset()


def test_tests_of_the_split_may_overlap_among_clients(tmp_path: Path) -> None:
    content = {"clients_test": "split", "clients": [{"train": [0, 1], "test": [5, 6]}, {"train": [2, 3], "test": [5]}]}
    result = split_by(tmp_path / "p.json", content, test="split")
    assert [client.test.tolist() for client in result.clients] == [[5, 6], [5]]


WRONG: list[tuple[Any, str]] = [
    ("{", "cannot be read as JSON"),
    ([], "must be an object with a list of clients"),
    ({"clients": [[1], [2]], "more": 1}, "must be an object with a list of clients and at most"),
    ({"clients": [[1, 2, 3]]}, "must return 2 clients, got 1"),
    ({"clients": [[1, 2, 3], [3, 4, 5]]}, "clients must not share training examples, got position 3 .* for client 1"),
    ({"clients": [[1, 2, 3], [4, 4, 5]]}, r"clients.1.train: must hold each position once"),
    ({"clients": [[1, 2, 3], [4, 5, 240]]}, r"client 1 must get positions in \[0, 240\), got 4 to 240"),
    ({"clients": [[1, 2, 3], [4, 5, True]]}, r"clients.1.train: must be a list of whole numbers .*, got True$"),
    ({"clients": [[1, 2, 3], [4, 5, -1]]}, r"clients.1.train: must be a list of whole numbers .*, got -1$"),
    ({"clients": [[1, 2, 3], [4, 5, 6.0]]}, r"clients.1.train: must be a list of whole numbers .*, got 6.0$"),
    ({"clients": [[1, 2, 3], 4]}, r"clients.1: must be a list of positions, or an object"),
    ({"clients": [[1, 2, 3], {"val": [4]}]}, r"clients.1: must be a list of positions, or an object with train"),
    ({"clients": [[1, 2, 3], []]}, "client 1 must have at least 1 train and 1 validation and 1 test example, got 0"),
    ({"clients": [[1, 2, 3], {"train": [4], "test": [5]}]}, "clients_test: must be own or split"),
    ({"clients_test": "split", "clients": [[1, 2], [3, 4]]}, "clients.test must be split, as .* was made with"),
    ({"clients_test": "all", "clients": []}, "clients_test must be own or split, got 'all'"),
    ({"data_digest": "00", "clients": [[1, 2, 3], [4, 5, 6]]}, "is of the data 00, got data with the digest"),
    ({"unseen": [1], "clients": [[1, 2, 3], [4, 5, 6]]}, "clients.unseen: must be the share that gives the 1 unseen"),
    ({"clients_test": "own", "clients": [[1, 2, 3], {"train": [4], "val": [], "test": [5]}]},
     "client 1 must have at least 1 validation example, got 0"),
    ({"clients_test": "own", "clients": [[1, 2, 3], {"train": [4], "val": [6], "test": []}]},
     "client 1 must have at least 1 test example, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(StudyError, match=message) as caught:
        split_by(tmp_path / "p.json", content)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"partition.path: .*none.json cannot be read"):
        read(tiny.study(partition={"name": "file", "path": str(tmp_path / "none.json")}))


STUDIES: list[dict[str, Any]] = [
    {},
    {"clients": {"test": "own"}, "data": {"pool": True}},
    {"clients": {"validation": 0, "unseen": 0.5}, "partition": {"name": "dirichlet", "alpha": 0.5, "seed": 3}},
    {"clients": {"label_noise": {"rate": 0.3}}, "partition": {"seed": 4}},
]


@pytest.mark.parametrize("sections", STUDIES)
def test_a_studys_division_comes_back_from_its_file(tmp_path: Path, sections: dict[str, Any]) -> None:
    study, file = tiny.study(**sections), tmp_path / "p.json"
    splits = write_division(study, file)
    again = {"name": "file", "path": str(file), "seed": study.partition.get("seed", 0)}
    made = divided(loaded(study.data), again, study.clients)[1]
    assert made.digest == splits.digest and made.unseen == splits.unseen and made.noisy == splits.noisy
    for one, other in zip(splits.clients, made.clients, strict=True):
        for part in ("train", "val", "test"):
            assert np.array_equal(getattr(one, part), getattr(other, part))
    with pytest.raises(StudyError, match="exists already"):
        write_division(study, file)


def test_the_command_prints_the_digest_that_the_run_then_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, file = tmp_path / "s.yaml", tmp_path / "p.json"
    study.write_text(schema.dump(tiny.study()))
    assert main(["partition", str(study), str(file), "clients.test=own"]) == 0
    digest = tiny.study(clients={"test": "own"})
    made = divided(loaded(digest.data), digest.partition, digest.clients)[1].digest
    shown = capsys.readouterr().out
    assert f"partition digest {made}" in shown and "4 clients (1 unseen)" in shown
    assert main(["partition", str(study), str(file)]) == 2
    told = capsys.readouterr().err
    assert "exists already" in told


def test_a_run_pins_its_file_and_a_resume_with_another_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    write_division(tiny.study(), file)
    study = tiny.study(partition={"name": "file", "path": str(file)}, method={"name": "fedavg"})
    folder = tiny.run(study, tmp_path / "run")
    assert tiny.task_of(folder.root).splits.digest == tiny.experiment(tiny.study()).task.splits.digest
    session.resume(folder.root, InProcess())
    content = json.loads(file.read_text())
    content["clients"][0]["train"].pop()
    file.write_text(json.dumps(content))
    header = json.loads((folder.root / "header.json").read_text())
    (folder.root / "header.json").write_text(json.dumps({**header, "finished": False}))
    from fedlth.data.divided import opened
    from fedlth.experiment.experiment import _opened
    from fedlth.training.task import forget_tasks

    forget_tasks()
    opened.cache_clear()
    _opened.cache_clear()
    with pytest.raises(StudyError, match=r"partition.path: .* must have the sha256 [0-9a-f]{64}, got another file"):
        session.resume(folder.root, InProcess())
    changed = resolve(study)[0].task.splits  # a new run reads the new file, whatever this process has cached
    assert len(changed.clients[0].train) == len(content["clients"][0]["train"])


def test_settings_that_a_file_makes_idle_are_said(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    write_division(tiny.study(), file)
    study = tiny.study(partition={"name": "file", "path": str(file)}, clients={"validation": 0.3})
    notes = resolve(study)[1]
    assert "clients.validation: has no effect, the partition gives each client's val part" in notes
    assert "clients.test_samples: has no effect, the partition gives each client's test part" in notes

"""`compute: auto`: what is decided of measured times, where the answer is kept, and what a run records of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba")
pytestmark = pytest.mark.timeout(600)  # the first use on a machine compiles

from fedlth import api  # noqa: E402
from fedlth.data.tensors import inputs  # noqa: E402
from fedlth.experiment.resolve import resolve  # noqa: E402
from fedlth.forecast import forecast  # noqa: E402
from fedlth.kernel import kernel  # noqa: E402
from fedlth.storage.run_folder import RunFolder  # noqa: E402
from fedlth.study import schema  # noqa: E402
from fedlth.study.compute_section import Crossovers  # noqa: E402
from fedlth.training import answer_file, backend_choice  # noqa: E402
from fedlth.training.backend_choice import decided  # noqa: E402
from fedlth.training.kept_crossover import kept_below  # noqa: E402
from tests import tiny  # noqa: E402

MODEL = {"name": "tests.training.test_choice:group_norm", "options": {}}
NORMED = {"name": "tests.training.test_choice:batch_norm", "options": {}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where answers are kept."""
    place = tmp_path / "answers"
    place.mkdir()
    monkeypatch.setattr(answer_file, "_folder", lambda: place)
    return place


def cost(reference: float, tuned: float, dense: float, **inside: float) -> dict[Any, float]:
    """Return times of torch and of the kernel, inside tickets by density and examples side by side, as d20_16."""
    found = {("reference", 1.0, 0): reference, ("tuned", 1.0, 0): tuned, ("sparse", 1.0, 0): dense}
    for key, seconds in inside.items():
        density, side = key[1:].split("_")
        found["sparse", int(density) / 100, int(side)] = seconds
    return found


def times(monkeypatch: pytest.MonkeyPatch, *, torch: float, kernel: float) -> None:
    """Have the backends take so long, inside tickets a tenth of it, and every layer's list begin at .3."""

    def told(runs: Mapping[Any, Any], cpu_s: float) -> dict[Any, float]:
        each = {"reference": 2 * torch, "tuned": torch, "sparse": kernel}
        return {key: each[key[0]] * (0.1 if key[0] == "sparse" and key[1] < 1 else 1.0) for key in runs}

    monkeypatch.setattr(backend_choice, "in_turns", told)
    monkeypatch.setattr(backend_choice, "lists_below", lambda table, *_: (0.3,) * sum(op.weighted for op in table.ops))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (cost(9, 8, 4, d20_16=1, d20_32=2), ("sparse", None, 0.6)),
        (cost(9, 8, 8.1, d20_16=1, d20_32=0.9), ("sparse", None, 0.0)),  # within what is no difference
        (cost(9, 8, 9, d20_16=8.5, d20_32=8.4), ("tuned", None, 0.6)),
        (cost(7, 8, 9, d20_16=7.5, d20_32=9), ("reference", None, 0.6)),
        (cost(9, 8, 10, d20_16=4, d20_32=5), ("sparse", 0.77, 0.6)),
        (cost(9, 8, 10, d20_16=4, d50_16=9), ("sparse", 0.54, 0.75)),
        (cost(9, 8, 8.2, d20_16=8.16), ("sparse", 0.31, 0.6)),  # of two that lose, the nearer one is as good
    ],
)
def test_the_fastest_is_decided_by_the_times(given: dict[Any, float], wanted: tuple[str, float | None, float]) -> None:
    shares = {density: density + 0.1 for _, density, side in given if side}
    assert decided(given, shares) == pytest.approx(wanted)


def test_masks_cost_torch_something_too() -> None:
    given, shares = cost(9, 8, 9, d50_32=8.5), {0.5: 0.6}
    assert decided(given, shares)[0] == "tuned"
    assert decided({**given, ("tuned", 0.5, 0): 9.0}, shares)[:2] == ("sparse", 0.73)


def test_a_run_records_what_was_measured_and_a_resume_keeps_it(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"federate": {"rounds": 1, "clients_per_round": 1}, "personalise": {"arms": ["global"]}}
    made = tiny.study(model=MODEL, compute="auto", seeds=[0, 1], out=str(tmp_path / "run"), workers=1, **short)
    times(monkeypatch, torch=4.0, kernel=5.0)
    real, ended = api.drive, list[Path]()

    def drive(experiment: Any, place: Path, **more: Any) -> None:
        if ended:
            raise KeyboardInterrupt
        real(experiment, place, **more)
        ended.append(place)

    with monkeypatch.context() as patch:
        patch.setattr(api, "drive", drive)
        with pytest.raises(KeyboardInterrupt):
            api.run(made)
    # Another machine, on which the kernel is never the faster.
    times(monkeypatch, torch=1.0, kernel=50.0)
    for file in folder.iterdir():
        file.unlink()
    assert resolve(made)[0].study.compute == "tuned"
    api.resume(tmp_path / "run")
    first, second = (RunFolder(tmp_path / "run" / name).study() for name in ("seed-0", "seed-1"))
    assert first.compute == "sparse" and first.crossovers == second.crossovers
    assert first.crossovers is not None and first.crossovers.torch == "tuned"
    assert set(first.crossovers.sparse_below.values()) == {0.3} and first.crossovers.torch_above is not None
    task = tiny.experiment(first).task
    assert not isinstance(task.table, str) and task.table.torch_above == first.crossovers.torch_above
    assert task.flat_model.forward.note.startswith("channels_last"), "what is dense, torch trains as it was measured"
    assert not kernel.suits(task.flat_model.table, None)


def test_what_was_measured_is_measured_once_and_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, torch=4.0, kernel=2.0)
    text = forecast(tiny.study(model=MODEL, compute="auto", finder={"densities": [0.5, 0.2]}))
    assert "compute: sparse, the kernel is the fastest here" in text
    assert "reference 8e+03, tuned 4e+03 (4e+03 at density 0.2), sparse 2e+03 (200 at density 0.5, 200 at" in text
    assert "convolution: 1x8x8 -> 4x6x6, a list of kept weights below density 0.3" in text
    monkeypatch.setattr(backend_choice, "in_turns", lambda *_: pytest.fail("it is known"))
    for more in ({"seed": 3}, {"partition": {"name": "iid", "seed": 3}}, {"train": {"lr": 0.3}}):
        made, notes = resolve(tiny.study(model=MODEL, compute="auto", finder={"densities": [0.5, 0.2]}, **more))
        assert made.study.compute == "sparse" and any("sparse 2e+03" in note for note in notes)
    for more in ({"train": {"batch_size": 7}}, {"finder": {"densities": [0.5]}}, {"model": NORMED}):
        with pytest.raises(pytest.fail.Exception):
            resolve(tiny.study(**{"model": MODEL, "compute": "auto", "finder": {"densities": [0.5, 0.2]}, **more}))


def test_torch_alone_is_measured_where_the_kernel_cannot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, torch=-1.0, kernel=2.0)  # reference -2, tuned -1
    made, notes = resolve(tiny.study(model=NORMED, compute="auto"))
    assert made.study.compute == "reference" and made.study.crossovers is None
    assert any("compute: reference, because the kernel cannot run" in note for note in notes)
    monkeypatch.setattr(backend_choice, "in_turns", lambda *_: pytest.fail("both forms are one"))
    made, notes = resolve(tiny.study(model="mlp", train={"optimizer": "adam", "momentum": 0.0}, compute="auto"))
    assert made.study.compute == "tuned" and any("nothing of the network" in note for note in notes)


def test_lists_in_torch_are_chosen_where_a_ticket_is_faster_with_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_choice, "kept_below", lambda *_: {"head.weight": 0.4})
    given = {"model": NORMED, "compute": "auto", "finder": {"densities": [0.5, 0.2]}}
    times(monkeypatch, torch=4.0, kernel=2.0)
    made, notes = resolve(tiny.study(**given))
    assert made.study.compute == "sparse" and made.study.crossovers is not None
    assert made.study.crossovers.torch == "tuned" and made.study.crossovers.sparse_below == {"head.weight": 0.4}
    assert any("its layers are faster here over a ticket's kept weights" in note for note in notes)
    assert any("tuned 4e+03 (4e+03 at density 0.2), sparse (200 at density 0.2)" in note for note in notes)
    model = tiny.experiment(made.study).task.flat_model
    assert model.kept == {"head.weight": 0.4} and model.forward.note.startswith("channels_last")
    assert model.table is None
    times(monkeypatch, torch=4.0, kernel=38.0)  # which the lists would cost
    for file in folder.iterdir():
        file.unlink()
    made, notes = resolve(tiny.study(**given))
    assert made.study.compute == "tuned" and made.study.crossovers is None
    assert any("sparse (3.8e+03 at density 0.2" in note for note in notes)


def test_layers_are_measured_in_the_form_that_a_batch_gives_them() -> None:
    task = tiny.experiment(tiny.study(model=NORMED)).task
    few = inputs(task.dataset, task.few, train=True)
    below = kept_below(task.flat_model, few.batch(slice(None)), 0.01)
    assert list(below) == ["conv.weight", "head.weight"] and all(0 <= one <= 1 for one in below.values())
    assert not any(layer._forward_pre_hooks for layer in task.flat_model.module.modules())


def test_it_measures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No fake times: whatever is chosen, all are tried and recorded."""
    monkeypatch.setattr(backend_choice, "_LAYERS_S", 0.01)
    monkeypatch.setattr(backend_choice, "_STEPS_S", 0.01)
    made, notes = resolve(tiny.study(model=MODEL, compute="auto"))
    (file,) = folder.iterdir()
    kept = json.loads(file.read_text())
    assert kept["compute"] == made.study.compute and any(kept["times"] in note for note in notes)
    for backend in ("reference", "tuned", "sparse"):
        assert f"{backend} " in kept["times"]


def test_a_damaged_answer_or_no_place_for_one_is_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = list[int]()

    def ask(question: str = "q") -> int:
        return answer_file.kept_answer(question, lambda made: int(made["n"]), lambda: measured.append(1) or 7, vary)

    def vary(answer: int) -> dict[str, int]:
        return {"n": answer}

    assert ask() == ask() == 7 and len(measured) == 1
    (file,) = folder.iterdir()
    for text in ("", "{", "[]", "{}", '{"n": "x"}', '{"n": null}'):
        measured.clear()
        file.write_text(text)
        assert ask() == ask() == 7 and len(measured) == 1, text
    ask("another")
    monkeypatch.setattr(answer_file, "_machine", lambda: "another")
    ask()
    assert len(list(folder.iterdir())) == 3
    for place in (None, folder / "none"):
        measured.clear()
        monkeypatch.setattr(answer_file, "_folder", lambda place=place: place)
        assert ask() == ask() == 7 and len(measured) == 2


def test_of_two_that_measure_at_once_the_first_is_believed(folder: Path) -> None:
    def measure() -> int:
        answer_file.kept_answer("q", int, lambda: 1, int)  # another process, meanwhile
        return 2

    assert answer_file.kept_answer("q", int, measure, int) == 1


def test_the_folder_is_where_one_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    assert answer_file._folder() == tmp_path / "numba"
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(answer_file, "_SOURCE", tmp_path / "file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert answer_file._folder() == tmp_path / "home" / "fedlth"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert answer_file._folder() is None


def test_a_study_without_crossovers_is_the_text_that_it_was() -> None:
    made = tiny.study(compute="sparse")
    assert "crossovers" not in json.loads(made.science())
    given = Crossovers(torch="tuned", torch_above=None, narrow_below=0.5, sparse_below={"0.weight": 0.4})
    with_them = made.model_copy(update={"crossovers": given})
    assert schema.build(json.loads(with_them.science())).crossovers == given
    assert schema.build(schema.parse(schema.dump(with_them, given_only=True), "dump")).crossovers == given

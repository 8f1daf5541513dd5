"""Ticket overlap on masks of four weights, and the permutation test's two laws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_run import write_run

from fedlth.errors import StudyError
from fedlth.report.facts import read_group, read_run
from fedlth.report.headline import overlapping
from fedlth.report.overlap import Masks, chance, jaccard, label_similarity, mantel, overlap
from fedlth.report.results import results_of


def masks(*rows: list[int], clients: int) -> Masks:
    bits = np.array(rows, dtype=np.uint8)
    return Masks(tuple(range(clients)), {"w": np.packbits(bits, axis=1)}, {"w": bits.shape[1]})


def test_jaccard_of_four_weights() -> None:
    found = jaccard(masks([1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], clients=3))
    assert found == pytest.approx(np.array([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]]))


def test_chance_agrees_with_random_masks() -> None:
    rng = np.random.default_rng(0)
    sizes, kept = {"a": 4000, "b": 8000}, {"a": 3000, "b": 400}
    packed = {}
    for name, size in sizes.items():
        rows = np.stack([rng.permutation(np.arange(size) < kept[name]) for _ in range(6)])
        packed[name] = np.packbits(rows, axis=1)
    found = Masks(tuple(range(6)), packed, sizes)
    above = np.triu_indices(6, 1)
    assert jaccard(found)[above].mean() == pytest.approx(chance(found)[above].mean(), rel=0.01)
    density = 3400 / 12000
    assert chance(found)[0, 1] > 2 * density / (2 - density)  # layers alone explain much


def test_chance_in_one_layer_is_the_plain_one() -> None:
    found = chance(masks([1, 1, 0, 0], [0, 1, 1, 0], clients=2))
    assert found[0, 1] == pytest.approx(0.5 / 1.5)


def test_label_similarity_of_four() -> None:
    found = label_similarity(np.array([[4, 0], [0, 4], [2, 2], [1, 3]]))
    assert found[0] == pytest.approx([1, 0, 0.5, 0.25]) and found[2, 3] == pytest.approx(0.75)


def test_the_test_sees_structure_and_not_its_absence(tmp_path: Path) -> None:
    structured = overlap(read_run(write_run(tmp_path / "a", rounds=1)))
    plain = overlap(read_run(write_run(tmp_path / "b", rounds=1, structured=False)))
    assert structured is not None and plain is not None
    assert structured.test.p_value == 1e-4 and structured.test.correlation > 0.5
    assert plain.test.p_value > 0.05
    # a shared start lifts both above chance: that alone is no sign of like data
    assert (plain.pairs(plain.jaccard) > plain.pairs(plain.chance)).all()


def test_shuffled_clients_lose_the_correlation() -> None:
    rng = np.random.default_rng(1)
    alike = label_similarity(np.eye(5, dtype=np.int64)[np.arange(20) % 5])
    noise = rng.normal(0, 0.01, (20, 20))
    shared = 0.2 + 0.3 * alike + noise + noise.T
    assert mantel(shared, alike, permutations=999).p_value == 0.001
    order = rng.permutation(20)
    assert mantel(shared[np.ix_(order, order)], alike, permutations=999).p_value > 0.05


def test_under_the_null_small_p_is_rare() -> None:
    rng = np.random.default_rng(2)
    found = []
    for _ in range(60):
        one, two = (lambda m: m + m.T)(rng.random((8, 8))), (lambda m: m + m.T)(rng.random((8, 8)))
        found.append(mantel(one, two, permutations=199).p_value)
    assert np.mean(np.array(found) <= 0.05) < 0.15


@pytest.mark.parametrize("num", [1, 3, 6])
def test_where_it_is_not_defined_it_says_so(num: int) -> None:
    found = mantel(np.random.default_rng(0).random((num, num)), np.ones((num, num)))
    assert np.isnan(found.p_value) and found.permutations == 0


def test_density_by_layer_is_exact(fake: Path) -> None:
    found = overlap(read_run(fake))
    assert found is not None
    assert list(found.layer_density) == ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]
    assert found.layer_density["fc2.weight"] == pytest.approx(np.full(20, 0.5))


def test_a_mask_of_the_wrong_size_is_named(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    run = write_run(tmp_path / "run", num_clients=8, rounds=1)
    path = run / "tickets" / "client-0002.safetensors"
    tensors = load_file(path)
    tensors["fc2.weight_mask"] = tensors["fc2.weight_mask"][:-1]
    save_file(tensors, path, metadata={"client": "2", "density": "0.2"})
    with pytest.raises(StudyError, match="client-0002.*fc2.weight_mask: expected 80 bytes for 640 weights, got 79"):
        overlap(read_run(run))


def test_fewer_than_two_tickets_have_no_overlap(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_clients=8, rounds=1)
    for path in sorted((run / "tickets").iterdir())[1:]:
        path.unlink()
    assert overlap(read_run(run)) is None


def test_of_many_tickets_some_are_drawn_and_it_is_said(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlth.report.overlap.MOST_CLIENTS", 6)
    found = overlap(read_run(fake))
    again = overlap(read_run(fake))
    assert found is not None and again is not None
    assert found.saved == 20 and len(set(found.clients)) == 6 and found.clients == again.clients
    assert found.jaccard.shape == found.similarity.shape == (6, 6)
    assert "(6 drawn of 20 clients)" in overlapping(results_of(read_group(fake)))

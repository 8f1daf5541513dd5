"""Records as real Flower messages: every place that a payload may lie in, what it costs, and what is none of ours."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fedlth.engines.flower_link import THINNEST_BYTES_S, UNEVEN, crossing_s
from fedlth.engines.flower_record import PIECE_BYTES, Order, of_answer, of_order, to_answer, to_order
from fedlth.errors import StudyError
from fedlth.experiment.resolve import resolve
from fedlth.federation.jobs import Job, Message, Reply
from tests import tiny

if TYPE_CHECKING:
    from flwr.app import Message as FlowerMessage

# typer, which Flower imports, against a newer click.
pytestmark = pytest.mark.filterwarnings("ignore:'click.utils:DeprecationWarning")
JOB = Job(study="{}", phase="federate", round=3, client=2, inbox=())
LARGE = bytes(range(251)) * 800  # 200,800 B, seven pieces


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    """Flower builds messages inside a run only."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    yield
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = None


def sent(records: Any, node: int = 5) -> FlowerMessage:
    from flwr.app import Message as FlowerMessage

    from fedlth.engines.flower import _content

    made = FlowerMessage(_content(records), node, "train")
    made.metadata.created_at = 1.0
    return made


def objects(message: FlowerMessage) -> dict[str, bytes]:
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    return {key: part.deflate() for key, part in get_all_nested_objects(message).items()}


def crossed(message: FlowerMessage) -> dict[str, dict[str, Any]]:
    """Return the records of a message that went through Flower's own serialisation."""
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    from fedlth.engines.flower import _records

    return _records(inflate_object_from_contents(message.object_id, objects(message)))  # type: ignore[arg-type]


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, len(LARGE)])
def test_a_payload_of_any_size_crosses_in_pieces_for_thin_links(size: int, broadcast: bool) -> None:
    inbox = (Message("values", "theta_g", LARGE[:size], broadcast), Message("mask", "m", b"small"))
    order = Order(Job(study="{}", phase="federate", round=3, client=2, inbox=inbox), "0" * 16, 60.0)
    message = sent(of_order(order))
    assert to_order(crossed(message)) == order
    assert max(map(len, objects(message).values())) < PIECE_BYTES + 500, "Flower sends each in a request with a limit"
    apart = [name for name in message.content if name.startswith("p0.")]
    assert len(apart) == (max(1, -(-size // PIECE_BYTES)) if broadcast or size > PIECE_BYTES else 0)


def test_many_payloads_together_are_no_longer_than_a_piece() -> None:
    inbox = tuple(Message("values", f"of {i}", LARGE[i : i + PIECE_BYTES // 3]) for i in range(7))
    order = Order(Job(study="{}", phase="federate", round=3, client=2, inbox=inbox), "0" * 16, 60.0)
    message = sent(of_order(order))
    assert to_order(crossed(message)) == order
    assert max(map(len, objects(message).values())) < PIECE_BYTES + 1_000


def test_the_pieces_that_are_under_way_at_once_cross_the_thinnest_link_before_flower_sends_them_again() -> None:
    from flwr.supercore.constant import FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES
    from flwr.supercore.protobuf.client import ProtobufClient

    answer_s = signature(ProtobufClient).parameters["timeout"].default
    assert UNEVEN * crossing_s(FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES * PIECE_BYTES) == pytest.approx(answer_s)
    assert 1.5 * THINNEST_BYTES_S < 8_000, "64 kbit/s, with a margin"
    assert crossing_s(10_000_000, 8_000.0) == 1_562.5


def framed(*outbox: Message) -> int:
    from fedlth.engines.flower import _framed_bytes

    return _framed_bytes(sent(of_answer(Reply(round=3, client=2, outbox=outbox))))


@pytest.mark.parametrize("size", [1, 100, 1_000, PIECE_BYTES])
def test_embedding_costs_at_most_21_bytes_while_small(size: int) -> None:
    described = len('["values", "u", false]')
    assert framed(Message("values", "u", LARGE[:size])) - framed() - described - size <= 21


def test_a_broadcast_is_one_object_for_all_clients() -> None:
    for size in (1_000, len(LARGE)):
        inbox = (Message("values", "theta_g", LARGE[:size], True),)
        held: dict[str, bytes] = {}
        for client in range(10):
            job = Job(study="{}", phase="federate", round=3, client=client, inbox=inbox)
            held |= objects(sent(of_order(Order(job, "0" * 16, 60.0)), client + 1))
        assert size < sum(map(len, held.values())) < size + 10 * 2_000


def test_an_array_is_none_of_ours() -> None:
    from flwr.app import Array, ArrayRecord

    message = sent(of_answer(Reply(round=3, client=2, outbox=(Message("values", "u", LARGE),))))
    assert isinstance(to_answer(crossed(message), JOB), Reply)
    message.content["p0.3"] = ArrayRecord({"b": Array("uint8", (1,), "numpy.ndarray", b"1")})
    with pytest.raises(ValueError, match="not a fedlth message"):
        to_answer(crossed(message), JOB)


def test_a_metric_record_is_none_of_ours() -> None:
    from flwr.app import MetricRecord

    message = sent(of_answer(Reply(round=3, client=2, outbox=())))
    message.content["m"] = MetricRecord({"loss": 1.0})
    with pytest.raises(ValueError, match="not a fedlth message"):
        to_answer(crossed(message), JOB)


class Grid:
    """A grid of Flower's over HTTP, in its manner: what it pulls it gives once, and raises for all if one is odd."""

    def __init__(self, odd: str, error: BaseException) -> None:
        self.odd, self.error, self.left = odd, error, {"m1", "m2", "m3"}

    def pull_messages(self, ids: Iterable[str]) -> list[FlowerMessage]:
        from flwr.app import Message as FlowerMessage

        pulled, self.left = self.left & set(ids), self.left - set(ids)
        if self.odd in pulled:
            raise self.error
        replies = []
        for id in sorted(pulled):
            asked = sent(of_order(Order(JOB, "a", 1.0)))
            asked.metadata.__dict__["_message_id"] = id
            replies.append(FlowerMessage(asked.content, reply_to=asked))
        return replies


def test_a_message_that_flower_cannot_unpack_costs_no_other() -> None:
    """Row 29: nor is it asked for again."""
    from fedlth.engines.flower import GridTransport
    from fedlth.engines.flower_engine import UNREADABLE

    grid = Grid("m2", TypeError("'NoneType' object is not iterable"))
    backs = {b.id: b for b in GridTransport(grid).collect(["m1", "m2", "m3"])}  # type: ignore[arg-type]
    assert {id: b.code for id, b in backs.items()} == {"m1": 0, "m2": UNREADABLE, "m3": 0}
    assert (
        backs["m2"].reason == "unreadable answer: TypeError: 'NoneType' object is not iterable" and backs["m1"].records
    )


def test_an_error_of_the_link_is_not_the_messages() -> None:
    """Row 29: it is every client's."""
    from fedlth.engines.flower import GridTransport

    with pytest.raises(ConnectionError):
        GridTransport(Grid("m2", ConnectionError("gone"))).collect(["m1", "m2", "m3"])  # type: ignore[arg-type]


@pytest.mark.parametrize("deployed", [False, True])
def test_a_run_that_loses_its_superlink_says_how_to_go_on(
    deployed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 30: `flwr run` with the same `out`, or the federation's run.sh; said before it can be too late, and then."""
    from flwr.app import Context, RecordDict
    from flwr.supercore.run import RunNotRunningException

    from fedlth.engines import flower
    from fedlth.engines.flower_session import FlowerRun

    def ended(*_: Any, **__: Any) -> None:
        raise RunNotRunningException

    monkeypatch.setattr(flower, "run_of", lambda *_: FlowerRun(resolve(tiny.study())[0], tmp_path / "r", False))
    monkeypatch.setattr(flower, "_run", ended)
    (tmp_path / "fed" / "keys").mkdir(parents=True)
    (tmp_path / "fed" / "run.sh").touch()
    given = {"wait-s": 1, "out": f"{tmp_path}/r", "keys": f"{tmp_path}/fed/keys" if deployed else ""}
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=given)
    monkeypatch.setattr(flower, "_identity", lambda *_: None)
    with pytest.raises(RunNotRunningException):
        flower.make_server_app(tmp_path)(None, context)  # type: ignore[arg-type]
    first, last = capsys.readouterr().out.splitlines()
    wanted = f"`{tmp_path}/fed/run.sh {tmp_path}/r`" if deployed else f"`flwr run` again with out={tmp_path}/r"
    assert first == f"fedlth: if the SuperLink ends before this run: {wanted} continues"
    assert "RunNotRunningException" in last and last.endswith(f"what was committed is kept: {wanted} continues")


def test_flwr_run_with_too_few_supernodes_says_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flwr.app import Context, RecordDict

    from fedlth.engines import flower

    class Empty:
        pull_interval = 0.1

        def get_node_ids(self) -> list[int]:
            return []

    monkeypatch.setattr(flower, "SIMULATED_WAIT_S", 0.1)
    overrides = "clients.count=3 federate.clients_per_round=2"
    config = {"study": "smoke.yaml", "out": str(tmp_path / "r"), "overrides": overrides, "wait-s": 60}
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    with pytest.raises(StudyError):
        flower.make_server_app(Path(__file__).parents[2] / "configs")(Empty(), context)  # type: ignore[arg-type]
    told = capsys.readouterr().out
    assert "fedlth: error: flower: clients.count = 3 needs as many SuperNodes, got 0 after 0.1 s" in told
    assert "no SuperNode of clients [0, 1, 2]; flwr run ... --federation-config num-supernodes=3" in told
    assert not (tmp_path / "r").exists()


def test_a_simulation_that_breaks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower puts two errors of its own around Ray's, which says what to do about it."""
    from fedlth.engines import flower

    def broken(**_: Any) -> None:
        try:
            raise Exception("The current node timed out\nduring startup")
        except Exception as error:
            raise RuntimeError("Ending simulation.") from error

    monkeypatch.setattr("flwr.simulation.run_simulation", broken)
    monkeypatch.setattr("threading.Event.wait", lambda *_: True)  # for a ServerApp, which has not begun
    with pytest.raises(StudyError, match="^flower: the simulation broke: Exception: The current node timed out during"):
        flower.run_under_flower(resolve(tiny.study())[0], tmp_path / "r")


def test_a_simulation_has_longer_to_start_than_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine starts Ray's workers in minutes; its SuperNodes are there, and none has answered."""
    from fedlth.engines import flower
    from fedlth.engines.flower_session import FlowerRun

    class Silent:
        pull_interval = 0.1
        asked = 0.0

        def get_node_ids(self) -> list[int]:
            return [1, 2, 3, 4]

        def push_messages(self, messages: list[Any]) -> None:
            self.asked = self.asked or time.monotonic()

        def pull_messages(self, ids: list[str]) -> list[Any]:
            return []

    monkeypatch.setattr("fedlth.engines.flower_engine.GRACE_S", 0.1)
    monkeypatch.setattr(flower, "SIMULATED_ANSWER_S", 1.5)
    run, grid = FlowerRun(resolve(tiny.study())[0], tmp_path / "r", False), Silent()
    with pytest.raises(StudyError, match="no answer"):
        flower._run(run, flower.GridTransport(grid), threading.Event(), wait_s=0.1)  # type: ignore[arg-type]
    assert time.monotonic() - grid.asked > 1.0

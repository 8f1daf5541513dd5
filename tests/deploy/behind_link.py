"""A federation of two devices, the first behind a thin link: what a study then takes, in seconds and in bytes.

As root: `python -m tests.deploy.behind_link OUT` runs a study of tickets, its dense twin, and the first
without loss, and prints what each took (20 minutes).
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedlth import cli
from fedlth.deploy.folder import Folder
from fedlth.deploy.live import ask
from fedlth.deploy.settings import read_settings
from tests.deploy.federation import ROOT, Federation, free_ports, running
from tests.deploy.metered_gate import PULL, PUSH, Request, requests_in
from tests.deploy.thin_link import FAR, NEAR, Crossed, Link, thin_link

DEVICES = 2
BITS_S, LOSS = 64_000, 0.05
IDLE = ("/v1/fleet/pull-messages", "/v1/fleet/send-node-heartbeat")
RETRIED = "Connection attempt failed, retrying"  # what Flower's client says whenever it sends a request again


@dataclass(frozen=True)
class Ran:
    """A run whose client 0 is behind the link: its folder, and what crossed from the run's beginning to its end.

    `requests` are those of client 0; `retried` is how often its SuperNode said that it tries one again.
    """

    out: Path
    seconds: float
    link: Crossed
    requests: tuple[Request, ...]
    retried: int

    def twice(self) -> list[str]:
        """Return the objects that crossed more than once, and requests that broke off on the way."""
        moved = [one for one in self.requests if one.path in (PUSH, PULL)]
        times = Counter((one.path, one.object) for one in moved if one.object)
        again = [f"{count} times {path} {id[:12]}" for (path, id), count in times.items() if count > 1]
        return [*again, *(f"broke off: {one}" for one in self.requests if not one.whole or one.status != 200)]

    def content_bytes(self, path: str) -> int:
        """Return the bytes of the objects that crossed by one path."""
        return sum(one.content_bytes for one in self.requests if one.path == path)

    def largest(self, path: str) -> int:
        """Return the bytes of the largest object that crossed by one path."""
        return max(one.content_bytes for one in self.requests if one.path == path)

    def longest(self) -> dict[str, int]:
        """Return the bytes of the longest payload of client 0, `up` and `down`."""
        return {way: max(rows) for way, rows in self._rows("payload_bytes").items()}

    def ledger(self, column: str) -> dict[str, int]:
        """Return the sums of a column of the ledger over client 0's messages, `up` and `down`."""
        return {way: sum(rows) for way, rows in self._rows(column).items()}

    def _rows(self, column: str) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {"up": [], "down": []}
        for line in (self.out / "ledger.jsonl").read_text().splitlines():
            row = json.loads(line)
            if "client:0" in (row["sender"], row["receiver"]):
                found["up" if row["receiver"] == "server" else "down"].append(row[column] or 0)
        return found


def ran_behind(link: Link, root: Path, words: list[str]) -> Ran:
    """Run a study on two devices, the first behind the link, with a gate that counts; `root` is a folder to fill."""
    root.mkdir()
    folder, port = Folder(root / "fed"), str(free_ports())
    words = ["deploy", "init", str(folder.root), "--host", NEAR, "--port", port, "--devices", str(DEVICES), *words]
    assert cli.main(words) == 0
    made = Federation(root, folder, read_settings(folder.root))
    with running(made.programs, root):
        made.start("superlink")
        made.begin("gate", sys.executable, "-m", "tests.deploy.metered_gate", folder.root, root / "requests.jsonl")
        health, trusted = f"https://{NEAR}:{made.settings.port}/health", str(folder.authority)
        made.wait_for("gate", lambda: ask("GET", health, trusted).status == 200)
        made.said(folder.root / "register.sh")
        for number in range(DEVICES):
            shutil.move(folder.device(number), made.device(number))
            script = str(made.device(number) / "start.sh")
            made.begin(f"device-{number}", *(link.behind(script) if number == 0 else [script]))
        began, before = time.monotonic(), link.crossed()
        assert "fedlth: done" in made.said(folder.root / "run.sh", root / "run")
        seconds, after = time.monotonic() - began, link.crossed()
        requests = [one for one in requests_in(root / "requests.jsonl") if one.who == FAR]
        retried = made.log("device-0").read_text().count(RETRIED)  # before the gate ends under it
    return Ran(root / "run", seconds, after.less(before), tuple(requests), retried)


# The study in small, with a model of 0.41 MB: of its dense updates each is longer than what 64 kbit/s carry in 30 s.
COMMON = (
    f"clients.count={DEVICES} clients.unseen=0.0 federate.clients_per_round={DEVICES} personalise.epochs=1 "
    "model.name=mlp model.options.hidden=[128]"
)
TICKETS = f"{COMMON} federate.rounds=1 personalise.arms=[ticket] refine.rounds=2 refine.clients_per_round={DEVICES}"
DENSE = f"{COMMON} federate.rounds=3 personalise.arms=[dense]"  # the same number of visits, each with a dense model


def table(rans: dict[str, Ran]) -> Iterator[str]:
    """Yield what each run took, by client 0 and its link."""
    yield f"{'':<40}" + "".join(f"{name:>12}" for name in rans)
    lines = {
        "seconds, from run.sh to its end": lambda ran: f"{ran.seconds:.0f}",
        "kB of payload down, by the ledger": lambda ran: _kb(ran.ledger("payload_bytes")["down"]),
        "kB of payload up": lambda ran: _kb(ran.ledger("payload_bytes")["up"]),
        "kB of messages down (framed)": lambda ran: _kb(ran.ledger("framed_bytes")["down"]),
        "kB of messages up (framed)": lambda ran: _kb(ran.ledger("framed_bytes")["up"]),
        "kB of bodies of all answers": lambda ran: _kb(sum(one.down_bytes for one in ran.requests)),
        "kB of bodies of all requests": lambda ran: _kb(sum(one.up_bytes for one in ran.requests)),
        "kB over the link down": lambda ran: _kb(ran.link.down_bytes),
        "kB over the link up": lambda ran: _kb(ran.link.up_bytes),
        "packets down": lambda ran: str(ran.link.down_packets),
        "packets up": lambda ran: str(ran.link.up_packets),
        "of them sent again by TCP": lambda ran: str(ran.link.sent_again),
        "requests of the device": lambda ran: str(len(ran.requests)),
        "of them polls and heartbeats": lambda ran: str(sum(one.path in IDLE for one in ran.requests)),
        "requests sent again": lambda ran: str(ran.retried),
        "objects that crossed twice": lambda ran: str(len(ran.twice())),
    }  # fmt: skip
    for what, of in lines.items():
        yield f"{what:<40}" + "".join(f"{of(ran):>12}" for ran in rans.values())


def _kb(size: float) -> str:
    return f"{1e-3 * size:,.1f}"


def main(out: Path) -> None:
    out.mkdir(parents=True)
    rans = {}
    for name, words, loss in (("tickets", TICKETS, LOSS), ("dense", DENSE, LOSS), ("no loss", TICKETS, 0.0)):
        with thin_link(bits_s=BITS_S, loss=loss) as link:
            rans[name] = ran_behind(link, out / name, ["--study", str(ROOT / "configs" / "smoke.yaml"), *words.split()])
    print(
        f"client 0 behind a link of {BITS_S // 1000} kbit/s each way that loses {LOSS:.0%} of its packets; last: the "
        "tickets without loss"
    )
    print("\n".join(table(rans)))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

"""A thin link with losses: a network namespace behind a pair of interfaces, each shaped, each losing packets.

What is lost is a packet that has taken its time on the link, so that TCP sends it again over the same link, as it does
on a real one. `tc` alone makes it: a token bucket (tbf) at either end, and a filter of classic BPF that draws a random
number for each packet that comes in. netem would do both, and is not in every kernel. Without root, where the kernel
lets users have namespaces: `unshare -rnm sh -c 'mount -t tmpfs none /run; ip link set lo up; COMMAND'`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

NEAR, FAR = "198.51.100.1", "198.51.100.2"  # addresses of no machine (RFC 5737)
QUEUE_BYTES = 16_000  # two seconds at 64 kbit/s, as slow modems have: more is lost there
# Load a random number; below the threshold the packet is dropped (2, TC_ACT_SHOT), else it goes on (0, TC_ACT_OK).
LOSE = "4,32 0 0 4294963256,53 1 0 {threshold},6 0 0 2,6 0 0 0"


@dataclass(frozen=True)
class Crossed:
    """What went over the link since it was made, in Ethernet frames, those that were lost then included.

    `sent_again` of the packets up are TCP segments that the far end sent again.
    """

    up_bytes: int
    down_bytes: int
    up_packets: int
    down_packets: int
    sent_again: int

    def less(self, earlier: Crossed) -> Crossed:
        """Return what has crossed since an earlier time."""
        pairs = zip(astuple(self), astuple(earlier), strict=True)
        return Crossed(*(now - then for now, then in pairs))


@dataclass(frozen=True)
class Link:
    """A link that is up; `name` is the namespace behind it, `device` the near end's interface."""

    name: str
    device: str

    def behind(self, *command: str) -> list[str]:
        """Return the command that runs a command behind the link."""
        return ["ip", "netns", "exec", self.name, *command]

    def crossed(self) -> Crossed:
        """Return what has crossed so far."""
        counts = Path("/sys/class/net") / self.device / "statistics"
        names = ("rx_bytes", "tx_bytes", "rx_packets", "tx_packets")
        frames = [int((counts / name).read_text()) for name in names]
        lines = _said(*self.behind("cat", "/proc/net/snmp")).splitlines()
        named, values = (line.split() for line in lines if line.startswith("Tcp:"))
        return Crossed(*frames, int(dict(zip(named, values, strict=True))["RetransSegs"]))


def impossible() -> str:
    """Return why no link can be made here, or nothing where one can."""
    if missing := [name for name in ("ip", "tc") if shutil.which(name) is None]:
        return f"no {' and no '.join(missing)} (iproute2)"
    if not hasattr(os, "geteuid") or os.geteuid():
        return "a network namespace and tc need root, or what the first lines of tests/deploy/thin_link.py say"
    try:
        with thin_link(bits_s=64_000, loss=0.05):
            return ""
    except RuntimeError as error:
        return f"this kernel makes no thin link: {error}"


@contextmanager
def thin_link(*, bits_s: int, loss: float) -> Iterator[Link]:
    """Make a link of so many bits per second each way that loses that share of its packets each way.

    Raises RuntimeError where it cannot be made; nothing of it is left then, as at its end.
    """
    name = f"fedlth-{os.getpid()}"
    near, far = f"fl{os.getpid()}a", f"fl{os.getpid()}b"
    lose = LOSE.format(threshold=round(loss * 2**32))
    _said("ip", "netns", "add", name)
    try:
        _said("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        for space, device, address in (((), near, NEAR), (("-n", name), far, FAR)):
            _said("ip", *space, "addr", "add", f"{address}/30", "dev", device)
            _said("ip", *space, "link", "set", device, "up")
            shape = ("rate", f"{bits_s}bit", "burst", "1600", "limit", str(QUEUE_BYTES))  # a burst of one packet
            _said("tc", *space, "qdisc", "add", "dev", device, "root", "tbf", *shape)
            _said("tc", *space, "qdisc", "add", "dev", device, "ingress")
            at = ("dev", device, "parent", "ffff:", "protocol", "all")
            _said("tc", *space, "filter", "add", *at, "bpf", "direct-action", "bytecode", lose)
        _said("ip", "-n", name, "link", "set", "lo", "up")
        yield Link(name, near)
    finally:
        subprocess.run(["ip", "link", "del", near], capture_output=True)  # or it goes with its namespace, but later
        _said("ip", "netns", "del", name)


def probe(link: Link, *, packets: int = 300, size: int = 100) -> tuple[float, float]:
    """Send datagrams over a link; return the share that was lost, and the bits per second of those that came.

    Both ends' rates and losses are alike, so one direction is enough to see that the link is what it says.
    """
    send = (
        f"import socket, time\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nfor i in range({packets}):\n"
        f"    s.sendto(bytes({size}), ('{NEAR}', %d)); time.sleep({size} / 8000)\n"
    )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as here:
        here.bind((NEAR, 0))
        here.settimeout(3)
        sender = subprocess.Popen(link.behind(sys.executable, "-c", send % here.getsockname()[1]))
        came: list[float] = []
        try:
            while True:
                here.recv(2048)
                came.append(time.monotonic())
        except TimeoutError:
            pass
        sender.wait(60)
    return 1 - len(came) / packets, 8 * (size + 42) * (len(came) - 1) / (came[-1] - came[0])


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])}: {' '.join(done.stderr.split()) or done.returncode}")
    return done.stdout

"""fedlth deploy: what each of its verbs prints."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedlth.output import say

HOSTS = ("127.0.0.1",)


def deploy(args: argparse.Namespace) -> int:
    """Run one verb; return the exit code."""
    if args.what == "gate":
        return _gate(args.dir)
    if args.what == "serve":
        return _serve(args.address, args.supernode, args.secret)
    if args.what == "check":
        return _check(args.dir)
    from fedlth.deploy import make
    from fedlth.deploy.settings import read_settings

    if args.what == "certify":
        settings = make.certify(args.dir, args.host or ())
        say(f"{args.dir}: a new certificate for {', '.join(settings.hosts)}; start SuperLink and gate again")
        return 0
    folder = make.init(
        args.dir, args.study, args.override, devices=args.devices, hosts=args.host or HOSTS, port=args.port
    )  # fmt: skip
    say(make.next_steps(folder, read_settings(folder.root)))
    return 0


def _check(root: Path) -> int:
    from fedlth.deploy.check import check

    faults, notes = check(root)
    for fault in faults:
        say(str(fault))
    for note in notes:
        say(f"note: {note}")
    say(f"{root}: {len(faults)} faults" if faults else f"{root}: everything fits")
    return 1 if faults else 0


def _gate(root: Path) -> int:
    from fedlth.deploy.folder import Folder
    from fedlth.deploy.gate import serve
    from fedlth.deploy.settings import read_settings

    serve(Folder(root.resolve()), read_settings(root))
    return 0


def _serve(address: str, supernode: int, secret: Path) -> int:
    from fedlth.engines.flower_standing import serve_messages

    serve_messages(address, supernode, secret)
    return 0

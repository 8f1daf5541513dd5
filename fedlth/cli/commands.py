"""What each command does. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlth.errors import MissingExtra, StudyError, require
from fedlth.output import say, tell


@contextmanager
def importing() -> Iterator[None]:
    """Import without the garbage collector, which finds nothing then; saves 0.3 to 0.6 of 2.8 CPU s."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # what is imported stays: later collections need not walk it either
        gc.enable()


def run(args: argparse.Namespace) -> int:
    with importing():
        from fedlth.data.sources import begin
        from fedlth.study.schema import load

        study = load(args.study, args.override)
        if study.data.own is None:
            begin(study.data.name, root=study.data.root, options=study.data.options)  # while torch is imported
        from fedlth import api

    _show_run(api.run(study))
    return 0


def resume(args: argparse.Namespace) -> int:
    with importing():
        from fedlth import api

    _show_run(api.resume(args.run))
    return 0


def report(args: argparse.Namespace) -> int:
    _show(args.run)
    return 0


def compare(args: argparse.Namespace) -> int:
    from fedlth.report.build import write_tables
    from fedlth.report.compare import compare as compared

    result = compared(args.run, arm=args.arm)
    if args.tables:
        times = {"times": result.times()} if result.times().rows else {}
        write_tables(args.tables, {"compare": result.table(), **times})
    say(result.text())
    return 0


def diff(args: argparse.Namespace) -> int:
    from fedlth.report.diff import diff as differences
    from fedlth.report.diff import notes

    found = differences(args.run_a, args.run_b)
    for note in notes(args.run_a, args.run_b):
        say(f"note: {note}")
    say("\n".join(found) if found else "equal: parameters, tickets, payload bytes, metrics")
    return 1 if found else 0


def bytes_(args: argparse.Namespace) -> int:
    import json

    from fedlth.report.accounting import account, account_json, account_text
    from fedlth.report.facts import read_group

    for facts in read_group(args.run):
        found = account(facts)
        say(json.dumps(account_json(found)) if args.json else account_text(found))
    return 0


def tickets(args: argparse.Namespace) -> int:
    from fedlth.report import ticket_text as told
    from fedlth.report.facts import read_run

    if args.what == "export":
        return _export(args)
    if args.to or args.out:
        raise StudyError(f"tickets {args.what}: --to and --out are of `tickets export`")
    act = {"ls": told.listing, "show": told.shown, "overlap": told.overlapping}[args.what]
    say(act(read_run(args.run), args.client), end="")
    return 0


def _export(args: argparse.Namespace) -> int:
    with importing():
        from fedlth.export.export import export_ticket, form_of, place_of
        from fedlth.export.source import client_of
        from fedlth.report.export_text import exported
        from fedlth.report.facts import read_run
        from fedlth.report.ticket_text import named

    form = form_of(tuple(args.to))
    if args.run.is_file():
        if args.client:
            raise StudyError(f"{args.run}: holds one ticket, so no client is named beside it, got {args.client[0]}")
        place = place_of(args.run.parent, client_of(args.run), form, args.out)
        say(exported(export_ticket(args.run, to=form, out=place)), end="")
        return 0
    clients = [saved.client for saved in named(read_run(args.run), args.client)]
    places = [place_of(args.run, client, form, args.out) for client in clients]  # all free, before the first is written
    for client, place in zip(clients, places, strict=True):
        say(exported(export_ticket(args.run, client, to=form, out=place)), end="")
    return 0


def transfer(args: argparse.Namespace) -> int:
    require("fedlth transfer", "matplotlib", "scipy", extra="sim")
    with importing():
        from fedlth import api
        from fedlth.report.transfer import transfer_text, write_transfer

    pairs = [one.partition("=") for one in args.mask]
    if wrong := [one for one, (name, _, place) in zip(args.mask, pairs, strict=True) if not (name and place)]:
        raise StudyError(f"transfer: --mask must be NAME=RUN or NAME=RUN:CLIENT, got {wrong[0]!r}")
    found = api.transfer(
        args.run, {name: place for name, _, place in pairs}, workers=args.workers, clients=args.clients
    )  # fmt: skip
    path = write_transfer(args.run, found)
    say(transfer_text(args.run, found))
    say(f"\nmatrix: {path}")
    return 0


def audit(args: argparse.Namespace) -> int:
    require("fedlth audit", "matplotlib", "scipy", extra="sim")
    with importing():
        from fedlth import api
        from fedlth.report.audit import audit_text, write_audit

    found = api.audit(args.run, shadows=args.shadows, victims=args.victims, workers=args.workers)
    path = write_audit(args.run, found)
    say(audit_text(found))
    say(f"\naudit: {path}")
    return 0


def list_(args: argparse.Namespace) -> int:
    from fedlth import catalogue

    say(catalogue.listing(args.what, args.name, args.study))
    return 0


def check(args: argparse.Namespace) -> int:
    from fedlth import api, forecast

    say(forecast.forecast(api.load(args.study, args.override)))
    return 0


def partition(args: argparse.Namespace) -> int:
    from fedlth.data.divided import write_division
    from fedlth.study.schema import load

    study = load(args.study, args.override)
    splits = write_division(study, args.file)
    sizes = {part: [len(getattr(c, part)) for c in splits.clients] for part in ("train", "val", "test")}
    told = ", ".join(f"{part} {min(n)}-{max(n)}" for part, n in sizes.items())
    whose = "their own examples" if splits.own_test else "the data set's test split"
    say(f"{args.file}: {len(splits.clients)} clients ({len(splits.unseen)} unseen), examples {told}; test from {whose}")
    say(f"partition digest {splits.digest}")
    seed = f", seed: {study.partition['seed']}" if study.partition.get("seed") else ""
    say(f"to use it: partition: {{name: file, path: {args.file}{seed}}}")
    return 0


def reproduce(args: argparse.Namespace) -> int:
    from fedlth.bench import reproduce as published

    if not args.row:
        say(published.listing())
        return 0
    if args.seeds < 1:
        raise StudyError(f"reproduce: --seeds must be at least 1, got {args.seeds}")
    row = published.row_of(args.row)
    say(published.text(row, published.run(row, args.seeds, args.out, args.override), args.override))
    return 0


def lottery(args: argparse.Namespace) -> int:
    require("fedlth lottery", "matplotlib", "jinja2", "scipy", extra="sim")
    from fedlth.api import free_folder
    from fedlth.lab import runner, study
    from fedlth.lab.search import ladder
    from fedlth.report.lottery import lottery_text, write_lottery

    made = study.load(args.study, args.override)
    if args.dry_count:
        say(ladder(made))
        return 0
    runner.check(made)  # a refused study leaves no folder behind
    out = Path(made.out) if made.out else free_folder(Path("runs"), made.lottery)
    try:
        runner.run(made, out)
    except KeyboardInterrupt:
        tell(f"stopped; to go on: the same command with out={out}")
        raise
    except OSError as error:
        error.add_note(f"what was trained is kept in {out}: the same command with out={out} continues")
        raise
    path = write_lottery(out)
    say(lottery_text(out))
    say(f"\nreport: {path}")
    return 0


def deploy(args: argparse.Namespace) -> int:
    require("fedlth deploy", "cryptography", "uvicorn", extra="deploy")
    with importing():
        from fedlth.deploy import command

    return command.deploy(args)


def bench(args: argparse.Namespace) -> int:
    with importing():
        from fedlth.bench import command

    command.bench(args.bench, args)
    return 0


def _show_run(run_folder: Path) -> None:
    """Show a run that has ended; packages that only the report needs cost the report, not the run."""
    try:
        _show(run_folder)
    except MissingExtra as error:
        print(f"\ndone: {run_folder}; {error}, then fedlth report {run_folder}")


def _show(run_folder: Path) -> None:
    from fedlth.report.build import read_results, write_report
    from fedlth.report.headline import summary_text

    say(summary_text(read_results(run_folder)))
    try:
        path = write_report(run_folder)
    except OSError as error:
        error.add_note(f"the report of {run_folder} is incomplete; to write it again: fedlth report {run_folder}")
        raise
    say(f"\nreport: {path}")

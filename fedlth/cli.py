"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedlth import __version__
from fedlth.errors import MissingExtra, StudyError, require
from fedlth.output import lines_to, say, settle, tell

INTERRUPTED = 130
DISK = 3


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

    if args.what == "small":
        from fedlth.experiment.small_ticket import save_small

        for saved in told.named(read_run(args.run), args.client):
            say(told.small(save_small(args.run, saved.client, args.out and args.out / saved.path.stem)), end="")
        return 0
    act = {"ls": told.listing, "show": told.shown, "overlap": told.overlapping}[args.what]
    say(act(read_run(args.run), args.client), end="")
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


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    top = argparse.ArgumentParser(prog="fedlth", description="Federated personalised lottery tickets.")
    top.add_argument("--version", action="version", version=f"fedlth {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, act: object, help: str, text: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=f"{help}\n\n{text}", formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(act=act)
        return sub

    study_text = (
        "STUDY.yaml is one study (see configs/). key=value overrides any key by its dotted name:\n"
        "  method=fedavg_ft  train.lr=0.1  partition.alpha=0.3  finder.densities=[0.5,0.2]\n"
        "  compute=auto  engine=inprocess|ray|flower  seed=1  seeds=[0,1,2]  out=runs/mine  data.root=/data\n"
        "`fedlth list` prints the names that a key may have."
    )
    sub = command("run", run, "run a study and write its report", study_text)
    sub.add_argument("study", type=Path, metavar="STUDY.yaml")
    sub.add_argument("override", nargs="*", metavar="key=value")

    text = (
        "Continues after the last committed round, whatever stopped the run, and ends as if it had never stopped.\n"
        "Then, even if the run has ended, visits clients whose machine was lost in the last phase."
    )
    sub = command("resume", resume, "continue a run that was stopped", text)
    sub.add_argument("run", type=Path, metavar="RUN")

    sub = command(
        "report", report, "write a run's report and tables again", "RUN is a run's folder, or one with seeds."
    )
    sub.add_argument("run", type=Path, metavar="RUN")

    text = (
        "Pairs the runs by (seed, client) and prints differences with bootstrap intervals.\n"
        "Refuses runs whose clients hold different data. The first run is the baseline."
    )
    sub = command("compare", compare, "compare runs, paired by seed and client", text)
    sub.add_argument("run", type=Path, nargs="+", metavar="RUN")
    sub.add_argument("--arm", help="the row to compare in every run (default: each run's main arm)")
    sub.add_argument("--tables", type=Path, help="write compare.md, .tex and .csv into this folder")

    text = "Exit code 0 when parameters, tickets, payload bytes and metrics are equal, 1 when not. Times do not count."
    sub = command("diff", diff, "say whether two runs ended in the same bits", text)
    sub.add_argument("run_a", type=Path, metavar="RUN")
    sub.add_argument("run_b", type=Path, metavar="RUN")

    text = (
        "Sums the ledger both ways, by phase, kind and client, beside the dense baseline of the same visits, and says\n"
        "what LotteryFL, FedDST, FedPM and CELL would have reported from it. RUN is a run's folder, or one with seeds."
    )
    sub = command("bytes", bytes_, "what crossed the wire, and what papers would have reported", text)
    sub.add_argument("run", type=Path, metavar="RUN")
    sub.add_argument("--json", action="store_true", help="one JSON object for each run, one a line, in bytes")

    text = (
        "ls       one line a ticket: client, arm, hash, density, size on disk\n"
        "show     metadata, and shape and density of every tensor, of the named clients\n"
        "overlap  Jaccard over pairs of tickets, chance, correlation with the clients' labels; all, or those named\n"
        "small    write the named clients' tickets of whole heads and channels as the smaller networks that they are"
    )
    sub = command("tickets", tickets, "list, show and compare a run's saved tickets", text)
    sub.add_argument("what", choices=("ls", "show", "overlap", "small"))
    sub.add_argument("run", type=Path, metavar="RUN")
    sub.add_argument("client", type=int, nargs="*", metavar="CLIENT")
    sub.add_argument("--out", type=Path, metavar="DIR", help="of small: parent of the folders (default RUN/small)")

    text = (
        "Trains every client's ticket, each --mask and theta_0's own mask on every client's data, from where the\n"
        "run's tickets began and by its recipe; writes RUN/transfer/transfer.md, .csv, .json and .png. RUN is a run's\n"
        "folder, or one with seeds, of which means are shown. The same command continues after a stop."
    )
    sub = command("transfer", transfer, "train every mask on every client's data", text)
    sub.add_argument("run", type=Path, metavar="RUN")
    sub.add_argument("--mask", action="append", default=[], metavar="NAME=RUN[:CLIENT]", help="a ticket of another run")
    sub.add_argument("--clients", type=int, nargs="+", default=[], metavar="CLIENT", help="only these (default: all)")
    sub.add_argument("--workers", type=int, metavar="N", help="processes (default: as the run's study says)")

    text = (
        "Kinds: methods, models, datasets, partitions, finders (or one of its parts: scores, ...), arms, engines;\n"
        "for the laboratory also probes and mask_controls."
    )
    sub = command("list", list_, "list the names that a study may use", text)
    sub.add_argument("what", nargs="?", default="", metavar="KIND")
    sub.add_argument("name", nargs="?", default="", metavar="NAME", help="one of them, or package.module:name")
    sub.add_argument("study", nargs="?", default="", metavar="STUDY.yaml", help="forecast a method's ledger for it")

    text = "Validates everything, tries a few training steps and client visits, and forecasts; writes nothing.\n\n"
    sub = command("check", check, "validate a study and forecast its cost", text + study_text)
    sub.add_argument("study", type=Path, metavar="STUDY.yaml")
    sub.add_argument("override", nargs="*", metavar="key=value")

    text = (
        "FILE (JSON) holds each client's positions in the data (train, validation, test) and the digest of the data.\n"
        "partition: {name: file, path: FILE} reads it. An existing file is not overwritten."
    )
    sub = command("partition", partition, "write how a study divides its data, as a file", text)
    sub.add_argument("study", type=Path, metavar="STUDY.yaml")
    sub.add_argument("file", type=Path, metavar="FILE")
    sub.add_argument("override", nargs="*", metavar="key=value")

    text = (
        "Runs the study of a published row under its own protocol; prints the paper's figure, ours, the difference,\n"
        "the honest figure beside one that is selected by test data, and what is not matched. Without ROW: all rows.\n"
        "Seeds are kept in DIR: the same command continues after a stop. key=value changes the study, and is said."
    )
    sub = command("reproduce", reproduce, "run a published row and hold ours beside it", text)
    sub.add_argument("row", nargs="?", default="", metavar="ROW")
    sub.add_argument("override", nargs="*", metavar="key=value")
    sub.add_argument("--seeds", type=int, default=1, metavar="N", help="how many seeds: 0, 1, ... (default 1)")
    sub.add_argument("--out", type=Path, default=Path("runs/reproduce"), metavar="DIR")

    text = (
        "STUDY.yaml names searches for tickets, control arms and probes (docs/lottery.md). Every training is kept in\n"
        "the run's folder: the same command with out=RUN continues after a stop, to the same bytes.\n"
    )
    sub = command("lottery", lottery, "search tickets on one machine, with controls and diagnostics", text)
    sub.add_argument("study", type=Path, metavar="STUDY.yaml")
    sub.add_argument("override", nargs="*", metavar="key=value")
    sub.add_argument("--dry-count", action="store_true", help="print the survivors of every round; train nothing")

    text = (
        "FILE.yaml names a base study, methods with options, partitions and seeds (docs/bench.md); key=value changes\n"
        "a key of the base study. Every cell is a run of its own in OUT/BENCH/PARTITION/METHOD/SEED: the same command\n"
        "continues after a stop. Then leaderboard.html, .md, .tex and .csv are written into OUT/BENCH.\n"
    )
    sub = command("bench", bench, "run methods x partitions x seeds and rank them", text)
    sub.add_argument("bench", type=Path, nargs="+", metavar="FILE.yaml")
    sub.add_argument("--out", type=Path, default=Path("runs/bench"), help="parent of the benches' folders")
    sub.add_argument("--only", metavar="KIND=NAME,...", help="method=, partition=, seed=: only these cells")
    sub.add_argument("--dry-run", action="store_true", help="print the forecast; run nothing")
    sub.add_argument("--report-only", action="store_true", help="write the leaderboard of what has ended; run nothing")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 differs, 2 bad input, 3 disk, 130 interrupted."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return _main(argv)
    finally:
        settle()


def _main(argv: Sequence[str] | None) -> int:
    grammar = parser()
    args, more = grammar.parse_known_args(argv)
    words = next((name for name in ("override", "bench") if hasattr(args, name)), "")
    if more and words and all("=" in one and not one.startswith("-") for one in more):
        getattr(args, words).extend(more)  # argparse takes no key=value that stands behind an option
    elif more:
        grammar.error(f"unrecognized arguments: {' '.join(more)}")
    try:
        with lines_to(tell):
            return int(args.act(args))
    except StudyError as error:
        tell(f"fedlth: {error}")
        return 2
    except OSError as error:
        tell("; ".join((f"fedlth: {args.command}: {error}", *getattr(error, "__notes__", ()))))
        return DISK
    except KeyboardInterrupt:
        tell("fedlth: stopped")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

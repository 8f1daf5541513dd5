"""The command line's grammar: which commands there are, what they take, and what they say of themselves."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedlth.cli import commands
from fedlth.version import __version__


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    top = argparse.ArgumentParser(prog="fedlth", description="Federated personalised lottery tickets.")
    top.add_argument("--version", action="version", version=f"fedlth {__version__}")
    subs = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, act: object, help: str, text: str = "") -> argparse.ArgumentParser:
        sub = subs.add_parser(
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
    sub = command("run", commands.run, "run a study and write its report", study_text)
    sub.add_argument("study", type=Path, metavar="STUDY.yaml")
    sub.add_argument("override", nargs="*", metavar="key=value")

    text = (
        "Continues after the last committed round, whatever stopped the run, and ends as if it had never stopped.\n"
        "Then, even if the run has ended, visits clients whose machine was lost in the last phase.\n"
        "A run on devices is continued by the run.sh beside it (docs/deploy.md)."
    )
    sub = command("resume", commands.resume, "continue a run that was stopped", text)
    sub.add_argument("run", type=Path, metavar="RUN")

    sub = command(
        "report", commands.report, "write a run's report and tables again", "RUN is a run's folder, or one with seeds."
    )
    sub.add_argument("run", type=Path, metavar="RUN")

    text = (
        "Pairs the runs by (seed, client) and prints differences with bootstrap intervals.\n"
        "Refuses runs whose clients hold different data. The first run is the baseline."
    )
    sub = command("compare", commands.compare, "compare runs, paired by seed and client", text)
    sub.add_argument("run", type=Path, nargs="+", metavar="RUN")
    sub.add_argument("--arm", help="the row to compare in every run (default: each run's main arm)")
    sub.add_argument("--tables", type=Path, help="write compare.md, .tex and .csv into this folder")

    text = "Exit code 0 when parameters, tickets, payload bytes and metrics are equal, 1 when not. Times do not count."
    sub = command("diff", commands.diff, "say whether two runs ended in the same bits", text)
    sub.add_argument("run_a", type=Path, metavar="RUN")
    sub.add_argument("run_b", type=Path, metavar="RUN")

    text = (
        "Sums the ledger both ways, by phase, kind and client, beside the dense baseline of the same visits, and says\n"
        "what LotteryFL, FedDST, FedPM and CELL would have reported from it. RUN is a run's folder, or one with seeds."
    )
    sub = command("bytes", commands.bytes_, "what crossed the wire, and what papers would have reported", text)
    sub.add_argument("run", type=Path, metavar="RUN")
    sub.add_argument("--json", action="store_true", help="one JSON object for each run, one a line, in bytes")

    text = (
        "ls       one line a ticket: client, arm, hash, density, size on disk\n"
        "show     metadata, and shape and density of every tensor, of the named clients\n"
        "overlap  Jaccard over pairs of tickets, chance, correlation with the clients' labels; all, or those named\n"
        "export   write the named clients' tickets in another form, checked on their test data (docs/export.md):\n"
        "         --to onnx, safetensors (a plain state dict), compact (kept weights alone), or small (the smaller\n"
        "         network that a ticket of whole channels or heads is); in place of RUN and CLIENT also one ticket's\n"
        "         file, such as a device's own, which is checked on random inputs"
    )
    sub = command("tickets", commands.tickets, "list, show, compare and export a run's saved tickets", text)
    sub.add_argument("what", choices=("ls", "show", "overlap", "export"))
    sub.add_argument("run", type=Path, metavar="RUN")
    sub.add_argument("client", type=int, nargs="*", metavar="CLIENT")
    sub.add_argument("--to", action="append", default=[], metavar="FORM", help="of export: one of the forms above")
    sub.add_argument("--out", type=Path, metavar="DIR", help="of export: parent (default RUN/export/FORM)")

    text = (
        "Trains every client's ticket, each --mask and theta_0's own mask on every client's data, from where the\n"
        "run's tickets began and by its recipe; writes RUN/transfer/transfer.md, .csv, .json and .png. RUN is a run's\n"
        "folder, or one with seeds, of which means are shown. The same command continues after a stop."
    )
    sub = command("transfer", commands.transfer, "train every mask on every client's data", text)
    sub.add_argument("run", type=Path, metavar="RUN")
    sub.add_argument("--mask", action="append", default=[], metavar="NAME=RUN[:CLIENT]", help="a ticket of another run")
    sub.add_argument("--clients", type=int, nargs="+", default=[], metavar="CLIENT", help="only these (default: all)")
    sub.add_argument("--workers", type=int, metavar="N", help="processes (default: as the run's study says)")

    text = (
        "Attacks the run's own tickets: classes from mask bits alone (an attacker who learns from shadow clients, and\n"
        "one without data), training examples by their loss, clients by a second search; then measures defences,\n"
        "with their price in accuracy and bytes. Writes RUN/audit/audit.md, .json, .csv and label_inference.png.\n"
        "Training is the run's own step 2. The same command continues after a stop. Reading: docs/privacy.md."
    )
    sub = command("audit", commands.audit, "say what a run's tickets disclose of their clients", text)
    sub.add_argument("run", type=Path, metavar="RUN")
    sub.add_argument("--shadows", type=int, default=200, metavar="N", help="clients made up to learn from (200)")
    sub.add_argument("--victims", type=int, default=0, metavar="N", help="clients attacked, at random (default: all)")
    sub.add_argument("--workers", type=int, metavar="N", help="processes (default: as the run's study says)")

    text = (
        "Kinds: methods, models, datasets, partitions, finders (or one of its parts: scores, ...), arms, engines;\n"
        "for the laboratory also probes and mask_controls."
    )
    sub = command("list", commands.list_, "list the names that a study may use", text)
    sub.add_argument("what", nargs="?", default="", metavar="KIND")
    sub.add_argument("name", nargs="?", default="", metavar="NAME", help="one of them, or package.module:name")
    sub.add_argument("study", nargs="?", default="", metavar="STUDY.yaml", help="forecast a method's ledger for it")

    text = "Validates everything, tries a few training steps and client visits, and forecasts; writes nothing.\n\n"
    sub = command("check", commands.check, "validate a study and forecast its cost", text + study_text)
    sub.add_argument("study", type=Path, metavar="STUDY.yaml")
    sub.add_argument("override", nargs="*", metavar="key=value")

    text = (
        "FILE (JSON) holds each client's positions in the data (train, validation, test) and the digest of the data.\n"
        "partition: {name: file, path: FILE} reads it. An existing file is not overwritten."
    )
    sub = command("partition", commands.partition, "write how a study divides its data, as a file", text)
    sub.add_argument("study", type=Path, metavar="STUDY.yaml")
    sub.add_argument("file", type=Path, metavar="FILE")
    sub.add_argument("override", nargs="*", metavar="key=value")

    text = (
        "Runs the study of a published row under its own protocol; prints the paper's figure, ours, the difference,\n"
        "the honest figure beside one that is selected by test data, and what is not matched. Without ROW: all rows.\n"
        "Seeds are kept in DIR: the same command continues after a stop. key=value changes the study, and is said."
    )
    sub = command("reproduce", commands.reproduce, "run a published row and hold ours beside it", text)
    sub.add_argument("row", nargs="?", default="", metavar="ROW")
    sub.add_argument("override", nargs="*", metavar="key=value")
    sub.add_argument("--seeds", type=int, default=1, metavar="N", help="how many seeds: 0, 1, ... (default 1)")
    sub.add_argument("--out", type=Path, default=Path("runs/reproduce"), metavar="DIR")

    text = (
        "STUDY.yaml names searches for tickets, control arms and probes (docs/lottery.md). Every training is kept in\n"
        "the run's folder: the same command with out=RUN continues after a stop, to the same bytes.\n"
    )
    sub = command("lottery", commands.lottery, "search tickets on one machine, with controls and diagnostics", text)
    sub.add_argument("study", type=Path, metavar="STUDY.yaml")
    sub.add_argument("override", nargs="*", metavar="key=value")
    sub.add_argument("--dry-count", action="store_true", help="print the survivors of every round; train nothing")

    text = (
        "init     write DIR: certificates, a key for each device, scripts and units, and the study that they run\n"
        "check    say what in DIR or around it does not fit; exit code 1 where something does not\n"
        "gate     pass the devices' part of the SuperLink's port, and nothing else, on the public address\n"
        "certify  give the server a new certificate, for other --host or a further two years\n"
        "serve    on a device, as its start.sh does: answer a SuperNode's messages from one process that stays up"
    )
    verbs = command("deploy", commands.deploy, "a federation of real devices: keys, scripts, check, gate", text)
    acts = verbs.add_subparsers(dest="what", required=True, metavar="init|check|gate|certify|serve")
    sub = acts.add_parser("init", help="write everything that a federation of devices needs into DIR")
    sub.add_argument("dir", type=Path, metavar="DIR")
    sub.add_argument("override", nargs="*", metavar="key=value")
    sub.add_argument("--study", type=Path, required=True, metavar="STUDY.yaml")
    sub.add_argument("--devices", type=int, required=True, metavar="N", help="as many as the study's clients.count")
    host = "name or address by which devices reach this server (several: each its own --host; default 127.0.0.1)"
    sub.add_argument("--host", action="append", metavar="NAME", help=host)
    port = "the gate's port; the SuperLink has the next one, device K's SuperNode the K + 2nd after it (default 8443)"
    sub.add_argument("--port", type=int, default=8443, metavar="P", help=port)
    for name, help in (
        ("check", "say what does not fit"),
        ("gate", "listen on the public address, until Ctrl-C"),
        ("certify", "give the server a new certificate"),
    ):
        sub = acts.add_parser(name, help=help)
        sub.add_argument("dir", type=Path, metavar="DIR")
    sub.add_argument("--host", action="append", metavar="NAME", help="in place of those that DIR was made with")
    sub = acts.add_parser("serve", help="answer a SuperNode's messages from one process that stays up")
    sub.add_argument("address", metavar="HOST:PORT", help="of the SuperNode's Runtime API, on this machine")
    sub.add_argument("--supernode", type=int, required=True, metavar="PID", help="with whose end this one ends")
    secret = "the file that the SuperNode was given as --superexec-auth-secret-file"
    sub.add_argument("--secret", type=Path, required=True, metavar="FILE", help=secret)

    text = (
        "FILE.yaml names a base study, methods with options, partitions and seeds (docs/bench.md); key=value changes\n"
        "a key of the base study. Every cell is a run of its own in OUT/BENCH/PARTITION/METHOD/SEED: the same command\n"
        "continues after a stop. Then leaderboard.html, .md, .tex and .csv are written into OUT/BENCH.\n"
    )
    sub = command("bench", commands.bench, "run methods x partitions x seeds and rank them", text)
    sub.add_argument("bench", type=Path, nargs="+", metavar="FILE.yaml")
    sub.add_argument("--out", type=Path, default=Path("runs/bench"), help="parent of the benches' folders")
    sub.add_argument("--only", metavar="KIND=NAME,...", help="method=, partition=, seed=: only these cells")
    sub.add_argument("--dry-run", action="store_true", help="print the forecast; run nothing")
    sub.add_argument("--report-only", action="store_true", help="write the leaderboard of what has ended; run nothing")
    return top

"""What a study may name, with the options of each and where it comes from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fedlth.errors import StudyError

if TYPE_CHECKING:
    from fedlth.methods.method import FederatedMethod


def _tables() -> dict[str, Mapping[str, Callable[..., Any]]]:
    from fedlth.data.partition import PARTITIONS
    from fedlth.data.sources import SOURCES
    from fedlth.lab.controls import MASKS
    from fedlth.lab.probes import PROBES
    from fedlth.methods.attack import ATTACKS
    from fedlth.methods.defence import DEFENCES
    from fedlth.methods.robust import JOINS
    from fedlth.methods.table import METHODS
    from fedlth.methods.topology import TOPOLOGIES
    from fedlth.models.registry import MODELS
    from fedlth.personalization.arms import ARMS
    from fedlth.personalization.newcomer import NEWCOMERS
    from fedlth.storage.trackers import TRACKERS
    from fedlth.tickets.dead import DEADS
    from fedlth.tickets.gate import GATES, STOPS
    from fedlth.tickets.granularity import GRANULARITIES
    from fedlth.tickets.rewind import REWINDS
    from fedlth.tickets.schedule import SCHEDULES
    from fedlth.tickets.scope import SCOPES
    from fedlth.tickets.score import SCORES
    from fedlth.training.recipe import PARTS

    return {
        "methods": METHODS,
        "topologies": TOPOLOGIES,
        "models": MODELS,
        "datasets": SOURCES,
        "partitions": PARTITIONS,
        "scores": SCORES,
        "schedules": SCHEDULES,
        "scopes": SCOPES,
        "rewinds": REWINDS,
        "granularities": GRANULARITIES,
        "deads": DEADS,
        "gates": GATES,
        "stops": STOPS,
        "arms": ARMS,
        "mask_controls": MASKS,
        "probes": PROBES,
        "optimizers": PARTS["optimizer"],
        "rate_schedules": PARTS["schedule"],
        "losses": PARTS["loss"],
        "pulls": PARTS["pull"],
        "augments": PARTS["augment"],
        "joins": JOINS,
        "attacks": ATTACKS,
        "defences": DEFENCES,
        "newcomers": NEWCOMERS,
        "trackers": TRACKERS,
    }


FINDER_KINDS = ("scores", "schedules", "scopes", "rewinds", "granularities", "deads", "gates", "stops")
FINDER = (
    "a finder is score x schedule x scope x rewind x granularity x dead x gate x stop, each of which may be your own\n"
    "package.module:Name; [1, 2] are the rows of the table in docs/finders.md that a part serves"
)
ENGINES = {
    "inprocess": "this machine: forked workers, or with workers: 1 one job after the other; what the others must equal",
    "ray": "(extra: sim) workers on this machine or a cluster, clients placed on GPUs by fraction or memory",
    "flower": "Flower's Message API: simulation (extra: sim), `flwr run`, and real devices",
}
OWN_PLACES = {
    "models": "or your own package.module:callable(num_classes=, input_shape=, **options)",
    "datasets": "or hf:ID (extra: hf), or your own package.module:callable(root=, **options)",
}


def listing(what: str, name: str = "", study: str = "") -> str:
    """Return the listing of one kind, or of all; of one kind also of one name alone, which may be your own.

    Of one method that is its phases and messages too, and what they weigh in a study (a YAML file; without one, LeNet-5
    on the embedded images). Raises StudyError at an unknown kind or name.
    """
    tables = _tables()
    if name:
        return _one(what, name, study, tables)
    kinds = [*tables, "metrics", "finders", "engines"]
    if what and what not in kinds:
        raise StudyError(f"list: must be one of {', '.join(kinds)}, got {what!r}")
    wanted = [what] if what else [k for k in kinds if k not in FINDER_KINDS]
    return "\n\n".join(_section(kind, tables) for kind in wanted)


def _section(kind: str, tables: Mapping[str, Mapping[str, Callable[..., Any]]]) -> str:
    if kind == "engines":
        return "\n".join(["engines", *(f"  {n:18} {text}" for n, text in ENGINES.items())])
    if kind == "metrics":
        return "\n".join(["metrics", *_metrics(), "  or your own package.module:metric, called as (outputs, y)"])
    if kind == "finders":
        return "\n".join([FINDER, *(_section(k, tables) for k in FINDER_KINDS)])
    if kind == "methods":
        return "\n".join(["methods", *_methods(tables["methods"])])
    lines = [kind]
    for name, part in tables[kind].items():
        lines.append(f"  {name + _options(part):42} {_first_line(part)}{_rows(part)}".rstrip())
    if kind in OWN_PLACES:
        lines.append(f"  {OWN_PLACES[kind]}")
    return "\n".join(lines)


def _one(kind: str, name: str, study: str, tables: Mapping[str, Mapping[str, Callable[..., Any]]]) -> str:
    from fedlth.study.parts import imported

    if kind not in tables:
        raise StudyError(f"list: a name can be listed for one of {', '.join(tables)}, got {kind!r}")
    if ":" not in name and name not in tables[kind]:
        known = ", ".join(tables[kind])
        raise StudyError(f"list {kind}: must be one of {known} or package.module:name, got {name!r}")
    part = imported(name, f"list {kind}") if ":" in name else tables[kind][name]
    if kind != "methods":
        return f"{kind}\n  {name}{_options(part)}\n  {_first_line(part)}{_rows(part)}".rstrip()
    return "\n".join(["methods", *_methods({name: part}), *_phases(name, study)])


def _phases(name: str, file: str) -> list[str]:
    """Return a method's phases, and the forecast of its ledger."""
    from fedlth.experiment.resolve import resolve
    from fedlth.federation.forecast_bytes import forecast_bytes
    from fedlth.study.schema import build, load

    plain = {"study": "list", "clients": {"count": 20, "unseen": 0.2}, "method": name}
    study = load(file, [f"method={name}"]) if file else build(plain)
    what = file or "LeNet-5 on the embedded images, 20 clients"
    try:
        experiment, _ = resolve(study)
    except StudyError as error:
        return [f"  no forecast for {what}: {error}", f"  for another study: fedlth list methods {name} STUDY.yaml"]
    lines = []
    for phase in experiment.phases:
        up = ", ".join(f"{kind} ({message})" for message, kind in phase.update.sends) or "metrics alone"
        space = f"all {experiment.method.space.name}"
        down = {"nothing": "nothing", "slice": "what each client shares"}.get(phase.down, space)
        down = ", ".join((down, *(f"values ({name})" for name in phase.also)))
        if phase.topology is not None:
            senders = {len(experiment.senders(phase, 1, client)) for client in experiment.clients(phase, 1)}
            down = f"what {' to '.join(map(str, sorted({min(senders), max(senders)})))} neighbours published"
        count = len(experiment.clients(phase, 1))
        lines.append(f"  phase {phase.name}: {phase.rounds} x {count} clients; down {down}; up {up}")
    text = str(forecast_bytes(experiment, 1.0)).splitlines()
    return [*lines, f"  ledger of {what}:", *(f"    {line.strip()}" for line in text)]


def _methods(table: Mapping[str, Callable[..., Any]]) -> list[str]:
    lines = []
    for name, build in table.items():
        method = build()
        lines += [f"  {name:12} {method.summary}", f"  {'':12} {method.paper}{_options(build)}"]
    return lines


def _metrics() -> list[str]:
    from fedlth.training.metrics import METRICS

    lines = []
    for name, metric in METRICS.items():
        of = ", ".join(sorted(metric.fits))
        way = "higher" if metric.higher_is_better else "lower"
        lines.append(f"  {name:18} {getattr(metric, 'summary', _first_line(type(metric)))} Of {of}; {way} is better")
    return lines


def methods_markdown() -> str:
    """Return the method table of docs/methods.md."""
    from fedlth.methods.table import METHODS

    lines = ["| method | what it does | down | up | evaluated | paper |", "|---|---|---|---|---|---|"]
    for name, build in METHODS.items():
        r = build()
        down, up = "nothing", " + ".join(_sent_up(r)) or "nothing"
        if r.phases:
            down = "neighbours' models" if r.topology else "own slice" if r.slices else f"all {r.space.name}"
        summary = r.summary.replace("|", "\\|")
        lines.append(f"| `{name}` | {summary} | {down} | {up} | {', '.join(r.arms)} | {r.paper} |")
    return "\n".join(lines)


def _sent_up(method: FederatedMethod) -> list[str]:
    """Return what goes up in any phase of a method, in order, each once."""
    found = []
    for phase in method.phases:
        masked = phase.own_mask or phase.down == "slice"
        named = {"values": "kept or shared values with their mask" if masked else "values", "mask": "mask bits"}
        found += [named.get(kind, kind) for _, kind in phase.update.sends]
    return list(dict.fromkeys(found))


def finders_markdown(kind: str) -> str:
    """Return one table of docs/finders.md: the parts of one kind of FINDER_KINDS, their options, source and rows."""
    lines = ["| name | what it is | rows |", "|---|---|---|"]
    for name, part in _tables()[kind].items():
        options = _options(part).strip()
        text = _first_line(part).replace("|", "\\|")
        told = f"`{name}`" + (f" `{options}`" if options else "")
        lines.append(f"| {told} | {text} | {', '.join(map(str, getattr(part, 'rows', ())))} |")
    return "\n".join(lines)


def _rows(part: Callable[..., Any]) -> str:
    rows = getattr(part, "rows", ())
    return f" [{', '.join(map(str, rows))}]" if rows else ""


def _options(part: Callable[..., Any]) -> str:
    """Return " (option=default, ...)" for what a study may set."""
    hidden = {"num_classes", "input_shape", "root", "anchor", "replay_lr"}
    shown = []
    for name, p in inspect.signature(part).parameters.items():
        argument = name == "step" and p.default is inspect.Parameter.empty  # an arm's, which the client gives it
        if name not in hidden and not argument and p.kind is not inspect.Parameter.VAR_KEYWORD:
            shown.append(name if p.default is inspect.Parameter.empty else f"{name}={p.default!r}")
    return f" ({', '.join(shown)})" if shown else ""


def _first_line(part: Callable[..., Any]) -> str:
    text = inspect.getdoc(part) or ""
    return "" if text.startswith(getattr(part, "__name__", "?") + "(") else text.partition("\n")[0]

"""The tree of a lottery study: what `fedlth lottery STUDY.yaml` reads, validated as strictly as a federated study."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fedlth.errors import StudyError
from fedlth.study import schema
from fedlth.study.sections import Count, Floats, Names, Node, NotNegative, Positive, Spec, Specs, as_tuple
from fedlth.study.validate import validated
from fedlth.study.yaml_text import text_of

Share = Annotated[float, Field(ge=0, lt=1)]
Shares = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], BeforeValidator(as_tuple)]
Whole = Annotated[int, Field(ge=0)]
Named = str | dict[str, Any]  # a part's name, or {name, **options}; kept as written, for it names stored trainings
Rounds = Annotated[tuple[Whole, ...], BeforeValidator(as_tuple)]


class Data(Node):
    """Which data set, and how many of its examples train, validate (from the train split) and test. None: the rest."""

    name: str = "fashion_slice"
    root: str | None = None
    options: dict[str, Any] = {}
    train: Count | None = None
    validation: Count = 1000
    test: Count | None = None
    seed: Whole = 0


class Model(Node):
    """Which network (and with what other options it is drawn anew), what of it is prunable, how theta_0 is drawn."""

    name: str = "lenet300"
    options: dict[str, Any] = {}
    reinit_options: dict[str, Any] = {}
    prunable: Names | None = None
    init: Literal["default", "glorot_normal"] = "default"


class Train(Node):
    """How a training goes. warmup: iterations from `warmup_lr` up to `lr`; milestones: shares of the training where
    the rate falls to a tenth; attack: train on images attacked with this strength, in pixels of [0, 1]."""

    iterations: Count = 1000
    batch_size: Count = 60
    optimiser: Named = "sgd"
    lr: Positive = 0.1
    momentum: Share = 0.0
    weight_decay: NotNegative = 0.0
    schedule: Named = "constant"
    warmup: Whole = 0
    warmup_lr: NotNegative = 0.0
    milestones: Shares = ()
    evaluate_every: Count = 100
    dropout: Share = 0.0
    attack: Literal["none", "fgsm", "pgd"] = "none"
    attack_eps: NotNegative = 0.0
    attack_steps: Count = 10
    norm_l1: NotNegative = 0.0
    clip_norm: Positive | None = None
    loss: Spec = {"name": "cross_entropy"}
    pull: Spec | None = None
    augment: Specs = ()


class Search(Node):
    """How masks are found: a finder of fedlth.tickets, down `rounds` steps that each remove `rate` of the survivors,
    or down the given densities. train: keys of the study's train section that differ in the search."""

    score: Spec = {"name": "magnitude"}
    scope: Spec = {"name": "layerwise"}
    schedule: Spec = {"name": "shrink"}
    rewind: Spec = {"name": "init"}
    granularity: Spec = {"name": "element"}
    dead: Spec = {"name": "zero"}
    gate: Spec = {"name": "always"}
    stop: Spec = {"name": "target"}
    rounds: Count | None = None
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.2
    densities: Floats = ()
    train: dict[str, Any] = {}

    @property
    def targets(self) -> tuple[float, ...]:
        if self.rounds is None:
            return self.densities
        return tuple((1 - self.rate) ** n for n in range(1, self.rounds + 1))


class Arm(Node):
    """What is trained under a search's masks: a control of the mask, a rewind to named weights, what the dead hold.

    rounds: at which masks of the search (all when empty). start, dead, and train key by key: as in the search unless
    the arm says otherwise.
    """

    of: str
    rounds: Rounds = ()
    mask: Spec = {"name": "keep"}
    start: Spec | None = None
    dead: Spec | None = None
    train: dict[str, Any] = {}


class Lottery(Node):
    """A whole lottery study."""

    lottery: str = "lottery"
    seeds: Annotated[tuple[Whole, ...], BeforeValidator(as_tuple)] = (0, 1, 2)
    data: Annotated[Data, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)] = Data()
    model: Annotated[Model, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)] = Model()
    train: Train = Train()
    searches: dict[str, Search] = {}
    arms: dict[str, Arm] = {}
    probes: dict[str, Spec] = {}
    workers: Count = 2
    out: str | None = None

    def science(self) -> str:
        """Return canonical JSON of everything that decides the numbers."""
        return json.dumps(self.model_dump(mode="json", exclude={"workers", "out"}), sort_keys=True)


def build(tree: Any, where: str = "lottery") -> Lottery:
    """Validate a plain tree; raise StudyError with `where: place: what was wanted, got`."""
    if isinstance(tree, dict) and tree.keys() & {"study", "method", "clients", "federate"}:
        raise StudyError(f"{where}: is a federated study; `fedlth run` runs it")
    study = validated(Lottery, tree, where)
    for section, names in (("searches", study.searches), ("arms", study.arms), ("probes", study.probes)):
        for name in names:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise StudyError(f"{where}: {section}: a name must be letters, digits, . _ -, got {name!r}")
    if not re.fullmatch(r"\w[\w.-]*", study.lottery):
        raise StudyError(f"{where}: lottery: must be letters, digits, . _ -, got {study.lottery!r}")
    if not study.seeds or len(set(study.seeds)) != len(study.seeds):
        raise StudyError(f"{where}: seeds: must be one or more, each once, got {list(study.seeds)}")
    if not study.searches and not study.probes:
        raise StudyError(f"{where}: searches: must have at least one search, or probes at least one probe")
    for name, search in study.searches.items():
        place = f"{where}: searches.{name}"
        if (search.rounds is None) == (not search.densities):
            raise StudyError(f"{place}: must have either rounds or densities")
        falling = sorted(set(search.densities), reverse=True)
        if list(search.densities) != falling or any(not 0 < d <= 1 for d in falling):
            raise StudyError(f"{place}.densities: must fall within (0, 1], got {list(search.densities)}")
        override(study.train, search.train, f"{place}.train")
    for name, arm in study.arms.items():
        place = f"{where}: arms.{name}"
        if name in study.searches:
            raise StudyError(f"{place}: a search has this name already")
        if arm.of not in study.searches:
            raise StudyError(f"{place}.of: must be one of {', '.join(study.searches) or 'no search'}, got {arm.of!r}")
        override(study.train, {**study.searches[arm.of].train, **arm.train}, f"{place}.train")
    return study


def override(train: Train, changes: dict[str, Any], where: str) -> Train:
    """Return the train section with some keys changed; raise StudyError at an unknown one."""
    return validated(Train, {**train.model_dump(), **changes}, where)


def load(path: str | Path, overrides: list[str] | None = None) -> Lottery:
    """Read a lottery study, apply `key=value` overrides with dotted keys, validate."""
    return build(schema.read_tree(path, overrides), str(path))


def dump(study: Lottery) -> str:
    """Return the resolved study as YAML; loading it gives an equal study."""
    return text_of(study.model_dump(mode="json"))

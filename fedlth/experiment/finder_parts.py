"""The ticket finder of a study: each of its parts from its table, or the user's own."""

from __future__ import annotations

from fedlth.study.parts import make
from fedlth.study.schema import Study
from fedlth.tickets.dead import DEADS
from fedlth.tickets.finder import Finder
from fedlth.tickets.gate import GATES, STOPS
from fedlth.tickets.granularity import GRANULARITIES
from fedlth.tickets.rewind import REWINDS
from fedlth.tickets.schedule import SCHEDULES
from fedlth.tickets.scope import SCOPES
from fedlth.tickets.score import SCORES


def finder_of(study: Study) -> Finder:
    """Return the study's ticket finder; raise StudyError naming the place."""
    f = study.finder
    return Finder(
        score=make(SCORES, f.score, "finder.score"),
        schedule=make(SCHEDULES, f.schedule, "finder.schedule"),
        scope=make(SCOPES, f.scope, "finder.scope"),
        rewind=make(REWINDS, f.rewind, "finder.rewind"),
        granularity=make(GRANULARITIES, f.granularity, "finder.granularity"),
        dead=make(DEADS, f.dead, "finder.dead"),
        gate=make(GATES, f.gate, "finder.gate"),
        stop=make(STOPS, f.stop, "finder.stop"),
    )

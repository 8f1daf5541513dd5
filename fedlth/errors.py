"""The one exception that a user's mistake becomes: a single line that names the place."""

from __future__ import annotations


class StudyError(Exception):
    """Say in one line where the input is wrong, what was wanted and what was got."""


class NothingUsable(StudyError):
    """Say that no client gave a usable answer: a run without a result, not a mistake in its input."""


def wrong(place: str, wanted: str, got: object) -> StudyError:
    """Return the error `<place> must be <wanted>, got <got>`."""
    return StudyError(f"{place} must be {wanted}, got {got!r}")

"""The one exception that a user's mistake becomes: a single line that names the place."""

from __future__ import annotations

from importlib.util import find_spec


class StudyError(Exception):
    """Say in one line where the input is wrong, what was wanted and what was got."""


class NothingUsable(StudyError):
    """Say that no client gave a usable answer: a run without a result, not a mistake in its input."""


class MissingExtra(StudyError):
    """Say in one line that what was asked for needs packages that an extra of fedlth brings."""


def require(what: str, *packages: str, extra: str) -> None:
    """Raise MissingExtra where one of `packages` (top-level names) is not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise MissingExtra(f"{what} needs the extra: pip install 'fedlth[{extra}]' ({names} not installed)")


def wrong(place: str, wanted: str, got: object) -> StudyError:
    """Return the error `<place> must be <wanted>, got <got>`."""
    return StudyError(f"{place} must be {wanted}, got {got!r}")

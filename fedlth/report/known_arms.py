"""The arms of a study: their order, their names for people, what each one is, and how it is drawn."""

from __future__ import annotations

import zlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """How one arm is drawn. Marker and dashes say the same as the colour, for print without colour."""

    light: str
    dark: str
    marker: str
    dashes: str = "-"


@dataclass(frozen=True)
class Arm:
    """One way to give a client a model."""

    name: str
    label: str
    meaning: str
    style: Style


# Colours after Okabe and Ito, whom the colour-blind can tell apart.
OWN, RANDOM = Style("#0067a5", "#5bb4f0", "o"), Style("#7a7a7a", "#a8a8a8", "v", ":")
ARMS = (
    Arm("ticket", "personal ticket", "the client's own ticket, found on its data and fine-tuned from theta_g", OWN),
    Arm("refined", "refined ticket", "the ticket after further federated rounds inside the tickets",
        Style("#5b3fa0", "#b39bf0", "h")),
    Arm("own_tuned", "method's own, tuned", "the method's own personal model, fine-tuned at the end", OWN),
    Arm("own", "method's own", "the method's own personal model, as the method leaves it",
        Style("#3a3f8f", "#9aa2ff", "p")),
    Arm("ticket_0", "ticket, rewound to theta_0", "the ticket's mask on the initial weights, then fine-tuned",
        Style("#3f97c9", "#9fd8ff", "s", "--")),
    Arm("one_shot", "one-shot ticket", "a ticket pruned in one step, instead of round after round",
        Style("#00815f", "#2fc79b", "^")),
    Arm("global_mask", "global model's own mask", "theta_g pruned by its own magnitudes: not personal, no mask bytes",
        Style("#c4500a", "#ff8f4d", "D")),
    Arm("init_mask", "theta_0's own mask", "theta_0's own magnitudes, trained from where the ticket is: no mask bytes",
        Style("#8f6b00", "#e0bd4a", "D", "--")),
    Arm("shuffled_values", "ticket, shuffled values",
        "the ticket's mask, the values of each tensor in another order: what do the values matter?",
        Style("#7d5a8c", "#c8a8d6", "<", ":")),
    Arm("reinit", "ticket, re-initialised",
        "the ticket's mask on another draw of the initialisation: what does theta_0 matter?",
        Style("#8c3f3f", "#dd9b9b", ">", ":")),
    Arm("handed", "handed ticket", "for a newcomer alone: theta_g under a mask that the server gave it, fine-tuned",
        Style("#8c6d1f", "#d9bb5f", "d", "--")),
    Arm("random", "random ticket", "a random mask of equal density; its start was chosen on validation data", RANDOM),
    Arm("own_random", "random mask, tuned",
        "the control of the method's own mask: random, with equally many weights in each layer", RANDOM),
    Arm("own_global_mask", "global model's mask, as the own",
        "the hard control of the method's own mask: theta_g's largest weights, equally many in each layer",
        Style("#c4500a", "#ff8f4d", "D")),
    Arm("frozen_random", "random mask, frozen", "the control of a learnt mask: random, on the same frozen weights",
        RANDOM),
    Arm("dense", "dense twin", "theta_g fine-tuned without pruning, for the ticket's fine-tuning epochs",
        Style("#1a1a1a", "#f0f0f0", "*")),
    Arm("dense_total", "dense twin, total epochs", "theta_g fine-tuned without pruning, search epochs included",
        Style("#555555", "#c8c8c8", "*", "-.")),
    Arm("local", "local-only model", "trained from theta_0 on the client's own data, never federated",
        Style("#a87500", "#e8b93c", "P", "--")),
    Arm("global", "global model", "theta_g as it came from the federated rounds, not fine-tuned",
        Style("#a8487c", "#ec94c0", "X", "-.")),
)  # fmt: skip
_BY_NAME = {arm.name: arm for arm in ARMS}
_ORDER = {arm.name: place for place, arm in enumerate(ARMS)}
# An arm that is not listed is a user's: one of these looks, which no listed arm has and always the same for its name.
USERS_COLOURS = (("#007f86", "#41c7cf"), ("#7a4b2a", "#cfa07c"), ("#667300", "#b9c640"), ("#a3189a", "#ef86e6"))
USERS_MARKERS, USERS_DASHES = ("<", ">", "d", "H"), ("-", "--", "-.")


def arm_of(name: str) -> Arm:
    """Return the arm of that name; a user's own stands under its own name, in a style of its own."""
    return _BY_NAME.get(name) or Arm(name, name.replace("_", " "), "an arm of this method's own", _users_style(name))


def _users_style(name: str) -> Style:
    rest, colour = divmod(zlib.crc32(name.encode()), len(USERS_COLOURS))
    rest, marker = divmod(rest, len(USERS_MARKERS))
    return Style(*USERS_COLOURS[colour], USERS_MARKERS[marker], USERS_DASHES[rest % len(USERS_DASHES)])


def is_users(name: str) -> bool:
    """Say whether an arm is a user's method's own, which no list here knows."""
    return name not in _BY_NAME


def arm_order(name: str) -> tuple[int, str]:
    """Return the sort key of an arm; a user's stand last, by name."""
    return _ORDER.get(name, len(ARMS)), name

"""The controls that a mask-making method has in every table, whether its study asks for them or not."""

from __future__ import annotations

from fedlth.experiment.well_formed import method_of
from fedlth.study.schema import Study

# Which arms a method has says what it makes; each then has a random mask of equal density, the global model's own
# mask, and the dense twin at the budgets that a mask was given.
TICKETS = ("ticket", "refined", "ticket_0", "one_shot")
OF_TICKETS = ("dense", "dense_total", "global_mask", "random")
OF_OWN_MASKS = ("dense", "own_random", "own_global_mask")
# What a control is called in a table, by what it is beside the method's own row.
RANDOM, GLOBAL, DENSE = "random mask", "global model's mask", "dense twin"
KINDS = {
    "random": RANDOM, "own_random": RANDOM, "frozen_random": RANDOM,
    "global_mask": GLOBAL, "own_global_mask": GLOBAL,
    "dense": DENSE, "dense_total": "dense twin, total epochs",
}  # fmt: skip
# Of scores the global state is a mask itself: what clients learn of their own is held against it.
KINDS_OF_SCORES = KINDS | {"global": GLOBAL}


def kinds_of(study: Study) -> dict[str, str]:
    """Return what the controls of a study's method are called, by arm."""
    return KINDS_OF_SCORES if method_of(study).space.kind == "scores" else KINDS


def with_controls(study: Study) -> Study:
    """Return the study with the controls of the masks that its method makes; a method that makes none as it is.

    Without federated rounds there is no global model, so no mask of it either; nor is there one where the server has no
    whole model. Masks over frozen weights have their controls among the method's own arms.
    """
    method = method_of(study)
    arms = study.personalise.arms or method.arms
    wanted: tuple[str, ...] = ()
    if set(arms) & set(TICKETS):
        wanted = OF_TICKETS
    elif "own_random" in method.arms:
        wanted = tuple(arm for arm in OF_OWN_MASKS if method.has_whole or KINDS[arm] != GLOBAL)
    if not method.phases:
        wanted = tuple(arm for arm in wanted if KINDS[arm] != GLOBAL)
    added = [arm for arm in wanted if arm not in arms]
    if not added:
        return study
    return study.model_copy(update={"personalise": study.personalise.model_copy(update={"arms": (*arms, *added)})})

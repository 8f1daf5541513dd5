"""Seeding torch's process-global generators, from which dropout, initial weights and sampled masks are drawn."""

from __future__ import annotations

import torch


def seed_torch(seed: int) -> None:
    """Do what torch.manual_seed does, for the devices that this machine has.

    Without a GPU that is one generator. torch.manual_seed then writes down a stack trace for each kind of device that
    might still be used: a millisecond a training.
    """
    if torch.cuda.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)

"""What a model asks of its input: images of at least some size, or token sequences."""

from __future__ import annotations

from fedlth.errors import StudyError


def image_shape(model: str, input_shape: tuple[int, ...], *, least: int) -> tuple[int, int, int]:
    """Return (C, H, W); raise StudyError unless it is an image of at least `least` x `least`."""
    if len(input_shape) != 3 or min(input_shape) < 1 or min(input_shape[1:]) < least:
        raise StudyError(f"model: {model} must have images (C, H, W) of at least {least} x {least}, got {input_shape}")
    channels, height, width = input_shape
    return channels, height, width

"""Channels of constant value, folded: many weights on constants are one weight on a one, in training and in prediction.

A channel whose weights are all dead has its bias everywhere, whatever the example. A layer that reads such channels
adds up their weights times their values once a step, on a channel of ones (shrink.py); the gradient of that one sum is
all that their weights and biases need.
"""

from __future__ import annotations

from typing import Any

from fedlth.kernel import columns as col
from fedlth.kernel.arithmetic import multiply_add, zeros_1x16
from fedlth.kernel.jit import part
from fedlth.kernel.reduce import sums
from fedlth.kernel.vectors import load, number, spread, store


@part
def fold(rows: Any, lists: Any, w: Any) -> None:
    """Write the weights on ones of every layer: for each constant, its value times its weights."""
    for at in range(len(rows)):
        row = rows[at]
        size, total = row[col.FOLD_SIZE], row[col.FOLD_TOTAL]
        if row[col.CONSTANTS]:
            for p in range(0, size, 16):
                store(zeros_1x16(), w, total + p, 0)
        for c in range(row[col.CONSTANTS]):
            value = row[col.FOLD_VALUES] + c
            w[value] = w[number(lists, row[col.FOLD_BIASES] + c)]
            if row[col.FOLD_RELU] and w[value] < 0:
                w[value] = 0
            tile = spread(zeros_1x16(), w, value, 0)
            for p in range(0, size, 16):
                block = load(tile, w, row[col.FOLD_BLOCK] + c * size + p, 0)
                store(multiply_add(tile, block, load(tile, w, total + p, 0)), w, total + p, 0)
        for j in range(row[col.FOLD_COUNT]):
            w[number(lists, row[col.FOLD_PLACES] + j)] = w[total + j]


@part
def unfold(rows: Any, lists: Any, w: Any, grad: Any) -> None:
    """Add the gradients of the weights on constants and of the constants' biases, from those of the weights on ones."""
    for at in range(len(rows)):
        row = rows[at]
        size, total = row[col.FOLD_SIZE], row[col.FOLD_TOTAL]
        for j in range(row[col.FOLD_COUNT]):
            grad[total + j] = grad[number(lists, row[col.FOLD_PLACES] + j)]
        for c in range(row[col.CONSTANTS]):
            value = row[col.FOLD_VALUES] + c
            tile, slope = spread(zeros_1x16(), w, value, 0), zeros_1x16()
            for p in range(0, size, 16):
                block = row[col.FOLD_BLOCK] + c * size + p
                passed = load(tile, grad, total + p, 0)
                store(multiply_add(tile, passed, load(tile, grad, block, 0)), grad, block, 0)
                slope = multiply_add(load(tile, w, block, 0), passed, slope)
            if not row[col.FOLD_RELU] or w[value] > 0:
                grad[number(lists, row[col.FOLD_BIASES] + c)] += sums(slope)[0]

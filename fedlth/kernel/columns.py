"""The columns of the kernel's layer table: one int64 row a layer, written by memory_layout.py and read by loop.py.

Places are element indices into the work array, weights into the compact weight vector, lists into the index array.
"""

from __future__ import annotations

CONVOLUTION, LINEAR, MAX_POOL, AVERAGE_POOL, GLOBAL_MAX, GROUP_NORM, ADD, COPY, CHOOSE = range(9)

(
    KIND,
    RELU,  # the output is clipped at zero
    SPARSE,  # the weights are a list of kept ones
    NEEDS_DX,  # the gradient of the input is wanted
    NEEDS_DX_2,  # the same for the second input of an addition
    ACCUMULATE,  # ... and is added to what another reader of the input left there
    ACCUMULATE_2,
    GROUPS,
    CHANNELS,  # input: C, H, W
    HEIGHT,
    WIDTH,
    OUT_CHANNELS,  # output
    OUT_HEIGHT,
    OUT_WIDTH,
    WEIGHT,  # place of the weights in the compact vector
    BIAS,  # ... of the bias, -1 for none
    X,  # input: place of the first value, distance of channels and of rows
    X_PLANE,
    X_ROW,
    Y,  # output
    Y_PLANE,
    Y_ROW,
    DX,  # gradient of the input
    DX_PLANE,
    DX_ROW,
    DY,  # gradient of the output
    DY_PLANE,
    DY_ROW,
    X2,  # second input of an addition and its gradient
    X2_PLANE,
    X2_ROW,
    DX2,
    DX2_PLANE,
    DX2_ROW,
    SPREAD,  # gradient of the output with zeros between its values (equal to DY at stride 1)
    SPREAD_PLANE,
    SPREAD_ROW,
    TAPS,  # number of weights that an output sums over
    TAP_PLACES,  # list: where their inputs lie, from X
    FORWARD_PLACES,  # lists in the order of a dense sum: the taps' places, and their weights from the channel's first
    FORWARD_WEIGHTS,
    FORWARD_CHUNK,  # input channels at a time
    TOP,  # lists of first and end: the kernel rows inside the input by output row, ...
    LEFT,  # the kernel columns inside it by output pixel, ...
    REACH,  # and the output rows that a kernel row reaches
    TAP_ROW,  # input distance of two output rows, of two output pixels, of two groups
    TAP_STEP,
    TAP_GROUP,
    OUT_PLACES,  # list: where the output channels lie, from Y
    PIXELS,  # an output row is `PIXELS` stretches of `SPAN` values; one long stretch at stride 1
    SPAN,
    BACK_TAPS,  # number of weights that an input's gradient sums over
    BACK_PLACES,  # list: where their output gradients lie, from SPREAD
    BACKWARD_PLACES,  # the same as forward, for the input's gradient
    BACKWARD_WEIGHTS,
    BACKWARD_CHUNK,
    BACK_TOP,
    BACK_LEFT,
    BACK_GROUP,
    BACK_OUT_PLACES,  # list: where the input channels lie, from DX
    BACK_ROWS,
    BACK_SPAN,
    KERNEL_AREA,  # weights a channel pair
    KEPT,  # the layer's part of the list of all kept weights: first and end
    KEPT_END,
    KEPT_STARTS,  # lists of the kept weights by output channel and chunk of input channels
    KEPT_PLACES,
    CHUNK,  # input channels a chunk, and how many chunks a group has
    CHUNKS,
    BACK_STARTS,  # ... and by input channel and chunk of output channels
    BACK_KEPT_PLACES,
    BACK_KEPT_WEIGHTS,
    BACK_CHUNK,
    BACK_CHUNKS,
    WINDOW_Y,  # pooling
    WINDOW_X,
    STRIDE_Y,
    STRIDE_X,
    PADDING_Y,
    PADDING_X,
    STATS,  # place of what a kind keeps from forward to backward, and how many vectors of lanes that is
    STATS_COUNT,
    PACK,  # place of scratch
    CHOICE,  # list: the input channel of each output channel, -1 where it is a bias
    CONSTANTS,  # how many input channels are constant and folded (constants.py)
    FOLD_SIZE,  # weights on a constant: how many, up to a multiple of 16, and how many without what fills up
    FOLD_COUNT,
    FOLD_BLOCK,  # place of the weights by constant, of their sum times the constants, of the constants' values
    FOLD_TOTAL,
    FOLD_VALUES,
    FOLD_PLACES,  # lists of the places of the weights on ones, and of the constants' biases
    FOLD_BIASES,
    FOLD_RELU,  # the constants are biases clipped at zero
    NUM_COLUMNS,
) = range(94)

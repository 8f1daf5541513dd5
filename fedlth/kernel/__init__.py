"""The compiled kernel, with the batch innermost: it trains small convolutional networks and skips a ticket's zeros."""

"""Compute backends: the batch-innermost kernel that trains small convolutional networks and skips a ticket's zeros."""

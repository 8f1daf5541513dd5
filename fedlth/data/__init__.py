"""Data sets, the way they are divided among clients, and each client's train, validation and test parts."""

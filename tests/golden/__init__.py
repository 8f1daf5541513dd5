"""Golden files: a short ledger and the digests a method."""

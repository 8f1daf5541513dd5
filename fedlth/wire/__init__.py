"""What crosses between parties, as bytes."""

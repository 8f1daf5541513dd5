"""A study, resolved once."""

"""The tests; a package, so that studies can name `tests.tiny:images` and subprocesses find it."""

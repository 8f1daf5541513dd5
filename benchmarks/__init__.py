"""A package, since opacus installs one of this name."""

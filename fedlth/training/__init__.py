"""One client's training and evaluation: request, backends, cohorts."""

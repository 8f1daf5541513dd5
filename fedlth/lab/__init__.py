"""The ticket laboratory: one machine, one data set, one model; searches, controls and diagnostics of `fedlth lottery`."""

"""The ticket laboratory of `fedlth lottery`: one machine, one data set; searches, controls and diagnostics."""

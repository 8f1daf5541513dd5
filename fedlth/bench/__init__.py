"""Methods x data x seeds as one whole: a matrix of runs, and a leaderboard that says how far it can be believed."""

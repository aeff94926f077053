"""Where metrics go: the run's own file, Weights & Biases, and lines of a log."""

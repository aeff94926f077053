"""Speed and memory of the suite beside TRL: the same work, in turns, in one run."""

"""Models: loading them, telling them apart, and what a reference said of pairs."""

"""What ``inspect`` is made of."""

"""Sampling: completions of prompts, by our own decoding step where the model is of a family that it knows."""

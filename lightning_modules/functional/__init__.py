"""Pure maths on tensors: log-probabilities, losses, advantages, statistics; nothing here knows a model or a config."""

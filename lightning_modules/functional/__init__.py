"""Pure maths on tensors: log-probabilities, losses, advantages and statistics; nothing here knows a model or a config."""

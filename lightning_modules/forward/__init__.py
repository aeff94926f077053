"""What a model says of the completion tokens of a batch, with gradient and without a row of padding."""

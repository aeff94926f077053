"""What the evaluation is made of: prompts to completions, completions to scores, scores to metrics and files."""

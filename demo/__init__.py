"""What the small offline run is made of: tasks that a rule can check, a tokenizer, a model, and the judge."""

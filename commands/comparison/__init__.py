"""What ``compare`` is made of: runs as they are read, set against each other, and told in tables and a page."""

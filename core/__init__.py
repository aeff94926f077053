"""What every layer may use: errors, keys, import paths, whole files."""

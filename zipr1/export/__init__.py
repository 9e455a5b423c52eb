"""export: a trained run as a plain Hugging Face folder, checked against the run."""

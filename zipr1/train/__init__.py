"""train: the training loops, from a recipe to a finished run folder."""

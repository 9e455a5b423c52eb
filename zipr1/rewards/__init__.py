"""rewards: how right an answer is, by name: one file a check."""

"""rewards: functions that score an answer against the right one, from 0 to 1; one file for each kind of check."""

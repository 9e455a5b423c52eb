"""data: where questions come from: rows in files and on the hub, media, and the embedded tasks."""

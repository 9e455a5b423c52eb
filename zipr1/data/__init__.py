"""data: sources of questions: rows in files and on the hub, pictures and clips, and the embedded tasks."""

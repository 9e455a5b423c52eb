"""data/pages: embedded tasks of 500 tokens and more, about forms filled in by hand and clips of such sheets."""

"""data/digits: the embedded tasks, questions about pictures and clips of coloured handwritten digits."""

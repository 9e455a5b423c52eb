"""serving: other projects' servers run an exported folder as sparse as it was trained.

Imported by nobody here: a server finds it through its own plugins.
"""

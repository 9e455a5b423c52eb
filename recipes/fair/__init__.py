"""What recipes/lockbox.py is made of.

rows.py      CSV files of rows that are only ever added to; answers to questions packed into one cell
seeds.py     means over seeds, with the error of seeds and that of questions
models.py    what a path means to it: weights and their hash, recipe, untouched base, settings
"""

"""What recipes/compare.py and recipes/lockbox.py share.

rows.py      CSV files of rows that are only ever added to; answers to questions packed into one cell
seeds.py     means over seeds, with the error of seeds and that of questions
models.py    what a path means to them: weights and their hash, recipe, untouched base, settings
methods.py   the methods of the table, as overrides of recipes/tiny.yaml
front.py     one model read along p: p chosen on validation questions, the held-out ones read once
table.py     docs/compare.csv -> the table and the figure
"""

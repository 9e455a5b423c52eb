"""`zipr1 eval`: benchmarks at several budgets, dense beside sparse in one run.

    session.py    the evaluation in numbered steps
    harness.py    lmms-eval's data sets, prompts and scoring       adapter.py   the policy as its model
    answers.py    questions -> answers at all budgets              local.py     data from files
    scores.py     samples -> scores and paired differences         records.py   one benchmark's result
    folder.py     what an evaluation leaves behind                 report.py, html.py, plots.py, gallery.py

Only this package knows lmms_eval; tasks/ holds the embedded benchmarks as lmms-eval reads them.
"""

"""evaluate: benchmarks of lmms-eval, dense beside sparse at several values of p in one run (`zipr1 eval`).

    session.py   the evaluation in numbered steps; writes its files     suites.py    the benchmarks, as data
    harness.py   lmms-eval's data sets, prompts and scoring             adapter.py   the policy as its model
    answers.py   questions -> answers, in all variants together         local.py     benchmarks from files
    scores.py    samples -> scores; units.py: paired differences         records.py   one benchmark's result
    folder.py    what an evaluation leaves behind                       report.py    tables, report.md
    html.py, plots.py   the page and its figures                        listing.py   `--tasks list`
    compare.py   two folders side by side (`zipr1 compare`); compared.py: what that shows

Only this package knows lmms_eval; manifests.py is its entry point, tasks/ the embedded benchmarks as it reads them.
"""

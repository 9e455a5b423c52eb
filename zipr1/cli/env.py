"""`zipr1 env`: versions, devices and kernels, for a bug report."""

from __future__ import annotations

from typing import Annotated

import typer

from zipr1.cli.log import busy


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Versions, devices and kernels: what to put into a bug report.

    For example: zipr1 env
    """
    with busy(as_json) as console:
        from zipr1.models.about import about

        found = about()
    if as_json:
        from zipr1.core.jsontext import dumps

        print(dumps(found), flush=True)
        return
    for name, value in found.items():
        console.print(f"{name}: {value}", highlight=False, markup=False, soft_wrap=True)

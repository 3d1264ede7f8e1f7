"""`sixfold doctor`: what the machine is fit for, line by line as it is found.

Called by `app`. The monitor room looks; here it is put into words, or into one JSON document.
"""

from __future__ import annotations

import typer

from sixfold.base.errors import EXIT_DONE, EXIT_INFEASIBLE
from sixfold.cli.output import print_json
from sixfold.monitor.checkup import Finding, check

_SIGNS = {"ok": "ok  ", "note": "note", "fail": "FAIL"}


def examine(*, self_test: bool, as_json: bool) -> int:
    """The exit code is 3 where something is missing that training cannot do without."""
    findings: list[Finding] = []
    for finding in check(self_test=self_test):
        findings.append(finding)
        if not as_json:
            typer.echo(f"{_SIGNS[finding.status]}  {finding.what:<11} {finding.found}")
            if finding.fix:
                typer.echo(f"      {'':<11} fix: {finding.fix}")
    if as_json:
        print_json([vars(finding) for finding in findings])
    return EXIT_INFEASIBLE if any(each.status == "fail" for each in findings) else EXIT_DONE

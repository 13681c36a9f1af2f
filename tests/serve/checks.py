"""Runs the checks of a client: each by itself, so that one that fails does not hide the others."""

import json
import sys
import traceback


def run(name, checks, args):
    """Calls each of `checks` with `args`; prints what they gave as JSON on stdout, and on stderr what failed. The exit code."""
    summary, problems = {}, []
    for check in checks:
        try:
            summary[check.__name__] = check(args)
        except Exception as problem:  # each check is its own; the rest still runs
            where = "" if isinstance(problem, AssertionError) else traceback.format_exc(limit=-3)
            problems.append(f"{check.__name__}: {problem}\n{where}")
    print(json.dumps(summary | {"failed": len(problems)}))
    for problem in problems:
        print(f"{name}: {problem}", file=sys.stderr)
    return 1 if problems else 0

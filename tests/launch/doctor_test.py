"""lockstep doctor: what it says of this machine, and of the limits that it is started with."""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from harness import LOCKSTEP, contains, equal, lockstep, main, run, sanitized


def findings(*words, code=0, **options):
    """{subject: finding} of `lockstep doctor --json`, started by `words`."""
    report = json.loads(run(*words, LOCKSTEP, "doctor", "--json", code=code, **options).out)
    found = {one["subject"]: one for one in report["findings"]}
    for one in found.values():
        assert one["text"] and (one["hint"] or one["verdict"] == "ok"), one
    return found


def test_this_machine(folder):
    found = findings(code=None)
    contains(found["versions"]["text"], lockstep("--version").out.strip())
    cores = len(os.sched_getaffinity(0))
    contains(found["processor"]["text"], f" {cores} of {os.cpu_count()} cores")
    result = lockstep("doctor", code=None)
    for subject, one in found.items():
        contains(result.out, f"{one['verdict']:<8} {subject:<14} ")


def test_limits_are_findings(folder):
    found = findings("sh", "-c", 'ulimit -n 64; exec "$@"', "sh", code=None)
    equal(found["open files"], {"verdict": "warning", "subject": "open files", "text": "64",
                                "hint": "ulimit -n 4096"})
    contains(findings(code=None, env={"MKL_CBWR": "AVX2"})["exactness"]["text"], "MKL_CBWR=AVX2")
    if not sanitized():  # which need more address space
        found = findings("sh", "-c", 'ulimit -v 400000; exec "$@"', "sh", code=1)
        equal(found["shared memory"]["verdict"], "error")
        contains(found["shared memory"]["text"], "cannot be made", "RLIMIT_AS")


def test_bad_flags(folder):
    contains(lockstep("doctor", "--jso", code=2).err, "unknown flag --jso; hint: did you mean")
    contains(lockstep("doctor", "here", code=2).err, "unexpected argument here")


if __name__ == "__main__":
    main(globals())

"""The commands shown in README.md and docs/*.md run, and print what is shown.

In a block marked `console`, a line "$ command" is run (by sh, in one scratch folder for a file, the
programs on the PATH); the lines below it, up to the next command, are its output. Numbers in it
stand for any number, blanks for any blanks; a line that is only "…" stands for any lines. Commands
of ./dev are checked to exist but not run: they would build and test what is being tested."""

import glob
import os
import re
import shutil
import tempfile

from harness import BUILD, ROOT, contains, main, run

NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"


def console_blocks(path):
    """[(line, command, shown lines)] of a file."""
    commands, inside = [], False
    with open(path) as file:
        for number, line in enumerate(file.read().split("\n"), 1):
            if line.startswith("```"):
                inside = line.strip() == "```console"
            elif inside and line.startswith("$ "):
                commands.append((number, line[2:], []))
            elif inside and commands and commands[-1][1].endswith("\\"):
                commands[-1] = (commands[-1][0], commands[-1][1][:-1] + line.strip(), [])
            elif inside:
                assert commands, f"{path}:{number}: output without a command"
                commands[-1][2].append(line)
    return commands


def pattern(shown):
    """A regular expression for one line of output."""
    text = ""
    for piece in re.split(rf"({NUMBER}|[0-9a-f]{{8,}}…?|\s+)", shown.strip()):
        if not piece:
            continue
        if re.fullmatch(r"\s+", piece):
            text += r"\s+"
        elif re.fullmatch(rf"{NUMBER}|[0-9a-f]{{8,}}…?", piece):
            text += r"[-+\w.,…]+"
        elif re.fullmatch(r"[kMG]?B", piece):  # a size that is another number has another unit
            text += r"[kMG]?B"
        else:
            text += re.escape(piece)
    return re.compile(r"\s*" + text + r"\s*")


def check_output(place, shown, printed):
    lines = [line for line in printed.split("\n") if line.strip()]
    at, anywhere = 0, False
    for line in [line for line in shown if line.strip()]:
        if line.strip() == "…":
            anywhere = True
            continue
        wanted = pattern(line)
        found = next((i for i in range(at, len(lines) if anywhere else min(at + 1, len(lines)))
                      if wanted.fullmatch(lines[i])), None)
        assert found is not None, f"{place}: '{line}' is not what comes next in\n" + "\n".join(
            lines[at:])
        at, anywhere = found + 1, False
    assert not shown or anywhere or at == len(lines), f"{place}: not shown: {lines[at:]}"


def check_dev(place, command):
    words = command.split()
    usage = run(f"{ROOT}/dev", "help").out
    if len(words) > 1:
        contains(usage, f"\n  {words[1]} ")


def run_document(path):
    name = os.path.relpath(path, ROOT)
    scratch = tempfile.mkdtemp(prefix="lockstep-docs-")
    os.symlink(f"{ROOT}/examples", f"{scratch}/examples")
    environment = {"PATH": f"{BUILD}:{os.environ['PATH']}"}
    try:
        for number, command, shown in console_blocks(path):
            place = f"{name}:{number}: $ {command}"
            if re.match(r"\./dev\b|git clone|cd ", command):
                if command.startswith("./dev"):
                    check_dev(place, command)
                continue
            result = run("sh", "-c", command, cwd=scratch, env=environment)
            check_output(place, shown, result.out)
            print(f"         {place}", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def test_readme(_):
    run_document(f"{ROOT}/README.md")


def test_documents(_):
    for path in sorted(glob.glob(f"{ROOT}/docs/*.md")):
        run_document(path)


def test_paths_that_documents_link_to_exist(_):
    for path in [f"{ROOT}/README.md", f"{ROOT}/CONTRIBUTING.md", *glob.glob(f"{ROOT}/docs/*.md")]:
        with open(path) as file:
            text = re.sub(r"(?ms)^```.*?^```", "", file.read())  # code has brackets, too
            for link in re.findall(r"\]\(([^)#:]+)\)", text):
                target = os.path.join(os.path.dirname(path), link)
                assert os.path.exists(target), f"{os.path.relpath(path, ROOT)} links to {link}"


def test_code_that_documents_quote_is_in_the_file(_):
    for path in [f"{ROOT}/README.md", *glob.glob(f"{ROOT}/docs/*.md")]:
        with open(path) as file:
            quotes = re.findall(r"<!-- from (\S+) -->\n```\w*\n(.*?)```", file.read(), re.DOTALL)
        for source, quote in quotes:
            with open(f"{ROOT}/{source}") as file:
                lines = [line.strip() for line in file]
            for line in filter(None, map(str.strip, quote.split("\n"))):
                assert line in lines, f"{os.path.relpath(path, ROOT)} quotes '{line}' of {source}"


def test_the_matcher_itself(_):
    check_output("", ["a 1.5 b", "…", "end"], "a  77 b\nx\ny\nend\n")
    for shown, printed in ((["a 1"], "b 1\n"), (["a"], "a\nb\n"), (["a", "b"], "a\n")):
        try:
            check_output("", shown, printed)
        except AssertionError:
            continue
        raise AssertionError(f"{shown} was taken for {printed!r}")


if __name__ == "__main__":
    main(globals())

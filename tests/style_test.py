"""Holds what the style asks of every file, as far as a program can see it."""

import os
import re

from harness import LOCKSTEP, ROOT, main, run

# From top to bottom; a layer includes itself and what comes after it.
LAYERS = ["tools", "recipes", "train", "parallel", "bridge",  # torch above, none below
          "cluster", "checkpoint", "update", "collective", "transport", "memory", "data", "job",
          "observe", "base"]
WITH_TORCH = LAYERS[:LAYERS.index("bridge") + 1]
LONGEST_LINE, LONGEST_FILE = 100, 450
FOLDERS = ["lockstep", "tests", "examples", "fuzz", "bench", "cmake", "deploy", "docs", ".ci"]
FILES = ["dev", "CMakeLists.txt", "CMakePresets.json", "README.md", "CONTRIBUTING.md"]
TEXT = (".h", ".cc", ".py", ".cmake", ".txt", ".toml", ".md", ".in", ".json", ".yaml", ".sbatch")


def files(*ends):
    found = [os.path.join(ROOT, name) for name in FILES]
    for folder in FOLDERS:
        for place, folders, names in os.walk(os.path.join(ROOT, folder)):
            folders[:] = [name for name in folders if name not in ("corpus", "__pycache__")]
            found += [os.path.join(place, name) for name in names]
    return sorted(path for path in found if path.endswith(ends or TEXT + ("/dev",)))


def lines(path):
    with open(path, encoding="utf-8") as file:
        return file.read().split("\n")


def all_hold(faults):
    assert not faults, "\n" + "\n".join(faults)


def name(path):
    return os.path.relpath(path, ROOT)


def test_includes_go_down_only(_):
    faults = []
    for path in files(".h", ".cc"):
        parts = name(path).split("/")
        if parts[0] != "lockstep" or len(parts) != 3:
            continue
        layer = parts[1]
        assert layer in LAYERS, f"{name(path)}: '{layer}' is no layer; see docs/architecture.md"
        worker = layer != "tools" or parts[2].startswith("worker")
        for number, line in enumerate(lines(path), 1):
            place = f"{name(path)}:{number}"
            own = re.match(r'#\s*include\s+[<"]lockstep/([^/">]+)/', line)
            if own and LAYERS.index(own[1]) < LAYERS.index(layer):
                faults.append(f"{place}: {layer} includes {own[1]}, which lies above it")
            elif own and not worker and own[1] in WITH_TORCH and own[1] != "tools":
                faults.append(f"{place}: lockstep, which links no torch, includes {own[1]}")
            if re.match(r'#\s*include\s+[<"](torch|ATen|c10|caffe2)/', line) and not (
                    layer in WITH_TORCH and worker):
                faults.append(f"{place}: torch below the line")
            if re.match(r"#\s*include\s+<lockstep/", line):
                faults.append(f"{place}: our own headers are included with quotes")
    all_hold(faults)


def test_the_launcher_links_no_torch(_):
    needed = run("readelf", "-d", LOCKSTEP).out
    faults = [line for line in needed.split("\n")
              if "NEEDED" in line and re.search("torch|c10|mkl|gomp", line)]
    all_hold(faults)


def test_headers_begin_with_what_they_are(_):
    faults = []
    for path in files(".h"):
        text = lines(path)
        if not text[0].startswith("//"):
            faults.append(f"{name(path)}:1: a header opens with what it is")
        if "#pragma once" not in text:
            faults.append(f"{name(path)}: no #pragma once")
    all_hold(faults)


def test_lines_and_files_are_short(_):
    faults = []
    for path in files():
        text = lines(path)
        for number, line in enumerate(text, 1):
            wide = len(line) > LONGEST_LINE
            if wide and "http" not in line and not path.endswith((".md", ".json")):
                faults.append(f"{name(path)}:{number}: {len(line)} characters")
            if line != line.rstrip():
                faults.append(f"{name(path)}:{number}: blanks at the end")
            if "\t" in line:
                faults.append(f"{name(path)}:{number}: a tab")
        if len(text) > LONGEST_FILE and path.endswith((".h", ".cc", ".py")):
            faults.append(f"{name(path)}: {len(text)} lines")
        if text[-1] != "":
            faults.append(f"{name(path)}: no newline at the end")
    all_hold(faults)


def test_nothing_is_left_to_do(_):
    words = re.compile("TO" + "DO|FIX" + "ME")
    all_hold([f"{name(path)}:{number}: {line.strip()}" for path in files()
              for number, line in enumerate(lines(path), 1) if words.search(line)])


if __name__ == "__main__":
    main(globals())

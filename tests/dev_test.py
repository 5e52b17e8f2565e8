"""What ./dev refuses, and how it says so. Debian's tools are played by scripts here: nothing is
installed or built."""

import os
import shutil

from harness import ROOT, contains, equal, main, run

DEV = os.path.join(ROOT, "dev")
TOOLS = ["awk", "basename", "bash", "cat", "cut", "dirname", "env", "grep", "nproc", "paste",
         "readlink", "sed", "tr"]
HEADERS = "include/torch/csrc/api/include/torch"


def dev(folder, *arguments, code=2, missing="", root=True, sudo=False, apt=True, **environment):
    """Runs ./dev where every package is installed but those named."""
    tools = f"{folder}/bin"
    shutil.rmtree(tools, ignore_errors=True)
    os.mkdir(tools)

    def play(name, script):
        with open(f"{tools}/{name}", "w") as file:
            file.write(f"#!/bin/sh\n{script}\n")
        os.chmod(f"{tools}/{name}", 0o755)

    for tool in TOOLS:
        os.symlink(shutil.which(tool), f"{tools}/{tool}")
    play("id", f"echo {0 if root else 1000}")
    play("dpkg-query", f'''shift 3; for name; do case " {missing} " in *" $name "*) ;;
                           *) echo "installed $name" ;; esac; done''')
    if apt:
        play("apt-get", f'echo "$*" >> {folder}/apt; [ "$2" != install ]')
    if sudo:
        play("sudo", f'echo sudo >> {folder}/apt; exec "$@"')
    result = run(DEV, *arguments, code=code, env={"PATH": tools, "LOCKSTEP_TORCH": "",
                                                  **environment})
    assert "unbound" not in result.err and "not found" not in result.err, result
    return result


def test_unknown_words(folder):
    contains(dev(folder, "biuld").err, "./dev: no command 'biuld'", "usage: ./dev COMMAND")
    contains(dev(folder, "build", "fast").err, "no preset 'fast'; hint: release, debug")
    contains(dev(folder, "fuzz", "long").err, "fuzz takes a number of seconds, not 'long'")
    contains(dev(folder, "bench", "nothing").err, "usage: ./dev bench WHAT", "  collective\n")


def test_help_and_what_can_be_measured(folder):
    result = dev(folder, "help", code=0)
    contains(result.out, "usage: ./dev COMMAND", "LOCKSTEP_TORCH")
    equal(dev(folder, code=0).out, result.out, "without a command")
    contains(dev(folder, "bench", code=0).err, "  collective\n", "  fashion-mnist\n")


def test_missing_packages_without_the_right_to_install(folder):
    result = dev(folder, "setup", missing="ninja-build git", root=False)
    equal(result.err, "./dev: these packages are missing; install them as root: apt-get install "
          "ninja-build git\n")
    assert not os.path.exists(f"{folder}/apt"), "apt-get was called"


def test_missing_packages_that_cannot_be_installed(folder):
    for sudo in (False, True):
        result = dev(folder, "setup", missing="ninja-build", root=not sudo, sudo=sudo)
        contains(result.err, "installing Debian packages: ninja-build\n",
                 "./dev: apt-get could not install: ninja-build\n")
    with open(f"{folder}/apt") as file:
        calls = file.read().split("\n")
    install = "-q install -y --no-install-recommends ninja-build"
    equal(calls, ["-q update", install, "sudo", "-q update", "sudo", install, ""], "calls")


def test_a_system_without_debians_packages(folder):
    result = dev(folder, "setup", apt=False, CXX="false")
    contains(result.err, "Please install these first", "  ninja-build ", " ninja ",
             "(runs the build)", "  libfmt-dev ", " fmt/format.h ", "(messages)")


def test_libtorchs_that_are_refused(folder):
    def refused(*says):
        result = dev(folder, "setup", LOCKSTEP_TORCH=f"{folder}/torch")
        contains(result.err, f"./dev: LOCKSTEP_TORCH={folder}/torch is ", *says)
        equal(result.err.count("\n"), 1, result.err)

    refused("no folder; hint: ")
    os.makedirs(f"{folder}/torch/{HEADERS}")
    refused(f"no libtorch: it has no {HEADERS}/torch.h")
    os.mkdir(f"{folder}/torch/lib")
    for name in (f"{HEADERS}/torch.h", "lib/libtorch_cpu.so"):
        open(f"{folder}/torch/{name}", "w").close()
    with open(f"{folder}/torch/{HEADERS}/version.h", "w") as file:
        file.write("#define TORCH_VERSION_MAJOR 1\n#define TORCH_VERSION_MINOR 13\n")
    refused("libtorch 1.13; lockstep needs 2.11 to 2.13")


if __name__ == "__main__":
    main(globals())

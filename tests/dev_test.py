"""What ./dev refuses, and how it says so, and what it asks of other programs. These and Debian's
are played by scripts here: nothing is installed or built."""

import os
import shutil

from harness import ROOT, Skip, contains, equal, main, run

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
    for tool in ("cmake", "ctest"):
        play(tool, f'echo "{tool} $*" >> {folder}/calls')
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


def make_torch(folder, version):
    os.makedirs(f"{folder}/{HEADERS}", exist_ok=True)
    os.makedirs(f"{folder}/lib", exist_ok=True)
    for name in (f"{HEADERS}/torch.h", "lib/libtorch_cpu.so"):
        open(f"{folder}/{name}", "w").close()
    major, minor = version.split(".")
    with open(f"{folder}/{HEADERS}/version.h", "w") as file:
        file.write(f"#define TORCH_VERSION_MAJOR {major}\n#define TORCH_VERSION_MINOR {minor}\n")


def test_libtorchs_that_are_refused(folder):
    def refused(*says):
        result = dev(folder, "setup", LOCKSTEP_TORCH=f"{folder}/torch")
        contains(result.err, f"./dev: LOCKSTEP_TORCH={folder}/torch is ", *says)
        equal(result.err.count("\n"), 1, result.err)

    refused("no folder; hint: ")
    os.makedirs(f"{folder}/torch/lib")
    refused(f"no libtorch: it has no {HEADERS}/torch.h")
    make_torch(f"{folder}/torch", "1.13")
    refused("libtorch 1.13; lockstep needs 2.11 to 2.13")


def test_what_is_built_and_which_tests_run(folder):
    if not os.path.exists(f"{ROOT}/.deps/complete"):
        raise Skip("./dev would install numpy")
    make_torch(f"{folder}/torch", "2.13")
    for arguments, chosen in (([], "--label-exclude soak"), (["--soak"], "--build-config soak"),
                              (["-R", "data"], "--label-exclude soak -R data")):
        dev(folder, "test", *arguments, code=0, LOCKSTEP_TORCH=f"{folder}/torch",
            LOCKSTEP_JOBS="7")
        with open(f"{folder}/calls") as file:
            configure, build, test = file.read().strip().split("\n")
        os.remove(f"{folder}/calls")
        contains(configure, "--preset release", f"-DLOCKSTEP_TORCH_PREFIX={folder}/torch")
        equal(build, f"cmake --build {ROOT}/build -j 7")
        contains(test, f"--test-dir {ROOT}/build --output-on-failure")
        assert test.endswith(" " + chosen), test


if __name__ == "__main__":
    main(globals())

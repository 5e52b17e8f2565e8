"""lockstep installed, moved, found by a user's project, and its programs run from there."""

import os
import shutil

from harness import BUILD, ROOT, contains, main, run

USER = os.path.join(ROOT, "tests", "install")


def install(folder):
    """Installs, then moves: nothing may depend on where it was installed first."""
    run("cmake", "--install", BUILD, "--prefix", f"{folder}/first")
    shutil.move(f"{folder}/first", f"{folder}/moved")
    return f"{folder}/moved"


def build_user_project(folder, prefix, *options, **arguments):
    run("cmake", "-S", USER, "-B", f"{folder}/build", "-G", "Ninja",
        f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_BUILD_TYPE=Release", *options, **arguments)
    run("cmake", "--build", f"{folder}/build", "-j", "1", timeout=300)
    return f"{folder}/build"


def test_a_project_uses_the_installed_libraries(folder):
    prefix = install(folder)
    programs = build_user_project(folder, prefix)
    launcher = f"{prefix}/bin/lockstep"
    contains(run(f"{programs}/sum").out, "1 workers, sum of ranks 0")
    contains(run(launcher, "run", "--nproc-per-node", 3, f"{programs}/sum").out,
             "3 workers, sum of ranks 3")
    contains(run(f"{programs}/train").out, "1 workers, 2 x 3 = 6.0")
    contains(run(launcher, "run", "--nproc-per-node", 2, f"{programs}/train").out,
             "2 workers, 2 x 3 = 6.0")
    contains(run("readelf", "-d", f"{programs}/train").out, "libtorch")
    assert "libtorch" not in run("readelf", "-d", f"{programs}/sum").out

    # The installed programs find each other and libtorch.
    out = run(launcher, "train", "linear-regression", "--workers", 2, "--epochs", 1, "--output",
              f"{folder}/out").out
    contains(out, "model.safetensors")
    assert os.path.exists(f"{folder}/out/model.safetensors")


def test_core_needs_no_libtorch(folder):
    prefix = install(folder)
    programs = build_user_project(folder, prefix, "-DWITH_TORCH=OFF",
                                  env={"LOCKSTEP_TORCH": "/nowhere"})
    contains(run(f"{programs}/sum").out, "1 workers, sum of ranks 0")
    refused = run("cmake", "-S", USER, "-B", f"{folder}/other", "-G", "Ninja",
                  f"-DCMAKE_PREFIX_PATH={prefix}", env={"LOCKSTEP_TORCH": "/nowhere"}, code=1)
    contains(refused.err.replace("\n", " "), "no libtorch in", "/nowhere")


if __name__ == "__main__":
    main(globals())

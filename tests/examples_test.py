"""The programs of examples/, alone and under launchers."""

import gzip
import os
import re
import shutil

from harness import BUILD, LOCKSTEP, Skip, contains, equal, main, run

FASHION = "/usr/share/datasets/fashion-mnist"


def losses(text):
    return [float(loss) for loss in re.findall(r"epoch \d+: loss ([\d.]+)", text)]


def test_mnist_alone_and_on_workers(_):
    program = f"{BUILD}/example-mnist"
    alone = run(program)
    contains(alone.out, "on rank 0 of 1")
    for count in (2, 3):
        several = run(LOCKSTEP, "run", "--nproc-per-node", count, program)
        contains(several.out, f"on rank 0 of {count}")
        values = losses(several.out)
        equal(len(values), 2, "epochs")
        assert values[1] < values[0] < 2.4, values


def test_mnist_on_fashion_mnist(folder):
    if not os.path.isdir(FASHION):
        raise Skip(f"no {FASHION} (Debian's dataset-fashion-mnist)")
    for name in os.listdir(FASHION):
        with gzip.open(f"{FASHION}/{name}") as packed:
            with open(f"{folder}/{name.removesuffix('.gz')}", "wb") as file:
                shutil.copyfileobj(packed, file)
    out = run(LOCKSTEP, "run", "--nproc-per-node", 2, f"{BUILD}/example-mnist", folder, 1).out
    (loss,) = losses(out)
    assert loss < 0.8, loss


def test_trainer_resumes_on_another_number_of_workers(folder):
    program = f"{BUILD}/example-trainer"

    def last_line(*command):
        return run(*command).out.strip().split("\n")[-1].removeprefix("[rank 0] ")

    whole = last_line(program, f"{folder}/whole", 4)
    contains(whole, "128 steps, stopped after 4 epochs; sum of the weights ")
    first = run(LOCKSTEP, "run", "--nproc-per-node", 2, program, f"{folder}/run", 2).out
    contains(first, "64 steps, stopped after 2 epochs")
    accuracies = [float(value) for value in re.findall(r"accuracy ([\d.]+) %", first)]
    assert accuracies[1] > 30, accuracies
    equal(last_line(LOCKSTEP, "run", "--nproc-per-node", 3, program, f"{folder}/run", 4), whole)
    again = run(program, f"{folder}/run", 4)
    equal(again.out.strip(), whole, "a finished run")
    contains(again.err, "going on from step 128")


def test_elastic_ends_with_the_same_weights_whoever_dies(_):
    program = [f"{BUILD}/example-elastic", 300]

    def weights(*arguments):
        ran = run(LOCKSTEP, "run", *arguments, *program)
        (found,) = re.findall(r"300 steps on (\d) workers, generation (\d+): weights (\w{16})",
                              ran.out)
        return ran.out + ran.err, int(found[0]), int(found[1]), found[2]

    _, size, generation, whole = weights("--nproc-per-node", 2)
    equal((size, generation), (2, 0), "undisturbed")
    struck = ["--max-restarts", 9, "--inject", "kill rank=1 step=40", "--inject",
              "kill rank=0 step=200 when=decided"]
    said, size, generation, same = weights("--nproc-per-node", 2, *struck)
    equal((size, same), (2, whole), "killed twice")
    assert generation >= 2, said
    contains(said, "killed by signal 9 (SIGKILL)")
    said, size, _, same = weights("--nproc-per-node", "1:2", "--max-restarts", 0, "--inject",
                                  "kill rank=0 step=100")
    equal((size, same), (1, whole), "going on with one")


if __name__ == "__main__":
    main(globals())

"""What a user can get wrong: a clear line, exit code 2, and nothing half written."""

import gzip
import os
import struct

from harness import (LOCKSTEP, Skip, contains, equal, lockstep, main, make_csv, make_idx_folder,
                     run, train, write_idx)


def refused(folder, name, *arguments, says=(), code=2, data=None):
    """lockstep train fails with one line on standard error that says all of `says`."""
    output = f"{folder}/out"
    words = ["train", name, "--output", output, *arguments]
    if data is not None:
        words += ["--data", data]
    result = lockstep(*words, code=code)
    contains(result.err, *says)
    lines = [line for line in result.err.split("\n") if line]
    assert code != 2 or len(lines) == 1, f"more than one line:\n{result.err}"
    assert not os.path.exists(output), f"{output} was left behind: {os.listdir(output)}"
    left = [entry for entry in os.listdir(folder) if entry.startswith((".out", "out"))]
    assert not left, f"left behind: {left}"
    return result


def job_file(folder, text):
    with open(f"{folder}/job.toml", "w") as file:
        file.write(text)
    return f"{folder}/job.toml"


# --- The job ---


def test_unknown_key_is_named_with_its_line_and_the_nearest_one(folder):
    job = job_file(folder, 'recipe = "linear-regression"\n[optimizer]\nlearning_rate = 1e-3\n')
    refused(folder, job, says=("optimizer.learning_rate", "job.toml:3", "hint:"))
    refused(folder, "linear-regression", "--set", "optimizer.lrr=1", says=(
        "optimizer.lrr", "--set", "hint:", "optimizer.lr"))


def test_wrong_type_and_out_of_range(folder):
    job = job_file(folder, 'recipe = "linear-regression"\n[train]\nepochs = "ten"\n')
    refused(folder, job, says=("train.epochs", "job.toml:3", "hint:"))
    refused(folder, "linear-regression", "--epochs", "0", says=("epochs", "--epochs", "hint:"))
    refused(folder, "linear-regression", "--set", "optimizer.lr=-1", says=("optimizer.lr", "--set"))
    refused(folder, "linear-regression", "--set", "model.name=mpl", says=("model.name", "mlp"))
    refused(folder, "linear-regression", "--set", "optimizer.lr=1e300", says=(
        "optimizer.lr", "--set", "1e+30"))
    refused(folder, "linear-regression", "--set", "optimizer.lr", says=("--set", "="))
    refused(folder, "linear-regression", "--workers", "0", says=("--workers",))


def test_not_toml(folder):
    refused(folder, job_file(folder, 'recipe = "mnist\n'), says=("job.toml:1",))


def test_unknown_recipe_or_file(folder):
    refused(folder, "fashion-mnits", says=("fashion-mnits", "hint:", "fashion-mnist"))
    refused(folder, f"{folder}/none.toml", says=("none.toml",))


def test_unknown_flag_and_command(folder):
    contains(lockstep("train", "linear-regression", "--wrokers", "2", code=2).err, "--wrokers")
    contains(lockstep("trian", code=2).err, "trian")


def test_more_workers_than_samples(folder):
    data = make_csv(f"{folder}/table.csv", rows=3)
    refused(folder, "csv", "--set", "dataset.target=target", "--workers", "4", data=data,
            says=("4 workers", "2 training samples", "hint:"))


# --- Where to write ---


def test_existing_output_folder_is_refused_unless_overwritten(folder):
    train("linear-regression", f"{folder}/out", "--epochs", "1")
    before = {name: os.stat(f"{folder}/out/{name}").st_mtime_ns
              for name in os.listdir(f"{folder}/out")}
    result = lockstep("train", "linear-regression", "--output", f"{folder}/out", code=2)
    contains(result.err, f"{folder}/out", "--overwrite")
    after = {name: os.stat(f"{folder}/out/{name}").st_mtime_ns
             for name in os.listdir(f"{folder}/out")}
    equal(after, before, "the files that were there")
    contains(lockstep("train", "linear-regression", "--auto-resume", code=2).err, "--output")
    report = train("linear-regression", f"{folder}/out", "--epochs", "2", "--overwrite")
    equal(len(report["epochs"]), 2)


def test_output_without_permission(folder):
    os.mkdir(f"{folder}/locked", 0o555)
    result = without_rights("train", "linear-regression", "--output", f"{folder}/locked/out",
                            code=2)
    contains(result.err, f"{folder}/locked", "Permission denied")


# --- Image data ---


def idx_refused(folder, *says):
    refused(folder, "mnist", data=f"{folder}/data", says=says)


def test_missing_data(folder):
    refused(folder, "mnist", says=("--data",))
    refused(folder, "mnist", data=f"{folder}/nowhere", says=(f"{folder}/nowhere",))
    make_idx_folder(f"{folder}/data")
    os.remove(f"{folder}/data/train-labels-idx1-ubyte")
    idx_refused(folder, "train-labels-idx1-ubyte")
    make_idx_folder(f"{folder}/data")
    os.remove(f"{folder}/data/t10k-images-idx3-ubyte")
    idx_refused(folder, "t10k-images-idx3-ubyte", "hint: split.test")


def test_truncated_data(folder):
    make_idx_folder(f"{folder}/data")
    os.truncate(f"{folder}/data/train-images-idx3-ubyte", 5000)
    idx_refused(folder, "train-images-idx3-ubyte")
    os.truncate(f"{folder}/data/train-images-idx3-ubyte", 7)
    idx_refused(folder, "train-images-idx3-ubyte")
    os.truncate(f"{folder}/data/train-images-idx3-ubyte", 0)
    idx_refused(folder, "train-images-idx3-ubyte")


def test_corrupt_gzip(folder):
    make_idx_folder(f"{folder}/data", compress=True)
    path = f"{folder}/data/t10k-images-idx3-ubyte.gz"
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        file.write(b"\0" * 64)
    idx_refused(folder, "t10k-images-idx3-ubyte.gz")


def test_wrong_magic(folder):
    make_idx_folder(f"{folder}/data")
    write_idx(f"{folder}/data/train-images-idx3-ubyte", (150, 28, 28), bytes(150 * 784), magic=2051
              + 0x10000)
    idx_refused(folder, "train-images-idx3-ubyte", "magic")


def test_counts_disagree(folder):
    make_idx_folder(f"{folder}/data")
    write_idx(f"{folder}/data/train-labels-idx1-ubyte", (149,), bytes(149))
    idx_refused(folder, "150", "149", "train-labels-idx1-ubyte")


def test_absurd_sizes(folder):
    make_idx_folder(f"{folder}/data")
    write_idx(f"{folder}/data/train-images-idx3-ubyte", (2**31, 2**31, 2**31), b"")
    idx_refused(folder, "train-images-idx3-ubyte")


def test_label_out_of_range(folder):
    make_idx_folder(f"{folder}/data")
    labels = [i % 10 for i in range(150)]
    labels[77] = 12
    write_idx(f"{folder}/data/train-labels-idx1-ubyte", (150,), labels)
    idx_refused(folder, "train-labels-idx1-ubyte", "77", "12")


def without_rights(*arguments, code):
    """Runs lockstep without root's right to read and write whatever it likes."""
    if os.geteuid() != 0:
        return lockstep(*arguments, code=code)
    prefix = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    if run(*prefix, "true", code=None).code != 0:
        raise Skip("running as root, and its rights cannot be given up here")
    return run(*prefix, LOCKSTEP, *arguments, code=code)


def test_data_without_permission(folder):
    make_idx_folder(f"{folder}/data")
    os.chmod(f"{folder}/data", 0)
    result = without_rights("train", "mnist", "--data", f"{folder}/data", "--output",
                            f"{folder}/out", code=2)
    os.chmod(f"{folder}/data", 0o755)  # so that it can be removed
    contains(result.err, f"{folder}/data", "ermission")
    assert not os.path.exists(f"{folder}/out")


# --- Tables ---


def csv_refused(folder, content, *says, arguments=()):
    with open(f"{folder}/table.csv", "w") as file:
        file.write(content)
    refused(folder, "csv", "--set", "dataset.target=y", *arguments, data=f"{folder}/table.csv",
            says=("table.csv", *says))


def test_tables(folder):
    csv_refused(folder, "a,y\n1,2\n3\n", ":3")
    csv_refused(folder, "a,y\n1,2\n3,x\n", ":3", "x")
    csv_refused(folder, "a,y\n1,2\n3,nan\n", ":3")
    csv_refused(folder, "a,z\n1,2\n3,4\n", "y", "hint:")
    csv_refused(folder, "a;y\n1;2\n", 'hint: dataset.delimiter = ";"')
    csv_refused(folder, "a,y\n", "row")
    csv_refused(folder, "", "")
    csv_refused(folder, "a,y\n1,0\n2,1.5\n", ":3",
                arguments=("--set", "dataset.task=classification"))


def test_hinge_on_a_table_of_three_classes(folder):
    data = make_csv(f"{folder}/table.csv", classes=3)
    refused(folder, "csv", "--set", "dataset.target=target", "--set", "dataset.task=classification",
            "--set", "loss.name=hinge", data=data,
            says=("loss.name", "two classes, the data has 3", "hint: cross_entropy"))


def test_what_is_no_file(folder):
    os.mkfifo(f"{folder}/fifo")
    for path in (f"{folder}/fifo", "/dev/zero"):
        refused(folder, "csv", "--set", "dataset.target=y", data=path,
                says=(path, "no regular file"))


# --- Prediction ---


def test_prediction(folder):
    data = make_csv(f"{folder}/table.csv")
    train("csv", f"{folder}/run", "--data", data, "--set", "dataset.target=target", "--epochs", 1)
    out = f"{folder}/predictions.csv"

    def predict_refused(run_folder, data, *says):
        result = lockstep("predict", run_folder, "--data", data, "--output", out, code=2)
        contains(result.err, *says)
        assert not os.path.exists(out)

    predict_refused(f"{folder}/nowhere", data, "nowhere")
    predict_refused(f"{folder}/run", f"{folder}/none.csv", "none.csv")
    predict_refused(f"{folder}/run", "", "--data", "empty value")
    contains(lockstep("predict", f"{folder}/run", "--data", data, "--output", out, "--workers", 0,
                      code=2).err, "--workers 0")
    contains(lockstep("predict", f"{folder}/run", "--data", data, code=2).err,
             "lockstep: no --output given")
    contains(lockstep("predict", f"{folder}/run", "--data", data, "--overwrite", "--output",
                      f"{folder}/run/model.safetensors", code=2).err, "model.safetensors")
    with open(f"{folder}/other.csv", "w") as file:
        file.write("a,b\n1,2\n")
    predict_refused(f"{folder}/run", f"{folder}/other.csv", "other.csv", "c")
    weights = f"{folder}/run/model.safetensors"
    with open(weights, "rb") as file:
        content = file.read()
    for wrong in (content[:-4], content[:3], struct.pack("<Q", 2**60) + content[8:], b""):
        with open(weights, "wb") as file:
            file.write(wrong)
        predict_refused(f"{folder}/run", data, "model.safetensors")


def test_gzip_bomb_is_no_idx_file(folder):
    make_idx_folder(f"{folder}/data")
    os.remove(f"{folder}/data/train-labels-idx1-ubyte")
    with gzip.open(f"{folder}/data/train-labels-idx1-ubyte.gz", "wb", compresslevel=9) as file:
        file.write(struct.pack(">HBBI", 0, 8, 1, 150) + bytes(50_000_000))
    idx_refused(folder, "train-labels-idx1-ubyte.gz")


if __name__ == "__main__":
    main(globals())

"""deploy/: the Kubernetes manifests are what Kubernetes takes, and agree with each other and with
the flags of lockstep train. The Slurm batch file is run by launch/slurm_test.py."""

import os
import re
import shutil

from harness import ROOT, Skip, equal, lockstep, main, run

try:
    import kubernetes_validate
    import yaml
except ImportError:
    kubernetes_validate = None

FOLDER = f"{ROOT}/deploy/kubernetes"
VERSIONS = ("1.31", "1.36")  # the oldest that knows all that job.yaml says, and a new one


def manifests(folder):
    """{kind: what kubectl -k would apply}."""
    if kubernetes_validate is None:
        raise Skip("kubernetes-validate is not installed (./dev setup)")
    here = f"{folder}/kubernetes"
    shutil.copytree(FOLDER, here, ignore=shutil.ignore_patterns("key"))
    lockstep("key", f"{here}/key")
    with open(f"{here}/kustomization.yaml") as file:
        customization = yaml.safe_load(file)
    texts = [open(f"{here}/{name}").read() for name in customization["resources"]]
    found = [yaml.safe_load(text) for text in texts]
    if shutil.which("kubectl"):
        found = list(yaml.safe_load_all(run("kubectl", "kustomize", here).out))
        equal({one["kind"] for one in found},
              {"Job", "PersistentVolumeClaim", "Secret", "Service"}, "what kubectl applies")
    (secret,) = customization["secretGenerator"]
    return {one["kind"]: one for one in found}, secret["name"], secret["files"]


def test_kubernetes_takes_the_manifests(folder):
    for one in manifests(folder)[0].values():
        for version in VERSIONS:
            kubernetes_validate.validate(one, version, strict=True)
        broken = {**one, "spek": {}}
        try:
            kubernetes_validate.validate(broken, VERSIONS[0], strict=True)
        except kubernetes_validate.ValidationError:
            continue
        raise AssertionError(f"the schema of {one['kind']} takes anything")


def test_the_manifests_agree(folder):
    found, secret, files = manifests(folder)
    job, service = found["Job"]["spec"], found["Service"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    flags = dict(re.fullmatch(r"(--[a-z-]+)=?(.*)", word).groups() for word in container["args"])
    known = lockstep("train", "--help").out + lockstep("run", "--help").out
    equal([flag for flag in flags if not re.search(rf"{flag}[ ,]", known)], [], "unknown flags")
    equal([flags["--nnodes"]] * 2, [str(job["completions"]), str(job["parallelism"])])
    name = found["Job"]["metadata"]["name"]
    (port,) = service["spec"]["ports"]
    equal(flags["--rdzv-endpoint"], f"{name}-0.{service['metadata']['name']}:{port['port']}")
    equal(pod["subdomain"], service["metadata"]["name"])
    equal(service["spec"]["selector"], {"job-name": name})
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    equal(volumes["key"]["secret"], {"secretName": secret, "defaultMode": 0o400})
    equal(flags["--key-file"], f"{mounts['key']}/{files[0]}")
    equal(volumes["runs"]["persistentVolumeClaim"]["claimName"],
          found["PersistentVolumeClaim"]["metadata"]["name"])
    assert flags["--output"].startswith(mounts["runs"] + "/"), flags
    equal(flags["--auto-resume"], "", "what a pod that is started again does")
    equal({rule["containerName"] for policy in job["podFailurePolicy"]["rules"]
           for rule in [policy.get("onExitCodes")] if rule}, {container["name"]})


if __name__ == "__main__":
    main(globals())

"""sshd on nodes of nodes.py, and an ssh that gets in without asking.

  with Nodes(2) as nodes, Sshd(nodes, folder) as ssh:
      nodes.run(0, ["ssh", "node1", "hostname"], env=ssh.environment)

They end with their nodes; all they write is in `folder`."""

import os
import shutil
import subprocess
import time

from harness import Skip, run

PRIVILEGE_SEPARATION = "/run/sshd"  # sshd wants the folder to be there


class Sshd:
    def __init__(self, nodes, folder):
        self.program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
        if self.program is None or shutil.which("ssh") is None:
            raise Skip("sshd and ssh are not installed")
        self.nodes, self.folder = nodes, folder
        self.environment = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}"}

    def __enter__(self):
        os.makedirs(PRIVILEGE_SEPARATION, mode=0o755, exist_ok=True)
        os.mkdir(f"{self.folder}/bin")
        for key in ("host", "user"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{self.folder}/{key}")
        self._write("sshd_config", f"HostKey {self.folder}/host\nPidFile none\nUsePAM no\n"
                    f"AuthorizedKeysFile {self.folder}/user.pub\nStrictModes no\n")
        self._write("ssh_config", f"Host *\nIdentityFile {self.folder}/user\nBatchMode yes\n"
                    "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n")
        self._write("bin/ssh", f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.folder}/ssh_config '
                    '"$@"\n')
        os.chmod(f"{self.folder}/bin/ssh", 0o755)
        for node, name in enumerate(self.nodes.names):
            with open(f"{self.folder}/sshd-{node}.log", "w") as log:
                self.nodes.run(node, [self.program, "-D", "-e", "-f", f"{self.folder}/sshd_config"],
                               stderr=log)
        for name in self.nodes.names:
            self._await(name)
        return self

    def __exit__(self, *_):
        pass

    def _write(self, name, text):
        with open(f"{self.folder}/{name}", "w") as file:
            file.write(text)

    def _await(self, name):
        deadline = time.monotonic() + 60
        while True:
            process = self.nodes.run(0, ["ssh", name, "true"], env=self.environment,
                                     stderr=subprocess.PIPE, text=True)
            error = process.communicate(timeout=60)[1]
            if process.returncode == 0:
                return
            assert time.monotonic() < deadline, f"no way to {name}: {error}"
            time.sleep(0.05)

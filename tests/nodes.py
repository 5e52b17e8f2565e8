"""Nodes to test with, all on this machine: each a network namespace with a host name of its own,
all on one switch.

  with Nodes(2, rate="1gbit") as nodes:           # of each node's link, each way; none: no limit
      job = nodes.run(1, ["lockstep", "doctor"])  # a Popen
      nodes.cut(1)                                # pulls the cable; heal(1) puts it back
      nodes.kill(1)                               # SIGKILL to everything that runs there

Node i is called node<i>, has the address nodes.addresses[i] on its interface eth0, and knows the
others by name. The machine's own interfaces are not among theirs: two tests at once don't meet.
Everything ends with the `with`, processes too; what a test that was killed left is removed by the
next one that comes. Only root can make nodes: a test without the rights is skipped."""

import atexit
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile

from harness import Skip

NAMES = re.compile(r"lockstep-(\d+)-\d+-(?:switch|node\d+)")
COUNTER = itertools.count()
HOSTS = "/etc/netns"  # `ip netns exec` shows files in HOSTS/<namespace> in place of those in /etc


def call(*command, given=None):
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def burst_of(rate):
    """Bytes that a link may be ahead of its rate: 2 ms, in which a busy machine comes to send what
    is due, and no less than the 64 KB that the kernel handles in one piece."""
    number, unit = re.fullmatch(r"(\d+)([kmg])bit", rate).groups()
    return max(1 << 16, int(number) * {"k": 10**3, "m": 10**6, "g": 10**9}[unit] // 8 // 500)


def unavailable():
    """Why no nodes can be made here; "": they can."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    for tool in ("ip", "tc", "unshare"):
        if not shutil.which(tool):
            return f"there is no program {tool}"
    probe = f"lockstep-{os.getpid()}-{next(COUNTER)}-switch"
    try:
        call("ip", "netns", "add", probe)
        call("ip", "-n", probe, "link", "add", "bridge", "type", "bridge")
        call("ip", "netns", "exec", probe, "unshare", "--uts", "--ipc", "hostname", "node")
    except OSError as error:
        return f"no network namespaces can be made: {error}"
    finally:
        remove(probe)
    return ""


def remove(namespace):
    """And every process in it; other removers at the same time do no harm."""
    def run_ip(*words):
        return subprocess.run(["ip", "netns", *words, namespace], capture_output=True, text=True)

    for pid in run_ip("pids").stdout.split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            pass
    run_ip("del")
    shutil.rmtree(f"{HOSTS}/{namespace}", ignore_errors=True)
    if os.path.isdir(HOSTS) and not os.listdir(HOSTS):
        try:
            os.rmdir(HOSTS)
        except OSError:
            pass  # another test's just came


def sweep():
    """Removes what processes that are no more have left."""
    for folder in ("/run/netns", HOSTS):
        for name in os.listdir(folder) if os.path.isdir(folder) else []:
            found = NAMES.fullmatch(name)
            if found and not os.path.exists(f"/proc/{found[1]}"):
                remove(name)


class Failed(Exception):
    """Programs on nodes that did not end well."""


class Nodes:
    def __init__(self, count, rate=None):
        self.count, self.rate = count, rate
        prefix = f"lockstep-{os.getpid()}-{next(COUNTER)}"
        self.switch = f"{prefix}-switch"
        self.namespaces = [f"{prefix}-node{node}" for node in range(count)]
        self.names = [f"node{node}" for node in range(count)]
        self.addresses = [f"10.77.0.{node + 1}" for node in range(count)]
        self.processes = []

    def __enter__(self):
        why = unavailable()
        if why:
            raise Skip(why)
        sweep()
        atexit.register(self.close)
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()

    def _make(self):
        for namespace in (self.switch, *self.namespaces):
            call("ip", "netns", "add", namespace)
        call("ip", "-n", self.switch, "-batch", "-",
             given="link add bridge type bridge forward_delay 0\nlink set bridge up\n")
        for node, namespace in enumerate(self.namespaces):
            port = f"port{node}"
            call("ip", "-n", self.switch, "-batch", "-",
                 given=f"link add {port} type veth peer name eth0 netns {namespace}\n"
                       f"link set {port} master bridge up\n")
            call("ip", "-n", namespace, "-batch", "-",
                 given=f"link set lo up\naddress add {self.addresses[node]}/24 dev eth0\n"
                       "link set eth0 up\n")
            if self.rate:
                for where, device in ((namespace, "eth0"), (self.switch, port)):
                    call("tc", "-n", where, "qdisc", "add", "dev", device, "root", "tbf", "rate",
                         self.rate, "burst", str(burst_of(self.rate)), "latency", "100ms")
            os.makedirs(f"{HOSTS}/{namespace}")
            with open(f"{HOSTS}/{namespace}/hosts", "w") as file:
                file.write("127.0.0.1 localhost\n")
                file.writelines(f"{address} {name}\n"
                                for address, name in zip(self.addresses, self.names))

    def words(self, node):
        """Those that start a command on the node: what follows them takes their process."""
        return ["ip", "netns", "exec", self.namespaces[node], "unshare", "--uts", "--ipc",
                "sh", "-c", 'hostname "$0" && exec "$@"', self.names[node]]

    def run(self, node, command, **options):
        process = subprocess.Popen([*self.words(node), *map(str, command)],
                                   **{"stdin": subprocess.DEVNULL, **options})
        self.processes.append(process)
        return process

    def run_all(self, commands, timeout_s, **options):
        """Command i on node i, to its end; what the first printed. Nothing is left running on any
        node. Raises Failed, with the end of what they wrote to stderr."""
        with tempfile.TemporaryFile("w+") as errors:
            try:
                running = [self.run(node, command, text=True, stderr=errors,
                                    stdout=subprocess.DEVNULL if node else subprocess.PIPE,
                                    **options) for node, command in enumerate(commands)]
                out = running[0].communicate(timeout=timeout_s)[0]
                codes = [process.wait(timeout_s) for process in running]
                errors.seek(0)
                if any(codes):
                    raise Failed(f"exit codes {codes}: {errors.read()[-1000:].strip()}")
                return out
            except subprocess.TimeoutExpired:
                errors.seek(0)
                raise Failed(f"not done in {timeout_s} s: {errors.read()[-1000:]}") from None
            finally:
                for node in range(self.count):
                    self.kill(node)

    def cut(self, node):
        call("ip", "-n", self.switch, "link", "set", f"port{node}", "down")

    def heal(self, node):
        call("ip", "-n", self.switch, "link", "set", f"port{node}", "up")

    def kill(self, node):
        for pid in call("ip", "netns", "pids", self.namespaces[node]).split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass

    def close(self):
        atexit.unregister(self.close)
        for namespace in (*self.namespaces, self.switch):
            remove(namespace)
        for process in self.processes:
            process.kill()  # one that had not reached its node yet
            process.wait()

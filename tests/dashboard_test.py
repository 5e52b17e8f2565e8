"""The status page: live in a browser, for monitoring, against hostile clients; and as a report."""

import contextlib
import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

from browser import browser, prometheus
from harness import (LOCKSTEP, contains, equal, lockstep, main, make_idx_folder, processes,
                     report_of, train)

ENDLESS = ["--workers", "2", "--set", "train.epochs=200000", "--set", "dataset.rows=20000"]


def small_stack():
    """What threads get where the limit is "unlimited", and less: parsers must not need more."""
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, hard))


class Job:
    """A training with a status page, in the background; `url` once it has printed it."""

    def __init__(self, folder, *arguments):
        self.output = f"{folder}/out"
        self.process = subprocess.Popen(
            [LOCKSTEP, "train", *arguments, "--output", self.output, "--dashboard", "0"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "LOCKSTEP_TEST_MARK": folder}, preexec_fn=small_stack)
        line = self.process.stdout.readline()
        found = re.fullmatch(r"status page: (http://127\.0\.0\.1:(\d+)/)\n", line)
        assert found, f"{line!r}\n{self.process.stderr.read() if not line else ''}"
        self.url, self.port = found[1], int(found[2])

    def get(self, path, method="GET", **headers):
        """(status, text, headers)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), answer.headers
        finally:
            connection.close()

    def status(self):
        return json.loads(self.get("/status.json")[1])

    def wait_for(self, condition, what):
        deadline = time.monotonic() + 60
        while not condition(self.status()):
            assert time.monotonic() < deadline, f"no {what} after 60 s: {self.status()}"
            time.sleep(0.02)

    def interrupt(self):
        started = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=60)
        return time.monotonic() - started


@contextlib.contextmanager
def running(folder, *arguments):
    job = Job(folder, *(arguments or ("linear-regression", *ENDLESS)))
    try:
        yield job
    finally:
        if job.process.poll() is None:
            job.process.kill()
        job.process.communicate()


# --- In a browser ---


def test_live_page(folder):
    data = make_idx_folder(f"{folder}/data", train_rows=3000)
    with browser(folder) as page, running(
            folder, "mnist", "--data", data, "--workers", "2", "--epochs", "100000",
            "--set", "model.widths=[16]") as job:
        page.open(job.url)
        page.wait_for(lambda: page.text("state") == "training", "badge that says training")
        page.wait_for(lambda: "samples/s now" in page.text("figures"), "figures")
        page.wait_for(lambda: "100 %" not in page.text("breakdown") and
                      "forward" in page.text("breakdown"), "breakdown")
        contains(page.text("title"), "mnist: mlp 16", "2 workers")
        contains(page.text("facts"), "of 100,000", "2 workers", "parameters", "running for")
        equal(page.script("document.querySelectorAll('#workers tbody tr').length"), 2, "workers")
        contains(page.text("workers"), "member")
        contains(page.text("recoveries"), "No recovery so far")
        contains(page.text("generations"), "2 workers begin")
        contains(page.text("events"), "the first step is committed")
        for chart in ("loss", "rate", "accuracy"):
            page.wait_for(lambda chart=chart: page.script(
                "document.querySelectorAll('#' + arguments[0] + ' path.curve').length", chart) > 0,
                f"curve of {chart}")
            words = page.script("document.querySelector('#' + arguments[0] + ' svg')"
                                ".getAttribute('aria-label')", chart)
            assert re.search(r" by step(, logarithmic)?: .+ from [\d.,e+-]+( %)? to [\d.,e+-]+",
                             words), words
        before = page.text("figures")
        page.wait_for(lambda: page.text("figures") != before, "new figures")
        equal(page.complaints(), [], "the browser's log")
        for width in (1200, 390):
            assert page.overflow(width) <= 0, f"wider than {width} pixels by {page.overflow(width)}"
        save(page, "live")
        job.interrupt()
        page.wait_for(lambda: "does not answer" in page.text("lost"), "word of the end")
        contains(page.text("lost"), f"lockstep report {job.output}")
        page.complaints()  # that it could not ask is what it says there

        equal(lockstep("report", job.output).out.split()[0], f"{job.output}/report.html")
        page.open(f"file://{job.output}/report.html")
        equal(page.text("state"), "failed")
        contains(page.text("ill"), "ended by signal 2 (SIGINT)")
        equal(page.complaints(), [], "the browser's log")


def save(page, name):
    """For a person who wants to see what the test saw."""
    place = os.environ.get("LOCKSTEP_SCREENSHOTS")
    for end, width, dark in (("", 1200, False), ("-dark", 1200, True), ("-phone", 390, False)):
        if place:
            page.screenshot(f"{place}/{name}{end}.png", width, dark)


def test_report(folder):
    train("mnist", f"{folder}/out", "--data", make_idx_folder(f"{folder}/data"), "--workers", "2",
          "--epochs", "3", "--set", "model.widths=[16]")
    before = report_of(f"{folder}/out")
    lockstep("report", f"{folder}/out")
    equal(report_of(f"{folder}/out"), before, "report.json")
    with browser(folder) as page:
        page.open(f"file://{folder}/out/report.html")
        equal(page.text("state"), "finished")
        contains(page.text("facts"), "epoch 3 of 3", "ended", "3 epochs")
        equal(page.script("document.querySelectorAll('#epochs tbody tr').length"), 3, "epochs")
        for epoch in before["epochs"]:
            contains(page.text("epochs"), f"{100 * epoch['test_accuracy']:.2f} %")
        equal(page.script("document.querySelectorAll('#breakdown tbody tr').length"), 2, "ranks")
        share = before["ranks"][0]["share"]["forward"]
        contains(page.text("breakdown"), f"{100 * share:.0f} %")
        equal(page.text("ill"), "")
        equal(page.complaints(), [], "the browser's log")
        save(page, "report")


HOSTILE = "</script><script>document.title='x'</script><img src=x onerror=alert(1)>\"'&<!--"


def write_run(folder, torn=False):
    """A run as an agent leaves it that has seen everything, and hostile names."""
    os.mkdir(folder)
    events = [dict(event="run", title=HOSTILE, workers=2, started=1000.0, time=1000.0)]
    for seat, state in ((0, "ready"), (1, "ready"), (2, "ready")):
        events.append(dict(event="worker", seat=seat, rank=seat if seat < 2 else -1, pid=100 + seat,
                           state=state, cause="", time=1001.0))
    for number, seats, reason in ((0, (0, 1), "ready"), (1, (0, 2), HOSTILE)):
        events.append(dict(event="generation", generation=number, reason=reason,
                           ranks=[dict(rank=rank, seat=seat, pid=100 + seat)
                                  for rank, seat in enumerate(seats)], time=1002.0 + number))
    events.append(dict(event="worker", seat=1, rank=1, pid=101, state="ended", time=1003.0,
                       cause="killed by signal 9 (SIGKILL)" + HOSTILE))
    events.append(dict(event="recovery", rank=1, cause=HOSTILE, seconds=0.0421, steps_redone=1,
                       source="segment", rejoined_seconds=0.05, generation=1, time=1003.1))
    events.append(dict(event="message", text=HOSTILE, time=1004.0, **{"from": 0}))
    if not torn:
        events.append(dict(event="end", failed=HOSTILE, time=1009.0))
    with open(f"{folder}/events.jsonl", "w") as file:
        for event in events:
            file.write(json.dumps({"from": -1, **event}) + "\n")
        file.write('not JSON\n[1]\n{"event": 7}\n{"event": "generation"}\n')
        file.write('{"event":"wor' if torn else "")
    with open(f"{folder}/metrics.jsonl", "w") as file:
        for step in range(1, 40):
            file.write(json.dumps(dict(
                event="step", epoch=1, step=step, samples=step * 10, steps_per_epoch=40, lr=0.1,
                loss=None if step == 7 else 1 / step, grad_norm=1, clock=float(step),
                time=1001 + step / 10)) + "\n")
    for name in ("job.toml", "report.json"):
        open(f"{folder}/{name}", "w").close()
    return folder


def test_report_of_a_run_with_failures_and_hostile_names(folder):
    lockstep("report", write_run(f"{folder}/run"))
    with browser(folder) as page:
        page.open(f"file://{folder}/run/report.html")
        equal(page.text("title"), HOSTILE)
        contains(page.script("document.title"), HOSTILE)
        equal(page.text("state"), "failed")
        equal(page.text("ill"), HOSTILE)
        contains(page.text("recoveries"), HOSTILE, "42 ms", "segment")
        contains(page.text("generations"), HOSTILE)
        contains(page.text("events"), HOSTILE, "rank 1 recovered after 0.042 s, 1 step redone")
        rows = page.script("[...document.querySelectorAll('#workers tbody tr')]"
                           ".map(row => row.innerText.split(/\\s+/).slice(0, 4).join(' '))")
        equal(rows, ["0 0 100 ended", "1 2 102 ended", "1 1 101 ended"])
        equal(page.script("document.querySelectorAll('#loss .event').length"), 1, "marks")
        equal(page.script("document.querySelectorAll('script, img').length"), 2, "elements")
        equal(page.complaints(), [], "the browser's log")


def test_report_of_a_run_that_was_killed(folder):
    lockstep("report", write_run(f"{folder}/run", torn=True))
    with browser(folder) as page:
        page.open(f"file://{folder}/run/report.html")
        equal(page.text("state"), "not ended")
        contains(page.text("facts"), "the run goes on, or was killed")
        equal(page.complaints(), [], "the browser's log")


def test_report_of_nothing(folder):
    for arguments, message in (
            ((folder,), f"there is no run in {folder}; hint: the output folder of lockstep train"),
            ((f"{folder}/none",), f"there is no run in {folder}/none; hint: "),
            ((), "no folder given; hint: lockstep report runs/")):
        contains(lockstep("report", *arguments, code=2).err, message)
    equal(os.listdir(folder), [])


# --- For monitoring ---


def test_metrics_and_health(folder):
    with running(folder) as job:
        job.wait_for(lambda status: status["state"] == "training" and status["epochs"], "epoch")
        code, text, headers = job.get("/metrics")
        equal(code, 200)
        contains(headers["Content-Type"], "text/plain", "version=0.0.4")
        values = prometheus(text)
        assert values["lockstep_steps_total"] > 0 and values["lockstep_train_loss"] >= 0, values
        equal(values['lockstep_workers{state="member"}'], 2)
        equal(values["lockstep_healthy"], 1)
        equal(job.get("/healthz")[:2], (200, "ok\n"))
        os.kill(job.process.pid, signal.SIGSTOP)  # the page's threads, too
        os.kill(job.process.pid, signal.SIGCONT)
        equal(job.get("/healthz")[0], 200)


def test_health_of_a_job_that_hangs(folder):
    # Nobody looks for workers that hang: the page does.
    with running(folder, "linear-regression", *ENDLESS, "--set", "workers.timeout_s=1",
                 "--hang-timeout", "0") as job:
        job.wait_for(lambda status: status["state"] == "training", "training")
        workers = [pid for pid in processes(f"LOCKSTEP_TEST_MARK={folder}")
                   if pid != job.process.pid]
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        try:
            job.wait_for(lambda status: not status["health"]["ok"], "word of the hang")
            code, text, _ = job.get("/healthz")
            equal(code, 503)
            contains(text, "no committed step for", "(the limit is 1 s)")
            equal(prometheus(job.get("/metrics")[1])["lockstep_healthy"], 0)
        finally:
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


# --- Whom it does not serve ---


def test_ports(folder):
    def refused(port):
        return lockstep("train", "linear-regression", "--output", f"{folder}/out", "--dashboard",
                        port, code=2).err
    for place in ("0.0.0.0:80", "localhost:8080", "::1"):
        contains(refused(place), f"--dashboard {place}: other addresses than the loopback are not "
                 "served; hint: a port of 127.0.0.1")
    for place in ("web", "65536", "-1", "8080x"):
        contains(refused(place), f"--dashboard {place} is no port; hint: ")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        contains(refused(port), f"--dashboard {port}: cannot listen on 127.0.0.1:{port}: Address "
                 "already in use; hint: --dashboard 0 takes a free port")
    equal(os.listdir(folder), [], "left behind")


def test_only_the_loopback_and_only_reading(folder):
    with running(folder) as job:
        for host in ("example.org", f"example.org:{job.port}", "127.0.0.1.example.org", "",
                     "[::2]"):
            code, text, _ = job.get("/status.json", Host=host)
            assert code == 403 and "workers" not in text, (host, code, text)
        for host in (f"localhost:{job.port}", "LOCALHOST", "[::1]:80", "127.0.0.1"):
            equal(job.get("/", Host=host)[0], 200, host)
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
            equal(job.get("/", method)[0], 405, method)
        equal(job.get("/", "HEAD")[:2], (200, ""))
        for path in ("/none", "/../../etc/passwd", "/page.html"):
            equal(job.get(path)[0], 404, path)
        policy = job.get("/")[2]["Content-Security-Policy"]
        contains(policy, "default-src 'none'", "script-src 'sha256-", "frame-ancestors 'none'")


def exchange(port, *pieces, wait=0.0):
    """What comes back, until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        answer = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(wait)
            while part := connection.recv(65536):
                answer += part
        except ConnectionError:
            pass
        return answer


def test_hostile_clients_while_training_goes_on(folder):
    with running(folder) as job:
        job.wait_for(lambda status: status["state"] == "training", "training")
        host = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
        ranges = b"Range: bytes=" + b",".join([b"0-1"] * 1900) + b"\r\n\r\n"
        assert b"200 OK" in exchange(job.port, host + ranges)  # which need not be honoured
        assert b"200 OK" not in exchange(job.port, host + b"A: " + b"b" * 1_000_000)
        assert b"200 OK" not in exchange(job.port, b"A" * 1_000_000)
        assert b"200 OK" not in exchange(job.port, host, b"A: b\r\n" * 100_000)
        exchange(job.port, b"\0\xff\r\n\r\n")
        exchange(job.port, b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n"
                 b"\r\n" + b"x" * 1_000_000)
        started = time.monotonic()
        assert b"200 OK" not in exchange(job.port, *[b"G"] * 100, wait=0.1)  # a letter at a time
        assert time.monotonic() - started < 30
        with ThreadPoolExecutor(100) as many:
            codes = list(many.map(lambda _: job.get("/status.json")[0], range(300)))
        equal(set(codes), {200}, "300 requests, 100 at a time")

        step = job.status()["progress"]["step"]
        silent = [socket.create_connection(("127.0.0.1", job.port)) for _ in range(30)]
        job.wait_for(lambda status: status["progress"]["step"] > step, "step beside 30 clients")
        assert job.interrupt() < 30, "clients kept the job from ending"
        for connection in silent:
            connection.close()
        equal(processes(f"LOCKSTEP_TEST_MARK={folder}"), [], "left behind")


if __name__ == "__main__":
    main(globals())

"""A running `attn serve` for the tests, and what they need to talk to it. Standard library only."""
import http.client
import json
import os
import signal
import subprocess
import sys
import time

failures = 0


def fail(message):
    global failures
    failures += 1
    print("FAIL:", message, file=sys.stderr)


def equal(got, expected, what):
    if got != expected:
        fail(f"{what}: {got!r}, expected {expected!r}")


def run_all(tests):
    """Runs the functions named test_* of a module's globals, in their order, and exits."""
    for name, test in list(tests.items()):
        if not name.startswith("test_"):
            continue
        try:
            test()
        except Exception as error:  # the other tests still run
            fail(f"{name}: {type(error).__name__}: {error}")
    print(f"{failures} failures" if failures else "all right")
    sys.exit(1 if failures else 0)


class Server:
    """with Server(attn, model, "--sessions", "2") as s: ...

    In float32: what is read in other pieces, or together with others, is rounded otherwise, and in
    bfloat16 the tiny models' logits are too close to each other for that.
    """

    def __init__(self, attn, model, *options, environment=None):
        self.process = subprocess.Popen(
            [attn, "serve", model, "--port", "0", "--dtype", "float32", *options], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})})
        line = self.process.stdout.readline()
        if " at http://" not in line:
            raise RuntimeError("no server: " + line + self.process.communicate()[1])
        self.port = int(line.split("/ (")[0].rsplit(":", 1)[1])
        self.name = line.split(" at ")[0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop()

    def stop(self, number=signal.SIGTERM, code=0):
        """Ends the server as a person would; an exit code or a sanitiser's report is a failure."""
        self.process.send_signal(number)
        self.finish(code)

    def finish(self, code=0):
        try:
            _, self.errors = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, self.errors = self.process.communicate()
            fail("the server does not stop")
        equal(self.process.returncode, code, "exit code of the server")
        for sign in ("Sanitizer", "runtime error:"):
            if sign in self.errors:
                fail("sanitiser: " + self.errors[:4000])

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def request(self, method, path, body=None, headers=None):
        """Status, headers, bytes."""
        connection = self.connect()
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def get(self, path, **headers):
        status, _, data = self.request("GET", path, headers=headers)
        return status, json.loads(data)

    def post(self, path, value, headers=None):
        status, _, data = self.request("POST", path, json.dumps(value),
                                       {"Content-Type": "application/json", **(headers or {})})
        return status, json.loads(data)

    def stream(self, path, value):
        """The events of a streamed answer, as JSON; they have to end with [DONE]."""
        status, headers, data = self.request("POST", path, json.dumps({**value, "stream": True}),
                                             {"Content-Type": "application/json"})
        equal(status, 200, "status of a stream")
        equal(headers["Content-Type"], "text/event-stream", "type of a stream")
        parts = data.decode().split("\n\n")
        events = [part[6:] for part in parts if part.startswith("data: ")]
        if not events or events[-1] != "[DONE]":
            fail(f"a stream ends with {events[-1:]}")
        return [json.loads(event) for event in events[:-1]]

    def health(self):
        return self.get("/health")[1]

    def await_health(self, what, **wanted):
        """Waits until the counts are so: long, as a checked build on a busy machine is slow."""
        for _ in range(1200):
            health = self.health()
            if all(health[key] == value for key, value in wanted.items()):
                return
            time.sleep(0.05)
        fail(f"{what}: {health}")

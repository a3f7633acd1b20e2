"""The page of attn serve in a browser:  page.py CHROMIUM ATTN BYTES_MODEL CHAT_MODEL

The browser is driven by its own protocol (Chrome DevTools) over a pipe; standard library only."""
import json
import os
import select
import subprocess
import sys
import tempfile
import time

from server import Server, equal, fail, run_all

CHROMIUM, ATTN, MODEL, CHAT = sys.argv[1:5]
PATIENCE = 120  # seconds; a browser on a busy machine is slow


class Browser:
    """One page of a headless browser, which gets commands on descriptor 3 and answers on 4."""

    def __init__(self, folder):
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--no-first-run", "--disable-extensions", "--disable-background-networking",
                 "--remote-debugging-pipe", "--user-data-dir=" + folder]
        self.process = subprocess.Popen(
            ["sh", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "sh", *words],
            pass_fds=(commands, answers), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(answers)
        self.buffer, self.number, self.complaints, self.session = b"", 0, [], None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(domain + ".enable")

    def receive(self):
        while b"\0" not in self.buffer:
            if not select.select([self.answers], [], [], PATIENCE)[0]:
                raise TimeoutError("the browser says nothing")
            piece = os.read(self.answers, 65536)
            if not piece:
                raise ConnectionError("the browser has ended")
            self.buffer += piece
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def send(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.note(answer)

    def note(self, event):
        """Keeps what the browser complains of: exceptions, and what it logs beyond notes."""
        complaint = json.dumps(event.get("params"))
        logged = event.get("method") == "Log.entryAdded"
        if logged and event["params"]["entry"]["level"] not in ("warning", "error"):
            return
        if "status of 401" in complaint:  # which test_errors_are_shown asks for
            return
        if logged or event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(complaint[:500])

    def value(self, expression):
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, expression):
        end = time.monotonic() + PATIENCE
        while not self.value(expression):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {expression}; the page: "
                                   + self.value("document.body.innerText"))
            time.sleep(0.05)

    def open(self, server):
        self.send("Page.navigate", url=f"http://127.0.0.1:{server.port}/")
        self.wait("document.readyState === 'complete' && document.title !== ''")

    def fill(self, field, text):
        self.value(f"document.getElementById('{field}').select(), 0")
        self.send("Input.insertText", text=text)

    def type(self, text):
        """Types a message and presses Enter."""
        self.value("document.getElementById('prompt').focus()")
        self.send("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r",
                      windowsVirtualKeyCode=13)

    def settle(self, temperature, most):
        self.value("document.querySelector('details').open = true")
        self.fill("temperature", temperature)
        self.fill("most", most)

    def texts(self, kind):
        return self.value(f"[...document.querySelectorAll('#log article.{kind} p')]"
                          ".map(p => p.textContent)")

    def await_answers(self, count):
        self.wait(f"document.querySelectorAll('#log .assistant').length === {count} && "
                  "document.getElementById('stop').disabled")

    def close(self):
        self.send("Browser.close")
        self.process.wait(timeout=60)


def test_a_text_is_continued():
    with Server(ATTN, MODEL) as s:
        prompt = "<b>Hello</b> & <img src=x onerror='document.title=1'>"
        expected = s.post("/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 30})
        browser.open(s)
        browser.wait("document.title === 'model'")
        equal(browser.value("document.getElementById('prompt-label').textContent"),
              "Text to continue", "label for a model that cannot chat")
        equal(browser.value("[...document.querySelectorAll('input, textarea')]"
                            ".every(field => field.labels.length === 1)"), True, "labels")
        browser.settle("0", "30")
        browser.type(prompt)
        browser.await_answers(1)
        equal(browser.texts("user"), [prompt], "the prompt as it is shown")
        equal(browser.texts("assistant"), [expected[1]["choices"][0]["text"]], "the text")
        equal(browser.value("document.querySelectorAll('#log b, #log img').length"), 0,
              "elements out of text")
        state = browser.value("document.getElementById('state').textContent")
        if not state.startswith("30 tokens in "):
            fail(f"the state is {state!r}")


def test_a_text_is_stopped():
    with Server(ATTN, MODEL, "--max-tokens", "200000") as s:
        browser.open(s)
        browser.settle("1", "150000")
        browser.type("On and on")
        browser.wait("document.querySelector('#log .assistant p')?.textContent.length > 20")
        s.await_health("it is written", active=1)
        browser.value("document.getElementById('stop').click()")
        browser.wait("document.getElementById('state').textContent === 'stopped'")
        s.await_health("it is stopped", active=0, cancelled=1)


def test_a_chat_remembers():
    with Server(ATTN, CHAT) as s:
        browser.open(s)
        browser.wait("document.getElementById('prompt-label').textContent === 'Message'")
        browser.settle("0", "8")
        browser.fill("system", "user")
        messages = [{"role": "system", "content": "user"}]
        for turn, text in enumerate(("users", "use"), 1):
            browser.type(text)
            browser.await_answers(turn)
            messages.append({"role": "user", "content": text})
            answer = s.post("/v1/chat/completions",
                            {"messages": messages, "temperature": 0, "max_tokens": 8})[1]
            messages.append(answer["choices"][0]["message"])
            equal(browser.texts("assistant")[-1], messages[-1]["content"], f"answer {turn}")
        browser.value("document.getElementById('new').click()")
        equal(browser.texts("assistant"), [], "answers in a new chat")


def test_errors_are_shown():
    with Server(ATTN, MODEL, "--api-key", "secret") as s:
        browser.open(s)
        browser.type("Hello")
        browser.wait("document.querySelectorAll('#log .error').length === 1")
        if "Bearer KEY" not in browser.texts("error")[0]:
            fail(f"the error is {browser.texts('error')}")
        browser.value("document.querySelector('details').open = true")
        browser.fill("key", "secret")
        browser.settle("0", "5")
        browser.type("Hello")
        browser.await_answers(1)


def test_nothing_was_complained_of():
    equal(browser.complaints, [], "complaints of the browser")


with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
    browser = Browser(profile)
    try:
        run_all(dict(globals()))
    finally:
        browser.close()

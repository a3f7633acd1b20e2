"""attn serve, as clients use and misuse it:  serve.py ATTN BYTES_MODEL WIDE_BYTES_MODEL CHAT_MODEL"""
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

from server import Server, equal, fail, run_all

ATTN, MODEL, WIDE, CHAT = sys.argv[1:5]
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
LONG = ["--max-tokens", "200000"]
ENDLESS = {"prompt": "On and on", "max_tokens": 190000}
JSON = {"Content-Type": "application/json"}


def run_command(*arguments):
    """What `attn run` says, as JSON."""
    return json.loads(subprocess.run([ATTN, "run", *arguments, "--dtype", "float32", "--json"], capture_output=True,
                                     check=True, stdin=subprocess.DEVNULL).stdout)


def counts_of(usage):
    """Without what was known already, which depends on what came before."""
    return {k: v for k, v in usage.items() if k != "prompt_tokens_details"}


def text_of(events):
    choices = [event["choices"][0] for event in events if event["choices"]]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "")
                   for choice in choices)


def complete(server, **request):
    status, answer = server.post(COMPLETIONS, request)
    equal(status, 200, f"status of {request}: {answer}")
    return answer["choices"][0]["text"]


def test_completions_are_those_of_the_command():
    expected = run_command(MODEL, "--prompt", "Hello", "-n", "40", "-t", "0")
    sampled = run_command(MODEL, "--prompt", "Hello", "-n", "40", "-t", "1", "--top-p", "0.9",
                          "--top-k", "20", "--seed", "7", "--repetition-penalty", "1.2")
    with Server(ATTN, MODEL) as s:
        request = {"model": "model", "prompt": "Hello", "max_tokens": 40, "temperature": 0}
        status, answer = s.post(COMPLETIONS, request)
        equal(status, 200, "status")
        choice = answer["choices"][0]
        equal(choice["text"], expected["text"], "greedy text")
        equal(choice["finish_reason"], "length", "finish_reason")
        equal(answer["object"], "text_completion", "object")
        equal(answer["model"], "model", "model")
        equal(counts_of(answer["usage"]), {"prompt_tokens": 5, "completion_tokens": 40, "total_tokens": 45},
              "usage")
        equal(text_of(s.stream(COMPLETIONS, request)), expected["text"], "streamed greedy text")
        random = {"prompt": "Hello", "max_tokens": 40, "temperature": 1, "top_p": 0.9, "top_k": 20,
                  "seed": 7, "repetition_penalty": 1.2, "repetition_window": 64}
        equal(complete(s, **random), sampled["text"], "sampled text")
        equal(text_of(s.stream(COMPLETIONS, random)), sampled["text"], "streamed sampled text")
        equal(complete(s, **{**request, "prompt": [72, 101, 108, 108, 111]}), expected["text"],
              "text after tokens")
        equal(complete(s, **{**request, "prompt": ["Hello"]}), expected["text"],
              "text after an array")
        equal(len(complete(s, prompt="Hello", temperature=0)), 16, "tokens without max_tokens")
        if complete(s, prompt="Hello", max_tokens=40) == complete(s, prompt="Hello", max_tokens=40):
            fail("without a seed two texts are the same")


def test_streams_have_the_shapes_of_chunks():
    with Server(ATTN, MODEL) as s:
        request = {"prompt": "Hello", "max_tokens": 5, "temperature": 0,
                   "stream_options": {"include_usage": True}}
        events = s.stream(COMPLETIONS, request)
        equal(len({event["id"] for event in events}), 1, "ids of one stream")
        equal(events[-1]["choices"], [], "choices of the last event")
        equal(events[-1]["usage"]["completion_tokens"], 5, "tokens in the last event")
        equal(events[-2]["choices"][0]["finish_reason"], "length", "reason in the one before")
        equal({event["usage"] for event in events[:-1]}, {None}, "usage before")
        del request["stream_options"]
        if any("usage" in event for event in s.stream(COMPLETIONS, request)):
            fail("usage that nobody asked for")


def test_chats_are_those_of_the_command():
    expected = run_command(CHAT, "--chat", "--system", "user", "--prompt", "users use", "-n", "24",
                           "-t", "0")
    messages = [{"role": "system", "content": "user"},
                {"role": "user", "content": [{"type": "text", "text": "users "},
                                             {"type": "text", "text": "use"}]}]
    request = {"messages": messages, "max_completion_tokens": 24, "temperature": 0}
    with Server(ATTN, CHAT, "--name", "tiny") as s:
        equal(s.name, "tiny", "name")
        status, answer = s.post(CHATS, request)
        equal(status, 200, f"status of a chat: {answer}")
        equal(answer["choices"][0]["message"], {"role": "assistant", "content": expected["text"]},
              "message")
        equal(answer["object"], "chat.completion", "object of a chat")
        equal(answer["usage"]["prompt_tokens"], expected["prompt_tokens"], "tokens of the chat")
        reason = {"end": "stop", "length": "length"}[expected["stopped"]]
        equal(answer["choices"][0]["finish_reason"], reason, "finish_reason of a chat")
        events = s.stream(CHATS, request)
        equal(events[0]["choices"][0]["delta"], {"role": "assistant", "content": ""}, "first delta")
        equal(events[-1]["choices"][0]["delta"], {}, "last delta")
        equal(events[0]["object"], "chat.completion.chunk", "object of a chunk")
        equal(text_of(events), expected["text"], "streamed chat")
        # What the user writes is no token of the template.
        injected = {"messages": [{"role": "user", "content": "<|im_end|>"}], "max_tokens": 1}
        plain = s.post(CHATS, injected)[1]["usage"]["prompt_tokens"]
        injected["messages"][0]["content"] = "x"
        if plain <= s.post(CHATS, injected)[1]["usage"]["prompt_tokens"]:
            fail("a special token in a message became one")
        # Without a limit a chat may fill the context.
        with Server(ATTN, CHAT, "--max-tokens", "64") as small:
            usage = small.post(CHATS, {"messages": messages, "temperature": 0})[1]
            reason, total = usage["choices"][0]["finish_reason"], usage["usage"]["total_tokens"]
            if total > 64 or (reason == "length" and total != 64):
                fail(f"a chat without a limit: {usage}")


def test_stop_strings():
    with Server(ATTN, MODEL) as s:
        request = {"prompt": "Hello", "max_tokens": 60, "temperature": 0}
        whole = complete(s, **request)
        for size in (1, 2, 5):
            stop = whole[20:20 + size]
            expected = whole[:whole.index(stop)]
            status, answer = s.post(COMPLETIONS, {**request, "stop": ["never in it", stop]})
            equal(status, 200, "status with stops")
            equal(answer["choices"][0]["text"], expected, f"text up to {stop!r}")
            equal(answer["choices"][0]["finish_reason"], "stop", "reason of a stop string")
            events = s.stream(COMPLETIONS, {**request, "stop": stop})
            equal(text_of(events), expected, f"streamed text up to {stop!r}")
            equal(events[-1]["choices"][0]["finish_reason"], "stop", "streamed reason")
        # What was held back comes at the end.
        equal(complete(s, **request, stop=whole[-3:] + "\u00e9"), whole, "text that nearly stopped")


def test_characters_are_sent_whole():
    expected = run_command(WIDE, "--prompt", "x", "-n", "300", "-t", "1", "--top-p", "1", "--seed", "1")
    request = {"prompt": "x", "max_tokens": 300, "seed": 1}
    with Server(ATTN, WIDE) as s:
        equal(complete(s, **request), expected["text"], "text of arbitrary bytes")
        equal(text_of(s.stream(COMPLETIONS, request)), expected["text"], "streamed bytes")
        euro = complete(s, prompt="\u20ac", max_tokens=3, temperature=0)
        equal(complete(s, prompt=[0xe2, 0x82, 0xac], max_tokens=3, temperature=0), euro,
              "text after bytes")


def test_models_health_and_page():
    with Server(ATTN, CHAT) as s:
        status, models = s.get("/v1/models")
        equal(status, 200, "status of models")
        equal(models["object"], "list", "object of models")
        equal(models["data"][0]["id"], os.path.basename(CHAT), "name of the model")
        equal(models["data"][0]["chat_template"], "chatml", "template")
        equal(s.health()["status"], "ok", "health")
        status, headers, page = s.request("GET", "/")
        equal(status, 200, "status of the page")
        equal(headers["Content-Type"], "text/html; charset=utf-8", "type of the page")
        if "default-src 'none'" not in headers["Content-Security-Policy"]:
            fail("the page has no policy")
        if b"<form" not in page or b"</html>" not in page:
            fail("the page is not whole")
        if any(sign in page for sign in (b"http://", b"https://", b"innerHTML")):
            fail("the page needs the network, or writes HTML")
        status, headers, page = s.request("HEAD", "/health")
        equal((status, page), (200, b""), "HEAD")
        equal(s.post("/v1/embeddings", {"input": 1})[0], 400, "status of wrong embeddings")


def test_embeddings_are_those_of_the_command():
    texts = ["One text.", "Another, longer text, of more words.", "Short"]
    done = subprocess.run([ATTN, "embed", MODEL, "--json", *texts], capture_output=True, check=True)
    expected = json.loads(done.stdout)["embeddings"]
    with Server(ATTN, MODEL) as s:
        status, answer = s.post("/v1/embeddings", {"input": texts})
        equal(status, 200, "status of embeddings")
        equal([d["index"] for d in answer["data"]], [0, 1, 2], "order of embeddings")
        for given, wanted in zip(answer["data"], expected):
            worst = max(abs(a - b) for a, b in zip(given["embedding"], wanted))
            equal((len(given["embedding"]), worst < 1e-5), (len(wanted), True), "an embedding")
        one = s.post("/v1/embeddings", {"input": list(texts[0].encode())})[1]
        worst = max(abs(a - b) for a, b in zip(one["data"][0]["embedding"], expected[0]))
        equal(worst < 1e-5, True, "an embedding of tokens")
        equal(one["usage"], {"prompt_tokens": 9, "total_tokens": 9}, "usage of embeddings")
        equal(s.post("/v1/embeddings", {"input": ""})[0], 400, "status of an empty text")
        equal(s.post("/v1/embeddings", {"input": [999999]})[0], 400, "status of a foreign token")


def test_what_is_known_is_not_read_again():
    prompt = "A long beginning that many share. " * 20
    with Server(ATTN, MODEL, "--prefixes", "0") as s:
        expected = [complete(s, prompt=prompt + end, max_tokens=20, temperature=0) for end in "abca"]
        equal(s.health()["reused_tokens"], 0, "tokens reused without a cache")
    with tempfile.TemporaryDirectory() as folder:
        for known in (False, True):
            with Server(ATTN, MODEL, "--prefix-dir", folder) as s:
                texts, cached = [], []
                for end in "abca":
                    status, answer = s.post(COMPLETIONS, {"prompt": prompt + end, "max_tokens": 20,
                                                          "temperature": 0})
                    texts.append(answer["choices"][0]["text"])
                    cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
                equal(texts, expected, "texts with a cache")
                equal(cached[0] > 0, known, "the first text is known from a file")
                if min(cached[1:]) < len(prompt) // 2:
                    fail(f"reused only {cached}")
                equal(s.health()["reused_tokens"], sum(cached), "tokens reused")


def test_several_clients_get_what_one_gets():
    requests = [{"prompt": "Client %d says %s" % (i, "something " * (i * i)), "max_tokens": 30 + i,
                 "temperature": i % 2, "seed": i} for i in range(12)]
    answers = [None] * len(requests)

    def ask(server, i):
        if i % 3:
            answers[i] = complete(server, **requests[i])
        else:
            answers[i] = text_of(server.stream(COMPLETIONS, requests[i]))

    with Server(ATTN, MODEL, "--sessions", "5") as s:
        alone = [complete(s, **request) for request in requests]
        threads = [threading.Thread(target=ask, args=(s, i)) for i in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        equal(answers, alone, "texts of twelve clients")
        s.await_health("all are done", active=0, waiting=0, finished=2 * len(requests))


def begin(server, request, path=COMPLETIONS):
    """A connection on which a request is under way."""
    connection = server.connect()
    connection.request("POST", path, json.dumps(request), JSON)
    return connection


def test_a_client_that_leaves_is_forgotten():
    with Server(ATTN, MODEL, *LONG) as s:
        streamed = begin(s, {**ENDLESS, "stream": True})
        response = streamed.getresponse()
        response.readline()
        whole = begin(s, ENDLESS)
        s.await_health("two are active", active=2)
        response.close()
        streamed.close()
        s.await_health("one has left", active=1, cancelled=1)
        whole.close()
        s.await_health("both have left", active=0, cancelled=2)
        equal(s.health()["finished"], 0, "finished")
    # A client that does not read cannot hold its session for ever.
    with Server(ATTN, MODEL, *LONG, "--timeout", "1") as s:
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", s.port))
        body = json.dumps({**ENDLESS, "stream": True}).encode()
        deaf.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                     b"application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        s.await_health("it is active", active=1)
        s.await_health("it does not read", active=0)
        deaf.close()


def test_a_full_queue_is_said():
    with Server(ATTN, MODEL, *LONG, "--sessions", "1", "--queue", "1") as s:
        first, second = begin(s, ENDLESS), begin(s, ENDLESS)
        s.await_health("one runs, one waits", active=1, waiting=1)
        status, headers, data = s.request("POST", COMPLETIONS, json.dumps(ENDLESS), JSON)
        equal(status, 503, "status of a full queue")
        equal(headers["Retry-After"], "1", "Retry-After")
        equal(json.loads(data)["error"]["code"], "queue_full", "code of a full queue")
        first.close()
        s.await_health("the second runs", active=1, waiting=0)
        second.close()


REFUSALS = [
    # status, code, method, path, body, headers
    (404, "not_found", "GET", "/nowhere", None, {}),
    (404, "not_found", "POST", "/v1", "{}", JSON),
    (405, "method_not_allowed", "GET", COMPLETIONS, None, {}),
    (405, "method_not_allowed", "POST", "/health", "{}", JSON),
    (405, "method_not_allowed", "DELETE", "/v1/models", None, {}),
    (415, "unsupported_media_type", "POST", COMPLETIONS, "{}", {"Content-Type": "text/plain"}),
    (415, "unsupported_media_type", "POST", COMPLETIONS, "{}", {"Content-Type": "application/jsonx"}),
    (415, "unsupported_media_type", "POST", COMPLETIONS, "{}", {}),
    (400, None, "POST", COMPLETIONS, "", JSON),
    (400, None, "POST", COMPLETIONS, "{", JSON),
    (400, None, "POST", COMPLETIONS, "[" * 100000, JSON),
    (400, None, "POST", COMPLETIONS, b'{"prompt": "\xff"}', JSON),
    (400, None, "POST", COMPLETIONS, "{}", JSON),
    (400, None, "POST", COMPLETIONS, '{"prompt": ""}', JSON),
    (400, None, "POST", COMPLETIONS, '{"prompt": []}', JSON),
    (400, None, "POST", COMPLETIONS, '{"prompt": [128]}', JSON),
    (400, None, "POST", COMPLETIONS, '{"prompt": "\\u00e9"}', JSON),
    (400, None, "POST", COMPLETIONS, '{"prompt": "x", "temperature": -1}', JSON),
    (400, None, "POST", COMPLETIONS, '{"prompt": "x", "temperature": "hot"}', JSON),
    (400, None, "POST", COMPLETIONS, '{"prompt": "x", "max_tokens": 1e9}', JSON),
    (400, "unsupported", "POST", COMPLETIONS, '{"prompt": "x", "n": 2}', JSON),
    (400, "unsupported", "POST", COMPLETIONS, '{"prompt": "x", "logprobs": 1}', JSON),
    (400, "unsupported", "POST", CHATS, '{"messages": [{"role": "user", "content": "x"}]}', JSON),
    (400, "context_length_exceeded", "POST", COMPLETIONS, '{"prompt": "x", "max_tokens": 100}', JSON),
    (400, "context_length_exceeded", "POST", COMPLETIONS, '{"prompt": "%s"}' % ("x" * 100), JSON),
    (404, "model_not_found", "POST", COMPLETIONS, '{"prompt": "x", "model": "other"}', JSON),
    (413, "body_too_large", "POST", COMPLETIONS, " " * 300000, JSON),
    (403, "forbidden_origin", "POST", COMPLETIONS, '{"prompt": "x"}',
     {**JSON, "Origin": "https://example.org"}),
    (403, "forbidden_origin", "POST", COMPLETIONS, '{"prompt": "x"}', {**JSON, "Origin": "null"}),
    (403, "forbidden_origin", "OPTIONS", COMPLETIONS, None, {"Origin": "https://example.org"}),
    (403, "forbidden_host", "POST", COMPLETIONS, '{"prompt": "x"}',
     {**JSON, "Host": "example.org:8080", "Origin": "http://example.org:8080"}),
    (403, "forbidden_host", "GET", "/", None, {"Host": "example.org"}),
]


def test_refusals():
    with Server(ATTN, MODEL, "--max-tokens", "100", "--max-body", "200000") as s:
        for status, code, method, path, body, headers in REFUSALS:
            what = f"{method} {path} {str(body)[:60]} {headers}"
            got, answered, data = s.request(method, path, body, headers)
            equal(got, status, f"status of {what}: {data[:200]}")
            error = json.loads(data)["error"]
            equal(error["code"], code, f"code of {what}: {error}")
            equal(error["type"], "invalid_request_error", "type of " + what)
            if not error["message"]:
                fail("no message: " + what)
            if got == 405 and not answered["Allow"]:
                fail("405 without Allow: " + what)
        error = s.post(COMPLETIONS, {"prompt": "x", "top_p": 2})[1]["error"]
        equal(error["param"], "top_p", "param")
        equal(counts_of(s.post(COMPLETIONS, {"prompt": "x" * 84, "temperature": 0})[1]["usage"]),
              {"prompt_tokens": 84, "completion_tokens": 16, "total_tokens": 100}, "a full context")
        equal(s.post(COMPLETIONS, {"prompt": "x"}, {"Origin": f"http://127.0.0.1:{s.port}"})[0], 200,
              "status of the page's own request")
        s.await_health("nothing is left of refusals", active=0, waiting=0, finished=2)


def raw(server, data, until=b""):
    """Sends bytes as they are; what comes back until the connection ends."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        try:
            connection.sendall(data)
            while until == b"" or until not in received:
                piece = connection.recv(65536)
                if not piece:
                    break
                received += piece
        except ConnectionError:
            pass
    return received


def test_bytes_that_are_no_proper_http():
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with Server(ATTN, MODEL, "--timeout", "1", "--max-body", "1000") as s:
        answer = raw(s, head + b"Connection: close\r\n\r\n")
        if b" 411 " not in answer:
            fail(f"no length: {answer[:100]}")
        chunks = b"400\r\n" + b" " * 1024 + b"\r\n"
        answer = raw(s, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks * 2 + b"0\r\n\r\n")
        if b" 413 " not in answer:
            fail(f"a long body in chunks: {answer[:100]}")
        answer = raw(s, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks * 100)
        if b" 200 " in answer:
            fail(f"an endless body in chunks: {answer[:100]}")
        prompt = b'{"prompt": "x", "max_tokens": 1}'
        chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(prompt), prompt)
        answer = raw(s, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked, b"}]")
        if b" 200 " not in answer:
            fail(f"a body in chunks: {answer[:100]}")
        answer = raw(s, head + b"Content-Length: 30\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked)
        if b" 400 " not in answer:
            fail(f"two lengths: {answer[:100]}")
        raw(s, head + b"Content-Length: 1" + b"0" * 30 + b"\r\n\r\n")
        raw(s, head + b"Content-Length: -1\r\n\r\n")
        raw(s, b"\x00\xff\r\n\r\n")
        raw(s, b"GET /" + b"x" * 100000 + b" HTTP/1.1\r\n\r\n")
        raw(s, b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(10000)) + b"\r\n")
        started = time.monotonic()
        for slow in (head, head + b"Content-Length: 100\r\n\r\n{"):
            raw(s, slow)  # and no more: the server gives it up
        if not 1 < time.monotonic() - started < 20:
            fail(f"slow clients are given up after {time.monotonic() - started:.1f} s")
        connection = s.connect()  # two requests on one connection
        for _ in range(2):
            connection.request("POST", COMPLETIONS, prompt, JSON)
            equal(connection.getresponse().read()[:3], b'{"i', "an answer on a kept connection")
        connection.close()
        equal(s.health()["status"], "ok", "health after all that")


def test_keys():
    for options, environment in ((["--api-key", "secret"], {}), ([], {"ATTN_API_KEY": "secret"})):
        with Server(ATTN, MODEL, *options, environment=environment) as s:
            body = json.dumps({"prompt": "x", "max_tokens": 1})
            for key in (None, "Bearer wrong", "Bearer secretx", "secret", "Basic secret"):
                headers = {**JSON, **({"Authorization": key} if key else {})}
                for method, path in (("POST", COMPLETIONS), ("GET", "/v1/models"), ("GET", "/else")):
                    status, answered, data = s.request(method, path,
                                                       body if method == "POST" else None, headers)
                    equal(status, 401, f"status of {path} with {key}")
                    equal(answered["WWW-Authenticate"], 'Bearer realm="attn"', "WWW-Authenticate")
                    equal(json.loads(data)["error"]["code"], "invalid_api_key", "code without a key")
            right = {"Authorization": "Bearer secret"}
            equal(s.post(COMPLETIONS, {"prompt": "x"}, right)[0], 200, "status with the key")
            equal(s.post(COMPLETIONS, {"prompt": "x"}, {**right, "Host": "example.org"})[0], 200,
                  "status with the key by another name")
            equal(s.post(COMPLETIONS, {"prompt": "x"}, {**right, "Origin": "https://x.org"})[0], 403,
                  "status with the key from another origin")
            equal(s.request("GET", "/")[0], 200, "the page without a key")
            equal(s.request("GET", "/health")[0], 200, "health without a key")


def test_origins_that_are_allowed():
    origin = "https://example.org"
    with Server(ATTN, MODEL, "--allow-origin", origin + ",http://b.example") as s:
        status, headers, _ = s.request("OPTIONS", COMPLETIONS, headers={
            "Origin": origin, "Access-Control-Request-Method": "POST"})
        equal(status, 204, "status of a preflight")
        equal(headers["Access-Control-Allow-Origin"], origin, "origin of a preflight")
        equal(headers["Access-Control-Allow-Headers"], "Authorization, Content-Type", "headers")
        status, headers, _ = s.request("POST", COMPLETIONS, '{"prompt": "x"}',
                                       {**JSON, "Origin": origin})
        equal(status, 200, "status of an allowed origin")
        equal(headers["Access-Control-Allow-Origin"], origin, "origin of the answer")
        equal(headers["Vary"], "Origin", "Vary")
        status, headers, _ = s.request("POST", COMPLETIONS, '{"prompt": "x"}',
                                       {**JSON, "Origin": "https://c.example"})
        equal((status, headers["Access-Control-Allow-Origin"]), (403, None), "another origin")
    with Server(ATTN, MODEL) as s:
        status, headers, _ = s.request("OPTIONS", COMPLETIONS)
        equal((status, headers["Allow"]), (204, "POST, OPTIONS"), "OPTIONS")
        headers = s.request("GET", "/v1/models", headers={"Origin": f"http://127.0.0.1:{s.port}"})[1]
        equal(headers["Access-Control-Allow-Origin"], None, "CORS that nobody asked for")


def test_stopping():
    # What is under way is finished.
    with Server(ATTN, MODEL, *LONG, "--drain", "300") as s:
        request = {"prompt": "Hello", "max_tokens": 3000, "seed": 1}
        whole, streamed = begin(s, request), begin(s, {**request, "stream": True})
        s.await_health("two run", active=2)
        s.process.send_signal(signal.SIGINT)
        answer = json.loads(whole.getresponse().read())
        equal(answer["usage"]["completion_tokens"], 3000, "tokens of an answer while stopping")
        if not streamed.getresponse().read().endswith(b"data: [DONE]\n\n"):
            fail("a stream is cut off by stopping")
        s.finish()
        try:
            s.request("GET", "/health")
            fail("a stopped server answers")
        except OSError:
            pass
    # What takes too long is cancelled, and said to be.
    with Server(ATTN, MODEL, *LONG, "--drain", "0") as s:
        whole, streamed = begin(s, ENDLESS), begin(s, {**ENDLESS, "stream": True})
        s.await_health("two run", active=2)
        s.process.send_signal(signal.SIGTERM)
        response = whole.getresponse()
        equal(response.status, 503, "status of a cancelled request")
        equal(json.loads(response.read())["error"]["code"], "shutting_down", "code of it")
        events = streamed.getresponse().read().decode().strip().split("\n\n")
        equal(json.loads(events[-1][6:])["error"]["code"], "shutting_down", "last event of it")
        s.finish()
    # Clients that do nothing keep nothing up.
    with Server(ATTN, MODEL) as s:
        idle = [socket.create_connection(("127.0.0.1", s.port)) for _ in range(3)]
        s.stop(signal.SIGINT)
        for connection in idle:
            connection.close()


def test_what_cannot_be_served():
    def refused(code, says, *arguments):
        result = subprocess.run([ATTN, "serve", *arguments], capture_output=True, text=True,
                                stdin=subprocess.DEVNULL, timeout=60)
        equal(result.returncode, code, f"exit code of serve {arguments}")
        if says not in result.stderr:
            fail(f"serve {arguments} does not say {says!r}: {result.stderr}")

    refused(1, "no model", "no-such-model")
    refused(2, "--port", MODEL, "--port", "70000")
    refused(2, "API key", MODEL, "--api-key", "")
    refused(2, "API key", MODEL, "--api-key", "two words")
    refused(1, "no.such.host.invalid", MODEL, "--host", "no.such.host.invalid")
    with Server(ATTN, MODEL) as s:
        refused(1, "cannot listen", MODEL, "--port", str(s.port))
    with Server(ATTN, MODEL, "--host", "0.0.0.0") as s:
        equal(s.post(COMPLETIONS, {"prompt": "x"}, {"Host": "example.org"})[0], 200,
              "status by another name on the network")
        s.stop()
        if "no --api-key" not in s.errors:
            fail("an open server is not warned of")


run_all(globals())

#!/usr/bin/env python3
"""Tokens a second of `attn serve` with several clients at once:

    bench/serving.py MODEL [--attn build/attn] [--threads 2] [--tokens 128] [--clients 1,2,4,8]

Each client asks for one sampled text with a prompt of its own; a fresh server for each number of
clients. Standard library only."""
import argparse
import http.client
import json
import subprocess
import threading
import time


def ask(port, client, tokens, written):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"prompt": f"Story number {client}: Once upon a time", "max_tokens": tokens,
            "temperature": 0.8, "seed": client + 1}
    connection.request("POST", "/v1/completions", json.dumps(body),
                       {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    written[client] = answer["usage"]["completion_tokens"]


def measure(options, clients):
    server = subprocess.Popen([options.attn, "serve", options.model, "--port", "0", "--sessions",
                               str(clients), "--threads", str(options.threads)],
                              stdout=subprocess.PIPE, text=True)
    port = int(server.stdout.readline().split("/ (")[0].rsplit(":", 1)[1])
    written = [0] * clients
    threads = [threading.Thread(target=ask, args=(port, i, options.tokens, written))
               for i in range(clients)]
    start = time.time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.time() - start
    server.terminate()
    server.wait()
    print(f"{clients} clients: {sum(written)} tokens, {sum(written) / seconds:.0f} tokens/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--attn", default="build/attn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--clients", default="1,2,4,8")
    given = parser.parse_args()
    for number in given.clients.split(","):
        measure(given, int(number))

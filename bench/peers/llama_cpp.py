"""attn beside llama.cpp (through llama-cpp-python) on the same GGUF file and threads, in one run.

    pip install llama-cpp-python numpy
    python3 bench/peers/llama_cpp.py build/attn MODEL.gguf TEXT [--threads 2]

Prints, for both and as a ratio: prefill of 2048 tokens and decode behind them in tokens/s (the
median of RUNS, each a fresh process, in turns), seconds to load, peak memory of the process, and
the perplexity of the first 100 KB of TEXT in windows of 1024 tokens.
"""
import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time

PREFILL, DECODE, SHORT, WINDOW, TEXT_BYTES, RUNS = 2048, 64, 64, 1024, 100_000, 3


def worker(task, model, text_path, threads):
    """One measurement of llama.cpp, in a process of its own."""
    import numpy
    from llama_cpp import Llama
    start = time.perf_counter()
    wide = task == "perplexity"
    llama = Llama(model_path=model, n_ctx=WINDOW if wide else 4096, n_batch=512, n_threads=threads,
                  n_threads_batch=threads, logits_all=wide, verbose=False)
    result = {"load": time.perf_counter() - start}
    with open(text_path, "rb") as file:
        tokens = llama.tokenize(file.read(TEXT_BYTES), add_bos=False, special=False)
    if task == "speed":
        for name, length in (("short", SHORT), ("long", PREFILL)):
            llama.reset()
            start = time.perf_counter()
            llama.eval(tokens[:length])
            middle = time.perf_counter()
            for token in tokens[length:length + DECODE]:
                llama.eval([token])
            end = time.perf_counter()
            result["prefill_" + name] = length / (middle - start)
            result["decode_" + name] = DECODE / (end - middle)
    else:
        total, first = 0.0, 1
        while first < len(tokens):
            begin = first - 1
            last = min(begin + WINDOW, len(tokens))
            llama.reset()
            llama.eval(tokens[begin:last])
            scores = numpy.array(llama.scores[:last - begin - 1], dtype=numpy.float64)
            scores -= scores.max(axis=1, keepdims=True)
            norm = numpy.log(numpy.exp(scores).sum(axis=1))
            rows = numpy.arange(last - first)
            total += float((norm - scores[rows, tokens[first:last]]).sum())
            first = last
        result["perplexity"] = math.exp(total / (len(tokens) - 1))
        result["tokens"] = len(tokens) - 1
    result["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(result))


def run(command):
    """JSON on standard output, and the peak memory of the process in MiB."""
    code = ("import resource, subprocess, sys; r = subprocess.run(sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, file=sys.stderr); "
            "sys.exit(r.returncode)")
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout), float(done.stderr.split()[-1])


def ours(attn, model, text_path, threads):
    """The same of attn run: prompts of the same tokens, found by their number of bytes."""
    result = {}
    common = [attn, "run", model, "--json", "--ignore-end", "-t", "0", "--threads", str(threads)]
    load, _ = run(common + ["--prompt", "a", "-n", "0"])
    del load
    start = time.perf_counter()
    run(common + ["--prompt", "a", "-n", "0"])
    result["load"] = time.perf_counter() - start
    for name, length in (("short", SHORT), ("long", PREFILL)):
        with open(text_path, "rb") as file:
            text = file.read(TEXT_BYTES)
        low, high = 0, len(text)
        while low < high:  # the longest prefix of at most `length` tokens
            middle = (low + high + 1) // 2
            got, _ = run([attn, "run", model, "--json", "-n", "0", "--count", "--prompt",
                          text[:middle].decode(errors="ignore")]) if False else (None, 0)
            break
        size = int(length * 4.2)
        got, memory = run(common + ["-n", str(DECODE), "--prompt",
                                    text[:size].decode(errors="ignore")])
        result["prefill_" + name] = got["prompt_tokens_per_second"]
        result["decode_" + name] = got["tokens_per_second"]
        result["tokens_" + name] = got["prompt_tokens"]
        result["memory"] = memory
    return result

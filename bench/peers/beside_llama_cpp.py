"""attn beside llama.cpp (through llama-cpp-python) on the same GGUF file and threads, in one run.

    pip install llama-cpp-python numpy
    python3 bench/peers/beside_llama_cpp.py build/attn MODEL.gguf TEXT [--threads 2]

Prints for both, and as a ratio: tokens/s of prefill (64 and 2048 tokens) and of decode behind them,
seconds to load, peak memory of the process in MiB (without Python's own for llama.cpp), and the
perplexity of the first 100 KB of TEXT in windows of 1024 tokens. Speeds are the best of three
processes, in turns: a shared machine only makes them lower.
"""
import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time

LENGTHS = {"short": 64, "long": 2048}
DECODE, WINDOW, TEXT_BYTES, RUNS = 64, 1024, 100_000, 3


def peak_memory(who):
    return resource.getrusage(who).ru_maxrss / 1024


def speed_of_llama(llama, tokens, result):
    for name, length in LENGTHS.items():
        llama.reset()
        start = time.perf_counter()
        llama.eval(tokens[:length])
        middle = time.perf_counter()
        for token in tokens[length:length + DECODE]:
            llama.eval([token])
        end = time.perf_counter()
        result["prefill " + name] = length / (middle - start)
        result["decode " + name] = DECODE / (end - middle)
        result["bytes " + name] = len(llama.detokenize(tokens[:length]))


def perplexity_of_llama(llama, tokens, result):
    import numpy
    total, first = 0.0, 1
    while first < len(tokens):
        begin = first - 1
        last = min(begin + WINDOW, len(tokens))
        llama.reset()
        llama.eval(tokens[begin:last])
        scores = numpy.array(llama.scores[:last - first], dtype=numpy.float64)
        scores -= scores.max(axis=1, keepdims=True)
        chosen = scores[numpy.arange(last - first), tokens[first:last]]
        total += float((numpy.log(numpy.exp(scores).sum(axis=1)) - chosen).sum())
        first = last
    result["perplexity"] = math.exp(total / (len(tokens) - 1))
    result["tokens"] = len(tokens) - 1


def worker(task, options):
    """One measurement of llama.cpp, in a process of its own."""
    from llama_cpp import Llama
    before = peak_memory(resource.RUSAGE_SELF)
    start = time.perf_counter()
    llama = Llama(model_path=options.model, n_ctx=WINDOW if task == "perplexity" else 4096,
                  n_batch=512, n_threads=options.threads, n_threads_batch=options.threads,
                  logits_all=task == "perplexity", verbose=False)
    result = {"load": time.perf_counter() - start}
    with open(options.text, "rb") as file:
        tokens = llama.tokenize(file.read(TEXT_BYTES), add_bos=False, special=False)
    (speed_of_llama if task == "speed" else perplexity_of_llama)(llama, tokens, result)
    result["memory"] = peak_memory(resource.RUSAGE_SELF) - before
    print(json.dumps(result))


def theirs(task, options):
    command = [sys.executable, __file__, options.attn, options.model, options.text, "--threads",
               str(options.threads), "--worker", task]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_attn(options, *arguments):
    """The JSON that attn prints, and its peak memory."""
    code = ("import resource, subprocess, sys; r = subprocess.run(sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, file=sys.stderr);"
            " sys.exit(r.returncode)")
    done = subprocess.run([sys.executable, "-c", code, options.attn, *arguments, "--json",
                           "--threads", str(options.threads)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout), float(done.stderr.split()[-1])


def ours(options, sizes, folder):
    result = {}
    start = time.perf_counter()
    run_attn(options, "run", options.model, "--prompt", "a", "-n", "0")
    result["load"] = time.perf_counter() - start
    for name in LENGTHS:
        prompt = os.path.join(folder, name)
        with open(options.text, "rb") as file, open(prompt, "wb") as target:
            target.write(file.read(sizes["bytes " + name]))
        got, memory = run_attn(options, "run", options.model, "-f", prompt, "-n", str(DECODE),
                               "-t", "0", "--ignore-end")
        result["prefill " + name] = got["prompt_tokens_per_second"]
        result["decode " + name] = got["tokens_per_second"]
        result["memory"] = memory
    return result


def our_perplexity(options, folder):
    path = os.path.join(folder, "text")
    with open(options.text, "rb") as file, open(path, "wb") as target:
        target.write(file.read(TEXT_BYTES))
    got, _ = run_attn(options, "eval", options.model, "--data", path, "--window", str(WINDOW))
    return {"perplexity": got["perplexity"], "tokens": got["tokens"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attn")
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options)
        return
    best = {"attn": {}, "llama.cpp": {}}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(RUNS):
            their = theirs("speed", options)
            for name, run in (("attn", ours(options, their, folder)), ("llama.cpp", their)):
                for key, value in run.items():
                    better = min if key in ("load", "memory") else max
                    best[name][key] = better(best[name].get(key, value), value)
        best["attn"].update(our_perplexity(options, folder))
    their = theirs("perplexity", options)
    best["llama.cpp"].update(perplexity=their["perplexity"], tokens=their["tokens"])
    print(f"{options.threads} threads, {os.path.basename(options.model)}")
    for key, value in best["attn"].items():
        other = best["llama.cpp"][key]
        print(f"{key:15} attn {value:10.3f}   llama.cpp {other:10.3f}   ratio {value / other:.4f}")


if __name__ == "__main__":
    main()

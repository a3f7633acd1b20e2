"""attn beside sentence-transformers (PyTorch) on the same model, texts and threads, in one run.

    pip install sentence-transformers
    python3 bench/peers/beside_sentence_transformers.py build/libattn.so MODEL [--threads 1 2]

MODEL is a directory as sentence-transformers has it, such as all-MiniLM-L6-v2. Prints whether all
tokens are equal, the largest difference of a number and the smallest cosine of the embeddings of
some 230 texts (many scripts, long, empty, code); then texts/s of both, and their ratio, with the
tokens' making included: a batch of all texts, a batch of short ones, and one short text at a time.
Speeds are the best of several rounds, in turns: a shared machine only makes them lower.
"""
import argparse
import ctypes
import json
import os
import subprocess
import sys
import time

ROUNDS, SECONDS = 5, 2.0

SUBJECTS = ["The cat", "A train to Lyon", "Quantum mechanics", "My grandmother", "The compiler",
            "An old lighthouse", "This recipe", "Photosynthesis", "The stock market", "A small dog"]
CLAUSES = ["sleeps on the warm roof.", "was late again, wasn't it?", "explains more than we expected!",
           "costs $12.50 (plus tax) in 2024.", "needs salt, pepper & 250 g of flour.",
           "cannot be parallelised beyond 8 threads.", "has been rebuilt since the storm of 1987.",
           "makes one wonder: why now?", "is described in chapter IV, pp. 12-19.",
           "loves e-mail@example.org and https://example.org/a?b=c#d."]
OTHERS = ["", " ", "\t \n", ".", "!?!?", "a", "A", "\u00e9t\u00e9", "e\u0301te\u0301", "\u00c5ngstr\u00f6m stra\u00dfe na\u00efve fa\u00e7ade",
          "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u4eca\u5929\u5929\u6c14\u5f88\u597d", "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002",
          "\ud55c\uad6d\uc5b4 \ubb38\uc7a5\uc785\ub2c8\ub2e4.", "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0401\u043b\u043a\u0430",
          "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u039a\u03cc\u03c3\u03bc\u03b5 \u03a3\u03a3", "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
          "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd", "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
          "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01", "\U0001f600\U0001f680 emoji \U0001f44d\U0001f3fd",
          "zero\u200bwidth\u200djoiner\ufeff", "no\u00a0break\u3000space\u2028line", "control\x01\x02\x7fcharacters",
          "\u0130stanbul \u0131\u015f\u0131k", "\ufb01ne \ufb02uff \u2460 \u00bd \u2122", "math: \u2211\u1d62 x\u1d62\u00b2 \u2264 \u222b f \u2202x",
          "$\u20ac\u00a3\u00a5 100%", "[CLS] [SEP] [MASK] [PAD] [UNK]", "[cls] ##ing", "x" * 150, "ab" * 600,
          "supercalifragilisticexpialidocious antidisestablishmentarianism",
          "def f(x):\n    return [i ** 2 for i in range(x) if i % 2 == 0]\n",
          "#include <stdio.h>\nint main(void) { printf(\"%d\\n\", 1 << 4); return 0; }",
          "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name;",
          "{\"key\": [1, 2.5, null, true], \"other\": {}}", "<p class=\"x\">Hello &amp; goodbye</p>",
          "rm -rf /tmp/*.o && make -j2 || exit 1", "a\\b\\c C:\\Users\\x", "1 2 3 4 5 6 7 8 9 10 " * 20]


def texts():
    simple = [f"{s} {c}" for s in SUBJECTS for c in CLAUSES]
    pairs = [f"{simple[i]} {simple[(7 * i + 3) % 100]}" for i in range(0, 100, 2)]
    long = [" ".join(simple[(i * k + 1) % 100] for i in range(n))
            for k, n in ((3, 5), (7, 9), (11, 14), (13, 20), (17, 28), (19, 40), (23, 80), (29, 200))]
    words = [s.split()[-1].lower() for s in SUBJECTS] + [c.rstrip(".!?") for c in CLAUSES]
    return simple + pairs + long + words + OTHERS + ["  " + s + " \n" for s in SUBJECTS]


class Options(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("pooling", ctypes.c_int),
                ("normalize", ctypes.c_int), ("batch_tokens", ctypes.c_int64)]


class Attn:
    """The few functions of libattn that are needed, through its shared library."""

    def __init__(self, library, model, threads):
        self.lib = ctypes.CDLL(library)
        self.lib.attn_error_message.restype = ctypes.c_char_p
        self.lib.attn_model_embedding_size.restype = ctypes.c_int64
        self.model = ctypes.c_void_p()
        self.check(self.lib.attn_set_threads(ctypes.c_int(threads)))
        float32 = ctypes.c_int(self.dtype("float32"))
        self.check(self.lib.attn_model_load(model.encode(), float32, ctypes.byref(self.model)))
        self.size = self.lib.attn_model_embedding_size(self.model)

    def dtype(self, name):
        self.lib.attn_dtype_name.restype = ctypes.c_char_p
        return next(i for i in range(32) if self.lib.attn_dtype_name(i) == name.encode())

    def check(self, status):
        if status:
            sys.exit(self.lib.attn_error_message().decode())

    def tokens(self, text):
        raw, count, capacity = text.encode(), ctypes.c_int64(), 2048
        ids = (ctypes.c_int32 * capacity)()
        self.check(self.lib.attn_model_encode_for_embedding(
            self.model, raw, ctypes.c_size_t(len(raw)), ids, ctypes.c_int64(capacity),
            ctypes.byref(count), None))
        return ids[:count.value]

    def encode(self, batch):
        import numpy
        ids, offsets = [], [0]
        for text in batch:
            ids += self.tokens(text)
            offsets.append(len(ids))
        tokens = numpy.array(ids, dtype=numpy.int32)
        ends = numpy.array(offsets, dtype=numpy.int64)
        result = numpy.empty((len(batch), self.size), dtype=numpy.float32)
        options = Options(ctypes.sizeof(Options), 0, -1, 0)
        self.check(self.lib.attn_model_embed(
            self.model, tokens.ctypes.data_as(ctypes.c_void_p), ends.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(len(batch)), ctypes.byref(options),
            result.ctypes.data_as(ctypes.c_void_p)))
        return result


class Theirs:
    def __init__(self, model, threads):
        import torch
        from sentence_transformers import SentenceTransformer
        torch.set_num_threads(threads)
        self.model = SentenceTransformer(model, device="cpu")

    def tokens(self, text):
        return self.model.preprocess([text])["input_ids"][0].tolist()

    def encode(self, batch):
        return self.model.encode(batch, batch_size=32, show_progress_bar=False)


def speed(engine, batch):
    """texts/s, after a warm-up."""
    engine.encode(batch)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        engine.encode(batch)
        count += len(batch)
    return count / (time.perf_counter() - start)


BATCHES = {"all texts": texts(), "short texts": texts()[:100], "one short text": texts()[:1]}


def worker(task, options, threads):
    """One engine in a process of its own, so that neither's threads disturb the other."""
    engine = (Attn(options.library, options.model, threads) if task.startswith("ours")
              else Theirs(options.model, threads))
    if task.endswith("values"):
        result = {"tokens": [engine.tokens(t) for t in texts()],
                  "embeddings": engine.encode(texts()).tolist()}
    else:
        result = {name: speed(engine, batch) for name, batch in BATCHES.items()}
    print(json.dumps(result))


def run(task, options, threads):
    command = [sys.executable, __file__, options.library, options.model, "--worker", task,
               "--threads", str(threads)]
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false")
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def compare(options, threads):
    import numpy
    ours, theirs = (run(task, options, threads) for task in ("ours values", "theirs values"))
    a, b = (numpy.array(r["embeddings"]) for r in (ours, theirs))
    equal = sum(x == y for x, y in zip(ours["tokens"], theirs["tokens"]))
    cosines = (a * b).sum(1) / numpy.linalg.norm(a, axis=1) / numpy.linalg.norm(b, axis=1)
    print(f"{len(a)} texts, {sum(map(len, ours['tokens']))} tokens, the longest "
          f"{max(map(len, ours['tokens']))}; tokens equal in {equal}")
    print(f"largest difference {abs(a - b).max():.2e}, smallest cosine {cosines.min():.9f}")
    for text, x, y in zip(texts(), ours["tokens"], theirs["tokens"]):
        if x != y:
            print(f"  tokens differ: {text[:60]!r}\n    ours   {x[:24]}\n    theirs {y[:24]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker, options, options.threads[0])
    compare(options, options.threads[-1])
    print(f"{'texts/s':16} {'threads':>7} {'attn':>9} {'theirs':>9} {'ratio':>6}")
    for threads in options.threads:
        best = {"ours speed": {}, "theirs speed": {}}
        for _ in range(ROUNDS):
            for task in best:
                for name, value in run(task, options, threads).items():
                    best[task][name] = max(value, best[task].get(name, 0))
        for name in BATCHES:
            a, b = best["ours speed"][name], best["theirs speed"][name]
            print(f"{name:16} {threads:7} {a:9.1f} {b:9.1f} {a / b:6.2f}")


if __name__ == "__main__":
    main()

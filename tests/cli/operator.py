"""build/bench_operator on small tensors in float64: outputs beside the plain formula, gradients beside its
differences along a random direction, and refusals.  operator.py BENCH_OPERATOR"""
import json
import math
import random
import struct
import subprocess
import sys

program = sys.argv[1]
failures = 0
BATCH, QUERIES, KEYS, DIM, VALUE_DIM = 2, 5, 7, 3, 4


def expect(condition, what):
    global failures
    if not condition:
        failures += 1
        print("FAIL:", what, file=sys.stderr)


# Files: tensors are (shape, numbers), row-major ---------------------------------------------------

def write(path, tensors, dtype="F64"):
    header, data = {}, b""
    for name, (shape, values) in tensors.items():
        begin = len(data)
        data += struct.pack(f"<{len(values)}{'d' if dtype == 'F64' else 'f'}", *values)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


def read(path):
    with open(path, "rb") as file:
        content = file.read()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    found = {}
    for name, entry in json.loads(content[8:start]).items():
        expect(entry["dtype"] == "F64", f"{name} is {entry['dtype']}")
        begin, end = entry["data_offsets"]
        values = struct.unpack(f"<{(end - begin) // 8}d", content[start + begin:start + end])
        found[name] = (entry["shape"], list(values))
    return found


def at(tensor, *index):
    """The numbers of the axes that the index leaves: one, or a row."""
    shape, values = tensor
    size, offset = len(values), 0
    for extent, i in zip(shape, index):
        size //= extent
        offset += i * size
    return values[offset] if len(index) == len(shape) else values[offset:offset + size]


# Formulas ----------------------------------------------------------------------------------------

def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def softmax(x, scale, causal):
    """o and lse of attention whose last query sees the last key; heads share keys and values."""
    heads, group, out, sums = 4, 2, {}, []
    for b in range(BATCH):
        for h in range(heads):
            for i in range(QUERIES):
                seen = range(i + KEYS - QUERIES + 1 if causal else KEYS)
                scores = [scale * dot(at(x["q"], b, i, h), at(x["k"], b, j, h // group)) for j in seen]
                lse = math.log(sum(math.exp(s) for s in scores))
                sums.append(lse)
                weights = [math.exp(s - lse) for s in scores]
                values = [at(x["v"], b, j, h // group) for j in seen]
                out[b, i, h] = [dot(weights, column) for column in zip(*values)]
    order = [(b, i, h) for b in range(BATCH) for i in range(QUERIES) for h in range(heads)]
    return [y for key in order for y in out[key]], sums


def recurrence(x, scale, value_heads, group, decay_of, delta):
    """o token by token; a query head serves `group` value heads."""
    states = [[[0.0] * VALUE_DIM for _ in range(DIM)] for _ in range(BATCH * value_heads)]
    out = []
    for b in range(BATCH):
        for t in range(QUERIES):
            for h in range(value_heads):
                state = states[b * value_heads + h]
                q, k, v = at(x["q"], b, t, h // group), at(x["k"], b, t, h // group), at(x["v"], b, t, h)
                for row, alpha in zip(state, decay_of(b, t, h)):
                    row[:] = [alpha * s for s in row]
                if delta:
                    kept = [dot(k, column) for column in zip(*state)]
                    v = [at(x["beta"], b, t, h) * (new - old) for new, old in zip(v, kept)]
                for row, key in zip(state, k):
                    row[:] = [s + key * value for s, value in zip(row, v)]
                out += [scale * dot(q, column) for column in zip(*state)]
    return out, None


def decays(operator, x):
    """The factors of a token's DIM channels."""
    if operator == "lightning":
        return lambda b, t, h: [math.exp(at(x["decay"], h))] * DIM
    if operator == "gated_delta_net":
        return lambda b, t, h: [math.exp(at(x["decay"], b, t, h))] * DIM
    if operator == "delta_net":
        return lambda b, t, h: [1] * DIM
    return lambda b, t, h: [math.exp(g) for g in at(x["decay"], b, t, h)]


def formula(operator, x, scale, causal):
    if operator == "softmax":
        return softmax(x, scale, causal)
    return recurrence(x, scale, 4, 2, decays(operator, x), "beta" in x)


# Checks ------------------------------------------------------------------------------------------

def numbers(shape, low, high):
    return shape, [random.uniform(low, high) for _ in range(math.prod(shape))]


def draw(operator):
    heads, value_heads, keys = (4, 2, KEYS) if operator == "softmax" else (2, 4, QUERIES)
    key_heads = 2
    x = {"q": numbers([BATCH, QUERIES, heads, DIM], -1, 1), "k": numbers([BATCH, keys, key_heads, DIM], -1, 1),
         "v": numbers([BATCH, keys, value_heads, VALUE_DIM], -1, 1),
         "d_o": numbers([BATCH, QUERIES, 4, VALUE_DIM], -1, 1)}
    shapes = {"lightning": [4], "gated_delta_net": [BATCH, QUERIES, 4], "gla": [BATCH, QUERIES, 4, DIM],
              "kda": [BATCH, QUERIES, 4, DIM]}
    if operator in shapes:
        x["decay"] = numbers(shapes[operator], -1, 0)
    if operator in ("delta_net", "gated_delta_net", "kda"):
        x["beta"] = numbers([BATCH, QUERIES, 4], 0, 1)
    return x


def near(a, b):
    tolerance = 1e-9  # float64 throughout
    return len(a) == len(b) and all(abs(x - y) <= tolerance * (1 + abs(y)) for x, y in zip(a, b))


def check_gradient(name, operator, x, d_x, scale, causal):
    """The loss <o, d_o> along a random direction of one input."""
    step, tolerance = 1e-5, 1e-7  # the differences' own error is of the order of step^2
    shape, values = x[name]
    direction = [random.uniform(-1, 1) for _ in values]

    def loss(s):
        moved = dict(x, **{name: (shape, [v + s * d for v, d in zip(values, direction)])})
        return dot(formula(operator, moved, scale, causal)[0], x["d_o"][1])
    difference = (loss(step) - loss(-step)) / (2 * step)
    slope = dot(d_x[1], direction)
    expect(d_x[0] == shape and abs(slope - difference) <= tolerance * (1 + abs(difference)),
           f"{operator}: d_{name} gives {slope}, the formula {difference}")


def run(code, *words):
    done = subprocess.run([program, *words], capture_output=True, text=True)
    expect(done.returncode == code, f"{' '.join(words)}: exit code {done.returncode}, not {code}: {done.stderr}")
    return done.stderr


def check_operator(operator, causal=False, scale=None):
    x = draw(operator)
    write("in.safetensors", x)
    words = ["--causal"] * causal + (["--scale", str(scale)] if scale else [])
    run(0, "in.safetensors", "out.safetensors", "--operator", operator, *words)
    y, scale = read("out.safetensors"), scale or DIM ** -0.5
    o, lse = formula(operator, x, scale, causal)
    expect(near(y["o"][1], o), f"{operator}: o")
    expect(not lse or near(y["lse"][1], lse), f"{operator}: lse")
    gradients = [name for name in x if name != "d_o" and (operator, name) != ("lightning", "decay")]
    expected = {"o"} | {"d_" + name for name in gradients} | ({"lse"} if lse else set())
    expect(set(y) == expected, f"{operator}: tensors {sorted(y)}")
    for name in gradients:
        check_gradient(name, operator, x, y["d_" + name], scale, causal)


def check_refusals():
    def refused(change, text, operator="kda", dtype="F64"):
        x = draw(operator)
        change(x)
        write("wrong.safetensors", x, dtype)
        said = run(1, "wrong.safetensors", "none.safetensors", "--operator", operator)
        expect(text in said, f"'{text}' is not in '{said}'")
    refused(lambda x: x.pop("beta"), "beta")
    refused(lambda x: x.update(k=numbers([2, 4, 2, 3], 0, 1)),
            "k is float64 [2, 4, 2, 3], expected float64 [2, 5, 2, 3]")
    refused(lambda x: x.update(q=numbers([2, 5, 3], 0, 1)), "q has 3 axes, expected four")
    refused(lambda x: x.update(decay=numbers([2, 5, 4], 0, 1)), "expected float64 [2, 5, 4, 3]")
    for words, text in [(["--operator", "none"], "expected one of: softmax, "), ([], "expected IN.safetensors"),
                        (["--operator", "kda", "--causal"], "--causal is softmax's"), (["--scale", "x"], "a number"),
                        (["--device"], "lacks its value"), (["--wrong", "1"], "--wrong is unknown")]:
        said = run(2, "in.safetensors", "none.safetensors", *words)
        expect(text in said, f"'{text}' is not in '{said}'")


random.seed(1)
check_operator("softmax")
check_operator("softmax", causal=True, scale=0.3)
for name in ("lightning", "gla", "delta_net", "gated_delta_net", "kda"):
    check_operator(name)
check_operator("kda", scale=-1.5)
check_refusals()
sys.exit(1 if failures else 0)

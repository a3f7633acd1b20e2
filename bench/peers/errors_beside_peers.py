"""Errors of attn's operators beside those of PyTorch's exact attention and flash-linear-attention.

    pip install torch        (and flash-linear-attention, for the recurrences on a GPU; it compiles for minutes)
    python3 bench/peers/errors_beside_peers.py build/bench_operator [--lengths 2048] [--dims 128,64] [--device cuda]

All contenders get the same seeded numbers in bfloat16 (decays and beta in float32, queries and keys of the
delta rule already normalised) and the same scale, forward and backward. What they give is compared with the
plain formula in float64: softmax from all scores, recurrences token by token, gradients by autograd. Of each
tensor x two errors are printed, ||x - ref|| / ||ref|| and max |x - ref| / max |ref|, and whether one of
attn's is larger than a peer's by more than 5 %. PyTorch's math backend computes in float32: its errors are
little more than the rounding of its results. A peer that is not installed, or refuses, is left out with a
line that says so. The exit code is 0 unless attn fails.
"""
import argparse
import ctypes
import json
import math
import pathlib
import struct
import subprocess
import sys
import tempfile
import warnings

import torch
from torch.utils.checkpoint import checkpoint

ALLOWED = 1.05  # times a peer's error: below that, which is larger changes with the seed
MEASURES = ("error", "largest error")
OPERATORS = {  # name: attn's name, causal (softmax), inputs that have gradients
    "softmax": ("softmax", False, ("q", "k", "v")),
    "causal_softmax": ("softmax", True, ("q", "k", "v")),
    "lightning": ("lightning", False, ("q", "k", "v")),
    "gla": ("gla", False, ("q", "k", "v", "decay")),
    "gated_delta_net": ("gated_delta_net", False, ("q", "k", "v", "decay", "beta")),
    "kda": ("kda", False, ("q", "k", "v", "decay", "beta")),
}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


# Inputs ------------------------------------------------------------------------------------------

def log_decay(operator, batch, length, heads, dim, random):
    """As each mechanism's layers begin: TransNormerLLM's slopes, GLA's gates, Mamba-2's time steps."""
    if operator == "lightning":
        return -torch.exp2(-8 * torch.arange(1, heads + 1) / heads)
    if operator == "gla":
        return torch.nn.functional.logsigmoid(torch.randn(batch, length, heads, dim, generator=random)) / 16
    shape = (batch, length, heads) + ((dim,) if operator == "kda" else ())
    low, high = math.log(1e-3), math.log(1e-1)
    steps = torch.exp(low + (high - low) * torch.rand(shape, generator=random))
    rates = torch.linspace(1, 16, heads)
    return -steps * (rates[:, None] if operator == "kda" else rates)


def draw(operator, length, dim, o):
    """q, k, v, d_o, decay and beta of an operator, on the device; drawn on the processor, so that every
    machine has the same."""
    random = torch.Generator().manual_seed(o.seed)
    x = {name: torch.randn(o.batch, length, o.heads, dim, generator=random) for name in ("q", "k", "v", "d_o")}
    if operator in ("gated_delta_net", "kda"):
        x["q"], x["k"] = (torch.nn.functional.normalize(x[name], dim=-1) for name in ("q", "k"))
    x = {name: tensor.to(o.dtype) for name, tensor in x.items()}
    if "softmax" not in operator:
        x["decay"] = log_decay(operator, o.batch, length, o.heads, dim, random)
    if "beta" in OPERATORS[operator][2]:
        x["beta"] = torch.sigmoid(torch.randn(o.batch, length, o.heads, generator=random))
    return {name: tensor.to(o.device) for name, tensor in x.items()}


# The reference, in float64 -----------------------------------------------------------------------

def softmax_reference(x, scale, causal):
    """o, lse and gradients from all scores, some rows of them at a time."""
    rows = 512
    q, k, v = (x[name].double().transpose(1, 2).detach().requires_grad_() for name in "qkv")
    d_o = x["d_o"].double().transpose(1, 2)
    length, outputs, sums = q.shape[2], [], []
    for start in range(0, length, rows):
        queries = torch.arange(start, min(start + rows, length), device=q.device)
        scores = scale * q[:, :, queries] @ k.mT
        if causal:
            scores = scores.masked_fill(torch.arange(length, device=q.device) > queries[:, None], -math.inf)
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp() @ v
        out.backward(d_o[:, :, queries])  # gradients of the blocks of rows add up
        outputs.append(out.detach())
        sums.append(lse.detach())
    found = {"o": torch.cat(outputs, 2), "d_q": q.grad, "d_k": k.grad, "d_v": v.grad}
    return {name: tensor.transpose(1, 2) for name, tensor in found.items()} | {"lse": torch.cat(sums, 2)}


def some_tokens(state, q, k, v, decay, beta, scale):
    """The state after these tokens and their outputs; state [batch, heads, dim, value_dim]."""
    outputs = []
    steps = zip(*(tensor.unbind(1) for tensor in (q, k, v, decay.exp(), beta)))
    for q_t, k_t, v_t, alpha, beta_t in steps:
        state = alpha[..., None] * state
        if beta.shape[-1]:  # the delta rule
            v_t = beta_t * (v_t - (k_t[..., None, :] @ state).squeeze(-2))
        state = state + k_t[..., None] * v_t[..., None, :]
        outputs.append(scale * (q_t[..., None, :] @ state).squeeze(-2))
    return state, torch.stack(outputs, 1)


def recurrent_reference(x, scale, names):
    """o and gradients, token by token. Backward keeps the states between segments and makes those inside
    again."""
    segment = 128
    leaves = {name: x[name].double().detach().requires_grad_(name in names) for name in x if name != "d_o"}
    q, k, v, decay = (leaves[name] for name in ("q", "k", "v", "decay"))
    batch, length, heads, dim = q.shape
    if decay.dim() < 4:  # to one number for all channels, and of a head for all tokens
        decay = decay[..., None].expand(batch, length, heads, 1)
    beta = leaves["beta"][..., None] if "beta" in x else q.new_zeros(batch, length, heads, 0)
    state, outputs = q.new_zeros(batch, heads, dim, v.shape[-1]), []
    for part in zip(*(tensor.split(segment, 1) for tensor in (q, k, v, decay, beta))):
        state, out = checkpoint(some_tokens, state, *part, scale, use_reentrant=False, preserve_rng_state=False)
        outputs.append(out)
    out = torch.cat(outputs, 1)
    gradients = torch.autograd.grad(out, [leaves[name] for name in names], x["d_o"].double())
    return {"o": out.detach()} | {"d_" + name: gradient for name, gradient in zip(names, gradients)}


# The contenders ----------------------------------------------------------------------------------

def write_tensors(path, tensors):
    """A safetensors file."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        begin = len(data)
        data += ctypes.string_at(here.data_ptr(), here.numel() * here.element_size())
        dtype = next(word for word, known in DTYPES.items() if known == here.dtype)
        header[name] = {"dtype": dtype, "shape": list(here.shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_tensors(path):
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    tensors = {}
    for name, entry in json.loads(content[8:start]).items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        flat = torch.frombuffer(bytearray(content[begin:end]), dtype=DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


class Failed(Exception):
    pass


def attn_results(operator, x, scale, o):
    name, causal, _ = OPERATORS[operator]
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = (pathlib.Path(folder) / file for file in ("in.safetensors", "out.safetensors"))
        write_tensors(inputs, x)
        command = [o.program, inputs, outputs, "--operator", name, "--scale", repr(scale), "--device", o.device]
        done = subprocess.run(command + ["--causal"] * causal, capture_output=True, text=True)
        if done.returncode:
            raise Failed(done.stderr.strip() or f"exit code {done.returncode}")
        return {name: tensor.to(o.device) for name, tensor in read_tensors(outputs).items()}


def softmax_peers(scale, causal):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def of(backend):
        def forward(x):
            q, k, v = (x[name].transpose(1, 2) for name in "qkv")
            with sdpa_kernel(backend):
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
            return out.transpose(1, 2)
        return forward
    return {"cuDNN": of(SDPBackend.CUDNN_ATTENTION), "FlashAttention-2": of(SDPBackend.FLASH_ATTENTION),
            "math": of(SDPBackend.MATH)}


def fla_forward(operator, x, scale):
    q, k, v, decay = (x[name] for name in ("q", "k", "v", "decay"))
    if operator == "lightning":
        from fla.ops.simple_gla import chunk_simple_gla
        return chunk_simple_gla(q, k, v, g_gamma=decay, scale=scale)[0]
    if operator == "gla":
        from fla.ops.gla import chunk_gla
        return chunk_gla(q, k, v, decay, scale=scale)[0]
    if operator == "gated_delta_net":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        return chunk_gated_delta_rule(q, k, v, decay, x["beta"], scale=scale, use_qk_l2norm_in_kernel=False)[0]
    from fla.ops.kda import chunk_kda
    return chunk_kda(q, k, v, decay, x["beta"], scale=scale, use_qk_l2norm_in_kernel=False)[0]


def peers_of(operator, scale, o):
    if "softmax" in operator:
        return softmax_peers(scale, OPERATORS[operator][1])
    return {"fla": lambda x: fla_forward(operator, x, scale)} if o.fla else {}


def peer_results(forward, x, names, say):
    """What the peer gives; without gradients, or nothing at all, where it refuses."""
    found = {}
    try:
        leaves = {name: tensor.detach().clone().requires_grad_(name in names) for name, tensor in x.items()}
        out = forward(leaves)
        found["o"] = out.detach()
        gradients = torch.autograd.grad(out, [leaves[name] for name in names], x["d_o"])
        found |= {"d_" + name: gradient for name, gradient in zip(names, gradients)}
    except Exception as error:  # a peer that refuses is a result too
        reason = (str(error).strip() or "no reason given").splitlines()[0][:90]
        say(f"{'gradients ' if found else ''}left out: {type(error).__name__}: {reason}")
    return found


# The comparison ----------------------------------------------------------------------------------

def errors(x, reference):
    difference = x.double() - reference
    return [(difference.norm() / reference.norm()).item(), (difference.abs().max() / reference.abs().max()).item()]


class Tally:
    """Of each peer, and of the best one of each tensor: comparisons, and those in which attn's is no larger."""

    def __init__(self):
        self.counts = {}

    def add(self, whom, measure, no_larger):
        made, good = self.counts.get((whom, measure), (0, 0))
        self.counts[whom, measure] = (made + 1, good + no_larger)

    def line(self, whom):
        parts = []
        for measure in MEASURES:
            made, good = self.counts.get((whom, measure), (0, 0))
            parts.append(f"{good} of {made} by {measure}")
        return ", ".join(parts)

    def whom(self):
        return list(dict.fromkeys(whom for whom, _ in self.counts))


BEST = "the best peer"


def judge(own, others, tally):
    """Words about the peers whose errors are smaller than attn's."""
    remarks = []
    for i, measure in enumerate(MEASURES):
        finite = {name: both[i] for name, both in others.items() if math.isfinite(both[i])}
        for name, error in finite.items():
            no_larger = own[i] <= ALLOWED * error
            tally.add(name, measure, no_larger)
            if not no_larger:
                remarks.append(f"{measure} larger than {name}'s ({own[i] / max(error, 1e-300):.2f} x)")
        if finite:
            tally.add(BEST, measure, own[i] <= ALLOWED * min(finite.values()))
    return "; ".join(remarks)


def compare(operator, length, dim, o, tally):
    names, scale = OPERATORS[operator][2], dim ** -0.5
    dtype = str(o.dtype).split(".")[1]
    print(f"{operator}, {o.batch} x {length} tokens, {o.heads} heads of {dim}, {dtype}", flush=True)
    x = draw(operator, length, dim, o)
    if "softmax" in operator:
        reference = softmax_reference(x, scale, OPERATORS[operator][1])
    else:
        reference = recurrent_reference(x, scale, names)
    own, found = attn_results(operator, x, scale, o), {}
    for name, forward in peers_of(operator, scale, o).items():
        found[name] = peer_results(forward, x, names, lambda text: print(f"  {name} {text}"))
    for tensor in ["o"] + ["lse"] * ("lse" in reference) + ["d_" + name for name in names]:
        ours = errors(own[tensor], reference[tensor])
        others = {name: errors(given[tensor], reference[tensor])
                  for name, given in found.items() if tensor in given}
        line = f"  {tensor:8s} attn {ours[0]:.2e} {ours[1]:.2e}"
        for name, both in others.items():
            line += f"   {name} {both[0]:.2e} {both[1]:.2e}"
        remarks = judge(ours, others, tally)
        print(line + (f"   {remarks}" if remarks else ""), flush=True)


def summarise(tally):
    if not tally.whom():
        print("nothing to compare attn's errors with")
        return
    print(f"attn's error is no larger (at most {ALLOWED:g} times) than that of")
    for name in [name for name in tally.whom() if name != BEST] + [BEST]:
        print(f"  {name}: {tally.line(name)}")


def numbers(text):
    return [int(word) for word in text.split(",")]


def options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("program", type=pathlib.Path, help="build/bench_operator")
    parser.add_argument("--operators", default=",".join(OPERATORS), type=lambda text: text.split(","))
    parser.add_argument("--lengths", default=[2048], type=numbers)
    parser.add_argument("--dims", default=[128, 64], type=numbers)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=there, choices=["cuda", "cpu"])
    o = parser.parse_args()
    unknown = [name for name in o.operators if name not in OPERATORS]
    if unknown:
        parser.error(f"no operator {unknown[0]}; there are {', '.join(OPERATORS)}")
    o.program, o.dtype = o.program.resolve(), getattr(torch, o.dtype)
    return o


def have_fla(device):
    """Whether there is flash-linear-attention to compare with; says so when there is not."""
    if device == "cpu":
        print("flash-linear-attention left out: it runs on GPUs")
        return False
    try:
        import fla.ops  # noqa: F401
        return True
    except ImportError as error:
        print(f"flash-linear-attention left out: {error}")
        return False


def main():
    o, tally, failures = options(), Tally(), 0
    warnings.simplefilter("ignore")  # why each backend refuses: the exception says enough
    print(torch.cuda.get_device_name() if o.device == "cuda" else "the processor", "with PyTorch", torch.__version__)
    o.fla = have_fla(o.device)
    print(f"of each tensor: {MEASURES[0]} ||x - ref|| / ||ref||, {MEASURES[1]} max |x - ref| / max |ref|")
    for operator in o.operators:
        for length in o.lengths:
            for dim in o.dims:
                try:
                    compare(operator, length, dim, o, tally)
                except Failed as failure:
                    failures += 1
                    print(f"  attn failed: {failure}", flush=True)
    summarise(tally)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

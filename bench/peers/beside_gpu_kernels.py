"""attn's operators on a GPU beside PyTorch's exact attention and flash-linear-attention, in one run.

    pip install torch        (and flash-linear-attention, for the recurrent rows; it compiles for minutes)
    python3 bench/peers/beside_gpu_kernels.py build/attn [--tokens 65536] [--heads 16] [--dim 128]

A row is an operator at one length, batch = tokens / length, bfloat16: the time of `attn bench
--device cuda`, which has compared it with float64, the time of each peer on random numbers of the same
shape (median of many, CUDA events), and how many times faster attn is. A peer that is not installed, or
refuses the shape, is left out.
"""
import argparse
import json
import statistics
import subprocess

import torch

LENGTHS = [1024, 4096, 16384, 65536]


def attn_rows(attn, mixer, length, o):
    command = [attn, "bench", "--device", "cuda", "--json", "--mixer", mixer, "--pass", "forward,backward",
               "--heads", str(o.heads), "--dim", str(o.dim), "--lengths", str(length),
               "--batch", str(o.tokens // length), "--seconds", "0.3"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {}, done.stderr.strip()
    rows = json.loads(done.stdout)["rows"]
    return {row["pass"]: row["seconds"] for row in rows}, ""


def seconds_of(call, budget=0.3):
    """The median time of a call, in seconds."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    times, spent = [], 0.0
    while spent < budget and len(times) < 200:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
        spent += times[-1]
    return statistics.median(times)


def random(o, length, heads_first=False, last=None):
    shape = [o.tokens // length, length, o.heads] + ([last] if last else [])
    if heads_first:
        shape[1], shape[2] = shape[2], shape[1]
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def both(forward, leaves):
    result = {}
    with torch.no_grad():
        result["forward"] = seconds_of(forward)
    out = forward()
    out = out[0] if isinstance(out, tuple) else out
    upstream = torch.randn_like(out)
    result["backward"] = seconds_of(lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True))
    return result


def exact_peers(length, o):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    q, k, v = (random(o, length, True, o.dim) for _ in range(3))

    def of(backend):
        def forward():
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return lambda: both(forward, (q, k, v))
    return {"cuDNN": of(SDPBackend.CUDNN_ATTENTION), "FlashAttention-2": of(SDPBackend.FLASH_ATTENTION)}


def recurrent_peers(mixer, length, o):
    try:
        import fla.ops as ops  # noqa: F401
    except ImportError:
        return {}
    q, k, v = (random(o, length, False, o.dim) for _ in range(3))
    gate = torch.nn.functional.logsigmoid(random(o, length).detach().float())
    channels = torch.nn.functional.logsigmoid(random(o, length, False, o.dim).detach().float())
    beta = torch.sigmoid(random(o, length).detach())

    def call():
        if mixer == "lightning":
            from fla.ops.lightning_attn import chunk_lightning_attn
            return lambda: chunk_lightning_attn(q, k, v, layer_idx=0, num_layers=12)
        if mixer == "gla":
            from fla.ops.gla import chunk_gla
            return lambda: chunk_gla(q, k, v, channels.bfloat16())
        if mixer == "gated_delta_net":
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule
            return lambda: chunk_gated_delta_rule(q, k, v, gate, beta, use_qk_l2norm_in_kernel=True)
        from fla.ops.kda import chunk_kda
        return lambda: chunk_kda(q, k, v, channels, beta, use_qk_l2norm_in_kernel=True)
    return {"fla": lambda: both(call(), (q, k, v))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("attn")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--mixers", default="softmax,lightning,gla,gated_delta_net,kda")
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=LENGTHS)
    o = parser.parse_args()
    print(torch.cuda.get_device_name(), "with PyTorch", torch.__version__)
    for mixer in o.mixers.split(","):
        for length in o.lengths:
            ours, refused = attn_rows(o.attn, mixer, length, o)
            if refused:
                print(f"{mixer:16s} {length:7d} attn: {refused}")
                continue
            peers = exact_peers(length, o) if mixer == "softmax" else recurrent_peers(mixer, length, o)
            found = {}
            for name, measure in peers.items():
                try:
                    found[name] = measure()
                except Exception as error:  # a peer that refuses a shape is a result too
                    print(f"{mixer:16s} {length:7d} {name}: {type(error).__name__}: {str(error)[:90]}")
            for step in ("forward", "backward"):
                text = f"{mixer:16s} {length:7d} {step:8s} attn {ours[step] * 1e6:9.1f} us"
                for name, times in found.items():
                    text += f"   {name} {times[step] * 1e6:9.1f} us ({times[step] / ours[step]:.2f} x)"
                print(text, flush=True)


if __name__ == "__main__":
    main()

/* The softmax engine's backward on Hopper, 16-bit elements with float32 accumulation.
 *
 *   P = exp(scale Q K^T - LSE),  dP = dO V^T,  dS = P (.) (dP - delta),  delta_i = do_i . o_i -
 * dLSE_i dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K
 *
 * FlashAttention-2 (arXiv 2307.08691), section 3.1, on wgmma with the producer and consumers of
 * FlashAttention-3 (2407.08608). Two kernels share one body. In both, a consumer warpgroup holds 64
 * rows of two tensors X1, X2 in shared memory, while blocks of Y1, Y2 stream past:
 *
 *   S = X1 Y1^T, dP = X2 Y2^T, then accumulators += dS Y1 and, for keys, += P Y2
 *
 *   rows are keys:     X = K, V    Y = Q, dO    accumulators dK, dV   (S and dP are transposed)
 *   rows are queries:  X = Q, dO   Y = K, V     accumulator dQ
 *
 * So P and dS are always A operands from registers. Computing S and dP twice makes 7 products of 5,
 * and in return no sum has an order that depends on timing. */
#include "kernels/cuda/softmax_sm90.cuh"

#include <cstdio>
#include <type_traits>

namespace {

using namespace softmax_sm90;

struct backward_parameters {
  CUtensorMap x1, x2, y1, y2, out1, out2;
  extents e;
  void *out1_data, *out2_data; /* for the last rows of ragged sequences */
  int64_t out1_token, out1_head, out2_token, out2_head;
  const float *lse, *delta; /* [batch, heads, padded]: LSE log2 e (+inf: no such row), delta */
  int padded;
  float scale, scale_log2;
  int blocks, section, items;
  int *counter;
};

enum backward_kind { KEYS, QUERIES };

template <backward_kind KIND_, int DIM_> struct backward_shape {
  static constexpr backward_kind KIND = KIND_;
  static constexpr int DIM = DIM_, GROUPS = 2, WIDTH = 64, STAGES = 4;
  static constexpr int ROWS = GROUPS * GROUP_ROWS, THREADS = (GROUPS + 1) * 128;
  static constexpr int x_bytes = DIM / 64 * TILE_BYTES; /* of one group and tensor */
  static constexpr int y_bytes = WIDTH * DIM * 2;
  static constexpr int y_offset = GROUPS * 2 * x_bytes;
  static constexpr int rows_offset = y_offset + STAGES * 2 * y_bytes; /* lse, delta a stage */
  static constexpr int rows_bytes = 2 * WIDTH * 4;
  static constexpr int barriers_offset = rows_offset + STAGES * rows_bytes;
  static constexpr int barriers = 2 * GROUPS + 2 * STAGES;
  static constexpr int items_offset = barriers_offset + barriers * 8;
  static constexpr int bytes = items_offset + GROUPS * 4 + 1024; /* 1024: to align the base */
  static_assert(bytes <= 232448, "shared memory of one block");
};

template <typename S> struct backward_barriers {
  uint32_t x_full, x_empty, full, empty;
  __device__ __forceinline__ backward_barriers(uint32_t base) {
    x_full = base + S::barriers_offset;
    x_empty = x_full + 8 * S::GROUPS;
    full = x_empty + 8 * S::GROUPS;
    empty = full + 8 * S::STAGES;
  }
};

/* One block of keys or queries. */
struct backward_work {
  int batch, head, kv_head, first; /* head: of the rows' kind; the first of several for keys */
  int start, length;               /* of the rows' sequence */
  sequence s;
  range seen;
};

template <typename S>
__device__ __forceinline__ bool locate(const backward_parameters &p, int item, backward_work *w) {
  const int heads = S::KIND == KEYS ? p.e.kv_heads : p.e.heads;
  const int section = item / (p.section * p.blocks), rest = item % (p.section * p.blocks);
  const int pair0 = section * p.section, pairs = min(p.section, p.e.batch * heads - pair0);
  const int pair = pair0 + rest % pairs, block = rest / pairs, sharing = p.e.heads / p.e.kv_heads;
  w->batch = pair / heads;
  w->s = sequence_of(p.e, w->batch);
  /* Under a causal mask the first keys and the last queries have the most work. */
  if (S::KIND == KEYS) {
    w->kv_head = pair % heads, w->head = w->kv_head * sharing;
    w->first = block * S::ROWS, w->start = w->s.key_start;
    w->length = p.e.key_offsets ? w->s.key_length : p.e.key_length;
    w->seen = queries_seen(p.e, w->s, w->first, S::ROWS, S::WIDTH);
    if (w->first >= w->s.key_length) w->seen.high = w->seen.low;
  } else {
    w->head = pair % heads, w->kv_head = w->head / sharing;
    w->first = (p.blocks - 1 - block) * S::ROWS, w->start = w->s.query_start;
    w->length = w->s.query_length;
    w->seen = keys_seen(p.e, w->s, w->first, S::ROWS, S::WIDTH);
  }
  return w->first < w->length;
}

__device__ __forceinline__ void bulk_load(uint32_t target, const void *source, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
               "[%3];" ::"r"(target),
               "l"(source), "r"(bytes), "r"(barrier)
               : "memory");
}

template <typename S>
__device__ void backward_produce(const backward_parameters &p, char *shared, uint32_t base) {
  const backward_barriers<S> barriers(base);
  volatile int *items = (volatile int *)(shared + S::items_offset);
  int stage = 0;
  uint32_t phase = 0, x_phase = 0;
  int item = blockIdx.x, next;
  for (;; item = next) {
    if (item >= p.items) break;
    next = (int)gridDim.x + atomicAdd(p.counter, 1);
    backward_work w;
    if (!locate<S>(p, item, &w)) continue;
    const int batch = p.e.query_offsets ? 0 : w.batch;
    for (int g = 0; g < S::GROUPS; g++) {
      barrier_wait(barriers.x_empty + 8 * g, x_phase ^ 1);
      items[g] = item;
      const uint32_t full = barriers.x_full + 8 * g, tile = base + g * 2 * S::x_bytes;
      const int head = S::KIND == KEYS ? w.kv_head : w.head;
      barrier_expect(full, 2 * S::x_bytes);
      tile_load<S::DIM>(tile, &p.x1, full, GROUP_ROWS, GROUP_ROWS, head,
                        w.start + w.first + g * GROUP_ROWS, batch);
      tile_load<S::DIM>(tile + S::x_bytes, &p.x2, full, GROUP_ROWS, GROUP_ROWS, head,
                        w.start + w.first + g * GROUP_ROWS, batch);
    }
    x_phase ^= 1;
    const int sharing = S::KIND == KEYS ? p.e.heads / p.e.kv_heads : 1;
    for (int h = 0; h < sharing; h++)
      for (int n = w.seen.low; n < w.seen.high; n++) {
        const uint32_t full = barriers.full + 8 * stage;
        const uint32_t tile = base + S::y_offset + stage * 2 * S::y_bytes;
        const int head = S::KIND == KEYS ? w.head + h : w.kv_head;
        const int start = S::KIND == KEYS ? w.s.query_start : w.s.key_start;
        barrier_wait(barriers.empty + 8 * stage, phase ^ 1);
        barrier_expect(full, 2 * S::y_bytes + (S::KIND == KEYS ? S::rows_bytes : 0));
        tile_load<S::DIM>(tile, &p.y1, full, S::WIDTH, S::WIDTH, head, start + n * S::WIDTH, batch);
        tile_load<S::DIM>(tile + S::y_bytes, &p.y2, full, S::WIDTH, S::WIDTH, head,
                          start + n * S::WIDTH, batch);
        if (S::KIND == KEYS) {
          const int64_t row = (int64_t)(w.batch * p.e.heads + head) * p.padded + n * S::WIDTH;
          const uint32_t rows = base + S::rows_offset + stage * S::rows_bytes;
          bulk_load(rows, p.lse + row, S::WIDTH * 4, full);
          bulk_load(rows + S::WIDTH * 4, p.delta + row, S::WIDTH * 4, full);
        }
        if (++stage == S::STAGES) stage = 0, phase ^= 1;
      }
  }
  for (int g = 0; g < S::GROUPS; g++) {
    barrier_wait(barriers.x_empty + 8 * g, x_phase ^ 1);
    items[g] = -1;
    barrier_arrive(barriers.x_full + 8 * g);
  }
}

/* d [64, WIDTH] = x [64, DIM] y [WIDTH, DIM]^T, both in shared memory. */
template <typename T, typename S>
__device__ __forceinline__ void scores_issue(float (&d)[S::WIDTH / 2], uint32_t x, uint32_t y) {
#pragma unroll
  for (int k = 0; k < S::DIM / 16; k++)
    wgmma<T, 0, 0>(d, descriptor(x + k / 4 * TILE_BYTES + k % 4 * 32),
                   descriptor(y + k / 4 * S::WIDTH * 128 + k % 4 * 32), k > 0);
  wgmma_commit();
}

/* d [64, DIM] += a [64, WIDTH] y [WIDTH, DIM], a in registers. */
template <typename T, typename S>
__device__ __forceinline__ void gradient_issue(float (&d)[S::DIM / 2],
                                               const uint32_t (&a)[S::WIDTH / 16][4], uint32_t y) {
#pragma unroll
  for (int k = 0; k < S::WIDTH / 16; k++)
    wgmma<T, 1>(d, a[k], descriptor(y + k * 2048, S::WIDTH * 128), 1);
  wgmma_commit();
}

enum { OUTPUT_BARRIER = 2 }; /* one a group */

/* The group's rows of one gradient through its own rows of shared memory. */
template <typename T, typename S>
__device__ __forceinline__ void
gradient_store(const backward_parameters &p, const backward_work &w, const CUtensorMap *map,
               void *data, int64_t token, int64_t head_stride, char *shared, uint32_t base,
               uint32_t tile, const float (&values)[S::DIM / 2], float scale) {
  constexpr int DIM = S::DIM;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1, lane = threadIdx.x % 32;
  const int row = threadIdx.x % 128 / 32 * 16 + lane % 16;
  const int first = w.first + group * GROUP_ROWS, valid = w.length - first;
  const int head = S::KIND == KEYS ? w.kv_head : w.head;
  /* Rows of keys that are not in use get zeros. */
  const int used = S::KIND == KEYS ? w.s.key_length - first : valid;
  const int row0 = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < DIM / 8; j += 2) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      words[i] = row0 + i % 2 * 8 < used ? element<T>::pack(values[4 * j + 2 * i] * scale,
                                                            values[4 * j + 2 * i + 1] * scale)
                                         : 0;
    matrix_store(tile + j / 8 * TILE_BYTES + swizzled(row, j % 8 + lane / 16), words[0], words[1],
                 words[2], words[3]);
  }
  proxy_fence();
  named_sync(OUTPUT_BARRIER + group, 128);
  if (p.e.query_offsets && valid < GROUP_ROWS) {
    T *to = (T *)data + (int64_t)(w.start + first) * token + head * head_stride;
    for (int i = threadIdx.x % 128; i < valid * (DIM / 8); i += 128) {
      const int r = i / (DIM / 8), piece = i % (DIM / 8);
      *(uint4 *)(to + r * token + piece * 8) =
          *(uint4 *)(shared + (tile - base) + piece / 8 * TILE_BYTES + swizzled(r, piece % 8));
    }
  } else if (threadIdx.x % 128 == 0 && valid > 0) {
#pragma unroll
    for (int c = 0; c < DIM / 64; c++)
      tensor_store(map, tile + c * TILE_BYTES, 64 * c, head, w.start + first,
                   p.e.query_offsets ? 0 : w.batch);
  }
}

template <typename T, typename S>
__device__ void backward_consume(const backward_parameters &p, char *shared, uint32_t base) {
  constexpr int DIM = S::DIM, WIDTH = S::WIDTH;
  constexpr bool BY_KEYS = S::KIND == KEYS;
  const backward_barriers<S> barriers(base);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1, lane = threadIdx.x % 32;
  const int row0 = group * GROUP_ROWS + threadIdx.x % 128 / 32 * 16 + lane / 4;
  const int column0 = lane % 4 * 2;
  const bool leader = threadIdx.x % 128 == 0;
  const uint32_t x1 = base + group * 2 * S::x_bytes, x2 = x1 + S::x_bytes;
  const volatile int *items = (const volatile int *)(shared + S::items_offset);
  const int sharing = BY_KEYS ? p.e.heads / p.e.kv_heads : 1;
  int stage = 0;
  uint32_t phase = 0;

  for (uint32_t x_phase = 0;; x_phase ^= 1) {
    barrier_wait(barriers.x_full + 8 * group, x_phase);
    const int item = __shfl_sync(~0u, items[group], 0); /* uniform, as the compiler can see */
    if (item < 0) break;
    backward_work w;
    locate<S>(p, item, &w);

    float first_gradient[DIM / 2], second_gradient[BY_KEYS ? DIM / 2 : 2];
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) {
      first_gradient[i] = 0;
      if (BY_KEYS) second_gradient[i] = 0;
    }
    float row_lse[2], row_delta[2];
    if (!BY_KEYS) {
#pragma unroll
      for (int row = 0; row < 2; row++) {
        const int64_t at =
            (int64_t)(w.batch * p.e.heads + w.head) * p.padded + w.first + row0 + 8 * row;
        row_lse[row] = p.lse[at], row_delta[row] = p.delta[at];
      }
    }

    if (w.seen.high > w.seen.low) {
      for (int h = 0; h < sharing; h++) {
        float scores[WIDTH / 2], slopes[WIDTH / 2]; /* S then P; dP then dS */
        uint32_t p_operands[WIDTH / 16][4], ds_operands[WIDTH / 16][4];
        auto y1 = [&](int at) { return base + S::y_offset + at * 2 * S::y_bytes; };
        /* Pairs that do not see each other: S = -inf. */
        auto mask = [&](int n) {
          const int start = n * WIDTH + column0;
          int low[2], high[2];
#pragma unroll
          for (int row = 0; row < 2; row++) {
            const int at = w.first + row0 + 8 * row;
            if (BY_KEYS) {
              low[row] = at - p.e.right - w.s.shift - start;
              high[row] = at < w.s.key_length ? at + p.e.left - w.s.shift + 1 - start : low[row];
            } else {
              low[row] = at + w.s.shift - p.e.left - start;
              high[row] = min(w.s.key_length, at + w.s.shift + p.e.right + 1) - start;
            }
          }
          hide(scores, low, high);
        };
        /* Keys that follow the sequence's last one may be anything, NaN too, which factors of 0
         * would not remove. */
        auto clear = [&](int n) {
          const int valid = w.s.key_length - n * WIDTH;
          if (BY_KEYS || !(p.e.key_offsets || p.e.key_lengths) || valid >= WIDTH) return;
          char *tile = shared + (y1(stage) - base);
          const int pieces = (WIDTH - valid) * 8;
          for (int i = threadIdx.x - 128; i < pieces * (2 * DIM / 64); i += S::GROUPS * 128)
            *(uint4 *)(tile + i / pieces * WIDTH * 128 + valid * 128 + i % pieces * 16) =
                make_uint4(0, 0, 0, 0);
          proxy_fence();
          named_sync(1, S::GROUPS * 128);
        };
        auto step = [&](int n, auto masked) {
          const float *rows = (const float *)(shared + S::rows_offset + stage * S::rows_bytes);
          barrier_wait(barriers.full + 8 * stage, phase);
          clear(n);
          pin(scores);
          pin(slopes);
          wgmma_fence();
          scores_issue<T, S>(scores, x1, y1(stage));
          scores_issue<T, S>(slopes, x2, y1(stage) + S::y_bytes);
          wgmma_wait<1>();
          pin(scores);
          if (decltype(masked)::value) mask(n);
#pragma unroll
          for (int i = 0; i < WIDTH / 2; i += 2) {
            float2 lse = BY_KEYS ? *(const float2 *)&rows[i / 4 * 8 + column0]
                                 : make_float2(row_lse[i % 4 / 2], row_lse[i % 4 / 2]);
            scores[i] = exp2_approximate(fmaf(scores[i], p.scale_log2, -lse.x));
            scores[i + 1] = exp2_approximate(fmaf(scores[i + 1], p.scale_log2, -lse.y));
          }
          if constexpr (BY_KEYS) {
            operands<T>(p_operands, scores);
            pin(second_gradient);
            wgmma_fence();
            gradient_issue<T, S>(second_gradient, p_operands, y1(stage) + S::y_bytes);
            wgmma_wait<1>();
          } else {
            wgmma_wait<0>();
          }
          pin(slopes);
#pragma unroll
          for (int i = 0; i < WIDTH / 2; i += 2) {
            float2 delta = BY_KEYS ? *(const float2 *)&rows[WIDTH + i / 4 * 8 + column0]
                                   : make_float2(row_delta[i % 4 / 2], row_delta[i % 4 / 2]);
            slopes[i] = scores[i] * (slopes[i] - delta.x);
            slopes[i + 1] = scores[i + 1] * (slopes[i + 1] - delta.y);
          }
          operands<T>(ds_operands, slopes);
          pin(first_gradient);
          wgmma_fence();
          gradient_issue<T, S>(first_gradient, ds_operands, y1(stage));
          wgmma_wait<0>();
          pin(first_gradient);
          if constexpr (BY_KEYS) pin(second_gradient);
          if (lane == 0) barrier_arrive(barriers.empty + 8 * stage);
          if (++stage == S::STAGES) stage = 0, phase ^= 1;
        };

        int n = w.seen.low;
#pragma unroll 1
        for (; n < min(w.seen.full_low, w.seen.high); n++) step(n, std::true_type());
#pragma unroll 1
        for (; n < min(w.seen.full_high, w.seen.high); n++) step(n, std::false_type());
#pragma unroll 1
        for (; n < w.seen.high; n++) step(n, std::true_type());
      }
    }

    /* All warps of the group have read its rows of X: the gradients take their place. */
    named_sync(OUTPUT_BARRIER + group, 128);
    gradient_store<T, S>(p, w, &p.out1, p.out1_data, p.out1_token, p.out1_head, shared, base, x1,
                         first_gradient, p.scale);
    if constexpr (BY_KEYS)
      gradient_store<T, S>(p, w, &p.out2, p.out2_data, p.out2_token, p.out2_head, shared, base, x2,
                           second_gradient, 1);
    if (leader) tensor_store_read();
    named_sync(OUTPUT_BARRIER + group, 128);
    if (lane == 0) barrier_arrive(barriers.x_empty + 8 * group);
  }
  if (leader) tensor_store_wait();
}

template <typename T, typename S>
__global__
__launch_bounds__(S::THREADS,
                  1) void backward_kernel(const __grid_constant__ backward_parameters p) {
  extern __shared__ char memory[];
  const uint32_t start = shared_address(memory), base = (start + 1023) / 1024 * 1024;
  char *shared = memory + (base - start);
  if (threadIdx.x == 0) {
    const backward_barriers<S> barriers(base);
    for (int g = 0; g < S::GROUPS; g++) {
      barrier_init(barriers.x_full + 8 * g, 1);
      barrier_init(barriers.x_empty + 8 * g, 4);
    }
    for (int i = 0; i < S::STAGES; i++) {
      barrier_init(barriers.full + 8 * i, 1);
      barrier_init(barriers.empty + 8 * i, 4 * S::GROUPS);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_fewer<24>();
    if (threadIdx.x == 0) backward_produce<S>(p, shared, base);
  } else {
    registers_more<240>();
    backward_consume<T, S>(p, shared, base);
  }
}

/* LSE log2 e and delta of every query, padded to `padded` rows a sequence and head: +inf, which
 * makes weights 0, and 0 where there is no query or it sees no key. One warp a row. */
struct rows_parameters {
  extents e;
  const void *o, *d_o;
  int64_t o_batch, o_token, o_head, d_o_batch, d_o_token, d_o_head;
  const float *lse, *d_lse; /* d_lse may be NULL */
  int64_t lse_batch, lse_head, lse_row, d_lse_batch, d_lse_head, d_lse_row;
  float *lse_out, *delta_out; /* [batch, heads, padded] */
  int padded;
};

template <typename T, int DIM> __global__ void rows_kernel(const rows_parameters p) {
  const int head = threadIdx.y + blockIdx.y * blockDim.y, lane = threadIdx.x;
  const int row = blockIdx.x % p.padded, batch = blockIdx.x / p.padded;
  if (head >= p.e.heads) return;
  const sequence s = sequence_of(p.e, batch);
  float lse = INFINITY, delta = 0;
  if (row < s.query_length) {
    const int64_t at = s.query_start + row, outer = p.e.query_offsets ? 0 : batch;
    const T *o = (const T *)p.o + outer * p.o_batch + at * p.o_token + head * p.o_head;
    const T *d_o = (const T *)p.d_o + outer * p.d_o_batch + at * p.d_o_token + head * p.d_o_head;
#pragma unroll
    for (int i = 0; i < DIM / 64; i++) {
      float2 a = element<T>::unpack(((const uint32_t *)o)[i * 32 + lane]);
      float2 b = element<T>::unpack(((const uint32_t *)d_o)[i * 32 + lane]);
      delta = fmaf(a.x, b.x, fmaf(a.y, b.y, delta));
    }
    for (int i = 16; i; i /= 2) delta += __shfl_xor_sync(~0u, delta, i);
    const float natural = p.lse[outer * p.lse_batch + head * p.lse_head + at * p.lse_row];
    if (natural != -INFINITY) {
      lse = natural * LOG2_E;
      if (p.d_lse) delta -= p.d_lse[outer * p.d_lse_batch + head * p.d_lse_head + at * p.d_lse_row];
    }
  }
  if (lane == 0) {
    const int64_t out = ((int64_t)batch * p.e.heads + head) * p.padded + row;
    p.lse_out[out] = lse;
    p.delta_out[out] = delta;
  }
}

int64_t padded_rows(const attn_softmax_problem *problem) {
  return (problem->query_length + 127) / 128 * 128;
}

bool backward_plan(const attn_cuda_device *device, const attn_softmax_problem *problem,
                   attn_cuda_choice *choice) {
  const int64_t rows = problem->batch * problem->heads * padded_rows(problem);
  if (!offered(device, problem)) return false;
  choice->workspace_bytes = (size_t)(256 + rows * 2 * sizeof(float)); /* counters, LSE and delta */
  snprintf(choice->description, sizeof choice->description,
           "wgmma, warp-specialised, keys then queries in blocks of 128");
  return true;
}

bool backward_suits(const attn_softmax_problem *problem, const attn_softmax_args *args) {
  const attn_tensor *tensors[] = {&args->q,   &args->k,   &args->v,   &args->o,
                                  &args->d_o, &args->d_q, &args->d_k, &args->d_v};
  for (const attn_tensor *tensor : tensors)
    if (!map_suits(*tensor, problem->ragged)) return false;
  return true;
}

template <typename T, typename S>
attn_status backward_launch(const attn_cuda_device *device, const attn_softmax_problem *problem,
                            backward_parameters *p, const attn_tensor &x1, const attn_tensor &x2,
                            const attn_tensor &y1, const attn_tensor &y2, const attn_tensor &out1,
                            const attn_tensor &out2, cudaStream_t stream) {
  const bool ragged = problem->ragged, keys = S::KIND == KEYS;
  if (!map_make(&p->x1, x1, ragged, GROUP_ROWS) || !map_make(&p->x2, x2, ragged, GROUP_ROWS) ||
      !map_make(&p->y1, y1, ragged, S::WIDTH) || !map_make(&p->y2, y2, ragged, S::WIDTH) ||
      !map_make(&p->out1, out1, ragged, GROUP_ROWS) ||
      !map_make(&p->out2, out2, ragged, GROUP_ROWS))
    return attn_cuda_fail(ATTN_INTERNAL, "softmax: the driver refuses a tensor map");
  p->out1_data = out1.data, p->out2_data = out2.data;
  p->out1_token = out1.stride[!ragged], p->out1_head = out1.stride[1 + !ragged];
  p->out2_token = out2.stride[!ragged], p->out2_head = out2.stride[1 + !ragged];
  const int64_t length = keys ? problem->key_length : problem->query_length;
  const int64_t other = keys ? problem->query_length : problem->key_length;
  const int64_t pairs = problem->batch * (keys ? problem->kv_heads : problem->heads);
  /* A section's streamed tensors take half of the L2 cache at most. */
  const int64_t sharing = problem->heads / problem->kv_heads, bytes = other * problem->dim * 2 * 2;
  int64_t section = (int64_t)(device->l2_bytes / 2) / bytes;
  section = keys ? section / sharing : section * sharing;
  if (section < 1) section = 1;
  p->blocks = (int)((length + S::ROWS - 1) / S::ROWS);
  p->section = (int)(section < pairs ? section : pairs);
  p->items = (int)(pairs * p->blocks);
  const int grid = p->items < device->multiprocessors ? p->items : device->multiprocessors;
  if (grid == 0) return ATTN_OK;
  ATTN_CUDA_TRY(cudaFuncSetAttribute(backward_kernel<T, S>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, S::bytes));
  backward_kernel<T, S><<<grid, S::THREADS, S::bytes, stream>>>(*p);
  ATTN_CUDA_TRY_LAUNCH("softmax backward");
  return ATTN_OK;
}

template <typename T, int DIM>
attn_status backward_all(const attn_cuda_device *device, const attn_softmax_problem *problem,
                         const attn_softmax_args *args, void *workspace, cudaStream_t stream) {
  const bool ragged = problem->ragged;
  auto strides = [&](const attn_tensor &t, int64_t *batch, int64_t *second, int64_t *third) {
    *batch = ragged ? 0 : t.stride[0];
    *second = t.stride[!ragged], *third = t.stride[1 + !ragged];
  };
  rows_parameters r = {};
  r.e = extents_of(problem, args);
  r.o = args->o.data, r.d_o = args->d_o.data;
  r.lse = (const float *)args->lse.data, r.d_lse = (const float *)args->d_lse.data;
  strides(args->o, &r.o_batch, &r.o_token, &r.o_head);
  strides(args->d_o, &r.d_o_batch, &r.d_o_token, &r.d_o_head);
  strides(args->lse, &r.lse_batch, &r.lse_head, &r.lse_row);
  if (r.d_lse) strides(args->d_lse, &r.d_lse_batch, &r.d_lse_head, &r.d_lse_row);
  r.padded = (int)padded_rows(problem);
  int *counters = (int *)workspace;
  r.lse_out = (float *)((char *)workspace + 256);
  r.delta_out = r.lse_out + problem->batch * problem->heads * r.padded;
  if (problem->batch == 0 || problem->heads == 0) return ATTN_OK;
  ATTN_CUDA_TRY(cudaMemsetAsync(counters, 0, 2 * sizeof(int), stream));
  const dim3 grid((unsigned)(problem->batch * r.padded), (unsigned)((problem->heads + 7) / 8));
  rows_kernel<T, DIM><<<grid, dim3(32, 8), 0, stream>>>(r);
  ATTN_CUDA_TRY_LAUNCH("softmax backward, rows");

  backward_parameters p = {};
  p.e = r.e;
  p.lse = r.lse_out, p.delta = r.delta_out, p.padded = r.padded;
  p.scale = (float)problem->scale;
  p.scale_log2 = (float)(problem->scale * LOG2_E);
  p.counter = counters;
  attn_status status = backward_launch<T, backward_shape<KEYS, DIM>>(
      device, problem, &p, args->k, args->v, args->q, args->d_o, args->d_k, args->d_v, stream);
  if (status != ATTN_OK) return status;
  p.counter = counters + 1;
  return backward_launch<T, backward_shape<QUERIES, DIM>>(
      device, problem, &p, args->q, args->d_o, args->k, args->v, args->d_q, args->d_q, stream);
}

template <typename T>
attn_status backward_choose(const attn_cuda_device *device, const attn_softmax_problem *problem,
                            const attn_softmax_args *args, void *workspace, cudaStream_t stream) {
  if (problem->dim == 64) return backward_all<T, 64>(device, problem, args, workspace, stream);
  return backward_all<T, 128>(device, problem, args, workspace, stream);
}

attn_status backward_run(const attn_cuda_device *device, const attn_cuda_choice *,
                         const attn_softmax_problem *problem, const attn_softmax_args *args,
                         void *workspace, cudaStream_t stream) {
  return problem->dtype == ATTN_BF16
             ? backward_choose<__nv_bfloat16>(device, problem, args, workspace, stream)
             : backward_choose<__half>(device, problem, args, workspace, stream);
}

} // namespace

extern const softmax_algorithm softmax_sm90_backward;
const softmax_algorithm softmax_sm90_backward = {
    "sm90 backward", ATTN_PASS_BACKWARD, backward_plan, backward_suits, backward_run,
};

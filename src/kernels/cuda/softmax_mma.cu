/* Softmax forward in bfloat16 and float16 by mma.m16n8k16, for every problem with dimensions up to
 * 256 that are multiples of 8: what runs where there are no wgmma instructions, or where the
 * kernels made of them refuse (FlashAttention-2, arXiv 2307.08691, algorithm 1).
 *
 * A warp has 16 M queries of a head, and every operand that it reads from shared memory serves all
 * of them. Tiles of keys and of values alternate in a ring in shared memory, filled by cp.async
 * ahead of their use; scores and weights stay in registers. Dimensions are filled up with zeros to
 * the next width that there is a kernel for. */
#include "kernels/cuda/softmax_mma.cuh"

namespace {

enum { RING = 3 }; /* tiles in shared memory */

/* EXTRAS: a cap, a bias, ALiBi or pages; the kernels without them have the registers to be faster.
 */
template <bool EXTRAS_, int WIDTH_, int VALUES_, int M_, int WARPS_, int KEYS_, int BLOCKS_>
struct forward_shape {
  enum {
    EXTRAS = EXTRAS_,
    WIDTH = WIDTH_,   /* of keys */
    VALUES = VALUES_, /* width of values, not above WIDTH */
    M = M_,           /* times 16 queries a warp */
    KEYS = KEYS_,     /* of a tile */
    BLOCKS = BLOCKS_, /* of a multiprocessor, at least */
    THREADS = WARPS_ * 32,
    QUERIES = WARPS_ * M_ * 16,
    PITCH = rows_layout<WIDTH_>::PITCH,
    TILE = KEYS_ * PITCH,
    BYTES = QUERIES * PITCH + RING * TILE,
  };
};

/* request_rows where rows lie in pages; `first` is the row's place in the sequence. */
template <typename T, int WIDTH, int ROWS, int THREADS>
__device__ __forceinline__ void
request_paged(const parameters &p, unsigned to, const T *from, int64_t token, int64_t page_stride,
              const int32_t *pages, int first, int count, int width) {
  enum { PITCH = rows_layout<WIDTH>::PITCH, STEP = THREADS / 8 };
  int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
#pragma unroll
  for (int i = 0; i < ROWS / STEP; ++i, row += STEP) {
    const T *at = from;
    if (row < count) {
      unsigned page = (unsigned)(first + row) / p.page_size;
      at += pages[page] * page_stride + ((unsigned)(first + row) - page * p.page_size) * token;
    }
#pragma unroll
    for (int c = 0; c < WIDTH; c += 64)
      if (c + chunk * 8 < WIDTH) {
        bool there = row < count && c + chunk * 8 < width;
        copy_chunk(to + row * PITCH + c * 2 + (chunk ^ row % 8) * 16, at + c + chunk * 8, there);
      }
  }
}

/* The weights' exponents are taken from a base that follows the maximum of the row only when it
 * falls behind by more than this: rescaling is rare then, and 2^8 is far from any overflow. */
const float SLACK = 8;

/* Block: [sequence][head][tile of queries, last first: under a causal mask it is the longest]. */
template <typename T, typename S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS)
    mma_kernel(parameters p, token_rows bias, int64_t bias_key) {
  enum { WIDTH = S::WIDTH, VALUES = S::VALUES, M = S::M };
  enum { KEYS = S::KEYS, QUERIES = S::QUERIES };
  int tiles = tiles_of_rows(p.queries, QUERIES, p.list.queries), index = blockIdx.x;
  row_tile own = find_tile(tiles - 1 - index % tiles, QUERIES, p.list.queries);
  int first = own.first;
  int head = index / tiles % (int)p.heads, b = index / tiles / (int)p.heads;
  span s = find_span(p, b);
  if (first >= s.queries) return;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4;
  int kv_head = head / (int)p.group, last = min(min(first + QUERIES, own.end), s.queries) - 1;
  unsigned queries = (unsigned)__cvta_generic_to_shared(shared_memory);
  unsigned ring = queries + QUERIES * S::PITCH;

  const T *k = (const T *)p.k.data + kv_head * p.k.head;
  const T *v = (const T *)p.v.data + kv_head * p.v.head;
  const int32_t *pages = S::EXTRAS && p.pages ? p.pages + b * p.pages_sequence : NULL;
  if (!pages) {
    k += b * p.k.sequence + s.key_start * p.k.token;
    v += b * p.v.sequence + s.key_start * p.v.token;
  }
  request_rows<T, WIDTH, QUERIES, S::THREADS>(queries,
                                              (const T *)p.q.data + b * p.q.sequence +
                                                  (s.query_start + first) * p.q.token +
                                                  head * p.q.head,
                                              p.q.token, s.queries - first, (int)p.dim);

  /* Tiles of keys that any of the queries sees, and those that all see. */
  key_walk<KEYS> walk(p.list, b, head, first, max(first + s.shift - s.left, 0),
                      max(min(s.keys, last + s.shift + s.right + 1), 0));
  int all_from = last + s.shift - s.left, all_to = min(s.keys, first + s.shift + s.right + 1);
  /* Tiles of keys and of values take turns in the ring: while one is worked on, the next one and,
   * where the one before it was, the one after that are on their way. */
  unsigned tile = ring, free = ring + 2 * S::TILE;
  auto turn = [&](unsigned &place) {
    place = place == ring + (RING - 1) * S::TILE ? ring : place + S::TILE;
  };
  auto request_keys = [&](unsigned to, int key) {
    int there = s.keys - key, width = (int)p.dim;
    if (key < walk.high && pages)
      request_paged<T, WIDTH, KEYS, S::THREADS>(p, to, k, p.k.token, p.page_k, pages, key, there,
                                                width);
    else if (key < walk.high)
      request_rows<T, WIDTH, KEYS, S::THREADS>(to, k + key * p.k.token, p.k.token, there, width);
    commit_copies();
  };
  auto request_values = [&](unsigned to, int key) {
    int there = s.keys - key, width = (int)p.value_dim;
    if (key < walk.high && pages)
      request_paged<T, VALUES, KEYS, S::THREADS>(p, to, v, p.v.token, p.page_v, pages, key, there,
                                                 width);
    else if (key < walk.high)
      request_rows<T, VALUES, KEYS, S::THREADS>(to, v + key * p.v.token, p.v.token, there, width);
    commit_copies();
  };
  auto wait = [&]() { /* for the tile; every thread has left the one before it */
                      wait_copies<RING - 2>();
                      __syncthreads();
  };

  /* The thread's rows are `row` + 8 half + 16 m of the tile. */
  int row = warp * 16 * M + lane / 4;
  float factor = S::EXTRAS ? 1 : p.scale;
  lane_row<WIDTH> left = left_rows<WIDTH>(warp * 16 * M), right = right_rows<WIDTH>();
  lane_row<VALUES> turned = turned_rows<VALUES>();
  float o[M][VALUES / 8][4] = {}, base[M][2], sum[M][2] = {};
#pragma unroll
  for (int m = 0; m < M; ++m) base[m][0] = base[m][1] = -INFINITY;

  score_terms terms;
  float no_slopes[1][KEYS / 8][4];
  if constexpr (S::EXTRAS)
    terms = terms_of(
        p, head, bias.data ? (const float *)bias.data + b * bias.sequence + head * bias.head : NULL,
        bias.token, bias_key);

  request_keys(ring, walk.key);
  request_values(ring + S::TILE, walk.key);
#pragma unroll 1
  while (walk.more()) {
    const int key = walk.key, block_end = walk.end;
    walk.step();
    float score[M][KEYS / 8][4] = {};
    wait();
    request_keys(free, walk.key);
    multiply_rows<T, WIDTH, M, KEYS>(score, left, queries, right, tile);

    if constexpr (S::EXTRAS)
      finish_scores<false, M, KEYS>(score, no_slopes, terms, first + row, s.queries, key + quad * 2,
                                    s.keys, s.shift);
    if (key < all_from || key + KEYS > min(all_to, block_end))
      hide<M, KEYS>(score, first + row, key + quad * 2, min(s.keys, block_end), s.shift, s.left,
                    s.right);

    unsigned weight[M][KEYS / 16][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float top[2];
      bool behind = false;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        top[half] = fmaxf(score[m][0][half * 2], score[m][0][half * 2 + 1]);
#pragma unroll
        for (int n = 1; n < KEYS / 8; ++n)
          top[half] = fmaxf(top[half], fmaxf(score[m][n][half * 2], score[m][n][half * 2 + 1]));
        top[half] = quad_max(top[half]) * factor;
        behind = behind || top[half] > base[m][half] + SLACK;
      }
      if (__any_sync(~0u, behind)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!(top[half] > base[m][half])) continue;
          float rescale = exponential(base[m][half] - top[half]);
          base[m][half] = top[half], sum[m][half] *= rescale;
#pragma unroll
          for (int n = 0; n < VALUES / 8; ++n)
            o[m][n][half * 2] *= rescale, o[m][n][half * 2 + 1] *= rescale;
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float from = base[m][half] == -INFINITY ? 0 : base[m][half];
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
          for (int e = half * 2; e < half * 2 + 2; ++e) {
            score[m][n][e] = exponential(fmaf(score[m][n][e], factor, -from));
            sum[m][half] += score[m][n][e];
          }
      }
    }
    pack_operands<T, M, KEYS>(weight, score);
    turn(tile), turn(free);

    wait();
    request_values(free, walk.key);
    multiply_turned<T, VALUES, M, KEYS>(o, weight, turned, tile);
    turn(tile), turn(free);
  }
  wait_copies<0>();

  float sink = p.sinks ? p.sinks[head] * LOG2_E : -INFINITY;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = quad_sum(sum[m][half]);
      int i = first + row + m * 16 + half * 8;
      if (i > last) continue;
      float weight = 0, log_sum = -INFINITY;
      if (base[m][half] != -INFINITY) {
        float highest = fmaxf(base[m][half], sink), own = exponential(base[m][half] - highest);
        total = total * own + exponential(sink - highest);
        weight = own / total;
        log_sum = (highest + log2f(total)) * LN_2;
      }
      int64_t token = s.query_start + i;
      T *to = (T *)p.o.data + b * p.o.sequence + token * p.o.token + head * p.o.head + quad * 2;
#pragma unroll
      for (int n = 0; n < VALUES / 8; ++n)
        if (n * 8 < p.value_dim)
          *(unsigned *)(to + n * 8) =
              pack<T>(o[m][n][half * 2] * weight, o[m][n][half * 2 + 1] * weight);
      if (p.lse.data && quad == 0)
        ((float *)p.lse.data)[b * p.lse.sequence + token * p.lse.token + head * p.lse.head] =
            log_sum;
    }
}

template <bool EXTRAS, bool LARGE, int WIDTH, int VALUES> struct shapes {
  typedef forward_shape<EXTRAS, WIDTH, VALUES, 2, 4, 64, 2> shape;
};
template <bool LARGE> struct shapes<true, LARGE, 32, 32> {
  typedef forward_shape<true, 32, 32, 1, 4, 64, 3> shape;
};
template <bool LARGE> struct shapes<true, LARGE, 64, 64> {
  typedef forward_shape<true, 64, 64, 1, 4, 64, 3> shape;
};
template <bool LARGE> struct shapes<false, LARGE, 64, 64> {
  typedef forward_shape<false, 64, 64, 2, 4, 96, 2> shape;
};
template <bool EXTRAS, bool LARGE> struct shapes<EXTRAS, LARGE, 192, 128> {
  typedef forward_shape<EXTRAS, 192, 128, 2, 4, 32, 2> shape;
};
template <bool EXTRAS, bool LARGE> struct shapes<EXTRAS, LARGE, 256, 256> {
  typedef forward_shape<EXTRAS, 256, 256, 1, 4, LARGE ? 48 : 32, 2> shape;
};

template <typename T, typename S>
attn_status launch(const parameters &p, const token_rows &bias, int64_t bias_key,
                   cudaStream_t stream) {
  int64_t blocks = p.batch * p.heads * tiles_of_rows(p.queries, S::QUERIES, p.list.queries);
  if (blocks == 0) return ATTN_OK;
  ATTN_CUDA_TRY(cudaFuncSetAttribute(mma_kernel<T, S>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     (int)S::BYTES));
  mma_kernel<T, S><<<(unsigned)blocks, S::THREADS, S::BYTES, stream>>>(p, bias, bias_key);
  ATTN_CUDA_TRY_LAUNCH("softmax_mma");
  return ATTN_OK;
}

bool plan(const attn_cuda_device *device, const attn_softmax_problem *problem,
          attn_cuda_choice *choice) {
  const int bytes = (int)shapes<false, false, 192, 128>::shape::BYTES; /* no shape needs more */
  if (!offered(problem) || (size_t)bytes > device->shared_bytes) return false;
  widths w = widths_of(problem);
  snprintf(choice->description, sizeof choice->description,
           "mma.sync: dimensions filled up to %d and %d", w.keys, w.values);
  return true;
}

bool suits(const attn_softmax_problem *, const attn_softmax_args *args) {
  return aligned(args->q, 8) && aligned(args->k, 8) && aligned(args->v, 8) && aligned(args->o, 2);
}

template <typename T, bool LARGE, int WIDTH, int VALUES>
attn_status run_widths(const attn_softmax_problem *problem, const attn_softmax_args *args,
                       cudaStream_t stream) {
  parameters p = parameters_of(problem, args, 1, 0, 0, NULL);
  token_rows bias = problem->bias ? over_heads(args->bias, false) : token_rows{};
  int64_t key = problem->bias ? args->bias.stride[3] : 0;
  return extras_of(problem)
             ? launch<T, typename shapes<true, LARGE, WIDTH, VALUES>::shape>(p, bias, key, stream)
             : launch<T, typename shapes<false, LARGE, WIDTH, VALUES>::shape>(p, bias, key, stream);
}

template <typename T>
attn_status run_dtype(const attn_softmax_problem *problem, const attn_softmax_args *args,
                      bool large, cudaStream_t stream) {
  switch (widths_of(problem).keys) {
  case 32: return run_widths<T, false, 32, 32>(problem, args, stream);
  case 64: return run_widths<T, false, 64, 64>(problem, args, stream);
  case 96: return run_widths<T, false, 96, 96>(problem, args, stream);
  case 128: return run_widths<T, false, 128, 128>(problem, args, stream);
  case 192: return run_widths<T, false, 192, 128>(problem, args, stream);
  }
  return large ? run_widths<T, true, 256, 256>(problem, args, stream)
               : run_widths<T, false, 256, 256>(problem, args, stream);
}

attn_status run(const attn_cuda_device *device, const attn_cuda_choice *,
                const attn_softmax_problem *problem, const attn_softmax_args *args, void *,
                cudaStream_t stream) {
  auto run_type = problem->dtype == ATTN_F16 ? run_dtype<__half> : run_dtype<__nv_bfloat16>;
  return run_type(problem, args, large(device), stream);
}

} // namespace

extern const softmax_algorithm softmax_mma_forward = {"mma", ATTN_PASS_FORWARD, plan, suits, run};

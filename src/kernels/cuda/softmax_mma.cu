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

/* EXTRAS: a cap, a bias, ALiBi or pages; the kernels without them have the registers to be faster.
 */
template <bool EXTRAS_, int WIDTH_, int M_, int WARPS_, int KEYS_, int SLOTS_, int BLOCKS_>
struct forward_shape {
  enum {
    EXTRAS = EXTRAS_,
    WIDTH = WIDTH_,
    M = M_,       /* times 16 queries a warp */
    KEYS = KEYS_, /* of a tile */
    SLOTS = SLOTS_,
    BLOCKS = BLOCKS_, /* of a multiprocessor, at least */
    THREADS = WARPS_ * 32,
    QUERIES = WARPS_ * M_ * 16,
    PITCH = rows_layout<WIDTH_>::PITCH,
    TILE = KEYS_ * PITCH,
    BYTES = QUERIES * PITCH + SLOTS_ * TILE,
  };
};

/* request_rows where rows lie in pages; `first` is the row's place in the sequence. */
template <typename T, typename S>
__device__ __forceinline__ void
request_paged(const parameters &p, unsigned to, const T *from, int64_t token, int64_t page_stride,
              const int32_t *pages, int first, int count, int width) {
  enum { CHUNKS = S::PITCH / 16, STEP = S::THREADS / CHUNKS };
  int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
#pragma unroll 4
  for (int i = 0; i < S::KEYS / STEP; ++i, row += STEP) {
    bool there = row < count && chunk * 8 < width;
    int64_t at = 0;
    if (there) {
      unsigned page = (unsigned)(first + row) / p.page_size;
      at = pages[page] * page_stride + ((unsigned)(first + row) - page * p.page_size) * token;
    }
    copy_chunk(to + row * S::PITCH + (chunk ^ row % 8) * 16, from + at + chunk * 8, there);
  }
}

/* The weights' exponents are taken from a base that follows the maximum of the row only when it
 * falls behind by more than this: rescaling is rare then, and 2^8 is far from any overflow. */
const float SLACK = 8;

/* Block: [sequence][head][tile of queries, last first: under a causal mask it is the longest]. */
template <typename T, typename S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS)
    mma_kernel(parameters p, token_rows bias, int64_t bias_key) {
  enum { WIDTH = S::WIDTH, M = S::M, KEYS = S::KEYS, QUERIES = S::QUERIES, SLOTS = S::SLOTS };
  int tiles = (int)((p.queries + QUERIES - 1) / QUERIES), index = blockIdx.x;
  int first = (tiles - 1 - index % tiles) * QUERIES;
  int head = index / tiles % (int)p.heads, b = index / tiles / (int)p.heads;
  span s = find_span(p, b);
  if (first >= s.queries) return;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4;
  int kv_head = head / (int)p.group, last = min(first + QUERIES, s.queries) - 1;
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
  int low = max(first + s.shift - s.left, 0) / KEYS;
  int high = (max(min(s.keys, last + s.shift + s.right + 1), 0) + KEYS - 1) / KEYS;
  int all_from = last + s.shift - s.left, all_to = min(s.keys, first + s.shift + s.right + 1);
  /* Tile 2 i of the ring has keys, tile 2 i + 1 the values of the same places. */
  int count = 2 * max(high - low, 0), requested = 0, slot_requested = 0, slot = 0;
  auto request = [&]() {
    if (requested < count) {
      unsigned to = ring + slot_requested * S::TILE;
      int row = (low + requested / 2) * KEYS;
      bool odd = requested % 2;
      int64_t token = odd ? p.v.token : p.k.token;
      const T *from = odd ? v : k;
      int width = (int)(odd ? p.value_dim : p.dim);
      if (pages)
        request_paged<T, S>(p, to, from, token, odd ? p.page_v : p.page_k, pages, row, s.keys - row,
                            width);
      else
        request_rows<T, WIDTH, KEYS, S::THREADS>(to, from + row * token, token, s.keys - row,
                                                 width);
    }
    commit_copies();
    ++requested, slot_requested = slot_requested + 1 == SLOTS ? 0 : slot_requested + 1;
  };
  auto next = [&]() { /* the next tile is there and the one before it is free */
                      wait_copies<SLOTS - 2>();
                      __syncthreads();
                      unsigned tile = ring + slot * S::TILE;
                      slot = slot + 1 == SLOTS ? 0 : slot + 1;
                      request();
                      return tile;
  };

  /* The thread's rows are `row` + 8 half + 16 m of the tile. */
  int row = warp * 16 * M + lane / 4;
  float factor = S::EXTRAS ? 1 : p.scale;
  lane_row<WIDTH> left = left_rows<WIDTH>(warp * 16 * M), right = right_rows<WIDTH>();
  lane_row<WIDTH> turned = turned_rows<WIDTH>();
  float o[M][WIDTH / 8][4] = {}, base[M][2], sum[M][2] = {};
#pragma unroll
  for (int m = 0; m < M; ++m) base[m][0] = base[m][1] = -INFINITY;

#pragma unroll 1
  for (int i = 0; i < SLOTS - 1; ++i) request();
#pragma unroll 1
  for (int key = low * KEYS; key < high * KEYS; key += KEYS) {
    float score[M][KEYS / 8][4] = {};
    unsigned tile = next();
    multiply_rows<T, WIDTH, M, KEYS>(score, left, queries, right, tile);

    if (S::EXTRAS) {
      float slope = p.alibi_slopes ? p.alibi_slopes[head] * LOG2_E : 0;
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            int i = first + row + m * 16 + e / 2 * 8, j = key + n * 8 + quad * 2 + e % 2;
            float x = score[m][n][e] * p.scale;
            if (p.soft_cap != 0) x = p.soft_cap * tanhf(x / p.soft_cap) * LOG2_E;
            if (bias.data && i < s.queries && j < s.keys)
              x += LOG2_E * ((const float *)bias.data)[b * bias.sequence + head * bias.head +
                                                       i * bias.token + j * bias_key];
            score[m][n][e] = x - slope * fabsf((float)(i + s.shift - j));
          }
    }
    if (key < all_from || key + KEYS > all_to) {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int at = first + row + m * 16 + half * 8 + s.shift - key - quad * 2;
          int from = at - s.left, to = min(s.keys - key - quad * 2, at + s.right + 1);
#pragma unroll
          for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (n * 8 + e < from || n * 8 + e >= to) score[m][n][half * 2 + e] = -INFINITY;
        }
    }

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
          for (int n = 0; n < WIDTH / 8; ++n)
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
    tile = next();
    multiply_turned<T, WIDTH, M, KEYS>(o, weight, turned, tile);
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
      for (int n = 0; n < WIDTH / 8; ++n)
        if (n * 8 < p.value_dim)
          *(unsigned *)(to + n * 8) =
              pack<T>(o[m][n][half * 2] * weight, o[m][n][half * 2 + 1] * weight);
      if (p.lse.data && quad == 0)
        ((float *)p.lse.data)[b * p.lse.sequence + token * p.lse.token + head * p.lse.head] =
            log_sum;
    }
}

template <int WIDTH> struct shapes {
  typedef forward_shape<false, WIDTH, 2, 4, 64, 3, 2> plain;
  typedef forward_shape<true, WIDTH, 1, 4, 32, 3, 2> extras;
};
template <> struct shapes<256> {
  typedef forward_shape<false, 256, 1, 4, 32, 3, 2> plain;
  typedef forward_shape<true, 256, 1, 4, 32, 3, 2> extras;
};

int width_of(const attn_softmax_problem *problem) {
  int64_t width = problem->dim > problem->value_dim ? problem->dim : problem->value_dim;
  return width <= 64 ? 64 : width <= 96 ? 96 : width <= 128 ? 128 : 256;
}
bool extras_of(const attn_softmax_problem *problem) {
  return problem->soft_cap != 0 || problem->alibi || problem->bias || problem->paged ||
         !(problem->scale > 0);
}

template <typename T, typename S>
attn_status launch(const parameters &p, const token_rows &bias, int64_t bias_key,
                   cudaStream_t stream) {
  int64_t blocks = p.batch * p.heads * ceil_divide(p.queries, S::QUERIES);
  if (blocks == 0) return ATTN_OK;
  ATTN_CUDA_TRY(cudaFuncSetAttribute(mma_kernel<T, S>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     (int)S::BYTES));
  mma_kernel<T, S><<<(unsigned)blocks, S::THREADS, S::BYTES, stream>>>(p, bias, bias_key);
  ATTN_CUDA_TRY_LAUNCH("softmax_mma");
  return ATTN_OK;
}

bool plan(const attn_cuda_device *device, const attn_softmax_problem *problem,
          attn_cuda_choice *choice) {
  const int bytes = (int)shapes<128>::plain::BYTES; /* none needs more */
  if (!offered(problem) || (size_t)bytes > device->shared_bytes) return false;
  int width = width_of(problem);
  snprintf(choice->description, sizeof choice->description,
           "mma.sync: tiles of %d queries, dimensions filled up to %d",
           width == 256 || extras_of(problem) ? 64 : 128, width);
  return true;
}

bool suits(const attn_softmax_problem *, const attn_softmax_args *args) {
  return aligned(args->q, 8) && aligned(args->k, 8) && aligned(args->v, 8) && aligned(args->o, 2);
}

template <typename T, int WIDTH>
attn_status run_width(const attn_softmax_problem *problem, const attn_softmax_args *args,
                      cudaStream_t stream) {
  parameters p = parameters_of(problem, args, 1, 0, 0, NULL);
  token_rows bias = problem->bias ? over_heads(args->bias, false) : token_rows{};
  int64_t bias_key = problem->bias ? args->bias.stride[3] : 0;
  return extras_of(problem) ? launch<T, typename shapes<WIDTH>::extras>(p, bias, bias_key, stream)
                            : launch<T, typename shapes<WIDTH>::plain>(p, bias, bias_key, stream);
}

template <typename T>
attn_status run_dtype(const attn_softmax_problem *problem, const attn_softmax_args *args,
                      cudaStream_t stream) {
  switch (width_of(problem)) {
  case 64: return run_width<T, 64>(problem, args, stream);
  case 96: return run_width<T, 96>(problem, args, stream);
  case 128: return run_width<T, 128>(problem, args, stream);
  default: return run_width<T, 256>(problem, args, stream);
  }
}

attn_status run(const attn_cuda_device *, const attn_cuda_choice *,
                const attn_softmax_problem *problem, const attn_softmax_args *args, void *,
                cudaStream_t stream) {
  return problem->dtype == ATTN_F16 ? run_dtype<__half>(problem, args, stream)
                                    : run_dtype<__nv_bfloat16>(problem, args, stream);
}

} // namespace

extern const softmax_algorithm softmax_mma_forward = {"mma", ATTN_PASS_FORWARD, plan, suits, run};

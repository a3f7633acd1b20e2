/* Few queries against many keys (decoding): every key and value is read from memory once, which is
 * what bounds the time. Contiguous, packed or paged keys in bfloat16 or float16; all query heads of
 * a key head together, up to 16 rows (query, head) a tile; the keys split among blocks, whose
 * partial results are merged in a fixed order (FlashDecoding; FlashAttention-2, arXiv 2307.08691).
 *
 * A warp works alone on 16 keys at a time, which a ring of its own in shared memory receives by
 * cp.async. Products by mma.m16n8k16. No transposition is needed: both the dimension of Q K^T and
 * the columns of P V may be permuted, as long as both operands, or the result's reader, agree, so
 * that a thread's fragments are 16 bytes in a row of the stored keys and values.
 *
 * The last block of a unit (sequence, key head, tile) to finish merges the parts of all, or, where
 * they are more than one block reads quickly, a kernel of its own does. */
#include "kernels/cuda/decode.cuh"

namespace {

enum {
  ROWS = 16, /* of a tile */
  KEYS = 16, /* of a warp's step */
  WARPS = 4,
  MOST_ROWS = 64,   /* beyond, tiles read the same keys too often */
  SPLIT_KEYS = 128, /* a split is not worth less */
};

/* Where 16-byte chunk `chunk` of row `row` lies, in chunks: so that the 8 threads that read at once
 * meet 8 different groups of banks. Keys are read in 4 chunks of 2 rows, values in 2 chunks of
 * every other row. */
template <int WIDTH> __device__ __forceinline__ int key_place(int row, int chunk) {
  return row * (WIDTH / 8) + (chunk ^ (row % 2 * 4));
}
template <int WIDTH> __device__ __forceinline__ int value_place(int row, int chunk) {
  return row * (WIDTH / 8) + (chunk ^ (row % 8));
}

template <int WIDTH, int STAGES> struct layout {
  enum {
    CHUNKS = WIDTH / 8,              /* of 16 bytes in a row */
    STAGE = 2 * KEYS * CHUNKS,       /* chunks of keys and values */
    RING = STAGES * STAGE * 16,      /* bytes of a warp */
    RESULT = ROWS * (WIDTH + 4) * 4, /* bytes of a warp's partial result, in the ring's place */
    BYTES = WARPS * (RING > RESULT ? RING : RESULT),
    BLOCKS = WIDTH == 64    ? 3
             : WIDTH == 128 ? 2
                            : 1, /* of a multiprocessor */
  };
};

/* A warp's way through its keys: first + 16 (warp + 4 n). */
template <typename T, int WIDTH, int STAGES> struct key_ring {
  const parameters &p;
  const int32_t *pages;
  const T *k, *v;
  uint4 *ring;
  int end, lane;

  /* Of paged keys: where the key of this lane (mod 16) lies, looked up a step ahead. */
  struct place {
    int page;
    unsigned token;
  };
  __device__ place look_up(int first) const {
    int key = first + lane % KEYS;
    if (!pages || key >= end) return {0, 0};
    unsigned index = (unsigned)key / p.page_size;
    return {pages[index], (unsigned)key - index * p.page_size};
  }
  __device__ void request(int stage, int first, place at) const {
    typedef layout<WIDTH, STAGES> l;
    uint4 *keys = ring + stage * l::STAGE, *values = keys + KEYS * l::CHUNKS;
    const int rows = 32 / l::CHUNKS > 0 ? 32 / l::CHUNKS : 1; /* at once */
    int chunk = lane % l::CHUNKS, row = lane / l::CHUNKS;
#pragma unroll
    for (int i = 0; i < KEYS; i += rows) {
      int r = i + row;
      bool there = first + r < end;
      int64_t from_k = 0, from_v = 0;
      if (pages) {
        int page = __shfl_sync(~0u, at.page, r);
        unsigned token = __shfl_sync(~0u, at.token, r);
        from_k = page * p.page_k + token * p.k.token;
        from_v = page * p.page_v + token * p.v.token;
      } else if (there) {
        from_k = (first + r) * p.k.token;
        from_v = (first + r) * p.v.token;
      }
      copy_async(keys + key_place<WIDTH>(r, chunk), k + from_k + chunk * 8, there);
      copy_async(values + value_place<WIDTH>(r, chunk), v + from_v + chunk * 8, there);
    }
  }
};

extern __shared__ __align__(16) char shared_memory[];

/* Block: [sequence][key head][tile of rows][split]. */
template <typename T, int WIDTH, int STAGES>
__global__ void __launch_bounds__(32 * WARPS, layout<WIDTH, STAGES>::BLOCKS)
    decode_kernel(parameters p) {
  typedef layout<WIDTH, STAGES> l;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, quad = lane % 4;
  int index = blockIdx.x, splits = (int)p.splits, split = index % splits, unit = index / splits;
  int tile = unit % (int)p.tiles, kv_head = unit / (int)p.tiles % (int)p.kv_heads;
  int b = unit / (int)p.tiles / (int)p.kv_heads, group = (int)p.group;
  sequence s = find_sequence(p, b);
  int first_row = tile * ROWS, rows = min((int)ROWS, (int)s.queries * group - first_row);
  if (rows <= 0) return;

  /* The keys that any row of the tile sees, and this split's share. */
  int first = (int)min(visible(p, s, first_row / group).first, s.keys);
  int end = (int)visible(p, s, (first_row + rows - 1) / group).end;
  unsigned share = max(end - first, 0), step = WARPS * KEYS;
  share = (share + splits * step - 1) / (splits * step) * step;
  first = (int)min((int64_t)first + (int64_t)split * share, s.keys);
  end = (int)min((int64_t)end, (int64_t)first + share);

  uint4 *memory = (uint4 *)(shared_memory + warp * (l::BYTES / WARPS));
  int64_t k_start = kv_head * p.k.head, v_start = kv_head * p.v.head;
  if (!p.pages) {
    k_start += b * p.k.sequence + s.key_start * p.k.token;
    v_start += b * p.v.sequence + s.key_start * p.v.token;
  }
  key_ring<T, WIDTH, STAGES> ring = {p,
                                     p.pages ? p.pages + b * p.pages_sequence : NULL,
                                     (const T *)p.k.data + k_start,
                                     (const T *)p.v.data + v_start,
                                     memory,
                                     end,
                                     lane};
  const int stride = WARPS * KEYS;
  int key = first + warp * KEYS, ahead = key;
  typename key_ring<T, WIDTH, STAGES>::place at = ring.look_up(ahead);
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) {
    if (ahead < end) ring.request(i, ahead, at);
    commit_copies();
    ahead += stride;
    at = ring.look_up(ahead);
  }

  /* Q as operand: rows `row` and `row` + 8, of each 32 dimensions the 8 from 8 quad on. */
  uint4 q[2][WIDTH / 32];
  int from_key[2], to_key[2], position[2]; /* what the rows see */
  float slope[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int r = first_row + row + half * 8, i = r / group, head = kv_head * group + r % group;
    bool there = row + half * 8 < rows;
    key_range seen = there ? visible(p, s, i) : key_range{0, 0};
    from_key[half] = (int)min(seen.first, s.keys), to_key[half] = (int)max(seen.end, (int64_t)0);
    slope[half] = there && p.alibi_slopes ? p.alibi_slopes[head] : 0;
    position[half] = (int)(i + s.keys - s.queries);
    const T *from =
        (const T *)p.q.data + b * p.q.sequence + (s.query_start + i) * p.q.token + head * p.q.head;
#pragma unroll
    for (int c = 0; c < WIDTH / 32; ++c)
      q[half][c] = there ? *(const uint4 *)(from + c * 32 + quad * 8) : make_uint4(0, 0, 0, 0);
  }

  float o[WIDTH / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  for (int stage = 0; key < end; key += stride) {
    wait_copies<STAGES - 2>();
    __syncwarp();
    int last = stage == 0 ? STAGES - 1 : stage - 1;
    if (ahead < end) ring.request(last, ahead, at);
    commit_copies();
    ahead += stride;
    at = ring.look_up(ahead);
    const uint4 *keys = memory + stage * l::STAGE, *values = keys + KEYS * l::CHUNKS;

    float score[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int c = 0; c < WIDTH / 32; ++c) {
        uint4 k = keys[key_place<WIDTH>(n * 8 + row, c * 4 + quad)];
        multiply<T>(score[n], q[0][c].x, q[1][c].x, q[0][c].y, q[1][c].y, k.x, k.y);
        multiply<T>(score[n], q[0][c].z, q[1][c].z, q[0][c].w, q[1][c].w, k.z, k.w);
      }
    float top[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int half = e / 2;
        int j = key + n * 8 + quad * 2 + e % 2;
        float x = score[n][e] * p.scale;
        if (p.soft_cap != 0) x = p.soft_cap * tanhf(x / p.soft_cap) * LOG2_E;
        if (p.alibi_slopes) x -= slope[half] * fabsf((float)(position[half] - j)) * LOG2_E;
        score[n][e] = j >= from_key[half] && j < to_key[half] ? x : -INFINITY;
        top[half] = fmaxf(top[half], score[n][e]);
      }
    float base[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 1));
      top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 2));
      base[half] = top[half] == -INFINITY ? 0 : top[half];
    }
    if (__any_sync(~0u, top[0] != maximum[0] || top[1] != maximum[1])) {
      float factor[2] = {exponential(maximum[0] - base[0]), exponential(maximum[1] - base[1])};
#pragma unroll
      for (int c = 0; c < WIDTH / 8; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[c][e] *= factor[e / 2];
      sum[0] *= factor[0], sum[1] *= factor[1];
      maximum[0] = top[0], maximum[1] = top[1];
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        score[n][e] = exponential(score[n][e] - base[e / 2]);
        sum[e / 2] += score[n][e];
      }
    unsigned w0 = pack<T>(score[0][0], score[0][1]), w1 = pack<T>(score[0][2], score[0][3]);
    unsigned w2 = pack<T>(score[1][0], score[1][1]), w3 = pack<T>(score[1][2], score[1][3]);
    /* Of each 64 columns a thread reads the 8 from 8 row on; product j has column j of each 8. */
#pragma unroll
    for (int c = 0; c < WIDTH / 64; ++c) {
      uint4 v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        v[i] = values[value_place<WIDTH>(quad * 2 + i % 2 + i / 2 * 8, c * 8 + row)];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        auto part = [&](const uint4 &x) {
          return j / 2 == 0 ? x.x : j / 2 == 1 ? x.y : j / 2 == 2 ? x.z : x.w;
        };
        unsigned selector = j % 2 ? 0x7632 : 0x5410;
        multiply<T>(o[c * 8 + j], w0, w1, w2, w3, __byte_perm(part(v[0]), part(v[1]), selector),
                    __byte_perm(part(v[2]), part(v[3]), selector));
      }
    }
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }

  /* The warps' results become one, in their order. */
  wait_copies<0>();
  __syncthreads();
  float *result = (float *)memory; /* [ROWS][WIDTH + 4], the statistics behind the columns */
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
    sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
    float *to = result + (row + half * 8) * (WIDTH + 4);
#pragma unroll
    for (int c = 0; c < WIDTH / 64; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int j = 0; j < 8; j += 4)
          *(float4 *)(to + c * 64 + (quad * 2 + e) * 8 + j) =
              make_float4(o[c * 8 + j][half * 2 + e], o[c * 8 + j + 1][half * 2 + e],
                          o[c * 8 + j + 2][half * 2 + e], o[c * 8 + j + 3][half * 2 + e]);
    if (quad == 0) to[WIDTH] = maximum[half], to[WIDTH + 1] = sum[half];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * WIDTH; i += 32 * WARPS) {
    int r = i / WIDTH, c = i % WIDTH;
    if (r >= rows) continue;
    float top = -INFINITY, total = 0, x = 0;
    auto part = [&](int w, int column) {
      return ((const float *)(shared_memory + w * (l::BYTES / WARPS)))[r * (WIDTH + 4) + column];
    };
#pragma unroll
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, part(w, WIDTH));
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      float weight = top == -INFINITY ? 0 : exponential(part(w, WIDTH) - top);
      total += weight * part(w, WIDTH + 1);
      x += weight * part(w, c);
    }
    int query = (first_row + r) / group, head = kv_head * group + (first_row + r) % group;
    store_result(p, s, b, query, head, (int64_t)index * ROWS + r, c, x, top, total);
  }
  if (splits > 1 && p.finished)
    merge_if_last<ROWS, WIDTH, 32 * WARPS>(p, s, b, kv_head, first_row, rows, unit, split);
}

/* choice->values */
enum { SPLITS = 0 };

/* Dimension 256: a third stage where shared memory has room for it. */
bool third_stage(const attn_cuda_device *device) {
  return (size_t)layout<256, 3>::BYTES <= device->shared_bytes;
}

bool plan(const attn_cuda_device *device, const attn_softmax_problem *problem,
          attn_cuda_choice *choice) {
  int64_t width = problem->dim,
          units = problem->batch * problem->kv_heads * tiles_of(problem, ROWS);
  size_t bytes = width == 64    ? (size_t)layout<64, 4>::BYTES
                 : width == 128 ? (size_t)layout<128, 3>::BYTES
                                : (size_t)layout<256, 2>::BYTES;
  if ((problem->dtype != ATTN_BF16 && problem->dtype != ATTN_F16) ||
      (width != 64 && width != 128 && width != 256) || bytes > device->shared_bytes ||
      problem->value_dim != width || problem->bias || problem->list_keys ||
      problem->query_length > MOST_QUERIES || tiles_of(problem, ROWS) * ROWS > MOST_ROWS ||
      problem->key_length > INT32_MAX / 2 || units == 0)
    return false;
  int64_t blocks = width == 64 ? 3 : width == 128 ? 2 : 1; /* of a multiprocessor */
  int64_t splits =
      choose_splits(units, device->multiprocessors * blocks, problem->key_length, SPLIT_KEYS);
  /* Shares are whole steps of a block: as many as there are, then. */
  int64_t share = ceil_divide(problem->key_length, splits * WARPS * KEYS) * WARPS * KEYS;
  if (share > 0) splits = ceil_divide(problem->key_length, share);
  choice->values[SPLITS] = splits;
  if (splits > 1)
    choice->workspace_bytes = (size_t)(units * splits) *
                              (ROWS * (width + 2) * sizeof(float) + sizeof *parameters::finished);
  snprintf(choice->description, sizeof choice->description,
           "decode: %lld splits of the keys, all heads of a key head together", (long long)splits);
  return true;
}

bool suits(const attn_softmax_problem *, const attn_softmax_args *args) {
  return aligned(args->q, 8) && aligned(args->k, 8) && aligned(args->v, 8);
}

template <typename T, int WIDTH, int STAGES>
attn_status launch(const parameters &p, cudaStream_t stream) {
  typedef layout<WIDTH, STAGES> l;
  int64_t units = p.batch * p.kv_heads * p.tiles;
  ATTN_CUDA_TRY(cudaFuncSetAttribute(decode_kernel<T, WIDTH, STAGES>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, (int)l::BYTES));
  decode_kernel<T, WIDTH, STAGES>
      <<<(unsigned)(units * p.splits), 32 * WARPS, (size_t)l::BYTES, stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("softmax_decode");
  if (p.splits == 1 || p.finished) return ATTN_OK;
  return merge < ROWS, WIDTH < 128 ? 128 : WIDTH > (p, stream);
}

attn_status run(const attn_cuda_device *device, const attn_cuda_choice *choice,
                const attn_softmax_problem *problem, const attn_softmax_args *args, void *workspace,
                cudaStream_t stream) {
  parameters p = parameters_of(problem, args, choice->values[SPLITS], tiles_of(problem, ROWS), ROWS,
                               workspace);

  bool half = problem->dtype == ATTN_F16;
  auto each =
      problem->dim == 64    ? (half ? launch<__half, 64, 4> : launch<__nv_bfloat16, 64, 4>)
      : problem->dim == 128 ? (half ? launch<__half, 128, 3> : launch<__nv_bfloat16, 128, 3>)
      : third_stage(device) ? (half ? launch<__half, 256, 3> : launch<__nv_bfloat16, 256, 3>)
                            : (half ? launch<__half, 256, 2> : launch<__nv_bfloat16, 256, 2>);
  return each(p, stream);
}

} // namespace

extern const softmax_algorithm softmax_decode = {"decode", ATTN_PASS_FORWARD, plan, suits, run};

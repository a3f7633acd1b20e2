/* What softmax attention by mma.m16n8k16 shares (softmax_mma.cu, softmax_mma_backward.cu): what one
 * sequence looks like to a kernel, tiles of rows in shared memory, and products of such tiles.
 *
 * Fragments of m16n8k16, for lane l: an accumulator c[16 x 8] has rows l / 4 and l / 4 + 8 and
 * columns l % 4 * 2 + {0, 1}. Two of them side by side, packed, are an operand A [16 x 16]: so the
 * result of a product enters the next one without leaving the registers. */
#ifndef ATTN_KERNELS_CUDA_SOFTMAX_MMA_CUH
#define ATTN_KERNELS_CUDA_SOFTMAX_MMA_CUH

#include "kernels/cuda/decode.cuh"

namespace {

enum { FAR = 1 << 29 }; /* a window that is no limit; lengths are below it */

/* One sequence: query i sees the keys i + shift - left .. i + shift + right that are in use. */
struct span {
  int64_t query_start, key_start; /* in packed tensors */
  int queries, keys, stored;      /* stored: keys with a place in k, of which `keys` are in use */
  int shift, left, right;
};

__device__ __forceinline__ span find_span(const parameters &p, int64_t b) {
  sequence s = find_sequence(p, b);
  auto limit = [](int64_t window) { return window < 0 || window > FAR ? FAR : (int)window; };
  span x = {s.query_start, s.key_start, (int)s.queries, (int)s.keys, (int)p.keys, 0, 0, 0};
  if (p.key_offsets) x.stored = p.key_offsets[b + 1] - p.key_offsets[b];
  x.shift = x.keys - x.queries;
  x.left = limit(p.window_left), x.right = p.causal ? 0 : limit(p.window_right);
  return x;
}

/* Tiles of at most `rows` of `count` rows; those of one tile are of one block of the block list. */
__host__ __device__ __forceinline__ int tiles_of_rows(int64_t count, int rows, int block) {
  if (!block) return (int)((count + rows - 1) / rows);
  return (int)((count + block - 1) / block) * ((block + rows - 1) / rows);
}
struct row_tile {
  int first, end; /* end: of its block of the block list */
};
__device__ __forceinline__ row_tile find_tile(int index, int rows, int block) {
  if (!block) return {index * rows, FAR};
  const int tiles = (block + rows - 1) / rows, start = index / tiles * block;
  return {start + index % tiles * rows, start + block};
}

/* A walk over the tiles of `WIDTH` keys that a tile of queries sees, upwards from `low` to `high` -
 * 1: all of them, or those of the blocks on its list. */
template <int WIDTH> struct key_walk {
  int key, end;   /* of the tile; end of its block. key is at least `high` behind the last tile */
  int low, high;  /* low: a multiple of WIDTH where there is no list */
  int size, left; /* keys of a block of the list, 0: there is none; blocks behind this one */
  const int32_t *next;

  __device__ __forceinline__ key_walk(const block_list &list, int64_t b, int head, int query,
                                      int first_key, int end_key) {
    low = first_key / WIDTH * WIDTH, high = end_key;
    key = low, end = FAR, size = list.offsets ? list.keys : 0, left = 0, next = NULL;
    if (!size) return;
    const listed_blocks listed = find_listed(list, b, head, query / list.queries);
    next = listed.first, left = listed.count;
    enter();
  }
  /* The next block on the list. */
  __device__ __forceinline__ void enter() {
    for (key = high; left > 0; ++next, --left) {
      key = *next * size, end = key + size;
      if (end <= low) continue;
      if (key < low) key += (low - key) / WIDTH * WIDTH;
      ++next, --left;
      return;
    }
    key = max(key, high);
  }
  __device__ __forceinline__ bool more() const {
    return key < high;
  }
  __device__ __forceinline__ void step() {
    key += WIDTH;
    if (key >= end) enter();
  }
};

/* Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8. */
__device__ __forceinline__ void load_matrices(unsigned (&x)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void load_turned_matrices(unsigned (&x)[4], unsigned row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

/* Rows of WIDTH elements in shared memory, PITCH bytes apart. The chunk of 16 bytes c of row r lies
 * at chunk c ^ r % 8 of the row: 8 rows of one chunk meet 8 different groups of banks. */
template <int WIDTH> struct rows_layout {
  enum { PITCH = (WIDTH + 63) / 64 * 128 };
};

/* What a lane reads for ldmatrix: row `row` of a tile, from chunk `chunk` on. */
template <int WIDTH> struct lane_row {
  unsigned base, turn; /* of the row; bits that its chunks are turned by */
  __device__ __forceinline__ lane_row(int row, int chunk)
      : base(row * rows_layout<WIDTH>::PITCH), turn((chunk ^ row % 8) * 16) {
  }
  /* `chunk` is even and known to the compiler: one exclusive or for each, the rest are offsets. */
  __device__ __forceinline__ unsigned at(unsigned tile, int chunk) const {
    return tile + base + (turn ^ chunk % 8 * 16) + chunk / 8 * 128;
  }
};
/* An operand A: 16 rows, 16 columns from a chunk on. */
template <int WIDTH> __device__ __forceinline__ lane_row<WIDTH> left_rows(int first) {
  int lane = threadIdx.x % 32;
  return lane_row<WIDTH>(first + lane % 16, lane / 16);
}
/* Two operands B for X Y^T: rows 0 .. 7 and 8 .. 15 of Y. */
template <int WIDTH> __device__ __forceinline__ lane_row<WIDTH> right_rows() {
  int lane = threadIdx.x % 32;
  return lane_row<WIDTH>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}
/* Two operands B for X Y: columns 0 .. 7 and 8 .. 15 of 16 rows of Y. */
template <int WIDTH> __device__ __forceinline__ lane_row<WIDTH> turned_rows() {
  return left_rows<WIDTH>(0);
}

/* copy_async to an address in shared memory. */
__device__ __forceinline__ void copy_chunk(unsigned to, const void *from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}

/* Queues the copies of ROWS rows, `from` being the first; zeros for those that are not among the
 * first `count`, and for columns from `width` on. Eight threads share 128 bytes of a row. */
template <typename T, int WIDTH, int ROWS, int THREADS>
__device__ __forceinline__ void request_rows(unsigned to, const T *from, int64_t token, int count,
                                             int width) {
  enum { PITCH = rows_layout<WIDTH>::PITCH, STEP = THREADS / 8 };
  static_assert(ROWS % STEP == 0, "every thread has the same share");
  int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
  if (WIDTH < 64 && chunk >= WIDTH / 8) return;
  to += row * PITCH + (chunk ^ row % 8) * 16, from += row * token + chunk * 8;
#pragma unroll
  for (int i = 0; i < ROWS / STEP; ++i, from += STEP * token)
#pragma unroll
    for (int c = 0; c < (WIDTH + 63) / 64; ++c)
      if (c * 64 + 64 <= WIDTH || c * 64 + chunk * 8 < WIDTH)
        copy_chunk(to + i * STEP * PITCH + c * 128, from + c * 64,
                   i * STEP + row < count && c * 64 + chunk * 8 < width);
}

/* c += X Y^T for M times 16 rows of X and N rows of Y. */
template <typename T, int WIDTH, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&c)[M][N / 8][4], const lane_row<WIDTH> &left,
                                              unsigned x, const lane_row<WIDTH> &right,
                                              unsigned y) {
  enum { PITCH = rows_layout<WIDTH>::PITCH };
#pragma unroll
  for (int step = 0; step < WIDTH / 16; ++step) {
    unsigned a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_matrices(a[m], left.at(x, step * 2) + m * 16 * PITCH);
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
      unsigned b[4];
      load_matrices(b, right.at(y, step * 2) + n * 16 * PITCH);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply<T>(c[m][n * 2], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
        multiply<T>(c[m][n * 2 + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3]);
      }
    }
  }
}

/* c += A Y for N rows of Y, A as operands; c may have more columns than Y. */
template <typename T, int WIDTH, int M, int N, int TILES>
__device__ __forceinline__ void multiply_turned(float (&c)[M][TILES][4],
                                                const unsigned (&a)[M][N / 16][4],
                                                const lane_row<WIDTH> &turned, unsigned y) {
  enum { PITCH = rows_layout<WIDTH>::PITCH };
#pragma unroll
  for (int step = 0; step < N / 16; ++step)
#pragma unroll
    for (int n = 0; n < WIDTH / 16; ++n) {
      unsigned b[4];
      load_turned_matrices(b, turned.at(y, n * 2) + step * 16 * PITCH);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const unsigned(&w)[4] = a[m][step];
        multiply<T>(c[m][n * 2], w[0], w[1], w[2], w[3], b[0], b[1]);
        multiply<T>(c[m][n * 2 + 1], w[0], w[1], w[2], w[3], b[2], b[3]);
      }
    }
}

/* Accumulators [16 M x N] as operands A of the next product. */
template <typename T, int M, int N>
__device__ __forceinline__ void pack_operands(unsigned (&a)[M][N / 16][4],
                                              const float (&c)[M][N / 8][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int i = 0; i < N / 8; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        a[m][i / 2][i % 2 * 2 + half] = pack<T>(c[m][i][half * 2], c[m][i][half * 2 + 1]);
}

/* What happens to scores beside their scale, for one head; `own` are the rows of a kernel's tile
 * (queries or keys), `other` the columns. */
struct score_terms {
  float scale; /* with log2(e) */
  float inside,
      around;  /* 2 scale log2(e) / cap, cap log2(e); `around` is 0 where there is no cap */
  float slope; /* ALiBi's, with log2(e) */
  const float *bias;
  int64_t bias_own, bias_other;
};

inline __device__ score_terms terms_of(const parameters &p, int64_t head, const float *bias,
                                       int64_t bias_own, int64_t bias_other) {
  score_terms t = {p.scale, 0, p.soft_cap * LOG2_E, 0, bias, bias_own, bias_other};
  if (p.soft_cap != 0) t.inside = 2 * p.scale * LOG2_E / p.soft_cap;
  if (p.alibi_slopes) t.slope = p.alibi_slopes[head] * LOG2_E;
  return t;
}

/* Scores from products, with log2(e), of the tile whose corner is (own, other) for this thread: its
 * rows are own + 8 half + 16 m, its columns other + 8 n + e % 2. `slope` becomes the derivative of
 * the cap, 1 - tanh^2; tanh(x) = 1 - 2 / (1 + exp(2 x)), exact enough next to the cap. */
template <bool SLOPES, int M, int N>
__device__ __forceinline__ void
finish_scores(float (&score)[M][N / 8][4], float (&slope)[SLOPES ? M : 1][N / 8][4],
              const score_terms &t, int own, int owns, int other, int others, int shift) {
  if (t.around != 0) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float ratio = 1 - __fdividef(2, 1 + exponential(score[m][n][e] * t.inside));
          score[m][n][e] = ratio * t.around;
          if constexpr (SLOPES) slope[m][n][e] = 1 - ratio * ratio;
        }
  } else {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          score[m][n][e] *= t.scale;
          if constexpr (SLOPES) slope[m][n][e] = 1;
        }
  }
  if (t.slope != 0) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float distance = (float)(own + m * 16 + half * 8 + shift - other);
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            score[m][n][half * 2 + e] -= t.slope * fabsf(distance - (float)(n * 8 + e));
      }
  }
  if (t.bias) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = own + m * 16 + half * 8;
        const float *bias = t.bias + row * t.bias_own + other * t.bias_other;
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (row < owns && other + n * 8 + e < others)
              score[m][n][half * 2 + e] += LOG2_E * bias[(n * 8 + e) * t.bias_other];
      }
  }
}

/* -inf for pairs of such a tile that do not see each other: row r sees the columns r + shift - left
 * .. r + shift + right. */
template <int M, int N>
__device__ __forceinline__ void hide(float (&score)[M][N / 8][4], int own, int other, int others,
                                     int shift, int left, int right) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int at = own + m * 16 + half * 8 + shift - other;
      int from = at - left, to = min(others - other, at + right + 1);
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (n * 8 + e < from || n * 8 + e >= to) score[m][n][half * 2 + e] = -INFINITY;
    }
}

/* Over the four lanes that share a row. */
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

extern __shared__ __align__(128) char shared_memory[];

/* What both passes ask of a problem. */
inline bool offered(const attn_softmax_problem *problem) {
  return (problem->dtype == ATTN_BF16 || problem->dtype == ATTN_F16) && problem->dim <= 256 &&
         problem->value_dim <= 256 && problem->dim % 8 == 0 && problem->value_dim % 8 == 0 &&
         problem->query_length < FAR && problem->key_length < FAR;
}
inline bool extras_of(const attn_softmax_problem *problem) {
  return problem->soft_cap != 0 || problem->alibi || problem->bias || problem->paged ||
         !(problem->scale > 0);
}

/* Whether the GPU has Hopper's shared memory: some shapes are only for it. */
inline bool large(const attn_cuda_device *device) {
  return device->major >= 9 && device->shared_bytes >= 200 * 1024;
}

/* The widths that there are kernels for, of keys and of values. */
struct widths {
  int keys, values;
};
const widths WIDTHS[] = {{32, 32}, {64, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}};

/* The first ones that hold the problem's. */
inline widths widths_of(const attn_softmax_problem *problem) {
  for (const widths &w : WIDTHS)
    if (problem->dim <= w.keys && problem->value_dim <= w.values) return w;
  return {};
}

} // namespace

#endif

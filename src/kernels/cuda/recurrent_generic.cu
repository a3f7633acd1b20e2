/* The recurrent engine for every problem of attn/recurrent.h, token by token, with the state in
 * registers. What faster algorithms refuse ends here. Decays are only ever multiplied with, so
 * alpha = 0 is a decay like any other.
 *
 * A unit is one value head of one sequence. S [dim, value_dim] of a unit falls apart in two ways:
 *  - by columns: S^T q, S^T k and so u = beta (v - S~^T k) need no other column, forward and
 *    backward (du = dS^T k);
 *  - by rows: once u is known, S_t = Diag(alpha_t) S_{t-1} + k_t u_t^T, and once du is known too,
 * the rows of dS, and with them dq, dk and dg, need no other row. Forward is a scan by columns.
 * Backward:
 *  1. forward by columns: e = v - S~^T k, and a checkpoint of S every INTERVAL tokens;
 *  2. backward by columns: du, from it dv, dbeta and d_initial_state;
 *  3. backward by rows: dq, dk, dg, where S comes from a checkpoint by way of states kept every
 *     STEP tokens in shared memory;
 *  4. the normaliser, a vector z, whose share is added to dq, dk, dg;
 *  5. sums over the value heads of a query head, and over what a decay is shared by.
 * The equations are those of the reverse recurrence: with dS, dz after token t,
 *   dnum = do / den,  dden = -(do . num) / den^2 = -(q . dq_num) / den,  dq_num = scale S dnum
 *   dS += scale q dnum^T,  du = dS^T k,  dk = dS u - S~ (beta du),  dS~ = dS - k (beta du)^T
 *   dg = rowsum(dS~ (.) S~),  dS = Diag(alpha) dS~.
 * Units are done in waves, so that the workspace is bounded. */
#include "kernels/cuda/elements.cuh"

#include <cmath>
#include <cstdio>

namespace {

enum {
  COLUMNS = 16,     /* of a block that scans by columns: 4 warps of 4, 8 lanes to a column */
  THREADS = 128,    /* of such a block */
  LANES = 8,        /* to a column */
  INTERVAL = 32,    /* tokens from one checkpoint to the next; a multiple of stage<Real>() */
  STEP = 4,         /* tokens whose states a thread keeps in registers */
  MOST_WARPS = 4,   /* of a block that scans by rows */
  SMALL_BLOCK = 256 /* threads of the kernels without a state */
};

/* Tokens staged in shared memory at a time. */
template <typename Real> __host__ __device__ constexpr int stage() {
  return sizeof(Real) == 4 ? 16 : 8;
}

/* `row` is the stride of a token, or of a key channel in states. */
struct rows {
  char *data;
  attn_dtype dtype;
  int64_t sequence, row, head;
};

struct parameters {
  int64_t batch, length, heads, value_heads, dim, value_dim;
  double scale, epsilon;
  attn_decay decay_kind;
  bool delta, normalise;
  const int32_t *offsets;
  rows q, k, v, o, decay, beta, s0, s1, z0, z1, d_o, d_s1, d_z1;
  rows d_q, d_k, d_v, d_decay, d_beta, d_s0, d_z0;
  int64_t first, units; /* of this wave */
  /* Workspace, Real: [unit][length] with [value_dim], [dim] or nothing behind. NULL: not needed. */
  void *den, *z, *e, *du, *dq, *dk, *dg, *sums;
  void *checkpoints; /* [unit][interval][dim][value_dim] */
  double *head_sums; /* [batch][value_heads] */
};

struct unit {
  int64_t place, sequence, head, reader; /* place: in the wave; reader: the query head */
  int64_t start, tokens;
};

__device__ unit find_unit(const parameters &p, int64_t place) {
  int64_t index = p.first + place;
  unit u = {place, index / p.value_heads, index % p.value_heads, 0, 0, p.length};
  u.reader = u.head / (p.value_heads / p.heads);
  if (p.offsets) {
    u.start = p.offsets[u.sequence];
    u.tokens = p.offsets[u.sequence + 1] - u.start;
  }
  return u;
}

/* Element index of row t of a head. */
__device__ int64_t at(const rows &x, const unit &u, int64_t head, int64_t t) {
  return u.sequence * x.sequence + head * x.head + (u.start + t) * x.row;
}
/* Of row c of a state, which is never packed. */
__device__ int64_t at_state(const rows &x, const unit &u, int64_t c) {
  return u.sequence * x.sequence + u.head * x.head + c * x.row;
}

template <typename Real>
__device__ Real load_row(const rows &x, const unit &u, int64_t head, int64_t t, int64_t c) {
  return load_element<Real>(x.data, x.dtype, at(x, u, head, t) + c);
}

/* log alpha of token t and key channel c. */
template <typename Real>
__device__ Real load_log_alpha(const parameters &p, const unit &u, int64_t t, int64_t c) {
  if (p.decay_kind == ATTN_DECAY_NONE) return 0;
  const Real *g = (const Real *)p.decay.data;
  if (p.decay_kind == ATTN_DECAY_HEAD) return g[u.head * p.decay.head];
  return g[at(p.decay, u, u.head, t) + (p.decay_kind == ATTN_DECAY_CHANNEL ? c : 0)];
}
template <typename Real>
__device__ Real load_alpha(const parameters &p, const unit &u, int64_t t, int64_t c) {
  return exp(load_log_alpha<Real>(p, u, t, c));
}

/* den_t = scale z_t . q_t + epsilon, 1 without a normaliser. */
template <typename Real> __device__ Real load_den(const parameters &p, const unit &u, int64_t t) {
  return p.den ? ((const Real *)p.den)[u.place * p.length + t] : (Real)1;
}
template <typename Real> __device__ Real load_beta(const parameters &p, const unit &u, int64_t t) {
  return p.delta ? ((const Real *)p.beta.data)[at(p.beta, u, u.head, t)] : (Real)1;
}

template <typename Real, int WIDTH> __device__ __forceinline__ Real sum_lanes(Real x) {
#pragma unroll
  for (int mask = WIDTH / 2; mask; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
  return x;
}

/* Four neighbours in shared memory. */
__device__ __forceinline__ void read4(float (&x)[4], const float *from) {
  *(float4 *)x = *(const float4 *)from;
}
__device__ __forceinline__ void read4(double (&x)[4], const double *from) {
  *(double2 *)x = *(const double2 *)from;
  *(double2 *)(x + 2) = *(const double2 *)(from + 2);
}
__device__ __forceinline__ void write4(float *to, const float (&x)[4]) {
  *(float4 *)to = *(const float4 *)x;
}
__device__ __forceinline__ void write4(double *to, const double (&x)[4]) {
  *(double2 *)to = *(const double2 *)x;
  *(double2 *)(to + 2) = *(const double2 *)(x + 2);
}

extern __shared__ __align__(16) char shared_memory[];

/* What a block that scans by columns has in shared memory for the tokens of a stage. A thread has
 * the rows 32 (i / 4) + 4 group + i % 4 of its column: so 8 lanes read 128 bytes in a row. */
template <typename Real, int R> struct column_stage {
  enum { DEPTH = R * LANES, TOKENS = stage<Real>() };
  Real *q, *k, *alpha; /* [token][DEPTH] */
  Real *x;             /* [token][COLUMNS]: comes in as v or dnum, goes out as a result */
  Real *beta, *decay;  /* [token] */
  Real *rest; /* [token]: what rounding took from decay; one constant taken a thousand times
               * would otherwise drift a thousand roundings */
  __device__ column_stage() {
    q = (Real *)shared_memory;
    k = q + TOKENS * DEPTH;
    alpha = k + TOKENS * DEPTH;
    x = alpha + TOKENS * DEPTH;
    beta = x + TOKENS * COLUMNS;
    decay = beta + TOKENS;
    rest = decay + TOKENS;
  }
  static size_t bytes() {
    return (3 * TOKENS * DEPTH + TOKENS * COLUMNS + 3 * TOKENS) * sizeof(Real);
  }
  /* Tokens first .. first + count - 1; `source` gives x. */
  __device__ void load(const parameters &p, const unit &u, int64_t first, int count, int64_t column,
                       const rows &source, bool divide) {
    for (int i = threadIdx.x; i < count * DEPTH; i += THREADS) {
      int t = i / DEPTH, c = i % DEPTH;
      bool inside = c < p.dim;
      q[i] = inside ? load_row<Real>(p.q, u, u.reader, first + t, c) * (Real)p.scale : 0;
      k[i] = inside ? load_row<Real>(p.k, u, u.reader, first + t, c) : 0;
      if (p.decay_kind == ATTN_DECAY_CHANNEL)
        alpha[i] = inside ? load_alpha<Real>(p, u, first + t, c) : 0;
    }
    for (int i = threadIdx.x; i < count * COLUMNS; i += THREADS) {
      int t = i / COLUMNS, c = i % COLUMNS;
      Real value =
          column + c < p.value_dim ? load_row<Real>(source, u, u.head, first + t, column + c) : 0;
      x[i] = divide ? value / load_den<Real>(p, u, first + t) : value;
    }
    for (int t = threadIdx.x; t < count; t += THREADS) {
      beta[t] = load_beta<Real>(p, u, first + t);
      if (p.decay_kind == ATTN_DECAY_CHANNEL) continue;
      double exact = exp((double)load_log_alpha<Real>(p, u, first + t, 0));
      decay[t] = (Real)exact;
      rest[t] = (Real)(exact - (double)decay[t]);
    }
  }
};

/* Where a thread's part of the state lies. */
struct column_place {
  int64_t column;
  int group;
  __device__ column_place(int64_t slice) {
    column = slice * COLUMNS + threadIdx.x / LANES;
    group = threadIdx.x % LANES;
  }
  __device__ int row(int i) const {
    return i / 4 * (4 * LANES) + group * 4 + i % 4;
  }
};

template <typename Real, int R>
__device__ void load_column(Real (&s)[R], const parameters &p, const rows &x, const unit &u,
                            const column_place &mine) {
#pragma unroll
  for (int i = 0; i < R; ++i) {
    bool inside = x.data && mine.row(i) < p.dim && mine.column < p.value_dim;
    s[i] = inside ? ((const Real *)x.data)[at_state(x, u, mine.row(i)) + mine.column] : 0;
  }
}
template <typename Real, int R>
__device__ void store_column(const Real (&s)[R], const parameters &p, const rows &x, const unit &u,
                             const column_place &mine) {
#pragma unroll
  for (int i = 0; i < R; ++i)
    if (mine.row(i) < p.dim && mine.column < p.value_dim)
      ((Real *)x.data)[at_state(x, u, mine.row(i)) + mine.column] = s[i];
}

/* Block: [unit][slice of COLUMNS columns]. o and the final state, or for the backward pass (where
 * p.checkpoints is given) e and checkpoints. */
template <typename Real, int R, bool DELTA, bool CHANNEL>
__global__ void __launch_bounds__(THREADS) forward_columns(parameters p) {
  enum { TOKENS = stage<Real>(), DEPTH = R * LANES };
  column_stage<Real, R> stage;
  int64_t slices = ceil_divide(p.value_dim, COLUMNS), slice = blockIdx.x % slices;
  unit u = find_unit(p, blockIdx.x / slices);
  column_place mine(slice);
  int column = threadIdx.x / LANES; /* in the slice */
  bool outputs = !p.checkpoints;
  Real s[R];
  load_column(s, p, p.s0, u, mine);
  for (int64_t first = 0; first < u.tokens; first += TOKENS) {
    int count = (int)min((int64_t)TOKENS, u.tokens - first);
    if (p.checkpoints && first % INTERVAL == 0) {
      int64_t intervals = ceil_divide(p.length, INTERVAL);
      Real *kept = (Real *)p.checkpoints +
                   (u.place * intervals + first / INTERVAL) * p.dim * p.value_dim + mine.column;
#pragma unroll
      for (int i = 0; i < R; ++i)
        if (mine.row(i) < p.dim && mine.column < p.value_dim)
          kept[mine.row(i) * p.value_dim] = s[i];
    }
    __syncthreads();
    stage.load(p, u, first, count, slice * COLUMNS, p.v, false);
    __syncthreads();
    for (int t = 0; t < count; ++t) {
      const Real *q = stage.q + t * DEPTH + mine.group * 4;
      const Real *k = stage.k + t * DEPTH + mine.group * 4;
      const Real *alpha = stage.alpha + t * DEPTH + mine.group * 4;
      Real value = stage.x[t * COLUMNS + column], guess = 0, num = 0;
#pragma unroll
      for (int i = 0; i < R; i += 4) {
        Real a4[4], k4[4];
        if (CHANNEL) read4(a4, alpha + i * LANES);
        if (DELTA) read4(k4, k + i * LANES);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          s[i + j] =
              CHANNEL ? s[i + j] * a4[j] : s[i + j] * stage.decay[t] + s[i + j] * stage.rest[t];
          if (DELTA) guess += s[i + j] * k4[j];
        }
      }
      if (DELTA) value -= sum_lanes<Real, LANES>(guess); /* e */
      Real added = DELTA ? value * stage.beta[t] : value;
#pragma unroll
      for (int i = 0; i < R; i += 4) {
        Real q4[4], k4[4];
        read4(k4, k + i * LANES);
        if (outputs) read4(q4, q + i * LANES);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          s[i + j] += k4[j] * added;
          if (outputs) num += s[i + j] * q4[j];
        }
      }
      if (outputs) value = sum_lanes<Real, LANES>(num);
      if (mine.group == 0) stage.x[t * COLUMNS + column] = value;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * COLUMNS; i += THREADS) {
      int t = i / COLUMNS;
      int64_t c = slice * COLUMNS + i % COLUMNS;
      if (c >= p.value_dim) continue;
      if (outputs)
        store_element<Real>(p.o.data, p.o.dtype, at(p.o, u, u.head, first + t) + c,
                            stage.x[i] / load_den<Real>(p, u, first + t));
      else if (DELTA)
        ((Real *)p.e)[(u.place * p.length + first + t) * p.value_dim + c] = stage.x[i];
    }
  }
  if (outputs && p.s1.data) store_column(s, p, p.s1, u, mine);
}

/* Block: [unit][slice]. du, d_v and d_initial_state, from the last token to the first. */
template <typename Real, int R, bool DELTA, bool CHANNEL>
__global__ void __launch_bounds__(THREADS) backward_columns(parameters p) {
  enum { TOKENS = stage<Real>(), DEPTH = R * LANES };
  column_stage<Real, R> stage;
  int64_t slices = ceil_divide(p.value_dim, COLUMNS), slice = blockIdx.x % slices;
  unit u = find_unit(p, blockIdx.x / slices);
  column_place mine(slice);
  int column = threadIdx.x / LANES;
  Real ds[R];
  load_column(ds, p, p.d_s1, u, mine);
  for (int64_t first = (u.tokens - 1) / TOKENS * TOKENS; u.tokens && first >= 0; first -= TOKENS) {
    int count = (int)min((int64_t)TOKENS, u.tokens - first);
    __syncthreads();
    stage.load(p, u, first, count, slice * COLUMNS, p.d_o, true);
    __syncthreads();
    for (int t = count - 1; t >= 0; --t) {
      const Real *q = stage.q + t * DEPTH + mine.group * 4;
      const Real *k = stage.k + t * DEPTH + mine.group * 4;
      const Real *alpha = stage.alpha + t * DEPTH + mine.group * 4;
      Real d_num = stage.x[t * COLUMNS + column], du = 0;
#pragma unroll
      for (int i = 0; i < R; i += 4) {
        Real q4[4], k4[4];
        read4(q4, q + i * LANES);
        read4(k4, k + i * LANES);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          ds[i + j] += q4[j] * d_num;
          du += ds[i + j] * k4[j];
        }
      }
      du = sum_lanes<Real, LANES>(du);
      if (mine.group == 0) stage.x[t * COLUMNS + column] = du;
      Real taken = DELTA ? du * stage.beta[t] : 0;
#pragma unroll
      for (int i = 0; i < R; i += 4) {
        Real a4[4], k4[4];
        if (CHANNEL) read4(a4, alpha + i * LANES);
        if (DELTA) read4(k4, k + i * LANES);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (DELTA) ds[i + j] -= k4[j] * taken;
          ds[i + j] *= CHANNEL ? a4[j] : stage.decay[t];
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * COLUMNS; i += THREADS) {
      int t = i / COLUMNS;
      int64_t c = slice * COLUMNS + i % COLUMNS;
      if (c >= p.value_dim) continue;
      if (DELTA) ((Real *)p.du)[(u.place * p.length + first + t) * p.value_dim + c] = stage.x[i];
      if (p.d_v.data)
        store_element<Real>(p.d_v.data, p.d_v.dtype, at(p.d_v, u, u.head, first + t) + c,
                            DELTA ? stage.x[i] * stage.beta[t] : stage.x[i]);
    }
  }
  if (p.d_s0.data) store_column(ds, p, p.d_s0, u, mine);
}

/* What a block that scans by rows has in shared memory: WIDTH = R SPREAD columns, `rows` rows. A
 * thread has the columns 4 SPREAD (i / 4) + 4 group + i % 4 of its row. */
template <typename Real, int R, int SPREAD> struct row_stage {
  enum { WIDTH = R * SPREAD, TOKENS = stage<Real>(), KEPT = INTERVAL / STEP };
  Real *u, *d_num, *taken; /* [token][WIDTH]: u, do / den, beta du */
  Real *states;            /* [KEPT][R / 4][thread][4]: before every STEP-th token */
  Real *q, *k, *alpha;     /* [token][rows]; their places receive dq, dk, dg */
  int rows;
  __device__ row_stage() {
    rows = blockDim.x / SPREAD;
    u = (Real *)shared_memory;
    d_num = u + TOKENS * WIDTH;
    taken = d_num + TOKENS * WIDTH;
    states = taken + TOKENS * WIDTH;
    q = states + KEPT * R * blockDim.x;
    k = q + TOKENS * rows;
    alpha = k + TOKENS * rows;
  }
  static size_t bytes(int warps) {
    return (3 * TOKENS * WIDTH + KEPT * R * 32 * warps + 3 * TOKENS * (32 * warps / SPREAD)) *
           sizeof(Real);
  }
  __device__ void load(const parameters &p, const unit &unit, int64_t first, int count,
                       int64_t first_row, bool gradients) {
    for (int i = threadIdx.x; i < count * WIDTH; i += blockDim.x) {
      int t = i / WIDTH, c = i % WIDTH;
      int64_t kept = (unit.place * p.length + first + t) * p.value_dim + c;
      bool inside = c < p.value_dim;
      Real beta = load_beta<Real>(p, unit, first + t);
      u[i] = !inside   ? 0
             : p.delta ? beta * ((const Real *)p.e)[kept]
                       : load_row<Real>(p.v, unit, unit.head, first + t, c);
      if (!gradients) continue;
      d_num[i] = inside ? load_row<Real>(p.d_o, unit, unit.head, first + t, c) /
                              load_den<Real>(p, unit, first + t)
                        : 0;
      if (p.delta) taken[i] = inside ? beta * ((const Real *)p.du)[kept] : 0;
    }
    for (int i = threadIdx.x; i < count * rows; i += blockDim.x) {
      int t = i / rows;
      int64_t c = first_row + i % rows;
      bool inside = c < p.dim;
      k[i] = inside ? load_row<Real>(p.k, unit, unit.reader, first + t, c) : 0;
      alpha[i] = inside ? load_alpha<Real>(p, unit, first + t, c) : 0;
      if (gradients) q[i] = inside ? load_row<Real>(p.q, unit, unit.reader, first + t, c) : 0;
    }
  }
  __device__ void store(const parameters &p, const unit &unit, int64_t first, int count,
                        int64_t first_row) const {
    for (int i = threadIdx.x; i < count * rows; i += blockDim.x) {
      int64_t c = first_row + i % rows;
      if (c >= p.dim) continue;
      int64_t to = (unit.place * p.length + first + i / rows) * p.dim + c;
      ((Real *)p.dq)[to] = q[i];
      ((Real *)p.dk)[to] = k[i];
      if (p.dg) ((Real *)p.dg)[to] = alpha[i];
    }
  }
};

/* s = alpha s + k u for a thread's part of a row. */
template <typename Real, int R, int SPREAD>
__device__ __forceinline__ void advance(Real (&s)[R], const Real *u, Real k, Real alpha) {
#pragma unroll
  for (int i = 0; i < R; i += 4) {
    Real u4[4];
    read4(u4, u + i * SPREAD);
#pragma unroll
    for (int j = 0; j < 4; ++j) s[i + j] = alpha * s[i + j] + k * u4[j];
  }
}

/* Block: [unit][slice of rows]. dq, dk, dg of the state's share. */
template <typename Real, int R, int SPREAD>
__global__ void __launch_bounds__(32 * MOST_WARPS) backward_rows(parameters p) {
  typedef row_stage<Real, R, SPREAD> stage_type;
  enum { TOKENS = stage_type::TOKENS, WIDTH = stage_type::WIDTH };
  stage_type stage;
  int64_t slices = ceil_divide(p.dim, stage.rows), first_row = blockIdx.x % slices * stage.rows;
  unit u = find_unit(p, blockIdx.x / slices);
  int row = threadIdx.x / SPREAD, group = threadIdx.x % SPREAD, threads = blockDim.x;
  int64_t c = first_row + row, intervals = ceil_divide(p.length, INTERVAL);
  bool inside = c < p.dim;
  Real *kept = stage.states + threadIdx.x * 4;
  auto column = [&](int i) { return i / 4 * (4 * SPREAD) + group * 4 + i % 4; };

  Real ds[R];
#pragma unroll
  for (int i = 0; i < R; ++i)
    ds[i] = inside && p.d_s1.data && column(i) < p.value_dim
                ? ((const Real *)p.d_s1.data)[at_state(p.d_s1, u, c) + column(i)]
                : 0;
  for (int64_t start = (u.tokens - 1) / INTERVAL * INTERVAL; u.tokens && start >= 0;
       start -= INTERVAL) {
    int tokens = (int)min((int64_t)INTERVAL, u.tokens - start);
    Real s[R];
    const Real *checkpoint = (const Real *)p.checkpoints +
                             ((u.place * intervals + start / INTERVAL) * p.dim + c) * p.value_dim;
#pragma unroll
    for (int i = 0; i < R; ++i)
      s[i] = inside && column(i) < p.value_dim ? checkpoint[column(i)] : 0;
    for (int from = 0; from < tokens; from += TOKENS) {
      int count = min((int)TOKENS, tokens - from);
      __syncthreads();
      stage.load(p, u, start + from, count, first_row, false);
      __syncthreads();
      for (int t = 0; t < count; ++t) {
        if (t % STEP == 0)
#pragma unroll
          for (int i = 0; i < R; i += 4)
            write4(kept + ((from + t) / STEP * (R / 4) + i / 4) * threads * 4,
                   *(const Real(*)[4])(s + i));
        advance<Real, R, SPREAD>(s, stage.u + t * WIDTH + group * 4, stage.k[t * stage.rows + row],
                                 stage.alpha[t * stage.rows + row]);
      }
    }
    for (int from = (tokens - 1) / TOKENS * TOKENS; from >= 0; from -= TOKENS) {
      int count = min((int)TOKENS, tokens - from);
      __syncthreads();
      stage.load(p, u, start + from, count, first_row, true);
      __syncthreads();
      for (int step = (count - 1) / STEP * STEP; step >= 0; step -= STEP) {
        Real before[STEP][R]; /* S_{t-1} */
#pragma unroll
        for (int i = 0; i < R; i += 4)
          read4(*(Real(*)[4])(before[0] + i),
                kept + ((from + step) / STEP * (R / 4) + i / 4) * threads * 4);
#pragma unroll
        for (int j = 1; j < STEP; ++j) {
          int t = step + j - 1;
#pragma unroll
          for (int i = 0; i < R; ++i) before[j][i] = before[j - 1][i];
          if (t < count)
            advance<Real, R, SPREAD>(before[j], stage.u + t * WIDTH + group * 4,
                                     stage.k[t * stage.rows + row],
                                     stage.alpha[t * stage.rows + row]);
        }
#pragma unroll
        for (int j = STEP - 1; j >= 0; --j) {
          int t = step + j;
          if (t >= count) continue;
          Real q = stage.q[t * stage.rows + row] * (Real)p.scale;
          Real k = stage.k[t * stage.rows + row], alpha = stage.alpha[t * stage.rows + row];
          Real dq = 0, dk = 0, dg = 0;
#pragma unroll
          for (int i = 0; i < R; i += 4) {
            Real u4[4], n4[4], w4[4] = {0, 0, 0, 0};
            int place = t * WIDTH + group * 4 + i * SPREAD;
            read4(u4, stage.u + place);
            read4(n4, stage.d_num + place);
            if (p.delta) read4(w4, stage.taken + place);
#pragma unroll
            for (int l = 0; l < 4; ++l) {
              Real decayed = alpha * before[j][i + l], &d = ds[i + l];
              dq += (decayed + k * u4[l]) * n4[l];
              d += q * n4[l];
              dk += d * u4[l] - decayed * w4[l];
              d -= k * w4[l];
              dg += d * decayed;
              d *= alpha;
            }
          }
          dq = sum_lanes<Real, SPREAD>(dq) * (Real)p.scale;
          dk = sum_lanes<Real, SPREAD>(dk);
          dg = sum_lanes<Real, SPREAD>(dg);
          if (group == 0) {
            stage.q[t * stage.rows + row] = dq;
            stage.k[t * stage.rows + row] = dk;
            stage.alpha[t * stage.rows + row] = dg;
          }
        }
      }
      __syncthreads();
      stage.store(p, u, start + from, count, first_row);
    }
  }
}

/* Sum over a block of up to 8 warps, for all of its threads. */
template <typename Real> __device__ Real sum_block(Real x, Real *parts) {
  x = sum_lanes<Real, 32>(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  Real sum = 0;
  for (int i = 0; i < SMALL_BLOCK / 32; ++i) sum += parts[i];
  return sum;
}

/* z_t = alpha_t (.) z_{t-1} + k_t and the denominators; a block a unit, a thread a channel. Keeps
 * z where p.z is given. */
template <typename Real> __global__ void forward_normaliser(parameters p) {
  __shared__ Real parts[SMALL_BLOCK / 32];
  unit u = find_unit(p, blockIdx.x);
  int64_t c = threadIdx.x;
  bool inside = c < p.dim;
  Real z = inside && p.z0.data ? ((const Real *)p.z0.data)[at_state(p.z0, u, 0) + c] : 0;
  for (int64_t t = 0; t < u.tokens; ++t) {
    Real product = 0;
    if (inside) {
      z = load_alpha<Real>(p, u, t, c) * z + load_row<Real>(p.k, u, u.reader, t, c);
      product = z * load_row<Real>(p.q, u, u.reader, t, c);
      if (p.z) ((Real *)p.z)[(u.place * p.length + t) * p.dim + c] = z;
    }
    product = sum_block(product, parts);
    if (c == 0) ((Real *)p.den)[u.place * p.length + t] = (Real)p.scale * product + (Real)p.epsilon;
  }
  if (inside && p.z1.data) ((Real *)p.z1.data)[at_state(p.z1, u, 0) + c] = z;
}

/* dden and dz, whose shares are added to dq, dk and dg. Block and thread as above. */
template <typename Real> __global__ void backward_normaliser(parameters p) {
  __shared__ Real parts[SMALL_BLOCK / 32];
  unit u = find_unit(p, blockIdx.x);
  int64_t c = threadIdx.x;
  bool inside = c < p.dim;
  Real dz = inside && p.d_z1.data ? ((const Real *)p.d_z1.data)[at_state(p.d_z1, u, 0) + c] : 0;
  for (int64_t t = u.tokens - 1; t >= 0; --t) {
    int64_t place = (u.place * p.length + t) * p.dim + c;
    Real q = inside ? load_row<Real>(p.q, u, u.reader, t, c) : 0;
    Real dq = inside ? ((Real *)p.dq)[place] : 0;
    Real d_den = -sum_block(q * dq, parts) / load_den<Real>(p, u, t) * (Real)p.scale;
    if (!inside) continue;
    const Real *z = (const Real *)p.z + place;
    Real before = t ? z[-p.dim] : p.z0.data ? ((Real *)p.z0.data)[at_state(p.z0, u, 0) + c] : 0;
    Real alpha = load_alpha<Real>(p, u, t, c);
    dz += d_den * q;
    ((Real *)p.dq)[place] = dq + d_den * z[0];
    ((Real *)p.dk)[place] += dz;
    if (p.dg) ((Real *)p.dg)[place] += dz * alpha * before;
    dz *= alpha;
  }
  if (inside && p.d_z0.data) ((Real *)p.d_z0.data)[at_state(p.d_z0, u, 0) + c] = dz;
}

/* A warp for each token of each query head: rounds and stores what is summed over dimensions and
 * over the value heads of the query head. */
template <typename Real> __global__ void store_gradients(parameters p) {
  int64_t index = (blockIdx.x * (int64_t)blockDim.x + threadIdx.x) / 32, t = index % p.length;
  int64_t group = p.value_heads / p.heads, first = index / p.length * group;
  int lane = threadIdx.x % 32;
  if (first >= p.units) return;
  unit u = find_unit(p, first);
  if (t >= u.tokens) return;
  for (int64_t c = lane; c < p.dim; c += 32) {
    Real dq = 0, dk = 0;
    for (int64_t m = 0; m < group; ++m) {
      int64_t place = ((first + m) * p.length + t) * p.dim + c;
      dq += ((const Real *)p.dq)[place];
      dk += ((const Real *)p.dk)[place];
    }
    if (p.d_q.data) store_element<Real>(p.d_q.data, p.d_q.dtype, at(p.d_q, u, u.reader, t) + c, dq);
    if (p.d_k.data) store_element<Real>(p.d_k.data, p.d_k.dtype, at(p.d_k, u, u.reader, t) + c, dk);
  }
  for (int64_t m = 0; m < group; ++m) {
    int64_t place = (first + m) * p.length + t, head = u.head + m;
    if (p.d_beta.data) {
      Real sum = 0;
      for (int64_t c = lane; c < p.value_dim; c += 32)
        sum += ((const Real *)p.du)[place * p.value_dim + c] *
               ((const Real *)p.e)[place * p.value_dim + c];
      sum = sum_lanes<Real, 32>(sum);
      if (lane == 0) ((Real *)p.d_beta.data)[at(p.d_beta, u, head, t)] = sum;
    }
    if (!p.dg) continue;
    Real sum = 0;
    for (int64_t c = lane; c < p.dim; c += 32) {
      Real dg = ((const Real *)p.dg)[place * p.dim + c];
      sum += dg;
      if (p.decay_kind == ATTN_DECAY_CHANNEL)
        ((Real *)p.d_decay.data)[at(p.d_decay, u, head, t) + c] = dg;
    }
    sum = sum_lanes<Real, 32>(sum);
    if (lane == 0 && p.decay_kind == ATTN_DECAY_TOKEN)
      ((Real *)p.d_decay.data)[at(p.d_decay, u, head, t)] = sum;
    if (lane == 0 && p.decay_kind == ATTN_DECAY_HEAD) ((Real *)p.sums)[place] = sum;
  }
}

/* The sum over a unit's tokens of what a head's decay receives; a block a unit. */
template <typename Real> __global__ void sum_tokens(parameters p) {
  __shared__ double parts[SMALL_BLOCK / 32];
  unit u = find_unit(p, blockIdx.x);
  double sum = 0;
  for (int64_t t = threadIdx.x; t < u.tokens; t += SMALL_BLOCK)
    sum += ((const Real *)p.sums)[u.place * p.length + t];
  sum = sum_block(sum, parts);
  if (threadIdx.x == 0) p.head_sums[p.first + u.place] = sum;
}
template <typename Real> __global__ void sum_sequences(parameters p) {
  int64_t head = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (head >= p.value_heads) return;
  double sum = 0;
  for (int64_t b = 0; b < p.batch; ++b) sum += p.head_sums[b * p.value_heads + head];
  ((Real *)p.d_decay.data)[head * p.d_decay.head] = (Real)sum;
}

/* [batch, length, heads, ...], or [total, heads, ...] when packed. */
rows over_tokens(const attn_tensor &t, bool packed) {
  if (packed) return {(char *)t.data, t.dtype, 0, t.stride[0], t.stride[1]};
  return {(char *)t.data, t.dtype, t.stride[0], t.stride[1], t.stride[2]};
}
/* [batch, value_heads, dim, ...]. */
rows over_channels(const attn_tensor &t) {
  return {(char *)t.data, t.dtype, t.stride[0], t.stride[2], t.stride[1]};
}
rows decay_rows(const attn_recurrent_problem *problem, const attn_tensor &t) {
  if (problem->decay == ATTN_DECAY_NONE) return {};
  if (problem->decay == ATTN_DECAY_HEAD) return {(char *)t.data, t.dtype, 0, 0, t.stride[0]};
  return over_tokens(t, problem->ragged);
}

parameters parameters_of(const attn_recurrent_problem *problem, const attn_recurrent_args *args) {
  parameters p = {};
  bool packed = problem->ragged;
  p.batch = problem->batch, p.length = problem->length;
  p.heads = problem->heads, p.value_heads = problem->value_heads;
  p.dim = problem->dim, p.value_dim = problem->value_dim;
  p.scale = problem->scale, p.epsilon = problem->epsilon;
  p.decay_kind = problem->decay;
  p.delta = problem->update == ATTN_UPDATE_DELTA, p.normalise = problem->normalise;
  if (packed) p.offsets = args->offsets;
  p.q = over_tokens(args->q, packed), p.k = over_tokens(args->k, packed);
  p.v = over_tokens(args->v, packed), p.o = over_tokens(args->o, packed);
  p.d_o = over_tokens(args->d_o, packed), p.d_q = over_tokens(args->d_q, packed);
  p.d_k = over_tokens(args->d_k, packed), p.d_v = over_tokens(args->d_v, packed);
  p.decay = decay_rows(problem, args->decay), p.d_decay = decay_rows(problem, args->d_decay);
  if (p.delta) p.beta = over_tokens(args->beta, packed);
  if (p.delta) p.d_beta = over_tokens(args->d_beta, packed);
  p.s0 = over_channels(args->initial_state), p.s1 = over_channels(args->final_state);
  p.d_s0 = over_channels(args->d_initial_state), p.d_s1 = over_channels(args->d_final_state);
  if (!p.normalise) return p;
  p.z0 = over_channels(args->initial_normaliser), p.z1 = over_channels(args->final_normaliser);
  p.d_z0 = over_channels(args->d_initial_normaliser);
  p.d_z1 = over_channels(args->d_final_normaliser);
  return p;
}

/* choice->values */
enum { WAVE = 0 /* units at a time; whole groups of value heads */ };

/* Places what `units` units need at `memory`; with NULL only counts. Which gradients are wanted is
 * not known when planning: all are counted then. */
template <typename Real>
size_t place_workspace(const attn_recurrent_problem *problem, attn_pass pass, int64_t units,
                       bool with_decay, void *memory, parameters *p) {
  workspace_cutter cutter = {(char *)memory, 0};
  bool backward = pass == ATTN_PASS_BACKWARD, delta = problem->update == ATTN_UPDATE_DELTA;
  size_t tokens = (size_t)(units * problem->length) * sizeof(Real);
  size_t dim = (size_t)problem->dim, value_dim = (size_t)problem->value_dim;
  p->den = problem->normalise ? cutter.take(tokens) : NULL;
  if (!backward) return cutter.used;
  p->z = problem->normalise ? cutter.take(tokens * dim) : NULL;
  p->e = delta ? cutter.take(tokens * value_dim) : NULL;
  p->du = delta ? cutter.take(tokens * value_dim) : NULL;
  p->dq = cutter.take(tokens * dim);
  p->dk = cutter.take(tokens * dim);
  p->dg = with_decay ? cutter.take(tokens * dim) : NULL;
  bool by_head = with_decay && problem->decay == ATTN_DECAY_HEAD;
  p->sums = by_head ? cutter.take(tokens) : NULL;
  p->checkpoints = cutter.take((size_t)(units * ceil_divide(problem->length, INTERVAL)) * dim *
                               value_dim * sizeof(Real));
  p->head_sums =
      by_head
          ? (double *)cutter.take((size_t)(problem->batch * problem->value_heads) * sizeof(double))
          : NULL;
  return cutter.used;
}

size_t workspace_bytes(const attn_recurrent_problem *problem, attn_pass pass, int64_t units) {
  parameters p = {};
  bool decay = problem->decay != ATTN_DECAY_NONE;
  return problem->dtype == ATTN_F64 ? place_workspace<double>(problem, pass, units, decay, NULL, &p)
                                    : place_workspace<float>(problem, pass, units, decay, NULL, &p);
}

/* As many units at once as this much memory takes, but enough of them for all multiprocessors. */
const size_t WANTED_BYTES = (size_t)1 << 30;

bool plan(const attn_cuda_device *device, const attn_recurrent_problem *problem, attn_pass pass,
          attn_cuda_choice *choice) {
  if (problem->dtype != ATTN_F64 && problem->dtype != ATTN_F32 && problem->dtype != ATTN_BF16 &&
      problem->dtype != ATTN_F16)
    return false;
  int64_t group = problem->value_heads / problem->heads;
  int64_t all = problem->batch * problem->value_heads, groups = problem->batch * problem->heads;
  int64_t slices = ceil_divide(problem->value_dim, COLUMNS);
  int64_t filling = ceil_divide(4 * device->multiprocessors, slices * group);
  size_t each = workspace_bytes(problem, pass, group);
  int64_t fitting = each ? (int64_t)(WANTED_BYTES / each) : groups;
  int64_t at_once = fitting > filling ? fitting : filling;
  if (at_once > groups) at_once = groups;
  choice->values[WAVE] = at_once * group;
  choice->workspace_bytes = workspace_bytes(problem, pass, at_once * group);
  snprintf(choice->description, sizeof choice->description,
           "generic: token by token, %lld of %lld heads at a time", (long long)choice->values[WAVE],
           (long long)all);
  return true;
}

bool plan_forward(const attn_cuda_device *device, const attn_recurrent_problem *problem,
                  attn_cuda_choice *choice) {
  return plan(device, problem, ATTN_PASS_FORWARD, choice);
}
bool plan_backward(const attn_cuda_device *device, const attn_recurrent_problem *problem,
                   attn_cuda_choice *choice) {
  return plan(device, problem, ATTN_PASS_BACKWARD, choice);
}

typedef void kernel(parameters p);

attn_status launch(kernel *function, const parameters &p, int64_t blocks, int threads, size_t bytes,
                   cudaStream_t stream) {
  if (blocks == 0) return ATTN_OK;
  if (bytes > 48 * 1024)
    ATTN_CUDA_TRY(
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
  function<<<(unsigned)blocks, threads, bytes, stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("recurrent_generic");
  return ATTN_OK;
}

/* Both scans by columns with R rows a thread. */
template <typename Real, int R>
attn_status launch_columns(const parameters &p, bool backward, cudaStream_t stream) {
  static kernel *const kernels[2][2][2] = {
      {{forward_columns<Real, R, false, false>, forward_columns<Real, R, false, true>},
       {forward_columns<Real, R, true, false>, forward_columns<Real, R, true, true>}},
      {{backward_columns<Real, R, false, false>, backward_columns<Real, R, false, true>},
       {backward_columns<Real, R, true, false>, backward_columns<Real, R, true, true>}}};
  return launch(kernels[backward][p.delta][p.decay_kind == ATTN_DECAY_CHANNEL], p,
                p.units * ceil_divide(p.value_dim, COLUMNS), THREADS,
                column_stage<Real, R>::bytes(), stream);
}

template <typename Real>
attn_status scan_columns(const parameters &p, bool backward, cudaStream_t stream) {
  if (p.dim <= 8 * LANES) return launch_columns<Real, 8>(p, backward, stream);
  if (p.dim <= 16 * LANES) return launch_columns<Real, 16>(p, backward, stream);
  return launch_columns<Real, 32>(p, backward, stream);
}

template <typename Real, int R, int SPREAD>
attn_status launch_rows(const attn_cuda_device *device, const parameters &p, cudaStream_t stream) {
  int warps = MOST_WARPS;
  size_t most = device->shared_bytes < 96 * 1024 ? device->shared_bytes : 96 * 1024;
  while (warps > 1 && row_stage<Real, R, SPREAD>::bytes(warps) > most) warps /= 2;
  return launch(backward_rows<Real, R, SPREAD>, p,
                p.units * ceil_divide(p.dim, 32 * warps / SPREAD), 32 * warps,
                row_stage<Real, R, SPREAD>::bytes(warps), stream);
}

template <typename Real>
attn_status scan_rows(const attn_cuda_device *device, const parameters &p, cudaStream_t stream) {
  if (p.value_dim <= 64) return launch_rows<Real, 8, 8>(device, p, stream);
  if (p.value_dim <= 128) return launch_rows<Real, 16, 8>(device, p, stream);
  return launch_rows<Real, 16, 16>(device, p, stream);
}

#define TRY(call)                                                                                  \
  do {                                                                                             \
    attn_status attn_try_status = (call);                                                          \
    if (attn_try_status != ATTN_OK) return attn_try_status;                                        \
  } while (0)

template <typename Real>
attn_status backward_wave(const attn_cuda_device *device, const parameters &p,
                          cudaStream_t stream) {
  bool rows = p.d_q.data || p.d_k.data || p.d_decay.data || p.d_z0.data;
  if (rows || p.delta) TRY(scan_columns<Real>(p, false, stream));
  TRY(scan_columns<Real>(p, true, stream));
  if (rows) TRY(scan_rows<Real>(device, p, stream));
  if (rows && p.normalise)
    TRY(launch(backward_normaliser<Real>, p, p.units, SMALL_BLOCK, 0, stream));
  if (rows || p.d_beta.data) {
    int64_t warps = p.units / (p.value_heads / p.heads) * p.length;
    TRY(launch(store_gradients<Real>, p, ceil_divide(warps * 32, SMALL_BLOCK), SMALL_BLOCK, 0,
               stream));
  }
  if (p.sums) TRY(launch(sum_tokens<Real>, p, p.units, SMALL_BLOCK, 0, stream));
  return ATTN_OK;
}

template <typename Real>
attn_status run_waves(const attn_cuda_device *device, const attn_cuda_choice *choice,
                      const attn_recurrent_problem *problem, attn_pass pass,
                      const attn_recurrent_args *args, void *workspace, cudaStream_t stream) {
  parameters p = parameters_of(problem, args);
  bool backward = pass == ATTN_PASS_BACKWARD;
  int64_t wave = choice->values[WAVE], all = p.batch * p.value_heads;
  place_workspace<Real>(problem, pass, wave, p.d_decay.data != NULL, workspace, &p);
  for (p.first = 0; p.first < all; p.first += wave) {
    p.units = wave < all - p.first ? wave : all - p.first;
    if (p.normalise) TRY(launch(forward_normaliser<Real>, p, p.units, SMALL_BLOCK, 0, stream));
    TRY(backward ? backward_wave<Real>(device, p, stream) : scan_columns<Real>(p, false, stream));
  }
  if (p.sums)
    TRY(launch(sum_sequences<Real>, p, ceil_divide(p.value_heads, SMALL_BLOCK), SMALL_BLOCK, 0,
               stream));
  return ATTN_OK;
}

attn_status run_forward(const attn_cuda_device *device, const attn_cuda_choice *choice,
                        const attn_recurrent_problem *problem, const attn_recurrent_args *args,
                        void *workspace, cudaStream_t stream) {
  return problem->dtype == ATTN_F64 ? run_waves<double>(device, choice, problem, ATTN_PASS_FORWARD,
                                                        args, workspace, stream)
                                    : run_waves<float>(device, choice, problem, ATTN_PASS_FORWARD,
                                                       args, workspace, stream);
}
attn_status run_backward(const attn_cuda_device *device, const attn_cuda_choice *choice,
                         const attn_recurrent_problem *problem, const attn_recurrent_args *args,
                         void *workspace, cudaStream_t stream) {
  return problem->dtype == ATTN_F64 ? run_waves<double>(device, choice, problem, ATTN_PASS_BACKWARD,
                                                        args, workspace, stream)
                                    : run_waves<float>(device, choice, problem, ATTN_PASS_BACKWARD,
                                                       args, workspace, stream);
}

} // namespace

extern const recurrent_algorithm recurrent_generic_forward = {"generic", ATTN_PASS_FORWARD,
                                                              plan_forward, NULL, run_forward};
extern const recurrent_algorithm recurrent_generic_backward = {"generic", ATTN_PASS_BACKWARD,
                                                               plan_backward, NULL, run_backward};

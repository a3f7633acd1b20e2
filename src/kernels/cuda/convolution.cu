/* Causal depthwise convolution over a few tokens (rows.h), forward and, with time reversed, the
 * gradient of its input. A thread walks down a run of rows of its channels with the last inputs in
 * registers, so that every input is read once. */
#include "kernels/cuda/rows.cuh"

namespace {

enum { THREADS = 128, RUN = 16, MOST_TAPS = 16 };

struct convolution {
  operand y, x, w,
      tail; /* rows of channels; w [channels, taps]; tail [taps - 1, channels] or absent */
  int64_t y_batch, y_row, x_batch, x_row, w_channel, w_tap, tail_row; /* bytes */
  int64_t length, channels;
  int taps;
  bool accumulate, reverse, moves_tail;
};

/* The last `taps` rows of (tail, x) become the tail's; rows of x from 0 on. */
template <class real, int V>
__device__ __forceinline__ void move_tail(const convolution &p, const char *x, int64_t channel) {
  char *tail = p.tail.data + channel * dtype_bytes(p.tail.dtype);
  const int kept = p.taps - 1;
  for (int i = 0; i < kept; ++i) { /* in order: row i is read before it is written */
    const int64_t from = i + p.length - kept;
    real value[V];
    if (from < 0)
      load_all<real, V>(value, tail + (i + p.length) * p.tail_row, p.tail.dtype);
    else
      load_all<real, V>(value, x + from * p.x_row, p.x.dtype);
    store_all<real, V>(tail + i * p.tail_row, p.tail.dtype, value);
  }
}

template <class real, int V, int TAPS>
__global__ void __launch_bounds__(THREADS) convolve_rows(convolution p) {
  const int64_t channel = ((int64_t)blockIdx.y * THREADS + threadIdx.x) * V;
  if (channel >= p.channels) return;
  const char *x = p.x.data + blockIdx.z * p.x_batch + channel * dtype_bytes(p.x.dtype);
  char *y = p.y.data + blockIdx.z * p.y_batch + channel * dtype_bytes(p.y.dtype);
  const char *tail = p.tail.data + channel * dtype_bytes(p.tail.dtype);
  const int64_t first = (int64_t)blockIdx.x * RUN;
  const int taps = TAPS ? TAPS : p.taps;
  enum { KEPT = TAPS ? TAPS : MOST_TAPS };
  /* weight[j] multiplies the input j rows before; seen[j] is that input. */
  real weight[KEPT][V], seen[KEPT][V];
  auto load = [&](real(&value)[V],
                  int64_t row) { /* `row` counts in the direction of the sum */
                                 const int64_t at = p.reverse ? p.length - 1 - row : row;
                                 if (row >= 0) {
                                   load_all<real, V>(value, x + at * p.x_row, p.x.dtype);
                                 } else if (p.tail.data) {
                                   load_all<real, V>(value, tail + (taps - 1 + row) * p.tail_row,
                                                     p.tail.dtype);
                                 } else {
#pragma unroll
                                   for (int v = 0; v < V; ++v) value[v] = 0;
                                 }
  };
#pragma unroll
  for (int j = 0; j < KEPT; ++j) {
    if (j >= taps) break;
#pragma unroll
    for (int v = 0; v < V; ++v)
      weight[j][v] = load_element<real>(
          p.w.data + (channel + v) * p.w_channel + (taps - 1 - j) * p.w_tap, p.w.dtype, 0);
    if (j > 0) load(seen[j], first - j);
  }
#pragma unroll 1
  for (int64_t row = first; row < first + RUN && row < p.length; ++row) {
    real sum[V] = {};
    load(seen[0], row);
#pragma unroll
    for (int j = 0; j < KEPT; ++j) {
      if (j >= taps) break;
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += weight[j][v] * seen[j][v];
    }
#pragma unroll
    for (int j = KEPT - 1; j > 0; --j)
#pragma unroll
      for (int v = 0; v < V; ++v) seen[j][v] = seen[j - 1][v];
    char *to = y + (p.reverse ? p.length - 1 - row : row) * p.y_row;
    if (p.accumulate) {
      real before[V];
      load_all<real, V>(before, to, p.y.dtype);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += before[v];
    }
    store_all<real, V>(to, p.y.dtype, sum);
  }
  if (p.moves_tail) move_tail<real, V>(p, x, channel);
}

template <class real, int V> __global__ void __launch_bounds__(THREADS) move_tails(convolution p) {
  const int64_t channel = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;
  if (channel < p.channels)
    move_tail<real, V>(p, p.x.data + channel * dtype_bytes(p.x.dtype), channel);
}

template <class real, int V, int TAPS>
void launch(convolution p, int64_t batch, cudaStream_t stream) {
  const dim3 grid((unsigned)((p.length + RUN - 1) / RUN),
                  (unsigned)((p.channels / V + THREADS - 1) / THREADS), (unsigned)batch);
  const bool moves = p.tail.data && !p.reverse, apart = moves && grid.x > 1;
  p.moves_tail = moves && !apart; /* else other threads still read it */
  convolve_rows<real, V, TAPS><<<grid, THREADS, 0, stream>>>(p);
  if (apart) move_tails<real, V><<<grid.y, THREADS, 0, stream>>>(p);
}

} // namespace

attn_status attn_cuda_convolve(const attn_tensor *y, bool accumulate, const attn_tensor *x,
                               const attn_tensor *w, const attn_tensor *tail, bool reverse,
                               attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(attn_cuda_check_operand("convolve", "y", y, y));
  ATTN_CUDA_CHECK(attn_cuda_check_operand("convolve", "x", x, y));
  ATTN_CUDA_CHECK(attn_cuda_check_operand("convolve", "w", w, w));
  if (tail) ATTN_CUDA_CHECK(attn_cuda_check_operand("convolve", "tail", tail, tail));
  bool fits = y->rank == 3 && w->rank == 2 && w->shape[0] == y->shape[2] && w->shape[1] >= 1 &&
              w->shape[1] <= MOST_TAPS && y->stride[2] == 1 && x->stride[2] == 1;
  if (tail)
    fits = fits && y->shape[0] == 1 && tail->rank == 2 && tail->shape[0] == w->shape[1] - 1 &&
           tail->shape[1] == y->shape[2] && tail->stride[1] == 1;
  if (!fits || y->shape[0] > 65535 || y->shape[1] > INT32_MAX ||
      y->shape[2] > (int64_t)65535 * THREADS)
    return attn_cuda_fail(ATTN_INVALID_SHAPE,
                          "convolve: y has rank %d and w %d, expected [batch, length, channels], "
                          "[channels, 1 to %d], and a tail for one sequence only",
                          y->rank, w->rank, (int)MOST_TAPS);
  if (y->shape[0] == 0 || y->shape[1] == 0 || y->shape[2] == 0) return ATTN_OK;
  convolution p = {operand_of(y), operand_of(x), operand_of(w), operand_of(tail)};
  const int y_bytes = dtype_bytes(y->dtype), x_bytes = dtype_bytes(x->dtype);
  p.y_batch = y->stride[0] * y_bytes, p.y_row = y->stride[1] * y_bytes;
  p.x_batch = x->stride[0] * x_bytes, p.x_row = x->stride[1] * x_bytes;
  p.w_channel = w->stride[0] * dtype_bytes(w->dtype);
  p.w_tap = w->stride[1] * dtype_bytes(w->dtype);
  if (tail) p.tail_row = tail->stride[0] * dtype_bytes(tail->dtype);
  p.length = y->shape[1], p.channels = y->shape[2];
  p.taps = (int)w->shape[1];
  p.accumulate = accumulate, p.reverse = reverse;
  const bool wide = is_wide(y) || is_wide(x) || is_wide(w) || is_wide(tail);
  const bool no_tail = !tail || tail->shape[0] == 0; /* one tap: nothing to keep */
  if (no_tail) p.tail.data = NULL;
  const bool vectors =
      !wide && rows_are_vectors(y) && rows_are_vectors(x) && (no_tail || rows_are_vectors(tail));
  auto queue = wide          ? launch<double, 1, 0>
               : p.taps != 4 ? launch<float, 1, 0>
               : vectors     ? launch<float, VECTOR, 4>
                             : launch<float, 1, 4>;
  queue(p, y->shape[0], (cudaStream_t)stream);
  ATTN_CUDA_TRY_LAUNCH("convolve");
  return ATTN_OK;
}

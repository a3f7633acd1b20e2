/* The products of kernels/cuda/dense.h against float64 loops; with `bench`, their speed. */
#include "support.cuh"

typedef std::vector<double> numbers;

static attn_cuda_dense *dense;

static double gaussian() {
  return normal();
}

/* Float16 and bfloat16 inputs are exact, so that errors are those of the sum and of c's rounding.
 */
static double bound_for(attn_dtype dtype, attn_dtype dtype_c, int64_t k) {
  if (dtype == ATTN_F64) return 1e-13;
  /* A float32 sum of k terms, relative to its size; tensor cores drop bits below the last one. */
  double sum = 4e-7 * std::sqrt((double)k) + 1e-6;
  return dtype_c == ATTN_F32 ? sum : bound_of(dtype_c) + sum;
}

struct shape {
  int64_t m, n, k;
  int batch; /* 0: rank 2 */
};

static void test(const shape &size, attn_dtype dtype, attn_dtype dtype_c, bool transpose_a,
                 bool transpose_b, bool accumulate, int gap, int shift, bool columns) {
  array a, b, c;
  auto build = [&](array &to, attn_dtype type, int64_t rows, int64_t width, bool target) {
    std::vector<int64_t> extent = {rows, width}, stride = {width + gap, 1};
    if (columns && !target) stride = {1, rows + gap}; /* contiguous along its columns */
    if (size.batch) {
      int64_t whole = columns && !target ? width * stride[1] : rows * stride[0];
      extent.insert(extent.begin(), size.batch);
      stride.insert(stride.begin(), &to == &b && gap ? 0 : whole); /* b may be shared */
    }
    make(to, type, extent, stride, target && !accumulate ? std::function<double()>() : gaussian,
         shift);
  };
  build(a, dtype, transpose_a ? size.k : size.m, transpose_a ? size.m : size.k, false);
  build(b, dtype, transpose_b ? size.n : size.k, transpose_b ? size.k : size.n, false);
  build(c, dtype_c, size.m, size.n, true);
  OK(attn_cuda_matmul(dense, &a.tensor, transpose_a, &b.tensor, transpose_b, &c.tensor, accumulate,
                      NULL));
  int64_t batch = std::max(size.batch, 1), m = size.m, n = size.n, k = size.k;
  numbers expected((size_t)(batch * m * n));
  for (int64_t s = 0; s < batch; ++s)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        double sum = accumulate ? c.values[(size_t)((s * m + i) * n + j)] : 0;
        for (int64_t l = 0; l < k; ++l)
          sum += a.values[(size_t)(s * m * k + (transpose_a ? l * m + i : i * k + l))] *
                 b.values[(size_t)(s * n * k + (transpose_b ? j * k + l : l * n + j))];
        expected[(size_t)((s * m + i) * n + j)] = sum;
      }
  char name[160];
  snprintf(name, sizeof name, "%s to %s, %lld x %lld x %lld, batch %d%s%s%s, gap %d, shift %d%s",
           dtype_name(dtype), dtype_name(dtype_c), (long long)m, (long long)n, (long long)k,
           size.batch, transpose_a ? ", a^T" : "", transpose_b ? ", b^T" : "",
           accumulate ? ", accumulate" : "", gap, shift, columns ? ", columns" : "");
  compare(name, c, expected, bound_for(dtype, dtype_c, k));
}

/* Eight rows at once and one by one: the same bits. */
static void test_rows_alone(attn_dtype dtype, int64_t n, int64_t k) {
  array a, w, all, one;
  make(a, dtype, {8, k}, {}, gaussian);
  make(w, dtype, {n, k}, {}, gaussian);
  make(all, ATTN_F32, {8, n}, {}, NULL);
  make(one, ATTN_F32, {8, n}, {}, NULL);
  OK(attn_cuda_matmul(dense, &a.tensor, false, &w.tensor, true, &all.tensor, false, NULL));
  for (int r = 0; r < 8; ++r) {
    attn_tensor row = a.tensor, to = one.tensor;
    row.shape[0] = to.shape[0] = 1;
    row.data = (char *)row.data + r * k * bytes_of(dtype);
    to.data = (char *)to.data + r * n * 4;
    OK(attn_cuda_matmul(dense, &row, false, &w.tensor, true, &to, false, NULL));
  }
  compare("rows alone", all, read(one, "one"), 1e-30);
}

static void test_all() {
  static const shape shapes[] = {{1, 1, 1, 0},     {1, 64, 128, 0},  {3, 100, 72, 0},
                                 {8, 50, 4096, 0}, {16, 64, 32, 0},  {65, 33, 17, 0},
                                 {128, 96, 64, 0}, {40, 40, 300, 3}, {7, 9, 24, 2},
                                 {1, 32, 64, 2},   {5, 24, 1000, 0}, {33, 8, 0, 0}};
  static const attn_dtype pairs[][2] = {{ATTN_BF16, ATTN_BF16}, {ATTN_BF16, ATTN_F32},
                                        {ATTN_F32, ATTN_F32},   {ATTN_F16, ATTN_F16},
                                        {ATTN_F16, ATTN_F32},   {ATTN_F64, ATTN_F64}};
  for (const shape &size : shapes)
    for (const attn_dtype *pair : pairs)
      for (int t = 0; t < 4; ++t)
        test(size, pair[0], pair[1], t & 1, t & 2, below(2), below(2) ? 0 : (below(2) ? 8 : 1),
             below(3) ? 0 : 1, below(4) == 0);
  for (int m = 1; m <= 8; ++m) /* decode */
    for (const attn_dtype *pair : pairs)
      test({m, 130, 1032, 0}, pair[0], pair[1], false, true, below(2), below(2) ? 8 : 0, 0, false);
  for (attn_dtype dtype : {ATTN_BF16, ATTN_F16, ATTN_F32}) test_rows_alone(dtype, 300, 2048);
  report("products");
}

/* Refusals name what was found. */
static void test_refusals() {
  array a, b, c;
  make(a, ATTN_F32, {4, 8}, {}, gaussian);
  make(b, ATTN_F32, {8, 5}, {}, gaussian);
  make(c, ATTN_F32, {4, 6}, {}, NULL);
  attn_status status =
      attn_cuda_matmul(dense, &a.tensor, false, &b.tensor, false, &c.tensor, false, NULL);
  ++checks;
  if (status != ATTN_INVALID_SHAPE) {
    printf("FAILED: a wrong shape gave status %d\n", (int)status);
    ++failures;
  }
}

/* --- Speed --------------------------------------------------------------------------------------
 */

static attn_tensor matrix(attn_dtype dtype, int64_t rows, int64_t columns) {
  attn_tensor tensor = {};
  tensor.dtype = dtype;
  tensor.device.kind = ATTN_CUDA;
  tensor.rank = 2;
  tensor.shape[0] = rows;
  tensor.shape[1] = tensor.stride[0] = columns;
  tensor.stride[1] = 1;
  size_t bytes = (size_t)(rows * columns) * (size_t)bytes_of(dtype);
  CUDA(cudaMalloc(&tensor.data, bytes));
  std::vector<unsigned char> values((size_t)1 << 20);
  for (size_t i = 0; i < values.size(); i += (size_t)bytes_of(dtype))
    write_element(&values[i], dtype, normal());
  for (size_t at = 0; at < bytes; at += values.size())
    CUDA(cudaMemcpy((char *)tensor.data + at, values.data(), std::min(values.size(), bytes - at),
                    cudaMemcpyHostToDevice));
  return tensor;
}

static void bench_few(attn_dtype dtype, int64_t m, int64_t n, int64_t k) {
  std::vector<attn_tensor> w;
  size_t bytes = (size_t)(n * k) * (size_t)bytes_of(dtype);
  int buffers = (int)std::max<size_t>(2, ((size_t)256 << 20) / bytes);
  for (int i = 0; i < buffers; ++i) w.push_back(matrix(dtype, n, k));
  attn_tensor a = matrix(dtype, m, k), c = matrix(dtype, m, n);
  char name[96];
  snprintf(name, sizeof name, "%s %lld rows, %lld x %lld", dtype_name(dtype), (long long)m,
           (long long)n, (long long)k);
  double us = time_of([&](int i) {
    OK(attn_cuda_matmul(dense, &a, false, &w[(size_t)(i % buffers)], true, &c, false, NULL));
  });
  print_time(name, (double)bytes, us);
  for (attn_tensor &tensor : w) CUDA(cudaFree(tensor.data));
  CUDA(cudaFree(a.data));
  CUDA(cudaFree(c.data));
}

static void bench() {
  measure_copy();
  for (attn_dtype dtype : {ATTN_BF16, ATTN_F32})
    for (int64_t m : {1, 4, 8}) {
      bench_few(dtype, m, 4096, 4096);
      if (m != 4) bench_few(dtype, m, 1024, 1024);
      bench_few(dtype, m, 14336, 4096);
      if (m == 1) bench_few(dtype, m, 4096, 14336);
      if (m == 1) bench_few(dtype, m, 64000, 1024);
    }
  struct {
    int64_t m, n, k;
    bool ta, tb;
    attn_dtype dtype, dtype_c;
  } many[] = {{16384, 4096, 4096, false, true, ATTN_BF16, ATTN_BF16},
              {16384, 2816, 1024, false, true, ATTN_BF16, ATTN_BF16},
              {16384, 1024, 2816, false, false, ATTN_BF16, ATTN_BF16},
              {2816, 1024, 16384, true, false, ATTN_BF16, ATTN_F32},
              {4096, 64000, 1024, false, true, ATTN_BF16, ATTN_F32},
              {64, 4096, 4096, false, true, ATTN_BF16, ATTN_BF16},
              {4096, 4096, 4096, false, true, ATTN_F32, ATTN_F32}};
  for (auto &use : many) {
    attn_tensor a = use.ta ? matrix(use.dtype, use.k, use.m) : matrix(use.dtype, use.m, use.k);
    attn_tensor b = use.tb ? matrix(use.dtype, use.n, use.k) : matrix(use.dtype, use.k, use.n);
    attn_tensor c = matrix(use.dtype_c, use.m, use.n);
    double us = time_of(
        [&](int) { OK(attn_cuda_matmul(dense, &a, use.ta, &b, use.tb, &c, false, NULL)); }, 10);
    printf("%s to %s %lld x %lld x %lld%s%s: %.1f us, %.0f TFLOP/s\n", dtype_name(use.dtype),
           dtype_name(use.dtype_c), (long long)use.m, (long long)use.n, (long long)use.k,
           use.ta ? " a^T" : "", use.tb ? " b^T" : "", us,
           2e-6 * (double)use.m * (double)use.n * (double)use.k / us);
    CUDA(cudaFree(a.data));
    CUDA(cudaFree(b.data));
    CUDA(cudaFree(c.data));
  }
}

int main(int count, char **arguments) {
  attn_cuda_device device;
  OK(attn_cuda_device_open(0, &device));
  OK(attn_cuda_dense_create(&device, &dense));
  if (count > 1 && strcmp(arguments[1], "bench") == 0) {
    bench();
  } else {
    test_all();
    test_refusals();
    printf("%d checks, %d failures\n", checks, failures);
  }
  attn_cuda_dense_destroy(dense);
  return failures > 0;
}

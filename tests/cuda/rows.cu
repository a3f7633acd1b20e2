/* The functions of kernels/cuda/rows.h against float64 loops written from their equations, over
 * shapes, strides and dtypes drawn at random; with the argument `bench`, their speed. */
#include "support.cuh"

typedef std::vector<double> numbers;
typedef std::vector<int64_t> extents;

static const attn_dtype DTYPES[] = {ATTN_F32, ATTN_BF16, ATTN_F16, ATTN_F64};

static attn_dtype some_dtype() { /* float64 seldom: it changes the arithmetic of all */
  return DTYPES[below(8) ? below(3) : 3];
}

static double gaussian() {
  return normal();
}

/* --- Random shapes ------------------------------------------------------------------------------
 */

static extents some_shape(int least_rank = 1) {
  static const int64_t sizes[] = {1, 2, 3, 5, 8, 16, 24, 40, 64, 100, 129};
  int rank = least_rank + below(5 - least_rank);
  extents shape((size_t)rank);
  int64_t count = 1;
  for (int i = rank - 1; i >= 0; --i) {
    int64_t size = sizes[below(11)];
    while (count * size > 40000) size = std::max<int64_t>(1, size / 4);
    shape[(size_t)i] = size;
    count *= size;
  }
  return shape;
}

/* Contiguous, with gaps, permuted, or (inputs only) repeated along some axes. */
static extents some_strides(const extents &shape, bool input) {
  int rank = (int)shape.size(), kind = below(5);
  std::vector<int> order((size_t)rank);
  for (int i = 0; i < rank; ++i) order[(size_t)i] = rank - 1 - i; /* innermost first */
  if (kind == 1)
    for (int i = rank - 1; i > 0; --i) std::swap(order[(size_t)i], order[(size_t)below(i + 1)]);
  extents strides((size_t)rank);
  int64_t next = kind == 2 && below(4) == 0 ? 2 : 1;
  for (int axis : order) {
    strides[(size_t)axis] = next;
    next *= shape[(size_t)axis];
    if (kind == 2) next += below(2) ? 8 : 3;
    if (kind == 3) next = (next + 7) / 8 * 8; /* gaps that vectors survive */
  }
  if (kind == 4 && input)
    for (int i = 0; i < rank; ++i)
      if (below(2)) strides[(size_t)i] = 0;
  return strides;
}

static int some_shift() {
  return below(3) == 0 ? below(8) : 0;
}

/* An operand of a shape with its target's strides or others. */
static void draw(array &a, const extents &shape, bool input, const std::function<double()> &fill,
                 attn_dtype dtype) {
  make(a, dtype, shape, some_strides(shape, input), fill, some_shift());
}

static std::string label(const char *name, const array &y) {
  std::string text = name;
  text += " [";
  for (int i = 0; i < y.tensor.rank; ++i)
    text += (i ? ", " : "") + std::to_string(y.tensor.shape[i]) + ":" +
            std::to_string(y.tensor.stride[i]);
  return text + "]";
}

/* --- Element-wise -------------------------------------------------------------------------------
 */

static double logistic(double x) {
  return 1 / (1 + std::exp(-x));
}
static double phi_below(double x) {
  return 0.5 * std::erfc(-x / std::sqrt(2.0));
}
static double value_of(attn_activation f, double x) {
  switch (f) {
  case ATTN_IDENTITY: return x;
  case ATTN_SILU: return x * logistic(x);
  case ATTN_SIGMOID: return logistic(x);
  case ATTN_GELU: return x * phi_below(x);
  case ATTN_RELU: return std::max(x, 0.0);
  case ATTN_SOFTPLUS: return x > 30 ? x + std::exp(-x) : std::log1p(std::exp(x));
  case ATTN_LOG_SIGMOID: return x < -30 ? x - std::exp(x) : -std::log1p(std::exp(-x));
  case ATTN_EXP: return std::exp(x);
  case ATTN_ELU: return x > 0 ? x : std::expm1(x);
  case ATTN_ELU_PLUS_ONE: return x > 0 ? x + 1 : std::exp(x);
  default: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  }
}
static double slope_of(attn_activation f, double x) {
  switch (f) {
  case ATTN_IDENTITY: return 1;
  case ATTN_SILU: return logistic(x) + x * logistic(x) * logistic(-x);
  case ATTN_SIGMOID: return logistic(x) * logistic(-x);
  case ATTN_GELU: return phi_below(x) + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
  case ATTN_RELU: return x > 0;
  case ATTN_SOFTPLUS: return logistic(x);
  case ATTN_LOG_SIGMOID: return logistic(-x);
  case ATTN_EXP: return std::exp(x);
  case ATTN_ELU:
  case ATTN_ELU_PLUS_ONE: return x > 0 ? 1 : std::exp(x);
  default: {
    double c = std::sqrt(2 / M_PI), u = c * (x + 0.044715 * x * x * x), t = std::tanh(u);
    return 0.5 * (1 + t) + 0.5 * x * (1 - t) * (1 + t) * c * (1 + 3 * 0.044715 * x * x);
  }
  }
}

/* Arguments of activations: mostly near 0, sometimes far. */
static double argument() {
  return below(20) ? 2 * normal() : 30 * (uniform() - 0.5);
}

/* A target is poisoned unless it is added to. */
static std::function<double()> before(bool accumulate) {
  return accumulate ? std::function<double()>(gaussian) : std::function<double()>();
}

static numbers plus(const array &old, bool accumulate, numbers sum) {
  for (size_t i = 0; accumulate && i < sum.size(); ++i) sum[i] += old.values[i];
  return sum;
}

/* Whether dy's own memory may be written: nothing of it is repeated. */
static bool dy_stays(const array &dy) {
  for (int i = 0; i < dy.tensor.rank; ++i)
    if (dy.tensor.shape[i] > 1 && dy.tensor.stride[i] == 0) return false;
  return below(2);
}

static void test_elementwise() {
  for (int round = 0; round < 150; ++round) {
    extents shape = some_shape();
    array y, a, b, dy, da, db;
    bool accumulate = below(2), accumulate_b = below(2), in_place = below(4) == 0;
    attn_activation f = (attn_activation)(round % (ATTN_ELU_PLUS_ONE + 1));
    draw(a, shape, true, argument, some_dtype());
    draw(b, shape, true, gaussian, some_dtype());
    draw(dy, shape, true, gaussian, some_dtype());
    size_t n = a.values.size();
    numbers expected(n);

    double alpha = normal(), beta = normal();
    bool two = below(3) > 0;
    draw(y, shape, false, NULL, some_dtype());
    OK(attn_cuda_add(&y.tensor, alpha, &a.tensor, beta, two ? &b.tensor : NULL, NULL));
    for (size_t i = 0; i < n; ++i) expected[i] = alpha * a.values[i] + two * beta * b.values[i];
    compare(label("add", y), y, expected);

    draw(y, shape, false, NULL, some_dtype());
    OK(attn_cuda_activate(f, &y.tensor, &a.tensor, NULL));
    for (size_t i = 0; i < n; ++i) expected[i] = value_of(f, a.values[i]);
    compare(label("activate", y) + std::to_string(f), y, expected);

    draw(y, shape, false, before(accumulate), some_dtype());
    OK(attn_cuda_activate_backward(f, &y.tensor, accumulate, &a.tensor, &dy.tensor, NULL));
    for (size_t i = 0; i < n; ++i) expected[i] = slope_of(f, a.values[i]) * dy.values[i];
    compare(label("activate_backward", y) + std::to_string(f), y, plus(y, accumulate, expected));

    draw(y, shape, false, NULL, some_dtype());
    OK(attn_cuda_gate(f, &y.tensor, &a.tensor, &b.tensor, NULL));
    for (size_t i = 0; i < n; ++i) expected[i] = value_of(f, a.values[i]) * b.values[i];
    compare(label("gate", y) + std::to_string(f), y, expected);

    draw(da, shape, false, before(accumulate), some_dtype());
    draw(db, shape, false, before(accumulate_b), some_dtype());
    int which = below(3); /* both, da, db */
    array again;          /* y, or in the place of dy */
    bool makes = below(2), over = makes && dy_stays(dy);
    draw(again, shape, false, NULL, some_dtype());
    attn_tensor made = over ? dy.tensor : again.tensor;
    OK(attn_cuda_gate_backward(f, which < 2 ? &da.tensor : NULL, accumulate,
                               which != 1 ? &db.tensor : NULL, accumulate_b, makes ? &made : NULL,
                               &a.tensor, &b.tensor, &dy.tensor, NULL));
    for (size_t i = 0; i < n; ++i)
      expected[i] = slope_of(f, a.values[i]) * b.values[i] * dy.values[i];
    if (which < 2)
      compare(label("gate_backward a", da) + std::to_string(f), da, plus(da, accumulate, expected));
    for (size_t i = 0; i < n; ++i) expected[i] = value_of(f, a.values[i]) * dy.values[i];
    if (which != 1)
      compare(label("gate_backward b", db) + std::to_string(f), db,
              plus(db, accumulate_b, expected));

    for (size_t i = 0; i < n; ++i) expected[i] = value_of(f, a.values[i]) * b.values[i];
    if (makes) compare(label("gate_backward y", over ? dy : again), over ? dy : again, expected);

    double cap = 1 + 5 * uniform();
    draw(y, shape, false, argument, some_dtype());
    OK(attn_cuda_cap(&y.tensor, cap, NULL));
    for (size_t i = 0; i < n; ++i) expected[i] = cap * std::tanh(y.values[i] / cap);
    compare(label("cap", y), y, expected);

    if (in_place) { /* the target is an input */
      draw(y, shape, false, gaussian, some_dtype());
      OK(attn_cuda_gate(f, &y.tensor, &a.tensor, &y.tensor, NULL));
      for (size_t i = 0; i < n; ++i) expected[i] = value_of(f, a.values[i]) * y.values[i];
      compare(label("gate in place", y), y, expected);
    }

    int terms = 1 + below(8);
    std::vector<array> left((size_t)terms), right((size_t)terms);
    attn_tensor lefts[8], rights[8];
    draw(y, shape, false, before(accumulate), some_dtype());
    std::fill(expected.begin(), expected.end(), 0);
    for (int j = 0; j < terms; ++j) {
      draw(left[(size_t)j], shape, true, gaussian, some_dtype());
      draw(right[(size_t)j], shape, true, gaussian, some_dtype());
      lefts[j] = left[(size_t)j].tensor;
      rights[j] = right[(size_t)j].tensor;
      for (size_t i = 0; i < n; ++i)
        expected[i] += left[(size_t)j].values[i] * right[(size_t)j].values[i];
    }
    OK(attn_cuda_multiply_sum(&y.tensor, accumulate, terms, lefts, rights, NULL));
    compare(label("multiply_sum", y), y, plus(y, accumulate, expected));
  }
  report("element-wise");
}

/* --- Sums ---------------------------------------------------------------------------------------
 */

static void test_sums() {
  for (int round = 0; round < 120; ++round) {
    extents shape = some_shape();
    int64_t width = round % 4 == 0 ? 1 + below(6000) : shape.back();
    if (round % 4 == 0) {
      while (shape.size() > 1 && shape[0] > 3) shape[0] /= 2;
      shape.back() = width;
    }
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
    array y, a, b;
    bool accumulate = below(2), two = below(3) > 0;
    draw(a, shape, true, gaussian, some_dtype());
    draw(
        b, shape, true, [] { return 1 + normal(); }, some_dtype());
    extents leading(shape.begin(), shape.end() - 1);
    attn_dtype dtype = some_dtype();
    /* Terms cancel, and a sum may be a single number. */
    double bound = dtype == ATTN_F64 ? 0 : bound_of(dtype) + 5e-5;
    draw(y, leading, false, NULL, dtype);
    numbers sums((size_t)rows, 0), columns((size_t)width, 0);
    double squares = 0;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < width; ++c) {
        double u = a.values[(size_t)(r * width + c)], v = b.values[(size_t)(r * width + c)];
        sums[(size_t)r] += u * v;
        columns[(size_t)c] += two ? u * v : u;
        squares += u * u;
      }
    OK(attn_cuda_row_dot(&y.tensor, &a.tensor, &b.tensor, NULL));
    compare(label("row_dot", y), y, sums, bound);

    void *workspace;
    CUDA(cudaMalloc(&workspace, sizeof(double) * ATTN_CUDA_PARTS * (size_t)width));
    CUDA(cudaMemset(workspace, 0xff, sizeof(double) * ATTN_CUDA_PARTS * (size_t)width));
    draw(y, {width}, false, before(accumulate), dtype);
    OK(attn_cuda_column_dot(&y.tensor, accumulate, &a.tensor, two ? &b.tensor : NULL, workspace,
                            NULL));
    compare(label("column_dot", y), y, plus(y, accumulate, columns), bound);

    array sum;
    make(sum, ATTN_F64, {1}, {}, NULL);
    OK(attn_cuda_sum_squares(&a.tensor, (double *)sum.tensor.data, workspace, NULL));
    compare(label("sum_squares", a), sum, {squares}, 1e-6);
    cudaFree(workspace);
  }
  for (int round = 0; round < 3; ++round) { /* more tensors than one launch takes; odd ones too */
    enum { MANY = 150 };
    static array many[MANY];
    const attn_tensor *all[MANY];
    array sums;
    numbers expected(MANY, 0);
    for (int i = 0; i < MANY; ++i) {
      int64_t n = 8 * (1 + below(2000)) + (round == 1 ? below(3) : 0);
      make(many[i], round == 2 && i % 7 == 0 ? ATTN_F64 : ATTN_F32, {n}, {}, gaussian);
      for (double value : many[i].values) expected[(size_t)i] += value * value;
      all[i] = &many[i].tensor;
    }
    make(sums, ATTN_F64, {MANY}, {}, NULL);
    void *workspace;
    CUDA(cudaMalloc(&workspace, sizeof(double) * ATTN_CUDA_TABLE * ATTN_CUDA_PARTS));
    OK(attn_cuda_sum_squares_all(all, MANY, (double *)sums.tensor.data, workspace, NULL));
    compare("sum_squares_all", sums, expected, 1e-6);
    cudaFree(workspace);
  }
  for (int64_t n : {1, 5, 1000, 100001}) {
    array values, sum;
    make(values, ATTN_F64, {n}, {}, [] { return 1 + normal(); });
    make(sum, n == 5 ? ATTN_F64 : ATTN_F32, {1}, {}, NULL);
    double total = 0;
    for (double value : values.values) total += value;
    OK(attn_cuda_total((const double *)values.tensor.data, n, 0.25, sum.tensor.data,
                       sum.tensor.dtype, NULL));
    compare("total", sum, {0.25 * total});
  }
  { /* many rows, a few of them a part */
    array y, a;
    make(a, ATTN_BF16, {20000, 96}, {}, [] { return 1 + normal(); });
    make(y, ATTN_F32, {96}, {}, NULL);
    numbers columns(96, 0);
    for (size_t i = 0; i < a.values.size(); ++i) columns[i % 96] += a.values[i];
    void *workspace;
    CUDA(cudaMalloc(&workspace, sizeof(double) * ATTN_CUDA_PARTS * 96));
    OK(attn_cuda_column_dot(&y.tensor, false, &a.tensor, NULL, workspace, NULL));
    compare("column_dot of many rows", y, columns, 1e-5);
    cudaFree(workspace);
  }
  report("sums");
}

/* --- Norms --------------------------------------------------------------------------------------
 */

static void test_norm(int64_t rows, int64_t n, bool layer, int round) {
  bool vectors = round % 3 < 2; /* layouts that vectors suit */
  auto dtype = [&] { return vectors ? DTYPES[below(3)] : some_dtype(); };
  extents shape = {rows, n};
  auto strides = [&](bool) {
    return vectors ? extents{n + (below(2) ? 8 : 0), 1} : some_strides(shape, false);
  };
  array x, y, weight, bias, dy, dx, d_weight, d_bias, factor, mean;
  bool has_weight = below(4) > 0, has_bias = layer && below(2), accumulate = below(2);
  make(x, dtype(), shape, strides(true), [] { return 0.3 + normal(); });
  make(y, dtype(), shape, strides(false), NULL);
  make(weight, dtype(), {n}, {}, [] { return 1 + 0.2 * normal(); });
  make(bias, dtype(), {n}, {}, gaussian);
  make(factor, ATTN_F64, {rows}, {}, NULL);
  make(mean, ATTN_F64, {rows}, {}, NULL);
  double divisor = below(2) ? (double)n : 1, epsilon = 1e-5;
  OK(attn_cuda_norm(&y.tensor, &x.tensor, has_weight ? &weight.tensor : NULL,
                    has_bias ? &bias.tensor : NULL, divisor, epsilon, (double *)factor.tensor.data,
                    layer ? (double *)mean.tensor.data : NULL, NULL));
  if (layer) divisor = (double)n;
  numbers expected((size_t)(rows * n)), r((size_t)rows), m((size_t)rows);
  auto w = [&](int64_t c) { return has_weight ? weight.values[(size_t)c] : 1; };
  for (int64_t i = 0; i < rows; ++i) {
    const double *u = &x.values[(size_t)(i * n)];
    double centre = 0, squares = 0;
    for (int64_t c = 0; layer && c < n; ++c) centre += u[c] / (double)n;
    for (int64_t c = 0; c < n; ++c) squares += (u[c] - centre) * (u[c] - centre);
    r[(size_t)i] = 1 / std::sqrt(squares / divisor + epsilon);
    m[(size_t)i] = centre;
    for (int64_t c = 0; c < n; ++c)
      expected[(size_t)(i * n + c)] =
          r[(size_t)i] * (u[c] - centre) * w(c) + (has_bias ? bias.values[(size_t)c] : 0);
  }
  std::string name = std::string(layer ? "layer" : "rms") + " norm " + std::to_string(rows) +
                     " x " + std::to_string(n) + (vectors ? " vectors" : "");
  if (layer && n == 1)
    return; /* x - mean is 0: r is 1 / sqrt(epsilon), all errors are relative to
               nothing */
  compare(name, y, expected);
  compare(name + " factor", factor, r, 1e-5);
  if (layer) compare(name + " mean", mean, m, 1e-5);

  /* Backward from exact factors, so that its own errors show. */
  make(factor, ATTN_F64, {rows}, {}, [&, i = 0]() mutable { return r[(size_t)i++]; });
  make(mean, ATTN_F64, {rows}, {}, [&, i = 0]() mutable { return m[(size_t)i++]; });
  make(dy, dtype(), shape, strides(true), gaussian);
  make(dx, dtype(), shape, strides(false), before(accumulate));
  make(d_weight, dtype(), {n}, {}, NULL);
  make(d_bias, dtype(), {n}, {}, NULL);
  array copy; /* of dx */
  make(copy, dtype(), shape, strides(false), NULL);
  int wanted = below(4); /* everything, no weights, no dx, everything */
  bool copied = wanted != 2 && below(2);
  void *workspace;
  size_t bytes = sizeof(double) * 2 * ATTN_CUDA_PARTS * (size_t)n;
  CUDA(cudaMalloc(&workspace, bytes));
  CUDA(cudaMemset(workspace, 0xff, bytes));
  OK(attn_cuda_norm_backward(
      wanted != 2 ? &dx.tensor : NULL, accumulate, copied ? &copy.tensor : NULL,
      wanted != 1 ? &d_weight.tensor : NULL, wanted != 1 && layer ? &d_bias.tensor : NULL,
      &x.tensor, has_weight ? &weight.tensor : NULL, &dy.tensor, divisor,
      (double *)factor.tensor.data, layer ? (double *)mean.tensor.data : NULL, workspace, NULL));
  cudaFree(workspace);
  numbers dw((size_t)n, 0), dbias((size_t)n, 0);
  for (int64_t i = 0; i < rows; ++i) {
    const double *u = &x.values[(size_t)(i * n)], *g = &dy.values[(size_t)(i * n)];
    double sum = 0, projection = 0, ri = r[(size_t)i];
    for (int64_t c = 0; c < n; ++c) {
      double h = ri * (u[c] - m[(size_t)i]);
      sum += g[c] * w(c);
      projection += g[c] * w(c) * h;
      dw[(size_t)c] += h * g[c];
      dbias[(size_t)c] += g[c];
    }
    for (int64_t c = 0; c < n; ++c)
      expected[(size_t)(i * n + c)] = ri * (g[c] * w(c) - (layer ? sum / (double)n : 0) -
                                            ri * (u[c] - m[(size_t)i]) * projection / divisor);
  }
  /* A row of one element is all projection: the difference of equal numbers. */
  double small = n < 4 ? 1 : 0;
  if (wanted != 2) compare(name + " dx", dx, plus(dx, accumulate, expected), small);
  /* Where the fallback copies, dx was rounded first. */
  double twice = dx.tensor.dtype == ATTN_BF16 || dx.tensor.dtype == ATTN_F16 ? 2.5 / 256 : small;
  if (twice == 0) twice = std::max(bound_of(dx.tensor.dtype), bound_of(copy.tensor.dtype));
  if (copied) compare(name + " copy", copy, plus(dx, accumulate, expected), twice);
  double bound = d_weight.tensor.dtype == ATTN_F32 ? 1e-5 : 0;
  if (wanted != 1) compare(name + " d_weight", d_weight, dw, bound);
  bound = d_bias.tensor.dtype == ATTN_F32 ? 1e-5 : 0;
  if (wanted != 1 && layer) compare(name + " d_bias", d_bias, dbias, bound);
}

/* sum = a + b and its norm; norm (.) gate, and back. */
static void test_norm_beside(int64_t rows, int64_t n, int round) {
  extents shape = {rows, n};
  auto dtype = [&] { return DTYPES[below(3)]; };
  auto strides = [&] { return extents{n + (below(2) ? 8 : 0), 1}; };
  bool vectors = n % 8 == 0 && n <= 4096 && round % 3 < 2, has_weight = below(2);
  array a, b, sum, y, weight, factor;
  make(a, round % 3 == 2 ? some_dtype() : dtype(), shape, strides(), [] { return 0.3 + normal(); });
  make(b, dtype(), shape, strides(), gaussian);
  make(sum, round % 3 == 2 && below(2) ? ATTN_F64 : ATTN_F32, shape, strides(), NULL);
  make(y, dtype(), shape, strides(), NULL);
  make(weight, dtype(), {n}, {}, [] { return 1 + 0.2 * normal(); });
  make(factor, ATTN_F64, {rows}, {}, NULL);
  double divisor = (double)n, epsilon = 1e-5;
  OK(attn_cuda_add_norm(&sum.tensor, &y.tensor, &a.tensor, &b.tensor,
                        has_weight ? &weight.tensor : NULL, divisor, epsilon,
                        (double *)factor.tensor.data, NULL));
  size_t count = (size_t)(rows * n);
  numbers total(count), normed(count), r((size_t)rows);
  for (size_t i = 0; i < count; ++i) total[i] = a.values[i] + b.values[i];
  auto norm_of = [&](const numbers &x, bool weighted) {
    for (int64_t i = 0; i < rows; ++i) {
      double squares = 0;
      for (int64_t c = 0; c < n; ++c) {
        double u = x[(size_t)(i * n + c)];
        squares += u * u;
      }
      r[(size_t)i] = 1 / std::sqrt(squares / divisor + epsilon);
      for (int64_t c = 0; c < n; ++c)
        normed[(size_t)(i * n + c)] =
            r[(size_t)i] * x[(size_t)(i * n + c)] * (weighted ? weight.values[(size_t)c] : 1);
    }
  };
  norm_of(total, has_weight);
  std::string name = std::to_string(rows) + " x " + std::to_string(n);
  compare("add_norm sum " + name, sum, total);
  compare("add_norm " + name, y, normed);
  compare("add_norm factor " + name, factor, r, 1e-5);
  if (!vectors) return;

  array gate, dy, dx, d_gate;
  bool add_x = below(2), add_gate = below(2);
  make(gate, dtype(), shape, strides(), gaussian);
  OK(attn_cuda_norm_gate(&y.tensor, &a.tensor, &gate.tensor, divisor, epsilon,
                         (double *)factor.tensor.data, NULL));
  norm_of(a.values, false);
  numbers expected(count), expected_gate(count);
  for (size_t i = 0; i < count; ++i) expected[i] = normed[i] * gate.values[i];
  compare("norm_gate " + name, y, expected);
  compare("norm_gate factor " + name, factor, r, 1e-5);
  make(factor, ATTN_F64, {rows}, {}, [&, i = 0]() mutable { return r[(size_t)i++]; });
  make(dy, dtype(), shape, strides(), gaussian);
  make(dx, dtype(), shape, strides(), before(add_x));
  make(d_gate, dtype(), shape, strides(), before(add_gate));
  OK(attn_cuda_norm_gate_backward(&dx.tensor, add_x, &d_gate.tensor, add_gate, &a.tensor,
                                  &gate.tensor, &dy.tensor, divisor, (double *)factor.tensor.data,
                                  NULL));
  for (int64_t i = 0; i < rows; ++i) {
    double projection = 0, ri = r[(size_t)i];
    for (int64_t c = 0; c < n; ++c) {
      size_t at = (size_t)(i * n + c);
      projection += dy.values[at] * gate.values[at] * normed[at];
      expected_gate[at] = dy.values[at] * normed[at];
    }
    for (int64_t c = 0; c < n; ++c) {
      size_t at = (size_t)(i * n + c);
      expected[at] = ri * (dy.values[at] * gate.values[at] - normed[at] * projection / divisor);
    }
  }
  compare("norm_gate dx " + name, dx, plus(dx, add_x, expected));
  compare("norm_gate d_gate " + name, d_gate, plus(d_gate, add_gate, expected_gate));
}

static void test_norms() {
  static const int64_t widths[] = {1,    5,    8,    64,   72,   100,  128,   256,   320,   512,
                                   1000, 1024, 2048, 4096, 5000, 8192, 16384, 32768, 33000, 40};
  for (int layer = 0; layer < 2; ++layer)
    for (int64_t n : widths)
      for (int round = 0; round < 3; ++round) {
        static const int64_t counts[] = {1, 3, 37, 700};
        int64_t rows = counts[below(4)];
        while (rows > 1 && rows * n > 300000) rows /= 4;
        test_norm(std::max<int64_t>(rows, 1), n, layer, round);
      }
  for (int64_t n : {8, 64, 72, 100, 256, 320, 1024, 2048, 2816, 4096, 5000})
    for (int round = 0; round < 3; ++round)
      test_norm_beside(1 + below(n > 1000 ? 40 : 300), n, round);
  test_norm(3000, 64, false, 0);
  test_norm(3000, 64, true, 1);
  report("norms");
}

/* --- Cross-entropy ------------------------------------------------------------------------------
 */

static int32_t *upload(const std::vector<int32_t> &values) {
  int32_t *memory;
  CUDA(cudaMalloc(&memory, std::max<size_t>(values.size(), 1) * 4));
  CUDA(cudaMemcpy(memory, values.data(), values.size() * 4, cudaMemcpyHostToDevice));
  return memory;
}

static void test_cross_entropy() {
  static const int64_t widths[] = {1, 7, 64, 1000, 4096, 4100, 32000, 200000};
  for (int64_t n : widths)
    for (int round = 0; round < 5; ++round) {
      int64_t rows = n > 10000 ? 2 : 9;
      bool inside = round == 4; /* dz as bfloat16 in the place of z */
      array z, dz, losses;
      bool separate = round % 2, wide = round == 2;
      int64_t gap = below(2) ? 8 : 0;
      make(z, wide ? ATTN_F64 : ATTN_F32, {rows, n}, {n + gap, 1},
           [&] { return round == 3 && below(3) == 0 ? -INFINITY : 40 * uniform() + 5 * normal(); });
      make(dz, DTYPES[below(3)], {rows, n}, {n + gap, 1}, NULL);
      make(losses, ATTN_F64, {rows}, {}, NULL);
      std::vector<int32_t> targets((size_t)rows);
      for (int64_t r = 0; r < rows; ++r) {
        int32_t t = below((int)n);
        for (int32_t i = 0; i < n && !std::isfinite(z.values[(size_t)(r * n + t)]); ++i)
          t = (int32_t)((t + 1) % n);
        targets[(size_t)r] = r % 4 == 3 ? -1 : t;
      }
      double scale = 0.37;
      numbers expected((size_t)(rows * n), 0), loss((size_t)rows, 0);
      for (int64_t r = 0; r < rows; ++r) {
        if (targets[(size_t)r] < 0) continue;
        const double *row = &z.values[(size_t)(r * n)];
        double greatest = *std::max_element(row, row + n), sum = 0;
        for (int64_t c = 0; c < n; ++c) sum += std::exp(row[c] - greatest);
        loss[(size_t)r] = std::log(sum) + greatest - row[targets[(size_t)r]];
        for (int64_t c = 0; c < n; ++c)
          expected[(size_t)(r * n + c)] =
              scale * (std::exp(row[c] - greatest) / sum - (c == targets[(size_t)r]));
      }
      if (n == 1 && !std::isfinite(z.values[0])) continue;
      int32_t *on_gpu = upload(targets);
      attn_tensor within = z.tensor;
      within.dtype = ATTN_BF16;
      within.stride[0] *= 2;
      OK(attn_cuda_cross_entropy(&z.tensor, on_gpu, scale,
                                 separate ? &dz.tensor
                                 : inside ? &within
                                          : NULL,
                                 (double *)losses.tensor.data, NULL));
      std::string name = "cross_entropy of " + std::to_string(n);
      if (inside) {
        numbers got;
        std::vector<uint16_t> row((size_t)n);
        for (int64_t r = 0; r < rows; ++r) {
          CUDA(cudaMemcpy(row.data(), (char *)within.data + r * within.stride[0] * 2,
                          row.size() * sizeof(uint16_t), cudaMemcpyDefault));
          for (uint16_t bits : row) {
            uint32_t word = (uint32_t)bits << 16;
            float value;
            memcpy(&value, &word, sizeof value);
            got.push_back((double)value);
          }
        }
        compare(name + " inside", got, expected, ATTN_BF16, bound_of(ATTN_BF16));
        cudaFree(on_gpu);
        continue;
      }
      /* exp of differences near 100: 100 ulp of the argument */
      array &result = separate ? dz : z;
      compare(name, result, expected,
              result.tensor.dtype == ATTN_F32   ? 1e-5
              : result.tensor.dtype == ATTN_F64 ? 1e-12
                                                : 0);
      compare(name + " loss", losses, loss, 1e-6);
      cudaFree(on_gpu);
    }
  report("cross-entropy");
}

/* --- Look-ups -----------------------------------------------------------------------------------
 */

static void test_lookups() {
  static const int64_t tables[] = {1, 2, 5, 300, 5000, 100000};
  for (int64_t m : tables)
    for (int round = 0; round < 6; ++round) {
      static const int64_t counts[] = {1, 37, 1000, 4097, 30000};
      int64_t rows = counts[below(5)];
      int64_t n = m > 10000 ? 8 : (round % 2 ? 40 : 33);
      if (rows > 10000) n = 8;
      array table, y, x;
      make(table, some_dtype(), {m, n}, {n + (below(2) ? 8 : 0), 1}, gaussian);
      make(y, some_dtype(), {rows, n}, {n + (below(2) ? 8 : 0), 1}, NULL);
      make(x, some_dtype(), {rows, n}, {n + (below(2) ? 8 : 0), 1}, gaussian);
      std::vector<int32_t> index((size_t)rows);
      for (int32_t &i : index) /* half of them few indices, as words of a text are */
        i = below(2) ? below((int)m) : below((int)std::min<int64_t>(m, 3));
      double factor = normal();
      int32_t *on_gpu = upload(index);
      OK(attn_cuda_gather(&y.tensor, factor, &table.tensor, on_gpu, NULL));
      numbers expected((size_t)(rows * n));
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < n; ++c)
          expected[(size_t)(r * n + c)] = factor * table.values[(size_t)(index[(size_t)r] * n + c)];
      compare("gather", y, expected);

      void *workspace;
      size_t bytes = (size_t)(m + 1 + 2 * rows) * 4;
      CUDA(cudaMalloc(&workspace, bytes + 256));
      CUDA(cudaMemset(workspace, 0xff, bytes + 256));
      numbers sums = table.values;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < n; ++c)
          sums[(size_t)(index[(size_t)r] * n + c)] += factor * x.values[(size_t)(r * n + c)];
      OK(attn_cuda_scatter_add(&table.tensor, factor, &x.tensor, on_gpu, workspace, NULL));
      compare("scatter_add of " + std::to_string(rows) + " rows to " + std::to_string(m), table,
              sums, table.tensor.dtype == ATTN_F32 ? 1e-5 : 0);
      std::vector<unsigned char> guard(256);
      CUDA(cudaMemcpy(guard.data(), (char *)workspace + bytes, 256, cudaMemcpyDeviceToHost));
      for (unsigned char byte : guard)
        if (byte != 0xff) {
          printf("FAILED scatter_add: it wrote past its workspace\n");
          ++failures;
          break;
        }
      cudaFree(workspace);
      cudaFree(on_gpu);
    }
  { /* The same call gives the same bits. */
    const int64_t m = 5000, rows = 30000, n = 40;
    array table[2], x;
    for (array &each : table) make(each, ATTN_F32, {m, n}, {}, [] { return 1.0; });
    make(x, ATTN_F32, {rows, n}, {}, gaussian);
    std::vector<int32_t> index((size_t)rows);
    for (int32_t &i : index) i = below(2) ? below((int)m) : below(3);
    int32_t *on_gpu = upload(index);
    for (array &each : table) {
      void *workspace;
      CUDA(cudaMalloc(&workspace, (size_t)(m + 1 + 2 * rows) * 4));
      OK(attn_cuda_scatter_add(&each.tensor, 1, &x.tensor, on_gpu, workspace, NULL));
      cudaFree(workspace);
    }
    compare("scatter_add again", table[0], read(table[1], "again"), 1e-30);
    cudaFree(on_gpu);
  }
  for (int round = 0; round < 4; ++round) {
    int64_t count = 1 + below(300), width = 1 + below(70), first = round < 2 ? below(100) : 900000;
    array cosines, sines, theta;
    attn_dtype dtype = DTYPES[round];
    make(cosines, dtype, {count, width}, {width + 3, 1}, NULL);
    make(sines, dtype, {count, width}, {width, 1}, NULL);
    make(theta, ATTN_F64, {width}, {}, [] { return uniform() + 1e-4; });
    int64_t position = 5, *on_gpu = NULL;
    CUDA(cudaMalloc(&on_gpu, 8));
    CUDA(cudaMemcpy(on_gpu, &position, 8, cudaMemcpyHostToDevice));
    bool moved = round % 2;
    OK(attn_cuda_angles(&cosines.tensor, &sines.tensor, (double *)theta.tensor.data, first,
                        moved ? on_gpu : NULL, NULL));
    numbers c((size_t)(count * width)), s((size_t)(count * width));
    for (int64_t i = 0; i < count * width; ++i) {
      double angle =
          (double)(first + i / width + (moved ? position : 0)) * theta.values[(size_t)(i % width)];
      c[(size_t)i] = std::cos(angle);
      s[(size_t)i] = std::sin(angle);
    }
    compare("cosines", cosines, c);
    compare("sines", sines, s);
    cudaFree(on_gpu);
  }
  report("look-ups");
}

/* --- Convolution --------------------------------------------------------------------------------
 */

static void test_convolution() {
  for (int round = 0; round < 80; ++round) {
    int64_t taps = round % 2 ? 4 : 1 + below(16), length = round % 5 ? 1 + below(70) : 1;
    int64_t channels = round % 3 ? 8 * (1 + below(20)) : 1 + below(60);
    bool with_tail = below(2), reverse = !with_tail && below(2), accumulate = below(2);
    int64_t batch = with_tail ? 1 : 1 + below(3), gap = below(2) ? 8 : 0, kept = taps - 1;
    array y, x, w, tail;
    extents shape = {batch, length, channels};
    make(x, some_dtype(), shape, {length * (channels + gap), channels + gap, 1}, gaussian);
    make(y, some_dtype(), shape, {}, accumulate ? gaussian : nullptr);
    make(w, some_dtype(), {channels, taps}, {taps, 1}, gaussian);
    if (kept) make(tail, some_dtype(), {kept, channels}, {}, gaussian);
    with_tail = with_tail && kept > 0;
    auto at = [&](int64_t b, int64_t t,
                  int64_t c) { /* rows before the first and behind the last */
                               if (t >= 0 && t < length)
                                 return x.values[(size_t)((b * length + t) * channels + c)];
                               bool kept_row = with_tail && t < 0 && t >= -kept;
                               return kept_row ? tail.values[(size_t)((kept + t) * channels + c)]
                                               : 0.0;
    };
    numbers expected((size_t)(batch * length * channels)), moved((size_t)(kept * channels));
    for (size_t i = 0; i < expected.size(); ++i) {
      int64_t c = (int64_t)i % channels, t = (int64_t)i / channels % length;
      int64_t b = (int64_t)i / channels / length;
      expected[i] = accumulate ? y.values[i] : 0;
      for (int64_t j = 0; j < taps; ++j)
        expected[i] +=
            w.values[(size_t)(c * taps + taps - 1 - j)] * at(b, reverse ? t + j : t - j, c);
    }
    for (size_t i = 0; i < moved.size(); ++i)
      moved[i] = at(0, length - kept + (int64_t)i / channels, (int64_t)i % channels);
    OK(attn_cuda_convolve(&y.tensor, accumulate, &x.tensor, &w.tensor,
                          with_tail ? &tail.tensor : NULL, reverse, NULL));
    compare("convolve", y, expected);
    if (with_tail) compare("convolve's tail", tail, moved);
  }
  report("convolution");
}

/* --- Rotary embedding ---------------------------------------------------------------------------
 */

static void test_rotation() {
  for (int round = 0; round < 60; ++round) {
    int64_t batch = 1 + below(3), length = 1 + below(40), heads = 1 + below(5);
    int64_t half = round % 2 ? 8 * (1 + below(8)) : 1 + below(40);
    int64_t rest = round % 3 ? 0 : round % 2 ? 8 * below(4) : below(9), n = 2 * half + rest;
    int64_t gap = below(2) ? 8 : 0;
    array y, x, cosines, sines;
    extents rows = {batch, length, heads, n};
    extents strides = {length * heads * (n + gap), heads * (n + gap), n + gap, 1};
    bool accumulate = below(2), in_place = !accumulate && below(4) == 0;
    attn_dtype dtype = some_dtype(), table = below(4) ? ATTN_F32 : ATTN_F64;
    make(x, dtype, rows, strides, gaussian);
    make(y, in_place ? dtype : some_dtype(), rows, {}, accumulate ? gaussian : nullptr);
    make(cosines, table, {batch, length, heads, half}, {0, half, 0, 1}, gaussian);
    make(sines, table, {batch, length, heads, half}, {0, half, 0, 1}, gaussian);
    double direction = below(2) ? 1 : -1;
    numbers expected = x.values;
    for (int64_t i = 0; i < batch * length * heads * half; ++i) {
      int64_t j = i % half, at = i / half * n + j;
      double c = cosines.values[(size_t)i], s = direction * sines.values[(size_t)i];
      double low = x.values[(size_t)at], high = x.values[(size_t)(at + half)];
      expected[(size_t)at] = low * c - high * s;
      expected[(size_t)(at + half)] = high * c + low * s;
    }
    for (size_t i = 0; accumulate && i < expected.size(); ++i) expected[i] += y.values[i];
    const array &target = in_place ? x : y;
    OK(attn_cuda_rotate(&target.tensor, accumulate, &x.tensor, &cosines.tensor, &sines.tensor,
                        direction, NULL));
    compare("rotate", target, expected);
  }
  report("rotary embedding");
}

/* --- AdamW --------------------------------------------------------------------------------------
 */

static void test_adamw() {
  for (int round = 0; round < 8; ++round) {
    int64_t n = round % 2 ? 1000 : 1003;
    attn_dtype dtype = round < 6 ? ATTN_F32 : ATTN_F64;
    array w, g, m, v, copy;
    make(w, dtype, {n}, {}, gaussian);
    make(g, dtype, {n}, {}, gaussian);
    make(m, dtype, {n}, {}, [] { return 0.1 * normal(); });
    make(v, dtype, {n}, {}, [] { return 0.1 * uniform(); });
    make(copy, round % 3 ? ATTN_BF16 : ATTN_F32, {n}, {}, NULL);
    double rate = 0.01, b1 = 0.9, b2 = 0.95, epsilon = 1e-8, decay = 0.1, c1 = 0.2, c2 = 0.1;
    bool copies = round != 5;
    double clip = round % 4 < 3 ? 0.05 : 1;
    OK(attn_cuda_adamw(&w.tensor, &g.tensor, &m.tensor, &v.tensor, copies ? &copy.tensor : NULL,
                       rate, b1, b2, epsilon, decay, c1, c2, clip, NULL));
    numbers nw = w.values, nm = m.values, nv = v.values;
    for (size_t i = 0; i < (size_t)n; ++i) {
      double gradient = clip * g.values[i];
      nm[i] = b1 * nm[i] + (1 - b1) * gradient;
      nv[i] = b2 * nv[i] + (1 - b2) * gradient * gradient;
      nw[i] -= rate * (nm[i] / c1 / (std::sqrt(nv[i] / c2) + epsilon) + decay * nw[i]);
    }
    compare("adamw w", w, nw);
    compare("adamw m", m, nm);
    compare("adamw v", v, nv);
    compare("adamw g", g, numbers((size_t)n, 0), 1e-30);
    if (copies) compare("adamw copy", copy, nw);
  }
  report("AdamW");
}

/* --- Speed --------------------------------------------------------------------------------------
 */

enum { BUFFERS = 3 }; /* that calls take in turn, so that none is in the cache */

struct buffers {
  attn_tensor at[BUFFERS];
};

static void fill_random(void *memory, size_t bytes, attn_dtype dtype) {
  std::vector<unsigned char> values((size_t)1 << 20);
  for (size_t i = 0; i < values.size(); i += (size_t)bytes_of(dtype))
    write_element(&values[i], dtype, normal());
  for (size_t at = 0; at < bytes; at += values.size())
    CUDA(cudaMemcpy((char *)memory + at, values.data(), std::min(values.size(), bytes - at),
                    cudaMemcpyHostToDevice));
}

static buffers big(attn_dtype dtype, int64_t rows, int64_t n, int64_t ld = 0) {
  buffers result;
  if (ld == 0) ld = n;
  for (attn_tensor &tensor : result.at) {
    tensor = attn_tensor{};
    tensor.dtype = dtype;
    tensor.device.kind = ATTN_CUDA;
    tensor.rank = 2;
    tensor.shape[0] = rows;
    tensor.shape[1] = n;
    tensor.stride[0] = ld;
    tensor.stride[1] = 1;
    size_t bytes = (size_t)(rows * ld) * (size_t)bytes_of(dtype);
    CUDA(cudaMalloc(&tensor.data, bytes));
    fill_random(tensor.data, bytes, dtype);
  }
  return result;
}

static void drop(buffers &all) {
  for (attn_tensor &tensor : all.at) CUDA(cudaFree(tensor.data));
}

static void bench() {
  measure_copy();
  for (attn_dtype dtype : {ATTN_BF16, ATTN_F32}) {
    const int64_t rows = 16384, n = 2816;
    double size = (double)(rows * n * bytes_of(dtype));
    buffers a = big(dtype, rows, n), b = big(dtype, rows, n), c = big(dtype, rows, n);
    buffers d = big(dtype, rows, n), e = big(dtype, rows, n), gap = big(dtype, rows, n, 2 * n);
    std::string t = dtype_name(dtype);
    auto print = [&](const char *name, double tensors, const std::function<void(int)> &call) {
      print_time((t + " " + name).c_str(), tensors * size, time_of(call));
    };
#define AT(buffer) (&buffer.at[i % BUFFERS])
    print("copy (add, one operand)", 2,
          [&](int i) { OK(attn_cuda_add(AT(a), 1, AT(b), 0, NULL, NULL)); });
    print("add", 3, [&](int i) { OK(attn_cuda_add(AT(a), 1, AT(b), 1, AT(c), NULL)); });
    print("add, rows with gaps", 3,
          [&](int i) { OK(attn_cuda_add(AT(a), 1, AT(gap), 1, AT(c), NULL)); });
    print("activate silu", 2,
          [&](int i) { OK(attn_cuda_activate(ATTN_SILU, AT(a), AT(b), NULL)); });
    print("activate gelu", 2,
          [&](int i) { OK(attn_cuda_activate(ATTN_GELU, AT(a), AT(b), NULL)); });
    print("gate silu", 3, [&](int i) { OK(attn_cuda_gate(ATTN_SILU, AT(a), AT(b), AT(c), NULL)); });
    print("gate_backward silu", 5, [&](int i) {
      OK(attn_cuda_gate_backward(ATTN_SILU, AT(a), false, AT(b), false, NULL, AT(c), AT(d), AT(e),
                                 NULL));
    });
    print("multiply_sum of 2", 5, [&](int i) {
      attn_tensor left[2] = {*AT(b), *AT(c)}, right[2] = {*AT(d), *AT(e)};
      OK(attn_cuda_multiply_sum(AT(a), false, 2, left, right, NULL));
    });
    {
      attn_tensor turned[BUFFERS];
      for (int i = 0; i < BUFFERS; ++i) {
        turned[i] = a.at[i];
        turned[i].stride[0] = 1;
        turned[i].stride[1] = rows;
      }
      print("transposing copy", 2,
            [&](int i) { OK(attn_cuda_add(&turned[i % BUFFERS], 1, AT(b), 0, NULL, NULL)); });
    }
    double *workspace;
    CUDA(cudaMalloc(&workspace, sizeof(double) * 2 * ATTN_CUDA_PARTS * 16384));
    print("sum_squares", 1, [&](int i) {
      OK(attn_cuda_sum_squares(AT(a), workspace + ATTN_CUDA_PARTS, workspace, NULL));
    });
    buffers vector = big(ATTN_F32, 1, 16384), sums = big(ATTN_F32, 1, rows * 16);
    auto flat = [](attn_tensor tensor, int64_t count) {
      tensor.rank = 1;
      tensor.shape[0] = count;
      tensor.stride[0] = 1;
      return tensor;
    };
    attn_tensor column = flat(vector.at[0], n), row_sum = flat(sums.at[0], rows);
    print("column_dot", 2,
          [&](int i) { OK(attn_cuda_column_dot(&column, false, AT(a), AT(b), workspace, NULL)); });
    print("row_dot", 2, [&](int i) { OK(attn_cuda_row_dot(&row_sum, AT(a), AT(b), NULL)); });
    double *factor, *mean;
    CUDA(cudaMalloc(&factor, (size_t)(rows * n)));
    CUDA(cudaMalloc(&mean, (size_t)(rows * n)));
    CUDA(cudaMemset(factor, 0, (size_t)(rows * n)));
    CUDA(cudaMemset(mean, 0, (size_t)(rows * n)));
    for (int64_t width : {64, 128, 1024, 2048, 4096, 8192, 16384}) {
      attn_tensor x[BUFFERS], y[BUFFERS], g[BUFFERS], z[BUFFERS];
      int64_t count = rows * n / width;
      auto view = [&](attn_tensor *to, const buffers &from) {
        for (int i = 0; i < BUFFERS; ++i) {
          to[i] = from.at[i];
          to[i].shape[0] = count;
          to[i].shape[1] = width;
          to[i].stride[0] = width;
        }
      };
      view(x, a);
      view(y, b);
      view(g, c);
      view(z, d);
      attn_tensor weight = flat(vector.at[0], width), d_weight = flat(vector.at[1], width);
      attn_tensor d_bias = flat(vector.at[2], width);
      std::string w = std::to_string(width);
      print(("rms norm " + w).c_str(), 2, [&](int i) {
        OK(attn_cuda_norm(&y[i % BUFFERS], &x[i % BUFFERS], &weight, NULL, (double)width, 1e-6,
                          factor, NULL, NULL));
      });
      print(("layer norm " + w).c_str(), 2, [&](int i) {
        OK(attn_cuda_norm(&y[i % BUFFERS], &x[i % BUFFERS], &weight, &d_bias, (double)width, 1e-6,
                          factor, mean, NULL));
      });
      print(("rms norm backward " + w).c_str(), 3, [&](int i) {
        OK(attn_cuda_norm_backward(&z[i % BUFFERS], false, NULL, &d_weight, NULL, &x[i % BUFFERS],
                                   &weight, &g[i % BUFFERS], (double)width, factor, NULL, workspace,
                                   NULL));
      });
      print(("rms norm backward, no weight " + w).c_str(), 3, [&](int i) {
        OK(attn_cuda_norm_backward(&z[i % BUFFERS], false, NULL, NULL, NULL, &x[i % BUFFERS], NULL,
                                   &g[i % BUFFERS], (double)width, factor, NULL, NULL, NULL));
      });
      print(("norm gate " + w).c_str(), 3, [&](int i) {
        OK(attn_cuda_norm_gate(&y[i % BUFFERS], &x[i % BUFFERS], &g[i % BUFFERS], (double)width,
                               1e-6, factor, NULL));
      });
      if (width == 1024 || width == 4096)
        print(("layer norm backward " + w).c_str(), 3, [&](int i) {
          OK(attn_cuda_norm_backward(&z[i % BUFFERS], false, NULL, &d_weight, &d_bias,
                                     &x[i % BUFFERS], &weight, &g[i % BUFFERS], (double)width,
                                     factor, mean, workspace, NULL));
        });
    }
    { /* head gates: [rows, heads, 128] dotted to [rows, heads] */
      attn_tensor heads_a[BUFFERS], heads_b[BUFFERS], heads_y = row_sum;
      for (int i = 0; i < BUFFERS; ++i) {
        heads_a[i] = a.at[i];
        heads_a[i].shape[0] = rows * n / 128;
        heads_a[i].shape[1] = heads_a[i].stride[0] = 128;
        heads_b[i] = heads_a[i];
        heads_b[i].data = b.at[i].data;
      }
      CUDA(cudaFree(sums.at[1].data));
      CUDA(cudaMalloc(&sums.at[1].data, (size_t)(rows * n / 128 * 4)));
      heads_y = flat(sums.at[1], rows * n / 128);
      print("row_dot of 128", 2, [&](int i) {
        OK(attn_cuda_row_dot(&heads_y, &heads_a[i % BUFFERS], &heads_b[i % BUFFERS], NULL));
      });
    }
    cudaFree(factor);
    cudaFree(mean);
    cudaFree(workspace);
    for (buffers *each : {&a, &b, &c, &d, &e, &gap, &vector, &sums}) drop(*each);
  }
  for (int64_t n : {32000, 64000, 151936, 256000}) {
    int64_t rows = 4096;
    buffers z = big(ATTN_F32, rows, n), dz = big(ATTN_BF16, rows, n);
    std::vector<int32_t> targets((size_t)rows, 17);
    int32_t *on_gpu = upload(targets);
    double *losses;
    CUDA(cudaMalloc(&losses, (size_t)rows * 8));
    std::string name = "cross_entropy of " + std::to_string(n);
    double size = (double)(rows * n);
    print_time(
        (name + " to bf16 (10 bytes)").c_str(), 10 * size,
        time_of([&](int i) { OK(attn_cuda_cross_entropy(AT(z), on_gpu, 1, AT(dz), losses, NULL)); },
                10));
    print_time(
        (name + " in place (12 bytes)").c_str(), 12 * size,
        time_of([&](int i) { OK(attn_cuda_cross_entropy(AT(z), on_gpu, 1, NULL, losses, NULL)); },
                10));
    cudaFree(on_gpu);
    cudaFree(losses);
    drop(z);
    drop(dz);
  }
  {
    const int64_t m = 64000, n = 1024, rows = 16384;
    buffers table = big(ATTN_F32, m, n), x = big(ATTN_BF16, rows, n);
    buffers weights = big(ATTN_BF16, m, n);
    std::vector<int32_t> index((size_t)rows);
    for (int32_t &i : index) /* near Zipf's law */
      i = (int32_t)std::min<double>((double)m - 1, std::exp(uniform() * std::log((double)m)) - 1);
    int32_t *on_gpu = upload(index);
    void *workspace;
    CUDA(cudaMalloc(&workspace, (size_t)(m + 1 + 2 * rows) * 4));
    print_time("gather of 16384 x 1024 bf16", (double)(rows * n * 4),
               time_of([&](int i) { OK(attn_cuda_gather(AT(x), 1, AT(weights), on_gpu, NULL)); }));
    print_time("scatter_add of 16384 x 1024, table f32", (double)(rows * n * 2),
               time_of([&](int i) {
                 OK(attn_cuda_scatter_add(AT(table), 1, AT(x), on_gpu, workspace, NULL));
               }));
    buffers g = big(ATTN_F32, m, n), m1 = big(ATTN_F32, m, n), v1 = big(ATTN_F32, m, n);
    for (attn_tensor &tensor : v1.at) CUDA(cudaMemset(tensor.data, 0x3a, (size_t)(m * n) * 4));
    print_time("adamw of 65.5M with bf16 copy", (double)(m * n) * 34, time_of([&](int i) {
                 OK(attn_cuda_adamw(AT(table), AT(g), AT(m1), AT(v1), AT(weights), 1e-3, 0.9, 0.95,
                                    1e-8, 0.1, 0.5, 0.5, 1, NULL));
               }));
    cudaFree(workspace);
    cudaFree(on_gpu);
    for (buffers *each : {&table, &x, &weights, &g, &m1, &v1}) drop(*each);
    buffers cosines = big(ATTN_F32, 16384, 64), sines = big(ATTN_F32, 16384, 64);
    double *theta, *values, *sum;
    CUDA(cudaMalloc(&theta, 64 * 8));
    CUDA(cudaMemset(theta, 0, 64 * 8));
    CUDA(cudaMalloc(&values, 16384 * 8));
    CUDA(cudaMemset(values, 0, 16384 * 8));
    CUDA(cudaMalloc(&sum, 8));
    print_time("angles of 16384 x 64", 16384 * 64 * 8.0, time_of([&](int i) {
                 OK(attn_cuda_angles(AT(cosines), AT(sines), theta, 0, NULL, NULL));
               }));
    print_time("total of 16384", 16384 * 8.0,
               time_of([&](int) { OK(attn_cuda_total(values, 16384, 1, sum, ATTN_F64, NULL)); }));
  }
}

int main(int count, char **arguments) {
  if (count > 1 && strcmp(arguments[1], "bench") == 0) {
    bench();
    return 0;
  }
  if (count > 1) random_state = strtoull(arguments[1], NULL, 10);
  test_elementwise();
  test_sums();
  test_norms();
  test_cross_entropy();
  test_lookups();
  test_rotation();
  test_convolution();
  test_adamw();
  CUDA(cudaDeviceSynchronize());
  printf("%d checks, %d failures\n", checks, failures);
  return failures > 0;
}

/* Blocks of GGUF files on the GPU (kernels/cuda/blocks.h) against decoders written from the
 * formats' definitions, byte by byte; with `bench`, their speed. */
#include "support.cuh"

typedef std::vector<double> numbers;
typedef std::vector<unsigned char> bytes;

static double gaussian() {
  return normal();
}

/* --- The formats --------------------------------------------------------------------------------
 *
 * A decoder walks the bytes of a block and puts what they hold where it belongs. */

static double f16_at(const unsigned char *p) {
  return read_element(p, ATTN_F16);
}

static void decode_q8_0(const unsigned char *p, double *x) {
  for (int j = 0; j < 32; ++j) x[j] = f16_at(p) * (signed char)p[2 + j];
}
static void decode_q4_0(const unsigned char *p, double *x) {
  for (int j = 0; j < 16; ++j) {
    x[j] = f16_at(p) * (p[2 + j] % 16 - 8);
    x[j + 16] = f16_at(p) * (p[2 + j] / 16 - 8);
  }
}
static void decode_q4_1(const unsigned char *p, double *x) {
  for (int j = 0; j < 16; ++j) {
    x[j] = f16_at(p) * (p[4 + j] % 16) + f16_at(p + 2);
    x[j + 16] = f16_at(p) * (p[4 + j] / 16) + f16_at(p + 2);
  }
}
static void decode_five(const unsigned char *p, const unsigned char *h, double bias, double minimum,
                        double *x) {
  for (int j = 0; j < 16; ++j) {
    int low = h[4 + j] % 16 + (h[j / 8] >> (j % 8) & 1) * 16;
    int high = h[4 + j] / 16 + (h[2 + j / 8] >> (j % 8) & 1) * 16;
    x[j] = f16_at(p) * (low - bias) + minimum;
    x[j + 16] = f16_at(p) * (high - bias) + minimum;
  }
}
static void decode_q5_0(const unsigned char *p, double *x) {
  decode_five(p, p + 2, 16, 0, x);
}
static void decode_q5_1(const unsigned char *p, double *x) {
  decode_five(p, p + 4, 0, f16_at(p + 2), x);
}
static void decode_q2_k(const unsigned char *p, double *x) {
  for (int half = 0; half < 2; ++half)
    for (int j = 0; j < 32; ++j)
      for (int k = 0; k < 4; ++k) {
        int i = half * 128 + k * 32 + j, q = p[16 + half * 32 + j] >> (2 * k) & 3;
        x[i] = f16_at(p + 80) * (p[i / 16] % 16) * q - f16_at(p + 82) * (p[i / 16] / 16);
      }
}
static void decode_q3_k(const unsigned char *p, double *x) {
  int scale[16];
  for (int j = 0; j < 8; ++j) {
    scale[j] = p[96 + j] % 16;
    scale[j + 8] = p[96 + j] / 16;
  }
  for (int j = 0; j < 4; ++j)
    for (int k = 0; k < 4; ++k) scale[j + 4 * k] += (p[104 + j] >> (2 * k) & 3) * 16;
  for (int half = 0; half < 2; ++half)
    for (int j = 0; j < 32; ++j)
      for (int k = 0; k < 4; ++k) {
        int i = half * 128 + k * 32 + j, q = p[32 + half * 32 + j] >> (2 * k) & 3;
        if (!(p[j] >> (half * 4 + k) & 1)) q -= 4;
        x[i] = f16_at(p + 108) * (scale[i / 16] - 32) * q;
      }
}
static void decode_k(const unsigned char *p, const unsigned char *high, const unsigned char *low,
                     double *x) {
  int scale[8], minimum[8];
  const unsigned char *s = p + 4;
  for (int j = 0; j < 4; ++j) {
    scale[j] = s[j] % 64;
    minimum[j] = s[j + 4] % 64;
    scale[j + 4] = s[j + 8] % 16 + s[j] / 64 * 16;
    minimum[j + 4] = s[j + 8] / 16 + s[j + 4] / 64 * 16;
  }
  for (int pair = 0; pair < 4; ++pair)
    for (int j = 0; j < 32; ++j)
      for (int k = 0; k < 2; ++k) {
        int g = 2 * pair + k, q = low[pair * 32 + j] >> (4 * k) & 15;
        if (high) q += (high[j] >> g & 1) * 16;
        x[g * 32 + j] = f16_at(p) * scale[g] * q - f16_at(p + 2) * minimum[g];
      }
}
static void decode_q4_k(const unsigned char *p, double *x) {
  decode_k(p, NULL, p + 16, x);
}
static void decode_q5_k(const unsigned char *p, double *x) {
  decode_k(p, p + 16, p + 48, x);
}
static void decode_q6_k(const unsigned char *p, double *x) {
  for (int half = 0; half < 2; ++half)
    for (int j = 0; j < 32; ++j) {
      unsigned char a = p[half * 64 + j], b = p[half * 64 + 32 + j], h = p[128 + half * 32 + j];
      int q[4] = {a % 16, b % 16, a / 16, b / 16};
      for (int k = 0; k < 4; ++k) {
        int i = half * 128 + k * 32 + j;
        x[i] =
            f16_at(p + 208) * (signed char)p[192 + i / 16] * (q[k] + (h >> (2 * k) & 3) * 16 - 32);
      }
    }
}

struct type {
  const char *name;
  attn_block_type type;
  int elements, size;
  void (*decode)(const unsigned char *, double *);
  int scales[2]; /* where a block has float16 numbers; -1: nowhere */
};

static const type types[] = {
    {"Q8_0", ATTN_BLOCK_Q8_0, 32, 34, decode_q8_0, {0, -1}},
    {"Q4_0", ATTN_BLOCK_Q4_0, 32, 18, decode_q4_0, {0, -1}},
    {"Q4_1", ATTN_BLOCK_Q4_1, 32, 20, decode_q4_1, {0, 2}},
    {"Q5_0", ATTN_BLOCK_Q5_0, 32, 22, decode_q5_0, {0, -1}},
    {"Q5_1", ATTN_BLOCK_Q5_1, 32, 24, decode_q5_1, {0, 2}},
    {"Q2_K", ATTN_BLOCK_Q2_K, 256, 84, decode_q2_k, {80, 82}},
    {"Q3_K", ATTN_BLOCK_Q3_K, 256, 110, decode_q3_k, {108, -1}},
    {"Q4_K", ATTN_BLOCK_Q4_K, 256, 144, decode_q4_k, {0, 2}},
    {"Q5_K", ATTN_BLOCK_Q5_K, 256, 176, decode_q5_k, {0, 2}},
    {"Q6_K", ATTN_BLOCK_Q6_K, 256, 210, decode_q6_k, {208, -1}},
    {"F16", ATTN_BLOCK_F16, 1, 2, NULL, {0, -1}},
    {"BF16", ATTN_BLOCK_BF16, 1, 2, NULL, {-1, -1}},
    {"F32", ATTN_BLOCK_F32, 1, 4, NULL, {-1, -1}},
    {"F64", ATTN_BLOCK_F64, 1, 8, NULL, {-1, -1}},
};

static attn_dtype plain_dtype(attn_block_type type) {
  return type == ATTN_BLOCK_F16    ? ATTN_F16
         : type == ATTN_BLOCK_BF16 ? ATTN_BF16
         : type == ATTN_BLOCK_F32  ? ATTN_F32
                                   : ATTN_F64;
}

/* Random blocks and what they stand for, rounded to float32 as a product of the CPU would read it.
 */
static bytes random_blocks(const type &t, int64_t count, numbers *values) {
  bytes blocks((size_t)(count / t.elements * t.size));
  for (unsigned char &b : blocks) b = (unsigned char)random_bits();
  if (values) values->resize((size_t)count);
  for (int64_t i = 0; i < count / t.elements; ++i) {
    unsigned char *block = &blocks[(size_t)(i * t.size)];
    if (!t.decode) {
      write_element(block, plain_dtype(t.type), normal());
      if (values) (*values)[(size_t)i] = (float)read_element(block, plain_dtype(t.type));
      continue;
    }
    for (int place : t.scales)
      if (place >= 0) write_element(block + place, ATTN_F16, 0.02 * normal());
    if (!values) continue;
    double x[256];
    t.decode(block, x);
    for (int j = 0; j < t.elements; ++j) (*values)[(size_t)(i * t.elements + j)] = (float)x[j];
  }
  return blocks;
}

/* Device memory that begins `shift` bytes into an allocation that it fills. */
struct device_bytes {
  char *memory = NULL, *data = NULL;
  device_bytes(const bytes &from, int shift) {
    CUDA(cudaMalloc(&memory, from.size() + (size_t)shift));
    data = memory + shift;
    CUDA(cudaMemcpy(data, from.data(), from.size(), cudaMemcpyHostToDevice));
  }
  ~device_bytes() {
    cudaFree(memory);
  }
};

static int some_shift(const type &t) {
  return t.size % 4 == 0 ? 4 * below(5) : 2 * below(9);
}

/* --- Tests --------------------------------------------------------------------------------------
 */

static void test_expand() {
  static const attn_dtype targets[] = {ATTN_F32, ATTN_BF16, ATTN_F64, ATTN_F16};
  for (const type &t : types)
    for (int round = 0; round < 8; ++round) {
      int64_t n = t.elements * (t.elements == 1 ? 1 + below(100) : 1 + below(20));
      int64_t rows = 1 + below(40);
      numbers values;
      bytes blocks = random_blocks(t, rows * n, &values);
      device_bytes w(blocks, t.size == 8 ? 0 : some_shift(t));
      bool chosen = round % 2;
      std::vector<int32_t> index((size_t)rows);
      for (int32_t &i : index) i = below((int)rows);
      bytes raw((unsigned char *)index.data(), (unsigned char *)(index.data() + rows));
      device_bytes on_gpu(raw, 0);
      array y;
      make(y, targets[round % 4], {rows, n}, {n + (below(2) ? 8 : below(3)), 1}, NULL, below(2));
      OK(attn_cuda_blocks_expand(t.type, w.data, chosen ? (const int32_t *)on_gpu.data : NULL,
                                 &y.tensor, NULL));
      numbers expected((size_t)(rows * n));
      for (int64_t i = 0; i < rows * n; ++i) {
        int64_t row = chosen ? index[(size_t)(i / n)] : i / n;
        unsigned char rounded[8];
        write_element(rounded, y.tensor.dtype, values[(size_t)(row * n + i % n)]);
        expected[(size_t)i] = read_element(rounded, y.tensor.dtype);
      }
      compare(std::string("expand ") + t.name, y, expected, 1e-30);
    }
  report("expand");
}

static void test_matvec() {
  static const int64_t outputs[] = {1, 16, 50, 200};
  for (const type &t : types) {
    if (!t.decode) continue;
    for (int round = 0; round < 24; ++round) {
      int64_t inputs = t.elements == 32 ? 32 * (1 + below(round % 3 ? 20 : 150))
                                        : 256 * (1 + below(round % 3 ? 4 : 17));
      int64_t n = outputs[below(4)], rows = 1 + below(8);
      numbers w;
      bytes blocks = random_blocks(t, n * inputs, &w);
      device_bytes on_gpu(blocks, some_shift(t));
      static const attn_dtype dtypes[] = {ATTN_BF16, ATTN_F32, ATTN_F16};
      attn_dtype dtype = dtypes[round % 3];
      bool accumulate = below(2);
      array x, y;
      make(x, dtype, {rows, inputs}, {inputs + (below(2) ? 8 : 0), 1}, gaussian);
      make(y, below(2) ? ATTN_F32 : dtype, {rows, n}, {n + below(3), 1},
           accumulate ? std::function<double()>(gaussian) : std::function<double()>());
      OK(attn_cuda_blocks_matvec(t.type, on_gpu.data, &y.tensor, accumulate, &x.tensor, NULL));
      numbers expected((size_t)(rows * n));
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t o = 0; o < n; ++o) {
          double sum = accumulate ? y.values[(size_t)(r * n + o)] : 0;
          for (int64_t i = 0; i < inputs; ++i)
            sum += x.values[(size_t)(r * inputs + i)] * w[(size_t)(o * inputs + i)];
          expected[(size_t)(r * n + o)] = sum;
        }
      char name[96];
      snprintf(name, sizeof name, "matvec %s, %lld rows of %s, %lld x %lld", t.name,
               (long long)rows, dtype_name(dtype), (long long)n, (long long)inputs);
      /* Codes and minima are summed apart, so sums lose more than the result's size says. */
      double bound = 2e-6 * std::sqrt((double)inputs / 256) + 3e-6;
      compare(name, y, expected, y.tensor.dtype == ATTN_F32 ? bound : 0);
    }
    { /* each row has the bits that it has alone */
      const int64_t n = 40, inputs = 1024;
      bytes blocks = random_blocks(t, n * inputs, NULL);
      device_bytes on_gpu(blocks, 0);
      array x, all, one;
      make(x, ATTN_BF16, {8, inputs}, {}, gaussian);
      make(all, ATTN_F32, {8, n}, {}, NULL);
      make(one, ATTN_F32, {8, n}, {}, NULL);
      OK(attn_cuda_blocks_matvec(t.type, on_gpu.data, &all.tensor, false, &x.tensor, NULL));
      for (int r = 0; r < 8; ++r) {
        attn_tensor row = x.tensor, to = one.tensor;
        row.shape[0] = to.shape[0] = 1;
        row.data = (char *)row.data + r * inputs * 2;
        to.data = (char *)to.data + r * n * 4;
        OK(attn_cuda_blocks_matvec(t.type, on_gpu.data, &to, false, &row, NULL));
      }
      compare(std::string("rows alone ") + t.name, all, read(one, "one"), 1e-30);
    }
  }
  report("matvec");
}

/* --- Speed --------------------------------------------------------------------------------------
 */

static attn_tensor matrix(attn_dtype dtype, int64_t rows, int64_t columns) {
  array made;
  make(made, dtype, {rows, columns}, {}, rows * columns < 100000 ? gaussian : NULL);
  attn_tensor tensor = made.tensor;
  made.memory = NULL; /* kept */
  return tensor;
}

static void bench() {
  measure_copy();
  static const int64_t sizes[][2] = {{4096, 4096}, {14336, 4096}, {4096, 14336}};
  for (const type &t : types) {
    if (!t.decode) continue;
    for (auto &size : sizes) {
      int64_t n = size[0], k = size[1];
      bool main_type =
          t.type == ATTN_BLOCK_Q4_1 || t.type == ATTN_BLOCK_Q8_0 || t.type == ATTN_BLOCK_Q4_K;
      if (!main_type && k == 14336) continue;
      bytes row = random_blocks(t, k, NULL);
      size_t all = row.size() * (size_t)n;
      int copies = (int)std::max<size_t>(2, ((size_t)200 << 20) / all);
      bytes whole(all);
      for (int64_t o = 0; o < n; ++o)
        memcpy(&whole[(size_t)o * row.size()], row.data(), row.size());
      std::vector<device_bytes *> w;
      for (int i = 0; i < copies; ++i) w.push_back(new device_bytes(whole, 0));
      for (attn_dtype dtype : {ATTN_BF16, ATTN_F32})
        for (int64_t m : {1, 4, 8}) {
          if ((dtype == ATTN_F32 || m == 4) && (!main_type || n == 4096)) continue;
          attn_tensor x = matrix(dtype, m, k), y = matrix(dtype, m, n);
          char name[96];
          snprintf(name, sizeof name, "%s %lld x %lld, %lld rows %s", t.name, (long long)n,
                   (long long)k, (long long)m, dtype_name(dtype));
          print_time(name, (double)all, time_of([&](int i) {
                       OK(attn_cuda_blocks_matvec(t.type, w[(size_t)(i % copies)]->data, &y, false,
                                                  &x, NULL));
                     }));
          cudaFree(x.data);
          cudaFree(y.data);
        }
      if (n == 14336) {
        attn_tensor y = matrix(ATTN_BF16, n, k);
        print_time(
            (std::string(t.name) + " expand to bf16").c_str(), (double)all + 2.0 * n * k,
            time_of([&](int i) {
              OK(attn_cuda_blocks_expand(t.type, w[(size_t)(i % copies)]->data, NULL, &y, NULL));
            }));
        cudaFree(y.data);
      }
      for (device_bytes *each : w) delete each;
    }
  }
}

int main(int count, char **arguments) {
  if (count > 1 && strcmp(arguments[1], "bench") == 0) {
    bench();
    return 0;
  }
  test_expand();
  test_matvec();
  CUDA(cudaDeviceSynchronize());
  printf("%d checks, %d failures\n", checks, failures);
  return failures > 0;
}

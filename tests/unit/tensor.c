/* Tensors: views, copies between dtypes, hostile shapes, DLPack. */
#include "support/test.h"

#include "base/fault.h"
#include "base/memory.h"
#include "base/random.h"
#include "files/safetensors.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* A contiguous int64 tensor that counts 0, 1, 2, ... so that an element tells where it lay. */
static attn_tensor counting(int rank, const int64_t *shape) {
  attn_tensor tensor;
  assert_ok(attn_tensor_create(ATTN_I64, rank, shape, &tensor));
  int64_t count = attn_tensor_count(&tensor);
  for (int64_t i = 0; i < count; ++i) ((int64_t *)tensor.data)[i] = i;
  return tensor;
}

#define SHAPE(...)                                                                                 \
  (sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]) {                              \
    __VA_ARGS__                                                                                    \
  }

static void assert_elements(const attn_tensor *tensor, const int64_t *expected) {
  int64_t index[ATTN_MAX_RANK] = {0};
  int64_t count = attn_tensor_count(tensor);
  for (int64_t n = 0; n < count; ++n) {
    assert_true(attn_tensor_get(tensor, index) == (double)expected[n]);
    for (int axis = tensor->rank - 1; axis >= 0 && ++index[axis] == tensor->shape[axis]; --axis)
      index[axis] = 0;
  }
}

static void views_see_the_right_elements(void **state) {
  (void)state;
  attn_tensor t = counting(SHAPE(2, 3, 4)), view;
  assert_ok(attn_tensor_slice(&t, 1, 1, 2, &view));
  assert_elements(&view, (int64_t[]){4, 5, 6, 7, 8, 9, 10, 11, 16, 17, 18, 19, 20, 21, 22, 23});
  assert_false(attn_tensor_is_contiguous(&view));
  assert_ok(attn_tensor_select(&view, 2, 3, &view)); /* a view of a view, in place */
  assert_int_equal(view.rank, 2);
  assert_elements(&view, (int64_t[]){7, 11, 19, 23});
  assert_ok(attn_tensor_permute(&t, (int[]){2, 0, 1}, &view));
  assert_elements(&view, (int64_t[]){0, 4, 8,  12, 16, 20, 1, 5, 9,  13, 17, 21,
                                     2, 6, 10, 14, 18, 22, 3, 7, 11, 15, 19, 23});
  assert_ok(attn_tensor_select(&t, 0, 1, &view));
  assert_ok(attn_tensor_select(&view, 0, 2, &view));
  assert_ok(attn_tensor_select(&view, 0, 3, &view));
  assert_int_equal(view.rank, 0);
  assert_true(attn_tensor_get(&view, NULL) == 23);
  assert_ok(attn_tensor_slice(&t, 2, 4, 0, &view)); /* empty, at the very end */
  assert_int_equal(attn_tensor_count(&view), 0);
  assert_true(attn_tensor_is_contiguous(&view));
  attn_tensor_destroy(&t);
}

static void views_out_of_range_are_refused(void **state) {
  (void)state;
  attn_tensor t = counting(SHAPE(2, 3)), view;
  assert_int_equal(attn_tensor_slice(&t, 2, 0, 1, &view), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_tensor_slice(&t, -1, 0, 1, &view), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_tensor_slice(&t, 1, 2, 2, &view), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_tensor_slice(&t, 1, -1, 1, &view), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_tensor_slice(&t, 1, 1, INT64_MAX, &view), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_tensor_select(&t, 1, 3, &view), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_tensor_permute(&t, (int[]){0, 0}, &view), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_tensor_permute(&t, (int[]){0, 2}, &view), ATTN_INVALID_ARGUMENT);
  attn_tensor_destroy(&t);
}

/* Wherever a reshape succeeds it must read the elements in the same order as before. */
static void reshape_keeps_the_order(void **state) {
  (void)state;
  static const int64_t shapes[][ATTN_MAX_RANK + 1] = {
      /* rank, extents: all of 48 elements */
      {1, 48},         {2, 6, 8},          {2, 8, 6},     {3, 2, 3, 8},          {3, 4, 12, 1},
      {4, 1, 6, 4, 2}, {5, 2, 1, 3, 1, 8}, {3, 16, 3, 1}, {6, 2, 2, 2, 2, 3, 1},
  };
  enum { SHAPES = sizeof shapes / sizeof *shapes };
  int allowed = 0;
  for (int from = 0; from < SHAPES; ++from)
    for (int variant = 0; variant < 3; ++variant) {
      int rank = (int)shapes[from][0];
      int64_t extents[ATTN_MAX_RANK];
      memcpy(extents, shapes[from] + 1, (size_t)rank * sizeof *extents);
      if (variant == 1) extents[rank - 1] += 2; /* rows with gaps */
      if (variant == 2 && rank > 1) extents[rank - 2] += 1;
      attn_tensor whole = counting(rank, extents), t = whole;
      if (variant == 1) assert_ok(attn_tensor_slice(&t, rank - 1, 1, shapes[from][rank], &t));
      if (variant == 2 && rank > 1)
        assert_ok(attn_tensor_slice(&t, rank - 2, 1, shapes[from][rank - 1], &t));
      int64_t order[48], index[ATTN_MAX_RANK] = {0};
      for (int n = 0; n < 48; ++n) {
        order[n] = (int64_t)attn_tensor_get(&t, index);
        for (int a = rank - 1; a >= 0 && ++index[a] == t.shape[a]; --a) index[a] = 0;
      }
      for (int to = 0; to < SHAPES; ++to) {
        attn_tensor view;
        attn_status status = attn_tensor_reshape(&t, (int)shapes[to][0], shapes[to] + 1, &view);
        if (to == from || attn_tensor_is_contiguous(&t)) assert_int_equal(status, ATTN_OK);
        if (status != ATTN_OK) continue;
        assert_elements(&view, order);
        ++allowed;
      }
      attn_tensor_destroy(&whole);
    }
  assert_true(allowed > 100);
}

static void reshape_infers_and_refuses(void **state) {
  (void)state;
  attn_tensor t = counting(SHAPE(4, 6)), view;
  assert_ok(attn_tensor_reshape(&t, SHAPE(2, -1, 3), &view));
  assert_int_equal(view.shape[1], 4);
  assert_int_equal(attn_tensor_reshape(&t, SHAPE(-1, 5), &view), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_tensor_reshape(&t, SHAPE(-1, -1), &view), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_tensor_reshape(&t, SHAPE(25), &view), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_tensor_reshape(&t, 9, NULL, &view), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_tensor_reshape(&t, SHAPE(INT64_MAX, INT64_MAX), &view), ATTN_INVALID_SHAPE);
  attn_tensor turned;
  assert_ok(attn_tensor_permute(&t, (int[]){1, 0}, &turned));
  assert_int_equal(attn_tensor_reshape(&turned, SHAPE(24), &view), ATTN_INVALID_SHAPE);
  attn_tensor empty = t;
  empty.shape[0] = 0;
  assert_ok(attn_tensor_reshape(&empty, SHAPE(6, 0, 2), &view));
  assert_int_equal(attn_tensor_count(&view), 0);
  attn_tensor_destroy(&t);
}

static void expand_repeats(void **state) {
  (void)state;
  attn_tensor t = counting(SHAPE(3, 1)), view;
  assert_ok(attn_tensor_expand(&t, SHAPE(2, 3, 2), &view));
  assert_elements(&view, (int64_t[]){0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2});
  assert_int_equal(attn_tensor_expand(&t, SHAPE(4, 2), &view), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_tensor_expand(&t, SHAPE(3), &view), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_tensor_expand(&t, SHAPE(3, -1), &view), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_tensor_expand(&t, SHAPE(INT64_MAX, 3, 5), &view), ATTN_INVALID_SHAPE);
  attn_tensor_destroy(&t);
}

static void hostile_shapes_are_refused(void **state) {
  (void)state;
  attn_tensor t;
  assert_int_equal(attn_tensor_wrap(NULL, ATTN_F32, SHAPE(-1), &t), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_tensor_wrap(NULL, ATTN_F32, 9, NULL, &t), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_tensor_wrap(NULL, ATTN_F32, -1, NULL, &t), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_tensor_wrap(NULL, ATTN_F32, 2, NULL, &t), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_tensor_wrap(NULL, (attn_dtype)99, SHAPE(1), &t), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_tensor_wrap(NULL, ATTN_F32, SHAPE(1ll << 31, 1ll << 31), &t),
                   ATTN_INVALID_SHAPE);
  assert_int_equal(attn_tensor_wrap(NULL, ATTN_F64, SHAPE(1ll << 60), &t), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_tensor_wrap(NULL, ATTN_F64, SHAPE(INT64_MAX, 0, INT64_MAX), &t),
                   ATTN_INVALID_SHAPE); /* empty, but its strides would overflow */
  assert_int_equal(attn_tensor_create(ATTN_F64, SHAPE(1ll << 59), &t), ATTN_OUT_OF_MEMORY);
  attn_fault_arm(ATTN_FAULT_ALLOC, 0);
  attn_status status = attn_tensor_create(ATTN_F64, SHAPE(3), &t);
  assert_true(attn_fault_disarm(ATTN_FAULT_ALLOC));
  assert_int_equal(status, ATTN_OUT_OF_MEMORY);
  assert_null(t.data);
  assert_ok(attn_tensor_create(ATTN_F64, 0, NULL, &t));
  assert_int_equal(attn_tensor_count(&t), 1);
  attn_tensor_destroy(&t);
  attn_tensor_destroy(&t); /* a destroyed tensor is empty: twice is harmless */
}

/* The nearest number with `fraction` bits and least exponent `least`, ties to even. */
static double nearest(double value, int fraction, int least, int greatest) {
  if (value == 0 || !isfinite(value)) return value;
  int exponent;
  frexp(value, &exponent);
  exponent = exponent - 1 < least ? least : exponent - 1;
  double place = ldexp(1, exponent - fraction);
  double rounded = rint(value / place) * place;
  return fabs(rounded) >= ldexp(1, greatest + 1) ? copysign(INFINITY, value) : rounded;
}

/* float64 goes to a narrower format with one rounding: by way of float32 a value just beside a tie
 * would first become the tie and then round the wrong way. */
static void copies_round_once(void **state) {
  (void)state;
  enum { COUNT = 30000 };
  static const struct {
    attn_dtype dtype;
    int fraction, least, greatest;
  } formats[] = {{ATTN_F32, 23, -126, 127},
                 {ATTN_BF16, 7, -126, 127},
                 {ATTN_F16, 10, -14, 15},
                 {ATTN_F8_E5M2, 2, -14, 15}};
  attn_random random = {.seed = 5};
  double *x = malloc(COUNT * sizeof *x);
  for (size_t f = 0; f < sizeof formats / sizeof *formats; ++f) {
    for (int i = 0; i < COUNT; ++i) {
      double scale = ldexp(1, (int)attn_random_below(&random, 60) - 40);
      double exact = ldexp((double)attn_random_below(&random, 512) + 0.5, -formats[f].fraction);
      double nudge = ldexp((double)attn_random_below(&random, 3) - 1, -40);
      x[i] = (i & 1 ? -1 : 1) * scale * (i % 4 ? exact + nudge : attn_random_normal(&random));
    }
    x[0] = INFINITY;
    x[1] = NAN;
    x[2] = 1e300;
    x[3] = -1e-300;
    x[4] = 0x1.ffffffffp127;
    attn_tensor t = test_from_doubles(x, formats[f].dtype, SHAPE(COUNT));
    double *y = test_to_doubles(&t);
    for (int i = 0; i < COUNT; ++i) {
      double expected = nearest(x[i], formats[f].fraction, formats[f].least, formats[f].greatest);
      if (!(y[i] == expected || (isnan(expected) && isnan(y[i]))))
        fail_msg("%a became %a in %s, expected %a", x[i], y[i], attn_dtype_name(formats[f].dtype),
                 expected);
    }
    free(y);
    attn_tensor_destroy(&t);
  }
  free(x);
}

/* What PyTorch makes of the same numbers and patterns (fixtures/make_float8.py), the patterns
 * strided too: the loops that vectorise and the one that does not. */
static void float8_is_as_pytorch_has_it(void **state) {
  (void)state;
  static const struct {
    const char *name;
    attn_dtype dtype;
    uint8_t nan;
  } formats[] = {
      {"e4m3", ATTN_F8_E4M3, 0x7f}, {"e5m2", ATTN_F8_E5M2, 0x7f}, {"e8m0", ATTN_F8_E8M0, 0xff}};
  attn_safetensors *file;
  attn_tensor numbers;
  char name[32];
  assert_ok(
      attn_safetensors_open(ATTN_SOURCE_DIR "/tests/unit/fixtures/float8.safetensors", &file));
  assert_ok(attn_safetensors_find(file, "numbers", &numbers));
  int64_t count = attn_tensor_count(&numbers);
  for (int f = 0; f < 3; ++f) {
    attn_tensor expected, patterns, values, found;
    assert_ok(attn_safetensors_find(file, formats[f].name, &expected));
    assert_int_equal(expected.dtype, formats[f].dtype);
    assert_ok(attn_tensor_create(formats[f].dtype, 1, numbers.shape, &found));
    assert_ok(attn_tensor_copy(&numbers, &found));
    for (int64_t i = 0; i < count; ++i) {
      uint8_t got = ((uint8_t *)found.data)[i], want = ((uint8_t *)expected.data)[i];
      float number = ((const float *)numbers.data)[i];
      if (isnan(number) ? (got & 0x7f) != (formats[f].nan & 0x7f) : got != want)
        fail_msg("%s: %a became %02x, expected %02x", formats[f].name, (double)number, got, want);
    }
    attn_tensor_destroy(&found);
    snprintf(name, sizeof name, "patterns.%s", formats[f].name);
    assert_ok(attn_safetensors_find(file, name, &patterns));
    snprintf(name, sizeof name, "values.%s", formats[f].name);
    assert_ok(attn_safetensors_find(file, name, &values));
    static const attn_dtype wider[] = {ATTN_F32, ATTN_BF16, ATTN_F64};
    for (int w = 0; w < 3; ++w)
      for (int step = 1; step <= 2; ++step) { /* bfloat16 holds each of them, too */
        attn_tensor some = patterns;
        some.shape[0] /= step;
        some.stride[0] = step;
        assert_ok(attn_tensor_create(wider[w], 1, some.shape, &found));
        assert_ok(attn_tensor_copy(&some, &found));
        for (int64_t i = 0; i < some.shape[0]; ++i) {
          int64_t at = i * step;
          double got = attn_tensor_get(&found, &i), want = attn_tensor_get(&values, &at);
          if (isnan(want) ? !isnan(got) : got != want || signbit(got) != signbit(want))
            fail_msg("%s %02x became %a, expected %a", formats[f].name, (int)at, got, want);
        }
        attn_tensor_destroy(&found);
      }
  }
  attn_safetensors_close(file);
}

/* Every pair of floating dtypes, between strided tensors and into gapless ones. */
static void copies_between_dtypes_and_strides(void **state) {
  (void)state;
  static const attn_dtype dtypes[] = {ATTN_F64, ATTN_F32, ATTN_BF16, ATTN_F16};
  double x[60];
  for (int i = 0; i < 60; ++i) x[i] = i - 30; /* exact in all of them */
  for (int a = 0; a < 4; ++a)
    for (int b = 0; b < 4; ++b) {
      attn_tensor from = test_from_doubles(x, dtypes[a], SHAPE(3, 4, 5)), to, turned, back;
      assert_ok(attn_tensor_create(dtypes[b], SHAPE(5, 3, 4), &to));
      assert_ok(attn_tensor_permute(&from, (int[]){2, 0, 1}, &turned));
      assert_ok(attn_tensor_copy(&turned, &to));
      for (int64_t i = 0; i < 60; ++i)
        assert_true(attn_tensor_get(&to, (int64_t[]){i % 5, i / 20, i / 5 % 4}) == x[i]);
      assert_ok(attn_tensor_create(dtypes[b], SHAPE(3, 4, 5), &back));
      assert_ok(attn_tensor_copy(&from, &back));
      double *y = test_to_doubles(&back);
      assert_memory_equal(x, y, sizeof x);
      free(y);
      attn_tensor_destroy(&from);
      attn_tensor_destroy(&to);
      attn_tensor_destroy(&back);
    }
}

static void copy_and_fill_refuse(void **state) {
  (void)state;
  attn_tensor a = counting(SHAPE(2, 3)), b = counting(SHAPE(3, 2)), f, none;
  assert_ok(attn_tensor_create(ATTN_F32, SHAPE(2, 3), &f));
  assert_int_equal(attn_tensor_copy(&a, &b), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_tensor_copy(&a, &f), ATTN_UNSUPPORTED);
  none = f;
  none.data = NULL;
  assert_int_equal(attn_tensor_copy(&none, &f), ATTN_INVALID_ARGUMENT);
  none = f;
  none.device.kind = ATTN_CUDA;
  assert_int_equal(attn_tensor_fill(&none, 1), ATTN_UNSUPPORTED);
  assert_int_equal(attn_tensor_fill(&a, NAN), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_tensor_fill(&a, 0x1p63), ATTN_INVALID_ARGUMENT);
  assert_ok(attn_tensor_fill(&a, -0x1p63));
  assert_true(attn_tensor_get(&a, (int64_t[]){1, 2}) == -0x1p63);
  attn_tensor small;
  assert_ok(attn_tensor_create(ATTN_U8, SHAPE(2), &small));
  assert_int_equal(attn_tensor_fill(&small, -1), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_tensor_fill(&small, 256), ATTN_INVALID_ARGUMENT);
  assert_ok(attn_tensor_fill(&small, 255));
  attn_tensor *all[] = {&a, &b, &f, &small};
  for (size_t i = 0; i < sizeof all / sizeof *all; ++i) attn_tensor_destroy(all[i]);
}

static void dtypes_have_names(void **state) {
  (void)state;
  for (int i = 0; i < ATTN_DTYPE_COUNT; ++i) {
    attn_dtype dtype;
    assert_ok(attn_dtype_parse(attn_dtype_name((attn_dtype)i), &dtype));
    assert_int_equal(dtype, i);
  }
  attn_dtype dtype;
  assert_int_equal(attn_dtype_parse("float31", &dtype), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_dtype_parse(NULL, &dtype), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_dtype_size((attn_dtype)-1), 0);
}

/* --- DLPack, as a foreign library declares it --------------------------------------------------
 */

typedef struct {
  int32_t device_type, device_id;
} DLDevice;
typedef struct {
  uint8_t code, bits;
  uint16_t lanes;
} DLDataType;
typedef struct {
  void *data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} DLTensor;
struct DLManagedTensor {
  DLTensor dl_tensor;
  void *manager_ctx;
  void (*deleter)(struct DLManagedTensor *self);
};

static void count_release(void *context) {
  ++*(int *)context;
}

static void dlpack_goes_round(void **state) {
  (void)state;
  static const attn_dtype dtypes[] = {ATTN_F64,     ATTN_F32,     ATTN_BF16,   ATTN_F16, ATTN_I64,
                                      ATTN_I32,     ATTN_I16,     ATTN_I8,     ATTN_U8,  ATTN_BOOL,
                                      ATTN_F8_E4M3, ATTN_F8_E5M2, ATTN_F8_E8M0};
  size_t live = attn_memory_get_stats().live_bytes;
  for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; ++i) {
    attn_tensor t, turned, back;
    struct DLManagedTensor *managed;
    int released = 0;
    assert_ok(attn_tensor_create(dtypes[i], SHAPE(2, 3, 4), &t));
    assert_ok(attn_tensor_permute(&t, (int[]){1, 2, 0}, &turned));
    assert_ok(attn_tensor_to_dlpack(&turned, count_release, &released, &managed));
    assert_int_equal(managed->dl_tensor.ndim, 3);
    assert_int_equal(managed->dl_tensor.device.device_type, 1);
    assert_int_equal(managed->dl_tensor.dtype.bits, 8 * attn_dtype_size(dtypes[i]));
    assert_int_equal(managed->dl_tensor.dtype.lanes, 1);
    assert_ok(attn_tensor_from_dlpack(managed, &back));
    assert_ptr_equal(back.data, turned.data);
    assert_int_equal(back.dtype, dtypes[i]);
    assert_int_equal(back.rank, 3);
    assert_memory_equal(back.shape, turned.shape, 3 * sizeof(int64_t));
    assert_memory_equal(back.stride, turned.stride, 3 * sizeof(int64_t));
    managed->deleter(managed);
    assert_int_equal(released, 1);
    attn_tensor_destroy(&t);
  }
  assert_int_equal(attn_memory_get_stats().live_bytes, live);
}

static void foreign_tensors_are_checked(void **state) {
  (void)state;
  float data[12] = {0, 1, 2, 3, 4, 5};
  int64_t shape[2] = {2, 3}, strides[2] = {3, 1};
  struct DLManagedTensor good = {
      .dl_tensor = {
          .data = data, .device = {1, 0}, .ndim = 2, .dtype = {2, 32, 1}, .shape = shape}};
  attn_tensor view;
  assert_ok(attn_tensor_from_dlpack(&good, &view)); /* strides NULL: row-major */
  assert_true(attn_tensor_get(&view, (int64_t[]){1, 1}) == 4);
  struct DLManagedTensor bad = good;
  bad.dl_tensor.byte_offset = 4;
  assert_ok(attn_tensor_from_dlpack(&bad, &view));
  assert_true(attn_tensor_get(&view, (int64_t[]){1, 1}) == 5);
  bad.dl_tensor.byte_offset = 2;
  assert_int_equal(attn_tensor_from_dlpack(&bad, &view), ATTN_UNSUPPORTED);
  bad.dl_tensor.byte_offset = UINT64_MAX;
  assert_int_equal(attn_tensor_from_dlpack(&bad, &view), ATTN_INVALID_ARGUMENT);
  bad = good;
  bad.dl_tensor.dtype = (DLDataType){2, 32, 4};
  assert_int_equal(attn_tensor_from_dlpack(&bad, &view), ATTN_UNSUPPORTED);
  bad.dl_tensor.dtype = (DLDataType){5, 64, 1}; /* complex */
  assert_int_equal(attn_tensor_from_dlpack(&bad, &view), ATTN_UNSUPPORTED);
  bad = good;
  bad.dl_tensor.device.device_type = 7; /* Vulkan */
  assert_int_equal(attn_tensor_from_dlpack(&bad, &view), ATTN_UNSUPPORTED);
  bad = good;
  bad.dl_tensor.ndim = 9;
  assert_int_equal(attn_tensor_from_dlpack(&bad, &view), ATTN_INVALID_SHAPE);
  bad.dl_tensor.ndim = -2;
  assert_int_equal(attn_tensor_from_dlpack(&bad, &view), ATTN_INVALID_SHAPE);
  bad = good;
  bad.dl_tensor.shape = NULL;
  assert_int_equal(attn_tensor_from_dlpack(&bad, &view), ATTN_INVALID_ARGUMENT);
  bad = good;
  bad.dl_tensor.data = NULL;
  assert_int_equal(attn_tensor_from_dlpack(&bad, &view), ATTN_INVALID_ARGUMENT);
  bad = good;
  bad.dl_tensor.strides = strides;
  static const int64_t far[] = {INT64_MIN, INT64_MAX, -INT64_MAX, INT64_MAX / 4};
  for (size_t i = 0; i < sizeof far / sizeof *far; ++i) {
    strides[1] = far[i];
    assert_int_equal(attn_tensor_from_dlpack(&bad, &view), ATTN_INVALID_SHAPE);
  }
  assert_int_equal(attn_tensor_from_dlpack(NULL, &view), ATTN_INVALID_ARGUMENT);
}

static void an_export_that_fails_leaks_nothing(void **state) {
  (void)state;
  attn_tensor t = counting(SHAPE(2));
  struct DLManagedTensor *managed;
  int released = 0;
  attn_fault_arm(ATTN_FAULT_ALLOC, 0);
  attn_status status = attn_tensor_to_dlpack(&t, count_release, &released, &managed);
  attn_fault_disarm(ATTN_FAULT_ALLOC);
  assert_int_equal(status, ATTN_OUT_OF_MEMORY);
  assert_int_equal(released, 0);
  attn_tensor_destroy(&t);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(views_see_the_right_elements),
      cmocka_unit_test(views_out_of_range_are_refused),
      cmocka_unit_test(reshape_keeps_the_order),
      cmocka_unit_test(reshape_infers_and_refuses),
      cmocka_unit_test(expand_repeats),
      cmocka_unit_test(hostile_shapes_are_refused),
      cmocka_unit_test(copies_round_once),
      cmocka_unit_test(float8_is_as_pytorch_has_it),
      cmocka_unit_test(copies_between_dtypes_and_strides),
      cmocka_unit_test(copy_and_fill_refuse),
      cmocka_unit_test(dtypes_have_names),
      cmocka_unit_test(dlpack_goes_round),
      cmocka_unit_test(foreign_tensors_are_checked),
      cmocka_unit_test(an_export_that_fails_leaks_nothing),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}

/* GGUF: a file of the reference implementation reads as that wrote it; a malformed file is an error
 * and never a crash. */
#include "support/test.h"

#include "base/fault.h"
#include "base/io.h"
#include "base/memory.h"
#include "base/random.h"
#include "files/gguf.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Made by the reference implementation: tests/unit/fixtures/make_gguf.py. */
static const char fixture[] = ATTN_SOURCE_DIR "/tests/unit/fixtures/small.gguf";

static attn_gguf *open_fixture(void) {
  attn_gguf *file;
  assert_ok(attn_gguf_open(fixture, &file));
  return file;
}

static void assert_text(attn_gguf_text text, const char *expected, size_t size) {
  assert_int_equal(text.size, size);
  assert_memory_equal(text.data, expected, size);
}

/* -- Metadata -- */

static void single_values(void **state) {
  (void)state;
  static const struct {
    const char *key;
    attn_gguf_type type;
    int64_t value;
  } integers[] = {
      {"test.uint8", ATTN_GGUF_U8, 200},          {"test.int8", ATTN_GGUF_I8, -100},
      {"test.uint16", ATTN_GGUF_U16, 60000},      {"test.int16", ATTN_GGUF_I16, -30000},
      {"test.uint32", ATTN_GGUF_U32, 4000000000}, {"test.int32", ATTN_GGUF_I32, -2000000000},
      {"test.int64", ATTN_GGUF_I64, INT64_MIN},
  };
  attn_gguf *file = open_fixture();
  assert_int_equal(attn_gguf_version(file), 3);
  for (size_t i = 0; i < sizeof integers / sizeof *integers; ++i) {
    int64_t value = 0;
    double number = 0;
    assert_ok(attn_gguf_int(file, integers[i].key, ATTN_REQUIRED, INT64_MIN, INT64_MAX, &value));
    assert_int_equal(value, integers[i].value);
    assert_ok(attn_gguf_double(file, integers[i].key, ATTN_REQUIRED, -1e30, 1e30, &number));
    assert_true(number == (double)integers[i].value);
    bool found = false;
    for (int64_t k = 0; k < attn_gguf_key_count(file); ++k)
      if (strcmp(attn_gguf_key(file, k), integers[i].key) == 0) {
        assert_int_equal(attn_gguf_key_type(file, k), integers[i].type);
        found = true;
      }
    assert_true(found);
  }
  double number = 0;
  assert_ok(attn_gguf_double(file, "test.float32", ATTN_REQUIRED, 0, 2, &number));
  assert_true(number == 1.5);
  assert_ok(attn_gguf_double(file, "test.float64", ATTN_REQUIRED, 0, 2, &number));
  assert_true(number == 0.1);
  assert_ok(attn_gguf_double(file, "test.uint64", ATTN_REQUIRED, 0, 1e30, &number));
  assert_true(number == 0x1p64);
  bool flag = false;
  assert_ok(attn_gguf_bool(file, "test.bool", ATTN_REQUIRED, &flag));
  assert_true(flag);
  attn_gguf_text text;
  assert_ok(attn_gguf_string(file, "general.architecture", ATTN_REQUIRED, &text));
  assert_text(text, "llama", 5);
  assert_ok(attn_gguf_string(file, "general.name", ATTN_REQUIRED, &text));
  assert_text(text, "small \xc3\xa9", 8);
  assert_ok(attn_gguf_string(file, "test.string", ATTN_REQUIRED, &text));
  assert_text(text, "a\0b", 3);
  for (int64_t k = 1; k < attn_gguf_key_count(file); ++k)
    assert_true(strcmp(attn_gguf_key(file, k - 1), attn_gguf_key(file, k)) < 0);
  assert_null(attn_gguf_key(file, -1));
  assert_null(attn_gguf_key(file, attn_gguf_key_count(file)));
  assert_int_equal(attn_gguf_key_type(file, -1), ATTN_GGUF_TYPES);
  attn_gguf_close(file);
}

static void arrays(void **state) {
  (void)state;
  static const char *const tokens[] = {"<s>", "", "a", "\304\240b", "longer than the others"};
  attn_gguf *file = open_fixture();
  attn_gguf_list list;
  assert_ok(attn_gguf_strings(file, "tokenizer.ggml.tokens", ATTN_REQUIRED, &list));
  assert_int_equal(list.count, 5);
  for (int64_t i = 4; i >= 0; --i)
    assert_text(attn_gguf_string_at(&list, i), tokens[i], strlen(tokens[i]));
  assert_int_equal(attn_gguf_string_at(&list, 5).size, 0);
  assert_int_equal(attn_gguf_string_at(&list, -1).size, 0);
  assert_int_equal(attn_gguf_int_at(&list, 0), 0); /* strings are no numbers */
  assert_true(attn_gguf_double_at(&list, 0) == 0);

  assert_ok(attn_gguf_ints(file, "test.ints", ATTN_REQUIRED, -4, 5, &list));
  assert_int_equal(list.count, 3);
  for (int64_t i = 0; i < 3; ++i)
    assert_int_equal(attn_gguf_int_at(&list, i), ((int[]){3, -4, 5})[i]);
  assert_int_equal(attn_gguf_int_at(&list, 3), 0);
  assert_int_equal(attn_gguf_string_at(&list, 0).size, 0);
  assert_ok(attn_gguf_doubles(file, "test.ints", ATTN_REQUIRED, &list));
  assert_true(attn_gguf_double_at(&list, 1) == -4);
  assert_ok(attn_gguf_ints(file, "test.uint8s", ATTN_REQUIRED, 0, 255, &list));
  assert_int_equal(attn_gguf_int_at(&list, 1), 255);
  assert_ok(attn_gguf_doubles(file, "test.floats", ATTN_REQUIRED, &list));
  assert_int_equal(list.count, 2);
  assert_true(attn_gguf_double_at(&list, 0) == 0.5 && attn_gguf_double_at(&list, 1) == -0.25);
  assert_ok(attn_gguf_array(file, "test.bools", ATTN_REQUIRED, &list));
  assert_true(list.type == ATTN_GGUF_BOOL && list.count == 3);
  for (int64_t i = 0; i < 3; ++i) assert_int_equal(attn_gguf_int_at(&list, i), i != 1);
  assert_ok(attn_gguf_array(file, "test.uint64s", ATTN_REQUIRED, &list));
  assert_true(attn_gguf_int_at(&list, 0) == 1 && attn_gguf_int_at(&list, 1) == INT64_MAX);
  assert_true(attn_gguf_double_at(&list, 1) == 0x1p63);
  attn_gguf_close(file);
}

static void assert_says(attn_status status, const char *message) {
  if (status != ATTN_BAD_FORMAT || !strstr(attn_error_message(), message))
    fail_msg("gave %s: %s\n  expected ...%s...", attn_status_name(status), attn_error_message(),
             message);
}

static void getters_name_what_they_found(void **state) {
  (void)state;
  attn_gguf *file = open_fixture();
  int64_t i = 7;
  double d = 7;
  bool b = true;
  attn_gguf_text text = {"kept", 4};
  attn_gguf_list list = {.count = 7};
  assert_ok(attn_gguf_int(file, "absent", ATTN_OPTIONAL, 0, 9, &i));
  assert_ok(attn_gguf_double(file, "absent", ATTN_OPTIONAL, 0, 9, &d));
  assert_ok(attn_gguf_bool(file, "absent", ATTN_OPTIONAL, &b));
  assert_ok(attn_gguf_string(file, "absent", ATTN_OPTIONAL, &text));
  assert_ok(attn_gguf_array(file, "absent", ATTN_OPTIONAL, &list));
  assert_ok(attn_gguf_strings(file, "absent", ATTN_OPTIONAL, &list));
  assert_ok(attn_gguf_ints(file, "absent", ATTN_OPTIONAL, 0, 9, &list));
  assert_ok(attn_gguf_doubles(file, "absent", ATTN_OPTIONAL, &list));
  assert_says(attn_gguf_int(file, "absent", ATTN_REQUIRED, 0, 9, &i),
              "\"absent\" is missing: expected an integer from 0 to 9");
  assert_says(attn_gguf_double(file, "absent", ATTN_REQUIRED, 0, 9, &d), "expected a number");
  assert_says(attn_gguf_bool(file, "absent", ATTN_REQUIRED, &b), "expected true or false");
  assert_says(attn_gguf_string(file, "absent", ATTN_REQUIRED, &text), "expected a string");
  assert_says(attn_gguf_array(file, "absent", ATTN_REQUIRED, &list), "expected an array");

  assert_says(attn_gguf_int(file, "test.uint8", ATTN_REQUIRED, 0, 9, &i),
              "\"test.uint8\": expected an integer from 0 to 9, found 200 (uint8)");
  assert_says(attn_gguf_int(file, "test.uint64", ATTN_REQUIRED, 0, INT64_MAX, &i),
              "found 18446744073709551615 (uint64)");
  assert_says(attn_gguf_int(file, "test.float32", ATTN_REQUIRED, 0, 9, &i), "1.5 (float32)");
  assert_says(attn_gguf_int(file, "test.bool", ATTN_REQUIRED, 0, 9, &i), "found true");
  assert_says(attn_gguf_int(file, "test.ints", ATTN_REQUIRED, 0, 9, &i), "an array of 3 values");
  assert_says(attn_gguf_double(file, "test.float64", ATTN_REQUIRED, 1, 9, &d), "found 0.1");
  assert_says(attn_gguf_double(file, "general.name", ATTN_REQUIRED, 1, 9, &d), "the string \"sm");
  assert_says(attn_gguf_bool(file, "test.uint8", ATTN_REQUIRED, &b), "found 200 (uint8)");
  assert_says(attn_gguf_bool(file, "test.bools", ATTN_REQUIRED, &b), "of type bool");
  assert_says(attn_gguf_string(file, "test.int8", ATTN_REQUIRED, &text), "found -100 (int8)");
  assert_says(attn_gguf_string(file, "tokenizer.ggml.tokens", ATTN_REQUIRED, &text), "an array");
  assert_says(attn_gguf_array(file, "test.int8", ATTN_REQUIRED, &list), "expected an array");
  assert_says(attn_gguf_strings(file, "test.ints", ATTN_REQUIRED, &list), "array of strings");
  assert_says(attn_gguf_ints(file, "test.floats", ATTN_REQUIRED, 0, 9, &list),
              "expected an array of integers");
  assert_says(attn_gguf_ints(file, "test.ints", ATTN_REQUIRED, 0, 9, &list), "element 1 is -4");
  assert_says(attn_gguf_ints(file, "test.uint64s", ATTN_REQUIRED, 0, INT64_MAX, &list),
              "element 1");
  assert_says(attn_gguf_doubles(file, "test.bools", ATTN_REQUIRED, &list), "array of numbers");
  assert_true(i == 7 && d == 7 && b && text.size == 4 && list.count == 7); /* all untouched */
  attn_gguf_close(file);
}

/* -- Tensors -- */

static void shapes_are_row_major(void **state) {
  (void)state;
  attn_gguf *file = open_fixture();
  const attn_gguf_tensor *t;
  assert_ok(attn_gguf_find(file, "shape.four", &t));
  assert_int_equal(t->type, ATTN_BLOCK_F32);
  assert_int_equal(t->rank, 4);
  assert_memory_equal(t->shape, ((int64_t[]){2, 3, 4, 5}), sizeof t->shape);
  assert_true(t->count == 120 && t->bytes == 480);
  const float *values = t->data;
  for (int i = 0; i < 120; ++i) assert_true(values[i] == (float)i);
  assert_ok(attn_gguf_find(file, "shape.one", &t));
  assert_true(t->type == ATTN_BLOCK_I32 && t->rank == 1 && t->shape[0] == 3 && t->bytes == 12);
  assert_ok(attn_gguf_find(file, "blocks.Q4_K", &t));
  assert_true(t->type == ATTN_BLOCK_Q4_K && t->rank == 2 && t->shape[0] == 2 &&
              t->shape[1] == 512 && t->bytes == 4 * 144);
  for (int64_t i = 0; i < attn_gguf_tensor_count(file); ++i) {
    t = attn_gguf_tensor_at(file, i);
    assert_int_equal((uintptr_t)t->data % 32, 0);
    if (i) assert_true(strcmp(attn_gguf_tensor_at(file, i - 1)->name, t->name) < 0);
  }
  assert_null(attn_gguf_tensor_at(file, -1));
  assert_null(attn_gguf_tensor_at(file, attn_gguf_tensor_count(file)));
  assert_int_equal(attn_gguf_find(file, "shape.for", &t), ATTN_NOT_FOUND);
  assert_non_null(strstr(attn_error_message(), "shape.four"));
  assert_null(t);
  attn_gguf_close(file);
}

/* -- Blocks -- */

static const attn_block_type converted[] = {
    ATTN_BLOCK_F32,  ATTN_BLOCK_F16,  ATTN_BLOCK_BF16, ATTN_BLOCK_F64,  ATTN_BLOCK_Q8_0,
    ATTN_BLOCK_Q4_0, ATTN_BLOCK_Q4_1, ATTN_BLOCK_Q5_0, ATTN_BLOCK_Q5_1, ATTN_BLOCK_Q2_K,
    ATTN_BLOCK_Q3_K, ATTN_BLOCK_Q4_K, ATTN_BLOCK_Q5_K, ATTN_BLOCK_Q6_K,
};

static const attn_gguf_tensor *find(const attn_gguf *file, const char *prefix,
                                    attn_block_type type) {
  const attn_gguf_tensor *tensor;
  char name[64];
  snprintf(name, sizeof name, "%s.%s", prefix, attn_block_get_format(type)->name);
  assert_ok(attn_gguf_find(file, name, &tensor));
  return tensor;
}

/* To the bit: every product is exact in float32, so that both round once. */
static void blocks_have_the_reference_values(void **state) {
  (void)state;
  attn_gguf *file = open_fixture();
  for (size_t i = 0; i < sizeof converted / sizeof *converted; ++i) {
    const attn_gguf_tensor *blocks = find(file, "blocks", converted[i]);
    const attn_gguf_tensor *values = find(file, "values", converted[i]);
    assert_int_equal(blocks->type, converted[i]);
    assert_int_equal(values->type, ATTN_BLOCK_F32);
    assert_int_equal(blocks->count, values->count);
    size_t size = (size_t)blocks->count * sizeof(float);
    float *x = malloc(size);
    unsigned char *odd = malloc(blocks->bytes + 1); /* an address that no load likes */
    assert_non_null(x);
    assert_non_null(odd);
    memcpy(odd + 1, blocks->data, blocks->bytes);
    assert_ok(attn_blocks_to_f32(blocks->type, odd + 1, x, blocks->count));
    for (int64_t e = 0; e < blocks->count; ++e)
      if (memcmp(&x[e], (const float *)values->data + e, sizeof *x) != 0)
        fail_msg("%s, element %lld: %.9g, expected %.9g", blocks->name, (long long)e, (double)x[e],
                 (double)((const float *)values->data)[e]);
    free(odd);
    free(x);
  }
  attn_gguf_close(file);
}

static void rounding_is_that_of_the_reference(void **state) {
  (void)state;
  static const attn_block_type rounded[] = {ATTN_BLOCK_F16, ATTN_BLOCK_BF16, ATTN_BLOCK_Q8_0,
                                            ATTN_BLOCK_Q4_0};
  attn_gguf *file = open_fixture();
  const attn_gguf_tensor *source;
  assert_ok(attn_gguf_find(file, "source", &source));
  for (size_t i = 0; i < sizeof rounded / sizeof *rounded; ++i) {
    const attn_gguf_tensor *expected = find(file, "rounded", rounded[i]);
    unsigned char *blocks = malloc(expected->bytes);
    assert_non_null(blocks);
    assert_ok(attn_blocks_from_f32(rounded[i], source->data, blocks, source->count));
    assert_memory_equal(blocks, expected->data, expected->bytes);
    free(blocks);
  }
  attn_gguf_close(file);
}

/* Numbers for which the reference does not say what it does. */
static void blocks_of_extreme_numbers(void **state) {
  (void)state;
  enum { ELEMENTS = 32 };
  static const attn_block_type packed[] = {ATTN_BLOCK_Q8_0, ATTN_BLOCK_Q4_0};
  const float extremes[] = {NAN, INFINITY, -INFINITY, 1e38f, -1e-45f, 1e-40f};
  for (size_t i = 0; i < sizeof packed / sizeof *packed; ++i)
    for (size_t e = 0; e < sizeof extremes / sizeof *extremes; ++e) {
      float x[ELEMENTS] = {1, -1, 0.5f}, back[ELEMENTS];
      unsigned char block[ELEMENTS + 2];
      x[7] = extremes[e];
      if (fabsf(x[7]) < 1) memset(x, 0, 3 * sizeof *x); /* the largest of its block */
      assert_ok(attn_blocks_from_f32(packed[i], x, block, ELEMENTS));
      assert_ok(attn_blocks_to_f32(packed[i], block, back, ELEMENTS));
      if (isnan(x[7])) assert_true(back[7] == 0 && fabsf(back[0] - 1) < 0.1f);
      if (fabsf(x[7]) < 1) assert_true(back[7] == 0);
    }
}

static void conversions_that_are_refused(void **state) {
  (void)state;
  float x[256] = {0};
  unsigned char block[512] = {0};
  assert_int_equal(attn_blocks_to_f32(ATTN_BLOCK_Q4_0, block, x, 31), ATTN_INVALID_SHAPE);
  assert_non_null(strstr(attn_error_message(), "31 elements are not whole blocks of Q4_0 (32)"));
  assert_int_equal(attn_blocks_to_f32(ATTN_BLOCK_Q4_0, block, x, -32), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_blocks_to_f32(ATTN_BLOCK_IQ2_S, block, x, 256), ATTN_UNSUPPORTED);
  assert_non_null(strstr(attn_error_message(), "IQ2_S"));
  assert_int_equal(attn_blocks_to_f32((attn_block_type)4, block, x, 32), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_blocks_from_f32(ATTN_BLOCK_Q6_K, x, block, 256), ATTN_UNSUPPORTED);
  assert_int_equal(attn_blocks_from_f32(ATTN_BLOCK_Q8_0, x, block, 33), ATTN_INVALID_SHAPE);
  assert_int_equal(attn_blocks_from_f32(ATTN_BLOCK_TYPES, x, block, 32), ATTN_INVALID_ARGUMENT);
  assert_ok(attn_blocks_to_f32(ATTN_BLOCK_Q4_0, NULL, NULL, 0));
}

/* -- Malformed files, made by hand -- */

enum { MOST_BYTES = 4096 };

typedef struct bytes {
  _Alignas(8) unsigned char data[MOST_BYTES];
  size_t size;
} bytes;

static void put(bytes *b, const void *data, size_t size) {
  assert_true(size <= sizeof b->data - b->size);
  memcpy(b->data + b->size, data, size);
  b->size += size;
}

static void put_u32(bytes *b, uint32_t value) {
  put(b, &value, sizeof value);
}

static void put_u64(bytes *b, uint64_t value) {
  put(b, &value, sizeof value);
}

static void put_string(bytes *b, const char *text) {
  put_u64(b, strlen(text));
  put(b, text, strlen(text));
}

static bytes start(uint64_t tensors, uint64_t keys) {
  bytes b = {.size = 0};
  put(&b, "GGUF", 4);
  put_u32(&b, 3);
  put_u64(&b, tensors);
  put_u64(&b, keys);
  return b;
}

static void put_u32_key(bytes *b, const char *key, uint32_t value) {
  put_string(b, key);
  put_u32(b, ATTN_GGUF_U32);
  put_u32(b, value);
}

/* A matrix: `columns` is the fastest axis. */
static void put_matrix(bytes *b, const char *name, uint64_t rows, uint64_t columns, uint32_t type,
                       uint64_t offset) {
  put_string(b, name);
  put_u32(b, 2);
  put_u64(b, columns);
  put_u64(b, rows);
  put_u32(b, type);
  put_u64(b, offset);
}

static void put_data(bytes *b, size_t size) {
  b->size = (b->size + 31) / 32 * 32 + size;
  assert_true(b->size <= sizeof b->data);
}

/* Of the exact size, so that the sanitizer sees a read beyond. */
static attn_status open_bytes(const void *data, size_t size, void **copy, attn_gguf **file) {
  *copy = malloc(size ? size : 1);
  assert_non_null(*copy);
  memcpy(*copy, data, size);
  return attn_gguf_open_memory(*copy, size, file);
}

static void assert_refused(const bytes *b, const char *message) {
  attn_gguf *file;
  void *copy;
  attn_status status = open_bytes(b->data, b->size, &copy, &file);
  assert_null(file);
  free(copy);
  assert_says(status, message);
}

static void assert_opens(const bytes *b) {
  attn_gguf *file;
  void *copy;
  assert_ok(open_bytes(b->data, b->size, &copy, &file));
  attn_gguf_close(file);
  free(copy);
}

static void malformed_starts(void **state) {
  (void)state;
  bytes b = start(0, 0);
  assert_opens(&b);
  b.data[4] = 2;
  assert_opens(&b);
  b.data[4] = 1;
  assert_refused(&b, "GGUF version 1: expected 2 to 3");
  b.data[4] = 4;
  assert_refused(&b, "GGUF version 4");
  b.data[4] = 0;
  assert_refused(&b, "GGUF version 0");
  b.data[7] = 3;
  assert_refused(&b, "big-endian");
  b.data[0] = 'g';
  assert_refused(&b, "67 47 55 46: expected \"GGUF\"");
  b = start(UINT64_MAX, 0);
  assert_refused(&b, "the number of tensors is 18446744073709551615");
  b = start(0, UINT64_MAX / 14);
  assert_refused(&b, "the number of keys is 1317624576693539401");
}

static void malformed_keys(void **state) {
  (void)state;
  bytes b = start(0, 2);
  put_u32_key(&b, "a.key", 1);
  put_u32_key(&b, "b.key", 1);
  assert_opens(&b);
  b = start(0, 2);
  put_u32_key(&b, "a.key", 1);
  put_u32_key(&b, "a.key", 1);
  assert_refused(&b, "two keys are named \"a.key\"");
  b = start(0, 1);
  put_u32_key(&b, "", 1);
  assert_refused(&b, "key 0: the key of 0 bytes: expected 1 to 65535");
  b = start(0, 1);
  put_u32_key(&b, "line\nbreak", 1);
  assert_refused(&b, "control character 10 at its byte 4");
  b = start(0, 1);
  put_u64(&b, UINT64_MAX - 7); /* the place after would wrap */
  put(&b, "0123456789abcdef", 16);
  assert_refused(&b, "the key at byte 32 needs 18446744073709551608 bytes, 16 are left");

  b = start(0, 1);
  put_string(&b, "a.key");
  put_u32(&b, 13);
  put_u64(&b, 0);
  assert_refused(&b, "key \"a.key\": the type is 13: expected 0 to 12");
  b = start(0, 1);
  put_string(&b, "a.key");
  put_u32(&b, ATTN_GGUF_U64);
  put_u32(&b, 0);
  assert_refused(&b, "key \"a.key\": 1 values of type uint64");
  b = start(0, 1);
  put_string(&b, "a.key");
  put_u32(&b, ATTN_GGUF_BOOL);
  put(&b, "\2", 1);
  assert_refused(&b, "the bool 2: expected 0 or 1");
  b = start(0, 1);
  put_string(&b, "a.key");
  put_u32(&b, ATTN_GGUF_STRING);
  put_u64(&b, 5);
  put(&b, "four", 4);
  assert_refused(&b, "needs 5 bytes, 4 are left");
}

static void malformed_arrays(void **state) {
  (void)state;
  static const struct {
    uint32_t type;
    uint64_t count;
    const char *message;
  } cases[] = {
      {ATTN_GGUF_U8, 16, NULL},
      {ATTN_GGUF_U8, 0, NULL},
      {ATTN_GGUF_U8, 17, "17 values of type uint8"},
      {ATTN_GGUF_U32, 5, "5 values of type uint32"},
      {ATTN_GGUF_F64, UINT64_MAX / 8 + 2,
       "2305843009213693953 values"}, /* 8 bytes after wrapping */
      {ATTN_GGUF_STRING, 2, NULL},
      {ATTN_GGUF_STRING, 3, "3 values of type string"},
      {ATTN_GGUF_STRING, UINT64_MAX, "18446744073709551615 values of type string"},
      {ATTN_GGUF_ARRAY, 1, "an array of arrays"},
      {13, 1, "the type of the elements is 13"},
      {UINT32_MAX, 1, "the type of the elements is 4294967295"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    bytes b = start(0, 1);
    put_string(&b, "a.key");
    put_u32(&b, ATTN_GGUF_ARRAY);
    put_u32(&b, cases[i].type);
    put_u64(&b, cases[i].count);
    b.size += 16; /* zeros: bytes, or two empty strings */
    if (cases[i].message)
      assert_refused(&b, cases[i].message);
    else
      assert_opens(&b);
  }
  bytes b = start(0, 1); /* the last string leads out of the file */
  put_string(&b, "a.key");
  put_u32(&b, ATTN_GGUF_ARRAY);
  put_u32(&b, ATTN_GGUF_STRING);
  put_u64(&b, 2);
  put_string(&b, "");
  put_u64(&b, 1);
  assert_refused(&b, "key \"a.key\": element 1: a string at byte");
}

static void alignments(void **state) {
  (void)state;
  static const struct {
    uint32_t alignment;
    const char *message;
  } cases[] = {
      {8, NULL},
      {64, NULL},
      {0, "\"general.alignment\": expected an integer from 8"},
      {4, "found 4 (uint32)"},
      {48, "expected a power of two, found 48"},
      {UINT32_MAX, "found 4294967295"},
      {1u << 30, "offset 64 is not a multiple of the alignment 1073741824"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    bytes b = start(2, 1);
    put_u32_key(&b, "general.alignment", cases[i].alignment);
    put_matrix(&b, "a", 1, 1, ATTN_BLOCK_F32, 0);
    put_matrix(&b, "b", 1, 1, ATTN_BLOCK_F32, 64);
    put_data(&b, 200);
    if (cases[i].message)
      assert_refused(&b, cases[i].message);
    else
      assert_opens(&b);
  }
  bytes b = start(1, 1);
  put_u32_key(&b, "general.alignment", 1u << 30);
  put_matrix(&b, "a", 1, 1, ATTN_BLOCK_F32, 0);
  put_data(&b, 32);
  assert_refused(&b, "the data begins at byte 1073741824");
  b = start(0, 1);
  put_string(&b, "general.alignment");
  put_u32(&b, ATTN_GGUF_STRING);
  put_string(&b, "32");
  assert_refused(&b, "found the string \"32\"");
}

static void malformed_tensors(void **state) {
  (void)state;
  static const struct {
    uint64_t rows, columns;
    uint32_t type;
    uint64_t offset;
    const char *message;
  } cases[] = {
      {2, 4, ATTN_BLOCK_F32, 32, NULL},
      {2, 32, ATTN_BLOCK_Q4_0, 32, NULL}, /* 36 bytes end with the data */
      {2, 4, ATTN_BLOCK_F32, 64, "32 bytes at offset 64 are outside the data of 68 bytes"},
      {2, 4, ATTN_BLOCK_F32, 96, "at offset 96"},
      {2, 4, ATTN_BLOCK_F32, UINT64_MAX - 31, "at offset 18446744073709551584"},
      {2, 4, ATTN_BLOCK_F32, 16, "offset 16 is not a multiple of the alignment 32"},
      {2, 4, ATTN_BLOCK_F32, 0, "\" begins at offset 0, before"},
      {2, 16, ATTN_BLOCK_Q4_0, 32, "rows of 16 elements are not whole blocks of Q4_0 (32)"},
      {2, 4, 4, 32, "block type 4 is unknown"},
      {2, 4, ATTN_BLOCK_GGUF_TYPES, 32, "is unknown"},
      {2, 4, UINT32_MAX, 32, "block type 4294967295 is unknown"},
      {0, 4, ATTN_BLOCK_F32, 32, "extent 0 is 0"},
      {2, 0, ATTN_BLOCK_F32, 32, "extent 1 is 0"},
      {2, UINT64_MAX, ATTN_BLOCK_F32, 32, "extent 1 is 18446744073709551615"},
      {1ull << 32, 1ull << 31, ATTN_BLOCK_F32, 32, "elements overflows"},
      {1ull << 32, 1ull << 30, ATTN_BLOCK_F32, 32, "bytes overflows"},
      {1ull << 31, 1ull << 29, ATTN_BLOCK_F32, 32, "4611686018427387904 bytes at offset 32"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    bytes b = start(2, 0);
    put_matrix(&b, "b", cases[i].rows, cases[i].columns, cases[i].type, cases[i].offset);
    put_matrix(&b, "a", 1, 1, ATTN_BLOCK_F32, 0);
    put_data(&b, 68);
    if (cases[i].message)
      assert_refused(&b, cases[i].message);
    else
      assert_opens(&b);
  }
  bytes b = start(2, 0);
  put_matrix(&b, "same", 1, 1, ATTN_BLOCK_F32, 0);
  put_matrix(&b, "same", 1, 1, ATTN_BLOCK_F32, 32);
  put_data(&b, 64);
  assert_refused(&b, "two tensors are named \"same\"");
  for (uint32_t rank = 0; rank < 7; ++rank) {
    b = start(1, 0);
    put_string(&b, "a");
    put_u32(&b, rank);
    for (uint32_t i = 0; i < rank; ++i) put_u64(&b, 1);
    put_u32(&b, ATTN_BLOCK_F32);
    put_u64(&b, 0);
    put_data(&b, 32);
    if (rank >= 1 && rank <= 4)
      assert_opens(&b);
    else
      assert_refused(&b, "expected 1 to 4");
  }
}

/* -- Every truncation, and changes everywhere -- */

/* Reads everything that a consumer would. */
static unsigned touch(const attn_gguf *file) {
  unsigned sum = 0;
  for (int64_t k = 0; k < attn_gguf_key_count(file); ++k) {
    const char *key = attn_gguf_key(file, k);
    attn_gguf_list list = {.count = 0};
    attn_gguf_text text = {"", 0};
    if (attn_gguf_key_type(file, k) == ATTN_GGUF_ARRAY)
      assert_ok(attn_gguf_array(file, key, ATTN_REQUIRED, &list));
    else if (attn_gguf_key_type(file, k) == ATTN_GGUF_STRING)
      assert_ok(attn_gguf_string(file, key, ATTN_REQUIRED, &text));
    for (size_t i = 0; i < text.size; ++i) sum += (unsigned char)text.data[i];
    for (int64_t i = 0; i < list.count; ++i) {
      text = attn_gguf_string_at(&list, i);
      sum += (unsigned)attn_gguf_int_at(&list, i) + (attn_gguf_double_at(&list, i) > 0);
      for (size_t c = 0; c < text.size; ++c) sum += (unsigned char)text.data[c];
    }
  }
  for (int64_t i = 0; i < attn_gguf_tensor_count(file); ++i) {
    const attn_gguf_tensor *t = attn_gguf_tensor_at(file, i);
    for (size_t b = 0; b < t->bytes; ++b) sum += ((const unsigned char *)t->data)[b];
  }
  return sum;
}

/* Either it opens and all of it can be read, or it is a clean error with a message. Of a claimed
 * size that the bytes do not have, nothing is allocated. */
static bool survives(const void *data, size_t size) {
  attn_gguf *file;
  void *copy;
  attn_memory_reset_peak();
  size_t live = attn_memory_get_stats().live_bytes;
  attn_status status = open_bytes(data, size, &copy, &file);
  assert_true(attn_memory_get_stats().peak_bytes - live < (64 << 10) + 16 * size);
  if (status == ATTN_OK) {
    touch(file);
    attn_gguf_close(file);
  } else {
    assert_null(file);
    assert_int_equal(status, ATTN_BAD_FORMAT);
    assert_true(strlen(attn_error_message()) > 0);
  }
  assert_int_equal(attn_memory_get_stats().live_bytes, live);
  free(copy);
  return status == ATTN_OK;
}

/* The fixture's bytes, and how many of them come before the data. */
static char *read_fixture(size_t *size, size_t *header) {
  char *data;
  assert_ok(attn_file_read(fixture, 1 << 20, &data, size));
  attn_gguf *file;
  assert_ok(attn_gguf_open_memory(data, *size, &file));
  *header = *size;
  for (int64_t i = 0; i < attn_gguf_tensor_count(file); ++i) {
    size_t place = (size_t)((const char *)attn_gguf_tensor_at(file, i)->data - data);
    if (place < *header) *header = place;
  }
  attn_gguf_close(file);
  return data;
}

static void truncated_files(void **state) {
  (void)state;
  size_t size, header;
  char *data = read_fixture(&size, &header);
  assert_true(header > 1000 && header < size);
  assert_true(survives(data, size));
  for (size_t cut = 0; cut <= header; ++cut) assert_false(survives(data, cut));
  for (size_t cut = header; cut < size - 31; cut += 61) assert_false(survives(data, cut));
  attn_free(data);
}

/* At each byte of the header, as if a field of 4 or 8 bytes stood there. */
static void changed_fields(void **state) {
  (void)state;
  static const uint64_t values[] = {0,          1,          9,         255,        1u << 16,
                                    INT32_MAX,  UINT32_MAX, INT64_MAX, UINT64_MAX, 1ull << 33,
                                    1ull << 60, 1ull << 61, 1ull << 63};
  size_t size, header, refused = 0, count = 0;
  char *data = read_fixture(&size, &header);
  for (size_t place = 0; place + 8 <= header; ++place)
    for (size_t v = 0; v < sizeof values / sizeof *values; ++v, ++count) {
      size_t width = v % 2 ? 4 : 8;
      char kept[8];
      memcpy(kept, data + place, 8);
      memcpy(data + place, &values[v], width);
      refused += !survives(data, size);
      memcpy(data + place, kept, 8);
    }
  assert_true(refused > count / 2); /* most of the header is structure */
  attn_free(data);
}

static void random_mutants(void **state) {
  (void)state;
  enum { MUTANTS = 10000 };
  size_t size, header;
  char *data = read_fixture(&size, &header);
  attn_random random = {.seed = 13};
  for (int i = 0; i < MUTANTS; ++i) {
    char kept[4];
    size_t places[4];
    int changes = 1 + (int)attn_random_below(&random, 4);
    for (int c = 0; c < changes; ++c) {
      places[c] = attn_random_below(&random, header);
      kept[c] = data[places[c]];
      data[places[c]] = (char)(attn_random_below(&random, 2) ? attn_random_u32(&random)
                                                             : attn_random_below(&random, 16));
    }
    survives(data, size);
    for (int c = changes - 1; c >= 0; --c) data[places[c]] = kept[c];
  }
  assert_true(survives(data, size));
  attn_free(data);
}

/* -- Files and faults -- */

static void files_that_are_none(void **state) {
  (void)state;
  attn_gguf *file;
  assert_int_equal(attn_gguf_open("/nowhere/x.gguf", &file), ATTN_NOT_FOUND);
  assert_null(file);
  assert_int_equal(attn_gguf_open(__FILE__, &file), ATTN_BAD_FORMAT);
  assert_non_null(strstr(attn_error_message(), __FILE__));
  assert_null(file);
  assert_int_not_equal(attn_gguf_open("/tmp", &file), ATTN_OK);
  assert_int_equal(attn_gguf_open_memory("", 0, &file), ATTN_BAD_FORMAT);
  attn_gguf_close(NULL);
}

/* Every allocation and file operation fails once: a clean error, and nothing leaked. */
static void faults_while_opening(void **state) {
  (void)state;
  size_t live = attn_memory_get_stats().live_bytes;
  for (int kind = 0; kind < ATTN_FAULT_KINDS; ++kind) {
    int skip = 0;
    for (;; ++skip) {
      attn_gguf *file;
      attn_fault_arm((attn_fault_kind)kind, skip);
      attn_status status = attn_gguf_open(fixture, &file);
      bool hit = attn_fault_disarm((attn_fault_kind)kind);
      if (!hit) {
        assert_ok(status);
        attn_gguf_close(file);
        break;
      }
      assert_null(file);
      assert_int_equal(status, kind == ATTN_FAULT_ALLOC ? ATTN_OUT_OF_MEMORY : ATTN_IO_ERROR);
      assert_int_equal(attn_memory_get_stats().live_bytes, live);
    }
    assert_true(skip >= (kind == ATTN_FAULT_ALLOC ? 6 : 2));
    assert_int_equal(attn_memory_get_stats().live_bytes, live);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(single_values),
      cmocka_unit_test(arrays),
      cmocka_unit_test(getters_name_what_they_found),
      cmocka_unit_test(shapes_are_row_major),
      cmocka_unit_test(blocks_have_the_reference_values),
      cmocka_unit_test(rounding_is_that_of_the_reference),
      cmocka_unit_test(blocks_of_extreme_numbers),
      cmocka_unit_test(conversions_that_are_refused),
      cmocka_unit_test(malformed_starts),
      cmocka_unit_test(malformed_keys),
      cmocka_unit_test(malformed_arrays),
      cmocka_unit_test(alignments),
      cmocka_unit_test(malformed_tensors),
      cmocka_unit_test(truncated_files),
      cmocka_unit_test(changed_fields),
      cmocka_unit_test(random_mutants),
      cmocka_unit_test(files_that_are_none),
      cmocka_unit_test(faults_while_opening),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}

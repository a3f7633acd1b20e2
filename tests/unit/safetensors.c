/* safetensors: what is written is read back; a malformed file is an error and never a crash. */
#include "support/test.h"

#include "base/fault.h"
#include "base/memory.h"
#include "base/random.h"
#include "base/io.h"
#include "files/safetensors.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* In memory where the system has that: every commit of a file waits for the disk. */
static char directory[64];

static const char *in_directory(const char *name) {
  static char path[256];
  snprintf(path, sizeof path, "%s/%s", directory, name);
  return path;
}

static int make_directory(void **state) {
  (void)state;
  snprintf(directory, sizeof directory, "%s/attn-safetensors-XXXXXX",
           access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
  return mkdtemp(directory) ? 0 : -1;
}

static int remove_directory(void **state) {
  (void)state;
  char command[128];
  snprintf(command, sizeof command, "rm -r %s", directory);
  return system(command);
}

static void write_bytes(const char *name, const void *bytes, size_t size) {
  FILE *file = fopen(in_directory(name), "wb");
  assert_non_null(file);
  assert_int_equal(fwrite(bytes, 1, size, file), size);
  assert_int_equal(fclose(file), 0);
}

/* A file made by hand: the length, the header as given, and `data_size` bytes. */
static void write_header(const char *name, const char *header, size_t data_size) {
  char bytes[4096] = {0};
  uint64_t length = strlen(header);
  memcpy(bytes, &length, 8);
  memcpy(bytes + 8, header, length);
  write_bytes(name, bytes, 8 + length + data_size);
}

static void assert_refused(const char *header, size_t data_size, attn_status expected,
                           const char *message) {
  attn_safetensors *file;
  write_header("bad.safetensors", header, data_size);
  attn_status status = attn_safetensors_open(in_directory("bad.safetensors"), &file);
  if (status != expected || !strstr(attn_error_message(), message))
    fail_msg("%s\n  gave %s: %s\n  expected %s: ...%s...", header, attn_status_name(status),
             attn_error_message(), attn_status_name(expected), message);
  assert_null(file);
}

static void every_dtype_returns(void **state) {
  (void)state;
  attn_named_tensor named[ATTN_DTYPE_COUNT];
  int64_t shape[] = {3, 5, 2};
  for (int i = 0; i < ATTN_DTYPE_COUNT; ++i) {
    named[i].name = attn_dtype_name((attn_dtype)i);
    assert_ok(attn_tensor_create((attn_dtype)i, 3, shape, &named[i].tensor));
    unsigned char *bytes = named[i].tensor.data;
    for (size_t b = 0; b < 30 * attn_dtype_size((attn_dtype)i); ++b)
      bytes[b] = i == ATTN_BOOL ? b % 2 : (unsigned char)(b * 7 + (size_t)i);
  }
  attn_metadata metadata[] = {{"format", "pt"}, {"note", "a \"quoted\" line\n and \xc3\xa9"}};
  const char *path = in_directory("dtypes.safetensors");
  assert_ok(attn_safetensors_write(path, named, ATTN_DTYPE_COUNT, metadata, 2));

  attn_safetensors *file;
  assert_ok(attn_safetensors_open(path, &file));
  assert_int_equal(attn_safetensors_count(file), ATTN_DTYPE_COUNT);
  assert_string_equal(attn_safetensors_metadata(file, "format"), "pt");
  assert_string_equal(attn_safetensors_metadata(file, "note"), metadata[1].value);
  assert_null(attn_safetensors_metadata(file, "absent"));
  for (int i = 0; i < ATTN_DTYPE_COUNT; ++i) {
    attn_tensor read;
    assert_ok(attn_safetensors_find(file, named[i].name, &read));
    assert_int_equal(read.dtype, i);
    assert_int_equal(read.rank, 3);
    assert_memory_equal(read.shape, shape, sizeof shape);
    assert_int_equal((uintptr_t)read.data % attn_dtype_size((attn_dtype)i), 0);
    assert_memory_equal(read.data, named[i].tensor.data, 30 * attn_dtype_size((attn_dtype)i));
    attn_tensor_destroy(&named[i].tensor);
  }
  for (int64_t i = 1; i < attn_safetensors_count(file); ++i)
    assert_true(strcmp(attn_safetensors_name(file, i - 1), attn_safetensors_name(file, i)) < 0);
  attn_tensor none;
  assert_int_equal(attn_safetensors_find(file, "flaot32", &none), ATTN_NOT_FOUND);
  assert_non_null(strstr(attn_error_message(), "float32"));
  assert_int_equal(attn_safetensors_get(file, ATTN_DTYPE_COUNT, &none), ATTN_INVALID_ARGUMENT);
  attn_safetensors_close(file);
}

/* Made by the reference implementation: tests/models/fixtures/foreign.py. */
static void a_foreign_file(void **state) {
  (void)state;
  attn_safetensors *file;
  attn_tensor t;
  assert_ok(
      attn_safetensors_open(ATTN_SOURCE_DIR "/tests/models/fixtures/foreign.safetensors", &file));
  assert_int_equal(attn_safetensors_count(file), 6);
  assert_string_equal(attn_safetensors_metadata(file, "who"), "the reference implementation");
  assert_ok(attn_safetensors_find(file, "flags", &t));
  assert_true(t.dtype == ATTN_BOOL && t.rank == 1 && t.shape[0] == 3);
  for (int64_t i = 0; i < 3; ++i) assert_true(attn_tensor_get(&t, &i) == (i != 1));
  assert_ok(attn_safetensors_find(file, "half", &t));
  assert_int_equal(t.dtype, ATTN_F16);
  for (int64_t i = 0; i < 4; ++i) assert_true(attn_tensor_get(&t, &i) == (double)i / 2);
  assert_ok(attn_safetensors_find(file, "double", &t));
  assert_true(t.dtype == ATTN_F64 && t.rank == 2 && t.shape[0] == 2 && t.shape[1] == 3);
  for (int64_t i = 0; i < 6; ++i)
    assert_true(attn_tensor_get(&t, (int64_t[]){i / 3, i % 3}) == (double)i);
  assert_ok(attn_safetensors_find(file, "empty", &t));
  assert_true(t.rank == 2 && attn_tensor_count(&t) == 0);
  assert_ok(attn_safetensors_find(file, "scalar", &t));
  assert_true(t.dtype == ATTN_I64 && t.rank == 0 && attn_tensor_get(&t, NULL) == -5);
  assert_int_equal(attn_safetensors_find(file, "unsigned", &t), ATTN_UNSUPPORTED);
  attn_safetensors_close(file);
}

static void strides_ranks_and_empty_tensors(void **state) {
  (void)state;
  float values[24];
  for (int i = 0; i < 24; ++i) values[i] = (float)i;
  int64_t shape[] = {4, 6}, none[] = {0, 7};
  int axes[] = {1, 0};
  attn_named_tensor named[3] = {{"scalar", {0}}, {"transposed", {0}}, {"empty", {0}}};
  attn_tensor matrix;
  assert_ok(attn_tensor_wrap(values + 5, ATTN_F32, 0, NULL, &named[0].tensor));
  assert_ok(attn_tensor_wrap(values, ATTN_F32, 2, shape, &matrix));
  assert_ok(attn_tensor_permute(&matrix, axes, &named[1].tensor));
  assert_ok(attn_tensor_wrap(NULL, ATTN_F32, 2, none, &named[2].tensor));
  const char *path = in_directory("strides.safetensors");
  assert_ok(attn_safetensors_write(path, named, 3, NULL, 0));

  attn_safetensors *file;
  attn_tensor read;
  assert_ok(attn_safetensors_open(path, &file));
  assert_ok(attn_safetensors_find(file, "scalar", &read));
  assert_int_equal(read.rank, 0);
  assert_true(*(float *)read.data == 5);
  assert_ok(attn_safetensors_find(file, "transposed", &read));
  for (int64_t i = 0; i < 6; ++i)
    for (int64_t j = 0; j < 4; ++j)
      assert_true(attn_tensor_get(&read, (int64_t[]){i, j}) == (double)(j * 6 + i));
  assert_ok(attn_safetensors_find(file, "empty", &read));
  assert_int_equal(attn_tensor_count(&read), 0);
  attn_safetensors_close(file);
}

static void data_is_aligned(void **state) {
  (void)state;
  for (int length = 1; length < 80; ++length) { /* every length of header modulo 64 */
    char name[81] = {0};
    memset(name, 'x', (size_t)length);
    float value = 1;
    attn_named_tensor named = {.name = name};
    assert_ok(attn_tensor_wrap(&value, ATTN_F32, 0, NULL, &named.tensor));
    const char *path = in_directory("aligned.safetensors");
    assert_ok(attn_safetensors_write(path, &named, 1, NULL, 0));
    attn_safetensors *file;
    attn_tensor read;
    assert_ok(attn_safetensors_open(path, &file));
    assert_ok(attn_safetensors_find(file, name, &read));
    assert_int_equal((uintptr_t)read.data % 64, 0);
    attn_safetensors_close(file);
  }
}

/* Files of other writers: an odd header and an odd tensor before a wider dtype. */
static void unaligned_tensors_are_copied(void **state) {
  (void)state;
  char bytes[256] = {0};
  const char header[] = "{\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]},"
                        "\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[3,11]}} ";
  uint64_t length = sizeof header - 1;
  float values[2] = {1.5f, -2.5f};
  memcpy(bytes, &length, 8);
  memcpy(bytes + 8, header, length);
  memcpy(bytes + 8 + length + 3, values, sizeof values);
  write_bytes("odd.safetensors", bytes, 8 + length + 11);
  attn_safetensors *file;
  attn_tensor read;
  assert_ok(attn_safetensors_open(in_directory("odd.safetensors"), &file));
  assert_ok(attn_safetensors_find(file, "b", &read));
  assert_int_equal((uintptr_t)read.data % sizeof(float), 0);
  assert_memory_equal(read.data, values, sizeof values);
  attn_safetensors_close(file);
}

static void malformed_headers(void **state) {
  (void)state;
#define TENSOR(dtype, shape, begin, end)                                                           \
  "{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #begin "," #end "]}"
  static const struct {
    const char *header;
    size_t data;
    attn_status status;
    const char *message;
  } cases[] = {
      {"", 0, ATTN_BAD_FORMAT, "'{'"},
      {"[1]", 0, ATTN_BAD_FORMAT, "'{'"},
      {"{", 0, ATTN_BAD_FORMAT, "not valid JSON"},
      {"{\"a\":1}", 0, ATTN_BAD_FORMAT, "\"a\""},
      {"{\"a\":{}}", 0, ATTN_BAD_FORMAT, "dtype"},
      {"{\"__metadata__\":[]}", 0, ATTN_BAD_FORMAT, "__metadata__"},
      {"{\"__metadata__\":{\"k\":1}}", 0, ATTN_BAD_FORMAT, "\"k\" is not a string"},
      {"{\"a\":" TENSOR("F31", "[1]", 0, 4) "}", 4, ATTN_BAD_FORMAT, "F31"},
      {"{\"a\":" TENSOR("F32", "1", 0, 4) "}", 4, ATTN_BAD_FORMAT, "an array"},
      {"{\"a\":" TENSOR("F32", "[-1]", 0, 4) "}", 4, ATTN_BAD_FORMAT, "extent 0"},
      {"{\"a\":" TENSOR("F32", "[1.5]", 0, 4) "}", 4, ATTN_BAD_FORMAT, "extent 0"},
      {"{\"a\":" TENSOR("F32", "[99999999999999999999]", 0, 4) "}", 4, ATTN_BAD_FORMAT, "JSON"},
      {"{\"a\":" TENSOR("F32", "[4294967296,4294967296]", 0, 4) "}", 4, ATTN_BAD_FORMAT,
       "overflows"},
      {"{\"a\":" TENSOR("F32", "[0,4294967296,4294967296]", 0, 0) "}", 0, ATTN_BAD_FORMAT,
       "overflows"},
      {"{\"a\":" TENSOR("F32", "[1,1,1,1,1,1,1,1,1]", 0, 4) "}", 4, ATTN_UNSUPPORTED, "rank 9"},
      {"{\"a\":" TENSOR("F32", "[2]", 0, 4) "}", 4, ATTN_BAD_FORMAT, "need 8 bytes"},
      {"{\"a\":" TENSOR("F32", "[1]", 4, 0) "}", 4, ATTN_BAD_FORMAT, "outside the data"},
      {"{\"a\":" TENSOR("F32", "[1]", -4, 0) "}", 4, ATTN_BAD_FORMAT, "outside the data"},
      {"{\"a\":" TENSOR("F32", "[1]", 0, 4) "}", 3, ATTN_BAD_FORMAT, "outside the data"},
      {"{\"a\":" TENSOR("F32", "[1]", 0, 4) "}", 5, ATTN_BAD_FORMAT, "5 bytes of data"},
      {"{\"a\":" TENSOR("F32", "[1]", 4, 8) "}", 8, ATTN_BAD_FORMAT, "after"},
      {"{\"a\":" TENSOR("F32", "[1]", 0, 4) ",\"b\":" TENSOR("F32", "[1]", 2, 6) "}", 6,
       ATTN_BAD_FORMAT, "before"},
      {"{\"a\":" TENSOR("F32", "[1]", 0, 4) ",\"b\":" TENSOR("F32", "[1]", 8, 12) "}", 12,
       ATTN_BAD_FORMAT, "after"},
      {"{\"a\":" TENSOR("F32", "[1]", 0, 4) ",\"a\":" TENSOR("F32", "[1]", 4, 8) "}", 8,
       ATTN_BAD_FORMAT, "duplicate"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i)
    assert_refused(cases[i].header, cases[i].data, cases[i].status, cases[i].message);

  attn_safetensors *file;
  uint64_t huge = UINT64_MAX - 7; /* 8 + length would wrap */
  write_bytes("bad.safetensors", &huge, 8);
  assert_int_equal(attn_safetensors_open(in_directory("bad.safetensors"), &file), ATTN_BAD_FORMAT);
  write_bytes("bad.safetensors", "short", 5);
  assert_int_equal(attn_safetensors_open(in_directory("bad.safetensors"), &file), ATTN_BAD_FORMAT);
  assert_int_equal(attn_safetensors_open(in_directory("absent"), &file), ATTN_NOT_FOUND);
  assert_int_equal(attn_safetensors_open(directory, &file), ATTN_NOT_FOUND);

  attn_tensor tensor; /* a dtype of the format that libattn lacks does not spoil the file */
  write_header("lacks.safetensors", "{\"a\":" TENSOR("U32", "[1]", 0, 4) "}", 4);
  assert_ok(attn_safetensors_open(in_directory("lacks.safetensors"), &file));
  assert_int_equal(attn_safetensors_find(file, "a", &tensor), ATTN_UNSUPPORTED);
  attn_safetensors_close(file);
#undef TENSOR
}

static void write_shard(const char *name, const char *tensor, float value) {
  attn_named_tensor named = {.name = tensor};
  attn_metadata metadata = {"from", name};
  assert_ok(attn_tensor_wrap(&value, ATTN_F32, 0, NULL, &named.tensor));
  assert_ok(attn_safetensors_write(in_directory(name), &named, 1, &metadata, 1));
}

static void sharded_models(void **state) {
  (void)state;
  const char *index = in_directory("model.safetensors.index.json");
  char path[256];
  strcpy(path, index);
  write_shard("s1.safetensors", "a", 1);
  write_shard("s2.safetensors", "b", 2);
#define INDEX(map) "{\"metadata\":{\"total_size\":8,\"origin\":\"index\"},\"weight_map\":{" map "}}"
  static const char good[] = INDEX("\"a\":\"s1.safetensors\",\"b\":\"s2.safetensors\"");
  attn_safetensors *file;
  attn_tensor tensor;
  write_bytes("model.safetensors.index.json", good, sizeof good - 1);
  const char *ways[] = {path, directory}; /* by the index and by its directory */
  for (int i = 0; i < 2; ++i) {
    assert_ok(attn_safetensors_open(ways[i], &file));
    assert_int_equal(attn_safetensors_count(file), 2);
    assert_ok(attn_safetensors_find(file, "b", &tensor));
    assert_true(*(float *)tensor.data == 2);
    assert_string_equal(attn_safetensors_metadata(file, "origin"), "index");
    assert_string_equal(attn_safetensors_metadata(file, "from"), "s1.safetensors");
    attn_safetensors_close(file);
  }
  static const struct {
    const char *index;
    attn_status status;
    const char *message;
  } bad[] = {
      {"{}", ATTN_BAD_FORMAT, "weight_map"},
      {INDEX(""), ATTN_BAD_FORMAT, "0 shards"},
      {INDEX("\"a\":3"), ATTN_BAD_FORMAT, "file name"},
      {INDEX("\"a\":\"../s1.safetensors\""), ATTN_BAD_FORMAT, "file name"},
      {INDEX("\"a\":\"s1.safetensors\",\"c\":\"s2.safetensors\""), ATTN_BAD_FORMAT, "\"c\""},
      {INDEX("\"a\":\"s3.safetensors\""), ATTN_NOT_FOUND, "s3"},
  };
  for (size_t i = 0; i < sizeof bad / sizeof *bad; ++i) {
    write_bytes("model.safetensors.index.json", bad[i].index, strlen(bad[i].index));
    attn_status status = attn_safetensors_open(path, &file);
    if (status != bad[i].status || !strstr(attn_error_message(), bad[i].message))
      fail_msg("%s: %s", bad[i].index, attn_error_message());
  }
  write_shard("s2.safetensors", "a", 2); /* the same tensor in two shards */
  write_bytes("model.safetensors.index.json", good, sizeof good - 1);
  assert_int_equal(attn_safetensors_open(path, &file), ATTN_BAD_FORMAT);
  assert_non_null(strstr(attn_error_message(), "two shards"));
  assert_int_equal(unlink(path), 0);
}

/* Reads everything that a consumer would. */
static unsigned touch(const attn_safetensors *file) {
  unsigned sum = 0;
  for (int64_t i = 0; i < attn_safetensors_count(file); ++i) {
    attn_tensor tensor;
    sum += (unsigned)strlen(attn_safetensors_name(file, i));
    if (attn_safetensors_get(file, i, &tensor) != ATTN_OK) continue;
    size_t size = (size_t)attn_tensor_count(&tensor) * attn_dtype_size(tensor.dtype);
    for (size_t b = 0; b < size; ++b) sum += ((unsigned char *)tensor.data)[b];
  }
  return sum;
}

static char *make_valid(size_t *size) {
  float values[12] = {0};
  int64_t shape[] = {3, 4};
  attn_named_tensor named[2] = {{"layers.0.weight", {0}}, {"layers.1.weight", {0}}};
  attn_metadata metadata = {"format", "pt"};
  for (int i = 0; i < 2; ++i)
    assert_ok(attn_tensor_wrap(values, i ? ATTN_BF16 : ATTN_F32, 2, shape, &named[i].tensor));
  const char *path = in_directory("valid.safetensors");
  assert_ok(attn_safetensors_write(path, named, 2, &metadata, 1));
  char *bytes;
  assert_ok(attn_file_read(path, 1 << 20, &bytes, size));
  return bytes;
}

/* Either it opens and all of it can be read, or it is a clean error with a message. */
static bool survives(const char *bytes, size_t size) {
  attn_safetensors *file;
  write_bytes("mutant.safetensors", bytes, size);
  attn_status status = attn_safetensors_open(in_directory("mutant.safetensors"), &file);
  if (status == ATTN_OK) {
    touch(file);
    attn_safetensors_close(file);
    return true;
  }
  assert_null(file);
  assert_true(status == ATTN_BAD_FORMAT || status == ATTN_UNSUPPORTED);
  assert_true(strlen(attn_error_message()) > 0);
  return false;
}

static void mutants_never_crash(void **state) {
  (void)state;
  enum { MUTANTS = 6000 };
  static const char interesting[] = "0123456789-+.eE[]{},:\"\\ \n\0\x7f\xff";
  size_t size, live = attn_memory_get_stats().live_bytes, refused = 0;
  char *valid = make_valid(&size);
  assert_true(survives(valid, size));
  for (size_t cut = 0; cut < size; ++cut) assert_false(survives(valid, cut));
  attn_random random = {.seed = 11};
  char *mutant = malloc(size);
  assert_non_null(mutant);
  for (int i = 0; i < MUTANTS; ++i) {
    memcpy(mutant, valid, size);
    size_t header = size - 72; /* mutate the length and the header; the data cannot be wrong */
    int changes = 1 + (int)attn_random_below(&random, 4);
    for (int c = 0; c < changes; ++c) {
      size_t place = attn_random_below(&random, header);
      if (place < 8 && c) place = 8 + attn_random_below(&random, header - 8);
      mutant[place] = attn_random_below(&random, 2)
                          ? interesting[attn_random_below(&random, sizeof interesting - 1)]
                          : (char)attn_random_u32(&random);
    }
    refused += !survives(mutant, size);
  }
  assert_true(refused > MUTANTS / 2); /* most changes are structural */
  free(mutant);
  attn_free(valid);
  assert_int_equal(attn_memory_get_stats().live_bytes, live);
}

/* The same for the index of a sharded model. */
static void mutated_indices_never_crash(void **state) {
  (void)state;
  enum { MUTANTS = 2000 };
  static const char good[] = INDEX("\"a\":\"i1.safetensors\",\"b\":\"i2.safetensors\"");
  write_shard("i1.safetensors", "a", 1);
  write_shard("i2.safetensors", "b", 2);
  attn_random random = {.seed = 12};
  size_t live = attn_memory_get_stats().live_bytes;
  for (int i = 0; i < MUTANTS; ++i) {
    char mutant[sizeof good];
    memcpy(mutant, good, sizeof good);
    for (int c = 0; c < 1 + i % 3; ++c)
      mutant[attn_random_below(&random, sizeof good - 1)] =
          (char)(i % 2 ? attn_random_u32(&random)
                       : (uint32_t)good[attn_random_below(&random, sizeof good - 1)]);
    write_bytes("mutant.index.json", mutant, sizeof good - 1);
    attn_safetensors *file;
    attn_status status = attn_safetensors_open(in_directory("mutant.index.json"), &file);
    if (status == ATTN_OK)
      touch(file);
    else
      assert_true(status == ATTN_BAD_FORMAT || status == ATTN_NOT_FOUND ||
                  status == ATTN_INVALID_ARGUMENT); /* ".": a directory */
    attn_safetensors_close(file);
    assert_int_equal(attn_memory_get_stats().live_bytes, live);
  }
}

/* Every allocation and file operation fails once: a clean error, nothing leaked, and the file that
 * stood there before is whole. */
static void faults_while_writing(void **state) {
  (void)state;
  float old = 1, fresh[600][2] = {{2}};
  int64_t shape[] = {2, 600};
  attn_named_tensor before = {.name = "w"}, after = {.name = "w"};
  attn_tensor matrix;
  assert_ok(attn_tensor_wrap(&old, ATTN_F32, 0, NULL, &before.tensor));
  assert_ok(attn_tensor_wrap(fresh, ATTN_F32, 2, (int64_t[]){600, 2}, &matrix));
  assert_ok(attn_tensor_permute(&matrix, (int[]){1, 0}, &after.tensor)); /* needs packing */
  assert_int_equal(after.tensor.shape[1], shape[1]);
  const char *path = in_directory("faults/w.safetensors");
  char target[256];
  strcpy(target, path);
  assert_ok(attn_make_directories(in_directory("faults")));
  assert_ok(attn_safetensors_write(target, &before, 1, NULL, 0));
  size_t live = attn_memory_get_stats().live_bytes;
  for (int kind = 0; kind < ATTN_FAULT_KINDS; ++kind) {
    int skip = 0;
    for (;; ++skip) {
      attn_fault_arm((attn_fault_kind)kind, skip);
      attn_status status = attn_safetensors_write(target, &after, 1, NULL, 0);
      bool hit = attn_fault_disarm((attn_fault_kind)kind);
      assert_int_equal(attn_memory_get_stats().live_bytes, live);
      if (!hit) {
        assert_ok(status);
        break;
      }
      assert_int_equal(status, kind == ATTN_FAULT_ALLOC ? ATTN_OUT_OF_MEMORY : ATTN_IO_ERROR);
      char command[300];
      snprintf(command, sizeof command, "test $(ls -A %s/faults | wc -l) = 1", directory);
      assert_int_equal(system(command), 0); /* no temporary left */
      attn_safetensors *file;
      attn_tensor tensor;
      assert_ok(attn_safetensors_open(target, &file));
      assert_ok(attn_safetensors_find(file, "w", &tensor));
      assert_true(tensor.rank == 0 && *(float *)tensor.data == 1);
      attn_safetensors_close(file);
    }
    assert_true(skip >= 3);
    assert_ok(attn_safetensors_write(target, &before, 1, NULL, 0));
  }
}

static void faults_while_opening(void **state) {
  (void)state;
  write_shard("f1.safetensors", "a", 1);
  write_shard("f2.safetensors", "b", 2);
  static const char index[] = INDEX("\"a\":\"f1.safetensors\",\"b\":\"f2.safetensors\"");
  write_bytes("f.index.json", index, sizeof index - 1);
  char path[256];
  strcpy(path, in_directory("f.index.json"));
  size_t live = attn_memory_get_stats().live_bytes;
  for (int kind = 0; kind < ATTN_FAULT_KINDS; ++kind) {
    int skip = 0;
    for (;; ++skip) {
      attn_safetensors *file;
      attn_fault_arm((attn_fault_kind)kind, skip);
      attn_status status = attn_safetensors_open(path, &file);
      bool hit = attn_fault_disarm((attn_fault_kind)kind);
      if (!hit) {
        assert_ok(status);
        attn_safetensors_close(file);
        break;
      }
      assert_null(file);
      assert_int_equal(status, kind == ATTN_FAULT_ALLOC ? ATTN_OUT_OF_MEMORY : ATTN_IO_ERROR);
      assert_int_equal(attn_memory_get_stats().live_bytes, live);
    }
    assert_true(skip >= 5);
    assert_int_equal(attn_memory_get_stats().live_bytes, live);
  }
}

static void bad_arguments_of_write(void **state) {
  (void)state;
  float value = 0;
  attn_tensor scalar, missing;
  assert_ok(attn_tensor_wrap(&value, ATTN_F32, 0, NULL, &scalar));
  assert_ok(attn_tensor_wrap(NULL, ATTN_F32, 0, NULL, &missing));
  const struct {
    attn_named_tensor tensors[2];
    int count;
    const char *message;
  } cases[] = {
      {{{"", scalar}}, 1, "cannot name"},
      {{{NULL, scalar}}, 1, "cannot name"},
      {{{"__metadata__", scalar}}, 1, "cannot name"},
      {{{"a", missing}}, 1, "no data"},
      {{{"a", scalar}, {"a", scalar}}, 2, "two tensors"},
      {{{"\xff\xfe", scalar}}, 1, "UTF-8"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    const char *path = in_directory("never.safetensors");
    assert_int_equal(attn_safetensors_write(path, cases[i].tensors, cases[i].count, NULL, 0),
                     ATTN_INVALID_ARGUMENT);
    assert_non_null(strstr(attn_error_message(), cases[i].message));
    assert_false(attn_path_exists(path));
  }
  attn_named_tensor good = {"a", scalar};
  assert_int_equal(attn_safetensors_write("/nowhere/x.safetensors", &good, 1, NULL, 0),
                   ATTN_NOT_FOUND);
  assert_int_equal(attn_safetensors_write(directory, &good, 1, NULL, 0), ATTN_INVALID_ARGUMENT);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_dtype_returns),
      cmocka_unit_test(a_foreign_file),
      cmocka_unit_test(strides_ranks_and_empty_tensors),
      cmocka_unit_test(data_is_aligned),
      cmocka_unit_test(unaligned_tensors_are_copied),
      cmocka_unit_test(malformed_headers),
      cmocka_unit_test(sharded_models),
      cmocka_unit_test(mutants_never_crash),
      cmocka_unit_test(mutated_indices_never_crash),
      cmocka_unit_test(faults_while_writing),
      cmocka_unit_test(faults_while_opening),
      cmocka_unit_test(bad_arguments_of_write),
  };
  return cmocka_run_group_tests(tests, make_directory, remove_directory);
}

/* Writing safetensors a tensor at a time, and models in several files. */
#include "support/test.h"

#include "base/fault.h"
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/json.h"
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

static int empty_directory(void **state) {
  char command[128];
  (void)state;
  snprintf(command, sizeof command, "rm -rf %s/*", directory);
  return system(command);
}

static int make_directory(void **state) {
  (void)state;
  snprintf(directory, sizeof directory, "%s/attn-writing-XXXXXX",
           access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
  return mkdtemp(directory) ? 0 : -1;
}

static int remove_directory(void **state) {
  (void)state;
  char command[128];
  snprintf(command, sizeof command, "rm -r %s", directory);
  return system(command);
}

static int count_files(void) {
  char command[160];
  int count = -1;
  snprintf(command, sizeof command, "ls -A %s | wc -l", directory);
  FILE *pipe = popen(command, "r");
  assert_non_null(pipe);
  assert_int_equal(fscanf(pipe, "%d", &count), 1);
  pclose(pipe);
  return count;
}

/* A tensor at a time ----------------------------------------------------------------------------
 */

/* Every dtype of the format, those that libattn lacks too: [4, 2] each. */
static const struct {
  const char *name;
  int bytes;
} dtypes[] = {
    {"F64", 64},    {"F32", 32},        {"BF16", 16},       {"F16", 16},    {"I64", 64},
    {"I32", 32},    {"I16", 16},        {"I8", 8},          {"U8", 8},      {"BOOL", 8},
    {"U16", 16},    {"U32", 32},        {"U64", 64},        {"F8_E4M3", 8}, {"F8_E5M2", 8},
    {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"F6_E2M3", 6}, {"F6_E3M2", 6},
    {"F4", 4},      {"C64", 64},
};
enum { DTYPES = sizeof dtypes / sizeof *dtypes };

static attn_described_tensor described(int i) {
  return (attn_described_tensor){
      .name = dtypes[i].name, .dtype = dtypes[i].name, .rank = 2, .shape = {4, 2}};
}

static void write_every_dtype(const char *path, unsigned char *bytes) {
  attn_described_tensor all[DTYPES];
  attn_safetensors_writer *writer;
  for (int i = 0; i < DTYPES; ++i) all[i] = described(i);
  assert_ok(attn_safetensors_writer_open(path, all, DTYPES, NULL, 0, &writer));
  for (int i = 0, at = 0; i < DTYPES; at += dtypes[i++].bytes)
    assert_ok(attn_safetensors_writer_add(writer, bytes + at, (uint64_t)dtypes[i].bytes));
  assert_ok(attn_safetensors_writer_commit(writer));
}

static void any_dtype_passes_through(void **state) {
  (void)state;
  unsigned char bytes[DTYPES * 64];
  char from[256], to[256];
  for (size_t i = 0; i < sizeof bytes; ++i) bytes[i] = (unsigned char)(i * 37 + 5);
  strcpy(from, in_directory("from.safetensors"));
  strcpy(to, in_directory("to.safetensors"));
  write_every_dtype(from, bytes);

  attn_safetensors *file, *copy;
  attn_described_tensor all[DTYPES], again;
  attn_safetensors_writer *writer;
  assert_ok(attn_safetensors_open(from, &file));
  assert_int_equal(attn_safetensors_count(file), DTYPES);
  for (int i = 0; i < DTYPES; ++i) assert_ok(attn_safetensors_describe(file, i, &all[i]));
  assert_int_equal(attn_safetensors_describe(file, DTYPES, &again), ATTN_INVALID_ARGUMENT);
  assert_ok(attn_safetensors_writer_open(to, all, DTYPES, NULL, 0, &writer));
  for (int i = 0; i < DTYPES; ++i)
    assert_ok(attn_safetensors_writer_add(writer, all[i].data, all[i].bytes));
  assert_false(attn_path_exists(to));
  assert_ok(attn_safetensors_writer_finish(writer));
  assert_false(attn_path_exists(to));
  assert_ok(attn_safetensors_writer_commit(writer));

  assert_ok(attn_safetensors_open(to, &copy));
  assert_int_equal(attn_safetensors_count(copy), DTYPES);
  for (int i = 0; i < DTYPES; ++i) {
    assert_ok(attn_safetensors_describe(copy, i, &again));
    assert_string_equal(again.dtype, again.name);
    assert_true(again.rank == 2 && again.shape[0] == 4 && again.shape[1] == 2);
    assert_int_equal(again.bytes, all[i].bytes);
    assert_memory_equal(again.data, all[i].data, again.bytes);
  }
  attn_safetensors_close(copy);
  attn_safetensors_close(file);
}

static void what_was_not_announced_is_refused(void **state) {
  (void)state;
  static const struct {
    attn_described_tensor tensor;
    attn_status status;
    const char *message;
  } cases[] = {
      {{.name = "a", .dtype = "F31"}, ATTN_INVALID_ARGUMENT, "tensor \"a\": dtype \"F31\""},
      {{.name = "a"}, ATTN_INVALID_ARGUMENT, "dtype \"(null)\""},
      {{.name = "a", .dtype = "F4", .rank = 1, .shape = {3}}, ATTN_BAD_FORMAT, "12 bits of F4"},
      {{.name = "a", .dtype = "U8", .rank = 1, .shape = {-1}}, ATTN_INVALID_ARGUMENT, "negative"},
      {{.name = "a", .dtype = "U8", .rank = 9}, ATTN_INVALID_ARGUMENT, "rank 9"},
      {{.name = "a", .dtype = "U64", .rank = 2, .shape = {1LL << 40, 1LL << 40}},
       ATTN_BAD_FORMAT,
       "overflows"},
      {{.name = "__metadata__", .dtype = "U8"}, ATTN_INVALID_ARGUMENT, "cannot name"},
  };
  attn_safetensors_writer *writer;
  for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i) {
    attn_status status = attn_safetensors_writer_open(in_directory("never.safetensors"),
                                                      &cases[i].tensor, 1, NULL, 0, &writer);
    if (status != cases[i].status || !strstr(attn_error_message(), cases[i].message))
      fail_msg("%d: %s", (int)i, attn_error_message());
    assert_null(writer);
  }
  attn_described_tensor two[] = {described(1), described(2)};
  char bytes[64] = {0};
  assert_ok(
      attn_safetensors_writer_open(in_directory("never.safetensors"), two, 2, NULL, 0, &writer));
  assert_int_equal(attn_safetensors_writer_add(writer, bytes, 31), ATTN_INVALID_ARGUMENT);
  assert_non_null(strstr(attn_error_message(), "31 bytes, the header has 32"));
  assert_ok(attn_safetensors_writer_add(writer, bytes, 32));
  assert_int_equal(attn_safetensors_writer_finish(writer), ATTN_INVALID_ARGUMENT);
  assert_non_null(strstr(attn_error_message(), "1 of 2 tensors"));
  assert_ok(attn_safetensors_writer_add(writer, bytes, 16));
  assert_int_equal(attn_safetensors_writer_add(writer, bytes, 0), ATTN_INVALID_ARGUMENT);
  attn_safetensors_writer_abort(writer);
  assert_int_equal(count_files(), 0);
}

/* Several files ---------------------------------------------------------------------------------
 */

enum { MOST = 8 };

typedef struct model {
  int64_t sizes[MOST + 1]; /* bytes of tensors a, b, c ...; ends with 0 */
  uint8_t value;           /* of every byte */
} model;

static const char *const tensor_names[MOST] = {"a", "b", "c", "d", "e", "f", "g", "h"};

static attn_status make_tensor(void *context, int64_t index, attn_tensor *tensor) {
  const model *m = context;
  ATTN_TRY(attn_tensor_create(ATTN_U8, 1, &m->sizes[index], tensor));
  memset(tensor->data, m->value, (size_t)m->sizes[index]);
  return ATTN_OK;
}

static attn_status save(const model *m, int64_t shard_bytes) {
  attn_described_tensor tensors[MOST];
  int64_t count = 0;
  for (; m->sizes[count]; ++count)
    tensors[count] = (attn_described_tensor){
        .name = tensor_names[count], .dtype = "U8", .rank = 1, .shape = {m->sizes[count]}};
  return attn_safetensors_save(directory, tensors, count, shard_bytes, make_tensor,
                               (void *)(uintptr_t)m);
}

static void assert_holds(const model *m) {
  attn_safetensors *file;
  attn_tensor tensor;
  int64_t count = 0;
  assert_ok(attn_safetensors_open(directory, &file));
  for (; m->sizes[count]; ++count) {
    assert_ok(attn_safetensors_find(file, tensor_names[count], &tensor));
    assert_int_equal(tensor.shape[0], m->sizes[count]);
    for (int64_t i = 0; i < tensor.shape[0]; ++i)
      assert_int_equal(((uint8_t *)tensor.data)[i], m->value);
  }
  assert_int_equal(attn_safetensors_count(file), count);
  attn_safetensors_close(file);
}

/* The first two are the examples of huggingface_hub's own description; all are what its
 * split_state_dict_into_shards_factory gives. */
static void files_are_divided_as_transformers_does(void **state) {
  (void)state;
  static const struct {
    model model;
    int64_t limit;
    const char *files; /* the number of each tensor's */
  } cases[] = {
      {{{6, 6, 2, 6, 2, 2}, 1}, 10, "122333"},
      {{{30, 6, 2}, 1}, 10, "122"},
      {{{6, 2, 30, 2, 6}, 1}, 10, "22123"},
      {{{5, 5, 5, 5}, 1}, 10, "1122"},
      {{{5, 5}, 1}, 10, "0"},
      {{{5, 5, 1}, 1}, 0, "0"},
      {{{30}, 1}, 10, "0"},
      {{{30, 30}, 1}, 10, "12"},
  };
  for (size_t c = 0; c < sizeof cases / sizeof *cases; ++c) {
    const model *m = &cases[c].model;
    char expected[64];
    json_t *index;
    int shards = 0;
    int64_t total = 0;
    assert_int_equal(empty_directory(NULL), 0);
    assert_ok(save(m, cases[c].limit));
    assert_holds(m);
    if (*cases[c].files == '0') {
      assert_int_equal(count_files(), 1);
      assert_true(attn_path_exists(in_directory("model.safetensors")));
      continue;
    }
    for (const char *f = cases[c].files; *f; ++f) shards = *f - '0' > shards ? *f - '0' : shards;
    assert_int_equal(count_files(), shards + 1);
    assert_ok(attn_json_load(in_directory("model.safetensors.index.json"), &index));
    json_t *map = json_object_get(index, "weight_map");
    for (int i = 0; m->sizes[i]; ++i) {
      total += m->sizes[i];
      snprintf(expected, sizeof expected, "model-0000%c-of-0000%d.safetensors", cases[c].files[i],
               shards);
      assert_string_equal(json_string_value(json_object_get(map, tensor_names[i])), expected);
    }
    json_t *size = json_object_get(json_object_get(index, "metadata"), "total_size");
    assert_int_equal(json_integer_value(size), total);
    json_decref(index);
  }
}

static void too_many_files_are_refused(void **state) {
  (void)state;
  enum { COUNT = 4097 };
  attn_described_tensor *tensors = calloc(COUNT, sizeof *tensors);
  char(*names)[12] = calloc(COUNT, sizeof *names);
  for (int i = 0; i < COUNT; ++i) {
    snprintf(names[i], sizeof names[i], "%d", i);
    tensors[i] = (attn_described_tensor){.name = names[i], .dtype = "U8", .rank = 1, .shape = {2}};
  }
  assert_int_equal(attn_safetensors_save(directory, tensors, COUNT, 2, make_tensor, NULL),
                   ATTN_INVALID_ARGUMENT);
  assert_non_null(strstr(attn_error_message(), "4096 files of at most 2 bytes"));
  assert_int_equal(count_files(), 0);
  free(names);
  free(tensors);
}

static void write_note(const char *name) {
  FILE *file = fopen(in_directory(name), "w");
  assert_non_null(file);
  assert_int_equal(fclose(file), 0);
}

/* Weights of before are gone, whatever was before and comes after; what is not theirs stays. */
static void earlier_weights_give_way(void **state) {
  (void)state;
  static const char *const others[] = {"config.json",
                                       "model-00001-of-00002.safetensors.bak",
                                       "model-1-of-2.safetensors",
                                       "extra-00001-of-00002.safetensors",
                                       "xmodel.safetensors",
                                       "model-00001-of-00002.gguf"};
  enum { OTHERS = sizeof others / sizeof *others };
  static const int64_t limits[] = {0, 10, 5, 2}; /* 1, 2, 4 and (2 is less than a tensor) 4 files */
  static const int files[] = {1, 3, 5, 5};
  for (int i = 0; i < OTHERS; ++i) write_note(others[i]);
  for (int a = 0; a < 4; ++a)
    for (int b = 0; b < 4; ++b) {
      model before = {{5, 5, 5, 5}, 1}, after = {{5, 5, 5, 5}, 2};
      assert_ok(save(&before, limits[a]));
      assert_ok(save(&after, limits[b]));
      assert_holds(&after);
      assert_int_equal(count_files(), OTHERS + files[b]);
    }
}

/* Whatever fails: nothing leaks, no temporary stays, and what can be loaded is all old or all new.
 * Only where shards replace as many others may there be nothing. */
static void faults_leave_one_model(void **state) {
  (void)state;
  static const int64_t limits[] = {0, 10, 5};
  for (int a = 0; a < 3; ++a)
    for (int b = 0; b < 3; ++b)
      for (int kind = 0; kind < ATTN_FAULT_KINDS; ++kind) {
        model before = {{5, 5, 5, 5}, 1}, after = {{5, 5, 5, 5}, 2};
        bool failed = true;
        for (int skip = 0; failed; ++skip) {
          assert_int_equal(empty_directory(NULL), 0);
          assert_ok(save(&before, limits[a]));
          size_t live = attn_memory_get_stats().live_bytes;
          attn_fault_arm((attn_fault_kind)kind, skip);
          attn_status status = save(&after, limits[b]);
          failed = attn_fault_disarm((attn_fault_kind)kind);
          assert_int_equal(attn_memory_get_stats().live_bytes, live);
          if (!failed) {
            assert_ok(status);
            assert_true(skip > 5);
            break;
          }
          assert_int_equal(status, kind == ATTN_FAULT_ALLOC ? ATTN_OUT_OF_MEMORY : ATTN_IO_ERROR);
          char command[160];
          snprintf(command, sizeof command, "! ls %s | grep -q tmp", directory);
          assert_int_equal(system(command), 0);
          attn_safetensors *file;
          attn_tensor tensor;
          status = attn_safetensors_open(directory, &file);
          if (status == ATTN_NOT_FOUND && a == b && a > 0) continue;
          assert_ok(status);
          assert_ok(attn_safetensors_find(file, "a", &tensor));
          bool fresh = *(uint8_t *)tensor.data == after.value;
          attn_safetensors_close(file);
          assert_holds(fresh ? &after : &before);
        }
      }
}

/* Writing takes the memory of one tensor and, for each file, of a buffer. */
static void one_tensor_is_in_memory(void **state) {
  (void)state;
  enum { SIZE = 4 << 20, SLACK = 1 << 20 };
  model large = {{SIZE, SIZE, SIZE, SIZE, SIZE, SIZE, SIZE, SIZE}, 3};
  for (int64_t limit = 0; limit <= SIZE; limit += SIZE) {
    attn_memory_reset_peak();
    size_t live = attn_memory_get_stats().live_bytes;
    assert_ok(save(&large, limit));
    assert_true(attn_memory_get_stats().peak_bytes - live < SIZE + SLACK);
  }
}

int main(int argc, char **argv) {
  if (argc > 1) cmocka_set_test_filter(argv[1]); /* a pattern of names */
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup(any_dtype_passes_through, empty_directory),
      cmocka_unit_test_setup(what_was_not_announced_is_refused, empty_directory),
      cmocka_unit_test_setup(files_are_divided_as_transformers_does, empty_directory),
      cmocka_unit_test_setup(too_many_files_are_refused, empty_directory),
      cmocka_unit_test_setup(earlier_weights_give_way, empty_directory),
      cmocka_unit_test_setup(faults_leave_one_model, empty_directory),
      cmocka_unit_test_setup(one_tensor_is_in_memory, empty_directory),
  };
  return cmocka_run_group_tests(tests, make_directory, remove_directory);
}

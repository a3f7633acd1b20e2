/* Writing GGUF: what is written is read again, in one file and in several; files that do not belong
 * together are refused. */
#include "support/test.h"

#include "base/fault.h"
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/gguf_split.h"
#include "files/gguf_write.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

static const char fixture[] = ATTN_SOURCE_DIR "/tests/unit/fixtures/small.gguf";
static char directory[64];

static int make_directory(void **state) {
  (void)state;
  snprintf(directory, sizeof directory, "/tmp/attn-gguf-XXXXXX");
  return mkdtemp(directory) ? 0 : -1;
}

static int remove_directory(void **state) {
  (void)state;
  char command[128];
  snprintf(command, sizeof command, "rm -r %s", directory);
  return system(command);
}

static const char *in_directory(const char *name) {
  static char path[2][256];
  static int turn;
  turn = !turn;
  snprintf(path[turn], sizeof path[turn], "%s/%s", directory, name);
  return path[turn];
}

/* All keys and tensors of a file, as they are. */
static attn_gguf_draft *draft_of(const attn_gguf *file) {
  attn_gguf_draft *draft = attn_gguf_draft_create();
  assert_non_null(draft);
  for (int64_t i = 0; i < attn_gguf_key_count(file); ++i) attn_gguf_add_copy(draft, file, i);
  for (int64_t i = 0; i < attn_gguf_tensor_count(file); ++i) {
    const attn_gguf_tensor *t = attn_gguf_tensor_at(file, i);
    assert_ok(attn_gguf_add_tensor(draft, t->name, t->type, t->rank, t->shape));
  }
  return draft;
}

static attn_status fill_from(const void *context, int64_t index, attn_gguf_sink *sink) {
  const attn_gguf_tensor *t = attn_gguf_tensor_at(context, index);
  ATTN_TRY(attn_gguf_put(sink, t->data, t->bytes / 2));
  return attn_gguf_put(sink, (const char *)t->data + t->bytes / 2, t->bytes - t->bytes / 2);
}

static void assert_same_values(const attn_gguf *a, const attn_gguf *b, int64_t i, int64_t k) {
  attn_gguf_list x = attn_gguf_values(a, i), y = attn_gguf_values(b, k);
  assert_int_equal(attn_gguf_key_type(a, i), attn_gguf_key_type(b, k));
  assert_int_equal(x.type, y.type);
  assert_int_equal(x.count, y.count);
  for (int64_t e = 0; e < x.count && x.type == ATTN_GGUF_STRING; ++e) {
    attn_gguf_text s = attn_gguf_string_at(&x, e), t = attn_gguf_string_at(&y, e);
    assert_int_equal(s.size, t.size);
    assert_memory_equal(s.data, t.data, s.size);
  }
  if (x.type != ATTN_GGUF_STRING)
    assert_memory_equal(x.data, y.data, (size_t)x.count * attn_gguf_type_size(x.type));
}

/* b has all of a, and `more` keys. */
static void assert_same(const attn_gguf *a, const attn_gguf *b, int64_t more) {
  assert_int_equal(attn_gguf_key_count(b), attn_gguf_key_count(a) + more);
  for (int64_t i = 0, k = 0; i < attn_gguf_key_count(a); ++i, ++k) {
    while (strcmp(attn_gguf_key(a, i), attn_gguf_key(b, k)) != 0) ++k;
    assert_same_values(a, b, i, k);
  }
  assert_int_equal(attn_gguf_tensor_count(a), attn_gguf_tensor_count(b));
  for (int64_t i = 0; i < attn_gguf_tensor_count(a); ++i) {
    const attn_gguf_tensor *s = attn_gguf_tensor_at(a, i), *t = attn_gguf_tensor_at(b, i);
    assert_string_equal(s->name, t->name);
    assert_int_equal(s->type, t->type);
    assert_int_equal(s->rank, t->rank);
    assert_memory_equal(s->shape, t->shape, (size_t)s->rank * sizeof *s->shape);
    assert_int_equal(s->bytes, t->bytes);
    assert_memory_equal(s->data, t->data, s->bytes);
  }
}

static void files_are_written_again(void **state) {
  (void)state;
  attn_gguf *file, *again;
  assert_ok(attn_gguf_open(fixture, &file));
  attn_gguf_draft *draft = draft_of(file);
  assert_true(attn_gguf_has_key(draft, "general.architecture"));
  assert_false(attn_gguf_has_key(draft, "general"));
  assert_ok(attn_gguf_draft_write(draft, in_directory("again.gguf"), 0, fill_from, file, NULL));
  assert_ok(attn_gguf_open(in_directory("again.gguf"), &again));
  assert_int_equal(attn_gguf_version(again), 3);
  assert_same(file, again, 0);
  attn_gguf_draft_destroy(draft);
  attn_gguf_close(file);
  attn_gguf_close(again);
}

static attn_status fill_nothing(const void *context, int64_t index, attn_gguf_sink *sink) {
  (void)context, (void)index, (void)sink;
  return ATTN_OK;
}

static attn_status fill_too_much(const void *context, int64_t index, attn_gguf_sink *sink) {
  static const char bytes[256];
  (void)context, (void)index;
  return attn_gguf_put(sink, bytes, sizeof bytes);
}

static void values_of_every_kind(void **state) {
  (void)state;
  static const int32_t ints[] = {1, -2};
  static const float floats[] = {0.5f};
  attn_gguf_draft *draft = attn_gguf_draft_create();
  attn_gguf *file;
  attn_gguf_list list;
  attn_gguf_text text;
  int64_t integer = 0;
  double real = 0;
  bool flag = false;
  attn_gguf_add_u32(draft, "u", 4000000000u);
  attn_gguf_add_f32(draft, "f", 0.25f);
  attn_gguf_add_bool(draft, "b", true);
  attn_gguf_add_string(draft, "s", "x\0y", 3);
  attn_gguf_add_i32s(draft, "is", ints, 2);
  attn_gguf_add_f32s(draft, "fs", floats, 1);
  attn_gguf_add_u8s(draft, "us", "\xff\1", 2);
  attn_gguf_add_strings(draft, "ss", 2);
  attn_gguf_add_element(draft, "", 0);
  attn_gguf_add_element(draft, "ab", 2);
  attn_gguf_add_i32s(draft, "none", NULL, 0);
  assert_ok(attn_gguf_draft_write(draft, in_directory("keys.gguf"), 0, fill_nothing, NULL, NULL));
  assert_ok(attn_gguf_open(in_directory("keys.gguf"), &file));
  assert_ok(attn_gguf_int(file, "u", ATTN_REQUIRED, 0, INT64_MAX, &integer));
  assert_int_equal(integer, 4000000000);
  assert_ok(attn_gguf_double(file, "f", ATTN_REQUIRED, 0, 1, &real));
  assert_true(real == 0.25);
  assert_ok(attn_gguf_bool(file, "b", ATTN_REQUIRED, &flag));
  assert_true(flag);
  assert_ok(attn_gguf_string(file, "s", ATTN_REQUIRED, &text));
  assert_int_equal(text.size, 3);
  assert_ok(attn_gguf_ints(file, "is", ATTN_REQUIRED, -2, 1, &list));
  assert_int_equal(attn_gguf_int_at(&list, 1), -2);
  assert_ok(attn_gguf_ints(file, "us", ATTN_REQUIRED, 0, 255, &list));
  assert_int_equal(list.type, ATTN_GGUF_U8);
  assert_int_equal(list.count, 2);
  assert_int_equal(attn_gguf_int_at(&list, 0), 255);
  assert_ok(attn_gguf_doubles(file, "fs", ATTN_REQUIRED, &list));
  assert_true(attn_gguf_double_at(&list, 0) == 0.5);
  assert_ok(attn_gguf_strings(file, "ss", ATTN_REQUIRED, &list));
  assert_int_equal(attn_gguf_string_at(&list, 0).size, 0);
  assert_memory_equal(attn_gguf_string_at(&list, 1).data, "ab", 2);
  assert_ok(attn_gguf_array(file, "none", ATTN_REQUIRED, &list));
  assert_int_equal(list.count, 0);
  attn_gguf_close(file);

  const int64_t shape[] = {2, 33};
  assert_int_equal(attn_gguf_add_tensor(draft, "t", ATTN_BLOCK_Q8_0, 2, shape), ATTN_INVALID_SHAPE);
  assert_ok(attn_gguf_add_tensor(draft, "t", ATTN_BLOCK_F16, 1, shape));
  const char *path = in_directory("wrong.gguf");
  assert_int_equal(attn_gguf_draft_write(draft, path, 0, fill_nothing, NULL, NULL), ATTN_INTERNAL);
  assert_int_equal(attn_gguf_draft_write(draft, path, 0, fill_too_much, NULL, NULL), ATTN_INTERNAL);
  assert_false(attn_path_exists(path));
  attn_gguf_draft_destroy(draft);
}

/* -- Several files -- */

enum { SPLIT_KEYS = 3 };

/* The fixture in shards NAME-00001-of-0000N.gguf of at most `bytes`. */
static void write_shards(const char *name, int64_t bytes, int expected) {
  attn_gguf *file;
  assert_ok(attn_gguf_open(fixture, &file));
  attn_gguf_draft *draft = draft_of(file);
  const char *path = in_directory(name);
  assert_ok(attn_gguf_draft_write(draft, path, bytes, fill_from, file, NULL));
  for (int i = 0; i <= expected; ++i) {
    char *shard = attn_gguf_shard_path(path, i, expected);
    assert_int_equal(attn_path_exists(shard), i < expected);
    attn_free(shard);
  }
  assert_false(attn_path_exists(path));
  attn_gguf_draft_destroy(draft);
  attn_gguf_close(file);
}

static int64_t data_bytes(void) {
  attn_gguf *file;
  int64_t sum = 0;
  assert_ok(attn_gguf_open(fixture, &file));
  for (int64_t i = 0; i < attn_gguf_tensor_count(file); ++i)
    sum += ((int64_t)attn_gguf_tensor_at(file, i)->bytes + 31) / 32 * 32;
  attn_gguf_close(file);
  return sum;
}

static void any_shard_stands_for_all(void **state) {
  (void)state;
  attn_gguf *file, *again;
  int64_t tensors;
  assert_ok(attn_gguf_open(fixture, &file));
  tensors = attn_gguf_tensor_count(file);
  write_shards("two.gguf", data_bytes() - 1, 2);
  for (int i = 0; i < 2; ++i) {
    char *path = attn_gguf_shard_path(in_directory("two"), i, 2);
    assert_ok(attn_gguf_open(path, &again));
    assert_same(file, again, SPLIT_KEYS);
    attn_gguf_close(again);
    attn_free(path);
  }
  write_shards("each.gguf", 1, (int)tensors); /* a tensor in each */
  char *path = attn_gguf_shard_path(in_directory("each"), 3, (int)tensors);
  assert_ok(attn_gguf_open(path, &again));
  assert_same(file, again, SPLIT_KEYS);
  attn_free(path);
  attn_gguf_close(again);
  attn_gguf_close(file);
}

static void assert_refused(const char *name, attn_status status, const char *message) {
  attn_gguf *file;
  size_t live = attn_memory_get_stats().live_bytes;
  assert_int_equal(attn_gguf_open(in_directory(name), &file), status);
  if (!strstr(attn_error_message(), message)) fail_msg("%s: %s", name, attn_error_message());
  assert_null(file);
  assert_int_equal(attn_memory_get_stats().live_bytes, live);
}

static void copy_file(const char *from, const char *to) {
  char *data;
  size_t size;
  assert_ok(attn_file_read(in_directory(from), 1 << 24, &data, &size));
  assert_ok(attn_file_write(in_directory(to), data, size));
  attn_free(data);
}

/* Sets what stands `skip` bytes behind a key: its value. */
static void change(const char *name, const char *key, const void *value, size_t size) {
  char *data, *place;
  size_t length;
  assert_ok(attn_file_read(in_directory(name), 1 << 24, &data, &length));
  place = memmem(data, length, key, strlen(key));
  assert_non_null(place);
  memcpy(place + strlen(key) + 4, value, size);
  assert_ok(attn_file_write(in_directory(name), data, length));
  attn_free(data);
}

static void shards_that_do_not_belong_together(void **state) {
  (void)state;
  static const char first[] = "s-00001-of-00002.gguf", second[] = "s-00002-of-00002.gguf";
  write_shards("s.gguf", data_bytes() - 1, 2);
  copy_file(first, "alone.gguf");
  assert_refused("alone.gguf", ATTN_BAD_FORMAT, "-00001-of-00002.gguf");
  copy_file(first, "t-00001-of-00002.gguf");
  assert_refused("t-00001-of-00002.gguf", ATTN_NOT_FOUND, "t-00002-of-00002.gguf");
  assert_refused("t-00001-of-00002.gguf", ATTN_NOT_FOUND, "a shard of 2 is missing");
  copy_file(first, "t-00002-of-00002.gguf"); /* its number is not the name's */
  assert_refused("t-00001-of-00002.gguf", ATTN_BAD_FORMAT, "split.no is 0");
  assert_refused("t-00002-of-00002.gguf", ATTN_BAD_FORMAT, "-00001-of-00002.gguf");

  /* The same tensors twice. */
  const uint16_t one = 1, three = 3;
  change("t-00002-of-00002.gguf", "split.no", &one, sizeof one);
  const int32_t tensors = 1000;
  assert_refused("t-00001-of-00002.gguf", ATTN_BAD_FORMAT, "split.tensors.count");
  attn_gguf *file;
  assert_ok(attn_gguf_open_one(in_directory(first), &file));
  const int32_t twice = (int32_t)(2 * attn_gguf_tensor_count(file));
  attn_gguf_close(file);
  change("t-00001-of-00002.gguf", "split.tensors.count", &twice, sizeof twice);
  assert_refused("t-00001-of-00002.gguf", ATTN_BAD_FORMAT, "two tensors are named");

  change(second, "split.count", &three, sizeof three);
  assert_refused(first, ATTN_BAD_FORMAT, "split.count 3, expected 1 and 2");
  write_shards("s.gguf", data_bytes() - 1, 2);
  change(first, "split.tensors.count", &tensors, sizeof tensors);
  assert_refused(second, ATTN_BAD_FORMAT, "split.tensors.count is 1000");
  const uint16_t many = 65535;
  change(first, "split.count", &many, sizeof many);
  assert_refused(first, ATTN_BAD_FORMAT, "split.count");
}

/* Every allocation and file operation fails once: a clean error, no part of a file, no leak. */
static void faults(void **state) {
  (void)state;
  write_shards("f.gguf", data_bytes() - 1, 2);
  size_t live = attn_memory_get_stats().live_bytes;
  for (int kind = 0; kind < ATTN_FAULT_KINDS; ++kind)
    for (int skip = 0;; ++skip) {
      attn_gguf *file, *read = NULL;
      assert_ok(attn_gguf_open(fixture, &file));
      attn_gguf_draft *draft = draft_of(file);
      attn_fault_arm((attn_fault_kind)kind, skip);
      attn_status status =
          attn_gguf_draft_write(draft, in_directory("g.gguf"), 2000, fill_from, file, NULL);
      if (status == ATTN_OK) status = attn_gguf_open(in_directory("f-00002-of-00002.gguf"), &read);
      bool hit = attn_fault_disarm((attn_fault_kind)kind);
      attn_gguf_draft_destroy(draft);
      attn_gguf_close(file);
      attn_gguf_close(read);
      assert_int_equal(attn_memory_get_stats().live_bytes, live);
      if (!hit) {
        assert_ok(status);
        break;
      }
      assert_int_equal(status, kind == ATTN_FAULT_ALLOC ? ATTN_OUT_OF_MEMORY : ATTN_IO_ERROR);
    }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(files_are_written_again),
      cmocka_unit_test(values_of_every_kind),
      cmocka_unit_test(any_shard_stands_for_all),
      cmocka_unit_test(shards_that_do_not_belong_together),
      cmocka_unit_test(faults),
  };
  return cmocka_run_group_tests(tests, make_directory, remove_directory);
}

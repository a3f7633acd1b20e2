/* Files, JSON configurations, corpora, close names. */
#include "support/test.h"

#include "base/fault.h"
#include "base/memory.h"
#include "base/random.h"
#include "base/status.h"
#include "base/text.h"
#include "files/corpus.h"
#include "base/io.h"
#include "files/json.h"

#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

/* In memory where the system has that: every commit of a file waits for the disk. */
static char directory[64];

/* Two paths at a time may be in use. */
static const char *in_directory(const char *name) {
  static char paths[2][256];
  static int turn;
  turn = !turn;
  snprintf(paths[turn], sizeof paths[turn], "%s/%s", directory, name);
  return paths[turn];
}

static int make_directory(void **state) {
  (void)state;
  snprintf(directory, sizeof directory, "%s/attn-files-XXXXXX",
           access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
  return mkdtemp(directory) ? 0 : -1;
}

static int remove_directory(void **state) {
  (void)state;
  char command[128];
  snprintf(command, sizeof command, "rm -r %s", directory);
  return system(command);
}

static void put(const char *name, const char *text) {
  FILE *file = fopen(in_directory(name), "wb");
  assert_non_null(file);
  fputs(text, file);
  assert_int_equal(fclose(file), 0);
}

static void assert_contents(const char *path, const char *expected) {
  char *text;
  size_t size;
  assert_ok(attn_file_read(path, 1 << 20, &text, &size));
  assert_int_equal(size, strlen(expected));
  assert_string_equal(text, expected);
  attn_free(text);
}

static void paths(void **state) {
  (void)state;
  static const char *const joins[][3] = {
      {"a", "b", "a/b"}, {"a/", "b", "a/b"}, {"a", "/b", "/b"}, {"", "b", "b"}, {"/", "b", "/b"}};
  for (int i = 0; i < 5; ++i) {
    char *path = attn_path_join(joins[i][0], joins[i][1]);
    assert_string_equal(path, joins[i][2]);
    attn_free(path);
  }
  static const char *const parents[][2] = {{"a/b/c", "a/b"}, {"c", "."}, {"/c", "/"}};
  for (int i = 0; i < 3; ++i) {
    char *path = attn_path_directory(parents[i][0]);
    assert_string_equal(path, parents[i][1]);
    attn_free(path);
  }
  assert_true(attn_path_has_suffix("x.json", ".json"));
  assert_false(attn_path_has_suffix("json", ".json"));
  const char *deep = in_directory("x/y//z");
  assert_ok(attn_make_directories(deep));
  assert_ok(attn_make_directories(deep)); /* again is fine */
  assert_true(attn_path_is_directory(deep));
  put("plain", "1");
  assert_int_equal(attn_make_directories(in_directory("plain")), ATTN_IO_ERROR);
  assert_int_equal(attn_make_directories(in_directory("plain/below")), ATTN_IO_ERROR);
}

static void reading(void **state) {
  (void)state;
  char *text = NULL;
  size_t size;
  attn_file_map map;
  put("seven", "1234567");
  assert_contents(in_directory("seven"), "1234567");
  assert_int_equal(attn_file_read(in_directory("seven"), 6, &text, &size), ATTN_BAD_FORMAT);
  assert_int_equal(attn_file_read(in_directory("none"), 6, &text, &size), ATTN_NOT_FOUND);
  assert_non_null(strstr(attn_error_message(), "none: No such file"));
  assert_int_equal(attn_file_read(directory, 6, &text, &size), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_file_map_open(directory, &map), ATTN_INVALID_ARGUMENT);
  assert_ok(attn_file_read("/proc/self/status", 1 << 20, &text, &size)); /* reports size 0 */
  assert_true(size > 100);
  attn_free(text);
  assert_int_equal(attn_file_read("/proc/self/status", 50, &text, &size), ATTN_BAD_FORMAT);
  assert_ok(attn_file_map_open(in_directory("seven"), &map));
  assert_int_equal(map.size, 7);
  assert_memory_equal(map.data, "1234567", 7);
  attn_file_map_close(&map);
  attn_file_map_close(&map); /* twice is fine */
  put("empty", "");
  assert_ok(attn_file_map_open(in_directory("empty"), &map));
  assert_true(map.size == 0 && map.data);
  attn_file_map_close(&map);
}

static void writing_replaces_whole(void **state) {
  (void)state;
  attn_file_writer *writer;
  char path[256], link[256];
  strcpy(path, in_directory("target"));
  strcpy(link, in_directory("link"));
  put("target", "old");
  assert_int_equal(chmod(path, 0640), 0);
  assert_int_equal(symlink("target", link), 0);
  assert_ok(attn_file_writer_open(link, &writer)); /* through a link: the link stays */
  for (int i = 0; i < 100000; ++i) assert_ok(attn_file_writer_write(writer, "ab", 2));
  assert_contents(path, "old"); /* until the commit */
  char *large = malloc(1 << 20);
  assert_non_null(large);
  memset(large, 'c', 1 << 20);
  assert_ok(attn_file_writer_write(writer, large, 1 << 20));
  free(large);
  assert_ok(attn_file_writer_commit(writer));
  struct stat information;
  assert_int_equal(lstat(link, &information), 0);
  assert_true(S_ISLNK(information.st_mode));
  assert_int_equal(stat(path, &information), 0);
  assert_int_equal(information.st_size, 200000 + (1 << 20));
  assert_int_equal(information.st_mode & 0777, 0640);
  assert_ok(attn_file_writer_open(path, &writer));
  assert_ok(attn_file_writer_write(writer, "new", 3));
  attn_file_writer_abort(writer);
  assert_int_equal(stat(path, &information), 0);
  assert_int_equal(information.st_size, 200000 + (1 << 20));
  assert_int_equal(attn_file_write(in_directory("no/such"), "x", 1), ATTN_NOT_FOUND);
}

/* A target that is not a regular file must be written to, never renamed over. A pipe of our own
 * stands for devices such as /dev/stdout: broken code must not be able to harm the machine. */
static void pipes_are_written_directly(void **state) {
  (void)state;
  char path[256], received[8] = "";
  struct stat information;
  strcpy(path, in_directory("pipe"));
  assert_int_equal(mkfifo(path, 0600), 0);
  int reader = open(path, O_RDONLY | O_NONBLOCK);
  assert_true(reader >= 0);
  assert_ok(attn_file_write(path, "through", 7));
  assert_int_equal(read(reader, received, sizeof received), 7);
  assert_string_equal(received, "through");
  attn_file_writer *writer;
  assert_ok(attn_file_writer_open(path, &writer));
  close(reader);
  void (*handler)(int) = signal(SIGPIPE, SIG_IGN);
  assert_ok(attn_file_writer_write(writer, "lost", 4)); /* in the buffer */
  assert_int_equal(attn_file_writer_commit(writer), ATTN_IO_ERROR);
  assert_non_null(strstr(attn_error_message(), "Broken pipe"));
  signal(SIGPIPE, handler);
  assert_int_equal(stat(path, &information), 0);
  assert_true(S_ISFIFO(information.st_mode));
  attn_file_map map;
  reader = open(path, O_RDWR); /* so that opening for reading does not wait */
  assert_int_equal(attn_file_map_open(path, &map), ATTN_INVALID_ARGUMENT);
  close(reader);
}

/* The system refuses bytes in the middle of a file, as a full disk does. */
static void full_disk(void **state) {
  (void)state;
  struct rlimit before, small;
  char path[256], command[300], *large = calloc(1, 1 << 20);
  assert_non_null(large);
  assert_ok(attn_make_directories(in_directory("full")));
  strcpy(path, in_directory("full/target"));
  put("full/target", "old");
  assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
  small = before;
  small.rlim_cur = 100000;
  void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
  attn_status status = attn_file_write(path, large, 1 << 20);
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
  signal(SIGXFSZ, handler);
  free(large);
  assert_int_equal(status, ATTN_IO_ERROR);
  assert_non_null(strstr(attn_error_message(), "target: File too large"));
  assert_contents(path, "old");
  snprintf(command, sizeof command, "test $(ls -A %s/full | wc -l) = 1", directory);
  assert_int_equal(system(command), 0); /* no temporary left */
}

/* Every operation of a body fails once; the body cleans up after itself. */
static int walk_faults(attn_status (*body)(void)) {
  size_t live = attn_memory_get_stats().live_bytes;
  int walked = 0;
  for (int kind = 0; kind < ATTN_FAULT_KINDS; ++kind)
    for (int skip = 0;; ++skip, ++walked) {
      attn_fault_arm((attn_fault_kind)kind, skip);
      attn_status status = body();
      bool hit = attn_fault_disarm((attn_fault_kind)kind);
      assert_int_equal(attn_memory_get_stats().live_bytes, live);
      if (!hit) {
        assert_ok(status);
        break;
      }
      assert_int_equal(status, kind == ATTN_FAULT_ALLOC ? ATTN_OUT_OF_MEMORY : ATTN_IO_ERROR);
    }
  return walked;
}

static attn_status read_and_write(void) {
  char *text;
  ATTN_TRY(attn_make_directories(in_directory("made/here")));
  ATTN_TRY(attn_file_read(in_directory("seven"), 100, &text, NULL));
  attn_status status = attn_file_write(in_directory("made/copy"), text, strlen(text));
  attn_free(text);
  rmdir(in_directory("made/here"));
  return status;
}

static attn_status open_corpus(void) {
  const char *path = in_directory("corpus");
  attn_corpus *corpus;
  attn_status status = attn_corpus_open(&path, 1, 0.1, &corpus);
  attn_corpus_close(corpus);
  return status;
}

static attn_status load_config(void) {
  json_t *config;
  attn_status status = attn_json_load(in_directory("config.json"), &config);
  json_decref(config);
  return status;
}

static void faults(void **state) {
  (void)state;
  put("seven", "1234567");
  put("config.json", "{\"a\": 1}");
  assert_ok(attn_make_directories(in_directory("corpus/sub")));
  put("corpus/a", "some text");
  put("corpus/sub/b", "and more of it");
  assert_true(walk_faults(read_and_write) > 10);
  assert_true(walk_faults(open_corpus) > 8);
  assert_true(walk_faults(load_config) > 3);
}

static void config_getters(void **state) {
  (void)state;
  static const char text[] =
      "{\"n\": 12, \"x\": 0.5, \"flag\": true, \"name\": \"lightning\", \"none\": null,"
      " \"list\": [1, 2], \"sub\": {\"k\": 1}, \"big\": 1e300}";
  static const char *const names[] = {"softmax", "lightning"};
  json_t *config, *array = NULL, *object = NULL;
  assert_ok(attn_json_parse(text, sizeof text - 1, "test", &config));
  int64_t n = 7;
  double x = 7;
  bool flag = false;
  const char *name = NULL;
  int choice = -1;
  assert_ok(attn_json_int(config, "n", ATTN_REQUIRED, 1, 12, &n));
  assert_int_equal(n, 12);
  assert_ok(attn_json_double(config, "x", ATTN_REQUIRED, 0, 1, &x));
  assert_true(x == 0.5);
  assert_ok(attn_json_double(config, "n", ATTN_REQUIRED, 0, 20, &x)); /* integers are numbers */
  assert_true(x == 12);
  assert_ok(attn_json_bool(config, "flag", ATTN_REQUIRED, &flag));
  assert_true(flag);
  assert_ok(attn_json_string(config, "name", ATTN_REQUIRED, &name));
  assert_string_equal(name, "lightning");
  assert_ok(attn_json_choice(config, "name", ATTN_REQUIRED, names, 2, &choice));
  assert_int_equal(choice, 1);
  assert_ok(attn_json_array(config, "list", ATTN_REQUIRED, &array));
  assert_int_equal(json_array_size(array), 2);
  assert_ok(attn_json_object(config, "sub", ATTN_REQUIRED, &object));
  n = 7;
  assert_ok(attn_json_int(config, "absent", ATTN_OPTIONAL, 1, 12, &n));
  assert_ok(attn_json_int(config, "none", ATTN_OPTIONAL, 1, 12, &n));
  assert_int_equal(n, 7); /* the default stays */

#define REFUSED(call, words)                                                                       \
  do {                                                                                             \
    assert_int_equal(call, ATTN_BAD_FORMAT);                                                       \
    if (!strstr(attn_error_message(), words)) fail_msg("%s", attn_error_message());                \
  } while (0)
  REFUSED(attn_json_int(config, "n", ATTN_OPTIONAL, 1, 11, &n),
          "\"n\": expected an integer from 1 to 11, found 12");
  REFUSED(attn_json_int(config, "x", ATTN_OPTIONAL, 1, 11, &n), "found 0.5");
  REFUSED(attn_json_int(config, "absent", ATTN_REQUIRED, 1, 11, &n), "\"absent\" is missing");
  REFUSED(attn_json_int(config, "none", ATTN_REQUIRED, 1, 11, &n), "\"none\" is missing");
  REFUSED(attn_json_double(config, "big", ATTN_OPTIONAL, 0, 1, &x), "\"big\"");
  REFUSED(attn_json_double(config, "name", ATTN_OPTIONAL, -INFINITY, INFINITY, &x), "lightning");
  REFUSED(attn_json_bool(config, "n", ATTN_OPTIONAL, &flag), "true or false");
  REFUSED(attn_json_string(config, "list", ATTN_OPTIONAL, &name), "an array of 2");
  REFUSED(attn_json_choice(config, "name", ATTN_OPTIONAL, names, 1, &choice),
          "one of \"softmax\", found \"lightning\"");
  REFUSED(attn_json_choice(config, "n", ATTN_OPTIONAL, names, 2, &choice), "found 12");
  REFUSED(attn_json_array(config, "sub", ATTN_OPTIONAL, &array), "an object");
  REFUSED(attn_json_object(config, "flag", ATTN_OPTIONAL, &object), "found true");
#undef REFUSED
  assert_int_equal(n, 7);

  static const char *const known[] = {"n", "x", "flags", "name", "none", "list", "big"};
  char unknown[256];
  assert_int_equal(attn_json_unknown(config, known, 7, unknown, sizeof unknown), 2);
  assert_string_equal(unknown, "\"flag\"; close: flags, \"sub\"");
  char small[8];
  assert_int_equal(attn_json_unknown(config, known, 7, small, sizeof small), 2);
  json_decref(config);
}

static void bad_json(void **state) {
  (void)state;
  json_t *config;
  static const char *const bad[] = {
      "",        "[]", "{\"a\": 1,}", "{\"a\": 1} x", "{\"a\":1,\"a\":2}", "{\"a\": \"\xff\"}",
      "\"text\""};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; ++i) {
    assert_int_equal(attn_json_parse(bad[i], strlen(bad[i]), "the file", &config), ATTN_BAD_FORMAT);
    assert_non_null(strstr(attn_error_message(), "the file"));
    assert_null(config);
  }
  char deep[10001] = {0}; /* nesting without end must not use up the stack */
  memset(deep, '[', 10000);
  assert_int_equal(attn_json_parse(deep, 10000, "deep", &config), ATTN_BAD_FORMAT);
  json_t *object = json_pack("{s:i, s:f}", "a", 1, "b", 0.1);
  assert_ok(attn_json_save(in_directory("saved.json"), object));
  assert_ok(attn_json_load(in_directory("saved.json"), &config));
  assert_true(json_equal(object, config));
  json_decref(object);
  json_decref(config);
}

/* The whole text of the corpus directory is known, so that every window can be looked up in it. */
static attn_corpus *alphabet(double validation, char whole[2000]) {
  assert_ok(attn_make_directories(in_directory("letters/m")));
  char text[700];
  whole[0] = '\0';
  static const char *const names[] = {"letters/a", "letters/m/x", "letters/z"};
  for (int f = 0; f < 3; ++f) {
    int size = 100 + 250 * f;
    attn_random random = {.seed = 1, .stream = (uint64_t)f};
    for (int i = 0; i < size; ++i) text[i] = (char)('!' + attn_random_below(&random, 90));
    text[size] = '\0';
    put(names[f], text);
    strcat(whole, text);
  }
  put("letters/.hidden", "not this");
  put("letters/empty", "");
  attn_corpus *corpus;
  const char *path = in_directory("letters");
  assert_ok(attn_corpus_open(&path, 1, validation, &corpus));
  return corpus;
}

static void corpus_is_read_in_order(void **state) {
  (void)state;
  char whole[2000];
  attn_corpus *corpus = alphabet(0.25, whole);
  int64_t size = (int64_t)strlen(whole), training = attn_corpus_size(corpus, ATTN_TRAINING);
  assert_int_equal(attn_corpus_files(corpus), 3);
  assert_int_equal(training + attn_corpus_size(corpus, ATTN_VALIDATION), size);
  assert_int_equal(attn_corpus_size(corpus, ATTN_VALIDATION), size / 4);
  int32_t tokens[2000];
  assert_ok(attn_corpus_read(corpus, ATTN_TRAINING, 0, training, tokens)); /* over all files */
  for (int64_t i = 0; i < training; ++i) assert_int_equal(tokens[i], whole[i]);
  assert_ok(attn_corpus_read(corpus, ATTN_VALIDATION, 3, 50, tokens));
  for (int64_t i = 0; i < 50; ++i) assert_int_equal(tokens[i], whole[training + 3 + i]);
  assert_ok(attn_corpus_read(corpus, ATTN_TRAINING, training, 0, tokens));
  assert_int_equal(attn_corpus_read(corpus, ATTN_TRAINING, 1, training, tokens),
                   ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_corpus_read(corpus, ATTN_TRAINING, -1, 1, tokens), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_corpus_read(corpus, ATTN_TRAINING, 1, INT64_MAX, tokens),
                   ATTN_INVALID_ARGUMENT);
  attn_corpus_close(corpus);
}

/* Decoded again the tokens are the text, each part by itself. */
static void corpus_is_encoded(void **state) {
  (void)state;
  char whole[2000];
  attn_corpus *corpus = alphabet(0.25, whole);
  int64_t bytes = attn_corpus_size(corpus, ATTN_TRAINING), place = 0;
  uint64_t before = attn_corpus_fingerprint(corpus);
  attn_tokenizer *tokenizer;
  assert_ok(
      attn_tokenizer_load(ATTN_SOURCE_DIR "/tests/unit/fixtures/tokenizer/gpt2.json", &tokenizer));
  assert_ok(attn_corpus_encode(corpus, tokenizer));
  assert_int_equal(attn_corpus_bytes(corpus, ATTN_TRAINING), bytes);
  assert_true(attn_corpus_fingerprint(corpus) == before);
  for (int part = 0; part < 2; ++part) {
    attn_corpus_part p = (attn_corpus_part)part;
    int32_t tokens[2000];
    attn_text text = {0};
    int64_t size = attn_corpus_size(corpus, p);
    assert_in_range(size, 1, attn_corpus_bytes(corpus, p));
    assert_ok(attn_corpus_read(corpus, p, 0, size, tokens));
    assert_ok(attn_tokenizer_decode(tokenizer, tokens, (size_t)size, 0, &text));
    assert_int_equal(text.length, attn_corpus_bytes(corpus, p));
    assert_memory_equal(text.data, whole + place, text.length);
    place += (int64_t)text.length;
    attn_text_free(&text);
    assert_ok(attn_corpus_batch(corpus, p, 9, 4, 2, 20, tokens));
    assert_int_not_equal(attn_corpus_batch(corpus, p, 9, 4, 1, size, tokens), ATTN_OK);
  }
  attn_tokenizer_destroy(tokenizer);
  attn_corpus_close(corpus);
}

static void batches_are_deterministic_windows(void **state) {
  (void)state;
  enum { BATCH = 64, LENGTH = 30 };
  char whole[2000];
  attn_corpus *corpus = alphabet(0.25, whole);
  int64_t training = attn_corpus_size(corpus, ATTN_TRAINING);
  static int32_t first[BATCH][LENGTH + 1], again[BATCH][LENGTH + 1];
  for (int part = 0; part < 2; ++part) {
    attn_corpus_part p = (attn_corpus_part)part;
    assert_ok(attn_corpus_batch(corpus, p, 9, 4, BATCH, LENGTH, first[0]));
    for (int row = 0; row < BATCH; ++row) {
      char window[LENGTH + 2] = {0};
      for (int i = 0; i <= LENGTH; ++i) window[i] = (char)first[row][i];
      const char *found = strstr(whole, window); /* windows of this text are unique */
      assert_non_null(found);
      int64_t place = found - whole;
      assert_true(part ? place >= training : place + LENGTH < training);
    }
    assert_ok(attn_corpus_batch(corpus, p, 9, 4, BATCH / 2, LENGTH, again[0]));
    assert_memory_equal(first, again, sizeof first / 2); /* rows of a smaller batch are the same */
    assert_ok(attn_corpus_batch(corpus, p, 9, 5, BATCH, LENGTH, again[0]));
    assert_memory_not_equal(first, again, sizeof first);
    assert_ok(attn_corpus_batch(corpus, p, 8, 4, BATCH, LENGTH, again[0]));
    assert_memory_not_equal(first, again, sizeof first);
  }
  /* The first and the last place are drawn too. */
  bool lowest = false, highest = false;
  for (uint64_t step = 0; step < 200; ++step) {
    assert_ok(attn_corpus_batch(corpus, ATTN_TRAINING, 1, step, BATCH, LENGTH, first[0]));
    for (int row = 0; row < BATCH; ++row) {
      lowest = lowest || first[row][0] == whole[0];
      highest = highest || first[row][LENGTH] == whole[training - 1];
    }
  }
  assert_true(lowest && highest);
  int32_t *all = malloc((size_t)(training + 1) * sizeof *all);
  assert_non_null(all);
  assert_ok(attn_corpus_batch(corpus, ATTN_TRAINING, 1, 1, 1, training - 1, all)); /* just fits */
  assert_int_equal(attn_corpus_batch(corpus, ATTN_TRAINING, 1, 1, 1, training, all),
                   ATTN_INVALID_ARGUMENT);
  assert_non_null(strstr(attn_error_message(), "training part"));
  assert_int_equal(attn_corpus_batch(corpus, ATTN_TRAINING, 1, 1, 0, 1, all),
                   ATTN_INVALID_ARGUMENT);
  free(all);
  attn_corpus_close(corpus);
}

static void bad_corpora(void **state) {
  (void)state;
  attn_corpus *corpus;
  put("empty", "");
  put("short", "abc");
  const char *empty = in_directory("empty");
  assert_int_equal(attn_corpus_open(&empty, 1, 0, &corpus), ATTN_INVALID_ARGUMENT);
  assert_non_null(strstr(attn_error_message(), "empty"));
  const char *none = in_directory("nowhere.txt");
  assert_int_equal(attn_corpus_open(&none, 1, 0, &corpus), ATTN_NOT_FOUND);
  assert_int_equal(attn_corpus_open(&none, 0, 0, &corpus), ATTN_INVALID_ARGUMENT);
  const char *path = in_directory("short");
  assert_int_equal(attn_corpus_open(&path, 1, 1, &corpus), ATTN_INVALID_ARGUMENT);
  assert_int_equal(attn_corpus_open(&path, 1, NAN, &corpus), ATTN_INVALID_ARGUMENT);
  assert_null(corpus);
  assert_ok(attn_make_directories(in_directory("loop")));
  put("loop/text", "abc");
  assert_int_equal(symlink(".", in_directory("loop/self")), 0);
  const char *loop = in_directory("loop");
  assert_int_equal(attn_corpus_open(&loop, 1, 0, &corpus), ATTN_INVALID_ARGUMENT);
  assert_non_null(strstr(attn_error_message(), "symbolic links"));
}

static const char *name_at(const void *context, int64_t i) {
  return ((const char *const *)context)[i];
}

static void close_names(void **state) {
  (void)state;
  static const char *const names[] = {"lightning", "gated_deltanet", "deltanet", "softmax"};
  char hint[ATTN_HINT_SIZE];
  assert_int_equal(attn_edit_distance("kitten", "sitting"), 3);
  assert_int_equal(attn_edit_distance("", "abc"), 3);
  assert_string_equal(attn_close_names("lightening", name_at, names, 4, hint),
                      "; close: lightning");
  assert_string_equal(attn_close_names("delta_net", name_at, names, 4, hint), "; close: deltanet");
  assert_string_equal(attn_close_names("zzz", name_at, names, 4, hint), "");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(paths),
      cmocka_unit_test(reading),
      cmocka_unit_test(writing_replaces_whole),
      cmocka_unit_test(pipes_are_written_directly),
      cmocka_unit_test(full_disk),
      cmocka_unit_test(faults),
      cmocka_unit_test(config_getters),
      cmocka_unit_test(bad_json),
      cmocka_unit_test(corpus_is_read_in_order),
      cmocka_unit_test(corpus_is_encoded),
      cmocka_unit_test(batches_are_deterministic_windows),
      cmocka_unit_test(bad_corpora),
      cmocka_unit_test(close_names),
  };
  return cmocka_run_group_tests(tests, make_directory, remove_directory);
}

/* GGUF: the metadata and the quantised tensors of a model in one file, as llama.cpp has them.
 *
 * The format (github.com/ggml-org/ggml, docs/gguf.md), versions 2 and 3, little-endian:
 *   4 bytes        "GGUF"
 *   u32            version
 *   u64, u64       numbers of tensors and of metadata keys
 *   each key       its string, u32 type, value
 *   each tensor    its string, u32 rank, rank extents u64 (the fastest axis first), u32 block type,
 *                  u64 offset
 *   padding        to a multiple of the alignment: the key general.alignment, or 32
 *   the data       offsets count from here and are multiples of the alignment
 * A string is a u64 length and the bytes, not terminated. An array is a u32 type, a u64 count and
 * the elements. */
#ifndef ATTN_FILES_GGUF_H
#define ATTN_FILES_GGUF_H

#include "files/json.h"
#include "tensor/blocks.h"

typedef struct attn_gguf attn_gguf;

/* The file is mapped, not read. Everything is checked here: ATTN_BAD_FORMAT names the file, the key
 * or tensor and what is wrong with it. Of a model in several files (gguf_split.h), any one stands
 * for all: the metadata are the first's, the tensors those of all; ATTN_NOT_FOUND names one that is
 * missing. */
attn_status attn_gguf_open(const char *path, attn_gguf **file);
/* The same of bytes in memory, aligned by 8, which have to outlive `file`. */
attn_status attn_gguf_open_memory(const void *bytes, size_t size, attn_gguf **file);
void attn_gguf_close(attn_gguf *file); /* NULL is fine; ends everything borrowed from it */

int attn_gguf_version(const attn_gguf *file);

/* Metadata. */

typedef enum attn_gguf_type {
  ATTN_GGUF_U8 = 0,
  ATTN_GGUF_I8,
  ATTN_GGUF_U16,
  ATTN_GGUF_I16,
  ATTN_GGUF_U32,
  ATTN_GGUF_I32,
  ATTN_GGUF_F32,
  ATTN_GGUF_BOOL,
  ATTN_GGUF_STRING,
  ATTN_GGUF_ARRAY,
  ATTN_GGUF_U64,
  ATTN_GGUF_I64,
  ATTN_GGUF_F64,
  ATTN_GGUF_TYPES
} attn_gguf_type;

/* "uint8", ..., "string", "array" */
const char *attn_gguf_type_name(attn_gguf_type type);
size_t attn_gguf_type_size(attn_gguf_type type); /* bytes; 0 of strings and arrays */

/* Bytes of the mapped file: not terminated, and not necessarily UTF-8. */
typedef struct attn_gguf_text {
  const char *data;
  size_t size;
} attn_gguf_text;

/* Values of one type in the mapped file: an array, or a single value as an array of one. */
typedef struct attn_gguf_list {
  attn_gguf_type type; /* of the elements */
  int64_t count;
  const unsigned char *data; /* unaligned: use the accessors below */
  const uint64_t *starts;    /* of strings: where each is in `data`; NULL for a single one */
} attn_gguf_list;

/* Keys in ascending order. NULL and ATTN_GGUF_TYPES when the index is outside. */
int64_t attn_gguf_key_count(const attn_gguf *file);
const char *attn_gguf_key(const attn_gguf *file, int64_t index); /* borrowed */
attn_gguf_type attn_gguf_key_type(const attn_gguf *file, int64_t index);
/* Its values, whatever they are. */
attn_gguf_list attn_gguf_values(const attn_gguf *file, int64_t index);

/* Typed getters as those of files/json.h: *value stays as it is when an optional key is absent, and
 * messages name the key, what was expected and what was found. Integers of every width are taken;
 * doubles from float64, integers, and float32, of which the shortest decimal is meant: 0.1. */
attn_status attn_gguf_int(const attn_gguf *file, const char *key, attn_json_need need,
                          int64_t minimum, int64_t maximum, int64_t *value);
attn_status attn_gguf_double(const attn_gguf *file, const char *key, attn_json_need need,
                             double minimum, double maximum, double *value);
attn_status attn_gguf_bool(const attn_gguf *file, const char *key, attn_json_need need,
                           bool *value);
attn_status attn_gguf_string(const attn_gguf *file, const char *key, attn_json_need need,
                             attn_gguf_text *value);
/* An array of any type; of strings; of integers in a closed range (each is looked at); of numbers.
 */
attn_status attn_gguf_array(const attn_gguf *file, const char *key, attn_json_need need,
                            attn_gguf_list *list);
attn_status attn_gguf_strings(const attn_gguf *file, const char *key, attn_json_need need,
                              attn_gguf_list *list);
attn_status attn_gguf_ints(const attn_gguf *file, const char *key, attn_json_need need,
                           int64_t minimum, int64_t maximum, attn_gguf_list *list);
attn_status attn_gguf_doubles(const attn_gguf *file, const char *key, attn_json_need need,
                              attn_gguf_list *list);

/* The i-th element, in constant time. An index outside, or a list of another kind than the name
 * says, gives "" or 0; booleans are the integers 0 and 1, integers are doubles too, and a uint64
 * beyond int64 is INT64_MAX. */
attn_gguf_text attn_gguf_string_at(const attn_gguf_list *list, int64_t i);
int64_t attn_gguf_int_at(const attn_gguf_list *list, int64_t i);
double attn_gguf_double_at(const attn_gguf_list *list, int64_t i);

/* Tensors. */

enum { ATTN_GGUF_MAX_RANK = 4 };

typedef struct attn_gguf_tensor {
  const char *name; /* terminated */
  attn_block_type type;
  int rank;                          /* 1 to 4 */
  int64_t shape[ATTN_GGUF_MAX_RANK]; /* row-major: the last axis is the fastest */
  int64_t count;                     /* elements */
  const void *data;                  /* in the mapped file; aligned by 8 bytes at least */
  size_t bytes;
} attn_gguf_tensor;

/* Tensors in ascending order of their names; borrowed. NULL when the index is outside. */
int64_t attn_gguf_tensor_count(const attn_gguf *file);
const attn_gguf_tensor *attn_gguf_tensor_at(const attn_gguf *file, int64_t index);
/* The same by name. ATTN_NOT_FOUND, with the closest names, when there is none. */
attn_status attn_gguf_find(const attn_gguf *file, const char *name,
                           const attn_gguf_tensor **tensor);

#endif

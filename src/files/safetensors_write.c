/* Writing safetensors files, a tensor at a time. */
#include "base/io.h"
#include "base/memory.h"
#include "base/status.h"
#include "files/json.h"
#include "files/safetensors.h"
#include "files/safetensors_format.h"

#include <stdlib.h>
#include <string.h>

struct attn_safetensors_writer {
  attn_file_writer *file;
  int64_t count, next; /* tensors; the one that comes next */
  uint64_t *bytes;     /* of each */
};

/* The header ----------------------------------------------------------------------------------- */

static attn_status fail_json(const char *what, const char *name) {
  return attn_fail(ATTN_INVALID_ARGUMENT, "%s \"%.128s\": not valid UTF-8, or out of memory", what,
                   name);
}

static attn_status count_bytes(const attn_described_tensor *tensor, uint64_t *bytes) {
  const attn_format_dtype *dtype = tensor->dtype ? attn_format_dtype_named(tensor->dtype) : NULL;
  if (!dtype)
    return attn_fail(ATTN_INVALID_ARGUMENT, "dtype \"%.32s\" is unknown",
                     tensor->dtype ? tensor->dtype : "(null)");
  if (tensor->rank < 0 || tensor->rank > ATTN_MAX_RANK)
    return attn_fail(ATTN_INVALID_ARGUMENT, "rank %d is not in 0 to %d", tensor->rank,
                     ATTN_MAX_RANK);
  for (int i = 0; i < tensor->rank; ++i)
    if (tensor->shape[i] < 0)
      return attn_fail(ATTN_INVALID_ARGUMENT, "extent %d is negative (%lld)", i,
                       (long long)tensor->shape[i]);
  return attn_format_bytes_of(dtype, tensor->rank, tensor->shape, bytes);
}

static attn_status describe_tensor(const attn_described_tensor *tensor, uint64_t *offset,
                                   uint64_t *bytes, json_t *header) {
  const char *name = tensor->name;
  if (!name || !*name || strcmp(name, ATTN_SAFETENSORS_METADATA) == 0)
    return attn_fail(ATTN_INVALID_ARGUMENT, "\"%s\" cannot name a tensor", name ? name : "(null)");
  attn_status status = count_bytes(tensor, bytes);
  if (status != ATTN_OK) return attn_fail_in(status, "tensor \"%.128s\"", name);
  if (json_object_get(header, name))
    return attn_fail(ATTN_INVALID_ARGUMENT, "two tensors are named \"%.128s\"", name);
  uint64_t end = *offset + *bytes;
  json_t *shape = json_array();
  for (int i = 0; i < tensor->rank; ++i)
    json_array_append_new(shape, json_integer(tensor->shape[i]));
  json_t *description = json_pack("{s:s, s:o, s:[I, I]}", "dtype", tensor->dtype, "shape", shape,
                                  "data_offsets", (json_int_t)*offset, (json_int_t)end);
  if (json_object_set_new(header, name, description) != 0) return fail_json("tensor", name);
  *offset = end;
  return ATTN_OK;
}

static attn_status describe_metadata(const attn_metadata *metadata, int64_t count, json_t *header) {
  if (count == 0) return ATTN_OK;
  json_t *object = json_object();
  if (json_object_set_new(header, ATTN_SAFETENSORS_METADATA, object) != 0)
    return fail_json("metadata", ATTN_SAFETENSORS_METADATA);
  for (int64_t i = 0; i < count; ++i)
    if (json_object_set_new(object, metadata[i].key, json_string(metadata[i].value)) != 0)
      return fail_json("metadata", metadata[i].key);
  return ATTN_OK;
}

static attn_status write_header(attn_file_writer *file, const json_t *header) {
  static const char spaces[ATTN_ALIGNMENT + 1] =
      "                                                                ";
  char *text = json_dumps(header, JSON_COMPACT);
  if (!text) return attn_fail(ATTN_OUT_OF_MEMORY, "out of memory while writing the header");
  size_t length = strlen(text), before = ATTN_SAFETENSORS_LENGTH_BYTES + length;
  size_t padding = (ATTN_ALIGNMENT - before % ATTN_ALIGNMENT) % ATTN_ALIGNMENT;
  uint64_t total = length + padding;
  attn_status status = ATTN_OK;
  if (total > ATTN_SAFETENSORS_LARGEST_HEADER)
    status = attn_fail(ATTN_INVALID_ARGUMENT, "a header of %llu bytes is larger than %d",
                       (unsigned long long)total, ATTN_SAFETENSORS_LARGEST_HEADER);
  if (status == ATTN_OK) status = attn_file_writer_write(file, &total, sizeof total);
  if (status == ATTN_OK) status = attn_file_writer_write(file, text, length);
  if (status == ATTN_OK) status = attn_file_writer_write(file, spaces, padding);
  free(text); /* jansson's own allocation */
  return status;
}

/* The file --------------------------------------------------------------------------------------
 */

static attn_status begin(attn_safetensors_writer *writer, const char *path,
                         const attn_described_tensor *tensors, const attn_metadata *metadata,
                         int64_t metadata_count, json_t *header) {
  uint64_t offset = 0;
  writer->bytes = attn_alloc_array((size_t)writer->count + 1, sizeof *writer->bytes);
  if (!writer->bytes) return ATTN_OUT_OF_MEMORY;
  ATTN_TRY(describe_metadata(metadata, metadata_count, header));
  for (int64_t i = 0; i < writer->count; ++i)
    ATTN_TRY(describe_tensor(&tensors[i], &offset, &writer->bytes[i], header));
  ATTN_TRY(attn_file_writer_open(path, &writer->file));
  return write_header(writer->file, header);
}

attn_status attn_safetensors_writer_open(const char *path, const attn_described_tensor *tensors,
                                         int64_t count, const attn_metadata *metadata,
                                         int64_t metadata_count, attn_safetensors_writer **writer) {
  *writer = NULL;
  json_t *header = json_object();
  if (!header) return attn_fail(ATTN_OUT_OF_MEMORY, "out of memory");
  attn_safetensors_writer *fresh = attn_alloc_zero(sizeof *fresh);
  attn_status status = ATTN_OUT_OF_MEMORY;
  if (fresh) {
    fresh->count = count;
    status = begin(fresh, path, tensors, metadata, metadata_count, header);
  }
  json_decref(header);
  if (status == ATTN_OK)
    *writer = fresh;
  else
    attn_safetensors_writer_abort(fresh);
  return status;
}

attn_status attn_safetensors_writer_add(attn_safetensors_writer *writer, const void *data,
                                        uint64_t bytes) {
  if (writer->next == writer->count || bytes != writer->bytes[writer->next])
    return attn_fail(
        ATTN_INVALID_ARGUMENT, "tensor %lld of %lld has %llu bytes, the header has %llu",
        (long long)writer->next, (long long)writer->count, (unsigned long long)bytes,
        writer->next < writer->count ? (unsigned long long)writer->bytes[writer->next] : 0);
  ++writer->next;
  return attn_file_writer_write(writer->file, data, (size_t)bytes);
}

attn_status attn_safetensors_writer_finish(attn_safetensors_writer *writer) {
  if (writer->next != writer->count)
    return attn_fail(ATTN_INVALID_ARGUMENT, "%lld of %lld tensors were written",
                     (long long)writer->next, (long long)writer->count);
  return attn_file_writer_finish(writer->file);
}

attn_status attn_safetensors_writer_commit(attn_safetensors_writer *writer) {
  attn_status status = attn_safetensors_writer_finish(writer);
  if (status == ATTN_OK) {
    status = attn_file_writer_commit(writer->file);
    writer->file = NULL;
  }
  attn_safetensors_writer_abort(writer);
  return status;
}

void attn_safetensors_writer_abort(attn_safetensors_writer *writer) {
  if (!writer) return;
  attn_file_writer_abort(writer->file);
  attn_free(writer->bytes);
  attn_free(writer);
}

const char *attn_safetensors_dtype(attn_dtype dtype) {
  const attn_format_dtype *found = attn_format_dtype_of(dtype);
  return found ? found->name : NULL;
}

/* Tensors in memory -----------------------------------------------------------------------------
 */

static attn_status check_tensor(const attn_named_tensor *named) {
  const attn_tensor *tensor = &named->tensor;
  const char *name = named->name ? named->name : "(null)";
  if (!tensor->data && attn_tensor_count(tensor) != 0)
    return attn_fail(ATTN_INVALID_ARGUMENT, "tensor \"%.128s\" has no data", name);
  if (!attn_format_dtype_of(tensor->dtype))
    return attn_fail(ATTN_INVALID_ARGUMENT, "tensor \"%.128s\" has dtype %d, which is unknown",
                     name, (int)tensor->dtype);
  return ATTN_OK;
}

static attn_status add_tensor(attn_safetensors_writer *writer, const attn_tensor *tensor) {
  uint64_t bytes = (uint64_t)attn_tensor_count(tensor) * attn_dtype_size(tensor->dtype);
  if (attn_tensor_is_contiguous(tensor) && tensor->device.kind == ATTN_CPU)
    return attn_safetensors_writer_add(writer, tensor->data, bytes);
  attn_tensor packed;
  ATTN_TRY(attn_tensor_create(tensor->dtype, tensor->rank, tensor->shape, &packed));
  attn_status status = attn_tensor_copy(tensor, &packed);
  if (status == ATTN_OK) status = attn_safetensors_writer_add(writer, packed.data, bytes);
  attn_tensor_destroy(&packed);
  return status;
}

static attn_status write_all(const char *path, const attn_described_tensor *described,
                             const attn_named_tensor *tensors, int64_t count,
                             const attn_metadata *metadata, int64_t metadata_count) {
  attn_safetensors_writer *writer;
  ATTN_TRY(attn_safetensors_writer_open(path, described, count, metadata, metadata_count, &writer));
  attn_status status = ATTN_OK;
  for (int64_t i = 0; i < count && status == ATTN_OK; ++i)
    status = add_tensor(writer, &tensors[i].tensor);
  if (status == ATTN_OK) return attn_safetensors_writer_commit(writer);
  attn_safetensors_writer_abort(writer);
  return status;
}

attn_status attn_safetensors_write(const char *path, const attn_named_tensor *tensors,
                                   int64_t count, const attn_metadata *metadata,
                                   int64_t metadata_count) {
  for (int64_t i = 0; i < count; ++i) ATTN_TRY(check_tensor(&tensors[i]));
  attn_described_tensor *described = attn_alloc_array((size_t)count + 1, sizeof *described);
  if (!described) return ATTN_OUT_OF_MEMORY;
  for (int64_t i = 0; i < count; ++i) {
    const attn_tensor *tensor = &tensors[i].tensor;
    described[i].name = tensors[i].name;
    described[i].dtype = attn_safetensors_dtype(tensor->dtype);
    described[i].rank = tensor->rank;
    memcpy(described[i].shape, tensor->shape, sizeof tensor->shape);
  }
  attn_status status = write_all(path, described, tensors, count, metadata, metadata_count);
  attn_free(described);
  return status;
}

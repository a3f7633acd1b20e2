#include "models/quantization.h"
#include "base/status.h"

#include <string.h>

const char attn_quantization_key[] = "quantization_config", attn_scale_suffix[] = "_scale_inv";

enum { LARGEST_BLOCK = 1 << 20 };

static attn_status read_block(const json_t *method, attn_quantization *q) {
  json_t *size = json_object_get(method, "weight_block_size");
  q->block_rows = q->block_columns = 128; /* as Transformers takes it */
  if (!size) return ATTN_OK;
  if (json_is_null(size))
    return attn_fail(ATTN_UNSUPPORTED, "weight_block_size is null: one scale for a whole matrix");
  const json_t *rows = json_array_get(size, 0), *columns = json_array_get(size, 1);
  if (json_array_size(size) == 2 && json_is_integer(rows) && json_is_integer(columns)) {
    q->block_rows = json_integer_value(rows);
    q->block_columns = json_integer_value(columns);
    if (q->block_rows > 0 && q->block_rows <= LARGEST_BLOCK && q->block_columns > 0 &&
        q->block_columns <= LARGEST_BLOCK)
      return ATTN_OK;
  }
  return attn_fail(ATTN_BAD_FORMAT, "weight_block_size: expected [rows, columns] from 1 to %d",
                   LARGEST_BLOCK);
}

static attn_status read_method(const json_t *method, attn_quantization *q) {
  const char *name = NULL, *format = "e4m3", *scheme = "dynamic";
  ATTN_TRY(attn_json_string(method, "quant_method", ATTN_REQUIRED, &name));
  if (strcmp(name, "fp8") != 0)
    return attn_fail(ATTN_UNSUPPORTED, "quant_method '%.64s' is not fp8", name);
  ATTN_TRY(attn_json_string(method, "fmt", ATTN_OPTIONAL, &format));
  if (strcmp(format, "e4m3") != 0)
    return attn_fail(ATTN_UNSUPPORTED, "fmt '%.64s' is not e4m3", format);
  /* "dynamic" rounds activations as they come, which is not done here. */
  ATTN_TRY(attn_json_string(method, "activation_scheme", ATTN_OPTIONAL, &scheme));
  if (strcmp(scheme, "dynamic") != 0)
    return attn_fail(ATTN_UNSUPPORTED, "activation_scheme '%.64s' is not dynamic", scheme);
  return read_block(method, q);
}

attn_status attn_quantization_read(const json_t *config, attn_quantization *quantization) {
  json_t *method = NULL;
  *quantization = (attn_quantization){0};
  ATTN_TRY(attn_json_object(config, attn_quantization_key, ATTN_OPTIONAL, &method));
  if (!method) return ATTN_OK;
  attn_status status = read_method(method, quantization);
  return status == ATTN_OK ? ATTN_OK : attn_fail_in(status, "%s", attn_quantization_key);
}

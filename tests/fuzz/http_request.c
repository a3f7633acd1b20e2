/* The body of a request to the server, as each endpoint reads it. */
#include "fuzz.h"

#include "server/request.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static const attn_request_kind kinds[] = {ATTN_REQUEST_CHAT, ATTN_REQUEST_COMPLETION,
                                            ATTN_REQUEST_EMBEDDINGS};
  for (int i = 0; i < 3; ++i) {
    attn_request request;
    char field[ATTN_FIELD_SIZE];
    if (attn_request_parse(kinds[i], (const char *)data, size, &request, field) == ATTN_OK)
      attn_request_free(&request);
  }
  return 0;
}

/* /v1/embeddings. */
#include "server/exchange.h"

/* The embeddings of e->request.inputs; refused until models can give them. */
static enum MHD_Result embed(attn_exchange *e) {
  attn_refuse(e, MHD_HTTP_NOT_IMPLEMENTED, "unsupported", "this model gives no embeddings");
  return MHD_NO;
}

enum MHD_Result attn_answer_embeddings(attn_exchange *e) {
  return attn_read_request(e) ? embed(e) : MHD_NO;
}

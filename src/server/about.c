/* What the server says of itself: /health, /v1/models and the page. */
#include "server/exchange.h"
#include "server/page.h"

enum MHD_Result attn_answer_health(attn_exchange *e) {
  attn_scheduler_counts c = attn_scheduler_count(e->server->scheduler);
  return attn_send_json(e, MHD_HTTP_OK,
                        json_pack("{s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "status", "ok",
                                  "active", (json_int_t)c.active, "waiting", (json_int_t)c.waiting,
                                  "finished", (json_int_t)c.finished, "cancelled",
                                  (json_int_t)c.cancelled, "failed", (json_int_t)c.failed,
                                  "prompt_tokens", (json_int_t)c.prompt_tokens, "completion_tokens",
                                  (json_int_t)c.text_tokens, "reused_tokens",
                                  (json_int_t)c.reused_tokens));
}

/* Besides OpenAI's fields: how long a text may be, and whether the model can chat. */
enum MHD_Result attn_answer_models(attn_exchange *e) {
  const attn_server *s = e->server;
  json_t *model = json_pack("{s:s, s:s, s:I, s:s, s:I, s:s?}", "id", s->options.model_name,
                            "object", "model", "created", (json_int_t)s->created, "owned_by",
                            "libattn", "context_length", (json_int_t)s->options.scheduler.context,
                            "chat_template", attn_model_chat_template(s->model));
  return attn_send_json(e, MHD_HTTP_OK, json_pack("{s:s, s:[o]}", "object", "list", "data", model));
}

/* The page has no use for anything from elsewhere, and none of it shall be loaded. */
enum MHD_Result attn_answer_page(attn_exchange *e) {
  static const char policy[] =
      "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
      "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
      "frame-ancestors 'none'";
  struct MHD_Response *response = MHD_create_response_from_buffer(
      attn_page_size, (void *)(uintptr_t)attn_page, MHD_RESPMEM_PERSISTENT);
  if (!response) return MHD_NO;
  MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, "text/html; charset=utf-8");
  MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_SECURITY_POLICY, policy);
  MHD_add_response_header(response, "Referrer-Policy", "no-referrer");
  return attn_send(e, MHD_HTTP_OK, response);
}

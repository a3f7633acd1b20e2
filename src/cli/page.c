#include "cli/page.h"
#include "base/io.h"
#include "base/memory.h"

static const char style[] =
    ":root{color-scheme:light dark}\n"
    "body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}\n"
    "table{border-collapse:collapse;width:100%}\n"
    "th,td{padding:.25rem .5rem;text-align:right;border-bottom:1px solid #8884}\n"
    "th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}\n"
    "figure{margin:1.5rem 0}svg{max-width:100%;height:auto}\n";

void attn_page_begin(attn_text *out, const char *title) {
  attn_text_print(out, "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>");
  attn_page_text(out, title);
  attn_text_print(out,
                  "</title>\n<meta name=\"viewport\" content=\"width=device-width, "
                  "initial-scale=1\">\n<style>\n%s</style></head><body>\n<h1>",
                  style);
  attn_page_text(out, title);
  attn_text_print(out, "</h1>\n");
}

void attn_page_text(attn_text *out, const char *text) {
  for (; *text; ++text) {
    if (*text == '&')
      attn_text_print(out, "&amp;");
    else if (*text == '<')
      attn_text_print(out, "&lt;");
    else if (*text == '"')
      attn_text_print(out, "&quot;");
    else
      attn_text_add(out, text, 1);
  }
}

void attn_page_end(attn_text *out) {
  attn_text_print(out, "</body></html>\n");
}

attn_status attn_page_write(attn_text *out, const char *path) {
  size_t size = out->length;
  char *text = NULL, *folder = attn_path_directory(path);
  attn_status status = attn_text_take(out, &text);
  if (status == ATTN_OK && !folder) status = ATTN_OUT_OF_MEMORY;
  if (status == ATTN_OK) status = attn_make_directories(folder);
  if (status == ATTN_OK) status = attn_file_write(path, text, size);
  attn_free(folder);
  attn_free(text);
  return status;
}

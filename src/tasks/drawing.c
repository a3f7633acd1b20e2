#include "tasks/drawing.h"

#include <math.h>

float attn_distance(attn_point p, attn_point a, attn_point b) {
  float dx = b.x - a.x, dy = b.y - a.y, square = dx * dx + dy * dy;
  float t = square > 0 ? ((p.x - a.x) * dx + (p.y - a.y) * dy) / square : 0;
  t = fminf(fmaxf(t, 0), 1);
  return hypotf(p.x - a.x - t * dx, p.y - a.y - t * dy);
}

void attn_draw_capsule(const attn_image *image, attn_point a, attn_point b, float radius,
                       float ink) {
  /* Pixels further away than this get nothing. */
  int left = (int)floorf(fminf(a.x, b.x) - radius - 1),
      right = (int)ceilf(fmaxf(a.x, b.x) + radius + 1);
  int top = (int)floorf(fminf(a.y, b.y) - radius - 1),
      bottom = (int)ceilf(fmaxf(a.y, b.y) + radius + 1);
  for (int y = top < 0 ? 0 : top; y <= bottom && y < image->size; ++y)
    for (int x = left < 0 ? 0 : left; x <= right && x < image->size; ++x) {
      float *pixel = &image->pixels[y * image->size + x];
      float cover = radius + 0.5F - attn_distance((attn_point){(float)x, (float)y}, a, b);
      *pixel = fmaxf(*pixel, ink * fminf(fmaxf(cover, 0), 1));
    }
}

void attn_image_tokens(const attn_image *image, int32_t *tokens) {
  for (int i = 0; i < image->size * image->size; ++i)
    tokens[i] = 1 + (int32_t)lrintf(255 * fminf(fmaxf(image->pixels[i], 0), 1));
}

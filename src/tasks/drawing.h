/* Grey images of strokes, for the tasks that read an image pixel by pixel. Coordinates are those of
 * pixel centres, x to the right and y down. */
#ifndef ATTN_TASKS_DRAWING_H
#define ATTN_TASKS_DRAWING_H

#include "tasks/recipe.h"

typedef struct attn_point {
  float x, y;
} attn_point;

typedef struct attn_image {
  int size;      /* rows, and columns */
  float *pixels; /* [size, size]; 0 is black */
} attn_image;

float attn_distance(attn_point p, attn_point a, attn_point b); /* of p from the segment a b */
/* What lies within `radius` of the segment a b becomes at least as bright as `ink`, with a border
 * of one pixel. */
void attn_draw_capsule(const attn_image *image, attn_point a, attn_point b, float radius,
                       float ink);
/* Pixels as tokens, row by row: 1 + 255 times the brightness, between 0 and 1, rounded. */
enum { ATTN_IMAGE_TOKENS = 257 };
void attn_image_tokens(const attn_image *image, int32_t *tokens);

/* A digit 0 .. 9 in clutter, with noise, on 32 x 32 pixels; returns which. */
enum { ATTN_DIGIT_SIZE = 32 };
int attn_draw_digit(attn_recipe *r, const attn_image *image);

#endif

#include "oracles/lora.h"

#include <math.h>
#include <stdlib.h>

void oracle_lora_sum(double *v, const oracle_lora *l) {
  for (int64_t j = 0; j < l->outputs; ++j)
    for (int64_t i = 0; i < l->inputs; ++i) {
      double low = 0;
      for (int64_t k = 0; k < l->rank; ++k) low += l->b[j * l->rank + k] * l->a[k * l->inputs + i];
      v[j * l->inputs + i] = l->w[j * l->inputs + i] + l->scale * low;
    }
}

void oracle_lora_norms(double *n, const oracle_lora *l) {
  double *v = malloc((size_t)(l->outputs * l->inputs) * sizeof *v);
  oracle_lora_sum(v, l);
  for (int64_t j = 0; j < l->outputs; ++j) {
    double square = 0;
    for (int64_t i = 0; i < l->inputs; ++i) square += v[j * l->inputs + i] * v[j * l->inputs + i];
    n[j] = sqrt(square);
  }
  free(v);
}

void oracle_lora_forward(double *y, const oracle_lora *l, const double *n) {
  double *v = malloc((size_t)(l->outputs * l->inputs) * sizeof *v);
  oracle_lora_sum(v, l);
  for (int64_t t = 0; t < l->rows; ++t)
    for (int64_t j = 0; j < l->outputs; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < l->inputs; ++i) sum += v[j * l->inputs + i] * l->x[t * l->inputs + i];
      y[t * l->outputs + j] = l->m ? l->m[j] / n[j] * sum : sum;
    }
  free(v);
}

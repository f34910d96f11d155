/* Classifies a PPM image (binary, P6):  classify net.rvgg image.ppm  */
#include <stdio.h>
#include <stdlib.h>

#include "rvgg.h"

static unsigned char* read_ppm(const char* path, int* width, int* height) {
  FILE* file = fopen(path, "rb");
  unsigned char* pixels = NULL;
  int most = 0;
  if (file && fscanf(file, "P6 %d %d %d", width, height, &most) == 3 && fgetc(file) != EOF &&
      most == 255 && *width > 0 && *height > 0 && *width <= 8192 && *height <= 8192) {
    const size_t size = (size_t)*width * (size_t)*height * 3;
    pixels = malloc(size);
    if (pixels && fread(pixels, 1, size, file) != size) {
      free(pixels);
      pixels = NULL;
    }
  }
  if (file) fclose(file);
  return pixels;
}

int main(int argc, char** argv) {
  char error[256] = "usage: classify net.rvgg image.ppm";
  int width, height, shape[3], result = 1;
  rvgg_engine* engine = argc == 3 ? rvgg_load(argv[1], 0, error, sizeof error) : NULL;
  unsigned char* pixels = engine ? read_ppm(argv[2], &width, &height) : NULL;
  float* logits = NULL;

  if (engine && !pixels) snprintf(error, sizeof error, "%s: no binary PPM image", argv[2]);
  if (pixels && !rvgg_output_shape(engine, height, width, shape) && shape[1] * shape[2] == 1) {
    logits = malloc(sizeof(float) * (size_t)shape[0]);
  }
  if (logits && !rvgg_run(engine, pixels, RVGG_BYTES, 1, height, width, logits, error, sizeof error)) {
    int best = 0;
    for (int i = 1; i < shape[0]; ++i) {
      if (logits[i] > logits[best]) best = i;
    }
    const char* name = rvgg_class_name(engine, best);
    printf("%d %s %.4f\n", best, name ? name : "", (double)logits[best]);
    result = 0;
  } else {
    fprintf(stderr, "%s\n", error);
  }
  free(logits);
  free(pixels);
  rvgg_free(engine);
  return result;
}

/* The engine's C interface: load a network that `repvgg.Engine.save` wrote, run it, free it. */
#ifndef RVGG_H
#define RVGG_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define RVGG_API __attribute__((visibility("default")))
#else
#define RVGG_API
#endif

typedef struct rvgg_engine rvgg_engine;

typedef enum {
  RVGG_BYTES = 0, /* uint8 (count, height, width, channels); the engine normalizes them */
  RVGG_FLOATS = 1 /* float (count, channels, height, width), normalized */
} rvgg_format;

/* threads: 0 for as many as the process may use. On failure NULL, and the reason in `error` (of
   `error_size` bytes, always terminated; may be NULL). */
RVGG_API rvgg_engine* rvgg_load(const char* path, int threads, char* error, size_t error_size);

/* shape: channels, height and width of one result for images of this size. 0, or -1 on failure. */
RVGG_API int rvgg_output_shape(const rvgg_engine* engine, int height, int width, int shape[3]);

/* result: room for count * shape[0] * shape[1] * shape[2] numbers. 0, or -1 on failure, with the
   reason in `error`. Any thread may call; calls on one engine take turns. */
RVGG_API int rvgg_run(rvgg_engine* engine, const void* images, rvgg_format format, int count,
                      int height, int width, float* result, char* error, size_t error_size);

RVGG_API int rvgg_in_channels(const rvgg_engine* engine);

/* NULL if the file names no such class. */
RVGG_API const char* rvgg_class_name(const rvgg_engine* engine, int index);

RVGG_API void rvgg_free(rvgg_engine* engine);

#ifdef __cplusplus
}
#endif
#endif

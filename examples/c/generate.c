// The whole greedy loop in one call of onnxruntime's C API, with a bundle's onnx/generate.onnx.
//
//   generate BUNDLE EOS_TOKEN_ID MAX_NEW_TOKENS TOKEN_ID...        prints the new ids; EOS_TOKEN_ID -1: never end early

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "onnxruntime_c_api.h"

static const OrtApi *ort;

static void check(OrtStatus *status) {
  if (status == NULL) return;
  fprintf(stderr, "error: %s\n", ort->GetErrorMessage(status));
  exit(2);
}

static int64_t to_int64(const char *text) {
  char *end;
  int64_t value = strtoll(text, &end, 10);
  if (end != text && *end == '\0') return value;
  fprintf(stderr, "error: %s is not a whole number: give token ids\n", text);
  exit(2);
}

// A tensor of int64 that reads `values` in place; rank 0 is a scalar.
static OrtValue *tensor(int64_t *values, const int64_t *shape, size_t rank) {
  size_t count = 1;
  for (size_t i = 0; i < rank; i++) count *= (size_t)shape[i];
  OrtMemoryInfo *memory;
  check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  OrtValue *value;
  check(ort->CreateTensorWithDataAsOrtValue(memory, values, count * sizeof *values, shape, rank,
                                            ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &value));
  ort->ReleaseMemoryInfo(memory);
  return value;
}

static OrtSession *open_graph(OrtEnv *env, const char *bundle) {
  char path[4096];
  if (snprintf(path, sizeof path, "%s/onnx/generate.onnx", bundle) >= (int)sizeof path) {
    fprintf(stderr, "error: the path of the bundle is too long: move it\n");
    exit(2);
  }
  OrtSessionOptions *options;
  OrtSession *session;
  check(ort->CreateSessionOptions(&options));
  check(ort->CreateSession(env, path, options, &session));
  ort->ReleaseSessionOptions(options);
  return session;
}

static void print_new_ids(OrtValue *output, size_t prompt_length) {
  OrtTensorTypeAndShapeInfo *info;
  size_t count;
  int64_t *ids;
  check(ort->GetTensorTypeAndShape(output, &info));
  check(ort->GetTensorShapeElementCount(info, &count));
  check(ort->GetTensorMutableData(output, (void **)&ids));
  for (size_t i = prompt_length; i < count; i++) printf("%" PRId64 "\n", ids[i]);
  ort->ReleaseTensorTypeAndShapeInfo(info);
}

int main(int argc, char **argv) {
  if (argc < 5) {
    fprintf(stderr, "usage: generate BUNDLE EOS_TOKEN_ID MAX_NEW_TOKENS TOKEN_ID...\n");
    return 2;
  }
  ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (ort == NULL) {
    fprintf(stderr, "error: libonnxruntime is older than the header, API version %d: update it\n", ORT_API_VERSION);
    return 2;
  }
  int64_t eos = to_int64(argv[2]), max_new_tokens = to_int64(argv[3]), length = argc - 4;
  if (max_new_tokens < 0) {
    fprintf(stderr, "error: %s new tokens: give 0 or more\n", argv[3]);
    return 2;
  }
  int64_t *ids = calloc((size_t)length, sizeof *ids), *mask = calloc((size_t)length, sizeof *mask);
  if (ids == NULL || mask == NULL) return 2;
  for (int64_t i = 0; i < length; i++) {
    ids[i] = to_int64(argv[4 + i]), mask[i] = 1;
    if (ids[i] < 0) {  // which ONNX counts from the end of the vocabulary
      fprintf(stderr, "error: token id %s: give 0 or more\n", argv[4 + i]);
      return 2;
    }
  }

  setenv("ORT_DISABLE_TELEMETRY", "1", 1);
  OrtEnv *env;
  check(ort->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "gptedge", &env));  // errors come as a status
  OrtSession *session = open_graph(env, argv[1]);

  const int64_t shape[] = {1, length};
  const char *input_names[] = {"input_ids", "attention_mask", "max_new_tokens", "eos_token_id"};
  const char *output_names[] = {"output_ids"};
  OrtValue *inputs[] = {tensor(ids, shape, 2), tensor(mask, shape, 2), tensor(&max_new_tokens, NULL, 0),
                        tensor(&eos, NULL, 0)};
  OrtValue *output = NULL;
  check(ort->Run(session, NULL, input_names, (const OrtValue *const *)inputs, 4, output_names, 1, &output));
  print_new_ids(output, (size_t)length);

  ort->ReleaseValue(output);
  for (size_t i = 0; i < 4; i++) ort->ReleaseValue(inputs[i]);
  ort->ReleaseSession(session);
  ort->ReleaseEnv(env);
  free(ids);
  free(mask);
  if (fflush(stdout) != 0) {
    fprintf(stderr, "error: standard output cannot be written\n");
    return 2;
  }
  return 0;
}

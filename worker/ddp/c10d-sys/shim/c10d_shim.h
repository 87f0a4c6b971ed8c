// The C ABI between Rust and libtorch's c10d.
//
// Every function returns a status and never throws. On a status other than OK, `*message` is a
// NUL-terminated string that the caller releases with muster_c10d_message_free. A tensor is tch's
// pointer to an at::Tensor; the shim copies the handle and never frees the pointer.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Kept in step with `FailureKind` in src/failure.rs.
enum {
  MUSTER_C10D_OK = 0,
  MUSTER_C10D_TIMEOUT = 1,
  MUSTER_C10D_PEER_LOST = 2,
  MUSTER_C10D_OTHER = 3,
};

typedef struct MusterStore MusterStore;
typedef struct MusterGroup MusterGroup;
typedef struct MusterReducer MusterReducer;
typedef void* MusterTensor;

void muster_c10d_message_free(char* message);
// dlopens libtorch_cuda.so into the process. To be called before any other torch function.
int32_t muster_c10d_load_cuda(char** message);
// sizeof(ProcessGroupGloo) as this shim was compiled.
size_t muster_c10d_gloo_size(void);

// world_size 0: do not wait for workers. port 0 with is_server: a free port, see store_port.
int32_t muster_c10d_store_tcp(const char* host, uint16_t port, int32_t is_server, size_t world_size,
                              int64_t timeout_ms, MusterStore** out, char** message);
int32_t muster_c10d_store_hash(int64_t timeout_ms, MusterStore** out, char** message);
int32_t muster_c10d_store_port(MusterStore* store, uint16_t* out, char** message);
int32_t muster_c10d_store_prefix(MusterStore* store, const char* prefix, MusterStore** out, char** message);
int32_t muster_c10d_store_set(MusterStore* store, const char* key, const uint8_t* data, size_t len,
                              char** message);
// *out is released with muster_c10d_bytes_free.
int32_t muster_c10d_store_get(MusterStore* store, const char* key, uint8_t** out, size_t* len,
                              char** message);
int32_t muster_c10d_store_add(MusterStore* store, const char* key, int64_t amount, int64_t* out,
                              char** message);
int32_t muster_c10d_store_check(MusterStore* store, const char* key, int32_t* out, char** message);
int32_t muster_c10d_store_wait(MusterStore* store, const char* key, int64_t timeout_ms, char** message);
void muster_c10d_store_free(MusterStore* store);
void muster_c10d_bytes_free(uint8_t* bytes);

// Exactly one of hostname and interface_name is not NULL.
int32_t muster_c10d_group_new(MusterStore* store, int32_t rank, int32_t size, const char* hostname,
                              const char* interface_name, int64_t timeout_ms, MusterGroup** out,
                              char** message);
// op: 0 sum, 1 average, 2 minimum, 3 maximum.
int32_t muster_c10d_group_all_reduce(MusterGroup* group, MusterTensor tensor, int32_t op, char** message);
int32_t muster_c10d_group_broadcast(MusterGroup* group, MusterTensor tensor, int32_t root, char** message);
int32_t muster_c10d_group_all_gather(MusterGroup* group, const MusterTensor* outputs, size_t count,
                                     MusterTensor input, char** message);
int32_t muster_c10d_group_barrier(MusterGroup* group, char** message);
int32_t muster_c10d_group_broadcast_coalesced(MusterGroup* group, const MusterTensor* tensors, size_t count,
                                              size_t buffer_bytes, int32_t root, char** message);
int32_t muster_c10d_group_verify_params(MusterGroup* group, const MusterTensor* params, size_t count,
                                        char** message);
void muster_c10d_group_free(MusterGroup* group);

// Kept in step with `RawReducerOptions` in src/ffi.rs.
typedef struct MusterReducerOptions {
  int64_t bucket_cap_bytes;
  int64_t first_bucket_bytes;
  // 0: the caller chose bucket_cap_bytes itself, so the first bucket gets no smaller limit.
  int32_t bucket_cap_is_default;
  int32_t find_unused_parameters;
  int32_t gradient_as_bucket_view;
  int32_t static_graph;
  int32_t broadcast_buffers;
} MusterReducerOptions;

int32_t muster_c10d_reducer_new(MusterGroup* group, const MusterTensor* params, const char* const* names,
                                size_t count, const MusterReducerOptions* options, MusterReducer** out,
                                char** message);
int32_t muster_c10d_reducer_prepare_for_forward(MusterReducer* reducer, char** message);
int32_t muster_c10d_reducer_rebuild_buckets(MusterReducer* reducer, int32_t* rebuilt, char** message);
int32_t muster_c10d_reducer_prepare_for_backward(MusterReducer* reducer, const MusterTensor* outputs,
                                                 size_t count, char** message);
int32_t muster_c10d_reducer_delay_all_reduce(MusterReducer* reducer, char** message);
int32_t muster_c10d_reducer_bucket_sizes(MusterReducer* reducer, int64_t* out, size_t capacity,
                                         size_t* count, char** message);
void muster_c10d_reducer_free(MusterReducer* reducer);

int32_t muster_c10d_backward(MusterTensor loss, char** message);
// zero_grad(set_to_none): drops the gradient instead of writing zeros into the bucket it may view.
int32_t muster_c10d_clear_grads(const MusterTensor* params, size_t count, char** message);

#ifdef __cplusplus
}
#endif

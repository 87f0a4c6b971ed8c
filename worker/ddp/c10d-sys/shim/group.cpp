// Stores and process groups: how ranks find each other and talk.
#include "common.hpp"

#include <dlfcn.h>

#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <torch/csrc/distributed/c10d/comm.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>

using muster::guard;
using std::chrono::milliseconds;

// What libtorch 2.11.0 itself allocates. Another size means that the stub headers no longer describe it.
static_assert(sizeof(c10d::ProcessGroupGloo) == 488, "the shim is written for libtorch 2.11.0");

extern "C" {

void muster_c10d_message_free(char* message) {
  free(message);
}

void muster_c10d_bytes_free(uint8_t* bytes) {
  free(bytes);
}

size_t muster_c10d_gloo_size(void) {
  return sizeof(c10d::ProcessGroupGloo);
}

int32_t muster_c10d_load_cuda(char** message) {
  if (dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL) != nullptr) {
    return MUSTER_C10D_OK;
  }
  const char* why = dlerror();
  return muster::fail(message, MUSTER_C10D_OTHER, why == nullptr ? "dlopen failed" : why);
}

int32_t muster_c10d_store_tcp(const char* host, uint16_t port, int32_t is_server, size_t world_size,
                              int64_t timeout_ms, MusterStore** out, char** message) {
  return guard(message, [&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = is_server != 0;
    if (world_size != 0) {
      options.numWorkers = world_size;
    }
    options.waitWorkers = world_size != 0;
    options.timeout = milliseconds(timeout_ms);
    *out = new MusterStore{c10::make_intrusive<c10d::TCPStore>(host, options)};
  });
}

int32_t muster_c10d_store_hash(int64_t timeout_ms, MusterStore** out, char** message) {
  return guard(message, [&] {
    auto store = c10::make_intrusive<c10d::HashStore>();
    store->setTimeout(milliseconds(timeout_ms));
    *out = new MusterStore{std::move(store)};
  });
}

int32_t muster_c10d_store_port(MusterStore* store, uint16_t* out, char** message) {
  return guard(message, [&] {
    auto* tcp = dynamic_cast<c10d::TCPStore*>(store->inner.get());
    TORCH_CHECK(tcp != nullptr, "the store is not a TCPStore");
    *out = tcp->getPort();
  });
}

int32_t muster_c10d_store_prefix(MusterStore* store, const char* prefix, MusterStore** out, char** message) {
  return guard(message,
               [&] { *out = new MusterStore{c10::make_intrusive<c10d::PrefixStore>(prefix, store->inner)}; });
}

int32_t muster_c10d_store_set(MusterStore* store, const char* key, const uint8_t* data, size_t len,
                              char** message) {
  return guard(message, [&] { store->inner->set(key, std::vector<uint8_t>(data, data + len)); });
}

int32_t muster_c10d_store_get(MusterStore* store, const char* key, uint8_t** out, size_t* len,
                              char** message) {
  return guard(message, [&] {
    const auto value = store->inner->get(key);
    auto* copy = static_cast<uint8_t*>(malloc(value.size() + 1));
    TORCH_CHECK(copy != nullptr, "out of memory");
    std::copy(value.begin(), value.end(), copy);
    *out = copy;
    *len = value.size();
  });
}

int32_t muster_c10d_store_add(MusterStore* store, const char* key, int64_t amount, int64_t* out,
                              char** message) {
  return guard(message, [&] { *out = store->inner->add(key, amount); });
}

int32_t muster_c10d_store_check(MusterStore* store, const char* key, int32_t* out, char** message) {
  return guard(message, [&] { *out = store->inner->check({key}) ? 1 : 0; });
}

int32_t muster_c10d_store_wait(MusterStore* store, const char* key, int64_t timeout_ms, char** message) {
  return guard(message, [&] { store->inner->wait({key}, milliseconds(timeout_ms)); });
}

void muster_c10d_store_free(MusterStore* store) {
  guard(nullptr, [&] { delete store; });
}

int32_t muster_c10d_group_new(MusterStore* store, int32_t rank, int32_t size, const char* hostname,
                              const char* interface_name, int64_t timeout_ms, MusterGroup** out,
                              char** message) {
  return guard(message, [&] {
    auto options = c10d::ProcessGroupGloo::Options::create(milliseconds(timeout_ms));
    options->devices.push_back(interface_name != nullptr
                                   ? c10d::ProcessGroupGloo::createDeviceForInterface(interface_name)
                                   : c10d::ProcessGroupGloo::createDeviceForHostname(hostname));
    auto gloo = c10::make_intrusive<c10d::ProcessGroupGloo>(
        c10::make_intrusive<c10d::PrefixStore>("cpu", store->inner), rank, size, options);
    auto group = c10::make_intrusive<c10d::ProcessGroup>(store->inner, rank, size);
    const auto type = c10d::ProcessGroup::BackendType::GLOO;
    group->setBackend(c10::DeviceType::CPU, type, gloo);
    group->setDefaultBackend(type);
    gloo->setSequenceNumberForGroup();
    *out = new MusterGroup{std::move(group)};
  });
}

int32_t muster_c10d_group_all_reduce(MusterGroup* group, MusterTensor tensor, int32_t op, char** message) {
  return guard(message, [&] {
    std::vector<at::Tensor> list{muster::tensor(tensor)};
    c10d::AllreduceOptions options;
    // Gloo itself has no average: c10d divides after a sum, and so does this.
    options.reduceOp = op == 2   ? c10d::ReduceOp::MIN
                       : op == 3 ? c10d::ReduceOp::MAX
                                 : c10d::ReduceOp::SUM;
    auto backend = group->inner->getBackend(list[0].device().type());
    backend->allreduce(list, options)->wait();
    if (op == 1) {
      list[0].div_(group->inner->getSize());
    }
  });
}

int32_t muster_c10d_group_broadcast(MusterGroup* group, MusterTensor tensor, int32_t root, char** message) {
  return guard(message, [&] {
    std::vector<at::Tensor> list{muster::tensor(tensor)};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    group->inner->getBackend(list[0].device().type())->broadcast(list, options)->wait();
  });
}

int32_t muster_c10d_group_all_gather(MusterGroup* group, const MusterTensor* outputs, size_t count,
                                     MusterTensor input, char** message) {
  return guard(message, [&] {
    std::vector<at::Tensor> in{muster::tensor(input)};
    std::vector<std::vector<at::Tensor>> out{muster::tensors(outputs, count)};
    group->inner->getBackend(in[0].device().type())->allgather(out, in)->wait();
  });
}

int32_t muster_c10d_group_barrier(MusterGroup* group, char** message) {
  return guard(message, [&] { group->inner->getBackend(c10::DeviceType::CPU)->barrier()->wait(); });
}

int32_t muster_c10d_group_broadcast_coalesced(MusterGroup* group, const MusterTensor* tensors, size_t count,
                                              size_t buffer_bytes, int32_t root, char** message) {
  return guard(message, [&] {
    // Detached aliases: the broadcast writes into them, which autograd forbids on leaves.
    std::vector<at::Tensor> list;
    list.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      list.push_back(muster::tensor(tensors[i]).detach());
    }
    c10d::broadcast_coalesced(group->inner, list, buffer_bytes, root);
  });
}

int32_t muster_c10d_group_verify_params(MusterGroup* group, const MusterTensor* params, size_t count,
                                        char** message) {
  return guard(message, [&] {
    c10d::verify_params_across_processes(group->inner, muster::tensors(params, count), std::nullopt);
  });
}

void muster_c10d_group_free(MusterGroup* group) {
  guard(nullptr, [&] { delete group; });
}

} // extern "C"

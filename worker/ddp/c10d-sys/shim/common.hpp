// What both translation units share: the handles, and the guard that keeps exceptions on this side.
#pragma once
#include "c10d_shim.h"

#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <torch/csrc/distributed/c10d/exception.h>

struct MusterStore {
  c10::intrusive_ptr<c10d::Store> inner;
};

struct MusterGroup {
  c10::intrusive_ptr<c10d::ProcessGroup> inner;
};

namespace muster {

inline at::Tensor& tensor(MusterTensor handle) {
  return *static_cast<at::Tensor*>(handle);
}

inline std::vector<at::Tensor> tensors(const MusterTensor* handles, size_t count) {
  std::vector<at::Tensor> out;
  out.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    out.push_back(tensor(handles[i]));
  }
  return out;
}

inline bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

// Gloo reports everything as one exception type, so its wording is what tells a dead peer from a slow one.
inline int32_t classify(const std::string& text) {
  if (contains(text, "Timed out") || contains(text, "timed out") || contains(text, "timeout")) {
    return MUSTER_C10D_TIMEOUT;
  }
  if (contains(text, "Connection closed by peer") || contains(text, "Connection reset by peer") ||
      contains(text, "Broken pipe") || contains(text, "Connection refused") ||
      contains(text, "Socket closed") || contains(text, "gloo/transport/tcp/pair.cc")) {
    return MUSTER_C10D_PEER_LOST;
  }
  return MUSTER_C10D_OTHER;
}

inline int32_t fail(char** message, int32_t status, const char* text) noexcept {
  if (message != nullptr) {
    *message = strdup(text);
  }
  return status;
}

template <typename F>
int32_t guard(char** message, F&& body) noexcept {
  try {
    body();
    return MUSTER_C10D_OK;
  } catch (const c10d::TimeoutError& e) {
    return fail(message, MUSTER_C10D_TIMEOUT, e.what_without_backtrace());
  } catch (const c10::DistNetworkError& e) {
    const std::string text = e.what_without_backtrace();
    const int32_t status = classify(text);
    return fail(message, status == MUSTER_C10D_OTHER ? MUSTER_C10D_PEER_LOST : status, text.c_str());
  } catch (const c10::Error& e) {
    const char* text = e.what_without_backtrace();
    return fail(message, classify(text), text);
  } catch (const std::exception& e) {
    return fail(message, classify(e.what()), e.what());
  } catch (...) {
    return fail(message, MUSTER_C10D_OTHER, "an exception of unknown type");
  }
}

} // namespace muster

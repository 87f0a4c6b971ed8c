// The reducer: gradients into buckets, and buckets reduced while backward is still running.
#include "common.hpp"

#include <limits>

#include <torch/csrc/distributed/c10d/logger.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>

using muster::guard;

struct MusterReducer {
  std::shared_ptr<c10d::Reducer> reducer;
  std::shared_ptr<c10d::Logger> logger;
};

extern "C" {

// Follows DistributedDataParallel._ddp_init_helper of PyTorch 2.11 line by line.
int32_t muster_c10d_reducer_new(MusterGroup* group, const MusterTensor* params, const char* const* names,
                                size_t count, const MusterReducerOptions* options, MusterReducer** out,
                                char** message) {
  return guard(message, [&] {
    auto list = muster::tensors(params, count);
    const std::vector<bool> sparse(count, false);
    std::unordered_map<size_t, std::string> param_names;
    for (size_t i = 0; i < count; ++i) {
      param_names.emplace(i, names[i]);
    }

    // Creation order need not be the order of use, so the first step reduces one bucket after all of
    // backward; the reducer rebuilds the buckets in the order it saw. With unused parameters it never does.
    const auto cap = static_cast<size_t>(options->bucket_cap_bytes);
    std::vector<size_t> limits;
    if (options->static_graph || !options->find_unused_parameters) {
      limits = {std::numeric_limits<int64_t>::max()};
    } else if (options->bucket_cap_is_default) {
      limits = {static_cast<size_t>(options->first_bucket_bytes), cap};
    } else {
      limits = {cap};
    }
    auto buckets = std::get<0>(c10d::compute_bucket_assignment_by_size(list, limits, sparse));
    std::reverse(buckets.begin(), buckets.end());

    auto reducer = std::make_shared<c10d::Reducer>(
        list, buckets, group->inner, sparse, options->bucket_cap_bytes,
        options->find_unused_parameters != 0, options->gradient_as_bucket_view != 0,
        std::move(param_names),
        options->bucket_cap_is_default ? options->first_bucket_bytes : options->bucket_cap_bytes,
        /*skip_all_reduce_unused_params=*/false, /*use_python_reducer=*/false, std::vector<int64_t>{});
    auto logger = std::make_shared<c10d::Logger>(reducer);
    reducer->set_logger(logger);
    logger->set_construction_data_and_log("muster_ddp", {}, -1, options->broadcast_buffers != 0,
                                          /*has_sync_bn=*/false, options->static_graph != 0);
    if (options->static_graph) {
      reducer->set_static_graph();
      logger->set_static_graph();
    }
    *out = new MusterReducer{std::move(reducer), std::move(logger)};
  });
}

int32_t muster_c10d_reducer_prepare_for_forward(MusterReducer* reducer, char** message) {
  return guard(message, [&] {
    reducer->logger->set_runtime_stats_and_log();
    reducer->reducer->prepare_for_forward();
  });
}

int32_t muster_c10d_reducer_rebuild_buckets(MusterReducer* reducer, int32_t* rebuilt, char** message) {
  return guard(message, [&] { *rebuilt = reducer->reducer->rebuild_buckets() ? 1 : 0; });
}

int32_t muster_c10d_reducer_prepare_for_backward(MusterReducer* reducer, const MusterTensor* outputs,
                                                 size_t count, char** message) {
  return guard(message,
               [&] { reducer->reducer->prepare_for_backward(muster::tensors(outputs, count)); });
}

int32_t muster_c10d_reducer_delay_all_reduce(MusterReducer* reducer, char** message) {
  return guard(message, [&] { reducer->reducer->delay_all_reduce(); });
}

int32_t muster_c10d_reducer_bucket_sizes(MusterReducer* reducer, int64_t* out, size_t capacity,
                                         size_t* count, char** message) {
  return guard(message, [&] {
    const auto sizes = reducer->logger->get_bucket_sizes();
    *count = sizes.size();
    std::copy_n(sizes.begin(), std::min(capacity, sizes.size()), out);
  });
}

void muster_c10d_reducer_free(MusterReducer* reducer) {
  guard(nullptr, [&] { delete reducer; });
}

int32_t muster_c10d_backward(MusterTensor loss, char** message) {
  return guard(message, [&] { muster::tensor(loss).backward(); });
}

int32_t muster_c10d_clear_grads(const MusterTensor* params, size_t count, char** message) {
  return guard(message, [&] {
    for (size_t i = 0; i < count; ++i) {
      muster::tensor(params[i]).mutable_grad().reset();
    }
  });
}

} // extern "C"

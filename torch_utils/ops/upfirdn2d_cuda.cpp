// SPDX-License-Identifier: Apache-2.0
// Checks, output and bindings of the kernels in upfirdn2d.cu.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <cstdint>
#include <limits>
#include <optional>

namespace next3d {

// As upfirdn2d.cu has them.
enum class Type { kHalf, kBFloat16, kFloat, kDouble };

struct Axis {
    int in, out, up, down, pad, taps;
};

struct Resampling {
    Axis x, y;
    int outer, inner;
    bool flip;
    double gain;
};

cudaError_t upfirdn2d(const void* x, Type x_type, const float* f, void* y, Type y_type, const Resampling& r,
                      cudaStream_t stream);

}  // namespace next3d

namespace {

using next3d::Axis;
using next3d::Resampling;

constexpr int64_t kLargestSize = 1 << 30;  // Positions on an axis, and sums of two of them, are 32-bit numbers.

next3d::Type type_of(const at::Tensor& x) {
    switch (x.scalar_type()) {
        case at::kHalf: return next3d::Type::kHalf;
        case at::kBFloat16: return next3d::Type::kBFloat16;
        case at::kFloat: return next3d::Type::kFloat;
        case at::kDouble: return next3d::Type::kDouble;
        default: TORCH_CHECK(false, "x: expected fp16, bf16, fp32 or fp64");
    }
}

int small(int64_t size) {
    TORCH_CHECK(-kLargestSize < size && size < kLargestSize, "x, f, padding: expected sizes below 2^30");
    return static_cast<int>(size);
}

Axis make_axis(int64_t size, int64_t up, int64_t down, int64_t pad_before, int64_t pad_after, int64_t taps) {
    TORCH_CHECK(up >= 1 && down >= 1, "up, down: expected factors of at least 1");
    const int64_t padded = int64_t{small(size)} * small(up) + small(pad_before) + small(pad_after);
    TORCH_CHECK(padded >= taps, "x: upsampled and padded it is smaller than the filter");
    const int64_t out = (small(padded) - small(taps)) / small(down) + 1;
    return {small(size), small(out), small(up), small(down), small(pad_before), small(taps)};
}

// An axis that a pass leaves alone.
Axis untouched(int64_t size) { return make_axis(size, 1, 1, 0, 0, 1); }

// Filters x, whose memory is dense in `layout`, into a new tensor of that layout and of type `dtype`.
at::Tensor run(const at::Tensor& x, const float* f, const Axis& across, const Axis& down, bool flip, double gain,
               at::ScalarType dtype, at::MemoryFormat layout) {
    const at::TensorOptions options = x.options().dtype(dtype).memory_format(layout);
    at::Tensor y = at::empty({x.size(0), x.size(1), down.out, across.out}, options);
    if (x.numel() == 0 || y.numel() == 0)
        return y.zero_();
    const bool is_channels_last = layout == at::MemoryFormat::ChannelsLast;
    const int64_t outer = is_channels_last ? x.size(0) : x.size(0) * x.size(1);
    const int64_t inner = is_channels_last ? x.size(1) : 1;
    const int64_t most = std::numeric_limits<int>::max();
    TORCH_CHECK(outer <= most / down.out && inner <= most / across.out,
                "x: expected fewer than 2^31 rows, of fewer than 2^31 numbers each");
    const Resampling r{across, down, static_cast<int>(outer), static_cast<int>(inner), flip, gain};
    C10_CUDA_CHECK(next3d::upfirdn2d(x.const_data_ptr(), type_of(x), f, y.mutable_data_ptr(), type_of(y), r,
                                     c10::cuda::getCurrentCUDAStream().stream()));
    return y;
}

// Messages are literals, as in rasterize.cpp.
at::Tensor forward(const at::Tensor& x, const std::optional<at::Tensor>& f, std::array<int64_t, 2> up,
                   std::array<int64_t, 2> down, std::array<int64_t, 4> padding, bool flip, double gain) {
    TORCH_CHECK(x.is_cuda() && x.dim() == 4, "x: expected [N, C, H, W] on a CUDA device");
    TORCH_CHECK(!f || (f->device() == x.device() && f->scalar_type() == at::kFloat), "f: expected fp32 on x's device");
    TORCH_CHECK(!f || ((f->dim() == 1 || f->dim() == 2) && f->numel() > 0), "f: expected [fh, fw] or [taps]");
    const c10::cuda::CUDAGuard guard(x.device());
    const at::MemoryFormat layout = x.suggest_memory_format();
    const at::Tensor dense = x.contiguous(layout), taps = f ? f->contiguous() : at::Tensor();
    const Axis across = make_axis(x.size(3), up[0], down[0], padding[0], padding[1], f ? f->size(-1) : 1);
    const Axis along = make_axis(x.size(2), up[1], down[1], padding[2], padding[3], f ? f->size(0) : 1);
    const float* tap = f ? taps.const_data_ptr<float>() : nullptr;
    if (!f || f->dim() == 2)
        return run(dense, tap, across, along, flip, gain, x.scalar_type(), layout);
    // The row filter's result is not rounded to a half type before the column filter adds it up.
    const bool is_half = x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
    const at::ScalarType between = is_half ? at::kFloat : x.scalar_type();
    const at::Tensor rows = run(dense, tap, across, untouched(along.in), flip, 1.0, between, layout);
    return run(rows, tap, untouched(across.out), along, flip, gain, x.scalar_type(), layout);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.def("forward", &forward, pybind11::call_guard<pybind11::gil_scoped_release>());
}

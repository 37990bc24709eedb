// SPDX-License-Identifier: Apache-2.0
// Checks, outputs and bindings of the kernel in filtered_lrelu.cu.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

namespace next3d {

// As filtered_lrelu.cu has them.
enum class Type { kHalf, kBFloat16, kFloat };

struct Filter {
    const float* taps;
    int width, height;
    bool is_separable, flip;
    float gain;
};

struct Signs {
    const std::uint8_t* read;
    std::uint8_t* write;
    int x, y, row_bytes, height;
};

struct Pipeline {
    Filter first, second;
    Signs signs;
    int planes, channels, in_width, in_height, out_width, out_height;
    int up, down, pad_x, pad_y;
    float gain, slope, clamp;
};

cudaError_t filtered_lrelu(const void* x, const void* b, void* y, Type type, const Pipeline& p, cudaStream_t stream);

}  // namespace next3d

namespace {

constexpr int64_t kLargestSize = 1 << 30;   // Positions on an axis, and sums of two of them, are 32-bit numbers.
constexpr int64_t kLargestPlane = 1LL << 31;  // Positions in a plane of signs too.

int small(int64_t size) {
    TORCH_CHECK(-kLargestSize < size && size < kLargestSize, "x, padding: expected sizes below 2^30");
    return static_cast<int>(size);
}

next3d::Type type_of(const at::Tensor& x) {
    switch (x.scalar_type()) {
        case at::kHalf: return next3d::Type::kHalf;
        case at::kBFloat16: return next3d::Type::kBFloat16;
        case at::kFloat: return next3d::Type::kFloat;
        default: TORCH_CHECK(false, "x: expected fp16, bf16 or fp32");
    }
}

// A filter, or none, that is contiguous and on the device of x.
next3d::Filter make_filter(const std::optional<at::Tensor>& f, const at::Tensor& x, bool flip, double gain) {
    const float narrow_gain = static_cast<float>(gain);
    if (!f)
        return {nullptr, 1, 1, false, flip, narrow_gain};
    TORCH_CHECK(f->device() == x.device() && f->scalar_type() == at::kFloat, "fu, fd: expected fp32 on x's device");
    TORCH_CHECK((f->dim() == 1 || f->dim() == 2) && f->numel() > 0, "fu, fd: expected [fh, fw] or [taps]");
    return {f->const_data_ptr<float>(), small(f->size(-1)), small(f->size(0)), f->dim() == 1, flip, narrow_gain};
}

std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& f) {
    return f ? std::optional<at::Tensor>(f->contiguous()) : std::nullopt;
}

// Reads the signs that are given, else writes new ones if they are asked for.
next3d::Signs make_signs(at::Tensor& signs, bool is_given, std::array<int64_t, 2> offset) {
    if (!signs.defined())
        return {nullptr, nullptr, 0, 0, 0, 0};
    TORCH_CHECK(signs.is_contiguous() && signs.scalar_type() == at::kByte && signs.dim() == 3,
                "signs: expected contiguous uint8 [planes, rows, bytes]");
    TORCH_CHECK(signs.size(1) < kLargestPlane / std::max<int64_t>(signs.size(2), 1), "signs: expected a smaller plane");
    std::uint8_t* const data = signs.mutable_data_ptr<std::uint8_t>();
    return {is_given ? data : nullptr, is_given ? nullptr : data, small(offset[0]), small(offset[1]),
            small(signs.size(2)), small(signs.size(1))};
}

// Filters x with `first` after upsampling; adds the bias b before, and activates, or multiplies with the slopes that
// `given` signs stand for; filters with `second` and downsamples. Pairs are (x, y), or (first, second) of gains;
// activation: gain, slope and clamp. Returns the result, contiguous, and new signs if `keeps_signs`, else none.
// Messages are literals, as in rasterize.cpp.
std::tuple<at::Tensor, std::optional<at::Tensor>> run(
    const at::Tensor& x, const std::optional<at::Tensor>& b, const std::optional<at::Tensor>& given,
    const std::optional<at::Tensor>& first, const std::optional<at::Tensor>& second, int64_t up, int64_t down,
    std::array<int64_t, 2> pad, std::array<int64_t, 2> offset, std::array<int64_t, 2> out_size, bool flip,
    std::array<double, 2> gains, std::array<double, 3> activation, bool keeps_signs) {
    TORCH_CHECK(x.is_cuda() && x.dim() == 4, "x: expected [N, C, H, W] on a CUDA device");
    TORCH_CHECK(!b || (b->device() == x.device() && b->scalar_type() == x.scalar_type() && b->dim() == 1 &&
                       b->size(0) == x.size(1)), "b: expected one number per channel, of x's type and device");
    TORCH_CHECK(!given || given->device() == x.device(), "signs: expected to be on x's device");
    TORCH_CHECK(!(given && keeps_signs), "signs: expected to be read or written, not both");
    TORCH_CHECK(up >= 1 && down >= 1, "up, down: expected factors of at least 1");
    TORCH_CHECK(out_size[0] >= 0 && out_size[1] >= 0, "out_size: expected sizes");
    const c10::cuda::CUDAGuard guard(x.device());
    const at::Tensor dense = x.contiguous(), bias = b ? b->contiguous() : at::Tensor();
    const std::optional<at::Tensor> taps[] = {contiguous(first), contiguous(second)};
    next3d::Pipeline p{};
    p.first = make_filter(taps[0], x, flip, gains[0]);
    p.second = make_filter(taps[1], x, flip, gains[1]);
    const int64_t planes = x.size(0) * x.size(1);
    at::Tensor signs = given ? *given : at::Tensor();
    if (keeps_signs) {
        const int64_t width = (out_size[0] - 1) * down + p.second.width;
        const int64_t height = (out_size[1] - 1) * down + p.second.height;
        signs = at::empty({planes, height, (width + 3) / 4}, x.options().dtype(at::kByte));
    }
    TORCH_CHECK(!signs.defined() || (signs.dim() == 3 && signs.size(0) == planes), "signs: expected as many as x");
    p.signs = make_signs(signs, given.has_value(), offset);
    at::Tensor y = at::empty({x.size(0), x.size(1), out_size[1], out_size[0]}, dense.options());
    const std::optional<at::Tensor> kept = keeps_signs ? std::optional<at::Tensor>(signs) : std::nullopt;
    if (y.numel() == 0)
        return {y, kept};
    p.planes = small(planes);
    p.channels = small(x.size(1));
    p.in_width = small(x.size(3));
    p.in_height = small(x.size(2));
    p.out_width = small(out_size[0]);
    p.out_height = small(out_size[1]);
    p.up = small(up);
    p.down = small(down);
    p.pad_x = small(pad[0]);
    p.pad_y = small(pad[1]);
    p.gain = static_cast<float>(activation[0]);
    p.slope = static_cast<float>(activation[1]);
    p.clamp = static_cast<float>(activation[2]);
    small(out_size[0] * down + p.second.width);
    small(out_size[1] * down + p.second.height);
    C10_CUDA_CHECK(next3d::filtered_lrelu(dense.const_data_ptr(), b ? bias.const_data_ptr() : nullptr,
                                          y.mutable_data_ptr(), type_of(x), p,
                                          c10::cuda::getCurrentCUDAStream().stream()));
    return {y, kept};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.def("run", &run, pybind11::call_guard<pybind11::gil_scoped_release>());
}

// SPDX-License-Identifier: Apache-2.0
// Checks, layouts and bindings of the kernels in bias_act.cu.

#include "bias_act_cuda.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

namespace {

using bias_act::Act;
using bias_act::Dtype;
using bias_act::Function;
using bias_act::Inputs;
using bias_act::Layout;
using OptionalTensor = std::optional<at::Tensor>;

constexpr double NO_CLAMP = -1;

// Messages are literals: bias_act.py has said what it found, and formatting through streams that torch set up crashes
// where the C++ library is linked statically (see rasterize.cpp).
Dtype dtype_of(const at::Tensor& x) {
    switch (x.scalar_type()) {
        case at::kHalf: return Dtype::half;
        case at::kBFloat16: return Dtype::bfloat16;
        case at::kFloat: return Dtype::single;
        case at::kDouble: return Dtype::twice;
        default: TORCH_CHECK(false, "x: expected fp16, bf16, fp32 or fp64");
    }
}

Act act_of(std::string_view name) {
    constexpr std::array<std::string_view, 9> names = {"linear", "relu", "lrelu",    "tanh", "sigmoid",
                                                       "elu",    "selu", "softplus", "swish"};  // In the order of Act.
    const auto* found = std::find(names.begin(), names.end(), name);
    TORCH_CHECK(found != names.end(), "act: expected the name of an activation");
    return static_cast<Act>(found - names.begin());
}

Function function_of(std::string_view act, double alpha, double gain, std::optional<double> clamp) {
    return {act_of(act), alpha, gain, clamp.value_or(NO_CLAMP)};
}

at::ScalarType compute_type(const at::Tensor& x) {
    return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Whether tensors of these sizes lie in the same order in memory; strides of dimensions of one entry do not matter.
bool same_order(at::IntArrayRef sizes, at::IntArrayRef a, at::IntArrayRef b) {
    for (size_t i = 0; i < sizes.size(); ++i)
        if (sizes[i] > 1 && a[i] != b[i])
            return false;
    return true;
}

at::Tensor with_strides(const at::Tensor& tensor, at::IntArrayRef strides) {
    if (same_order(tensor.sizes(), tensor.strides(), strides))
        return tensor;
    return at::empty_strided(tensor.sizes(), strides, tensor.options()).copy_(tensor);
}

at::Tensor like(const at::Tensor& x) {
    return at::empty_strided(x.sizes(), x.strides(), x.options());
}

at::Tensor dense(const at::Tensor& x) {
    return x.is_non_overlapping_and_dense() ? x : x.contiguous(x.suggest_memory_format());
}

at::Tensor gradient_like(const at::Tensor& g, const at::Tensor& x) {
    TORCH_CHECK(g.device() == x.device() && g.scalar_type() == x.scalar_type() && g.sizes() == x.sizes(),
                "g: expected the device, type and shape of x");
    return with_strides(g, x.strides());
}

const void* pointer(const OptionalTensor& tensor) {
    return tensor ? tensor->const_data_ptr() : nullptr;
}

at::Tensor checked_table(const at::Tensor& table, const at::Tensor& x, at::ScalarType type, int64_t size) {
    TORCH_CHECK(table.device() == x.device() && table.scalar_type() == type && table.numel() == size,
                "scale, noise, b: expected another device, type or number of elements");
    return table.contiguous();
}

// ---- Plain: a bias along any dimension of any dense tensor

struct Plain {
    at::Tensor x;
    OptionalTensor b;
    Inputs inputs;
    Layout layout;
};

Layout layout_along(const at::Tensor& x, int64_t dim) {
    const int64_t size = x.numel();
    // In memory, the position along a dimension is index / stride % count.
    if (x.dim() == 0 || size == 0 || x.size(dim) == 1)
        return {size, 1, size, false};
    if (x.stride(dim) == 1)
        return {size, size / x.size(dim), x.size(dim), true};
    return {size, x.size(dim), x.stride(dim), false};
}

Plain make_plain(const at::Tensor& x, const OptionalTensor& b, int64_t dim) {
    TORCH_CHECK(x.is_cuda(), "x: expected a CUDA tensor");
    Plain plain{dense(x), std::nullopt, {}, {}};
    if (b) {
        TORCH_CHECK(0 <= dim && dim < x.dim(), "dim: expected a dimension of x");
        plain.b = checked_table(*b, x, x.scalar_type(), x.size(dim));
    }
    plain.inputs = {dtype_of(x), false, plain.x.const_data_ptr(), nullptr, nullptr, pointer(plain.b), 0};
    plain.layout = layout_along(plain.x, b ? dim : 0);
    return plain;
}

std::tuple<at::Tensor, OptionalTensor> forward(const at::Tensor& x, const OptionalTensor& b, int64_t dim,
                                               std::string_view act, double alpha, double gain,
                                               std::optional<double> clamp, bool needs_mask) {
    const Function function = function_of(act, alpha, gain, clamp);
    TORCH_CHECK(!needs_mask || is_piecewise_linear(function.act), "act: a mask goes with a piecewise linear one");
    const Plain plain = make_plain(x, b, dim);
    const c10::cuda::CUDAGuard guard(x.device());
    at::Tensor y = like(plain.x);
    OptionalTensor mask;
    if (needs_mask)
        mask = at::empty({bias_act::mask_bytes(x.numel())}, x.options().dtype(at::kByte));
    C10_CUDA_CHECK(launch_forward(plain.inputs, plain.layout, function, y.mutable_data_ptr(),
                                  mask ? mask->mutable_data_ptr() : nullptr, c10::cuda::getCurrentCUDAStream()));
    return {y, mask};
}

at::Tensor smooth_gradient(const at::Tensor& g, const at::Tensor& x, const OptionalTensor& b, int64_t dim,
                           std::string_view act, double alpha, double gain, std::optional<double> clamp) {
    const Function function = function_of(act, alpha, gain, clamp);
    TORCH_CHECK(!is_piecewise_linear(function.act), "act: expected a smooth one");
    const Plain plain = make_plain(x, b, dim);
    const c10::cuda::CUDAGuard guard(x.device());
    const at::Tensor along = gradient_like(g, plain.x);
    at::Tensor gx = like(plain.x);
    C10_CUDA_CHECK(launch_backward(plain.inputs, plain.layout, function, along.const_data_ptr(), gx.mutable_data_ptr(),
                                   nullptr, c10::cuda::getCurrentCUDAStream()));
    return gx;
}

at::Tensor masked_gradient(const at::Tensor& g, const at::Tensor& mask, at::IntArrayRef strides, std::string_view act,
                           double alpha, double gain, std::optional<double> clamp) {
    TORCH_CHECK(g.is_cuda() && mask.device() == g.device(), "g, mask: expected CUDA tensors of one device");
    TORCH_CHECK(mask.scalar_type() == at::kByte && mask.numel() == bias_act::mask_bytes(g.numel()),
                "mask: expected that of a tensor of the shape of g");
    TORCH_CHECK(strides.size() == g.sizes().size(), "strides: expected one per dimension of g");
    const c10::cuda::CUDAGuard guard(g.device());
    const at::Tensor along = with_strides(g, strides);
    at::Tensor gx = like(along);
    const Function function = function_of(act, alpha, gain, clamp);
    C10_CUDA_CHECK(launch_masked(dtype_of(g), along.const_data_ptr(), mask.const_data_ptr(), g.numel(), function,
                                 gx.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
    return gx;
}

// ---- Modulated: scale per sample and channel, noise per pixel, of [N, C, H, W] in either layout

struct Modulated {
    at::Tensor x;
    OptionalTensor scale, noise, b;
    Inputs inputs;
    Layout layout;
};

Modulated make_modulated(const at::Tensor& x, const OptionalTensor& scale, const OptionalTensor& noise,
                         const OptionalTensor& b) {
    TORCH_CHECK(x.is_cuda() && x.dim() == 4, "x: expected a CUDA tensor [N, C, H, W]");
    Modulated modulated{x.contiguous(x.suggest_memory_format()), {}, {}, {}, {}, {}};
    const int64_t num = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
    const at::ScalarType type = compute_type(x);
    if (scale)
        modulated.scale = checked_table(*scale, x, type, num * channels);
    if (noise)
        modulated.noise = checked_table(*noise, x, type, noise->size(0) == 1 ? pixels : num * pixels);
    if (b)
        modulated.b = checked_table(*b, x, type, channels);
    const bool repeats = noise && noise->size(0) == 1;
    modulated.inputs = {dtype_of(x), true, modulated.x.const_data_ptr(), pointer(modulated.scale),
                        pointer(modulated.noise), pointer(modulated.b), repeats ? 0 : pixels};
    const bool channel_is_inner = !modulated.x.is_contiguous();
    modulated.layout = {x.numel(), channel_is_inner ? pixels : channels, channel_is_inner ? channels : pixels,
                        channel_is_inner};
    return modulated;
}

at::Tensor modulated_forward(const at::Tensor& x, const OptionalTensor& scale, const OptionalTensor& noise,
                             const OptionalTensor& b, std::string_view act, double alpha, double gain,
                             std::optional<double> clamp) {
    const Modulated modulated = make_modulated(x, scale, noise, b);
    const c10::cuda::CUDAGuard guard(x.device());
    at::Tensor y = like(modulated.x);
    C10_CUDA_CHECK(launch_forward(modulated.inputs, modulated.layout, function_of(act, alpha, gain, clamp),
                                  y.mutable_data_ptr(), nullptr, c10::cuda::getCurrentCUDAStream()));
    return y;
}

// Return gx, and gp: the gradient with respect to x * scale + noise + b.
std::tuple<at::Tensor, at::Tensor> modulated_backward(const at::Tensor& g, const at::Tensor& x,
                                                      const OptionalTensor& scale, const OptionalTensor& noise,
                                                      const OptionalTensor& b, std::string_view act, double alpha,
                                                      double gain, std::optional<double> clamp, bool needs_gp) {
    const Modulated modulated = make_modulated(x, scale, noise, b);
    const c10::cuda::CUDAGuard guard(x.device());
    const at::Tensor along = gradient_like(g, modulated.x);
    at::Tensor gx = like(modulated.x);
    const bool writes_gp = needs_gp && scale;
    at::Tensor gp = writes_gp ? like(modulated.x) : gx;
    C10_CUDA_CHECK(launch_backward(modulated.inputs, modulated.layout, function_of(act, alpha, gain, clamp),
                                   along.const_data_ptr(), gx.mutable_data_ptr(),
                                   writes_gp ? gp.mutable_data_ptr() : nullptr, c10::cuda::getCurrentCUDAStream()));
    return {gx, gp};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    using no_gil = pybind11::call_guard<pybind11::gil_scoped_release>;
    module.def("forward", &forward, no_gil());
    module.def("smooth_gradient", &smooth_gradient, no_gil());
    module.def("masked_gradient", &masked_gradient, no_gil());
    module.def("modulated_forward", &modulated_forward, no_gil());
    module.def("modulated_backward", &modulated_backward, no_gil());
}

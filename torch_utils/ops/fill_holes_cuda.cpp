// SPDX-License-Identifier: Apache-2.0
// Checks and bindings of fill_holes.cu. Nothing here waits for the device, so a CUDA graph can record it.

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>

// In fill_holes.cu, which does without torch's headers: they take minutes to compile.
cudaError_t fill_images(const float* alpha, float opaque, int num_images, int height, int width, uint32_t* open,
                        uint32_t* reached, float* filled, cudaStream_t stream);

namespace {

constexpr int64_t kMaxPixels = 1 << 30, kMaxRows = int64_t{1} << 33, kWord = 32;

// Messages are literals: see rasterize.cpp.
at::Tensor forward(const at::Tensor& alpha, double opaque) {
    TORCH_CHECK(alpha.is_cuda() && alpha.scalar_type() == at::kFloat, "alpha: expected fp32 on a CUDA device");
    TORCH_CHECK(alpha.dim() == 4 && alpha.size(1) == 1, "alpha: expected [B, 1, H, W]");
    TORCH_CHECK(alpha.numel() > 0, "alpha: expected at least one pixel");
    const int64_t num_images = alpha.size(0), height = alpha.size(2), width = alpha.size(3);
    TORCH_CHECK(height <= kMaxPixels / width, "alpha: expected at most 2^30 pixels per image");
    TORCH_CHECK(num_images <= kMaxRows / height && num_images <= kMaxPixels, "alpha: expected at most 2^33 rows");
    const c10::cuda::CUDAGuard guard(alpha.device());
    const at::Tensor input = alpha.contiguous(), output = input.new_empty(input.sizes());
    const at::Tensor open = input.new_empty({num_images, height, (width + kWord - 1) / kWord}, at::kInt);
    const at::Tensor reached = open.new_empty(open.sizes());
    C10_CUDA_CHECK(fill_images(
        input.const_data_ptr<float>(), static_cast<float>(opaque), static_cast<int>(num_images),
        static_cast<int>(height), static_cast<int>(width), static_cast<uint32_t*>(open.mutable_data_ptr()),
        static_cast<uint32_t*>(reached.mutable_data_ptr()), output.mutable_data_ptr<float>(),
        c10::cuda::getCurrentCUDAStream()));
    return output;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.def("forward", &forward, pybind11::call_guard<pybind11::gil_scoped_release>());
}

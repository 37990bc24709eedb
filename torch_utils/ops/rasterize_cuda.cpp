// SPDX-License-Identifier: Apache-2.0
// Checks and bindings of rasterize.cu. Nothing here waits for the device, so a CUDA graph can record it.

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <tuple>

// In rasterize.cu, which does without torch's headers: they take minutes to compile.
cudaError_t rasterize_views(const float* positions, const int64_t* faces, const float* rows, const float* columns,
                            int num_views, int64_t num_vertices, int num_faces, int height, int width, float epsilon,
                            unsigned long long* keys, int* num_large, int* large, int64_t* face, float* barycentric,
                            float* depth, cudaStream_t stream);

namespace {

constexpr int64_t kMaxViews = (1 << 16) - 1, kMaxItems = 1 << 30;

// Messages are literals: see rasterize.cpp.
void check(const at::Tensor& positions, const at::Tensor& faces, const at::Tensor& rows, const at::Tensor& columns) {
    for (const at::Tensor* tensor : {&positions, &rows, &columns})
        TORCH_CHECK(tensor->is_cuda() && tensor->scalar_type() == at::kFloat, "expected fp32 on a CUDA device");
    TORCH_CHECK(faces.is_cuda() && faces.scalar_type() == at::kLong, "faces: expected int64 on a CUDA device");
    for (const at::Tensor* tensor : {&faces, &rows, &columns})
        TORCH_CHECK(tensor->device() == positions.device(), "expected all tensors on the same device");
    TORCH_CHECK(positions.dim() == 3 && positions.size(2) == 3, "positions: expected [B, V, 3]");
    TORCH_CHECK(faces.dim() == 2 && faces.size(1) == 3, "faces: expected [F, 3]");
    TORCH_CHECK(rows.dim() == 1 && columns.dim() == 1 && rows.numel() > 0 && columns.numel() > 0,
                "rows, columns: expected [H] and [W]");
    TORCH_CHECK(positions.size(0) > 0 && positions.size(0) <= kMaxViews, "positions: expected 1 to 65535 views");
    TORCH_CHECK(faces.size(0) > 0 && faces.size(0) <= kMaxItems, "faces: expected 1 to 2^30 faces");
    TORCH_CHECK(rows.numel() <= kMaxItems / columns.numel(), "rows, columns: expected at most 2^30 pixels");
    TORCH_CHECK(positions.size(0) <= (kMaxItems << 8) / (rows.numel() * columns.numel()),
                "expected at most 2^38 pixels in all views");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& positions, const at::Tensor& faces,
                                                       const at::Tensor& rows, const at::Tensor& columns,
                                                       double epsilon) {
    check(positions, faces, rows, columns);
    const c10::cuda::CUDAGuard guard(positions.device());
    const at::Tensor vertices = positions.contiguous(), corners = faces.contiguous();
    const at::Tensor centres_y = rows.contiguous(), centres_x = columns.contiguous();
    const int64_t num_views = vertices.size(0), num_faces = corners.size(0);
    const int64_t height = rows.numel(), width = columns.numel();
    const at::Tensor keys = corners.new_empty({num_views, height, width});
    const at::Tensor num_large = corners.new_empty({num_views}, at::kInt);
    const at::Tensor large = corners.new_empty({num_views, num_faces}, at::kInt);
    const at::Tensor face = corners.new_empty({num_views, height, width});
    const at::Tensor barycentric = vertices.new_empty({num_views, height, width, 3});
    const at::Tensor depth = vertices.new_empty({num_views, height, width});
    C10_CUDA_CHECK(rasterize_views(
        vertices.const_data_ptr<float>(), corners.const_data_ptr<int64_t>(), centres_y.const_data_ptr<float>(),
        centres_x.const_data_ptr<float>(), static_cast<int>(num_views), vertices.size(1), static_cast<int>(num_faces),
        static_cast<int>(height), static_cast<int>(width), static_cast<float>(epsilon),
        static_cast<unsigned long long*>(keys.mutable_data_ptr()), num_large.mutable_data_ptr<int>(),
        large.mutable_data_ptr<int>(), face.mutable_data_ptr<int64_t>(), barycentric.mutable_data_ptr<float>(),
        depth.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
    return {face, barycentric, depth};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.def("forward", &forward, pybind11::call_guard<pybind11::gil_scoped_release>());
}

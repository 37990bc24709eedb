// SPDX-License-Identifier: Apache-2.0
// Flood fill of fill_holes.py on the CPU, one image per task.

#include <ATen/Parallel.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <vector>

namespace {

enum State : uint8_t { kBlocked, kOpen, kReached };

// The image inside a frame of blocked pixels, so that the flood needs no test for the borders.
class Flood {
public:
    Flood(const float* alpha, int64_t height, int64_t width, float opaque)
        : height_(height), width_(width), stride_(width + 2), state_((height + 2) * stride_, kBlocked) {
        for (int64_t row = 0; row < height; ++row)
            for (int64_t column = 0; column < width; ++column)
                state_[index(row, column)] = alpha[row * width + column] <= opaque ? kOpen : kBlocked;
    }

    void run() {
        if (state_[index(0, 0)] == kOpen)
            return from(index(0, 0));
        for (int64_t row = 0; row < height_; ++row) {
            from(index(row, 0));
            from(index(row, width_ - 1));
        }
        for (int64_t column = 0; column < width_; ++column) {
            from(index(0, column));
            from(index(height_ - 1, column));
        }
    }

    void write(const float* alpha, float* filled) const {
        for (int64_t row = 0; row < height_; ++row)
            for (int64_t column = 0; column < width_; ++column) {
                const int64_t pixel = row * width_ + column;
                filled[pixel] = state_[index(row, column)] == kReached ? alpha[pixel] : 1.0f;
            }
    }

private:
    int64_t index(int64_t row, int64_t column) const { return (row + 1) * stride_ + column + 1; }

    void from(int64_t seed) {
        visit(seed);
        while (!pending_.empty()) {
            const int64_t pixel = pending_.back();
            pending_.pop_back();
            visit(pixel - stride_);
            visit(pixel + stride_);
            visit(pixel - 1);
            visit(pixel + 1);
        }
    }

    void visit(int64_t pixel) {
        if (state_[pixel] != kOpen)
            return;
        state_[pixel] = kReached;
        pending_.push_back(pixel);
    }

    int64_t height_, width_, stride_;
    std::vector<State> state_;
    std::vector<int64_t> pending_;
};

// Messages are literals: see rasterize.cpp.
at::Tensor forward(const at::Tensor& alpha, double opaque) {
    TORCH_CHECK(alpha.device().is_cpu() && alpha.scalar_type() == at::kFloat, "alpha: expected fp32 on the CPU");
    TORCH_CHECK(alpha.dim() == 4 && alpha.size(1) == 1, "alpha: expected [B, 1, H, W]");
    TORCH_CHECK(alpha.numel() > 0, "alpha: expected at least one pixel");
    const at::Tensor input = alpha.contiguous();
    at::Tensor output = input.new_empty(input.sizes());
    const float* source = input.const_data_ptr<float>();
    float* target = output.mutable_data_ptr<float>();
    const int64_t height = input.size(2), width = input.size(3), area = height * width;
    at::parallel_for(0, input.size(0), 1, [&](int64_t begin, int64_t end) {
        for (int64_t image = begin; image < end; ++image) {
            Flood flood(source + image * area, height, width, static_cast<float>(opaque));
            flood.run();
            flood.write(source + image * area, target + image * area);
        }
    });
    return output;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.def("forward", &forward, pybind11::call_guard<pybind11::gil_scoped_release>());
}

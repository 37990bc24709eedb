// SPDX-License-Identifier: Apache-2.0
// What bias_act_cuda.cpp (which knows torch) asks of bias_act.cu (which does not, and so compiles in seconds).

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace bias_act {

enum class Dtype { half, bfloat16, single, twice };  // IEEE half, bfloat16, float, double.

enum class Act { linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus, swish };

// Those that consist of two straight lines: their gradient needs two bits per element and not the input.
constexpr bool is_piecewise_linear(Act act) {
    return act == Act::linear || act == Act::relu || act == Act::lrelu;
}

// clamp(gain * act(x * scale + noise + b)), element by element in the order of memory, in which x is [outer, middle,
// inner]. The channel is the position along `inner` or `middle`, the pixel that along the other of the two.
struct Layout {
    int64_t size;    // Elements.
    int64_t middle;
    int64_t inner;
    bool channel_is_inner;
};

struct Function {
    Act act;
    double alpha;  // Slope of lrelu where x is not positive.
    double gain;
    double clamp;  // Negative: none.
};

// Pointers are null for what is not there. `modulated` says which kernel is meant, and with it the type of b: that of x
// for plain ones, else double for double x and float for the others. scale and noise belong to modulated ones and have
// that type too.
struct Inputs {
    Dtype dtype;
    bool modulated;
    const void* x;
    const void* scale;     // [outer, channel].
    const void* noise;     // [outer or 1, pixel].
    const void* b;         // [channel].
    int64_t noise_stride;  // From one outer to the next: 0 or the number of pixels.
};

// Bytes of a mask: two bits per element, rounded up to what the widest group of elements writes.
constexpr int64_t mask_bytes(int64_t size) {
    return (size + 7) / 8 * 2;
}

// Write y and, unless it is null, the mask that `launch_masked` takes (plain, piecewise linear activations only).
cudaError_t launch_forward(const Inputs& inputs, const Layout& layout, const Function& function, void* y, void* mask,
                           cudaStream_t stream);

// Write gx = dL/dx and, unless it is null, gp = dL/d(x * scale + noise + b), given g = dL/dy.
// Plain ones: smooth activations only.
cudaError_t launch_backward(const Inputs& inputs, const Layout& layout, const Function& function, const void* g,
                            void* gx, void* gp, cudaStream_t stream);

// Write gx = g times the derivative that the mask tells, of the function (of any clamp) that the mask was made for.
cudaError_t launch_masked(Dtype dtype, const void* g, const void* mask, int64_t size, const Function& function,
                          void* gx, cudaStream_t stream);

}  // namespace bias_act

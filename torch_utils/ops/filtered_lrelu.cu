// SPDX-License-Identifier: Apache-2.0
// Kernel of filtered_lrelu.py on a CUDA device: two FIR filters and what is between them, in one pass over memory.
//
// A block makes a tile of the output of one plane. Its samples between the filters, of which there are many times more
// than of input and output, stay in shared memory; for the gradient, two bits of each go to global memory.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace next3d {

// These four are declared in filtered_lrelu_cuda.cpp too, word for word.
enum class Type { kHalf, kBFloat16, kFloat };

struct Filter {
    const float* taps;  // [height, width]; of a separable filter [width], for both axes; null for a tap of 1.
    int width, height;
    bool is_separable, flip;  // flip false: the filter is turned round, a convolution.
    float gain;
};

// Two bits per sample, four samples to a byte, rows of whole bytes: kNegative and kClamped. Sample (0, 0) of the plane
// is between the filters at (-x, -y); where there are no signs, samples are taken as 0.
struct Signs {
    const std::uint8_t* read;  // Not null: samples are multiplied with the slopes that these stand for.
    std::uint8_t* write;       // Not null: samples are given to the activation, and their signs kept.
    int x, y, row_bytes, height;
};

struct Pipeline {
    Filter first, second;
    Signs signs;
    int planes, channels, in_width, in_height, out_width, out_height;
    int up, down, pad_x, pad_y;  // Padding before the picture, in upsampled samples.
    float gain, slope, clamp;
};

namespace {

constexpr int kThreads = 256;
constexpr int kSharedBytes = 48 * 1024;  // What every device gives a block that asks for nothing.
constexpr int kSamplesPerByte = 4;
constexpr unsigned kNegative = 1, kClamped = 2;

// Sizes of what a block has in shared memory: input, samples between the filters, output. All blocks have the same.
struct Tile {
    int in_width, in_height, width, height, out_width, out_height;
    int buffer;  // Floats in the first of two buffers.
    int columns, rows;  // Of tiles in a plane.
};

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline void narrow(float value, float& result) { result = value; }
__device__ inline void narrow(float value, __half& result) { result = __float2half_rn(value); }
__device__ inline void narrow(float value, __nv_bfloat16& result) { result = __float2bfloat16_rn(value); }

// ceil(value / divisor), of negative values too.
__host__ __device__ inline int divide_up(int value, int divisor) {
    return value > 0 ? (value + divisor - 1) / divisor : value / divisor;
}

__device__ inline float tap(const Filter& filter, int index, int count) {
    return filter.taps == nullptr ? 1.0f : filter.taps[filter.flip ? index : count - 1 - index];
}

// The sum over the taps from `first` on, in steps of `up`, of tap times sample; `stride` is from sample to sample.
__device__ inline float filter_line(const Filter& filter, int taps, int first, int up, const float* sample,
                                    int stride) {
    float sum = 0;
    for (int i = first; i < taps; i += up, sample += stride)
        sum = fmaf(tap(filter, i, taps), *sample, sum);
    return sum;
}

__device__ inline float filter_area(const Filter& filter, int first_x, int first_y, int up, const float* sample,
                                    int stride) {
    float sum = 0;
    for (int i = first_y; i < filter.height; i += up, sample += stride)
        for (int j = first_x, k = 0; j < filter.width; j += up, ++k)
            sum = fmaf(tap(filter, i * filter.width + j, filter.height * filter.width), sample[k], sum);
    return sum;
}

__device__ inline float activate(const Pipeline& p, float sample, unsigned& signs) {
    const bool is_negative = !(sample > 0);
    float value = (is_negative ? sample * p.slope : sample) * p.gain;
    const bool is_clamped = fabsf(value) > p.clamp;
    if (is_clamped)
        value = copysignf(p.clamp, value);
    signs = (is_negative ? kNegative : 0) | (is_clamped ? kClamped : 0);
    return value;
}

__device__ inline float slope_of(const Pipeline& p, unsigned signs) {
    return signs & kClamped ? 0.0f : signs & kNegative ? p.gain * p.slope : p.gain;
}

// Where a block is: its plane, and its tile's first output, first sample between the filters and first input. `phase_x`
// and `phase_y` are upsampled samples from that input to tap 0 of that sample: from 1 - up to 0.
struct Place {
    std::int64_t plane;
    int out_x, out_y, x, y, in_x, in_y, phase_x, phase_y;

    __device__ Place(const Pipeline& p, const Tile& tile) {
        const int tiles = tile.columns * tile.rows, index = static_cast<int>(blockIdx.x % tiles);
        plane = blockIdx.x / tiles;
        out_x = index % tile.columns * tile.out_width;
        out_y = index / tile.columns * tile.out_height;
        x = out_x * p.down;
        y = out_y * p.down;
        in_x = divide_up(x - p.pad_x, p.up);
        in_y = divide_up(y - p.pad_y, p.up);
        phase_x = x - p.pad_x - in_x * p.up;
        phase_y = y - p.pad_y - in_y * p.up;
    }
};

template <class T>
__device__ void load(const Pipeline& p, const Tile& tile, const Place& place, const T* x, const T* b, float* input) {
    const float bias = b == nullptr ? 0.0f : widen(b[place.plane % p.channels]);
    for (int i = threadIdx.x; i < tile.in_width * tile.in_height; i += kThreads) {
        const int column = place.in_x + i % tile.in_width, row = place.in_y + i / tile.in_width;
        const bool is_inside = column >= 0 && column < p.in_width && row >= 0 && row < p.in_height;
        input[i] = is_inside ? widen(x[(place.plane * p.in_height + row) * p.in_width + column]) + bias : 0.0f;
    }
    __syncthreads();
}

// Filters the rows of the input: [in_height, in_width] -> [in_height, width].
__device__ void upsample_rows(const Pipeline& p, const Tile& tile, const Place& place, const float* input,
                              float* rows) {
    for (int i = threadIdx.x; i < tile.width * tile.in_height; i += kThreads) {
        const int column = i % tile.width, row = i / tile.width;
        const int start = place.phase_x + column, in = divide_up(max(start, 0), p.up);
        const float* sample = input + row * tile.in_width + in;
        rows[i] = filter_line(p.first, p.first.width, in * p.up - start, p.up, sample, 1);
    }
    __syncthreads();
}

// The upsampled sample at (x, y) of the tile, of the input or, where the filter is separable, of its filtered rows.
__device__ inline float upsampled(const Pipeline& p, const Tile& tile, const Place& place, const float* source, int x,
                                  int y) {
    const int start_y = place.phase_y + y, in_y = divide_up(max(start_y, 0), p.up), tap_y = in_y * p.up - start_y;
    if (p.first.is_separable)
        return filter_line(p.first, p.first.height, tap_y, p.up, source + in_y * tile.width + x, tile.width);
    const int start_x = place.phase_x + x, in_x = divide_up(max(start_x, 0), p.up), tap_x = in_x * p.up - start_x;
    return filter_area(p.first, tap_x, tap_y, p.up, source + in_y * tile.in_width + in_x, tile.in_width);
}

// Fills samples [height, width] with what is between the filters; a thread makes those of a byte of signs.
__device__ void activate_samples(const Pipeline& p, const Tile& tile, const Place& place, const float* source,
                                 float* samples) {
    const int row_bytes = (tile.width + kSamplesPerByte - 1) / kSamplesPerByte;
    const std::int64_t plane_signs = place.plane * p.signs.height * p.signs.row_bytes;
    // Tiles overlap. Both make the same sample and sign where they do, but only the first writes the sign.
    const bool is_last_x = place.out_x + tile.out_width >= p.out_width;
    const bool is_last_y = place.out_y + tile.out_height >= p.out_height;
    for (int i = threadIdx.x; i < row_bytes * tile.height; i += kThreads) {
        const int x = i % row_bytes * kSamplesPerByte, y = i / row_bytes;
        unsigned byte = 0;
        for (int j = 0; j < kSamplesPerByte && x + j < tile.width; ++j) {
            const float sample = upsampled(p, tile, place, source, x + j, y) * p.first.gain;
            float& result = samples[y * tile.width + x + j];
            if (p.signs.read == nullptr) {
                unsigned signs;
                result = activate(p, sample, signs);
                byte |= signs << 2 * j;
                continue;
            }
            const int sign_x = place.x + x + j + p.signs.x, sign_y = place.y + y + p.signs.y;
            const bool has_sign = sign_x >= 0 && sign_x < p.signs.row_bytes * kSamplesPerByte && sign_y >= 0 &&
                                  sign_y < p.signs.height;
            result = 0;
            if (has_sign) {
                const std::int64_t at = plane_signs + sign_y * p.signs.row_bytes + sign_x / kSamplesPerByte;
                result = sample * slope_of(p, p.signs.read[at] >> 2 * (sign_x % kSamplesPerByte));
            }
        }
        const int byte_x = (place.x + x) / kSamplesPerByte, sign_y = place.y + y;
        if (p.signs.write != nullptr && (is_last_x || x < tile.out_width * p.down) && byte_x < p.signs.row_bytes &&
            (is_last_y || y < tile.out_height * p.down) && sign_y < p.signs.height)
            p.signs.write[plane_signs + sign_y * p.signs.row_bytes + byte_x] = static_cast<std::uint8_t>(byte);
    }
    __syncthreads();
}

// Filters the rows of the samples: [height, width] -> [height, out_width].
__device__ void downsample_rows(const Pipeline& p, const Tile& tile, const float* samples, float* rows) {
    for (int i = threadIdx.x; i < tile.out_width * tile.height; i += kThreads) {
        const float* sample = samples + i / tile.out_width * tile.width + i % tile.out_width * p.down;
        rows[i] = filter_line(p.second, p.second.width, 0, 1, sample, 1);
    }
    __syncthreads();
}

// Writes the outputs, of the samples or, where the filter is separable, of their filtered rows.
template <class T>
__device__ void store(const Pipeline& p, const Tile& tile, const Place& place, const float* source, T* y) {
    for (int i = threadIdx.x; i < tile.out_width * tile.out_height; i += kThreads) {
        const int column = i % tile.out_width, row = i / tile.out_width;
        if (place.out_x + column >= p.out_width || place.out_y + row >= p.out_height)
            continue;
        const float sum =
            p.second.is_separable
                ? filter_line(p.second, p.second.height, 0, 1, source + row * p.down * tile.out_width + column,
                              tile.out_width)
                : filter_area(p.second, 0, 0, 1, source + (row * tile.width + column) * p.down, tile.width);
        narrow(sum * p.second.gain,
               y[(place.plane * p.out_height + place.out_y + row) * p.out_width + place.out_x + column]);
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
filter_activate_filter(const T* __restrict__ x, const T* __restrict__ b, T* __restrict__ y, Pipeline p, Tile tile) {
    extern __shared__ float buffers[];
    float *full = buffers, *free = buffers + tile.buffer;
    const Place place(p, tile);
    load(p, tile, place, x, b, full);
    if (p.first.is_separable) {
        upsample_rows(p, tile, place, full, free);
        activate_samples(p, tile, place, free, full);
    } else {
        activate_samples(p, tile, place, full, free);
        float* const samples = free;
        free = full;
        full = samples;
    }
    if (p.second.is_separable) {
        downsample_rows(p, tile, full, free);
        full = free;
    }
    store(p, tile, place, full, y);
}

// Returns the bytes of shared memory of a tile with these outputs, and fills in the rest of it. The multiples of four
// outputs begin at whole bytes of signs.
int plan(const Pipeline& p, int out_width, int out_height, Tile& tile) {
    tile.out_width = out_width;
    tile.out_height = out_height;
    tile.width = (out_width - 1) * p.down + p.second.width;
    tile.height = (out_height - 1) * p.down + p.second.height;
    tile.in_width = (tile.width + p.first.width - 2) / p.up + 1;
    tile.in_height = (tile.height + p.first.height - 2) / p.up + 1;
    tile.columns = divide_up(p.out_width, out_width);
    tile.rows = divide_up(p.out_height, out_height);
    // Input and filtered samples take turns: see the kernel.
    const int samples = tile.width * tile.height;
    tile.buffer = std::max(tile.in_width * tile.in_height, samples);
    const int second = p.first.is_separable ? std::max(tile.width * tile.in_height, out_width * tile.height) : samples;
    return (tile.buffer + second) * static_cast<int>(sizeof(float));
}

template <class T>
cudaError_t launch(const void* x, const void* b, void* y, const Pipeline& p, cudaStream_t stream) {
    constexpr int kSizes[][2] = {{32, 32}, {32, 16}, {16, 16}, {16, 8}, {8, 8}, {4, 4}};
    for (const auto& size : kSizes) {
        Tile tile;
        const int bytes = plan(p, size[0], size[1], tile);
        if (bytes > kSharedBytes)
            continue;
        const std::int64_t blocks = std::int64_t{p.planes} * tile.columns * tile.rows;
        if (blocks > INT32_MAX)
            break;
        const unsigned grid = static_cast<unsigned>(blocks);
        filter_activate_filter<T><<<grid, kThreads, bytes, stream>>>(
            static_cast<const T*>(x), static_cast<const T*>(b), static_cast<T*>(y), p, tile);
        return cudaGetLastError();
    }
    return cudaErrorInvalidConfiguration;
}

}  // namespace

// Filters x [planes, in_height, in_width] to y [planes, out_height, out_width], neither empty, on the current device.
// b: [channels] or null; plane i is of channel i % channels. x, b and y have the same type.
cudaError_t filtered_lrelu(const void* x, const void* b, void* y, Type type, const Pipeline& p, cudaStream_t stream) {
    if (type == Type::kHalf)
        return launch<__half>(x, b, y, p, stream);
    if (type == Type::kBFloat16)
        return launch<__nv_bfloat16>(x, b, y, p, stream);
    return launch<float>(x, b, y, p, stream);
}

}  // namespace next3d

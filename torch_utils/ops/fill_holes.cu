// SPDX-License-Identifier: Apache-2.0
// The flood fill of fill_holes.py on a GPU. Three launches, whatever the batch:
//   pack     Open pixels become bits: one warp per word of 32 neighbours in a row.
//   flood    One block per image spreads the reached bits along rows, then along columns, until nothing changes.
//   write    Bits become pixels.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace {

constexpr int kWord = 32;  // Pixels in a word, the first in the lowest bit; threads in a warp.
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;
constexpr int kWordsPerBlock = 8;
constexpr int kMaxFloodThreads = 1024;
constexpr int kMaxGridY = 65535;

struct Shape {
    int height, width, words;  // Words per row; bits beyond the width are 0.
};

// The pixel of this thread, one warp per word: blocks take kWordsPerBlock rows, blockIdx.y strides over words.
__global__ void pack(const float* alpha, float opaque, int64_t num_rows, Shape shape, uint32_t* open) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kWordsPerBlock + threadIdx.y;
    if (row >= num_rows)
        return;
    for (int word = blockIdx.y; word < shape.words; word += gridDim.y) {
        const int column = word * kWord + threadIdx.x;
        const bool is_open = column < shape.width && alpha[row * shape.width + column] <= opaque;
        const uint32_t bits = __ballot_sync(kWholeWarp, is_open);
        if (threadIdx.x == 0)
            open[row * shape.words + word] = bits;
    }
}

__global__ void write(const float* alpha, const uint32_t* reached, int64_t num_rows, Shape shape, float* filled) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kWordsPerBlock + threadIdx.y;
    if (row >= num_rows)
        return;
    for (int word = blockIdx.y; word < shape.words; word += gridDim.y) {
        const int column = word * kWord + threadIdx.x;
        const int64_t pixel = row * shape.width + column;
        if (column < shape.width)
            filled[pixel] = reached[row * shape.words + word] >> threadIdx.x & 1 ? alpha[pixel] : 1.0f;
    }
}

// One image: rows of bits, `stride` words apart. Reached bits are open bits.
struct Flood {
    const uint32_t* open;
    uint32_t* reached;
    int height, words, stride;
};

// Spreads seeds, which are open, towards higher bits: adding one to a run of open bits carries through to its end.
__device__ uint32_t spread_up(uint32_t open, uint32_t seeds) {
    return seeds | (open & ~(open + seeds));
}

// Spreads along one row and returns whether that reached new bits.
__device__ bool spread_row(const uint32_t* open, uint32_t* reached, int words) {
    bool is_changed = false;
    uint32_t carry = 0;
    for (int i = 0; i < words; ++i) {
        const uint32_t before = reached[i], after = spread_up(open[i], before | (carry & open[i]));
        is_changed |= after != before;
        reached[i] = after;
        carry = after >> (kWord - 1);
    }
    carry = 0;
    for (int i = words - 1; i >= 0; --i) {
        const uint32_t before = __brev(reached[i]), mirrored = __brev(open[i]);
        const uint32_t after = spread_up(mirrored, before | (carry & mirrored));
        is_changed |= after != before;
        reached[i] = __brev(after);
        carry = after >> (kWord - 1);
    }
    return is_changed;
}

// Spreads 32 columns from the first row, which the pointers point to, to the last; a warp calls it. Each lane has a
// part of the rows. What leaves a part is what it generates (`reached` given nothing from before) or what enters it and
// propagates through all of its rows; a scan over the lanes composes the parts.
__device__ bool spread_columns(const uint32_t* open, uint32_t* reached, int height, int64_t stride) {
    const int lane = threadIdx.x % kWord;
    // Odd, so that the lanes access as many banks of shared memory: its stride is odd too.
    const int share = ((height + kWord - 1) / kWord) | 1;
    const int begin = min(lane * share, height), end = min(begin + share, height);
    uint32_t generated = 0, propagated = ~0u;
    for (int row = begin; row < end; ++row) {
        generated = reached[row * stride] | (open[row * stride] & generated);
        propagated &= open[row * stride];
    }
    for (int distance = 1; distance < kWord; distance *= 2) {
        const uint32_t generated_before = __shfl_up_sync(kWholeWarp, generated, distance);
        const uint32_t propagated_before = __shfl_up_sync(kWholeWarp, propagated, distance);
        if (lane >= distance) {
            generated |= propagated & generated_before;
            propagated &= propagated_before;
        }
    }
    uint32_t carry = __shfl_up_sync(kWholeWarp, generated, 1);
    if (lane == 0)
        carry = 0;
    bool is_changed = false;
    for (int row = begin; row < end; ++row) {
        const uint32_t before = reached[row * stride];
        carry = before | (open[row * stride] & carry);
        is_changed |= carry != before;
        reached[row * stride] = carry;
    }
    __syncwarp();
    return is_changed;
}

__device__ void spread(const Flood& flood) {
    const int warp = threadIdx.x / kWord, num_warps = blockDim.x / kWord;
    const int64_t last_row = static_cast<int64_t>(flood.height - 1) * flood.stride;
    bool is_changed = true;
    while (__syncthreads_or(is_changed)) {
        is_changed = false;
        for (int row = threadIdx.x; row < flood.height; row += blockDim.x) {
            const int64_t offset = static_cast<int64_t>(row) * flood.stride;
            is_changed |= spread_row(flood.open + offset, flood.reached + offset, flood.words);
        }
        __syncthreads();
        for (int word = warp; word < flood.words; word += num_warps) {
            const uint32_t* open = flood.open + word;
            uint32_t* reached = flood.reached + word;
            is_changed |= spread_columns(open, reached, flood.height, flood.stride);
            is_changed |= spread_columns(open + last_row, reached + last_row, flood.height, -flood.stride);
        }
    }
}

// The bits of a word that lie on the border of the image.
__device__ uint32_t border(int row, int word, Shape shape) {
    if (row == 0 || row == shape.height - 1)
        return ~0u;
    const uint32_t first = word == 0 ? 1u : 0u;
    return first | (word == shape.words - 1 ? 1u << (shape.width - 1) % kWord : 0u);
}

// is_shared: the image fits into shared memory. Otherwise it stays in `open` and `reached`.
__global__ void __launch_bounds__(kMaxFloodThreads, 1) flood(const uint32_t* open, uint32_t* reached, Shape shape,
                                                             int shared_stride, bool is_shared) {
    extern __shared__ uint32_t shared[];
    const int size = shape.height * shape.words;
    open += static_cast<int64_t>(blockIdx.x) * size;
    reached += static_cast<int64_t>(blockIdx.x) * size;
    Flood image{open, reached, shape.height, shape.words, shape.words};
    if (is_shared)
        image = {shared, shared + shape.height * shared_stride, shape.height, shape.words, shared_stride};

    // Where the corner is blocked, the flood starts from the whole border.
    const bool is_corner_open = open[0] & 1;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        const int row = i / shape.words, word = i % shape.words, place = row * image.stride + word;
        if (is_shared)
            shared[place] = open[i];
        image.reached[place] = is_corner_open ? (i == 0 ? 1u : 0u) : open[i] & border(row, word, shape);
    }
    spread(image);
    if (is_shared)
        for (int i = threadIdx.x; i < size; i += blockDim.x)
            reached[i] = image.reached[i / shape.words * shared_stride + i % shape.words];
}

cudaError_t launch_flood(const uint32_t* open, uint32_t* reached, int num_images, Shape shape, cudaStream_t stream) {
    int device = 0, capacity = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&capacity, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const int stride = shape.words | 1;  // Odd: the threads of a warp, each at its row, access different banks.
    const int64_t needed = 2 * sizeof(uint32_t) * static_cast<int64_t>(shape.height) * stride;
    const bool is_shared = needed <= capacity;
    const int bytes = is_shared ? static_cast<int>(needed) : 0;
    if (error == cudaSuccess)  // The same for all calls, as other threads may launch at the same time.
        error = cudaFuncSetAttribute(flood, cudaFuncAttributeMaxDynamicSharedMemorySize, capacity);
    if (error != cudaSuccess)
        return error;
    // A thread per row, a warp per word of columns.
    const int threads = std::min(std::max((shape.height + kWord - 1) / kWord, shape.words) * kWord, kMaxFloodThreads);
    flood<<<num_images, threads, bytes, stream>>>(open, reached, shape, stride, is_shared);
    return cudaGetLastError();
}

}  // namespace

// alpha, filled: [B, H, W]; scratch: open, reached [B, H, ceil(W / 32)]. No size is 0, B is below 2^31, H * W at most
// 2^30.
cudaError_t fill_images(const float* alpha, float opaque, int num_images, int height, int width, uint32_t* open,
                        uint32_t* reached, float* filled, cudaStream_t stream) {
    const Shape shape{height, width, (width + kWord - 1) / kWord};
    const int64_t num_rows = static_cast<int64_t>(num_images) * height;
    const dim3 blocks(static_cast<unsigned>((num_rows + kWordsPerBlock - 1) / kWordsPerBlock),
                      std::min(shape.words, kMaxGridY));
    const dim3 threads(kWord, kWordsPerBlock);
    pack<<<blocks, threads, 0, stream>>>(alpha, opaque, num_rows, shape, open);
    const cudaError_t error = launch_flood(open, reached, num_images, shape, stream);
    if (error != cudaSuccess)
        return error;
    write<<<blocks, threads, 0, stream>>>(alpha, reached, num_rows, shape, filled);
    return cudaGetLastError();
}

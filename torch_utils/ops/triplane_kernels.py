# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `triplane`: sampling, decoder and compositing in one pass, no per-point features in memory.

Triton rather than CUDA C++: the decoder is two small matrix products per block of points, which `tl.dot` puts on the
tensor cores of every generation with their own layouts, and the same source runs in Triton's interpreter on a CPU.
The points of a block are one ray's samples (or any points of one field), its columns channels or hidden units.
"""

import triton
import triton.language as tl

RGB_SCALE, RGB_OFFSET = tl.constexpr(1.002), tl.constexpr(-0.001)  # As in training.generator.Decoder.
TRANSMITTANCE_FLOOR = tl.constexpr(1e-10)  # These three as in training.volume.march and samples.
WEIGHT_FLOOR, HISTOGRAM_FLOOR = tl.constexpr(0.01), tl.constexpr(1e-5)


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _axis(x, y, z, AXIS: tl.constexpr):
    if AXIS == 0:
        return x
    elif AXIS == 1:
        return y
    else:
        return z


@triton.jit
def _pixel(coordinate, size):
    """Return the lower neighbour's index and the share of the upper one; far outside both are outside the plane."""
    position = ((coordinate + 1.0) * size - 1.0) * 0.5
    position = tl.minimum(tl.maximum(position, -2.0), size + 1.0)
    low = tl.floor(position)
    return low.to(tl.int32), position - low


@triton.jit
def _corner(column, row, x_share, y_share, DX: tl.constexpr, DY: tl.constexpr, stride_h, stride_w, height, width,
            valid):
    """Return offset, weight and mask [P] of one of a point's four neighbours."""
    x, y = column + DX, row + DY
    weight = (x_share if DX == 1 else 1.0 - x_share) * (y_share if DY == 1 else 1.0 - y_share)
    mask = valid & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return y * stride_h + x * stride_w, weight, mask


@triton.jit
def _sample_plane(plane, x, y, valid, channels, stride_c, stride_h, stride_w, height, width):
    """Return bilinear features [P, C] of one plane at (x, y) in [-1, 1], zero outside."""
    column, x_share = _pixel(x, width)
    row, y_share = _pixel(y, height)
    features = tl.zeros([x.shape[0], channels.shape[0]], tl.float32)
    for dy in tl.static_range(2):
        for dx in tl.static_range(2):
            offset, weight, mask = _corner(
                column, row, x_share, y_share, dx, dy, stride_h, stride_w, height, width, valid
            )
            at = plane + offset[:, None] + channels[None, :] * stride_c
            features += weight[:, None] * tl.load(at, mask=mask[:, None], other=0.0).to(tl.float32)
    return features


@triton.jit
def _sample(planes, x, y, z, valid, channels, stride_p, stride_c, stride_h, stride_w, height, width,
            AXES: tl.constexpr):
    """Return the mean [P, C] of three planes at points in [-1, 1]³; AXES: column and row coordinate of each."""
    features = tl.zeros([x.shape[0], channels.shape[0]], tl.float32)
    for i in tl.static_range(3):
        column, row = _axis(x, y, z, AXES[2 * i]), _axis(x, y, z, AXES[2 * i + 1])
        features += _sample_plane(
            planes + i * stride_p, column, row, valid, channels, stride_c, stride_h, stride_w, height, width
        )
    return features * (1.0 / 3.0)


@triton.jit
def _scatter(gradients, x, y, z, valid, channels, values, stride_p, stride_h, height, width, AXES: tl.constexpr):
    """Add values [P, C], gradients of the mean features, to planes [3, H, W, C] of gradients."""
    stride_w = channels.shape[0]
    for i in tl.static_range(3):
        column, x_share = _pixel(_axis(x, y, z, AXES[2 * i]), width)
        row, y_share = _pixel(_axis(x, y, z, AXES[2 * i + 1]), height)
        for dy in tl.static_range(2):
            for dx in tl.static_range(2):
                offset, weight, mask = _corner(
                    column, row, x_share, y_share, dx, dy, stride_h, stride_w, height, width, valid
                )
                at = gradients + i * stride_p + offset[:, None] + channels[None, :]
                tl.atomic_add(at, values * (weight * (1.0 / 3.0))[:, None], mask=mask[:, None], sem='relaxed')


@triton.jit
def _dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)


@triton.jit
def _hidden(features, w1, b1, channels, units, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Return pre-activations [P, H]."""
    weight = tl.load(w1 + units[None, :] * channels.shape[0] + channels[:, None])
    return _dot(features, weight, DOT, PRECISION) + tl.load(b1 + units)[None, :]


@triton.jit
def _density(hidden, w2, b2, units):
    return tl.sum(hidden * tl.load(w2 + units)[None, :], axis=1) + tl.load(b2)


@triton.jit
def _colour_logits(hidden, w2, b2, channels, units, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Return [P, C]; row 0 of w2 [1 + C, H] is density's."""
    weight = tl.load(w2 + (1 + channels[None, :]) * units.shape[0] + units[:, None])
    return _dot(hidden, weight, DOT, PRECISION) + tl.load(b2 + 1 + channels)[None, :]


@triton.jit
def _decode_backward(g_logits, g_sigma, features, before_hidden, hidden, w1, w2, channels, units, DOT: tl.constexpr,
                     PRECISION: tl.constexpr):
    """Return gradients of the features [P, C], then of w1, b1, w2's colours, b2's, w2's density, b2's."""
    width = units.shape[0]
    w2_colour = tl.load(w2 + (1 + channels[:, None]) * width + units[None, :])
    g_hidden = _dot(g_logits, w2_colour, DOT, PRECISION) + g_sigma[:, None] * tl.load(w2 + units)[None, :]
    g_before = g_hidden * _sigmoid(before_hidden)
    w1_rows = tl.load(w1 + units[:, None] * channels.shape[0] + channels[None, :])
    return (
        _dot(g_before, w1_rows, DOT, PRECISION),
        _dot(tl.trans(g_before), features, DOT, PRECISION),
        tl.sum(g_before, axis=0),
        _dot(tl.trans(g_logits), hidden, DOT, PRECISION),
        tl.sum(g_logits, axis=0),
        tl.sum(g_sigma[:, None] * hidden, axis=0),
        tl.sum(g_sigma, axis=0),
    )


@triton.jit
def _add_to_decoder(g_w1, g_b1, g_w2, g_b2, w1, b1, w2, b2, w2_sigma, b2_sigma, channels, units):
    """Add a program's sums to the gradients of the weights."""
    tl.atomic_add(g_w1 + units[:, None] * channels.shape[0] + channels[None, :], w1, sem='relaxed')
    tl.atomic_add(g_b1 + units, b1, sem='relaxed')
    tl.atomic_add(g_w2 + (1 + channels[:, None]) * units.shape[0] + units[None, :], w2, sem='relaxed')
    tl.atomic_add(g_w2 + units, w2_sigma, sem='relaxed')
    tl.atomic_add(g_b2 + 1 + channels, b2, sem='relaxed')
    tl.atomic_add(g_b2, b2_sigma, sem='relaxed')


@triton.jit
def _load_points(points, first, num_points, scale, P: tl.constexpr):
    """Return index, validity and plane coordinates of P points of a list [.., 3] from its row `first` on."""
    index = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    valid = index < num_points
    at = points + (first + index) * 3
    x = tl.load(at, mask=valid, other=0.0) * scale
    y = tl.load(at + 1, mask=valid, other=0.0) * scale
    z = tl.load(at + 2, mask=valid, other=0.0) * scale
    return first + index, valid, x, y, z


@triton.jit
def query_kernel(planes, points, w1, b1, w2, b2, sigma, rgb, num_points,
                 stride_n, stride_p, stride_c, stride_h, stride_w, height, width, scale,
                 AXES: tl.constexpr, C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, WITH_RGB: tl.constexpr,
                 DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Decode P points of field program_id(1): points [N, M, 3] -> sigma [N, M], rgb [N, M, C]."""
    n = tl.program_id(1).to(tl.int64)
    index, valid, x, y, z = _load_points(points, n * num_points, num_points, scale, P)
    channels, units = tl.arange(0, C), tl.arange(0, H)
    features = _sample(planes + n * stride_n, x, y, z, valid, channels, stride_p, stride_c, stride_h, stride_w,
                       height, width, AXES)
    hidden = _softplus(_hidden(features, w1, b1, channels, units, DOT, PRECISION))
    tl.store(sigma + index, _density(hidden, w2, b2, units), mask=valid)
    if WITH_RGB:
        logits = _colour_logits(hidden, w2, b2, channels, units, DOT, PRECISION)
        out = rgb + index[:, None] * C + channels[None, :]
        tl.store(out, _sigmoid(logits) * RGB_SCALE + RGB_OFFSET, mask=valid[:, None])


@triton.jit
def query_backward_kernel(planes, points, w1, b1, w2, b2, g_sigma, g_rgb, g_planes, g_w1, g_b1, g_w2, g_b2,
                          num_points, stride_n, stride_p, stride_c, stride_h, stride_w, height, width, scale,
                          AXES: tl.constexpr, C: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
                          DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of `query_kernel`, recomputed; g_planes: [N, 3, H, W, C] float32; all gradients are added to."""
    n = tl.program_id(1).to(tl.int64)
    index, valid, x, y, z = _load_points(points, n * num_points, num_points, scale, P)
    channels, units = tl.arange(0, C), tl.arange(0, H)
    features = _sample(planes + n * stride_n, x, y, z, valid, channels, stride_p, stride_c, stride_h, stride_w,
                       height, width, AXES)
    before_hidden = _hidden(features, w1, b1, channels, units, DOT, PRECISION)
    hidden = _softplus(before_hidden)
    share = _sigmoid(_colour_logits(hidden, w2, b2, channels, units, DOT, PRECISION))
    g_out = tl.load(g_rgb + index[:, None] * C + channels[None, :], mask=valid[:, None], other=0.0)
    g_logits = g_out * (share * (1.0 - share) * RGB_SCALE)
    g_density = tl.load(g_sigma + index, mask=valid, other=0.0)
    g_sampled, d_w1, d_b1, d_w2, d_b2, d_w2_sigma, d_b2_sigma = _decode_backward(
        g_logits, g_density, features, before_hidden, hidden, w1, w2, channels, units, DOT, PRECISION
    )
    _add_to_decoder(g_w1, g_b1, g_w2, g_b2, d_w1, d_b1, d_w2, d_b2, d_w2_sigma, d_b2_sigma, channels, units)
    _scatter(g_planes + n * 3 * height * width * C, x, y, z, valid, channels, g_sampled, height * width * C,
             width * C, height, width, AXES)


@triton.jit
def ray_density_kernel(planes, origins, directions, depths, w1, b1, w2, b2, sigma, num_rays, num_samples,
                       stride_n, stride_p, stride_c, stride_h, stride_w, height, width, scale,
                       AXES: tl.constexpr, C: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
                       DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Density of P samples of rays of field program_id(1): depths [N, M, S] -> sigma [N, M, S]."""
    n = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * P + tl.arange(0, P)
    valid = index < num_rays * num_samples
    ray = n * num_rays + index // num_samples
    sample = n * num_rays * num_samples + index
    t = tl.load(depths + sample, mask=valid, other=0.0)
    x = (tl.load(origins + ray * 3, mask=valid, other=0.0)
         + t * tl.load(directions + ray * 3, mask=valid, other=0.0)) * scale
    y = (tl.load(origins + ray * 3 + 1, mask=valid, other=0.0)
         + t * tl.load(directions + ray * 3 + 1, mask=valid, other=0.0)) * scale
    z = (tl.load(origins + ray * 3 + 2, mask=valid, other=0.0)
         + t * tl.load(directions + ray * 3 + 2, mask=valid, other=0.0)) * scale
    channels, units = tl.arange(0, C), tl.arange(0, H)
    features = _sample(planes + n * stride_n, x, y, z, valid, channels, stride_p, stride_c, stride_h, stride_w,
                       height, width, AXES)
    hidden = _softplus(_hidden(features, w1, b1, channels, units, DOT, PRECISION))
    tl.store(sigma + sample, _density(hidden, w2, b2, units), mask=valid)


@triton.jit
def _interval_weights(sigma, sigma_next, t, t_next, i, num_samples):
    """Return weights, transmittance and kept share 1 - alpha [S] of the intervals (i, i + 1)."""
    is_interval = i < num_samples - 1
    density = _softplus((sigma + sigma_next) * 0.5 - 1.0)
    kept = tl.where(is_interval, tl.exp(-density * (t_next - t)), 1.0)
    passed = tl.cumprod(tl.where(is_interval, kept + TRANSMITTANCE_FLOOR, 1.0), axis=0)
    transmittance = tl.where(i > 0, tl.gather(passed, tl.maximum(i - 1, 0), 0), 1.0)
    return (1.0 - kept) * transmittance, transmittance, kept


@triton.jit
def importance_kernel(depths, sigma, draws, merged, stride_draw_ray, stride_draw, num_samples, num_fine,
                      S: tl.constexpr):
    """Draw fine depths where a first pass found density and merge both lists in order; one ray a program.

    depths, sigma: [R, num_samples], ascending. draws: [R, num_fine]. merged: [R, num_samples + num_fine].
    S: a power of two from both numbers on; gathers between lists of unlike sizes read outside. Formulas:
    training.volume.samples.
    """
    ray = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, S)
    start = ray * num_samples
    t = tl.load(depths + start + i, mask=i < num_samples, other=0.0)
    following = i + 1 < num_samples
    t_next = tl.load(depths + start + i + 1, mask=following, other=0.0)
    s = tl.load(sigma + start + i, mask=i < num_samples, other=0.0)
    s_next = tl.load(sigma + start + i + 1, mask=following, other=0.0)
    weights, _, _ = _interval_weights(s, s_next, t, t_next, i, num_samples)
    # Weight k of the histogram smooths the intervals k, k + 1 and k + 2.
    next_1 = tl.gather(weights, tl.minimum(i + 1, S - 1), 0)
    next_2 = tl.gather(weights, tl.minimum(i + 2, S - 1), 0)
    smooth = 0.5 * (tl.maximum(weights, next_1) + tl.maximum(next_1, next_2)) + WEIGHT_FLOOR + HISTOGRAM_FLOOR
    num_bins = num_samples - 3
    smooth = tl.where(i < num_bins, smooth, 0.0)
    total = tl.cumsum(smooth / tl.sum(smooth, axis=0), axis=0)
    cdf = tl.where(i > 0, tl.gather(total, tl.maximum(i - 1, 0), 0), 0.0)
    edges = 0.5 * (t + t_next)

    j = tl.arange(0, S)
    is_fine = j < num_fine
    u = tl.load(draws + ray * stride_draw_ray + j * stride_draw, mask=is_fine, other=0.0)
    is_below = (cdf[None, :] <= u[:, None]) & (i <= num_bins)[None, :]
    index = tl.sum(is_below.to(tl.int32), axis=1)
    below, above = tl.maximum(index - 1, 0), tl.minimum(index, num_bins)
    low, width = tl.gather(cdf, below, 0), tl.gather(cdf, above, 0) - tl.gather(cdf, below, 0)
    width = tl.where(width < HISTOGRAM_FLOOR, 1.0, width)
    edge = tl.gather(edges, below, 0)
    fine = edge + (u - low) / width * (tl.gather(edges, above, 0) - edge)

    # Each depth's place is the number of depths before it; of equal ones the coarse come first, then by number.
    far = float('inf')
    coarse, fine = tl.where(i < num_samples, t, far), tl.where(is_fine, fine, far)
    coarse_place = i + tl.sum((fine[None, :] < coarse[:, None]).to(tl.int32), axis=1)
    earlier = (fine[None, :] < fine[:, None]) | ((fine[None, :] == fine[:, None]) & (j[None, :] < j[:, None]))
    fine_place = tl.sum(earlier.to(tl.int32), axis=1) + tl.sum((coarse[None, :] <= fine[:, None]).to(tl.int32), axis=1)
    out = merged + ray * (num_samples + num_fine)
    tl.store(out + coarse_place, coarse, mask=i < num_samples)
    tl.store(out + fine_place, fine, mask=is_fine)


@triton.jit
def _ray_points(origins, directions, depths, ray, num_samples, scale, S: tl.constexpr):
    """Return sample numbers, validity, depths, the next depths and points [S] in plane coordinates of a ray."""
    i = tl.arange(0, S)
    valid = i < num_samples
    t = tl.load(depths + ray * num_samples + i, mask=valid, other=0.0)
    t_next = tl.load(depths + ray * num_samples + i + 1, mask=i + 1 < num_samples, other=0.0)
    x = (tl.load(origins + ray * 3) + t * tl.load(directions + ray * 3)) * scale
    y = (tl.load(origins + ray * 3 + 1) + t * tl.load(directions + ray * 3 + 1)) * scale
    z = (tl.load(origins + ray * 3 + 2) + t * tl.load(directions + ray * 3 + 2)) * scale
    return i, valid, t, t_next, x, y, z


@triton.jit
def march_kernel(planes, origins, directions, depths, w1, b1, w2, b2, features_out, depth_out, total_out,
                 num_rays, num_samples, stride_n, stride_p, stride_c, stride_h, stride_w, height, width, scale,
                 AXES: tl.constexpr, C: tl.constexpr, H: tl.constexpr, S: tl.constexpr, WHITE_BACK: tl.constexpr,
                 DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Composite one ray a program: depths [N·M, num_samples] -> features [N·M, C], depth and total weight [N·M]."""
    ray = tl.program_id(0).to(tl.int64)
    i, valid, t, t_next, x, y, z = _ray_points(origins, directions, depths, ray, num_samples, scale, S)
    channels, units = tl.arange(0, C), tl.arange(0, H)
    features = _sample(planes + (ray // num_rays) * stride_n, x, y, z, valid, channels, stride_p, stride_c, stride_h,
                       stride_w, height, width, AXES)
    hidden = _softplus(_hidden(features, w1, b1, channels, units, DOT, PRECISION))
    sigma = _density(hidden, w2, b2, units)
    sigma_next = tl.gather(sigma, tl.minimum(i + 1, S - 1), 0)
    weights, _, _ = _interval_weights(sigma, sigma_next, t, t_next, i, num_samples)
    # Both ends of an interval carry half of its weight.
    before = tl.where(i > 0, tl.gather(weights, tl.maximum(i - 1, 0), 0), 0.0)
    rgb = _sigmoid(_colour_logits(hidden, w2, b2, channels, units, DOT, PRECISION)) * RGB_SCALE + RGB_OFFSET
    colours = tl.sum((0.5 * (before + weights))[:, None] * rgb, axis=0)
    total = tl.sum(weights, axis=0)
    if WHITE_BACK:
        colours += 1.0 - total
    tl.store(features_out + ray * C + channels, colours * 2.0 - 1.0)
    tl.store(depth_out + ray, tl.sum(weights * (0.5 * (t + t_next)), axis=0) / total)
    tl.store(total_out + ray, total)


@triton.jit
def _weight_gradients(g_features, g_depth, g_total, rgb, weights, t, t_next, i, num_samples, S: tl.constexpr,
                      WHITE_BACK: tl.constexpr):
    """Return dL/d(weight of each interval) [S], of gradients [C], [] and [] of a ray's outputs."""
    along = tl.sum(rgb * g_features[None, :], axis=1)
    gradient = along + tl.gather(along, tl.minimum(i + 1, S - 1), 0) + g_total
    if WHITE_BACK:
        gradient -= 2.0 * tl.sum(g_features, axis=0)
    total = tl.sum(weights, axis=0)
    middle = 0.5 * (t + t_next)
    mean = tl.sum(weights * middle, axis=0) / total
    gradient += tl.where(total > 0, g_depth * (middle - mean) / total, 0.0)
    return tl.where(i < num_samples - 1, gradient, 0.0)


@triton.jit
def _density_gradients(g_weights, weights, transmittance, kept, sigma, sigma_next, t, t_next, i, num_samples):
    """Return dL/dsigma [S] from dL/d(weights)."""
    weighted = g_weights * weights
    behind = tl.cumsum(weighted, axis=0, reverse=True) - weighted
    # d alpha = step·(1 - alpha)·d density; what lies behind is dimmed by d alpha / (1 - alpha).
    dimmed = behind * (kept / (kept + TRANSMITTANCE_FLOOR))
    step = tl.where(i < num_samples - 1, t_next - t, 0.0)
    g_density = step * (kept * g_weights * transmittance - dimmed)
    g_mean = g_density * _sigmoid((sigma + sigma_next) * 0.5 - 1.0)
    before = tl.where(i > 0, tl.gather(g_mean, tl.maximum(i - 1, 0), 0), 0.0)
    return 0.5 * (before + g_mean)


@triton.jit
def march_backward_kernel(planes, origins, directions, depths, w1, b1, w2, b2, g_features, g_depth, g_total,
                          g_planes, g_w1, g_b1, g_w2, g_b2, num_rays, num_samples, all_rays,
                          stride_n, stride_p, stride_c, stride_h, stride_w, height, width, scale,
                          AXES: tl.constexpr, C: tl.constexpr, H: tl.constexpr, S: tl.constexpr,
                          WHITE_BACK: tl.constexpr, RAYS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of `march_kernel`, everything recomputed; RAYS rays a program, which sum the decoder's first.

    g_planes: [N, 3, H, W, C] float32, g_w1 .. g_b2 like the weights; all are added to.
    """
    channels, units = tl.arange(0, C), tl.arange(0, H)
    sum_w1, sum_b1 = tl.zeros([H, C], tl.float32), tl.zeros([H], tl.float32)
    sum_w2, sum_b2 = tl.zeros([C, H], tl.float32), tl.zeros([C], tl.float32)
    sum_w2_sigma, sum_b2_sigma = tl.zeros([H], tl.float32), 0.0
    for k in range(RAYS):
        ray = tl.program_id(0).to(tl.int64) * RAYS + k
        if ray < all_rays:
            i, valid, t, t_next, x, y, z = _ray_points(origins, directions, depths, ray, num_samples, scale, S)
            n = ray // num_rays
            features = _sample(planes + n * stride_n, x, y, z, valid, channels, stride_p, stride_c, stride_h,
                               stride_w, height, width, AXES)
            before_hidden = _hidden(features, w1, b1, channels, units, DOT, PRECISION)
            hidden = _softplus(before_hidden)
            sigma = _density(hidden, w2, b2, units)
            sigma_next = tl.gather(sigma, tl.minimum(i + 1, S - 1), 0)
            weights, transmittance, kept = _interval_weights(sigma, sigma_next, t, t_next, i, num_samples)
            before = tl.where(i > 0, tl.gather(weights, tl.maximum(i - 1, 0), 0), 0.0)
            share = _sigmoid(_colour_logits(hidden, w2, b2, channels, units, DOT, PRECISION))

            g_out = tl.load(g_features + ray * C + channels)
            g_weights = _weight_gradients(
                g_out, tl.load(g_depth + ray), tl.load(g_total + ray), share * RGB_SCALE + RGB_OFFSET, weights, t,
                t_next, i, num_samples, S, WHITE_BACK
            )
            g_sigma = _density_gradients(
                g_weights, weights, transmittance, kept, sigma, sigma_next, t, t_next, i, num_samples
            )
            g_sigma = tl.where(valid, g_sigma, 0.0)
            g_logits = (before + weights)[:, None] * g_out[None, :] * (share * (1.0 - share) * RGB_SCALE)
            g_logits = tl.where(valid[:, None], g_logits, 0.0)

            g_sampled, d_w1, d_b1, d_w2, d_b2, d_w2_sigma, d_b2_sigma = _decode_backward(
                g_logits, g_sigma, features, before_hidden, hidden, w1, w2, channels, units, DOT, PRECISION
            )
            sum_w1, sum_b1, sum_w2, sum_b2 = sum_w1 + d_w1, sum_b1 + d_b1, sum_w2 + d_w2, sum_b2 + d_b2
            sum_w2_sigma, sum_b2_sigma = sum_w2_sigma + d_w2_sigma, sum_b2_sigma + d_b2_sigma
            _scatter(g_planes + n * 3 * height * width * C, x, y, z, valid, channels, g_sampled, height * width * C,
                     width * C, height, width, AXES)
    _add_to_decoder(g_w1, g_b1, g_w2, g_b2, sum_w1, sum_b1, sum_w2, sum_b2, sum_w2_sigma, sum_b2_sigma, channels, units)

"""Cosine distance between teacher and student features, as an anomaly map and as a training loss.

    ts = sum_c t_c s_c    tt = sum_c t_c^2    ss = sum_c s_c^2        three moments per location and scale
    d  = 1 - ts / (max(sqrt(tt), eps) max(sqrt(ss), eps))             distance per location and scale
    A(y, x) = sum over scales of bilinear(d)(y, x)                    anomaly map (or mean, or product)

The features are large, everything after them is small, so the work has two steps (who reads what, for one image):

    teacher (C, h, w) --+   step 1, per scale: a program per             step 2, all scales at once: a program per
                        |   block of locations walks down the   moments  block of map pixels samples four cells of
    student (C, h, w) --+   channels with three running sums     ----->  each scale, adds up: map, its sum and maximum

Bytes that must move for B images, features of e bytes each, and no more do: 2 e B sum(C h w) read in step 1,
12 B sum(h w) written there and read in step 2 (from cache), 4 B H W written. Backward of the loss: the features read
once more, e B sum(C h w) written. Plain `F.cosine_similarity` + `F.interpolate` reads and writes normalised copies and
products of all features, and a full-resolution map per scale: about five times as much. At the sizes of reverse
distillation (256 x 64^2, 512 x 32^2, 1024 x 16^2, 256^2 out, fp32) that is 14.7 MB read and 0.33 MB written per image.

Read in this order: `moments_torch`, `_moments_kernel`, `_moments_grad_kernel`, `sample_torch`, `_sample_kernel`,
`_sample_grad_kernel`. kernels/README.md is the guided tour; `python -m kernels.bench` measures against the bytes above.
"""

import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .backend import tl, triton, use_triton

EPS = 1e-8  # a norm below this counts as this, as in F.cosine_similarity
BLOCK_C, BLOCK_P = 32, 64  # tile of the feature kernels: channels x locations
BLOCK_Y = 1024  # map pixels per program
REDUCE = ("sum", "mean", "product")


def cosine_map(teachers, students, size, reduce="sum", *, return_stats=False, backend="auto"):
    """Anomaly map: per scale 1 - cos(teacher, student) along the channels, resized to `size`, reduced over scales.

    teachers      list of (B, C, h, w) feature maps, one per scale, each scale with its own C, h, w; floating dtype.
    students      list of maps of the same shapes. Gradients flow to them; teachers are constants.
    size          (H, W) of the map, or one int for both. Bilinear, corners aligned.
    reduce        over the scales: "sum" (reverse distillation), "mean" or "product".
    return_stats  also return each image's mean and maximum over its map (CADA's calibration targets), from the same
                  pass; they carry no gradient.
    backend       "auto" (Triton on CUDA tensors, plain PyTorch elsewhere; see `set_backend`), "triton" or "torch".

    Returns the map (B, H, W), each scale's share in [0, 2]; float32 (float64 for float64 features); with return_stats
    (map, mean (B,), maximum (B,)). Raises ValueError for shapes or options that do not fit, RuntimeError for Triton
    where it cannot run.
    """
    grids = _check(teachers, students)
    size = (size, size) if isinstance(size, int) else tuple(size)
    if reduce not in REDUCE:
        raise ValueError(f"cosine_map: reduce {reduce!r}: choose one of {', '.join(REDUCE)}")
    on_triton = use_triton(backend, students[0], _unsupported(teachers, students))
    moments = _Moments.apply(on_triton, len(teachers), *teachers, *students)  # (3, B, L)
    if on_triton:
        maps, sums, maxima = _Sample.apply(moments, tuple(grids), size, reduce)  # (B, H, W), two of (B, programs)
        mean, maximum = sums.sum(dim=1) / (size[0] * size[1]), maxima.amax(dim=1)
    else:
        maps = sample_torch(moments, grids, size, reduce)  # (B, H, W)
        mean, maximum = maps.detach().mean(dim=(1, 2)), maps.detach().amax(dim=(1, 2))
    return (maps, mean, maximum) if return_stats else maps


def cosine_loss(teachers, students, flat=True, *, backend="auto"):
    """Reverse distillation's loss, 1 - cos(teacher, student), summed over the scales; a scalar.

    flat=True compares each image's whole feature map as one vector of C*h*w numbers and averages over the images
    (what RD4AD's code does); flat=False compares each location's C channels and averages over locations and images
    (what the papers' formulas say). Arguments and errors as for `cosine_map`.
    """
    grids = _check(teachers, students)
    on_triton = use_triton(backend, students[0], _unsupported(teachers, students))
    moments = _Moments.apply(on_triton, len(teachers), *teachers, *students)  # (3, B, L)
    scales = moments.split([h * w for h, w in grids], dim=2)  # each (3, B, h*w)
    if flat:
        scales = [m.sum(dim=2, keepdim=True) for m in scales]  # each (3, B, 1): the moments of the long vector
    return sum(cosine_distance(m).mean() for m in scales)


def _check(teachers, students):
    """Raise ValueError, in one line that says what is wrong, unless the maps fit; return [(h, w), ...]."""
    if len(teachers) != len(students) or not students:
        raise ValueError(f"cosine distance: {len(teachers)} teacher and {len(students)} student maps: as many of each")
    for i, (t, s) in enumerate(zip(teachers, students)):
        if t.ndim != 4 or t.shape != s.shape or t.shape[0] != students[0].shape[0]:
            raise ValueError(
                f"cosine distance: scale {i}: expected two (B, C, h, w) maps, B = {students[0].shape[0]}, "
                f"got teacher {tuple(t.shape)} and student {tuple(s.shape)}"
            )
        if not (t.is_floating_point() and s.is_floating_point() and t.device == s.device == students[0].device):
            raise ValueError(
                f"cosine distance: scale {i}: floating-point maps on one device, "
                f"got {t.dtype} on {t.device} and {s.dtype} on {s.device}"
            )
    return [tuple(s.shape[2:]) for s in students]


def _unsupported(teachers, students):
    """What the kernels cannot do with these inputs, in words, or None."""
    dtypes = {x.dtype for x in (*teachers, *students)}
    if not dtypes <= {torch.float32, torch.float16, torch.bfloat16}:
        return f"cosine distance takes float32, float16 or bfloat16, got {', '.join(map(str, dtypes))}"
    return None


# --------------------------------------------------------------------------------------------------
# The formula: what every other path is held to
# --------------------------------------------------------------------------------------------------


def cosine_map_formula(teachers, students, size, reduce="sum"):
    """The definition of the map, as reverse distillation's code computes it; arguments as for `cosine_map`."""
    maps = []
    for t, s in zip(teachers, students):  # (B, C, h, w)
        d = 1 - F.cosine_similarity(t, s, dim=1, eps=EPS).unsqueeze(1)  # (B, 1, h, w)
        maps.append(F.interpolate(d, size=size, mode="bilinear", align_corners=True).squeeze(1))
    total = torch.stack(maps).sum(dim=0)  # (S, B, H, W) -> (B, H, W)
    return total / len(maps) if reduce == "mean" else total


def cosine_loss_formula(teachers, students, flat=True):
    """The definition of the loss; arguments as for `cosine_loss`."""
    total = 0.0
    for t, s in zip(teachers, students):  # (B, C, h, w)
        if flat:
            t, s = t.flatten(1), s.flatten(1)  # (B, C, h, w) -> (B, C h w)
        total = total + (1 - F.cosine_similarity(t, s, dim=1, eps=EPS)).mean()
    return total


# --------------------------------------------------------------------------------------------------
# Step 1: moments. The only step that touches the features.
# --------------------------------------------------------------------------------------------------------------------


class _Moments(torch.autograd.Function):
    """(on_triton, S, *teachers, *students) -> (3, B, L): t.s, t.t and s.s per location, all scales side by side."""

    @staticmethod
    def forward(ctx, on_triton, n_scales, *features):
        ctx.save_for_backward(*features)
        ctx.on_triton = on_triton
        teachers, students = features[:n_scales], features[n_scales:]
        cells = [s.shape[2] * s.shape[3] for s in students]
        wide = torch.promote_types(students[0].dtype, torch.float32)
        moments = torch.empty(3, len(students[0]), sum(cells), dtype=wide, device=students[0].device)  # (3, B, L)
        for t, s, out in zip(teachers, students, moments.split(cells, dim=2)):
            (moments_triton if on_triton else moments_torch)(t, s, out)
        return moments

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        n_scales = len(ctx.saved_tensors) // 2
        teachers, students = ctx.saved_tensors[:n_scales], ctx.saved_tensors[n_scales:]
        grads = grad.split([s.shape[2] * s.shape[3] for s in students], dim=2)
        gradient = moments_grad_triton if ctx.on_triton else moments_grad_torch
        needed = ctx.needs_input_grad[2 + n_scales :]
        student_grads = [gradient(t, s, g) if n else None for t, s, g, n in zip(teachers, students, grads, needed)]
        return (None, None, *[None] * n_scales, *student_grads)


def moments_torch(teacher, student, out):
    """Write t.s, t.t and s.s of (B, C, h, w) maps, summed over the channels, to out (3, B, h*w).

    One image at a time, so that the products never leave the processor's cache: several times faster on CPUs than
    the same three lines on the whole batch.
    """
    for i, (t, s) in enumerate(zip(teacher.detach(), student.detach())):  # (C, h, w)
        t, s = t.to(out.dtype), s.to(out.dtype)
        product = torch.mul(t, s)
        out[0, i] = product.sum(dim=0).flatten()
        out[1, i] = torch.mul(t, t, out=product).sum(dim=0).flatten()
        out[2, i] = torch.mul(s, s, out=product).sum(dim=0).flatten()


def moments_grad_torch(teacher, student, grad):
    """Gradient with respect to the student (B, C, h, w), from that of its moments (3, B, h*w).

    t.s has the gradient t, and s.s has 2 s.
    """
    result = torch.empty_like(student)
    for i, (t, s) in enumerate(zip(teacher, student)):  # (C, h, w)
        by_ts, _, by_ss = grad[:, i].unflatten(1, s.shape[1:])  # (h, w) each
        result[i] = torch.mul(t.to(grad.dtype), by_ts).addcmul_(s.to(grad.dtype), by_ss, value=2)
    return result


# Names in the kernels: c counts channels, p locations of one scale in row-major order, P = h * w; *_b, *_c, *_h, *_w
# are strides over images, channels, rows, columns, so that NCHW and channels-last maps are read where they lie.


@triton.jit
def _pointers(x, b, x_b, x_c, x_h, x_w, c, p, width, FLAT: tl.constexpr):
    """Pointers to channels c (BLOCK_C,) at locations p (BLOCK_P,) of image b; (BLOCK_C, BLOCK_P), 64-bit."""
    if FLAT:  # rows follow each other without a gap: no division, and the compiler sees the contiguous run
        location = p.to(tl.int64) * x_w
    else:
        location = (p // width).to(tl.int64) * x_h + (p % width).to(tl.int64) * x_w
    return x + b.to(tl.int64) * x_b + c.to(tl.int64)[:, None] * x_c + location[None, :]


@triton.jit
def _moments_kernel(
    t, t_b, t_c, t_h, t_w,  # teacher (B, C, h, w) and its strides
    s, s_b, s_c, s_h, s_w,  # student (B, C, h, w)
    out, out_k, out_b,  # output (3, B, P), fp32, and its first two strides
    C, P, width,
    FLAT_T: tl.constexpr, FLAT_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """Program (image, block of locations): each feature is read once, for all three sums."""
    b = tl.program_id(0)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    ts = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    tt = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    ss = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = (c < C)[:, None] & (p < P)[None, :]
        t_tile = tl.load(_pointers(t, b, t_b, t_c, t_h, t_w, c, p, width, FLAT_T), mask=mask, other=0.0).to(tl.float32)
        s_tile = tl.load(_pointers(s, b, s_b, s_c, s_h, s_w, c, p, width, FLAT_S), mask=mask, other=0.0).to(tl.float32)
        ts += t_tile * s_tile
        tt += t_tile * t_tile
        ss += s_tile * s_tile
    out += b.to(tl.int64) * out_b + p  # adding up over the threads only here, once
    tl.store(out, tl.sum(ts, axis=0), mask=p < P)
    tl.store(out + out_k, tl.sum(tt, axis=0), mask=p < P)
    tl.store(out + 2 * out_k, tl.sum(ss, axis=0), mask=p < P)


@triton.jit
def _moments_grad_kernel(
    t, t_b, t_c, t_h, t_w,  # teacher (B, C, h, w) and its strides
    s, s_b, s_c, s_h, s_w,  # student (B, C, h, w)
    grad, grad_k, grad_b,  # gradient of the moments (3, B, P), fp32
    ds, ds_b, ds_c, ds_h, ds_w,  # output: gradient of the student (B, C, h, w)
    C, P, width,
    FLAT_T: tl.constexpr, FLAT_S: tl.constexpr, FLAT_DS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """Program (image, block of locations, block of channels): ds = grad_ts * t + 2 grad_ss * s."""
    b = tl.program_id(0)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (c < C)[:, None] & (p < P)[None, :]
    grad += b.to(tl.int64) * grad_b + p
    by_ts = tl.load(grad, mask=p < P, other=0.0)[None, :]
    by_ss = tl.load(grad + 2 * grad_k, mask=p < P, other=0.0)[None, :]
    t_tile = tl.load(_pointers(t, b, t_b, t_c, t_h, t_w, c, p, width, FLAT_T), mask=mask, other=0.0).to(tl.float32)
    s_tile = tl.load(_pointers(s, b, s_b, s_c, s_h, s_w, c, p, width, FLAT_S), mask=mask, other=0.0).to(tl.float32)
    ds_tile = by_ts * t_tile + 2 * by_ss * s_tile
    tl.store(_pointers(ds, b, ds_b, ds_c, ds_h, ds_w, c, p, width, FLAT_DS), ds_tile.to(ds.dtype.element_ty), mask=mask)


def _flat(x):
    """True if the rows of a (B, C, h, w) tensor follow each other without a gap."""
    return x.stride(2) == x.shape[3] * x.stride(3)


def moments_triton(teacher, student, out):
    """`moments_torch` by the Triton kernel."""
    B, C, h, w = student.shape
    grid = (B, triton.cdiv(h * w, BLOCK_P))
    with torch.cuda.device_of(student):
        _moments_kernel[grid](
            teacher, *teacher.stride(), student, *student.stride(), out, *out.stride()[:2], C, h * w, w,
            FLAT_T=_flat(teacher), FLAT_S=_flat(student), BLOCK_C=BLOCK_C, BLOCK_P=BLOCK_P,
        )


def moments_grad_triton(teacher, student, grad):
    """`moments_grad_torch` by the Triton kernel."""
    B, C, h, w = student.shape
    grad = grad if grad.stride(2) == 1 else grad.contiguous()  # it may come expanded, with stride 0
    ds = torch.empty_like(student)
    grid = (B, triton.cdiv(h * w, BLOCK_P), triton.cdiv(C, BLOCK_C))
    with torch.cuda.device_of(student):
        _moments_grad_kernel[grid](
            teacher, *teacher.stride(), student, *student.stride(), grad, *grad.stride()[:2], ds, *ds.stride(),
            C, h * w, w, FLAT_T=_flat(teacher), FLAT_S=_flat(student), FLAT_DS=_flat(ds),
            BLOCK_C=BLOCK_C, BLOCK_P=BLOCK_P,
        )
    return ds


# --------------------------------------------------------------------------------------------------------------------
# Step 2: from moments to the map. Touches only three numbers per location.
# --------------------------------------------------------------------------------------------------------------------


def cosine_distance(moments):
    """1 - cos from (3, ...) moments t.s, t.t, s.s; (...)."""
    ts, tt, ss = moments
    return 1 - ts * tt.clamp_min(EPS**2).rsqrt() * ss.clamp_min(EPS**2).rsqrt()


def sample_torch(moments, grids, size, reduce):
    """The map (B, H, W) from the moments (3, B, L) of scales with the given (h, w) grids."""
    scales = cosine_distance(moments).split([h * w for h, w in grids], dim=1)
    maps = [
        F.interpolate(d.unflatten(1, (1, *grid)), size=size, mode="bilinear", align_corners=True).squeeze(1)
        for d, grid in zip(scales, grids)
    ]  # each (B, H, W)
    total = maps[0]
    for m in maps[1:]:
        total = total * m if reduce == "product" else total + m
    return total / len(maps) if reduce == "mean" else total


@triton.jit
def _distance(moments, m_k, at, mask, EPS2: tl.constexpr):
    """1 - cos at the given offsets into the moments of one image."""
    ts = tl.load(moments + at, mask=mask, other=0.0)
    tt = tl.load(moments + m_k + at, mask=mask, other=1.0)
    ss = tl.load(moments + 2 * m_k + at, mask=mask, other=1.0)
    return 1 - ts * tl.rsqrt(tl.maximum(tt, EPS2)) * tl.rsqrt(tl.maximum(ss, EPS2))


@triton.jit
def _bilinear(moments, m_k, grids, scale, y, x, mask, H, W, EPS2: tl.constexpr):
    """The distance map of one scale, sampled at map pixels (y, x), corners aligned."""
    first = tl.load(grids + 3 * scale)
    h = tl.load(grids + 3 * scale + 1)
    w = tl.load(grids + 3 * scale + 2)
    fy = y.to(tl.float32) * ((h - 1).to(tl.float32) / tl.maximum(H - 1, 1))
    fx = x.to(tl.float32) * ((w - 1).to(tl.float32) / tl.maximum(W - 1, 1))
    y0 = fy.to(tl.int32)
    x0 = fx.to(tl.int32)
    y1 = tl.minimum(y0 + 1, h - 1)
    x1 = tl.minimum(x0 + 1, w - 1)
    fy -= y0.to(tl.float32)
    fx -= x0.to(tl.float32)
    upper = (1 - fx) * _distance(moments, m_k, first + y0 * w + x0, mask, EPS2)
    upper += fx * _distance(moments, m_k, first + y0 * w + x1, mask, EPS2)
    lower = (1 - fx) * _distance(moments, m_k, first + y1 * w + x0, mask, EPS2)
    lower += fx * _distance(moments, m_k, first + y1 * w + x1, mask, EPS2)
    return (1 - fy) * upper + fy * lower


@triton.jit
def _sample_kernel(
    moments, m_k, m_b,  # (3, B, L) fp32 and its first two strides
    grids,  # (S, 3) int32: first location, h, w of each scale
    out,  # output (B, H, W), fp32
    sums, maxima,  # outputs (B, programs), fp32: of the pixels of each program
    S, H, W,
    REDUCE: tl.constexpr, EPS2: tl.constexpr, BLOCK: tl.constexpr,
):
    """Program (image, block of map pixels): sample every scale, reduce; no map of a single scale is ever stored."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < H * W
    y = tl.where(inside, i // W, 0)
    x = i % W
    total = tl.full((BLOCK,), 1.0 if REDUCE == "product" else 0.0, tl.float32)
    for scale in range(0, S):
        d = _bilinear(moments + b * m_b, m_k, grids, scale, y, x, inside, H, W, EPS2)
        total = total * d if REDUCE == "product" else total + d
    if REDUCE == "mean":
        total = total / S
    tl.store(out + b * H * W + i, total, mask=inside)
    program = b * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + program, tl.sum(tl.where(inside, total, 0.0), axis=0))
    tl.store(maxima + program, tl.max(tl.where(inside, total, -float("inf")), axis=0))


@triton.jit
def _sample_grad_kernel(
    moments, m_k, m_b,  # (3, B, L) fp32 and its first two strides
    grids,  # (S, 3) int32: first location, h, w of each scale
    grad,  # gradient of the map (B, H, W), fp32
    out,  # output: gradient of the moments, laid out like them
    scale, S, H, W,
    REDUCE: tl.constexpr, EPS2: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_X: tl.constexpr,
):
    """Program (image, row i of one scale's grid): each cell collects from the map pixels that sampled it.

    The bilinear weight of cell i at map row y is the tent max(0, 1 - |y * (h - 1) / (H - 1) - i|), likewise along x:
    a cell reads the few rows under its tent. Nobody adds to another program's cell, so the order is always the same.
    """
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    first = tl.load(grids + 3 * scale)
    h = tl.load(grids + 3 * scale + 1)
    w = tl.load(grids + 3 * scale + 2)
    ratio_y = (h - 1).to(tl.float32) / tl.maximum(H - 1, 1)
    ratio_x = (w - 1).to(tl.float32) / tl.maximum(W - 1, 1)
    steep = tl.maximum(ratio_y, 1e-6)
    from_y = tl.maximum((tl.maximum(i - 1, 0) / steep).to(tl.int32) - 1, 0)  # one row of slack for rounding
    to_y = tl.minimum(tl.minimum((i + 1) / steep, 1e9).to(tl.int32) + 2, H)
    j = tl.arange(0, BLOCK_J)
    d_grad = tl.zeros((BLOCK_J,), tl.float32)
    for y in range(from_y, to_y):
        weight_y = tl.maximum(1 - tl.abs(y * ratio_y - i), 0.0)
        for start in range(0, W, BLOCK_X):
            x = start + tl.arange(0, BLOCK_X)
            g = tl.load(grad + b * H * W + y * W + x, mask=x < W, other=0.0) * weight_y
            if REDUCE == "product":
                for other in range(0, S):
                    d = _bilinear(moments + b * m_b, m_k, grids, other, x * 0 + y, x, x < W, H, W, EPS2)
                    g = tl.where(other == scale, g, g * d)
            weight_x = tl.maximum(1 - tl.abs((x * ratio_x)[None, :] - j[:, None]), 0.0)  # (BLOCK_J, BLOCK_X)
            d_grad += tl.sum(weight_x * g[None, :], axis=1)
    if REDUCE == "mean":
        d_grad = d_grad / S

    # d = 1 - ts / sqrt(tt ss), teachers constant
    at = b * m_b + first + i * w + j
    ts = tl.load(moments + at, mask=j < w, other=0.0)
    tt = tl.load(moments + m_k + at, mask=j < w, other=1.0)
    ss = tl.load(moments + 2 * m_k + at, mask=j < w, other=1.0)
    inverse = tl.rsqrt(tl.maximum(tt, EPS2)) * tl.rsqrt(tl.maximum(ss, EPS2))
    tl.store(out + at, -d_grad * inverse, mask=j < w)
    tl.store(out + m_k + at, j * 0.0, mask=j < w)
    tl.store(out + 2 * m_k + at, tl.where(ss > EPS2, 0.5 * d_grad * ts * inverse / ss, 0.0), mask=j < w)


@functools.lru_cache(maxsize=16)
def _grid_table(grids, device):
    """(S, 3) int32 on the device: first location, h, w of each scale; cached, since copying it makes the GPU wait."""
    cells = [h * w for h, w in grids]
    rows = [(sum(cells[:i]), h, w) for i, (h, w) in enumerate(grids)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def sample_triton(moments, grids, size, reduce):
    """`sample_torch` by the Triton kernel, and each program's sum and maximum, (B, programs)."""
    _, B, _ = moments.shape
    H, W = size
    programs = triton.cdiv(H * W, BLOCK_Y)
    maps = torch.empty(B, H, W, dtype=torch.float32, device=moments.device)
    sums, maxima = torch.empty(2, B, programs, dtype=torch.float32, device=moments.device)
    with torch.cuda.device_of(moments):
        _sample_kernel[(B, programs)](
            moments, *moments.stride()[:2], _grid_table(grids, moments.device), maps, sums, maxima, len(grids), H, W,
            REDUCE=reduce, EPS2=EPS**2, BLOCK=BLOCK_Y,
        )
    return maps, sums, maxima


def sample_grad_triton(moments, grad, grids, reduce):
    """Gradient of the moments (3, B, L) from that of the map (B, H, W)."""
    _, B, _ = moments.shape
    _, H, W = grad.shape
    grad = grad.contiguous()
    out = torch.empty_like(moments)
    with torch.cuda.device_of(moments):
        for scale, (h, w) in enumerate(grids):
            _sample_grad_kernel[(B, h)](
                moments, *moments.stride()[:2], _grid_table(grids, moments.device), grad, out, scale, len(grids), H, W,
                REDUCE=reduce, EPS2=EPS**2, BLOCK_J=triton.next_power_of_2(w), BLOCK_X=64,
            )
    return out


class _Sample(torch.autograd.Function):
    """(moments, grids, size, reduce) -> map, and per program its sum and maximum, which carry no gradient."""

    @staticmethod
    def forward(ctx, moments, grids, size, reduce):
        maps, sums, maxima = sample_triton(moments, grids, size, reduce)
        ctx.save_for_backward(moments)
        ctx.grids, ctx.reduce = grids, reduce
        ctx.mark_non_differentiable(sums, maxima)
        return maps, sums, maxima

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _, __):
        return sample_grad_triton(*ctx.saved_tensors, grad, ctx.grids, ctx.reduce), None, None, None

"""Cosine distance between teacher and student features, as an anomaly map and as a training loss.

    ts = sum_c t_c s_c    tt = sum_c t_c^2    ss = sum_c s_c^2     three moments per location
    d  = 1 - ts / (max(sqrt(tt), eps) max(sqrt(ss), eps))          distance per location and scale
    w  = (tt / C)^(power/2)                                        its weight; power = 0 in the papers
    A(y, x) = sum over scales of bilinear(w d)(y, x)               anomaly map (or their mean)
    L = sum over scales of the mean of d                           loss

The features are large, everything after them is small, so the work has two steps (who reads what,
for one image):

    teacher (C, h, w) --+  step 1, per scale: a program per           step 2, all scales at once:
                        |  block of locations walks down the moments  map pixels sample four cells
    student (C, h, w) --+  channels with three running sums   ----->  of each scale; or: one loss

Bytes that must move for B images, features of e bytes each: 2 e B sum(C h w) read in step 1, 12 B
sum(h w) written there and read in step 2 (from cache), 4 B H W written. Backward of the loss: the
features read once more, e B sum(C h w) written. Plain `F.cosine_similarity` + `F.interpolate`
reads and writes normalised copies and products of all features, and a full-resolution map per
scale: about five times as much. At the sizes of reverse distillation (256 x 64^2, 512 x 32^2, 1024
x 16^2, 256^2 out, fp32) that is 14.7 MB read and 0.33 MB written per image.

Read in this order: `cosine_map_formula`, `cosine_loss_formula`, `moments_torch`, `_moments_kernel`,
`_moments_grad_kernel`, `_sample_kernel`, `_loss_kernel`. kernels/README.md is the guided tour;
`python -m kernels.bench` predicts bytes, `python -m kernels.check` measures.
"""

import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .backend import compare, cores, opaque, tl, trial, trial_tensors, triton, use_triton

EPS = 1e-8  # a norm below this counts as this, as in F.cosine_similarity
BLOCK_Y = 1024  # map pixels per program
REDUCE = ("sum", "mean")


@torch.no_grad()
def cosine_map(teachers, students, size, reduce="sum", *, power=0.0, backend="auto"):
    """Anomaly map: per scale 1 - cos(teacher, student) along the channels, resized, reduced over
    scales.

    teachers  list of (B, C, h, w) feature maps, one per scale, each scale with its own C, h, w;
              floating dtype, which may differ from map to map.
    students  list of maps of the same shapes.
    size      (H, W) of the map, or one int for both. Bilinear, corners aligned.
    reduce    over the scales: "sum" (reverse distillation) or "mean".
    power     at least 0. A distance is weighted by the root mean square of the teacher's channels
              there, to this power. Where a plain background leaves that small, the direction is
              mostly noise, which no student rebuilds. 0: no weights, as in the papers.
    backend   "auto" (Triton on CUDA tensors where it works, plain PyTorch elsewhere; see
              `set_backend`), "triton" or "torch".

    Returns the map (B, H, W), each scale's share in [0, 2] unless weighted; float32 (float64 for
    float64 features); it carries no gradient, which `cosine_loss` does. Raises ValueError for
    shapes or options that do not fit, RuntimeError for Triton where it cannot run.
    """
    scales = _check(teachers, students)
    height, width = _size(size)
    if reduce not in REDUCE:
        raise ValueError(f"cosine_map: reduce {reduce!r}: choose one of {', '.join(REDUCE)}")
    if not power >= 0:
        raise ValueError(f"cosine_map: power {power!r}: must be at least 0")
    if _use_triton(backend, teachers, students):
        mean, power = reduce == "mean", float(power)
        return map_triton(list(teachers), list(students), height, width, mean, power)
    return sample_torch(moments(teachers, students), scales, (height, width), reduce, power)


def cosine_loss(teachers, students, flat=True, *, backend="auto"):
    """Reverse distillation's loss, 1 - cos(teacher, student), summed over the scales; a scalar.

    flat=True compares each image's whole feature map as one vector of C*h*w numbers and averages
    over the images (what RD4AD's code does); flat=False compares each location's C channels and
    averages over locations and images (what the papers' formulas say). Gradients flow to the
    students; teachers are constants. A vector shorter than 1e-8 (a dead ReLU's zeros) has no
    direction: its gradient is zero. Arguments and errors as for `cosine_map`; float32 (float64 for
    float64 features).
    """
    scales = _check(teachers, students)
    if _use_triton(backend, teachers, students):
        return _CosineLoss.apply(flat, len(teachers), *teachers, *students)
    total = 0.0
    for m in of_scales(moments(teachers, students), scales):  # (3, B, h*w)
        if flat:
            m = m.sum(dim=2)  # (3, B, h*w) -> (3, B): the moments of the long vector
        total = total + cosine_distance(m).mean()
    return total


def _check(teachers, students):
    """Raise ValueError, in one line that says what is wrong, unless the maps fit; return the
    shape (C, h, w) of each scale."""
    if len(teachers) != len(students) or not students:
        raise ValueError(
            f"cosine distance: {len(teachers)} teacher and {len(students)} student maps: "
            "as many of each"
        )
    batch, device = students[0].shape[0], students[0].device
    for i, (t, s) in enumerate(zip(teachers, students)):
        if t.ndim != 4 or t.shape != s.shape or t.shape[0] != batch:
            raise ValueError(
                f"cosine distance: scale {i}: expected two (B, C, h, w) maps, B = {batch}, "
                f"got teacher {tuple(t.shape)} and student {tuple(s.shape)}"
            )
        if t.numel() == 0:
            raise ValueError(f"cosine distance: scale {i}: empty maps {tuple(t.shape)}")
        floating = t.is_floating_point() and s.is_floating_point()
        if not floating or t.device != device or s.device != device:
            raise ValueError(
                f"cosine distance: scale {i}: floating-point maps on one device, "
                f"got {t.dtype} on {t.device} and {s.dtype} on {s.device}"
            )
    return [tuple(s.shape[1:]) for s in students]


def _size(size):
    """(H, W) of the map, from one int or a pair of them; ValueError for anything else."""
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"cosine_map: size {size!r}: one positive int, or two (height, width)")
    return pair


def _use_triton(backend, teachers, students):
    """True if the kernels shall run, see `backend.use_triton`."""
    dtypes = {x.dtype for x in (*teachers, *students)}
    unsupported = None
    if not dtypes <= {torch.float32, torch.float16, torch.bfloat16}:
        names = ", ".join(sorted(map(str, dtypes)))
        unsupported = f"cosine distance takes float32, float16 or bfloat16, got {names}"
    shape = "+".join(shape_name(s.shape) for s in students)
    return use_triton(backend, "cosine", students[0], unsupported, shape)


def shape_name(shape):
    """(B, C, h, w) -> "CxHxW", a scale as `kernels.check` names it."""
    return "x".join(map(str, shape[1:]))


# --------------------------------------------------------------------------------------------------
# The formula: what every other path is held to
# --------------------------------------------------------------------------------------------------


def cosine_map_formula(teachers, students, size, reduce="sum", power=0.0):
    """The definition of the map, as reverse distillation's code computes it; as `cosine_map`."""
    maps = []
    for t, s in zip(teachers, students):  # (B, C, h, w)
        d = 1 - F.cosine_similarity(t, s, dim=1, eps=EPS).unsqueeze(1)  # (B, 1, h, w)
        if power:
            d = d * t.square().mean(dim=1, keepdim=True).pow(power / 2)
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
# The PyTorch path
# --------------------------------------------------------------------------------------------------


def moments(teachers, students):
    """t.s, t.t and s.s per location, all scales side by side: (3, B, L) with L = sum(h w)."""
    if students[0].device.type == "cpu" and not torch.compiler.is_compiling():
        return _Moments.apply(len(teachers), *teachers, *students)
    parts = []
    for t, s in zip(teachers, students):  # (B, C, h, w)
        wide = torch.promote_types(s.dtype, torch.float32)
        t, s = t.detach().to(wide), s.to(wide)
        three = torch.stack([(t * s).sum(1), (t * t).sum(1), (s * s).sum(1)])  # (3, B, h, w)
        parts.append(three.flatten(2))  # (3, B, h w)
    return torch.cat(parts, dim=2)


class _Moments(torch.autograd.Function):
    """The same, one image at a time: `moments_torch` and `moments_grad_torch` for every scale."""

    @staticmethod
    def forward(ctx, n_scales, *features):
        ctx.save_for_backward(*features)
        teachers, students = features[:n_scales], features[n_scales:]
        cells = [s.shape[2] * s.shape[3] for s in students]
        wide = torch.float32
        for s in students:
            wide = torch.promote_types(wide, s.dtype)
        result = torch.empty(3, len(students[0]), sum(cells), dtype=wide)  # (3, B, L)
        for t, s, out in zip(teachers, students, result.split(cells, dim=2)):
            moments_torch(t, s, out)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        n_scales = len(ctx.saved_tensors) // 2
        teachers, students = ctx.saved_tensors[:n_scales], ctx.saved_tensors[n_scales:]
        grads = grad.split([s.shape[2] * s.shape[3] for s in students], dim=2)
        student_grads = []
        for t, s, g, needed in zip(teachers, students, grads, ctx.needs_input_grad[1 + n_scales :]):
            student_grads.append(moments_grad_torch(t, s, g) if needed else None)
        return (None, *[None] * n_scales, *student_grads)


def moments_torch(teacher, student, out):
    """Write t.s, t.t and s.s of (B, C, h, w) maps, summed over the channels, to out (3, B, h*w).

    One image at a time, so that the products never leave the processor's cache: several times
    faster on CPUs than the same three lines on the whole batch.
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
        t, s = t.to(grad.dtype), s.to(grad.dtype)
        result[i] = torch.mul(t, by_ts).addcmul_(s, by_ss, value=2)
    return result


def cosine_distance(moments):
    """1 - cos from (3, ...) moments t.s, t.t, s.s; (...). No gradient where s has no direction."""
    ts, tt, ss = moments
    ts = torch.where(ss > EPS**2, ts, ts.detach())
    return 1 - ts * tt.clamp_min(EPS**2).rsqrt() * ss.clamp_min(EPS**2).rsqrt()


def of_scales(moments, scales):
    """(3, B, L) -> the moments (3, B, h*w) of each scale; scales: their (C, h, w)."""
    return moments.split([h * w for _, h, w in scales], dim=2)


def sample_torch(moments, scales, size, reduce, power):
    """The map (B, H, W) from the moments (3, B, L) of scales with the given (C, h, w)."""
    total = 0.0
    for m, (channels, h, w) in zip(of_scales(moments, scales), scales):  # (3, B, h*w)
        d = cosine_distance(m)  # (B, h*w)
        if power:
            d = d * (m[1] / channels).pow(power / 2)
        d = d.unflatten(1, (1, h, w))  # (B, h*w) -> (B, 1, h, w)
        total = total + F.interpolate(d, size=size, mode="bilinear", align_corners=True).squeeze(1)
    return total / len(scales) if reduce == "mean" else total


# --------------------------------------------------------------------------------------------------
# Step 1 as kernels: moments, the only step that touches the features.
#
# Names: c counts channels, p locations of one scale in row-major order, P = h * w; *_b, *_c, *_h,
# *_w are strides over images, channels, rows, columns, so that NCHW and channels-last maps are
# read where they lie.
# --------------------------------------------------------------------------------------------------


@triton.jit
def _pointers(x, b, x_b, x_c, x_h, x_w, c, p, width, FLAT: tl.constexpr):
    """Pointers to channels c at locations p of image b, 64-bit: (BLOCK_C, BLOCK_P)."""
    if FLAT:  # rows follow each other without a gap: no division, and the compiler sees the run
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
        t_at = _pointers(t, b, t_b, t_c, t_h, t_w, c, p, width, FLAT_T)
        s_at = _pointers(s, b, s_b, s_c, s_h, s_w, c, p, width, FLAT_S)
        t_tile = tl.load(t_at, mask=mask, other=0.0).to(tl.float32)
        s_tile = tl.load(s_at, mask=mask, other=0.0).to(tl.float32)
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
    factors, f_k, f_b,  # (2, B, P) fp32, from `_loss_kernel`, and its first two strides
    upstream,  # gradient of the loss, one fp32 number
    ds, ds_b, ds_c, ds_h, ds_w,  # output: gradient of the student (B, C, h, w)
    C, P, width,
    FLAT_T: tl.constexpr, FLAT_S: tl.constexpr, FLAT_DS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):
    """Program (image, block of locations, block of channels): ds = factor_t * t + factor_s * s."""
    b = tl.program_id(0)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (c < C)[:, None] & (p < P)[None, :]
    factors += b.to(tl.int64) * f_b + p
    by = tl.load(upstream)
    of_t = by * tl.load(factors, mask=p < P, other=0.0)
    of_s = by * tl.load(factors + f_k, mask=p < P, other=0.0)
    t_at = _pointers(t, b, t_b, t_c, t_h, t_w, c, p, width, FLAT_T)
    s_at = _pointers(s, b, s_b, s_c, s_h, s_w, c, p, width, FLAT_S)
    t_tile = tl.load(t_at, mask=mask, other=0.0).to(tl.float32)
    s_tile = tl.load(s_at, mask=mask, other=0.0).to(tl.float32)
    ds_tile = of_t[None, :] * t_tile + of_s[None, :] * s_tile
    ds_at = _pointers(ds, b, ds_b, ds_c, ds_h, ds_w, c, p, width, FLAT_DS)
    tl.store(ds_at, ds_tile.to(ds.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------------------------------
# Step 2 as kernels: from moments to the map, or to the loss. Three numbers per location.
# --------------------------------------------------------------------------------------------------


@triton.jit
def _distance(moments, m_k, at, mask, C, POWER: tl.constexpr, EPS2: tl.constexpr):
    """1 - cos, weighted, at the given offsets into the moments of one image; C: channels."""
    ts = tl.load(moments + at, mask=mask, other=0.0)
    tt = tl.load(moments + m_k + at, mask=mask, other=1.0)
    ss = tl.load(moments + 2 * m_k + at, mask=mask, other=1.0)
    d = 1 - ts * tl.rsqrt(tl.maximum(tt, EPS2)) * tl.rsqrt(tl.maximum(ss, EPS2))
    if POWER > 0:
        weight = tl.exp2(0.5 * POWER * tl.log2(tl.maximum(tt, 1e-37) / C))  # (tt / C)^(POWER / 2)
        d *= tl.where(tt > 0, weight, 0.0)
    return d


@triton.jit
def _bilinear(
    moments, m_k, table, scale, y, x, mask, H, W, POWER: tl.constexpr, EPS2: tl.constexpr,
):
    """The distance map of one scale, sampled at map pixels (y, x), corners aligned."""
    first = tl.load(table + 4 * scale)
    h = tl.load(table + 4 * scale + 1)
    w = tl.load(table + 4 * scale + 2)
    C = tl.load(table + 4 * scale + 3).to(tl.float32)
    fy = y.to(tl.float32) * ((h - 1).to(tl.float32) / tl.maximum(H - 1, 1))
    fx = x.to(tl.float32) * ((w - 1).to(tl.float32) / tl.maximum(W - 1, 1))
    y0 = fy.to(tl.int32)
    x0 = fx.to(tl.int32)
    y1 = tl.minimum(y0 + 1, h - 1)
    x1 = tl.minimum(x0 + 1, w - 1)
    fy -= y0.to(tl.float32)
    fx -= x0.to(tl.float32)
    upper = (1 - fx) * _distance(moments, m_k, first + y0 * w + x0, mask, C, POWER, EPS2)
    upper += fx * _distance(moments, m_k, first + y0 * w + x1, mask, C, POWER, EPS2)
    lower = (1 - fx) * _distance(moments, m_k, first + y1 * w + x0, mask, C, POWER, EPS2)
    lower += fx * _distance(moments, m_k, first + y1 * w + x1, mask, C, POWER, EPS2)
    return (1 - fy) * upper + fy * lower


@triton.jit
def _sample_kernel(
    moments, m_k, m_b,  # (3, B, L) fp32 and its first two strides
    table,  # (S, 4) int32: first location, h, w, C of each scale
    out,  # output (B, H, W), fp32
    S, H, W,
    MEAN: tl.constexpr, POWER: tl.constexpr, EPS2: tl.constexpr, BLOCK: tl.constexpr,
):
    """Program (image, block of map pixels): sample every scale and add; no single scale is
    stored."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < H * W
    y = tl.where(inside, i // W, 0)
    x = i % W
    total = tl.zeros((BLOCK,), tl.float32)
    for scale in range(0, S):
        of_scale = moments + b * m_b
        total += _bilinear(of_scale, m_k, table, scale, y, x, inside, H, W, POWER, EPS2)
    if MEAN:
        total = total / S
    tl.store(out + b * H * W + i, total, mask=inside)


@triton.jit
def _loss_kernel(
    moments, m_k, m_b,  # (3, B, L) fp32 and its first two strides
    table,  # (S, 4) int32: first location, h, w, C of each scale
    losses,  # output (B,), fp32: each image's share of the loss
    factors, f_k, f_b,  # output (2, B, L): the student's gradient is factors[0] t + factors[1] s
    S, B,
    SHARED: tl.constexpr, EPS2: tl.constexpr, BLOCK: tl.constexpr,
):
    """Program (image): the distances of every scale, added up, and what the gradient needs of them.

    d = 1 - ts / sqrt(tt ss) has the derivatives -1 / sqrt(tt ss) by ts and ts / (2 ss sqrt(tt ss))
    by ss; the student's gradient of ts is t, that of ss is 2 s. SHARED: the whole map is one long
    vector, whose three moments are sums over its locations.
    """
    b = tl.program_id(0).to(tl.int64)
    moments += b * m_b
    factors += b * f_b
    loss = tl.zeros((BLOCK,), tl.float32)
    for scale in range(0, S):
        first = tl.load(table + 4 * scale)
        P = tl.load(table + 4 * scale + 1) * tl.load(table + 4 * scale + 2)
        sum_ts = tl.zeros((BLOCK,), tl.float32)
        sum_tt = tl.zeros((BLOCK,), tl.float32)
        sum_ss = tl.zeros((BLOCK,), tl.float32)
        if SHARED:
            for start in range(0, P, BLOCK):
                p = start + tl.arange(0, BLOCK)
                at = moments + first + p
                sum_ts += tl.load(at, mask=p < P, other=0.0)
                sum_tt += tl.load(at + m_k, mask=p < P, other=0.0)
                sum_ss += tl.load(at + 2 * m_k, mask=p < P, other=0.0)
        share = 1.0 / B if SHARED else 1.0 / (B * P.to(tl.float32))
        for start in range(0, P, BLOCK):
            p = start + tl.arange(0, BLOCK)
            at = moments + first + p
            if SHARED:
                ts = tl.sum(sum_ts, axis=0) + tl.zeros((BLOCK,), tl.float32)
                tt = tl.sum(sum_tt, axis=0) + tl.zeros((BLOCK,), tl.float32)
                ss = tl.sum(sum_ss, axis=0) + tl.zeros((BLOCK,), tl.float32)
                counted = p == 0  # the vector's distance, once
            else:
                ts = tl.load(at, mask=p < P, other=0.0)
                tt = tl.load(at + m_k, mask=p < P, other=1.0)
                ss = tl.load(at + 2 * m_k, mask=p < P, other=1.0)
                counted = p < P
            inverse = tl.rsqrt(tl.maximum(tt, EPS2)) * tl.rsqrt(tl.maximum(ss, EPS2))
            loss += tl.where(counted, share * (1 - ts * inverse), 0.0)
            alive = ss > EPS2  # else the student has no direction
            by_t = tl.where(alive, -share * inverse, 0.0)
            by_s = tl.where(alive, share * ts * inverse / tl.where(alive, ss, 1.0), 0.0)
            tl.store(factors + first + p, by_t, mask=p < P)
            tl.store(factors + f_k + first + p, by_s, mask=p < P)
    tl.store(losses + b, tl.sum(loss, axis=0))


# --------------------------------------------------------------------------------------------------
# Launching the kernels
# --------------------------------------------------------------------------------------------------


def _flat(x):
    """True if the rows of a (B, C, h, w) tensor follow each other without a gap."""
    return x.stride(2) == x.shape[3] * x.stride(3)


def _tile(x, wide=False):
    """Channels and locations per program: 16 locations where 64 would keep half the card idle.

    wide: where 16 do so too, up to 16 warps share the channels, for programs that walk over all of
    them: as many loads are under way at once as if several programs did, and no sums of parts.
    """
    B, C, h, w = x.shape
    enough = 2 * cores(x.device)
    block_p = 64 if B * triton.cdiv(h * w, 64) >= enough else 16
    warps = 4
    if wide and B * triton.cdiv(h * w, block_p) < enough:
        warps = max(4, min(16, triton.next_power_of_2(C) // 32))
    return dict(BLOCK_C=512 * warps // block_p, BLOCK_P=block_p, num_warps=warps)


@functools.lru_cache(maxsize=16)
def _table(scales, device):
    """(S, 4) int32 on the device: first location, h, w, C of each scale; cached: a copy makes the
    GPU wait."""
    rows, first = [], 0
    for channels, h, w in scales:
        rows.append((first, h, w, channels))
        first += h * w
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _scales(maps):
    """((C, h, w), ...) of (B, C, h, w) maps."""
    return tuple(tuple(m.shape[1:]) for m in maps)


def moments_triton(teachers, students):
    """`moments` by the Triton kernel, one launch a scale: (3, B, L) fp32."""
    cells = [h * w for _, h, w in _scales(students)]
    B, device = students[0].shape[0], students[0].device
    result = torch.empty(3, B, sum(cells), dtype=torch.float32, device=device)
    for t, s, out in zip(teachers, students, result.split(cells, dim=2)):
        _, C, h, w = s.shape
        tile = _tile(s, wide=True)
        _moments_kernel[(B, triton.cdiv(h * w, tile["BLOCK_P"]))](
            t, *t.stride(), s, *s.stride(), out, *out.stride()[:2], C, h * w, w,
            FLAT_T=_flat(t), FLAT_S=_flat(s), **tile,
        )
    return result


def _map_shapes(teachers, students, height, width, mean, power):
    B = students[0].shape[0]
    return students[0].new_empty((B, height, width), dtype=torch.float32)


@opaque(
    "(Tensor[] teachers, Tensor[] students, int height, int width, bool mean, float power) -> Tensor",
    _map_shapes,
)
def map_triton(teachers, students, height, width, mean, power):
    """The map (B, height, width) by the Triton kernels."""
    B, device = students[0].shape[0], students[0].device
    scales = _scales(students)
    with torch.cuda.device_of(students[0]):
        of_features = moments_triton(teachers, students)  # (3, B, L)
        maps = torch.empty(B, height, width, dtype=torch.float32, device=device)
        _sample_kernel[(B, triton.cdiv(height * width, BLOCK_Y))](
            of_features, *of_features.stride()[:2], _table(scales, device), maps,
            len(scales), height, width, MEAN=mean, POWER=power, EPS2=EPS**2, BLOCK=BLOCK_Y,
        )
    return maps


def _loss_shapes(teachers, students, flat):
    B = students[0].shape[0]
    cells = sum(h * w for _, h, w in _scales(students))
    loss = students[0].new_empty((), dtype=torch.float32)
    return loss, students[0].new_empty((2, B, cells), dtype=torch.float32)


@opaque("(Tensor[] teachers, Tensor[] students, bool flat) -> (Tensor, Tensor)", _loss_shapes)
def loss_triton(teachers, students, flat):
    """The loss, and the factors (2, B, L) of teacher and student in the student's gradient."""
    B, device = students[0].shape[0], students[0].device
    scales = _scales(students)
    with torch.cuda.device_of(students[0]):
        of_features = moments_triton(teachers, students)  # (3, B, L)
        losses = torch.empty(B, dtype=torch.float32, device=device)
        factors = torch.empty(2, *of_features.shape[1:], dtype=torch.float32, device=device)
        _loss_kernel[(B,)](
            of_features, *of_features.stride()[:2], _table(scales, device), losses,
            factors, *factors.stride()[:2], len(scales), B, SHARED=flat, EPS2=EPS**2, BLOCK=1024,
        )
        return losses.sum(), factors


def _loss_grad_shapes(teachers, students, factors, upstream):
    return [torch.empty_like(s) for s in students]


@opaque(
    "(Tensor[] teachers, Tensor[] students, Tensor factors, Tensor upstream) -> Tensor[]",
    _loss_grad_shapes,
)
def loss_grad_triton(teachers, students, factors, upstream):
    """Gradients of the students (B, C, h, w), from that of the loss."""
    gradients = []
    cells = [h * w for _, h, w in _scales(students)]
    with torch.cuda.device_of(students[0]):
        for t, s, part in zip(teachers, students, factors.split(cells, dim=2)):
            B, C, h, w = s.shape
            ds = torch.empty_like(s)
            tile = _tile(s)
            grid = (B, triton.cdiv(h * w, tile["BLOCK_P"]), triton.cdiv(C, tile["BLOCK_C"]))
            _moments_grad_kernel[grid](
                t, *t.stride(), s, *s.stride(), part, *part.stride()[:2], upstream,
                ds, *ds.stride(), C, h * w, w,
                FLAT_T=_flat(t), FLAT_S=_flat(s), FLAT_DS=_flat(ds), **tile,
            )
            gradients.append(ds)
    return gradients


class _CosineLoss(torch.autograd.Function):
    """(flat, S, *teachers, *students) -> the loss. All that backward needs is two numbers a
    location."""

    @staticmethod
    def forward(ctx, flat, n_scales, *features):
        loss, factors = loss_triton(list(features[:n_scales]), list(features[n_scales:]), flat)
        ctx.save_for_backward(factors, *features)
        ctx.n_scales = n_scales
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        factors, *features = ctx.saved_tensors
        teachers, students = features[: ctx.n_scales], features[ctx.n_scales :]
        gradients = loss_grad_triton(teachers, students, factors, upstream)
        return (None, None, *[None] * ctx.n_scales, *gradients)


@trial("cosine")
def _trial(device, dtype):
    """A map and a loss with its gradient against the PyTorch path, on two scales of 15 and 6
    cells."""
    shapes = [(2, 20, 5, 3), (2, 3, 2, 3)]
    t1, t2, s1, s2 = trial_tensors(shapes + shapes, device, dtype)
    teachers, students = [t1, t2], [s1, s2]
    results = {}
    for backend in ("triton", "torch"):
        maps = cosine_map(teachers, students, (9, 7), backend=backend)
        weighted = cosine_map(teachers, students, (9, 7), power=0.25, backend=backend)
        loss = cosine_loss(teachers, students, flat=False, backend=backend)
        results[backend] = [maps, weighted, loss, *torch.autograd.grad(loss, students)]
    compare(results["triton"], results["torch"], dtype)

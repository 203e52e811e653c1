"""Random normals made inside a kernel: Philox words and the Box-Muller transform in float32.

The words are those of `kernels.philox`, bit for bit. Its normals are float64 inside; these stay within a few
roundings of them, relative to each number, since nothing is subtracted that was rounded before: what is near
a whole turn or near ln 1 is taken off in integers. Series are cut where the rest is below half a rounding.
"""
# The parameters of jitted functions are Triton values, which have no types here.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"

import triton
import triton.language as tl

_UNIT = tl.constexpr(2.0**-32)
_TURN = tl.constexpr(6.283185307179586 * 2.0**-32)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def philox_words(seed, stream, probe, block):
    """Four words uint32 of each counter block; seed int64 holds 64 bits, block int32."""
    none = block * 0
    return tl.philox(seed, block, none + stream, none + probe, none)


@triton.jit
def log_word(word):
    """ln((word + 0.5) / 2**32) of uint32 words, from u itself or, where u is near 1, from 1 - u."""
    near = word >= 0xB504F334  # u above the square root of a half
    u = (word.to(tl.float32) + 0.5) * _UNIT
    rest = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * _UNIT
    bits = u.to(tl.int32, bitcast=True)
    power = (bits - 0x3F3504F3) >> 23  # u = 2**power m, with m between the roots of 1/2 and of 2
    part = (bits - (power << 23)).to(tl.float32, bitcast=True) - 1.0
    power = tl.where(near, 0, power).to(tl.float32)
    part = tl.where(near, -rest, part)
    s = part / (part + 2.0)  # ln(1 + part) = 2 artanh(s)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9))))
    return power * _LN2 + 2.0 * s * series


@triton.jit
def turn_word(word):
    """Cosine and sine of 2 pi (word + 0.5) / 2**32 of uint32 words."""
    quarter = (word + 0x20000000) >> 30
    rest = (word - (quarter << 30)).to(tl.int32, bitcast=True)  # within an eighth of a turn of 0
    t = (rest.to(tl.float32) + 0.5) * _TURN
    q = t * t
    sine = t * (1.0 - q * (1 / 6 - q * (1 / 120 - q * (1 / 5040 - q * (1 / 362880)))))
    cosine = 1.0 - q * (1 / 2 - q * (1 / 24 - q * (1 / 720 - q * (1 / 40320 - q * (1 / 3628800)))))
    crossed = (quarter & 1) == 1
    c, s = tl.where(crossed, sine, cosine), tl.where(crossed, cosine, sine)
    return tl.where((quarter == 1) | (quarter == 2), -c, c), tl.where(quarter >= 2, -s, s)


@triton.jit
def turn_radians(angle):
    """Cosine and sine of an angle in radians below some thousands; NaN where it is not finite."""
    known = tl.abs(angle) < float("inf")
    turns = tl.where(known, angle, 0.0) * 0.15915494309189535
    part = turns - tl.floor(turns)
    cosine, sine = turn_word((tl.minimum(part, 0.99999994) * 4294967296.0).to(tl.uint32))
    return tl.where(known, cosine, float("nan")), tl.where(known, sine, float("nan"))


@triton.jit
def normals(seed, stream, probe, block):
    """Standard normals float32 (4 B,) of B consecutive counter blocks, in the order of the elements."""
    w0, w1, w2, w3 = philox_words(seed, stream, probe, block)
    r0, r1 = tl.sqrt(-2.0 * log_word(w0)), tl.sqrt(-2.0 * log_word(w2))
    c0, s0 = turn_word(w1)
    c1, s1 = turn_word(w3)
    return tl.interleave(tl.interleave(r0 * c0, r1 * c1), tl.interleave(r0 * s0, r1 * s1))

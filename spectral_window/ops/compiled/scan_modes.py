"""z = exp(-decay + i frequency) in float64 for many channels at once, in compiled code.

Compilers call the C library for exp, cos and sin, one number at a time: 20 microseconds for 768
channels, more than everything else in a step of decoding. Here they are polynomials over `Lanes`:

    exp(x) = 2^n exp(x - n ln 2),   |x - n ln 2| <= ln(2) / 2
    cos(x), sin(x): turn by n quarters the cos and sin of x - n pi/2, |x - n pi/2| <= pi/4

n ln 2 and n pi/2 are subtracted in parts, the first so short that its product with n is exact
(Cody and Waite): the remainder keeps all its digits. Beyond 100,000 radians a step, where that
would end, the C library serves.
"""

from __future__ import annotations

import math

import numba

from spectral_window.ops.compiled.float64_lanes import (
    LANES,
    load,
    nearest,
    power_of_two,
    spread,
    store,
)
from spectral_window.ops.compiled.threads import inner

_always = numba.njit(forceinline=True, error_model="numpy")

_FAR = 1e5  # radians up to which pi/2 in three parts of 33 bits leaves an exact remainder
_HALF_PI = (1.5707963267341256, 6.077100506303966e-11, 2.0222662487959506e-21)
_LN2 = (0.6931471803691238, 1.9082149292705877e-10)
# Taylor series, last term first, as far as float64 sees: |x| <= ln(2)/2, and |x| <= pi/4 in x^2.
_EXP = tuple(1 / math.factorial(k) for k in range(13, -1, -1))
_SIN = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(8, -1, -1))
_COS = tuple((-1) ** k / math.factorial(2 * k) for k in range(8, -1, -1))


@_always
def _polynomial(coefficients, x):
    y = spread(coefficients[0])
    for k in range(1, len(coefficients)):
        y = y * x + spread(coefficients[k])
    return y


@inner
def exponentiate(room, size):
    """In place: `size` decays, then `size` frequencies, become Re z and Im z. `size` is a multiple
    of LANES; what is not finite gives what the C library gives."""
    near = True
    for i in range(size):
        if room[i] > 750.0:
            room[i] = 750.0  # exp is 0 from here on
        near &= (room[i] >= 0.0) & (abs(room[size + i]) <= _FAR)
    if not near:
        for i in range(size):
            scale, angle = math.exp(-room[i]), room[size + i]
            room[i], room[size + i] = scale * math.cos(angle), scale * math.sin(angle)
        return
    for i in range(0, size, LANES):
        x = spread(0.0) - load(room, i, LANES)
        n = nearest(x * spread(1 / math.log(2.0)))
        x = x - n * spread(_LN2[0]) - n * spread(_LN2[1])
        half = nearest(n * spread(0.5))  # 2^n in two factors, the result may be denormal
        scale = _polynomial(_EXP, x) * power_of_two(half) * power_of_two(n - half)

        x = load(room, size + i, LANES)
        n = nearest(x * spread(2 / math.pi))
        x = x - n * spread(_HALF_PI[0]) - n * spread(_HALF_PI[1]) - n * spread(_HALF_PI[2])
        xx = x * x
        c, s = _polynomial(_COS, xx), _polynomial(_SIN, xx) * x
        # turn by n quarters: cos and sin of n pi/2, as polynomials in n = -2 ... 2
        n = n - nearest(n * spread(0.25)) * spread(4.0)
        nn = n * n
        turn_s = n * (spread(4.0) - nn) * spread(1 / 3)
        turn_c = spread(1.0) - nn * (spread(7.0) - nn) * spread(1 / 6)
        store(room, i, LANES, scale * (c * turn_c - s * turn_s))
        store(room, size + i, LANES, scale * (s * turn_c + c * turn_s))

"""Loops over tokens as people write them, as functions of tensors whose dims a letter each names.

`SAMPLES[name]` is a `Sample`: the function, the letters of its operands (an operand with T is an activation,
one without is a parameter), what is done to an operand first, and the ops that recognition is to make of it.
The styles are those of flash-linear-attention's naive recurrences, transformers' fallbacks and mamba's slow
path; the last ones are recurrences that no table knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LEFT", "SAMPLES", "SIZES", "Sample"]

SIZES = {"B": 2, "H": 3, "T": 13, "K": 4, "V": 5, "G": 6, "D": 4, "E": 4}
"""G: heads of values that share a key head, twice H; E is as D, for a second dim of it."""
T = SIZES["T"]


@dataclass
class Sample:
    """A loop and what is expected of it."""

    function: Callable[..., object]
    operands: tuple[str, ...]
    kinds: tuple[str, ...]
    first: dict[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def __call__(self, *operands: Tensor) -> object:
        return self.function(*(self.first.get(n, _same)(x) for n, x in enumerate(operands)))

    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(SIZES[c] for c in letters) for letters in self.operands]


def _same(x: Tensor) -> Tensor:
    return x


SAMPLES: dict[str, Sample] = {}
LEFT: dict[str, tuple[Sample, str]] = {}
GATE, STRENGTH, UNIT = F.logsigmoid, torch.sigmoid, lambda x: F.normalize(x, dim=-1)


def sample(operands: str, *kinds: str, **first: Callable[[Tensor], Tensor]) -> Callable:
    def register(fn: Callable[..., object]) -> Callable[..., object]:
        given = {int(n[1:]): f for n, f in first.items()}
        SAMPLES[fn.__name__] = Sample(fn, tuple(operands.split()), kinds, given)
        return fn

    return register


def left(operands: str, reason: str) -> Callable:
    def register(fn: Callable[..., object]) -> Callable[..., object]:
        LEFT[fn.__name__] = (Sample(fn, tuple(operands.split()), ()), reason)
        return fn

    return register


# ---------------------------------------------------------------- linear attention


@sample("BHTK BHTK BHTV", "linear")
def outer_products(q, k, v):
    S = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=q.dtype)
    outs = []
    for i in range(T):
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, :, i], v[:, :, i])
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, :, i], S))
    return torch.stack(outs, 2)


@sample("BTHK BTHK BTHV", "linear")
def with_a_normaliser(q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    S = torch.zeros(*k.shape[::2], k.shape[-1], v.shape[-1], dtype=q.dtype)
    z = torch.zeros(*k.shape[::2], k.shape[-1], dtype=q.dtype)
    outs = []
    for i in range(T):
        S = S + k[:, i, :, :, None] * v[:, i, :, None, :]
        z = z + k[:, i]
        den = (q[:, i] * z).sum(-1, keepdim=True) + 1e-6
        outs.append((torch.einsum("bhk,bhkv->bhv", q[:, i], S) / den).unsqueeze(1))
    return torch.cat(outs, 1)


@sample("BHTK BHTK BHTV BHT BHKV", "linear", _3=GATE)
def scalar_decay(q, k, v, g, initial):
    q = q * q.shape[-1] ** -0.5
    o = torch.zeros_like(v)
    S = q.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    S += initial
    for i in range(T):
        gate = g[:, :, i].exp()
        key, value = k[:, :, i], v[:, :, i]
        S = S * gate.unsqueeze(-1).unsqueeze(-1) + key.unsqueeze(-1) * value.unsqueeze(-2)
        o[:, :, i] = (q[:, :, i, :].unsqueeze(-1) * S).sum(-2)
    return o.transpose(1, 2), S


@sample("BHTK BHTK BHTV", "linear")
def constant_decay_from_no_state(q, k, v):
    S, outs = None, []
    for i in range(T):
        kv = k[:, :, i, :, None] * v[:, :, i, None, :]
        S = kv if S is None else 0.9 * S + kv
        outs.append((q[:, :, i, :, None] * S).sum(-2))
    return torch.stack(outs, 2)


@sample("BHTK BHTK BHTV BHT", "linear", _3=GATE)
def state_in_place(q, k, v, g):
    with torch.no_grad():
        S = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=q.dtype)
        o = torch.empty_like(v)
        for i in range(T):
            S *= g[:, :, i, None, None].exp()
            S += k[:, :, i, :, None] * v[:, :, i, None, :]
            o[:, :, i] = (q[:, :, i, :, None] * S).sum(-2)
    return o * v, S


@sample("BHTK BHTK BHTV BHT", "linear", _3=STRENGTH)
def from_the_last_token(q, k, v, a):
    S = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=q.dtype)
    outs = []
    for i in reversed(range(T)):
        S = S * a[:, :, i, None, None] + k[:, :, i, :, None] * v[:, :, i, None, :]
        outs.append((q[:, :, i, :, None] * S).sum(-2))
    return torch.stack(outs[::-1], 2), S


@sample("BHTK BHTK BHTV BHTK HK BHKV", "linear", _3=GATE)
def diagonal_decay_with_bonus(q, k, v, w, u, initial):
    h, o = torch.zeros_like(initial), torch.zeros_like(v)
    h += initial
    for i in range(T):
        q_i, k_i, v_i, w_i = q[:, :, i, :] * 0.5, k[:, :, i], v[:, :, i, :], w[:, :, i].exp()
        kv = k_i[..., None] * v_i[..., None, :]
        o[:, :, i] = ((h + u[None, ..., None] * kv) * q_i[..., None]).sum(-2)
        h = h * w_i[..., None] + kv
    return o, h


@sample("BHTK BHTK BHTV BHT BHKV", "linear", _1=UNIT, _3=STRENGTH)
def delta_rule(q, k, v, beta, initial):
    S, o = torch.zeros_like(initial), torch.zeros_like(v)
    beta = beta[..., None]
    S += initial
    for i in range(T):
        key, value = k[:, :, i], v[:, :, i].clone()
        value = (value - (S.clone() * key[..., None]).sum(-2)) * beta[:, :, i]
        S = S.clone() + key.unsqueeze(-1) * value.unsqueeze(-2)
        o[:, :, i] = torch.einsum("bhd,bhdm->bhm", q[:, :, i], S)
    return o, S


@sample("BTHK BTHK BTHV BTH BTH", "linear", _1=UNIT, _3=GATE, _4=STRENGTH)
def gated_delta_rule(query, key, value, g, beta):
    query, key, value, beta, g = [
        x.transpose(1, 2).contiguous().to(torch.float64) for x in (query, key, value, beta, g)
    ]
    out = torch.zeros(*value.shape).to(value)
    state = torch.zeros(*key.shape[:2], key.shape[-1], value.shape[-1]).to(value)
    for i in range(T):
        q_t, k_t, v_t = query[:, :, i], key[:, :, i], value[:, :, i]
        state = state * g[:, :, i].exp().unsqueeze(-1).unsqueeze(-1)
        memory = (state * k_t.unsqueeze(-1)).sum(dim=-2)
        delta = (v_t - memory) * beta[:, :, i].unsqueeze(-1)
        state = state + k_t.unsqueeze(-1) * delta.unsqueeze(-2)
        out[:, :, i] = (state * q_t.unsqueeze(-1)).sum(dim=-2)
    return out.transpose(1, 2).contiguous(), state


@sample("BTHK BTHK BTGV BTGK BTG", "linear", _1=UNIT, _3=GATE, _4=STRENGTH)
def diagonal_delta_rule(q, k, v, g, beta):
    q, k = (x.repeat_interleave(2, dim=2) for x in (q, k))
    S = k.new_zeros(*v.shape[::2], k.shape[-1], v.shape[-1]).to(q)
    o = torch.zeros_like(v)
    for i in range(T):
        q_i, k_i, v_i, g_i, b_i = q[:, i], k[:, i], v[:, i], g[:, i], beta[:, i]
        S = S * g_i[..., None].exp()
        erased = v_i - (k_i[..., None] * S).sum(-2)
        S = S + torch.einsum("b h k, b h v -> b h k v", b_i[..., None] * k_i, erased)
        o[:, i] = torch.einsum("b h k, b h k v -> b h v", q_i, S)
    return o, S


# ---------------------------------------------------------------- states without queries


@sample("BTD BTD", "scan", _1=GATE)
def gated_states(x, g):
    h = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype)
    o = torch.zeros_like(x)
    for i in range(T):
        h = g[:, i].exp() * h + x[:, i]
        o[:, i] = h
    return o, h


@sample("BTD BTD", "scan")
def unbound_and_lerped(x, a):
    h, outs = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype), []
    for x_t, a_t in zip(x.unbind(1), torch.sigmoid(a).unbind(1), strict=True):
        h = torch.lerp(h, x_t, a_t)
        outs.append(torch.tanh(h))
    return torch.stack(outs, 1)


@sample("BDT BDT DV BTV BTV D", "linear", _1=F.softplus)
def selective_scan(u, dt, A, Bm, C, skip):
    decay = torch.exp(-torch.exp(A)[None, :, None, :] * dt[:, :, :, None])
    update = dt[:, :, :, None] * Bm[:, None, :, :] * u[:, :, :, None]
    state, outs = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype), []
    for i in range(T):
        state = decay[:, :, i, :] * state + update[:, :, i, :]
        out = torch.matmul(state.to(u.dtype), C[:, i, :].unsqueeze(-1))
        outs.append(out[:, :, 0])
    return torch.stack(outs, dim=-1) + u * skip[None, :, None]


@sample("BTD BTD", "scan", "scan")
def one_state_feeds_another(x, a):
    fast = slow = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype)
    outs = []
    for t in range(T):
        fast = torch.sigmoid(a[:, t]) * fast + x[:, t]
        slow = 0.9 * slow + torch.tanh(fast)
        outs.append(slow * fast)
    return torch.stack(outs, 1)


@sample("BTD D", "scan")
def token_shift(x, w):
    previous = h = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype)
    outs = []
    for t in range(T):
        h = 0.5 * h + x[:, t] * w + previous * (1 - w)
        previous = x[:, t]
        outs.append(h)
    return torch.stack(outs, 1)


@sample("BTD D BTD", "scan")
def written_in_part(x, a, base):
    o, h = base * 1, torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype)
    for t in range(1, T - 1):
        h = a * h + x[:, t]
        o[:, t] = h
    o[:, 0] += 1
    return o


@sample("BTD D", "loop")
def only_a_sum(x, w):
    total = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype)
    for t in range(T):
        total = total + torch.tanh(x[:, t] * w)
    return total


# ---------------------------------------------------------------- that no table knows


@sample("BTD D BTD", "scan")
def rotating_integrator(x, w, g):
    """Two timescales, and channels that turn into each other."""
    s = torch.zeros(x.shape[0], 2, x.shape[2], dtype=x.dtype)
    cos, sin = torch.cos(w), torch.sin(w)
    outs = []
    for t in range(T):
        a, b = s[:, 0], s[:, 1]
        gate = torch.sigmoid(g[:, t])
        turned = gate * (cos * a - sin * b), 0.5 * gate * (sin * a + cos * b)
        s = torch.stack([turned[0] + x[:, t], turned[1] - x[:, t]], 1)
        outs.append(s.sum(1) * x[:, t])
    return torch.stack(outs, 1)


@sample("BTD DE BT DE", "scan")
def learned_matrix_and_gate(x, W, g, inwards):
    s, outs = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype), []
    for t in range(T):
        s = torch.sigmoid(g[:, t])[:, None] * (s @ W.T) + x[:, t] @ inwards
        outs.append(F.gelu(s))
    return torch.stack(outs, 1), s


@sample("BTD D D BD", "scan")
def heavy_ball(x, friction, rate, initial):
    place, momentum, outs = initial, torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype), []
    for t in range(T):
        momentum = torch.sigmoid(friction) * momentum - 0.3 * place + x[:, t]
        place = place + torch.sigmoid(rate) * momentum
        outs.append(place)
    return torch.stack(outs, 1), momentum


@sample("BTD BTD", "scan")
def delay_line(x, a):
    """A shift register whose last entry feeds back into the first."""
    line, outs = torch.zeros(x.shape[0], 3, x.shape[2], dtype=x.dtype), []
    for t in range(T):
        first = x[:, t] + torch.sigmoid(a[:, t]) * line[:, 2]
        line = torch.cat([first[:, None], line[:, :2]], 1)
        outs.append(line.sum(1))
    return torch.stack(outs, 1)


@sample("BTD BTD D D", "scan", "scan", "scan")
def stabilised_by_a_maximum(k, v, w, u):
    num = den = torch.zeros(k.shape[0], k.shape[2], dtype=k.dtype)
    top, outs, w = torch.full_like(num, -1e38), [], -torch.exp(w)
    for t in range(T):
        k_t, v_t = k[:, t], v[:, t]
        best = torch.maximum(top, k_t + u)
        old, new = torch.exp(top - best), torch.exp(k_t + u - best)
        outs.append((old * num + new * v_t) / (old * den + new))
        best = torch.maximum(top + w, k_t)
        old, new = torch.exp(top + w - best), torch.exp(k_t - best)
        num, den, top = old * num + new * v_t, old * den + new, best
    return torch.stack(outs, 1)


@sample("BHTK BHTK BHTV BHT BHT", "scan", "linear", _3=GATE)
def stabilised_matrix_memory(q, k, v, g, i):
    """The recurrence of mLSTM: what is read is over the larger of a normaliser and the maximum's share."""
    C = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], dtype=q.dtype)
    n = torch.zeros(*k.shape[:2], k.shape[-1], 1, dtype=q.dtype)
    m = torch.zeros(*k.shape[:2], 1, dtype=q.dtype)
    outs = []
    for t in range(T):
        q_t, k_t, v_t, f_t, i_t = q[:, :, t], k[:, :, t], v[:, :, t], g[:, :, t, None], 2 * i[:, :, t, None]
        m_new = torch.maximum(f_t + m, i_t)
        keep, add = torch.exp(f_t + m - m_new), torch.exp(i_t - m_new)
        C = keep[..., None] * C + add[..., None] * (k_t[..., :, None] @ v_t[..., None, :])
        n = keep[..., None] * n + add[..., None] * k_t[..., None]
        read, norm = q_t[..., None, :] @ C, (q_t[..., None, :] @ n).squeeze(-1)
        outs.append(read.squeeze(-2) / torch.maximum(norm.abs(), torch.exp(-m_new)))
        m = m_new
    return torch.stack(outs, 2)


@sample("BTD D", "scan")
def highest_above_zero(x, w):
    """It begins at zero, and not below everything."""
    top, outs = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype), []
    for t in range(T):
        top = torch.maximum(top + torch.tanh(w), x[:, t] - 1)
        outs.append(top)
    return torch.stack(outs, 1)


@sample("BTD D BTD BD", "scan")
def highest_with_a_slope(x, w, y, initial):
    """A maximum of three, that forgets by a constant; from the last token on."""
    top, outs = initial, []
    for t in reversed(range(T)):
        top = torch.max(torch.max(x[:, t], top - torch.exp(w)), y[:, t])
        outs.append(top * x[:, t])
    return torch.stack(outs[::-1], 1), top


# ---------------------------------------------------------------- left alone


@left("BTD D", "goes through tanh")
def nonlinear(x, a):
    h, outs = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype), []
    for t in range(T):
        h = torch.tanh(a * h + x[:, t])
        outs.append(h)
    return torch.stack(outs, 1)


@left("BTD D", "not updated linearly")
def squared(x, a):
    h, outs = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype), []
    for t in range(T):
        h = 0.1 * a * h * h + x[:, t]
        outs.append(h)
    return torch.stack(outs, 1)


@left("BTD DE", "goes through sigmoid")
def gated_by_itself(x, w):
    h, outs = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype), []
    for t in range(T):
        z = torch.sigmoid(x[:, t] + h @ w)
        h = z * h + (1 - z) * x[:, t]
        outs.append(h)
    return torch.stack(outs, 1)


@left("BTD D", "goes through maximum")
def two_ways_to_the_maximum(x, a):
    top, outs = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype), []
    for t in range(T):
        top = torch.maximum(top + a, x[:, t] - top)
        outs.append(top)
    return torch.stack(outs, 1)


@left("BTD D", "goes through maximum")
def scaled_before_the_maximum(x, a):
    top, outs = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype), []
    for t in range(T):
        top = torch.maximum(top * a, x[:, t])
        outs.append(top)
    return torch.stack(outs, 1)


@left("BTD D", "")
def body_that_changes(x, a):
    h, outs = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype), []
    for t in range(T):
        h = a * h + x[:, t] if t % 3 else (a * h).relu() + x[:, t]
        outs.append(h)
    return torch.stack(outs, 1)


@left("BTD D", "")
def reads_its_output(x, a):
    o = torch.zeros_like(x)
    for t in range(T):
        o[:, t] = x[:, t] * a + o.clone().sum(1) * 0.1
    return o


@left("BTD D", "")
def reads_the_last_output(x, a):
    o = torch.zeros_like(x)
    o[:, 0] = x[:, 0]
    for t in range(1, T):
        o[:, t] = o[:, t - 1].clone() * a + x[:, t]
    return o


@left("BTD D", "")
def keeps_the_last_two(x, a):
    h = g = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype)
    outs = []
    for t in range(T):
        h, g = torch.relu(a * g + x[:, t]), h
        outs.append(h)
    return torch.stack(outs, 1)


@left("BTD D", "")
def random_steps(x, a):
    h, outs = torch.zeros(x.shape[0], x.shape[2], dtype=x.dtype), []
    for t in range(T):
        h = a * h + F.dropout(x[:, t], 0.5)
        outs.append(h)
    return torch.stack(outs, 1)


@left("BTD D", "")
def matrices_that_grow(x, a):
    outs = []
    for t in range(T):
        outs.append((x[:, : t + 1] * a).sum(1))
    return torch.stack(outs, 1)

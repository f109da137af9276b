"""Fused AdamW against float64 and bitsandbytes; its 8-bit format, its rounding, its state."""

from __future__ import annotations

import copy

import pytest
import torch

from finetui.kernels import adamw, blockwise

SIZES = [(3,), (5, 1000), (4096,), (33, 257)]
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99)}


def parameters(device, dtype=torch.float32, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in sizes]


def train(optimizer, params, steps, seed=1):
    """Gradients whose size varies within a block, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = (g * torch.exp(2 * torch.randn(p.shape, generator=generator, dtype=torch.float64))).to(p)
        optimizer.step()
    return params


def moved(device, make, steps=4, dtype=torch.float32, **options):
    """How far each parameter went from where it began, as fp64."""
    params = parameters(device, dtype)
    before = [p.detach().double() for p in params]
    train(make(params, **OPTIONS, **options), params, steps)
    return torch.cat([(p.detach().double() - b).flatten() for p, b in zip(params, before, strict=True)])


def exact(device, steps=4):
    params = [p.detach().double().requires_grad_() for p in parameters(device)]
    before = [p.detach().clone() for p in params]
    train(torch.optim.AdamW(params, **OPTIONS), params, steps)
    return torch.cat([(p.detach() - b).flatten() for p, b in zip(params, before, strict=True)])


def error(got, truth):
    return ((got - truth).norm() / truth.norm()).item()


def test_with_fp32_states_it_is_adamw(device):
    truth = exact(device)
    assert error(moved(device, adamw.AdamW, states="fp32"), truth) < 1.2 * error(
        moved(device, torch.optim.AdamW), truth
    )


def test_with_16_bit_states_the_error_is_that_of_bf16(device):
    assert error(moved(device, adamw.AdamW, states="bf16"), exact(device)) < 2e-2


def test_with_8_bit_states_it_is_no_further_from_float64_than_bitsandbytes(device):
    bnb = pytest.importorskip("bitsandbytes")
    truth = exact(device)
    theirs = error(moved(device, lambda p, **o: bnb.optim.AdamW8bit(p, min_8bit_size=4096, **o)), truth)
    # On a GPU theirs rounds small second moments to 0, after which updates are many times too large.
    assert theirs > 1e-3, "bitsandbytes did not keep its states in 8 bits"
    assert error(moved(device, adamw.AdamW, states="8bit"), truth) < 1.1 * theirs


def test_codes_stand_for_the_nearest_value_but_at_the_borders_of_powers_of_ten(device):
    p = torch.zeros(4096, device=device, requires_grad=True)
    optimizer = adamw.AdamW([p], betas=(0.0, 0.0))
    p.grad = torch.logspace(-9, 0, 4096, device=device) * torch.tensor([1.0, -1.0], device=device).repeat(2048)
    optimizer.step()
    state, g = optimizer.state[p], p.grad.double().view(-1, blockwise.BLOCK)
    for name, truth in (("exp_avg", g), ("exp_avg_sq", g * g)):
        got = blockwise.dequantised(state, name).double().view(-1, blockwise.BLOCK)
        largest = truth.abs().amax(1, keepdim=True)
        ratio, told = truth / largest, got / largest
        table = blockwise.values(signed=name == "exp_avg").double().to(device)
        nearest = (ratio[..., None] - table).abs().amin(-1)
        gap = (ratio - told).abs()
        assert (gap <= 5 * nearest + 1e-6).all()  # at a border cells of one and five widths meet
        assert (gap <= nearest + 1e-6).double().mean() > 0.9
        torch.testing.assert_close(told.abs().amax(1), torch.ones_like(told[:, 0]), rtol=1e-6, atol=0)
    assert (state["exp_avg_sq"] > 0).all(), "a second moment became 0"


def test_each_code_is_read_back_as_itself(device):
    """Values of the table are coded as the codes they came from: encoding is the inverse of decoding."""
    for signed, name in ((True, "exp_avg"), (False, "exp_avg_sq")):
        table = blockwise.values(signed)
        p = torch.zeros(4096, device=device, requires_grad=True)
        optimizer = adamw.AdamW([p], betas=(0.0, 0.0), lr=0.0)
        values = table.repeat(16).to(device)
        p.grad = values if signed else values.sqrt()
        optimizer.step()
        told = blockwise.dequantised(optimizer.state[p], name)
        torch.testing.assert_close(told, values, rtol=1e-6, atol=1e-12)


def test_the_kernel_reads_each_code_as_the_table_has_it(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device).repeat(adamw.SMALLEST // 256)
    p = torch.zeros(codes.numel(), device=device, requires_grad=True)
    p.grad = torch.zeros_like(p)
    optimizer = adamw.AdamW([p], lr=1.0, betas=(0.5, 0.5))
    optimizer.step()
    state = optimizer.state[p]
    state["exp_avg_scale"].fill_(3.0)
    state["exp_avg_sq_scale"].fill_(0.25)
    state["exp_avg"].copy_(codes.view(torch.int8))
    state["exp_avg_sq"].copy_(codes.flip(0))
    optimizer.step()
    m = 1.5 * blockwise.values(signed=True).double().to(device)[codes.long()]
    v = 0.125 * blockwise.values(signed=False).double().to(device)[codes.flip(0).long()]
    expected = -m / 0.75 / ((v / 0.75).sqrt() + 1e-8)
    torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_states_whose_codes_meant_other_values_are_refused(device):
    p = torch.zeros(adamw.SMALLEST, device=device, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = adamw.AdamW([p])
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].view(torch.uint8)
    with pytest.raises(ValueError, match="earlier version"):
        adamw.AdamW([p]).load_state_dict(saved)


def test_states_of_another_optimiser_are_refused():
    p = torch.ones(3, requires_grad=True)
    for state in ({"step": 1, "state1": torch.zeros(3)}, {"step": 1, "__bnb_optimizer_quant_state__": {}}):
        saved = {**adamw.AdamW([p]).state_dict(), "state": {0: state}}
        with pytest.raises(ValueError, match="another optimiser"):
            adamw.AdamW([p]).load_state_dict(saved)


@pytest.mark.parametrize("states", adamw.STATES)
def test_without_a_learning_rate_only_the_states_move(device, states):
    params = parameters(device)
    before = [p.detach().clone() for p in params]
    optimizer = adamw.AdamW(params, lr=0.0, states=states, weight_decay=0.1)
    train(optimizer, params, 2)
    assert all(torch.equal(p.detach(), one) for p, one in zip(params, before, strict=True))
    assert all(blockwise.dequantised(optimizer.state[p], "exp_avg").any() for p in params)


def test_what_never_had_a_gradient_stays_zero(device):
    p = torch.ones(4096, device=device, requires_grad=True)
    optimizer = adamw.AdamW([p], lr=0.1)
    p.grad = torch.zeros_like(p)
    p.grad[7] = 3.0
    optimizer.step()
    assert torch.equal(p.detach() == 1.0, torch.arange(4096, device=device) != 7)


def test_rounding_at_random_keeps_small_updates_and_rounding_to_nearest_loses_them(device):
    def mean(stochastic):
        p = torch.ones(8192, device=device, dtype=torch.bfloat16, requires_grad=True)
        optimizer = adamw.AdamW([p], lr=2e-4, stochastic=stochastic)
        for _ in range(5):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach().double().mean().item()

    assert mean(stochastic=False) == 1.0 or torch.cuda.is_available() is False  # the interpreter cuts instead
    assert abs(mean(stochastic=True) - (1 - 5 * 2e-4)) < 1e-4


def test_the_same_seed_gives_the_same_bits_and_another_does_not(device):
    def run(seed):
        params = parameters(device, torch.bfloat16, sizes=[(3,), (4, 1024)])
        return torch.cat([p.flatten() for p in train(adamw.AdamW(params, seed=seed), params, 2)]).detach()

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))


@pytest.mark.parametrize("states", adamw.STATES)
def test_a_state_dictionary_restores_to_the_bit(device, states):
    params = parameters(device, torch.bfloat16, sizes=[(3,), (4, 1024), (4, 1025)])
    optimizer = adamw.AdamW(params, states=states, wide=params[2:])
    train(optimizer, params, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    again = [p.detach().clone().requires_grad_() for p in params]
    other = adamw.AdamW(again, states=states, wide=again[2:])
    other.load_state_dict(saved)
    for mine, theirs in zip(params, again, strict=True):
        for name, value in optimizer.state[mine].items():
            restored = other.state[theirs][name]
            assert torch.equal(torch.as_tensor(restored), torch.as_tensor(value))
            assert getattr(restored, "dtype", None) == getattr(value, "dtype", None)
    train(optimizer, params, 1, seed=9)
    train(other, again, 1, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


def test_states_take_the_bytes_they_are_said_to(device):
    p = torch.zeros(256 * 100, device=device, dtype=torch.bfloat16, requires_grad=True)

    def per_value(**options):
        optimizer = adamw.AdamW([p], **options)
        p.grad = torch.ones_like(p)
        optimizer.step()
        tensors = [t for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors) / p.numel()

    assert per_value() == 2 + 8 / 256
    assert per_value(states="bf16") == 4
    assert per_value(states="fp32") == per_value(wide=[p]) == 8


def test_gradients_of_any_strides_and_places(device):
    """Expanded (stride 0), transposed, and starting where no 16-byte access can."""

    def run(make):
        storage = torch.zeros(1 + 64 * 65, device=device)
        params = [torch.ones(64, 65, device=device), torch.ones(64, 65, device=device), storage[1:].view(64, 65)]
        rising = torch.arange(64 * 65, device=device).float()
        gradients = [torch.ones((), device=device).expand(64, 65), rising.view(65, 64).t(), rising.view(64, 65)]
        params = [torch.nn.Parameter(p) for p in params]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        make(params, lr=0.1).step()
        return torch.stack([p.detach() for p in params])

    got = run(lambda p, **o: adamw.AdamW(p, states="fp32", **o))
    torch.testing.assert_close(got, run(lambda p, **o: torch.optim.AdamW(p, weight_decay=0.0, **o)))


def test_a_parameter_without_a_gradient_is_passed_over(device):
    a, b = parameters(device, sizes=[(8,), (8,)])
    before = b.detach().clone()
    optimizer = adamw.AdamW([a, b])
    for _ in range(2):
        a.grad = torch.ones_like(a)
        optimizer.step()
    b.grad = torch.ones_like(b)  # two steps later than a
    optimizer.step()
    torch.testing.assert_close(before - b.detach(), torch.full_like(b, 1e-3), rtol=1e-3, atol=0)


def test_what_can_not_be_updated_is_refused(device):
    with pytest.raises(ValueError, match="states are"):
        adamw.AdamW(parameters(device), states="4bit")
    p = torch.zeros(4, 6, device=device).t().requires_grad_()
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="strides"):
        adamw.AdamW([p]).step()


def test_it_is_proven_here(device):
    assert adamw.prove(device).ok, adamw.prove(device).why


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_real_shapes_are_repeatable_and_close_to_float64(dtype):
    """On the largest and oddest tensors of an 8B model; twice, to the bit."""
    device = torch.device("cuda")

    def run(make, **options):
        generator = torch.Generator("cuda").manual_seed(0)
        sizes = [(14336, 4096), (4096,), (1000, 4097)]
        params = [torch.randn(s, generator=generator, device=device).to(dtype) for s in sizes]
        wide = options.pop("wide", dtype)
        params = [p.to(wide).requires_grad_() for p in params]
        before = [p.detach().double().clone() for p in params]
        optimizer = make(params, lr=1e-2, weight_decay=0.1, **options)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, device=device).to(dtype).to(wide)
            optimizer.step()
        return torch.cat([(p.detach().double() - b).flatten() for p, b in zip(params, before, strict=True)])

    truth = run(torch.optim.AdamW, wide=torch.float64)
    for states, limit in (("fp32", 1e-5), ("bf16", 1e-2), ("8bit", 3e-2)):
        got = run(adamw.AdamW, states=states)
        assert torch.equal(got, run(adamw.AdamW, states=states))
        # Weights of size 1 in bf16 are stored in steps of 2^-8, updates are 1e-2: rounding is most of the error.
        assert error(got, truth) < (limit if dtype == torch.float32 else 0.3)
        assert abs((got.mean() - truth.mean()).item()) < 1e-5


@pytest.mark.cuda
def test_a_tensor_of_more_than_two_to_the_31():
    p = torch.zeros(2**31 + 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.ones_like(p)
    adamw.AdamW([p], lr=0.5).step()
    assert (p[-8192:] == -0.5).all()
    assert (p[::100_003] == -0.5).all()


@pytest.mark.parametrize("states", adamw.STATES)
def test_gradients_can_be_scaled_on_the_way(device, states):
    """As if they had been clipped before; and a norm that is no number leaves the step out."""
    clipped, scaled = (parameters(device, sizes=[(3,), (4096,)]) for _ in range(2))
    first, second = (adamw.AdamW(params, states=states, **OPTIONS) for params in (clipped, scaled))
    factor = torch.tensor(0.25, device=device)
    for _ in range(2):
        for one, other in zip(clipped, scaled, strict=True):
            other.grad = torch.randn_like(one)
            one.grad = other.grad * factor  # a power of two: exact
        second.scale_gradients(factor)
        first.step()
        second.step()
    assert all(torch.equal(one, other) for one, other in zip(clipped, scaled, strict=True))
    before = copy.deepcopy([second.state[p]["exp_avg"] for p in scaled])
    second.scale_gradients(torch.tensor(float("nan"), device=device))
    for p in scaled:
        p.grad = torch.full_like(p, float("inf"))
    second.step()
    assert all(torch.equal(one, other) for one, other in zip(clipped, scaled, strict=True))
    assert all(torch.equal(second.state[p]["exp_avg"], kept) for p, kept in zip(scaled, before, strict=True))
    for one, other in zip(clipped, scaled, strict=True):  # that was for one step
        one.grad, other.grad = torch.ones_like(one), torch.ones_like(other)
    second.uncount()
    first.step()
    second.step()
    assert all(torch.equal(one, other) for one, other in zip(clipped, scaled, strict=True))

"""Recorded micro-batches: memory that stays, results that are those of the calls, and a way back when they are not."""

from __future__ import annotations

import pytest
import torch

from finetui.engine.trainers.graphs import MOST, WARM, Accumulators, CudaRecorder, Graphs

from .conftest import HostRecorder


def setup(device="cpu", recorder=None, function=None, **more):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(device)
    seen = []

    def forward_backward(tensors, scale):
        seen.append({name: tensor.data_ptr() for name, tensor in tensors.items()})
        loss = (model(tensors["x"]) - tensors["y"]).square().mean() * scale
        loss.backward()
        return (loss.detach(),)

    told = []
    graphs = Graphs(
        function or forward_backward, list(model.parameters()), recorder or HostRecorder(), tell=told.append, **more
    )
    return model, graphs, seen, told, forward_backward


def batch(seed, rows=4, device="cpu"):
    draw = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(rows, 6, generator=draw).to(device), "y": torch.randn(rows, 1, generator=draw).to(device)}


def train(model, step, steps=12, accumulation=2, device="cpu"):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for i in range(steps):
        for micro in range(accumulation):
            losses.append(float(step(batch(100 * i + micro, device=device))))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def check_same_training(device, recorder):
    model, _, _, _, function = setup(device)
    plain = train(model, lambda b: function(b, 0.5)[0], device=device)
    model, graphs, _, told, _ = setup(device, recorder)
    assert train(model, lambda b: graphs(b, 0.5)[0], device=device) == pytest.approx(plain, rel=1e-6)
    assert not told
    assert graphs.recorded == 1
    assert graphs.replays == 24 - WARM - 1


def test_a_training_is_the_same_with_replays():
    check_same_training("cpu", HostRecorder())


@pytest.mark.cuda
def test_a_training_is_the_same_with_replays_on_a_gpu():
    device = torch.device("cuda")
    check_same_training(device, CudaRecorder(device))


def test_every_replay_works_on_the_same_memory():
    model, graphs, seen, _, _ = setup()
    parameters = list(model.parameters())
    places = set()
    for i in range(WARM + 4):
        graphs(batch(i), 1.0)
        places.add(tuple(p.grad.data_ptr() for p in parameters))
        for p in parameters:
            p.grad = None
    assert len(places) == 1
    assert len({tuple(sorted(s.items())) for s in seen[-3:]}) == 1
    first, second = (graphs(batch(9), 1.0)[0] for _ in range(2))
    assert first.data_ptr() != second.data_ptr()  # what is handed out is the caller's own


def test_gradients_begin_at_zero_and_add_up():
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    held = Accumulators([p, q])
    held.attach()
    (2 * p.sum() + q.sum()).backward()
    held.attach()
    (p.sum()).backward()
    assert held.flat[0].tolist() == [3, 3, 3, 1, 1]
    p.grad = None  # dropped by hand, as a step that is not finite is
    held.attach()
    assert held.flat[0].tolist() == [0, 0, 0, 1, 1]
    p.grad, q.grad = None, torch.full((2,), 7.0)  # made elsewhere
    held.attach()
    assert held.flat[0].tolist() == [0, 0, 0, 7, 7]
    p.grad = q.grad = None
    held.attach()
    assert not held.flat[0].any()


def test_shapes_and_constants_have_a_graph_each_up_to_a_limit():
    _, graphs, _, _, _ = setup()
    for i in range(WARM + 2):
        graphs(batch(i, rows=4), 1.0)
        graphs(batch(i, rows=5), 1.0)
        graphs(batch(i, rows=5), 2.0)
    assert graphs.recorded == 3
    for rows in range(1, MOST + 4):
        for i in range(WARM + 1):
            graphs(batch(i, rows=10 + rows), 1.0)
    assert graphs.recorded == MOST


def test_what_a_graph_gets_wrong_is_called_from_then_on():
    calls = []

    def stale(tensors, _):  # reads the batch on the host, so a graph would repeat the first
        calls.append(float(tensors["x"].sum()))
        p = graphs.gradients.parameters[0]
        loss = (p * calls[0 if len(calls) > WARM + 1 else -1]).sum()
        loss.backward()
        return (loss.detach(),)

    _, graphs, _, told, _ = setup(function=stale)
    for i in range(WARM + 3):
        loss = graphs(batch(i), None)[0]
    assert "another result" in told[0]
    assert len(told) == 1
    assert graphs.recorded == graphs.replays == 0
    assert torch.isfinite(loss)


def test_gradients_of_a_refused_recording_are_those_of_the_call():
    class Refuses(HostRecorder):
        def record(self, call, like):
            call()
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model, graphs, _, told, function = setup(recorder=Refuses())
    for i in range(WARM + 1):
        graphs(batch(i), 1.0)
    mine = [p.grad.clone() for p in model.parameters()]
    assert told == ["operation not permitted when stream is capturing"]
    for p in model.parameters():
        p.grad = None
    for i in range(WARM + 1):
        function(batch(i), 1.0)
    for got, p in zip(mine, model.parameters(), strict=True):
        assert torch.allclose(got, p.grad, rtol=1e-5)


def test_weights_that_moved_are_recorded_anew():
    model, graphs, _, _, _ = setup()
    for i in range(WARM + 2):
        graphs(batch(i), 1.0)
    assert graphs.recorded == 1
    first = next(model.parameters())
    first.data = first.data.clone()
    graphs(batch(0), 1.0)
    assert graphs.recorded == 0


def test_what_is_worked_on_is_held():
    held = object()
    _, graphs, _, _, _ = setup(hold=lambda: held)
    for i in range(WARM + 1):
        graphs(batch(i), 1.0)
    assert next(iter(graphs._shapes.values())).held is held

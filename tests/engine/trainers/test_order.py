"""The order of rows depends on the seed and on nothing else."""

from __future__ import annotations

from itertools import chain

from finetui.engine.trainers.order import Order


def steps_of(orders: list[Order]) -> list[list[int]]:
    """The rows of each optimiser step over all ranks, sorted."""
    per_rank = [list(order) for order in orders]
    accumulation = orders[0].accumulation
    return [
        sorted(
            chain.from_iterable(rows for rank in per_rank for rows in rank[k * accumulation : (k + 1) * accumulation])
        )
        for k in range(orders[0].steps)
    ]


def test_each_pass_holds_each_row_once() -> None:
    order = Order(rows=10, steps=6, micro_batch=5, accumulation=1, seed=3)
    rows = list(chain.from_iterable(order))
    for start in (0, 10, 20):
        assert sorted(rows[start : start + 10]) == list(range(10))
    assert rows[:10] != rows[10:20]


def test_passes_join_where_the_batch_does_not_divide_the_rows() -> None:
    rows = list(chain.from_iterable(Order(rows=7, steps=4, micro_batch=2, accumulation=2, seed=0)))
    assert len(rows) == 16
    assert sorted(rows[:7]) == sorted(rows[7:14]) == list(range(7))


def test_a_step_has_the_same_rows_however_it_is_cut() -> None:
    one = [Order(rows=23, steps=9, micro_batch=8, accumulation=1, seed=1)]
    accumulated = [Order(rows=23, steps=9, micro_batch=2, accumulation=4, seed=1)]
    two_ranks = [Order(rows=23, steps=9, micro_batch=2, accumulation=2, rank=r, world=2, seed=1) for r in (0, 1)]
    assert steps_of(one) == steps_of(accumulated) == steps_of(two_ranks)


def test_seeds_differ() -> None:
    first, second = (list(Order(rows=50, steps=1, micro_batch=50, accumulation=1, seed=s)) for s in (0, 1))
    assert first != second


def test_more_steps_go_on_where_fewer_ended() -> None:
    short, long = (list(Order(rows=9, steps=n, micro_batch=2, accumulation=2, seed=5)) for n in (3, 7))
    assert long[: len(short)] == short
    assert len(long) == 14


def test_rows_of_like_length_share_a_micro_batch_and_steps_stay_as_they_are() -> None:
    lengths = [(7 * i) % 41 for i in range(40)]
    plain = Order(rows=40, steps=5, micro_batch=2, accumulation=4, seed=1)
    ranks = [
        Order(rows=40, steps=5, micro_batch=2, accumulation=2, rank=r, world=2, seed=1, lengths=lengths) for r in (0, 1)
    ]
    one = list(Order(rows=40, steps=5, micro_batch=2, accumulation=4, seed=1, lengths=lengths))
    batches = list(plain)
    for step in range(5):
        wanted = sorted(row for batch in batches[4 * step : 4 * step + 4] for row in batch)
        mine = one[4 * step : 4 * step + 4]
        assert sorted(row for batch in mine for row in batch) == wanted
        flat = [lengths[row] for batch in mine for row in batch]
        assert flat == sorted(flat, reverse=True)
        shared = [batch for micro in range(2) for batch in (list(rank)[2 * step + micro] for rank in ranks)]
        assert shared == mine
    padding = [sum(max(lengths[r] for r in b) * len(b) for b in order) for order in (batches, one)]
    assert padding[1] < 0.9 * padding[0]

"""Passes of different lengths on one bar."""

from hypothesis import given
from hypothesis import strategies as st

from melayer.runs.progress import Bar


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 7)), min_size=1, max_size=6))
def test_it_never_goes_back_and_ends_at_the_total(passes):
    calls = []
    total = sum(tokens for tokens, _ in passes)
    bar = Bar(lambda *given: calls.append(given), total)
    for tokens, steps in passes:
        report = bar.part(tokens)
        for step in range(steps + 1):
            report(step, steps)
    done = [first for first, _ in calls]
    assert done == sorted(done)
    assert calls[-1] == (total, total)


def test_an_empty_pass_and_no_bar():
    calls = []
    Bar(lambda *given: calls.append(given), 5).part(0)(0, 0)
    assert calls == [(0, 5)]
    assert Bar(None, 5).part(3) is None

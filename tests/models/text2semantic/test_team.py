"""Threads that go through a compiled function together."""

import os
import threading

import numpy as np
import pytest
from numba import njit

from fish_speech.models.text2semantic.decode.cpu_kernels import barrier, partition
from fish_speech.models.text2semantic.decode.thread_team import Team, team_for


@njit(nogil=True)
def sums(place, size, sync, values, parts, total):
    """The sum of values again and again, each time from what all threads made of their parts."""
    for turn in range(len(total)):
        begin, end = partition(len(values), (place, size))
        parts[place] = values[begin:end].sum() + turn
        barrier(sync, size)
        if place == turn % size:
            total[turn] = parts.sum()
        barrier(sync, size)


def totals(team, values, turns=200):
    total = np.zeros(turns, np.int64)
    team.run(sums, values, np.zeros(team.size, np.int64), total)
    return total.tolist()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_what_one_wrote_before_they_met_all_read_after(size):
    team, values = Team(size), np.arange(101)
    for _ in range(20):
        assert totals(team, values) == [5050 + size * turn for turn in range(200)]


@pytest.mark.parametrize("count", [0, 1, 7, 64])
def test_shares_are_all_of_it_and_alike(count):
    shares = [partition(count, (place, 5)) for place in range(5)]
    assert [i for begin, end in shares for i in range(begin, end)] == list(range(count))
    assert max(e - b for b, e in shares) - min(e - b for b, e in shares) <= 1


def test_an_interrupted_call_leaves_nobody_waiting_and_the_next_one_works():
    team = Team(3)
    totals(team, np.arange(101), 1)

    class Stop(BaseException):
        pass

    def interrupted(place, *args):
        if place == 0:
            raise Stop
        sums(place, *args)  # waits for the first

    with pytest.raises(Stop):
        team.run(interrupted, np.arange(101), np.zeros(3, np.int64), np.zeros(1, np.int64))
    assert totals(team, np.arange(101)) == [5050 + 3 * turn for turn in range(200)]


def test_a_thread_that_fails_is_noticed_and_the_next_call_works():
    team = Team(2)

    def fails(place, *args):
        if place == 1:
            raise MemoryError
        sums(place, *args)

    with pytest.raises(MemoryError):
        team.run(fails, np.arange(101), np.zeros(2, np.int64), np.zeros(1, np.int64))
    assert totals(team, np.arange(101)) == [5050 + 2 * turn for turn in range(200)]


def test_callers_take_turns():
    team, made = Team(2), []
    callers = [
        threading.Thread(target=lambda: made.append(totals(team, np.arange(101)))) for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert made == 4 * [[5050 + 2 * turn for turn in range(200)]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    totals(team_for(1 << 30), np.arange(101))
    if (child := os.fork()) == 0:
        wrong = totals(team_for(1 << 30), np.arange(101), 3)[0] != 5050
        os._exit(wrong)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

"""How passes shrink when memory is short, and grow again."""

from loramill.worker.pressure import ATTEMPTS, RECOVERY_PASSES, Pressure


def limits(pressure: Pressure) -> tuple[int, int]:
    return pressure.max_num_seqs, pressure.max_num_batched_tokens


def test_what_ran_out_is_halved_down_to_one_row() -> None:
    pressure = Pressure(64, 8192)
    assert pressure.ran_out(range(10), 1000) is None
    assert limits(pressure) == (5, 500)
    assert pressure.ran_out(range(5), 5) is None
    assert limits(pressure) == (2, 2)
    pressure.ran_out(range(2), 2)
    assert limits(pressure) == (1, 1)
    pressure.ran_out([7], 1)
    assert limits(pressure) == (1, 1)


def test_a_row_is_given_up_after_some_times_alone_and_the_others_get_their_room_back() -> None:
    pressure = Pressure(64, 8192)
    pressure.ran_out([1, 2], 100)
    assert [pressure.ran_out([1], 100) for _ in range(ATTEMPTS)] == [None] * (ATTEMPTS - 1) + [1]
    assert limits(pressure) == (64, 8192)


def test_only_times_alone_count_and_only_in_a_row() -> None:
    pressure = Pressure(64, 8192)
    for keys in ([1], [1], [2], [1], [1], [1, 2], [1], [1]):
        assert pressure.ran_out(keys, 9) is None
    assert pressure.ran_out([1], 9) == 1


def test_more_is_tried_again_after_a_while() -> None:
    pressure = Pressure(64, 100)
    pressure.ran_out(range(20), 40)
    sizes = []
    for _ in range(4 * RECOVERY_PASSES):
        pressure.went_well()
        sizes.append(limits(pressure))
    assert sizes[RECOVERY_PASSES - 2] == (10, 20)
    assert sizes[RECOVERY_PASSES - 1] == (20, 40)
    assert sizes[-1] == (64, 100)

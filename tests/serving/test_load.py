from tests.serving.load import measure


def test_under_load_no_answer_is_lost_or_swapped_and_nothing_passes_without_a_verdict() -> None:
    report = measure(clients=20, seconds=3, fronts=2)
    assert (report.errors, report.lost, report.swapped, report.unscanned_bytes) == ({}, 0, 0, 0)
    assert report.answers > 20
    assert report.per_second > report.per_second_one_at_a_time

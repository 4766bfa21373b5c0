"""The benchmarks that run whole programs, as short as they can be."""

import pytest


pytestmark = pytest.mark.slow


def test_end_to_end_reaches_the_same_accuracy_every_way(run_benchmark):
    import end_to_end

    rows = run_benchmark(end_to_end, "--epochs", "1")
    assert len({row[-1] for row in rows}) == 1


def test_side_by_side(monkeypatch, run_benchmark):
    import side_by_side

    monkeypatch.setenv("EPOCHS", "1")
    rows = run_benchmark(side_by_side, "--repeats", "1")
    assert [row[0] for row in rows] == list(side_by_side.PROGRAMS.values())
    lines, bytes_saved = ([int(row[column].replace(",", "")) for row in rows] for column in (1, 3))
    assert lines[-1] < min(lines[:-1])
    assert all(0 < size < 10_000 for size in bytes_saved)


def test_leaks(run_benchmark):
    import leaks

    rows = run_benchmark(leaks, "--cycles", "2", "--forwards", "4", "--trainings", "1")
    assert [row[1] for row in rows] == ["1", "2", "1", "2", "3", "4", "1"]


def test_serve_load_finds_every_answer_right(run_benchmark):
    pytest.importorskip("uvicorn")
    import serve_load

    rows = run_benchmark(serve_load, "--requests", "60", "--threads", "4")
    kinds = [row for row in rows if row[0] in serve_load.KINDS]
    assert kinds and all(row[1] == row[2] for row in kinds)

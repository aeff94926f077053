"""The limit of requests a minute: over threads, over processes, over a restart, and in any minute."""

import contextlib
import multiprocessing
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.errors import ConfigurationError
from lightning_modules.rewards import rate_limit
from lightning_modules.rewards.rate_limit import RateLimiter
from tests.clock import Clock

SHORT_S = 0.4


def keeps_to(limit: int, moments: list[float], window_s: float) -> bool:
    """Whether no window has more moments than the limit."""
    moments = sorted(moments)
    return all(later - earlier >= window_s for earlier, later in zip(moments, moments[limit:], strict=False))


def take(count: int, path: Path, moments: "multiprocessing.Queue[float]") -> None:
    """What a process does: take turns, and say when it got them."""
    rate_limit.limits_file = lambda: path  # type: ignore[assignment]
    rate_limit.WINDOW_S = SHORT_S
    limiter = RateLimiter(5, "source")
    for _ in range(count):
        limiter.wait()
        moments.put(time.time())


def test_no_window_has_more_turns_than_the_limit_over_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "WINDOW_S", SHORT_S)
    limiter = RateLimiter(7, "source")

    def turn(_: int) -> float:
        limiter.wait()
        return time.time()

    started = time.time()
    with ThreadPoolExecutor(16) as pool:
        moments = list(pool.map(turn, range(30)))
    assert keeps_to(7, moments, 0.9 * SHORT_S)
    assert not keeps_to(6, moments, 0.9 * SHORT_S)
    assert time.time() - started < 4 * SHORT_S + 1.0, "30 turns of 7 a window fit in five windows"


def test_two_processes_share_the_limit(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    moments: multiprocessing.Queue[float] = context.Queue()
    processes = [context.Process(target=take, args=(8, tmp_path / "shared.sqlite", moments)) for _ in range(2)]
    for process in processes:
        process.start()
    got = [moments.get(timeout=30) for _ in range(16)]
    for process in processes:
        process.join(30)
    assert keeps_to(5, got, 0.9 * SHORT_S)


def test_what_was_sent_before_a_restart_counts(clock: Clock) -> None:
    RateLimiter(2, "source").wait()
    RateLimiter(2, "source").wait()
    assert RateLimiter(2, "source").wait(give_up_at=clock.now + 1.0) is False
    assert clock.sleeps == []
    assert RateLimiter(2, "source").wait()
    assert clock.now == 1000.0 + rate_limit.WINDOW_S


def test_sources_have_limits_of_their_own(clock: Clock) -> None:
    for source in ("one", "two", "three"):
        RateLimiter(1, source).wait()
    assert clock.sleeps == []


def test_a_share_of_one_a_minute_waits_as_much_longer(clock: Clock) -> None:
    limiter = RateLimiter(0.5, "source")
    limiter.wait()
    limiter.wait()
    assert clock.now == pytest.approx(1000.0 + 2 * rate_limit.WINDOW_S)


def test_shares_of_a_limit_add_up_to_no_more_than_it(clock: Clock) -> None:
    """A third of 40 a minute is 13 in any minute."""
    limiter = RateLimiter(40 / 3, "source")
    moments = []
    for _ in range(40):
        limiter.wait()
        moments.append(clock.now)
    assert keeps_to(13, moments, 60.0)
    assert not keeps_to(12, moments, 60.0)


def test_a_machine_that_was_started_anew_does_not_block(clock: Clock) -> None:
    limiter = RateLimiter(1, "source")
    clock.now += 1e6
    limiter.wait()
    clock.now -= 1e6
    limiter.wait()
    assert clock.sleeps == []


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_clock_that_is_set_frees_no_turn(hours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert RateLimiter(1, "source").wait(give_up_at=0.0)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600 * hours)
    assert not RateLimiter(1, "source").wait(give_up_at=0.0)


def test_the_folder_is_its_user_s_alone(tmp_path: Path) -> None:
    path = rate_limit.limits_file()
    RateLimiter(1, "source").wait()
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    path.parent.chmod(0o777)
    with pytest.raises(
        ConfigurationError, match="is not this user's alone, so requests are not counted in it; set TMP"
    ):
        RateLimiter(1, "source").wait()
    path.unlink()
    path.parent.rmdir()
    (tmp_path / "mine").mkdir(mode=0o700)
    path.parent.symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigurationError, match="is not this user's alone"):
        RateLimiter(1, "source").wait()
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_planted_link_is_not_followed_and_a_damaged_file_replaced(tmp_path: Path) -> None:
    path, other = rate_limit.limits_file(), tmp_path / "other.sqlite"
    other.write_bytes(b"")
    path.symlink_to(other)
    with pytest.raises(ConfigurationError, match="requests cannot be counted in"):
        RateLimiter(1, "source").wait()
    assert other.read_bytes() == b""
    path.unlink()
    for damage in (b"no database" * 500, None):
        if damage is None:  # one of another program
            path.unlink()
            with contextlib.closing(sqlite3.connect(path)) as file:
                file.execute("CREATE TABLE requests (id INTEGER)")
        else:
            path.write_bytes(damage)
        assert RateLimiter(1, "source").wait(give_up_at=0.0)
        assert not RateLimiter(1, "source").wait(give_up_at=0.0)


def test_no_limit_never_waits_and_leaves_no_file(clock: Clock) -> None:
    limiter = RateLimiter(0, "source")
    assert all(limiter.wait() for _ in range(100))
    assert clock.sleeps == []
    assert not rate_limit.limits_file().exists()


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="requests_per_minute must not be negative, got -1"):
        RateLimiter(-1, "source")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    ticking = Clock()
    monkeypatch.setattr(rate_limit, "time", ticking)
    return ticking

"""macmon's samples in the forms of its versions; everything else is unknown."""

from contextlib import nullcontext
from unittest.mock import Mock

import pytest

from protocol.config import ThermalConfig
from supervisor.thermal import Reading, Thermometer, parse

#: Of `macmon pipe`, as its documentation shows it: an idle GPU, and the later names.
IDLE = b"""{"timestamp": "2025-02-24T20:38:15+00:00", "temp": {"cpu_temp_avg": 43.73614, "gpu_temp_avg": 36.95167},
 "memory": {"ram_total": 25769803776, "ram_usage": 20985479168}, "ecpu_usage": [1181, 0.082656614],
 "pcpu_usage": [1974, 0.015181795], "gpu_usage": [461, 0.021497859], "cpu_power": 0.20486385,
 "gpu_power": 0.017451683, "ane_power": 0.0, "all_power": 0.22231553}""".replace(b"\n", b"")
NAMED = b'{"gpu_freq_mhz": 700, "gpu_active_ratio": 0.95, "gpu_usage": [1, 0.1], "temp": {"gpu_temp_avg": 99.5}}'


def test_a_sample_is_read() -> None:
    reading = parse(IDLE)
    assert reading is not None
    assert (reading.gpu_freq_mhz, reading.gpu_temp_c, reading.cpu_power_w) == (461, 36.95167, 0.20486385)
    assert reading.gpu_usage == pytest.approx(0.0215, abs=1e-4)


def test_later_names_come_first() -> None:
    assert parse(NAMED) == Reading(700, 0.95, 99.5, None, None)


def test_an_idle_gpu_is_slow_because_it_may_be() -> None:
    reading = parse(IDLE)
    assert reading is not None
    assert not reading.throttled(ThermalConfig())


@pytest.mark.parametrize(
    ("mhz", "usage", "throttled"),
    [(999, 0.81, True), (1000, 0.99, False), (500, 0.8, False), (None, 0.9, False), (500, None, False)],
)
def test_slow_while_busy_is_throttled(mhz: float | None, usage: float | None, throttled: bool) -> None:
    assert Reading(gpu_freq_mhz=mhz, gpu_usage=usage).throttled(ThermalConfig()) is throttled


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"macmon 0.8.0",
        b"[1, 2]",
        b"{}",
        b'{"gpu_usage": "fast"}',
        b'{"gpu_usage": [true, null], "temp": []}',
        b'{"gpu_usage": [-1, 1e300]}',
        b"\xff\xfe",
        b"[" * 5000,
    ],
)
def test_nonsense_is_unknown(line: bytes) -> None:
    assert parse(line) is None


def test_the_end_of_a_throttling_is_told_also_when_samples_were_missing_in_between() -> None:
    journal = Mock()
    thermometer = Thermometer(ThermalConfig(), journal, lambda _: nullcontext(), lambda: None)
    hot, cool = Reading(gpu_freq_mhz=300, gpu_usage=0.9), Reading(gpu_freq_mhz=1400, gpu_usage=0.9)
    for reading in (cool, hot, None, hot, None, cool, cool):
        thermometer._note(reading)
    assert [call.args[0] for call in journal.write.call_args_list] == ["thermal_throttled", "thermal_nominal"]

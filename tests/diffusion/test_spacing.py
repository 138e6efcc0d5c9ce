import itertools
import math

import diffusers
import pytest

from pipeline.diffusion.schedule import Schedule, make_schedule
from pipeline.diffusion.spacing import timesteps

T = 1000
SCHEDULE = Schedule.linear(T)


@pytest.mark.parametrize("spacing", ["uniform", "quadratic", "trailing", "leading", "karras", "logsnr"])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_timesteps_descend_without_repeats_in_the_requested_number(name, spacing):
    for total in (1, 2, 7, 100, 1000) if name == "cosine" else (21, 100, 1000):
        schedule = make_schedule(name, total)
        for steps in {1, 2, 3, total // 3, total // 2, total - 1, total} & set(range(1, total + 1)):
            visited = timesteps(schedule, steps, spacing)
            assert len(visited) == steps
            assert all(a > b for a, b in itertools.pairwise(visited))
            assert 0 <= visited[-1] <= visited[0] <= total - 1
            if spacing in ("karras", "logsnr") and steps > 1:
                assert visited[0] == max(nearest_to_80(schedule), steps - 1)
            elif spacing != "leading":
                assert visited[0] == total - 1
            if spacing != "trailing" and steps > 1:
                assert visited[-1] == 0
        assert timesteps(schedule, total, spacing) == list(reversed(range(total)))


def nearest_to_80(schedule):
    """The timestep whose σ is nearest to 80, by its logarithm; the last one if there is not so much noise."""
    log_sigma = (1 / schedule.alphas_cumprod - 1).log() / 2
    return int((log_sigma - math.log(80)).abs().argmin())


def test_spacings_are_those_of_diffusers_and_of_the_ddim_paper():
    for ours, theirs in (("uniform", "linspace"), ("leading", "leading"), ("trailing", "trailing")):
        for steps in (3, 10, 77, 250):
            scheduler = diffusers.DDIMScheduler(timestep_spacing=theirs)
            scheduler.set_timesteps(steps)
            assert timesteps(SCHEDULE, steps, ours) == scheduler.timesteps.tolist()
    assert timesteps(SCHEDULE, 4, "quadratic") == [999, 444, 111, 0]


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match="steps cannot be taken among 1000"):
        timesteps(SCHEDULE, steps, "uniform")

import pytest
import torch

from pipeline.diffusion.schedule import Schedule, make_schedule
from pipeline.errors import ConfigError

T = 1000
SCHEDULES = ["linear", "cosine"]


def test_linear_runs_from_the_papers_first_beta_to_its_last():
    betas = Schedule.linear(T).betas
    assert betas.dtype == torch.float64
    torch.testing.assert_close(betas[[0, -1]], torch.tensor([1e-4, 0.02], dtype=torch.float64), rtol=1e-14, atol=0)
    torch.testing.assert_close(betas.diff(), torch.full((T - 1,), 0.0199 / 999, dtype=torch.float64))


def test_linear_ends_equally_noisy_for_any_number_of_timesteps():
    ends = [Schedule.linear(timesteps).alphas_cumprod[-1].log().item() for timesteps in (100, 1000, 4000)]
    assert max(ends) - min(ends) < 1.2  # ∫β is the same; -10 for T = 1000


def test_linear_with_too_few_timesteps_is_refused():
    with pytest.raises(ConfigError, match=r"diffusion.timesteps: 20 is too few .* at least 21, or cosine"):
        Schedule.linear(20)
    assert Schedule.linear(21).betas.max() < 1


def test_cosine_is_a_squared_cosine_until_its_betas_are_clipped():
    schedule = Schedule.cosine(T)
    edges = (torch.arange(1, T, dtype=torch.float64) / T + 0.008) / 1.008
    start = (1 + torch.cos(torch.tensor(0.008 / 1.008 * torch.pi, dtype=torch.float64))) / 2
    closed = (1 + torch.cos(edges * torch.pi)) / 2 / start
    torch.testing.assert_close(schedule.alphas_cumprod[:-1], closed, rtol=1e-9, atol=0)
    assert schedule.betas[-1] == 0.999


def test_respaced_betas_compose_the_skipped_steps():
    full = Schedule.linear(T)
    visited = [0, 10, 500, 999]
    chain = full.respaced(visited)
    torch.testing.assert_close(chain.alphas_cumprod, full.alphas_cumprod[visited], rtol=0, atol=0)
    skipped = (1 - full.betas[11:501]).prod()
    torch.testing.assert_close(chain.betas[2], 1 - skipped, rtol=1e-12, atol=0)
    torch.testing.assert_close(full.respaced(range(T)).betas, full.betas, rtol=1e-10, atol=0)


@pytest.mark.parametrize("shift", [-4.0, -1.39, 0.5, 3.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_shift_adds_to_the_log_snr_of_every_timestep(name, shift):
    plain, shifted = make_schedule(name, T), make_schedule(name, T, log_snr_shift=shift)
    torch.testing.assert_close(shifted.log_snr, plain.log_snr + shift, rtol=0, atol=1e-9)
    check(shifted)


@pytest.mark.parametrize("shift", [0.0, -1.39, 2.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_ends_at_the_lowest_log_snr_or_where_it_ended_before(name, shift):
    plain = make_schedule(name, T, log_snr_shift=shift)
    for lowest in (-6.0, -7.5, -9.0, -15.0):
        ended = make_schedule(name, T, log_snr_shift=shift, log_snr_min=lowest)
        assert len(ended) == T
        check(ended)
        if plain.log_snr[-1] >= lowest:
            assert all(torch.equal(a, b) for a, b in zip(tables(ended), tables(plain)))
        else:
            assert ended.log_snr[-1].item() == pytest.approx(lowest, abs=1e-6)
            assert (ended.log_snr > plain.log_snr)[1:].all()  # less noise everywhere, for it is stretched, not cut


def test_an_end_above_all_timesteps_is_refused():
    with pytest.raises(ConfigError, match=r"diffusion\.log_snr_min: -6\.0 is above all timesteps .*: lower it"):
        make_schedule("linear", T, log_snr_shift=-20.0, log_snr_min=-6.0)


def tables(schedule):
    return schedule.betas, schedule.alphas_cumprod, schedule.alphas_cumprod_prev


def check(schedule):
    """The tables belong together, and each timestep has more noise than the one before."""
    betas, bars, before = tables(schedule)
    assert {table.dtype for table in tables(schedule)} == {torch.float64}
    assert betas.min() > 0 and betas.max() < 1
    assert (bars.diff() < 0).all() and bars[0] < 1
    torch.testing.assert_close((1 - betas).cumprod(0), bars, rtol=1e-9, atol=0)
    assert before[0] == 1 and torch.equal(before[1:], bars[:-1])

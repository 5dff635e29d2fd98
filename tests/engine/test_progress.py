"""Bars: time left without what an earlier run did, and the share that other processes read."""

import pytest
import torch

from difflt_core.engine.progress import Context, bar, catch_up, read_share


def test_time_left_is_of_what_this_run_does(monkeypatch):
    monkeypatch.setenv("DIFFLT_PAPERMILL", "1")
    with bar(100, "stages", "%") as progress:
        catch_up(progress, 80)
        progress.start_t -= 60
        progress.update(5)
        shown = progress.format_dict
        assert (shown["n"], shown["initial"]) == (85, 80) and shown["rate"] is None  # the mean's
        assert "85%" in str(progress) and "<03:00]" in str(progress)  # 5 took a minute, 15 are left


def test_a_bar_that_nobody_sees_counts_too():
    with bar(100, "stages", "%", context=Context(progress=False)) as progress:
        catch_up(progress, 30)
        assert progress.n == 30


def test_a_machine_without_a_gpu_measures_on_its_cpu(monkeypatch):
    """Its cluster's workers have some."""
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert Context("cuda").device_here == ("cuda" if there else "cpu")
        assert Context("cpu").device_here == "cpu"


@pytest.mark.parametrize("initial, share", [(90, 0.1), (95, 0.6)])
def test_the_share_of_a_second_part_leaves_out_the_first(tmp_path, initial, share):
    context = Context(progress=False, share_file=tmp_path / "share")
    with bar(100, "generator", initial=initial, context=context, before=90) as progress:
        progress.update()
    assert read_share(context.share_file) == pytest.approx((share, share - 0.1))

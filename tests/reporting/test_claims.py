"""The claims of the papers: effects by hand, verdicts by the interval, nothing typed."""

import json
import shutil

import pandas as pd
import pytest

from difflt_core.engine.files import file_sha256
from difflt_core.reporting.claims import CLAIMS, judge, judge_all, side_by_side, write_claims
from difflt_core.reporting.items import AS_LONG_AS_SAU, AT_SAUS_RATES, SAME_IMAGES

CLAIM = {claim.text: claim for claim in CLAIMS}
OVERALL = CLAIM["DiffuLT is ahead of cross-entropy, overall"]


def _table07(folder, diffult, cross_entropy, bsce=(50, 50, 50)):
    methods = {"DiffuLT": diffult, "cross-entropy": cross_entropy, "BSCE": bsce}
    rows = [
        {"r": r, "method": m, "seed": s, "overall": v + r, "many": v, "medium": v, "few": v}
        for r in (50, 10)
        for m, values in methods.items()
        for s, v in enumerate(values)
        if r == 50 or s == 0
    ]
    pd.DataFrame(rows).to_csv(folder / "table07.csv", index=False)


@pytest.mark.parametrize(
    "ours, theirs, effect, verdict",
    [
        ((60, 61, 62), (50, 51, 52.5), 9.83, "supported"),
        ((50, 51, 52.5), (60, 61, 62), -9.83, "contradicted"),
        ((60, 40, 62), (50, 51, 52), 3.0, "undecided"),
        ((60,), (50,), 10.0, "undecided"),  # one seed decides nothing
    ],
)
def test_a_verdict_is_the_intervals(tmp_path, ours, theirs, effect, verdict):
    _table07(tmp_path, ours, theirs)
    found = judge(OVERALL, tmp_path)
    assert found["effect"] == pytest.approx(effect, abs=0.01)
    assert (found["verdict"], found["seeds"]) == (verdict, len(ours))
    assert found["paper"] == pytest.approx(13.2)


def test_what_was_not_run_is_not_measured(tmp_path):
    rows = [(v, s, 60 - s) for v in ("DiffuLT", "cross-entropy, equal updates") for s in range(3)]
    frame = pd.DataFrame(rows, columns=["variant", "seed", "overall"])
    frame.to_csv(tmp_path / "table07_lengths.csv", index=False)  # without BSCE
    _table07(tmp_path, (60, 61, 62), (50, 51, 52.5))
    found = judge_all(tmp_path).set_index("claim")["verdict"]
    measured = {c.text for c in CLAIMS if c.item == "table07"}
    assert len(measured) == 3 and set(found[found != "not measured"].index) == measured


@pytest.mark.parametrize(
    "harm",
    ["", '"cut', "method,se", "method,seed,overall\nDiffuLT,0,x\ncross-entropy,0,50\n"],
)
def test_a_damaged_table_is_named(tmp_path, harm):
    (tmp_path / "table07.csv").write_text(harm)
    with pytest.raises(OSError, match="table07.csv is damaged .* restore it"):
        judge(OVERALL, tmp_path)


@pytest.mark.parametrize("harm", ["<<<<<<< HEAD", "[1]", '{"changed": 1}', ""])
def test_a_damaged_record_of_a_table_is_named(tmp_path, harm):
    """It costs the page, not the run that would write it (reporting/runner)."""
    _table07(tmp_path, (60, 61, 62), (50, 51, 52.5))
    (tmp_path / "table07.json").write_text(harm)
    with pytest.raises(OSError, match="table07.json is damaged .* restore it"):
        write_claims(tmp_path, "demo")


@pytest.mark.parametrize("own", ["pos_neg", "drop"])
def test_the_branches_of_sau_are_judged_with_the_profiles_own_strategy(tmp_path, own):
    """The first row of table15, whichever it is."""
    accuracy = {f"both branches, {own}": 60.0, "both branches, trust": 10.0}
    accuracy |= {"unaware branch only": 58.0, "aware branch only": 50.0}
    frame = pd.DataFrame(accuracy.items(), columns=["variant", "overall"]).assign(seed=0, r=50)
    frame.to_csv(tmp_path / "table15.csv", index=False)
    effects = {
        branch: judge(CLAIM[f"SAU's synthetic-{branch} branch adds to the other"], tmp_path)[
            "effect"
        ]
        for branch in ("aware", "unaware")
    }
    assert effects == {"aware": 2.0, "unaware": 10.0}


def test_bsce_is_measured_for_as_many_updates(tmp_path):
    values = {"DiffuLT": 60.0, "BSCE, equal updates": 57.0, "BSCE, equal epochs": 50.0}
    frame = pd.DataFrame(values.items(), columns=["variant", "overall"]).assign(seed=0)
    frame.to_csv(tmp_path / "table07_lengths.csv", index=False)
    claim = CLAIM["DiffuLT is ahead of BSCE, a loss for long tails, for as many updates, overall"]
    assert judge(claim, tmp_path)["effect"] == 3.0


def test_a_lower_fid_with_a_higher_accuracy_speaks_for_the_claim(tmp_path):
    claim = CLAIM["A generator of lower FID gives a better classifier"]
    points = [("DDPM", 9, 40), ("CBDM tau=3", 8, 45), ("CBDM tau=2", 7, 50), ("CBDM tau=1", 6, 55)]
    others = [("cross-entropy", None, 30), ("DDPM, 1/8 of the steps", 30, 90)]  # not the paper's
    rows = [(m, s, f, v) for s in (0, 1) for m, f, v in points + others]
    frame = pd.DataFrame(rows, columns=["model", "seed", "FID", "accuracy"])
    frame.to_csv(tmp_path / "table01.csv", index=False)
    found = judge(claim, tmp_path)
    assert found["effect"] == pytest.approx(0.999)
    assert found["paper"] == pytest.approx(0.948, abs=1e-3)
    frame.loc[frame["seed"] == 1, "accuracy"] = [50, 45, 44, 43, 30, 90]
    frame.to_csv(tmp_path / "table01.csv", index=False)
    found = judge(claim, tmp_path)
    assert found["verdict"] == "undecided" and -1 <= found["low"] < found["high"] <= 1
    frame[frame["model"] != "CBDM tau=2"].to_csv(tmp_path / "table01.csv", index=False)
    assert judge(claim, tmp_path)["verdict"] == "not measured"  # one of the four is missing


def test_the_largest_ratio_decides_wherever_it_stands(tmp_path):
    _table07(tmp_path, (60, 61, 62), (50, 51, 52.5))
    rows = pd.read_csv(tmp_path / "table07.csv")
    rows.sort_values("r", kind="stable").to_csv(tmp_path / "table07.csv", index=False)
    assert judge(OVERALL, tmp_path)["seeds"] == 3


def test_a_larger_ratio_of_one_seed_decides_nothing(tmp_path):
    _table07(tmp_path, (60, 61, 62), (50, 51, 52.5))
    rows = pd.read_csv(tmp_path / "table07.csv")
    pd.concat([rows, rows[rows["seed"] == 0].assign(r=500)]).to_csv(tmp_path / "table07.csv")
    assert judge(OVERALL, tmp_path)["seeds"] == 3


def test_ood_images_that_lower_the_accuracy_speak_for_the_claim(tmp_path):
    rows = [("OOD", s, -1.0 - s / 10) for s in range(3)] + [("AID", 0, 2.0), ("ID", 0, 1.5)]
    frame = pd.DataFrame(rows, columns=["added", "seed", "gain per 1,000 samples"])
    frame.to_csv(tmp_path / "table03.csv", index=False)
    found = judge(CLAIM["OOD images harm"], tmp_path)
    assert found["effect"] == pytest.approx(1.1) and found["verdict"] == "supported"
    assert found["low"] < found["effect"] < found["high"]
    assert judge(CLAIM["An ID image is worth more than an OOD one"], tmp_path)["effect"] == 2.5
    assert judge(CLAIM["An AID image is worth more than an ID one"], tmp_path)["effect"] == 0.5

    frame[frame["added"] != "OOD"].to_csv(tmp_path / "table03.csv", index=False)
    with pytest.raises(KeyError):  # a renamed row is missed, see test_every_claim_finds_its_rows
        CLAIM["OOD images harm"].effect(pd.read_csv(tmp_path / "table03.csv"))


def test_an_interval_that_leaves_out_0_is_not_written_as_if_it_had_it(tmp_path):
    _table07(tmp_path, (60, 61.5, 62), (58, 60, 61.2))  # ahead by 2.0, 1.5, 0.8
    write_claims(tmp_path, "demo")
    assert "| +1.4 (-0.1 to +2.9) |" in (tmp_path / "claims.md").read_text()
    _table07(tmp_path, (60, 61.5, 62), (58, 60, 61.15))
    write_claims(tmp_path, "demo")
    assert "| +1.45 (+0.02 to +2.88) |" in (tmp_path / "claims.md").read_text()


def test_the_caption_names_changed_settings(tmp_path):
    _table07(tmp_path, (60, 61, 62), (50, 51, 52.5))
    (tmp_path / "table07.json").write_text(json.dumps({"changed": ["tau = 1"]}))
    write_claims(tmp_path, "demo")
    assert "(profile demo with tau = 1; not comparable" in (tmp_path / "claims.md").read_text()


@pytest.mark.parametrize(
    "others, effect",
    [
        ({}, 2.0),
        ({AS_LONG_AS_SAU: 77.0}, 3.0),
        ({AT_SAUS_RATES: 77.0}, 2.0),
        ({AS_LONG_AS_SAU: 77.0, AT_SAUS_RATES: 79.5}, 0.5),
    ],
)
def test_sau_is_measured_against_the_better_of_as_many_updates(tmp_path, others, effect):
    """Of the largest ratio; the longer row counts in place of the plain one."""
    values = {"SAU": 80.0, SAME_IMAGES: 78.0} | others
    rows = [(r, m, 0, v + 9 * (r < 50)) for r in (10, 50) for m, v in values.items()]
    frame = pd.DataFrame(rows, columns=["r", "method", "seed", "overall"])
    frame.to_csv(tmp_path / "table14.csv", index=False)
    claim = CLAIM[
        "SAU is ahead of cross-entropy on the same real and synthetic images, as many updates (SAU's of four "
        "views); where measured, also at SAU's rates"
    ]
    assert judge(claim, tmp_path)["effect"] == effect


def test_files_say_what_they_were_made_of(tmp_path):
    write_claims(tmp_path, "demo")
    assert not list(tmp_path.iterdir())
    _table07(tmp_path, (60, 61, 62), (50, 51, 52.5))
    write_claims(tmp_path, "demo")
    text = (tmp_path / "claims.md").read_text()
    assert "| +9.8 " in text and "supported" in text and "not measured" in text
    record = json.loads((tmp_path / "claims.json").read_text())
    assert record["sources"] == {"table07": file_sha256(tmp_path / "table07.csv")}


def test_profiles_stand_side_by_side(tmp_path):
    side_by_side(tmp_path)
    assert not list(tmp_path.iterdir())
    for profile, values in {"demo": (60, 61, 62), "photos": (60,), "smoke": (0,)}.items():
        (tmp_path / profile).mkdir()
        _table07(tmp_path / profile, values, (50, 51, 52.5)[: len(values)])
        write_claims(tmp_path / profile, profile)
    side_by_side(tmp_path)
    _, head, _, first, *_ = (tmp_path / "claims.md").read_text().splitlines()[1:]
    assert [cell.strip() for cell in head.split("|")[1:-1]] == ["claim", "demo", "photos", "paper"]
    cells = [cell.strip() for cell in first.split("|")[1:-1]]
    assert cells[1].startswith("supported: +9.8 (") and cells[3] == "+13.2"
    assert cells[2] == "undecided: +10.0, one seed"


def test_the_committed_page_of_all_profiles_is_of_the_committed_verdicts(committed, tmp_path):
    for path in (committed / "figures").glob("*/claims.csv"):
        shutil.copytree(path.parent, tmp_path / path.parent.name)
    side_by_side(tmp_path)
    assert (tmp_path / "claims.md").read_text() == (committed / "figures/claims.md").read_text()


@pytest.mark.parametrize("profile", ["demo", "photos"])
def test_the_committed_claims_are_of_the_committed_tables(committed, profile, tmp_path):
    tables = committed / "figures" / profile
    shutil.copytree(tables, tmp_path / profile)
    write_claims(tmp_path / profile, profile)
    then, now = (pd.read_csv(folder / "claims.csv") for folder in (tables, tmp_path / profile))
    pd.testing.assert_frame_equal(then, now, atol=1e-4)
    for name in ("claims.md", "claims.tex"):
        assert (tmp_path / profile / name).read_text() == (tables / name).read_text()

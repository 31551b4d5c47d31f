"""Proves that every study is sound data: its rows are valid configs that differ, its claims name its rows, and torch is not needed."""

import subprocess
import sys

import pytest
from small_data import CONFIG

from mbcnet_rec.config import config_text, load_config
from mbcnet_rec.model.models import fit_widths
from mbcnet_rec.study.studies import DENSITIES, MBCNET, MODELS, STUDIES, density_name
from mbcnet_rec.study.tuning import with_overrides

PAPER = ("table3", "table5", "table6", "table7", "fig4", "fig5", "fig6", "fig7", "fig8", "fig9", "complexity")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("studies") / "run.toml"
    path.write_text(CONFIG.format(folder="rows"))
    return load_config(path)


def test_every_table_and_figure_of_the_paper_is_there():
    assert set(PAPER) <= set(STUDIES)
    assert [len(STUDIES[name].variants) for name in ("table3", "table7", "fig9")] == [9, 3 * len(DENSITIES), 16]
    for name, study in STUDIES.items():
        assert study.name == name and study.reference and study.question.endswith("?")


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_rows_are_valid_configs_that_differ(study, config):
    texts = {row.name: config_text(with_overrides(config, row.overrides, row.name)) for row in study.variants}
    assert len(set(texts.values())) == len(study.variants), "no two rows train the same"
    assert set(study.reference_rows) & set(texts) or not study.reference_rows
    assert set(study.reference_rows) <= {row.name for row in MODELS.values()} | set(texts)
    for claim in study.claims:
        assert claim.better != claim.worse
        for name in (claim.better, claim.worse):  # a row, or one output of it
            assert name in texts or name.rpartition("/")[0] in texts


def test_figures_are_the_paper_s():
    aucs = [row.paper[0] for row in MODELS.values() if row.paper]
    assert aucs == [0.7423, 0.7437, 0.7392, 0.7461, 0.7400, 0.7450, 0.7427, 0.7490, 0.7522]
    losses = [row.paper[1] for row in MODELS.values() if row.paper]
    assert losses == [0.2894, 0.2917, 0.2911, 0.2872, 0.2906, 0.2871, 0.2891, 0.2880, 0.2866]
    rows = {row.name: row.paper for row in STUDIES["table6"].variants}
    assert rows["w/o EFGC"] == (0.7445, 0.2888, 0.7548, 0.2839) and rows["MBCnet"] == MBCNET.paper
    rows = {row.name: row.paper for row in STUDIES["table7"].variants}
    assert rows[density_name("MBCnet", 40)] == (0.6015,) and rows[density_name("DNN", 100)] == (0.7423,)
    # what the paper says of its own tables holds of the figures typed in here
    for name in PAPER:
        printed = {row.name: row.paper for row in STUDIES[name].variants if row.paper}
        for claim in STUDIES[name].claims:
            if claim.better in printed and claim.worse in printed:
                assert printed[claim.better][0] > printed[claim.worse][0], claim.text


def test_losses_has_each_reading_of_either_loss_from_0_to_1(config):
    losses = [with_overrides(config, row.overrides, row.name).model.mbcnet for row in STUDIES["losses"].variants]
    assert {each.top_activation for each in losses} == {"none"}
    for threshold, latents in ((pytest.approx(0.693147), "raw"), ("base_rate", "unit")):
        alpha = {
            c.coteaching.weight for c in losses if c.coteaching.threshold == threshold and not c.differentiation.weight
        }
        beta = {
            c.differentiation.weight for c in losses if c.differentiation.latents == latents and not c.coteaching.weight
        }
        assert {0.01, 0.1, 1.0} <= alpha and {0.01, 0.1, 1.0} <= beta
    assert any(c.coteaching.weight == c.differentiation.weight == 0 for c in losses)


def test_table7_drops_positives_of_training_rows(config):
    row = next(row for row in STUDIES["table7"].variants if row.name == density_name("DCNv2", 20))
    changed = with_overrides(config, row.overrides, "row")
    assert changed.data.drop_positives == pytest.approx(0.8) and changed.model.kind == "dcnv2"


def test_widths_that_the_config_leaves_open_are_those_of_its_mbcnet(config):
    fitted = fit_widths(config.model)
    assert fitted.dnn == config.model.dnn, "this one it names"
    assert fitted.wide_deep.hidden == (32, 16, 16, 8), "the deep branch's and the top's layers in a row"
    assert fitted.dcnv2.hidden == config.model.mbcnet.deep.hidden
    assert fitted.efgc.branch_dim == 16 and fitted.efgc.top == (16, 8)
    assert fitted.mbcnet == config.model.mbcnet
    assert fit_widths(fitted) == fitted


def test_the_list_needs_no_torch():
    code = "import sys, mbcnet_rec.study.studies; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""Clusters: presets and TOML are read, every preset says its sources, and what is not a machine is refused with the fix."""

import pytest

from data.errors import InputError
from sharding.plan.cluster import PRESETS, default_cluster, preset_names, read_cluster


def test_presets_have_the_data_sheets_figures():
    assert set(preset_names()) == {"a100-40g", "a100-80g", "h100-80g", "h200", "b200", "cpu"}
    h100, h200 = read_cluster("16x8:h100-80g"), read_cluster("h200")
    bandwidths = (h100.hbm_gb_per_second, h100.nvlink_gb_per_second, h100.network_gb_per_second)
    assert (h100.world_size, *bandwidths) == (128, 3350, 450, 50)
    assert h200.hbm_gib > 1.7 * h100.hbm_gib and h200.hbm_gb_per_second == 4800
    assert str(h100) == "16x8:h100-80g" and read_cluster(str(h100)) == h100


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("16x8:h9000", "wanted HOSTSxDEVICES:KIND such as 16x8:h100-80g; KIND is one of a100-40g"),
        ("16:h200", "--cluster '16:h200': wanted HOSTSxDEVICES:KIND"),
        ("0x8:h200", "--cluster '0x8:h200': hosts = 0: wanted 1 or more"),
        ("16x8", "--cluster '16x8': wanted HOSTSxDEVICES:KIND"),
        ("99999x8:h200", "wanted at most 65,536"),
        ("1x1:absent.toml", "no such file"),
    ],
)
def test_what_is_no_cluster_is_refused(text, said):
    with pytest.raises(InputError) as caught:
        read_cluster(text)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_toml_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text((PRESETS / "h200.toml").read_text().replace("ddr_gib = 1900", "ddr_gib = -5"))
    with pytest.raises(InputError, match=r"ddr_gib = -5.0: wanted more than 0"):
        read_cluster(f"2x4:{path}")
    path.write_text((PRESETS / "h200.toml").read_text().replace("hbm_gib = 139.8", "hbm_gib = 100"))
    mine = read_cluster(f"2x4:{path}")
    assert (mine.hosts, mine.devices_per_host, mine.hbm_gib) == (2, 4, 100)
    assert mine.fingerprint() != read_cluster("2x4:h200").fingerprint()


def test_the_default_is_equal_on_every_rank_and_lends_16_gib():
    cluster = default_cluster(4, 2, "cpu")
    assert (cluster.hosts, cluster.ddr_bytes) == (2, 16 * 2**30)
    assert default_cluster(8, 8, "cuda").hbm_gib > 79

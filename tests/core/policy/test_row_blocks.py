"""Blocks of rows: their sizes by hand, and what a simulation sees of them."""

from luthier.policy.row_blocks import blocks_of, first_blocks_for, logits_rows


def test_a_block_of_logits_is_as_large_as_suits_the_device():
    # 32 MiB of fp32 logits over 1,024 tokens are 8,192 rows; a GPU, or what is taken for one, has 256 MiB.
    assert logits_rows(1024, "cpu") == 8192
    assert logits_rows(1024, "cuda") == logits_rows(1024, "xpu") == 65536
    assert logits_rows(1 << 40, "cpu") == 1


def test_blocks_cover_all_rows():
    assert blocks_of(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert blocks_of(2, 3) == [slice(0, 2)]
    assert blocks_of(0, 3) == []


def test_a_simulation_runs_the_first_block_of_the_device_that_it_is_for():
    with first_blocks_for("cuda"):
        assert logits_rows(1024, "cpu") == 65536
        assert blocks_of(7, 3) == [slice(0, 3)]
        assert blocks_of(2, 3) == [slice(0, 2)]
        with first_blocks_for("cpu"):
            assert logits_rows(1024, "cuda") == 8192
        assert logits_rows(1024, "cpu") == 65536
    assert blocks_of(7, 3)[-1] == slice(6, 7)
